# SPDX-License-Identifier: Apache-2.0
"""``./dev drcuts``: replication under cuts of its channel and kills of its ends.

Two sites with real QEMU, the receiver as its real process, the sender as ``pveplug dr
seed|incremental``, a proxy between them. Seeds of fresh VMs and increments in turn: the
channel is cut at a byte drawn from the seed, in either direction, or one end is killed
at a drawn moment, while the guest writes behind the point in time. Then the last
restore point has to be what the disks were at its instant, the next cycle has to end
well with a restore point that is right, and nothing may be left on either site.
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
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.drcuts_check import (
    Judge,
    LostPointError,
    WrongCycleError,
    crash,
)
from tests.lab.lifecycle import destroy_vm
from tests.lab.vm import LabVm
from tests.support.cutting_proxy import CuttingProxy, How, Way
from tests.support.dr_written import Ran, Sender, Written, start_sender
from tests.support.two_sites import TwoSites

MIB = 1 << 20
SIZES = {"scsi0": 32 * MIB, "scsi1": 32 * MIB}
DISKS = {
    "scsi0": "local:0.03125,format=qcow2",
    "scsi1": "local:0.03125,format=raw",
}
WORDS = "verify_sample_blocks=4 dr_restore_points=3"
FILL = (("scsi0", 0, 3 * MIB), ("scsi1", 9 * MIB, 2 * MIB), ("scsi1", 31 * MIB, MIB))
EDGE = 2500
"""Bytes at either end of a connection that are drawn more often than the others."""
EX_UNAVAILABLE = 69
MANY = 5
"""Problems after which a run gives up."""
TRIES = 6


@dataclass(frozen=True, slots=True)
class Event:
    """What happens to one cycle."""

    number: int
    mode: str
    kind: str
    """``cut``, ``kill sender`` or ``kill receiver``."""
    seed: int


@dataclass(frozen=True, slots=True)
class Course:
    """An uncut cycle: bytes on the wire, and seconds."""

    passed: dict[Way, int]
    seconds: float


@dataclass(slots=True)
class Sums:
    """What a run came to."""

    cuts: int = 0
    kills: int = 0
    lost: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return (
            f"drcuts: {self.cuts} cuts, {self.kills} kills, {self.lost} restore points "
            f"lost, {self.wrong} cycles wrong"
        )


def plan(seed: int, cuts: int, kills: int) -> list[Event]:
    """Return the events of a run: seeds and increments in turn."""
    rng = random.Random(seed)
    kinds = ["cut"] * cuts
    kinds += [("kill sender", "kill receiver")[n % 2] for n in range(kills)]
    rng.shuffle(kinds)
    return [
        Event(n + 1, ("seed", "incremental")[n % 2], kind, rng.getrandbits(32))
        for n, kind in enumerate(kinds)
    ]


class DrCuts:
    """One run."""

    def __init__(self, sites: TwoSites, proxy: CuttingProxy, seed: int) -> None:
        self.sites = sites
        self.proxy = proxy
        self.sums = Sums()
        self._seed = seed
        self._courses: dict[str, Course] = {}
        self._vmid = 99
        self._written: Written | None = None
        self._judge: Judge
        self._began = time.monotonic()
        self._log_at = 0

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    async def run(self, events: Sequence[Event]) -> None:
        """Measure what is uncut, then go through the events."""
        await self._measure()
        problems = 0
        for event in events:
            try:
                await self._event(event)
            except (LostPointError, WrongCycleError) as error:
                self.sums.lost += isinstance(error, LostPointError)
                self.sums.wrong += isinstance(error, WrongCycleError)
                self.say(f"{event.number}: {event.mode}: WRONG: {error}")
                keep_logs(self.sites)
                problems += 1
                if problems >= MANY:
                    raise
                await self._destroy()
                await self.sites.kill_receiver()
                await self.sites.start_receiver()
        await self._destroy()

    # --- the VMs ---------------------------------------------------------------------

    async def _fresh(self) -> None:
        """Begin with a VM that nobody has replicated."""
        await self._destroy()
        self._vmid += 1
        identity = str(uuid.UUID(int=self._seed << 32 | self._vmid))
        vm = await self.sites.site.create_vm(
            self._vmid, {"smbios1": f"uuid={identity}"}, disks=DISKS
        )
        await vm.start()
        seed = self._seed * 10_000 + self._vmid
        self._written = Written(vm, SIZES, folder=self.sites.base, seed=seed)
        self._judge = Judge(self.sites, vm, identity)
        for key, offset, length in FILL:
            await self._written.data(key, offset, length)

    async def _destroy(self) -> None:
        """Remove the VM, its replica and what the receiver knows of it."""
        written, self._written = self._written, None
        if written is None:
            return
        await written.vm.stop()
        await _destroy(written.vm)
        if replica := self._judge.replica:
            replica.set(protection=None)
            await _destroy(replica)
        for folder in (self.sites.state_dir / "replicas", self.sites.stage_dir):
            shutil.rmtree(folder / self._judge.uuid, ignore_errors=True)

    # --- cycles ----------------------------------------------------------------------

    async def _measure(self) -> None:
        """Run a cycle of each kind that nothing happens to."""
        await self._fresh()
        for mode in ("seed", "incremental", "incremental"):
            ran = await self._cycle(mode, random.Random(self._seed))
            await self._judged(ran)
            last = self.proxy.connections[-1]
            self._courses[mode] = Course(dict(last.passed), ran.seconds)
            self.say(
                f"{mode} uncut: {last.up} bytes up, {last.down} down, "
                f"{ran.seconds:.1f} s"
            )

    @contextlib.asynccontextmanager
    async def _running(self, mode: str, rng: random.Random) -> AsyncIterator[Sender]:
        """Write, start a sender, and write on behind its point in time at times."""
        assert self._written
        await self._written.some(rng.randint(15, 40))
        self._judge.open.append(await asyncio.to_thread(self._written.sums))
        before = self._judge.record.get("cycle", 0)
        sender = await start_sender(
            self.sites, mode, self._vmid, WORDS, port=self.proxy.port
        )
        behind = None
        if rng.random() < 0.6:
            behind = asyncio.create_task(self._write_behind(rng.randint(1, 12), before))
        try:
            yield sender
        finally:
            sender.kill()
            if behind:
                await self._stopped(behind)

    async def _write_behind(self, count: int, before: int) -> None:
        """Write when the receiver has heard of the point in time, not before."""
        assert self._written
        while self._judge.record.get("cycle", 0) == before:
            await asyncio.sleep(0.01)
        await self._written.some(count)

    @staticmethod
    async def _stopped(behind: asyncio.Task[None]) -> None:
        """Let the writer end; it waits for ever where no point in time was taken."""
        await asyncio.wait({behind}, timeout=1.0)
        behind.cancel()
        await asyncio.gather(behind, return_exceptions=True)
        if not behind.cancelled() and (error := behind.exception()):
            raise error

    async def _cycle(self, mode: str, rng: random.Random) -> Ran:
        """Run one cycle that nothing happens to."""
        async with self._running(mode, rng) as sender:
            return await sender.ended()

    async def _judged(self, ran: Ran) -> str:
        """Judge a cycle that has to have ended well."""
        if ran.status:
            raise WrongCycleError(f"status {ran.status}: {ran.text[-3000:]}")
        await self._judge.released()
        new = await self._judge.judge_points(ended=True)
        await self._judge.clean(ended=True)
        self._look_for_crashes(ran)
        count = len(self._judge.points())
        more = ", one of them the cycle's before" if new > 1 else ""
        return f"{count} restore points{more}, {ran.seconds:.1f} s"

    def _look_for_crashes(self, ran: Ran) -> None:
        text = self.sites.receiver_log
        new, self._log_at = text[self._log_at :], len(text)
        for where, said in (("receiver", new), ("sender", ran.text)):
            if found := crash(said):
                raise WrongCycleError(f"the {where} crashed: {found}")

    # --- events ----------------------------------------------------------------------

    async def _event(self, event: Event) -> None:
        """Let one event happen, be judged, and the next cycle be right."""
        rng = random.Random(event.seed)
        for late in range(TRIES):
            if event.mode == "seed" or self._written is None:
                await self._fresh()
                if event.mode != "seed":
                    await self._judged(await self._cycle("seed", rng))
            if event.kind == "cut":
                said, ran = await self._cut(event, rng, late)
            else:
                said, ran = await self._kill(event, rng, late)
            if said:
                break
            await self._judged(ran)  # it was over before: that cycle counts for nothing
        else:
            raise AssertionError(f"{event}: every cycle was over before")
        self.sums.cuts += event.kind == "cut"
        self.sums.kills += event.kind != "cut"
        if ran.status not in (0, EX_UNAVAILABLE, -signal.SIGKILL):
            raise WrongCycleError(f"status {ran.status}: {ran.text[-3000:]}")
        await self._judge.released()
        new = await self._judge.judge_points(ended=not ran.status)
        killed = event.kind.removeprefix("kill ") if event.kind != "cut" else ""
        await self._judge.clean(ended=not ran.status, killed=killed)
        self._look_for_crashes(ran)
        was = "it had ended" if not ran.status else f"{new} restore points more"
        then = await self._judged(await self._next(event, rng))
        self.say(f"{event.number}: {event.mode} {said}: {was}; next cycle: {then}")
        if event.mode != "seed":
            await self._judge.judge_all()

    async def _next(self, event: Event, rng: random.Random) -> Ran:
        """Run the job again; a seed that was whole already is gone on with."""
        mode = event.mode
        if self._judge.record.get("role") == "standby":
            mode = "incremental"
        ran = await self._cycle(mode, rng)
        if mode == "seed" and not ran.status and "its seed had ended" in ran.text:
            # Only its restore point was missing, which this opening has taken.
            self._judge.open.pop()
            ran = await self._cycle("incremental", rng)
        return ran

    async def _cut(
        self, event: Event, rng: random.Random, late: int
    ) -> tuple[str, Ran]:
        """Cut the channel of one cycle; returns no text if it was over before."""
        way, how = rng.choice(list(Way)), rng.choice([How.CLOSE, How.CLOSE, How.RESET])
        total = int(self._courses[event.mode].passed[way] * 0.8**late)
        where = rng.random()
        at = rng.randrange(total)
        if where < 0.1:
            at = rng.randrange(min(EDGE, total))
        elif where < 0.25:
            at = total - 1 - rng.randrange(min(EDGE, total))
        self.proxy.cut_next(way, at, how)
        ran = await self._cycle(event.mode, rng)
        if not self.proxy.connections[-1].cut:
            return "", ran
        return f"cut {way.value} at {at} of {total} ({how.value})", ran

    async def _kill(
        self, event: Event, rng: random.Random, late: int
    ) -> tuple[str, Ran]:
        """Kill one end in mid-cycle; returns no text if it was over before."""
        course = self._courses[event.mode]
        before = len(self.proxy.connections)
        by_bytes = rng.random() < 0.5
        share = rng.random() * 0.8**late
        goal = int(share * course.passed[Way.UP])
        async with self._running(event.mode, rng) as sender:
            ended = asyncio.create_task(sender.ended())
            began = time.monotonic()
            while not ended.done():
                there = self.proxy.connections[before:]
                passed = there[0].up if there else 0
                seconds = time.monotonic() - began
                if passed > goal if by_bytes else seconds > share * course.seconds:
                    break
                await asyncio.sleep(0.002)
            if ended.done():
                return "", await ended
            if event.kind == "kill sender":
                sender.kill()
                ran = await ended
            else:
                await self.sites.kill_receiver()
                ran = await ended
                await self.sites.start_receiver()
        if event.kind == "kill sender" and not ran.status:
            return "", ran
        when = f"after {passed} bytes" if by_bytes else f"after {seconds:.2f} s"
        return f"{event.kind} {when}", ran


async def _destroy(vm: LabVm) -> None:
    await destroy_vm(
        vm.site, vm.node, vm.vmid, skiplock=True, unreferenced=True, purge=True
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev drcuts", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cuts", type=int, default=12)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--only", type=int, help="the event of this number alone")
    return parser.parse_args(argv)


async def drcuts(arguments: argparse.Namespace) -> int:
    """Run it; return an exit status. A signal undoes everything as an error does."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    print(
        f"drcuts: seed {arguments.seed}, {arguments.cuts} cuts, {arguments.kills} "
        "kills are planned",
        flush=True,
    )
    events = plan(arguments.seed, arguments.cuts, arguments.kills)
    if arguments.only is not None:
        events = [event for event in events if event.number == arguments.only]
    run: DrCuts | None = None
    failure = ""
    try:
        async with TwoSites() as sites, sites.cutting() as proxy:
            sites.most_hold_s = 10.0  # who holds a monitor may wait for a processor
            run = DrCuts(sites, proxy, arguments.seed)
            try:
                await sites.start_receiver()
                await run.run(events)
            except BaseException:
                keep_logs(sites)
                raise
    except (Exception, asyncio.CancelledError) as error:
        failure = f"{type(error).__name__}: {error}"
        print(f"drcuts: FAILED: {failure}", flush=True)
    sums = run.sums if run else Sums()
    print(sums, flush=True)
    return 1 if failure or sums.lost or sums.wrong else 0


def keep_logs(sites: TwoSites) -> None:
    """Copy what may tell why, for the sites are removed."""
    place = Path(tempfile.mkdtemp(prefix="pveplug-drcuts-"))
    for name, folder in (("source", sites.site.root), ("dr", sites.dr.root)):
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(folder / "log", place / name)
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(sites.state_dir, place / "state")
    (place / "receiver.log").write_text(sites.receiver_log)
    if not os.environ.get("PVEPLUG_KEEP"):
        print(f"PVEPLUG_KEEP=1 keeps {sites.base} too", flush=True)
    print(f"the logs are kept in {place}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(drcuts(_arguments(None))))
