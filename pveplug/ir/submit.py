# SPDX-License-Identifier: Apache-2.0
"""A chain restored newest first: one restore job per job of it, into one recovery.

Bacula delivers a chain oldest first, so the cluster a guest boots from may come last.
Here each job of the chain gets a restore job of its own, the newest first; what a newer
job brought is final, an older one only fills gaps. Every restore job names all JobIds
of the chain and marks only its own directory: so the restore objects of the whole chain
arrive with each, and the recovery knows from the first what is still owed.

One more restore job goes before the others, of the whole chain: the small images of EFI
variables and TPM, since QEMU can't wait for them, and the copies of what lies at the
disks' ends, at which every guest looks while it boots (:mod:`pveplug.images.edges`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pveplug.bconsole import Head, Part, age
from pveplug.errors import JobError, RequestError
from pveplug.images import manifest
from pveplug.proto.bconsole import BaculaJob, Progress, RestoreOrder
from pveplug.units import human

FIRMWARE_KEYS: Final = ("efidisk0", "tpmstate0")
"""Disks that must be whole before the VM starts."""
FIRST_OF_EACH: Final = (manifest.LAYOUT_FILE,)
FIRST_OF_HEAD: Final = (
    manifest.LAYOUT_FILE,
    manifest.CONFIG_FILE,
    manifest.FIREWALL_FILE,
    manifest.MANIFEST_FILE,
)
"""What goes with what is first, where a job has it: to tell the head by."""

_BACULA_S_OWN: Final = "Connected to Storage "
"""A file daemon of 15.0 says that itself, in every job."""
LOOKS: Final = 15
"""A line of progress for so many looks at a job: every half minute."""


class RestoreConsole(Protocol):
    """What a submission needs of Bacula; :class:`pveplug.bconsole.Console` has it."""

    async def chain(self, head: BaculaJob) -> list[BaculaJob]: ...
    async def parts(self, job: BaculaJob, vmid: int) -> list[Part]: ...
    async def head(
        self, vmid: int, *, job: int | str | None = None, client: str | None = None
    ) -> Head: ...
    async def restore_jobs(self) -> list[str]: ...
    async def preview(self, order: RestoreOrder) -> None: ...
    async def restore(self, order: RestoreOrder) -> int: ...
    async def cancel(self, job_id: int) -> None: ...
    async def wait(
        self,
        job_id: int,
        report: Callable[[Progress], None],
        on_log: Callable[[str], None],
    ) -> BaculaJob: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One restore job; ``title`` says which, for a line of progress."""

    title: str
    order: RestoreOrder


@dataclass(frozen=True, slots=True)
class Plan:
    """The restore jobs of a recovery, in the order in which they run.

    Attributes:
        head: the backup it goes back to.
        chain: Bacula's jobs, oldest first; ``parts``: the VM's directories in them,
            newest first.
        remarks: what an operator should know before, a line each.
    """

    head: Head
    chain: tuple[BaculaJob, ...]
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    remarks: tuple[str, ...] = ()


async def make_plan(
    console: RestoreConsole,
    vmid: int,
    where: str,
    *,
    job: int | str | None = None,
    client: str | None = None,
    restore_client: str | None = None,
    restore_job: str | None = None,
    one_by_one: bool = False,
) -> Plan:
    """Find the backup and its chain, and plan its restore jobs; submit nothing.

    Args:
        vmid: the VM's id when it was backed up.
        where: of each restore job.
        job: a JobId or a job's name; None: the newest good backup of any.
        client: only its backups.
        restore_client: who restores; None: whose backup it is.
        restore_job: the Job resource; None: the Director's only one.
        one_by_one: a restore job for each job of the chain, whatever that costs.

    Raises:
        RequestError: there is no such backup, or its chain is broken.
        ConfigError, TransportError: as the console's.
    """
    head = await console.head(vmid, job=job, client=client)
    chain = await console.chain(head.job)
    parts = [part for link in chain for part in await console.parts(link, vmid)]
    if restore_job is None:
        restore_job = _only(await console.restore_jobs())
    return planned(
        head,
        chain,
        parts,
        where=where,
        restore_client=restore_client or head.job.client,
        restore_job=restore_job,
        one_by_one=one_by_one,
    )


def _only(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise RequestError(
            "the Director shows this console no Job of Type = Restore: define one, or "
            "extend the console's JobACL"
        )
    raise RequestError(
        f"the Director has {len(names)} restore jobs ({', '.join(names[:8])}): name "
        "one with --restore-job"
    )


def planned(
    head: Head,
    chain: Sequence[BaculaJob],
    found: Sequence[Part],
    *,
    where: str,
    restore_client: str,
    restore_job: str,
    one_by_one: bool = False,
) -> Plan:
    """Return the restore jobs of a chain, newest first, what boots before all.

    All that is newer than the oldest goes together, unless ``one_by_one``: each
    restore job costs some four seconds besides its data, and as the owner of each
    cluster is known, no order among them is better than another.

    Args:
        chain: Bacula's jobs, oldest first, the head's last.
        found: what they have of the VMs with the head's vmid.

    Raises:
        RequestError: the VM is missing in a part of the chain that must have it, or
            two jobs have the same directory.
    """
    own = [part for part in found if part.vm == head.part.vm]
    parts = sorted(own, key=age, reverse=True)
    if not parts or parts[0] != head.part:
        newest = parts[0].directory if parts else "none"
        raise RequestError(
            f"the newest directory of the chain is {newest}, not {head.part.directory} "
            "of the backup to go back to: Bacula's catalogue changed meanwhile; run "
            "the same command again"
        )
    if len({part.directory for part in parts}) != len(parts):
        raise RequestError("two jobs of the chain have the same directory")
    job_ids = tuple(job.job_id for job in chain)

    def step(title: str, *marks: tuple[str, tuple[str, ...]]) -> Step:
        order = RestoreOrder(
            job_ids, marks, where, head.job.client, restore_client, restore_job
        )
        return Step(title, order)

    together = 1 if one_by_one else max(len(parts) - 1, 1)
    groups = [parts[:together], *([part] for part in parts[together:])]
    steps = [
        step(
            ", ".join(f"{part.job} (JobId {part.job_id})" for part in group),
            *((part.directory, part.names) for part in group),
        )
        for group in groups
    ]
    marks = first_marks(parts)
    if marks and len(groups) > 1:
        # With the newest jobs, and not in one of its own: Bacula gives the older ones'
        # small files first, and then what is as a rule the smallest of all.
        whole_ones = {part.directory for part in groups[0]}
        older = [mark for mark in marks if mark[0] not in whole_ones]
        title = f"{_what(marks)} of the whole chain, and {steps[0].title}"
        steps[0] = step(title, *steps[0].order.marks, *older)
    elif marks and manifest.image_file("tpmstate0") in parts[0].names:
        # It comes after the disks in its job, and the start can't wait for those.
        steps.insert(0, step(_what(marks), *marks))
    return Plan(head, tuple(chain), tuple(parts), tuple(steps), _remarks(head, found))


def _what(marks: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    names = {name for _, found in marks for name in found}
    firmware = any(manifest.image_file(key) in names for key in FIRMWARE_KEYS)
    parts = [
        *(["firmware state"] if firmware else []),
        *(["ends of the disks"] if manifest.EDGES_FILE in names else []),
    ]
    return " and ".join(parts)


def whole(plan: Plan) -> RestoreOrder:
    """Return one restore job of everything: what a proof is."""
    order = plan.steps[-1].order
    marks = tuple((part.directory, part.names) for part in reversed(plan.parts))
    return dataclasses.replace(order, marks=marks)


def first_marks(parts: Sequence[Part]) -> list[tuple[str, tuple[str, ...]]]:
    """Return what is restored before all else, newest part first; empty: nothing.

    Args:
        parts: newest first.
    """
    keys = [key for key in FIRMWARE_KEYS if manifest.image_file(key) in parts[0].names]
    wanted = {
        name
        for key in keys
        for name in (manifest.image_file(key), manifest.digest_file(key))
    }
    wanted.add(manifest.EDGES_FILE)
    if not any(wanted.intersection(part.names) for part in parts):
        return []
    marks: list[tuple[str, tuple[str, ...]]] = []
    for part in parts:
        small = FIRST_OF_EACH if marks else FIRST_OF_HEAD
        names = tuple(name for name in part.names if name in wanted or name in small)
        if names:
            marks.append((part.directory, names))
    return marks


def _remarks(head: Head, found: Sequence[Part]) -> tuple[str, ...]:
    remarks = [f"passed over {line}" for line in head.skipped]
    others = {part.vm for part in found} | set(head.others)
    for other in sorted(others - {head.part.vm}):
        remarks.append(
            f"the chain also has {other}, another VM with this id; taken is "
            f"{head.part.vm}, of the newest job"
        )
    return tuple(remarks)


async def submit(
    console: RestoreConsole,
    plan: Plan,
    say: Callable[[str], None],
    *,
    again: str,
    started: Callable[[int | None], None] = lambda _: None,
) -> list[int]:
    """Run the restore jobs one after another; return their JobIds.

    Args:
        say: takes lines of progress.
        again: the command that goes on where this one ended.
        started: told the JobId that runs now, None in between. Cancelling this leaves
            that job running in Bacula, and submits no other.

    Raises:
        JobError: a restore job did not end well; no other was submitted, and the
            recovery stays as it is.
    """
    done: list[int] = []
    total = len(plan.steps)
    for number, step in enumerate(plan.steps, 1):
        job_id = await _restored(console, step.order, started)
        done.append(job_id)
        which = f"restore job {job_id} ({number} of {total})"
        say(f"{which}: {step.title}, {_files(step.order.files)}")
        watch = _Watch(which, step.order, say)
        job = await console.wait(job_id, watch.progress, watch.log)
        started(None)
        if not job.good:
            raise JobError(
                f"{which}, {step.title}, {job.state}{watch.why}",
                vm=plan.head.part.vm,
                phase="restore",
                remedy=f"what has arrived stays and is served; when the cause is gone: "
                f"{again}",
            )
        say(f"{which}: {job.state}, {human(job.bytes)}")
    return done


async def _restored(
    console: RestoreConsole,
    order: RestoreOrder,
    started: Callable[[int | None], None],
) -> int:
    """Submit a job; a cancellation waits for the console, so that the job is known."""
    submission = asyncio.ensure_future(console.restore(order))
    try:
        job_id = await asyncio.shield(submission)
    except asyncio.CancelledError:
        started(await submission)
        raise
    started(job_id)
    return job_id


class _Watch:
    """Turns one job's progress and log into lines, as few as tell the story."""

    def __init__(
        self, which: str, order: RestoreOrder, say: Callable[[str], None]
    ) -> None:
        self._which = which
        self._order = order
        self._say = say
        self._state = ""
        self._looks = 0
        self._errors: list[str] = []

    @property
    def why(self) -> str:
        """The first thing that Bacula called an error, to follow the state."""
        return f": {self._errors[0]}" if self._errors else ""

    def progress(self, progress: Progress) -> None:
        if progress.status != "R" and progress.state != self._state:
            self._state = progress.state
            if progress.status not in "CTW":
                self._say(f"{self._which}: {progress.state}")
        self._looks += 1
        if self._looks % LOOKS == 0 and progress.bytes is not None:
            of = f" of {progress.expected_files}" if progress.expected_files else ""
            self._say(
                f"{self._which}: {progress.state}, {human(progress.bytes)}, "
                f"file {progress.files}{of}"
            )

    def log(self, line: str) -> None:
        """Repeat what the restoring client says: it is the recovery that speaks."""
        client = f"{self._order.restore_client} JobId "
        said = line.partition(": ")[2] if line.startswith(client) else ""
        if "Fatal error:" in line or " Error:" in line:
            self._errors.append(" ".join((said or line).split()))
        if said and not said.startswith(_BACULA_S_OWN):
            self._say(f"{self._which}: {said}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def where_values(
    vmid: int, new_vmid: int | None, options: Mapping[str, str]
) -> dict[str, str]:
    """Return the restore options of an instant recovery, as ``where`` carries them.

    The VM is named by its old id, for the restore objects of a job's other VMs arrive
    with its own.
    """
    target = "next" if new_vmid is None else str(new_vmid)
    return {"mode": "instant", "restore_vmid": f"{vmid}:{target}", **options}
