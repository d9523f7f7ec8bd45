# SPDX-License-Identifier: Apache-2.0
"""Edges of any job, and of any chain: they change when a cluster comes, never what."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.diskstream import RateLimit
from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.chain import Chain, DiskEntry, JobRecord, Manifest, backing_name
from pveplug.images.clusters import ClusterMap
from pveplug.images.edges import DISK_BYTES, Edges, EdgesWriter, edge_ranges
from pveplug.images.qcow2_writer import Qcow2StreamWriter
from pveplug.ir.landing import Landing
from pveplug.ir.presence import Mark
from pveplug.ir.sink import LandingSink
from pveplug.restore_disk import DiskWriter
from pveplug.units import CLUSTER
from tests.property.test_chain import replayed
from tests.support.images import Piece, map_of, pieces_of, without_zeroes

LETTERS = st.text("dz.", min_size=1, max_size=8)
SHORT = st.sampled_from([0, 512, CLUSTER - 512])


@st.composite
def disks(draw):
    """Runs of clusters that rise and are apart, of a disk whose last may be short."""
    size = draw(st.integers(1, 40)) * CLUSTER - draw(SHORT)
    cuts = draw(st.lists(st.integers(0, size // CLUSTER), unique=True, max_size=8))
    edges = sorted(cut * CLUSTER for cut in cuts)
    if draw(st.booleans()) and (not edges or edges[-1] != size):
        edges.append(size)
    runs = zip(edges[::2], edges[1::2], strict=False)
    return size, [(low, high) for low, high in runs if low < high]


@settings(max_examples=60, deadline=None)
@given(st.lists(disks(), max_size=3), st.integers(0, 1000))
def test_what_is_put_in_comes_back(made, seed):
    noise = random.Random(seed)
    writer, wanted = EdgesWriter(), []
    for number, (size, runs) in enumerate(made):
        writer.begin(f"scsi{number}", size)
        content = bytearray(noise.randbytes(size))
        for at in range(0, size, CLUSTER):
            if noise.random() < 0.5:
                content[at : at + CLUSTER] = bytes(min(CLUSTER, size - at))
        for low, high in runs:
            writer.add(low, memoryview(content)[low:high])
        wanted.append([(low, bytes(content[low:high])) for low, high in runs])
    found = Edges.decode(writer.finish()).disks
    assert list(found) == [f"scsi{number}" for number in range(len(made))]
    for disk, (size, _), runs in zip(found.values(), made, wanted, strict=True):
        assert disk.size == size
        joined: list[tuple[int, bytes]] = []
        for run in disk.runs:
            if joined and joined[-1][0] + len(joined[-1][1]) == run.offset:
                if run.offset not in [low for low, _ in runs]:
                    low, before = joined.pop()
                    joined.append((low, before + run.data()))
                    continue
            joined.append((run.offset, bytes(run.data())))
        assert joined == runs


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_refused_or_has_bounded_runs(body, head):
    body = b"PHED\x01\x10" + body if head else body
    try:
        found = Edges.decode(body + blake3(body).digest(16)).disks
    except IntegrityError:
        return
    for disk in found.values():
        for run in disk.runs:
            assert run.end <= disk.size
            try:
                assert len(run.data()) == run.length
            except IntegrityError:
                pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=700), st.integers(1, 1 << 34), st.integers(1, 60))
def test_ranges_are_whole_clusters_within_bounds_whatever_the_table_says(
    table, size, disks
):
    first = (bytes(446) + table[:64]).ljust(510, b"\0") + b"\x55\xaa" + table[64:]
    ranges = edge_ranges(size, disks, first)
    flat = [place for pair in ranges for place in pair]
    assert flat == sorted(set(flat))
    assert flat[0] == 0
    assert all(place % CLUSTER == 0 or place == size for place in flat)
    assert sum(high - low for low, high in ranges) <= DISK_BYTES


class Given:
    def __init__(self, pieces: list[Piece], size: int) -> None:
        self.pieces, self.size = pieces, size

    async def data(self) -> AsyncIterator[tuple[int, memoryview]]:
        for offset, piece in self.pieces:
            yield offset, memoryview(piece)


@st.composite
def chains(draw):
    members = []
    for number in range(draw(st.integers(1, 4))):
        kinds = draw(LETTERS)
        size = CLUSTER * len(kinds) - draw(SHORT)
        alone = number == 0 or draw(st.integers(0, 5)) == 0
        members.append((map_of(kinds, size, 16), alone))
    return members


async def landed(chain: Chain, edges, images, noise: random.Random) -> bytes:
    """Land edges, then images, both in any order; check after each."""
    size = chain.final_size("scsi0")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        landing = Landing.create(base / "l", base / "r", "scsi0", size)
        try:
            order = [job for job in edges if chain.needs(job, "scsi0")]
            for number, job in enumerate(noise.sample(order, len(order))):
                writer = DiskWriter(
                    "scsi0", chain=chain, zeroed=number > 0, limit=RateLimit(0)
                )
                await writer.begin(LandingSink(landing), size)
                await writer.copy(job, edges[job])
                await writer.finish()
                owned = chain.owned(job, "scsi0")
                for run in edges[job].runs:
                    for at in range(run.offset, min(run.end, owned.size), CLUSTER):
                        whole = min(CLUSTER, size - at)
                        if (
                            owned.kind_at(at // CLUSTER) is Kind.DATA
                            and at + whole <= owned.size
                        ):
                            marks = [m for *_, m in landing.kinds(at, whole)]
                            assert Mark.OWED not in marks
            writer = DiskWriter("scsi0", chain=chain, zeroed=False, limit=RateLimit(0))
            await writer.begin(LandingSink(landing), size)
            members = chain.members("scsi0")
            for job in noise.sample(members, len(members)):
                await writer.receive(job, images[job])
            assert writer.complete
            await writer.finish()
            assert landing.complete
            return landing.files.data.read_bytes()
        finally:
            landing.remove()


@settings(max_examples=25, deadline=None)
@given(chains(), st.integers(0, 1000))
def test_a_chain_with_edges_becomes_the_disk_that_it_is_without(members, seed):
    noise = random.Random(seed)
    contents = [noise.randbytes(clusters.size) for clusters, _ in members]
    records, images, edges = [], {}, {}
    for number, ((clusters, alone), disk) in enumerate(
        zip(members, contents, strict=True)
    ):
        job, parent = f"job{number}", f"job{number - 1}"
        backing = None if alone else backing_name(parent, "scsi0")
        writer = Qcow2StreamWriter(clusters, backing=backing)
        sent = pieces_of(writer, lambda at, length, disk=disk: disk[at : at + length])
        images[job] = Given(list(without_zeroes(sent, 512)), writer.file_size)
        made = EdgesWriter()
        made.begin("scsi0", clusters.size)
        for run in edge_clusters(clusters, noise):
            made.add(run, disk[run : run + CLUSTER])
        edges[job] = Edges.decode(made.finish()).disks["scsi0"]
        entry = DiskEntry("scsi0", clusters.size, backing=backing)
        manifest = Manifest(
            100, "", "vm", job, parent if number else None, "I", number,
            "pve", "", "", disks=(entry,),
        )  # fmt: skip
        records.append(JobRecord(manifest, {"scsi0": clusters.to_bytes()}))
    chain = Chain(records, f"job{len(members) - 1}")
    found = asyncio.run(landed(chain, edges, images, noise))
    assert found == replayed(members, contents)


def edge_clusters(clusters: ClusterMap, noise: random.Random) -> list[int]:
    """Any of the clusters that a job carries."""
    return [
        at
        for run in clusters.data_runs()
        for at in range(run.offset, run.end, CLUSTER)
        if noise.random() < 0.6
    ]
