# SPDX-License-Identifier: Apache-2.0
"""What the DR site knows of its replicas, on disk: one directory for each.

::

    <state_dir>/replicas/<uuid>/record.json    the record, replaced whole
                               /lock           held with flock(2) by the one session
                               /lock.by        who that is, for who finds it busy
                               /*.stage        increments that aren't applied yet

The record is written before what it announces is done, and again when it has been done;
so whoever gets the lock and reads it knows how far a session that died had come. The
directory of a replica that was forgotten stays with its lock: a lock file that is
removed is one that two may hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Final, TypeVar, get_args, get_origin

from pveplug.errors import PveplugError
from pveplug.journal import sync_directory
from pveplug.proto.dr_frames import Point, State

VERSION: Final = 1
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_T = TypeVar("_T")

ROLES: Final = ("none", "seeding", "standby", "active", "permanent")


class ReplicaError(PveplugError):
    """A replica refuses or failed.

    Attributes:
        code: one of :class:`~pveplug.proto.dr_frames.Refusal`'s.
    """

    def __init__(self, code: str, text: str, *, remedy: str = "") -> None:
        if remedy:
            text = f"{text.rstrip('. ')}. Remedy: {remedy}"
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class Origin:
    """The VM that is replicated, as its site calls it."""

    vmid: int = 0
    name: str = ""
    site: str = ""


@dataclass(slots=True)
class Volume:
    """A disk of the replica; ``size`` is the source's, in bytes."""

    volid: str
    size: int
    format: str
    storage: str


@dataclass(slots=True)
class Staged:
    """A verified increment in a file of the replica's directory.

    Attributes:
        cycle: the sender's name of its instant.
        file: its name; the description of the VM is in it.
        bytes: of data, for the restore point.
        numbers: disk key -> its number in the stage's frames.
        sizes: disk key -> bytes, of the VM's disks at that instant.
        snapshot: the restore point's name once it is about to be taken.
        seed: nothing is staged, the volumes themselves hold the cycle.
    """

    cycle: str
    number: int
    file: str = ""
    instant: int = 0
    consistency: str = ""
    bytes: int = 0
    numbers: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    snapshot: str = ""
    seed: bool = False


@dataclass(slots=True)
class Report:
    """What the last cycle was."""

    job: str = ""
    time: float = 0.0
    seconds: float = 0.0
    bytes: int = 0


@dataclass(slots=True)
class Record:
    """All that is known of one replica.

    Attributes:
        uuid: SMBIOS UUID of the source VM: the replica's identity.
        link: 8 hex digits, made once: names this replica on this receiver.
        vmid: of the replica VM; 0: none yet.
        created: the VM with this id was made, or was about to be made, by us.
        role: one of ``ROLES``.
        epoch: raised by each failover.
        welcome: a sender with an older epoch may go on.
        acked: the cycle whose instant the replica holds or has staged.
        cycle: number of the last cycle that was begun.
        seed_cycle: what a seed that isn't ended began with.
        seeded: disk key -> bytes from its start that are durable.
        disks: disk key -> its volume.
        keys: configuration keys that were ever set from the source's.
        pending: names of volumes that were about to be allocated and are not attached.
        retired: volumes of disks the source lost, freed with their last restore point.
        points: restore points, oldest first; the name is the snapshot's.
        leaving: snapshots that were restore points and are being deleted.
        staged: increments acknowledged and not applied, oldest first.
        intent: the increment that is being applied.
        testing: what a running failover test uses, None: none runs.
        slice: how many cycles have checked their slice.
        dirty: the volumes may differ from the newest restore point.
        failover: what the last failover was.
        storage: where its disks are.
    """

    uuid: str
    link: str = ""
    vmid: int = 0
    created: bool = False
    role: str = "none"
    epoch: int = 1
    welcome: bool = False
    acked: str | None = None
    cycle: int = 0
    seed_cycle: str | None = None
    seeded: dict[str, int] = field(default_factory=dict)
    disks: dict[str, Volume] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    staged: list[Staged] = field(default_factory=list)
    intent: Staged | None = None
    testing: dict[str, Any] | None = None
    slice: int = 0
    dirty: bool = False
    failover: dict[str, Any] | None = None
    origin: Origin = field(default_factory=Origin)
    report: Report = field(default_factory=Report)
    storage: str = ""
    changed: float = 0.0

    def state(self, *, node: str = "", version: str = "") -> State:
        """Return what a sender is told."""
        return State(
            link=self.link,
            role=self.role,
            epoch=self.epoch,
            vmid=self.vmid,
            acked=self.acked,
            cycle=self.cycle,
            seed_cycle=self.seed_cycle,
            seeded=dict(self.seeded),
            staged=tuple(item.cycle for item in self.staged),
            disks={key: volume.size for key, volume in self.disks.items()},
            points=tuple(self.points),
            testing=self.testing is not None,
            slice=self.slice,
            welcome=self.welcome,
            node=node,
            version=version,
        )


def new_record(uuid: str) -> Record:
    """Return the record of a replica that has nothing yet."""
    return Record(uuid, link=secrets.token_hex(4))


def checked_uuid(text: str) -> str:
    """Return a UUID in lower case; it names a directory.

    Raises:
        ReplicaError: it is none.
    """
    uuid = text.lower()
    if not _UUID.fullmatch(uuid):
        raise ReplicaError(
            "identity",
            f"{text[:60]!r} is no SMBIOS UUID",
            remedy="the source VM needs one: smbios1: uuid=…, it is its replica's name",
        )
    return uuid


class ReplicaStore:
    """The replicas of one receiver, below ``state_dir``."""

    def __init__(self, state_dir: str) -> None:
        self._root = Path(state_dir) / "replicas"

    def directory(self, uuid: str) -> Path:
        """Return where a replica's files are."""
        return self._root / checked_uuid(uuid)

    def uuids(self) -> list[str]:
        """Return the replicas that have a record, readable or not."""
        found = self._root.glob("*/record.json")
        return sorted(p.parent.name for p in found if _UUID.fullmatch(p.parent.name))

    def read(self, uuid: str) -> Record | None:
        """Return a replica's record, or None; needs no lock, for it is replaced whole.

        Raises:
            ReplicaError: it is damaged, or of a later version.
        """
        path = self.directory(uuid) / "record.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(path, str(error)) from error
        try:
            values = json.loads(text)
            version = values["version"] if isinstance(values, dict) else None
            if type(version) is int and version > VERSION:
                raise ReplicaError(
                    "internal",
                    f"{path} was written by a later version of this program "
                    f"({version}, this one knows {VERSION})",
                    remedy="update this receiver.",
                )
            record: Record = _value(Record, values["record"], "record")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(path, str(error) or type(error).__name__) from error
        if record.uuid != checked_uuid(uuid) or record.role not in ROLES:
            raise _damaged(path, f"uuid {record.uuid}, role {record.role}")
        return record

    def write(self, record: Record) -> None:
        """Replace a record; it is on stable storage when this returns.

        Raises:
            ReplicaError: it can't be written; then what it announces must not be done.
        """
        record.changed = time.time()
        directory = self.directory(record.uuid)
        path = directory / "record.json"
        whole = {"version": VERSION, "record": dataclasses.asdict(record)}
        try:
            _make(directory)
            temporary = path.with_suffix(".new")
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(whole, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(directory)
        except OSError as error:
            raise _unwritable(path, error) from error

    def forget(self, uuid: str) -> None:
        """Remove a record: there is no such replica any more."""
        directory = self.directory(uuid)
        try:
            for name in ("record.json", "record.new"):
                (directory / name).unlink(missing_ok=True)
            sync_directory(directory)
        except OSError as error:
            raise _unwritable(directory, error) from error

    @contextlib.contextmanager
    def hold(self, uuid: str, who: str) -> Iterator[None]:
        """Be the only one who changes a replica, until the context is left.

        Args:
            uuid: the replica.
            who: what to tell another one who wants it.

        Raises:
            ReplicaError: ``busy``, with who has it since when.
        """
        directory = self.directory(uuid)
        try:
            _make(directory)
            file = (directory / "lock").open("a")
        except OSError as error:
            raise _unwritable(directory / "lock", error) from error
        with file:
            note = directory / "lock.by"
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReplicaError(
                    "busy",
                    f"replica {uuid} is being worked on by {_owner(note)}",
                    remedy="let it end or cancel it, then run this again.",
                ) from None
            with contextlib.suppress(OSError):
                # Only for the text above: a lost note does no harm.
                note.write_text(json.dumps({"who": who, "since": time.time()}))
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    note.unlink(missing_ok=True)


def _owner(note: Path) -> str:
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(said["since"]))
        return f"{said['who']} since {since}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another session"


def _make(directory: Path) -> None:
    if directory.is_dir():
        return
    _make(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    sync_directory(directory.parent)


def _damaged(path: Path, why: str) -> ReplicaError:
    return ReplicaError(
        "internal",
        f"{path} can't be read: {why[:200]}",
        remedy="put it back from a backup of the receiver's state_dir; or move it away "
        "and seed anew, after the replica VM was removed by hand.",
    )


def _unwritable(path: Path, error: OSError) -> ReplicaError:
    return ReplicaError(
        "space" if error.errno == 28 else "internal",
        f"cannot write {path}: {error.strerror or error}",
        remedy="make room there; a receiver that can't write down what it does doesn't "
        "do it.",
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the hinted type.

    Keys this version doesn't know are passed over.

    Raises:
        ValueError: it isn't of that type.
    """
    origin = get_origin(hint)
    if origin is UnionType:
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
        origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is list and isinstance(value, list):
        kind = get_args(hint)[0]
        return [_value(kind, item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        kind = get_args(hint)[1]
        return {key: _value(kind, item, where) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        found = {
            spec.name: _value(hints[spec.name], value[spec.name], spec.name)
            for spec in dataclasses.fields(hint)
            if spec.name in value
        }
        return typing.cast(Any, hint)(**found)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{where} is {str(value)[:40]!r}")
