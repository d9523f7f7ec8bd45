# SPDX-License-Identifier: Apache-2.0
"""An NBD client without a socket: bytes in, typed events out.

Theory of operation. The parser is a generator that says where the next bytes belong,
so a payload goes from the kernel straight into the buffer of the read that asked for
it. An adapter has four verbs::

    machine.read(...), write(...), …    a request; its bytes join data_to_send()
    data_to_send()                      buffers to write to the peer, in order
    get_buffer() / buffer_updated(n)    where the next bytes go; n of them arrived
    events()                            what that completed

Each request has a cookie; replies may come in any order, and the chunks of one reply
may be mixed with those of others. A request ends with one :class:`Completed`. What a
reply may do is checked against its request: a chunk outside it, on top of another,
one that is missing, of a type that doesn't belong to the command, or a length that no
honest server sends, ends the connection with RemoteProtocolError. An error number in
a reply ends only that request.

A cancelled read leaves its buffer to others while its reply is still on the way:
:meth:`NbdClientMachine.abandon` sends the payload to a scratch area instead.
"""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, NewType

from pveplug.errors import (
    LocalProtocolError,
    NbdError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_handshake import Export, StartTls, Steps, handshake, take
from pveplug.proto.nbd_request import Request, Runs
from pveplug.proto.nbd_wire import Chunk, Command, CommandFlag, TransmissionFlag

Cookie = NewType("Cookie", int)

STAGE: Final = 40
"""Bytes read ahead while a header is due: the longest header and the offset behind it,
so at most 24 bytes of a payload are ever copied."""
SCRATCH: Final = 64 * 1024
MAX_STATUS: Final = 16 * 1024 * 1024 + 8
"""nbdkit stops at 2^20 extents of 16 bytes, QEMU at 2^17."""
MAX_ERROR: Final = wire.CHUNK_ERROR_HEAD.size + wire.MAX_STRING + 8
_ZEROES: Final = bytes(256 * 1024)


class Phase(enum.Enum):
    HANDSHAKE = "handshake"
    TLS = "waiting for TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Ready:
    """The handshake is over; requests may be sent."""

    export: Export


@dataclass(frozen=True, slots=True)
class Completed:
    """A request ended: well, or with the server's error.

    ``status`` maps context names to their runs, for BLOCK_STATUS only.
    """

    cookie: Cookie
    error: NbdError | None
    status: dict[str, Runs] | None


Event = Ready | StartTls | Completed


class NbdClientMachine:
    """One connection to one export; see the module for how to drive it.

    Args:
        export: name of the export, "" for the server's default one.
        contexts: metadata contexts to ask for, e.g. ``base:allocation``.
        tls: ask for STARTTLS before anything else.
    """

    def __init__(
        self, export: str = "", *, contexts: Sequence[str] = (), tls: bool = False
    ) -> None:
        if any(len(s.encode()) > wire.MAX_STRING for s in (export, *contexts)):
            raise LocalProtocolError("an NBD name is at most 4096 bytes long")
        self.phase = Phase.HANDSHAKE
        self.export: Export | None = None
        self._outgoing: list[bytes | memoryview] = []
        self._events: list[Event] = []
        self._requests: dict[int, Request] = {}
        self._cookie = 0
        self._stage = memoryview(bytearray(STAGE))
        self._scratch = memoryview(bytearray(SCRATCH))
        self._view: memoryview | None = None  # where bytes go; None: thrown away
        self._left = 0  # bytes still wanted there
        self._receiving: Request | None = None  # whose payload it is
        self._disconnected = False
        self._parser = self._parse(export, contexts, tls)
        self._advance()

    # -- the adapter's side ---------------------------------------------------

    def data_to_send(self) -> list[bytes | memoryview]:
        """Return what must be written to the peer now, in order; then forget it."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def events(self) -> list[Event]:
        """Return what has happened since the last call."""
        events, self._events = self._events, []
        return events

    def get_buffer(self) -> memoryview:
        """Return where the next bytes belong; fill any part, then tell how much."""
        self._require_receiving()
        if self._left < STAGE and self.phase is Phase.TRANSMISSION:
            return self._stage
        if self._view is None:
            return self._scratch[: self._left]
        return self._view

    def buffer_updated(self, count: int) -> None:
        """Take notice of ``count`` bytes written into :meth:`get_buffer`'s view.

        Raises:
            NbdError: in the handshake only: the server refused the export.
            RemoteProtocolError: the peer broke the protocol; the machine is closed.
        """
        self._require_receiving()
        if self._left < STAGE and self.phase is Phase.TRANSMISSION:
            self._distribute(self._stage[:count])
            return
        self._filled(count)

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take what arrived as a whole, and return the events: for tests and pipes.

        Raises: as :meth:`buffer_updated`.
        """
        self._distribute(memoryview(data))
        return self.events()

    def receive_eof(self) -> None:
        """Take notice that the peer closed.

        Raises:
            TransportError: unless we had said goodbye and nothing was owed.
        """
        phase, self.phase = self.phase, Phase.CLOSED
        if self._disconnected and not self._requests:
            return
        doing = (
            f"with {len(self._requests)} requests unanswered"
            if phase is Phase.TRANSMISSION
            else "during the handshake"
        )
        raise TransportError(f"the NBD server closed the connection {doing}")

    def tls_established(self) -> None:
        """Go on with the handshake, now inside TLS."""
        if self.phase is not Phase.TLS:
            raise LocalProtocolError("nobody asked for TLS")
        self.phase = Phase.HANDSHAKE
        self._advance()

    # -- requests -------------------------------------------------------------

    def read(
        self, offset: int, buffer: memoryview, *, dont_fragment: bool = False
    ) -> Cookie:
        """Read ``len(buffer)`` bytes into ``buffer``, which the machine may write to
        until the request completes or is abandoned.
        """
        export = self._ready()
        flags = CommandFlag(0)
        if dont_fragment:
            self._need(TransmissionFlag.SEND_DF, "unfragmented reads")
            flags = CommandFlag.DF
        self._check_payload(export, len(buffer))
        return self._request(Command.READ, flags, offset, len(buffer), view=buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool = False) -> Cookie:
        """Write ``data``, which must not change until the request completes."""
        export = self._ready()
        self._check_payload(export, len(data))
        flags = CommandFlag.FUA if fua else CommandFlag(0)
        if fua:
            self._need(TransmissionFlag.SEND_FUA, "FUA")
        if export.extended:
            flags |= CommandFlag.PAYLOAD_LEN
        cookie = self._request(Command.WRITE, flags, offset, len(data))
        self._outgoing.append(data)
        return cookie

    def write_zeroes(
        self, offset: int, length: int, *, may_punch: bool = True, fast: bool = False
    ) -> Cookie:
        """Make a range read as zeroes; ``fast`` fails when that is slow."""
        self._need(TransmissionFlag.SEND_WRITE_ZEROES, "WRITE_ZEROES")
        flags = CommandFlag(0) if may_punch else CommandFlag.NO_HOLE
        if fast:
            self._need(TransmissionFlag.SEND_FAST_ZERO, "FAST_ZERO")
            flags |= CommandFlag.FAST_ZERO
        return self._request(Command.WRITE_ZEROES, flags, offset, length)

    def trim(self, offset: int, length: int) -> Cookie:
        """Tell that a range is no longer needed; it may read as anything then."""
        self._need(TransmissionFlag.SEND_TRIM, "TRIM")
        return self._request(Command.TRIM, CommandFlag(0), offset, length)

    def flush(self) -> Cookie:
        """Make all completed writes durable."""
        self._need(TransmissionFlag.SEND_FLUSH, "FLUSH")
        return self._request(Command.FLUSH, CommandFlag(0), 0, 0)

    def block_status(
        self, offset: int, length: int, *, one: bool = False, only: str | None = None
    ) -> Cookie:
        """Ask for the extents of every granted context; ``one`` per context only.

        ``only`` asks for one context (NBD specification, NBD_CMD_BLOCK_STATUS with
        NBD_CMD_FLAG_PAYLOAD_LEN), where the export offers BLOCK_STATUS_PAYLOAD.
        """
        contexts = self._ready().contexts
        if not contexts:
            raise LocalProtocolError("the NBD server granted no metadata context")
        flags = CommandFlag.REQ_ONE if one else CommandFlag(0)
        if only is None:
            return self._request(
                *(Command.BLOCK_STATUS, flags, offset, length),
                contexts=contexts.values(),
            )
        self._need(TransmissionFlag.BLOCK_STATUS_PAYLOAD, "choosing a context")
        if not self._ready().extended:
            raise LocalProtocolError("a context is chosen with extended headers only")
        ids = [number for number, name in contexts.items() if name == only]
        if not ids:
            raise LocalProtocolError(f"the NBD server granted no context {only}")
        cookie = self._request(
            *(Command.BLOCK_STATUS, flags | CommandFlag.PAYLOAD_LEN, offset, length),
            contexts=(only,),
            sent_length=wire.STATUS_PAYLOAD.size,
        )
        self._outgoing.append(wire.STATUS_PAYLOAD.pack(length, ids[0]))
        return cookie

    def disconnect(self) -> None:
        """Say goodbye; the server answers what is owed and closes."""
        if self.phase is Phase.TRANSMISSION and not self._disconnected:
            self._send_request(Command.DISC, CommandFlag(0), 0, 0, 0)
            self._disconnected = True

    def abandon(self, cookie: Cookie) -> None:
        """Stop caring for a read: its buffer isn't touched again, now or later."""
        request = self._requests.get(cookie)
        if request is not None:
            request.view = None
            if self._receiving is request:
                self._view = None

    # -- inside: requests -----------------------------------------------------

    def _ready(self) -> Export:
        if self.phase is not Phase.TRANSMISSION or self._disconnected:
            raise LocalProtocolError(f"no NBD requests now: {self.phase.value}")
        if self.export is None:
            raise LocalProtocolError("no NBD export")
        return self.export

    def _need(self, flag: TransmissionFlag, what: str) -> None:
        if not self._ready().flags & flag:
            raise LocalProtocolError(f"this NBD export doesn't offer {what}")

    @staticmethod
    def _check_payload(export: Export, length: int) -> None:
        if length > max(export.maximum_block, export.minimum_block):
            limit = export.maximum_block
            raise LocalProtocolError(f"payload of {length} bytes, limit is {limit}")

    def _request(
        self,
        command: Command,
        flags: CommandFlag,
        offset: int,
        length: int,
        *,
        view: memoryview | None = None,
        contexts: Collection[str] = (),
        sent_length: int | None = None,
    ) -> Cookie:
        export = self._ready()
        request = Request(command, flags, offset, length, view, contexts)
        if command is not Command.FLUSH:
            end, unit = offset + length, export.minimum_block
            if not 0 <= offset < end <= export.size:
                raise LocalProtocolError(f"{request} is outside of {export.size} bytes")
            if offset % unit or (end % unit and end != export.size):
                raise LocalProtocolError(f"{request} isn't aligned to {unit} bytes")
            if not export.extended and length > wire.UINT32_MAX:
                raise LocalProtocolError(f"{request} is too long for a compact request")
        writes = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)
        if command in writes and export.flags & TransmissionFlag.READ_ONLY:
            raise LocalProtocolError(f"{request} on a read-only NBD export")
        self._cookie += 1
        self._requests[self._cookie] = request
        sent = length if sent_length is None else sent_length
        self._send_request(command, flags, self._cookie, offset, sent)
        return Cookie(self._cookie)

    def _send_request(
        self, command: Command, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        extended = self.export is not None and self.export.extended
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        magic = wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC
        header = layout.pack(magic, flags, command, cookie, offset, length)
        self._outgoing.append(header)

    # -- inside: bytes in -----------------------------------------------------

    def _require_receiving(self) -> None:
        if self.phase is Phase.TLS:
            raise RemoteProtocolError("the NBD server sent data before TLS began")
        if self.phase is Phase.CLOSED:
            raise LocalProtocolError("this NBD connection is closed")

    def _distribute(self, data: memoryview) -> None:
        while data:
            self._require_receiving()
            count = min(self._left, len(data))
            if self._view is not None:
                self._view[:count] = data[:count]
            self._filled(count)
            data = data[count:]

    def _filled(self, count: int) -> None:
        self._left -= count
        if not self._left:
            self._advance()
        elif self._view is not None:
            self._view = self._view[count:]

    def _advance(self) -> None:
        """Run the parser to its next wish."""
        try:
            wish = next(self._parser)
        except BaseException:
            self.phase = Phase.CLOSED
            raise
        match wish:
            case StartTls():
                self.phase = Phase.TLS
                self._events.append(wish)
            case int():
                self._view, self._left = None, wish
            case _:
                self._view, self._left = wish, len(wish)

    def _parse(self, name: str, contexts: Sequence[str], tls: bool) -> Steps[None]:
        self.export = yield from handshake(name, contexts, tls, self._say)
        self.phase = Phase.TRANSMISSION
        self._events.append(Ready(self.export))
        if self.export.extended:
            yield from self._extended_replies()
        else:
            yield from self._replies(self.export.structured)

    def _say(self, data: bytes) -> None:
        self._outgoing.append(data)

    def _replies(self, structured: bool) -> Steps[None]:
        """Receive simple replies, and structured ones where these were agreed."""
        head = memoryview(bytearray(wire.STRUCTURED_REPLY.size))
        simple, rest = head[: wire.SIMPLE_REPLY.size], head[wire.SIMPLE_REPLY.size :]
        while True:
            yield simple
            magic, error, cookie = wire.SIMPLE_REPLY.unpack(simple)
            if magic == wire.SIMPLE_REPLY_MAGIC:
                yield from self._simple(error, cookie, structured)
            elif magic == wire.STRUCTURED_REPLY_MAGIC and structured:
                yield rest
                _, flags, kind, cookie, size = wire.STRUCTURED_REPLY.unpack(head)
                yield from self._chunk(self._asked(cookie), cookie, flags, kind, size)
            else:
                raise RemoteProtocolError(f"NBD reply has magic {magic:#x}")

    def _extended_replies(self) -> Steps[None]:
        head = memoryview(bytearray(wire.EXTENDED_REPLY.size))
        while True:
            yield head
            fields = wire.EXTENDED_REPLY.unpack(head)
            magic, flags, kind, cookie, offset, size = fields
            if magic != wire.EXTENDED_REPLY_MAGIC:
                raise RemoteProtocolError(f"NBD extended reply has magic {magic:#x}")
            request = self._asked(cookie)
            if offset != request.offset:
                raise RemoteProtocolError(f"NBD reply to {request} says {offset}")
            yield from self._chunk(request, cookie, flags, kind, size)

    def _asked(self, cookie: int) -> Request:
        request = self._requests.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"NBD reply with the unknown cookie {cookie}")
        return request

    def _simple(self, error: int, cookie: int, structured: bool) -> Steps[None]:
        request = self._asked(cookie)
        if error:
            self._refused(request, error)
        elif request.command is Command.BLOCK_STATUS or (
            structured and request.command is Command.READ
        ):
            raise RemoteProtocolError(f"NBD simple reply to {request}")
        elif request.command is Command.READ:
            yield from self._payload(request, request.offset, request.length)
        self._complete(request, cookie)

    def _chunk(
        self, request: Request, cookie: int, flags: int, kind: int, size: int
    ) -> Steps[None]:
        done = bool(flags & wire.REPLY_FLAG_DONE)
        reads = request.command is Command.READ
        if kind == Chunk.NONE and size == 0 and done:
            pass
        elif kind == Chunk.OFFSET_DATA and reads and 8 < size <= request.length + 8:
            raw = yield from take(wire.CHUNK_OFFSET.size)
            (start,) = wire.CHUNK_OFFSET.unpack(raw)
            yield from self._payload(request, start, size - wire.CHUNK_OFFSET.size)
        elif kind == Chunk.OFFSET_HOLE and reads and size == wire.CHUNK_HOLE.size:
            start, length = wire.CHUNK_HOLE.unpack((yield from take(size)))
            request.cover(start, start + length)
            self._zero(request, start, length)
        elif kind & wire.CHUNK_ERROR and 6 <= size <= MAX_ERROR:
            self._error_chunk(request, kind, (yield from take(size)))
        elif (
            request.command is Command.BLOCK_STATUS
            and kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)
            and size <= MAX_STATUS
        ):
            self._status_chunk(request, kind, (yield from take(size)))
        else:
            what = f"chunk of type {kind:#x} and {size} bytes"
            raise RemoteProtocolError(f"NBD {what} in the reply to {request}")
        if done:
            self._complete(request, cookie)

    def _payload(self, request: Request, start: int, length: int) -> Steps[None]:
        request.cover(start, start + length)
        if request.view is None:
            yield length
            return
        at = start - request.offset
        self._receiving = request
        yield request.view[at : at + length]
        self._receiving = None

    @staticmethod
    def _zero(request: Request, start: int, length: int) -> None:
        if request.view is None:
            return
        at = start - request.offset
        hole = request.view[at : at + length]
        for piece in range(0, length, len(_ZEROES)):
            part = hole[piece : piece + len(_ZEROES)]
            part[:] = _ZEROES[: len(part)]

    def _error_chunk(self, request: Request, kind: int, data: bytearray) -> None:
        number, length = wire.CHUNK_ERROR_HEAD.unpack_from(data)
        tail = data[wire.CHUNK_ERROR_HEAD.size + length :]
        place = 8 if kind == Chunk.ERROR_OFFSET else 0
        fits = wire.CHUNK_ERROR_HEAD.size + length + place
        known = kind in (Chunk.ERROR, Chunk.ERROR_OFFSET)
        if not number or fits > len(data) or (known and fits != len(data)):
            raise RemoteProtocolError(f"NBD error chunk for {request} is malformed")
        where = ""
        if place:
            (at,) = wire.CHUNK_OFFSET.unpack(tail)
            if not request.offset <= at <= request.offset + request.length:
                raise RemoteProtocolError(f"NBD error at {at} is outside {request}")
            where = f" at {at}"
        said = data[wire.CHUNK_ERROR_HEAD.size :][:length].decode("utf-8", "replace")
        self._refused(request, number, where, " ".join(said.split())[:200])

    @staticmethod
    def _refused(
        request: Request, number: int, where: str = "", said: str = ""
    ) -> None:
        if request.error is None:
            name = wire.error_name(number) + where + (f" ({said})" if said else "")
            request.error = NbdError(f"NBD server failed {request}: {name}", number)

    def _status_chunk(self, request: Request, kind: int, data: bytearray) -> None:
        export = self._ready_export()
        wide = kind == Chunk.BLOCK_STATUS_EXT
        unit, head = (16, 8) if wide else (8, 4)
        context = export.contexts.get(int.from_bytes(data[:4], "big"))
        count = (len(data) - head) // unit
        if (
            len(data) != head + count * unit
            or count < 1
            or context is None
            or context not in request.contexts
            or context in request.status
            or (wide and (not export.extended or count != _uint32(data, 4)))
        ):
            raise RemoteProtocolError(f"NBD status chunk for {request} is malformed")
        values = array("Q" if wide else "I")
        values.frombytes(memoryview(data)[head:])
        if sys.byteorder == "little":
            values.byteswap()
        runs = Runs(values[::2], values[1::2])
        if 0 in runs.lengths or runs.total - runs.lengths[-1] >= request.length:
            raise RemoteProtocolError(f"NBD extents of {context} lie outside {request}")
        one = bool(request.flags & CommandFlag.REQ_ONE)
        if one and (count > 1 or runs.total > request.length):
            raise RemoteProtocolError(f"NBD server ignored REQ_ONE in {request}")
        request.status[context] = runs

    def _ready_export(self) -> Export:
        assert self.export is not None  # noqa: S101  # set before the first reply
        return self.export

    def _complete(self, request: Request, cookie: int) -> None:
        del self._requests[cookie]
        status: dict[str, Runs] | None = None
        if request.error is None:
            if request.command is Command.READ and not request.whole():
                raise RemoteProtocolError(f"NBD reply left out a part of {request}")
            if request.command is Command.BLOCK_STATUS:
                status = request.status
                if len(status) != len(request.contexts):
                    raise RemoteProtocolError(f"NBD reply to {request} lacks a context")
        self._events.append(Completed(Cookie(cookie), request.error, status))


def _uint32(data: bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
