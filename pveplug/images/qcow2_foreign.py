# SPDX-License-Identifier: Apache-2.0
"""qcow2 images of any maker, versions 2 and 3, forward only.

Our own images, whose every number can be foreseen, have their own reader
(:mod:`pveplug.images.qcow2_reader`). This one follows QEMU's docs/interop/qcow2.txt::

    header ─► L1 table ─► L2 tables ─► clusters: plain, compressed, zero, unallocated

A table may come after clusters that it names (a second L2 table of a compressed image
does, by a few clusters): these wait in the spill. Snapshots inside the image are not
read, nor are reference counts. What can't be read right is refused by name: encryption,
an external data file, the corrupt mark, features that aren't known.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Final

from pveplug.images.bitruns import words
from pveplug.images.placed import Place, PlacedReader
from pveplug.images.qcow2_layout import MAGIC, MAX_BACKING_NAME
from pveplug.images.stream import (
    Flow,
    GuestParent,
    GuestZero,
    ImageInfo,
    ParentLink,
    Spill,
)
from pveplug.images.zstdframe import frame_length, unpacked
from pveplug.units import SECTOR, MiB

HEADER: Final = struct.Struct(">IIQIIQIIQQIIQ")
"""magic, version, backing offset and size, cluster bits, size, crypt method, L1 size
and offset, refcount table offset and clusters, snapshots and their offset."""
HEADER_3: Final = struct.Struct(">QQQII")
"""incompatible, compatible, autoclear features, refcount order, header length."""
EXTENSION: Final = struct.Struct(">II")
NAMES: Final = 0x6803F857
MAX_L1: Final = 32 * MiB
MAX_HEADER: Final = 64 * 1024

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED: Final = 1 << 4
KNOWN: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED

PLACE: Final = 0x00FFFFFFFFFFFE00
RESERVED: Final = 0x3F000000000001FE  # of a standard L2 entry
L1_RESERVED: Final = 0x7F000000000001FF
IS_COMPRESSED: Final = 1 << 62
IS_ZERO: Final = 1
SUBCLUSTERS: Final = 32
ALL: Final = (1 << SUBCLUSTERS) - 1

_L1: Final = 0
_L2: Final = 1
_DATA: Final = 2
_PACKED: Final = 3
_REFCOUNTS: Final = 4
_NAMES: Final = (
    *("L1 table", "L2 tables", "clusters", "compressed clusters"),
    "refcount table",
)
MAX_REFCOUNTS: Final = 8 * MiB


class Qcow2Reader(PlacedReader):
    """Tells a qcow2 image."""

    format = "qcow2"

    def __init__(
        self,
        *,
        name: str = "image",
        file_size: int | None = None,
        spill: Spill | None = None,
    ) -> None:
        super().__init__(name=name, file_size=file_size, spill=spill)
        self._version = 2
        self._bits = 16
        self._l1_size = 0
        self._extended = self._zstd = self._parent = False
        self._tables_left = 0

    def _run(self) -> Flow[None]:
        raw = yield from self._take(HEADER.size)
        fields = HEADER.unpack(raw)
        magic, version, name_at, name_size, bits, size, crypt, l1_size, l1_at = fields[
            :9
        ]
        refcounts, refcount_clusters, snapshots = fields[9:12]
        if magic != MAGIC:
            raise self._error(0, "this is not a qcow2 image")
        if version not in (2, 3):
            raise self._error(4, f"version {version}")
        if not 9 <= bits <= 21:
            raise self._error(20, f"clusters of 2^{bits} bytes")
        if crypt:
            how = {1: "AES", 2: "LUKS"}.get(crypt, f"method {crypt}")
            raise self._error(32, f"the image is encrypted ({how})")
        self._version, self._bits = version, bits
        yield from self._read_rest(version)
        backing = yield from self._read_name(name_at, name_size)
        self._parent = backing is not None
        kind = f"v{version}" + (", zstd" if self._zstd else "")
        info = ImageInfo(
            "qcow2",
            kind + (", extended L2" if self._extended else ""),
            size,
            parent=ParentLink("name", (), (backing,)) if backing is not None else None,
        )
        self._begin(info, 24)
        if self._dirty:
            self._note("is marked dirty: reference counts are stale, the data isn't")
        if snapshots:
            self._note(f"holds {snapshots} snapshots, which are not read")
        # What is known not to be a cluster of the disk needn't be spilled.
        self._what = "header"
        yield from self._skip(max((1 << bits) - self.position, 0))
        length = refcount_clusters << bits
        if refcounts >= 1 << bits and 0 < length <= MAX_REFCOUNTS:
            self._plan(Place(refcounts, length, 0, _REFCOUNTS), 48)
        self._plan_l1(l1_at, l1_size)
        yield from self._walk()
        yield from self._finish(info)

    # --- the header ----------------------------------------------------------------

    def _read_rest(self, version: int) -> Flow[None]:
        """Take the features of version 3."""
        incompatible, length = 0, HEADER.size
        self._kept_header = b""
        if version == 3:
            raw = yield from self._take(HEADER_3.size)
            incompatible, _, _, _, length = HEADER_3.unpack(raw)
            least = HEADER.size + HEADER_3.size
            if not least <= length <= 1 << self._bits or length % 8:
                raise self._error(100, f"a header of {length} bytes")
            more = yield from self._take(length - least)
            if incompatible & COMPRESSION:
                method = more[0] if more else 0
                if method > 1:
                    raise self._error(104, f"compression type {method}")
                self._zstd = method == 1
        self._dirty = bool(incompatible & DIRTY)
        self._extended = bool(incompatible & EXTENDED)
        if incompatible & CORRUPT:
            raise self._error(72, "is marked corrupt; qemu-img check may mend it")
        if incompatible & DATA_FILE:
            raise self._error(72, "keeps its data in an external file")
        if unknown := incompatible & ~KNOWN:
            raise self._error(72, f"needs unknown features (0x{unknown:x})")
        if self._extended and self._bits < 14:
            raise self._error(20, "subclusters of less than 512 bytes")

    def _read_name(self, at: int, size: int) -> Flow[str | None]:
        """Let the extensions pass and take the backing file's name, if any."""
        if not at:
            return None
        if not 0 < size <= MAX_BACKING_NAME:
            raise self._error(16, f"a backing name of {size} bytes")
        if not self.position <= at <= MAX_HEADER + (1 << self._bits):
            raise self._error(8, f"a backing name at byte {at}")
        self._what = "backing file's name"
        yield from self._skip(at - self.position)
        raw = yield from self._take(size)
        return raw.decode("utf-8", "replace")

    def _plan_l1(self, at: int, entries: int) -> None:
        span = self._bits + self._table_bits
        needed = -(-self._size // (1 << span))
        if entries < needed:
            raise self._error(36, f"an L1 table of {entries} entries, {needed} needed")
        if needed * 8 > MAX_L1:
            raise self._error(36, f"an L1 table of {needed} entries")
        if at % (1 << self._bits):
            raise self._error(40, f"an L1 table at byte {at}")
        self._l1_size = needed
        self._plan(Place(at, needed * 8, 0, _L1), 40)

    @property
    def _table_bits(self) -> int:
        """log2 of the entries of an L2 table."""
        return self._bits - (4 if self._extended else 3)

    # --- the tables ----------------------------------------------------------------

    def _visit(self, place: Place) -> Flow[None]:
        self._what = _NAMES[place.tag]
        match place.tag:
            case 0:
                data = yield from self._bytes_at(place.offset, place.length)
                yield from self._judge_l1(data, place.offset)
            case 1:
                data = yield from self._bytes_at(place.offset, place.length)
                self._tables_left -= 1
                self._settled = not self._tables_left
                guest = place.target << self._bits + self._table_bits
                through = self._places_extended if self._extended else self._places
                places = through(data, place.offset, guest)
                yield from self._plan_all(places, place.offset, join=_DATA)
            case 2:
                yield from self._data_at(place.offset, place.length, place.target)
            case 3:
                yield from self._visit_packed(place)
            case _:
                yield from self._go_to(place.offset)
                yield from self._skip(place.length)

    def _judge_l1(self, data: bytes, at: int) -> Flow[None]:
        table = words(data, "Q", "big")
        self._tables_left = sum(1 for entry in table if entry & PLACE)
        self._settled = not self._tables_left
        yield from self._plan_all(self._tables(table, at), at)

    def _tables(self, table: array[int], at: int) -> Iterator[Place | None]:
        size = 1 << self._bits
        span = 1 << self._bits + self._table_bits
        for index, entry in enumerate(table):
            if entry & L1_RESERVED or entry & PLACE & size - 1:
                raise self._error(at + index * 8, f"L1 entry 0x{entry:016x}")
            if entry & PLACE:
                yield Place(entry & PLACE, size, index, _L2)
            else:
                self._tell_hole(index * span, span)
                if self._full:
                    yield None

    def _tell_hole(self, guest: int, length: int) -> None:
        self._tell((GuestParent if self._parent else GuestZero)(guest, length))

    def _places(self, data: bytes, at: int, guest: int) -> Iterator[Place | None]:
        """Go through an L2 table, telling what has no bytes."""
        cluster = 1 << self._bits
        if data.count(0) == len(data):
            self._tell_hole(guest, len(data) // 8 << self._bits)
            return
        for index, entry in enumerate(words(data, "Q", "big")):
            if guest >= self._size:
                return
            if not entry:
                self._tell_hole(guest, cluster)
            elif entry & IS_COMPRESSED:
                yield self._packed_place(entry, guest)
            elif entry & RESERVED or entry & PLACE & cluster - 1:
                raise self._error(at + index * 8, f"L2 entry 0x{entry:016x}")
            elif entry & IS_ZERO:
                if self._version < 3:
                    raise self._error(at + index * 8, "a zero cluster in version 2")
                self._tell(GuestZero(guest, cluster))
            elif not entry & PLACE:
                self._tell_hole(guest, cluster)
            else:
                length = min(cluster, self._size - guest)
                yield Place(entry & PLACE, length, guest, _DATA)
            if self._full:
                yield None
            guest += cluster

    def _packed_place(self, entry: int, guest: int) -> Place:
        """Return where a compressed cluster may be: its end is rounded to a sector."""
        shift = 62 - (self._bits - 8)
        start = entry & (1 << shift) - 1
        sectors = (entry & IS_COMPRESSED - 1) >> shift
        end = (start // SECTOR + sectors + 1) * SECTOR
        return Place(start, end - start, guest, _PACKED)

    def _places_extended(
        self, data: bytes, at: int, guest: int
    ) -> Iterator[Place | None]:
        """Do the same where each cluster has 32 subclusters, with two bits each."""
        cluster = 1 << self._bits
        table = words(data, "Q", "big")
        for index in range(0, len(table), 2):
            if guest >= self._size:
                return
            entry, bitmap = table[index], table[index + 1]
            where = at + index * 8
            allocated, zero = bitmap & ALL, bitmap >> SUBCLUSTERS
            place = entry & PLACE
            if entry & IS_COMPRESSED:
                if bitmap:
                    raise self._error(where + 8, "a compressed cluster of subclusters")
                yield self._packed_place(entry, guest)
            elif entry & (RESERVED | IS_ZERO) or place & cluster - 1:
                raise self._error(where, f"L2 entry 0x{entry:016x}")
            elif allocated & zero or (allocated and not place):
                raise self._error(
                    where + 8, f"subclusters 0x{bitmap:016x} contradict each other"
                )
            else:
                yield from self._subclusters(place, allocated, zero, guest)
            if self._full:
                yield None
            guest += cluster

    def _subclusters(
        self, place: int, allocated: int, zero: int, guest: int
    ) -> Iterator[Place]:
        part = (1 << self._bits) // SUBCLUSTERS
        for kind, count in _kinds(allocated, zero):
            length = count * part
            if kind == "data":
                inside = min(length, self._size - guest)
                if inside > 0:
                    yield Place(place, inside, guest, _DATA)
            elif kind == "zero":
                self._tell(GuestZero(guest, length))
            else:
                self._tell_hole(guest, length)
            place, guest = place + length, guest + length

    # --- compressed clusters -------------------------------------------------------

    def _visit_packed(self, place: Place) -> Flow[None]:
        """Several share a sector: what isn't used of the last one is given back."""
        window = yield from self._window_at(place.offset, place.length)
        size = 1 << self._bits
        if self._zstd:
            found, used = _unpack(window[0], size)
        else:
            found, used = _inflate(window[0], size)
        if isinstance(found, str):
            raise self._error(place.offset, f"the compressed cluster {found}")
        self._used(place.offset, window, used)
        self._tell_data(place.target, memoryview(found), made=True)


def _inflate(data: bytes, size: int) -> tuple[bytes | str, int]:
    """Inflate one cluster; return it, or what is wrong, and how many bytes it took."""
    machine = zlib.decompressobj(-15)
    try:
        out = machine.decompress(data, size)
        # QEMU takes a cluster that is full for complete; as a rule its end is here.
        rest = machine.unconsumed_tail
        if not machine.eof and len(out) == size and machine.decompress(rest, 1):
            return "is larger than a cluster", 0
    except zlib.error as error:
        return f"is damaged ({error})", 0
    if len(out) != size:
        return f"has {len(out)} bytes instead of {size}", 0
    left = machine.unused_data if machine.eof else machine.unconsumed_tail
    return out, len(data) - len(left)


def _unpack(data: bytes, size: int) -> tuple[bytes | str, int]:
    """Do the same for zstd."""
    used = frame_length(data)
    return ("is cut", 0) if used is None else (unpacked(data[:used], size), used)


def _kinds(allocated: int, zero: int) -> list[tuple[str, int]]:
    """Return runs of ``data``, ``zero`` and ``hole`` of a cluster's subclusters."""
    if allocated == ALL:
        return [("data", SUBCLUSTERS)]
    out: list[tuple[str, int]] = []
    for bit in range(SUBCLUSTERS):
        kind = "hole"
        if allocated >> bit & 1:
            kind = "data"
        elif zero >> bit & 1:
            kind = "zero"
        if out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + 1)
        else:
            out.append((kind, 1))
    return out
