# SPDX-License-Identifier: Apache-2.0
"""Every good job of a torture run, restored from the Storage Daemon and compared."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.torture_model import good_jobs
from tests.lab.torture_truth import Truth, lost_blocks
from tests.support import truth

if TYPE_CHECKING:
    from tests.lab.torture import Torture


class LostBlocksError(Exception):
    """A restored image isn't what its disk was."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    job: str
    job_id: int
    name: str
    truth: Truth


class Checker:
    """Holds what is not yet compared; ``check_all`` compares it."""

    def __init__(self, torture: Torture) -> None:
        self._t = torture
        self._waiting: list[Unchecked] = []
        self.lost = 0
        self.checked = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, unchecked: Unchecked) -> None:
        self._waiting.append(unchecked)

    def disowned(self, name: str) -> None:
        """A job was deleted; it must have been checked before."""
        assert all(one.name != name for one in self._waiting)

    async def check_all(self) -> None:
        """Restore and compare every good job since the last time.

        Raises:
            LostBlocksError: some don't hold what they must.
        """
        waiting, self._waiting = self._waiting, []
        for job in sorted({one.job for one in waiting}):
            await self._check(job, [one for one in waiting if one.job == job])
        for one in waiting:  # two jobs at once share what was known before both
            one.truth.forget()

    async def _check(self, job: str, waiting: list[Unchecked]) -> None:
        good = await asyncio.to_thread(good_jobs, self._t.bacula, job)
        # All that the oldest of them may stand on: from its Full onwards.
        oldest = min(one.job_id for one in waiting)
        start = max(
            (at for at, (job_id, _, level) in enumerate(good)
             if level == "F" and job_id <= oldest),
            default=0,
        )  # fmt: skip
        folder = self._t.folder / "restored"
        result = await self._t.world.restore(
            where=str(folder), job_ids=[job_id for job_id, _, _ in good[start:]]
        )
        if not result.ok:
            raise LostBlocksError(f"the restore failed:\n{result.text}")
        homes = {path.parent.name: path.parent for path in folder.rglob("*.qcow2")}
        wrong = []
        for one in waiting:
            lost = await asyncio.to_thread(self._compare, homes[one.name], one.truth)
            if lost:
                self.lost += len(lost)
                wrong.append(f"{one.name}: {len(lost)} lost: {', '.join(lost[:8])}")
                continue
            self.checked += 1
        if wrong:
            raise LostBlocksError("; ".join(wrong) + f"; see {folder}")
        await asyncio.to_thread(shutil.rmtree, folder)
        self._t.say(f"  {len(waiting)} job(s) of {job} restored: exact")

    def _compare(self, home: Path, known: Truth) -> list[str]:
        images = {}
        for key in known.base:
            image, flat = home / f"{key}.qcow2", home / f"{key}.flat"
            truth.check(image)
            truth.convert(image, "qcow2", flat)
            images[key] = flat.read_bytes()
            flat.unlink()
        return lost_blocks(known, images)
