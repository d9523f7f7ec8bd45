# SPDX-License-Identifier: Apache-2.0
"""What an NBD client remembers of a request until its reply is complete."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import NbdError, RemoteProtocolError
from pveplug.proto.nbd_wire import Command, CommandFlag

MAX_FRAGMENTS: Final = 65536
"""A 32 MiB read answered by 512-byte chunks in the worst order."""


class Runs:
    """The extents of one context of a BLOCK_STATUS reply, kept as two arrays.

    Iterating gives ``(length, flags)``. 65,536 extents take 0.5 or 1 MiB here and
    6 MiB as a list of tuples.
    """

    __slots__ = ("flags", "lengths", "total")

    def __init__(self, lengths: array[int], flags: array[int]) -> None:
        self.lengths = lengths
        self.flags = flags
        self.total = sum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.lengths, self.flags, strict=True)


@dataclass(slots=True, eq=False)
class Request:
    command: Command
    flags: CommandFlag
    offset: int
    length: int
    view: memoryview | None = None
    contexts: Collection[str] = ()
    """What a BLOCK_STATUS has to tell."""
    error: NbdError | None = None
    status: dict[str, Runs] = field(default_factory=dict)
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        name = self.command.name
        if self.command is Command.FLUSH:
            return name
        return f"{name} of {self.length} bytes at {self.offset}"

    def cover(self, start: int, end: int) -> None:
        """Note that ``[start, end)`` of a read is answered; once only, and inside."""
        if not self.offset <= start < end <= self.offset + self.length:
            raise RemoteProtocolError(f"NBD chunk {start}-{end} is outside {self}")
        ranges = self.ranges
        at = bisect_left(ranges, (start, end))
        follows = at < len(ranges)
        if (at and ranges[at - 1][1] > start) or (follows and ranges[at][0] < end):
            raise RemoteProtocolError(f"NBD chunk {start}-{end} came twice in {self}")
        if follows and ranges[at][0] == end:
            end = ranges.pop(at)[1]
        if at and ranges[at - 1][1] == start:
            at -= 1
            start = ranges.pop(at)[0]
        ranges.insert(at, (start, end))
        if len(ranges) > MAX_FRAGMENTS:
            raise RemoteProtocolError(f"NBD reply to {self} is in too many fragments")

    def whole(self) -> bool:
        return self.ranges == [(self.offset, self.offset + self.length)]
