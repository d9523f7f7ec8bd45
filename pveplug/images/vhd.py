# SPDX-License-Identifier: Apache-2.0
"""Dynamic and differencing VHDs (Virtual PC, Hyper-V, Azure), forward only.

::

    0        copy of the footer        512 bytes
    512      dynamic disk header       1024 bytes
             block allocation table    4 bytes a block: its sector, or FFFFFFFF
             block: bitmap, data       anywhere
    end      footer

A bit of a block's bitmap is 1 where a sector was written; elsewhere it is zero, or the
parent's. A fixed VHD is read by :mod:`pveplug.images.raw`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pveplug.images import vhd_wire
from pveplug.images.bitruns import bit_runs, words
from pveplug.images.placed import Place, PlacedReader
from pveplug.images.stream import Flow, GuestParent, GuestZero, ImageInfo, ParentLink
from pveplug.images.vhd_wire import DynamicHeader, Footer
from pveplug.units import SECTOR, GiB, KiB, MiB, TiB, round_up

MAX_SIZE: Final = 2040 * GiB
MAX_TABLE: Final = 16 * MiB
MAX_BLOCK: Final = 256 * MiB

_TABLE: Final = 0
_BLOCK: Final = 1


class VhdReader(PlacedReader):
    """Tells a dynamic or differencing VHD."""

    format = "vhd"

    _bitmap_size = 0
    _block = 0
    _parent = False
    _stale = 0
    _blocks = 0

    def _run(self) -> Flow[None]:
        first = yield from self._take(vhd_wire.FOOTER.size)
        footer = vhd_wire.parse_footer(first)
        if not isinstance(footer, Footer):
            raise self._error(0, footer)
        if footer.kind not in (vhd_wire.DYNAMIC, vhd_wire.DIFFERENCING):
            raise self._error(
                60, f"a {footer.kind_name} disk that begins with a footer's copy"
            )
        if footer.size > min(MAX_SIZE, 2 * TiB):
            raise self._error(48, f"a disk of {footer.size} bytes")
        self._what = "dynamic disk header"
        raw = yield from self._bytes_at(
            self._placed(footer.data_offset), vhd_wire.HEADER.size
        )
        header = vhd_wire.parse_header(raw)
        if not isinstance(header, DynamicHeader):
            raise self._error(footer.data_offset, header)
        info = self._describe(footer, header)
        self._begin(info, 48)
        self._what = "block allocation table"
        table = round_up(header.entries * 4, SECTOR)
        self._plan(Place(self._placed(header.table), table, 0, _TABLE), 0)
        yield from self._walk()
        if self._stale:
            self._note(
                f"{self._stale} bytes stand in sectors whose bitmap says that they "
                "were never written; they read as zeroes, as the specification says"
            )
        yield from self._judge_end(first, info)

    def _placed(self, offset: int) -> int:
        if offset % SECTOR or offset >= 1 << 62:
            raise self._error(0, f"a header or table at byte {offset}")
        return offset

    def _describe(self, footer: Footer, header: DynamicHeader) -> ImageInfo:
        block = header.block
        if block & (block - 1) or not 4 * KiB <= block <= MAX_BLOCK:
            raise self._error(footer.data_offset + 32, f"blocks of {block} bytes")
        blocks = -(-footer.size // block)
        if not blocks <= header.entries <= MAX_TABLE // 4:
            raise self._error(
                footer.data_offset + 28,
                f"a table of {header.entries} entries for {blocks} blocks",
            )
        self._blocks = blocks
        self._block = block
        self._bitmap_size = round_up(block // SECTOR // 8, SECTOR)
        parent = None
        if footer.kind == vhd_wire.DIFFERENCING:
            names = (header.parent_name,) if header.parent_name else ()
            parent = ParentLink(
                "vhd-uuid", (header.parent,), names, header.parent_modified
            )
            self._parent = True
        size = round_up(footer.size, SECTOR)
        return ImageInfo(
            "vhd", footer.kind_name, size, identity=footer.identity, parent=parent
        )

    def _visit(self, place: Place) -> Flow[None]:
        if place.tag == _TABLE:
            table = yield from self._bytes_at(place.offset, place.length)
            self._settled = True
            self._what = "blocks"
            yield from self._plan_all(self._places(table), place.offset)
        else:
            yield from self._tell_block(place)

    def _places(self, table: bytes) -> Iterator[Place | None]:
        """Go through the BAT, telling what isn't there."""
        length = self._bitmap_size + self._block
        for index, sector in enumerate(words(table, "I", "big")[: self._blocks]):
            guest = index * self._block
            if sector == vhd_wire.UNUSED:
                self._tell_hole(guest, self._block)
                if self._full:
                    yield None
            else:
                yield Place(sector * SECTOR, length, guest, _BLOCK)

    def _tell_hole(self, guest: int, length: int) -> None:
        self._tell((GuestParent if self._parent else GuestZero)(guest, length))

    def _tell_block(self, place: Place) -> Flow[None]:
        """Read the bitmap, then what it says is there.

        The last block may be cut in the file where the disk ends.
        """
        bitmap = yield from self._bytes_at(place.offset, self._bitmap_size)
        at, guest = place.offset + self._bitmap_size, place.target
        inside = min(self._block, self._size - guest)
        for written, sectors in bit_runs(bitmap, 0, inside // SECTOR, high_first=True):
            length = sectors * SECTOR
            if written:
                yield from self._data_at(at, length, guest)
            else:
                self._tell_hole(guest, length)
                yield from self._pass_stale(at, length)
            at, guest = at + length, guest + length

    def _pass_stale(self, at: int, length: int) -> Flow[None]:
        if at < self.position:
            return  # the block lies in the spill; the rest of it may stay there
        while length:
            view = yield from self._some(min(length, 64 * KiB))
            length -= len(view)
            if not self._parent:
                self._stale += len(view) - bytes(view).count(0)

    def _judge_end(self, first: bytes, info: ImageInfo) -> Flow[None]:
        """The footer ends the file; it must be what its copy at the beginning was."""
        self._what = "footer"
        last = b""
        while not (yield from self._ended()):
            last = (last + bytes((yield from self._some(64 * KiB))))[-len(first) :]
        if last != first:
            footer = vhd_wire.parse_footer(last)
            if not isinstance(footer, Footer):
                raise self._error(self.position, f"{footer}: truncated")
            if footer != vhd_wire.parse_footer(first):
                raise self._error(
                    self.position - len(first), "the footer and its copy differ"
                )
        yield from self._finish(info)
