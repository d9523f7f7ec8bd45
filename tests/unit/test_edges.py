# SPDX-License-Identifier: Apache-2.0
"""The file of a job's edges: what comes back, what is refused, what is left to read."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from blake3 import blake3

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.edges import (
    ALL_BYTES,
    DISK_BYTES,
    FILE_BYTES,
    HEAD,
    PART,
    DiskEdges,
    Edges,
    EdgesWriter,
    edge_ranges,
    without,
)
from pveplug.images.evidence import JobEvidence, Paper, is_paper
from pveplug.images.manifest import EDGES_FILE, text_digest
from pveplug.images.partitions import partitions
from pveplug.units import CLUSTER, GiB, KiB, MiB, TiB
from tests.support.images import gpt
from tests.support.stored import a_chain

GPT_BACKUP = 33 * 512
PROMISE = 3087 * 512
VMFS = 2 * MiB


def written(**disks: tuple[int, list[tuple[int, bytes]]]) -> bytes:
    writer = EdgesWriter()
    for key, (size, runs) in disks.items():
        writer.begin(key, size)
        for offset, data in runs:
            writer.add(offset, data)
    return writer.finish()


def sealed(body: bytes) -> bytes:
    return body + blake3(body).digest(16)


def small() -> bytes:
    return written(scsi0=(3 * CLUSTER + 512, [(CLUSTER, b"ab" * (CLUSTER // 2))]))


def test_what_was_put_in_comes_back() -> None:
    noise = bytes(range(256)) * (CLUSTER // 256)
    content = written(
        scsi0=(100 * GiB, [(0, noise * 20), (100 * GiB - CLUSTER, noise)]),
        efidisk0=(540672, [(8 * CLUSTER, bytes(540672 - 8 * CLUSTER))]),
        scsi1=(512, []),
    )
    found = Edges.decode(content).disks
    assert list(found) == ["scsi0", "efidisk0", "scsi1"]
    assert [(disk.size, len(disk.runs)) for disk in found.values()] == [
        (100 * GiB, 3),  # 20 clusters are more than one run may have
        (540672, 1),
        (512, 0),
    ]
    first, second, last = found["scsi0"].runs
    assert (first.offset, first.end, second.end) == (0, MiB, 20 * CLUSTER)
    assert first.data() + second.data() == noise * 20
    assert last.data() == noise
    assert found["efidisk0"].runs[0].data() == bytes(540672 - 8 * CLUSTER)
    assert len(content) < 20 * CLUSTER


def holds(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    return any(low <= start and end <= high for low, high in ranges)


def tidy(ranges: list[tuple[int, int]], size: int) -> bool:
    """Whole clusters, rising and apart."""
    flat = [place for pair in ranges for place in pair]
    return flat == sorted(set(flat)) and all(
        place % CLUSTER == 0 or place == size for place in flat
    )


def test_the_ranges_hold_what_guests_look_for() -> None:
    for size in (8 * GiB, 8 * GiB + 512, 64 * TiB - 512, 4 * MiB, 5 * MiB + 512):
        for ranges in (edge_ranges(size), edge_ranges(size, 8)):
            assert tidy(ranges, size)
            assert ranges[0][0] == 0
            for start, end in (
                (0, MiB + 512),
                (VMFS, VMFS + 512),
                (size - PROMISE, size),
            ):
                assert holds(ranges, start, end)
    for disks in range(1, 100):
        size = 64 * GiB - 512
        ranges = edge_ranges(size, disks)
        assert tidy(ranges, size)
        total = sum(end - start for start, end in ranges)
        assert total * disks <= max(ALL_BYTES, disks * 3 * CLUSTER)
        assert total <= DISK_BYTES
        assert holds(ranges, 0, 34 * 512)
        assert holds(ranges, size - GPT_BACKUP, size)


@pytest.mark.parametrize("size", [512, CLUSTER, HEAD, 2 * MiB, 2 * MiB + 512])
def test_a_disk_that_is_all_edge_has_one_range(size: int) -> None:
    assert edge_ranges(size) == [(0, size)]


def mbr(*parts: tuple[int, int]) -> bytes:
    entries = b"".join(
        struct.pack("<B3sB3sII", 0, b"", 0x83, b"", low // 512, (high - low) // 512)
        for low, high in parts
    )
    return ((bytes(446) + entries).ljust(510, b"\0") + b"\x55\xaa").ljust(
        CLUSTER, b"\0"
    )


PARTS = ((MiB, 512 * MiB), (512 * MiB, 7 * GiB + 4096), (7 * GiB + 4096, 8 * GiB - MiB))


@pytest.mark.parametrize(
    "first",
    [gpt(512, *PARTS), gpt(4096, *PARTS), mbr(*PARTS)],
    ids=["512", "4096", "mbr"],
)
def test_ends_of_partitions_are_among_the_ranges(first: bytes) -> None:
    assert partitions(first, 8 * GiB) == list(PARTS)
    ranges = edge_ranges(8 * GiB, 1, first)
    assert tidy(ranges, 8 * GiB)
    for low, high in PARTS:
        assert holds(ranges, low, low + PART)
        assert holds(ranges, high - PART, high)
        assert holds(ranges, low + MiB, low + MiB + 512)
        assert holds(ranges, low + 2 * MiB, low + 2 * MiB + 512)
    # Where there is no room, the ends of the disk remain.
    assert edge_ranges(8 * GiB, 8, first) == edge_ranges(8 * GiB, 8)


def test_a_table_of_partitions_is_never_believed_beyond_its_bounds() -> None:
    wild = (MiB, 9 * GiB), (0, MiB), (2 * MiB, 2 * MiB)
    assert partitions(gpt(512, *wild), 8 * GiB) == []
    assert partitions(b"", GiB) == []
    assert partitions(bytes(CLUSTER), GiB) == []
    assert partitions(gpt(512, *PARTS)[:600], 8 * GiB) == []
    full = gpt(512, *((n * MiB, (n + 1) * MiB) for n in range(1, 127)), count=2**31)
    found = partitions(full, 8 * GiB)
    assert len(found) == 126
    ranges = edge_ranges(8 * GiB, 1, full)
    assert sum(high - low for low, high in ranges) <= DISK_BYTES
    assert tidy(ranges, 8 * GiB)


def test_what_is_held_is_not_read() -> None:
    disk = Edges.decode(
        written(
            scsi0=(
                20 * CLUSTER,
                [(0, bytes(2 * CLUSTER)), (4 * CLUSTER, bytes(CLUSTER))],
            )
        )
    ).disks["scsi0"]
    runs = [(0, 3 * CLUSTER), (4 * CLUSTER, CLUSTER), (6 * CLUSTER, 2 * CLUSTER)]
    assert list(without(runs, disk.runs)) == [
        (2 * CLUSTER, CLUSTER),
        (6 * CLUSTER, 2 * CLUSTER),
    ]
    assert list(without(runs, ())) == runs
    assert list(without([(0, 20 * CLUSTER)], disk.runs)) == [
        (2 * CLUSTER, 2 * CLUSTER),
        (5 * CLUSTER, 15 * CLUSTER),
    ]


def test_a_bit_that_turned_anywhere_is_found() -> None:
    content = small()
    for at in range(len(content)):
        bad = bytearray(content)
        bad[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError, match="edges: "):
            Edges.decode(bad)
    for length in range(len(content)):
        with pytest.raises(IntegrityError, match="edges: "):
            Edges.decode(content[:length])


def test_a_run_that_is_not_what_its_digest_says_is_refused() -> None:
    """The file is whole: somebody made it so, or we did."""
    disk = Edges.decode(small()).disks["scsi0"]
    run = dataclasses.replace(disk.runs[0], _digest=bytes(16))
    with pytest.raises(IntegrityError, match=f"the run at {CLUSTER} is damaged"):
        run.data()
    run = dataclasses.replace(disk.runs[0], _stored=memoryview(b"nothing of zstd"))
    with pytest.raises(IntegrityError, match=f"the run at {CLUSTER}"):
        run.data()
    bomb = dataclasses.replace(disk.runs[0], length=CLUSTER - 1)
    with pytest.raises(IntegrityError, match="more than"):
        bomb.data()


HEADER = b"PHED\x01\x10"
DISK = b"\x05scsi0"


def one(size: int, *runs: tuple[int, int, int, int]) -> bytes:
    """A file of one disk; a run is (offset, length, packing, stored length)."""
    body = HEADER + b"\x00\x01" + DISK + struct.pack(">QI", size, len(runs))
    for offset, length, packing, stored in runs:
        body += struct.pack(">QIBI16s", offset, length, packing, stored, bytes(16))
        body += bytes(stored)
    return sealed(body)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (sealed(b"PHDG\x01\x10\x00\x00"), "not in a known format"),
        (sealed(b"PHED\x02\x10\x00\x00"), "version 2"),
        (sealed(b"PHED\x01\x09\x00\x00"), "clusters of 2"),
        (sealed(HEADER + b"\xff\xff"), "65535 disks"),
        (sealed(HEADER + b"\x00\x01"), "cut short"),
        (sealed(HEADER + b"\x00\x00more"), "4 bytes follow"),
        (sealed(HEADER + b"\x00\x01\x02.."), "impossible disk key"),
        (one(0), "a disk of 0 bytes"),
        (one(65 * TiB), "a disk of"),
        (one(GiB, *[(0, CLUSTER, 0, CLUSTER)] * 2), "impossible run"),
        (one(GiB, (512, CLUSTER, 1, 1)), "impossible run"),
        (one(GiB, (0, 512, 1, 1)), "impossible run"),
        (one(GiB, (0, 0, 1, 0)), "impossible run"),
        (one(GiB, (0, 2 * MiB, 1, 1)), "impossible run"),
        (one(GiB, (GiB, CLUSTER, 1, 1)), "impossible run"),
        (one(CLUSTER, (0, CLUSTER, 2, 1)), "has 1 bytes"),
        (one(CLUSTER, (0, CLUSTER, 0, 1)), "has 1 bytes"),
        (one(CLUSTER, (0, CLUSTER, 1, CLUSTER)), "has 65536 bytes"),
        (
            one(GiB, *[(n * MiB, MiB, 1, 1) for n in range(DISK_BYTES // MiB + 1)]),
            "impossible run",
        ),
        (sealed(HEADER + b"\x00\x02" + one(GiB)[8:-16] * 2), "appears twice"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=f"edges: .*{reason}"):
        Edges.decode(content)


def test_a_file_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(IntegrityError, match="too many"):
        Edges.decode(bytes(FILE_BYTES + 1))


@pytest.mark.parametrize(
    ("offset", "length"), [(512, CLUSTER), (0, 512), (10 * CLUSTER, CLUSTER)]
)
def test_a_writer_takes_whole_clusters_of_the_disk_only(
    offset: int, length: int
) -> None:
    writer = EdgesWriter()
    writer.begin("scsi0", 10 * CLUSTER)
    with pytest.raises(LocalProtocolError):
        writer.add(offset, bytes(length))


def test_a_writer_goes_forward_and_takes_no_disk_twice() -> None:
    writer = EdgesWriter()
    writer.begin("scsi0", GiB)
    writer.add(CLUSTER, bytes(CLUSTER))
    with pytest.raises(LocalProtocolError):
        writer.add(0, bytes(CLUSTER))
    with pytest.raises(LocalProtocolError):
        writer.begin("scsi0", GiB)
    with pytest.raises(LocalProtocolError):
        writer.begin("../x", GiB)
    with pytest.raises(LocalProtocolError):
        writer.add(2 * CLUSTER, bytes(DISK_BYTES))


def test_the_manifest_vouches_for_the_file() -> None:
    content = small()
    job = a_chain().jobs[0].manifest
    manifest = dataclasses.replace(job, edges=text_digest(content))
    assert is_paper(EDGES_FILE)
    for known, given, good in (
        (manifest, content, True),
        (manifest, content + b"\0", False),
        (job, content, False),
        (dataclasses.replace(job, version=2), content, False),
    ):
        evidence = JobEvidence(job.directory, known)
        paper = Paper(EDGES_FILE)
        for at in range(0, len(given), 4 * KiB):
            paper.add(at, given[at : at + 4 * KiB])
        if good:
            evidence.paper(paper)
        else:
            with pytest.raises(IntegrityError, match=r"edges\.bin: it is not the file"):
                evidence.paper(paper)


def test_an_empty_disk_edge_is_a_value() -> None:
    assert DiskEdges(512, ()) == Edges.decode(written(a=(512, []))).disks["a"]
