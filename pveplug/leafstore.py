# SPDX-License-Identifier: Apache-2.0
"""Where the digests of what disks held are kept, and which of them are forgotten.

::

    <state_dir>/digests/key                             32 random bytes
    <state_dir>/digests/100/c0123abcd-1f2e3d4c/         a VM's files of one chain
        scsi0.nightly.2026-11-22_01.05.00_03            a Full's: complete
        scsi0.nightly.2026-11-23_01.05.00_07            what its overlay holds

A file is there if, and only if, the job has sent that image whole: it gets its name
when the VM's data has been sent and before the job can be a success. Files of jobs that
failed in the end do no harm, nobody names them. Everything here may be deleted at any
time: the next job that would have needed it sends the disk whole.

What blocks on the disk is called in worker threads. Nothing is locked: a VM is held by
one job of ours at a time, and only its files are touched (:meth:`LeafStore.sweep` but
looks at dates).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from pveplug.errors import IntegrityError, PveplugError
from pveplug.images.clusters import ClusterMap
from pveplug.images.leaves import (
    KEY,
    MAC,
    MAX_ROW,
    Header,
    Keys,
    LeafWriter,
    RunReader,
    merge,
    read_header,
    verify,
)
from pveplug.journal import sync_directory
from pveplug.units import KiB

log = logging.getLogger(__name__)

MERGE_ABOVE: Final = 32
"""A row of more files is merged into a complete one: as many are open at a time."""
KEEP_FULLS: Final = 3
KEEP_OTHERS: Final = 32
"""Newest Fulls, and newest other jobs, of a disk that a job may still name."""
FORGET_AFTER_S: Final = 100 * 86400
"""A chain without a job for so long is forgotten: its VM or its Job is gone."""
_BUFFER: Final = 32 * KiB
_NEW: Final = ".new-"


class NoDigestsError(PveplugError):
    """The state of a disk at a job isn't known; the disk is sent whole.

    Attributes:
        odd: something is wrong with a file that should be there.
    """

    def __init__(self, message: str, *, odd: bool = False) -> None:
        super().__init__(message)
        self.odd = odd


class Row:
    """The verified files that say what a disk held at a job; close it."""

    def __init__(self, files: list[BinaryIO], readers: list[RunReader]) -> None:
        self._files = files
        self.readers = readers
        """Oldest first, each at its beginning."""

    def __enter__(self) -> Row:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()


class Recording:
    """The file of one image, as that is being sent.

    That it can't be written never disturbs the backup: ``problem`` says why, and
    whoever would have needed the file finds none.
    """

    def __init__(
        self, path: Path, header: Header, clusters: ClusterMap, keys: Keys
    ) -> None:
        self.path = path
        self.header = header
        self.problem = ""
        self._new = path.with_name(_NEW + path.name)
        self._file: BinaryIO | None = None
        self._writer: LeafWriter | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = _create(self._new)
            self._writer = LeafWriter(header, clusters, keys, self._file.write)
        except OSError as error:
            self._give_up(error)

    def add(self, cluster: int, found: bytes | None) -> None:
        """Add the hash of one of the image's data clusters, in order; None: zeroes."""
        if self._writer is None:
            return
        try:
            self._writer.add(cluster, found)
        except (OSError, IntegrityError) as error:
            self._give_up(error)

    def add_all(self, first: int, found: Sequence[bytes | None]) -> None:
        """Add clusters in a row, as :meth:`add` each."""
        if self._writer is None:
            return
        try:
            self._writer.add_all(first, found)
        except (OSError, IntegrityError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.problem = f"{self.path.parent}: {_text(error)}"
        log.warning("digests path=%s not kept: %s", self.path, error)
        self.drop()

    def keep(self) -> None:
        """Give the file its name; whether that was done, ``problem`` tells. Blocks."""
        if self._writer is None or self._file is None:
            return
        try:
            self._writer.finish()
            _settle(self._file)
            self._writer = self._file = None
            if self.path.exists():
                # A job's name is its own but for a clock set back, or a FileSet that
                # names the VM twice. Which of the two a later job means is not known.
                self.path.unlink()
                self._new.unlink()
                self.problem = f"there were digests of job {self.header.job} already"
            else:
                self._new.replace(self.path)
            sync_directory(self.path.parent)
        except (OSError, IntegrityError) as error:
            self._give_up(error)

    def drop(self) -> None:
        """Remove what was written, unless it was kept."""
        self._writer = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                self._new.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class VmLeaves:
    """The files of one VM's chain."""

    folder: Path
    vm: str
    chain: str
    keys: Keys

    def path(self, disk: str, job: str) -> Path:
        """Return where a job's file of a disk is, or would be."""
        return self.folder / f"{disk}.{urllib.parse.quote(job, safe=' :')}"

    def open(self, disk: str, job: str, size: int) -> Row:
        """Return what a disk that now has ``size`` bytes held at a job. Blocks.

        Every byte of every file of the row is verified.

        Raises:
            NoDigestsError: it isn't known, and why.
        """
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            wanted: str | None = job
            mac, depth = "", MAX_ROW + 1
            while wanted is not None:
                try:
                    file = self.path(disk, wanted).open("rb", buffering=_BUFFER)
                    files.append(stack.enter_context(file))
                    length = os.fstat(file.fileno()).st_size
                    header, own_mac = verify(file, length, self.keys)
                    self._must_fit(header, disk, wanted, size, mac, own_mac.hex())
                    file.seek(0)
                except FileNotFoundError:
                    raise self._missing(job, wanted) from None
                except IntegrityError as error:
                    text = f"{self.path(disk, wanted)}: {error}"
                    raise NoDigestsError(text, odd=True) from error
                except OSError as error:
                    text = f"{self.path(disk, wanted)}: {_text(error)}"
                    raise NoDigestsError(text, odd=True) from error
                if header.depth >= depth:
                    raise NoDigestsError(f"{file.name}: its row has no end", odd=True)
                wanted, mac = header.parent, header.parent_mac
                size, depth = header.size, header.depth
            files.reverse()
            row = Row(files, self._readers(files))
            stack.pop_all()
            return row

    def _readers(self, files: Iterable[BinaryIO]) -> list[RunReader]:
        try:
            return [
                RunReader(file, os.fstat(file.fileno()).st_size, self.keys)
                for file in files
            ]
        except (OSError, IntegrityError) as error:
            raise NoDigestsError(f"{self.folder}: {_text(error)}", odd=True) from error

    @staticmethod
    def _missing(job: str, wanted: str) -> NoDigestsError:
        if wanted == job:
            return NoDigestsError(f"this node has no digests of job {job}")
        return NoDigestsError(
            f"job {job} builds on job {wanted}, of which this node has no digests"
        )

    def _must_fit(
        self, header: Header, disk: str, job: str, size: int, mac: str, own_mac: str
    ) -> None:
        said = (header.vm, header.chain, header.disk, header.job)
        if said != (self.vm, self.chain, disk, job):
            raise IntegrityError(
                f"it is of job {header.job}, disk {header.disk} of VM {header.vm}"
            )
        if mac and mac != own_mac:
            raise IntegrityError("it is not the one that its successor was made on")
        if header.size > size:
            raise NoDigestsError(f"the disk shrank from {header.size} to {size} bytes")

    def record(
        self,
        disk: str,
        clusters: ClusterMap,
        *,
        job: str,
        level: str,
        parent: str | None,
        began: int,
    ) -> Recording | None:
        """Begin the file of an image; None where there is nothing it could build on.

        Args:
            clusters: the image's map.
            parent: the job whose image lies below, None for none.
        """
        header = Header(
            vm=self.vm,
            chain=self.chain,
            disk=disk,
            job=job,
            level=level,
            size=clusters.size,
            began=began,
            key=self.keys.name,
        )
        if parent is not None:
            try:
                with self.path(disk, parent).open("rb") as file:
                    below, _ = read_header(file)
                    file.seek(-MAC, os.SEEK_END)
                    mac = file.read(MAC).hex()
            except (OSError, IntegrityError) as error:
                log.info("digests disk=%s parent=%s: none: %s", disk, parent, error)
                return None
            if below.key != self.keys.name or below.depth >= MAX_ROW:
                return None
            header = replace(
                header, parent=parent, parent_mac=mac, depth=below.depth + 1
            )
        return Recording(self.path(disk, job), header, clusters, self.keys)

    def shorten(self, header: Header) -> None:
        """Replace a file that was just kept by a complete one, if its row is long.

        Blocks. That it fails costs room, and one day a whole image.
        """
        if header.depth <= MERGE_ABOVE:
            return
        path = self.path(header.disk, header.job)
        new = path.with_name(_NEW + path.name)
        try:
            with self.open(header.disk, header.job, header.size) as row:
                complete = replace(header, parent=None, parent_mac="", depth=0)
                with _create(new) as file:
                    merge(row.readers, complete, self.keys, file.write)
                    _settle(file)
            new.replace(path)
            sync_directory(path.parent)
        except (OSError, IntegrityError, NoDigestsError) as error:
            log.warning("digests path=%s not merged: %s", path, error)
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)

    def prune(self, disks: Iterable[str]) -> None:
        """Forget what no job will name. Blocks; raises nothing.

        Kept are the newest Fulls and the newest other jobs of each of ``disks``, the
        VM's disks now, and all that these build on.
        """
        here = set(disks)
        try:
            found = list(self._files())
        except OSError as error:
            log.warning("digests path=%s not pruned: %s", self.folder, error)
            return
        kept: set[str] = set()
        for disk in here:
            of_disk = [header for _, header in found if header and header.disk == disk]
            for job in self._named(of_disk):
                kept.add(self.path(disk, job).name)
        for path, _ in found:
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _files(self) -> Iterator[tuple[Path, Header | None]]:
        for path in sorted(self.folder.iterdir()):
            header = None
            if not path.name.startswith(_NEW):
                with contextlib.suppress(IntegrityError), path.open("rb") as file:
                    header, _ = read_header(file)
            yield path, header

    @staticmethod
    def _named(headers: list[Header]) -> set[str]:
        """Return the jobs of one disk that may be named, and those below them."""
        newest = sorted(headers, key=lambda h: (h.began, h.job), reverse=True)
        fulls = [h.job for h in newest if h.level == "F"][:KEEP_FULLS]
        others = [h.job for h in newest if h.level != "F"][:KEEP_OTHERS]
        below = {h.job: h.parent for h in headers}
        kept: set[str] = set()
        for job in (*fulls, *others):
            at: str | None = job
            while at is not None and at not in kept:
                kept.add(at)
                at = below.get(at)
        return kept


class LeafStore:
    """All files of this node."""

    def __init__(self, state_dir: str) -> None:
        self._folder = Path(state_dir) / "digests"

    def vm(self, vmid: int, uuid: str, chain: str) -> VmLeaves:
        """Return a VM's part; makes the node's key at its first use. Blocks.

        Raises:
            NoDigestsError: the key can't be read or made.
        """
        try:
            keys = Keys.of(self._secret())
        except OSError as error:
            raise NoDigestsError(
                f"{self._folder / 'key'}: {_text(error)}", odd=True
            ) from error
        name = f"{vmid}-{uuid}"
        tail = hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
        return VmLeaves(self._folder / str(vmid) / f"{chain}-{tail}", name, chain, keys)

    def _secret(self) -> bytes:
        path = self._folder / "key"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if len(secret := path.read_bytes()) == KEY:
                return secret
            log.warning("digests path=%s is no key; another is made", path)
            path.unlink(missing_ok=True)
        new = self._folder / f"{_NEW}key.{os.getpid()}"
        try:
            new.unlink(missing_ok=True)
            with _create(new) as file:
                file.write(os.urandom(KEY))
                _settle(file)
            # Of two jobs that make one at the same time, one key stays.
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
            sync_directory(self._folder)
        finally:
            new.unlink(missing_ok=True)
        secret = path.read_bytes()
        if len(secret) != KEY:
            raise OSError("it is no key")
        return secret

    def sweep(self, now: float | None = None) -> None:
        """Forget chains that no job has touched for long. Blocks; raises nothing."""
        oldest = (time.time() if now is None else now) - FORGET_AFTER_S
        try:
            for vm in self._folder.iterdir():
                if not vm.is_dir():
                    continue
                for chain in list(vm.iterdir()):
                    # Every job that keeps a file changes its directory.
                    if chain.stat().st_mtime < oldest:
                        shutil.rmtree(chain, ignore_errors=True)
                with contextlib.suppress(OSError):
                    vm.rmdir()  # unless something is in it
        except OSError as error:
            log.warning("digests path=%s not swept: %s", self._folder, error)


def _create(path: Path) -> BinaryIO:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return open(fd, "wb", buffering=2 * _BUFFER)


def _settle(file: BinaryIO) -> None:
    """Bring a file onto stable storage and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _text(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
