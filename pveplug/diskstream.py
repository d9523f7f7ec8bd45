# SPDX-License-Identifier: Apache-2.0
"""One disk from NBD into one file of Bacula: scan, then stream.

::

    BLOCK_STATUS ─ extents ─► ClusterMap ─► Qcow2StreamWriter ─► pieces in file order
                                                                     │
    NBD READ ──── slots of a run, in order ── zero test, digest ─────┴─► FileSink

The map is made first, so the whole layout of the image is known before a byte is read;
what turns out to be zero while it is read stays a hole in the file. What lies at the
disk's ends is read before, for the job's edges, and comes from there. Memory: two bits
per 64 KiB of disk, the reader's slots, and those edges.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from pveplug.errors import IntegrityError
from pveplug.extents import Extent, Kind
from pveplug.images.clusterhash import ClusterCutter
from pveplug.images.clusters import ClusterMap
from pveplug.images.edges import EdgeRun, EdgesWriter, edge_ranges, without
from pveplug.images.qcow2_writer import DataRun, Metadata, Qcow2StreamWriter
from pveplug.nbd.client import NbdClient
from pveplug.nbd.source import MAX_REQUESTS, OrderedReader, Slot, is_zero, mark
from pveplug.pacing import Pace
from pveplug.units import CLUSTER, KiB, MiB, round_down

REQUEST: Final = 512 * KiB
"""Of a reader that may be slowed, or is to leave little behind."""
LONG_REQUEST: Final = 1 * MiB
"""A fifth less processor time, and no more bytes under way."""
KEPT_BYTES: Final = 2 * MiB
"""So much in buffers may still be written from behind a slot that is waited for: a pipe
that lends is done with that when 1 MiB has gone in behind it, and has the other to go
on with. Where the buffers aren't full it has less, and a timer tells: no slower."""
TURN_BYTES: Final = 256 * KiB
"""At least so often the event loop turns, also if nothing is waited for."""
TRIM_STEP: Final = 4 * MiB
"""Give scratch space back in pieces of this size: one request per 4 MiB read."""
TRIM_AHEAD: Final = 4 * MiB
"""Shortest run that will not be read and is given back before reading begins."""
TRIM_RUNS: Final = 4096
"""At most about so many of them: each is a request and may cost the scratch image a
table. 27,000 on a scattered TiB took 15 s; reading the changes took 3."""


class FileSink(Protocol):
    """Where the image goes."""

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        """Take bytes for ``offset``; the buffers may be reused when it returns."""

    async def begin(self, offset: int, view: memoryview) -> int:
        """Begin to take bytes, which mustn't change until they're free.

        Returns: the mark for :meth:`free`, which never falls. Unless it is overridden,
        the bytes have been written.
        """
        await self.write(offset, view)
        return 0

    async def free(self, mark: int) -> None:
        """Wait until what was begun up to ``mark`` may be changed."""
        return


class Digest(Protocol):
    """What wants to know the data as it passes."""

    def add_all(self, first: int, found: Sequence[bytes | None]) -> None:
        """Take the hashes of clusters in a row, None for one of zeroes; they rise."""


@dataclass(slots=True)
class Progress:
    """Bytes so far; ``total`` is what is to be read."""

    total: int = 0
    read: int = 0
    sent: int = 0
    zero: int = 0
    """Read, found to be zero and left out."""


class RateLimit:
    """A bandwidth limit over one or more readers; ``rate`` in bytes/s, 0 is none.

    ``pace`` may lower it meanwhile.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self.pace = Pace()
        self._clock = clock
        self._free_at = clock()
        self._readers = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """One more reads at the same time as others, within the block."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    def in_flight(self) -> int:
        """Return how many requests each reader may have under way now.

        Without a latency budget only their bytes are bounded, by the reader. Once the
        pace is slowed, those that read at the same time share them.
        """
        if not self.pace.budget_s:
            return MAX_REQUESTS
        if self.pace.ahead or self._readers < 2:
            return self.pace.in_flight
        return max(self.pace.in_flight // self._readers, 1)

    @property
    def request_bytes(self) -> int:
        """How much to ask for at once: less where the guest's latency counts."""
        return REQUEST if self.pace.budget_s else LONG_REQUEST

    async def spend(self, size: int) -> None:
        """Wait until ``size`` more bytes fit the rate."""
        rate = self._rate
        if self.pace.rate:
            rate = min(rate or self.pace.rate, self.pace.rate)
        if not rate:
            return
        now = self._clock()
        # At most a second of unused rate is carried over.
        self._free_at = max(self._free_at, now - 1.0) + size / rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


async def scan(client: NbdClient, *, context: str | None, known: int) -> ClusterMap:
    """Return what an image of this export has to carry.

    Args:
        context: the dirty bitmap's meta context; None: everything.
        known: with a context, the disk's size at the parent job; what lies beyond is
            new, whatever the bitmap says (a grown bitmap's tail starts clean).
    """
    clusters = ClusterMap(client.size)
    tail = 0
    if context is not None:
        tail = min(round_down(known, CLUSTER), client.size)
        await mark(client, clusters, dirty=context)
    if context is None or known < client.size:
        await mark(client, clusters, start=tail)
    return clusters


async def read_edges(
    client: NbdClient,
    clusters: ClusterMap,
    writer: EdgesWriter,
    limit: RateLimit,
    *,
    disks: int,
) -> None:
    """Read the DATA clusters at the ends of a disk and its partitions, each once.

    Args:
        writer: has begun the disk.
        disks: how many the VM has.

    Raises: as :func:`read_ranges`.
    """
    (_, head), *_ = edge_ranges(clusters.size, disks)
    first = await read_ranges(client, clusters, [(0, head)], writer, limit)
    ranges = edge_ranges(clusters.size, disks, first)
    rest = [(max(low, head), high) for low, high in ranges if high > head]
    await read_ranges(client, clusters, rest, writer, limit)


async def read_ranges(
    client: NbdClient,
    clusters: ClusterMap,
    ranges: Sequence[tuple[int, int]],
    writer: EdgesWriter,
    limit: RateLimit,
) -> bytes:
    """Read the DATA clusters of some ranges ``(start, end)`` into ``writer``.

    They aren't given back, nor counted: that is done when the disk is streamed.

    Returns: the disk's first cluster, if it was read; else nothing.

    Raises:
        NbdError, TransportError: a read failed; the point in time may be broken.
    """
    runs = (
        (run.offset, run.length)
        for start, end in ranges
        for run in clusters.data_runs(start, end)
    )
    reader = OrderedReader(
        client, request_bytes=REQUEST, in_flight_bytes=MiB, allowed=limit.in_flight
    )
    first = b""
    async with aclosing(reader.read(runs)) as slots:  # type: ignore[type-var]
        async for slot in slots:
            writer.add(slot.offset, slot.view)
            if slot.offset == 0:
                first = bytes(slot.view[:CLUSTER])
    return first


async def give_back_unread(client: NbdClient, clusters: ClusterMap) -> None:
    """TRIM what will not be read, so that guest writes there need no copy.

    A trimmed range can't be read again, and nobody will.
    """
    shortest = max(TRIM_AHEAD, client.size // TRIM_RUNS)
    for run in clusters.runs():
        if run.kind is not Kind.DATA and run.length >= shortest:
            await trim_range(client, run.offset, run.length)


async def trim_range(client: NbdClient, offset: int, length: int) -> None:
    """Give a range of scratch space back, in requests of at most 1 GiB."""
    while length > 0:
        step = min(length, 1024 * MiB)
        await client.trim(offset, step)
        offset += step
        length -= step


class DiskStream:
    """Streams one disk as a qcow2 image; ``prefetch`` may begin before its turn."""

    def __init__(
        self,
        client: NbdClient,
        clusters: ClusterMap,
        *,
        backing: str | None,
        trim: bool,
        limit: RateLimit,
        digest: Digest | None = None,
        leaves: Digest | None = None,
    ) -> None:
        self._client = client
        self._writer = Qcow2StreamWriter(clusters, backing=backing)
        self._trim = trim
        self._limit = limit
        self._digests = [one for one in (digest, leaves) if one is not None]
        self._cutter = ClusterCutter(clusters.size)
        self._reader = OrderedReader(
            client,
            request_bytes=limit.request_bytes,
            allowed=limit.in_flight,
            keep=True,
        )
        self._begun = 0
        """The sink's mark of what was begun last."""
        self._kept: deque[tuple[Slot, int]] = deque()
        """What may still be written from, and the mark that ends it."""
        self._kept_bytes = 0
        self._since_turn = 0
        self._held: Sequence[EdgeRun] = ()
        self._slots: AsyncGenerator[Slot, None] | None = None
        self._first: asyncio.Task[Slot | None] | None = None
        self._trimmed = Extent(0, 1, Kind.CLEAN)
        self.progress = Progress(total=clusters.data_bytes)
        self.file_size = self._writer.file_size

    def hold(self, runs: Sequence[EdgeRun]) -> None:
        """Take these runs of data from here, and read only the others.

        Args:
            runs: rising; every cluster is DATA. Before anything is read ahead.
        """
        self._held = runs

    def prefetch(self) -> None:
        """Begin to read ahead, up to the reader's slots, and wait there."""
        if self._slots is None:
            self._slots = self._in_order()
            self._first = asyncio.create_task(
                self._next_slot(self._slots), name="prefetch"
            )

    def _runs(self) -> Iterator[tuple[int, int]]:
        for piece in self._writer.pieces():
            if isinstance(piece, DataRun):
                yield piece.guest_offset, piece.length

    async def _in_order(self) -> AsyncGenerator[Slot, None]:
        """Yield what is read and what is held, by offset.

        The first is read before what is held in front of it is looked at: so others
        can read ahead while this disk waits for its turn.
        """
        held = iter(self._held)
        one = next(held, None)
        reading = self._reader.read(without(self._runs(), self._held))
        async with aclosing(reading) as slots:  # type: ignore[type-var]
            async for slot in slots:
                while one is not None and one.offset < slot.offset:
                    yield _slot_of(one)
                    one = next(held, None)
                yield slot
        while one is not None:
            yield _slot_of(one)
            one = next(held, None)

    @staticmethod
    async def _next_slot(slots: AsyncIterator[Slot]) -> Slot | None:
        return await anext(slots, None)

    async def send(self, out: FileSink) -> None:
        """Write the whole image to ``out``.

        Raises:
            NbdError, TransportError: a read failed; the point in time may be broken.
        """
        self.prefetch()
        try:
            await self._send(out)
        finally:
            self._kept.clear()
            self._reader.forget()  # not used again: a sink may still have some of it

    async def _send(self, out: FileSink) -> None:
        slots, first = self._slots, self._first
        if slots is None or first is None:
            raise IntegrityError("the disk was not opened")
        pending: Slot | None = await first
        self._first = None
        async with aclosing(slots):
            used = 0  # bytes of the pending slot that are already written
            for piece in self._writer.pieces():
                if isinstance(piece, Metadata):
                    await out.write(piece.file_offset, piece.data)
                    self.progress.sent += piece.length
                    continue
                at, end = piece.guest_offset, piece.guest_offset + piece.length
                while at < end:
                    if pending is None or pending.offset + used != at:
                        raise IntegrityError(f"expected the disk's bytes at {at}")
                    length = min(pending.length - used, end - at)
                    place = piece.file_offset + (at - piece.guest_offset)
                    await self._send_slot(out, place, pending, used, length)
                    at += length
                    used += length
                    if used == pending.length:
                        await self._keep(out, pending)
                        pending, used = await anext(slots, None), 0
            await out.free(self._begun)
        if pending is not None:
            raise IntegrityError(f"more was read than the image holds: {pending}")
        await self._flush_trim()

    async def _keep(self, out: FileSink, slot: Slot) -> None:
        """Keep a slot that may still be written from, and let go of earlier ones."""
        kept = self._kept
        kept.append((slot, self._begun))
        self._kept_bytes += len(slot.buffer)
        while self._kept_bytes - len(kept[0][0].buffer) >= KEPT_BYTES:
            oldest, mark = kept[0]
            await out.free(mark)
            kept.popleft()
            self._kept_bytes -= len(oldest.buffer)
            self._reader.release(oldest)
        self._since_turn += slot.length
        if self._since_turn >= TURN_BYTES:
            self._since_turn = 0
            await asyncio.sleep(0)

    async def _send_slot(
        self, out: FileSink, place: int, slot: Slot, start: int, length: int
    ) -> None:
        """Send a part of a slot without its zero clusters."""
        await self._limit.spend(length)
        found = self._digested(slot, start, length)
        if found is not None and None not in found:
            await self._write(out, place, slot, start, start + length)
        else:
            zero = None if found is None else iter(found)
            await self._send_without_zeroes(out, place, slot, start, length, zero)
        self.progress.read += length
        if self._trim:
            await self._give_back(slot.offset + start, length)

    async def _send_without_zeroes(
        self,
        out: FileSink,
        place: int,
        slot: Slot,
        start: int,
        length: int,
        found: Iterator[bytes | None] | None,
    ) -> None:
        end = start + length
        run = start  # where the run of clusters that aren't zero began
        at = start
        while at < end:
            step = min(CLUSTER, end - at)
            if next(found) is None if found else is_zero(slot.buffer, at, step):
                if run < at:
                    await self._write(out, place + run - start, slot, run, at)
                self.progress.zero += step
                run = at + step
            at += step
        if run < end:
            await self._write(out, place + run - start, slot, run, end)

    def _digested(
        self, slot: Slot, start: int, length: int
    ) -> Sequence[bytes | None] | None:
        """Tell the digests of a part of a slot.

        Returns: of each cluster its hash, None for one of zeroes; None where nobody
        asked, or where they aren't whole clusters.
        """
        # Not in a thread of its own, beside the reading: on two processors, of which
        # the source takes one, that took 0.2 s more CPU time per GiB and no less time.
        if not self._digests:
            return None
        offset = slot.offset + start
        found = self._cutter.take_whole(offset, slot.buffer, start, length)
        if found is not None:
            self._tell(offset // CLUSTER, found)
            return found
        cut = [*self._cutter.take(offset, slot.buffer, start, length)]
        if not cut:
            return None
        found = [one for _, one in cut]
        self._tell(cut[0][0], found)
        whole = not offset % CLUSTER and len(cut) == -(-length // CLUSTER)
        return found if whole else None

    def _tell(self, first: int, found: Sequence[bytes | None]) -> None:
        for digest in self._digests:
            digest.add_all(first, found)

    async def _write(
        self, out: FileSink, place: int, slot: Slot, start: int, end: int
    ) -> None:
        self._begun = await out.begin(place, slot.view[start:end])
        self.progress.sent += end - start

    async def _give_back(self, offset: int, length: int) -> None:
        """TRIM what has been sent; it can't be read again, so a broken stream fails."""
        last = self._trimmed
        if last.end == offset and last.kind is Kind.DATA:
            self._trimmed = Extent(last.offset, last.length + length, Kind.DATA)
        else:
            await self._flush_trim()
            self._trimmed = Extent(offset, length, Kind.DATA)
        if self._trimmed.length >= TRIM_STEP:
            await self._flush_trim()

    async def _flush_trim(self) -> None:
        pending, self._trimmed = self._trimmed, Extent(0, 1, Kind.CLEAN)
        if pending.kind is Kind.DATA:
            await trim_range(self._client, pending.offset, pending.length)

    async def aclose(self) -> None:
        """Stop reading ahead."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        elif self._first is not None and not self._first.cancelled():
            self._first.exception()  # seen here where send() never asked
        if self._slots is not None:
            await self._slots.aclose()


def _slot_of(run: EdgeRun) -> Slot:
    data = run.data()
    return Slot(run.offset, run.length, data, memoryview(data))
