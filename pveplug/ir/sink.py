# SPDX-License-Identifier: Apache-2.0
"""What a restore writes a landing through: the interface of NbdSink, over a Landing.

::

    write(), zero() ──copy──► a slot of 1 MiB ──► one thread: write whole clusters, mark
                              (at most eight)         └─ pieces of one: remember what of
                                                         it is there, mark when all is
    every few seconds ───────────────────────► another thread: checkpoint

While the thread is idle whole clusters go at once, so that a guest that waits for one
has it soon; while it is busy they are joined to larger writes.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from pveplug.errors import LocalProtocolError
from pveplug.ir.landing import Landing
from pveplug.ir.presence import Mark
from pveplug.tasks import to_the_end
from pveplug.units import MiB, round_down

SLOT: Final = 1 * MiB
"""A multiple of every cluster size."""
MAX_JOBS: Final = 16
MAX_ZEROES: Final = 1024
"""Ranges handed to the thread together."""
MAX_PIECES: Final = 4096
"""Clusters of which a part has come. Of images read in order there is one at a time,
and one for each place where the disk grew within its chain."""


class LandingSink:
    """A landing to be written; an async context manager for one task.

    ``write`` copies what it is given before it returns. What the landing has already
    stays as it is.

    Args:
        final: what is written is the disk's last word, in any order: each cluster is
            marked as soon as it is whole. False: images are replayed, later calls win,
            and everything is marked by :meth:`finish` only; what an earlier attempt
            left unmarked is zeroed first, and no other job may write meanwhile.
        in_flight_bytes: bound of copied bytes.
        clock: seconds, of any origin.
        checkpoint_s, checkpoint_bytes: a checkpoint is made when so much time has gone
            by, or so much was written, since the last one began.

    Leaving the context without :meth:`finish` (and without an exception) is an error.
    With an exception, cancelled too, what was marked stays, and what is being written
    is written to its end first.
    """

    def __init__(
        self,
        landing: Landing,
        *,
        final: bool = True,
        in_flight_bytes: int = 8 * MiB,
        clock: Callable[[], float] = time.monotonic,
        checkpoint_s: float = 5.0,
        checkpoint_bytes: int = 256 * MiB,
    ) -> None:
        self._landing = landing
        self._final = final
        self._max_slots = max(in_flight_bytes // SLOT, 2)
        self._clock = clock
        self._checkpoint_s = checkpoint_s
        self._checkpoint_bytes = checkpoint_bytes
        self._writer = ThreadPoolExecutor(1, "landing")
        self._syncer = ThreadPoolExecutor(1, "landing-sync")
        self._slots = 0
        self._free: list[bytearray] = []
        self._open: bytearray | None = None  # being filled
        self._open_at = 0
        self._open_length = 0
        self._zeroes: list[tuple[int, int]] = []  # start, end; not handed over yet
        self._jobs: set[asyncio.Future[Any]] = set()
        self._checkpoint: asyncio.Future[bool] | None = None
        self._checked = clock()
        self._unchecked = 0
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # the thread's own
        self._error: BaseException | None = None
        self._wake = asyncio.Event()
        self._feeding = False
        self._closing = False
        self._finished = False
        self.written = 0
        """Bytes taken as data so far."""
        self.zeroed = 0
        """Bytes taken as zeroes so far."""
        self.landed = 0
        """Bytes that were not there before; without ``final`` known at the end."""

    async def __aenter__(self) -> Self:
        """Take part in writing.

        Raises:
            LandingError: another job writes, and one of both must be alone (EBUSY).
        """
        self._landing.begin_feeding(alone=not self._final)
        self._feeding = True
        try:
            if not self._final:
                await to_the_end(asyncio.to_thread(self._landing.clear_owed))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()
        if error is None and not self._finished:
            self._raise_error()
            raise LocalProtocolError("a landing's sink was left without finish()")

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset``, now or together with what touches it.

        Raises:
            LandingError: the first failure of any write or checkpoint so far.
        """
        view = memoryview(data).cast("B")
        self._begin(f"write of {len(view)} bytes", offset, len(view))
        self._submit_zeroes()
        while view:
            if self._open is None or offset != self._open_at + self._open_length:
                self._submit_open()
                self._open = await self._slot()
                self._open_at, self._open_length = offset, 0
            stop = round_down(self._open_at, SLOT) + SLOT
            count = min(len(view), stop - offset)
            at = self._open_length
            self._open[at : at + count] = view[:count]
            self._open_length += count
            self.written += count
            offset += count
            view = view[count:]
            if offset == stop:
                self._submit_open()
        self._go_on()

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes.

        Raises: as :meth:`write`.
        """
        self._begin(f"zeroing {length} bytes", offset, length)
        self._submit_open()
        if length:
            self._zeroes.append((offset, offset + length))
            self.zeroed += length
        if len(self._zeroes) >= MAX_ZEROES:
            while len(self._jobs) >= MAX_JOBS:
                await self._progress()
            self._submit_zeroes()
        self._go_on()

    async def finish(self) -> None:
        """Wait for every write, mark what a replay has made, and make a checkpoint.

        Something may be owed afterwards: what other jobs' images hold.

        Raises: as :meth:`write`; and again if called again after a failure.
        """
        self._raise_error()
        self._submit_open()
        self._submit_zeroes()
        await self._drain()
        if not self._final:
            self._submit(self._landing.settle, 0, self._landing.size)
            await self._drain()
        self._begin_checkpoint()
        await self._drain()
        self._finished = True

    # -- inside -----------------------------------------------------------------

    def _begin(self, what: str, offset: int, length: int) -> None:
        self._raise_error()
        self._finished = False
        size = self._landing.size
        if length < 0 or offset < 0 or offset + length > size:
            raise LocalProtocolError(f"{what} at {offset} is outside of {size} bytes")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _progress(self) -> None:
        """Wait until something under way has ended."""
        self._wake.clear()
        await self._wake.wait()
        self._raise_error()

    async def _drain(self) -> None:
        while self._jobs or self._checkpoint is not None:
            await self._progress()
        self._raise_error()

    async def _end(self) -> None:
        """Let the threads end what they do; drop what they haven't begun."""
        self._finished = self._finished and not self._jobs
        self._closing = True
        self._open = None
        self._zeroes.clear()
        try:
            await to_the_end(asyncio.to_thread(self._shut))
        finally:
            if self._feeding:
                self._feeding = False
                self._landing.end_feeding()

    def _shut(self) -> None:
        for threads in (self._writer, self._syncer):
            threads.shutdown(cancel_futures=True)

    async def _slot(self) -> bytearray:
        while not self._free and self._slots >= self._max_slots:
            await self._progress()
        return self._new_slot()

    def _new_slot(self) -> bytearray:
        if self._free:
            return self._free.pop()
        self._slots += 1
        return bytearray(SLOT)

    def _go_on(self) -> None:
        """Hand over whole clusters if the thread has nothing to do."""
        if self._jobs or self._error is not None or self._closing:
            return
        if self._zeroes:
            self._submit_zeroes()
            return
        slot, start = self._open, self._open_at
        end = start + self._open_length
        unit = 1 << self._landing.cluster_bits
        # The disk's end ends its last cluster.
        cut = end if end == self._landing.size else round_down(end, unit)
        if slot is None or cut <= start:
            return
        if cut == end:
            self._submit_open()
            return
        if not self._free and self._slots >= self._max_slots:
            return
        # The rest is less than a cluster; it begins the next slot.
        rest = self._new_slot()
        rest[: end - cut] = memoryview(slot)[cut - start : end - start]
        self._open_length = cut - start
        self._submit_open()
        self._open, self._open_at, self._open_length = rest, cut, end - cut

    def _submit_open(self) -> None:
        slot, self._open = self._open, None
        if slot is None:
            return
        if not self._open_length:
            self._free.append(slot)
            return
        view = memoryview(slot)[: self._open_length]
        job = self._submit(self._write, self._open_at, view)
        job.add_done_callback(lambda _: self._free.append(slot))

    def _submit_zeroes(self) -> None:
        zeroes, self._zeroes = self._zeroes, []
        if zeroes:
            self._submit(self._zero, zeroes)

    def _submit(self, work: Callable[..., int], *args: Any) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._writer, partial(work, *args))
        self._jobs.add(job)
        job.add_done_callback(self._worked)
        return job

    def _worked(self, job: asyncio.Future[int]) -> None:
        self._jobs.discard(job)
        self._wake.set()
        if job.cancelled():
            return
        if (error := job.exception()) is not None:
            self._error = self._error or error
            return
        self.landed += job.result()
        self._unchecked += job.result()
        self._go_on()
        since = self._clock() - self._checked
        if since >= self._checkpoint_s or self._unchecked >= self._checkpoint_bytes:
            self._begin_checkpoint()

    def _begin_checkpoint(self) -> None:
        if self._checkpoint is not None or self._error is not None or self._closing:
            return
        self._checked = self._clock()
        self._unchecked = 0
        loop = asyncio.get_running_loop()
        self._checkpoint = loop.run_in_executor(self._syncer, self._landing.checkpoint)
        self._checkpoint.add_done_callback(self._checkpointed)

    def _checkpointed(self, job: asyncio.Future[bool]) -> None:
        self._checkpoint = None
        self._wake.set()
        if not job.cancelled() and (error := job.exception()) is not None:
            self._error = self._error or error

    # -- in the writing thread ----------------------------------------------------

    def _write(self, offset: int, view: memoryview) -> int:
        if not self._final:
            self._landing.put(offset, view)
            return 0
        landed, end = 0, offset + len(view)
        for low, high, whole in self._cut(offset, end):
            part = view[low - offset : high - offset]
            if whole:
                landed += self._landing.write(low, part)
                self._forget(low, high)
            else:
                landed += self._piece(low, high, part)
        return landed

    def _zero(self, ranges: list[tuple[int, int]]) -> int:
        landed = 0
        whole: list[tuple[int, int]] = []
        for start, end in ranges:
            if not self._final:
                self._landing.put_zeroes(start, end - start)
                continue
            for low, high, all_of_it in self._cut(start, end):
                if all_of_it:
                    whole.append((low, high - low))
                    self._forget(low, high)
                else:
                    landed += self._piece(low, high, None)
        return landed + (self._landing.zero_all(whole) if whole else 0)

    def _cut(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Cut a range into (start, end, is it whole clusters)."""
        unit, size = 1 << self._landing.cluster_bits, self._landing.size
        low = -(-start // unit) * unit
        high = end if end == size else round_down(end, unit)
        if low > high or low == high == size:  # inside of one cluster
            return [(start, end, False)]
        parts = [(start, low, False), (low, high, True), (high, end, False)]
        return [part for part in parts if part[0] < part[1]]

    def _forget(self, start: int, end: int) -> None:
        bits = self._landing.cluster_bits
        if self._pieces:
            for cluster in [c for c in self._pieces if start <= c << bits < end]:
                del self._pieces[cluster]

    def _piece(self, start: int, end: int, view: memoryview | None) -> int:
        """Write a part of one cluster; mark the cluster if it was the last."""
        landing, bits = self._landing, self._landing.cluster_bits
        cluster = start >> bits
        low = cluster << bits
        size = min(1 << bits, landing.size - low)
        if next(landing.kinds(low, size))[2] is not Mark.OWED:
            self._pieces.pop(cluster, None)
            return 0
        if view is None:
            landing.put_zeroes(start, end - start)
        else:
            landing.put(start, view)
        runs = self._pieces.setdefault(cluster, [])
        if len(self._pieces) > MAX_PIECES:
            text = f"parts of more than {MAX_PIECES} clusters, and none is whole"
            raise LocalProtocolError(text)
        _add(runs, start - low, end - low)
        if runs != [(0, size)]:
            return 0
        del self._pieces[cluster]
        return landing.adopt(low, size)


def _add(runs: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a range to sorted ranges that neither touch nor overlap."""
    bisect.insort(runs, (start, end))
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    runs[:] = joined
