# SPDX-License-Identifier: Apache-2.0
"""Sparse VMDK extents with tables in place, forward only; and ESX's COWD.

::

    header, descriptor
    grain directory ─► grain tables ─► grains     often twice: redundant, then primary

A grain table entry is a grain's sector, 0 for the parent's content (zeroes without a
parent) or, if the header allows it, 1 for zeroes. Where the tables are there twice,
both are read and must be equal: they are the only check the format has. ``tables``
lets an operator read an image by one of them that is known to be good.

qemu-img writes streamOptimized this way too: grains are compressed behind markers, and
the tables are in front.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from typing import Final, Literal

from pveplug.images import vmdk_wire as wire
from pveplug.images.bitruns import words
from pveplug.images.placed import Place, PlacedReader
from pveplug.images.stream import (
    Flow,
    GuestParent,
    GuestZero,
    ImageInfo,
    ParentLink,
    Spill,
)
from pveplug.units import SECTOR, MiB

Tables = Literal["both", "primary", "redundant"]

MAX_DIRECTORY: Final = 4 * MiB
_DIRECTORY: Final = 0
_TABLE: Final = 1  # target: its index, twice, plus 1 for the redundant one
_GRAIN: Final = 2
_COMPRESSED: Final = 3
_NAMES: Final = ("grain directory", "grain tables", "grains", "grains")


class SparseReader(PlacedReader):
    """What hosted sparse extents and COWD have in common: a directory of tables."""

    format = "vmdk"

    def __init__(
        self,
        *,
        name: str = "image",
        file_size: int | None = None,
        spill: Spill | None = None,
        tables: Tables = "both",
        extent_of: ImageInfo | None = None,
    ) -> None:
        """Make a reader for one file.

        Args:
            name: what errors call it; ``file_size``, ``spill``: see StreamReader.
            tables: which of redundant tables to believe.
            extent_of: the disk that this is an extent of: that has a parent or not.
        """
        super().__init__(name=name, file_size=file_size, spill=spill)
        self._mode = tables
        self._extent_of = extent_of
        self._parent = False
        self._grain = 0
        self._entries = 0
        self._zeroed = self._compressed = False
        self._both = False
        self._used_tables: bytes | None = None  # a byte for each: the directory has it
        self._sums: dict[int, int] = {}  # of the first copy of a table
        self._tables_left = 0

    def _plan_directories(self, places: dict[int, int], tables: int, at: int) -> None:
        """Plan the directories: by copy, 0 for the primary one."""
        self._both = len(places) > 1
        self._tables_left = len(places)
        for copy, place in places.items():
            self._plan(Place(place, tables * 4, copy, _DIRECTORY), at)

    def _judge_directory(self, place: Place, data: bytes) -> Flow[None]:
        """Plan its tables; what one directory lacks, the other must lack too."""
        sectors = words(data, "I", "little")
        used = bytes(map(bool, sectors))
        first = self._used_tables is None
        if not first and self._used_tables != used:
            raise self._error(place.offset, "the two grain directories differ")
        self._used_tables = used
        self._tables_left += sum(used) - 1
        self._settled = not self._tables_left
        tables = self._table_places(sectors, place.target, first)
        yield from self._plan_all(tables, place.offset)

    def _table_places(
        self, sectors: array[int], copy: int, first: bool
    ) -> Iterator[Place | None]:
        span = self._grain * self._entries
        for index, sector in enumerate(sectors):
            if sector:
                target = index * 2 + copy
                yield Place(sector * SECTOR, self._entries * 4, target, _TABLE)
            elif first:
                self._tell_hole(index * span, span)
                if self._full:
                    yield None

    def _tell_hole(self, guest: int, length: int) -> None:
        self._tell((GuestParent if self._parent else GuestZero)(guest, length))

    def _visit(self, place: Place) -> Flow[None]:
        self._what = _NAMES[place.tag]
        if place.tag == _GRAIN:
            yield from self._data_at(place.offset, place.length, place.target)
        elif place.tag == _COMPRESSED:
            yield from self._visit_compressed(place)
        else:
            data = yield from self._bytes_at(place.offset, place.length)
            if place.tag == _DIRECTORY:
                yield from self._judge_directory(place, data)
                return
            self._tables_left -= 1
            # Before its places are planned: they may lie right behind it.
            self._settled = not self._tables_left
            yield from self._judge_table(place, data)

    def _judge_table(self, place: Place, data: bytes) -> Flow[None]:
        index = place.target >> 1
        if self._both:
            known = self._sums.pop(index, None)
            if known is None:
                self._sums[index] = zlib.crc32(data)
            else:
                if known != zlib.crc32(data):
                    raise self._error(
                        place.offset,
                        f"grain table {index} and its redundant copy differ: one of "
                        "them is damaged or was not written before a crash",
                    )
                return
        if data.count(0) != len(data):
            places = self._grain_places(data, index, place.offset)
            yield from self._plan_all(places, place.offset, join=_GRAIN)
        else:
            span = self._grain * self._entries
            self._tell_hole(index * span, span)

    def _grain_places(self, data: bytes, index: int, at: int) -> Iterator[Place]:
        grain = self._grain
        guest = index * grain * self._entries
        for entry in words(data, "I", "little"):
            if guest >= self._size:
                if entry:
                    raise self._error(at, f"table {index} has a grain beyond the disk")
            elif not entry:
                self._tell_hole(guest, grain)
            elif entry == wire.ZEROED and self._zeroed:
                self._tell(GuestZero(guest, grain))
            elif self._compressed:
                yield Place(entry * SECTOR, SECTOR, guest, _COMPRESSED)
            else:
                length = min(grain, self._size - guest)
                yield Place(entry * SECTOR, length, guest, _GRAIN)
            guest += grain

    def _visit_compressed(self, place: Place) -> Flow[None]:
        marker = yield from self._bytes_at(place.offset, wire.GRAIN_MARKER.size)
        sector, length = wire.GRAIN_MARKER.unpack(marker)
        if sector * SECTOR != place.target:
            raise self._error(
                place.offset,
                f"the grain of sector {place.target // SECTOR} is "
                f"marked as that of {sector}",
            )
        if not 0 < length <= wire.longest(self._grain):
            raise self._error(place.offset + 8, f"a compressed grain of {length} bytes")
        data = yield from self._bytes_at(place.offset + wire.GRAIN_MARKER.size, length)
        inside = min(self._grain, self._size - place.target)
        grain = wire.inflated(data, self._grain, inside)
        if isinstance(grain, str):
            raise self._error(place.offset, grain)
        self._tell_data(place.target, memoryview(grain), made=True)


class VmdkSparseReader(SparseReader):
    """Tells monolithicSparse, an extent of twoGbMaxExtentSparse, qemu's compressed."""

    def _run(self) -> Flow[None]:
        header = wire.parse_header((yield from self._take(wire.HEADER.size)))
        if not isinstance(header, wire.Header):
            raise self._error(*header)
        if header.directory is None:
            raise self._error(56, "the grain directory is at the end: a stream")
        if header.flags & wire.COMPRESSED and not header.flags & wire.MARKERS:
            raise self._error(8, "compressed grains without markers")
        if header.tables * 4 > MAX_DIRECTORY:
            raise self._error(12, f"a grain directory of {header.tables} entries")
        info = yield from self._describe(header)
        self._begin(info, 12)
        self._grain, self._entries = header.grain, wire.ENTRIES
        self._zeroed = bool(header.flags & wire.ZEROED_GRAINS)
        self._compressed = bool(header.flags & wire.COMPRESSED)
        self._parent = info.parent is not None
        if header.unclean:
            self._note("was not closed cleanly; its tables are read as they are")
        directories = {0: header.directory, 1: header.redundant}
        if self._mode == "primary" or not header.redundant:
            del directories[1]
        elif self._mode == "redundant":
            del directories[0]
        self._plan_directories(directories, header.tables, 56)
        yield from self._walk()
        yield from self._finish(info)

    def _describe(self, header: wire.Header) -> Flow[ImageInfo]:
        identity, parent = "", None
        kind = "streamOptimized" if header.flags & wire.COMPRESSED else "sparse"
        if header.descriptor and header.descriptor_size:
            self._what = "descriptor"
            text = yield from self._bytes_at(header.descriptor, header.descriptor_size)
            found = wire.parse_descriptor(text)
            if isinstance(found, str):
                if self._extent_of is None:
                    raise self._error(header.descriptor, found)
            else:
                identity, parent = found.cid, found.parent
                kind = found.create_type
        elif self._extent_of is None:
            raise self._error(
                28,
                "has no descriptor: it is one extent of a disk, whose .vmdk text "
                "file says which",
            )
        if self._extent_of is not None:
            identity, parent = "", self._extent_of.parent
        return ImageInfo(
            "vmdk", kind, header.capacity, identity=identity, parent=parent
        )


class CowdReader(SparseReader):
    """Tells a COWD: ESX 2's disks, and vmfsSparse, the snapshots of later ESX."""

    def _run(self) -> Flow[None]:
        raw = yield from self._take(wire.COWD_SIZE)
        _, version, flags, sectors, grain, place, entries, _, text = (
            wire.COWD.unpack_from(raw)
        )
        if not raw.startswith(wire.COWD_MAGIC):
            raise self._error(0, "this is not a COWD")
        if version != 1:
            raise self._error(4, f"version {version}")
        if not sectors:
            raise self._error(12, "a disk of 0 sectors")
        if grain & (grain - 1) or not 0 < grain <= wire.MAX_GRAIN:
            raise self._error(16, f"grains of {grain} sectors")
        tables = -(-sectors // (grain * wire.COWD_ENTRIES))
        if not tables <= entries <= MAX_DIRECTORY // 4:
            raise self._error(24, f"a directory of {entries} for {tables} tables")
        parent: ParentLink | None = None
        if self._extent_of is not None:
            parent = self._extent_of.parent
        elif not flags & wire.COWD_ROOT:
            hint = text.split(b"\0", 1)[0].decode("utf-8", "replace")
            parent = ParentLink("name", (), (hint,))
        info = ImageInfo("vmdk", "vmfsSparse", sectors * SECTOR, parent=parent)
        self._begin(info, 12)
        self._grain, self._entries = grain * SECTOR, wire.COWD_ENTRIES
        self._parent = parent is not None
        self._plan_directories({0: place * SECTOR}, tables, 20)
        yield from self._walk()
        yield from self._finish(info)
