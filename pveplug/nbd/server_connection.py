# SPDX-License-Identifier: Apache-2.0
"""One client of the NBD server: between its transport, the machine and a device.

A READ goes through three places, and only the second of them holds memory::

    waiting                     reading                    written
    device.ready() -> a task    device.read(): at most     the transport: while it has
    per request, no buffer      ``Limits.bytes`` at a      anything to send (TLS: more
                                time, in order of ready    than 2 MiB), nothing is read

So hundreds of reads may wait for data that is still to come while others are answered.
At ``Limits.requests`` open requests the socket is left alone until one is answered.

A request that needs no waiting costs no task: where the device has the answer at hand
(warm data), it is on its way before the event loop turns. After that, a client which
has nothing else to wait for is waited for awake (:mod:`pveplug.nbd.polling`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import ssl
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Final, Protocol, cast

from pveplug.errors import NbdError, ProtocolError, PveplugError
from pveplug.nbd.polling import Lookout, worth_polling
from pveplug.nbd.sockets import widen
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_offer import Offer
from pveplug.proto.nbd_server import (
    Buffer,
    Data,
    Entered,
    Event,
    Goodbye,
    NbdServerMachine,
    Request,
    State,
)
from pveplug.proto.nbd_wire import Command, Error
from pveplug.units import KiB, MiB

HIGH_WATER: Final = 0
"""The transport's, in plain text: it holds but what the socket didn't take of the last
reply."""
TLS_HIGH_WATER: Final = 2 * MiB
"""With TLS so much may be on its way to a slow client, and one reply more."""
SOCKET_BYTES: Final = 1 * MiB
"""A unix socket's own buffer: with its default (208 KiB)
each 256 KiB reply took three turns of the event loop, and half as much CPU again."""
INBOX: Final = 64 * KiB
LOOK_S: Final = 1.0
_AT_ONCE: Final = (memoryview, list, bytes, bytearray, tuple, Sequence)
"""What a read is that need not be awaited, the likely ones first."""
GONE: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR

log = logging.getLogger(__name__)

Runs = Iterable[tuple[int, int]]
"""(length, STATE_HOLE | STATE_ZERO) one after the other."""


class Device(Protocol):
    """What the server serves: a disk that is only read, with sizes in bytes.

    Offsets and lengths lie inside of the disk and are multiples of ``minimum_block``,
    but for the disk's end. Each method may answer at once, which is fast, or return an
    awaitable (be an ``async def``), which is cancelled when the client goes.

    Each may raise NbdError or OSError, whose number the client is told, or any other
    error, which it is told as EIO. The connection goes on in every case.
    """

    @property
    def size(self) -> int: ...

    @property
    def minimum_block(self) -> int:
        """A power of two, at most 64 KiB."""

    @property
    def preferred_block(self) -> int: ...

    @property
    def maximum_block(self) -> int:
        """The longest read, a multiple of ``minimum_block``."""

    def ready(self, offset: int, length: int) -> Awaitable[None] | None:
        """Wait until the range can be read without waiting for anybody.

        May take for ever, and should hold no memory meanwhile; None: it can now.
        """

    def read(self, offset: int, length: int) -> Data | Awaitable[Data]:
        """Return ``length`` bytes: a buffer, or a row of buffers and holes.

        The buffers must not change until nobody refers to them any more.
        """

    def block_status(self, offset: int, length: int) -> Runs | Awaitable[Runs]:
        """Return (length, flags) from ``offset`` on, at least one.

        They may end before ``length``: the client then asks again. A generator is the
        best: QEMU always wants but the first.
        """


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost, and how many there may be."""

    requests: int = 1024
    bytes: int = 8 * MiB
    """Read or being read and not handed to the transport; one longer read passes."""
    handshake_s: float = 30.0
    connections: int = 128


class _Offers(Mapping[str, Offer]):
    """The devices as the machine is told of them."""

    def __init__(self, devices: Mapping[str, Device]) -> None:
        self._devices = devices

    def __getitem__(self, name: str) -> Offer:
        device = self._devices[name]
        block = (device.minimum_block, device.preferred_block, device.maximum_block)
        return Offer(device.size, *block)

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)


class ServerConnection(asyncio.BufferedProtocol):
    """Created for each client; ``came`` and ``left`` are told of it.

    ``came`` returns why the client isn't taken, or None.
    """

    def __init__(
        self,
        devices: Mapping[str, Device],
        tls: ssl.SSLContext | None,
        limits: Limits,
        came: Callable[[ServerConnection], str | None],
        left: Callable[[ServerConnection], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.machine = NbdServerMachine(
            _Offers(devices), tls=tls is not None, max_requests=limits.requests
        )
        self._devices = devices
        self._device: Device | None = None
        self._tls = tls
        self._limits = limits
        self._came, self._left = came, left
        self._transport: asyncio.Transport | None = None
        self._inbox = memoryview(bytearray(INBOX))
        self._ready: deque[Request] = deque()
        self._waits: set[asyncio.Task[None]] = set()
        self._reads: set[asyncio.Task[None]] = set()
        self._reading = 0  # bytes that the tasks of _reads will bring
        self._paused = False  # the transport has enough to write
        self._full = False  # the machine has; the socket is left alone
        self._pumping = False
        self._lookout: Lookout | None = None
        self._replied = False  # since the client was last heard
        self._closing = False
        self._early: bytearray | None = None  # came before start_tls() returned
        self._timer: asyncio.TimerHandle | None = None

    async def aclose(self, grace_s: float) -> None:
        """Finish the reads under way, drop those that wait, and hang up.

        A client that waits is told nothing: QEMU then connects anew and asks again,
        where an error would reach its guest.
        """
        self._closing = True
        self._cancel(self._waits)
        if self._transport is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while self._reads:
                        await asyncio.wait(self._reads)
                    self._transport.close()
                    await asyncio.shield(self.closed)
            self._abort()
            await self.closed
        await asyncio.gather(*self._waits, *self._reads, return_exceptions=True)

    # -- called by the event loop ---------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _prepare(sock)
            if self._tls is None and worth_polling():
                self._lookout = Lookout(self._loop, sock.fileno())
        refused = self._came(self)
        if refused is not None:
            log.warning("nbd-client-refused reason=%s", refused)
            self._abort()
            return
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        self._timer = self._loop.call_later(self._limits.handshake_s, self._too_late)
        self._transport.writelines(self.machine.data_to_send())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inbox

    def buffer_updated(self, nbytes: int) -> None:
        data = self._inbox[:nbytes]
        if self._closing:
            return
        if self._early is None:
            self._replied = False
            self._receive(data)
            self._look_out()
            return
        # asyncio hands over what came inside TLS before start_tls() has returned.
        self._early += data
        if len(self._early) > INBOX:
            self._abort()

    def eof_received(self) -> None:
        self._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        if not self.closed.done():
            self.closed.set_result(None)
            self._left(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    # -- inside: from bytes to requests ---------------------------------------

    def _receive(self, data: Buffer) -> None:
        self._take(data)
        self._pump()

    def _take(self, data: Buffer) -> None:
        try:
            events = self.machine.receive_data(data)
        except ProtocolError as error:
            log.warning("nbd-client-dropped reason=%s", error)
            self._abort()
            return
        if self._device is None and self._transport is not None:
            self._transport.writelines(self.machine.data_to_send())
        for event in events:
            self._happened(event)
        if self.machine.state is State.TRANSMISSION and not self.machine.wants_data:
            self._rest()

    def _happened(self, event: Event) -> None:
        match event:
            case Request():
                self._asked(event)
            case Entered(name):
                self._stop_timer()
                self._device = self._devices[name]
                log.info("nbd-client-entered export=%s", name)
            case StartTls() if self._transport is not None:
                # What comes now belongs to TLS; start_tls() reads on.
                self._transport.pause_reading()
                self._early = bytearray()
                self._spawn(self._start_tls(self._transport), self._waits)
            case Goodbye():
                pass

    async def _start_tls(self, transport: asyncio.Transport) -> None:
        assert self._tls is not None  # noqa: S101  # the machine offered it
        try:
            secured = await self._loop.start_tls(
                transport, self, self._tls, server_side=True
            )
        except (OSError, ssl.SSLError) as error:
            log.warning("nbd-client-dropped reason=TLS: %s", error)
            self._abort()
            return
        early, self._early = self._early, None
        if secured is None or self.machine.state is not State.TLS:
            self._abort()
            return
        self._transport = secured
        secured.set_write_buffer_limits(high=TLS_HIGH_WATER)
        self._paused = False
        self.machine.tls_established()
        self._receive(bytes(early or b""))

    def _asked(self, request: Request) -> None:
        if request.error or request.command != Command.READ or self._device is None:
            self._ready.append(request)
            return
        try:
            waiting = self._device.ready(request.offset, request.length)
        except Exception as error:
            request.error, request.reason = _told(request, error)
            waiting = None
        if waiting is None:
            self._ready.append(request)
        else:
            self._spawn(self._wait(request, waiting), self._waits)

    async def _wait(self, request: Request, waiting: Awaitable[None]) -> None:
        try:
            await waiting
        except Exception as error:
            request.error, request.reason = _told(request, error)
        self._ready.append(request)
        self._pump()

    # -- inside: from requests to answers -------------------------------------

    def _pump(self) -> None:
        """Answer what may be answered now, and take more from the client."""
        if self._pumping:
            return  # called back by the transport in mid-write
        self._pumping = True
        try:
            while True:
                while self._ready and self._may_begin(self._ready[0]):
                    self._begin(self._ready.popleft())
                if not (self._full and self.machine.wants_data):
                    break
                self._full = False
                self._take(b"")
                if not self._full and self._transport is not None:
                    self._stop_timer()
                    self._transport.resume_reading()
        finally:
            self._pumping = False
        if self.machine.state is State.LEAVING and not self.machine.open_requests:
            self._close()

    def _may_begin(self, request: Request) -> bool:
        fits = self._reading + request.length <= self._limits.bytes
        return not self._paused and (fits or not self._reading)

    def _begin(self, request: Request) -> None:
        device = self._device
        if request.error or device is None:
            self._write(self.machine.send_error(request))
            return
        try:
            reply = self._answer(device, request)
        except Exception as error:
            reply = self.machine.send_error(request, *_told(request, error))
        self._write(reply)

    def _answer(self, device: Device, request: Request) -> list[Buffer]:
        """Return the reply if the device has it at hand; else nothing, and a task."""
        if request.command == Command.READ:
            data = device.read(request.offset, request.length)
            if isinstance(data, _AT_ONCE):
                return self.machine.send_read(request, data)
            self._reading += request.length
            self._spawn(self._read(request, data), self._reads)
            return []
        runs = device.block_status(request.offset, request.length)
        if not isinstance(runs, Awaitable):
            return self.machine.send_status(request, runs)
        self._spawn(self._status(request, runs), self._reads)
        return []

    async def _read(self, request: Request, found: Awaitable[Data]) -> None:
        try:
            reply = self.machine.send_read(request, await found)
        except Exception as error:
            reply = self._failed(request, error)
        finally:
            self._reading -= request.length
        self._write(reply)
        self._pump()

    async def _status(self, request: Request, found: Awaitable[Runs]) -> None:
        try:
            reply = self.machine.send_status(request, await found)
        except Exception as error:
            reply = self._failed(request, error)
        self._write(reply)
        self._pump()

    def _failed(self, request: Request, error: Exception) -> list[Buffer]:
        if self.machine.state is State.CLOSED:
            return []
        return self.machine.send_error(request, *_told(request, error))

    def _write(self, buffers: list[Buffer]) -> None:
        transport = self._transport
        if transport is not None and buffers and not transport.is_closing():
            transport.writelines(buffers)
            self._replied = True

    def _look_out(self) -> None:
        """Where the client has its answer and asks for nothing else, it soon will."""
        idle = self._replied and not self._paused and not self.machine.open_requests
        if idle and self._lookout is not None:
            self._lookout.look()

    # -- inside: endings ------------------------------------------------------

    def _rest(self) -> None:
        """Leave the socket alone; nobody tells then that the client has gone."""
        if self._transport is not None and not self._full:
            self._full = True
            self._transport.pause_reading()
            self._stop_timer()
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        poll = select.poll()
        poll.register(sock.fileno(), GONE)
        if any(events & GONE for _, events in poll.poll(0)):
            self._abort()

    def _too_late(self) -> None:
        log.warning("nbd-client-dropped reason=no export was asked for in time")
        self._abort()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _abort(self) -> None:
        self._gone()
        # asyncio's TLS transport (3.11) can't be aborted once it is closed.
        if self._transport is not None and not self.closed.done():
            self._transport.abort()

    def _gone(self) -> None:
        """Forget the client: what it waits for isn't wanted any more."""
        self._closing = True
        self._stop_timer()
        self._cancel(self._waits)
        self._cancel(self._reads)
        self._ready.clear()
        self.machine.receive_eof()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _spawn(
        self, work: Coroutine[None, None, None], owner: set[asyncio.Task[None]]
    ) -> None:
        task = self._loop.create_task(work, name="nbd-request")
        owner.add(task)
        task.add_done_callback(owner.discard)

    @staticmethod
    def _cancel(tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()


def _told(request: Request, error: Exception) -> tuple[int, str]:
    """Return the error number and the text a client is given."""
    match error:
        case NbdError(errno=number) if number:
            return number, str(error)
        case OSError(errno=int(number)):
            log.warning("nbd-request-failed request=%s reason=%s", request, error)
            return number, error.strerror or "input/output error"
        case PveplugError():
            log.warning("nbd-request-failed request=%s reason=%s", request, error)
            return Error.EIO, str(error)
    log.error("nbd-request-failed request=%s", request, exc_info=error)
    return Error.EIO, "internal error"


def _prepare(sock: socket.socket) -> None:
    """Make room; over TCP, send at once and notice within a minute a host that died."""
    if sock.family == socket.AF_UNIX:
        widen(sock, SOCKET_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
