# SPDX-License-Identifier: Apache-2.0
"""``./dev torture``: change tracking under everything that may happen to it.

The whole product between a real Bacula and a real QEMU whose guest writes, zeroes and
discards all the time. Rounds of Full, Incremental and Differential, drawn from a seed;
before and within them the VM, Bacula and the backend suffer. Every job that Bacula
counts as good is restored from what the Storage Daemon holds and compared with what
strangers say of its instant (``torture_truth``); every disk read whole must have a
reason in the events (``torture_model``); after every job nothing may be left behind,
the guest may not have seen an error, and the backend may not have crashed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pveplug.proto.pve_login import Endpoint, TicketAuth
from pveplug.pve import PveApi
from tests.lab.bacula import JobResult
from tests.lab.lifecycle import start_vm
from tests.lab.torture_check import Checker, Unchecked
from tests.lab.torture_events import REFUSED, Clock, Events, SmallScratch
from tests.lab.torture_model import Expected, Tracking, WrongJobError, good_jobs
from tests.lab.torture_plan import MAIN, MAY_FAIL, OTHER, Round, rounds
from tests.lab.torture_truth import Copies, Hooks, Truth
from tests.lab.torture_writer import Writer
from tests.support.kills import Stage
from tests.support.world import World

MIB = 1 << 20
VMID = 100
MACHINES = {"blockdev": "pc", "drive": "pc-i440fx-9.2+pve1"}
KEYS = ("scsi0", "virtio1", "scsi2", "sata3", "virtio4", "scsi5")
SIZES_M = (24, 12, 16, 8, 8, 8)
BWLIMIT = "12M"
"""A Full takes some 2 s: room for what shall happen meanwhile."""
CHECK_EVERY = 5
CRASHED = re.compile(r"internal error|Fatal Python error|never retrieved|never awaited")


class Torture:
    """One run."""

    def __init__(self, world: World, arguments: argparse.Namespace) -> None:
        self.world = world
        self.bacula = world.bacula
        self._seed = arguments.seed
        self._layout = arguments.layout
        self._mechanism = arguments.mechanism
        self.keys = KEYS[: arguments.disks]
        self.folder = world.base / "t"
        self.tracking = Tracking(self.keys, self._mechanism, VMID)
        self.events = Events(self)
        self.checker = Checker(self)
        self.running_job = 0
        self.jobs = 0
        self.rounds = 0
        self.vm_died = False
        self.left_behind = False
        """Everything was killed at once, and no job has come since."""
        self.grew = False
        self._began = time.monotonic()
        self._log_at = 0
        self._truths: dict[str, Truth] = {}
        self._base: Truth
        self._after: Truth | None = None
        self._other: tuple[str, int, Expected] | None = None

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    # -- what the events use

    async def api(self, method: str, what: str, **params: str | int) -> None:
        """One call of PVE's API about the VM, as root, and the task's end."""
        call = {"PUT": self._pve.put, "POST": self._pve.post}.get(
            method, self._pve.delete
        )
        node = self.world.site.node.name
        upid = await call(f"/nodes/{node}/qemu/{VMID}/{what}", **params)
        await self._pve.wait_task(upid, timeout_s=60)

    async def console(self, line: str) -> str:
        return await asyncio.to_thread(self.bacula.console, line)

    async def good_jobs(self) -> Sequence[tuple[int, str, str]]:
        return await asyncio.to_thread(good_jobs, self.bacula, MAIN)

    async def sizes(self) -> None:
        """Tell the writer the disks' sizes; the caller holds it still."""
        for path in (await self._copies.take()).values():
            path.unlink()

    def backend_pids(self) -> list[int]:
        """The backends at work; not one that only cleans up."""
        found = []
        for task in Path(f"/proc/{self.bacula.pid('fd')}/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in (task / "children").read_text().split():
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if (
                        b"podheitor-proxmox-backend" in line
                        and b"--cleanup" not in line
                    ):
                        found.append(int(pid))
        return found

    async def start_other(self, name: str) -> str:
        """Start another job of the VM; it waits for the first one's lock."""
        expected = self._expect(name, "Incremental")
        job_id = await asyncio.to_thread(self.bacula.start_job, name, "Incremental")
        self._other = (name, job_id, expected)
        return f"started {name} as well"

    # -- the run

    async def run(self, count: int) -> None:
        """Set up, go through the rounds, check what is left to be checked."""
        site = self.world.site
        self.folder.mkdir()
        socket = self.folder / "w"
        # Some seeds have a raw disk, which forbids snapshots until it is moved.
        formats = ["qcow2" if n != 1 or self._seed % 3 else "raw" for n in range(9)]
        self.vm = await site.create_vm(
            VMID,
            {
                "agent": "0",
                "machine": MACHINES[self._layout],
                "args": f"-chardev socket,id=guest,path={socket},server=on,wait=off "
                "-mon chardev=guest,mode=control",
            },
            disks={
                key: f"local:{size / 1024},format={fmt},discard=on"
                + (",iothread=1" if key == "scsi0" else "")
                for key, size, fmt in zip(self.keys, SIZES_M, formats, strict=False)
            },
        )
        self._stage = Stage(self.world)
        self.writer = Writer(self.vm, socket, self.keys, self._seed)
        self._copies = Copies(self.folder, self.vm, self.writer, self.keys)
        self._hooks = Hooks(self.folder / "hooks")
        endpoint = Endpoint("127.0.0.1", site.api_port, (site.fingerprint,))
        login = TicketAuth("root@pam", site.root_password)
        for job in (MAIN, OTHER):
            await self._define(job)
        try:
            async with PveApi(endpoint, login) as self._pve:
                await self.vm.start()
                assert self.vm.modern == (self._layout == "blockdev")
                await self.sizes()
                self.writer.start()
                await self.writer.burst(100)
                for each in rounds(self._seed, count):
                    await self._round(each)
                if self.left_behind:
                    quiet = replace(each, before=(), during=None)
                    await self._back_up(quiet, random.Random(each.seed))
                await self.checker.check_all()
                await self._stage.clean()
        finally:
            await self.writer.stop()
            self._hooks.close()

    async def _define(self, job: str, more: str = "") -> None:
        await self.world.add_job(
            job,
            f"vmid={VMID} mechanism={self._mechanism} bwlimit={BWLIMIT} "
            f"{self._hooks.options} {more}",
        )

    async def _round(self, now: Round) -> None:
        self.rounds += 1
        rng = random.Random(now.seed)
        for name in now.before:
            try:
                said = await self.events.before(name)(rng)
            except REFUSED as error:
                # PVE's lock outlives a power cut, until the next job.
                if not self.left_behind:
                    raise
                said = f"{name} did not work: {error}"
            self.say(f"{now.number}: {said}")
        if not self.vm.running and "stay stopped" not in now.before:
            await self.vm.start()
        await self.writer.burst(rng.randint(5, 60))
        self.writer.check()
        async with contextlib.AsyncExitStack() as stack:
            if now.during == "full scratch":
                # A fleecing backup must not even begin with so little room.
                size = 2 * MIB if self._mechanism == "cbw" else 200 * MIB
                small = SmallScratch(self.folder / "small", size)
                await stack.enter_async_context(small)
                await self._define(now.job, f"scratch_dir={small.folder}")
            self.left_behind = False
            await self._back_up(now, rng)
            if now.during == "power off" and self.vm_died:
                await self.vm.wait_gone()
            if not self.left_behind:
                await self._stage.clean()
        if now.during == "full scratch":
            await self._define(now.job)
        if self.vm_died:
            await self._come_back()
        self.writer.check()
        await self.events.foreign_left()
        self._look_for_crashes()
        if self.checker.waiting >= CHECK_EVERY:
            await self.checker.check_all()

    async def _come_back(self) -> None:
        """Start the VM that died during the job."""
        assert not self.vm.running
        self.events.gone("died")
        # PVE's lock outlives a power cut; an administrator would look and skip it.
        await start_vm(self.world.site, self.vm.node, VMID, skiplock=self.left_behind)

    def _expect(self, job: str, level: str) -> Expected:
        return self.tracking.expect(self.bacula, job, level, self.vm.running)

    async def _back_up(self, now: Round, rng: random.Random) -> None:
        self.vm_died = self.grew = False
        self._other = None
        async with self.writer.still():
            self._base = Truth(await self._copies.take())
            start = len(self.writer.log)
        expected = self._expect(now.job, now.level)
        alive = self.vm.running
        hold = now.during == "kill backend" and rng.random() < 0.5
        clock = Clock(self, now.instant, hold=hold, reading=now.during == "cut nbd")
        self._still = now.still
        with clock.ticking():
            async with self._hooks.attended(self._at_switch, self.writer.let_go):
                self.running_job = await asyncio.to_thread(
                    self.bacula.start_job, now.job, now.level
                )
                job = asyncio.create_task(self._ended(self.running_job))
                if now.during:
                    await self._strike(now, clock, job, rng)
                result = await job
                other = None
                if self._other:
                    other = await self._ended(self._other[1])
        if alive and not self.vm.running and not self.vm_died:
            raise WrongJobError("QEMU is gone")
        self._after = None
        if not self.vm.running:
            # What QEMU had not written down when it was killed nobody can back up.
            self._after = Truth(await self._copies.take(), exact=True)
        self._base.log = self.writer.log[start:]
        self._base.grown = self.grew
        used = [self._finish(now, now.job, result, expected)]
        if self._other and other:
            name, _, wanted = self._other
            used.append(self._finish(now, name, other, wanted))
        if not any(used):
            self._base.forget()
        if self._after:
            self._after.forget()

    async def _strike(
        self, now: Round, clock: Clock, job: asyncio.Task[JobResult], rng: random.Random
    ) -> None:
        """Let the event happen at its instant, or as the job has ended before."""
        assert now.during
        reached = asyncio.create_task(clock.reached())
        await asyncio.wait({reached, job}, return_when=asyncio.FIRST_COMPLETED)
        late = not reached.done() or reached.exception() is not None
        reached.cancel()
        await asyncio.gather(reached, return_exceptions=True)
        if late and now.during not in ("kill sd", "kill qemu", "other job", "reboot"):
            self.say(f"{now.number}: too late: {now.during} {now.instant}")
            return
        try:
            said = await self.events.during(now.during)(rng)
        except REFUSED as error:
            said = f"{now.during} did not work: {error}"
        finally:
            clock.release()
        when = "while it read" if now.during == "cut nbd" else now.instant
        self.say(f"{now.number}: {said}{'' if late else f' {when}'}")

    async def _at_switch(self, job: str) -> None:
        if not self._still:
            return
        await self.writer.hold()
        self._truths[job] = Truth(await self._copies.take(), exact=True)

    async def _ended(self, job_id: int) -> JobResult:
        return await asyncio.to_thread(self.bacula.wait, job_id, 180)

    def _finish(
        self, now: Round, job: str, result: JobResult, expected: Expected
    ) -> bool:
        """Judge one job; return whether its truth is the copy from before it."""
        self.jobs += 1
        self.tracking.began(job, result.name, expected)
        exact = self._truths.pop(result.name, None)
        head = f"{now.number}: {result.name} {result.level}"
        if not result.ok:
            if exact:
                exact.forget()
            if now.during not in MAY_FAIL:
                raise WrongJobError(f"{head} failed:\n{result.text}")
            reason = next((s for s in result.log if "rror:" in s), "")
            self.say(f"{head} failed: {reason.partition('rror: ')[2][:100]}")
            return False
        stopped = "the VM is stopped" in result.text
        if stopped:
            expected = Expected(expected.level, expected.parent, expected.epochs, False)
        said = "; ".join(self.tracking.judge(job, result, expected))
        known = self._base
        if stopped and self._after:
            known, self._after = self._after, None
        elif exact:
            exact.grown = self.grew
            known = exact
        how = "still" if exact else "moving"
        self.say(f"{head}: {'stopped' if stopped else how}: {said}")
        self.checker.add(Unchecked(job, result.job_id, result.name, known))
        return known is self._base

    def _look_for_crashes(self) -> None:
        text = self.world.backend_log
        new, self._log_at = text[self._log_at :], len(text)
        if found := CRASHED.search(new):
            start = max(0, found.start() - 500)
            raise WrongJobError(f"the backend crashed:\n{new[start : start + 4000]}")

    def sums(self) -> Sums:
        return Sums(
            self.rounds, self.jobs, self.tracking.escalations, self.checker.lost
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """What one run, or several, came to."""

    rounds: int = 0
    jobs: int = 0
    escalations: int = 0
    lost: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.rounds + other.rounds,
            self.jobs + other.jobs,
            self.escalations + other.escalations,
            self.lost + other.lost,
        )

    def __str__(self) -> str:
        return (
            f"torture: {self.rounds} rounds, {self.jobs} jobs, "
            f"{self.escalations} escalations, {self.lost} lost blocks"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layout", choices=tuple(MACHINES), default="blockdev")
    parser.add_argument("--mechanism", choices=("cbw", "fleece"), default="cbw")
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin runs until this time is up: seed after seed, each in both layouts "
        "with both mechanisms",
    )
    parser.add_argument("--backend", help="another backend program than the built one")
    parser.add_argument("--disks", type=int, choices=range(1, 7), default=2)
    return parser.parse_args(argv)


def _runs(arguments: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Yield the arguments of each run: one, or as many as begin in ``--minutes``."""
    if arguments.minutes is None:
        yield arguments
        return
    until = time.monotonic() + 60 * arguments.minutes
    kinds = [(layout, how) for layout in MACHINES for how in ("cbw", "fleece")]
    for seed in itertools.count(arguments.seed):
        for layout, mechanism in kinds:
            if time.monotonic() >= until:
                return
            changed = {"seed": seed, "layout": layout, "mechanism": mechanism}
            yield argparse.Namespace(**{**vars(arguments), **changed})


async def torture(arguments: argparse.Namespace) -> int:
    """Run it; return an exit status. A signal undoes everything as an error does."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    sums, failure = Sums(), ""
    for one in _runs(arguments):
        run_sums, failure = await _one(one)
        sums += run_sums
        if failure:
            print(f"torture: FAILED: {failure}", flush=True)
            break
        if arguments.minutes is not None:
            print(f"  so far: {sums}", flush=True)
    print(sums, flush=True)
    return 1 if failure else 0


async def _one(arguments: argparse.Namespace) -> tuple[Sums, str]:
    """One run in a world of its own; return what it came to and why it failed."""
    print(
        f"torture: seed {arguments.seed}, {arguments.layout}, {arguments.mechanism}, "
        f"{arguments.disks} disks",
        flush=True,
    )
    run: Torture | None = None
    failure = ""
    changes = {"PODHEITOR_PROXMOX_BACKEND": arguments.backend}
    world = World(environment=changes if arguments.backend else None)
    try:
        async with world:
            run = Torture(world, arguments)
            try:
                await run.run(arguments.rounds)
            except BaseException:
                _keep_logs(world)
                raise
    except (Exception, asyncio.CancelledError) as error:
        failure = f"{type(error).__name__}: {error}"
    return run.sums() if run else Sums(), failure


def _keep_logs(world: World) -> None:
    place = Path(tempfile.mkdtemp(prefix="pveplug-torture-"))
    for name, folder in (("site", world.site.root), ("bacula", world.base / "b")):
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(folder / "log", place / name)
    if not os.environ.get("PVEPLUG_KEEP"):
        print(f"PVEPLUG_KEEP=1 keeps {world.base} too", flush=True)
    print(f"the logs are kept in {place}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(torture(_arguments(None))))
