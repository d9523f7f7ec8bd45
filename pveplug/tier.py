# SPDX-License-Identifier: Apache-2.0
"""The second tier of change tracking, as one job uses it for one VM.

Where the bitmaps can't tell what changed since job P, the disk is read whole, compared
with the digests that P left on this node, and only what differs is sent, as an overlay
on P's image. So every job leaves the digests of what it sends. docs/cbt.md, "The second
tier".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pveplug.cbt import Level, chain_id
from pveplug.compare import compare
from pveplug.diskstream import Progress, RateLimit
from pveplug.events import Reporter
from pveplug.images.clusters import ClusterMap
from pveplug.leafstore import LeafStore, NoDigestsError, Recording, VmLeaves
from pveplug.nbd.client import NbdClient
from pveplug.tasks import to_the_end


class Tier:
    """One VM's digests during one job; ``drop`` it on every way out."""

    def __init__(
        self, state_dir: str, vmid: int, job: str, level: Level, say: Reporter
    ) -> None:
        """Make one that isn't ``open``: it compares nothing and keeps nothing."""
        self._store = LeafStore(state_dir)
        self._vmid = vmid
        self._job = job
        self._level = level
        self._say = say
        self._leaves: VmLeaves | None = None
        self._recordings: list[Recording] = []
        self.progress: list[tuple[str, Progress]] = []
        """The disks that were or are compared."""

    async def open(self, uuid: str) -> None:
        """Make or read the node's key; says so where that fails."""
        try:
            self._leaves = await asyncio.to_thread(
                self._store.vm, self._vmid, uuid, chain_id(self._job)
            )
        except NoDigestsError as error:
            self._say.warning(
                f"VM {self._vmid}: no digests are kept or compared: {error}"
            )

    @property
    def parent(self) -> str | None:
        """The job whose image a compared disk builds on."""
        return self._level.parent_job if self._level.letter != "F" else None

    async def changes(
        self,
        key: str,
        client: NbdClient,
        found: ClusterMap,
        *,
        trim: bool,
        limit: RateLimit,
    ) -> tuple[ClusterMap, Progress] | None:
        """Return what changed since ``parent`` on a disk; None where nobody can tell.

        Args:
            found: the disk's allocation, all of it.

        Raises: as :func:`pveplug.compare.compare`.
        """
        leaves, parent = self._leaves, self.parent
        if leaves is None or parent is None or not _compared(key):
            return None
        opening = asyncio.to_thread(leaves.open, key, parent, client.size)
        try:
            row = await to_the_end(opening)
        except NoDigestsError as error:
            text = f"VM {self._vmid} {key}: not compared, all of it is sent: {error}"
            (self._say.warning if error.odd else self._say.info)(text)
            return None
        progress = Progress()
        self.progress.append((key, progress))
        with row, limit.shared():
            changed = await compare(
                client,
                found,
                row.readers,
                leaves.keys,
                trim=trim,
                limit=limit,
                progress=progress,
            )
        return changed, progress

    def record(
        self, key: str, clusters: ClusterMap, parent: str | None, began: int
    ) -> Recording | None:
        """Begin the digests of an image; None where none are kept."""
        if self._leaves is None or not _compared(key):
            return None
        recording = self._leaves.record(
            key,
            clusters,
            job=self._job,
            level=self._level.letter,
            parent=parent,
            began=began,
        )
        if recording is not None:
            self._recordings.append(recording)
        return recording

    async def keep(self, disks: Sequence[str]) -> None:
        """Keep the digests of all images, which have been sent; forget old ones.

        Args:
            disks: keys of all disks of the VM that are in the job.
        """
        if self._leaves is not None:
            await to_the_end(asyncio.to_thread(self._keep, self._leaves, disks))
        for recording in self._recordings:
            if recording.problem:
                self._say.warning(
                    f"VM {self._vmid} {recording.header.disk}: no digests are kept of "
                    f"this job: {recording.problem}"
                )

    def _keep(self, leaves: VmLeaves, disks: Sequence[str]) -> None:
        for recording in self._recordings:
            recording.keep()
            if not recording.problem:
                leaves.shorten(recording.header)
        leaves.prune(disks)
        self._store.sweep()

    def drop(self) -> None:
        """Remove what wasn't kept."""
        for recording in self._recordings:
            recording.drop()


def _compared(key: str) -> bool:
    """EFI variables and TPM state are some KiB, and the latter is no instant."""
    return not key.startswith(("efidisk", "tpmstate"))
