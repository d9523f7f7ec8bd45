# SPDX-License-Identifier: Apache-2.0
"""The Verify engine: files that Bacula restored by itself, against what they say.

::

    arguments ──► job directories ──► their manifests ──► hash chain
                       └─ per job: papers against the manifest, then each image once:
                          structure, header, every digest, where its parent is

A job directory is ``…/100-1a2b3c4d/JOB`` with a manifest, a layout or digests in it, or
with images below ``@proxmox``. Memory: a buffer, one disk's digests (16 bytes per MiB)
and the manifests. Holes are not read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pveplug.errors import IntegrityError
from pveplug.images.chain import check_parent
from pveplug.images.digests import DigestVerifier, root_of
from pveplug.images.evidence import (
    JobEvidence,
    Paper,
    check_counts,
    check_header,
    is_paper,
)
from pveplug.images.manifest import (
    CONFIG_FILE,
    EDGES_FILE,
    FIREWALL_FILE,
    LAYOUT_FILE,
    MANIFEST_FILE,
    PREFIX,
    DiskEntry,
    Manifest,
    digest_file,
    parse_backing,
)
from pveplug.images.qcow2_reader import ImageHeader, Qcow2StreamReader
from pveplug.units import MiB, human

IMAGE: Final = ".qcow2"
PIECE: Final = 1 * MiB
_VM_DIRECTORY: Final = re.compile(r"\d+-[0-9a-z-]+")

OK: Final = "ok"
UNPROVEN: Final = "unproven"
DAMAGED: Final = "damaged"
MISSING: Final = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one file in the end.

    Attributes:
        state: ``ok``; ``unproven``: well-formed, but nothing has digests of its data;
            ``damaged``; ``missing``.
        vm: the VM's directory; ``job``, ``disk``: what the file is of.
        disk_offset, file_offset: where it is damaged, in bytes, where that is known.
    """

    path: str
    state: str
    text: str = ""
    vm: str = ""
    job: str = ""
    disk: str | None = None
    disk_offset: int | None = None
    file_offset: int | None = None

    @property
    def good(self) -> bool:
        return self.state in (OK, UNPROVEN)


@dataclass(slots=True)
class _Job:
    """One job directory."""

    path: Path
    chosen: set[str] = field(default_factory=set)
    """Files to look at; with ``whole`` also those that should be there."""
    whole: bool = False
    manifest: Manifest | None = None

    def load(self) -> None:
        """Read the manifest, where there is one that is well-formed."""
        with contextlib.suppress(IntegrityError, OSError):
            paper, _ = _read_paper(self.path / MANIFEST_FILE)
            self.manifest = Manifest.from_json(paper.content)

    @property
    def vm(self) -> str:
        return self.path.parent.name

    @property
    def directory(self) -> str:
        """Where it was in the backup; a VM's directory may have been renamed."""
        vm = self.vm
        if self.manifest is not None and not _VM_DIRECTORY.fullmatch(vm):
            vm = self.manifest.directory.split("/")[-2]
        return f"{PREFIX}/{vm}/{self.path.name}"


class _DamageError(Exception):
    """An image is not what it should be."""

    def __init__(self, error: IntegrityError, on_disk: bool) -> None:
        super().__init__(str(error))
        self.disk_offset = error.offset if on_disk else None
        self.file_offset = None if on_disk else error.offset


class Verify:
    """One verification; ``run`` once.

    Attributes:
        findings: one for each file, in the order they were looked at.
        nothing_at: arguments at which there is no file of ours.
        total, done: bytes of images to be read and read so far.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        on_finding: Callable[[Finding], None] = lambda _: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._paths = list(paths)
        self._on_finding = on_finding
        self._on_progress = on_progress
        self._chosen: dict[Path, _Job] = {}
        self._siblings: dict[Path, _Job] = {}
        self._missing: set[Path] = set()
        self._buffer = bytearray(PIECE)
        self.findings: list[Finding] = []
        self.nothing_at: list[str] = []
        self.total = self.done = 0

    @property
    def jobs(self) -> int:
        """Number of job directories."""
        return len(self._chosen)

    def count(self, state: str) -> int:
        return sum(finding.state == state for finding in self.findings)

    @property
    def good(self) -> bool:
        """Whether something was found and nothing is wrong with it."""
        return bool(self.findings) and all(f.good for f in self.findings)

    def run(self) -> None:
        """Look at everything; what is wrong becomes a finding, never an exception."""
        self.nothing_at = [p for p in self._paths if not self._find(_absolute(p))]
        for job in self._chosen.values():
            job.load()
            for name in job.chosen:
                if name.endswith(IMAGE):
                    with contextlib.suppress(OSError):
                        status = (job.path / name).stat()
                        self.total += min(status.st_blocks * 512, status.st_size)
        for job in sorted(self._chosen.values(), key=_age):
            self._check(job)

    # --- what there is ---------------------------------------------------------------

    def _find(self, path: Path) -> bool:
        """Choose what is at a path; return whether anything of ours is."""
        found = False
        if path.is_file():
            if found := _is_ours(path.name):
                self._job(path.parent).chosen.add(path.name)
            return found
        for folder, _, files in os.walk(path):
            if _is_job(Path(folder), files):
                job = self._job(Path(folder))
                job.whole = found = True
                job.chosen.update(name for name in files if _is_ours(name))
        return found

    def _job(self, path: Path) -> _Job:
        return self._chosen.setdefault(path, _Job(path))

    def _sibling(self, job: _Job, name: str) -> _Job:
        """Return a job of the same VM, chosen or not, with its manifest loaded."""
        path = job.path.parent / name
        if path in self._chosen:
            return self._chosen[path]
        if path not in self._siblings:
            self._siblings[path] = _Job(path)
            self._siblings[path].load()
        return self._siblings[path]

    # --- one job ---------------------------------------------------------------------

    def _check(self, job: _Job) -> None:
        evidence = JobEvidence(job.directory)
        sidecars: dict[str, bytes] = {}
        papers = {name for name in job.chosen if is_paper(name)}
        # The manifest comes first, chosen or not: all else is compared with it.
        for name in [MANIFEST_FILE, *sorted(papers - {MANIFEST_FILE})]:
            if name in papers or (job.path / name).exists():
                self._check_paper(job, evidence, name, sidecars, say=name in papers)
        if job.whole:
            self._expect(job, evidence)
        entries: dict[str, DiskEntry] = {}
        if evidence.best is not None:
            entries = {disk.image: disk for disk in evidence.best.disks}
        for name in sorted(name for name in job.chosen if name.endswith(IMAGE)):
            self._check_image(job, evidence, name, entries.get(name), sidecars)
        for entry in entries.values():
            if entry.image in job.chosen:
                self._check_line(job, entry)

    def _check_paper(
        self,
        job: _Job,
        evidence: JobEvidence,
        name: str,
        sidecars: dict[str, bytes],
        *,
        say: bool,
    ) -> None:
        key = name.removesuffix(".digests") if name.endswith(".digests") else None
        try:
            paper, content = _read_paper(job.path / name)
            evidence.paper(paper)
            if name == MANIFEST_FILE and evidence.manifest is not None:
                self._check_parent(job, evidence.manifest)
            sidecars[name] = content
        except IntegrityError as error:
            self._say(job, name, DAMAGED, str(error), disk=key)
        except OSError as error:
            self._say(job, name, DAMAGED, _unreadable(error), disk=key)
        else:
            if say:
                self._say(job, name, OK, disk=key)

    def _check_parent(self, job: _Job, manifest: Manifest) -> None:
        if manifest.built_on is None or "/" in manifest.built_on:
            return
        parent = self._sibling(job, manifest.built_on).manifest
        if parent is not None:
            check_parent(manifest, parent.digest)

    def _expect(self, job: _Job, evidence: JobEvidence) -> None:
        """Say what a whole job directory lacks."""
        keys: dict[str, str | None] = dict.fromkeys(
            (MANIFEST_FILE, LAYOUT_FILE, CONFIG_FILE)
        )
        if (best := evidence.best) is not None:
            if best.firewall is not None:
                keys[FIREWALL_FILE] = None
            if best.edges:
                keys[EDGES_FILE] = None
            for disk in best.disks:
                keys[disk.image] = disk.key
                if disk.digest_root:
                    keys[digest_file(disk.key)] = disk.key
        for name, key in keys.items():
            if name not in job.chosen:
                self._say(job, name, MISSING, "its job had it", disk=key)

    # --- one image -------------------------------------------------------------------

    def _check_image(
        self,
        job: _Job,
        evidence: JobEvidence,
        name: str,
        entry: DiskEntry | None,
        sidecars: dict[str, bytes],
    ) -> None:
        key = entry.key if entry else name.removesuffix(IMAGE)
        best = evidence.best
        if best is not None and entry is None:
            text = "its job's manifest knows no such image"
            self._say(job, name, DAMAGED, text, disk=key)
            return
        sidecar = sidecars.pop(digest_file(key), None)
        root = entry.digest_root if entry else ""
        if sidecar is not None and root and root_of(sidecar) != root:
            sidecar = None  # that has been told; the root alone judges the image
        scan = _Scan(job, entry, sidecar, best.version if best else 1)
        try:
            for offset, view in self._pieces(job.path / name, scan):
                scan.receive(offset, view)
            found = scan.finish()
            evidence.image(key, found)
        except _DamageError as error:
            text = str(error) + self._whose(job, scan)
            self._say(
                job,
                name,
                DAMAGED,
                text,
                disk=key,
                disk_offset=error.disk_offset,
                file_offset=error.file_offset,
            )
        except IntegrityError as error:
            self._say(job, name, DAMAGED, str(error), disk=key)
        except OSError as error:
            self._say(job, name, DAMAGED, _unreadable(error), disk=key)
        else:
            data, zero = scan.verifier.counts
            text = f"{human(data)} of data, {human(zero)} of zero clusters"
            if root:
                self._say(job, name, OK, text, disk=key)
            elif evidence.proven is not None:
                text += "; the backup was made without digests (digests=no)"
                self._say(job, name, UNPROVEN, text, disk=key)
            else:
                text += "; without a manifest its digests can't be compared"
                self._say(job, name, UNPROVEN, text, disk=key)

    def _pieces(self, path: Path, scan: _Scan) -> Iterator[tuple[int, memoryview]]:
        """Yield what a file holds but its holes; a view is valid until the next."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            scan.file_size = size = os.fstat(fd).st_size
            view = memoryview(self._buffer)
            for start, end in _data_runs(fd, size):
                at = start
                while at < end:
                    count = os.preadv(fd, [view[: min(PIECE, end - at)]], at)
                    if not count:
                        break  # it became shorter meanwhile: the reader will say so
                    yield at, view[:count]
                    at += count
                    self.done += count
                    self._on_progress()
        finally:
            os.close(fd)

    def _whose(self, job: _Job, scan: _Scan) -> str:
        """Return a remark where another job's manifest fits an image's header."""
        header = scan.reader.header
        if header is None or scan.fits:
            return ""
        others = [
            f"job {other.path.name} of {other.vm}"
            for other in self._chosen.values()
            for disk in (other.manifest.disks if other.manifest else ())
            if (disk.backing, disk.size) == (header.backing, header.size)
            and other is not job
        ]
        return f" (its header fits {others[0]})" if len(others) == 1 else ""

    def _check_line(self, job: _Job, entry: DiskEntry) -> None:
        """Follow an image's backing names to one that stands alone."""
        seen = {job.path}
        at: _Job = job
        disk: DiskEntry | None = entry
        while disk is not None and disk.backing is not None:
            parent, file = parse_backing(disk.backing)
            older = self._sibling(at, parent)
            what = f"job {at.path.name}'s image of {disk.key} builds on it"
            if older.path in seen:
                text = f"disk {entry.key}: {what}, and it builds on that one"
                self._say(older, file, DAMAGED, text, disk=disk.key)
                return
            seen.add(older.path)
            if not (older.path / file).is_file():
                self._say(older, file, MISSING, what, disk=disk.key)
                return
            manifest = older.manifest
            disk = next(
                (d for d in manifest.disks if d.image == file)
                if manifest
                else iter(()),
                None,
            )
            at = older

    def _say(
        self,
        job: _Job,
        name: str,
        state: str,
        text: str = "",
        *,
        disk: str | None = None,
        disk_offset: int | None = None,
        file_offset: int | None = None,
    ) -> None:
        path = job.path / name
        if state == MISSING:
            if path in self._missing:
                return
            self._missing.add(path)
        finding = Finding(
            str(path),
            state,
            text,
            job.vm,
            job.path.name,
            disk,
            disk_offset,
            file_offset,
        )
        self.findings.append(finding)
        self._on_finding(finding)


class _Scan:
    """One image on its way through reader and digests."""

    def __init__(
        self,
        job: _Job,
        entry: DiskEntry | None,
        sidecar: bytes | None,
        version: int,
    ) -> None:
        self._job = job.path.name
        self._entry = entry
        self.reader = Qcow2StreamReader()
        self.file_size: int | None = None
        self.fits = True
        """Whether the header is that of the image its manifest speaks of."""
        try:
            self.verifier = DigestVerifier(sidecar, version=version)
        except IntegrityError:  # a sidecar whose root nobody has: that has been told
            self.verifier = DigestVerifier(version=version)

    def receive(self, offset: int, view: memoryview) -> None:
        """Take a piece of the file.

        Raises:
            _DamageError: it isn't what it should be.
        """
        try:
            events = self.reader.receive_data(offset, view)
        except IntegrityError as error:
            raise _DamageError(error, on_disk=False) from error
        for event in events:
            if isinstance(event, ImageHeader) and self._entry is not None:
                try:
                    check_header(self._job, self._entry, event)
                except IntegrityError as error:
                    self.fits = False
                    raise _DamageError(error, on_disk=False) from error
        try:
            self.verifier.receive(events)
        except IntegrityError as error:
            raise _DamageError(error, on_disk=True) from error

    def finish(self) -> str:
        """Return the root of the digests, at the file's end.

        Raises:
            _DamageError: something is missing, or differs.
        """
        try:
            self.reader.receive_eof(self.file_size)
        except IntegrityError as error:
            raise _DamageError(error, on_disk=False) from error
        try:
            root = self.verifier.finish()[1]
            if self._entry is not None:
                check_counts(self._job, self._entry, self.verifier)
        except IntegrityError as error:
            raise _DamageError(error, on_disk=True) from error
        return root


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))


def _is_ours(name: str) -> bool:
    return is_paper(name) or name.endswith(IMAGE)


def _is_job(folder: Path, files: list[str]) -> bool:
    if MANIFEST_FILE in files or LAYOUT_FILE in files:
        return True
    below = folder.parent.parent.name == PREFIX.strip("/")
    return below and any(_is_ours(name) for name in files)


def _age(job: _Job) -> tuple[str, int, str]:
    return job.vm, job.manifest.started if job.manifest else 0, job.path.name


def _unreadable(error: OSError) -> str:
    return f"it can't be read: {error.strerror or error}"


def _read_paper(path: Path) -> tuple[Paper, bytes]:
    """Read a small file; its content is returned where somebody needs it.

    Raises:
        IntegrityError: it is too long for what it should be.
        OSError: it can't be read.
    """
    paper = Paper(path.name)
    kept = bytearray()
    keep = path.name.endswith(".digests")
    with path.open("rb") as file:
        at = 0
        while piece := file.read(PIECE):
            paper.add(at, piece)
            at += len(piece)
            if keep:
                kept += piece
    return paper, bytes(kept)


def _data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of a file that aren't holes; all of it where that is unknown."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            if error.errno != errno.EINVAL:
                raise
            yield at, size
            return
        yield start, min(end, size)
        at = end
