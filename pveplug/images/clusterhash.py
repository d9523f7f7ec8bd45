# SPDX-License-Identifier: Apache-2.0
"""The BLAKE3-256 of each cluster of a disk, taken once for all who want digests.

What goes with the image (:mod:`pveplug.images.digests`) and what stays on the node
(:mod:`pveplug.images.leaves`) are both made of it: hashing the bytes is most of what a
backup does with them, 0.2 s of CPU time per GiB each time. All 32 bytes of it, so that
what is made of them is as hard to forge as if it were made of the bytes themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.units import CLUSTER

_BITS: Final = CLUSTER.bit_length() - 1
_NOUGHT: Final = bytes(CLUSTER)


@functools.lru_cache(maxsize=8)
def hash_of_zeroes(length: int) -> bytes:
    """Return what :func:`blake3` makes of so many zeroes."""
    return blake3(bytes(length)).digest()


class ClusterCutter:
    """Cuts a disk's bytes, as they come in order, into clusters of 64 KiB."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._part = bytearray()  # of a cluster that came in several pieces
        self._part_at = 0  # where the next piece must begin

    def take_whole(
        self, offset: int, buffer: bytearray, start: int, length: int
    ) -> list[bytes | None] | None:
        """Return the hashes of clusters that are here whole; arguments as :meth:`take`.

        Returns: None, and nothing is taken, where one is not of 64 KiB or not whole.
        """
        if self._part or offset % CLUSTER or length % CLUSTER:
            return None
        view = memoryview(buffer)
        return [
            None
            if buffer.startswith(_NOUGHT, at, at + CLUSTER)
            else blake3(view[at : at + CLUSTER]).digest()
            for at in range(start, start + length, CLUSTER)
        ]

    def take(
        self, offset: int, buffer: bytearray, start: int, length: int
    ) -> Iterator[tuple[int, bytes | None]]:
        """Yield ``(cluster, hash)`` of each one completed; None for one of zeroes.

        Args:
            offset: of the bytes on the disk; ``start`` and ``length``: in the buffer.

        Raises:
            IntegrityError: a cluster doesn't go on where it was left.
        """
        view = memoryview(buffer)
        end = start + length
        while start < end:
            cluster = offset - offset % CLUSTER
            whole = min(CLUSTER, self._size - cluster)
            step = min(cluster + whole - offset, end - start)
            if step == whole:
                if self._part:
                    raise IntegrityError(f"a cluster was left at byte {self._part_at}")
                if buffer.startswith(
                    _NOUGHT if whole == CLUSTER else _NOUGHT[:whole],
                    start,
                    start + whole,
                ):
                    yield cluster >> _BITS, None
                else:
                    found = blake3(view[start : start + whole]).digest()
                    yield cluster >> _BITS, found
            else:
                if offset != (self._part_at if self._part else cluster):
                    raise IntegrityError(f"a cluster has no bytes before {offset}")
                self._part += view[start : start + step]
                self._part_at = offset + step
                if len(self._part) == whole:
                    part, self._part = self._part, bytearray()
                    yield from self.take(cluster, part, 0, whole)
            offset += step
            start += step
