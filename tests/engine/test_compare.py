# SPDX-License-Identifier: Apache-2.0
"""A disk compared with its digests: what differs, what is given back, what fails."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from pveplug.compare import compare
from pveplug.diskstream import DiskStream, Progress, RateLimit, give_back_unread, scan
from pveplug.errors import IntegrityError, NbdError
from pveplug.images.clusterhash import ClusterCutter
from pveplug.images.clusters import ClusterMap
from pveplug.images.leaves import Header, Keys, LeafWriter, RunReader
from pveplug.images.manifest import backing_name
from pveplug.nbd.client import connect
from pveplug.pacing import IN_FLIGHT, PARALLEL_STEPS, Pace
from pveplug.proto.nbd_wire import Command
from pveplug.units import CLUSTER, MiB
from tests.engine.test_disk_path import (
    BASE,
    MemoryFile,
    allocation,
    scribbled,
)
from tests.support.nbd_model import Manner, ModelServer, serving

KEYS = Keys.of(b"k" * 32)


def digests_of(disk: bytearray) -> bytes:
    """The file of a Full of this disk."""
    clusters = ClusterMap.all_data(len(disk))
    header = Header("v", "c", "scsi0", "F1", "F", len(disk), 0, KEYS.name)
    out = io.BytesIO()
    writer = LeafWriter(header, clusters, KEYS, out.write)
    for cluster, found in ClusterCutter(len(disk)).take(0, disk, 0, len(disk)):
        writer.add(cluster, found)
    writer.finish()
    return out.getvalue()


def changed(before: bytearray, now: bytearray) -> set[int]:
    known = (
        before[: len(before) // CLUSTER * CLUSTER] if len(before) < len(now) else before
    )
    return {
        at // CLUSTER
        for at in range(0, len(now), CLUSTER)
        if known[at : at + CLUSTER] != now[at : at + CLUSTER]
    }


def written_to(disk: bytearray, seed: int, count: int) -> bytearray:
    now, rng = bytearray(disk), random.Random(seed)
    for _ in range(count):
        at, length = rng.randrange(len(now)), rng.choice((1, 512, 70_000, 300_000))
        length = min(length, len(now) - at)
        now[at : at + length] = rng.choice((bytes(length), rng.randbytes(length)))
    return now


class Recorded(ModelServer):
    """Tells which clusters requests were about."""

    def clusters(self, *commands: Command) -> list[int]:
        return [
            cluster
            for request in self.seen
            if request.command in commands
            for cluster in range(
                request.offset // CLUSTER,
                -(-(request.offset + request.length) // CLUSTER),
            )
        ]


async def compared(
    base: Path,
    before: bytearray,
    now: bytearray,
    *,
    manner: Manner | None = None,
    trim: bool = False,
    file: bytes | None = None,
    damage: bool = False,
    known: bool = True,
) -> tuple[ClusterMap, MemoryFile, Recorded, Progress]:
    """Compare and send; the image is an overlay."""
    manner = manner or Manner()
    manner.contexts = {BASE: allocation(now)} if known else {}
    file = digests_of(before) if file is None else file
    row = [RunReader(io.BytesIO(file), len(file), KEYS)]
    server, kept, progress = Recorded(now, manner), MemoryFile(), Progress()
    async with serving(str(base / "s"), lambda: server) as address:
        async with await connect(address, contexts=[BASE]) as client:
            found = await scan(client, context=None, known=0)
            if trim:
                await give_back_unread(client, found)
            result = await compare(
                client,
                found,
                row,
                KEYS,
                trim=trim,
                limit=RateLimit(0),
                progress=progress,
            )
            stream = DiskStream(
                client, result, backing=backing_name("F1", "scsi0"), trim=trim,
                limit=RateLimit(0),
            )  # fmt: skip
            try:
                await stream.send(kept)
            finally:
                await stream.aclose()
    return result, kept, server, progress


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [4096, 96 * 1024, 32 * MiB])
async def test_exactly_what_differs_is_in_the_overlay(
    tmp_path: Path, seed: int, block: int
) -> None:
    before = scribbled(3 * MiB + 512 * seed, seed, 0.5)
    now = written_to(before, seed, 5)
    if seed > 1:
        now += scribbled(MiB + 1024, seed, 0.7)
    result, _, server, progress = await compared(
        tmp_path, before, now, manner=Manner(block=(1, 4096, block)), known=seed != 3
    )
    marked = {n for n in range(result.clusters) if result.kind_at(n).value != "clean"}
    wanted = changed(before, now)
    zero = {n for n in wanted if not any(now[n * CLUSTER : (n + 1) * CLUSTER])}
    # Of what the disk has grown by, zeroes are marked as well: nothing is known of it.
    assert marked == wanted
    assert {n for n in marked if result.kind_at(n).value == "zero"} == zero
    assert progress.sent == sum(
        min(CLUSTER, len(now) - n * CLUSTER) for n in wanted - zero
    )
    reads = server.clusters(Command.READ)
    if block >= CLUSTER and block % CLUSTER == 0:
        assert all(
            reads.count(n) <= (2 if n in wanted - zero else 1) for n in set(reads)
        )


async def test_nothing_that_is_needed_again_is_given_back(tmp_path: Path) -> None:
    before = scribbled(40 * MiB, 1, 1.0)
    now = bytearray(before)
    for at in (9 * MiB, 9 * MiB + 3 * CLUSTER, 30 * MiB):
        now[at : at + 10] = b"x" * 10
    result, _, server, _ = await compared(tmp_path, before, now, trim=True)
    needed = {n for n in range(result.clusters) if result.kind_at(n).value == "data"}
    assert needed == {144, 147, 480}
    order = [r for r in server.seen if r.command in (Command.READ, Command.TRIM)]
    gone: set[int] = set()
    for request in order:
        touched = range(
            request.offset // CLUSTER, -(-(request.offset + request.length) // CLUSTER)
        )
        if request.command is Command.TRIM:
            gone |= set(touched)
        else:
            assert not gone & set(touched), "read after it was given back"
    # All but the short piece between two changes went back while it was compared.
    assert set(range(result.clusters)) - gone == {145, 146}


async def test_a_file_damaged_after_it_was_verified_fails_the_job(
    tmp_path: Path,
) -> None:
    disk = scribbled(2 * MiB, 1, 1.0)
    file = bytearray(digests_of(disk))
    file[-40] ^= 1
    with pytest.raises(IntegrityError, match="changed while it was read"):
        await compared(tmp_path, disk, disk, file=bytes(file))


async def test_a_read_that_fails_while_comparing_is_never_clean(tmp_path: Path) -> None:
    def fail(command: Command, offset: int, length: int) -> int:
        return 5 if command is Command.READ and offset + length > MiB else 0

    disk = scribbled(2 * MiB, 1, 1.0)
    with pytest.raises(NbdError):
        await compared(tmp_path, disk, disk, manner=Manner(fail=fail))


async def test_reading_to_compare_keeps_to_the_limit(tmp_path: Path) -> None:
    spent: list[int] = []

    class Limit(RateLimit):
        async def spend(self, size: int) -> None:
            spent.append(size)

    disk = scribbled(2 * MiB, 1, 1.0)
    file = digests_of(disk)
    server = ModelServer(disk, Manner(contexts={BASE: allocation(disk)}))
    async with serving(str(tmp_path / "s"), lambda: server) as address:
        async with await connect(address, contexts=[BASE]) as client:
            found = await scan(client, context=None, known=0)
            row = [RunReader(io.BytesIO(file), len(file), KEYS)]
            await compare(
                client, found, row, KEYS, trim=False, limit=Limit(0),
                progress=Progress(),
            )  # fmt: skip
    assert sum(spent) == found.data_bytes


class Counting(ModelServer):
    """Knows how many reads it had in hand at once."""

    most = 0

    def receive(self, data: bytes) -> None:
        before = len(self.seen)
        super().receive(data)
        reads = [r for r in self.seen[before:] if r.command is Command.READ]
        self.most = max(self.most, len(reads))


@pytest.mark.parametrize("step", [0, PARALLEL_STEPS])
async def test_reading_to_compare_keeps_to_the_pace(tmp_path: Path, step: int) -> None:
    disk = scribbled(16 * MiB, 1, 1.0)
    file = digests_of(disk)
    server = Counting(disk, Manner(contexts={BASE: allocation(disk)}))
    limit = RateLimit(0)
    limit.pace = Pace(0.02)
    while limit.pace.step < step:
        limit.pace.sample(1.0, 1e9)
    async with serving(str(tmp_path / "s"), lambda: server) as address:
        async with await connect(address, contexts=[BASE]) as client:
            found = await scan(client, context=None, known=0)
            row = [RunReader(io.BytesIO(file), len(file), KEYS)]
            await compare(
                client, found, row, KEYS, trim=False, limit=limit,
                progress=Progress(),
            )  # fmt: skip
    assert server.most == (1 if step else IN_FLIGHT)


def test_those_who_read_at_once_share_a_slowed_pace() -> None:
    limit = RateLimit(0)
    limit.pace = Pace(0.02)
    with limit.shared(), limit.shared():
        assert limit.in_flight() == IN_FLIGHT
        limit.pace.sample(1.0, 1e9)
        assert limit.in_flight() == IN_FLIGHT // 4
        with limit.shared(), limit.shared(), limit.shared():
            assert limit.in_flight() == 1
    assert limit.in_flight() == IN_FLIGHT // 2
