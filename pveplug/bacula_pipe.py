# SPDX-License-Identifier: Apache-2.0
"""The two pipes to bacula-fd: packets in, bytes out, both by the event loop.

Reading is done by ``readv`` straight into the connection's one buffer, and goes on
while we are busy elsewhere: that is how a vanished bacula-fd is noticed in the middle
of a read from a disk. Writing is done at once as far as the pipe has room, the rest
when it has some again; what waits for that is bounded in bytes. What is long and may
change isn't copied into the pipe but lent to it, see :mod:`pveplug.splicing`::

    put()   |---- in the pipe, and read ----|-- in the pipe --|-- queued --|
                                            :                 :            :
                                          free             written       queued

A buffer may be used again below ``free``. Nobody else reads or writes these file
descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeGuard

from pveplug.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto.ptcomm import Buffer, Packet, PtcommConnection
from pveplug.splicing import REFUSED, lend, unread
from pveplug.units import KiB, MiB

log = logging.getLogger(__name__)

PIPE_BYTES: Final = MiB
"""Default of /proc/sys/fs/pipe-max-size: what an unprivileged process may have."""
QUEUE_BYTES: Final = 2 * MiB
"""Copied bytes that may wait for room in the pipe."""
GATHER_BYTES: Final = 260 * KiB
"""So much of what was copied goes out at a time: four clusters and their packets."""
_IOV: Final = 512  # half of Linux' IOV_MAX
_for_good: Final[list[Buffer]] = []
"""Lent and unread when a job was given up: what is in the pipe goes to a volume."""
_FIRST_LOOK_S: Final = 0.001
_LAST_LOOK_S: Final = 0.05

CLOSED: Final = "bacula-fd closed the pipe"


class PipeWriter:
    """Writes what it is given, in order, to a file descriptor; marks count bytes."""

    def __init__(self, fd: int, broken: Callable[[str], None]) -> None:
        """Begin; ``broken`` is called, from the loop, when writing fails."""
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._on_broken = broken
        self._queue: deque[Buffer] = deque()
        self._queued = self._pushed = 0
        self._written = self._consumed = 0
        self._lent: deque[tuple[int, Sequence[memoryview]]] = deque()
        """Up to which mark, in the pipe and unread. Never let go of before: whatever
        came to be in that memory would be read instead."""
        self._lending = True
        self._waiting_for_room = False
        self._waiters: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._look: asyncio.TimerHandle | None = None
        self._look_s = _FIRST_LOOK_S
        self._failure: str | None = None
        os.set_blocking(fd, False)

    @property
    def queued(self) -> int:
        """The highest mark there is."""
        return self._queued

    @property
    def done(self) -> int:
        """The highest mark that is written into the pipe."""
        return self._written

    @property
    def reusable(self) -> int:
        """The mark up to which buffers may be used again."""
        return self._consumed if self._lent else self._written

    def put(self, buffers: Sequence[Buffer], size: int, *, enough: int = 0) -> int:
        """Queue ``size`` bytes; return the mark to give to :meth:`free`.

        The buffers belong to the writer until then; what is a writable view is lent,
        the others are copied into the pipe. Until ``enough`` bytes wait for nothing but
        that, they are left to a later call, or :meth:`push`.

        Raises:
            TransportError: writing has failed before.
        """
        if self._failure is not None:
            raise TransportError(self._failure)
        self._queued += size
        self._queue.extend(buffers)
        if self._queued - self._pushed >= enough:
            self.push()
        return self._queued

    def push(self) -> None:
        """Begin to write everything that is queued."""
        if self._pushed < self._queued and self._failure is None:
            self._pushed = self._queued
            if not self._waiting_for_room:
                self._push()

    async def written(self, mark: int) -> None:
        """Wait until everything up to ``mark`` is in the pipe.

        There is no time limit: Bacula may wait hours for a volume. What ends the wait
        is the peer's end of the pipe. When cancelled, the bytes are written later.

        Raises:
            TransportError: the pipe broke.
        """
        await self._until(mark, read=False)

    async def free(self, mark: int) -> None:
        """Wait until the buffers up to ``mark`` may be used again.

        As :meth:`written`, but what was lent must have been read as well.
        """
        await self._until(mark, read=True)

    async def _until(self, mark: int, *, read: bool) -> None:
        if read and self.reusable < mark:
            self._take_back()
        if self._look is None:
            self._look_s = _FIRST_LOOK_S
        while (self.reusable if read else self._written) < mark:
            if self._failure is not None:
                raise TransportError(self._failure)
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append((read, mark, waiter))
            self._look_soon()
            await waiter

    def fail(self, reason: str) -> None:
        """Write nothing more; every waiter and every later call gets ``reason``."""
        if self._failure is None:
            self._failure = reason
        self._queue.clear()
        self._wait_for_room(False)
        self._wake()

    def close(self) -> None:
        """Fail, and let nothing else come to be where unread bytes are."""
        self.fail("the session is closed")
        for _, views in self._lent:
            _for_good.extend(views)
        self._fd = -1

    # -- inside -----------------------------------------------------------------------

    def _push(self) -> None:
        """Write as much as there is room for."""
        try:
            while self._queue:
                self._write_some()
        except BlockingIOError:
            self._wait_for_room(True)
        except OSError as error:
            gone = error.errno in (errno.EPIPE, errno.ECONNRESET)
            self._break(CLOSED if gone else f"cannot write to bacula-fd: {error}")
            return
        else:
            self._wait_for_room(False)
        self._wake()

    def _write_some(self) -> None:
        """Lend the next buffers, or copy them.

        Raises:
            BlockingIOError: no room now.
            OSError: the pipe broke.
        """
        queue = self._queue
        if views := self._to_lend():
            try:
                count = lend(self._fd, views)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                log.warning("copies what could be lent reason=%r", error.strerror)
                self._lending = False
                return
            self._lent.append((self._written + count, views))
        else:
            count = os.writev(self._fd, self._to_copy())
        self._written += count
        while queue and count >= len(queue[0]):
            count -= len(queue.popleft())
        if count:
            rest = memoryview(queue[0])
            # What was to be copied is, to its end.
            rest = rest if _lendable(queue[0]) else rest.toreadonly()
            queue[0] = rest[count:]

    def _to_lend(self) -> list[memoryview]:
        views = list[memoryview]()
        if self._lending:
            # A slow reader makes room bit by bit: not all is looked at each time.
            size, most = 0, GATHER_BYTES if self._waiting_for_room else PIPE_BYTES
            for buffer in self._queue:
                if not _lendable(buffer) or len(views) == _IOV or size >= most:
                    break
                views.append(buffer)
                size += len(buffer)
        return views

    def _to_copy(self) -> list[Buffer]:
        buffers = list[Buffer]()
        for buffer in self._queue:
            if (self._lending and _lendable(buffer)) or len(buffers) == _IOV:
                break
            buffers.append(buffer)
        return buffers

    def _wait_for_room(self, on: bool) -> None:
        if on is not self._waiting_for_room:
            self._waiting_for_room = on
            if on:
                self._loop.add_writer(self._fd, self._push)
            else:
                self._loop.remove_writer(self._fd)

    def _take_back(self) -> None:
        """See what has been read."""
        lent = self._lent
        if lent and self._fd >= 0:
            self._consumed = self._written - unread(self._fd)
            while lent and lent[0][0] <= self._consumed:
                lent.popleft()

    def _wake(self) -> None:
        """Wake whoever has what it waits for."""
        self._take_back()
        if not self._waiters:
            return
        failed, reusable = self._failure is not None, self.reusable
        still = []
        for entry in self._waiters:
            read, mark, waiter = entry
            if waiter.done():
                continue
            if failed or mark <= (reusable if read else self._written):
                waiter.set_result(None)
            else:
                still.append(entry)
        self._waiters = still
        if still:
            self._look_soon()

    def _peer_left(self) -> bool:
        """Whether nobody will read any more, which is told only to who writes."""
        poll = select.poll()
        poll.register(self._fd, 0)
        return bool(poll.poll(0))

    def _break(self, reason: str) -> None:
        self._failure = reason
        self._on_broken(reason)
        self.fail(reason)

    def _look_soon(self) -> None:
        """Nobody tells when the last of a pipe is read; while it is full, room does."""
        if self._look is None and not self._waiting_for_room and self._lent:
            self._look = self._loop.call_later(self._look_s, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        if self._failure is not None:
            return
        if self._peer_left():
            self._break(CLOSED)
            return
        before = self.reusable
        self._take_back()
        rests = self.reusable == before
        self._look_s = min(2 * self._look_s, _LAST_LOOK_S) if rests else _FIRST_LOOK_S
        self._wake()


def _lendable(buffer: Buffer) -> TypeGuard[memoryview]:
    return isinstance(buffer, memoryview) and not buffer.readonly


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
        """Queue buffers; they are the writer's until the returned mark is free.

        Raises:
            LocalProtocolError: after :meth:`refuse`.
            TransportError: the pipe is closed.
        """
        self._must_be_open()
        if self._copies.used:
            self._send_copies()
        return self.writer.put(buffers, sum(len(buffer) for buffer in buffers))

    def lend(self, buffers: Sequence[memoryview]) -> int:
        """As :meth:`send`, together with what follows, until the event loop turns.

        All are lent, however short: headers too, for all go in one system call.
        """
        self._must_be_open()
        if self._copies.used:
            self._send_copies()
        size = sum(len(buffer) for buffer in buffers)
        mark = self.writer.put(buffers, size, enough=GATHER_BYTES)
        self._flush_soon()
        return mark

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
        self._flush_soon()
        return self.writer.queued - QUEUE_BYTES

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        with contextlib.suppress(TransportError):  # told to whoever sends next
            if self._copies.used:
                self._send_copies()
            self.writer.push()

    def _send_copies(self) -> None:
        copies, sent = self._copies, self._sent
        view = copies.take()
        if len(view) < GATHER_BYTES // 2:
            # A whole buffer for so little would be more memory than QUEUE_BYTES tell.
            self.writer.put([bytes(view)], len(view))
            return
        copies.mark = self.writer.put([view], len(view))
        sent.append(copies)
        free = sent[0].mark <= self.writer.reusable
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

    async def free(self, mark: int) -> None:
        """Wait until what was sent, up to ``mark``, may be changed.

        Raises:
            TransportError: the pipe is closed.
        """
        await self.writer.free(mark)

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
