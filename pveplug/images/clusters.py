# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a disk a job carries: two bitmaps, one bit per 64 KiB.

A cluster is DATA (its bytes are in the image), ZERO (it reads as zeroes and no byte
is carried) or CLEAN (the job says nothing about it). No cluster is both DATA and
ZERO: where sources disagree, DATA wins, because reading too much is only slow.

::

    extents      |zzzzzzzz|zzzddddd|dd......|....zzzz|zzzzzzzz|
    clusters      ZERO     DATA     DATA     DATA     ZERO
                                             ^ zero only in part: nothing is known of
                                               its other bytes, so all of it is read

1 TiB is 16 Mi clusters, two bitmaps of 2 MiB, of which only those pages take memory
that have a bit set. In a bitmap, cluster ``n`` is bit
``n % 8`` (least significant first) of byte ``n // 8``; bits after the disk's end are 0.
Whole ranges are handled as Python integers made of at most 64 KiB of bitmap, so
nothing here costs memory in proportion to the number of extents.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

import zstandard

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.extents import Extent, Kind
from pveplug.units import CLUSTER, TiB

MAX_SIZE: Final = 64 * TiB
"""Largest disk taken from a stream or an object: bounds what a hostile one costs."""

_STEP: Final = 64 * 1024  # bytes of bitmap turned into one integer at a time
_WINDOW: Final = 256  # bytes of bitmap searched at a time: 2048 clusters, 128 MiB
_NONE: Final = bytes(_STEP)
_ALL: Final = b"\xff" * _STEP

_PACKED: Final = struct.Struct(">4sBBHQ")
_MAGIC: Final = b"PHCM"
_VERSION: Final = 1
_CHECK: Final = 4


def _bitmap(bits: int) -> mmap.mmap:
    """Make a bitmap of zeroes, which takes no memory before a bit is set."""
    # A bytearray is written to become zero; shared memory is taken by reading it, too.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, (bits + 7) // 8, flags=flags)


def set_runs(bitmap: mmap.mmap, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the runs ``(start, end)`` of one bits among bits ``first`` to ``last - 1``.

    Empty and full windows cost one ``memcmp``; others become a string of digits in
    which ``str.find`` looks for the next change: 0.2 us a run, however dense.
    """
    if first >= last:
        return
    opened = -1  # start of a run that reaches the window's left edge
    end_byte = (last + 7) // 8
    at = first // 8
    while at < end_byte:
        width = min(_WINDOW, end_byte - at)
        base = at * 8
        inside = base >= first and base + width * 8 <= last
        window = bitmap[at : at + width]
        at += width
        if _NONE.startswith(window):
            if opened >= 0:
                yield opened, base
                opened = -1
            continue
        if inside and _ALL.startswith(window):
            if opened < 0:
                opened = base
            continue
        value = int.from_bytes(window, "little")
        low, high = max(first - base, 0), min(last - base, width * 8)
        value = (value & ((1 << high) - 1)) >> low << low
        digits = f"{value:0{width * 8}b}"[::-1]
        pos = 0
        if opened >= 0:
            pos = digits.find("0")
            if pos < 0:
                continue
            yield opened, base + pos
            opened = -1
        while (start := digits.find("1", pos)) >= 0:
            pos = digits.find("0", start)
            if pos < 0:
                opened = base + start
                break
            yield base + start, base + pos
    if opened >= 0:
        yield opened, last


def _fill(bitmap: mmap.mmap, first: int, last: int) -> None:
    """Set bits ``first`` to ``last - 1``."""
    low, high = first >> 3, last >> 3
    if low == high:
        bitmap[low] |= (1 << (last & 7)) - (1 << (first & 7))
        return
    if first & 7:
        bitmap[low] |= 0xFF & -(1 << (first & 7))
        low += 1
    for at in range(low, high, _STEP):
        width = min(_STEP, high - at)
        bitmap[at : at + width] = _ALL if width == _STEP else _ALL[:width]
    if last & 7:
        bitmap[high] |= (1 << (last & 7)) - 1


def _clear(bitmap: mmap.mmap, first: int, last: int) -> None:
    """Clear bits ``first`` to ``last - 1``."""
    low, high = first >> 3, last >> 3
    if low == high:
        bitmap[low] &= 0xFF ^ ((1 << (last & 7)) - (1 << (first & 7)))
        return
    if first & 7:
        bitmap[low] &= (1 << (first & 7)) - 1
        low += 1
    for at in range(low, high, _STEP):
        width = min(_STEP, high - at)
        if not _NONE.startswith(bitmap[at : at + width]):
            bitmap[at : at + width] = _NONE if width == _STEP else _NONE[:width]
    if last & 7:
        bitmap[high] &= 0xFF ^ ((1 << (last & 7)) - 1)


def _or_into(target: mmap.mmap, other: mmap.mmap) -> None:
    """``target |= other``, over what both have."""
    for at in range(0, min(len(target), len(other)), _STEP):
        theirs = other[at : at + _STEP]
        if _NONE.startswith(theirs):
            continue
        ours = target[at : at + len(theirs)]
        width = len(ours)
        joined = int.from_bytes(ours, "little") | int.from_bytes(
            theirs[:width], "little"
        )
        target[at : at + width] = joined.to_bytes(width, "little")


def _drop_from(target: mmap.mmap, other: mmap.mmap) -> None:
    """``target &= ~other``, over what both have."""
    for at in range(0, min(len(target), len(other)), _STEP):
        theirs = other[at : at + _STEP]
        ours = target[at : at + len(theirs)]
        width = len(ours)
        if _NONE.startswith(theirs) or _NONE.startswith(ours):
            continue
        mine = int.from_bytes(ours, "little")
        left = mine ^ (mine & int.from_bytes(theirs[:width], "little"))
        target[at : at + width] = left.to_bytes(width, "little")


def _bits(bitmap: mmap.mmap) -> int:
    """Count the one bits."""
    total = 0
    for at in range(0, len(bitmap), _STEP):
        total += int.from_bytes(bitmap[at : at + _STEP], "little").bit_count()
    return total


class ClusterMap:
    """The kind of every cluster of one disk.

    Attributes:
        size: the disk's size in bytes; the last cluster may be cut short by it.
        cluster_bits: log2 of the cluster size.
        data: the bitmap of DATA clusters.
        zero: the bitmap of ZERO clusters; has no bit in common with ``data``.

    The bitmaps may be read directly; only the methods here may change them, and not
    while a ``runs()`` iterator is in use.
    """

    __slots__ = ("cluster_bits", "clusters", "data", "size", "zero")

    def __init__(self, size: int, cluster_bits: int = CLUSTER.bit_length() - 1) -> None:
        """Make a map in which every cluster is CLEAN.

        Raises:
            LocalProtocolError: the size is not positive, or above 64 TiB.
        """
        if not 0 < size <= MAX_SIZE:
            raise LocalProtocolError(f"a disk of {size} bytes cannot be mapped")
        self.size = size
        self.cluster_bits = cluster_bits
        self.clusters = ((size - 1) >> cluster_bits) + 1
        self.data = _bitmap(self.clusters)
        self.zero = _bitmap(self.clusters)

    @classmethod
    def all_data(
        cls, size: int, cluster_bits: int = CLUSTER.bit_length() - 1
    ) -> ClusterMap:
        """Return a map in which every cluster is DATA, for a disk read whole."""
        made = cls(size, cluster_bits)
        _fill(made.data, 0, made.clusters)
        return made

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClusterMap):
            return NotImplemented
        return (
            self.size == other.size
            and self.cluster_bits == other.cluster_bits
            and self.data[:] == other.data[:]
            and self.zero[:] == other.zero[:]
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return (
            f"ClusterMap(size={self.size}, data={self.data_bytes}, "
            f"zero={self.zero_bytes})"
        )

    def copy(self) -> ClusterMap:
        """Return an independent map with the same contents."""
        return self.resized(self.size)

    def resized(self, size: int) -> ClusterMap:
        """Return a copy for a disk of another size: cut off, or CLEAN at the end."""
        made = ClusterMap(size, self.cluster_bits)
        for mine, theirs in ((made.data, self.data), (made.zero, self.zero)):
            _or_into(mine, theirs)
            if made.clusters & 7 and len(mine) <= len(theirs):
                mine[-1] &= (1 << (made.clusters & 7)) - 1
        return made

    def mark(self, extent: Extent) -> None:
        """Note what a source says of one run; runs may come in any order and overlap.

        DATA makes every cluster it touches DATA. ZERO makes the clusters it covers
        wholly ZERO unless they are DATA already, and those it covers in part DATA.
        CLEAN says nothing.

        Raises:
            IntegrityError: the run reaches beyond the disk or is empty.
        """
        self.mark_range(extent.offset, extent.length, extent.kind)

    def mark_range(self, offset: int, length: int, kind: Kind) -> None:
        """Do what :meth:`mark` does, without an Extent object."""
        end = offset + length
        if offset < 0 or length <= 0 or end > self.size:
            raise IntegrityError(
                f"extent of {length} bytes at {offset} is outside the disk of "
                f"{self.size} bytes"
            )
        if kind is Kind.CLEAN:
            return
        bits = self.cluster_bits
        first = offset >> bits
        last = ((end - 1) >> bits) + 1
        if kind is Kind.ZERO:
            mask = (1 << bits) - 1
            low = first + 1 if offset & mask else first
            high = last - 1 if end & mask and end != self.size else last
            if low >= high:
                # It lies inside one cluster, or around the border of two.
                low = high = last
            else:
                self._mark_zero(low, high)
            if first < low:
                self._mark_data(first, min(low, last))
            if high < last:
                self._mark_data(high, last)
            return
        self._mark_data(first, last)

    def _mark_data(self, first: int, last: int) -> None:
        if last == first + 1:  # the usual case of a scattered increment
            at, bit = first >> 3, 1 << (first & 7)
            self.data[at] |= bit
            if self.zero[at] & bit:
                self.zero[at] &= ~bit & 0xFF
            return
        _fill(self.data, first, last)
        _clear(self.zero, first, last)

    def _mark_zero(self, first: int, last: int) -> None:
        """Set ZERO in a range, except where there is DATA."""
        if last == first + 1:  # the usual case of scattered holes
            at, bit = first >> 3, 1 << (first & 7)
            if not self.data[at] & bit:
                self.zero[at] |= bit
            return
        _fill(self.zero, first, last)
        for at in range(first >> 3, (last + 7) >> 3, _STEP):
            width = min(_STEP, ((last + 7) >> 3) - at)
            ours = self.data[at : at + width]
            if _NONE.startswith(ours):
                continue
            wanted = int.from_bytes(self.zero[at : at + width], "little")
            left = wanted ^ (wanted & int.from_bytes(ours, "little"))
            self.zero[at : at + width] = left.to_bytes(width, "little")

    def mark_all(self, extents: Iterable[Extent]) -> None:
        """Mark every extent of a sequence."""
        for extent in extents:
            self.mark_range(extent.offset, extent.length, extent.kind)

    def kind_at(self, cluster: int) -> Kind:
        """Return the kind of one cluster, by its number."""
        at, bit = cluster >> 3, 1 << (cluster & 7)
        if self.data[at] & bit:
            return Kind.DATA
        return Kind.ZERO if self.zero[at] & bit else Kind.CLEAN

    @property
    def data_bytes(self) -> int:
        """Bytes of the disk in DATA clusters; the last cluster counts what it has."""
        return self._bytes(self.data)

    @property
    def zero_bytes(self) -> int:
        """Bytes of the disk in ZERO clusters."""
        return self._bytes(self.zero)

    def _bytes(self, bitmap: mmap.mmap) -> int:
        total = _bits(bitmap) << self.cluster_bits
        last = self.clusters - 1
        if bitmap[last >> 3] >> (last & 7) & 1:
            total -= (self.clusters << self.cluster_bits) - self.size
        return total

    def counts(self) -> tuple[int, int]:
        """Return how many clusters are DATA and how many ZERO."""
        return _bits(self.data), _bits(self.zero)

    def runs(self, start: int = 0, end: int | None = None) -> Iterator[Extent]:
        """Yield extents of all three kinds that tile ``[start, end)``, in bytes.

        Neighbours differ in kind. It streams: a sparse map of a huge disk takes
        milliseconds, a dense one never becomes a list.
        """
        end = self.size if end is None else min(end, self.size)
        if start >= end:
            return
        bits = self.cluster_bits
        first, last = start >> bits, ((end - 1) >> bits) + 1
        if last - first <= 2:  # what Bacula gives back at a time
            kind, after = self.kind_at(first), self.kind_at(last - 1)
            border = end if kind is after else (last - 1) << bits
            yield Extent(start, border - start, kind)
            if border < end:
                yield Extent(border, end - border, after)
            return
        data = set_runs(self.data, first, last)
        zero = set_runs(self.zero, first, last)
        none = (last, last)
        next_data, next_zero = next(data, none), next(zero, none)
        at = start
        while at < end:
            data_first = next_data[0] <= next_zero[0]
            low, high = next_data if data_first else next_zero
            low, high = min(low << bits, end), min(high << bits, end)
            if at < low:
                yield Extent(at, low - at, Kind.CLEAN)
                at = low
            if at < high:
                yield Extent(at, high - at, Kind.DATA if data_first else Kind.ZERO)
                at = high
            if data_first:
                next_data = next(data, none)
            else:
                next_zero = next(zero, none)

    def data_runs(self, start: int = 0, end: int | None = None) -> Iterator[Extent]:
        """Yield only the DATA extents of ``[start, end)``."""
        return self._only(self.data, Kind.DATA, start, end)

    def zero_runs(self, start: int = 0, end: int | None = None) -> Iterator[Extent]:
        """Yield only the ZERO extents of ``[start, end)``."""
        return self._only(self.zero, Kind.ZERO, start, end)

    def _only(
        self, bitmap: mmap.mmap, kind: Kind, start: int, end: int | None
    ) -> Iterator[Extent]:
        end = self.size if end is None else min(end, self.size)
        if start >= end:
            return
        bits = self.cluster_bits
        for low, high in set_runs(bitmap, start >> bits, ((end - 1) >> bits) + 1):
            at, stop = max(low << bits, start), min(high << bits, end)
            yield Extent(at, stop - at, kind)

    def union(self, other: ClusterMap) -> ClusterMap:
        """Return what either map marks; DATA wins. The result has this map's size."""
        made = self.copy()
        made.update(other)
        return made

    def update(self, other: ClusterMap) -> None:
        """Add the other map's marks to this one; DATA wins."""
        self._same_clusters(other)
        if other.clusters > self.clusters:
            other = other.resized(self.size)
        _or_into(self.data, other.data)
        _or_into(self.zero, other.zero)
        _drop_from(self.zero, self.data)

    def minus(self, other: ClusterMap) -> ClusterMap:
        """Return this map without the clusters the other marks, in either kind."""
        made = self.copy()
        made.discard(other)
        return made

    def discard(self, other: ClusterMap) -> None:
        """Make CLEAN every cluster that the other map marks, in either kind."""
        self._same_clusters(other)
        for bitmap in (self.data, self.zero):
            _drop_from(bitmap, other.data)
            _drop_from(bitmap, other.zero)

    def _same_clusters(self, other: ClusterMap) -> None:
        if other.cluster_bits != self.cluster_bits:
            raise LocalProtocolError(
                f"cluster maps of {self.cluster_size} and {other.cluster_size} bytes "
                "cannot be combined"
            )

    def to_bytes(self) -> bytes:
        """Pack the map: 16 bytes of header, the two bitmaps in a zstd frame, a CRC-32.

        See docs/protocols/backup-format.md, "Cluster map".
        """
        head = _PACKED.pack(_MAGIC, _VERSION, self.cluster_bits, 0, self.size)
        packer = zstandard.ZstdCompressor(level=3)
        stream = packer.compressobj(size=len(self.data) + len(self.zero))
        parts = [
            head,
            *(stream.compress(memoryview(b)) for b in (self.data, self.zero)),
        ]
        packed = b"".join((*parts, stream.flush()))
        return packed + zlib.crc32(packed).to_bytes(_CHECK, "big")

    @classmethod
    def from_bytes(cls, packed: bytes) -> ClusterMap:
        """Undo :meth:`to_bytes`.

        Raises:
            IntegrityError: the bytes are not a packed map, or a damaged one.
        """
        if len(packed) < _PACKED.size + _CHECK:
            raise IntegrityError("cluster map: too short")
        whole = memoryview(packed)[:-_CHECK]
        if zlib.crc32(whole).to_bytes(_CHECK, "big") != packed[-_CHECK:]:
            raise IntegrityError("cluster map: damaged")
        magic, version, bits, reserved, size = _PACKED.unpack_from(packed)
        if magic != _MAGIC or version != _VERSION or reserved:
            raise IntegrityError("cluster map: not in a known format")
        if not 0 < size <= MAX_SIZE or not 9 <= bits <= 21:
            raise IntegrityError(f"cluster map: impossible disk of {size} bytes")
        width = (((size - 1) >> bits) + 8) // 8
        try:
            frame = whole[_PACKED.size :]
            told = zstandard.get_frame_parameters(frame).content_size
            if told != 2 * width:
                raise IntegrityError(f"cluster map: {told} bytes for {size} of disk")
            made = cls(size, bits)
            # Through a reader: nothing larger than the expected size is made, and
            # whatever follows the frame is noticed.
            with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
                for bitmap in (made.data, made.zero):
                    at = 0
                    while at < width:
                        part = reader.read(min(width - at, _STEP))
                        if not part:
                            raise IntegrityError("cluster map: cut short")
                        if not _NONE.startswith(part):
                            bitmap[at : at + len(part)] = part
                        at += len(part)
                if reader.read(1):
                    raise IntegrityError("cluster map: longer than its disk")
        except zstandard.ZstdError as error:
            raise IntegrityError(f"cluster map: damaged ({error})") from error
        spare = 0xFF & -(1 << (made.clusters & 7)) if made.clusters & 7 else 0
        if (made.data[-1] | made.zero[-1]) & spare:
            raise IntegrityError("cluster map: marks clusters beyond the disk")
        before = made.zero[:]
        _drop_from(made.zero, made.data)
        if made.zero[:] != before:
            raise IntegrityError("cluster map: a cluster is both data and zero")
        return made
