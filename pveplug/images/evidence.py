# SPDX-License-Identifier: Apache-2.0
"""What one job's files say of each other, in whatever order they come.

Everything is told at least twice: the manifest has the texts of ``vm.conf`` and
``firewall.fw``, the digest of ``edges.bin`` and the root of each disk's digests,
``layout.json`` is the manifest without those roots, a restore object is the manifest
once more, and each image says of which disk and on whose image it is. A change of any
of them contradicts another::

    restore object == manifest.json ==(but roots) layout.json
        ├─ vm.conf, firewall.fw, edges.bin
        └─ per disk: root == BLAKE3(scsi0.digests) == what the image's data gives

A :class:`JobEvidence` compares each pair as soon as both sides are there.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.images.digests import DigestVerifier
from pveplug.images.manifest import (
    CONFIG_FILE,
    EDGES_FILE,
    FIREWALL_FILE,
    LAYOUT_FILE,
    MANIFEST_FILE,
    MAX_JSON,
    DiskEntry,
    Manifest,
    digest_file,
)
from pveplug.images.qcow2_reader import ImageHeader

_DIGESTS: Final = ".digests"


def is_paper(file: str) -> bool:
    """Whether a file's name is one that a job has beside its images."""
    papers = (CONFIG_FILE, FIREWALL_FILE, LAYOUT_FILE, EDGES_FILE, MANIFEST_FILE)
    return file in papers or file.endswith(_DIGESTS)


def check_header(job: str, entry: DiskEntry, header: ImageHeader) -> None:
    """Compare an image's header with what its job's manifest says of it.

    Raises:
        IntegrityError: it is another disk's or another job's image.
    """
    if header.backing != entry.backing:
        raise IntegrityError(
            f"job {job}: the image of {entry.key} names "
            f"{header.backing or 'no parent'} as what it builds on, its manifest says "
            f"{entry.backing or 'nothing'}: it is the image of another job, or damaged"
        )
    if header.size != entry.size:
        raise IntegrityError(
            f"job {job}: the image of {entry.key} is of a disk of {header.size} bytes, "
            f"its manifest says {entry.size}: it is another disk's image, or damaged"
        )


def check_counts(job: str, entry: DiskEntry, verifier: DigestVerifier) -> None:
    """Compare how much an image had with what its job's manifest says, at its end.

    Raises:
        IntegrityError: it has more or fewer data clusters or zero clusters.
    """
    data, zero = verifier.counts
    wanted = entry.zero_bytes if entry.backing is not None else 0
    if (data, zero) != (entry.data_bytes, wanted):
        raise IntegrityError(
            f"job {job}: the image of {entry.key} has {data} bytes of data and {zero} "
            f"of zero clusters, its manifest says {entry.data_bytes} and {wanted}"
        )


class Paper:
    """One small file as it comes: hashed, and kept where its content is needed."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._kept: bytearray | None = None
        if file in (MANIFEST_FILE, LAYOUT_FILE):
            self._kept = bytearray()
        self._hash = blake3()
        self._length = 0

    def add(self, offset: int, view: bytes | bytearray | memoryview) -> None:
        """Add bytes, in order and without a gap.

        Raises:
            IntegrityError: they leave a gap, or are too many for a manifest.
        """
        if offset != self._length:
            raise IntegrityError(
                f"{self.file}: bytes for {offset} come after {self._length}"
            )
        self._hash.update(view)
        self._length += len(view)
        if self._kept is not None:
            self._kept += view
            if self._length > MAX_JSON:
                raise IntegrityError(f"{self.file} is longer than {MAX_JSON} bytes")

    @property
    def content(self) -> bytes:
        """All of it; empty for a file that is only hashed."""
        return bytes(self._kept or b"")

    @property
    def digest(self) -> str:
        return self._hash.hexdigest(16)


class JobEvidence:
    """All that is known of one VM in one job.

    Args:
        directory: where its files are in the backup, ``/@proxmox/100-1a2b3c4d/JOB``.
        known: its manifest as the catalogue has it.

    Every method that adds raises IntegrityError at the first contradiction; the text
    begins with the job and names the file. What contradicted is then as if it had not
    been added: it may be the others' turn to be judged.
    """

    def __init__(self, directory: str, known: Manifest | None = None) -> None:
        self.directory = directory
        self.job = directory.rsplit("/", 1)[-1]
        self.known = known
        self.layout: Manifest | None = None
        self.manifest: Manifest | None = None
        self._papers: dict[str, str] = {}
        self._roots: dict[str, str] = {}
        self._check()

    @property
    def best(self) -> Manifest | None:
        """The manifest, where it is known with its digests' roots, else the layout."""
        return self.known or self.manifest or self.layout

    @property
    def proven(self) -> Manifest | None:
        """The manifest with its digests' roots; None as long as it has not come."""
        return self.known or self.manifest

    @property
    def unproven(self) -> tuple[str, ...]:
        """Disks whose image was read and whose digests' root has not come."""
        return () if self.proven else tuple(self._roots)

    @property
    def without_image(self) -> tuple[str, ...]:
        """Disks of the job whose image was not read."""
        disks = self.best.disks if self.best else ()
        return tuple(disk.key for disk in disks if disk.key not in self._roots)

    def paper(self, paper: Paper) -> None:
        """Add a small file."""
        before = self.manifest, self.layout
        try:
            if paper.file == MANIFEST_FILE:
                self.manifest = Manifest.from_json(paper.content)
            elif paper.file == LAYOUT_FILE:
                self.layout = Manifest.from_json(paper.content)
        except IntegrityError as error:
            raise self._error(paper.file, str(error)) from error
        self._papers[paper.file] = paper.digest
        try:
            self._check()
        except IntegrityError:
            self.manifest, self.layout = before
            del self._papers[paper.file]
            raise

    def image(self, key: str, root: str) -> None:
        """Add the digests' root of an image as it was read to its end."""
        self._roots[key] = root
        try:
            self._check()
        except IntegrityError:
            del self._roots[key]
            raise

    def _error(self, file: str, text: str) -> IntegrityError:
        return IntegrityError(f"job {self.job}: {file}: {text}")

    def _check(self) -> None:
        for file, made in (
            (MANIFEST_FILE, self.manifest),
            (LAYOUT_FILE, self.layout),
            ("the restore object", self.known),
        ):
            if made is not None and made.directory != self.directory:
                raise self._error(file, f"it belongs to {made.directory}")
        if self.known and self.manifest and self.known != self.manifest:
            raise self._error(MANIFEST_FILE, "it differs from the restore object's")
        proven = self.proven
        if proven and self.layout and _without_roots(proven) != self.layout:
            raise self._error(LAYOUT_FILE, "it differs from the manifest")
        if (best := self.best) is None:
            return
        self._check_text(CONFIG_FILE, best.config)
        self._check_text(FIREWALL_FILE, best.firewall)
        if self._papers.get(EDGES_FILE, best.edges) != best.edges:
            raise self._error(
                EDGES_FILE, "it is not the file whose digest the manifest has"
            )
        if proven is not None:
            for disk in proven.disks:
                self._check_roots(disk)

    def _check_text(self, file: str, wanted: str | None) -> None:
        found = self._papers.get(file)
        if found is None:
            return
        if wanted is None or found != blake3(wanted.encode()).hexdigest(16):
            raise self._error(file, "it is not the text that the manifest has of it")

    def _check_roots(self, disk: DiskEntry) -> None:
        file = digest_file(disk.key)
        found = self._papers.get(file)
        if found is not None and found != disk.digest_root:
            raise self._error(
                file, "these are not the digests whose root the manifest has"
            )
        root = self._roots.get(disk.key)
        if root is not None and disk.digest_root and root != disk.digest_root:
            raise IntegrityError(
                f"job {self.job}: the image's digests are not those of its manifest; "
                f"what Bacula gave back of {disk.key} is not what was stored"
            )


def _without_roots(manifest: Manifest) -> Manifest:
    disks = tuple(dataclasses.replace(d, digest_root="") for d in manifest.disks)
    return dataclasses.replace(manifest, disks=disks)
