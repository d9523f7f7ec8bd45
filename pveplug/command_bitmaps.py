# SPDX-License-Identifier: Apache-2.0
"""``pveplug bitmaps``: list and drop the segments on VMs' disks; docs/cli.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pveplug.bitmaps import Found, drop_bitmaps, list_bitmaps
from pveplug.errors import PveplugError
from pveplug.node import load_node
from pveplug.pve_local import PveLocal
from pveplug.units import human

EX_OK, EX_UNAVAILABLE = 0, 69
_HEAD = ("VMID", "DISK", "CHAIN", "SEQ", "LEVEL", "KIND", "STATE", "DIRTY", "JOB")


def add_parser(commands: Any, summary: str) -> None:
    """Add ``bitmaps`` and its two actions."""
    parser = commands.add_parser(
        "bitmaps",
        help=summary,
        description="Look at the bitmaps of ours (ph-…) on the disks of this node's "
        "VMs, running or stopped, or remove them. Run it as root.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show them; changes nothing")
    listing.add_argument("--vmid", type=int, metavar="N", help="only this VM's")
    listing.add_argument("--json", action="store_true", help="for programs")
    drop = actions.add_parser(
        "drop",
        help="remove them: the next backup reads the disks whole",
        description="Remove the persistent bitmaps of a VM, which keep Proxmox VE from "
        "rolling it back. The next backup reads its disks whole.",
    )
    drop.add_argument("--vmid", type=int, metavar="N", required=True)
    which = drop.add_mutually_exclusive_group()
    which.add_argument(
        "--chain", metavar="C", help="only this chain's, persistent or volatile"
    )
    which.add_argument("--all", action="store_true", help="the volatile ones, too")
    drop.add_argument(
        "--dry-run", action="store_true", help="say what would be removed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the action and return the exit status."""
    if arguments.action == "list":
        return asyncio.run(_list(arguments.vmid, as_json=arguments.json))
    return asyncio.run(_drop(arguments.vmid, _chooser(arguments), arguments.dry_run))


def _chooser(arguments: argparse.Namespace) -> Callable[[Found], bool]:
    if arguments.chain:
        return lambda one: one.chain == arguments.chain
    if arguments.all:
        return lambda one: True
    return lambda one: one.bitmap.persistent


async def _list(vmid: int | None, *, as_json: bool) -> int:
    node = load_node()
    local = PveLocal(node)
    status = EX_OK
    found: list[Found] = []
    for number in [vmid] if vmid is not None else await local.vmids():
        try:
            found += await list_bitmaps(node, local, number)
        except PveplugError as error:  # the other VMs are shown all the same
            _remark(number, str(error))
            status = EX_UNAVAILABLE
    if as_json:
        json.dump([_row(one) for one in found], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(_table(found))
    return status


async def _drop(vmid: int, chosen: Callable[[Found], bool], dry_run: bool) -> int:
    node = load_node()
    local = PveLocal(node)
    if dry_run:
        found = [one for one in await list_bitmaps(node, local, vmid) if chosen(one)]
    else:
        found = await drop_bitmaps(
            node, local, vmid, chosen, remark=lambda text: _remark(vmid, text)
        )
    verb = "would remove" if dry_run else "removed"
    for one in found:
        sys.stdout.write(f"{verb} {one.bitmap.name} from {one.disk} ({one.volume})\n")
    if not found:
        sys.stdout.write(f"VM {vmid} has no such bitmap\n")
    return EX_OK


def _remark(vmid: int, text: str) -> None:
    where = "" if text.startswith("VM ") else f"VM {vmid}: "
    sys.stderr.write(f"pveplug: {where}{text}\n")


def _row(one: Found) -> dict[str, Any]:
    segment = one.segment
    return {
        "vmid": one.vmid,
        "disk": one.disk,
        "volume": one.volume,
        "name": one.bitmap.name,
        "chain": segment.chain if segment else None,
        "seq": segment.seq if segment else None,
        "level": segment.level if segment else None,
        "job": segment.job if segment else None,
        "persistent": one.bitmap.persistent,
        "state": one.state,
        "dirty_bytes": one.bitmap.count if one.counted else None,
    }


def _table(found: Sequence[Found]) -> str:
    if not found:
        return "no bitmaps of ours\n"
    rows = [_HEAD]
    for one in found:
        segment = one.segment
        rows.append(
            (
                str(one.vmid),
                one.disk,
                segment.chain if segment else "-",
                str(segment.seq) if segment else "-",
                segment.level if segment else "-",
                "persistent" if one.bitmap.persistent else "volatile",
                one.state,
                human(one.bitmap.count) if one.counted else "-",
                segment.job if segment else one.bitmap.name,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)
