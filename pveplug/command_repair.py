# SPDX-License-Identifier: Apache-2.0
"""``pveplug repair``: undo by hand what dead jobs have left; docs/repair.md."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from typing import Any, Final

from pveplug.errors import PveplugError
from pveplug.journal import VmBusyError
from pveplug.node import Node, load_node
from pveplug.pve_local import PveLocal
from pveplug.repair import Repaired, candidates, dead_sockets, repair_vm

EX_OK: Final = 0
EX_LEFT: Final = 1
EX_BUSY: Final = 75
_HIGHEST: Final = 999_999_999
"""PVE's own bound."""


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "repair",
        help=summary,
        description="Undo what jobs that died have left on this node's VMs: in QEMU, a "
        "frozen guest, a lock, scratch images and volumes, a VM half restored. Nothing "
        "of anybody else's is touched, nor a VM that a job is working on. Runs as root "
        "on the node and needs no credential.",
        epilog="Exit status: 0 nothing is left; 1 something is, and a line says what; "
        "75 a job is working on the VM. With --dry-run, 1 if anything would be done.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--vmid", type=_vmid, metavar="N", help="this VM")
    which.add_argument(
        "--all", action="store_true", help="every VM that has something of ours"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, change nothing"
    )
    parser.add_argument(
        "--scratch-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="also look for scratch images here (a job's scratch_dir); may be repeated",
    )


def _vmid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _HIGHEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a VM")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Repair; returns the exit status."""
    # What is logged is said in the lines below, too.
    logger, quiet = logging.getLogger("pveplug"), logging.NullHandler()
    logger.addHandler(quiet)
    logger.propagate = False
    try:
        return asyncio.run(_Repair(load_node(), arguments).run())
    finally:
        logger.propagate = True
        logger.removeHandler(quiet)


class _Repair:
    def __init__(self, node: Node, arguments: argparse.Namespace) -> None:
        self._node = node
        self._local = PveLocal(node)
        self._vmid: int | None = arguments.vmid
        self._dry: bool = arguments.dry_run
        self._dirs: list[str] = [os.path.abspath(d) for d in arguments.scratch_dir]
        self._did = self._left = self._busy = 0

    async def run(self) -> int:
        if self._vmid is not None:
            await self._one(self._vmid)
        else:
            await self._all()
        return self._end()

    async def _all(self) -> None:
        vmids, failed = await candidates(self._node, self._local, self._dirs)
        for vmid in vmids:
            await self._one(vmid)
        for vmid, why in failed.items():
            self._say(f"VM {vmid}: left: {why}")
            self._left += 1
        for path in dead_sockets(self._node):
            if not self._dry:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            self._say(f"removed {path}")
            self._did += 1

    async def _one(self, vmid: int) -> None:
        found = Repaired()
        try:
            found = await repair_vm(
                self._node, self._local, vmid, scratch_dirs=self._dirs, dry=self._dry
            )
        except VmBusyError as error:
            self._busy += 1
            self._say(f"{error}")
        except PveplugError as error:
            self._left += 1
            self._say(f"{error}")
        for text in found.did:
            self._say(f"VM {vmid}: {text}")
        for text in found.left:
            self._say(f"VM {vmid}: left: {text}")
        self._did += len(found.did)
        self._left += len(found.left)

    def _say(self, text: str) -> None:
        head = "dry run: " if self._dry else ""
        sys.stdout.write(f"{head}{' '.join(text.split())}\n")
        sys.stdout.flush()

    def _end(self) -> int:
        would = "would be undone, nothing was changed" if self._dry else "undone"
        if self._did or self._left or self._busy:
            things = f"{self._did} thing{'' if self._did == 1 else 's'} {would}"
            self._say(f"{things}; {self._left} left; {self._busy} with a running job")
        elif self._vmid is not None:
            self._say(f"VM {self._vmid}: nothing of ours is left")
        else:
            self._say("nothing of ours is left on this node")
        if self._left or (self._dry and self._did):
            return EX_LEFT
        return EX_BUSY if self._busy else EX_OK
