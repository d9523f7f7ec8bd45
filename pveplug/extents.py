# SPDX-License-Identifier: Apache-2.0
"""Runs of a disk, and pure functions on them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class Kind(enum.Enum):
    DATA = "data"  # may hold anything: read it and carry the bytes
    ZERO = "zero"  # reads as zeroes: carry the length only
    CLEAN = "clean"  # unchanged since job P: carry the length, write nothing


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of one disk, in bytes from its start; ``length`` is never 0."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Block:
    """An extent with its bytes; ``data`` is None unless the kind is DATA."""

    extent: Extent
    data: memoryview | None


def coalesced(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of one kind; the input must be sorted and not overlap."""
    last: Extent | None = None
    for extent in extents:
        if last and last.end == extent.offset and last.kind is extent.kind:
            last = Extent(last.offset, last.length + extent.length, last.kind)
            continue
        if last:
            yield last
        last = extent
    if last:
        yield last


def clipped(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """Cut a sorted sequence of extents down to ``[start, end)``."""
    for extent in extents:
        low, high = max(extent.offset, start), min(extent.end, end)
        if low < high:
            yield Extent(low, high - low, extent.kind)


def tiles(extents: Iterable[Extent], size: int) -> bool:
    """Whether the extents cover ``[0, size)`` in order, without gap or overlap."""
    at = 0
    for extent in extents:
        if extent.offset != at or extent.length <= 0:
            return False
        at = extent.end
    return at == size
