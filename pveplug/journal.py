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
    locked: bool = False
    """We have set, or were about to set, ``lock: backup`` in the VM's configuration."""
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


class Journal:
    """An open entry; every change is on disk before it returns."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path = path
        self.entry = entry

    def note(self, **changes: Any) -> None:
        """Set fields and write the entry."""
        for name, value in changes.items():
            setattr(self.entry, name, value)
        self._write()

    def add(self, name: str, value: Any) -> None:
        """Append to one of the lists and write the entry."""
        getattr(self.entry, name).append(value)
        self._write()

    def drop(self, name: str, value: Any) -> None:
        """Take out of one of the lists and write the entry."""
        with contextlib.suppress(ValueError):
            getattr(self.entry, name).remove(value)
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self.entry), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def close(self) -> None:
        """Nothing is left to undo."""
        self._path.unlink(missing_ok=True)


def _directory(state_dir: str) -> Path:
    path = Path(state_dir) / "vms"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def read_entry(state_dir: str, vmid: int) -> Entry | None:
    """Return the journal that is there for a VM, or None."""
    path = _directory(state_dir) / f"{vmid}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Entry(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OSError) as error:
        # A journal is renamed into place whole; a broken one is a broken disk. What
        # can be found without it (QEMU, the lock) is then all there is to go by.
        log.warning("journal path=%s error=%s", path, error)
        return Entry(vmid, "(unreadable journal)", "backup", touched=True)


def entries_of(state_dir: str, job: str) -> Iterator[Entry]:
    """Yield the journals a job has left."""
    for path in sorted(_directory(state_dir).glob("*.json")):
        if path.stem.isdigit() and (entry := read_entry(state_dir, int(path.stem))):
            if entry.job == job:
                yield entry


@contextlib.asynccontextmanager
async def own_vm(state_dir: str, vmid: int, wait_s: float) -> AsyncIterator[None]:
    """Be the only job of ours on a VM of this node.

    Raises:
        JobError: another job has it, and did not end within ``wait_s`` seconds.
    """
    directory = _directory(state_dir)
    with (directory / f"{vmid}.lock").open("a") as file:
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
        yield


def open_journal(state_dir: str, vmid: int, job: str, kind: str) -> Journal:
    """Begin a VM's journal; the caller holds the VM with :func:`own_vm`."""
    entry = Entry(vmid, job, kind, pid=os.getpid(), started=time.time())
    journal = Journal(_directory(state_dir) / f"{vmid}.json", entry)
    journal.note()
    return journal


def write_entry(state_dir: str, entry: Entry) -> None:
    """Replace a VM's journal by what is left to undo."""
    Journal(_directory(state_dir) / f"{entry.vmid}.json", entry).note()


def forget(state_dir: str, vmid: int) -> None:
    """Remove a VM's journal: nothing is left to undo."""
    (_directory(state_dir) / f"{vmid}.json").unlink(missing_ok=True)
