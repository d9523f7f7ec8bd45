# SPDX-License-Identifier: Apache-2.0
"""Between the event loop's transport and the NBD protocol machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, cast

from pveplug.errors import NbdError, ProtocolError, PveplugError, TransportError
from pveplug.nbd.lending import LendingWriter
from pveplug.nbd.sockets import widen
from pveplug.proto.nbd_client import (
    Completed,
    Cookie,
    Event,
    NbdClientMachine,
    Phase,
    Ready,
)
from pveplug.proto.nbd_handshake import Export, StartTls
from pveplug.proto.nbd_request import Runs
from pveplug.units import KiB, MiB

GOODBYE_S: Final = 2.0
WRITE_PIECE: Final = 256 * KiB
LONG_PIECE: Final = 1 * MiB
SHORT_ONES: Final = 64
SHORT_BYTES: Final = 4 * KiB
"""So many requests are written at a time, with so much beside a piece of data."""
SOCKET_BYTES: Final = 4 * MiB
"""What may wait in a socket for qemu-nbd, so that it needn't wait for our next turn."""

Status = dict[str, Runs]


class Pending:
    """A request under way: await it once, or :meth:`abandon` it.

    ``future`` ends with the status of BLOCK_STATUS or None, or with the error.
    """

    __slots__ = ("_abandon", "cookie", "future")

    def __init__(
        self,
        cookie: Cookie,
        future: asyncio.Future[Status | None],
        abandon: Callable[[Pending], None],
    ) -> None:
        self.cookie = cookie
        self.future = future
        self._abandon = abandon

    def __await__(self) -> Generator[object, None, Status | None]:
        return self.future.__await__()

    def abandon(self) -> None:
        """Forget it: its buffer isn't touched from now on, its error isn't missed."""
        self._abandon(self)


class Adapter(asyncio.BufferedProtocol):
    """Between the event loop's transport and the machine."""

    def __init__(self, machine: NbdClientMachine, address: str, stall_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.machine = machine
        self.ready: asyncio.Future[Export] = loop.create_future()
        self.tls_due: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._waiting: dict[Cookie, asyncio.Future[Status | None]] = {}
        self._error: PveplugError | None = None
        self._transport: asyncio.Transport | None = None
        self._address = address
        self._loop = loop
        self._tick_s = stall_s / 4
        self._timer: asyncio.TimerHandle | None = None
        self._queue: deque[memoryview] = deque()
        self._writer: LendingWriter | None = None  # instead of the transport's
        self._unix = False
        self._lent: dict[Cookie, memoryview] = {}
        self._paused = False
        self._pump_due = False
        self._piece = WRITE_PIECE
        self._nowhere = memoryview(bytearray(1))
        self._heard = 0
        self._heard_before = 0
        self._quiet = 0
        self.others: Sequence[Adapter] = ()
        """Of the same client: when this one fails, they do."""

    # -- called by the client ---------------------------------------------------

    def submit(
        self,
        verb: Callable[[], Cookie],
        *,
        hold: bool = False,
        lent: memoryview | None = None,
    ) -> Pending:
        """Send a request; with ``hold`` the next one or the loop's turn may send it.

        ``lent`` is what the request writes, if that may be lent to a socket.
        """
        if self._error is not None:
            raise self._error
        cookie = verb()
        if lent is not None and self._writer is not None:
            self._lent[cookie] = lent
        future: asyncio.Future[Status | None] = self._loop.create_future()
        self._waiting[cookie] = future
        if not hold:
            self._pump()
        elif not self._pump_due:
            # Not for longer: the server owes nothing for what it hasn't got.
            self._pump_due = True
            self._loop.call_soon(self._pump_held)
        if self._timer is None and self._error is None:
            self._quiet = 0
            self._timer = self._loop.call_later(self._tick_s, self._tick)
        return Pending(cookie, future, self._abandon)

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        assert self._transport is not None  # noqa: S101  # tls_due came from it
        secured = await self._loop.start_tls(
            self._transport, self, context, server_hostname=hostname or None
        )
        if secured is None:
            raise TransportError(f"NBD server {self._address} left during TLS")
        self._transport, self._unix = secured, False
        secured.set_write_buffer_limits(high=WRITE_PIECE)
        self._paused = False
        self.machine.tls_established()
        self._pump()

    def fail(self, error: PveplugError) -> None:
        """End everything with ``error``, the first one that is given."""
        if self._error is None:
            self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queue.clear()
        waiting, self._waiting = self._waiting, {}
        futures: list[asyncio.Future[Any]] = [*waiting.values()]
        for future in (*futures, self.ready, self.tls_due):
            if not future.done():
                future.set_exception(self._error)
                future.exception()  # nobody may be listening; that's no mistake
        if self._writer is not None:
            self._writer.close(self._lent.values())
            self._lent.clear()
        if self._transport is not None:
            self._transport.abort()
        others, self.others = self.others, ()
        for other in others:
            if other._error is None:
                other.fail(self._error)

    def leave(self) -> None:
        """Say goodbye; :meth:`aclose` waits for it."""
        if self._transport is not None and self._error is None:
            self._error = TransportError("this NBD client was closed")
            self.machine.disconnect()
            self._pump(last=True)
            self._transport.close()

    async def aclose(self) -> None:
        self.leave()
        try:
            await self.gone()
        finally:
            if self._error is not None:
                self.fail(self._error)

    async def gone(self) -> None:
        """Wait until the transport is closed, but not for long."""
        if self._transport is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await asyncio.shield(self._closed)

    # -- called by the event loop -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_PIECE)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif sock is not None:
            self._unix = True
            if widen(sock, SOCKET_BYTES):
                self._piece = LONG_PIECE
        self._pump()

    def get_buffer(self, sizehint: int) -> memoryview:
        # asyncio asks as soon as TLS is up, before start_tls() has returned to tell
        # us; a byte that came then would be refused by buffer_updated().
        if self._error is None and self.machine.phase is not Phase.TLS:
            return self.machine.get_buffer()
        return self._nowhere

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return
        self._heard += 1
        try:
            self.machine.buffer_updated(nbytes)
        except (ProtocolError, NbdError) as error:
            self.fail(error)
            return
        events = self.machine.events()
        if events:
            self._dispatch(events)
            self._pump()
        elif self.machine.phase is Phase.HANDSHAKE:
            self._pump()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def eof_received(self) -> None:
        try:
            self.machine.receive_eof()
        except TransportError as error:
            self.fail(TransportError(f"{self._address}: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc else ""
        self.fail(TransportError(f"lost NBD server {self._address}{reason}"))
        if not self._closed.done():
            self._closed.set_result(None)

    # -- inside -------------------------------------------------------------------

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Completed(cookie, error, status):
                    self._lent.pop(cookie, None)
                    future = self._waiting.pop(cookie, None)
                    if future is None or future.done():
                        continue
                    if error is None:
                        future.set_result(status)
                    else:
                        future.set_exception(error)
                case Ready(export):
                    self._lend()
                    if not self.ready.done():
                        self.ready.set_result(export)
                case StartTls():
                    if self._transport is not None:
                        # What comes now belongs to TLS; start_tls() reads on.
                        self._transport.pause_reading()
                    if not self.tls_due.done():
                        self.tls_due.set_result(None)

    def _pump(self, *, last: bool = False) -> None:
        """Hand to the transport what it takes without piling up.

        asyncio's own transport (3.11) copies what the socket doesn't take at once, and
        moves the rest at each send: with 8 MiB of writes waiting that halved the speed.
        """
        queue = self._queue
        queue.extend(map(memoryview, self.machine.data_to_send()))
        # Python 3.12 and 3.13 had a writelines() that went on with a dead socket.
        if self._transport is None or self._transport.is_closing():
            return
        if self._writer is not None:
            self._write()
            return
        while queue and (last or not self._paused):
            pieces, room = [queue.popleft()], self._piece + SHORT_BYTES
            room -= len(pieces[0])
            # uvloop would write each by itself, and wake the server for its header.
            while queue and room >= len(queue[0]) and len(pieces) < SHORT_ONES:
                pieces.append(queue.popleft())
                room -= len(pieces[-1])
            if room < 0:
                queue.appendleft(pieces[0][self._piece :])
                pieces[0] = pieces[0][: self._piece]
            self._transport.writelines(pieces)

    def _lend(self) -> None:
        """From now on write to a UNIX socket ourselves, unless it has TLS."""
        transport = self._transport
        if (
            transport is None
            or not self._unix
            or transport.get_extra_info("sslcontext")
        ):
            return
        if not transport.get_write_buffer_size():
            sock = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # too many open files; then it copies
                self._writer = LendingWriter(sock, self._pump)

    def _write(self) -> None:
        assert self._writer is not None  # noqa: S101  # asked by who called
        try:
            self._writer.write(self._queue)
        except OSError as error:
            reason = error.strerror or str(error)
            self.fail(TransportError(f"lost NBD server {self._address}: {reason}"))

    def _pump_held(self) -> None:
        self._pump_due = False
        if self._error is None:
            self._pump()

    def _abandon(self, pending: Pending) -> None:
        self.machine.abandon(pending.cookie)
        self._waiting.pop(pending.cookie, None)
        if not pending.future.done():
            pending.future.cancel()
        elif not pending.future.cancelled():
            pending.future.exception()

    def _tick(self) -> None:
        """Notice a server that says nothing for four ticks while it owes a reply."""
        self._timer = None
        if not self._waiting:
            return
        self._quiet = self._quiet + 1 if self._heard == self._heard_before else 0
        self._heard_before = self._heard
        if self._quiet >= 4:
            stall_s = 4 * self._tick_s
            text = f"NBD server {self._address} said nothing for {stall_s:.0f} s"
            self.fail(TransportError(text))
            return
        self._timer = self._loop.call_later(self._tick_s, self._tick)
