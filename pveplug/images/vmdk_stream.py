# SPDX-License-Identifier: Apache-2.0
"""streamOptimized VMDK as VMware exports it: a stream of compressed grains.

::

    header, descriptor
    grain   grain   …   GT marker, grain table        for every 512 grains
    GD marker, grain directory
    footer marker, footer
    end-of-stream marker

Each grain is behind a marker with its sector, so nothing has to be looked up. The
tables come after what they describe: they are compared with what was seen. A stream
without its end marker is cut, whatever it held.
"""

from __future__ import annotations

from typing import Final

from pveplug.images import vmdk_wire as wire
from pveplug.images.bitruns import bit_runs, words
from pveplug.images.stream import (
    Flow,
    GuestParent,
    GuestZero,
    ImageInfo,
    StreamReader,
)
from pveplug.units import SECTOR, KiB, round_up

MAX_GRAINS: Final = 1 << 30
"""64 TiB of 64 KiB; a bit for each up to the last that came, so 128 MiB at most."""

MAX_OPEN: Final = 64 * KiB  # grains that no table has named yet; VMware: 512


class VmdkStreamReader(StreamReader):
    """Tells a streamOptimized disk with its directory at the end."""

    format = "vmdk"

    _seen = bytearray()  # a bit for each grain
    _footer = False
    _compared = True

    def _run(self) -> Flow[None]:
        header = wire.parse_header((yield from self._take(wire.HEADER.size)))
        if not isinstance(header, wire.Header):
            raise self._error(*header)
        wanted = wire.COMPRESSED | wire.MARKERS
        if header.flags & wanted != wanted:
            raise self._error(8, "a directory at the end, without compressed grains")
        info = yield from self._describe(header)
        self._begin(info, 12)
        self._header = header
        grains = -(-header.capacity // header.grain)
        if grains > MAX_GRAINS:
            raise self._error(12, f"a disk of {grains} grains")
        self._seen = bytearray()
        self._open: dict[int, int] = {}  # grains that no table has named yet
        self._tables: dict[int, int] = {}
        self._what = "grains"
        yield from self._skip(max(header.overhead - self.position, 0))
        while (yield from self._take_marker()):
            yield from self._breathe()
        hole = GuestZero if info.parent is None else GuestParent
        at = 0
        known = min(grains, 8 * len(self._seen))
        for seen, count in bit_runs(self._seen, 0, known, high_first=False):
            if not seen:
                self._tell(hole(at * header.grain, count * header.grain))
                yield from self._breathe()
            at += count
        self._tell(hole(at * header.grain, (grains - at) * header.grain))
        yield from self._finish(info)

    def _describe(self, header: wire.Header) -> Flow[ImageInfo]:
        self._what = "descriptor"
        if header.descriptor < wire.HEADER.size or not header.descriptor_size:
            raise self._error(28, "has no descriptor")
        if header.descriptor > wire.MAX_DESCRIPTOR:
            raise self._error(28, f"a descriptor at byte {header.descriptor}")
        yield from self._skip(header.descriptor - self.position)
        found = wire.parse_descriptor((yield from self._take(header.descriptor_size)))
        if isinstance(found, str):
            raise self._error(header.descriptor, found)
        return ImageInfo(
            "vmdk",
            found.create_type,
            header.capacity,
            identity=found.cid,
            parent=found.parent,
        )

    def _take_marker(self) -> Flow[bool]:
        """Take a marker and what it announces; False at the end of the stream."""
        at = self.position
        first = yield from self._take(SECTOR)
        value, size, kind = wire.MARKER.unpack_from(first)
        if size:
            yield from self._take_grain(at, value, size, first)
            return True
        if kind == wire.EOS and not value:
            self._judge_end(at)
            return False
        if self._footer:
            raise self._error(at, "a marker after the footer that isn't the end's")
        if kind == wire.GRAIN_TABLE:
            self._expect(at, value, wire.ENTRIES * 4)
            self._judge_table(at + SECTOR, (yield from self._take(wire.ENTRIES * 4)))
        elif kind == wire.GRAIN_DIRECTORY:
            length = round_up(self._header.tables * 4, SECTOR)
            self._expect(at, value, length)
            yield from self._judge_directory(at + SECTOR, length)
        elif kind == wire.FOOTER:
            self._expect(at, value, wire.HEADER.size)
            self._judge_footer(at, (yield from self._take(wire.HEADER.size)))
        else:
            raise self._error(at, f"an unknown marker: {value}, {size}, type {kind}")
        return True

    def _expect(self, at: int, sectors: int, length: int) -> None:
        if sectors * SECTOR != length:
            raise self._error(
                at, f"a marker of {sectors} sectors where {length} bytes follow"
            )

    def _take_grain(self, at: int, sector: int, size: int, first: bytes) -> Flow[None]:
        header = self._header
        if self._footer:
            raise self._error(at, "a grain after the footer")
        number, rest = divmod(sector * SECTOR, header.grain)
        if rest or number * header.grain >= header.capacity:
            raise self._error(at, f"a grain at sector {sector} of the disk")
        if size > wire.longest(header.grain):
            raise self._error(at + 8, f"a compressed grain of {size} bytes")
        if not self._mark(number):
            raise self._error(at, f"grain {number} comes twice")
        start = wire.GRAIN_MARKER.size
        data = first[start : start + size]
        if len(data) < size:
            more = yield from self._take(round_up(size - len(data), SECTOR))
            data += more[: size - len(data)]
        guest = number * header.grain
        inside = min(header.grain, header.capacity - guest)
        grain = wire.inflated(data, header.grain, inside)
        if isinstance(grain, str):
            raise self._error(at, grain)
        self._open[number] = at // SECTOR
        if len(self._open) > MAX_OPEN:
            # No tables come, or all of them at the end: then they are not compared.
            self._open.clear()
            self._compared = False
        self._tell_data(guest, memoryview(grain), made=True)

    def _mark(self, number: int) -> bool:
        """Note that a grain came; False if it had."""
        byte, bit = number >> 3, 1 << (number & 7)
        if byte >= len(self._seen):
            self._seen.extend(bytes(byte + 4 * KiB - len(self._seen)))
        new = not self._seen[byte] & bit
        self._seen[byte] |= bit
        return new

    # --- what comes after the grains -----------------------------------------------

    def _judge_table(self, at: int, data: bytes) -> None:
        """A table comes right after its grains; it must name them, and only them."""
        entries = words(data, "I", "little")
        if not self._compared:
            if self._header.flags & wire.ZEROED_GRAINS and wire.ZEROED in entries:
                raise self._error(at, "zeroed grains in a table that comes too late")
            return
        if not self._open:
            if any(entries):
                raise self._error(at, "a grain table for grains that did not come")
            return
        index = min(self._open) // wire.ENTRIES
        if index in self._tables:
            raise self._error(at, f"a second grain table {index}")
        self._tables[index] = at // SECTOR
        zeroed = bool(self._header.flags & wire.ZEROED_GRAINS)
        for slot, entry in enumerate(entries):
            number = index * wire.ENTRIES + slot
            place = self._open.pop(number, 0)
            if entry == wire.ZEROED and zeroed and not place:
                self._tell_zeroed(at, number)
            elif entry != place:
                raise self._error(
                    at + slot * 4,
                    f"the table has grain {number} at sector {entry}, it was "
                    + (f"at {place}" if place else "not there"),
                )

    def _tell_zeroed(self, at: int, number: int) -> None:
        guest = number * self._header.grain
        if guest >= self._size or not self._mark(number):
            raise self._error(at, f"grain {number} is zeroed, and was there")
        self._tell(GuestZero(guest, self._header.grain))

    def _judge_directory(self, at: int, length: int) -> Flow[None]:
        """Compare the directory with where the tables were; it may be megabytes."""
        index = 0
        while length:
            part = min(length, 64 * KiB)
            for sector in words((yield from self._take(part)), "I", "little"):
                if sector != self._tables.get(index, 0) and index in self._tables:
                    raise self._error(
                        at + index * 4,
                        f"the directory has table {index} at sector {sector}, it was "
                        f"at {self._tables[index]}",
                    )
                index += 1
            length -= part

    def _judge_footer(self, at: int, data: bytes) -> None:
        footer = wire.parse_header(data)
        if not isinstance(footer, wire.Header):
            raise self._error(at + SECTOR, f"the footer: {footer[1]}")
        ours = (self._header.capacity, self._header.grain, self._header.flags)
        if (footer.capacity, footer.grain, footer.flags) != ours:
            raise self._error(at + SECTOR, "the footer and the header differ")
        self._footer = True

    def _judge_end(self, at: int) -> None:
        if not self._compared:
            self._note("the grain tables come too late to be compared")
        elif self._tables and self._open:
            raise self._error(
                at, f"the stream ends, and {len(self._open)} grains are in no table"
            )
        if not self._footer:
            self._note("the stream has no footer")
