# SPDX-License-Identifier: Apache-2.0
"""Moving a disk to its storage by PVE, so that a cut move can be made again.

A keeper that is killed must not take ``qm`` with it: killed after QEMU has switched to
the new volume, PVE's configuration would still name the old one, and the next start
would lose what was written between. So ``qm`` prints to a file, holds a lock, and the
next keeper waits for it. Where ``qm`` died, too, it leaves a mirror job in QEMU and a
volume nobody uses; what was asked for is written down before, and both are taken away.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from pveplug.errors import JobError, PveplugError, QmpError, TransportError
from pveplug.ir.record import LandedDisk, Recovery
from pveplug.node import Node
from pveplug.pve_local import PveLocal
from pveplug.qmp import VmGoneError, qmp_session

log = logging.getLogger(__name__)

INTENT: Final = "moving.json"
LOCK: Final = "move.lock"
OUTPUT: Final = "move.log"
POLL_S: Final = 0.5
JOB_END_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Intent:
    """A move that was begun: of which disk, where to, and what was there before."""

    key: str
    storage: str
    before: tuple[str, ...]


async def move(
    node: Node,
    local: PveLocal,
    recovery: Recovery,
    disk: LandedDisk,
    bwlimit: int,
    on_line: Callable[[str], None],
) -> None:
    """Move a disk as PVE does, online where the VM runs; ``bwlimit`` in KiB/s.

    Raises:
        PveplugError: the disk stays where it was.
    """
    vmid = recovery.vmid
    async with _moving(recovery) as lock:
        _write(
            recovery, Intent(disk.key, disk.storage, await _there(local, disk, vmid))
        )
        with local.keeping(lock):
            await local.move_disk(
                vmid,
                disk.key,
                disk.storage,
                form=disk.form,
                bwlimit=bwlimit,
                on_line=on_line,
                output=recovery.folder / OUTPUT,
            )
        _forget(recovery)


async def clear_cut_move(node: Node, local: PveLocal, recovery: Recovery) -> None:
    """Take away what a move has left whose keeper was killed; waits for its ``qm``.

    Raises:
        JobError: the VM runs, or may have run, from the new volume and PVE doesn't
            know; nothing was touched.
        PveplugError: it could not be looked at, or taken away.
    """
    intent = _read(recovery)
    if intent is None:
        return
    async with _moving(recovery):
        config = (await local.config(recovery.vmid)).values
        new = [
            volid
            for volid in await _volumes(local, intent.storage, recovery.vmid)
            if volid not in intent.before
            and not any(volid in value for value in config.values())
        ]
        paths = {await local.volume_path(volid): volid for volid in new}
        asked = False
        if local.vm_running(recovery.vmid) is not None:
            monitor = node.qmp_socket(recovery.vmid)
            with contextlib.suppress(VmGoneError):
                await _end_job(monitor, intent.key)
                await _check_unused(monitor, recovery.vmid, intent.key, paths)
                await _drop_nodes(monitor, paths)
                asked = True
        if new and not asked:
            # Had PVE been killed at the very end of the move, the guest would have run
            # from there, and nobody is left to ask. It is not ours to throw away.
            raise JobError(
                f"a move was cut, and the VM has stopped since: {', '.join(new)} may "
                "hold the guest's last writes.",
                vm=str(recovery.vmid),
                disk=intent.key,
                phase="migrate",
                remedy=f"start the VM (qm start {recovery.vmid}); if it is right, free "
                f"that volume (pvesm free {new[0]}) and run pveplug ir migrate --vmid "
                f"{recovery.vmid}. If its last writes are missing, put the volume in "
                f"the place of {intent.key} in its configuration first.",
            )
        for volid in new:
            log.info("ir-cut-move vm=%s frees=%s", recovery.vmid, volid)
            await local.free_volume(volid)
        _forget(recovery)


async def _there(local: PveLocal, disk: LandedDisk, vmid: int) -> tuple[str, ...]:
    return tuple(await _volumes(local, disk.storage, vmid))


async def _volumes(local: PveLocal, storage: str, vmid: int) -> list[str]:
    """Return the volumes of a VM on a storage."""
    named = re.compile(rf"(?:^|[:/])vm-{vmid}-disk-\d+")
    return [volid for volid in await local.volumes(storage) if named.search(volid)]


# --- in QEMU --------------------------------------------------------------------------


async def _end_job(monitor: str, key: str) -> None:
    """End PVE's mirror of a disk, which nobody looks after any more."""
    names = (f"mirror-{key}", f"drive-{key}")
    async with asyncio.timeout(JOB_END_S):
        while True:
            async with qmp_session(monitor) as qmp:
                jobs = await qmp.execute("query-jobs")
                mine = [job for job in jobs if job["id"] in names]
                if not mine:
                    return
                for job in mine:
                    done = job["status"] == "concluded"
                    what = "job-dismiss" if done else "block-job-cancel"
                    named = {"id": job["id"]} if done else {"device": job["id"]}
                    if not done:
                        named["force"] = True
                    with contextlib.suppress(QmpError):
                        await qmp.execute(what, named)
            await asyncio.sleep(POLL_S)


async def _nodes(monitor: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    async with qmp_session(monitor) as qmp:
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        blocks = await qmp.execute("query-block")
    return list(nodes), list(blocks)


async def _check_unused(
    monitor: str, vmid: int, key: str, paths: dict[str, str]
) -> None:
    """See that the guest isn't on the new volume already.

    PVE notes a finished move in the configuration only after QEMU has switched.
    """
    _, blocks = await _nodes(monitor)
    for block in blocks:
        image = block.get("inserted", {}).get("image", {})
        if volid := _named(str(image.get("filename", "")), paths):
            raise JobError(
                f"the guest runs from {volid}, which its configuration doesn't name: "
                "PVE was killed at the end of a move.",
                vm=str(vmid),
                disk=key,
                phase="migrate",
                remedy=f"put {volid} in the place of the disk's volume in "
                f"/etc/pve/qemu-server/{vmid}.conf, then pveplug ir migrate --vmid "
                f"{vmid}.",
            )


async def _drop_nodes(monitor: str, paths: dict[str, str]) -> None:
    """Close the new volumes in QEMU: the format's node first, then the file's."""
    nodes, _ = await _nodes(monitor)
    mine = [node for node in nodes if _named(str(node.get("file", "")), paths)]
    mine.sort(key=lambda node: node["drv"] == "file")
    async with qmp_session(monitor) as qmp:
        for node in mine:
            with contextlib.suppress(QmpError):
                await qmp.execute("blockdev-del", {"node-name": node["node-name"]})


def _named(file: str, paths: dict[str, str]) -> str:
    """Return the volume that QEMU means by a file's name, plain or ``json:``."""
    for path, volid in paths.items():
        if file == path or json.dumps(path) in file:
            return volid
    return ""


# --- what is written down -------------------------------------------------------------


@contextlib.asynccontextmanager
async def _moving(recovery: Recovery) -> AsyncIterator[int]:
    """Be the one that moves; programs that inherit the descriptor are, too."""
    place = recovery.folder / LOCK
    try:
        fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TransportError(f"cannot open {place}: {error.strerror}") from error
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(POLL_S)
            else:
                break
        yield fd
    finally:
        os.close(fd)


def _write(recovery: Recovery, intent: Intent) -> None:
    place = recovery.folder / INTENT
    values = {"key": intent.key, "storage": intent.storage, "before": intent.before}
    try:
        place.write_text(json.dumps(values), encoding="utf-8")
    except OSError as error:
        raise TransportError(f"cannot write {place}: {error.strerror}") from error


def _read(recovery: Recovery) -> Intent | None:
    try:
        text = (recovery.folder / INTENT).read_text(encoding="utf-8")
        values = json.loads(text)
        return Intent(values["key"], values["storage"], tuple(values["before"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PveplugError(
            f"{recovery.folder / INTENT} can't be read: {error}"
        ) from None


def _forget(recovery: Recovery) -> None:
    with contextlib.suppress(OSError):
        (recovery.folder / INTENT).unlink()
