# SPDX-License-Identifier: Apache-2.0
"""The channel between two sites: frames over TLS 1.3, both ends proved.

A sender calls :func:`connect`, a receiver :func:`serve`; what both then have is a
:class:`Channel`. Nothing but the handshake passes before both ends have proved
themselves (proto/dr_auth), and no frame of another size or checksum than announced
passes at all (proto/dr_wire).

The end of a stream isn't a statement: whoever can cut the connection can end it, also
tidily. What must have come whole is said by a frame.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from pveplug.diskstream import RateLimit
from pveplug.dr.link import Link, address_text
from pveplug.dr.throttle import Throttle
from pveplug.dr.tls import (
    ClientAuth,
    ServerAuth,
    ServerTrust,
    client_complaint,
    client_trust,
    server_trust,
    tls_words,
)
from pveplug.errors import PveplugError, TransportError
from pveplug.proto import dr_auth
from pveplug.proto.dr_auth import (
    AuthenticationError,
    ClientHandshake,
    Method,
    ServerHandshake,
    State,
)
from pveplug.proto.dr_wire import (
    WORTH_COMPRESSING,
    ZSTD,
    Buffer,
    RawFrame,
    encode_frame,
    new_compressor,
)
from pveplug.units import KiB

__all__ = [
    "AuthenticationError",
    "Channel",
    "ClientAuth",
    "Frame",
    "Server",
    "ServerAuth",
    "connect",
    "serve",
]

log = logging.getLogger(__name__)

PING_S: Final = 10.0
SILENCE_S: Final = 60.0
HANDSHAKE_S: Final = 10.0
HANDSHAKES: Final = 32
"""In progress at once; of one address half as many."""
ACCEPT_PAUSE_S: Final = 0.5
"""When no connection can be accepted (no file descriptor left), wait so long."""
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_LEAVERS: Final = 120
"""Who leaves before he has failed may come so often a minute: a port is looked at by
monitoring, but each handshake costs us a signature."""
_BACKLOG: Final = 128
_IN_THREAD: Final = 128 * KiB
"""Longer payloads are compressed in a thread: 1 MiB of what shrinks takes 2 to 3 ms."""
_MAX_SKIP: Final = 15
"""So many payloads aren't tried after those before them didn't shrink: it saves the
sender 15% of its time with random data, and costs 15 payloads where that ends."""


class Frame(Protocol):
    """A message that can be sent: see dr_frames."""

    def encode(self) -> tuple[int, list[Buffer], bool]:
        """Return its type, its payload, and whether to try to compress that."""


class Channel:
    """Frames to and from a peer that has proved itself; close it with :meth:`aclose`.

    Attributes:
        peer: its address, ``192.0.2.1:40000``; ``methods``: how it proved itself.
        limit: the bandwidth limit on what is sent; 0 is none.
    """

    def __init__(self, link: Link, methods: Method, limit: RateLimit) -> None:
        self._link = link
        self._compressor = new_compressor()
        self._misses = 0
        self._skip = 0
        self.methods = methods
        self.limit = limit
        self.peer = link.peer

    @property
    def sent_bytes(self) -> int:
        """Bytes of frames sent, as they travel inside TLS."""
        return self._link.sent

    @property
    def received_bytes(self) -> int:
        """Bytes of frames received, as they travel inside TLS."""
        return self._link.received

    async def send(self, frame: Frame) -> None:
        """Send one frame; wait while too much is under way.

        The payload's buffers may be used again when this returns. Frames of one task
        arrive in order; those of several in some order, never mixed. When cancelled,
        the frame was sent whole or not at all.

        Raises:
            TransportError: the connection is gone.
            RemoteProtocolError: the peer broke the protocol meanwhile.
        """
        type, buffers, compressible = frame.encode()
        await self.send_raw(type, *buffers, compress=compressible)

    async def send_raw(
        self, type: int, *buffers: Buffer, compress: bool = False
    ) -> None:
        """Send one frame of this type and payload; as :meth:`send`."""
        encoded = await self._encoded(type, buffers, compress)
        await self.limit.spend(sum(len(buffer) for buffer in encoded))
        await self._link.writable()
        self._link.write(encoded)

    async def receive(self) -> RawFrame | None:
        """Return the next frame, or None when the peer has closed the connection.

        One task at a time may wait here; there is no limit but the peer's silence.

        Raises:
            TransportError: the connection broke, or the peer fell silent; frames that
                came before are returned first.
            RemoteProtocolError: the peer broke the protocol.
        """
        return await self._link.receive()

    async def aclose(self) -> None:
        """Close, after what was sent; never raises, never takes long.

        A peer that takes longer than 2 s to read the rest doesn't get it: wait for its
        answer first.
        """
        await self._link.aclose()

    def abort(self) -> None:
        """Close at once; what wasn't delivered is lost."""
        self._link.fail(TransportError(f"the channel to {self.peer} was closed"))

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
        await self.aclose()

    async def _encoded(
        self, type: int, buffers: tuple[Buffer, ...], compress: bool
    ) -> list[Buffer]:
        length = sum(map(len, buffers))
        if not compress or length < WORTH_COMPRESSING:
            return encode_frame(type, *buffers)
        if self._skip:
            self._skip -= 1
            return encode_frame(type, *buffers)
        # What comes next is mostly like what came before. A try in vain costs less
        # here than the way to a thread and back, but isn't for nothing either.
        if length >= _IN_THREAD and not self._misses:
            encoded = await asyncio.to_thread(
                encode_frame, type, *buffers, compress=True
            )
        else:
            encoded = encode_frame(
                type, *buffers, compress=True, compressor=self._compressor
            )
        if encoded[0][1] & ZSTD:
            self._misses = 0
        else:
            self._misses += 1
            self._skip = min(2**self._misses - 1, _MAX_SKIP)
        return encoded


async def connect(
    host: str,
    port: int,
    *,
    auth: ClientAuth,
    bwlimit: int = 0,
    timeout_s: float = 30.0,
    ping_s: float = PING_S,
    silence_s: float = SILENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Channel:
    """Open a channel to a receiver.

    Args:
        bwlimit: bytes per second that are sent at most, 0: no limit.
        timeout_s: bounds all of it, from the name's resolution to the last proof.

    Raises:
        ConfigError: what ``auth`` names can't be used.
        TransportError: nobody answers there, or not in time.
        AuthenticationError: one end didn't accept the other.
        RemoteProtocolError: it isn't a receiver.
    """
    trust = client_trust(auth)
    where = address_text((host, port))
    link = Link()
    proved = False
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().create_connection(
                lambda: link,
                host,
                port,
                ssl=trust.context,
                server_hostname=host,
                ssl_handshake_timeout=timeout_s,
            )
            # Before anything is sent: whose certificate is it?
            shown = link.info("ssl_object").getpeercert(binary_form=True)
            identity = trust.identity(where, shown)
            machine = ClientHandshake(identity, secrets.token_bytes(dr_auth.NONCE))
            await _prove(link, machine)
            proved = True
    except (PveplugError, OSError) as error:  # TimeoutError, ssl.SSLError are kinds
        raise _translated(error, where, timeout_s) from error
    finally:
        if not proved:
            link.fail(TransportError(f"the channel to {where} was closed"))
    link.trusted(ping_s, silence_s)
    log.info("dr connected peer=%s methods=%s", link.peer, trust.methods)
    return Channel(link, trust.methods, RateLimit(bwlimit, clock))


async def _prove(link: Link, machine: ClientHandshake) -> None:
    link.write([machine.start()])
    while machine.state is not State.DONE:
        frame = await link.receive()
        if frame is None:
            machine.receive_eof()
            return
        reply = machine.receive(frame)
        if reply:
            link.write([reply])


def _translated(
    error: PveplugError | OSError, where: str, timeout_s: float
) -> PveplugError:
    """Return what to raise for ``error``, of our own kinds and with the address."""
    # TLS 1.3 lets the client finish before the server has looked at its certificate:
    # the server's alert arrives as the end of an established connection.
    cause = error.__cause__ if isinstance(error, TransportError) else error
    match cause:
        case ssl.SSLCertVerificationError():
            return AuthenticationError(
                f"the certificate of the receiver at {where} is not trusted "
                f"({cause.verify_message}); nothing was sent. Check dr_auth_ca, and "
                "that the certificate names this host"
            )
        case ssl.SSLError() if "ALERT" in (cause.reason or ""):
            return AuthenticationError(
                f"the receiver at {where} refused us in TLS ({cause.reason}): check "
                "dr_auth_cert and dr_auth_key; its log says more"
            )
        case ssl.SSLError():
            return AuthenticationError(
                f"{where} doesn't speak TLS 1.3 as a receiver does ({tls_words(cause)})"
            )
    if isinstance(error, PveplugError):
        return type(error)(f"{where}: {error}") if where not in str(error) else error
    if isinstance(error, TimeoutError):
        return TransportError(f"no receiver answers at {where} within {timeout_s:g} s")
    return TransportError(
        f"no receiver can be reached at {where}: {_os_words(error)}. Is "
        "podheitor-proxmox-receiver running there, and the port open?"
    )


def _os_words(error: OSError) -> str:
    if error.errno and not isinstance(error, socket.gaierror) and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or "the connection was closed"


Handler = Callable[[Channel], Awaitable[None]]


class Server:
    """A listening receiver; end it with :meth:`aclose`."""

    def __init__(
        self,
        sock: socket.socket,
        trust: ServerTrust,
        handler: Handler,
        throttle: Throttle,
        make_channel: Callable[[Link, Method], Channel],
        *,
        handshake_s: float,
        handshakes: int,
        clock: Callable[[], float],
    ) -> None:
        self._sock = sock
        self._trust = trust
        self._handler = handler
        self._throttle = throttle
        self._leavers = Throttle(failures=_LEAVERS)
        self._make_channel = make_channel
        self._handshake_s = handshake_s
        self._slots = asyncio.Semaphore(handshakes)
        self._per_address = max(1, handshakes // 2)
        self._shaking: Counter[str] = Counter()
        self._crowds: set[str] = set()
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(), name="dr-accept")

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the port is known even if 0 was asked for."""
        host, port, *_ = self._sock.getsockname()
        return host, port

    def reload(self, auth: ServerAuth) -> None:
        """Ask for other credentials from now on; channels that are open stay.

        Raises:
            ConfigError: they can't be used; the old ones stay in force.
        """
        self._trust = server_trust(auth)

    async def aclose(self) -> None:
        """Stop listening and cancel every handler; returns when all have ended."""
        tasks = {self._accepting, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()

    async def stop_accepting(self) -> None:
        """Take no new connections; handlers go on until :meth:`aclose`."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._sock.close()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Full: the next ones wait in the kernel's queue, at most for as long as
            # a handshake may take.
            await self._slots.acquire()
            try:
                sock, name = await loop.sock_accept(self._sock)
            except OSError as error:
                self._slots.release()
                if error.errno in _EXHAUSTED:
                    log.warning("dr cannot accept: %s", error)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if not self._welcome(name):
                sock.close()
                self._slots.release()
                continue
            task = asyncio.create_task(
                self._serve(sock, name), name=f"dr {address_text(name)}"
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _welcome(self, name: Any) -> bool:
        """Whether to speak with this address at all."""
        host = str(name[0])
        for throttle in (self._throttle, self._leavers):
            if throttle.blocked(host, self._clock()):
                if throttle.worth_telling(host):
                    _refused(name, "too many failures; dropped for a minute")
                return False
        if self._shaking[host] >= self._per_address:
            if host not in self._crowds:  # said once for each crowd
                self._crowds.add(host)
                _refused(name, "too many handshakes at once")
            return False
        return True

    async def _serve(self, sock: socket.socket, name: Any) -> None:
        host = str(name[0])
        self._shaking[host] += 1
        try:
            channel = await self._handshaken(sock, name)
        finally:
            self._slots.release()
            self._shaking[host] -= 1
            if not self._shaking[host]:
                del self._shaking[host]
                self._crowds.discard(host)
        if channel is None:
            return
        try:
            await self._handler(channel)
        except PveplugError as error:
            log.warning("dr session peer=%s ended: %s", channel.peer, error)
        except Exception:
            log.exception("dr session peer=%s failed", channel.peer)
        finally:
            await channel.aclose()

    async def _handshaken(self, sock: socket.socket, name: Any) -> Channel | None:
        """Return a channel to a peer that has proved itself, or None: it is gone."""
        trust = self._trust
        link = Link(limit=dr_auth.MAX_PAYLOAD)
        reason, guilty = "", True
        try:
            async with asyncio.timeout(self._handshake_s):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: link,
                    sock,
                    ssl=trust.context,
                    ssl_handshake_timeout=self._handshake_s,
                )
                reason = await _challenge(link, trust, str(name[0]))
        except ssl.SSLError as error:
            reason = tls_words(error)
        except TimeoutError:
            reason = f"no handshake within {self._handshake_s:g} s"
        except TransportError as error:
            cause = error.__cause__
            guilty = isinstance(cause, ssl.SSLError)
            reason = tls_words(cause) if isinstance(cause, ssl.SSLError) else "it left"
        except OSError:
            # A port scanner, or who checks that the port is open: it tried nothing.
            reason, guilty = "it left", False
        except PveplugError as error:
            reason = str(error)
        except BaseException:
            link.fail(TransportError("this receiver is being stopped"))
            raise
        if not reason:
            self._throttle.succeeded(str(name[0]))
            log.info("dr accepted peer=%s methods=%s", link.peer, trust.methods)
            return self._make_channel(link, trust.methods)
        _refused(name, reason)
        throttle = self._throttle if guilty else self._leavers
        throttle.failed(str(name[0]), self._clock())
        await link.aclose()
        return None


async def _challenge(link: Link, trust: ServerTrust, host: str) -> str:
    """Let the client prove itself; return why it is refused, or ``""``."""
    shown = link.info("ssl_object").getpeercert(binary_form=True)
    machine = ServerHandshake(trust.identity(shown), secrets.token_bytes(dr_auth.NONCE))
    if Method.MTLS in trust.methods:
        complaint = await client_complaint(shown or b"", host, trust.client_names)
        if complaint:
            link.write([machine.refuse(complaint)])
    while machine.state not in (State.DONE, State.FAILED):
        frame = await link.receive()
        if frame is None:
            machine.receive_eof()
            break
        reply = machine.receive(frame)
        if reply:
            link.write([reply])
    return machine.reason


def _refused(name: Any, reason: str) -> None:
    log.warning("dr refused peer=%s reason=%s", address_text(name), reason)


async def serve(
    bind: str,
    port: int,
    *,
    auth: ServerAuth,
    handler: Handler,
    sock: socket.socket | None = None,
    bwlimit: int = 0,
    handshake_s: float = HANDSHAKE_S,
    handshakes: int = HANDSHAKES,
    ping_s: float = PING_S,
    silence_s: float = SILENCE_S,
    throttle: Throttle | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """Listen for senders; ``handler`` is run for each that has proved itself.

    Args:
        handler: gets the channel, which is closed when it returns.
        sock: a socket that listens already (socket activation), instead of bind, port.

    Raises:
        ConfigError: what ``auth`` names can't be used, or ``bind`` is no address.
        TransportError: the port is taken.
    """
    trust = server_trust(auth)
    listening = sock if sock is not None else listen(bind, port)
    listening.setblocking(False)

    def make_channel(link: Link, methods: Method) -> Channel:
        link.trusted(ping_s, silence_s)
        return Channel(link, methods, RateLimit(bwlimit, clock))

    return Server(
        listening,
        trust,
        handler,
        throttle or Throttle(),
        make_channel,
        handshake_s=handshake_s,
        handshakes=handshakes,
        clock=clock,
    )


def listen(bind: str, port: int) -> socket.socket:
    """Return a listening socket; ``::`` takes IPv4, too.

    Raises:
        TransportError: the port is taken, or may not be used.
    """
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((bind, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise TransportError(
                f"port {port} is taken: a receiver and a sender (File Daemon) on one "
                "host clash; give the receiver a port of its own (port in its "
                "configuration, dr_port at the sender) or run it on another host. "
                f"`ss -ltnp 'sport = :{port}'` shows who has it"
            ) from error
        raise TransportError(
            f"cannot listen on {address_text((bind, port))}: {_os_words(error)}"
        ) from error
    return sock
