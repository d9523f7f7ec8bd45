# SPDX-License-Identifier: Apache-2.0
"""Serving disks over NBD: where it listens, and who may come.

::

    async with serve({"scsi0": device}, UnixAddress("/run/pveplug/ir.sock")) as server:
        ...

Any number of exports, each a :class:`Device`; the mapping is looked at for each client
that comes, so exports may be added while serving. Everything is read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Mapping
from typing import Final

from pveplug.errors import ConfigError, TransportError
from pveplug.nbd.client import Address, TcpAddress, UnixAddress
from pveplug.nbd.server_connection import Device, Limits, ServerConnection
from pveplug.proto.nbd_server import Hole

__all__ = ["Device", "Hole", "Limits", "NbdServer", "serve"]

GRACE_S: Final = 5.0
BACKLOG: Final = 128
OWNER_ONLY: Final = 0o600

log = logging.getLogger(__name__)


class NbdServer:
    """What is known of a server that listens; see :func:`serve`."""

    def __init__(
        self,
        exports: Mapping[str, Device],
        tls: ssl.SSLContext | None,
        limits: Limits,
        address: Address,
    ) -> None:
        self.address = address
        """Where it listens; a port 0 has become the one that was found."""
        self._exports = exports
        self._tls = tls
        self._limits = limits
        self._clients: set[ServerConnection] = set()
        self._closing = False

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    @property
    def open_requests(self) -> int:
        """How many requests of all clients are not answered yet."""
        return sum(client.machine.open_requests for client in self._clients)

    def _connection(self) -> ServerConnection:
        return ServerConnection(
            self._exports, self._tls, self._limits, self._came, self._clients.discard
        )

    def _came(self, client: ServerConnection) -> str | None:
        if self._closing:
            return "the server is closing"
        if len(self._clients) >= self._limits.connections:
            return f"{self._limits.connections} clients are connected"
        self._clients.add(client)
        return None

    async def _close(self, grace_s: float) -> None:
        self._closing = True
        clients = list(self._clients)
        await asyncio.gather(*(client.aclose(grace_s) for client in clients))


@contextlib.asynccontextmanager
async def serve(
    exports: Mapping[str, Device],
    address: Address,
    *,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    mode: int = OWNER_ONLY,
    grace_s: float = GRACE_S,
) -> AsyncIterator[NbdServer]:
    """Serve ``exports`` for as long as the block runs.

    At its end nobody new is let in, reads under way are answered, reads that wait for
    their data are dropped with the connection, and no task is left.

    Args:
        address: a unix socket, or a TCP address, which must be a loopback one unless
            ``tls`` is given.
        tls: a server's context; then nothing is served in plain text. Let it demand a
            certificate (``CERT_REQUIRED``), or whoever trusts ours may read.
        mode: permissions of the unix socket.
        grace_s: how long the end may take for each client.

    Raises:
        ConfigError: the address would show disks to the network in plain text.
        TransportError: it can't be listened on.
    """
    server = NbdServer(exports, tls, limits or Limits(), address)
    sock = _bound(address, tls)
    try:
        if isinstance(address, UnixAddress):
            os.chmod(address.path, mode)  # before anybody can connect
        else:
            server.address = TcpAddress(*sock.getsockname()[:2])
        loop = asyncio.get_running_loop()
        make = server._connection
        if isinstance(address, UnixAddress):
            listener = await loop.create_unix_server(make, sock=sock, backlog=BACKLOG)
        else:
            listener = await loop.create_server(make, sock=sock, backlog=BACKLOG)
        log.info("nbd-server-listens address=%s", server.address)
        try:
            yield server
        finally:
            listener.close()
            await server._close(grace_s)
            await listener.wait_closed()
    finally:
        sock.close()
        if isinstance(address, UnixAddress):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)


def _bound(address: Address, tls: ssl.SSLContext | None) -> socket.socket:
    """Return a socket bound to ``address`` that doesn't listen yet."""
    try:
        if isinstance(address, UnixAddress):
            _remove_stale(address.path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            place: str | tuple[str, int] = address.path
        else:
            host = _checked_host(address, tls)
            family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place = (str(host), address.port)
        try:
            sock.setblocking(False)
            sock.bind(place)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise TransportError(f"cannot serve NBD on {address}: {reason}") from error
    return sock


def _checked_host(
    address: TcpAddress, tls: ssl.SSLContext | None
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    name = "127.0.0.1" if address.host == "localhost" else address.host
    try:
        host = ipaddress.ip_address(name)
    except ValueError:
        text = f"cannot serve NBD on {address}: give an IP address, not a name"
        raise ConfigError(text) from None
    if tls is None and not host.is_loopback:
        raise ConfigError(
            f"cannot serve NBD on {address} without TLS: whoever reaches that port "
            "could read the disks. Use a unix socket or 127.0.0.1, or give a "
            "certificate"
        )
    return host


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that died; one that answers is left alone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # bind() will tell
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
