# SPDX-License-Identifier: Apache-2.0
"""What a disk holds, and its data in order: BLOCK_STATUS to extents to reads.

Two contexts become one line of extents. The dirty bitmap decides first; only inside
dirty runs the allocation is looked at::

    asked         |<------------------ window ------------------>|
    dirty bitmap  |  clean   |   dirty    |  clean |    dirty    |
    allocation    |     data     | zero |      data      |  zero |
                  :          :   :      : :        :     :       :
    extents       |  CLEAN   |DAT|ZERO  |D|  CLEAN | DATA| ZERO  |

A reply need not be as long as the question, and the contexts need not agree. What all
of them cover counts, the next question begins there::

    asked         |<------------------ window ------------------>|
    dirty bitmap  |    clean     |  dirty  |                        short
    allocation    |   data   |            zero                 |.....|  long
    used          |<---- one round ------->|<---- next round ...

Neither an extent that reaches behind the window, nor one that reaches behind the end
of the disk, tells anything about what is there.

Where a server lets us choose (QEMU since 8.2), the allocation isn't asked for where it
doesn't count: a window with few dirty runs is asked for its bitmap only, and then for
the allocation of those. A single cluster isn't asked about: it is DATA, and to read it
tells as well whether it is zero. To tell the allocation of a qcow2 image of 1000 GiB
takes QEMU seconds, for it looks at each entry of each of its tables.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from pveplug.errors import NbdError
from pveplug.extents import Extent, Kind, coalesced
from pveplug.images.clusters import ClusterMap
from pveplug.nbd.client import NbdClient
from pveplug.nbd.connection import Pending
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_request import Runs
from pveplug.units import CLUSTER, GiB, KiB, MiB, round_down, round_up

WINDOW: Final = 4 * GiB - CLUSTER
"""The longest aligned question without extended headers: 26 of them for 100 GiB."""
SPARSE: Final = 64
"""Up to so many dirty runs in a window their allocation is asked for by itself: a
question for each, of 0.1 ms, where 4 GiB of an image cost 5 to 10."""
TOO_SHORT: Final = CLUSTER
"""A dirty run up to here isn't asked about then: to read it takes no longer."""
ZEROES: Final = bytes(1 * MiB)
ZERO_CLUSTER: Final = bytes(CLUSTER)
SHORT: Final = (CLUSTER, 4 * CLUSTER)
"""Buffers of scattered pieces, as many of them are under way; others are as long as a
request."""
HELD: Final = 8
"""So many short requests are sent at a time, each takes a system call otherwise."""
READERS: Final = 2
"""Connections a disk is read by: with one, server and client wait for each other, which
costs a third of the speed where waking up is dear (a virtual machine); a third and a
fourth gain nothing."""
MAX_REQUESTS: Final = 32
"""QEMU works at 16 of a client's requests at a time; the others wait at its door."""


async def extents(
    client: NbdClient,
    *,
    dirty: str | None = None,
    start: int = 0,
    end: int | None = None,
    window: int = WINDOW,
) -> AsyncIterator[Extent]:
    """Tile ``[start, end)`` with extents, neighbours of one kind joined.

    Args:
        dirty: the bitmap's name or whole context name; what it calls clean is
            Kind.CLEAN. None: the whole range is looked at.
        window: bytes asked at a time; a reply is held in memory only that long.

    Without ``base:allocation`` whatever isn't clean is DATA. An allocation that is a
    hole but not said to read as zeroes is DATA too.

    Raises:
        NbdError: the server doesn't offer the bitmap, or failed a request.
    """
    kind: Kind | None = None  # of the run that isn't ended yet, [since, at)
    since = at = start
    async with aclosing(_rounds(client, dirty, start, end, window)) as rounds:
        async for pieces in rounds:
            # One Extent per run that is yielded, none on the way: a fully scattered
            # disk has 16,384 of them per GiB.
            for stop, is_now in pieces:
                if stop <= at:
                    continue  # before a start that isn't aligned
                if is_now is not kind:
                    if kind is not None:
                        yield Extent(since, at - since, kind)
                    since, kind = at, is_now
                at = stop
    if kind is not None:
        yield Extent(since, at - since, kind)


async def mark(
    client: NbdClient,
    clusters: ClusterMap,
    *,
    dirty: str | None = None,
    start: int = 0,
    end: int | None = None,
) -> None:
    """Mark in ``clusters`` what :func:`extents` would yield.

    The same without an object and a step of the event loop's for each extent: a third
    of the time.

    Raises: as :func:`extents`.
    """
    kind = Kind.CLEAN  # of the run that isn't ended yet, [since, at)
    since = at = start
    mark_range, clean = clusters.mark_range, Kind.CLEAN
    async with aclosing(_rounds(client, dirty, start, end, WINDOW)) as rounds:
        async for pieces in rounds:
            for stop, is_now in pieces:
                if stop <= at:
                    continue
                if is_now is not kind:
                    if kind is not clean:
                        mark_range(since, at - since, kind)
                    since, kind = at, is_now
                at = stop
    if kind is not clean:
        mark_range(since, at - since, kind)


async def _rounds(
    client: NbdClient, dirty: str | None, start: int, end: int | None, window: int
) -> AsyncGenerator[Iterable[tuple[int, Kind]], None]:
    """Ask for ``[start, end)``; yield of each round the end and kind of its pieces.

    The first may begin before ``start``, the pieces of a round tile what it covers.
    """
    end = client.size if end is None else end
    context = _dirty_context(dirty)
    if context is not None and context not in client.contexts:
        raise NbdError(f"the NBD export has no context {context}", wire.Error.ENOTSUP)
    useful = context is not None or wire.BASE_ALLOCATION in client.contexts
    if start < end and not useful:
        yield [(end, Kind.DATA)]
        return
    unit = client.minimum_block
    window = max(round_down(window, unit), unit)
    choosing = (
        context is not None
        and wire.BASE_ALLOCATION in client.contexts
        and client.can_choose_context
    )
    only = context if choosing else None

    def ask(low: int) -> Pending:
        asked = min(round_up(min(low + window, end), unit), client.size) - low
        return client.start_status(low, asked, only)

    at = start
    low = round_down(at, unit)
    pending = ask(low) if at < end else None
    try:
        while pending is not None:
            status = await pending
            pending = None
            assert status is not None  # noqa: S101  # that is what was asked for
            allocation = status.get(wire.BASE_ALLOCATION)
            bitmap = status[context] if context is not None else None
            if choosing and bitmap is not None:
                few = _few(bitmap)
                only = context if few else None
                if allocation is None and not few:
                    pending = ask(low)  # the same again, with its allocation
                    continue
            lengths = [runs.total for runs in (allocation, bitmap) if runs is not None]
            high = min(low + min(lengths), end)
            at, before = max(at, high), low
            low = round_down(at, unit)
            if at < end:
                _must_rise(before, low)
            # The server looks for the next answer while this one is gone through.
            pending = ask(low) if at < end else None
            if bitmap is None or allocation is not None or not choosing:
                yield _merged(before, high, bitmap, allocation)
                continue
            async with aclosing(_looked_up(client, before, high, bitmap)) as rounds:
                async for pieces in rounds:
                    yield pieces
    finally:
        if pending is not None:
            pending.abandon()


def _must_rise(asked: int, told: int) -> None:
    """Refuse a status of less than a block: the same would be asked for ever."""
    if told <= asked:
        raise NbdError(
            f"the NBD server's status at {asked} is shorter than its own minimum block",
            wire.Error.EINVAL,
        )


def _few(bitmap: Runs) -> bool:
    return len(bitmap) <= 2 * SPARSE + 1 and (
        sum(flags & wire.STATE_DIRTY for flags in bitmap.flags) <= SPARSE
    )


async def _looked_up(
    client: NbdClient, at: int, high: int, bitmap: Runs
) -> AsyncGenerator[Iterable[tuple[int, Kind]], None]:
    """Yield a window's pieces; the allocation of its few dirty runs is asked for."""
    unit = client.minimum_block
    dirty = [
        run for run in _dirty_runs(at, high, bitmap) if run[1] - run[0] > TOO_SHORT
    ]

    def ask(low: int, stop: int) -> Pending:
        low = round_down(low, unit)
        asked = min(round_up(stop, unit), client.size) - low
        return client.start_status(low, asked, wire.BASE_ALLOCATION)

    under_way = deque(ask(low, stop) for low, stop in dirty)
    try:
        told = list[tuple[int, Kind]]()
        for low, stop in _dirty_runs(at, high, bitmap):
            told.append((low, Kind.CLEAN))
            if stop - low <= TOO_SHORT:
                told.append((stop, Kind.DATA))
                continue
            yield told
            told = []
            while low < stop:
                status = await under_way[0]
                under_way.popleft()
                assert status is not None  # noqa: S101  # that is what was asked for
                runs, first = status[wire.BASE_ALLOCATION], round_down(low, unit)
                if first + runs.total < stop:
                    _must_rise(first, round_down(first + runs.total, unit))
                yield _kinds(first, stop, runs, wire.STATE_ZERO, Kind.ZERO, Kind.DATA)
                low = max(low, min(first + runs.total, stop))
                if low < stop:
                    under_way.appendleft(ask(low, stop))
        yield [*told, (high, Kind.CLEAN)]
    finally:
        for pending in under_way:
            pending.abandon()


def _dirty_runs(at: int, high: int, bitmap: Runs) -> Iterator[tuple[int, int]]:
    for length, flags in bitmap:
        if at >= high:
            return
        stop = min(at + length, high)
        if flags & wire.STATE_DIRTY:
            yield at, stop
        at = stop


def _dirty_context(dirty: str | None) -> str | None:
    if dirty is None or ":" in dirty:
        return dirty
    return wire.DIRTY_BITMAP + dirty


def _merged(
    at: int, high: int, bitmap: Runs | None, allocation: Runs | None
) -> Iterator[tuple[int, Kind]]:
    """Merge one round: the end and kind of each piece from ``at`` up to ``high``."""
    if bitmap is None:
        assert allocation is not None  # noqa: S101  # one of the two was asked for
        return _kinds(at, high, allocation, wire.STATE_ZERO, Kind.ZERO, Kind.DATA)
    if allocation is None:
        return _kinds(at, high, bitmap, wire.STATE_DIRTY, Kind.DATA, Kind.CLEAN)
    return _overlaid(at, high, bitmap, allocation)


def _kinds(
    at: int, high: int, runs: Runs, flag: int, with_it: Kind, without: Kind
) -> Iterator[tuple[int, Kind]]:
    for length, flags in runs:
        if at >= high:
            return
        at += length
        yield min(at, high), with_it if flags & flag else without


def _overlaid(
    at: int, high: int, bitmap: Runs, allocation: Runs
) -> Iterator[tuple[int, Kind]]:
    allocated = iter(allocation)
    below_end, below = at, Kind.DATA
    run_end = at
    for length, flags in bitmap:
        run_end = min(run_end + length, high)
        if not flags & wire.STATE_DIRTY:
            at = run_end
            yield at, Kind.CLEAN
            continue
        while at < run_end:
            while below_end <= at:
                length, state = next(allocated)
                below_end += length
                below = Kind.ZERO if state & wire.STATE_ZERO else Kind.DATA
            at = min(below_end, run_end)
            yield at, below


def is_zero(buffer: bytearray | memoryview, start: int, length: int) -> bool:
    """Whether ``length`` bytes from ``start`` on are all zero.

    Give it the bytearray: 35 GB/s without a copy. A memoryview costs a copy.
    """
    stop = start + length
    if start < stop and buffer[start]:
        return False  # nearly always so
    while start < stop:
        count = min(len(ZEROES), stop - start)
        if count == CLUSTER:
            zeroes = ZERO_CLUSTER
        else:
            zeroes = ZEROES if count == len(ZEROES) else ZEROES[:count]
        if isinstance(buffer, bytearray):
            if not buffer.startswith(zeroes, start, start + count):
                return False
        # memoryview == bytes compares item by item, 100 times slower than a copy.
        elif bytes(buffer[start : start + count]) != zeroes:
            return False
        start += count
    return True


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes of the disk, valid until the reader is asked for the next, or gets it back.

    ``buffer`` may be longer than ``length``; ``view`` is its first ``length`` bytes.
    """

    offset: int
    length: int
    buffer: bytearray
    view: memoryview


class OrderedReader:
    """Reads runs in their order, with several requests in flight.

    Buffers are reused; read-ahead is bounded by ``in_flight_bytes`` (2-4 MiB measured
    best: more falls out of the processor's cache), and by ``allowed()`` requests, asked
    each time, so there are more of them where the runs are short. With ``keep`` a slot
    stays as it is until :meth:`release`. There are no tasks: leaving the iteration, by
    any way, abandons the requests under way. A generator that was left by ``break``
    does so when it is closed, so prefer ``contextlib.aclosing``.
    """

    def __init__(
        self,
        client: NbdClient,
        *,
        request_bytes: int = 512 * KiB,
        in_flight_bytes: int = 4 * MiB,
        allowed: Callable[[], int] | None = None,
        keep: bool = False,
    ) -> None:
        self._client = client
        self._request = max(
            round_down(min(request_bytes, client.maximum_block), client.minimum_block),
            client.minimum_block,
        )
        self._bytes = in_flight_bytes
        self._allowed = allowed or (lambda: MAX_REQUESTS)
        self._lasting: dict[int, bytearray] | None = {} if keep else None
        self._sizes = (*(s for s in SHORT if s < self._request), self._request)
        self._free: dict[int, list[bytearray]] = {size: [] for size in self._sizes}
        self._pooled = 0  # bytes in these
        self._held = 0

    async def read(self, runs: Iterable[tuple[int, int]]) -> AsyncIterator[Slot]:
        """Yield the bytes of ``(offset, length)`` runs; touching runs are joined.

        Raises: as :meth:`NbdClient.read_into`; nothing is yielded after a failure.
        """
        pieces = self._pieces(runs)
        piece = next(pieces, None)
        size = 0 if piece is None else self._size(piece[1])
        under_way: deque[tuple[Slot, Pending | None]] = deque()
        ahead = 0  # bytes of the buffers under way
        try:
            while True:
                while piece is not None and (
                    not under_way
                    or (
                        ahead + size <= self._bytes and len(under_way) < self._allowed()
                    )
                ):
                    under_way.append(self._start(*piece, size))
                    ahead += size
                    piece = next(pieces, None)
                    size = 0 if piece is None else self._size(piece[1])
                if not under_way:
                    return
                slot, pending = under_way[0]
                if pending is not None:
                    await pending
                else:
                    await self._client.read_into(slot.offset, slot.view)
                under_way.popleft()
                ahead -= len(slot.buffer)
                if self._lasting is None:
                    yield slot
                    self._release(slot.buffer)
                else:
                    self._lasting[id(slot.buffer)] = slot.buffer
                    yield slot
        finally:
            for slot, pending in under_way:
                if pending is not None:
                    pending.abandon()
                self._release(slot.buffer)

    def release(self, slot: Slot) -> None:
        """Take back a slot that was kept; one that isn't from here is left alone."""
        if self._lasting and self._lasting.pop(id(slot.buffer), None) is not None:
            self._release(slot.buffer)

    def forget(self) -> None:
        """Let go of all memory; what the consumer has is left as it is."""
        self._pooled = 0
        for free in self._free.values():
            free.clear()
        if self._lasting:
            self._lasting.clear()

    def _start(
        self, offset: int, length: int, size: int
    ) -> tuple[Slot, Pending | None]:
        client, unit = self._client, self._client.minimum_block
        buffer = self._buffer(size)
        slot = Slot(offset, length, buffer, memoryview(buffer)[:length])
        end = offset + length
        if offset % unit or (end % unit and end != client.size):
            return slot, None  # needs a copy; read when it is this slot's turn
        try:
            self._held = self._held + 1 if size <= SHORT[-1] else HELD
            hold = self._held < HELD
            if not hold:
                self._held = 0
            return slot, client.start_read(offset, slot.view, hold=hold)
        except BaseException:
            self._release(buffer)
            raise

    def _size(self, length: int) -> int:
        """Return how long the buffer of a piece is."""
        for size in self._sizes:
            if length <= size:
                break
        return size

    def _buffer(self, size: int) -> bytearray:
        if free := self._free[size]:
            self._pooled -= size
            return free.pop()
        return bytearray(size)

    def _release(self, buffer: bytearray) -> None:
        if self._pooled < self._bytes:
            self._pooled += len(buffer)
            self._free[len(buffer)].append(buffer)

    def _pieces(self, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Join touching runs, then cut at multiples of the request size."""
        joined = coalesced(Extent(at, length, Kind.DATA) for at, length in runs)
        for run in joined:
            at = run.offset
            while at < run.end:
                stop = min(round_down(at, self._request) + self._request, run.end)
                yield at, stop - at
                at = stop
