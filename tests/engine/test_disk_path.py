# SPDX-License-Identifier: Apache-2.0
"""A disk's whole path without QEMU or Bacula: NBD → image → NBD, and its failures."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pveplug.bacula_files import FileInfo, OutgoingFile
from pveplug.bacula_pipe import PtcommPipe
from pveplug.diskstream import (
    KEPT_BYTES,
    DiskStream,
    FileSink,
    RateLimit,
    give_back_unread,
    read_edges,
    read_ranges,
    scan,
)
from pveplug.errors import IntegrityError, NbdError, TransportError
from pveplug.images.chain import Chain, JobRecord
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.edges import Edges, EdgesWriter
from pveplug.images.manifest import DiskEntry, Manifest, backing_name
from pveplug.nbd.client import connect
from pveplug.proto.nbd_wire import Command
from pveplug.restore_disk import DiskWriter
from pveplug.units import CLUSTER, MiB
from tests.support.images import gpt
from tests.support.nbd_model import Manner, ModelServer, serving
from tests.support.pipe_ends import Ends, received

DIRTY = "qemu:dirty-bitmap:u"
BASE = "base:allocation"


class MemoryFile(FileSink):
    """What Bacula would keep of a file: pieces at offsets."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        self.pieces.append((offset, b"".join(buffers)))


class Given:
    """What Bacula gives back, cut anew."""

    def __init__(self, kept: MemoryFile, size: int, step: int = 65528) -> None:
        self.kept, self.size, self.step = kept, size, step

    async def data(self) -> AsyncIterator[tuple[int, memoryview]]:
        for offset, piece in self.kept.pieces:
            for at in range(0, len(piece), self.step):
                yield offset + at, memoryview(piece)[at : at + self.step]


async def received_and_finished(
    writer: DiskWriter, job: str, image: Given, root: str
) -> None:
    await writer.receive(job, image, root)
    await writer.finish()


def scribbled(size: int, seed: int, share: float) -> bytearray:
    rng = random.Random(seed)
    disk = bytearray(size)
    for at in range(0, size, CLUSTER):
        if rng.random() < share:
            length = min(CLUSTER, size - at)
            disk[at : at + length] = rng.randbytes(length)
    return disk


def allocation(disk: bytearray) -> list[tuple[int, int]]:
    return [
        (min(4096, len(disk) - at), 0 if any(disk[at : at + 4096]) else 3)
        for at in range(0, len(disk), 4096)
    ]


def dirty(before: bytes, now: bytes) -> list[tuple[int, int]]:
    return [
        (
            min(CLUSTER, len(now) - at),
            int(before[at : at + CLUSTER] != now[at : at + CLUSTER]),
        )
        for at in range(0, len(now), CLUSTER)
    ]


async def image_of(
    base: Path,
    disk: bytearray,
    *,
    before: bytes | None = None,
    parent: str | None = None,
    manner: Manner | None = None,
    trim: bool = False,
    held: list[tuple[int, int]] | None = None,
    seen: list[ModelServer] | None = None,
) -> tuple[MemoryFile, int, ClusterMap, str, DiskStream]:
    manner = manner or Manner()
    served: list[ModelServer] = [] if seen is None else seen

    def server() -> ModelServer:
        served.append(ModelServer(disk, manner))
        return served[-1]

    manner.contexts = {BASE: allocation(disk)}
    if before is not None:
        padded = before + bytes(max(0, len(disk) - len(before)))
        runs = dirty(padded[: len(disk)], bytes(disk))
        known = -(-len(before) // CLUSTER)
        manner.contexts[DIRTY] = runs[:known] + [(n, 0) for n, _ in runs[known:]]
    kept = MemoryFile()
    async with serving(str(base / "src"), server) as address:
        contexts = [BASE, *([DIRTY] if before is not None else [])]
        async with await connect(address, contexts=contexts) as client:
            clusters = await scan(
                client,
                context=DIRTY if before is not None else None,
                known=len(before or b""),
            )
            if trim:
                await give_back_unread(client, clusters)
            digest = DigestWriter(clusters, overlay=parent is not None)
            stream = DiskStream(
                client,
                clusters,
                backing=backing_name(parent, "scsi0") if parent else None,
                trim=trim,
                limit=RateLimit(0),
                digest=digest,
            )
            if held is not None:
                writer = EdgesWriter()
                writer.begin("scsi0", client.size)
                await read_ranges(client, clusters, held, writer, RateLimit(0))
                stream.hold(Edges.decode(writer.finish()).disks["scsi0"].runs)
            try:
                await stream.send(kept)
            finally:
                await stream.aclose()
            root = digest.finish()[1]
    return kept, stream.file_size, clusters, root, stream


def record(
    job: str, parent: str | None, size: int, clusters: ClusterMap, root: str, at: int
) -> JobRecord:
    entry = DiskEntry(
        key="scsi0",
        size=size,
        backing=backing_name(parent, "scsi0") if parent else None,
        digest_root=root,
    )
    manifest = Manifest(
        vmid=100,
        uuid="1a2b3c4d-0000-0000-0000-000000000000",
        vm_name="vm",
        job=job,
        parent_job=parent,
        level="I" if parent else "F",
        started=at,
        node="pve1",
        consistency="",
        config="",
        disks=(entry,),
    )
    return JobRecord(manifest, {"scsi0": clusters.to_bytes()})


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("owners", [True, False])
async def test_a_chain_of_images_becomes_the_disk_again(
    short_tmp: Path, zeroed: bool, owners: bool
) -> None:
    states = [
        scribbled(3 * MiB + 512, 1, 0.5),
        scribbled(3 * MiB + 512, 1, 0.5),
        scribbled(4 * MiB + 1024, 3, 0.4),
    ]
    states[1][CLUSTER * 3 : CLUSTER * 7] = bytes(CLUSTER * 4)
    states[1][CLUSTER * 9 : CLUSTER * 9 + 100] = b"x" * 100
    states[2][: len(states[1])] = states[1]
    states[2][5 * CLUSTER : 6 * CLUSTER] = random.Random(9).randbytes(CLUSTER)
    kept, records, parent, before = {}, [], None, None
    for number, state in enumerate(states):
        job = f"j.2026-01-01_00.00.0{number}_01"
        file, size, clusters, root, _ = await image_of(
            short_tmp, state, before=before, parent=parent
        )
        kept[job] = (file, size, root)
        records.append(record(job, parent, len(state), clusters, root, number))
        parent, before = job, bytes(state)
    if not owners:
        records = [JobRecord(r.manifest, None) for r in records]
    chain = Chain(records)
    truth = states[-1]
    rubbish = bytes(1) if zeroed else b"\xa5"
    target = bytearray(rubbish * (len(truth) + 3 * 512))
    async with (
        serving(
            str(short_tmp / "dst"), lambda: ModelServer(target, Manner())
        ) as address,
    ):
        writer = DiskWriter("scsi0", chain=chain, zeroed=zeroed, limit=RateLimit(0))
        await writer.open(address)
        for job, (file, size, root) in kept.items():
            await writer.receive(job, Given(file, size), root)
        assert writer.complete
        await writer.finish()
    assert target[: len(truth)] == truth
    assert not any(target[len(truth) :])


async def test_a_zero_cluster_travels_as_a_hole(short_tmp: Path) -> None:
    disk = bytearray(b"\1" * CLUSTER + bytes(CLUSTER) + b"\2" * CLUSTER)
    manner = Manner()
    kept, _, _, _, stream = await image_of(short_tmp, disk, manner=manner)
    assert stream.progress.zero == 0  # told by base:allocation, so never read
    manner = Manner(contexts={})
    async with serving(
        str(short_tmp / "s"), lambda: ModelServer(disk, manner)
    ) as address:
        async with await connect(address) as client:
            clusters = await scan(client, context=None, known=0)
            stream = DiskStream(
                client, clusters, backing=None, trim=False, limit=RateLimit(0)
            )
            kept = MemoryFile()
            await stream.send(kept)
            await stream.aclose()
    assert stream.progress.read == 3 * CLUSTER
    assert stream.progress.zero == CLUSTER
    assert not any(
        set(piece) == {0} for _, piece in kept.pieces if len(piece) >= CLUSTER
    )


@pytest.mark.parametrize(
    "held",
    [
        [(0, CLUSTER * 9), (CLUSTER * 40, 4 * MiB + 512)],
        [(0, 4 * MiB + 512)],
        [(CLUSTER * 20, CLUSTER * 21)],
        [],
    ],
)
async def test_an_image_whose_edges_were_read_before_is_the_same_and_read_once(
    short_tmp: Path, held: list[tuple[int, int]]
) -> None:
    disk = scribbled(4 * MiB + 512, 7, 0.6)
    before = bytearray(disk)
    for at in (0, 1, 5, 20, 21, 30, 62, 64):
        before[at * CLUSTER] ^= 1
    disk[5 * CLUSTER : 6 * CLUSTER] = bytes(CLUSTER)
    for parent, old in ((None, None), ("j.2026-01-01_00.00.01_01", bytes(before))):
        seen: list[ModelServer] = []
        ahead = await image_of(
            short_tmp,
            disk,
            before=old,
            parent=parent,
            trim=True,
            held=held,
            seen=seen,
        )
        plain = await image_of(short_tmp, disk, before=old, parent=parent, trim=True)
        assert laid_out(ahead[0], ahead[1]) == laid_out(plain[0], plain[1])
        assert ahead[3] == plain[3]
        assert ahead[4].progress == plain[4].progress
        assert ahead[4].progress.read == ahead[4].progress.total
        read, trimmed = (
            [
                (request.offset, request.offset + request.length)
                for request in seen[0].seen
                if request.command is command
            ]
            for command in (Command.READ, Command.TRIM)
        )
        clusters = ahead[2]
        wanted = [
            at // CLUSTER
            for run in clusters.data_runs()
            for at in range(run.offset, run.end, CLUSTER)
        ]
        assert touched(read) == wanted
        assert set(wanted) <= set(touched(trimmed))


def touched(ranges: list[tuple[int, int]]) -> list[int]:
    """The clusters of ranges, as often as they are in one."""
    return sorted(
        n for low, high in ranges for n in range(low // CLUSTER, -(-high // CLUSTER))
    )


def laid_out(kept: MemoryFile, size: int) -> bytes:
    file = bytearray(size)
    for offset, piece in kept.pieces:
        file[offset : offset + len(piece)] = piece
    return bytes(file)


async def test_ends_of_the_disk_and_its_partitions_are_read_once(
    short_tmp: Path,
) -> None:
    parts = ((MiB, 9 * MiB + 4096), (9 * MiB + 4096, 24 * MiB))
    disk = scribbled(28 * MiB + 512, 7, 1.0)
    disk[:CLUSTER] = gpt(512, *parts)
    model = ModelServer(disk, Manner(contexts={}))
    async with serving(str(short_tmp / "s"), lambda: model) as address:
        async with await connect(address) as client:
            clusters = await scan(client, context=None, known=0)
            writer = EdgesWriter()
            writer.begin("scsi0", client.size)
            await read_edges(client, clusters, writer, RateLimit(0), disks=2)
    read = [
        (request.offset, request.offset + request.length)
        for request in model.seen
        if request.command is Command.READ
    ]
    edges = Edges.decode(writer.finish()).disks["scsi0"]
    assert sum(run.length for run in edges.runs) < 8 * MiB
    held = touched([(run.offset, run.end) for run in edges.runs])
    assert touched(read) == held == sorted(set(held))
    for at in (0, 2 * MiB, 9 * MiB, 9 * MiB + 4096, 24 * MiB - 1, 28 * MiB + 511):
        assert at // CLUSTER in held
    for run in edges.runs:
        assert run.data() == disk[run.offset : run.end]


async def test_a_read_ahead_of_a_disk_begins_with_what_is_not_held(
    short_tmp: Path,
) -> None:
    """Its turn may be far off: nothing would be read meanwhile."""
    disk = scribbled(4 * MiB, 7, 1.0)
    model = ModelServer(disk, Manner(contexts={}))
    async with serving(str(short_tmp / "s"), lambda: model) as address:
        async with await connect(address) as client:
            clusters = await scan(client, context=None, known=0)
            stream = DiskStream(
                client, clusters, backing=None, trim=False, limit=RateLimit(0)
            )
            writer = EdgesWriter()
            writer.begin("scsi0", client.size)
            await read_ranges(client, clusters, [(0, MiB)], writer, RateLimit(0))
            stream.hold(Edges.decode(writer.finish()).disks["scsi0"].runs)
            before = len(model.seen)
            stream.prefetch()
            first = await stream._first
            assert first is not None
            assert first.offset == 0
            assert [request.offset for request in model.seen[before:]][:1] == [MiB]
            kept = MemoryFile()
            await stream.send(kept)
            await stream.aclose()
    assert stream.progress.read == 4 * MiB


async def test_a_failed_read_fails_the_image(short_tmp: Path) -> None:
    disk = scribbled(2 * MiB, 5, 1.0)

    def fail(command: Command, offset: int, length: int) -> int:
        inside = offset <= MiB < offset + length
        return 5 if command is Command.READ and inside else 0

    with pytest.raises(NbdError):
        await image_of(short_tmp, disk, manner=Manner(fail=fail))


async def test_a_failed_trim_fails_the_image(short_tmp: Path) -> None:
    def fail(command: Command, offset: int, length: int) -> int:
        return 5 if command is Command.TRIM else 0

    with pytest.raises(NbdError):
        await image_of(
            short_tmp, scribbled(MiB, 5, 1.0), manner=Manner(fail=fail), trim=True
        )


async def test_a_failed_write_never_completes_a_disk(short_tmp: Path) -> None:
    disk = scribbled(2 * MiB, 5, 1.0)
    file, size, clusters, root, _ = await image_of(short_tmp, disk)
    chain = Chain(
        [record("j.2026-01-01_00.00.00_01", None, 2 * MiB, clusters, root, 1)]
    )

    def fail(command: Command, offset: int, length: int) -> int:
        inside = offset <= MiB < offset + length
        return 28 if command is Command.WRITE and inside else 0

    target = bytearray(2 * MiB)
    async with serving(
        str(short_tmp / "d"), lambda: ModelServer(target, Manner(fail=fail))
    ) as address:
        writer = DiskWriter("scsi0", chain=chain, zeroed=True, limit=RateLimit(0))
        await writer.open(address)
        with pytest.raises(NbdError):
            await received_and_finished(writer, chain.head.job, Given(file, size), root)
        await writer.give_up()


async def test_an_image_that_is_cut_short_is_refused(short_tmp: Path) -> None:
    disk = scribbled(2 * MiB, 5, 1.0)
    file, size, clusters, root, _ = await image_of(short_tmp, disk)
    file.pieces.pop()
    chain = Chain(
        [record("j.2026-01-01_00.00.00_01", None, 2 * MiB, clusters, root, 1)]
    )
    async with serving(
        str(short_tmp / "d"), lambda: ModelServer(bytearray(2 * MiB), Manner())
    ) as a:
        writer = DiskWriter("scsi0", chain=chain, zeroed=True, limit=RateLimit(0))
        await writer.open(a)
        with pytest.raises(IntegrityError):
            await writer.receive(chain.head.job, Given(file, size), root)
        assert not writer.complete
        await writer.give_up()


async def test_a_changed_byte_is_found_by_the_digests(short_tmp: Path) -> None:
    disk = scribbled(2 * MiB, 5, 1.0)
    file, size, clusters, root, _ = await image_of(short_tmp, disk)
    at = next(i for i, (_, p) in enumerate(file.pieces) if len(p) > CLUSTER)
    offset, piece = file.pieces[at]
    file.pieces[at] = (offset, piece[:-1] + bytes([piece[-1] ^ 1]))
    chain = Chain(
        [record("j.2026-01-01_00.00.00_01", None, 2 * MiB, clusters, root, 1)]
    )
    async with serving(
        str(short_tmp / "d"), lambda: ModelServer(bytearray(2 * MiB), Manner())
    ) as a:
        writer = DiskWriter("scsi0", chain=chain, zeroed=True, limit=RateLimit(0))
        await writer.open(a)
        with pytest.raises(IntegrityError, match="digest"):
            await writer.receive(chain.head.job, Given(file, size), root)
        await writer.give_up()


async def test_a_member_out_of_order_is_refused_without_owners(short_tmp: Path) -> None:
    first = scribbled(MiB, 5, 1.0)
    second = bytearray(first)
    second[:CLUSTER] = bytes(b"\7" * CLUSTER)
    one, two = "j.2026-01-01_00.00.00_01", "j.2026-01-01_00.00.01_02"
    file, size, _, root, _ = await image_of(
        short_tmp, second, before=bytes(first), parent=one
    )
    async with serving(
        str(short_tmp / "d"), lambda: ModelServer(bytearray(MiB), Manner())
    ) as address:
        writer = DiskWriter("scsi0", chain=None, zeroed=True, limit=RateLimit(0))
        await writer.open(address)
        with pytest.raises(IntegrityError, match=one):
            await writer.receive(two, Given(file, size), root)
        await writer.give_up()


async def test_the_rate_limit_makes_readers_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("pveplug.diskstream.asyncio.sleep", sleep)
    limit = RateLimit(1000, clock=lambda: 5.0)
    for _ in range(4):
        await limit.spend(500)
    assert slept == pytest.approx([0.5, 1.0, 1.5, 2.0])


class LateFile(MemoryFile):
    """Copies what it is given only when it is asked whether that may be changed."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.under_way: deque[tuple[int, memoryview]] = deque()
        self.mark = self.most = 0

    async def begin(self, offset: int, view: memoryview) -> int:
        self.under_way.append((offset, view))
        self.most = max(self.most, sum(len(view) for _, view in self.under_way))
        self.mark += 1
        return self.mark

    async def free(self, mark: int) -> None:
        await asyncio.sleep(0)
        while self.under_way and self.mark - len(self.under_way) < mark:
            offset, view = self.under_way.popleft()
            if self.fails_at is not None and offset >= self.fails_at:
                raise TransportError("the pipe is gone")
            await self.write(offset, view)


async def sent_to(base: Path, disk: bytearray, out: FileSink) -> None:
    manner = Manner(contexts={BASE: [(len(disk), 0)]})
    async with serving(str(base / "s"), lambda: ModelServer(disk, manner)) as address:
        async with await connect(address, contexts=[BASE]) as client:
            clusters = await scan(client, context=None, known=0)
            stream = DiskStream(
                client, clusters, backing=None, trim=False, limit=RateLimit(0)
            )
            try:
                await stream.send(out)
            finally:
                await stream.aclose()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
async def test_a_sink_that_is_slow_gets_the_bytes_that_were_read(
    short_tmp: Path, share: float
) -> None:
    disk = scribbled(24 * MiB + 512, 3, share)
    disk[8 * MiB : 15 * MiB] = bytes(7 * MiB)  # slots from which nothing is written
    prompt, late = MemoryFile(), LateFile()
    await sent_to(short_tmp, disk, prompt)
    await sent_to(short_tmp, disk, late)
    assert sorted(late.pieces) == sorted(prompt.pieces)
    assert not late.under_way
    assert late.most <= KEPT_BYTES + 2 * MiB


@pytest.mark.parametrize("share", [1.0, 0.4])
async def test_a_reader_that_is_slow_gets_the_bytes_that_were_read(
    short_tmp: Path, share: float
) -> None:
    """The pipe holds pages of our buffers, and these are used again and again."""
    disk, ends = scribbled(32 * MiB, 9, share), Ends()
    kept = MemoryFile()
    await sent_to(short_tmp, disk, kept)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    size = max(offset + len(piece) for offset, piece in kept.pieces)
    out = OutgoingFile(pipe, FileInfo("d.qcow2", size), True)
    ends.read_all(step=90_000, rest_s=0.002)
    await sent_to(short_tmp, disk, out)
    await out.finish()
    await pipe.written()
    image = bytearray(size)
    for offset, piece in kept.pieces:
        image[offset : offset + len(piece)] = piece
    assert received(ends.finish(pipe), size) == image


async def test_a_sink_that_fails_ends_the_stream(short_tmp: Path) -> None:
    disk = scribbled(16 * MiB, 4, 1.0)
    late = LateFile(fails_at=6 * MiB)
    with pytest.raises(TransportError, match="pipe is gone"):
        await sent_to(short_tmp, disk, late)
    # The last slot of all: nothing else would look at what became of it.
    late = LateFile(fails_at=15 * MiB + 1)
    with pytest.raises(TransportError, match="pipe is gone"):
        await sent_to(short_tmp, disk, late)


async def test_a_stream_that_is_cancelled_leaves_what_it_lent_as_it_was(
    short_tmp: Path,
) -> None:
    disk, late = scribbled(64 * MiB, 5, 1.0), LateFile()
    job = asyncio.create_task(sent_to(short_tmp, disk, late))
    while len(late.pieces) < 5:
        await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert late.under_way
    prompt = MemoryFile()
    await sent_to(short_tmp, disk, prompt)
    pieces = {offset: piece for offset, piece in prompt.pieces if len(piece) == MiB}
    lent = [(at, view) for at, view in late.under_way if len(view) == MiB]
    assert lent
    assert all(view == pieces[offset] for offset, view in lent)


async def test_a_disk_that_was_sent_keeps_no_memory(short_tmp: Path) -> None:
    """A job has all its disks until it ends."""
    disk = scribbled(24 * MiB, 6, 1.0)
    manner = Manner(contexts={BASE: [(len(disk), 0)]})
    tracemalloc.start()
    try:
        async with (
            serving(str(short_tmp / "s"), lambda: ModelServer(disk, manner)) as address,
            await connect(address, contexts=[BASE]) as client,
        ):
            clusters = await scan(client, context=None, known=0)
            streams, held = [], []
            for _ in range(4):
                stream = DiskStream(
                    client, clusters, backing=None, trim=False, limit=RateLimit(0)
                )
                await stream.send(Dropping())
                streams.append(stream)
                held.append(tracemalloc.get_traced_memory()[0])
            for stream in streams:
                await stream.aclose()
    finally:
        tracemalloc.stop()
    assert held[-1] - held[0] < MiB


class Dropping(FileSink):
    """Takes an image and keeps nothing."""

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        await asyncio.sleep(0)
