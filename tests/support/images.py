# SPDX-License-Identifier: Apache-2.0
"""Disks, maps and streams for the tests of pveplug.images."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pveplug.extents import Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.qcow2_reader import (
    Event,
    GuestData,
    GuestZero,
    ImageHeader,
    Qcow2StreamReader,
)
from pveplug.images.qcow2_writer import DataRun, Metadata, Qcow2StreamWriter

Piece = tuple[int, bytes]
Disk = Callable[[int, int], bytes]


def map_of(kinds: str, size: int | None = None, cluster_bits: int = 9) -> ClusterMap:
    """Make a map from one letter a cluster: ``d``, ``z`` or ``.``."""
    bits = cluster_bits
    made = ClusterMap(size or len(kinds) << bits, bits)
    for number, letter in enumerate(kinds):
        start = number << bits
        length = min(1 << bits, made.size - start)
        if letter in "dz":
            made.mark_range(start, length, Kind.DATA if letter == "d" else Kind.ZERO)
    return made


def kinds_of(made: ClusterMap) -> str:
    """Undo :func:`map_of`."""
    letters = {Kind.DATA: "d", Kind.ZERO: "z", Kind.CLEAN: "."}
    return "".join(letters[made.kind_at(n)] for n in range(made.clusters))


def scattered(size: int, count: int, seed: int = 1) -> ClusterMap:
    """Make a map of ``count`` single data clusters anywhere on the disk."""
    made = ClusterMap(size)
    chosen = random.Random(seed).sample(range(made.clusters), count)
    for number in chosen:
        start = number << 16
        made.mark_range(start, min(1 << 16, size - start), Kind.DATA)
    return made


def pieces_of(writer: Qcow2StreamWriter, disk: Disk) -> Iterator[Piece]:
    """Do an engine's work: fetch the data runs from ``disk``."""
    for piece in writer.pieces():
        if isinstance(piece, Metadata):
            yield piece.file_offset, piece.data
        else:
            assert isinstance(piece, DataRun)
            at = 0
            while at < piece.length:
                length = min(piece.length - at, 1 << 20)
                yield piece.file_offset + at, disk(piece.guest_offset + at, length)
                at += length


def without_zeroes(pieces: Iterable[Piece], block: int) -> Iterator[Piece]:
    """Leave out the zero blocks of every piece, except for the stream's last byte."""
    last: Piece | None = None
    for at, data in pieces:
        if last:
            yield from _nonzero(*last, block)
        last = (at, data)
    if last:
        yield last


def _nonzero(at: int, data: bytes, block: int) -> Iterator[Piece]:
    for start in range(0, len(data), block):
        part = data[start : start + block]
        if any(part):
            yield at + start, part


def write_file(path: Path, pieces: Iterable[Piece]) -> int:
    """Write pieces to a sparse file; return how many bytes they had."""
    sent = 0
    with path.open("wb") as file:
        for at, data in pieces:
            file.seek(at)
            file.write(data)
            sent += len(data)
    return sent


def read_all(
    pieces: Iterable[Piece], file_size: int | None = None, **options: bool
) -> list[Event]:
    """Run a reader over a whole stream."""
    reader = Qcow2StreamReader(**options)
    events: list[Event] = []
    for at, data in pieces:
        events += reader.receive_data(at, data)
    return events + reader.receive_eof(file_size)


def apply(events: Iterable[Event], target: bytearray) -> ImageHeader:
    """Write what a reader told onto a disk; check that it comes in order."""
    header: ImageHeader | None = None
    at = 0
    for event in events:
        if isinstance(event, ImageHeader):
            assert header is None
            header = event
            continue
        assert event.offset >= at
        assert event.length > 0
        at = event.offset + event.length
        if isinstance(event, GuestZero):
            target[event.offset : at] = bytes(event.length)
        else:
            assert isinstance(event, GuestData)
            target[event.offset : at] = event.data
    assert header is not None
    assert at <= header.size
    return header


def gpt(sector: int, *parts: tuple[int, int], count: int = 128) -> bytes:
    """The beginning of a disk; parts in bytes."""
    mbr = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, 2**32 - 1)
    head = b"EFI PART" + bytes(64) + struct.pack("<QII", 2, count, 128)
    table = b"".join(
        struct.pack(
            "<16s16sQQ", b"\1" * 16, b"\2" * 16, low // sector, high // sector - 1
        ).ljust(128, b"\0")
        for low, high in parts
    )
    start = (mbr.ljust(510, b"\0") + b"\x55\xaa").ljust(sector, b"\0")
    return ((start + head).ljust(2 * sector, b"\0") + table).ljust(1 << 16, b"\0")
