# SPDX-License-Identifier: Apache-2.0
"""Reading foreign images in tests: bytes in, a disk out, every byte told once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pveplug.images.detect import FIRST, detect, reader_for
from pveplug.images.stream import (
    Event,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    ImageNote,
    MemorySpill,
    StreamReader,
    feed,
    finish,
)

PARENT = 0xA5
"""What a byte of the parent is, where a test has none."""


@dataclass
class Told:
    """What a reader told, put together."""

    info: ImageInfo | None = None
    end: ImageInfo | None = None
    disk: bytearray = field(default_factory=bytearray)
    notes: list[str] = field(default_factory=list)
    runs: list[tuple[str, int, int]] = field(default_factory=list)

    def take(self, events: Iterable[Event], parent: bytes | None = None) -> None:
        for event in events:
            match event:
                case ImageInfo():
                    assert self.info is None
                    self.info = event
                case ImageNote():
                    self.notes.append(event.text)
                case ImageEnd():
                    assert self.end is None
                    self.end = event.info
                case GuestData():
                    self._put("data", event.offset, bytes(event.data))
                case GuestZero():
                    self._put("zero", event.offset, bytes(event.length))
                case GuestParent():
                    low, high = event.offset, event.offset + event.length
                    below = b"" if parent is None else parent[low:high]
                    fill = bytes([PARENT]) if parent is None else b"\0"
                    self._put("parent", low, below.ljust(event.length, fill))

    def _put(self, kind: str, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.disk):
            self.disk.extend(bytes(end - len(self.disk)))
        self.disk[offset:end] = data
        self.runs.append((kind, offset, end))

    def tiling(self) -> list[tuple[str, int, int]]:
        """The runs in order, neighbours joined; checks that they tile the disk."""
        joined: list[tuple[str, int, int]] = []
        for kind, start, end in sorted(self.runs, key=lambda run: run[1]):
            assert start == (joined[-1][2] if joined else 0)
            if joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1], end)
            else:
                joined.append((kind, start, end))
        return joined


def pieces(data: bytes, cuts: Sequence[int] | int) -> Iterator[bytes]:
    """Cut at given places, or into pieces of one length."""
    if isinstance(cuts, int):
        cuts = range(cuts, len(data), cuts)
    at = 0
    for cut in [*sorted(c for c in cuts if 0 < c < len(data)), len(data)]:
        if cut > at:
            yield data[at:cut]
            at = cut


def read(
    reader: StreamReader,
    data: bytes,
    cuts: Sequence[int] | int = 1 << 20,
    parent: bytes | None = None,
) -> Told:
    """Feed a file to a reader; return what it told."""
    told = Told()
    for piece in pieces(data, cuts):
        for events in feed(reader, piece):
            told.take(events, parent)
    for events in finish(reader):
        told.take(events, parent)
    assert told.end is not None
    assert len(told.disk) == told.end.size
    told.tiling()
    return told


def read_skipping(
    reader: StreamReader, data: bytes, cuts: int, parent: bytes | None = None
) -> tuple[Told, int]:
    """Read as one who seeks over what may be skipped; say how much that was."""
    told, at, skipped = Told(), 0, 0
    while at < len(data):
        for events in feed(reader, data[at : at + cuts]):
            told.take(events, parent)
        at = min(at + cuts, len(data)) + reader.skippable
        skipped += reader.skippable
        reader.skip(reader.skippable)
    for events in finish(reader):
        told.take(events, parent)
    return told, skipped


def read_image(
    data: bytes,
    cuts: Sequence[int] | int = 1 << 20,
    *,
    parent: bytes | None = None,
    spill: int | None = 1 << 30,
) -> Told:
    """Detect what a file is and read it; the same must be told to one who skips."""

    def reader() -> StreamReader:
        return reader_for(
            detect(data[:FIRST]),
            file_size=len(data),
            spill=None if spill is None else MemorySpill(spill),
        )

    told = read(reader(), data, cuts, parent)
    length = cuts if isinstance(cuts, int) else 1 + len(cuts) * 500
    again, _ = read_skipping(reader(), data, length, parent)
    assert (again.disk, again.info, again.end) == (told.disk, told.info, told.end)
    assert (again.tiling(), again.notes) == (told.tiling(), told.notes)
    return told


def some_disk(size: int, seed: int = 1, holes: float = 0.5) -> bytes:
    """A disk of random, text and empty stretches of odd lengths."""
    noise = random.Random(seed)
    disk = bytearray(size)
    at = 0
    while at < size:
        length = min(noise.choice([512, 4096, 65536, 200 * 1024, 1 << 20]), size - at)
        if noise.random() >= holes:
            if noise.random() < 0.5:
                disk[at : at + length] = noise.randbytes(length)
            else:
                text = b"line %d of a log\n" % at
                disk[at : at + length] = (text * (length // len(text) + 1))[:length]
        at += length
    return bytes(disk)
