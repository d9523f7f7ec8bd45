# SPDX-License-Identifier: Apache-2.0
"""What a job must answer, told from the events alone: whole or incremental, and why.

A disk's *epoch* ends with whatever ends its bitmaps: QEMU's process, or the node they
are on. A job is incremental by bitmaps for a disk exactly when the job it builds on
took place in the same epoch. Anything else is a needless escalation, or worse.

A disk that is read whole must then be compared with the digests of the job it builds
on: nothing that happens to a VM here, a grown disk included, takes those away. Only a
Full stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pveplug.cbt import FOLD_ABOVE
from tests.lab.bacula import BaculaLab, JobResult

LINE = (
    r"VM {vmid} {key}: (?:whole \((.*?)\)(?:, compared with the digests of (\S+))?"
    r"|changes since (\S+)); (cbw|fleece|qemu-nbd);"
)


class WrongJobError(Exception):
    """A job did something else than the events call for."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known when a job begins."""

    level: str
    """As the Director runs it: F, I or D."""
    parent: str | None
    epochs: dict[str, int]
    live: bool


@dataclass
class Tracking:
    """The epochs of all disks, and which job saw which."""

    keys: tuple[str, ...]
    mechanism: str
    vmid: int
    escalations: int = 0
    _epochs: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, dict[str, int]] = field(default_factory=dict)
    _segments: dict[str, int] = field(default_factory=dict)
    _number: int = 0

    def __post_init__(self) -> None:
        self.lost("the VM is new", *self.keys)

    def lost(self, why: str, *keys: str) -> None:
        """Bitmaps are gone: of these disks, or of all of them."""
        self._number += 1
        for key in keys or self.keys:
            self._epochs[key] = self._number
        if not keys:
            self._segments.clear()

    def expect(self, bacula: BaculaLab, job: str, level: str, live: bool) -> Expected:
        """Say what the Director will ask for, as its catalogue stands."""
        good = good_jobs(bacula, job)
        letter = level[0]
        if not any(found == "F" for _, _, found in good):
            letter = "F"
        parent = None
        if letter == "I":
            parent = good[-1][1]
        elif letter == "D":
            parent = [name for _, name, found in good if found == "F"][-1]
        return Expected(letter, parent, dict(self._epochs), live)

    def began(self, job: str, result_name: str, expected: Expected) -> None:
        """Note a job that may have opened segments, whatever became of it."""
        chain = job
        self._segments[chain] = self._segments.get(chain, 0) + 1
        if expected.live:
            self._seen[result_name] = expected.epochs

    def judge(self, job: str, result: JobResult, expected: Expected) -> list[str]:
        """Return one text a disk; raises where it isn't what was to be.

        Raises:
            WrongJobError: level, parent or escalation is wrong.
        """
        if result.level != expected.level:
            raise WrongJobError(
                f"level {result.level} instead of {expected.level}:\n{result.text}"
            )
        texts = []
        for key in self.keys:
            line = re.search(LINE.format(vmid=self.vmid, key=key), result.text)
            if line is None:
                raise WrongJobError(f"no summary of {key}:\n{result.text}")
            whole, compared, since, mechanism = line.groups()
            self._judge_disk(job, key, whole, since, mechanism, expected)
            self._judge_tier(key, whole, compared, expected)
            reason = (whole or "").partition(" (")[0]
            how = "compared" if compared else "whole"
            texts.append(f"{key} {f'{how}: {reason}' if whole else 'changes'}")
        return texts

    def _judge_disk(
        self,
        job: str,
        key: str,
        whole: str | None,
        since: str | None,
        mechanism: str,
        expected: Expected,
    ) -> None:
        if mechanism not in (self.mechanism, "qemu-nbd"):
            raise WrongJobError(f"{key}: mechanism {mechanism}")
        if expected.level == "F":
            if whole is None:
                raise WrongJobError(f"{key}: a Full with changes since {since}")
            return
        self.escalations += whole is not None
        seen = self._seen.get(expected.parent or "", {}).get(key)
        kept = seen == expected.epochs[key] and mechanism != "qemu-nbd"
        if whole is not None:
            folded = self._segments.get(job, 0) > FOLD_ABOVE and "is gone" in whole
            if kept and not folded:
                raise WrongJobError(f"{key}: needless escalation: {whole}")
        elif not kept:
            raise WrongJobError(f"{key}: changes since {since} can't be known")
        elif since != expected.parent:
            raise WrongJobError(
                f"{key}: changes since {since} instead of {expected.parent}"
            )

    def _judge_tier(
        self, key: str, whole: str | None, compared: str | None, expected: Expected
    ) -> None:
        wanted = expected.parent if whole and expected.level != "F" else None
        if compared != wanted:
            raise WrongJobError(
                f"{key}: compared with the digests of {compared} instead of {wanted}"
            )


def good_jobs(bacula: BaculaLab, job: str) -> Sequence[tuple[int, str, str]]:
    """Return (JobId, unique name, level) of what the Director counts, oldest first."""
    return [
        (int(str(job_id)), str(name), str(level))
        for job_id, name, level in bacula.query(
            "SELECT JobId, Job, Level FROM Job WHERE Name = ? AND Type = 'B' "
            "AND JobStatus IN ('T', 'W') ORDER BY StartTime, JobId",
            job,
        )
    ]
