# SPDX-License-Identifier: Apache-2.0
"""Sides that are whole paths of backup and restore."""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from bench import paths
from bench.paths import Disk
from pveplug.diskstream import RateLimit
from pveplug.images.chain import Chain, decode_objects
from pveplug.nbd.client import UnixAddress
from pveplug.restore_disk import DiskWriter


async def backup(*disks: str) -> None:
    """Back disks up into standard output; a disk is SOCKET or SOCKET,CONTEXT."""
    await paths.backup([_disk(number, text) for number, text in enumerate(disks)])


def _disk(number: int, text: str) -> Disk:
    at, _, context = text.partition(",")
    parent = "bench.2026-01-01_00.00.00_00" if context else None
    return Disk(at, f"scsi{number}", context or None, parent)


async def memory(*disks: str) -> None:
    """Do as ``backup`` does, then tell on stderr the most memory it took, in MiB."""
    await backup(*disks)
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith("VmHWM:"))
    sys.stderr.write(f"{int(line.split()[1]) / 1024:.1f}\n")


async def disks(how: str, *sockets: str) -> None:
    """Read disks with all that a backup does to them, ``parallel`` or ``serial``."""
    found = [_disk(number, text) for number, text in enumerate(sockets)]
    async with paths.opened(found) as streams:
        if how == "serial":
            for one in streams:
                await paths.send(one, paths.Discard())
        else:
            async with asyncio.TaskGroup() as tasks:
                for one in streams:
                    tasks.create_task(paths.send(one, paths.Discard()))


async def restore(objects: str, socket: str) -> None:
    """Write what comes on standard input, the images of a chain, to a volume."""
    records, problems = decode_objects(pickle.loads(Path(objects).read_bytes()))
    assert not problems
    chain = Chain(records)
    writer = DiskWriter("scsi0", chain=chain, zeroed=True, limit=RateLimit(0))
    await writer.open(UnixAddress(socket))
    bacula = paths.Delivery()
    for job in chain.jobs:
        entry = chain.disk(job, "scsi0")
        assert entry is not None
        size = paths.image_size(chain.record(job), entry)
        file = await bacula.image(f"{job}/scsi0.qcow2", size)
        await writer.receive(job, file, entry.digest_root, entry=entry)
        await file.done()
    await writer.finish()
    bacula.close()
