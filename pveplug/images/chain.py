# SPDX-License-Identifier: Apache-2.0
"""A chain of backups of one VM: who builds on whom, and who owns each cluster.

A disk's chain goes from the newest job's image along the backing names to an image
that stands alone. A disk that was read whole in the middle (no backing) cuts the older
jobs off for itself; a disk the newest job doesn't have isn't restored at all.

::

    cluster      0  1  2  3  4  5
    Full         d  d  d  .  .  .
    Incr 1       .  d  z  .  d  .
    Incr 2       .  .  d  .  z  .        newest that says anything owns it:
    owner        F  1  2  -  2  -        2 owns cluster 4 as a zero; nobody owns 3 and 5

With the owners known each cluster is written once, in whatever order the jobs come,
and :meth:`Chain.never_written` is what the target must read as zeroes by itself.
Sizes may change along the chain. As in qcow2, what lay beyond a smaller disk is gone:
growing again shows zeroes, so a job owns nothing beyond the smallest disk after it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pveplug.errors import IntegrityError
from pveplug.extents import Extent, Kind, coalesced
from pveplug.images.clusters import ClusterMap
from pveplug.images.manifest import (
    DiskEntry,
    Manifest,
    backing_name,
    digest_file,
    image_file,
    job_directory,
    parse_backing,
    vm_directory,
)
from pveplug.images.restore_object import (
    JobRecord,
    decode_objects,
    encode_objects,
)

__all__ = [
    "Chain",
    "DiskEntry",
    "JobRecord",
    "Manifest",
    "backing_name",
    "by_vm",
    "check_parent",
    "decode_objects",
    "digest_file",
    "encode_objects",
    "image_file",
    "job_directory",
    "parse_backing",
    "vm_directory",
]


def check_parent(manifest: Manifest, digest: str) -> None:
    """Compare the digest of a parent's manifest with the one its child names, if any.

    Raises:
        IntegrityError: it is another; both jobs are named.
    """
    if manifest.parent_manifest is not None and manifest.parent_manifest != digest:
        raise IntegrityError(
            f"the manifest of job {manifest.built_on} is not the one that job "
            f"{manifest.job} was built on: its digest is {digest}, and "
            f"{manifest.parent_manifest} was recorded"
        )


def by_vm(records: Iterable[JobRecord]) -> dict[str, list[JobRecord]]:
    """Group the records of a restore by their VM's directory, one group a Chain."""
    groups: dict[str, list[JobRecord]] = {}
    for record in records:
        directory = record.manifest.directory.rsplit("/", 1)[0]
        groups.setdefault(directory, []).append(record)
    return groups


@dataclass(slots=True)
class _Member:
    """One job's image in a disk's chain."""

    job: str
    disk: DiskEntry
    size: int  # what of this image can still be seen: see the module's last paragraph


@dataclass(slots=True)
class _Owners:
    """Who owns what of one disk; maps are packed."""

    packed: dict[str, bytes]  # by job
    written: bytes  # all of them together
    tails: list[Extent]  # zeroes behind the ends of smaller disks


class Chain:
    """What to restore: the newest job and all that its disks build on.

    Attributes:
        head: the manifest of the job to restore.
        jobs: unique names of the jobs needed, oldest first, the head last.
        unused: jobs given that no disk of the head needs.
        keys: the disks of the head, in its order.
    """

    def __init__(self, records: Iterable[JobRecord], head: str | None = None) -> None:
        """Put the records of one VM in order.

        Args:
            head: unique name of the job to restore; by default the one that no other
                record builds on, and of several such the newest.

        Raises:
            IntegrityError: no records, records of several VMs, a member of the chain
                is missing or is another than the one that was built on (the text
                names the job), or the links make no sense.
        """
        found: dict[str, JobRecord] = {}
        for record in records:
            found[record.manifest.job] = record
        if not found:
            raise IntegrityError("no manifest of any job: nothing can be restored")
        if len(vms := by_vm(found.values())) > 1:
            raise IntegrityError(f"manifests of several VMs: {', '.join(sorted(vms))}")
        self._records = found
        self.head = self._choose(head).manifest
        self.keys = tuple(disk.key for disk in self.head.disks)
        self._members = {disk.key: self._walk(disk) for disk in self.head.disks}
        self._owners: dict[str, _Owners] = {}
        needed = {self.head.job} | {
            member.job for members in self._members.values() for member in members
        }
        self.jobs = self._in_order(needed)
        for job in self.jobs:
            manifest = found[job].manifest
            if manifest.built_on in needed:
                check_parent(manifest, found[manifest.built_on].manifest.digest)
        self.unused = tuple(sorted(found.keys() - needed))

    def _choose(self, head: str | None) -> JobRecord:
        if head is not None:
            if head not in self._records:
                raise IntegrityError(f"the manifest of job {head} is missing")
            return self._records[head]
        built_on: set[str | None] = set()
        for record in self._records.values():
            built_on.add(record.manifest.parent_job)
            built_on.update(
                parse_backing(disk.backing)[0]
                for disk in record.manifest.disks
                if disk.backing is not None
            )
        ends = [rec for job, rec in self._records.items() if job not in built_on]
        if not ends:
            raise IntegrityError(
                f"jobs {', '.join(sorted(self._records))} build on each other in a ring"
            )
        return max(ends, key=lambda rec: (rec.manifest.started, rec.manifest.job))

    def _walk(self, disk: DiskEntry) -> list[_Member]:
        """Follow the backing names of one disk; return its members, oldest first."""
        job = self.head.job
        size = disk.size
        members = [_Member(job, disk, size)]
        seen = {job}
        while disk.backing is not None:
            parent, file = parse_backing(disk.backing)
            what = f"disk {members[0].disk.key}: job {job} builds on job {parent}"
            if parent in seen:
                raise IntegrityError(f"{what}, which builds on it")
            record = self._records.get(parent)
            if record is None:
                raise IntegrityError(
                    f"{what}, which is missing: restore all jobs of the chain together"
                )
            older = next((d for d in record.manifest.disks if d.image == file), None)
            if older is None:
                raise IntegrityError(f"{what}, which has no {file}")
            seen.add(parent)
            job, disk = parent, older
            size = min(size, disk.size)
            members.append(_Member(job, disk, size))
        members.reverse()
        return members

    def _in_order(self, needed: set[str]) -> tuple[str, ...]:
        """Sort jobs so that each comes after those its disks build on."""
        depth = dict.fromkeys(needed, 0)
        # Depth 0 is the head; a job lies deeper than all that build on it. The longest
        # way has one step less than there are jobs, so the last round moves nothing.
        for _ in range(len(needed)):
            moved = False
            for members in self._members.values():
                for older, newer in itertools.pairwise(members):
                    if depth[older.job] <= depth[newer.job]:
                        depth[older.job] = depth[newer.job] + 1
                        moved = True
            if not moved:
                break
        else:
            raise IntegrityError("the disks' chains contradict each other")
        started = {job: self._records[job].manifest.started for job in needed}
        return tuple(sorted(needed, key=lambda job: (-depth[job], started[job], job)))

    def record(self, job: str) -> JobRecord:
        """Return one job's record."""
        return self._records[job]

    def members(self, key: str) -> tuple[str, ...]:
        """Return the jobs whose images of this disk are needed, oldest first."""
        return tuple(member.job for member in self._members.get(key, []))

    def needs(self, job: str, key: str) -> bool:
        """Whether a job's image of a disk has any part in the restored disk."""
        return job in self.members(key)

    def disk(self, job: str, key: str) -> DiskEntry | None:
        """Return the entry by which a job is a member of a disk's chain.

        ``key`` is the disk's name in the head.
        """
        return next((m.disk for m in self._members.get(key, []) if m.job == job), None)

    def final_size(self, key: str) -> int:
        """Return the size in bytes that the restored disk has."""
        return self._members[key][-1].disk.size

    def mapped(self, key: str) -> bool:
        """Whether every member's map is known; if not, replay the members in order."""
        return all(
            self._records[member.job].maps is not None
            and member.disk.key in (self._records[member.job].maps or {})
            for member in self._members[key]
        )

    def owned(self, job: str, key: str) -> ClusterMap:
        """Return the clusters of a disk that this job has the last word on.

        The map ends where the job can still be seen, at most at the restored disk's
        end. A job that isn't a member owns nothing.

        Raises:
            IntegrityError: a member's map is unknown (see :meth:`mapped`) or damaged.
        """
        found = self._find_owners(key)
        if job in found.packed:
            return ClusterMap.from_bytes(found.packed[job])
        bits = ClusterMap.from_bytes(found.written).cluster_bits
        return ClusterMap(self.final_size(key), bits)

    def _find_owners(self, key: str) -> _Owners:
        """Go from the newest member to the oldest, each taking what is left.

        Two maps are unpacked at any moment, 8 MiB for a disk of 1 TiB, however long
        the chain is.
        """
        if key in self._owners:
            return self._owners[key]
        size = self.final_size(key)
        claimed: ClusterMap | None = None
        found = _Owners({}, b"", [])
        for member in reversed(self._members[key]):
            mine = self._records[member.job].map(member.disk.key)
            if mine is None:
                raise IntegrityError(
                    f"disk {key}: the extent map of job {member.job} is unknown"
                )
            if mine.size != member.size:
                mine = mine.resized(member.size)
            claimed = claimed or ClusterMap(size, mine.cluster_bits)
            if mine.cluster_bits != claimed.cluster_bits:
                raise IntegrityError(
                    f"disk {key}: job {member.job} has clusters of "
                    f"{mine.cluster_size} bytes, later ones {claimed.cluster_size}"
                )
            mine.discard(claimed)
            claimed.update(mine)
            # The cluster in which a smaller disk ended: what follows in it is zero.
            border = min(mine.clusters << mine.cluster_bits, size)
            if mine.size < border and mine.kind_at(mine.clusters - 1) is Kind.DATA:
                found.tails.append(Extent(mine.size, border - mine.size, Kind.ZERO))
            found.packed[member.job] = mine.to_bytes()
        # The newest member is the head itself, so there is one.
        found.written = claimed.to_bytes() if claimed else b""
        self._owners[key] = found
        return found

    def never_written(self, key: str) -> Iterator[Extent]:
        """Yield the extents of the restored disk for which no member has bytes.

        They must read as zeroes. Clusters that are zero clusters in their owner are
        among them. Sorted, kind ZERO, in bytes.

        Raises:
            IntegrityError: as for :meth:`owned`.
        """
        found = self._find_owners(key)
        whole = (
            Extent(run.offset, run.length, Kind.ZERO)
            for run in ClusterMap.from_bytes(found.written).runs()
            if run.kind is not Kind.DATA
        )
        tails = sorted(found.tails, key=_offset)
        return coalesced(heapq.merge(whole, tails, key=_offset))


def _offset(extent: Extent) -> int:
    return extent.offset
