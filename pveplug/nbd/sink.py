# SPDX-License-Identifier: Apache-2.0
"""Writes a disk through NBD: joined, several at a time, zeroes as holes, one flush.

No write is forgotten (CVE-2022-0485 was a copying program that dropped the error of a
completed write): each completion is looked at, the first failure is raised from the
next call and from every one after it, and only :meth:`NbdSink.finish` says that all is
well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from pveplug.errors import LocalProtocolError, NbdError, TransportError
from pveplug.nbd.client import NbdClient
from pveplug.nbd.connection import Pending
from pveplug.nbd.source import ZEROES, is_zero
from pveplug.proto.nbd_wire import Error
from pveplug.units import CLUSTER, GiB, MiB, round_down, round_up

SLOT: Final = 1 * MiB
ZERO_PIECE: Final = 1 * GiB
"""A longer WRITE_ZEROES is silent for too long on storage that really writes."""
MAX_REQUESTS: Final = 16
_CANNOT_ZERO: Final = (Error.ENOTSUP, Error.EINVAL, Error.EOVERFLOW)


@dataclass(slots=True, eq=False)
class _Slot:
    """A buffer; free again when the last request that sends from it has ended."""

    buffer: bytearray
    users: int = 0


@dataclass(slots=True, eq=False)
class _Flight:
    """A request under way: its range, where its bytes are, whether it's a zeroing."""

    start: int
    end: int
    slot: _Slot | None
    zeroing: bool


class NbdSink:
    """A disk to be written; an async context manager for one task.

    ``write`` copies what it is given before it returns, so buffers may be reused at
    once. Touching writes are joined to requests of up to 1 MiB. Later calls win over
    earlier ones on the same range: overlapping requests are never in flight together.

    Args:
        client: a connection of our own to a writable export.
        in_flight_bytes: bound of copied bytes, at least two requests.
        detect_zeroes: look for 64 KiB pieces that are all zero in what is written,
            and send them as zeroes.

    Leaving the context without :meth:`finish` (and without an exception) is an error;
    with an exception, cancelled too, the connection is dropped if writes are under
    way, since what they did is unknown.
    """

    def __init__(
        self,
        client: NbdClient,
        *,
        in_flight_bytes: int = 8 * MiB,
        detect_zeroes: bool = True,
    ) -> None:
        if client.read_only:
            raise LocalProtocolError("the NBD export to be written to is read-only")
        self._client = client
        self._slot_bytes = max(
            round_down(min(SLOT, client.maximum_block), client.minimum_block),
            client.minimum_block,
        )
        self._max_slots = max(in_flight_bytes // self._slot_bytes, 2)
        self._slots = 0
        self._free: list[_Slot] = []
        self._detect = detect_zeroes
        self._open: _Slot | None = None  # being filled
        self._open_at = 0
        self._open_length = 0
        self._flights: dict[Pending, _Flight] = {}
        self._zeroes: deque[tuple[int, int]] = deque()  # still to be zeroed: start, end
        self._zero_piece = max(ZERO_PIECE, client.minimum_block)
        self._can_zero = client.can_zero
        self._error: BaseException | None = None
        self._wake = asyncio.Event()
        self._again = 0  # zeroings that were refused as they were, and put back
        self._finished = False
        self.written = 0
        """Bytes sent as data so far."""
        self.zeroed = 0
        """Bytes sent as zeroes so far."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._flights:
            self._finished = False
            self._client.abort("closed: writes were given up")
            for pending in tuple(self._flights):
                pending.abandon()
            self._flights.clear()
        if error is None and not self._finished:
            self._raise_error()
            raise LocalProtocolError("an NBD sink was left without finish()")

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset``, now or together with what touches it.

        Raises: the first failure of any request so far, as :class:`NbdClient` does.
        """
        view = memoryview(data).cast("B")
        self._begin(f"write of {len(view)} bytes", offset, len(view))
        while view:
            if self._open is None or offset != self._open_at + self._open_length:
                await self._submit_open()
                self._open = await self._slot()
                self._open_at, self._open_length = offset, 0
            # Requests end at multiples of their size, so pieces line up with clusters.
            stop = round_down(self._open_at, self._slot_bytes) + self._slot_bytes
            count = min(len(view), stop - offset)
            at = self._open_length
            self._open.buffer[at : at + count] = view[:count]
            self._open_length += count
            offset += count
            view = view[count:]
            if offset == stop:
                await self._submit_open()

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, as a hole where the storage has them.

        Raises: as :meth:`write`.
        """
        self._begin(f"zeroing {length} bytes", offset, length)
        await self._submit_open()
        if length:
            await self._zero(offset, offset + length)

    async def finish(self) -> None:
        """Wait for every request, then flush; only now may the disk be relied on.

        Raises: as :meth:`write`; and again if called again after a failure.
        """
        self._raise_error()
        await self._submit_open()
        while self._flights or self._zeroes:
            await self._progress()
        self._raise_error()
        try:
            await self._client.flush()
        except BaseException as error:
            self._error = error
            raise
        self._finished = True

    async def mark(self) -> Callable[[], Awaitable[bool]]:
        """Send all that was written so far, and return how to have it made durable.

        What is returned may run in another task while writing goes on. It tells whether
        all before the mark is on stable storage: False if it can't tell.

        Raises: as :meth:`write`; and so does what is returned.
        """
        self._raise_error()
        await self._submit_open()
        while self._zeroes:
            await self._progress()
        before = [pending.future for pending in self._flights]
        again = self._again

        async def durable() -> bool:
            if before:
                await asyncio.wait(before)
            self._raise_error()
            await self._client.flush()
            return again == self._again

        return durable

    # -- inside -----------------------------------------------------------------

    def _begin(self, what: str, offset: int, length: int) -> None:
        self._raise_error()
        self._finished = False
        if length < 0 or offset < 0 or offset + length > self._client.size:
            size = self._client.size
            raise LocalProtocolError(f"{what} at {offset} is outside of {size} bytes")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _progress(self) -> None:
        """Wait until a request has ended, unless zeroes could be sent on."""
        self._send_zeroes()
        if self._flights:
            self._wake.clear()
            await self._wake.wait()
        self._raise_error()

    async def _clear(self, start: int, end: int) -> None:
        """Wait until a request may be sent and none under way touches the range."""
        while (
            self._zeroes
            or len(self._flights) >= MAX_REQUESTS
            or any(f.start < end and start < f.end for f in self._flights.values())
        ):
            await self._progress()
        self._raise_error()

    async def _slot(self) -> _Slot:
        while not self._free and self._slots >= self._max_slots:
            await self._progress()
        if self._free:
            return self._free.pop()
        self._slots += 1
        return _Slot(bytearray(self._slot_bytes))

    async def _submit_open(self) -> None:
        """Send what was collected, its zero pieces as zeroes."""
        slot, self._open = self._open, None
        if slot is None:
            return
        base = self._open_at
        slot.users = 1  # ours, until all its pieces are on the way
        try:
            for at, stop, zero in self._pieces(slot.buffer, base, self._open_length):
                if zero:
                    await self._zero(base + at, base + stop)
                    continue
                await self._clear(base + at, base + stop)
                view = memoryview(slot.buffer)[at:stop]
                slot.users += 1
                self._launch(
                    self._client.start_write(base + at, view, lend=True),
                    _Flight(base + at, base + stop, slot, zeroing=False),
                )
                self.written += stop - at
        finally:
            self._release(slot)

    def _pieces(
        self, buffer: bytearray, base: int, length: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Cut a slot into ``(start, stop, all zero)``, neighbours of a kind joined."""
        if not self._detect:
            yield 0, length, False
            return
        start = at = 0
        before: bool | None = None
        while at < length:
            stop = min(round_up(base + at + 1, CLUSTER) - base, length)
            # A shorter piece isn't worth a request of its own, nor may it be aligned.
            zero = stop - at == CLUSTER and is_zero(buffer, at, CLUSTER)
            if before is not None and zero is not before:
                yield start, at, before
                start = at
            before, at = zero, stop
        if before is not None:
            yield start, at, before

    async def _zero(self, start: int, end: int) -> None:
        await self._clear(start, end)
        self._zeroes.append((start, end))
        self.zeroed += end - start
        self._send_zeroes()

    def _send_zeroes(self) -> None:
        """Send on what is to be zeroed, as far as there is room for requests."""
        while self._zeroes and len(self._flights) < MAX_REQUESTS:
            start, end = self._zeroes.popleft()
            piece = self._zero_piece if self._can_zero else self._slot_bytes
            stop = min(round_down(start, piece) + piece, end)
            if stop < end:
                self._zeroes.appendleft((stop, end))
            if self._can_zero:
                pending = self._client.start_write_zeroes(start, stop - start)
            else:
                zeroes = memoryview(ZEROES)[: stop - start]
                pending = self._client.start_write(start, zeroes)
            self._launch(pending, _Flight(start, stop, None, zeroing=self._can_zero))

    def _launch(self, pending: Pending, flight: _Flight) -> None:
        self._flights[pending] = flight
        pending.future.add_done_callback(lambda _: self._landed(pending, flight))

    def _landed(self, pending: Pending, flight: _Flight) -> None:
        self._flights.pop(pending, None)
        if flight.slot is not None:
            self._release(flight.slot)
        self._wake.set()
        if pending.future.cancelled():
            self._error = self._error or TransportError("an NBD write was given up")
            return
        error = pending.future.exception()
        if error is None:
            return
        refused = isinstance(error, NbdError) and error.errno in _CANNOT_ZERO
        if flight.zeroing and refused:
            # Too long for this server, or not possible at all: smaller, then as data.
            if flight.end - flight.start > self._client.maximum_block:
                self._zero_piece = self._client.maximum_block
            else:
                self._can_zero = False
            self._zeroes.append((flight.start, flight.end))
            self._again += 1
        elif self._error is None:
            self._error = error

    def _release(self, slot: _Slot) -> None:
        slot.users -= 1
        if not slot.users:
            self._free.append(slot)
