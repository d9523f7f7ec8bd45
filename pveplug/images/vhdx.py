# SPDX-License-Identifier: Apache-2.0
"""VHDX (Hyper-V), forward only: dynamic, fixed, differencing; with its log replayed.

::

    0       identifier, 2 headers, 2 region tables          the first MiB
            log, metadata, block allocation table (BAT)     in any order
            payload blocks, sector bitmap blocks            anywhere

Of the headers that with the higher sequence number counts, if its CRC is right. If it
names a log, the log's active sequence is put over everything that is read afterwards,
and over the metadata and the BAT if these came first: nothing is written, so the file
may come through a pipe. Every 2^23 sectors of a differencing disk have a bitmap block
that says which sectors of "partially present" blocks are here and not in the parent.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from typing import Final

from pveplug.images import vhdx_wire as wire
from pveplug.images.bitruns import bit_runs, words
from pveplug.images.placed import Place, PlacedReader
from pveplug.images.stream import (
    Flow,
    GuestParent,
    GuestZero,
    ImageInfo,
    ParentLink,
    Spill,
)
from pveplug.images.vhdx_log import MAX_LOG, Log, LogPatches
from pveplug.units import MiB

MAX_BAT: Final = 32 * MiB
"""4 TiB of blocks of 1 MiB, 64 TiB of blocks of 16 MiB (Hyper-V makes 32 MiB)."""
MAX_METADATA: Final = 4 * MiB
MAX_BITMAPS: Final = 32 * MiB  # of compressed sector bitmaps kept at a time

_METADATA: Final = 0
_LOG: Final = 1
_BAT: Final = 2
_DATA: Final = 3
_PARTIAL: Final = 4
_BITMAP: Final = 5
_NAMES: Final = ("metadata region", "log", "BAT", "payload", "payload", "bitmaps")


class VhdxReader(PlacedReader):
    """Tells a VHDX of any kind."""

    format = "vhdx"

    def __init__(
        self,
        *,
        name: str = "image",
        file_size: int | None = None,
        spill: Spill | None = None,
    ) -> None:
        super().__init__(name=name, file_size=file_size, spill=spill)
        self._regions: dict[int, tuple[int, bytes]] = {}  # by tag
        self._front = b""
        self._header: wire.Header
        self._laid_out: dict[bytes, tuple[int, int]] = {}
        self._wanted = 0
        self._info: ImageInfo | None = None
        self._parent = False
        self._block = self._sector = self._ratio = 0
        self._partial: dict[int, int] = {}  # chunk -> blocks that need its bitmap
        self._bitmaps: dict[int, bytes] = {}
        self._unpacked = (-1, b"")  # the bitmap that was used last
        self._bitmap_bytes = 0
        self._waiting: dict[int, list[Place]] = {}

    def _run(self) -> Flow[None]:
        front = yield from self._take(wire.FRONT)
        if not front.startswith(wire.SIGNATURE):
            raise self._error(0, "this is not a VHDX")
        header = self._choose_header(front)
        regions = self._choose_regions(front)
        places = [
            (_METADATA, *regions[wire.METADATA_REGION], MAX_METADATA),
            (_BAT, *regions[wire.BAT], MAX_BAT),
        ]
        if any(header.log_guid):
            if header.log_version:
                raise self._error(wire.HEADERS[0], f"log version {header.log_version}")
            if header.log_offset < wire.FRONT or header.log_offset % MiB:
                raise self._error(wire.HEADERS[0], f"a log at {header.log_offset}")
            places.append((_LOG, header.log_offset, header.log_length, MAX_LOG))
        for tag, offset, length, most in places:
            if not 0 < length <= most or length % MiB:
                raise self._error(offset, f"{_NAMES[tag]} of {length} bytes")
            self._plan(Place(offset, length, 0, tag), wire.REGIONS[0])
        self._wanted = len(places)
        self._front, self._header, self._laid_out = front, header, regions
        yield from self._walk()
        if not self._info:
            raise AssertionError("the regions were planned and not read")
        patches = self._patches
        yield from self._finish(self._info)
        if isinstance(patches, LogPatches) and self.position < patches.flushed:
            raise self._error(
                self.position,
                f"the file ends here; its log saw {patches.flushed} bytes: truncated",
            )

    def _choose_header(self, front: bytes) -> wire.Header:
        found: list[wire.Header] = []
        wrong: list[str] = []
        for at in wire.HEADERS:
            header = wire.parse_header(front[at : at + wire.HEADER_SIZE])
            if isinstance(header, wire.Header):
                found.append(header)
            else:
                wrong.append(f"the header at {at} {header}")
        if not found:
            raise self._error(wire.HEADERS[0], "; ".join(wrong))
        if len(found) == 2 and found[0].sequence == found[1].sequence:
            if found[0] != found[1]:
                raise self._error(
                    wire.HEADERS[0], "two different headers have one sequence number"
                )
            found.pop()
        header = max(found, key=lambda header: header.sequence)
        if header.version != 1:
            raise self._error(wire.HEADERS[0], f"version {header.version} is not read")
        return header

    def _choose_regions(self, front: bytes) -> dict[bytes, tuple[int, int]]:
        wrong: list[str] = []
        for at in wire.REGIONS:
            regions = wire.parse_regions(front[at : at + wire.REGION_SIZE])
            if not isinstance(regions, str):
                return regions
            wrong.append(f"the region table at {at} {regions}")
        raise self._error(wire.REGIONS[0], "; ".join(wrong))

    def _visit(self, place: Place) -> Flow[None]:
        self._what = _NAMES[place.tag]
        match place.tag:
            case 0 | 1 | 2:
                data = yield from self._bytes_at(place.offset, place.length)
                self._regions[place.tag] = (place.offset, data)
                if len(self._regions) == self._wanted:
                    yield from self._judge_regions()
            case 3:
                yield from self._data_at(place.offset, place.length, place.target)
            case 4:
                yield from self._visit_partial(place)
            case _:
                yield from self._visit_bitmap(place)

    # --- the regions ---------------------------------------------------------------

    def _judge_regions(self) -> Flow[None]:
        """All is here that the rest depends on: replay, then lay the blocks out."""
        if _LOG in self._regions:
            self._replay(*self._regions.pop(_LOG))
        at, data = self._regions.pop(_METADATA)
        metadata = wire.parse_metadata(self._patched(data, at))
        if isinstance(metadata, str):
            raise self._error(at, metadata)
        parent = None
        if metadata.has_parent:
            locator = metadata.locator
            keys = ("parent_linkage", "parent_linkage2")
            paths = ("relative_path", "absolute_win32_path", "volume_path")
            parent = ParentLink(
                "vhdx-guid",
                tuple(_plain(locator[key]) for key in keys if locator.get(key)),
                tuple(locator[key] for key in paths if locator.get(key)),
            )
            if not parent.identities:
                raise self._error(at, "a differencing disk that names no parent")
            kind = "differencing"
        else:
            kind = "fixed" if metadata.leave_allocated else "dynamic"
        self._parent = parent is not None
        self._info = ImageInfo(
            "vhdx",
            kind,
            metadata.size,
            metadata.sector,
            self._header.data_write,
            parent,
        )
        self._begin(self._info, at)
        self._block, self._sector = metadata.block, metadata.sector
        self._ratio = (wire.BITMAP_SECTORS * metadata.sector) // metadata.block
        at, data = self._regions.pop(_BAT)
        self._front = b""
        yield from self._judge_bat(self._patched(data, at), at)

    def _patched(self, data: bytes, at: int) -> bytes:
        patches = self._patches
        return patches.apply(data, at) if isinstance(patches, LogPatches) else data

    def _replay(self, at: int, ring: bytes) -> None:
        patches = Log(ring, self._header.log_guid).replay()
        if isinstance(patches, str):
            raise self._error(at, f"the header names a log, but {patches}")
        front = patches.apply(self._front, 0)
        if self._choose_regions(front) != self._laid_out:
            raise self._error(at, "the log moves the regions of the file")
        self._patches = patches
        self._note(f"was not closed cleanly; its log was applied ({len(patches)} runs)")

    def _judge_bat(self, data: bytes, at: int) -> Flow[None]:
        blocks = -(-self._size // self._block)
        if self._parent:
            entries = -(-blocks // self._ratio) * (self._ratio + 1)
        else:
            entries = blocks + (blocks - 1) // self._ratio
        if entries * 8 > len(data):
            raise self._error(at, f"a BAT of {len(data)} bytes for {blocks} blocks")
        table = words(memoryview(data)[: entries * 8].tobytes(), "Q", "little")
        del data
        self._settled = True
        yield from self._plan_all(self._places(table, blocks, at), at, join=_DATA)
        yield from self._plan_all(self._bitmap_places(table, at), at)

    def _places(
        self, table: array[int], blocks: int, at: int
    ) -> Iterator[Place | None]:
        """Go through the BAT, telling what isn't there."""
        hole = GuestParent if self._parent else GuestZero
        for index in range(blocks):
            entry = table[index + index // self._ratio]
            guest = index * self._block
            length = min(self._block, self._size - guest)
            state = entry & wire.STATE
            if state == wire.FULLY_PRESENT:
                yield Place(entry & wire.PLACE, length, guest, _DATA)
            elif state == wire.PARTIALLY_PRESENT and self._parent:
                chunk = index // self._ratio
                self._partial[chunk] = self._partial.get(chunk, 0) + 1
                yield Place(entry & wire.PLACE, length, guest, _PARTIAL)
            elif state == wire.NOT_PRESENT:
                self._tell(hole(guest, length))
            elif state in (wire.UNDEFINED, wire.ZERO, wire.UNMAPPED):
                self._tell(GuestZero(guest, length))
            else:
                raise self._error(
                    at + (index + index // self._ratio) * 8,
                    f"block {index} is in state {state} (0x{entry:016x})",
                )
            if self._full:
                yield None

    def _bitmap_places(self, table: array[int], at: int) -> Iterator[Place]:
        for chunk in self._partial:
            index = chunk * (self._ratio + 1) + self._ratio
            if table[index] & wire.STATE != wire.FULLY_PRESENT:
                raise self._error(
                    at + index * 8, f"sector bitmap {chunk} is needed and not there"
                )
            yield Place(table[index] & wire.PLACE, MiB, chunk, _BITMAP)

    # --- blocks of a differencing disk ---------------------------------------------

    def _visit_partial(self, place: Place) -> Flow[None]:
        chunk = place.target // (self._block * self._ratio)
        if chunk in self._bitmaps:
            yield from self._tell_partial(place, self._bitmap(chunk))
            self._done_with(chunk)
            return
        if place.offset >= self.position:
            yield from self._go_to(place.offset)
            self._settled = False  # the block is kept until its bitmap has come
            yield from self._go_to(place.offset + place.length)
            self._settled = True
        self._waiting.setdefault(chunk, []).append(place)

    def _visit_bitmap(self, place: Place) -> Flow[None]:
        data = yield from self._bytes_at(place.offset, place.length)
        chunk = place.target
        packed = zlib.compress(data, 1)
        self._bitmap_bytes += len(packed)
        if self._bitmap_bytes > MAX_BITMAPS:
            raise self._error(
                place.offset, f"more than {MAX_BITMAPS} bytes of sector bitmaps"
            )
        self._bitmaps[chunk] = packed
        for waiting in self._waiting.pop(chunk, []):
            yield from self._tell_partial(waiting, data)
            self._done_with(chunk)

    def _bitmap(self, chunk: int) -> bytes:
        if self._unpacked[0] != chunk:
            self._unpacked = (chunk, zlib.decompress(self._bitmaps[chunk]))
        return self._unpacked[1]

    def _done_with(self, chunk: int) -> None:
        self._partial[chunk] -= 1
        if not self._partial[chunk]:
            self._bitmap_bytes -= len(self._bitmaps.pop(chunk))

    def _tell_partial(self, place: Place, bitmap: bytes) -> Flow[None]:
        at, guest = place.offset, place.target
        first = guest // self._sector % wire.BITMAP_SECTORS
        count = place.length // self._sector
        for here, sectors in bit_runs(bitmap, first, count, high_first=False):
            length = sectors * self._sector
            if here:
                yield from self._data_at(at, length, guest)
            else:
                self._tell(GuestParent(guest, length))
            at, guest = at + length, guest + length


def _plain(guid: str) -> str:
    """Return a GUID without braces, in lower case."""
    return guid.strip("{}\0 ").lower()
