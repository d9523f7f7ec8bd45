# SPDX-License-Identifier: Apache-2.0
"""Between the event loop's TLS transport and the frames of a channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, cast

from pveplug.errors import (
    LocalProtocolError,
    PveplugError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto.dr_wire import (
    MAX_PAYLOAD,
    Buffer,
    FrameReader,
    RawFrame,
    encode_frame,
)
from pveplug.units import MiB

log = logging.getLogger(__name__)

PING: Final = 6
"""The type of the empty frame that says "I am still here"."""
GOODBYE_S: Final = 2.0
WRITE_BYTES: Final = 1 * MiB
"""Written and not yet taken by the kernel: above this senders wait."""
READ_BYTES: Final = 2 * MiB
"""Received and not yet asked for: above this nothing is read from the socket."""
_FRAME_COST: Final = 256
"""What an empty frame counts for in READ_BYTES: it takes memory, too."""
_TICKS: Final = 4
"""A heartbeat is due after so many ticks without a word of ours."""


def address_text(name: Any) -> str:
    """Show what ``getpeername()`` returned: ``192.0.2.1:9190``, ``[::1]:9190``."""
    if not isinstance(name, tuple) or len(name) < 2:
        return "(unknown)"
    host, port = str(name[0]), name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Link(asyncio.BufferedProtocol):
    """Frames in both directions over one transport, bounded in both.

    Attributes:
        peer: the other end's address; ``sent`` and ``received``: bytes of frames.
    """

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        """``limit`` bounds a payload until :meth:`trusted`.

        A server keeps strangers short. A client can't: what follows ACCEPT may be of
        any size and arrive with it.
        """
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(limit)
        self._transport: asyncio.Transport | None = None
        self._frames: deque[RawFrame] = deque()
        self._queued = 0
        self._reading = True
        self._arrived: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._error: PveplugError | None = None
        self._eof = False
        self._nowhere = memoryview(bytearray(1))
        self._timer: asyncio.TimerHandle | None = None
        self._tick_s = 0.0
        self._silence_s = 0.0
        self._heard = self._said = True  # since the last tick
        self._quiet_in = self._quiet_out = 0
        self.peer = "(unknown)"
        self.sent = 0
        self.received = 0

    # -- called by the channel ----------------------------------------------------

    def info(self, name: str) -> Any:
        """What the transport knows: ``ssl_object``, ``peername``."""
        return self._transport.get_extra_info(name) if self._transport else None

    def trusted(self, ping_s: float, silence_s: float) -> None:
        """The handshake is over: take long frames, send and expect heartbeats."""
        self._reader.limit = MAX_PAYLOAD
        self._tick_s = min(ping_s, silence_s) / _TICKS
        self._silence_s = silence_s
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    async def receive(self) -> RawFrame | None:
        """The next frame, or None at the end; see Channel.receive()."""
        if self._arrived is not None:
            raise LocalProtocolError("two tasks receive from one channel")
        while not self._frames:
            if self._eof:  # it came before what has ended the connection since
                return None
            if self._error is not None:
                raise self._error
            self._arrived = self._loop.create_future()
            try:
                await self._arrived
            finally:
                self._arrived = None
        frame = self._frames.popleft()
        self._queued -= len(frame.payload) + _FRAME_COST
        if not self._reading and self._queued <= READ_BYTES // 2:
            self._reading = True
            self._quiet_in = 0
            if self._transport is not None and self._error is None and not self._eof:
                self._transport.resume_reading()
        return frame

    async def writable(self) -> None:
        """Wait until there is room to write.

        Raises:
            TransportError, RemoteProtocolError: the connection is gone.
        """
        while True:
            self._check()
            if self._writable is None:
                return
            # A shielded wait: several may wait for one future, and each may give up.
            await asyncio.shield(self._writable)

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write a whole frame; the buffers may be used again when this returns."""
        self._check()
        if self._transport is None:
            raise LocalProtocolError("this channel isn't connected")
        self._said = True
        self.sent += sum(len(buffer) for buffer in buffers)
        self._transport.writelines(buffers)

    def fail(self, error: PveplugError) -> None:
        """End everything at once with ``error``, the first one that is given."""
        self._stop(error)
        if self._transport is not None:
            self._transport.abort()

    async def aclose(self) -> None:
        """Send what is written, say good-bye and wait for it, but not for long."""
        if self._transport is None:
            return
        if self._error is None:
            self._stop(TransportError(f"the channel to {self.peer} was closed"))
            self._transport.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await asyncio.shield(self._closed)
        finally:
            if self._transport is not None:
                self._transport.abort()

    # -- called by the event loop -------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        self.peer = address_text(transport.get_extra_info("peername"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._nowhere if self._error is not None else self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return
        self._heard = True
        self.received += nbytes
        try:
            frames = self._reader.buffer_updated(nbytes)
            for frame in frames:
                self._take(frame)
        except RemoteProtocolError as error:
            self.fail(RemoteProtocolError(f"{self.peer}: {error}"))
            return
        if self._frames:
            self._wake()
        if self._reading and self._queued > READ_BYTES and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        waiter, self._writable = self._writable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def eof_received(self) -> None:
        if self._error is not None:
            return
        try:
            self._reader.receive_eof()
        except RemoteProtocolError as error:
            # A cut, by whatever lies between: that may be tried again.
            self.fail(TransportError(f"{self.peer}: {error}"))
            return
        self._eof = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc.__class__.__name__} {exc}" if exc else ""
        error = TransportError(f"the connection to {self.peer} is lost{reason}")
        error.__cause__ = exc
        self._stop(error)
        self._transport = None  # asyncio's own fails when asked for anything now
        if not self._closed.done():
            self._closed.set_result(None)

    # -- inside -------------------------------------------------------------------

    def _take(self, frame: RawFrame) -> None:
        if frame.type == PING:
            if frame.payload:
                raise RemoteProtocolError("a PING with a payload")
            return
        self._frames.append(frame)
        self._queued += len(frame.payload) + _FRAME_COST

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._eof:
            raise TransportError(f"{self.peer} has closed the connection")

    def _stop(self, error: PveplugError) -> None:
        if self._error is None:
            self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self.resume_writing()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _tick(self) -> None:
        """Send a heartbeat when nothing was sent, notice a peer that sends none.

        Ticks are counted, not seconds: when this process was stopped or busy, what
        arrived meanwhile is read before the next tick.
        """
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        self._quiet_out = 0 if self._said else self._quiet_out + 1
        # The peer isn't silent while it is us who don't read.
        self._quiet_in = 0 if self._heard or not self._reading else self._quiet_in + 1
        self._said = self._heard = False
        if self._quiet_in * self._tick_s >= self._silence_s:
            self.fail(
                TransportError(f"{self.peer} said nothing for {self._silence_s:g} s")
            )
        elif self._quiet_out >= _TICKS - 1 and self._writable is None and not self._eof:
            # One tick early: the last word was said up to a tick before it was noted.
            self._quiet_out = 0
            self.write(encode_frame(PING))
            self._said = False
