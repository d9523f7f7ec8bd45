# SPDX-License-Identifier: Apache-2.0
"""What is written down of an instant recovery, and who may touch it.

One folder per VM, ``<landing_dir>/<vmid>/``::

    recovery.json    this record: made by the restore job, read by the keeper
    feed.lock        flock: the job that is delivering; free means nobody is
    keeper.lock      flock: the keeper, the process that serves the disks
    migrate          the disks shall move in the end, whatever the record says
    <key>.…          the landed disks, see pveplug.ir.landing

and below the runtime directory ``ir-<vmid>/`` the sockets and what a reboot may forget.
The folder goes only when the VM needs it no more: its disks have moved, or it was
discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pveplug.errors import IntegrityError, JobError, TransportError
from pveplug.journal import sync_directory
from pveplug.node import Node

RECORD: Final = "recovery.json"
FEED_LOCK: Final = "feed.lock"
KEEPER_LOCK: Final = "keeper.lock"
MIGRATE: Final = "migrate"
VERSION: Final = 1
POLL_S: Final = 0.2
OWNER_ONLY: Final = 0o700


@dataclass(frozen=True, slots=True)
class LandedDisk:
    """One disk of the recovered VM.

    Attributes:
        source: its key in the backup; its name in the landing store and as NBD export.
        key: where it is attached.
        size: bytes.
        storage: where it goes in the end, ``form`` its image format there.
        overlay: volume id of the overlay; empty for EFI variables and TPM state,
            which are copied whole before the start.
        options: of the drive, as they shall be in the end.
    """

    source: str
    key: str
    size: int
    storage: str
    form: str
    overlay: str = ""
    options: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Record:
    """An instant recovery; sizes in bytes, times in seconds.

    Attributes:
        vmid: of the recovered VM; ``uuid``: its SMBIOS UUID, by which it is known.
        node: this node's name in the cluster.
        directory: of the VM in the backup, ``head``: the job it is restored to.
        jobs: of the chain, oldest first; empty where only the stream told.
        job: unique name of the Bacula job that began it.
        created: by this node's clock.
        timeout: how long data may stay away before the VM is paused.
        bind, port: where its disks are served; no bind: a unix socket.
        notes: the VM's protection and onboot as they shall be.
        config: what the VM is told when it gets its disks, besides them; ``stale``:
            what it then must not have any more.
        prove: made for a proof, and goes with it.
        handed: the VM is its user's: only ``discard`` removes it.
        started: we have tried to start it; from then on that is its user's affair.
        verified: images that came whole and were as stored, as ``scsi0/JOB``.
        whole: all of its data came and was what had been stored; only then are its
            disks moved.
        damage: what was wrong with its data; empty: nothing is known.
    """

    vmid: int
    uuid: str
    node: str
    directory: str
    head: str
    job: str
    created: float
    timeout: int = 3600
    jobs: list[str] = field(default_factory=list)
    disks: list[LandedDisk] = field(default_factory=list)
    auto_migrate: bool = True
    bwlimit: int = 0
    bind: str = ""
    port: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    prove: bool = False
    handed: bool = False
    started: bool = False
    whole: bool = False
    verified: list[str] = field(default_factory=list)
    damage: str = ""

    @property
    def served(self) -> list[LandedDisk]:
        """The disks that the VM reads from us."""
        return [disk for disk in self.disks if disk.overlay]


class Recovery:
    """Where a recovery's things are."""

    def __init__(self, node: Node, vmid: int) -> None:
        self.vmid = vmid
        self.folder = Path(node.landing_dir) / str(vmid)
        self.runtime = Path(node.runtime_dir) / f"ir-{vmid}"

    @property
    def nbd_socket(self) -> str:
        """Where the disks are served."""
        return str(self.runtime / "nbd.sock")

    @property
    def control_socket(self) -> str:
        """Where the keeper takes orders."""
        return str(self.runtime / "keeper.sock")

    def make(self) -> None:
        """Make the folders, for root only.

        Raises:
            TransportError: they can't be made.
        """
        try:
            for place in (self.folder, self.runtime):
                place.parent.mkdir(OWNER_ONLY, parents=True, exist_ok=True)
                place.mkdir(OWNER_ONLY, exist_ok=True)
        except OSError as error:
            raise TransportError(
                f"cannot make {error.filename}: {error.strerror}; landing_dir in "
                "node.toml names the place for instant recovery"
            ) from error

    def make_runtime(self) -> None:
        """Make what a reboot has taken away."""
        self.runtime.mkdir(OWNER_ONLY, parents=True, exist_ok=True)

    def exists(self) -> bool:
        """Whether anything of it is there, finished or not."""
        return self.folder.exists() or self.runtime.exists()

    def load(self) -> Record | None:
        """Return the record; None: there is no recovery of this VM.

        Raises:
            IntegrityError: it can't be read; path and remedy are named.
        """
        path = self.folder / RECORD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        try:
            return _record(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"not a record of version {VERSION}: {error}") from None

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"{self.folder / RECORD} can't be read: {why}. The VM's own writes are in "
            "its overlays; to give the recovery up: stop and destroy the VM, then "
            f"remove {self.folder}"
        )

    def save(self, record: Record) -> None:
        """Write the record, on disk when this returns.

        Raises:
            TransportError: it can't be written.
        """
        path = self.folder / RECORD
        values = {"version": VERSION, **dataclasses.asdict(record)}
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(values, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except OSError as error:
            raise TransportError(f"cannot write {path}: {error.strerror}") from error

    @contextlib.asynccontextmanager
    async def feeding(self, wait_s: float) -> AsyncIterator[None]:
        """Be the one that delivers.

        Raises:
            JobError: another job delivers to this VM, still after ``wait_s``.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        with _opened(self.folder / FEED_LOCK) as fd:
            while not _locked(fd):
                if asyncio.get_running_loop().time() > deadline:
                    raise JobError(
                        "another restore job is delivering to it.",
                        vm=str(self.vmid),
                        phase="instant recovery",
                        remedy="wait for that job, or cancel it.",
                    )
                await asyncio.sleep(POLL_S)
            yield

    def want_migration(self) -> None:
        """Note that its disks shall move when all is here; outlives the keeper."""
        with contextlib.suppress(OSError):
            (self.folder / MIGRATE).touch()

    def migration_wanted(self) -> bool:
        """Whether :meth:`want_migration` was called."""
        return (self.folder / MIGRATE).exists()

    def fed(self) -> bool:
        """Whether a job is delivering."""
        return _held(self.folder / FEED_LOCK)

    def kept(self) -> bool:
        """Whether a keeper serves its disks."""
        return _held(self.folder / KEEPER_LOCK)

    @contextlib.asynccontextmanager
    async def keeping(self, wait_s: float = 1.0) -> AsyncIterator[bool]:
        """Be the keeper; False: there is one.

        Who asks :meth:`kept` holds the lock for a moment, hence ``wait_s``.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        with _opened(self.folder / KEEPER_LOCK) as fd:
            while not (ours := _locked(fd)):
                if asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.sleep(POLL_S)
            yield ours

    def remove(self) -> None:
        """Remove everything that is written down and landed; never raises."""
        with contextlib.suppress(OSError):
            (self.folder / RECORD).unlink()  # first: without it nothing resumes
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.runtime, ignore_errors=True)


def recoveries(node: Node) -> list[int]:
    """Return the VMs of this node that are being recovered, by id."""
    try:
        names = os.listdir(node.landing_dir)
    except OSError:
        return []
    return sorted(
        int(name)
        for name in names
        if name.isdecimal() and (Path(node.landing_dir) / name / RECORD).exists()
    )


def _record(values: Any) -> Record:
    if values.pop("version") != VERSION:
        raise ValueError("another version")
    disks = [
        LandedDisk(
            **{
                **disk,
                "options": tuple((str(k), str(v)) for k, v in disk["options"]),
            }
        )
        for disk in values.pop("disks")
    ]
    return Record(**values, disks=disks)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TransportError(f"cannot open {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: two who ask at once must not take each other for the holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)
