# SPDX-License-Identifier: Apache-2.0
"""Writer and reader are each other's inverse, whatever happens to the stream's cuts."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.errors import IntegrityError
from pveplug.images.digests import DigestVerifier, DigestWriter, compare
from pveplug.images.qcow2_reader import GuestData, ImageHeader, Qcow2StreamReader
from pveplug.images.qcow2_writer import DataRun, Gap, Metadata, Qcow2StreamWriter, dense
from tests.support.images import apply, map_of, pieces_of, read_all, without_zeroes


@st.composite
def images(draw):
    """A map, a disk partly of zeroes, an optional backing name."""
    kinds = "".join(
        letter * count
        for letter, count in draw(
            st.lists(
                st.tuples(st.sampled_from("dz."), st.integers(1, 150)),
                min_size=1,
                max_size=8,
            )
        )
    )
    bits = draw(st.sampled_from([9, 10, 12]))
    size = (len(kinds) << bits) - 512 * draw(st.integers(0, (1 << bits - 9) - 1))
    noise = random.Random(draw(st.integers(0, 1000)))
    disk = bytearray(noise.randbytes(size))
    for at in range(0, size, 512):
        if noise.random() < 0.3:
            disk[at : at + 512] = bytes(512)
    backing = draw(st.sampled_from([None, "../job.2026_01/scsi0.qcow2"]))
    return map_of(kinds, size, bits), bytes(disk), backing


def recut(pieces, file_size, draw):
    """Cut, merge and drop as Bacula may, or make it dense."""
    mode = draw(st.sampled_from(["same", "holes", "small", "dense"]))
    if mode == "holes":
        return list(without_zeroes(pieces, 512))
    if mode == "same":
        return pieces
    length = draw(st.sampled_from([1, 97, 512, 65528, 1 << 20]))
    if mode == "small":
        length = max(length, 97)
        return [
            (at + start, data[start : start + length])
            for at, data in pieces
            for start in range(0, len(data), length)
        ]
    flat = bytearray(file_size)
    for at, data in pieces:
        flat[at : at + len(data)] = data
    length = max(length, 512)
    return [(at, bytes(flat[at : at + length])) for at in range(0, file_size, length)]


@settings(max_examples=60, deadline=None)
@given(images(), st.data())
def test_what_was_written_is_read(image, data):
    clusters, disk, backing = image
    writer = Qcow2StreamWriter(clusters, backing=backing)
    pieces = list(pieces_of(writer, lambda at, length: disk[at : at + length]))
    pieces = recut(pieces, writer.file_size, data.draw)
    events = read_all(pieces, writer.file_size, zero_unallocated=True)

    target = bytearray(b"\xa5" * len(disk))
    header = apply(events, target)
    assert header == ImageHeader(
        len(disk), backing, clusters.cluster_bits, writer.file_size
    )
    expected = bytearray(b"\xa5" * len(disk))
    for run in clusters.runs():
        if run.kind.value == "data":
            expected[run.offset : run.end] = disk[run.offset : run.end]
        elif run.kind.value == "zero" or backing is None:
            expected[run.offset : run.end] = bytes(run.length)
    assert target == expected


def verify(verifier, events):
    verifier.receive(events)
    return verifier.finish()


@settings(max_examples=60, deadline=None)
@given(images(), st.data())
def test_digests_are_the_same_on_both_sides(image, data):
    clusters, disk, backing = image
    writer = Qcow2StreamWriter(clusters, backing=backing)
    pieces = list(pieces_of(writer, lambda at, length: disk[at : at + length]))
    sent = DigestWriter(clusters, overlay=backing is not None)
    told = data.draw(st.booleans())
    for run in clusters.data_runs():
        for at in range(run.offset, run.end, clusters.cluster_size):
            part = disk[at : min(at + clusters.cluster_size, run.end)]
            if any(part) or told:
                found = blake3(part).digest() if any(part) else None
                sent.add(at >> clusters.cluster_bits, found)
    sidecar, root = sent.finish()

    pieces = recut(pieces, writer.file_size, data.draw)
    for zero_unallocated in (False, True):
        events = read_all(pieces, zero_unallocated=zero_unallocated)
        assert verify(DigestVerifier(sidecar), events) == (sidecar, root)

    changed = [event for event in events if isinstance(event, GuestData)]
    if changed:
        victim = data.draw(st.sampled_from(changed))
        index = data.draw(st.integers(0, victim.length - 1))
        bad = bytearray(victim.data)
        bad[index] ^= 1
        events[events.index(victim)] = GuestData(victim.offset, memoryview(bad))
        with pytest.raises(IntegrityError, match="digest differs"):
            verify(DigestVerifier(sidecar), events)
        late = DigestVerifier()
        late.receive(events)
        with pytest.raises(IntegrityError, match="digest differs"):
            compare(sidecar, late.finish()[0])


@settings(max_examples=60, deadline=None)
@given(images())
def test_pieces_are_in_order_and_dense_fills_what_they_leave(image):
    clusters, _, backing = image
    writer = Qcow2StreamWriter(clusters, backing=backing)
    at = 0
    for piece in writer.pieces():
        assert piece.file_offset >= at
        assert piece.length > 0
        at = piece.file_offset + piece.length
    assert isinstance(piece, Metadata)
    assert at == writer.file_size
    at = 0
    for piece in dense(writer.pieces(), writer.file_size):
        assert isinstance(piece, Metadata | DataRun | Gap)
        assert piece.file_offset == at
        at += piece.length
    assert at == writer.file_size


@settings(max_examples=150, deadline=None)
@given(images(), st.data())
def test_a_damaged_image_gives_the_documented_error_or_other_data(image, data):
    clusters, disk, backing = image
    writer = Qcow2StreamWriter(clusters, backing=backing)
    pieces = list(pieces_of(writer, lambda at, length: disk[at : at + length]))
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(pieces) - 1))
        at, content = pieces[index]
        match data.draw(st.sampled_from(["flip", "drop", "swap", "move", "cut"])):
            case "flip":
                bad = bytearray(content)
                if bad:
                    bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(
                        st.integers(0, 255)
                    )
                pieces[index] = (at, bytes(bad))
            case "drop" if len(pieces) > 1:
                del pieces[index]
            case "swap":
                other = data.draw(st.integers(0, len(pieces) - 1))
                pieces[index], pieces[other] = pieces[other], pieces[index]
            case "move":
                pieces[index] = (at + data.draw(st.integers(0, 1 << 40)), content)
            case _:
                pieces[index] = (at, content[: len(content) // 2])
    reader = Qcow2StreamReader()
    reached = 0
    try:
        for at, content in pieces:
            for event in reader.receive_data(at, content):
                if not isinstance(event, ImageHeader):
                    assert reached <= event.offset
                    reached = event.offset + event.length
                    assert reached <= len(disk)
        reader.receive_eof(writer.file_size)
    except IntegrityError:
        with pytest.raises(IntegrityError):
            reader.receive_data(1 << 50, b"x")
        with pytest.raises(IntegrityError):
            reader.receive_eof()


@given(st.lists(st.tuples(st.integers(0, 1 << 70), st.binary(max_size=300))))
def test_garbage_is_refused(pieces):
    with pytest.raises(IntegrityError):
        read_all(pieces)


@given(st.data())
def test_any_number_in_the_header_is_judged_before_it_costs_anything(data):
    writer = Qcow2StreamWriter(map_of("d" * 100), backing="../job/x.qcow2")
    _, header = next(pieces_of(writer, lambda at, length: bytes(length)))
    bad = bytearray(header)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(4, 103))
        bad[at] = data.draw(st.integers(0, 255))
    if bad == header:
        return
    with pytest.raises(IntegrityError):
        read_all([(0, bytes(bad)), (1 << 45, b"x")])
