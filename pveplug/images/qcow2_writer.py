# SPDX-License-Identifier: Apache-2.0
"""A forward-only qcow2 writer: it plans the file, the caller brings the data.

The map of clusters is known before a byte is read from the disk, so the whole file is
arithmetic (:mod:`pveplug.images.qcow2_layout`): :meth:`Qcow2StreamWriter.pieces` says
in file order which bytes of metadata to send and which run of the guest's disk to
read and send, and where. What it doesn't name is a hole and reads as zeroes: most of
an L2 table in an increment, the padding of the disk's last cluster, and any part of a
data run that the caller finds to be zero and leaves out.

A ZERO cluster becomes a qcow2 zero cluster in an overlay, where something else could
shine through from the backing file. In a Full it stays unallocated, which reads the
same and may save its L2 table. CLEAN stays unallocated in both.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from pveplug.errors import LocalProtocolError
from pveplug.images import qcow2_layout as qcow2
from pveplug.images.clusters import ClusterMap, set_runs
from pveplug.units import SECTOR, KiB

BRIDGE: Final = 1 * KiB
"""Zeroes sent rather than started anew after: a run costs 21 to 39 bytes in a volume
and a call each. With a sector of its own and this gap in front, an isolated cluster
costs at most 1.5 KiB of L2 table: 2.3 % of its 64 KiB in the worst case."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Bytes of the image itself, to be sent as they are."""

    file_offset: int
    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class DataRun:
    """A run of the guest's disk that lies in one piece in the file as well.

    Both ends are cluster borders, except for the end of the disk.
    """

    file_offset: int
    guest_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of the file that nobody sent: zeroes, in a dense rendition."""

    file_offset: int
    length: int


Piece = Metadata | DataRun


class Qcow2StreamWriter:
    """Plans one image.

    Attributes:
        size: the disk's virtual size.
        file_size: the file's length, known from the start; its last byte is always
            part of the last piece.
        layout: where the parts are.
    """

    def __init__(self, clusters: ClusterMap, *, backing: str | None = None) -> None:
        """Plan the image of what ``clusters`` marks; the map must not change any more.

        Args:
            clusters: DATA is what :class:`DataRun` will ask for.
            backing: name of the parent's image, e.g. ``../JOB/scsi0.qcow2``; None for
                an image that stands alone.

        Raises:
            LocalProtocolError: the size is not a multiple of 512, the cluster size is
                not one of qcow2's, or the backing name is impossible.
        """
        bits = clusters.cluster_bits
        if clusters.size % SECTOR:
            raise LocalProtocolError(f"a disk of {clusters.size} bytes has no sectors")
        if not qcow2.MIN_CLUSTER_BITS <= bits <= qcow2.MAX_CLUSTER_BITS:
            raise LocalProtocolError(f"qcow2 has no clusters of 2^{bits} bytes")
        self._map = clusters
        self._overlay = backing is not None
        self.size = clusters.size
        self.backing = backing
        self._per_table = clusters.cluster_size // qcow2.ENTRY  # clusters per L2 table
        l1_clusters = qcow2.l1_clusters(clusters.size, bits)
        if l1_clusters << bits > max(qcow2.MAX_L1_BYTES, clusters.cluster_size):
            raise LocalProtocolError(
                f"a disk of {clusters.size} bytes needs larger clusters"
            )
        self._l1, body = self._plan(1 + l1_clusters)
        self.layout = qcow2.Layout(clusters.size, bits, body)
        self.file_size = self.layout.file_size
        self._header = qcow2.header(self.layout, backing)

    def _plan(self, at: int) -> tuple[array[int], int]:
        """Place the L2 tables from cluster ``at`` on; return them and where they end.

        Returns: file clusters of the L2 tables, 0 where there is none, and the first
        cluster after the last table's data.
        """
        width = self._per_table // 8  # bytes of bitmap for one L2 table
        nothing = bytes(width)
        data, zero = self._map.data, self._map.zero
        tables = array("Q")
        for start in range(0, len(data), width):
            mine = data[start : start + width]
            if nothing.startswith(mine):
                used = self._overlay and not nothing.startswith(
                    zero[start : start + width]
                )
                tables.append(at if used else 0)
                at += used
                continue
            tables.append(at)
            at += 1 + int.from_bytes(mine, "little").bit_count()
        return tables, at

    @property
    def data_bytes(self) -> int:
        """Bytes of all data runs together."""
        return self._map.data_bytes

    def pieces(self) -> Iterator[Piece]:
        """Yield what to send, in file order, without overlap.

        Memory stays at a few clusters, whatever the disk's size. May be iterated more
        than once.
        """
        yield from self._sparse(0, self._header)
        yield from self._l1_pieces()
        bits = self._map.cluster_bits
        for index, table in enumerate(self._l1):
            if table:
                yield from self._table_pieces(index, table << bits)
        yield from self._refcount_pieces()

    def _sparse(self, at: int, content: bytes | bytearray) -> Iterator[Metadata]:
        """Yield what of ``content`` isn't zero."""
        for start, end in qcow2.used_sectors(content, BRIDGE):
            yield Metadata(at + start, bytes(content[start:end]))

    def _l1_pieces(self) -> Iterator[Metadata]:
        bits, per = self._map.cluster_bits, self._per_table
        for number, first in enumerate(range(0, len(self._l1), per)):
            entries = [
                table << bits | qcow2.COPIED if table else 0
                for table in self._l1[first : first + per]
            ]
            content = struct.pack(f">{len(entries)}Q", *entries)
            yield from self._sparse((1 + number) << bits, content)

    def _table_pieces(self, index: int, file_offset: int) -> Iterator[Piece]:
        """Yield the L2 table at ``file_offset`` and its data clusters."""
        bits, size = self._map.cluster_bits, self._map.cluster_size
        first = index * self._per_table
        last = min(first + self._per_table, self._map.clusters)
        table = bytearray(size)
        runs: list[tuple[int, int]] = []
        at = (file_offset + size) | qcow2.COPIED
        for start, end in set_runs(self._map.data, first, last):
            after = at + ((end - start) << bits)
            struct.pack_into(
                f">{end - start}Q",
                table,
                (start - first) * qcow2.ENTRY,
                *range(at, after, size),
            )
            at = after
            runs.append((start, end))
        if self._overlay:
            for start, end in set_runs(self._map.zero, first, last):
                low, high = (start - first) * qcow2.ENTRY, (end - first) * qcow2.ENTRY
                entry = qcow2.ZERO_FLAG.to_bytes(qcow2.ENTRY, "big")
                table[low:high] = entry * (end - start)
        yield from self._sparse(file_offset, table)
        at = file_offset + size
        for start, end in runs:
            guest = start << bits
            yield DataRun(at, guest, min(end << bits, self.size) - guest)
            at += (end - start) << bits

    def _refcount_pieces(self) -> Iterator[Metadata]:
        """Yield the refcount table and blocks, the file's last byte included."""
        size, at = self.layout.cluster_size, self.layout.refcount_table
        for number in range(sum(self.layout.refcount_clusters)):
            content = self.layout.refcount_cluster(number)
            last = at + size == self.file_size
            runs = qcow2.used_sectors(content, BRIDGE)
            if last and (not runs or runs[-1][1] < size):
                # Without its last byte the file comes back short when Bacula itself
                # restores it, and the job ends in "Restore Error".
                runs.append((size - SECTOR, size))
            for start, end in runs:
                yield Metadata(at + start, content[start:end])
            at += size


class Placed(Protocol):
    """Anything that lies somewhere in a file."""

    @property
    def file_offset(self) -> int: ...
    @property
    def length(self) -> int: ...


P = TypeVar("P", bound=Placed)


def dense(pieces: Iterable[P], file_size: int) -> Iterator[P | Gap]:
    """Fill the gaps between pieces, for a stream that must not have holes.

    A :class:`DataRun` must then be sent whole, zeroes included.

    Raises:
        LocalProtocolError: pieces overlap, go backwards or end after ``file_size``.
    """
    at = 0
    for piece in pieces:
        if piece.file_offset < at:
            raise LocalProtocolError(f"piece at {piece.file_offset} comes after {at}")
        if piece.file_offset > at:
            yield Gap(at, piece.file_offset - at)
        yield piece
        at = piece.file_offset + piece.length
    if at > file_size:
        raise LocalProtocolError(f"pieces end at {at} of {file_size} bytes")
    if at < file_size:
        yield Gap(at, file_size - at)
