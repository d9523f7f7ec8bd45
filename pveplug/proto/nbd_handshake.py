# SPDX-License-Identifier: Apache-2.0
"""The client's half of NBD's fixed newstyle handshake, as straight-line code.

:func:`handshake` is a generator. It yields what it wants next: a memoryview to fill
to its end, or :class:`StartTls` when the connection must be wrapped before it goes on.
What it has to say goes to ``send``. It returns the :class:`Export` it was given.

::

    greeting, client flags
      [STARTTLS -> ACK, then everything below inside TLS]
      EXTENDED_HEADERS -> ACK (implies structured replies)
                       -> refused: STRUCTURED_REPLY -> ACK | refused: simple replies
      [SET_META_CONTEXT -> granted contexts]         only with structured replies
      GO with BLOCK_SIZE -> EXPORT, BLOCK_SIZE, ACK
                         -> unknown option: EXPORT_NAME, no more options
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from pveplug.errors import NbdError, RemoteProtocolError
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import HandshakeFlag, Info, Option, Reply, TransmissionFlag

T = TypeVar("T")

MAX_OPTION_REPLY: Final = 64 * 1024
"""A name or a message is at most 4096 bytes; sixteen times that is no honest reply."""


@dataclass(frozen=True, slots=True)
class StartTls:
    """Wrap the connection in TLS now, then call ``tls_established()``."""


Steps = Generator[memoryview | int | StartTls, None, T]
"""Yields a view to fill, a number of bytes to throw away, or the TLS step."""


@dataclass(frozen=True, slots=True)
class Export:
    """What the server said of the export; sizes in bytes."""

    size: int
    flags: TransmissionFlag
    minimum_block: int
    preferred_block: int
    maximum_block: int
    structured: bool
    extended: bool
    contexts: dict[int, str]
    """Context id -> name, of the contexts the server granted."""


def take(length: int) -> Steps[bytearray]:
    """Receive exactly ``length`` bytes into a buffer of their own."""
    data = bytearray(length)
    if length:
        yield memoryview(data)
    return data


def handshake(
    name: str, contexts: Sequence[str], tls: bool, send: Callable[[bytes], None]
) -> Steps[Export]:
    """Negotiate ``name`` up to the transmission phase.

    Raises:
        NbdError: the server refused the export, or TLS, or demands TLS.
        RemoteProtocolError: it isn't speaking fixed newstyle NBD.
    """
    flags = yield from _greeting()
    reply = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    send(wire.CLIENT_FLAGS.pack(reply))
    if tls:
        yield from _start_tls(send)
    extended = yield from _offered(Option.EXTENDED_HEADERS, send)
    structured = extended or (yield from _offered(Option.STRUCTURED_REPLY, send))
    granted: dict[int, str] = {}
    if structured and contexts:
        granted = yield from _meta_contexts(name, contexts, send)
    going = yield from _go(name, send)
    if going is None:
        going = yield from _export_name(name, flags, send)
    size, transmission, block = going
    return Export(size, transmission, *block, structured, extended, granted)


def _greeting() -> Steps[HandshakeFlag]:
    raw = yield from take(wire.GREETING.size)
    password, magic, flags = wire.GREETING.unpack(raw)
    if password != wire.INIT_PASSWD:
        raise RemoteProtocolError(f"not an NBD server: it greeted with {password!r}")
    if int.from_bytes(magic, "big") == wire.OLDSTYLE_MAGIC:
        raise RemoteProtocolError("the NBD server speaks the oldstyle handshake only")
    if magic != wire.IHAVEOPT:
        raise RemoteProtocolError(f"NBD greeting has magic {magic!r}")
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise RemoteProtocolError("the NBD server lacks the fixed newstyle handshake")
    return HandshakeFlag(flags & 3)


def _replies(number: Option) -> Steps[tuple[int, bytearray]]:
    """Receive one reply to ``number``: its type and its data."""
    raw = yield from take(wire.OPTION_REPLY.size)
    magic, echoed, kind, length = wire.OPTION_REPLY.unpack(raw)
    if magic != wire.OPTION_REPLY_MAGIC:
        raise RemoteProtocolError(f"NBD option reply has magic {magic:#x}")
    if echoed != number:
        raise RemoteProtocolError(f"NBD reply to option {echoed}, asked was {number}")
    if length > MAX_OPTION_REPLY:
        raise RemoteProtocolError(f"NBD option reply of {length} bytes")
    if kind == Reply.ACK and length:
        raise RemoteProtocolError(f"NBD ACK of {number.name} carries {length} bytes")
    data = yield from take(length)
    return kind, data


def _start_tls(send: Callable[[bytes], None]) -> Steps[None]:
    send(wire.option(Option.STARTTLS))
    kind, data = yield from _replies(Option.STARTTLS)
    if kind != Reply.ACK:
        raise NbdError(f"NBD server refused TLS: {_said(kind, data)}")
    yield StartTls()


def _offered(number: Option, send: Callable[[bytes], None]) -> Steps[bool]:
    send(wire.option(number))
    kind, data = yield from _replies(number)
    if kind == Reply.ACK:
        return True
    if not kind & wire.REPLY_ERROR:
        raise RemoteProtocolError(f"NBD {number.name} answered by {_said(kind, data)}")
    if kind == Reply.ERR_TLS_REQD:
        raise NbdError("the NBD server demands TLS: configure a certificate for it")
    return False


def _meta_contexts(
    name: str, wanted: Sequence[str], send: Callable[[bytes], None]
) -> Steps[dict[int, str]]:
    """Ask for contexts; a refusal is an empty answer, GO will tell the reason."""
    queries = b"".join(wire.named(query) for query in wanted)
    count = struct.pack(">I", len(wanted))
    send(wire.option(Option.SET_META_CONTEXT, wire.named(name) + count + queries))
    granted: dict[int, str] = {}
    while True:
        kind, data = yield from _replies(Option.SET_META_CONTEXT)
        if kind == Reply.ACK:
            return granted
        if kind & wire.REPLY_ERROR:
            return {}
        if kind != Reply.META_CONTEXT or len(data) < 5:
            said = _said(kind, data)
            raise RemoteProtocolError(f"NBD SET_META_CONTEXT answered by {said}")
        number = int.from_bytes(data[:4], "big")
        context = data[4:].decode("utf-8", "replace")
        if context not in wanted or context in granted.values() or number in granted:
            raise RemoteProtocolError(f"NBD server granted unasked {context[:80]!r}")
        granted[number] = context


_Going = tuple[int, TransmissionFlag, tuple[int, int, int]]
# Servers that don't say: the specification's defaults, except that a minimum of 1 lets
# the tail of an odd-sized export be read; such servers read any range.
_BLOCK_DEFAULTS: Final = (1, 4096, wire.DEFAULT_MAXIMUM_BLOCK)


def _go(name: str, send: Callable[[bytes], None]) -> Steps[_Going | None]:
    """Enter transmission; None when the server doesn't know GO."""
    asked = struct.pack(">HH", 1, Info.BLOCK_SIZE)
    send(wire.option(Option.GO, wire.named(name) + asked))
    export: tuple[int, TransmissionFlag] | None = None
    block = _BLOCK_DEFAULTS
    while True:
        kind, data = yield from _replies(Option.GO)
        if kind == Reply.INFO:
            info = int.from_bytes(data[:2], "big") if len(data) >= 2 else -1
            if info == Info.EXPORT:
                if len(data) != wire.INFO_EXPORT.size:
                    raise RemoteProtocolError("NBD INFO_EXPORT has a wrong length")
                _, size, flags = wire.INFO_EXPORT.unpack(data)
                export = size, TransmissionFlag(flags & 0x1FFF)
            elif info == Info.BLOCK_SIZE:
                block = _block_sizes(data)
            elif info < 0:
                raise RemoteProtocolError("NBD INFO reply without a type")
        elif kind == Reply.ACK:
            if export is None:
                raise RemoteProtocolError("NBD server acknowledged GO without a size")
            return (*_checked(*export), block)
        elif kind == Reply.ERR_UNSUP:
            return None
        elif kind & wire.REPLY_ERROR:
            raise NbdError(f"NBD export {name!r} refused: {_said(kind, data)}")
        else:
            raise RemoteProtocolError(f"NBD GO answered by {_said(kind, data)}")


def _export_name(
    name: str, flags: HandshakeFlag, send: Callable[[bytes], None]
) -> Steps[_Going]:
    # No length field here and no way to refuse but hanging up ("NBD_OPT_EXPORT_NAME").
    send(wire.option(Option.EXPORT_NAME, name.encode()))
    raw = yield from take(wire.EXPORT_NAME_REPLY.size)
    size, transmission = wire.EXPORT_NAME_REPLY.unpack(raw)
    if not flags & HandshakeFlag.NO_ZEROES:
        yield from take(124)
    known = TransmissionFlag(transmission & 0x1FFF)
    return (*_checked(size, known), _BLOCK_DEFAULTS)


def _checked(size: int, flags: TransmissionFlag) -> tuple[int, TransmissionFlag]:
    if size >= 1 << 63:
        raise RemoteProtocolError(f"NBD export claims {size} bytes")
    if not flags & TransmissionFlag.HAS_FLAGS:
        raise RemoteProtocolError("NBD transmission flags without HAS_FLAGS")
    return size, flags


def _block_sizes(data: bytearray) -> tuple[int, int, int]:
    if len(data) != wire.INFO_BLOCK_SIZE.size:
        raise RemoteProtocolError("NBD INFO_BLOCK_SIZE has a wrong length")
    _, minimum, preferred, maximum = wire.INFO_BLOCK_SIZE.unpack(data)
    sound = (
        0 < minimum <= 65536
        and minimum & (minimum - 1) == 0
        and minimum <= preferred <= maximum
        and (maximum == wire.UINT32_MAX or maximum % minimum == 0)
    )
    if not sound:
        said = f"{minimum}/{preferred}/{maximum}"
        raise RemoteProtocolError(f"NBD block sizes {said} contradict each other")
    return minimum, preferred, maximum


def _said(kind: int, data: bytes | bytearray) -> str:
    """Return a reply's name with the server's words, if it sent any."""
    words = " ".join(data.decode("utf-8", "replace").split())[:200]
    return wire.reply_name(kind) + (f" ({words})" if words else "")
