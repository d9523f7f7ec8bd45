# SPDX-License-Identifier: Apache-2.0
"""One replication cycle of one VM: from the point in time to the acknowledged point.

::

    Open ─ State ─ hold the VM ─ point in time ─ Describe ─ Ready ─ disks ─ Commit
                                                                             │
              Done ◄─ Finish ◄─ samples ◄─ slice (what differs is sent again)┘

The point in time stays open until the receiver has acknowledged, for verification reads
it again. What fails before that leaves the last restore point and its segment: the next
cycle's union has one segment more.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pveplug import __version__
from pveplug.cbt import Level
from pveplug.config import Capture, Replication
from pveplug.diskstream import (
    Progress,
    RateLimit,
    give_back_unread,
    scan,
)
from pveplug.dr.conversation import Conversation, ReceiverRefusedError
from pveplug.dr.delta import (
    DiskSender,
    Range,
    check_samples,
    check_slice,
    choose_samples,
    needed_again,
    resumed,
    slice_of,
)
from pveplug.errors import JobError, PveplugError
from pveplug.events import Reporter
from pveplug.extents import Kind
from pveplug.guestlatency import keep_pace
from pveplug.images.clusters import ClusterMap
from pveplug.nbd.client import NbdClient, connect
from pveplug.nbd.source import READERS
from pveplug.node import Node
from pveplug.pacing import Pace
from pveplug.progress import reporting
from pveplug.proto.dr_frames import (
    LEAF,
    Applied,
    Bye,
    Commit,
    Describe,
    DiskInfo,
    Done,
    Finish,
    Open,
    Ready,
    State,
)
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.scratch import watch_answers, watch_space
from pveplug.selection import VmSummary
from pveplug.source import Opened, ReadableDisk, open_vm
from pveplug.tasks import first_failure
from pveplug.units import KiB, human
from pveplug.vmhold import held

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DiskReport:
    """What came of one disk; bytes."""

    key: str
    size: int
    how: str
    """``changes since CYCLE``, ``all``, ``compared with the replica: WHY``."""
    read: int = 0
    sent: int = 0
    checked: int = 0
    repaired: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class CycleReport:
    """What came of one cycle, for the job log and the report file."""

    cycle: str
    consistency: str
    vmid: int
    """Of the replica."""
    disks: list[DiskReport]
    samples: int = 0
    deferred: bool = False
    done: Done | None = None
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Disk:
    number: int
    source: ReadableDisk
    client: NbdClient
    clusters: ClusterMap
    how: str
    compare: bool
    fresh: bool
    slice: Range | None = None
    samples: tuple[int, ...] = ()
    progress: Progress = field(default_factory=Progress)
    report: DiskReport = field(default_factory=lambda: DiskReport("", 0, ""))


def cycle_name(link: str, number: int, now: float) -> str:
    """Return the name of a cycle; the chain of segments is called by ``link``.

    It has the form of Bacula's unique job names, so all cycles of a replica are one
    chain, whichever Job runs them.
    """
    when = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return f"dr-{link}.{when:%Y-%m-%d_%H.%M.%S}_{number:02d}"


def wanted_level(mode: str, state: State) -> Level:
    """Return what the cycle builds on, or refuse it.

    Raises:
        JobError: the replica isn't in a state for this mode.
    """
    if mode == "seed":
        if state.role == "none":
            return Level("F")
        if state.role == "seeding":
            # Everything since the first try: what a later one sent is among it.
            return Level("I", state.seed_cycle) if state.seed_cycle else Level("F")
        raise JobError(
            f"the replica (VM {state.vmid} there) exists already, {state.role}.",
            phase="seed",
            remedy="mode=incremental goes on with it.",
        )
    if state.role == "none":
        raise JobError(
            "the receiver has no replica of this VM.",
            phase="replication",
            remedy="run a job with mode=seed first.",
        )
    if state.role == "seeding":
        raise JobError(
            "the replica's seed has not ended.",
            phase="replication",
            remedy="run the job with mode=seed again; it goes on where it was.",
        )
    return Level("I", state.acked) if state.acked else Level("F")


class Cycle:
    """One cycle; ``run`` once."""

    def __init__(
        self,
        talk: Conversation,
        state: State,
        opening: Open,
        capture: Capture,
        replication: Replication,
        exclude_disk: tuple[str, ...],
        node: Node,
        api: PveApi,
        local: PveLocal,
        here: str,
        vm: VmSummary,
        say: Reporter,
    ) -> None:
        self._talk = talk
        self._state = state
        self._opening = opening
        self._capture = capture
        self._replication = replication
        self._exclude = exclude_disk
        self._node = node
        self._api = api
        self._local = local
        self._here = here
        self._vm = vm
        self._say = say
        self._limit = RateLimit(capture.bwlimit * KiB)
        self._limit.pace = Pace(capture.latency_budget_ms / 1000)
        self._phase = "prepare"
        self._phases: dict[str, float] = {}
        self._since = time.monotonic()

    async def run(self) -> CycleReport:
        """Replicate once.

        Raises:
            JobError: VM, disk and phase; the last restore point stands.
        """
        began = time.monotonic()
        level = wanted_level(self._opening.mode, self._state)
        number = self._state.cycle + 1
        cycle = cycle_name(self._state.link, number, time.time())
        async with (
            held(
                self._node,
                self._local,
                self._vm.vmid,
                job=self._opening.job,
                kind="replication",
                lock_wait_s=self._capture.lock_wait,
                lock_now=self._lock_now,
                say=self._say,
            ) as hold,
            open_vm(
                self._capture,
                self._exclude,
                self._node,
                self._api,
                self._local,
                self._here,
                self._vm,
                hold.journal,
                job=cycle,
                level=level,
                say=self._say,
            ) as opened,
            contextlib.AsyncExitStack() as stack,
        ):
            try:
                report = await self._replicate(opened, cycle, number, stack)
            except ReceiverRefusedError as error:
                raise JobError(
                    str(error), vm=str(self._vm.vmid), phase=self._phase
                ) from error
            except JobError:
                raise
            except PveplugError as error:
                raise JobError(
                    str(error), vm=str(self._vm.vmid), phase=self._phase
                ) from error
        report.seconds = time.monotonic() - began
        return report

    async def _lock_now(self) -> str:
        return (await self._api.vm_config(self._here, self._vm.vmid)).lock

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        spent = self._phases.get(self._phase, 0.0)
        self._phases[self._phase] = spent + now - self._since
        self._phase, self._since = phase, now

    async def _replicate(
        self,
        opened: Opened,
        cycle: str,
        number: int,
        stack: contextlib.AsyncExitStack,
    ) -> CycleReport:
        self._enter("describe")
        ready = await self._talk.ask(
            Describe(
                cycle,
                number,
                opened.started,
                opened.config_text,
                opened.consistency,
                tuple(DiskInfo(d.key, d.size, d.format) for d in opened.disks),
                opened.firewall,
                opened.versions.get("machine", ""),
            ),
            Ready,
        )
        self._enter("scan")
        disks = [
            await self._scan(number, source, ready, stack)
            for number, source in enumerate(opened.disks)
        ]
        self._choose(disks)
        for disk in disks:
            if disk.source.trim:
                await give_back_unread(disk.client, self._needed(disk))
        async with self._watched(opened, disks):
            self._enter("send")
            for disk in disks:
                await self._send(disk)
            self._enter("apply")
            await self._talk.send(Commit(len(disks)))
            applied = await self._talk.answer(Applied)
            samples = 0
            if not applied.deferred:
                self._enter("verify")
                samples = await self._verify(disks)
            self._enter("restore point")
            repaired = sum(len(disk.report.repaired) for disk in disks) * LEAF
            done = await self._talk.ask(
                Finish(not applied.deferred and self._replication.slices > 0, repaired),
                Done,
            )
        self._enter("end")
        report = CycleReport(
            cycle,
            opened.consistency,
            ready.vmid,
            [disk.report for disk in disks],
            samples,
            applied.deferred,
            done,
            phases={k: round(v, 3) for k, v in self._phases.items()},
        )
        self._tell(disks, report)
        return report

    @contextlib.asynccontextmanager
    async def _watched(self, opened: Opened, disks: list[_Disk]) -> AsyncIterator[None]:
        """Run the watches that guard the guest, and the progress, meanwhile."""
        vmid = self._vm.vmid
        async with first_failure() as tasks:
            side: list[asyncio.Task[Any]] = []
            if opened.counted:
                side.append(tasks.create_task(watch_space(vmid, opened.counted)))
            if opened.fleeced:
                bound_s = self._capture.cbw_timeout
                side.append(
                    tasks.create_task(watch_answers(vmid, opened.fleeced, bound_s))
                )
            if self._limit.pace.budget_s and "qemu" in opened.versions:
                pacing = keep_pace(
                    self._node.qmp_socket(vmid),
                    self._limit.pace,
                    lambda: sum(disk.progress.read for disk in disks),
                    f"VM {vmid}",
                    self._say,
                )
                side.append(tasks.create_task(pacing, name="pace"))
            told = reporting(
                self._say,
                f"VM {vmid}",
                [(disk.source.key, disk.progress) for disk in disks],
                self._capture.progress_interval,
            )
            if disks:
                side.append(tasks.create_task(told, name="progress"))
            else:
                told.close()
            yield
            for task in side:
                task.cancel()

    async def _scan(
        self,
        number: int,
        source: ReadableDisk,
        ready: Ready,
        stack: contextlib.AsyncExitStack,
    ) -> _Disk:
        contexts = ["base:allocation"]
        if source.context:
            contexts.append(source.context)
        client = await connect(
            source.address, source.export, contexts=contexts, readers=READERS
        )
        stack.push_async_callback(client.aclose)
        if client.size != source.size:
            raise JobError(
                f"its export has {client.size} bytes instead of {source.size}.",
                vm=str(self._vm.vmid),
                disk=source.key,
                phase="scan",
            )
        fresh = source.key in ready.fresh
        durable = ready.seeded.get(source.key, 0)
        compare = False
        if fresh or (source.whole and self._state.role in ("none", "seeding")):
            clusters = await scan(client, context=None, known=0)
            how = "all" if fresh else f"all again: {source.whole}"
        elif source.whole:
            compare = True
            clusters = await scan(client, context=None, known=0)
            why = source.whole
            if not self._state.acked and not source.key.startswith("efidisk"):
                why = "a failback or an undo has ended, and nothing was tracked"
            how = f"compared with the replica: {why}"
        else:
            clusters = await scan(
                client, context=source.context, known=source.parent_size
            )
            how = f"changes since {source.parent_job}"
            if self._state.role == "seeding":
                everything = await scan(client, context=None, known=0)
                clusters = resumed(everything, clusters, durable)
                how = f"all from {human(durable)} on, and {how}"
        disk = _Disk(number, source, client, clusters, how, compare, fresh)
        disk.report = DiskReport(source.key, source.size, how)
        return disk

    def _choose(self, disks: list[_Disk]) -> None:
        """Choose what verification will read again."""
        steady = [d for d in disks if not d.source.key.startswith("tpmstate")]
        slices = self._replication.slices
        if slices:
            number = self._state.slice % slices
            for disk in steady:
                disk.slice = slice_of(disk.source.size, number, slices)
        count = self._replication.verify_sample_blocks
        if count:
            sizes = {disk.source.key: disk.source.size for disk in steady}
            chosen = choose_samples(sizes, count, random.Random())  # noqa: S311 - a sample
            for disk in steady:
                disk.samples = chosen.get(disk.source.key, ())

    @staticmethod
    def _needed(disk: _Disk) -> ClusterMap:
        sent = disk.clusters
        if disk.compare:
            sent = ClusterMap(disk.source.size)
            sent.mark_range(0, disk.source.size, Kind.DATA)
        return needed_again(disk.source.size, sent, disk.slice, disk.samples)

    async def _send(self, disk: _Disk) -> None:
        began = time.monotonic()
        sender = DiskSender(
            self._talk,
            disk.number,
            disk.source.key,
            disk.client,
            self._limit,
            disk.progress,
        )
        async with self._named(disk):
            if disk.compare:
                await sender.differences(disk.clusters)
            else:
                await sender.changes(disk.clusters, fresh=disk.fresh)
        disk.report.read = disk.progress.read
        disk.report.sent = disk.progress.sent
        disk.report.seconds = time.monotonic() - began

    async def _verify(self, disks: list[_Disk]) -> int:
        """Compare this cycle's slice and the samples; return how many were compared.

        Raises:
            JobError: a sample differs.
        """
        for disk in disks:
            if disk.slice is None:
                continue
            async with self._named(disk):
                disk.report.checked, disk.report.repaired = await check_slice(
                    self._talk, disk.number, disk.source.key, disk.client, disk.slice
                )
            if disk.report.repaired:
                self._say.warning(
                    f"VM {self._vm.vmid} {disk.source.key}: the replica differed in "
                    f"{len(disk.report.repaired)} blocks of 64 KiB, the first at "
                    f"{disk.report.repaired[0]}; they were sent again. Its storage may "
                    "be failing"
                )
        compared = 0
        for disk in disks:
            if not disk.samples:
                continue
            async with self._named(disk):
                differ = await check_samples(
                    self._talk, disk.source.key, disk.client, disk.samples
                )
            compared += len(disk.samples)
            if differ:
                with contextlib.suppress(PveplugError):
                    # So that the next opening doesn't make a restore point of it.
                    await self._talk.send(Bye())
                raise JobError(
                    f"the replica differs at offset {differ[0]}"
                    + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
                    + f" of {len(disk.samples)} sampled blocks; no restore point was "
                    "taken.",
                    vm=str(self._vm.vmid),
                    disk=disk.source.key,
                    phase="verify",
                    remedy="a cycle with verify_slice=1/1 compares and mends all of "
                    "it; see to the DR storage.",
                )
        return compared

    @contextlib.asynccontextmanager
    async def _named(self, disk: _Disk) -> AsyncIterator[None]:
        try:
            yield
        except JobError:
            raise
        except PveplugError as error:
            raise JobError(
                f"{error}.",
                vm=str(self._vm.vmid),
                disk=disk.source.key,
                phase=self._phase,
                remedy="the last restore point stands; run the job again.",
            ) from error

    def _tell(self, disks: list[_Disk], report: CycleReport) -> None:
        for disk in disks:
            seen = disk.report
            rate = seen.read / max(seen.seconds, 0.001) / 1e6
            self._say.info(
                f"VM {self._vm.vmid} {seen.key}: {seen.how}; {disk.source.mechanism}; "
                f"{report.consistency}; size {human(seen.size)}, read "
                f"{human(seen.read)}, sent {human(seen.sent)}, {seen.seconds:.1f} s, "
                f"{rate:.0f} MB/s, verified {human(seen.checked)}"
            )


def opening(
    mode: str,
    uuid: str,
    vm: VmSummary,
    site: str,
    job: str,
    epoch: int | None,
    replication: Replication,
) -> Open:
    """Return a session's first word."""
    wanted = replication.dr_vmid_map.get(str(vm.vmid)) or "next"
    target = vm.vmid if wanted == "same" else 0 if wanted == "next" else int(wanted)
    return Open(
        mode=mode,
        uuid=uuid,
        vmid=vm.vmid,
        name=vm.name,
        site=site,
        job=job,
        epoch=epoch,
        points=replication.dr_restore_points,
        storage=replication.dr_storage or "",
        bridge_map=str(replication.dr_bridge_map),
        target_vmid=target,
        takeover=replication.dr_takeover,
        version=__version__,
    )
