# SPDX-License-Identifier: Apache-2.0
"""The target of a proof: an instant recovery in isolation that is watched and removed.

Everything is landed and compared with its digests as in any restore, and the guest must
show that it is up. Only both together are a proof, and whatever happens the VM, its
overlays and what has landed are gone at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import time
from pathlib import Path
from typing import Final

from pveplug.errors import JobError, PveplugError
from pveplug.ir.control import release
from pveplug.ir.proof import watch, write_report
from pveplug.ir.target import InstantTarget
from pveplug.proveconfig import config_for_proof, wanted_for
from pveplug.proving.report import ChainMember, Subject, log_lines
from pveplug.proving.verdict import Outcome, Verdict, Wanted
from pveplug.units import human
from pveplug.vmconfig import parse_config, smbios_uuid
from pveplug.vmrestore import RestorePlan

REPORTS: Final = "reports"


class ProveTarget(InstantTarget):
    """One VM that boots to prove its backup."""

    async def begin(self, job: str) -> None:
        """Make the VM; the proof begins."""
        self._started_at = _now()
        self._wanted: Wanted | None = None
        self._watching: asyncio.Task[Verdict] | None = None
        self._reported = False
        self._restore_s = 0.0
        await super().begin(job)

    async def _resume(self, job: str) -> bool:
        return False  # a proof is of one restore, from its beginning

    def _shaped(self, plan: RestorePlan) -> RestorePlan:
        """Take away what a proof must not have: NICs above all."""
        prove = self._config.prove
        assert prove is not None  # noqa: S101 - it is what we are for
        self._wanted = wanted_for(
            parse_config(self._goal.manifest.config).current,
            evidence="" if prove.evidence == "auto" else prove.evidence,
            serial=prove.serial or "",
            timeout_s=prove.timeout,
        )
        shaped = config_for_proof(
            {**plan.params, **plan.late_params}, memory_mib=prove.memory
        )
        late = {k: v for k, v in shaped.values.items() if k in plan.late_params}
        return dataclasses.replace(
            plan,
            params={k: v for k, v in shaped.values.items() if k not in late},
            late_params=late,
            dropped=(*plan.dropped, *shaped.dropped),
        )

    async def _before_start(self) -> None:
        """Watch from before its first instruction; it is never handed over."""
        assert self._wanted is not None  # noqa: S101 - begin() has set it
        self._restore_s = time.monotonic() - self._began
        self._watching = asyncio.create_task(
            watch(self._node, self.vmid, self._wanted), name="watch the proof"
        )

    async def commit(self) -> None:
        """Judge: all data here and right, and the guest up.

        Raises:
            JobError: it isn't proven; the report says what was seen.
        """
        await self._land()
        owed = sum(landing.owed_bytes for landing in self._landings.values())
        if owed:
            raise JobError(
                f"Bacula did not deliver {human(owed)} of its disks.",
                vm=str(self.vmid),
                phase="prove",
                remedy="select the whole directory of the VM, in every job of the "
                "chain.",
            )
        if self._watching is None or self._start_failed:
            raise JobError(
                f"the VM was not started: {self._start_failed or 'nothing came'}.",
                vm=str(self.vmid),
                phase="prove",
                remedy="the job log says why; mend that and run the proof again.",
            )
        self._say.info(f"VM {self.vmid}: all of its data is here, and as it was stored")
        verdict = await self._watching
        await self._report(verdict)
        if not verdict.passed:
            raise JobError(
                f"backup {self._goal.manifest.job} is "
                f"{'broken' if verdict.outcome is Outcome.FAILED else 'not proven'}: "
                f"{verdict.reason}.",
                vm=str(self._goal.manifest.vmid),
                phase="prove",
                remedy="look at the report's screen and console; prove an older job to "
                "find the last good one.",
            )

    async def _report(self, verdict: Verdict) -> None:
        self._reported = True
        subject = self._subject()
        for number, line in enumerate(log_lines(subject, verdict)):
            if number == 0 and not verdict.passed:
                self._say.error(line)
            else:
                self._say.info(line)
        prove = self._config.prove
        wanted = prove.report if prove else None
        folder = Path(wanted or Path(self._node.state_dir) / REPORTS)
        self._say.info(f"report {await write_report(folder, subject, verdict)}")

    def _subject(self) -> Subject:
        manifest = self._goal.manifest
        chain = self._goal.chain
        ids = self._goal.job_ids
        jobs = [chain.record(job).manifest for job in chain.jobs] if chain else []
        members = tuple(
            ChainMember(ids.get(each.job, 0), each.level, each.job) for each in jobs
        )
        return Subject(
            manifest.vmid,
            manifest.vm_name,
            manifest.job,
            members,
            self._started_at,
            _now(),
            self.vmid,
            self._restore_s,
        )

    async def failed(self, error: BaseException) -> None:
        """Report a proof that ended before a verdict."""
        if self._reported or self._wanted is None or not self.vmid:
            return
        with contextlib.suppress(PveplugError):
            await self._report(
                Verdict(Outcome.FAILED, " ".join(str(error).split()), self._wanted)
            )

    async def _undo(self) -> None:
        """Remove everything: the VM first, while its disks are still served."""
        watching = self._watching
        if watching is not None and not watching.done():
            watching.cancel()
            await asyncio.wait([watching])
        if self._recovery is not None:
            await release(self._recovery)
        with contextlib.suppress(PveplugError):
            if await self._runs():
                await self._local.stop_vm(self.vmid)
        await super()._undo()

    async def _runs(self) -> bool:
        """Whether the VM runs, and is ours: the id may have gone to another."""
        entry = self._made.entry
        if entry is None or not entry.created or not entry.uuid:
            return False
        if self._local.vm_running(entry.vmid) is None:
            return False
        return smbios_uuid((await self._local.config(entry.vmid)).values) == entry.uuid


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
