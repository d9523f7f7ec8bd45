# SPDX-License-Identifier: Apache-2.0
"""Formats whose tables say where in the file each part of the disk lies.

A table names places; they are sorted and visited as the file goes by. A place may be
another table, which names more places. What nothing has named yet is dropped, or, as
long as a table is still to come that might name it, spilled::

    file     header  table A   a1  a2   ?   table B   b1   ?
    known    A, B    a1 a2 B   │   │    │   b1 …      │    │
             told or spilled:  told     spilled       told dropped
                                        (B names it: told from the spill)

A byte is used once. A place that was used already, or lies in what a table itself
occupies, is neither ahead of us nor in the spill: overlaps and loops show themselves.
"""

from __future__ import annotations

import abc
import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

from pveplug.images.stream import (
    OUTPUT,
    PIECE,
    Flow,
    Spill,
    SpillNeededError,
    StreamReader,
)

MAX_FRAGMENTS: Final = 4 * 1024 * 1024
"""Places waiting at one time: 24 bytes each, 96 MiB."""
MAX_KEPT: Final = 256 * 1024  # runs that have passed and aren't placed yet
MAX_FILE: Final = 1 << 62
SORTED: Final = 64 * 1024  # places that are sorted at a time


class Place(NamedTuple):
    """A run of the file; what ``target`` is depends on the tag."""

    offset: int
    length: int
    target: int
    tag: int


class Schedule:
    """Places in the order of the file, from any number of unsorted tables."""

    def __init__(self) -> None:
        self._heads: list[tuple[int, int]] = []  # offset, and whose it is
        self._series: dict[
            int, tuple[int, int, array[int], array[int], array[int]]
        ] = {}
        self._serial = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def next_offset(self) -> int:
        """Where the next place begins; MAX_FILE if there is none."""
        return self._heads[0][0] if self._heads else MAX_FILE

    def add(self, tag: int, places: list[tuple[int, int, int]]) -> None:
        """Add ``(offset, length, target)`` of one tag; the list is sorted in place."""
        places.sort()
        offsets, lengths, targets = (array("Q") for _ in range(3))
        for offset, length, target in places:
            offsets.append(offset)
            lengths.append(length)
            targets.append(target)
        self._count += len(places)
        if places:
            self._serial += 1
            self._series[self._serial] = (tag, 0, offsets, lengths, targets)
            heapq.heappush(self._heads, (offsets[0], self._serial))

    def pop(self) -> Place | None:
        """Return the next place and forget it; None if there is none."""
        if not self._heads:
            return None
        offset, serial = self._heads[0]
        tag, at, offsets, lengths, targets = self._series[serial]
        place = Place(offset, lengths[at], targets[at], tag)
        at += 1
        self._count -= 1
        if at == len(offsets):
            heapq.heappop(self._heads)
            del self._series[serial]
        else:
            heapq.heapreplace(self._heads, (offsets[at], serial))
            self._series[serial] = (tag, at, offsets, lengths, targets)
        return place


class _Kept:
    """Runs of the file that have passed unused, and where they are now (-1: lost)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[tuple[int, int]] = []  # length, place in the spill

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, offset: int, length: int, place: int) -> None:
        """Add a run at the end; offsets rise."""
        if self._starts:
            size, where = self._runs[-1]
            joins = where == place == -1 or (where >= 0 and where + size == place)
            if self._starts[-1] + size == offset and joins:
                self._runs[-1] = (size + length, where)
                return
        self._starts.append(offset)
        self._runs.append((length, place))

    def find(self, offset: int, length: int) -> tuple[int, int] | None:
        """Return how much is here in one run, up to ``length``, and its place."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        inside = offset - self._starts[index]
        size, place = self._runs[index]
        if inside >= size:
            return None
        return min(length, size - inside), place if place < 0 else place + inside

    def use(self, offset: int, length: int) -> None:
        """Forget a part of one run that :meth:`find` has shown."""
        index = bisect_right(self._starts, offset) - 1
        start, (size, place) = self._starts[index], self._runs[index]
        before, after = offset - start, start + size - offset - length
        rest = []
        if before:
            rest.append((start, before, place))
        if after:
            skipped = before + length
            rest.append(
                (start + skipped, after, place if place < 0 else place + skipped)
            )
        self._starts[index : index + 1] = [item[0] for item in rest]
        self._runs[index : index + 1] = [item[1:] for item in rest]


class PlacedReader(StreamReader, abc.ABC):
    """A reader that visits places; a format says what each tag means."""

    def __init__(
        self,
        *,
        name: str = "image",
        file_size: int | None = None,
        spill: Spill | None = None,
    ) -> None:
        super().__init__(name=name, file_size=file_size, spill=spill)
        self._schedule = Schedule()
        self._kept = _Kept()
        self._settled = False  # no table is to come: what isn't named yet is nothing
        self._spilled = 0
        self._recalled = 0

    @abc.abstractmethod
    def _visit(self, place: Place) -> Flow[None]:
        """Use one place, which may lie behind: by the methods below."""

    def _plan(self, place: Place, table: int) -> None:
        """Add one place that is named at byte ``table``."""
        self._judge_place(place, table)
        self._schedule.add(place.tag, [place[:3]])

    def _plan_all(
        self, places: Iterator[Place | None], table: int, join: int | None = None
    ) -> Flow[None]:
        """Add the places that the table at byte ``table`` names.

        Args:
            places: as the table is gone through, None now and then: what that tells
                by the way must not pile up.
            table: for errors.
            join: the tag of which places that are neighbours, in the file and by
                target, become one.
        """
        batches: dict[int, list[tuple[int, int, int]]] = {}
        for place in places:
            if place is None:
                yield from self._breathe()
                continue
            self._judge_place(place, table)
            offset, length, target, tag = place
            batch = batches.setdefault(tag, [])
            if tag == join and batch:
                last, size, where = batch[-1]
                if last + size == offset and where + size == target:
                    batch[-1] = (last, size + length, where)
                    continue
            batch.append((offset, length, target))
            if len(batch) == SORTED:
                self._add(tag, batches.pop(tag), table)
                yield from self._breathe()
        for tag, batch in batches.items():
            self._add(tag, batch, table)

    def _judge_place(self, place: Place, table: int) -> None:
        end = place.offset + place.length
        if end > MAX_FILE or (
            self._file_size is not None and place.offset >= self._file_size
        ):
            raise self._error(table, f"points to byte {place.offset}, beyond the file")

    def _add(self, tag: int, batch: list[tuple[int, int, int]], table: int) -> None:
        if len(self._schedule) + len(batch) > MAX_FRAGMENTS:
            raise self._error(table, f"more than {MAX_FRAGMENTS} fragments at a time")
        self._schedule.add(tag, batch)

    @property
    def _full(self) -> bool:
        """Whether a table that is gone through should pause."""
        return self._made >= OUTPUT

    def _walk(self) -> Flow[None]:
        """Visit everything that is planned, and what that plans in its turn."""
        while place := self._schedule.pop():
            yield from self._visit(place)
            yield from self._breathe()
        if self._recalled:
            self._note(
                f"{self._recalled} bytes came before the table that places them and "
                f"waited in the spill ({self._spilled} bytes in all)"
            )

    # --- what passes ---------------------------------------------------------------

    def _go_to(self, offset: int) -> Flow[None]:
        """Let the file pass up to ``offset``, keeping what may be asked for."""
        while not self._settled and self.position < offset:
            at = self.position
            self._keep(at, (yield from self._some(min(offset - at, PIECE))))
        yield from self._skip(max(offset - self.position, 0))

    def _keep(self, at: int, view: memoryview) -> None:
        place = -1
        if self._spill:
            if self._spilled + len(view) > self._spill.limit:
                raise self._spill_error(
                    at, f"more than {self._spill.limit} bytes would have to be spilled"
                )
            place = self._spill.append(view)
            self._spilled += len(view)
        if len(self._kept) >= MAX_KEPT:
            raise self._error(at, f"more than {MAX_KEPT} fragments would be kept")
        self._kept.add(at, len(view), place)

    def _spill_error(self, at: int, reason: str) -> SpillNeededError:
        text = f"{self._name}: {self.format} at byte {at}: {reason}"
        return SpillNeededError(text, offset=at)

    # --- what is used --------------------------------------------------------------

    def _bytes_at(self, offset: int, length: int) -> Flow[bytes]:
        """Use ``length`` bytes (bounded by the caller) wherever they are."""
        if offset >= self.position:
            yield from self._go_to(offset)
            return (yield from self._take(length))
        got = bytearray()
        while len(got) < length:
            part = self._recall(offset + len(got), length - len(got))
            self._kept.use(offset + len(got), len(part))
            self._recalled += len(part)
            got += part
        return bytes(got)

    def _data_at(self, offset: int, length: int, guest: int) -> Flow[None]:
        """Tell ``length`` bytes of the file as the disk's."""
        if offset >= self.position:
            yield from self._go_to(offset)
            yield from self._pass(length, guest)
            return
        while length:
            part = self._recall(offset, min(length, PIECE))
            self._kept.use(offset, len(part))
            self._recalled += len(part)
            self._tell_data(guest, memoryview(part), made=True)
            offset, guest = offset + len(part), guest + len(part)
            length -= len(part)
            yield from self._breathe()

    def _recall(self, offset: int, length: int) -> bytes:
        """Return bytes that have passed unused: at least one, at most ``length``."""
        found = self._kept.find(offset, length)
        if not found:
            raise self._error(
                offset, "is used twice: places overlap, or lie in a table of the image"
            )
        length, place = found
        if place < 0 or self._spill is None:
            raise self._spill_error(
                offset, "comes before the table that places it: a spill is needed"
            )
        data = self._spill.read(place, length)
        if self._patches:
            length, patch = self._patches.at(offset, length)
            return bytes(data[:length] if patch is None else patch)
        return data

    def _window_at(self, offset: int, limit: int) -> Flow[tuple[bytes, bool]]:
        """Return up to ``limit`` bytes, fewer at the end of what is there.

        They end where the next place begins: it may share a sector, but no byte.
        How many of them are used, :meth:`_used` says. The flag tells it from where
        they came.
        """
        limit = max(min(limit, self._schedule.next_offset - offset), 1)
        if offset < self.position:
            return self._recall(offset, limit), True
        yield from self._go_to(offset)
        got = bytearray()
        while len(got) < limit and not (yield from self._ended()):
            got += yield from self._some(limit - len(got))
        return bytes(got), False

    def _used(self, offset: int, window: tuple[bytes, bool], length: int) -> None:
        """Use the first ``length`` bytes of a window, give the others back."""
        data, recalled = window
        if recalled:
            self._kept.use(offset, length)
            self._recalled += length
        elif length < len(data):
            self._give_back(data[length:])
