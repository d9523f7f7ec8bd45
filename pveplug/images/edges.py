# SPDX-License-Identifier: Apache-2.0
"""The ends of all disks of a job, ahead of the disks: ``edges.bin``.

Whoever boots looks at both ends of every disk: partition tables, and the labels of
RAIDs, volume managers and file systems. An image is read from its first byte to its
last, so an instant recovery would have its guest wait there until the last disk's last
cluster has come. Hence a small file in front of the images, with copies of those data
clusters of the job that lie near the ends of its disks ::

    layout.json   edges.bin   scsi0.qcow2   scsi1.qcow2 …   manifest.json

Guests look at the ends of partitions, too. Their table is at the disk's beginning: a
job that reads it (each Full does) knows where they are.

It is a copy and never the only one: the images are whole without it. The format
(numbers big-endian, docs/protocols/backup-format.md has it with every bound)::

    PHED, version, cluster bits, number of disks        8 bytes
    per disk: key length, key, size, number of runs     1 + n + 12 bytes
      per run: offset, length, packing, stored length, BLAKE3-128 of its bytes, bytes
    BLAKE3-128 of all before

Sans-I/O; a file is held whole, and of its contents one run at a time.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import zstandard
from blake3 import blake3

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.clusters import MAX_SIZE
from pveplug.images.partitions import partitions
from pveplug.images.zstdframe import unpacked
from pveplug.units import CLUSTER, KiB, MiB, round_down, round_up

HEAD: Final = 1 * MiB + CLUSTER
"""Of each disk. MBR, GPT and its entries, superblocks; the cluster at 1 MiB is looked
at for a VMFS volume member."""
FAR: Final = 2 * MiB
"""Where each disk, and each partition, is looked at for a VMFS: the cluster there."""
TAIL: Final = 3088 * 512
"""Up to a disk's end: GPT, LDM, DDF, mdraid, ZFS and DRBD are within the last MiB; a
label of a Promise RAID is looked for 3087 sectors before it."""
PART: Final = 512 * KiB
"""From a partition's start, and up to its end: two labels of ZFS, and all that is
smaller."""
DISK_BYTES: Final = 8 * MiB
"""Most that a file may have of one disk."""
FILE_BYTES: Final = 64 * MiB
"""Most that a file may have."""
ALL_BYTES: Final = 24 * MiB
"""Most that a job keeps of all disks of a VM, in memory: of more than eight disks it
keeps less of each."""
RUN_BYTES: Final = 1 * MiB
"""Most that one run may have."""

_HEAD: Final = struct.Struct(">4sBBH")
_MAGIC: Final = b"PHED"
_VERSION: Final = 1
_BITS: Final = CLUSTER.bit_length() - 1
_DISK: Final = struct.Struct(">QI")
_RUN: Final = struct.Struct(">QIBI16s")
_STORED: Final = 0
_ZSTD: Final = 1
_DIGEST: Final = 16
_KEY: Final = re.compile(rb"[a-z0-9]{1,32}")
_MAX_DISKS: Final = 1024


def edge_ranges(
    size: int, disks: int = 1, first: bytes | bytearray | memoryview = b""
) -> list[tuple[int, int]]:
    """Return the ranges ``(start, end)`` of a disk that belong into the file.

    Whole clusters but for the disk's end, rising, apart from each other; the first
    begins at 0.

    Args:
        disks: how many the VM has; they share :data:`ALL_BYTES`.
        first: the disk's first cluster, where it is known: then ends of partitions are
            among the ranges, as far as there is room.
    """
    share = min(ALL_BYTES // max(disks, 1), DISK_BYTES)
    found = _joined(size, [(0, HEAD), (FAR, FAR + 1), (size - TAIL, size)])
    if _total(found) > share:
        each = max(round_down((share - CLUSTER) // 2, CLUSTER), CLUSTER)
        found = _joined(size, [(0, each), (size - each, size)])
    for low, high in partitions(first, size):
        ends = [(low, min(low + PART, high)), (max(high - PART, low), high)]
        ends += [(low + far, low + far + 1) for far in (MiB, FAR) if low + far < high]
        more = _joined(size, [*found, *ends])
        if _total(more) <= share:
            found = more
    return found


def _joined(size: int, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Make ranges whole clusters of a disk, and join those that then touch."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        low = round_down(max(start, 0), CLUSTER)
        high = min(round_up(end, CLUSTER), size)
        if joined and low <= joined[-1][1]:
            low, high = joined[-1][0], max(joined.pop()[1], high)
        if low < high:
            joined.append((low, high))
    return joined


def _total(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


@dataclass(frozen=True, slots=True)
class EdgeRun:
    """Copied clusters in a row; offset and length in bytes of the disk."""

    offset: int
    length: int
    _packing: int
    _stored: memoryview
    _digest: bytes

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.offset + self.length

    def data(self) -> bytearray:
        """Return the bytes, a new buffer.

        Raises:
            IntegrityError: they are not those that were put in.
        """
        data = bytearray(self._stored)
        if self._packing == _ZSTD:
            out = unpacked(bytes(self._stored), self.length)
            if isinstance(out, str):
                raise IntegrityError(f"edges: the run at {self.offset} {out}")
            data = bytearray(out)
        if blake3(data).digest(_DIGEST) != self._digest:
            raise IntegrityError(f"edges: the run at {self.offset} is damaged")
        return data


@dataclass(frozen=True, slots=True)
class DiskEdges:
    """What the file has of one disk of ``size`` bytes; runs rise and are apart."""

    size: int
    runs: tuple[EdgeRun, ...]


class EdgesWriter:
    """Makes the file: per disk ``begin``, then ``add`` with rising offsets."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._keys: set[str] = set()
        self._size = self._at = self._kept = self._total = 0
        self._runs = 0
        self._disk_head = -1  # where the present disk's size and count belong

    def begin(self, key: str, size: int) -> None:
        """Begin a disk."""
        label = key.encode()
        if key in self._keys or not _KEY.fullmatch(label):
            raise LocalProtocolError(f"edges: disk {key!r} can't be added")
        self._end_disk()
        self._keys.add(key)
        self._size, self._at, self._kept, self._runs = size, 0, 0, 0
        self._parts.append(bytes([len(label)]) + label)
        self._disk_head = len(self._parts)
        self._parts.append(b"")

    def add(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Add whole clusters (the disk's last may be short); the bytes are copied."""
        view = memoryview(data).cast("B")
        end = offset + len(view)
        if (
            offset < self._at
            or end > self._size
            or offset % CLUSTER
            or (end % CLUSTER and end != self._size)
        ):
            raise LocalProtocolError(f"edges: {len(view)} bytes at {offset}")
        self._at = end
        self._kept += len(view)
        self._total += len(view)
        if self._kept > DISK_BYTES or self._total > FILE_BYTES - MiB:
            raise LocalProtocolError("edges: more than may be kept")
        packer = zstandard.ZstdCompressor(level=1)
        for low in range(0, len(view), RUN_BYTES):
            piece = view[low : low + RUN_BYTES]
            packing, stored = _ZSTD, packer.compress(piece)
            if len(stored) >= len(piece):
                packing, stored = _STORED, bytes(piece)
            digest = blake3(piece).digest(_DIGEST)
            head = _RUN.pack(offset + low, len(piece), packing, len(stored), digest)
            self._parts += (head, stored)
            self._runs += 1

    def finish(self) -> bytes:
        """Return the file."""
        self._end_disk()
        head = _HEAD.pack(_MAGIC, _VERSION, _BITS, len(self._keys))
        content = b"".join((head, *self._parts))
        self._parts.clear()
        return content + blake3(content).digest(_DIGEST)

    def _end_disk(self) -> None:
        if self._disk_head >= 0:
            self._parts[self._disk_head] = _DISK.pack(self._size, self._runs)
            self._disk_head = -1


class Edges:
    """A file that was read: what it has of each disk.

    Attributes:
        disks: by the disks' keys.
    """

    def __init__(self, disks: Mapping[str, DiskEdges]) -> None:
        self.disks: Final = disks

    @classmethod
    def decode(cls, content: bytes | bytearray) -> Edges:
        """Undo :class:`EdgesWriter`; runs keep views of ``content``.

        Raises:
            IntegrityError: it isn't such a file, or a damaged one.
        """
        if len(content) > FILE_BYTES:
            raise IntegrityError(f"edges: {len(content)} bytes are too many")
        if len(content) < _HEAD.size + _DIGEST:
            raise IntegrityError("edges: cut short")
        whole = memoryview(content).toreadonly()[:-_DIGEST]
        magic, version, bits, count = _HEAD.unpack_from(whole)
        if magic != _MAGIC:
            raise IntegrityError("edges: not in a known format")
        if version != _VERSION or bits != _BITS or count > _MAX_DISKS:
            raise IntegrityError(
                f"edges: version {version}, clusters of 2^{bits} bytes, {count} disks"
            )
        if blake3(whole).digest(_DIGEST) != content[-_DIGEST:]:
            raise IntegrityError("edges: damaged: its own digest differs")
        disks: dict[str, DiskEdges] = {}
        at = _HEAD.size
        for _ in range(count):
            key, made, at = _disk(whole, at)
            if key in disks:
                raise IntegrityError(f"edges: disk {key} appears twice")
            disks[key] = made
        if at != len(whole):
            raise IntegrityError(f"edges: {len(whole) - at} bytes follow the last disk")
        return cls(disks)


def _disk(whole: memoryview, at: int) -> tuple[str, DiskEdges, int]:
    """Read one disk; return its key, what there is of it, and where it ends."""
    width = bytes(_taken(whole, at, 1))[0]
    label = bytes(_taken(whole, at + 1, width))
    if not _KEY.fullmatch(label):
        raise IntegrityError(f"edges: impossible disk key {label!r}")
    at += 1 + width
    size, count = _DISK.unpack(_taken(whole, at, _DISK.size))
    at += _DISK.size
    if not 0 < size <= MAX_SIZE or count > DISK_BYTES // CLUSTER + 1:
        raise IntegrityError(f"edges: a disk of {size} bytes with {count} runs")
    runs: list[EdgeRun] = []
    least = kept = 0
    for _ in range(count):
        head = _taken(whole, at, _RUN.size)
        offset, length, packing, stored, digest = _RUN.unpack(head)
        end = offset + length
        kept += length
        if (
            not 0 < length <= RUN_BYTES
            or offset < least
            or offset % CLUSTER
            or end > size
            or (end % CLUSTER and end != size)
            or kept > DISK_BYTES
        ):
            raise IntegrityError(f"edges: impossible run of {length} bytes at {offset}")
        if packing not in (_STORED, _ZSTD) or (
            stored != length if packing == _STORED else stored >= length
        ):
            raise IntegrityError(f"edges: the run at {offset} has {stored} bytes")
        at += _RUN.size
        view = _taken(whole, at, stored)
        runs.append(EdgeRun(offset, length, packing, view, digest))
        at += stored
        least = end
    return label.decode(), DiskEdges(size, tuple(runs)), at


def _taken(whole: memoryview, at: int, length: int) -> memoryview:
    view = whole[at : at + length]
    if len(view) != length:
        raise IntegrityError("edges: cut short")
    return view


def without(
    runs: Iterable[tuple[int, int]], held: Iterable[EdgeRun]
) -> Iterator[tuple[int, int]]:
    """Yield what of rising runs ``(offset, length)`` isn't held."""
    kept = iter(held)
    hole = next(kept, None)
    for offset, length in runs:
        at, end = offset, offset + length
        while at < end:
            while hole is not None and hole.end <= at:
                hole = next(kept, None)
            stop = min(hole.offset, end) if hole is not None else end
            if at < stop:
                yield at, stop - at
            at = max(stop, min(hole.end, end)) if hole is not None else end
