# SPDX-License-Identifier: Apache-2.0
r"""PTCOMM: what bacula-fd's plugin and its backend say to each other on two pipes.

Theory of operation. Every packet is eight header bytes, a status letter, six decimal
digits and a newline, followed by exactly that many payload bytes::

    C000013\nHello Bacula\n     D065536\n<65,536 bytes>     F000000\n

Text payloads end in a newline, which is counted. ``F`` acknowledges or ends data, ``T``
is the last packet of a session. :class:`PtcommConnection` turns received bytes into
packets and packets into buffers to write; it is filled in place, and the payload of a
``D`` packet is a view into its buffer. During a restore bacula-fd sends ``D`` packets
of one length by the thousand; their headers are foreseen and received beside the
buffer, so that the payloads come to lie in a row and are handed out as one. What the
texts say is in ``ptcomm_words.py``, the order of packets in the adapter
(``pveplug/bacula.py``), and all of it byte by byte in docs/protocols/ptcomm.md.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto.buffer import ReceiveBuffer
from pveplug.units import KiB

Buffer = bytes | bytearray | memoryview

HEADER: Final = 8
MAX_PAYLOAD: Final = 999_999
"""Six digits."""
MAX_TEXT: Final = 64 * KiB
"""No command or message is longer; a file name and a plugin string are far below."""
MAX_DATA_FRAME: Final = 256 * KiB
"""What we send at most: faster than larger ones through a pipe of 1 MiB."""
MAX_MESSAGE: Final = 1500
"""Bytes of one message line, newline included: Bacula formats into 2,000."""
MAX_MESSAGE_LINES: Final = 30
PROTOCOL: Final = 3
CAPACITY: Final = 1088 * KiB
"""Holds the largest packet whole: 8 + 999,999 bytes."""
_SHORTEST: Final = 4 * KiB
"""Shorter ``D`` packets aren't worth being foreseen."""
_JOINED: Final = 512 * KiB
_HEADS: Final = 32


class Status(enum.Enum):
    """The letter a packet begins with."""

    COMMAND = "C"
    DATA = "D"
    END_OF_DATA = "F"
    TERMINATE = "T"
    ERROR = "E"  # a job error, and what was asked for has failed
    ABORT = "A"  # the job fails
    NONFATAL = "Q"  # a job error; the session goes on
    WARNING = "W"
    INFO = "I"
    SAVED = "S"
    NOT_SAVED = "N"
    RESTORED = "R"
    SKIPPED = "P"
    OPERATOR = "O"
    EVENT = "V"


FROM_PLUGIN: Final = frozenset(
    {
        Status.COMMAND,
        Status.DATA,
        Status.END_OF_DATA,
        Status.TERMINATE,
        Status.ERROR,
    }
)
"""What the plugin inside bacula-fd may send to us."""
FROM_BACKEND: Final = frozenset(Status)
_EMPTY: Final = frozenset({Status.END_OF_DATA, Status.TERMINATE})
_LETTERS: Final = {status.value.encode(): status for status in Status}


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet; the ``data`` of a DATA packet is a view, valid for a while."""

    status: Status
    data: bytes | memoryview = b""

    @property
    def text(self) -> str:
        """The payload as text without trailing blanks and newline."""
        return bytes(self.data).decode("utf-8", "surrogateescape").rstrip(" \t\r\n\0")

    def __str__(self) -> str:
        """Return the packet as errors and the debug log show it, elided."""
        if self.status is Status.DATA:
            return f"D of {len(self.data)} bytes"
        return f"{self.status.value} {elided(self.data)}" if self.data else self.name

    @property
    def name(self) -> str:
        """The letter with its meaning: ``"F (end of data)"``."""
        return f"{self.status.value} ({self.status.name.lower().replace('_', ' ')})"


def elided(data: Buffer, limit: int = 60) -> str:
    """Show bytes in one line, at most ``limit`` of them."""
    shown = repr(bytes(memoryview(data)[:limit]))[1:]
    return f"{shown}... ({len(data)} bytes)" if len(data) > limit else shown


def header(status: Status, length: int) -> bytes:
    """The eight bytes in front of a payload of ``length`` bytes.

    Raises:
        LocalProtocolError: the payload is longer than a packet can carry.
    """
    if not 0 <= length <= MAX_PAYLOAD:
        raise LocalProtocolError(f"a packet cannot carry {length} bytes")
    return b"%b%06d\n" % (status.value.encode(), length)


def command(text: str) -> bytes:
    """A whole ``C`` packet.

    Raises:
        LocalProtocolError: the text has line breaks, is empty or too long.
    """
    payload = text.encode("utf-8", "surrogateescape") + b"\n"
    if len(payload) > MAX_TEXT or payload == b"\n":
        raise LocalProtocolError(f"a command cannot have {len(payload) - 1} bytes")
    if any(char in payload[:-1] for char in b"\n\r\0"):
        raise LocalProtocolError(f"line break in command {elided(payload)}")
    return header(Status.COMMAND, len(payload)) + payload


END_OF_DATA: Final = header(Status.END_OF_DATA, 0)
TERMINATE: Final = header(Status.TERMINATE, 0)

# Tabs become blanks, every other control character goes: C0, DEL and C1.
CONTROL: Final = {code: None for code in (*range(32), *range(127, 160))} | {9: " "}


def message(status: Status, text: str) -> list[bytes]:
    """Whole packets that carry ``text``, one for each of its lines.

    Control characters are removed, a line above MAX_MESSAGE bytes loses its middle,
    lines beyond MAX_MESSAGE_LINES are counted instead of sent.
    """
    lines = [
        clean
        for line in text.splitlines()
        if (clean := line.translate(CONTROL).strip())
    ]
    if len(lines) > MAX_MESSAGE_LINES:
        left_out = len(lines) - MAX_MESSAGE_LINES + 1
        lines[MAX_MESSAGE_LINES - 1 :] = [f"({left_out} more lines left out)"]
    packets = []
    for line in lines:
        payload = line.encode("utf-8", "replace")
        if len(payload) >= MAX_MESSAGE:
            head, tail = payload[: MAX_MESSAGE - 506], payload[-500:]
            # A cut may fall inside a character: "ignore" drops its other half.
            payload = (
                head.decode("utf-8", "ignore") + "…" + tail.decode("utf-8", "ignore")
            ).encode()
        packets.append(header(status, len(payload) + 1) + payload + b"\n")
    return packets


def data_frames(buffers: Iterable[Buffer]) -> list[Buffer]:
    """``D`` packets for the bytes of ``buffers`` in a row, ready for ``writev``.

    Payloads are views on what was given, nothing is copied, no packet is empty.
    """
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    left = sum(len(view) for view in views)
    frames: list[Buffer] = []
    room = 0
    for view in views:
        at = 0
        while at < len(view):
            # Never an empty D packet: to the plugin it looks like the end of data.
            if not room:
                room = min(left, MAX_DATA_FRAME)
                frames.append(header(Status.DATA, room))
            count = min(room, len(view) - at)
            frames.append(view[at : at + count])
            at += count
            room -= count
            left -= count
    return frames


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """Bytes to come of the present packet; the length of it and of those to come."""

    first: int
    length: int


class PtcommConnection:
    """The framing of one direction-pair: bytes in, packets out; packets in, bytes out.

    An adapter receives into :meth:`get_buffer`, says how much arrived by
    :meth:`buffer_updated` and asks :meth:`next_packet` until that has none; or into
    :meth:`get_buffers`, which joins ``D`` packets, and says :meth:`buffers_updated`.
    Whoever doesn't care for copies uses :meth:`receive_data`.

    The buffer's bytes in order::

        | joined payload | what has come of the present packet or header | space |
    """

    def __init__(self, accepts: Collection[Status] = FROM_PLUGIN) -> None:
        self._accepts = accepts
        self._buffer = ReceiveBuffer(CAPACITY)
        self._status: Status | None = None  # of the packet whose payload is awaited
        self._length = 0
        self._ready = 0  # bytes of joined payload
        self._repeated = 0  # length of the last packet, if D and worth foreseeing
        self._foreseen: _Foreseen | None = None  # what get_buffers() has given out
        self._heads = memoryview(bytearray(HEADER * _HEADS))
        self._finished = False
        self._error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the peer has sent its last packet, ``T``."""
        return self._finished

    def get_buffer(self) -> memoryview:
        """Where to receive; empty: call :meth:`next_packet` until it has none, first.

        Bytes of a packet that was handed out are never overwritten.
        """
        wanted = HEADER if self._status is None else self._length
        if len(self._buffer) < wanted:
            self._buffer.make_room(wanted, comfortable=256 * KiB)
        return self._buffer.space()

    def buffer_updated(self, count: int) -> None:
        """``count`` bytes of what :meth:`get_buffer` gave have been received."""
        self._buffer.filled(count)

    def get_buffers(self) -> list[memoryview]:
        """Where ``readv`` shall receive; empty as with :meth:`get_buffer`.

        After a long ``D`` packet others of the same length are expected: every second
        place is for a header then, and the payloads between them touch.
        """
        space = self.get_buffer()
        length, came = self._repeated, len(self._buffer) - self._ready
        within = self._status is Status.DATA and came < self._length
        self._foreseen = None
        if within and self._length == length:
            first = length - came
        elif length and self._status is None and not came:
            first = 0
        else:
            return [space] if space else []
        # Room is left for headers: those foreseen wrongly are put back in line.
        room = min(len(space) - HEADER * _HEADS, _JOINED) - first
        count = min(room // length, _HEADS)
        buffers = [space[:first]] if first else []
        if count < 1:
            return buffers  # or nothing, until the joined payload is taken
        self._foreseen = _Foreseen(first, length)
        for number in range(count):
            buffers.append(self._head(number))
            buffers.append(space[first + number * length :][:length])
        return buffers

    def buffers_updated(self, count: int) -> None:
        """``count`` bytes of what :meth:`get_buffers` gave have been received."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None or count < foreseen.first:
            self._buffer.filled(count)
            return
        length, space = foreseen.length, self._buffer.space()[foreseen.first :]
        self._buffer.filled(foreseen.first)
        if foreseen.first:
            self._ready += length
            self._status = None
        left, step = count - foreseen.first, HEADER + length
        expected = header(Status.DATA, length)
        number = 0
        while left >= HEADER and self._head(number) == expected:
            payload = min(left - HEADER, length)
            self._buffer.filled(payload)
            left -= HEADER + payload
            number += 1
            if payload < length:
                self._status, self._length = Status.DATA, length
            else:
                self._ready += length
        # Something else, or half of a header: back in front of what follows it.
        line = bytearray()
        for at in range(0, left, step):
            behind = space[number * length :][: max(min(left - at, step) - HEADER, 0)]
            line += self._head(number)[: left - at]
            line += behind
            number += 1
        self._buffer.space()[: len(line)] = line
        self._buffer.filled(len(line))

    def _head(self, number: int) -> memoryview:
        return self._heads[HEADER * number : HEADER * (number + 1)]

    def next_packet(self) -> Packet | None:
        """The next complete packet; the data of the previous one becomes invalid.

        The data of ``D`` packets that were joined comes as that of one.

        Raises:
            RemoteProtocolError: the peer isn't speaking PTCOMM.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        self._buffer.release()
        if self._ready:
            ready, self._ready = self._ready, 0
            return Packet(Status.DATA, self._buffer.take(ready))
        if self._status is None and not self._parse_header():
            return None
        status = self._status
        if status is None or len(self._buffer) < self._length:
            return None
        self._status = None
        worth = status is Status.DATA and _SHORTEST <= self._length <= _JOINED // 2
        self._repeated = self._length if worth else 0
        if status is Status.DATA:
            return Packet(status, self._buffer.take(self._length))
        payload = bytes(self._buffer.peek(self._length))
        self._buffer.skip(self._length)
        self._finished = status is Status.TERMINATE
        return Packet(status, payload)

    def receive_data(self, data: Buffer) -> list[Packet]:
        """Take what arrived; return the packets it completed, each with its own bytes.

        Raises:
            RemoteProtocolError: the peer isn't speaking PTCOMM; packets completed by
                the same call are lost, the connection is over anyway.
        """
        packets = []
        rest = memoryview(data)
        while rest:
            space = self.get_buffer()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            self.buffer_updated(count)
            rest = rest[count:]
            while (packet := self.next_packet()) is not None:
                packets.append(Packet(packet.status, bytes(packet.data)))
        return packets

    def receive_eof(self) -> None:
        """The peer closed its end.

        Raises:
            RemoteProtocolError: it did so within a packet, or before ``T``.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        got = len(self._buffer) - self._ready
        if self._status is not None:
            raise self._broken(
                f"expected {self._length} bytes of a {self._status.value} packet, "
                f"the pipe was closed after {got}"
            )
        if got:
            raise self._broken(
                f"expected a header of {HEADER} bytes, the pipe was closed after "
                f"{elided(self._buffer.peek(HEADER))}"
            )
        if not self._finished:
            raise self._broken("expected a packet, the pipe was closed")

    def _parse_header(self) -> bool:
        head = bytes(self._buffer.peek(HEADER))
        if not head:
            return False
        if self._finished:
            raise self._broken(f"expected nothing after T, got {self._shown()}")
        status = _LETTERS.get(head[:1])
        if status is None or status not in self._accepts:
            letters = "".join(
                sorted(status.value for status in Status if status in self._accepts)
            )
            raise self._broken(
                f"expected a packet that begins with one of {letters}, "
                f"got {self._shown()}"
            )
        # Not isdigit() on text: that takes the digits of every script.
        digits = head[1 : HEADER - 1]
        if (digits and not digits.isdigit()) or head[HEADER - 1 :] not in (b"", b"\n"):
            raise self._broken(
                f"expected {head[:1].decode()}, six digits and a newline, "
                f"got {self._shown()}"
            )
        if len(head) < HEADER:
            return False
        length = int(digits)
        if status in _EMPTY and length:
            raise self._broken(
                f"expected {status.value} without payload, got {self._shown()}"
            )
        if status not in _EMPTY and status is not Status.DATA and length > MAX_TEXT:
            raise self._broken(
                f"expected at most {MAX_TEXT} bytes of text in a {status.value} "
                f"packet, got {length}"
            )
        self._buffer.skip(HEADER)
        self._status, self._length = status, length
        return True

    def _shown(self) -> str:
        return elided(self._buffer.peek(1000))

    def _broken(self, text: str) -> RemoteProtocolError:
        self._error = f"PTCOMM: {text}"
        return RemoteProtocolError(self._error)
