# SPDX-License-Identifier: Apache-2.0
"""The qcow2 image we write, as arithmetic shared by its writer and its reader.

::

    0          header, backing format, backing name      one cluster
    C          L1 table                                  whole clusters
               L2 table of the first 512 MiB that hold anything
                 its data clusters, in guest order
               L2 table of the next 512 MiB that hold anything
                 …
    R          refcount table                            whole clusters
               refcount blocks                           to the end of the file

Every cluster of the file has reference count 1, so all of it follows from the disk's
size, the number of L2 tables and the number of data clusters. Names and values are
those of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pveplug.errors import LocalProtocolError
from pveplug.units import SECTOR

MAGIC: Final = 0x514649FB
VERSION: Final = 3
HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQQQII")
"""magic, version, backing offset and size, cluster bits, size, crypt method, L1 size
and offset, refcount table offset and clusters, snapshots and their offset,
incompatible, compatible and autoclear features, refcount order, header length."""
EXTENSION: Final = struct.Struct(">II")
BACKING_FORMAT: Final = 0xE2792ACA
MAX_BACKING_NAME: Final = 1023

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
ZERO_FLAG: Final = 1

ENTRY: Final = 8  # bytes of an L1, L2 or refcount table entry
REFCOUNT_ORDER: Final = 4
REFCOUNT: Final = 2  # bytes of a reference count of order 4
ONE: Final = (1).to_bytes(REFCOUNT, "big")

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_L1_BYTES: Final = 2 * 1024 * 1024
"""64 TiB need 1 MiB of L1 table at 64 KiB clusters."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in an image of ours.

    Attributes:
        size: virtual size in bytes.
        cluster_bits: log2 of the cluster size.
        body_clusters: clusters before the refcount table.
    """

    size: int
    cluster_bits: int
    body_clusters: int

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_table(self) -> int:
        """File offset of the refcount table."""
        return self.body_clusters << self.cluster_bits

    @property
    def refcount_clusters(self) -> tuple[int, int]:
        """Clusters of the refcount table, and number of refcount blocks.

        Both count themselves, hence the search for the fixed point; each round can
        only add, and adds at most what the round before made necessary.
        """
        size = self.cluster_size
        table = blocks = 1
        while True:
            total = self.body_clusters + table + blocks
            need_blocks = -(-total * REFCOUNT // size)
            need_table = -(-need_blocks * ENTRY // size)
            if (need_table, need_blocks) == (table, blocks):
                return table, blocks
            table, blocks = max(table, need_table), max(blocks, need_blocks)

    @property
    def file_clusters(self) -> int:
        return self.body_clusters + sum(self.refcount_clusters)

    @property
    def file_size(self) -> int:
        """Length of the file in bytes, always whole clusters."""
        return self.file_clusters << self.cluster_bits

    def refcount_cluster(self, number: int) -> bytes:
        """Return cluster ``number`` of the refcount area: table, then blocks."""
        size = self.cluster_size
        table, blocks = self.refcount_clusters
        if number < table:
            per = size // ENTRY
            first, last = number * per, min((number + 1) * per, blocks)
            start = (self.body_clusters + table + first) << self.cluster_bits
            count = max(last - first, 0)
            entries = range(start, start + (count << self.cluster_bits), size)
            return struct.pack(f">{count}Q", *entries).ljust(size, b"\0")
        per = size // REFCOUNT
        before = (number - table) * per
        return (ONE * min(per, self.file_clusters - before)).ljust(size, b"\0")


def l1_entries(size: int, cluster_bits: int) -> int:
    """Number of L1 entries, each for one L2 table, of a disk of ``size`` bytes."""
    per_table = 2 * cluster_bits - 3  # log2 of the bytes one L2 table maps
    return ((size - 1) >> per_table) + 1


def l1_clusters(size: int, cluster_bits: int) -> int:
    """Clusters of the L1 table."""
    return ((l1_entries(size, cluster_bits) * ENTRY - 1) >> cluster_bits) + 1


def header(layout: Layout, backing: str | None) -> bytes:
    """Return the header cluster's content, without trailing zeroes.

    Raises:
        LocalProtocolError: the backing name does not fit or would be misread.
    """
    table, _ = layout.refcount_clusters
    extensions, name = b"", b""
    if backing is not None:
        name = backing.encode()
        kind = b"qcow2"
        extensions = EXTENSION.pack(BACKING_FORMAT, len(kind)) + kind.ljust(8, b"\0")
    extensions += EXTENSION.pack(0, 0)
    name_at = HEADER.size + len(extensions)
    if backing is not None and (
        not name
        or len(name) > MAX_BACKING_NAME
        or name_at + len(name) > layout.cluster_size
        or b"\0" in name
    ):
        raise LocalProtocolError(f"{backing!r} cannot be a backing file name")
    fixed = HEADER.pack(
        MAGIC,
        VERSION,
        name_at if name else 0,
        len(name),
        layout.cluster_bits,
        layout.size,
        0,
        l1_entries(layout.size, layout.cluster_bits),
        layout.cluster_size,
        layout.refcount_table,
        table,
        0,
        0,
        0,
        0,
        0,
        REFCOUNT_ORDER,
        HEADER.size,
    )
    return fixed + extensions + name


def used_sectors(cluster: bytes | bytearray, bridge: int) -> list[tuple[int, int]]:
    """Return the runs of 512-byte sectors that are not all zero, as byte ranges.

    Gaps of at most ``bridge`` bytes are sent with their neighbours.
    """
    zeroes = bytes(SECTOR)
    runs: list[tuple[int, int]] = []
    for at in range(0, len(cluster), SECTOR):
        if cluster.startswith(zeroes, at):
            continue
        end = min(at + SECTOR, len(cluster))
        if runs and at - runs[-1][1] <= bridge:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((at, end))
    return runs
