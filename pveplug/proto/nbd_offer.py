# SPDX-License-Identifier: Apache-2.0
"""The server's half of NBD's handshake: each option with its answer.

What was agreed stands in :class:`Negotiation`; its only verb is :meth:`answer`, which
returns replies and what the connection does next. Whatever an option says that isn't
understood is refused by an NBD_REP_ERR_*; the connection goes on.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Info, Option, Reply, TransmissionFlag

MAX_QUERIES: Final = 64
"""Contexts in one LIST_META_CONTEXT or SET_META_CONTEXT; there is one to be had."""
MAX_INFOS: Final = 64
ALLOCATION_ID: Final = 1


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client is told of an export; sizes in bytes.

    ``minimum_block`` is a power of two up to 64 KiB, ``maximum_block`` a multiple of
    it: the longest READ that is answered.
    """

    size: int
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = wire.DEFAULT_MAXIMUM_BLOCK
    description: str = ""

    def __post_init__(self) -> None:
        unit, longest = self.minimum_block, self.maximum_block
        sound = (
            0 <= self.size < 1 << 63
            and 0 < unit <= 65536
            and unit & (unit - 1) == 0
            and unit <= self.preferred_block <= longest < 1 << 31
            and not longest % unit
        )
        if not sound:
            raise LocalProtocolError(f"{self} is no NBD export")


class Next(enum.Enum):
    """What the connection does after an option."""

    GO_ON = "wait for the next option"
    START_TLS = "wrap the connection in TLS"
    ENTER = "begin transmission"
    LEAVE = "close: the client has said goodbye"


class _Refusal(Exception):  # noqa: N818  # never leaves this module
    def __init__(self, reply: Reply, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


@dataclass(slots=True)
class Negotiation:
    """What a client and this server have agreed so far.

    Args:
        exports: what there is; looked at anew for each option. The name "" also finds
            an export that is the only one.
        tls: nothing but STARTTLS is answered in plain text.
        no_zeroes: the client's flag of that name.
    """

    exports: Mapping[str, Offer]
    tls: bool = False
    no_zeroes: bool = False
    secured: bool = False
    structured: bool = False
    extended: bool = False
    name: str = ""
    """The export entered, by its name in ``exports``."""
    offer: Offer | None = None
    allocation: bool = False
    """``base:allocation`` was granted for the export entered."""
    _granted_for: str | None = None
    _replies: list[bytes] = field(default_factory=list)

    def answer(self, number: int, data: bytes) -> tuple[Next, list[bytes]]:
        """Take one option; return what comes next, and the replies to send.

        Raises:
            RemoteProtocolError: EXPORT_NAME can't be granted, and has no refusal.
        """
        self._replies = []
        if number == Option.EXPORT_NAME:
            return self._export_name(data), self._replies
        try:
            handler = _HANDLERS.get(number)
            demanded = number in (Option.STARTTLS, Option.ABORT)
            if self.tls and not self.secured and not demanded:
                raise _Refusal(Reply.ERR_TLS_REQD, "this server demands TLS")
            if handler is None:
                raise _Refusal(Reply.ERR_UNSUP, "unknown option")
            after = handler(self, number, data)
        except _Refusal as refusal:
            self.refuse(number, refusal.reply, refusal.text)
            after = Next.GO_ON
        return after, self._replies

    def refuse(self, number: int, reply: Reply, text: str) -> list[bytes]:
        """Refuse an option whatever it says."""
        self._reply(number, reply, text.encode())
        return self._replies

    def secure(self) -> None:
        """TLS is up: what was agreed before it counts no more ("NBD_OPT_STARTTLS")."""
        self.secured = True
        self.structured = self.extended = False
        self._granted_for = None

    @property
    def flags(self) -> TransmissionFlag:
        """The transmission flags of any export of ours."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.READ_ONLY
            | TransmissionFlag.CAN_MULTI_CONN
        )
        return flags | TransmissionFlag.SEND_DF if self.structured else flags

    # -- one method per option ------------------------------------------------

    def _export_name(self, data: bytes) -> Next:
        # This option has no reply but the export, so a refusal is to hang up.
        if self.tls and not self.secured:
            raise RemoteProtocolError("an NBD client named an export before TLS")
        try:
            name, offer = self._find(_text(data))
        except _Refusal as refusal:
            raise RemoteProtocolError(f"NBD EXPORT_NAME: {refusal.text}") from None
        self._replies.append(wire.EXPORT_NAME_REPLY.pack(offer.size, self.flags))
        if not self.no_zeroes:
            self._replies.append(bytes(124))
        return self._enter(name, offer)

    def _abort(self, number: int, data: bytes) -> Next:
        self._reply(number, Reply.ACK)
        return Next.LEAVE

    def _start_tls(self, number: int, data: bytes) -> Next:
        _empty(data)
        if not self.tls:
            raise _Refusal(Reply.ERR_POLICY, "this server has no certificate")
        if self.secured:
            raise _Refusal(Reply.ERR_INVALID, "TLS is up already")
        self._reply(number, Reply.ACK)
        return Next.START_TLS

    def _list(self, number: int, data: bytes) -> Next:
        _empty(data)
        for name in self.exports:
            self._reply(number, Reply.SERVER, wire.named(name))
        self._reply(number, Reply.ACK)
        return Next.GO_ON

    def _structured_reply(self, number: int, data: bytes) -> Next:
        _empty(data)
        if self.extended:
            raise _Refusal(Reply.ERR_EXT_HEADER_REQD, "extended headers are agreed")
        if self.structured:
            raise _Refusal(Reply.ERR_INVALID, "structured replies are agreed already")
        self.structured = True
        self._reply(number, Reply.ACK)
        return Next.GO_ON

    def _extended_headers(self, number: int, data: bytes) -> Next:
        _empty(data)
        if self.extended:
            raise _Refusal(Reply.ERR_INVALID, "extended headers are agreed already")
        self.structured = self.extended = True
        self._reply(number, Reply.ACK)
        return Next.GO_ON

    def _meta_context(self, number: int, data: bytes) -> Next:
        setting = number == Option.SET_META_CONTEXT
        if setting:
            self._granted_for = None  # a failed attempt takes back an earlier one
        fields = _Fields(data)
        asked = fields.string()
        queries = [fields.string() for _ in range(fields.count(MAX_QUERIES))]
        fields.end()
        if not self.structured:
            raise _Refusal(Reply.ERR_INVALID, "structured replies come first")
        name, _ = self._find(asked)
        wanted = {wire.BASE_ALLOCATION} if setting else {wire.BASE_ALLOCATION, "base:"}
        if wanted & set(queries) or not (setting or queries):
            # LIST has no use for the number, and the specification wants 0 there.
            identity = struct.pack(">I", ALLOCATION_ID if setting else 0)
            context = identity + wire.BASE_ALLOCATION.encode()
            self._reply(number, Reply.META_CONTEXT, context)
            if setting:
                self._granted_for = name
        self._reply(number, Reply.ACK)
        return Next.GO_ON

    def _information(self, number: int, data: bytes) -> Next:
        fields = _Fields(data)
        asked = fields.string()
        infos = {fields.short() for _ in range(fields.short_count(MAX_INFOS))}
        fields.end()
        name, offer = self._find(asked)

        def tell(info: bytes) -> None:
            self._reply(number, Reply.INFO, info)

        tell(wire.INFO_EXPORT.pack(Info.EXPORT, offer.size, self.flags))
        block = (offer.minimum_block, offer.preferred_block, offer.maximum_block)
        tell(wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *block))
        if Info.NAME in infos:
            tell(struct.pack(">H", Info.NAME) + name.encode())
        if Info.DESCRIPTION in infos and offer.description:
            text = offer.description.encode()[: wire.MAX_STRING]
            tell(struct.pack(">H", Info.DESCRIPTION) + text)
        self._reply(number, Reply.ACK)
        return self._enter(name, offer) if number == Option.GO else Next.GO_ON

    # -- inside ---------------------------------------------------------------

    def _reply(self, number: int, reply: Reply, data: bytes = b"") -> None:
        head = (wire.OPTION_REPLY_MAGIC, number, reply, len(data))
        self._replies.append(wire.OPTION_REPLY.pack(*head) + data)

    def _find(self, name: str) -> tuple[str, Offer]:
        if not name and "" not in self.exports and len(self.exports) == 1:
            (name,) = self.exports
        offer = self.exports.get(name)
        if offer is None:
            raise _Refusal(Reply.ERR_UNKNOWN, f"no export is called {name[:80]!r}")
        return name, offer

    def _enter(self, name: str, offer: Offer) -> Next:
        self.name, self.offer = name, offer
        self.allocation = self._granted_for == name
        return Next.ENTER


class _Fields:
    """Reads an option's data from its start; what doesn't fit is ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def string(self) -> str:
        return _text(self._take(self._number(4)))

    def short(self) -> int:
        return self._number(2)

    def count(self, limit: int) -> int:
        return self._counted(self._number(4), limit)

    def short_count(self, limit: int) -> int:
        return self._counted(self._number(2), limit)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(Reply.ERR_INVALID, "the option is too long for its contents")

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise _Refusal(
                Reply.ERR_INVALID, "the option is too short for its contents"
            )
        self._at += count
        return taken

    @staticmethod
    def _counted(number: int, limit: int) -> int:
        if number > limit:
            raise _Refusal(Reply.ERR_TOO_BIG, f"{number} at once, {limit} are taken")
        return number


def _text(raw: bytes) -> str:
    if len(raw) > wire.MAX_STRING:
        raise _Refusal(Reply.ERR_TOO_BIG, "a string has more than 4096 bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _Refusal(Reply.ERR_INVALID, "a string isn't UTF-8") from None


def _empty(data: bytes) -> None:
    if data:
        raise _Refusal(Reply.ERR_INVALID, "this option has no data")


_HANDLERS: Final[Mapping[int, Callable[[Negotiation, int, bytes], Next]]] = {
    Option.ABORT: Negotiation._abort,
    Option.LIST: Negotiation._list,
    Option.STARTTLS: Negotiation._start_tls,
    Option.INFO: Negotiation._information,
    Option.GO: Negotiation._information,
    Option.STRUCTURED_REPLY: Negotiation._structured_reply,
    Option.LIST_META_CONTEXT: Negotiation._meta_context,
    Option.SET_META_CONTEXT: Negotiation._meta_context,
    Option.EXTENDED_HEADERS: Negotiation._extended_headers,
}
