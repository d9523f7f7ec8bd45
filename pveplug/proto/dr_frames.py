# SPDX-License-Identifier: Apache-2.0
"""What sender and receiver of a replica say to each other.

Each message is a frozen value with ``encode()``; :func:`decode` makes one of what
:mod:`pveplug.proto.dr_wire` delivered. Bytes of disks travel as binary messages, all
else as JSON objects. Unknown keys of an object are ignored, so a later version may add
some; a missing or ill-typed one is an error. ``docs/protocols/dr.md`` tells the order.

::

    sender                                   receiver
    Open ───────────────────────────────────►
         ◄─────────────────────────────────── State
    Describe ───────────────────────────────►             (seed, incremental)
         ◄─────────────────────────────────── Ready
    [AskDigests ► … ◄ Digests …]                          (a disk nobody tracked)
    Disk, Block*, Zero*, DiskEnd ───────────►  per disk
    Commit ─────────────────────────────────►
         ◄─────────────────────────────────── Applied
    [AskSamples ► ◄ Samples] [AskDigests ► ◄ Digests] [Block* to repair]
    Finish ─────────────────────────────────►
         ◄─────────────────────────────────── Done

    Command ────────────────────────────────►             (failover and its kin)
         ◄─────────────────────── Say* ── Result

``Say`` lines may come at any time from the receiver; ``Refusal`` ends the session.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Final, Protocol, TypeVar, get_args, get_origin

from pveplug.errors import RemoteProtocolError
from pveplug.units import KiB, MiB

LEAF: Final = 64 * KiB
"""Length of what one digest or one sample speaks of; a disk's last may be shorter."""
DIGEST_SIZE: Final = 16
"""BLAKE3, its first 128 bits."""
MAX_BLOCK: Final = 1 * MiB
MAX_DIGESTS: Final = 16384
"""Leaves one ``AskDigests`` may ask for: 1 GiB of the disk."""
MAX_SAMPLES: Final = 4096
MAX_JSON: Final = 1 * MiB

Buffer = bytes | bytearray | memoryview
_PLACE: Final = struct.Struct(">IQ")
_RUN: Final = struct.Struct(">IQQ")
_MAX_OFFSET: Final = 1 << 62
_M = TypeVar("_M", bound="Json")


class Frame(Protocol):
    """What a channel can send."""

    def encode(self) -> tuple[int, list[Buffer], bool]:
        """Return the frame's type, its payload, and whether to try compression."""


# --- JSON messages


@dataclass(frozen=True, slots=True)
class Json:
    """Base of the messages whose payload is one JSON object."""

    TYPE: ClassVar[int] = 0

    def encode(self) -> tuple[int, list[Buffer], bool]:
        text = json.dumps(_plain(self), separators=(",", ":"))
        return self.TYPE, [text.encode()], True


@dataclass(frozen=True, slots=True)
class Open(Json):
    """The sender's first word: which replica, and what for.

    Attributes:
        mode: as the parameter: ``seed``, ``incremental``, ``failover-exec``, …
        uuid: SMBIOS UUID of the source VM, which is the replica's identity.
        site: cluster and node of the source, to be shown.
        job: Bacula's unique job name, or what stands for it.
        epoch: the sender's last known epoch of this replica; None: it knows none.
        points: how many restore points it wants kept.
        storage: DR storage for new disks, "" for the receiver's own default.
        target_vmid: id wanted for the replica VM; 0: the receiver chooses.
        takeover: go on with a standby replica though its epoch is not known.
    """

    TYPE: ClassVar[int] = 16
    mode: str
    uuid: str
    vmid: int
    name: str
    site: str
    job: str
    epoch: int | None = None
    points: int = 7
    storage: str = ""
    bridge_map: str = ""
    target_vmid: int = 0
    takeover: bool = False
    version: str = ""


@dataclass(frozen=True, slots=True)
class Point(Json):
    """One restore point of a replica; ``cycle`` is the sender's name of its instant."""

    name: str
    cycle: str
    taken: int
    """Seconds since the epoch when it was taken on the DR site."""
    instant: int
    """Seconds since the epoch of the source's point in time."""
    consistency: str = ""
    bytes: int = 0
    """Data received for it."""


@dataclass(frozen=True, slots=True)
class State(Json):
    """What the receiver has of the replica that was opened.

    Attributes:
        link: names this replica on this receiver; the sender's chain is called by it.
        role: ``none``, ``seeding``, ``standby``, ``active`` (failed over) or
            ``permanent``.
        epoch: raised by each failover.
        acked: the cycle whose instant the replica holds; None: none, or unknown.
        cycle: number of the last cycle that was begun.
        seed_cycle: the cycle a seed that isn't ended began with.
        seeded: disk key -> bytes from its start that are durable.
        staged: cycles acknowledged, but not applied while a test runs.
        disks: disk key -> bytes, of the replica.
    """

    TYPE: ClassVar[int] = 17
    link: str
    role: str
    epoch: int
    vmid: int = 0
    acked: str | None = None
    cycle: int = 0
    seed_cycle: str | None = None
    seeded: dict[str, int] = field(default_factory=dict)
    staged: tuple[str, ...] = ()
    disks: dict[str, int] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    testing: bool = False
    slice: int = 0
    """How many cycles have checked their slice: the next slice's number, modulo."""
    welcome: bool = False
    """A sender with an older epoch may go on: failback or undo has ended."""
    node: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class DiskInfo(Json):
    """A disk of the source VM; ``size`` in bytes."""

    key: str
    size: int
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class Describe(Json):
    """The source VM at this cycle's instant.

    Attributes:
        cycle: the sender's name of this instant (``dr-LINK.DATE_TIME_NN``).
        number: the cycle's number, one more than ``State.cycle``.
        instant: seconds since the epoch.
        machine: QEMU machine version it runs with; "" if it doesn't run.
    """

    TYPE: ClassVar[int] = 18
    cycle: str
    number: int
    instant: int
    config: str
    consistency: str
    disks: tuple[DiskInfo, ...]
    firewall: str | None = None
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Ready(Json):
    """The receiver can take the disks.

    Attributes:
        fresh: keys of disks it has just made: they read as zeroes, all of them is to
            be sent.
        seeded: as in State, of disks that go on being seeded.
    """

    TYPE: ClassVar[int] = 19
    vmid: int
    fresh: tuple[str, ...] = ()
    seeded: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Disk(Json):
    """A disk begins; ``number`` names it in what follows (0, 1, …)."""

    TYPE: ClassVar[int] = 20
    number: int
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class DiskEnd(Json):
    """A disk has ended: what must have come for it; see :class:`RunDigest`."""

    TYPE: ClassVar[int] = 21
    number: int
    frames: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Durable(Json):
    """All of a seeded disk up to ``offset`` is on stable storage."""

    TYPE: ClassVar[int] = 22
    number: int
    offset: int


@dataclass(frozen=True, slots=True)
class Commit(Json):
    """All disks have come: verify them whole, and apply."""

    TYPE: ClassVar[int] = 23
    disks: int


@dataclass(frozen=True, slots=True)
class Applied(Json):
    """The replica's disks are those of the cycle; no restore point is taken yet.

    ``deferred``: only staged, because a test of the newest point runs.
    """

    TYPE: ClassVar[int] = 24
    deferred: bool = False


@dataclass(frozen=True, slots=True)
class AskDigests(Json):
    """Digest the leaves of a range of a disk (whole leaves, at most MAX_DIGESTS)."""

    TYPE: ClassVar[int] = 25
    key: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class AskSamples(Json):
    """FNV-1a-64 of the leaves that begin at these offsets."""

    TYPE: ClassVar[int] = 26
    key: str
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Samples(Json):
    TYPE: ClassVar[int] = 27
    key: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish(Json):
    """Take the restore point and acknowledge.

    Attributes:
        checked: whether this cycle's slice was compared; the next one's comes then.
        repaired: bytes sent again because a slice differed.
    """

    TYPE: ClassVar[int] = 28
    checked: bool = False
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class Done(Json):
    """The cycle is acknowledged: its restore point stands (None when deferred)."""

    TYPE: ClassVar[int] = 29
    cycle: str
    epoch: int
    point: Point | None = None
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Command(Json):
    """Do something with the replica; ``options`` are those of the mode."""

    TYPE: ClassVar[int] = 30
    action: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result(Json):
    """What came of a command; ``values`` depend on it and are JSON."""

    TYPE: ClassVar[int] = 31
    action: str
    epoch: int
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Say(Json):
    """A line for the sender's job log; ``kind`` is ``info`` or ``warning``."""

    TYPE: ClassVar[int] = 32
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Refusal(Json):
    """The receiver refuses or failed, and closes; ``code`` is stable, the text isn't.

    Codes: ``epoch``, ``role``, ``busy``, ``storage``, ``space``, ``pve``, ``identity``,
    ``integrity``, ``configuration``, ``protocol``, ``internal``.
    """

    TYPE: ClassVar[int] = 33
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Bye(Json):
    """The sender has no more to say."""

    TYPE: ClassVar[int] = 34


@dataclass(frozen=True, slots=True)
class SendBack(Json):
    """Failback: send what of a disk differs from these digests' owner.

    The sender's ``Digests`` of its own disk follow, a window at a time; each is
    answered by the ``Block`` and ``Zero`` that differ, and by ``WindowEnd``.
    """

    TYPE: ClassVar[int] = 35
    number: int
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class WindowEnd(Json):
    """What differs in a window has been sent: so many frames."""

    TYPE: ClassVar[int] = 36
    number: int
    frames: int


# --- binary messages


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of a disk: ``number`` u32, ``offset`` u64, then the data."""

    TYPE: ClassVar[int] = 64
    number: int
    offset: int
    data: Buffer

    def encode(self) -> tuple[int, list[Buffer], bool]:
        return self.TYPE, [_PLACE.pack(self.number, self.offset), self.data], True

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Zero:
    """A run of a disk that reads as zeroes: ``number`` u32, ``offset``, ``length``."""

    TYPE: ClassVar[int] = 65
    number: int
    offset: int
    length: int

    def encode(self) -> tuple[int, list[Buffer], bool]:
        return self.TYPE, [_RUN.pack(self.number, self.offset, self.length)], False

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of leaves in order: ``number`` u32, ``offset`` u64, 16 bytes each.

    ``number`` is 0 in an answer to AskDigests and the disk's in a failback.
    """

    TYPE: ClassVar[int] = 66
    number: int
    offset: int
    data: Buffer

    def encode(self) -> tuple[int, list[Buffer], bool]:
        return self.TYPE, [_PLACE.pack(self.number, self.offset), self.data], False


Message = Json | Block | Zero | Digests

_JSON: Final[dict[int, type[Json]]] = {
    kind.TYPE: kind
    for kind in (
        *(Open, State, Describe, Ready, Disk, DiskEnd, Durable, Commit, Applied),
        *(AskDigests, AskSamples, Samples, Finish, Done, Command, Result, Say),
        *(Refusal, Bye, SendBack, WindowEnd),
    )
}


def decode(kind: int, payload: Buffer) -> Message:
    """Return the message of a frame.

    Data of a binary message is a view of ``payload``.

    Raises:
        RemoteProtocolError: the type is unknown, or the payload isn't of that type.
    """
    if kind in _JSON:
        return _from_json(_JSON[kind], payload)
    view = memoryview(payload)
    try:
        if kind == Block.TYPE:
            number, offset = _PLACE.unpack_from(view)
            data = view[_PLACE.size :]
            _check_run(offset, len(data))
            if len(data) > MAX_BLOCK:
                raise RemoteProtocolError(f"a block of {len(data)} bytes")
            return Block(number, offset, data)
        if kind == Zero.TYPE:
            number, offset, length = _RUN.unpack(view)
            _check_run(offset, length)
            return Zero(number, offset, length)
        if kind == Digests.TYPE:
            number, offset = _PLACE.unpack_from(view)
            data = view[_PLACE.size :]
            if not len(data) or len(data) % DIGEST_SIZE:
                raise RemoteProtocolError(f"{len(data)} bytes of digests")
            if len(data) > MAX_DIGESTS * DIGEST_SIZE:
                raise RemoteProtocolError(f"{len(data) // DIGEST_SIZE} digests")
            return Digests(number, offset, data)
    except struct.error as error:
        raise RemoteProtocolError(
            f"a frame of type {kind} has {len(view)} bytes"
        ) from error
    raise RemoteProtocolError(f"unknown frame type {kind}")


def expect(message: Message | None, wanted: type[_M]) -> _M:
    """Return the message if it is of the wanted kind.

    Raises:
        RemoteProtocolError: it is another, or the peer has hung up (None).
    """
    if isinstance(message, wanted):
        return message
    came = "the end" if message is None else type(message).__name__
    raise RemoteProtocolError(f"expected {wanted.__name__}, got {came}")


def _check_run(offset: int, length: int) -> None:
    if not length or offset > _MAX_OFFSET or offset + length > _MAX_OFFSET:
        raise RemoteProtocolError(f"a run of {length} bytes at {offset}")


def _plain(value: Any) -> Any:
    if isinstance(value, Json):
        return {
            spec.name: _plain(getattr(value, spec.name))
            for spec in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _from_json(kind: type[_M], payload: Buffer) -> _M:
    if len(payload) > MAX_JSON:
        raise RemoteProtocolError(f"{kind.__name__} of {len(payload)} bytes")
    try:
        values = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{kind.__name__} is not JSON: {error}") from error
    return _object(kind, values, kind.__name__)


def _object(kind: type[_M], values: Any, where: str) -> _M:
    if not isinstance(values, dict):
        raise RemoteProtocolError(f"{where} is not an object")
    hints = typing.get_type_hints(kind)
    found = {}
    for spec in dataclasses.fields(kind):
        if spec.name in values:
            at = f"{where}.{spec.name}"
            found[spec.name] = _value(hints[spec.name], values[spec.name], at)
        elif (
            spec.default is dataclasses.MISSING
            and spec.default_factory is dataclasses.MISSING
        ):
            raise RemoteProtocolError(f"{where} has no {spec.name}")
    return kind(**found)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the hinted type, or refuse it."""
    origin = get_origin(hint)
    if origin is UnionType:
        if value is None and type(None) in get_args(hint):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
        origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is tuple and isinstance(value, list):
        kind = get_args(hint)[0]
        return tuple(_value(kind, item, where) for item in value)
    if origin is dict and isinstance(value, Mapping):
        kind = get_args(hint)[1]
        return {
            key: _value(kind, item, f"{where}.{key}") for key, item in value.items()
        }
    if isinstance(hint, type) and issubclass(hint, Json):
        return _object(hint, value, where)
    if hint in (int, str, bool) and type(value) is hint:
        if hint is int and not 0 <= value <= 1 << 64:
            raise RemoteProtocolError(f"{where} is {value}")
        return value
    raise RemoteProtocolError(f"{where} is {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
