# SPDX-License-Identifier: Apache-2.0
"""Proofs that are ordered: by a Bacula job of their own, or by ``pveplug ir prove``.

Through Bacula's console a restore job with ``mode=prove`` is submitted for the newest
good backup of each VM and followed; the order fails when one backup isn't proven. As a
job (``Plugin = "podheitor-proxmox: mode=prove …"``) it stores the reports, so the test
that a backup can be restored is scheduled, logged and mailed as every other job is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from pveplug.bacula import BaculaSession, FileInfo
from pveplug.config import BackupConfig, ProofOrder
from pveplug.errors import ConfigError, JobError, PveplugError
from pveplug.events import Reporter
from pveplug.ir.submit import Plan, RestoreConsole, make_plan, whole
from pveplug.pluginstring import where_string
from pveplug.tasks import first_failure

PREFIX: Final = "/@proxmox-proofs"
_OURS: Final = r"^(?:(?!: (?:serial|screen): ).)*?: "
"""What stands before our words, but for a guest's, which could say the same."""
_REPORT: Final = re.compile(_OURS + r"report (/\S+)\.json$")
_TELLING: Final = re.compile(
    _OURS + r"((?:prove VM|evidence|last screen|note:|report) .*)"
)
_READS: Final = re.compile(r"Ready to read from volume|restoring to a VM")
PATIENCE_S: Final = 180.0
_MAX_FILE: Final = 8 * 1024 * 1024


class Store(Protocol):
    """Where reports go."""

    async def file(self, name: str, content: bytes) -> None:
        """Keep a file; ``name`` begins with :data:`PREFIX`."""


class BaculaStore:
    """Stores reports as files of the running job."""

    def __init__(self, session: BaculaSession) -> None:
        self._session = session

    async def file(self, name: str, content: bytes) -> None:
        info = FileInfo(name, len(content))
        async with self._session.file(info, offsets=False) as out:
            await out.write(0, content)


class ProofJob:
    """Proves the newest backup of each VM; ``run`` once."""

    def __init__(
        self,
        vmids: Sequence[int],
        order: ProofOrder,
        console: RestoreConsole,
        store: Store | None,
        say: Reporter,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``patience_s``: how long a restore job may wait for its volume."""
        self._vmids = vmids
        self._order = order
        self._console = console
        self._store = store
        self._say = say
        self._patience_s = patience_s

    async def run(self) -> None:
        """Prove one VM after the other, all of them whatever comes of one.

        Raises:
            JobError: a backup isn't proven, or could not be tried; all are named.
        """
        failed: dict[int, str] = {}
        for vmid in self._vmids:
            try:
                why = await self._prove(vmid)
            except PveplugError as error:
                why = str(error)
                self._say.error(f"VM {vmid}: {why}")
            if why:
                failed[vmid] = why
        if failed:
            raise JobError(
                f"the newest backup of {', '.join(f'VM {v}' for v in failed)} is not "
                f"proven: {'; '.join(failed.values())}",
                phase="prove",
                remedy="the lines above and the stored reports say what was seen; "
                "restore an older job to find the last good one.",
            )

    async def _prove(self, vmid: int) -> str:
        """Return why a VM's backup isn't proven; empty: it is."""
        plan = await make_plan(
            self._console,
            vmid,
            where_string({"mode": "prove", **self._order.options}),
            restore_client=self._order.client,
            restore_job=self._order.restore_job,
        )
        for remark in plan.remarks:
            self._say.warning(f"VM {vmid}: {remark}")
        job_id = await self._console.restore(whole(plan))
        head = plan.head.job
        self._say.info(
            f"VM {vmid}: restore job {job_id} proves {head.unique} (JobId "
            f"{head.job_id}), chain {','.join(str(j.job_id) for j in plan.chain)}"
        )
        reports: list[str] = []
        errors: list[str] = []
        reads = asyncio.Event()

        def heard(line: str) -> None:
            if _READS.search(line):
                reads.set()
            if found := _TELLING.search(line):
                self._say.info(f"VM {vmid}: {found[1]}")
            if found := _REPORT.search(line):
                reports.append(found[1])
            if "Fatal error: " in line:
                errors.append(" ".join(line.partition("Fatal error: ")[2].split()))

        async with first_failure() as tasks:
            watch = tasks.create_task(self._patiently(job_id, reads), name="patience")
            ended = await self._console.wait(job_id, lambda _: None, heard)
            watch.cancel()
        for base in reports:
            await self._keep(plan, base)
        if ended.good:
            return ""
        return errors[0] if errors else f"restore job {job_id} {ended.state}"

    async def _patiently(self, job_id: int, reads: asyncio.Event) -> None:
        """Cancel a restore that waits for what we hold ourselves.

        Raises:
            JobError: it did not begin to read.
        """
        try:
            async with asyncio.timeout(self._patience_s):
                await reads.wait()
        except TimeoutError:
            await self._console.cancel(job_id)
            raise JobError(
                f"restore job {job_id} did not begin to read within "
                f"{self._patience_s:.0f} s and was cancelled.",
                phase="prove",
                remedy="a proof that is a job writes its report to a volume: where "
                "that is the volume, or the only drive, of the backups, each waits "
                "for the other. Give the job a Storage and Pool of its own, or order "
                "proofs by an Admin job (docs/prove.md).",
            ) from None

    async def _keep(self, plan: Plan, base: str) -> None:
        """Store a report's files, if they were written on this node."""
        if self._store is None:
            return
        for suffix in (".json", ".txt", ".png"):
            content = await asyncio.to_thread(_content, Path(base + suffix))
            if content is not None:
                vm, job = plan.head.part.vm, plan.head.job.unique
                await self._store.file(f"{PREFIX}/{vm}/{job}/report{suffix}", content)


def vmids(config: BackupConfig) -> list[int]:
    """Return the VMs to prove.

    Raises:
        ConfigError: they are not given by id; nobody but the catalogue knows them.
    """
    found: list[int] = []
    selection = config.selection
    for chosen in selection.vmid:
        if chosen.first != chosen.last:
            raise ConfigError(
                "mode=prove takes single ids in vmid=, as 100,103; it is Bacula's "
                "catalogue that is asked, not Proxmox VE",
                key="vmid",
            )
        found.append(chosen.first)
    if not found:
        raise ConfigError("mode=prove needs vmid=, as 100,103", key="vmid")
    return found


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE)
    except OSError:
        return None
