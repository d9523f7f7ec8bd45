# SPDX-License-Identifier: Apache-2.0
"""Jobs as Bacula would have stored them, made without QEMU or Bacula.

``a_chain()`` is a Full and two Incrementals of a VM with two disks; one of the disks
was read whole in the middle, the other has zero clusters far from any data. With
``edges`` each job has an edges.bin, of that many bytes at both ends of its disks.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pveplug.images.chain import encode_objects
from pveplug.images.clusterhash import ClusterCutter
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.edges import EdgesWriter
from pveplug.images.manifest import (
    CONFIG_FILE,
    EDGES_FILE,
    FIREWALL_FILE,
    LAYOUT_FILE,
    MANIFEST_FILE,
    DiskEntry,
    Manifest,
    backing_name,
    digest_file,
    image_file,
    text_digest,
)
from pveplug.images.qcow2_writer import Qcow2StreamWriter
from pveplug.units import CLUSTER
from tests.support.images import Piece, map_of, pieces_of, without_zeroes, write_file

UUID = "1a2b3c4d-0000-0000-0000-000000000000"
CONFIG = "name: wéb\ncores: 2\n"
FIREWALL = "[OPTIONS]\nenable: 1\n"


@dataclass
class StoredFile:
    """One file of a job: its pieces as they were sent, and its attributes' size."""

    pieces: list[Piece] = field(repr=False)
    size: int


@dataclass
class StoredJob:
    """One job of one VM, its files in the order of the stream."""

    manifest: Manifest
    files: dict[str, StoredFile]
    objects: list[bytes] = field(repr=False)

    @property
    def name(self) -> str:
        return self.manifest.job


@dataclass
class StoredChain:
    """Jobs, oldest first, and what the disks held at the last of them."""

    jobs: list[StoredJob] = field(default_factory=list)
    truth: dict[str, bytes] = field(default_factory=dict, repr=False)

    def write(self, folder: Path) -> list[Path]:
        """Write the files as a restore by Bacula alone does; return the jobs' homes."""
        homes = []
        for job in self.jobs:
            home = folder / job.manifest.directory.lstrip("/")
            home.mkdir(parents=True)
            for name, file in job.files.items():
                write_file(home / name, file.pieces)
                assert (home / name).stat().st_size == file.size
            homes.append(home)
        return homes


def a_chain(
    plan: tuple[dict[str, str], ...] = (
        {"scsi0": "dd.ddd" + "d" * 35 + ".d", "scsi1": "dd.d"},
        {"scsi0": ".d.z.." + "." * 20 + "zz" + "." * 14 + "d", "scsi1": "!.ddd"},
        {"scsi0": "z...d." + "." * 33 + "z..d", "scsi1": "..zd"},
    ),
    *,
    vmid: int = 100,
    seed: int = 1,
    digests: bool = True,
    edges: int = 0,
) -> StoredChain:
    """Make a chain; a letter per 64 KiB of a disk, ``!`` before those read whole."""
    noise = random.Random(seed)
    chain = StoredChain()
    parent: Manifest | None = None
    for number, kinds in enumerate(plan):
        name = f"nightly.2026-11-2{number}_22.35.59_5{number}"
        images, sidecars, maps = {}, {}, {}
        entries, roots, ends = [], {}, EdgesWriter()
        for key, letters in kinds.items():
            alone = number == 0 or letters.startswith("!")
            letters = letters.lstrip("!")
            # No whole number of clusters, and a disk that grows from job to job.
            size = len(letters) * CLUSTER - 1024 + 512 * (number and key == "scsi1")
            clusters = map_of(letters, size, 16)
            disk = _content(chain.truth.get(key, b""), clusters, alone, noise)
            chain.truth[key] = disk
            backing = backing_name(parent.job, key) if parent and not alone else None
            ends.begin(key, size)
            tail = max(len(letters) * CLUSTER - edges, edges)
            for start, end in ((0, edges), (tail, size)):
                for run in clusters.data_runs(start, end) if edges else ():
                    ends.add(run.offset, disk[run.offset : run.end])
            writer = Qcow2StreamWriter(clusters, backing=backing)
            sent = pieces_of(writer, lambda at, n, disk=disk: disk[at : at + n])
            pieces = _joined(without_zeroes(sent, 512))
            images[image_file(key)] = StoredFile(pieces, writer.file_size)
            maps[key] = clusters
            entry = DiskEntry(
                key,
                size,
                file=image_file(key),
                backing=backing,
                data_bytes=clusters.data_bytes,
                zero_bytes=clusters.zero_bytes,
            )
            entries.append(entry)
            roots[key] = ""
            if digests:
                sidecar, roots[key] = _digests(clusters, disk, backing is not None)
                sidecars[digest_file(key)] = sidecar
        copies = ends.finish() if edges else b""
        layout = Manifest(
            vmid, UUID, "wéb", name, parent.job if parent else None,
            "I" if parent else "F", 1_790_000_000 + number, "pve1", "crash-consistent",
            CONFIG, firewall=FIREWALL, disks=tuple(entries), chain="c01234567",
            parent_manifest=parent.digest if parent else None,
            edges=text_digest(copies) if copies else "",
        )  # fmt: skip
        manifest = dataclasses.replace(
            layout,
            disks=tuple(
                dataclasses.replace(entry, digest_root=roots[entry.key])
                for entry in entries
            ),
        )
        papers = {CONFIG_FILE: CONFIG.encode(), FIREWALL_FILE: FIREWALL.encode()}
        files = {name: _small(text) for name, text in papers.items()}
        files[LAYOUT_FILE] = _small(layout.to_json())
        if copies:
            files[EDGES_FILE] = _small(copies)
        files |= images
        files |= {name: _small(content) for name, content in sidecars.items()}
        files[MANIFEST_FILE] = _small(manifest.to_json())
        blobs = [content for _, content in encode_objects(manifest, maps)]
        chain.jobs.append(StoredJob(manifest, files, blobs))
        parent = manifest
    return chain


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join pieces that touch, up to a cluster, as a sender does."""
    joined: list[Piece] = []
    for at, piece in pieces:
        last, before = joined[-1] if joined else (0, b"")
        if joined and last + len(before) == at and at % CLUSTER:
            joined[-1] = (last, before + piece)
        else:
            joined.append((at, piece))
    return joined


def _small(content: bytes) -> StoredFile:
    return StoredFile([(0, content)], len(content))


def _content(
    before: bytes, clusters: ClusterMap, alone: bool, noise: random.Random
) -> bytes:
    size = clusters.size
    disk = bytearray(b"" if alone else before[:size]).ljust(size, b"\0")
    for run in clusters.zero_runs():
        disk[run.offset : run.end] = bytes(run.length)
    for run in clusters.data_runs():
        disk[run.offset : run.end] = noise.randbytes(run.length)
    return bytes(disk)


def _digests(clusters: ClusterMap, disk: bytes, overlay: bool) -> tuple[bytes, str]:
    writer = DigestWriter(clusters, overlay=overlay)
    cutter = ClusterCutter(clusters.size)
    for run in clusters.data_runs():
        data = bytearray(disk[run.offset : run.end])
        for number, found in cutter.take(run.offset, data, 0, len(data)):
            writer.add(number, found)
    return writer.finish()
