# SPDX-License-Identifier: Apache-2.0
"""asyncio's side of the NBD client: sockets, waiting, time limits.

One connection carries any number of requests at a time; each waits on a future that
its cookie finds. There is no reader task: the event loop puts bytes where the protocol
machine wants them (``asyncio.BufferedProtocol``; with uvloop, with TLS or without), so
nothing is left behind when a job ends.

Where a server lets us (NBD_FLAG_CAN_MULTI_CONN), reads may take turns on several
connections. A server fills a socket, 208 KiB of a UNIX one, and sleeps until it is
drained; we drain it and sleep until it is filled. With another socket to go on with,
neither does.

What cancellation leaves behind: a cancelled read or block_status is forgotten, its
buffer isn't written to any more, and the client stays usable. A cancelled write,
write_zeroes, trim or flush closes the client, for nobody can say what it has done.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, cast

from pveplug.errors import (
    NbdError,
    PveplugError,
    TransportError,
)
from pveplug.nbd.connection import Adapter, Pending, Status
from pveplug.proto.nbd_client import (
    NbdClientMachine,
)
from pveplug.proto.nbd_handshake import Export
from pveplug.proto.nbd_request import Runs
from pveplug.proto.nbd_wire import (
    DEFAULT_MAXIMUM_BLOCK,
    Error,
    TransmissionFlag,
)
from pveplug.units import KiB, round_down, round_up

log = logging.getLogger(__name__)

STALL_S: Final = 180.0
"""Nothing heard for so long with a request unanswered: the server hangs. Zeroing 1 GiB
of thick storage takes some ten seconds."""
FURTHER_S: Final = 1.0
"""A further connection that takes longer is done without."""
COMPACT_STATUS: Final = (1 << 32) - 64 * KiB


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


async def connect(
    address: Address,
    export: str = "",
    *,
    contexts: Sequence[str] = (),
    tls: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    readers: int = 1,
    timeout_s: float = 10.0,
    stall_s: float = STALL_S,
) -> NbdClient:
    """Connect to ``export`` and negotiate all the server can do.

    Args:
        address: where the server listens.
        export: the name; "" is the server's default export.
        contexts: what block_status shall tell; those the server doesn't know are left
            out, compare :attr:`NbdClient.contexts`.
        tls: begin TLS by STARTTLS before the export is named; without it plain text.
        server_hostname: whose certificate is expected; the host of a TCP address
            unless given.
        readers: how many connections the reads take turns on, if the server offers
            several; with those it doesn't give, there are fewer. For one who doesn't
            write: a read may overtake a write on another connection.
        timeout_s: bound of all of it.
        stall_s: how long a request may wait without a byte from the server.

    Raises:
        NbdError: the server refused the export or TLS.
        RemoteProtocolError: it doesn't speak NBD.
        TransportError: not reachable, no certificate we trust, or not in time.
    """
    host = address.host if isinstance(address, TcpAddress) else None
    name = server_hostname or host or ""

    async def opened(*contexts: str) -> tuple[Export, Adapter]:
        machine = NbdClientMachine(export, contexts=contexts, tls=tls is not None)
        adapter = Adapter(machine, str(address), stall_s)
        return await _open(adapter, address, tls, name), adapter

    with _translated(f"cannot connect to NBD server {address}"):
        async with asyncio.timeout(timeout_s):
            client = NbdClient(*await opened(*contexts))
    if readers > 1 and client.can_multi_conn:
        try:
            while client.connections < readers and await _further(client, opened):
                pass
        except BaseException:
            await client.aclose()
            raise
    return client


async def _further(
    client: NbdClient, opened: Callable[[], Awaitable[tuple[Export, Adapter]]]
) -> bool:
    """Open one more connection for reads, if that can be done at once."""
    try:
        with _translated("not opened"):
            async with asyncio.timeout(FURTHER_S):
                export, adapter = await opened()
    except PveplugError as error:
        log.info("an NBD server gives no further connection reason=%r", str(error))
        return False
    client.share(export, adapter)
    return True


async def _open(
    adapter: Adapter, address: Address, tls: ssl.SSLContext | None, name: str
) -> Export:
    loop = asyncio.get_running_loop()
    try:
        if isinstance(address, UnixAddress):
            await loop.create_unix_connection(lambda: adapter, address.path)
        else:
            await loop.create_connection(lambda: adapter, address.host, address.port)
        if tls is not None:
            await adapter.tls_due
            await adapter.start_tls(tls, name)
        return await adapter.ready
    except BaseException:
        adapter.fail(TransportError(f"gave up connecting to NBD server {address}"))
        await adapter.gone()
        raise


class NbdClient:
    """A negotiated connection; an async context manager that says goodbye at its end.

    Offsets and lengths are bytes. Requests longer than the server takes are split.

    Every request raises NbdError when the server refuses it (the client stays usable),
    RemoteProtocolError when a reply breaks the protocol, TransportError when the
    connection dies or stalls (in both the client is closed, and all who wait get the
    same error), LocalProtocolError when the range or the request isn't allowed here.
    """

    def __init__(self, export: Export, adapter: Adapter) -> None:
        self._adapter = adapter
        self._machine = adapter.machine
        self._export = export
        self._readers = [adapter]
        self._turn = 0
        self.size: Final = export.size
        self.flags: Final = export.flags
        self.minimum_block: Final = export.minimum_block
        self.preferred_block: Final = export.preferred_block
        # More than 32 MiB in one piece would only cost memory.
        self.maximum_block: Final = max(
            round_down(
                min(export.maximum_block, DEFAULT_MAXIMUM_BLOCK), export.minimum_block
            ),
            export.minimum_block,
        )
        self.contexts: Final = tuple(export.contexts.values())
        self.structured: Final = export.structured
        self.extended: Final = export.extended

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def read_only(self) -> bool:
        return bool(self.flags & TransmissionFlag.READ_ONLY)

    @property
    def can_trim(self) -> bool:
        return bool(self.flags & TransmissionFlag.SEND_TRIM) and not self.read_only

    @property
    def can_zero(self) -> bool:
        offered = self.flags & TransmissionFlag.SEND_WRITE_ZEROES
        return bool(offered) and not self.read_only

    @property
    def can_fast_zero(self) -> bool:
        return bool(self.flags & TransmissionFlag.SEND_FAST_ZERO) and self.can_zero

    @property
    def can_flush(self) -> bool:
        return bool(self.flags & TransmissionFlag.SEND_FLUSH)

    @property
    def can_multi_conn(self) -> bool:
        return bool(self.flags & TransmissionFlag.CAN_MULTI_CONN)

    @property
    def can_choose_context(self) -> bool:
        """Whether BLOCK_STATUS may ask for one of several contexts."""
        offered = self.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return bool(offered) and self.extended

    @property
    def connections(self) -> int:
        """On how many the reads take turns; all else goes by the first."""
        return len(self._readers)

    @property
    def can_dont_fragment(self) -> bool:
        return self.structured and bool(self.flags & TransmissionFlag.SEND_DF)

    # -- one request, for those who keep several in flight ---------------------

    def start_read(
        self,
        offset: int,
        buffer: memoryview,
        *,
        dont_fragment: bool = False,
        hold: bool = False,
    ) -> Pending:
        """Send one READ of at most ``maximum_block`` aligned bytes.

        ``buffer`` belongs to the client until the request ends or is abandoned. With
        ``hold`` it may be sent with the next request, at the latest when the event
        loop turns.
        """
        reader = self._readers[self._turn]
        if not hold:
            self._turn = (self._turn + 1) % len(self._readers)
        return reader.submit(
            lambda: reader.machine.read(offset, buffer, dont_fragment=dont_fragment),
            hold=hold,
        )

    def start_write(
        self,
        offset: int,
        data: memoryview,
        *,
        fua: bool = False,
        lend: bool = False,
    ) -> Pending:
        """Send one WRITE of at most ``maximum_block`` aligned bytes.

        ``data`` must not change until the request ends; if it can't be waited for,
        :meth:`abort` the client. With ``lend`` it must not change then either, ever: a
        UNIX socket may be lent its pages instead of taking a copy.
        """
        view = data if lend else data.toreadonly()
        return self._adapter.submit(
            lambda: self._machine.write(offset, view, fua=fua),
            lent=view if lend else None,
        )

    def start_write_zeroes(
        self, offset: int, length: int, *, may_punch: bool = True, fast: bool = False
    ) -> Pending:
        """Send one WRITE_ZEROES, of at most 4 GiB unless the server has 64 bits."""
        return self._adapter.submit(
            lambda: self._machine.write_zeroes(
                offset, length, may_punch=may_punch, fast=fast
            )
        )

    # -- whole operations -----------------------------------------------------

    async def read_into(
        self, offset: int, buffer: memoryview, *, dont_fragment: bool = False
    ) -> None:
        """Fill ``buffer`` from ``offset`` on; several calls may be in flight.

        A range that isn't aligned to ``minimum_block`` costs a copy. Cancelled, the
        buffer holds anything but isn't written to any more.
        """
        unit, end = self.minimum_block, offset + len(buffer)
        if offset % unit or (end % unit and end != self.size):
            low, high = round_down(offset, unit), min(round_up(end, unit), self.size)
            around = memoryview(bytearray(high - low))
            await self.read_into(low, around, dont_fragment=dont_fragment)
            buffer[:] = around[offset - low :][: len(buffer)]
            return
        under_way: list[Pending] = []
        step = self.maximum_block
        try:
            for at in range(0, len(buffer), step):
                piece = buffer[at : at + step]
                under_way.append(
                    self.start_read(offset + at, piece, dont_fragment=dont_fragment)
                )
            for pending in under_way:
                await pending
        except BaseException:
            for pending in under_way:
                pending.abandon()
            raise

    async def read(self, offset: int, length: int) -> bytearray:
        """Read ``length`` bytes at ``offset`` into a new buffer."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write ``data``; it must not change until this returns."""
        view, step = memoryview(data).cast("B"), self.maximum_block
        await self._changed(
            functools.partial(
                self.start_write, offset + at, view[at : at + step], fua=fua
            )
            for at in range(0, len(view), step)
        )

    async def write_zeroes(
        self, offset: int, length: int, *, may_punch: bool = True, fast: bool = False
    ) -> None:
        """Make a range read as zeroes, leaving a hole if ``may_punch``.

        Raises:
            NbdError: also ENOTSUP when ``fast`` is asked for and it wouldn't be.
        """
        await self._changed(
            functools.partial(
                self.start_write_zeroes, at, count, may_punch=may_punch, fast=fast
            )
            for at, count in self._compact(offset, length)
        )

    async def trim(self, offset: int, length: int) -> None:
        """Give a range back; what it reads as afterwards is undefined."""
        await self._changed(
            functools.partial(
                self._adapter.submit, functools.partial(self._machine.trim, at, count)
            )
            for at, count in self._compact(offset, length)
        )

    async def flush(self) -> None:
        """Make completed writes durable; nothing to do where FLUSH isn't offered."""
        if self.can_flush:
            await self._changed(
                [functools.partial(self._adapter.submit, self._machine.flush)]
            )

    async def block_status(
        self, offset: int, length: int
    ) -> dict[str, list[tuple[int, int]]]:
        """Return context -> [(length, flags)] from ``offset`` on.

        The contexts may cover different lengths, less than asked but never nothing;
        the last extent may reach further than asked, even behind the export's end.
        """
        status = await self.status(offset, length)
        return {context: list(runs) for context, runs in status.items()}

    async def status(self, offset: int, length: int) -> dict[str, Runs]:
        """Do what :meth:`block_status` does, with compact results."""
        pending = self.start_status(offset, length)
        try:
            return cast(Status, await pending)
        except BaseException:
            pending.abandon()
            raise

    def start_status(
        self, offset: int, length: int, only: str | None = None
    ) -> Pending:
        """Start what :meth:`status` waits for; await it, or abandon it.

        ``only`` is one of the contexts; see :attr:`can_choose_context`.
        """
        if not self.extended:
            length = min(length, COMPACT_STATUS)
        return self._adapter.submit(
            lambda: self._machine.block_status(offset, length, only=only)
        )

    def share(self, export: Export, adapter: Adapter) -> None:
        """Let reads take turns on one more connection.

        Raises:
            NbdError: it isn't to the same; then the client is closed.
        """
        self._readers.append(adapter)
        for one in self._readers:
            one.others = self._readers
        # Not the flags: some are for BLOCK_STATUS, which goes by the first.
        for name in ("size", "minimum_block", "maximum_block"):
            mine, theirs = getattr(self._export, name), getattr(export, name)
            if theirs != mine:
                text = f"the NBD export's {name} was {mine} and is {theirs} now"
                error = NbdError(text, Error.EINVAL)
                self._adapter.fail(error)
                raise error

    def abort(self, reason: str) -> None:
        """Drop the connection now; all who wait get a TransportError."""
        self._adapter.fail(TransportError(reason))

    async def aclose(self) -> None:
        """Say goodbye and close; requests under way fail. Bounded to seconds."""
        for adapter in self._readers:
            adapter.leave()
        for adapter in self._readers:
            await adapter.aclose()

    def _compact(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        step = length if self.extended else COMPACT_STATUS
        for at in range(offset, offset + length, max(step, 1)):
            yield at, min(step, offset + length - at)

    async def _changed(self, starts: Iterable[Callable[[], Pending]]) -> None:
        """Start all, wait for all, raise the first error; cancelled: close."""
        first: PveplugError | None = None
        under_way: list[Pending] = []
        try:
            for start in starts:
                under_way.append(start())
        except PveplugError as error:
            first = error
        try:
            for pending in under_way:
                try:
                    await pending
                except PveplugError as error:
                    first = first or error
        except BaseException:
            self.abort("closed: a write was cancelled half-way")
            for pending in under_way:
                pending.abandon()
            raise
        if first is not None:
            raise first


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise TransportError(f"{doing}: no answer in time") from error
    except OSError as error:  # ssl.SSLError is one too
        raise TransportError(f"{doing}: {error.strerror or error}") from error
