# SPDX-License-Identifier: Apache-2.0
"""The two pipes to bacula-fd: packets in by the event loop, bytes out by one thread.

Reading is done in the loop, by ``readv`` straight into the connection's one buffer, and
goes on while we are busy elsewhere: that is how a vanished bacula-fd is noticed in the
middle of a read from a disk. Writing is done by one thread, because a pipe that is full
would block the loop; what waits for it is bounded in bytes. What is short is written
at once where nothing waits, as far as the pipe has room: to wake a thread for it takes
longer. Nobody else reads or writes these file descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from pveplug.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto.ptcomm import Buffer, Packet, PtcommConnection
from pveplug.units import KiB, MiB

log = logging.getLogger(__name__)

PIPE_BYTES: Final = MiB
"""Default of /proc/sys/fs/pipe-max-size: what an unprivileged process may have."""
QUEUE_BYTES: Final = 2 * MiB
"""Copied bytes that may wait for the writer thread."""
AT_ONCE: Final = 384 * KiB
"""Up to so much isn't worth the thread, which has to get Python's lock twice for it."""
GATHER_BYTES: Final = 260 * KiB
"""So much of what was copied goes out at a time: four clusters and their packets."""
_MERGED: Final = 256 * KiB
_IOV: Final = 512  # half of Linux' IOV_MAX

CLOSED: Final = "bacula-fd closed the pipe"


class PipeWriter:
    """A thread that writes what it is given, in order, to a file descriptor.

    Only the event loop's thread calls its methods.
    """

    def __init__(self, fd: int, broken: Callable[[str], None]) -> None:
        """Start the thread; ``broken`` is called in the loop when writing fails."""
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._on_broken = broken
        self._queue: queue.SimpleQueue[tuple[Sequence[Buffer], int] | None] = (
            queue.SimpleQueue()
        )
        self._queued = 0
        self._written = 0  # while something is queued only the thread changes it
        self._lowest: float = float("inf")  # wake the loop when this much is written
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._failure: str | None = None
        self._broken: OSError | None = None
        self._stop = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(fd, False)
        self._thread = threading.Thread(
            target=self._run, name="ptcomm-writer", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> int:
        """The highest mark that is written."""
        return self._written

    @property
    def queued(self) -> int:
        """The highest mark there is."""
        return self._queued

    def put(self, buffers: Sequence[Buffer], size: int) -> int:
        """Queue ``size`` bytes; return the mark to give to :meth:`written`.

        The buffers belong to the writer until then.

        Raises:
            TransportError: writing has failed before.
        """
        if self._failure is not None:
            raise TransportError(self._failure)
        if not size:
            return self._queued
        self._queued += size
        if size <= AT_ONCE and self._written == self._queued - size:
            buffers, left = self._at_once(buffers, size)
            self._written += size - left
            if not left:
                return self._queued
            size = left
        self._queue.put((buffers, size))
        return self._queued

    def _at_once(
        self, buffers: Sequence[Buffer], left: int
    ) -> tuple[Sequence[Buffer], int]:
        """Write what there is room for; return what is left, and its size."""
        if len(buffers) > _IOV:
            return buffers, left
        try:
            count = os.writev(self._fd, buffers)
        except OSError:
            return buffers, left  # no room, or broken, which the thread will tell
        if count == left:
            return (), 0
        rest = list(buffers)
        left -= count
        while count >= len(rest[0]):
            count -= len(rest.pop(0))
        rest[0] = memoryview(rest[0])[count:]
        return rest, left

    async def written(self, mark: int) -> None:
        """Wait until everything up to ``mark`` is in the pipe.

        There is no time limit: Bacula may wait hours for a volume. What ends the wait
        is the peer's end of the pipe. When cancelled, the bytes are written later.

        Raises:
            TransportError: the pipe broke.
        """
        while self._written < mark:
            if self._failure is not None:
                raise TransportError(self._failure)
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append((mark, waiter))
            self._lowest = min(self._lowest, mark)
            # The thread reads _lowest after it changed _written, we the other way
            # round: one of us sees the other.
            if self._written >= mark:
                self._progress()
            await waiter

    def fail(self, reason: str) -> None:
        """Write nothing more; every waiter and every later call gets ``reason``."""
        if self._failure is None:
            self._failure = reason
        if not self._stop:
            self._stop = True
            self._queue.put(None)
            os.write(self._wake_write, b"x")
        # The thread never blocks, so this is short. Without it bytes that the peer
        # has answered already might not be counted as written yet.
        self._thread.join()
        self._progress()

    def close(self) -> None:
        """End the thread; what isn't written is dropped."""
        self.fail("the session is closed")
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _progress(self) -> None:
        """In the loop: wake whoever has what it waits for."""
        if self._broken is not None and self._failure is None:
            gone = self._broken.errno in (errno.EPIPE, errno.ECONNRESET)
            self._failure = (
                CLOSED if gone else f"cannot write to bacula-fd: {self._broken}"
            )
            self._on_broken(self._failure)
        still = []
        for mark, waiter in self._waiters:
            if waiter.done():
                continue
            if self._written >= mark or self._failure is not None:
                waiter.set_result(None)
            else:
                still.append((mark, waiter))
        self._waiters = still
        self._lowest = min((mark for mark, _ in still), default=float("inf"))
        if self._written >= self._lowest:  # written between the two lines above
            self._loop.call_soon(self._progress)

    def _notify(self) -> None:
        # The loop is closed when a job is over that nobody waited for.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._progress)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._wake_read, select.POLLIN)
        try:
            while (size := self._write_next(poller)) is not None:
                self._written += size
                if self._written >= self._lowest:
                    self._notify()
        except OSError as error:
            self._broken = error
            self._notify()

    def _write_next(self, poller: select.poll) -> int | None:
        """Write what is queued next; how much it was, None at the end.

        No reference to a buffer is left when this returns.
        """
        if (item := self._queue.get()) is None:
            return None
        buffers, size = list(item[0]), item[1]
        # Small things go out together: one system call instead of ten.
        while size < _MERGED and len(buffers) < _IOV:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                return None
            buffers += item[0]
            size += item[1]
        return size if self._write(buffers, poller) else None

    def _write(self, buffers: Sequence[Buffer], poller: select.poll) -> bool:
        """Write everything; False when interrupted."""
        rest: list[Buffer] = list(buffers)
        at = 0
        while at < len(rest) and not self._stop:
            try:
                count = os.writev(self._fd, rest[at : at + _IOV])
            except BlockingIOError:
                poller.poll()
                continue
            while at < len(rest) and count >= len(rest[at]):
                count -= len(rest[at])
                at += 1
            if count:
                rest[at] = memoryview(rest[at])[count:]
        return at == len(rest)


class _Copies:
    """Small things in a row, copied into one buffer."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(GATHER_BYTES))
        self.used = 0
        self.mark = 0
        """The writer's, when it was last sent."""

    def fits(self, size: int) -> bool:
        return self.used + size <= GATHER_BYTES

    def add(self, buffers: Sequence[Buffer]) -> None:
        """Copy these to the end."""
        at = self.used
        for buffer in buffers:
            end = at + len(buffer)
            self._view[at:end] = buffer
            at = end
        self.used = at

    def take(self) -> memoryview:
        """Return what was copied; it stays until something is added."""
        view = self._view[: self.used]
        self.used = 0
        return view


class PtcommPipe:
    """Packets from one file descriptor, bytes to another; owns and closes both.

    Attributes:
        closed: set when the peer is gone, or broke the protocol: nothing more will
            come, nothing more can be sent. What already came can still be received.
    """

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = PtcommConnection()
        self._in = fd_in
        self._out = fd_out
        self._reading = False
        self._arrived: asyncio.Future[None] | None = None
        self._lost: str | None = None
        self._refused: str | None = None
        self._copies = _Copies()
        self._sent: deque[_Copies] = deque()
        self._flush_due = False
        self.closed = asyncio.Event()
        for fd in (fd_in, fd_out):
            # Refused for sockets and by low limits; then it is only slower.
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(fd_in, False)
        self.writer = PipeWriter(fd_out, self._lose)
        try:
            self._resume()
        except OSError as error:
            self.writer.close()
            raise TransportError(
                f"standard input is not a pipe ({error}). "
                "This program is started by bacula-fd's plugin, not by hand."
            ) from error

    async def receive(self) -> Packet:
        """The next packet; the data of the one before becomes invalid.

        There is no time limit, see :meth:`PipeWriter.written`.

        Raises:
            RemoteProtocolError: this isn't PTCOMM.
            TransportError: the pipe is closed.
        """
        while True:
            try:
                packet = self._connection.next_packet()
            except RemoteProtocolError as error:
                self._lose(str(error))
                raise
            if packet is not None:
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("ptcomm received %s", packet)
                return packet
            if self._lost is not None:
                raise TransportError(self._lost)
            self._resume()
            self._arrived = self._loop.create_future()
            try:
                await self._arrived
            finally:
                self._arrived = None

    def send(self, buffers: Sequence[Buffer]) -> int:
        """Queue buffers; they are the writer's until the returned mark is written.

        Raises:
            LocalProtocolError: after :meth:`refuse`.
            TransportError: the pipe is closed.
        """
        self._must_be_open()
        if self._copies.used:
            self._send_copies()
        return self.writer.put(buffers, sum(len(buffer) for buffer in buffers))

    def gather(self, buffers: Sequence[Buffer]) -> int:
        """Copy at most ``GATHER_BYTES``, to go out before whatever is sent next.

        That is at the latest when the event loop turns, so nothing waits while we do.

        Returns: the mark that must be written before more is gathered, which keeps
        what waits to ``QUEUE_BYTES``.

        Raises: as :meth:`send`.
        """
        self._must_be_open()
        if not self._copies.fits(sum(len(buffer) for buffer in buffers)):
            self._send_copies()
        self._copies.add(buffers)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)
        return self.writer.queued - QUEUE_BYTES

    def _flush(self) -> None:
        self._flush_due = False
        if self._copies.used:
            with contextlib.suppress(TransportError):  # told to whoever sends next
                self._send_copies()

    def _send_copies(self) -> None:
        copies, sent = self._copies, self._sent
        view = copies.take()
        if len(view) < GATHER_BYTES // 2:
            # A whole buffer for so little would be more memory than QUEUE_BYTES tell.
            self.writer.put([bytes(view)], len(view))
            return
        copies.mark = self.writer.put([view], len(view))
        sent.append(copies)
        free = sent[0].mark <= self.writer.done
        self._copies = sent.popleft() if free else _Copies()

    def _must_be_open(self) -> None:
        if self._refused is not None:
            raise LocalProtocolError(self._refused)
        if self._lost is not None:
            raise TransportError(self._lost)

    def refuse(self, reason: str) -> None:
        """Nothing else may be sent: :meth:`send` raises ``reason`` from now on."""
        self._flush()
        self._refused = reason

    async def written(self, mark: int | None = None) -> None:
        """Wait until what was sent, up to ``mark``, is in the pipe.

        Raises:
            TransportError: the pipe is closed.
        """
        if mark is None:
            if self._copies.used:
                self._send_copies()
            mark = self.writer.put((), 0)
        await self.writer.written(mark)

    def close(self) -> None:
        """Stop reading and writing, close both file descriptors; never blocks."""
        if self._in < 0:
            return
        self._lose("the session is closed")
        self.writer.close()
        for fd in {self._in, self._out}:
            os.close(fd)
        self._in = self._out = -1

    def _resume(self) -> None:
        if not self._reading and self._lost is None:
            self._loop.add_reader(self._in, self._readable)
            self._reading = True

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._in)
            self._reading = False

    def _readable(self) -> None:
        buffers = self._connection.get_buffers()
        if not buffers:
            self._pause()  # receive() resumes when it has used up what came
            return
        try:
            count = os.readv(self._in, buffers)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"cannot read from bacula-fd: {error}")
            return
        if count:
            self._connection.buffers_updated(count)
            self._wake()
        else:
            self._lose(CLOSED)

    def _lose(self, reason: str) -> None:
        self._pause()
        if self._lost is None:
            self._lost = reason
            self.writer.fail(reason)
            self.closed.set()
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
