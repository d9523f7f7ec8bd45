# SPDX-License-Identifier: Apache-2.0
"""``./dev ircuts``: instant recoveries whose stream is cut under a writing guest.

A VM with two disks is backed up, Full and Incremental, by a real Bacula. Again and
again it is recovered with ``mode=instant`` while its guest reads and writes what has
come and what is owed; at a drawn byte of what lands, or a drawn moment before the VM is
there, something ends: a daemon, the backend, the keeper, the job, the connection
between the daemons, the keeper while it moves a disk. The same restore is run again. It
has to go on where it was, the disks have to be what the model of backup and writes
says, and nothing may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.bacula import TERMINAL, JobResult
from tests.lab.lifecycle import destroy_vm
from tests.lab.vm import LabVm
from tests.support.cutting_proxy import CuttingProxy, How
from tests.support.instant import (
    CLUSTER,
    MIB,
    Written,
    compare,
    contents,
    keeper_pid,
    kill_keeper,
    landed,
    left,
    nbd_nodes,
    noise,
    pveplug,
    traces,
)
from tests.support.kills import kill, until
from tests.support.world import World

SIZES = {"scsi0": 1 * MIB, "scsi1": 9 * MIB}
"""Bacula brings one image after the other, and a VM starts when it has the beginning of
each of its disks."""
VMID = 200
RATE = 2 * MIB
"""Bytes per second that Bacula may bring."""
SLOW = 256 << 10
"""As long as the VM isn't there: what is under way when something ends still comes."""
MOVE_KIB_S = 4096
MEANS = (
    "backend killed",
    "bacula-sd killed",
    "link cut",
    "job cancelled",
    "bacula-fd killed",
    "keeper killed",
    "keeper killed in mid-move",
)
EARLY = 0.15
"""How often it happens before the VM is its user's."""
MANY = 3
"""Problems after which a run gives up."""
CLEAN_S = 45.0


class WrongError(AssertionError):
    """The product did what it must not."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What happens to one recovery.

    Attributes:
        share: of the disks' clusters, landed when it happens; below 0: so many tenths
            of a second after the VM's journal is there, negated.
    """

    number: int
    means: str
    share: float
    seed: int

    @property
    def when(self) -> str:
        if self.share < 0:
            return f"{-self.share / 10:.2f} s after its begin"
        return f"{self.share:.1%} landed"


@dataclass(slots=True)
class Sums:
    """What a run came to."""

    cuts: int = 0
    resumed: int = 0
    undone: int = 0
    wrong: int = 0
    twice: int = 0
    """Bytes that were landed though they were there."""

    def __str__(self) -> str:
        return (
            f"ircuts: {self.cuts} cuts, {self.resumed} resumed, {self.undone} undone "
            f"and begun anew, {self.twice} bytes landed twice, {self.wrong} wrong"
        )


def plan(seed: int, cuts: int) -> list[Cut]:
    """Return what happens: every means in turn, at drawn places."""
    rng = random.Random(seed)
    found = []
    for number in range(cuts):
        means = MEANS[number % len(MEANS)]
        share = rng.random() * 0.95
        if rng.random() < EARLY and not means.startswith("keeper"):
            share = -rng.random() * 15
        found.append(Cut(number + 1, means, share, rng.getrandbits(32)))
    return found


@dataclass(slots=True)
class _Course:
    """One recovery, from its first job to the VM on its own."""

    cut: Cut
    written: Written | None = None
    jobs: list[int] = field(default_factory=list)


class IrCuts:
    """One run."""

    def __init__(self, world: World, proxy: CuttingProxy) -> None:
        self.world = world
        self.proxy = proxy
        self.sums = Sums()
        self._truth: dict[str, bytearray] = {}
        self._began = time.monotonic()
        self._lost: list[int] = []

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    async def run(self, cuts: Sequence[Cut]) -> None:
        """Back up, then go through the cuts."""
        await self._back_up()
        for cut in cuts:
            try:
                await self._course(cut)
            except (WrongError, AssertionError, TimeoutError) as error:
                self.sums.wrong += 1
                self.say(f"{cut.number}: {cut.means}, {cut.when}: WRONG: {error}")
                keep_logs(self.world)
                if self.sums.wrong >= MANY:
                    raise
                await self._give_up()
        await self._forget_jobs()

    # --- the backup ------------------------------------------------------------------

    async def _back_up(self) -> None:
        world, folder = self.world, self.world.base
        disks = {
            key: noise(folder / f"{key}.raw", size, at * 50)
            for at, (key, size) in enumerate(SIZES.items())
        }
        vm = await world.site.create_vm(
            100,
            {
                "agent": "0",
                "boot": "order=scsi0",
                "tags": "kept",
                "description": "its own",
            },
            disks=disks,
        )
        await vm.start()
        await vm.qemu_io("scsi1", "write -z 3M 512k")
        await world.add_job("nightly", "vmid=100")
        await self._good(await world.run("nightly", "Full"))
        for at in range(512 << 10, 9 * MIB, 512 << 10):
            await vm.qemu_io("scsi1", f"write -P {at >> 19 | 0xC0} {at} 96k")
        await vm.qemu_io("scsi0", "write -P 7 512k 300k")
        await self._good(await world.run("nightly", "Incremental"))
        await vm.stop()
        self._truth = contents(vm, folder)
        await _destroy(vm)

    async def _good(self, job: JobResult) -> JobResult:
        if not job.ok:
            raise WrongError(f"{job.termination}: {job.text}")
        return job

    # --- one recovery ----------------------------------------------------------------

    async def _course(self, cut: Cut) -> None:
        course = _Course(cut)
        await self._start(course)
        async with contextlib.AsyncExitStack() as guest:
            if cut.share >= 0:
                vm = await self._runs(course)
                course.written = Written(vm, self._truth, cut.seed)
                await guest.enter_async_context(course.written.going_on())
            await self._reached(course)
            owed = self._owed()
            await self._strike(course)
            self.sums.cuts += 1
            if course.written is not None:
                await asyncio.sleep(1.0)  # the guest goes on meanwhile
            again = await self._again(course, guest, owed)
        await self._judged(course)
        written = course.written
        assert written is not None
        self.say(
            f"{cut.number}: {cut.means}, {cut.when}: {again}; {written.writes} writes, "
            f"{written.reads} reads, {written.most_waiting} waited at once: right"
        )
        await _destroy(written.vm)

    async def _start(self, course: _Course) -> None:
        where = (
            f"/@pve/restore_vmid={VMID},mode=instant,restore_storage=local2,"
            f"ir_overlay_storage=local,bwlimit={MOVE_KIB_S}"
        )
        self.proxy.rate = SLOW
        course.jobs.append(
            await asyncio.to_thread(
                lambda: self.world.bacula.start_restore(where=where, job="nightly")
            )
        )

    async def _runs(self, course: _Course) -> LabVm:
        """Wait until the VM runs."""
        site, job = self.world.site, course.jobs[-1]

        def there() -> bool:
            if self.world.bacula.status(job) in TERMINAL:
                raise WrongError(f"{self.world.bacula.result(job).text}")
            return bool(site.find(VMID)) and site.vm(VMID).running

        await until(there, "the start of the VM", 60, 0.05)
        vm = site.vm(VMID)
        await vm.wait_started()
        self.proxy.rate = RATE
        return vm

    async def _reached(self, course: _Course) -> None:
        """Wait for the place of the cut."""
        site, share = self.world.site, course.cut.share
        if share < 0:
            journal = site.root / f"ph/lib/vms/{VMID}.json"
            await until(journal.exists, "the begin of the restore", 60, 0.01)
            await asyncio.sleep(-share / 10)
        elif course.cut.means == "keeper killed in mid-move":
            vm = site.vm(VMID)

            async def moves() -> bool:
                jobs = await vm.qmp("query-block-jobs")
                return any(j["offset"] > j["len"] * share * 0.8 for j in jobs)

            async with asyncio.timeout(90):
                while not await moves():
                    await asyncio.sleep(0.05)
        else:

            def enough() -> bool:
                here, total = landed(site, VMID)
                return total > 0 and here >= share * total

            await until(enough, "that much of the disks", 90, 0.01)

    def _owed(self) -> int:
        here, total = landed(self.world.site, VMID)
        return (total - here) * CLUSTER

    async def _strike(self, course: _Course) -> None:
        bacula, site = self.world.bacula, self.world.site
        match course.cut.means:
            case "backend killed":
                await kill(self._backend())
            case "bacula-sd killed":
                await asyncio.to_thread(bacula.kill, "sd")
            case "bacula-fd killed":
                await asyncio.to_thread(bacula.kill, "fd")
            case "job cancelled":
                await asyncio.to_thread(bacula.cancel, course.jobs[-1])
            case "link cut":
                self.proxy.cut_now(How.RESET)
            case _:
                await kill_keeper(site, VMID)

    def _backend(self) -> int:
        """The process below bacula-fd."""
        fd = self.world.bacula.pid("fd")
        children = Path(f"/proc/{fd}/task").glob("*/children")
        pids = {int(pid) for path in children for pid in path.read_text().split()}
        if not pids:
            raise WrongError("bacula-fd has no backend")
        return max(pids)

    async def _again(
        self, course: _Course, guest: contextlib.AsyncExitStack, owed: int
    ) -> str:
        """Make good what was broken, and run the restore again where that is needed."""
        bacula, cut = self.world.bacula, course.cut
        for daemon in ("sd", "fd"):
            if not bacula.alive(daemon):
                await asyncio.to_thread(bacula.start_daemon, daemon)
        if cut.means.startswith("keeper"):
            status, said = await pveplug(
                self.world, "ir", "resume", "--vmid", str(VMID)
            )
            if status and keeper_pid(self.world.site, VMID) is None:
                raise WrongError(f"pveplug ir resume: {said}")
            if cut.means.endswith("mid-move"):
                await self._ended(course.jobs[-1])
            else:
                await self._good(await self._ended(course.jobs[-1]))
            return "served again"
        if cut.means == "bacula-fd killed":
            # Its Director takes a minute to see it.
            self._lost.append(course.jobs[-1])
            await asyncio.to_thread(bacula.cancel, course.jobs[-1])
        else:
            job = await self._ended(course.jobs[-1])
            if job.ok:
                return "it was over before"
        found = await self._handed()
        if found is None:
            return "all had come before"
        if not found:
            await self._start(course)
            vm = await self._runs(course)
            course.written = Written(vm, self._truth, cut.seed)
            await guest.enter_async_context(course.written.going_on())
            await self._good(await self._ended(course.jobs[-1]))
            self.sums.undone += 1
            return "undone and begun anew"
        if course.written is None:
            vm = self.world.site.vm(VMID)
            owed = self._owed()
            await self._start(course)
            await until(lambda: vm.running, "the start of the VM", 60, 0.05)
            await vm.wait_started()
            self.proxy.rate = RATE
            course.written = Written(vm, self._truth, cut.seed)
            await guest.enter_async_context(course.written.going_on())
        else:
            owed = self._owed()
            await self._start(course)
            self.proxy.rate = RATE
        again = await self._ended(course.jobs[-1])
        if not owed and "exists. Remedy" in again.text:
            return "all had come before"
        await self._good(again)
        anew = landed_bytes(again)
        self.sums.twice += max(0, anew - owed)
        self.sums.resumed += 1
        if anew > owed:
            raise WrongError(f"{anew} bytes landed, {owed} were owed")
        return f"resumed, {anew >> 10} of {owed >> 10} KiB owed landed"

    async def _handed(self) -> bool | None:
        """Whether the VM was its user's when its job died; else nothing may be left.

        None: it stands on its own already.
        """
        site = self.world.site
        end = time.monotonic() + CLEAN_S
        while True:
            there = site.find(VMID) is not None
            record = site.root / f"ph/landing/{VMID}/recovery.json"
            journal = site.root / f"ph/lib/vms/{VMID}.json"
            if there and not journal.exists() and record.exists():
                return True
            if not left(self.world, VMID):
                return None if there else False
            if time.monotonic() > end:
                state = f"VM there: {there}; {left(self.world, VMID)}"
                raise WrongError(f"neither handed over nor undone: {state}")
            await asyncio.sleep(0.1)

    async def _ended(self, job_id: int) -> JobResult:
        return await asyncio.to_thread(self.world.bacula.wait, job_id, 180)

    # --- judging ---------------------------------------------------------------------

    async def _judged(self, course: _Course) -> None:
        world = self.world
        if (written := course.written) is None:
            written = Written(world.site.vm(VMID), self._truth, course.cut.seed)
            course.written = written
        await written.settled()
        await until(lambda: not left(world, VMID), "the end of the recovery", 120, 0.2)
        if found := await nbd_nodes(written.vm):
            raise WrongError(f"still served by us: {found}")
        if found := traces(world, VMID):
            raise WrongError(f"left: {found}")
        values = written.vm.conf.values
        own = (values.get("tags", ""), values.get("description", "").strip())
        if own != ("kept", "its own"):
            raise WrongError(f"tags and description are {own}")
        jobs = await written.vm.qmp("query-jobs")
        if jobs:
            raise WrongError(f"block jobs: {jobs}")
        for key in SIZES:
            await written.vm.qemu_io(key, "flush")
        await written.vm.stop()
        compare(contents(written.vm, world.base), written.disks)

    async def _give_up(self) -> None:
        """Remove what a recovery that went wrong has left."""
        bacula = self.world.bacula
        for daemon in ("sd", "fd"):
            if not bacula.alive(daemon):
                await asyncio.to_thread(bacula.start_daemon, daemon)
        await asyncio.to_thread(bacula.console, "cancel all yes")
        await asyncio.sleep(2)
        await pveplug(self.world, "ir", "discard", "--vmid", str(VMID), "--yes")
        if keeper_pid(self.world.site, VMID):
            await kill_keeper(self.world.site, VMID)
        if self.world.site.find(VMID):
            vm = self.world.site.vm(VMID)
            vm.set(protection=None, lock=None)
            await vm.stop()
            await _destroy(vm)
        for path in ("landing", "run", "lib/vms"):
            shutil.rmtree(self.world.site.root / "ph" / path, ignore_errors=True)

    async def _forget_jobs(self) -> None:
        for job_id in self._lost:
            await self._ended(job_id)


def landed_bytes(job: JobResult) -> int:
    """What a job says it has landed that wasn't there."""
    total = 0
    for line in job.log:
        before, mark, _ = line.partition(" bytes landed")
        if mark:
            total += int(before.rpartition(" ")[2])
    return total


async def _destroy(vm: LabVm) -> None:
    await destroy_vm(
        vm.site, vm.node, vm.vmid, skiplock=True, unreferenced=True, purge=True
    )


@contextlib.asynccontextmanager
async def behind_a_proxy(world: World) -> AsyncIterator[CuttingProxy]:
    """Let the daemons reach bacula-sd through a proxy that can be cut."""
    bacula = world.bacula
    async with CuttingProxy(bacula.port("sd")) as proxy:
        bacula.reach_storage_at(proxy.port)
        try:
            yield proxy
        finally:
            bacula.reach_storage_at(bacula.port("sd"))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev ircuts", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cuts", type=int, default=7)
    parser.add_argument("--only", type=int, help="the cut of this number alone")
    return parser.parse_args(argv)


async def ircuts(arguments: argparse.Namespace) -> int:
    """Run it; return an exit status. A signal undoes everything as an error does."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    print(f"ircuts: seed {arguments.seed}, {arguments.cuts} cuts", flush=True)
    cuts = plan(arguments.seed, arguments.cuts)
    if arguments.only is not None:
        cuts = [cut for cut in cuts if cut.number == arguments.only]
    run: IrCuts | None = None
    failure = ""
    try:
        async with (
            World() as world,
            behind_a_proxy(world) as proxy,
        ):
            world.most_hold_s = 10.0  # who holds a monitor may wait for a processor
            run = IrCuts(world, proxy)
            try:
                await run.run(cuts)
            except BaseException:
                keep_logs(world)
                raise
    except (Exception, asyncio.CancelledError) as error:
        failure = f"{type(error).__name__}: {error}"
        print(f"ircuts: FAILED: {failure}", flush=True)
    sums = run.sums if run else Sums()
    print(sums, flush=True)
    return 1 if failure or sums.wrong else 0


def keep_logs(world: World) -> None:
    """Copy what may tell why, for the world is removed."""
    place = Path(tempfile.mkdtemp(prefix="pveplug-ircuts-"))
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(world.site.root / "log", place / "site")
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(world.bacula.base / "log", place / "bacula")
    if not os.environ.get("PVEPLUG_KEEP"):
        print(f"PVEPLUG_KEEP=1 keeps {world.base} too", flush=True)
    print(f"the logs are kept in {place}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(ircuts(_arguments(None))))
