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


@dataclass(slots=True)
class Entry:
    """The journal of one job on one VM."""

    vmid: int
    job: str
    kind: str
    """``backup`` or ``restore``."""
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
        """Nothing is left to undo."""
        _unlink(self.proof)
        _unlink(self._path)


def sync_directory(directory: Path) -> None:
    """Have a rename survive a power failure."""
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
    path = Path(state_dir) / "vms"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def read_entry(state_dir: str, vmid: int) -> Entry | None:
    """Return the journal that is there for a VM, or None."""
    path = _directory(state_dir) / f"{vmid}.json"
    try:
        return _entry(vmid, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OSError) as error:
        # A journal is renamed into place whole; a broken one is a broken disk. What
        # can be found without it (QEMU, the lock) is then all there is to go by.
        log.warning("journal path=%s error=%s", path, error)
        return Entry(vmid, "(unreadable journal)", "backup", touched=True)


def _entry(vmid: int, values: Any) -> Entry:
    """Return what a file says; unknown fields, of another version, are passed over.

    Raises:
        ValueError, TypeError, KeyError: it is no journal.
    """
    entry = Entry(vmid, str(values["job"]), str(values["kind"]))
    for spec in dataclasses.fields(Entry):
        if spec.name not in values:
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


def entries_of(state_dir: str, job: str) -> Iterator[Entry]:
    """Yield the journals a job has left."""
    for path in sorted(_directory(state_dir).glob("*.json")):
        if path.stem.isdigit() and (entry := read_entry(state_dir, int(path.stem))):
            if entry.job == job:
                yield entry


@contextlib.asynccontextmanager
async def own_vm(state_dir: str, vmid: int, wait_s: float) -> AsyncIterator[int]:
    """Be the only job of ours on a VM of this node.

    Yields the descriptor that holds the lock. A program that changes the VM inherits
    it (``PveLocal.keeping``): then the VM is not free before that program has ended,
    even if we were killed meanwhile.

    Raises:
        JobError: another job has it, and did not end within ``wait_s`` seconds.
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
                entry = read_entry(state_dir, vmid)
                owner = f"job {entry.job} (pid {entry.pid})" if entry else "another job"
                raise JobError(
                    f"{owner} is working on this VM and did not end in {wait_s:.0f} s.",
                    vm=str(vmid),
                    phase="lock",
                    remedy="let it end or cancel it, then run this job again.",
                ) from None
        yield file.fileno()


def open_journal(state_dir: str, vmid: int, job: str, kind: str) -> Journal:
    """Begin a VM's journal; the caller holds the VM with :func:`own_vm`."""
    entry = Entry(vmid, job, kind, pid=os.getpid(), started=time.time())
    journal = Journal(_directory(state_dir) / f"{vmid}.json", entry)
    _unlink(journal.proof)
    journal.note()
    return journal


def proven(state_dir: str, vmid: int) -> bool:
    """Whether a job that was setting ``lock: backup`` has set it."""
    return (_directory(state_dir) / f"{vmid}.held").exists()


def write_entry(state_dir: str, entry: Entry) -> None:
    """Replace a VM's journal by what is left to undo."""
    Journal(_directory(state_dir) / f"{entry.vmid}.json", entry).note()


def forget(state_dir: str, vmid: int) -> None:
    """Remove a VM's journal: nothing is left to undo."""
    for suffix in ("held", "json"):
        _unlink(_directory(state_dir) / f"{vmid}.{suffix}")
