# SPDX-License-Identifier: Apache-2.0
"""Locks between processes: bytes of one file, let go by the kernel when a holder dies.

They belong to the open file (F_OFD_SETLK), not to the process: two objects in one
process exclude each other like two processes, and closing one frees nothing of the
other. Threads that share an object need a lock of their own besides.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_FLOCK: Final = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux


class Place(enum.IntEnum):
    """What may be held; each is a byte of the file."""

    OPEN = 0  # files are made, replaced or removed
    MARKS = 1  # clusters are looked at, written and marked
    DURABLE = 2  # a checkpoint is made
    FEEDER = 3  # somebody writes: shared, or alone


class Locks:
    """The places of one lock file, as one holder sees them."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def close(self) -> None:
        """Let go of everything."""
        os.close(self._fd)

    @contextlib.contextmanager
    def held(self, place: Place) -> Iterator[None]:
        """Hold a place alone in a block, waiting for whoever has it."""
        self._set(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, place)
        try:
            yield
        finally:
            self.release(place)

    def take(self, place: Place, *, alone: bool) -> bool:
        """Hold a place until it is released; False: somebody else has it."""
        kind = fcntl.F_WRLCK if alone else fcntl.F_RDLCK
        try:
            self._set(fcntl.F_OFD_SETLK, kind, place)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, place: Place) -> None:
        self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, place)

    def _set(self, command: int, kind: int, place: Place) -> None:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
        fcntl.fcntl(self._fd, command, wanted)
