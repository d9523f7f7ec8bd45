# SPDX-License-Identifier: Apache-2.0
"""A doorbell between processes: who writes a landing rings, who serves it looks.

A FIFO. Ringing never waits and needs nobody to listen. It is lossless in effect: a
ring that doesn't fit finds the FIFO full of rings nobody has answered, and whoever
answers empties it first and looks at the marks afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from pveplug.errors import IntegrityError


def make_bell(path: Path) -> None:
    """Make the FIFO unless it is there.

    Raises:
        IntegrityError: something else has its name.
    """
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        raise IntegrityError(f"{path} is not a FIFO. Remedy: remove it")


class Ringer:
    """Rings; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def ring(self) -> bool:
        """Wake whoever listens; False: nobody does."""
        for _ in range(2):  # a listener that died leaves us a FIFO without a reader
            if self._fd < 0:
                try:
                    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                    self._fd = os.open(self._path, flags)
                except OSError as error:
                    if error.errno in (errno.ENXIO, errno.ENOENT):
                        return False
                    raise
            try:
                os.write(self._fd, b"!")
            except BlockingIOError:
                return True  # full of rings
            except BrokenPipeError:
                self.close()
            else:
                return True
        return False

    def heard(self) -> bool:
        """Whether anybody listens."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise
        os.close(fd)
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Listener:
    """The other end; ``fd`` is readable when somebody has rung."""

    def __init__(self, path: Path) -> None:
        # For reading and writing: it doesn't end when the last ringer goes.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def answer(self) -> None:
        """Take all rings; look at the marks after that."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 65536)) == 65536:
                pass

    def close(self) -> None:
        os.close(self.fd)
