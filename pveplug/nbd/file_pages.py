# SPDX-License-Identifier: Apache-2.0
"""A file's bytes for the NBD server: those in memory at once, the others by a thread.

Short reads ask the kernel for bytes it has (``preadv2`` with ``RWF_NOWAIT``). Long ones
hand out a view of the mapped file, which the kernel copies once, from page to socket,
after ``mincore`` has said that the pages are there.

Nothing is remembered of what the file holds, so it may be written to meanwhile, as long
as nobody writes where a read is under way. It must not become shorter.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

from pveplug.proto.nbd_wire import DEFAULT_MAXIMUM_BLOCK
from pveplug.units import KiB, MiB, round_down

COPIED: Final = 32 * KiB
"""Up to here a copy costs less than two calls and a page fault."""
UNMAP_AFTER: Final = 16 * MiB
"""Mapped pages count as ours though they are the page cache's; so often they go."""
MAP_NORESERVE: Final = 0x4000
"""Python 3.11 doesn't name it. Without it a private mapping counts as memory."""


class FilePages:
    """Reads from an open file of ``size`` bytes, which stays the caller's."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._nowait = True
        known = bool(size) and _owned(fd)
        self._mapped = _Mapped(fd, size) if known else None

    def close(self) -> None:
        """Unmap the file once nobody has a view of it."""
        self._mapped = None

    def now(self, offset: int, length: int) -> memoryview | None:
        """Read without waiting for the disk; None: it isn't all in memory."""
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
            return self.now(offset, length)
        return view if count == length else None

    def wait(self, offset: int, length: int) -> memoryview:
        """Read from the disk, in a thread.

        Raises:
            OSError: EIO where the file has become shorter, and what the disk says.
        """
        view = memoryview(bytearray(length))
        at = 0
        while at < length:
            count = os.preadv(self._fd, [view[at:]], offset + at)
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            at += count
        return view


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
