# SPDX-License-Identifier: Apache-2.0
"""Bacula's console as an asyncio adapter: ask the catalogue, submit restores, wait.

Each question is a bconsole of its own, whose input is its lines and then an end: no
question of Bacula's is ever waited for. What is said and what answers mean is in
:mod:`pveplug.proto.bconsole`; the console may be any program that behaves like
``bconsole -n -c FILE``, from 9.6 to 15.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pveplug.errors import (
    ConfigError,
    LocalProtocolError,
    RequestError,
    TransportError,
)
from pveplug.images import manifest
from pveplug.proto import bconsole as words
from pveplug.proto.bconsole import BaculaJob, Progress, RestoreOrder

TIMEOUT_S: Final = 120.0
"""For one question; a large catalogue takes its time to build a tree of files."""
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
"""An answer is held whole, but for the files of others in a list of files."""
STATUS_S: Final = 10.0
"""For a file daemon's word on its jobs, which is only shown."""
JOBS_MAX: Final = 500
"""So many of the newest backups are looked through for a VM."""
FIRST_LOOKS_S: Final = 0.25
SUMMARY_S: Final = 15.0
"""A job's summary comes to the catalogue a moment after its status."""

_END_S: Final = 5.0
_CHUNK: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """What one job has of one VM: a directory and the files in it."""

    job_id: int
    directory: str
    names: tuple[str, ...]

    @property
    def job(self) -> str:
        """The unique name of the job that wrote it; after a VirtualFull another one."""
        return self.directory.rpartition("/")[2]

    @property
    def vm(self) -> str:
        """The VM's directory: ``100-1a2b3c4d``."""
        return self.directory.split("/")[2]

    @property
    def whole(self) -> bool:
        """Whether the VM's backup in this job came to its end."""
        return manifest.MANIFEST_FILE in self.names


@dataclass(frozen=True, slots=True)
class Head:
    """The backup a recovery goes back to.

    Attributes:
        job: Bacula's; ``part``: what it has of the VM.
        others: directories of other VMs with the same vmid in that job.
        skipped: what was passed over before it, a line each.
    """

    job: BaculaJob
    part: Part
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class Console:
    """One Director, as this console may see it.

    Args:
        program: bconsole, a name in PATH or a path.
        config: its configuration; None: the program's own default.
        timeout_s: seconds for each question.

    Every method raises ConfigError (no console, or its configuration), TransportError
    (no Director, no answer in time) or RequestError (Bacula refuses, or has it not),
    each with a remedy. Cancelling one ends the console it started; what the Director
    was told by then goes on.
    """

    def __init__(
        self,
        program: str = "bconsole",
        config: Path | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._argv = [program, "-n", *(["-c", str(config)] if config else [])]
        self._timeout_s = timeout_s

    async def ask(
        self, *lines: str, timeout_s: float | None = None, below: str = "/"
    ) -> str:
        """Say these lines, then nothing more; return what came after the greeting.

        Args:
            timeout_s: seconds, if not the console's own.
            below: of listed files keep only those with this in their path.
        """
        said = await self._converse(lines, timeout_s or self._timeout_s, below)
        text = words.answer(said)
        if problem := words.refusal(text, lines):
            raise problem
        return text

    # --- the catalogue ----------------------------------------------------------------

    async def job(self, job_id: int) -> BaculaJob:
        """Return what the catalogue has of a job."""
        text = await self.ask(f"llist jobid={job_id}")
        found = [job for job in words.jobs(text) if job.job_id == job_id]
        if not found:
            raise RequestError(
                f"Bacula's catalogue shows no job {job_id}: it is pruned or never was, "
                "or this console's JobACL, ClientACL, PoolACL or FileSetACL hides it"
            )
        return found[0]

    async def backups(
        self,
        *,
        name: str | None = None,
        client: str | None = None,
        limit: int = JOBS_MAX,
    ) -> list[BaculaJob]:
        """Return backups that ended well, newest first.

        Args:
            name: only of this Job resource; ``client``: only of this client.
            limit: look at so many of the newest.
        """
        line = words.jobs_line(name=name, client=client, limit=limit)
        found = [
            job
            for job in words.jobs(await self.ask(line))
            if job.type == "B"
            and job.good
            and name in (None, job.name)
            and client in (None, job.client)
        ]
        return sorted(found, key=lambda job: (job.started, job.job_id), reverse=True)

    async def chain(self, head: BaculaJob) -> list[BaculaJob]:
        """Return the jobs a restore of ``head`` needs, oldest first, ``head`` last."""
        ids: tuple[int, ...] = ()
        # A console may lack the right to ask that: then the list of jobs has to do.
        with contextlib.suppress(RequestError):
            ids = words.job_ids(await self.ask(f".bvfs_get_jobids jobid={head.job_id}"))
        if ids:
            chain = [
                head if job_id == head.job_id else await self.job(job_id)
                for job_id in ids
            ]
            chain.sort(key=lambda job: (job.started, job.job_id))
        else:
            chain = words.computed_chain(await self.backups(name=head.name), head)
        if not chain or chain[-1] != head or chain[0].level != "F":
            shown = ",".join(str(job.job_id) for job in chain) or "nothing"
            raise RequestError(
                f"job {head.job_id} can't be restored: its chain in Bacula's catalogue "
                f"is {shown}, which has no Full or doesn't end in it"
            )
        for job in chain:
            if job.purged:
                raise RequestError(
                    f"the files of job {job.job_id} ({job.unique}) are pruned from "
                    "Bacula's catalogue: bscan brings them back"
                )
        return chain

    async def parts(self, job: BaculaJob, vmid: int) -> list[Part]:
        """Return what a job has of the VMs with this id, a directory each.

        As a rule one; after a VirtualFull one for each job that went into it.
        """
        prefix = f"{manifest.PREFIX}/{vmid}-"
        text = await self.ask(f"list files jobid={job.job_id}", below=prefix)
        found: dict[str, list[str]] = {}
        for path in words.files(text.split("\n"), prefix):
            directory, _, name = path.rpartition("/")
            if directory.count("/") == 3 and name:
                found.setdefault(directory, []).append(name)
        return [
            Part(job.job_id, directory, tuple(names))
            for directory, names in found.items()
        ]

    async def head(
        self,
        vmid: int,
        *,
        job: int | str | None = None,
        client: str | None = None,
    ) -> Head:
        """Find the newest good backup that has a VM whole.

        Args:
            vmid: its id when it was backed up.
            job: exactly this JobId, or the newest of the Job resource of this name.
            client: only backups of this client.
        """
        skipped: list[str] = []
        if isinstance(job, int):
            candidates = [await self.job(job)]
            only = candidates[0]
            if only.type != "B" or not only.good:
                raise RequestError(
                    f"job {job} ({only.unique}) is no backup that ended well: type "
                    f"{only.type}, {only.state}"
                )
            if client not in (None, only.client):
                raise RequestError(f"job {job} is of client {only.client}")
        else:
            candidates = await self.backups(name=job, client=client)
        for candidate in candidates:
            if candidate.purged:
                skipped.append(f"job {candidate.job_id}: its files are pruned")
                continue
            parts = sorted(await self.parts(candidate, vmid), key=age, reverse=True)
            whole = [part for part in parts if part.whole]
            if whole:
                newest = whole[0]
                others = {part.vm for part in parts} - {newest.vm}
                return Head(candidate, newest, tuple(sorted(others)), tuple(skipped))
            if parts:
                skipped.append(
                    f"job {candidate.job_id} ({candidate.unique}): VM {vmid} has no "
                    f"{manifest.MANIFEST_FILE} there, so its backup did not end well"
                )
        raise RequestError(_nowhere(vmid, job, client, candidates, skipped))

    # --- jobs -------------------------------------------------------------------------

    async def restore_jobs(self) -> list[str]:
        """Return the names of the Director's Job resources of type Restore."""
        question = ".jobs type=R"
        lines = (line.strip() for line in (await self.ask(question)).split("\n"))
        return [line for line in lines if line and line != question]

    async def preview(self, order: RestoreOrder) -> None:
        """Have Bacula select the files and show the job, without running it.

        As after any restore that was declined, the Director leaves a bootstrap file of
        a few hundred bytes in its working directory.

        Raises:
            RequestError: it would be another job than the one that was ordered: Bacula
                takes what it has in the place of a name that it doesn't know.
        """
        text = await self.ask(*words.restore_lines(order, run=False))
        if problem := words.preview_problem(text, order):
            raise RequestError(f"the restore was not submitted: {problem}")

    async def restore(self, order: RestoreOrder) -> int:
        """Submit a restore job and return its JobId; see :meth:`preview`.

        Raises:
            RequestError: nothing was submitted, or what was is another job than the
                one ordered and has been cancelled.
        """
        await self.preview(order)
        text = await self.ask(*words.restore_lines(order, run=True))
        job_id = words.queued(text)
        problem = words.selection_problem(text, order)
        if job_id is None:
            asked = words.question(text)
            said = problem or (f"Bacula asks: {asked}" if asked else "it said nothing")
            raise RequestError(f"Bacula queued no job: {said}")
        if problem:
            await self.cancel(job_id)
            raise RequestError(f"restore job {job_id} was cancelled again: {problem}")
        return job_id

    async def progress(self, job_id: int) -> Progress:
        """Return how far a job is, as its file daemon knows it while it runs."""
        job = await self.job(job_id)
        if job.ended:
            return Progress(job_id, job.status, job.files, job.bytes)
        said = None
        # A file daemon that doesn't answer is no reason to give up on its job.
        with contextlib.suppress(RequestError, TransportError):
            client = words.quoted(job.client)
            text = await self.ask(
                f".status client={client} running", timeout_s=STATUS_S
            )
            said = words.running(text, job_id)
        return words.with_status(job, said)

    async def wait(
        self,
        job_id: int,
        report: Callable[[Progress], None] = lambda _: None,
        on_log: Callable[[str], None] = lambda _: None,
        *,
        every_s: float = 2.0,
    ) -> BaculaJob:
        """Wait until a job has ended; as long as it takes, as Bacula bounds it.

        Args:
            report: called at each look, at most ``every_s`` seconds apart.
            on_log: called once with each line of the job's log, as they come.

        Cancelling the wait leaves the job alone. A Director that is away for a moment
        is waited for, ``timeout_s`` long.
        """
        loop = asyncio.get_running_loop()
        silent_since: float | None = None
        shown = looks = 0
        while True:
            try:
                progress = await self.progress(job_id)
                ended = progress.status in words.ENDED
                lines = await (self.log if ended else self._log)(job_id)
            except TransportError:
                silent_since = silent_since or loop.time()
                if loop.time() - silent_since > self._timeout_s:
                    raise
            else:
                silent_since = None
                for line in lines[shown:]:
                    on_log(line)
                shown = max(shown, len(lines))
                report(progress)
                if ended:
                    return await self.job(job_id)
            # Small jobs end in seconds; large ones needn't be looked at that often.
            looks += 1
            await asyncio.sleep(min(every_s, looks * FIRST_LOOKS_S))

    async def log(self, job_id: int) -> list[str]:
        """Return the lines of a job's log; of one that ended, with its summary."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SUMMARY_S
        while True:
            lines = await self._log(job_id)
            if any("Termination:" in line for line in lines) or loop.time() > until:
                return lines
            await asyncio.sleep(0.5)

    async def _log(self, job_id: int) -> list[str]:
        return words.log_lines(await self.ask(f"list joblog jobid={job_id}"))

    async def cancel(self, job_id: int) -> None:
        """Cancel a job; one that has ended stays what it is."""
        await self.ask(f"cancel jobid={job_id} yes")

    # --- the child --------------------------------------------------------------------

    async def _converse(
        self, lines: Sequence[str], timeout_s: float, below: str
    ) -> str:
        for line in lines:
            if not line.isprintable():
                raise ConfigError(f"{line!a} can't be said to bconsole")
        try:
            async with asyncio.timeout(timeout_s), self._child() as child:
                return await self._exchange(child, lines, below)
        except TimeoutError:
            raise TransportError(
                f"bconsole gave no answer to {lines[0].split()[0]!r} within "
                f"{timeout_s:g} s: is the Director busy, or its address one that "
                "nobody answers at?"
            ) from None

    async def _exchange(
        self, child: asyncio.subprocess.Process, lines: Sequence[str], below: str
    ) -> str:
        if child.stdin is None or child.stdout is None:
            raise LocalProtocolError("bconsole was started without its pipes")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.stdin.write("".join(f"{line}\n" for line in lines).encode())
            child.stdin.write_eof()
        said, rest = bytearray(), b""
        while chunk := await child.stdout.read(_CHUNK):
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            said += words.without_other_files(whole + end, below)
            if len(said) + len(rest) > ANSWER_MAX_BYTES:
                raise RequestError(f"bconsole's answer to {lines[0]!r} has no end")
        await child.wait()
        return (said + rest).decode("utf-8", "backslashreplace")

    @contextlib.asynccontextmanager
    async def _child(self) -> AsyncIterator[asyncio.subprocess.Process]:
        program = self._argv[0]
        try:
            child = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                # A Ctrl-C at our terminal isn't one at bconsole's.
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ConfigError(
                f"there is no program {program}: install bacula-console here, or name "
                "it with --console"
            ) from None
        except OSError as error:
            raise ConfigError(f"{program} can't be run: {error.strerror}") from None
        try:
            yield child
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_S):
                        await child.wait()


_STAMP: Final = re.compile(r"\.(\d{4}-\d\d-\d\d_\d\d\.\d\d\.\d\d)_(\d+)\Z")


def age(part: Part) -> tuple[str, int, str]:
    """Return what orders the parts of a chain, oldest first.

    The time in the job's unique name, then Bacula's count: a VirtualFull brings the
    directories of several jobs under one JobId.
    """
    found = _STAMP.search(part.job)
    return (found[1], int(found[2]), part.job) if found else ("", 0, part.job)


def _nowhere(
    vmid: int,
    job: int | str | None,
    client: str | None,
    candidates: Sequence[BaculaJob],
    skipped: Sequence[str],
) -> str:
    of = f" of client {client}" if client else ""
    if isinstance(job, int):
        where = f"job {job}"
    elif job is not None and not candidates:
        return (
            f"Bacula's catalogue shows no good backup of a job named {job!r}{of}: "
            "`list jobs` in bconsole shows what there is to this console"
        )
    elif not candidates:
        return (
            f"Bacula's catalogue shows no good backup{of}: `list jobs` in bconsole "
            "shows what there is to this console"
        )
    else:
        named = f" of {job}" if job else ""
        where = f"the newest {len(candidates)} good backups{named}{of}"
    text = f"VM {vmid} is not in {where}"
    if skipped:
        text += f" ({'; '.join(skipped[:3])})"
    return text + ": name another with --job"
