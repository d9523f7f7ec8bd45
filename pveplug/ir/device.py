# SPDX-License-Identifier: Apache-2.0
"""A landing as something the NBD server can serve: what is owed is waited for.

A read that waits is filed under the first owed cluster of its range, and looked at
again only when that one has come. While any read waits the doorbell is listened to;
once a second the marks are looked at besides, for a feeder that was killed between
marking and ringing. Nothing runs while nobody waits.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from pveplug.ir.bell import Listener
from pveplug.ir.landing import Landing
from pveplug.ir.presence import HEAD, WINDOW, Mark
from pveplug.nbd.file_pages import FilePages
from pveplug.proto.nbd_server import Data, Hole
from pveplug.proto.nbd_wire import DEFAULT_MAXIMUM_BLOCK, STATE_HOLE, STATE_ZERO
from pveplug.units import KiB

THREADS: Final = 4
LOOK_S: Final = 1.0
MAX_RUNS: Final = 512
"""In one BLOCK_STATUS."""
_STATUS: Final = re.compile(rb"\x02+|[\x00\x01]+")

_DATA: Final = int(Mark.DATA)
_ZERO: Final = int(Mark.ZERO)

log = logging.getLogger(__name__)


class _Waiter:
    """A read that waits for the cluster ``at``, the first owed one before ``stop``."""

    __slots__ = ("at", "future", "stop")

    def __init__(self, at: int, stop: int, future: asyncio.Future[None]) -> None:
        self.at = at
        self.stop = stop
        self.future = future


class LandingDevice:
    """Serves a landing; a context manager that leaves the landing open.

    For one event loop. What is owed counts as data in BLOCK_STATUS: nobody may take it
    for zeroes.
    """

    minimum_block: Final = 1
    preferred_block: Final = 64 * KiB
    maximum_block: Final = DEFAULT_MAXIMUM_BLOCK

    def __init__(self, landing: Landing) -> None:
        self.size: Final = landing.size
        self._landing = landing
        self._bits = landing.cluster_bits
        self._marks = landing.marks
        self._pages = FilePages(landing.fd, landing.size)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nbd-landing")
        self._listener = Listener(landing.files.bell)
        self._waiters: dict[int, set[_Waiter]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # while somebody waits
        self._timer: asyncio.TimerHandle | None = None
        self._orphaned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the reads that wait, and wait for those under way."""
        for waiter in [w for waiters in self._waiters.values() for w in waiters]:
            waiter.future.cancel()
        self._waiters.clear()
        self._rest()
        self._threads.shutdown(cancel_futures=True)
        self._pages.close()
        self._listener.close()

    @property
    def waiting(self) -> int:
        """How many reads wait for what is owed."""
        return sum(len(waiters) for waiters in self._waiters.values())

    def ready(self, offset: int, length: int) -> asyncio.Future[None] | None:
        bits = self._bits
        stop = HEAD + ((offset + length - 1) >> bits) + 1
        at = self._marks.find(b"\0", HEAD + (offset >> bits), stop)
        if at < 0:
            return None
        return self._wait(at, stop)

    def read(self, offset: int, length: int) -> Data | Awaitable[Data]:
        bits, marks = self._bits, self._marks
        first, last = offset >> bits, (offset + length - 1) >> bits
        if first != last or marks[HEAD + first] != _DATA:
            return self._read(offset, length)
        data = self._pages.now(offset, length)
        if data is not None:
            return data
        return self._cold([(offset, length, Mark.DATA)])

    def block_status(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        bits, end = self._bits, offset + length
        for _ in range(MAX_RUNS):
            first = HEAD + (offset >> bits)
            last = min(HEAD + ((end - 1) >> bits) + 1, first + WINDOW)
            found = _STATUS.match(self._marks, first, last)
            if found is None:  # not a mark: reading will tell
                yield end - offset, 0
                return
            stop = min((found.end() - HEAD) << bits, end)
            zero = self._marks[first] == _ZERO
            yield stop - offset, STATE_HOLE | STATE_ZERO if zero else 0
            offset = stop
            if offset >= end:
                return

    # -- inside: reading ----------------------------------------------------------

    def _read(self, offset: int, length: int) -> Data | Awaitable[Data]:
        """Read what isn't the data of one cluster."""
        runs = list(self._landing.kinds(offset, length))
        if any(mark is Mark.OWED for _, _, mark in runs):
            # It was there, and was taken back: see Landing.checkpoint().
            return self._read_later(offset, length)
        pieces: list[Hole | memoryview] = []
        for at, size, mark in runs:
            data = Hole(size) if mark is Mark.ZERO else self._pages.now(at, size)
            if data is None:
                return self._cold(runs)
            pieces.append(data)
        return pieces

    async def _read_later(self, offset: int, length: int) -> Data:
        while (waiting := self.ready(offset, length)) is not None:
            await waiting
        data = self._read(offset, length)
        return await data if isinstance(data, Awaitable) else data

    def _cold(self, runs: list[tuple[int, int, Mark]]) -> Awaitable[Data]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, self._pieces, runs)

    def _pieces(self, runs: list[tuple[int, int, Mark]]) -> Data:
        return [
            Hole(size) if mark is Mark.ZERO else self._pages.wait(at, size)
            for at, size, mark in runs
        ]

    # -- inside: waiting ----------------------------------------------------------

    def _wait(self, at: int, stop: int) -> asyncio.Future[None] | None:
        if self._loop is None:
            self._listen()
            # A mark made before we listened was perhaps not rung for.
            at = self._marks.find(b"\0", at, stop)
            if at < 0:
                self._rest()
                return None
        assert self._loop is not None  # noqa: S101
        waiter = _Waiter(at, stop, self._loop.create_future())
        waiter.future.add_done_callback(lambda _: self._forget(waiter))
        self._waiters.setdefault(at, set()).add(waiter)
        return waiter.future

    def _listen(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.fd, self._rung)
        self._timer = self._loop.call_later(LOOK_S, self._look_again)

    def _rest(self) -> None:
        """Nobody waits."""
        if self._loop is not None:
            self._loop.remove_reader(self._listener.fd)
            self._loop = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rung(self) -> None:
        self._listener.answer()
        self._look()

    def _look_again(self) -> None:
        assert self._loop is not None  # noqa: S101
        self._timer = self._loop.call_later(LOOK_S, self._look_again)
        if not self._orphaned and not self._landing.is_live():
            self._orphaned = True
            log.error(
                "landing-removed live=%s remedy=start what serves it anew, it goes on",
                self._landing.files.live,
            )
        self._look()

    def _look(self) -> None:
        """Wake the reads whose last cluster has come."""
        marks = self._marks
        for at in [at for at in self._waiters if marks[at]]:
            for waiter in self._waiters.pop(at):
                owed = marks.find(b"\0", at, waiter.stop)
                if owed < 0:
                    if not waiter.future.done():
                        waiter.future.set_result(None)
                else:
                    waiter.at = owed
                    self._waiters.setdefault(owed, set()).add(waiter)
        if not self._waiters:
            self._rest()

    def _forget(self, waiter: _Waiter) -> None:
        waiters = self._waiters.get(waiter.at)
        if waiters is None:
            return
        waiters.discard(waiter)
        if not waiters:
            del self._waiters[waiter.at]
            if not self._waiters:
                self._rest()
