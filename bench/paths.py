# SPDX-License-Identifier: Apache-2.0
"""The product's data paths, put together as its engines do, without PVE around them.

Backup: scan, edges, read, zero test, digests, qcow2 layout, PTCOMM frames. Restore:
PTCOMM packets, qcow2, digests, owners of a chain, zero test, NBD. With every feature
that is on by default; what the engines add is the snapshot before and the papers after.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pveplug.bacula import receive
from pveplug.bacula_files import FileInfo, IncomingFile, OutgoingFile
from pveplug.bacula_pipe import PtcommPipe
from pveplug.diskstream import DiskStream, FileSink, RateLimit, read_edges, scan
from pveplug.images.chain import JobRecord, backing_name
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.edges import Edges, EdgesWriter
from pveplug.images.manifest import DiskEntry, Manifest
from pveplug.images.qcow2_writer import Qcow2StreamWriter
from pveplug.leafstore import LeafStore
from pveplug.nbd.client import NbdClient, UnixAddress, connect
from pveplug.nbd.source import READERS
from pveplug.proto import ptcomm
from pveplug.proto.ptcomm import Packet
from pveplug.proto.ptcomm_words import Stat, Times
from pveplug.units import CLUSTER

UUID = "1a2b3c4d-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Disk:
    """One disk to be backed up.

    Attributes:
        context: of a dirty bitmap; None for a Full.
        parent: the job it builds on, with a context.
    """

    socket: str
    key: str = "scsi0"
    context: str | None = None
    parent: str | None = None


class Discard(FileSink):
    """A sink without a pipe."""

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        pass


@dataclass
class Opened:
    """A disk between its scan and its end."""

    disk: Disk
    client: NbdClient
    clusters: ClusterMap
    stream: DiskStream
    digest: DigestWriter
    root: str = ""

    def entry(self) -> DiskEntry:
        """What the job's manifest says of it, once it is sent."""
        disk = self.disk
        return DiskEntry(
            key=disk.key,
            size=self.clusters.size,
            backing=backing_name(disk.parent, disk.key) if disk.parent else None,
            digest_root=self.root,
            data_bytes=self.clusters.data_bytes,
            zero_bytes=self.clusters.zero_bytes,
        )


@asynccontextmanager
async def opened(
    disks: Sequence[Disk], job: str = "bench.2026-01-01_00.00.00_01"
) -> AsyncIterator[list[Opened]]:
    """Connect to disks and scan them, with both digests ready."""
    limit = RateLimit(0)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        leaves = LeafStore(folder).vm(100, UUID, "bench")
        found = []
        for disk in disks:
            contexts = ["base:allocation", *([disk.context] if disk.context else [])]
            client = await connect(
                UnixAddress(disk.socket), contexts=contexts, readers=READERS
            )
            stack.push_async_callback(client.aclose)
            clusters = await scan(client, context=disk.context, known=client.size)
            digest = DigestWriter(clusters, overlay=disk.parent is not None)
            recording = leaves.record(
                *(disk.key, clusters), job=job, level="F", parent=None, began=0
            )
            assert recording is not None
            stack.callback(recording.drop)
            stream = DiskStream(
                client,
                clusters,
                backing=backing_name(disk.parent, disk.key) if disk.parent else None,
                trim=False,
                limit=limit,
                digest=digest,
                leaves=recording,
            )
            stack.push_async_callback(stream.aclose)
            found.append(Opened(disk, client, clusters, stream, digest))
        yield found


async def send(one: Opened, out: FileSink) -> None:
    """Send one disk's image."""
    await one.stream.send(out)
    one.root = one.digest.finish()[1]


async def read_ends(found: Sequence[Opened]) -> bytes:
    """Read the ends of all disks, which go before the images; return the file."""
    writer, limit = EdgesWriter(), RateLimit(0)
    for one in found:
        writer.begin(one.disk.key, one.clusters.size)
        disks = len(found)
        await read_edges(one.client, one.clusters, writer, limit, disks=disks)
    content = writer.finish()
    for key, disk in Edges.decode(content).disks.items():
        next(one for one in found if one.disk.key == key).stream.hold(disk.runs)
    return content


async def backup(disks: Sequence[Disk], *, ahead: int = 2) -> list[Opened]:
    """Back disks up into standard output, one after the other, as a job does."""
    nobody, _open = os.pipe()
    pipe = PtcommPipe(nobody, os.dup(1))
    async with opened(disks) as found:
        ends = await read_ends(found)
        file = OutgoingFile(pipe, FileInfo("edges.bin", len(ends)), False)
        await file.write(0, ends)
        await file.finish()
        for number, one in enumerate(found):
            for other in found[number : number + ahead]:
                other.stream.prefetch()
            info = FileInfo(f"{one.disk.key}.qcow2", one.stream.file_size)
            out = OutgoingFile(pipe, info, True)
            await send(one, out)
            await out.finish()
        await pipe.written()
    pipe.close()
    return found


class StoredFile(FileSink):
    """A sink that keeps an image as bacula-fd gives it back: ``D`` of 64 KiB each.

    In two files, of which the first has the image's first cluster. That holds the name
    of the backing file, all in which two increments of the same bytes differ.
    """

    def __init__(self, opening: Path, rest: Path) -> None:
        self._opening, self._rest = opening.open("wb"), rest.open("wb")
        self._at = 0
        self._opening.write(ptcomm.command("DATA"))

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        file = self._opening if offset < CLUSTER else self._rest
        if offset != self._at:
            file.write(ptcomm.command(f"OFFSET:{offset}"))
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), CLUSTER):
                piece = view[at : at + CLUSTER]
                file.write(ptcomm.header(ptcomm.Status.DATA, len(piece)))
                file.write(piece)
            offset += len(view)
        self._at = offset

    def close(self) -> None:
        self._rest.write(ptcomm.END_OF_DATA)
        self._opening.close()
        self._rest.close()


class Delivery:
    """bacula-fd on standard input, which delivers images without asking for answers."""

    def __init__(self) -> None:
        self._pipe = PtcommPipe(os.dup(0), os.dup(1))
        self._unread: Packet | None = None

    async def receive(self) -> Packet:
        if self._unread is not None:
            packet, self._unread = self._unread, None
            return packet
        return await receive(self._pipe)

    def unread(self, packet: Packet) -> None:
        self._unread = packet

    def answer(self, text: str) -> None:
        """Nobody listens."""

    def refuse(self, text: str) -> None:
        raise SystemExit(text)

    async def image(self, name: str, size: int) -> IncomingFile:
        """Return the next image, accepted."""
        file = IncomingFile(self, name, Stat(size), Times(0, 0, 0))
        await file.accept()
        return file

    def close(self) -> None:
        self._pipe.close()


def manifest(job: str, entry: DiskEntry, parent: str | None) -> Manifest:
    """Return a job's manifest with one disk."""
    return Manifest(
        vmid=100,
        uuid=UUID,
        vm_name="bench",
        job=job,
        parent_job=parent,
        level="I" if parent else "F",
        started=int(time.time()),
        node="pve1",
        consistency="",
        config="",
        disks=(entry,),
    )


def image_size(record: JobRecord, entry: DiskEntry) -> int:
    """Return the length of a job's image, which its map and backing tell."""
    clusters = record.map(entry.key)
    assert clusters is not None
    return Qcow2StreamWriter(clusters, backing=entry.backing).file_size
