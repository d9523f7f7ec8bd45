# SPDX-License-Identifier: Apache-2.0
"""How the two ends of a replication channel prove themselves, inside TLS 1.3.

::

    client                                        server
      HELLO versions, methods, nonce        ->
                                            <-      CHALLENGE version, methods, nonce
      PROOF MAC("client")                   ->
                                            <-      ACCEPT MAC("server")   or  REFUSE

Theory of operation. Both MACs are HMAC-SHA-256 under the shared token over: a label of
the role; HELLO and CHALLENGE to the last byte, so all that was offered and chosen and
both nonces; and the SHA-256 of the certificates that this side sees in TLS. A man in
the middle shows the client another certificate than the server's own, and the proof he
passes on is worth nothing. The client proves first; a stranger gets no MAC to work on.

Method ``mtls`` is TLS's own: the adapter has checked the certificates before a byte of
this. Where it is the only one, the MACs are keyed with nothing and only show that both
sides mean the same certificates, versions and methods.

Neither side settles for less than it was told: the methods that the server requires
are exactly those that the client has been given. The server's refusal is one fixed
frame, whatever was wrong; the reason stays in ``reason``, for its own log.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pveplug.errors import LocalProtocolError, RemoteProtocolError, TransportError
from pveplug.proto.dr_wire import Buffer, RawFrame, encode_frame

VERSIONS: Final = (1,)
"""What this side speaks, the best first."""
NONCE: Final = 32
MAC: Final = 32
MIN_TOKEN: Final = 16
"""Bytes. Whoever the client connects to gets a MAC to guess the token by, offline."""
MAX_VERSIONS: Final = 16
MAX_PAYLOAD: Final = 128
"""No frame of the handshake is longer."""
NO_CERTIFICATE: Final = bytes(32)
"""Stands for the hash of the certificate that a client without one doesn't show."""
REFUSED: Final = b"\x01"
"""All that a refused client is told."""
_MAGIC: Final = b"pveplug dr\0"
_HELLO: Final = struct.Struct(f">{len(_MAGIC)}s{NONCE}sBB")  # methods, versions
_CHALLENGE: Final = struct.Struct(f">H{NONCE}sB")
_LENGTH: Final = struct.Struct(">I")
_LABELS: Final = {"client": b"pveplug dr 1 client", "server": b"pveplug dr 1 server"}


class FrameType(enum.IntEnum):
    """The frames of the handshake."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    ACCEPT = 4
    REFUSE = 5


class Method(enum.Flag):
    """How the ends know each other; ``PSK | MTLS`` is both together."""

    NONE = 0
    PSK = 1
    MTLS = 2

    def __str__(self) -> str:
        names = [name for name, member in _METHODS.items() if member in self]
        return "+".join(names) or "nothing"


_METHODS: Final = {"psk": Method.PSK, "mtls": Method.MTLS}


class AuthenticationError(RemoteProtocolError):
    """One end didn't accept the other; repeating won't help."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What one side knows before the handshake.

    Attributes:
        methods: all that it demands; ``token``: needed for PSK.
        server_certificate, client_certificate: SHA-256 of the DER as this side sees
            it in TLS, or NO_CERTIFICATE for a client that shows none.
    """

    methods: Method
    server_certificate: bytes
    client_certificate: bytes = NO_CERTIFICATE
    token: bytes | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise LocalProtocolError("a channel needs a method of authentication")
        if (Method.PSK in self.methods) != (self.token is not None):
            raise LocalProtocolError("a token and the method psk go together")
        if self.token is not None and len(self.token) < MIN_TOKEN:
            raise LocalProtocolError(f"a token has at least {MIN_TOKEN} bytes")
        if len(self.server_certificate) != 32 or len(self.client_certificate) != 32:
            raise LocalProtocolError("a certificate's hash has 32 bytes")

    def __repr__(self) -> str:
        return f"Identity(methods={self.methods})"

    def mac(self, role: str, hello: bytes, challenge: bytes) -> bytes:
        """The proof of ``role``: "client" or "server"."""
        # Every part has a fixed length or says its own: no two inputs run together.
        parts = (
            _LABELS[role],
            _LENGTH.pack(len(hello)),
            hello,
            _LENGTH.pack(len(challenge)),
            challenge,
            self.server_certificate,
            self.client_certificate,
        )
        return hmac.digest(self.token or b"", b"".join(parts), "sha256")


class State(enum.Enum):
    """Where a handshake is; a client begins at START, a server at AWAIT_HELLO."""

    START = "start"
    AWAIT_CHALLENGE = "await challenge"
    AWAIT_ACCEPT = "await accept"
    AWAIT_HELLO = "await hello"
    AWAIT_PROOF = "await proof"
    DONE = "done"
    FAILED = "failed"


Transitions = dict[tuple[State, int], State]

CLIENT_TRANSITIONS: Final[Transitions] = {
    (State.AWAIT_CHALLENGE, FrameType.CHALLENGE): State.AWAIT_ACCEPT,
    (State.AWAIT_ACCEPT, FrameType.ACCEPT): State.DONE,
}
SERVER_TRANSITIONS: Final[Transitions] = {
    (State.AWAIT_HELLO, FrameType.HELLO): State.AWAIT_PROOF,
    (State.AWAIT_PROOF, FrameType.PROOF): State.DONE,
}
"""All that may come, and the state if its content is right too. Anything else, a
REFUSE included, leads to FAILED."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The client's opening: what it speaks and which methods it was given."""

    nonce: bytes
    methods: Method
    versions: tuple[int, ...]

    def encode(self) -> bytes:
        """Return the payload of HELLO."""
        head = _HELLO.pack(_MAGIC, self.nonce, self.methods.value, len(self.versions))
        return head + struct.pack(f">{len(self.versions)}H", *self.versions)

    @classmethod
    def decode(cls, payload: Buffer) -> Hello:
        """Read the payload of HELLO.

        Raises:
            RemoteProtocolError: it is none.
        """
        if len(payload) < _HELLO.size:
            raise RemoteProtocolError(f"HELLO of {len(payload)} bytes")
        magic, nonce, methods, count = _HELLO.unpack_from(payload)
        if magic != _MAGIC or not 0 < count <= MAX_VERSIONS:
            raise RemoteProtocolError("HELLO of another protocol")
        if len(payload) != _HELLO.size + 2 * count:
            raise RemoteProtocolError(
                f"HELLO of {len(payload)} bytes for {count} versions"
            )
        versions = struct.unpack_from(f">{count}H", payload, _HELLO.size)
        return cls(nonce, _method(methods), versions)


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's answer: the version it chose and the methods it requires."""

    version: int
    nonce: bytes
    methods: Method

    def encode(self) -> bytes:
        """Return the payload of CHALLENGE."""
        return _CHALLENGE.pack(self.version, self.nonce, self.methods.value)

    @classmethod
    def decode(cls, payload: Buffer) -> Challenge:
        """Read the payload of CHALLENGE.

        Raises:
            RemoteProtocolError: it is none.
        """
        if len(payload) != _CHALLENGE.size:
            raise RemoteProtocolError(f"CHALLENGE of {len(payload)} bytes")
        version, nonce, methods = _CHALLENGE.unpack(payload)
        return cls(version, nonce, _method(methods))


def _method(bits: int) -> Method:
    if not 0 < bits <= 3:
        raise RemoteProtocolError(f"methods of authentication {bits:#04x}")
    return Method(bits)


def _frame(type: FrameType, payload: bytes) -> bytes:
    return b"".join(encode_frame(type, payload))


class _Handshake:
    """What both roles share: the state and the way to fail."""

    def __init__(
        self, identity: Identity, nonce: bytes, state: State, table: Transitions
    ) -> None:
        if len(nonce) != NONCE:
            raise LocalProtocolError(f"a nonce has {NONCE} bytes")
        self.state = state
        self._identity = identity
        self._nonce = nonce
        self._table = table
        self._hello = b""
        self._challenge = b""

    def _next(self, frame: RawFrame) -> State | None:
        return self._table.get((self.state, frame.type))

    def _proof(self, role: str) -> bytes:
        return self._identity.mac(role, self._hello, self._challenge)


class ClientHandshake(_Handshake):
    """The sender's side: :meth:`start`, then :meth:`receive` until ``DONE``."""

    def __init__(
        self, identity: Identity, nonce: bytes, versions: Sequence[int] = VERSIONS
    ) -> None:
        super().__init__(identity, nonce, State.START, CLIENT_TRANSITIONS)
        self._versions = tuple(versions)
        self.version = 0

    def start(self) -> bytes:
        """Return the HELLO to send.

        Raises:
            LocalProtocolError: it was asked for before.
        """
        if self.state is not State.START:
            raise LocalProtocolError("the handshake has begun already")
        self.state = State.AWAIT_CHALLENGE
        hello = Hello(self._nonce, self._identity.methods, self._versions)
        self._hello = hello.encode()
        return _frame(FrameType.HELLO, self._hello)

    def receive(self, frame: RawFrame) -> bytes:
        """Take the server's frame; return what is to be sent, perhaps nothing.

        Raises:
            AuthenticationError: the server refused us, or couldn't prove itself.
            RemoteProtocolError: it isn't speaking this protocol.
        """
        target = self._next(frame)
        if target is None:
            refused = frame.type == FrameType.REFUSE and self.state in (
                State.AWAIT_CHALLENGE,
                State.AWAIT_ACCEPT,
            )
            if refused:
                raise self._failed(
                    "the receiver refused us: a wrong token or certificate, or no "
                    "common version. Its log says which"
                )
            state, self.state = self.state, State.FAILED
            raise RemoteProtocolError(
                f"the receiver sent a frame of type {frame.type} ({state.value})"
            )
        if target is State.DONE:
            if not hmac.compare_digest(self._proof("server"), frame.payload):
                raise self._failed(
                    "whoever answered there doesn't know our token: it is not our "
                    "receiver, or somebody is in between"
                )
            self.state = target
            return b""
        self._take_challenge(frame.payload)
        self.state = target
        return _frame(FrameType.PROOF, self._proof("client"))

    def receive_eof(self) -> None:
        """The server closed the connection.

        Raises:
            TransportError: it did so before it had accepted us, without a refusal:
                it is being stopped, or waited too long.
        """
        if self.state is not State.DONE:
            state, self.state = self.state, State.FAILED
            raise TransportError(
                f"the receiver closed the connection in the handshake ({state.value}): "
                "it refused our certificate, or is being stopped. Its log says which"
            )

    def _take_challenge(self, payload: Buffer) -> None:
        try:
            challenge = Challenge.decode(payload)
        except RemoteProtocolError:
            self.state = State.FAILED
            raise
        if challenge.version not in self._versions:
            raise self._failed(
                f"the receiver chose version {challenge.version}, offered were "
                + ", ".join(map(str, self._versions))
            )
        # Less would mean to trust somebody who has proved less than was asked for.
        if challenge.methods != self._identity.methods:
            raise self._failed(
                f"the receiver asks for {challenge.methods}, this side is set up for "
                f"{self._identity.methods}"
            )
        self.version = challenge.version
        self._challenge = bytes(payload)

    def _failed(self, text: str) -> AuthenticationError:
        self.state = State.FAILED
        return AuthenticationError(text)


class ServerHandshake(_Handshake):
    """The receiver's side: :meth:`receive` until ``DONE`` or ``FAILED``.

    Attributes:
        reason: why it failed, for our log; the client isn't told.
    """

    def __init__(
        self, identity: Identity, nonce: bytes, versions: Sequence[int] = VERSIONS
    ) -> None:
        super().__init__(identity, nonce, State.AWAIT_HELLO, SERVER_TRANSITIONS)
        self._versions = tuple(versions)
        self.version = 0
        self.reason = ""

    def receive(self, frame: RawFrame) -> bytes:
        """Take the client's frame; return what is to be sent, at the end a verdict.

        Never raises: a client that breaks the rules is refused like any other. Once
        it has ended, nothing is answered any more.
        """
        if self.state in (State.DONE, State.FAILED):
            return b""
        target = self._next(frame)
        if target is None:
            return self._refused(f"a frame of type {frame.type} ({self.state.value})")
        steps: dict[State, Callable[[Buffer], bytes]] = {
            State.AWAIT_PROOF: self._take_hello,
            State.DONE: self._take_proof,
        }
        reply = steps[target](frame.payload)
        if not self.reason:
            self.state = target
        return reply

    def receive_eof(self) -> None:
        """The client closed the connection."""
        if self.state is not State.DONE:
            self.refuse(f"it left ({self.state.value})")

    def refuse(self, reason: str) -> bytes:
        """End the handshake for a reason of the caller's; return what to send."""
        return self._refused(reason)

    def _take_hello(self, payload: Buffer) -> bytes:
        try:
            hello = Hello.decode(payload)
        except RemoteProtocolError as error:
            return self._refused(str(error))
        required = self._identity.methods
        if required not in hello.methods:
            return self._refused(f"it offers {hello.methods}, required is {required}")
        common = [v for v in self._versions if v in hello.versions]
        if not common:
            offered = ", ".join(map(str, hello.versions))
            return self._refused(f"no common version, it offers {offered}")
        self.version = common[0]
        self._hello = bytes(payload)
        self._challenge = Challenge(common[0], self._nonce, required).encode()
        return _frame(FrameType.CHALLENGE, self._challenge)

    def _take_proof(self, payload: Buffer) -> bytes:
        if not hmac.compare_digest(self._proof("client"), payload):
            wrong = "token or " if self._identity.token is not None else ""
            return self._refused(f"wrong proof: {wrong}certificate or transcript")
        return _frame(FrameType.ACCEPT, self._proof("server"))

    def _refused(self, reason: str) -> bytes:
        if self.state is State.FAILED:
            return b""
        self.state = State.FAILED
        self.reason = reason
        return _frame(FrameType.REFUSE, REFUSED)


def certificate_hash(der: bytes | None) -> bytes:
    """Return what stands for a certificate in the MACs."""
    return hashlib.sha256(der).digest() if der else NO_CERTIFICATE
