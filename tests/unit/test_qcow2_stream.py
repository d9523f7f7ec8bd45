# SPDX-License-Identifier: Apache-2.0
"""The qcow2 writer's promises and the reader's refusals, one by one."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.extents import Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.qcow2_reader import (
    GuestData,
    GuestZero,
    ImageHeader,
    Qcow2StreamReader,
)
from pveplug.images.qcow2_writer import Gap, Metadata, Qcow2StreamWriter, dense
from pveplug.units import CLUSTER, GiB, MiB, TiB
from tests.support.images import map_of, pieces_of, read_all, scattered

BACKING = "../job/x.qcow2"


def image(kinds="d.dz" * 20, backing=BACKING):
    """A dense image of 512-byte clusters: header, L1, L2 at 1024, data at 1536."""
    writer = Qcow2StreamWriter(map_of(kinds), backing=backing)
    flat = bytearray(writer.file_size)
    for at, data in pieces_of(writer, lambda at, length: b"x" * length):
        flat[at : at + len(data)] = data
    return flat


def test_a_full_leaves_zero_clusters_unallocated_and_an_overlay_does_not():
    full = Qcow2StreamWriter(map_of("z" * 64))
    overlay = Qcow2StreamWriter(map_of("z" * 64), backing=BACKING)
    assert full.file_size == 4 * 512
    assert overlay.file_size == 5 * 512
    events = read_all(pieces_of(overlay, bytes))
    assert events[1:] == [GuestZero(0, 64 * 512, Kind.ZERO)]


def test_the_last_byte_is_always_sent_and_the_size_known_before():
    for size in (512, MiB, 5 * GiB, 2 * TiB):
        writer = Qcow2StreamWriter(ClusterMap(size))
        *_, last = writer.pieces()
        assert isinstance(last, Metadata)
        assert last.file_offset + last.length == writer.file_size


@pytest.mark.parametrize("backing", ["", "x" * 1024, "a\0b"])
def test_an_impossible_backing_name_is_refused(backing):
    with pytest.raises(LocalProtocolError, match="backing file name"):
        Qcow2StreamWriter(ClusterMap(MiB), backing=backing)


def test_an_impossible_disk_is_refused():
    for clusters in (ClusterMap(513), ClusterMap(512, 8), ClusterMap(512, 22)):
        with pytest.raises(LocalProtocolError):
            Qcow2StreamWriter(clusters)
    with pytest.raises(LocalProtocolError, match="larger clusters"):
        Qcow2StreamWriter(ClusterMap(TiB, 9))


def test_dense_refuses_pieces_that_overlap():
    with pytest.raises(LocalProtocolError):
        list(dense([Gap(0, 5), Gap(4, 5)], 9))
    with pytest.raises(LocalProtocolError):
        list(dense([Gap(0, 5)], 4))


def test_a_whole_terabyte_is_planned_in_bounded_memory():
    clusters = ClusterMap.all_data(TiB)
    tracemalloc.start()
    writer = Qcow2StreamWriter(clusters)
    pieces = writer.pieces()
    for _ in range(40):
        next(pieces)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MiB


def test_data_goes_out_as_it_came_without_a_copy():
    flat = image()
    reader = Qcow2StreamReader()
    reader.receive_data(0, flat[:1536])
    piece = bytearray(b"y" * 300)
    (event,) = reader.receive_data(1536, piece)
    assert isinstance(event, GuestData)
    assert event.offset == 0
    piece[0] = 7
    assert event.data[0] == 7
    hole, data = reader.receive_data(1536 + 400, b"z" * 112)
    assert hole == GuestZero(300, 100, Kind.DATA)
    assert isinstance(data, GuestData)
    assert data.offset == 400


def test_the_header_is_told_before_any_data():
    reader = Qcow2StreamReader()
    flat = image()
    assert reader.receive_data(0, flat[:511]) == []
    assert reader.header is None
    assert reader.receive_data(511, flat[511:512]) == [
        ImageHeader(80 * 512, BACKING, 9, len(flat))
    ]
    assert reader.header is not None
    assert not reader.complete


def put(offset, fmt, value):
    def change(flat):
        struct.pack_into(fmt, flat, offset, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(0, ">I", 0x4B444D56), "this is not a qcow2 image"),
        (put(4, ">I", 2), "version 2"),
        (put(8, ">Q", 1 << 60), "backing name"),
        (put(16, ">I", 5000), "backing name of 5000 bytes"),
        (put(20, ">I", 63), r"clusters of 2\^63"),
        (put(24, ">Q", 1 << 62), "a disk of"),
        (put(24, ">Q", 1 << 40), "an L1 table of"),
        (put(32, ">I", 1), "the header has 0x01"),
        (put(36, ">I", 1 << 30), "the header has"),
        (put(40, ">Q", 0), "the header has"),
        (put(48, ">Q", 1 << 50), "refcount table at"),
        (put(48, ">Q", 777), "refcount table at"),
        (put(60, ">I", 1), "the header has"),
        (put(72, ">Q", 4), "the header has"),
        (put(512, ">Q", 1024), "L1 entry"),
        (put(512, ">Q", 1 << 63 | 512), "L1 entry"),
        (put(512, ">Q", 1 << 63 | 1536), "belongs here"),
        (put(520, ">Q", 1 << 63 | 1024), "L1 entry"),
        (put(520, ">Q", 1 << 63 | 1 << 40), "L1 entry"),
        (put(528, ">Q", 1 << 63 | 4096), "L1 entry"),
        (put(1024, ">Q", 1 << 62 | 1536), "compressed"),
        (put(1024, ">Q", 1536), "would follow"),
        (put(1024, ">Q", 1 << 63 | 2048), "would follow"),
        (put(1024 + 16, ">Q", 1 << 63 | 1536), "would follow"),
        (put(1024, ">Q", 1 << 63 | 1536 | 1), "would follow"),
        (put(1024 + 8, ">Q", 2), "would follow"),
    ],
)
def test_a_number_that_is_not_ours_is_refused_with_its_place(change, reason):
    flat = image()
    change(flat)
    with pytest.raises(IntegrityError, match=r"image: qcow2 at byte \d+: .*" + reason):
        read_all([(0, bytes(flat))])


def test_a_cluster_beyond_the_end_of_the_disk_is_refused():
    flat = image("d" * 10)
    struct.pack_into(">Q", flat, 1024 + 80, 1)
    with pytest.raises(IntegrityError, match="beyond the end of the disk"):
        read_all([(0, bytes(flat))])


def test_data_after_the_end_of_the_disk_must_be_zero():
    writer = Qcow2StreamWriter(ClusterMap.all_data(512 * 3, 10))
    pieces = list(pieces_of(writer, lambda at, length: b"x" * length))
    (at,) = (at for at, data in pieces if data == b"x" * 1536)
    with pytest.raises(IntegrityError, match="after the end of the disk"):
        read_all([*((a, d) for a, d in pieces if a < at), (at, b"x" * 2048)])


def test_an_l2_table_that_never_came_is_noticed():
    flat = image()
    with pytest.raises(IntegrityError, match="L2 table 0 is empty or lost"):
        read_all([(0, bytes(flat[:1024])), (1536, bytes(flat[1536:]))])


@pytest.mark.parametrize("cut", [0, 50, 300, 600, 1100, 1700, -700, -1])
def test_a_stream_cut_anywhere_is_noticed(cut):
    flat = bytes(image())
    with pytest.raises(IntegrityError, match="the stream ends here"):
        read_all([(0, flat[:cut])])


def test_a_stream_that_goes_on_goes_back_or_lies_about_its_length_is_refused():
    flat = bytes(image())
    with pytest.raises(IntegrityError, match="the stream goes on"):
        read_all([(0, flat + b"\0")])
    with pytest.raises(IntegrityError, match="bytes have passed"):
        read_all([(0, flat[:600]), (599, flat[599:])])
    with pytest.raises(IntegrityError, match="its attributes say"):
        read_all([(0, flat)], len(flat) + 512)
    with pytest.raises(IntegrityError, match="not a qcow2 image"):
        read_all([(1 << 60, b"x")])


def test_a_failed_reader_stays_failed():
    reader = Qcow2StreamReader(name="scsi0.qcow2")
    with pytest.raises(IntegrityError, match=r"scsi0\.qcow2: qcow2 at byte 0"):
        reader.receive_data(0, bytes(200))
    with pytest.raises(IntegrityError, match=r"scsi0\.qcow2: qcow2 at byte 0"):
        reader.receive_data(200, b"")


def test_unallocated_space_is_told_only_where_asked_and_nothing_lies_below():
    pieces = list(pieces_of(Qcow2StreamWriter(map_of("." * 200 + "d")), bytes_of))
    assert len(read_all(pieces)) == 2
    told = read_all(pieces, zero_unallocated=True)[1:]
    zeroes = [(event.offset, event.length) for event in told[:-1]]
    assert zeroes == [(0, 192 * 512), (192 * 512, 8 * 512)]
    overlay = Qcow2StreamWriter(map_of("." * 200 + "d"), backing=BACKING)
    assert len(read_all(pieces_of(overlay, bytes_of), zero_unallocated=True)) == 2


def bytes_of(at, length):
    return b"x" * length


def test_a_scattered_increment_of_a_huge_disk_is_read_quickly_in_little_memory():
    writer = Qcow2StreamWriter(scattered(TiB, 512), backing=BACKING)
    pieces = list(pieces_of(writer, bytes_of))
    tracemalloc.start()
    began = time.process_time()
    reader = Qcow2StreamReader()
    total = 0
    for at, data in pieces:
        for event in reader.receive_data(at, data):
            total += getattr(event, "length", 0)
    reader.receive_eof(writer.file_size)
    took = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 512 * CLUSTER
    assert peak < 3 * MiB
    assert took < 5  # 0.1 s by itself; tracing and a busy machine allowed for
