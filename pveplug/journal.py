# SPDX-License-Identifier: Apache-2.0
"""What a job has done to a VM, written down before it is done.

One file per VM, ``<state_dir>/vms/<vmid>.json``, beside a lock file that its job holds
with flock(2). The kernel drops the lock when the process dies, however it dies; so
whoever gets the lock and finds a journal knows that its job is dead, and what to undo.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pveplug.errors import JobError

log = logging.getLogger(__name__)
POLL_S: Final = 0.2
UNREADABLE: Final = "(unreadable journal)"


class VmBusyError(JobError):
    """A job of ours, or a program that one has left running, holds the VM."""


@dataclass(slots=True)
class Entry:
    """The journal of one job on one VM."""

    vmid: int
    job: str
    kind: str
    """``backup``, ``restore`` or ``prove``: a restore whose VM runs and goes."""
    pid: int = 0
    started: float = 0.0
    asking: bool = False
    """``lock: backup`` was being set; whether it was is told by a file (:func:`proof`).

    A lock doesn't say whose it is, and vzdump's must never be taken away.
    """
    locked: bool = False
    """We have set ``lock: backup`` in the VM's configuration."""
    frozen: bool = False
    """We have frozen, or were about to freeze, the guest's file systems."""
    touched: bool = False
    """We have added, or were about to add, something to the VM's QEMU."""
    nbd_socket: str = ""
    files: list[str] = field(default_factory=list)
    """Scratch files to remove."""
    volumes: list[str] = field(default_factory=list)
    """Volumes of ours to free (fleecing images, or disks of an unfinished restore)."""
    active: list[str] = field(default_factory=list)
    """Volumes we have activated."""
    created: bool = False
    """A restore has created, or was about to create, this VM."""
    uuid: str = ""
    """Its SMBIOS UUID: a VM with another one under this id is not ours to destroy."""
    changed: float = 0.0
    """When this was written: what was asked for just before may still happen."""
    damage: str = ""
    """Why the file can't be read: what it said is lost. Never written."""


class Journal:
    """An open entry; every change is on disk before it returns.

    What announces (``note``, ``add``) raises JobError when it can't be written: then
    the thing must not be done. What only takes back (``undone``, ``drop``, ``close``)
    never raises: an entry that says too much costs a look, and the way out goes on.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path = path
        self.entry = entry

    @property
    def proof(self) -> Path:
        """The file that appears when ``lock: backup`` has been set for us."""
        return self._path.with_suffix(".held")

    def note(self, **changes: Any) -> None:
        """Set fields and write the entry."""
        for name, value in changes.items():
            setattr(self.entry, name, value)
        try:
            self._write()
        except OSError as error:
            raise _unwritable(self._path, error, self.entry.vmid) from error

    def undone(self, **changes: Any) -> None:
        """Set fields whose cause is gone."""
        for name, value in changes.items():
            setattr(self.entry, name, value)
        self._try_write()

    def add(self, name: str, value: Any) -> None:
        """Append to one of the lists and write the entry."""
        self.note(**{name: [*getattr(self.entry, name), value]})

    def drop(self, name: str, value: Any) -> None:
        """Take out of one of the lists and write the entry."""
        with contextlib.suppress(ValueError):
            getattr(self.entry, name).remove(value)
        self._try_write()

    def _try_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            log.warning("journal path=%s not written: %s", self._path, error)

    def _write(self) -> None:
        self.entry.changed = time.time()
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self.entry), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Nothing is left to undo, but for a guest that an earlier job froze."""
        if self.entry.frozen:
            left = self.entry
            self.entry = Entry(left.vmid, left.job, left.kind, frozen=True)
            self._try_write()
        else:
            _forget(self._path)


def _forget(path: Path) -> None:
    """Remove a journal and its proof, so that no power cut brings them back.

    One that came back would claim a lock that is vzdump's by then.
    """
    for suffix in ("held", "json", "new"):
        _unlink(path.with_suffix(f".{suffix}"))
    try:
        sync_directory(path.parent)
    except OSError as error:
        log.warning("journal path=%s not synced: %s", path, error)


def sync_directory(directory: Path) -> None:
    """Have what happened to names in a directory survive a power failure."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("journal path=%s not removed: %s", path, error)


def _unwritable(path: Path, error: OSError, vmid: int | None = None) -> JobError:
    return JobError(
        f"cannot write {path}: {error.strerror or error}.",
        vm=str(vmid) if vmid is not None else None,
        phase="journal",
        remedy="make room there, or set state_dir in the node file; a job that can't "
        "write down what it does doesn't begin.",
    )


def _directory(state_dir: str) -> Path:
    """Return the directory of journals; made where it isn't there."""
    path = Path(state_dir) / "vms"
    try:
        _make(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _make(directory: Path) -> None:
    if directory.is_dir():
        return
    _make(directory.parent)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)


def read_entry(state_dir: str, vmid: int) -> Entry | None:
    """Return the journal that is there for a VM, or None; nothing is written.

    A journal is renamed into place whole, so one that can't be read is a broken disk or
    somebody's edit. Then ``damage`` says why, and all there is to go by is what can be
    found without it: names in QEMU and in the scratch directory, and the proof of a
    lock.
    """
    path = Path(state_dir) / "vms" / f"{vmid}.json"
    try:
        return _entry(vmid, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        log.warning("journal path=%s error=%s", path, error)
        damage = f"{path}: {error or type(error).__name__}"
        return Entry(
            vmid, UNREADABLE, "backup", asking=True, touched=True, damage=damage
        )


def _entry(vmid: int, values: Any) -> Entry:
    """Return what a file says; unknown fields, of another version, are passed over.

    Raises:
        ValueError, TypeError, KeyError: it is no journal.
    """
    entry = Entry(vmid, str(values["job"]), str(values["kind"]))
    for spec in dataclasses.fields(Entry):
        if spec.name not in values or spec.name == "damage":
            continue
        value = values[spec.name]
        known = getattr(entry, spec.name)
        good = isinstance(
            value, (int, float) if isinstance(known, float) else type(known)
        )
        if isinstance(value, list):
            good = good and all(isinstance(item, str) for item in value)
        if not good or (spec.name == "vmid" and value != vmid):
            raise ValueError(f"{spec.name}={value!r}")
        setattr(entry, spec.name, value)
    return entry


def vmids_of(state_dir: str) -> list[int]:
    """Return the VMs that have a journal, readable or not."""
    found = (Path(state_dir) / "vms").glob("*.json")
    return sorted(int(path.stem) for path in found if path.stem.isdecimal())


def entries_of(state_dir: str, job: str) -> Iterator[Entry]:
    """Yield the journals a job has left."""
    for vmid in vmids_of(state_dir):
        entry = read_entry(state_dir, vmid)
        if entry and entry.job == job:
            yield entry


@contextlib.asynccontextmanager
async def own_vm(state_dir: str, vmid: int, wait_s: float) -> AsyncIterator[int]:
    """Be the only job of ours on a VM of this node.

    Yields the descriptor that holds the lock. A program that changes the VM inherits
    it (``PveLocal.keeping``): then the VM is not free before that program has ended,
    even if we were killed meanwhile.

    Raises:
        VmBusyError: another job has it, and did not end within ``wait_s`` seconds.
        JobError: the lock file can't be opened.
    """
    directory = _directory(state_dir)
    try:
        file = (directory / f"{vmid}.lock").open("a")
    except OSError as error:
        raise _unwritable(directory / f"{vmid}.lock", error, vmid) from error
    with file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    await asyncio.sleep(POLL_S)
                    continue
                raise _busy(state_dir, vmid, wait_s) from None
        yield file.fileno()


@contextlib.contextmanager
def unowned_vm(state_dir: str, vmid: int) -> Iterator[None]:
    """Keep jobs of ours off a VM while it is only looked at; nothing is written.

    Raises:
        VmBusyError: a job has it.
        JobError: the lock file can't be opened.
    """
    with contextlib.ExitStack() as stack:
        path = Path(state_dir) / "vms" / f"{vmid}.lock"
        try:
            file = stack.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass  # no job has ever been here
        except BlockingIOError:
            raise _busy(state_dir, vmid, 0) from None
        except OSError as error:
            raise _unwritable(path, error, vmid) from error
        yield


def _busy(state_dir: str, vmid: int, wait_s: float) -> VmBusyError:
    entry = read_entry(state_dir, vmid)
    owner = f"job {entry.job} (pid {entry.pid})" if entry else "another job"
    waited = f" and did not end in {wait_s:.0f} s" if wait_s else ""
    return VmBusyError(
        f"{owner} is working on this VM{waited}.",
        vm=str(vmid),
        phase="lock",
        remedy="let it end or cancel it, then run this again.",
    )


def open_journal(state_dir: str, vmid: int, job: str, kind: str) -> Journal:
    """Begin a VM's journal; the caller holds the VM with :func:`own_vm`.

    What the recovery could not do (a guest whose agent was silent) is taken over.
    """
    path = _directory(state_dir) / f"{vmid}.json"
    before = read_entry(state_dir, vmid)
    entry = Entry(vmid, job, kind, pid=os.getpid(), started=time.time())
    entry.frozen = before is not None and before.frozen
    journal = Journal(path, entry)
    _unlink(journal.proof)
    journal.note()
    try:
        # A job killed just after it had made the directory may not have done it.
        sync_directory(path.parent.parent)
    except OSError as error:
        raise _unwritable(path, error, vmid) from error
    return journal


def proven(state_dir: str, vmid: int) -> bool:
    """Whether a job that was setting ``lock: backup`` has set it."""
    return (Path(state_dir) / "vms" / f"{vmid}.held").exists()


def write_entry(state_dir: str, entry: Entry) -> None:
    """Replace a VM's journal by what is left to undo."""
    Journal(_directory(state_dir) / f"{entry.vmid}.json", entry).note()


def forget(state_dir: str, vmid: int) -> None:
    """Remove a VM's journal: nothing is left to undo."""
    _forget(_directory(state_dir) / f"{vmid}.json")
