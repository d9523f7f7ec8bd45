# SPDX-License-Identifier: Apache-2.0
"""A file, or a block device, as something the NBD server can serve.

What is in the page cache is answered at once, what isn't is read by a thread, so that
a slow disk holds up only who asked for it. Short reads ask the kernel for bytes it has
(``preadv2`` with ``RWF_NOWAIT``). Long ones hand out a view of the mapped file, which
the kernel copies once, from page to socket, after ``mincore`` has said that the pages
are there. Holes are found by ``SEEK_HOLE`` and aren't read.

The file must not change while it is served: the last run that was looked up is kept.
Should it shrink, reads behind its end fail with EIO.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from pveplug.proto.nbd_server import Data, Hole
from pveplug.proto.nbd_wire import DEFAULT_MAXIMUM_BLOCK, STATE_HOLE, STATE_ZERO
from pveplug.units import KiB, MiB, round_down

THREADS: Final = 4
MAX_RUNS: Final = 512
"""In one BLOCK_STATUS: two system calls each, so it holds nobody up for long."""
COPIED: Final = 32 * KiB
"""Up to here a copy costs less than two calls and a page fault."""
UNMAP_AFTER: Final = 16 * MiB
"""Mapped pages count as ours though they are the page cache's; so often they go."""
MAP_NORESERVE: Final = 0x4000
"""Python 3.11 doesn't name it. Without it a private mapping counts as memory."""


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
        self._nowait = True
        known = bool(self.size) and _owned(self._fd)
        self._mapped = _Mapped(self._fd, self.size) if known else None

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
        self._mapped = None  # unmapped once nobody has a view of it
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
            return [Hole(length)] if hole else self._now(offset, length)
        pieces: list[Hole | memoryview] = []
        for low, high, hole in self._runs(offset, offset + length):
            data = Hole(high - low) if hole else self._now(low, high - low)
            if data is None:
                return None
            pieces.append(data)
        return pieces

    def _now(self, offset: int, length: int) -> memoryview | None:
        mapped = self._mapped
        if mapped is not None and (length > COPIED or not self._nowait):
            return mapped.view(offset, length)
        if not self._nowait:
            return None
        view = memoryview(bytearray(length))
        try:
            count = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = False  # tmpfs, NFS
            return self._now(offset, length)
        return view if count == length else None

    def _cold(self, offset: int, length: int) -> Data:
        pieces: list[Hole | memoryview] = []
        for low, high, hole in self._runs(offset, offset + length):
            if hole:
                pieces.append(Hole(high - low))
                continue
            view = memoryview(bytearray(high - low))
            at = 0
            while at < len(view):
                count = os.preadv(self._fd, [view[at:]], low + at)
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter")
                at += count
            pieces.append(view)
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


class _Mapped:
    """A file's pages, as far as they are in the page cache."""

    def __init__(self, fd: int, size: int) -> None:
        # Private and writable only in name: ctypes finds the address of no other.
        self._map = mmap.mmap(
            *(fd, size, mmap.MAP_PRIVATE | MAP_NORESERVE),
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        self._view = memoryview(self._map).toreadonly()
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._resident = bytearray(DEFAULT_MAXIMUM_BLOCK // mmap.PAGESIZE + 1)
        self._vector = (ctypes.c_char * len(self._resident)).from_buffer(self._resident)
        self._served = 0

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return these bytes without a copy; None: a page isn't in memory."""
        low = round_down(offset, mmap.PAGESIZE)
        wanted = offset + length - low
        if _mincore(self._start + low, wanted, self._vector):
            return None
        pages = -(-wanted // mmap.PAGESIZE)
        if self._resident.find(0, 0, pages) >= 0:
            return None
        self._served += length
        if self._served > UNMAP_AFTER:
            self._served = 0
            self._map.madvise(mmap.MADV_DONTNEED)
        return self._view[offset : offset + length]


_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def _owned(fd: int) -> bool:
    """Whether the kernel tells us which pages are there: for our own files only."""
    return os.geteuid() in (0, os.stat(fd).st_uid)
