# SPDX-License-Identifier: Apache-2.0
"""``pveplug ir status|migrate|discard|resume``: on the node, as root; docs/cli.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from typing import Any, Final

from pveplug.columns import age, aligned
from pveplug.errors import JobError, PveplugError, TransportError
from pveplug.ir.control import State, ask, start_keeper
from pveplug.ir.record import Record, Recovery, recoveries
from pveplug.ir.removal import discard
from pveplug.node import Node, load_node
from pveplug.units import human

EX_OK: Final = 0
EX_TROUBLE: Final = 1
EX_USAGE: Final = 2
POLL_S: Final = 1.0


def add_actions(actions: Any) -> None:
    """Add what is done on the node to the actions of ``pveplug ir``."""
    status = actions.add_parser(
        "status",
        help="show the recoveries of this node",
        description="Show the instant recoveries of this node: what has arrived, who "
        "serves it, what is wrong. Runs as root on the node.",
        epilog="Exit status: 0 all is well, or there is none; 1 one needs a hand.",
    )
    status.add_argument("--vmid", type=_vmid, metavar="N", help="only this VM")
    status.add_argument("--json", action="store_true", help="for programs")
    migrate = actions.add_parser(
        "migrate",
        help="move a recovered VM's disks to their storage now",
        description="Move the disks of a VM, all of whose data has arrived, to their "
        "storage while it runs, and end the recovery. Also after a move has failed.",
    )
    migrate.add_argument("--vmid", type=_vmid, required=True, metavar="N")
    migrate.add_argument(
        "--no-wait", action="store_true", help="say it and return; see `ir status`"
    )
    away = actions.add_parser(
        "discard",
        help="give a recovery up: the VM and all that its guest wrote go",
        description="Stop and destroy a VM under instant recovery, with everything its "
        "guest has written since it was started, and remove what has landed.",
    )
    away.add_argument("--vmid", type=_vmid, required=True, metavar="N")
    away.add_argument("--yes", action="store_true", help="don't ask")
    resume = actions.add_parser(
        "resume",
        help="serve a VM's disks again, after the node was rebooted, say",
        description="Start the process that serves a recovered VM's disks, unless it "
        "runs. What is still owed comes with the restore job, run again.",
    )
    resume.add_argument("--vmid", type=_vmid, required=True, metavar="N")


def _vmid(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a VM")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    node = load_node()
    match arguments.action:
        case "status":
            return asyncio.run(_status(node, arguments.vmid, as_json=arguments.json))
        case "migrate":
            waits = not arguments.no_wait
            return asyncio.run(_migrate(node, arguments.vmid, waits=waits))
        case "discard":
            if not arguments.yes and not _confirmed(node, arguments.vmid):
                return EX_USAGE
            asyncio.run(discard(node, arguments.vmid, _say))
            return EX_OK
    return asyncio.run(_resume(node, arguments.vmid))


def _confirmed(node: Node, vmid: int) -> bool:
    if Recovery(node, vmid).load() is None:
        return True  # which discard() will say
    if not sys.stdin.isatty():
        sys.stderr.write(
            f"pveplug: ir discard destroys VM {vmid} and all that its guest has "
            "written; give --yes\n"
        )
        return False
    sys.stdout.write(
        f"VM {vmid} and all that its guest has written since it was started will be "
        "destroyed. Type its id to go on: "
    )
    sys.stdout.flush()
    return sys.stdin.readline().strip() == str(vmid)


async def _status(node: Node, only: int | None, *, as_json: bool) -> int:
    shown: list[dict[str, object]] = []
    rows: list[tuple[str, ...]] = [
        ("VM", "PHASE", "HERE", "OF", "JOB", "KEEPER", "AGE", "BACKUP")
    ]
    notes: list[str] = []
    status = EX_OK
    for vmid in recoveries(node):
        if only not in (None, vmid):
            continue
        recovery = Recovery(node, vmid)
        try:
            record = recovery.load()
        except PveplugError as error:
            notes.append(f"VM {vmid}: {error}")
            shown.append({"vmid": vmid, "served": False, "trouble": str(error)})
            status = EX_TROUBLE
            continue
        if record is None:
            continue
        state, why = await _asked(recovery)
        trouble = state.trouble if state else why
        if trouble:
            notes.append(f"VM {vmid}: {trouble}")
            status = EX_TROUBLE
        rows.append(_row(record, state))
        shown.append(_shown(record, state, trouble))
        for disk in state.disks if state else []:
            if disk.moving:
                notes.append(f"VM {vmid} {disk.key}: {disk.moving}")
    if as_json:
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return status
    if len(rows) == 1 and not notes:
        _say("no instant recovery is under way on this node")
        return status
    for line in [*aligned(rows), *notes]:
        _say(line)
    return status


async def _asked(recovery: Recovery) -> tuple[State | None, str]:
    try:
        return await ask(recovery, "status"), ""
    except TransportError as error:
        return None, str(error)


def _row(record: Record, state: State | None) -> tuple[str, ...]:
    size = sum(disk.size for disk in record.disks)
    here = human(size - state.owed) if state else "-"
    phase = "not served" if state is None else state.phase
    if state is not None and state.paused:
        phase = "paused"
    return (
        str(record.vmid),
        phase,
        here,
        human(size),
        "delivers" if state is not None and state.feeding else "-",
        "serves" if state is not None else "none",
        age(max(int(time.time() - record.created), 0)),
        record.head,
    )


def _shown(record: Record, state: State | None, trouble: str) -> dict[str, object]:
    return {
        "vmid": record.vmid,
        "backup": record.head,
        "jobs": record.jobs,
        "created": record.created,
        "auto_migrate": record.auto_migrate,
        "served": state is not None,
        "trouble": trouble,
        "state": state.dump() if state else None,
    }


async def _migrate(node: Node, vmid: int, *, waits: bool) -> int:
    recovery = _there(node, vmid)
    state = await ask(recovery, "migrate")
    if state.owed:
        raise JobError(
            f"{human(state.owed)} of its data have not arrived.",
            vm=str(vmid),
            phase="migrate",
            remedy="run its restore job again; its disks can be moved when all is here "
            "(and then are, for that was noted now).",
        )
    if not waits:
        _say(f"VM {vmid}: its disks are being moved")
        return EX_OK
    last: dict[str, str] = {}
    while recovery.load() is not None:
        found, why = await _asked(recovery)
        if found is None:
            if recovery.load() is None:
                break
            raise TransportError(why)
        if found.trouble:
            sys.stderr.write(f"pveplug: VM {vmid}: {found.trouble}\n")
            return EX_TROUBLE
        for disk in found.disks:
            if disk.moving and last.get(disk.key) != disk.moving:
                last[disk.key] = disk.moving
                _say(f"VM {vmid} {disk.key}: {disk.moving}")
        await asyncio.sleep(POLL_S)
    _say(f"VM {vmid}: its disks are on their storage; nothing of the recovery is left")
    return EX_OK


async def _resume(node: Node, vmid: int) -> int:
    recovery = _there(node, vmid)
    state = await start_keeper(node, recovery)
    _say(
        f"VM {vmid}: its disks are served; "
        + (
            f"{human(state.owed)} are owed: run its restore job again"
            if state.owed
            else "all of its data is here"
        )
    )
    return EX_OK


def _there(node: Node, vmid: int) -> Recovery:
    recovery = Recovery(node, vmid)
    if recovery.load() is None:
        raise JobError(
            "no instant recovery of it is under way.",
            vm=str(vmid),
            phase="instant recovery",
            remedy="`pveplug ir status` lists them.",
        )
    return recovery


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
