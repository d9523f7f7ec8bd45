# SPDX-License-Identifier: Apache-2.0
"""A file, or a block device, as something the NBD server can serve.

What is in the page cache is answered at once, what isn't is read by a thread, so that
a slow disk holds up only who asked for it (:mod:`pveplug.nbd.file_pages`). Holes are
found by ``SEEK_HOLE`` and aren't read.

The file must not change while it is served: the last run that was looked up is kept.
Should it shrink, reads behind its end fail with EIO.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from pveplug.nbd.file_pages import FilePages
from pveplug.proto.nbd_server import Data, Hole
from pveplug.proto.nbd_wire import DEFAULT_MAXIMUM_BLOCK, STATE_HOLE, STATE_ZERO
from pveplug.units import KiB

THREADS: Final = 4
MAX_RUNS: Final = 512
"""In one BLOCK_STATUS: two system calls each, so it holds nobody up for long."""


class FileDevice:
    """Serves the file at ``path`` as it is; a context manager that closes it."""

    minimum_block: Final = 1
    preferred_block: Final = 64 * KiB
    maximum_block: Final = DEFAULT_MAXIMUM_BLOCK

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size: Final = os.lseek(self._fd, 0, os.SEEK_END)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nbd-file")
        self._run = (0, 0, False)  # start, end, is it a hole
        self._pages = FilePages(self._fd, self.size)

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
        """Wait for reads under way, then close the file."""
        self._threads.shutdown(cancel_futures=True)
        self._pages.close()
        os.close(self._fd)

    def ready(self, offset: int, length: int) -> Awaitable[None] | None:
        return None

    def read(self, offset: int, length: int) -> Data | Awaitable[Data]:
        data = self._warm(offset, length)
        if data is not None:
            return data
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, self._cold, offset, length)

    def block_status(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        runs = itertools.islice(self._runs(offset, offset + length), MAX_RUNS)
        for start, end, hole in runs:
            yield end - start, STATE_HOLE | STATE_ZERO if hole else 0

    # -- inside ---------------------------------------------------------------

    def _warm(self, offset: int, length: int) -> Data | None:
        """Read without waiting for the disk; None: it isn't all in memory."""
        start, end, hole = self._run
        if not start <= offset < end:
            start, end, hole = self._run = self._look(offset)
        if offset + length <= end:
            return [Hole(length)] if hole else self._pages.now(offset, length)
        pieces: list[Hole | memoryview] = []
        for low, high, hole in self._runs(offset, offset + length):
            data = Hole(high - low) if hole else self._pages.now(low, high - low)
            if data is None:
                return None
            pieces.append(data)
        return pieces

    def _cold(self, offset: int, length: int) -> Data:
        pieces: list[Hole | memoryview] = []
        for low, high, hole in self._runs(offset, offset + length):
            size = high - low
            pieces.append(Hole(size) if hole else self._pages.wait(low, size))
        return pieces

    def _look(self, offset: int) -> tuple[int, int, bool]:
        """Return the run at ``offset``: (start, end, is it a hole)."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if os.lseek(self._fd, 0, os.SEEK_END) <= offset:
                raise OSError(errno.EIO, "the file has become shorter") from None
            return offset, self.size, True
        if data > offset:
            return offset, min(data, self.size), True
        return offset, min(os.lseek(self._fd, offset, os.SEEK_HOLE), self.size), False

    def _runs(self, offset: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Cut ``[offset, stop)`` into its runs."""
        while offset < stop:
            _, end, hole = self._look(offset)
            end = min(end, stop)
            yield offset, end, hole
            offset = end
