# SPDX-License-Identifier: Apache-2.0
"""Making an overlay stand alone, where the overlay's storage is the disk's own.

Proxmox VE moves no disk to where it is. There QEMU's ``block-stream`` copies what is
missing from the backing file into the overlay while the guest writes, then cuts the
link; of a VM that doesn't run, ``qemu-img rebase`` does.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

from pveplug.blockgraph import find_disks
from pveplug.cleanup import query_graph
from pveplug.errors import JobError, PveplugError
from pveplug.ir.record import LandedDisk
from pveplug.node import Node
from pveplug.pve_local import PveLocal, run_long
from pveplug.qmp import qmp_session
from pveplug.units import KiB, human

POLL_S: Final = 1.0
_HEADER: Final = struct.Struct(">4sIQ44xI")
"""Magic, version, backing_file_offset, … nb_snapshots."""
_MAGIC: Final = b"QFI\xfb"


def job_id(key: str) -> str:
    """Return the id of our block job on a disk."""
    return f"ph-ir-{key}"


def stands_alone(path: str) -> bool:
    """Whether a qcow2 image has no backing file (qcow2 specification, "Header").

    Raises:
        OSError: it can't be read, or is no qcow2 image.
    """
    return not _header(path)[0]


def has_snapshots(path: str) -> bool:
    """Whether a qcow2 image has internal snapshots.

    Raises:
        OSError: it can't be read, or is no qcow2 image.
    """
    return bool(_header(path)[1])


def _header(path: str) -> tuple[int, int]:
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    magic, _version, backing, snapshots = _HEADER.unpack(
        head.ljust(_HEADER.size, b"\0")
    )
    if magic != _MAGIC:
        raise OSError(f"{path} is no qcow2 image")
    return backing, snapshots


async def make_independent(
    node: Node,
    local: PveLocal,
    vmid: int,
    disk: LandedDisk,
    bwlimit: int,
    on_line: Callable[[str], None],
) -> None:
    """Copy what an overlay lacks into it, online where the VM runs.

    Args:
        bwlimit: KiB/s, 0 is unlimited.

    Raises:
        PveplugError: it still depends on its backing file; nothing is lost.
    """
    path = await local.volume_path(disk.overlay)
    if await asyncio.to_thread(has_snapshots, path):
        # QEMU cuts the link for all of the image but copies for the active layer: what
        # a snapshot has from the backing file would read as zeroes from then on.
        raise JobError(
            "the VM has snapshots, which depend on what has landed.",
            vm=str(vmid),
            disk=disk.key,
            phase="migrate",
            remedy=f"delete them (qm listsnapshot {vmid}, qm delsnapshot), then "
            f"pveplug ir migrate --vmid {vmid}.",
        )
    if local.vm_running(vmid) is None:
        argv = [node.qemu_img, "rebase", "-p", "-b", ""]
        await run_long([*argv, path], on_line=on_line)
    else:
        await _stream(node, vmid, disk, bwlimit, on_line)
    if not await asyncio.to_thread(stands_alone, path):
        raise JobError(
            "the overlay still has a backing file.",
            vm=str(vmid),
            disk=disk.key,
            phase="migrate",
            remedy=f"pveplug ir migrate --vmid {vmid} tries again.",
        )


async def _stream(
    node: Node,
    vmid: int,
    disk: LandedDisk,
    bwlimit: int,
    on_line: Callable[[str], None],
) -> None:
    monitor = node.qmp_socket(vmid)
    name = job_id(disk.key)
    async with qmp_session(monitor) as qmp:
        jobs = {job["id"]: job for job in await qmp.execute("query-jobs")}
        if name in jobs and jobs[name]["status"] == "concluded":
            # Of a keeper that ended: it could cancel its job, not dismiss it.
            await qmp.execute("job-dismiss", {"id": jobs.pop(name)["id"]})
        if name not in jobs:
            graph = await query_graph(qmp)
            found = find_disks(graph, {disk.key: disk.overlay}).get(disk.key)
            if found is None:
                raise JobError(
                    "the VM runs without it.",
                    vm=str(vmid),
                    disk=disk.key,
                    phase="migrate",
                    remedy="put the drive back, or discard the recovery.",
                )
            await qmp.execute(
                "block-stream",
                {
                    "job-id": name,
                    "device": found.image,
                    "speed": bwlimit * KiB,
                    "auto-dismiss": False,
                },
            )
    try:
        await _followed(monitor, vmid, disk.key, on_line)
    except asyncio.CancelledError:
        # What was copied stays; the next keeper goes on with the rest.
        async with qmp_session(monitor) as qmp:
            await qmp.execute("job-cancel", {"id": name})
        raise


async def _followed(
    monitor: str, vmid: int, key: str, on_line: Callable[[str], None]
) -> None:
    """Wait for our job on a disk; short sessions, for PVE needs the monitor, too."""
    name = job_id(key)
    while True:
        async with qmp_session(monitor) as qmp:
            jobs = {job["id"]: job for job in await qmp.execute("query-jobs")}
            job = jobs.get(name)
            if job is None:
                return  # somebody else dismissed it: the image tells
            if job["status"] == "concluded":
                await qmp.execute("job-dismiss", {"id": name})
                if job.get("error"):
                    raise PveplugError(f"VM {vmid} {key}: QEMU: {job['error']}")
                return
        done, total = job["current-progress"], job["total-progress"]
        on_line(f"copied {human(done)} of {human(total)}")
        await asyncio.sleep(POLL_S)


def same_place(disk: LandedDisk) -> bool:
    """Whether a disk's overlay is where, and as, the disk shall be."""
    storage = disk.overlay.partition(":")[0]
    return storage == disk.storage and disk.form == "qcow2"
