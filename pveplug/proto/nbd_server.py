# SPDX-License-Identifier: Apache-2.0
"""An NBD server without a socket: one connection to a read-only disk.

Theory of operation. Bytes go in, typed events come out, and each event that wants an
answer is a :class:`Request`; the answer may come at any time and in any order::

    machine.receive_data(data)            bytes from the client -> events
    machine.data_to_send()                greeting and option replies, to be written
    machine.send_read(request, data)      buffers to write: head, payload, head, …
    machine.send_status(request, runs)
    machine.send_error(request, number, text)

Payloads aren't copied: they leave as the buffers that were given. A request that may
not be (outside of the disk, a write, an unknown command) comes out as an event too,
with its ``error`` set, to be answered by ``send_error(request)``: so whatever a client
sends is bounded by ``max_requests``. While so many are open nothing more is parsed
(:attr:`wants_data` is false) and the adapter leaves the rest in the socket; after an
answer ``receive_data(b"")`` goes on with what had been received.

::

                    flags              GO, EXPORT_NAME               DISC
    CLIENT_FLAGS ----------> OPTIONS -------------------> TRANSMISSION ----> LEAVING
                              |  ^ |                                            ^
                     STARTTLS v  | +--------------------------------------------+
                              TLS  tls_established()            ABORT

    a broken rule, or the end of the stream, in any state: CLOSED
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_offer import ALLOCATION_ID, Negotiation, Next, Offer
from pveplug.proto.nbd_wire import (
    Chunk,
    Command,
    CommandFlag,
    Error,
    HandshakeFlag,
    Option,
    Reply,
)

MAX_REQUESTS: Final = 1024
"""QEMU keeps 16 requests open, nbdcopy 64, the kernel 128 per connection."""
MAX_OPTIONS: Final = 256
MAX_OPTION: Final = 32 * 1024
"""Two names and a few contexts fit; a longer option is refused, its data dropped."""
MAX_DROPPED: Final = wire.DEFAULT_MAXIMUM_BLOCK
"""A payload up to this is read past; what is longer ends the connection."""
MAX_EXTENTS: Final = 65536
MIN_HOLE: Final = 4096
"""A shorter hole travels as zeroes: a chunk of its own would cost the client more."""
_ZEROES: Final = memoryview(bytes(256 * 1024))

Buffer = bytes | bytearray | memoryview


class State(enum.Enum):
    CLIENT_FLAGS = "waiting for the client's flags"
    OPTIONS = "negotiating"
    TLS = "waiting for TLS"
    TRANSMISSION = "transmission"
    LEAVING = "the client said goodbye"
    CLOSED = "closed"


class Input(enum.Enum):
    """What moves a connection from one state to another."""

    FLAGS = "the client's flags"
    START_TLS = "STARTTLS was acknowledged"
    SECURED = "TLS is up"
    ENTERED = "GO or EXPORT_NAME was granted"
    GOODBYE = "ABORT or DISC"
    END = "end of stream"
    BROKEN = "a broken rule"


NEXT: Final[Mapping[tuple[State, Input], State]] = {
    (State.CLIENT_FLAGS, Input.FLAGS): State.OPTIONS,
    (State.OPTIONS, Input.START_TLS): State.TLS,
    (State.OPTIONS, Input.ENTERED): State.TRANSMISSION,
    (State.OPTIONS, Input.GOODBYE): State.LEAVING,
    (State.TLS, Input.SECURED): State.OPTIONS,
    (State.TRANSMISSION, Input.GOODBYE): State.LEAVING,
    **{(state, Input.END): State.CLOSED for state in State},
    **{(state, Input.BROKEN): State.CLOSED for state in State},
}
"""A pair that isn't here is a mistake of the adapter's: LocalProtocolError."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The client has chosen this export; requests follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The client asks for nothing more: answer what is open, then close."""


@dataclass(slots=True, eq=False)
class Request:
    """A READ or BLOCK_STATUS to answer, or one that must be refused with ``error``."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    error: int = 0
    reason: str = ""

    def __str__(self) -> str:
        try:
            name = Command(self.command).name
        except ValueError:
            name = f"command {self.command}"
        return f"{name} of {self.length} bytes at {self.offset}"


Event = StartTls | Entered | Goodbye | Request


@dataclass(frozen=True, slots=True)
class Hole:
    """``length`` zero bytes of a disk that are sent as their number."""

    length: int


Data = Buffer | Sequence[Buffer | Hole]
"""What a read found: one buffer of bytes, or a row of buffers and holes."""

_DATA_HEAD: Final = struct.Struct(">IHHQIQ")  # STRUCTURED_REPLY, offset
_EXTENDED_DATA_HEAD: Final = struct.Struct(">IHHQQQQ")  # EXTENDED_REPLY, offset
# Plain numbers, because at each request an enum.IntFlag would take 1 us to be combined
# (and its complement leaves out the bits it has no name for).
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_CHANGES: Final = frozenset(
    map(int, (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_CLIENT_FLAGS: Final = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_ALLOWED: Final[Mapping[int, int]] = {
    _READ: _DF,
    int(Command.BLOCK_STATUS): _REQ_ONE,
}
_BUFFERS: Final = (bytes, bytearray, memoryview)
_ERRORS: Final = frozenset(int(error) for error in Error)


class NbdServerMachine:
    """One client's connection; see the module for how to drive it.

    Args:
        exports: name -> what is told of it; may change while nobody has entered.
        tls: nothing is said in plain text but STARTTLS.
        max_requests: so many may be open at a time.
    """

    def __init__(
        self,
        exports: Mapping[str, Offer],
        *,
        tls: bool = False,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        self.state = State.CLIENT_FLAGS
        self.agreed = Negotiation(exports, tls)
        self._max_requests = max_requests
        self._open: set[Request] = set()
        self._buffer = bytearray()
        self._dropping = 0  # bytes of a payload or option nobody wants
        self._options = 0
        self._fixed = False
        self._after: Request | None = None  # comes out once its payload is dropped
        self._layout = wire.REQUEST
        self._magic = wire.REQUEST_MAGIC
        self._events: list[Event] = []
        greeting = wire.GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, _CLIENT_FLAGS)
        self._outgoing = [greeting]

    # -- the adapter's side ---------------------------------------------------

    def data_to_send(self) -> list[bytes]:
        """Return what must be written now, in order; then forget it."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def wants_data(self) -> bool:
        """Whether receiving more makes sense now."""
        return len(self._open) < self._max_requests and self.state not in (
            State.TLS,
            State.LEAVING,
            State.CLOSED,
        )

    def receive_data(self, data: Buffer) -> list[Event]:
        """Take what arrived; return what it completed.

        Raises:
            RemoteProtocolError: the client broke the protocol; hang up.
        """
        if self.state is State.CLOSED:
            raise LocalProtocolError("this NBD connection is closed")
        if self.state is State.LEAVING:
            return []
        if self.state is State.TLS and data:
            # Else somebody in the middle could slip options in before TLS begins.
            self._break("an NBD client went on in plain text after STARTTLS")
        self._buffer += data
        try:
            while self._step():
                pass
        except RemoteProtocolError:
            self._close(Input.BROKEN)
            raise
        events, self._events = self._events, []
        return events

    def receive_eof(self) -> None:
        """Take notice that the client is gone; nothing can be answered any more."""
        self._close(Input.END)

    def tls_established(self) -> None:
        """Go on with the handshake, now inside TLS."""
        self._move(Input.SECURED)
        self.agreed.secure()

    def send_read(self, request: Request, data: Data) -> list[Buffer]:
        """Return the reply to a READ as buffers to write in this order.

        ``data`` is as long as the request; its buffers must not change until they
        are written.

        Raises:
            LocalProtocolError: it is shorter or longer, or the request isn't open.
        """
        if isinstance(data, _BUFFERS):
            total = len(data)
        else:
            total = sum(p.length if isinstance(p, Hole) else len(p) for p in data)
        if total != request.length or request.command != _READ:
            raise LocalProtocolError(f"{total} bytes are no answer to {request}")
        self._answered(request)
        if isinstance(data, _BUFFERS):
            return [self._data_head(request, request.offset, total, last=True), data]
        runs = _runs(data)
        if not self.agreed.structured or (len(runs) > 1 and request.flags & _DF):
            runs = [(False, total, _filled(data))]
        at, out = request.offset, list[Buffer]()
        for number, (hole, length, buffers) in enumerate(runs, 1):
            last = number == len(runs)
            if hole:
                body = wire.CHUNK_HOLE.pack(at, length)
                out.append(self._chunk(request, Chunk.OFFSET_HOLE, body, last=last))
            else:
                out.append(self._data_head(request, at, length, last=last))
                out += buffers
            at += length
        return out

    def send_status(
        self, request: Request, runs: Iterable[tuple[int, int]]
    ) -> list[Buffer]:
        """Return the reply to a BLOCK_STATUS.

        Args:
            runs: (length, flags of ``base:allocation``) from the request's offset on,
                at least one; they may end early and reach too far.
        """
        if request.command != Command.BLOCK_STATUS:
            raise LocalProtocolError(f"extents are no answer to {request}")
        one = bool(request.flags & _REQ_ONE)
        told = _told(runs, request.length, 1 if one else MAX_EXTENTS)
        if not told:
            raise LocalProtocolError(f"no extents are no answer to {request}")
        self._answered(request)
        extended = self.agreed.extended
        values = [value for run in told for value in run]
        if extended:
            kind, body = (
                Chunk.BLOCK_STATUS_EXT,
                struct.pack(f">II{len(values)}Q", ALLOCATION_ID, len(told), *values),
            )
        else:
            kind, body = (
                Chunk.BLOCK_STATUS,
                struct.pack(f">I{len(values)}I", ALLOCATION_ID, *values),
            )
        return [self._chunk(request, kind, body, last=True)]

    def send_error(
        self, request: Request, number: int = 0, text: str = ""
    ) -> list[Buffer]:
        """Return the reply that refuses or fails a request.

        ``number`` is an errno; what the protocol doesn't know becomes EIO. Without
        it, the request's own ``error`` and ``reason`` are told.
        """
        self._answered(request)
        number = number or request.error
        text = text or request.reason
        if number not in _ERRORS:
            number = Error.EIO
        if not self.agreed.structured:
            head = (wire.SIMPLE_REPLY_MAGIC, number, request.cookie)
            return [wire.SIMPLE_REPLY.pack(*head)]
        said = text.encode("utf-8", "replace")[: wire.MAX_STRING]
        body = wire.CHUNK_ERROR_HEAD.pack(number, len(said)) + said
        return [self._chunk(request, Chunk.ERROR, body, last=True)]

    # -- inside: states -------------------------------------------------------

    def _move(self, what: Input) -> None:
        after = NEXT.get((self.state, what))
        if after is None:
            raise LocalProtocolError(f"NBD server: {what.value}, {self.state.value}")
        self.state = after

    def _close(self, what: Input) -> None:
        self._move(what)
        self._buffer.clear()
        self._events.clear()
        self._open.clear()

    def _break(self, text: str) -> None:
        self._close(Input.BROKEN)
        raise RemoteProtocolError(text)

    def _answered(self, request: Request) -> None:
        try:
            self._open.remove(request)
        except KeyError:
            raise LocalProtocolError(f"nobody waits for {request}") from None

    # -- inside: bytes in -----------------------------------------------------

    def _step(self) -> bool:
        """Take one thing from the buffer; whether there may be another."""
        if self._dropping:
            count = min(self._dropping, len(self._buffer))
            del self._buffer[:count]
            self._dropping -= count
            if self._dropping:
                return False
        if self._after is not None:
            self._ask(self._after)
            self._after = None
        match self.state:
            case State.TRANSMISSION:
                return self._requests()
            case State.CLIENT_FLAGS:
                return self._client_flags()
            case State.OPTIONS:
                return self._option()
            case State.TLS if self._buffer:
                raise RemoteProtocolError(
                    "an NBD client went on in plain text after STARTTLS"
                )
        self._buffer.clear()  # what comes after a goodbye
        return False

    def _client_flags(self) -> bool:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return False
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: wire.CLIENT_FLAGS.size]
        if flags & ~_CLIENT_FLAGS:
            raise RemoteProtocolError(f"an NBD client has unknown flags {flags:#x}")
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self.agreed.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self._move(Input.FLAGS)
        return True

    def _option(self) -> bool:
        size = wire.OPTION_HEADER.size
        if len(self._buffer) < size:
            return False
        magic, number, length = wire.OPTION_HEADER.unpack_from(self._buffer)
        if magic != wire.IHAVEOPT:
            raise RemoteProtocolError(f"an NBD option has magic {bytes(magic)!r}")
        if number != Option.EXPORT_NAME and not self._fixed:
            raise RemoteProtocolError("an NBD client lacks the fixed newstyle")
        if length > MAX_OPTION:
            self._count_option()
            self._too_long(number, length)
            del self._buffer[:size]
            self._dropping = length
            return True
        if len(self._buffer) < size + length:
            return False
        self._count_option()
        data = bytes(self._buffer[size : size + length])
        del self._buffer[: size + length]
        after, replies = self.agreed.answer(number, data)
        self._outgoing += replies
        match after:
            case Next.START_TLS:
                self._move(Input.START_TLS)
                self._events.append(StartTls())
            case Next.ENTER:
                self._move(Input.ENTERED)
                if self.agreed.extended:
                    self._layout = wire.EXTENDED_REQUEST
                    self._magic = wire.EXTENDED_REQUEST_MAGIC
                self._events.append(Entered(self.agreed.name))
            case Next.LEAVE:
                self._move(Input.GOODBYE)
                self._events.append(Goodbye())
        return True

    def _count_option(self) -> None:
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise RemoteProtocolError(f"an NBD client sent {MAX_OPTIONS} options")

    def _too_long(self, number: int, length: int) -> None:
        if number == Option.EXPORT_NAME or length > MAX_DROPPED:
            raise RemoteProtocolError(f"an NBD option of {length} bytes")
        text = f"{length} bytes, {MAX_OPTION} are taken"
        self._outgoing += self.agreed.refuse(number, Reply.ERR_TOO_BIG, text)

    def _requests(self) -> bool:
        """Take all whole requests; true after one whose payload is to be dropped."""
        buffer, layout, size = self._buffer, self._layout, self._layout.size
        at, end = 0, len(buffer) - size
        while at <= end and len(self._open) < self._max_requests:
            magic, flags, command, cookie, offset, length = layout.unpack_from(
                buffer, at
            )
            if magic != self._magic:
                raise RemoteProtocolError(f"an NBD request has magic {magic:#x}")
            at += size
            if command == _DISC:
                self._move(Input.GOODBYE)
                self._events.append(Goodbye())
                break
            request = Request(command, flags, cookie, offset, length)
            self._check(request)
            if command == _WRITE or (flags & _PAYLOAD_LEN and self.agreed.extended):
                if length > MAX_DROPPED:
                    raise RemoteProtocolError(f"an NBD client sends {request}")
                self._dropping = length
                self._after = request
                break
            self._ask(request)
        del buffer[:at]
        return self.state is State.LEAVING or self._after is not None

    def _ask(self, request: Request) -> None:
        self._open.add(request)
        self._events.append(request)

    def _check(self, request: Request) -> None:
        """Say what is wrong with a request, in its ``error`` and ``reason``."""
        offer, agreed = self.agreed.offer, self.agreed
        if offer is None:
            raise LocalProtocolError("no NBD export")
        error, command = Error.EINVAL, request.command
        unit = offer.minimum_block
        end = request.offset + request.length
        allowed = _ALLOWED.get(command)
        if command in _CHANGES:
            error, reason = Error.EPERM, "this export is read-only"
        elif allowed is None:
            reason = "not a command this server knows"
        elif request.flags & ~allowed or (
            request.flags & _DF and not agreed.structured
        ):
            reason = f"flags {request.flags:#x} don't belong to this command"
        elif not request.offset < end <= offer.size:
            reason = f"outside of the export's {offer.size} bytes"
        elif request.offset % unit or (end % unit and end != offer.size):
            reason = f"not aligned to {unit} bytes"
        elif command == _READ and request.length > offer.maximum_block:
            if request.flags & _DF:
                error = Error.EOVERFLOW
            reason = f"more than {offer.maximum_block} bytes at once"
        elif command == Command.BLOCK_STATUS and not agreed.allocation:
            reason = "no context was agreed on for this export"
        else:
            return
        request.error, request.reason = error, f"{request}: {reason}"

    # -- inside: bytes out ----------------------------------------------------

    def _data_head(
        self, request: Request, at: int, length: int, *, last: bool
    ) -> bytes:
        agreed = self.agreed
        if agreed.extended:
            head = (wire.EXTENDED_REPLY_MAGIC, int(last), Chunk.OFFSET_DATA)
            place = (request.cookie, request.offset, length + 8, at)
            return _EXTENDED_DATA_HEAD.pack(*head, *place)
        if agreed.structured:
            return _DATA_HEAD.pack(
                wire.STRUCTURED_REPLY_MAGIC,
                *(int(last), Chunk.OFFSET_DATA, request.cookie, length + 8, at),
            )
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def _chunk(
        self, request: Request, kind: Chunk, body: bytes, *, last: bool
    ) -> bytes:
        flags = wire.REPLY_FLAG_DONE if last else 0
        if self.agreed.extended:
            head = (wire.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie)
            return wire.EXTENDED_REPLY.pack(*head, request.offset, len(body)) + body
        head = (wire.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie)
        return wire.STRUCTURED_REPLY.pack(*head, len(body)) + body


def _runs(pieces: Sequence[Buffer | Hole]) -> list[tuple[bool, int, list[Buffer]]]:
    """Join neighbours: (is it a hole, length, its buffers); short holes are data."""
    runs: list[tuple[bool, int, list[Buffer]]] = []
    for piece in pieces:
        hole = isinstance(piece, Hole) and piece.length >= MIN_HOLE
        length = piece.length if isinstance(piece, Hole) else len(piece)
        if not length:
            continue
        buffers = [] if hole else _filled([piece])
        if runs and runs[-1][0] is hole:
            _, before, already = runs.pop()
            length, buffers = length + before, already + buffers
        runs.append((hole, length, buffers))
    return runs


def _filled(pieces: Sequence[Buffer | Hole]) -> list[Buffer]:
    """Return the pieces with zeroes in their holes, all from one buffer."""
    out: list[Buffer] = []
    for piece in pieces:
        if isinstance(piece, Hole):
            whole, rest = divmod(piece.length, len(_ZEROES))
            out += [_ZEROES] * whole
            if rest:
                out.append(_ZEROES[:rest])
        elif piece:
            out.append(piece)
    return out


def _told(
    runs: Iterable[tuple[int, int]], length: int, most: int
) -> list[tuple[int, int]]:
    """Join neighbours of one kind, cut at ``length`` and after ``most`` of them."""
    told: list[tuple[int, int]] = []
    for run, flags in runs:
        run = max(0, min(run, length))
        if run:
            if told and told[-1][1] == flags:
                told[-1] = told[-1][0] + run, flags
            elif len(told) == most:
                break
            else:
                told.append((run, flags))
        length -= run
        if not length:
            break
    return told
