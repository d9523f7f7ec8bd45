# SPDX-License-Identifier: Apache-2.0
"""The rules of segments against a model of writes, jobs and a Director.

The model keeps what each block of each disk holds, what each bitmap has recorded and
when each block was written. A job does to the bitmaps what ``snapshot.py`` does, in
its order, and may be cut off between any two steps. What is true for every history:

- an image built on its parent's equals the disk at the job's instant;
- the union is *exactly* what was written since the parent, never more;
- a disk is read whole only for a reason that really happened;
- segments stay bounded, and their numbers only grow.

Persistent segments are in the disk's image: they survive a stop, and go with the image
to another key, into a copy and back out of it. The image's content may also be put back
under them, which nothing but the VM's new generation tells.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pveplug import cbt
from pveplug.cbt import Bitmap, Level, Tracked
from pveplug.units import CLUSTER

FOLD_ABOVE, KEEP_AT_MOST = 3, 7
RESOURCES = ("nightly", "weekly")
CUTS = ("", "", "", "", "before", "added", "switched", "disabled", "merged", "folded")
"""Where a job dies; "" is not at all, so most do well."""


@dataclass
class Bits:
    dirty: set[int] = field(default_factory=set)
    recording: bool = True
    busy: bool = False
    inconsistent: bool = False
    persistent: bool = False


@dataclass
class Disk:
    born: int
    slack: int
    blocks: list[int]
    qcow2: bool = True
    bitmaps: dict[str, Bits] = field(default_factory=dict)
    written: list[tuple[int, int]] = field(default_factory=list)
    disturbed: int = -1
    """When something last happened that no bitmap could record."""
    stopped: int = -1
    """When the VM was last stopped."""
    shrunk: set[str] = field(default_factory=set)
    """Chains which haven't seen yet that the disk shrank."""
    crowded_out: set[str] = field(default_factory=set)
    """Jobs whose segment went when there were too many and no Incremental to fold."""
    unaware: set[str] = field(default_factory=set)
    """Resources of which a job proved that a Full is dead, and left this disk out."""

    @property
    def size(self) -> int:
        return len(self.blocks) * CLUSTER - self.slack

    def tracked(self, home: str, *, one_node: bool) -> Tracked:
        here, elsewhere = [], []
        for name, bits in reversed(self.bitmaps.items()):
            bitmap = Bitmap(
                name,
                bits.recording,
                bits.busy,
                bits.inconsistent,
                persistent=bits.persistent,
            )
            mine = one_node or bits.persistent == bool(home)
            (here if mine else elsewhere).append(bitmap)
        return Tracked(self.size, tuple(here), home, tuple(elsewhere))

    def stop(self, now: int) -> None:
        self.stopped = now
        for name in [n for n, bits in self.bitmaps.items() if not bits.persistent]:
            del self.bitmaps[name]
        for bits in self.bitmaps.values():
            bits.busy = False

    def merge(self, target: set[int], names: tuple[str, ...]) -> None:
        assert names, "an empty merge kills QEMU"
        for name in names:
            assert not self.bitmaps[name].busy
            assert not self.bitmaps[name].inconsistent
            target |= self.bitmaps[name].dirty

    def remove(self, names: tuple[str, ...]) -> None:
        for name in names:
            assert not self.bitmaps[name].busy
            del self.bitmaps[name]


def same_series(name: str, new: cbt.Segment) -> bool:
    found = cbt.parse_segment(name)
    return bool(found and (found.chain, found.home) == (new.chain, new.home))


@dataclass
class Job:
    name: str
    level: str
    epoch: int
    """When it started, in seconds: what Bacula gives later jobs as ``since``."""
    zone: int
    """The Director's, in hours, while it ran."""
    began: int
    """The model's time at which its segments were added."""
    images: dict[str, tuple[int, list[int]]]
    """key -> (birth of the disk, blocks)"""
    opened: set[str]
    """Disks that got a segment."""
    persistent: set[str] = field(default_factory=set)
    """Disks whose segment is persistent."""


class History(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.saved = cbt.FOLD_ABOVE, cbt.KEEP_AT_MOST
        cbt.FOLD_ABOVE, cbt.KEEP_AT_MOST = FOLD_ABOVE, KEEP_AT_MOST  # type: ignore[misc]
        self.now = 0
        self.count = 0
        self.epoch = 1_700_000_000
        """When the newest job was named."""
        self.started = 0
        """When the newest job was started."""
        self.zone = 0
        self.disks: dict[str, Disk] = {}
        self.memory: dict[str, Disk] = {}
        """The disks of a snapshot with memory, which has their bitmaps too."""
        self.good: dict[str, list[Job]] = {name: [] for name in RESOURCES}
        self.disowned: dict[str, int] = dict.fromkeys(RESOURCES, -1)
        self.persistent: dict[str, bool] = dict.fromkeys(RESOURCES, False)
        self.switched: dict[str, int] = dict.fromkeys(RESOURCES, -1)
        """When cbt= was changed last."""
        self.generation = 0
        self.one_node = False
        """Whether QEMU is in the -drive layout."""
        self.copies: list[Disk] = []

    def teardown(self) -> None:
        cbt.FOLD_ABOVE, cbt.KEEP_AT_MOST = self.saved  # type: ignore[misc]

    def tick(self) -> int:
        self.now += 1
        return self.now

    @initialize()
    def machine(self) -> None:
        for key in ("scsi0", "scsi1"):
            self.disks[key] = Disk(self.tick(), 0, [0] * 6)

    # -- what a guest and an administrator do

    @rule(key=st.sampled_from(["scsi0", "scsi1", "scsi2"]), block=st.integers(0, 9))
    def write(self, key: str, block: int) -> None:
        disk = self.disks.get(key)
        if disk is None or block >= len(disk.blocks):
            return
        disk.blocks[block] = self.tick()
        disk.written.append((self.now, block))
        for bits in disk.bitmaps.values():
            if bits.recording:
                bits.dirty.add(block)

    def scribble(self, blocks: list[int]) -> None:
        for number, block in enumerate(blocks):
            self.write(f"scsi{number % 3}", block)

    @rule(
        key=st.sampled_from(["scsi1", "scsi2"]),
        blocks=st.integers(0, 8),
        slack=st.sampled_from([0, 512]),
        qcow2=st.booleans(),
    )
    def plug_or_replace(self, key: str, blocks: int, slack: int, qcow2: bool) -> None:
        if blocks:
            self.disks[key] = Disk(self.tick(), slack, [self.now] * blocks, qcow2)
        else:
            self.disks.pop(key, None)

    @rule(key=st.sampled_from(["scsi0", "scsi1"]), by=st.integers(0, 2))
    def grow(self, key: str, by: int) -> None:
        disk = self.disks.get(key)
        if disk and not disk.shrunk and len(disk.blocks) < 12:
            disk.slack = 0
            disk.blocks += [-1] * by

    @rule(key=st.sampled_from(["scsi0", "scsi1"]))
    def shrink(self, key: str) -> None:
        disk = self.disks.get(key)
        if disk is None or len(disk.blocks) < 3:
            return
        disk.slack = 0
        disk.blocks.pop()
        disk.disturbed = self.tick()
        disk.shrunk = {cbt.chain_id(name + ".x") for name in RESOURCES}
        for bits in disk.bitmaps.values():
            bits.dirty.discard(len(disk.blocks))

    @rule()
    def power_cycle(self) -> None:
        for disk in self.disks.values():
            disk.stop(self.tick())

    @rule()
    def snapshot_with_memory(self) -> None:
        self.memory = copy.deepcopy(self.disks)

    @precondition(lambda self: self.memory)
    @rule()
    def rollback_with_memory(self) -> None:
        """Disks and bitmaps jump back together, the jobs stay."""
        self.disks = copy.deepcopy(self.memory)
        for disk in self.disks.values():
            disk.disturbed = self.tick()

    @rule(key=st.sampled_from(["scsi0", "scsi1"]), pick=st.integers(0, 20))
    def another_tool_stops_tracking(self, key: str, pick: int) -> None:
        disk = self.disks.get(key)
        if disk is None or not disk.bitmaps:
            return
        bits = list(disk.bitmaps.values())[pick % len(disk.bitmaps)]
        if bits.recording:
            bits.recording = False
            disk.disturbed = self.tick()

    @rule(
        key=st.sampled_from(["scsi0", "scsi1"]),
        pick=st.integers(0, 20),
        broken=st.booleans(),
    )
    def trouble(self, key: str, pick: int, broken: bool) -> None:
        """A bitmap is in use for a while, or is found inconsistent."""
        disk = self.disks.get(key)
        if disk is None or not disk.bitmaps:
            return
        bits = list(disk.bitmaps.values())[pick % len(disk.bitmaps)]
        disk.disturbed = self.tick()
        if broken:
            bits.inconsistent, bits.recording, bits.dirty = True, False, set()
        else:
            bits.busy = True

    @rule()
    def nothing_is_busy(self) -> None:
        for disk in self.disks.values():
            for bits in disk.bitmaps.values():
                bits.busy = False

    @rule(zone=st.sampled_from([0, 0, 1, -1]))
    def clock_change(self, zone: int) -> None:
        """The Director's local time jumps; ours doesn't."""
        self.zone = zone

    # -- what the Director does

    @rule(resource=st.sampled_from(RESOURCES), count=st.integers(1, 3))
    def disown(self, resource: str, count: int) -> None:
        """Forget the newest jobs: deleted, purged, or found bad later."""
        if self.good[resource]:
            del self.good[resource][-count:]
            self.disowned[resource] = self.tick()

    @rule(resource=st.sampled_from(RESOURCES))
    def virtual_full(self, resource: str) -> None:
        """Consolidate and prune; the newest member lends it its start."""
        if not self.good[resource]:
            return
        newest = self.good[resource][-1]
        name = self.name(resource)
        virtual = dataclasses.replace(newest, name=name, level="F")
        self.good[resource] = [virtual]
        self.disowned[resource] = self.tick()

    def name(self, resource: str) -> str:
        self.epoch += 3600
        self.count += 1
        local = time.gmtime(self.epoch + self.zone * 3600)
        stamp = time.strftime("%Y-%m-%d_%H.%M.%S", local)
        return f"{resource}.{stamp}_{self.count % 60:02d}"

    def parent(self, resource: str, level: str) -> Job | None:
        jobs = self.good[resource]
        if level == "D":
            jobs = [job for job in jobs if job.level == "F"]
        full = any(job.level == "F" for job in self.good[resource])
        return jobs[-1] if level != "F" and full and jobs else None

    @rule(
        resource=st.sampled_from(RESOURCES),
        wanted=st.sampled_from("FIIIID"),
        cut=st.sampled_from(CUTS),
        excluded=st.sampled_from(["", "", "", "scsi1"]),
        blocks=st.lists(st.integers(0, 9), max_size=8),
        waits=st.sampled_from([0, 0, 3600]),
        local=st.booleans(),
    )
    def job(
        self,
        resource: str,
        wanted: str,
        cut: str,
        excluded: str,
        blocks: list[int],
        waits: int = 0,
        local: bool = False,
    ) -> None:
        """Run a job.

        Args:
            resource: its Job resource.
            wanted: the level that is scheduled.
            cut: where it dies, see CUTS.
            excluded: a disk that isn't backed up.
            blocks: written while it runs.
            waits: seconds between its name and its start.
            local: the catalogue holds local times, read in the zone of today.
        """
        parent = self.parent(resource, wanted)
        name = self.name(resource)
        level = Level("F", None, None)
        if parent:
            shift = (parent.zone - self.zone) * 3600 if local else 0
            level = Level(wanted, parent.name, parent.epoch + shift)
        self.started = max(self.epoch + waits, self.started + 60)
        disks = {k: d for k, d in self.disks.items() if k != excluded}
        if parent and excluded in self.disks:
            self.prove_dead_fulls_without(resource, self.disks[excluded])
        homes = {
            key: cbt.home_id(100, "uuid", str(self.generation), key)
            if self.persistent[resource] and disk.qcow2
            else ""
            for key, disk in disks.items()
        }
        plans = cbt.plan(
            name,
            level,
            {
                key: disk.tracked(homes[key], one_node=self.one_node)
                for key, disk in disks.items()
            },
            now=self.started + 5.0,
        )
        assert len({plan.new.seq for plan in plans.values()}) <= 1
        for key, plan in plans.items():
            changed = parent is not None and bool(homes[key]) != (
                key in parent.persistent
            )
            if changed:
                assert plan.whole
            else:
                self.check_plan(resource, level, parent, key, disks[key], plan)
        self.scribble(blocks[:2])
        if cut == "before":
            return
        began = self.tick()
        for key, plan in plans.items():
            disks[key].remove(plan.drop)
            disks[key].remove(plan.drop_elsewhere)
            if plan.opens:
                assert plan.new.name not in disks[key].bitmaps
                bits = Bits(persistent=bool(homes[key]))
                disks[key].bitmaps[plan.new.name] = bits
                disks[key].shrunk.discard(plan.new.chain)
        if cut == "added":
            return
        self.scribble(blocks[2:4])
        images = {key: (d.born, list(d.blocks)) for key, d in disks.items()}
        if cut == "switched":
            return
        self.scribble(blocks[4:6])
        for key, plan in plans.items():
            for old in plan.disable:
                disks[key].bitmaps[old].recording = False
        if cut == "disabled":
            return
        unions: dict[str, set[int]] = {}
        for key, plan in plans.items():
            if plan.union:
                unions[key] = set()
                disks[key].merge(unions[key], plan.union)
        if cut == "merged":
            return
        self.scribble(blocks[6:])
        for key, plan in plans.items():
            ours = [n for n in disks[key].bitmaps if same_series(n, plan.new)]
            crowded = len(ours) > KEEP_AT_MOST
            for fold in plan.folds:
                if fold.target:
                    disks[key].merge(
                        disks[key].bitmaps[fold.target].dirty, fold.sources
                    )
                disks[key].remove(fold.remove)
                if crowded and (plan.whole is not None or level.letter != "I"):
                    gone = map(cbt.parse_segment, fold.remove)
                    disks[key].crowded_out |= {s.job for s in gone if s}
            ours = [n for n in disks[key].bitmaps if same_series(n, plan.new)]
            busy = any(disks[key].bitmaps[n].busy for n in ours)
            assert busy or len(ours) <= KEEP_AT_MOST
        for key, plan in plans.items():
            if plan.whole is None:
                assert parent is not None
                self.check_union(parent, key, plan, images, unions[key], disks[key])
        if cut == "folded":
            return
        opened = {key for key, plan in plans.items() if plan.opens}
        persistent = {key for key, home in homes.items() if home}
        job = Job(
            name,
            level.letter,
            self.started,
            self.zone,
            began,
            images,
            opened,
            persistent,
        )
        self.good[resource].append(job)

    def prove_dead_fulls_without(self, resource: str, disk: Disk) -> None:
        """A job names its parent and isn't told of a disk with a dead Full."""
        found = map(cbt.parse_segment, disk.bitmaps)
        fulls = {s.job for s in found if s and s.level == "F"}
        fulls = {job for job in fulls if cbt.job_resource(job) == resource}
        if fulls - {job.name for job in self.good[resource]}:
            disk.unaware.add(resource)

    def check_plan(
        self,
        resource: str,
        level: Level,
        parent: Job | None,
        key: str,
        disk: Disk,
        plan: cbt.DiskPlan,
    ) -> None:
        assert (plan.whole is None) == bool(plan.union) == (plan.parent_job is not None)
        if plan.whole is None or parent is None:
            return
        assert plan.whole
        assert (
            key not in parent.images
            or parent.images[key][0] != disk.born
            or disk.disturbed >= parent.began
            or (key not in parent.persistent and disk.stopped >= parent.began)
            or self.switched[resource] >= parent.began
            or self.disowned[resource] >= parent.began
            or key not in parent.opened
            or parent.name in disk.crowded_out
            or (parent.level == "F" and resource in disk.unaware)
            or any(bits.busy for bits in disk.bitmaps.values())
        ), plan.whole

    def check_union(
        self,
        parent: Job,
        key: str,
        plan: cbt.DiskPlan,
        images: dict[str, tuple[int, list[int]]],
        union: set[int],
        disk: Disk,
    ) -> None:
        born, old = parent.images[key]
        assert born == disk.born, "an incremental on another disk's image"
        truth = images[key][1]
        image = (old + [0] * len(truth))[: len(truth)]
        for block in range(len(truth)):
            if block in union or block >= plan.parent_size // CLUSTER:
                image[block] = truth[block]
        assert image == truth, "a wrong incremental"
        if disk.disturbed < parent.began:
            since = {block for at, block in disk.written if at >= parent.began}
            # What was written after the switch is in it or not; it is no error.
            assert union <= since

    @invariant()
    def names_are_parsed_back(self) -> None:
        for disk in self.disks.values():
            for name in disk.bitmaps:
                segment = cbt.parse_segment(name)
                assert segment is not None
                assert segment.name == name

    @precondition(lambda self: self.disks)
    @invariant()
    def a_new_segment_is_always_the_newest(self) -> None:
        for disk in self.disks.values():
            for resource in RESOURCES:
                chain = cbt.chain_id(resource + ".x")
                found = [s for n in disk.bitmaps if (s := cbt.parse_segment(n))]
                for home in {s.home for s in found}:
                    seqs = [s.seq for s in found if (s.chain, s.home) == (chain, home)]
                    assert seqs == sorted(set(seqs))


class PersistentHistory(History):
    """The same with segments in images, and what happens to images."""

    @initialize(
        one_node=st.booleans(), persistent=st.sampled_from([(1, 1), (1, 0), (0, 1)])
    )
    def persistence(self, one_node: bool, persistent: tuple[int, int]) -> None:
        self.one_node = one_node
        self.persistent = dict(zip(RESOURCES, map(bool, persistent), strict=True))

    # Jobs that do well, or nothing would be at stake when something happens.
    @rule(wanted=st.sampled_from("FIIID"), block=st.integers(0, 5))
    def nightly(self, wanted: str, block: int) -> None:
        self.scribble([block] * 2)
        self.job("nightly", wanted, "", "", [block])

    @rule(block=st.integers(0, 5))
    def two_nights(self, block: int) -> None:
        self.nightly("I", block)
        self.nightly("I", 0)

    @rule(wanted=st.sampled_from("ID"))
    def weekly(self, wanted: str) -> None:
        self.job("weekly", wanted, "", "", [])

    @rule()
    def bitmaps_are_dropped(self) -> None:
        for disk in self.disks.values():
            disk.bitmaps.clear()
            disk.disturbed = self.tick()

    @rule(again=st.booleans())
    def stop_and_start(self, again: bool) -> None:
        """What writes to a qcow2 image meanwhile is seen by its bitmaps: write()."""
        for disk in self.disks.values():
            disk.stop(self.tick())
        if again:
            self.one_node = not self.one_node  # another machine version

    @rule()
    def kill(self) -> None:
        for disk in self.disks.values():
            disk.stop(self.tick())
            disk.disturbed = self.now
            for bits in disk.bitmaps.values():
                bits.inconsistent, bits.recording, bits.dirty = True, False, set()

    @rule()
    def swap(self) -> None:
        """Two images change places while the VM is stopped."""
        if "scsi1" not in self.disks:
            return
        self.stop_and_start(again=False)
        disks = self.disks
        disks["scsi0"], disks["scsi1"] = disks["scsi1"], disks["scsi0"]
        for disk in disks.values():
            disk.disturbed = self.now

    @rule(key=st.sampled_from(["scsi0", "scsi1"]))
    def copy_an_image(self, key: str) -> None:
        if key in self.disks:
            self.stop_and_start(again=False)
            self.copies.append(copy.deepcopy(self.disks[key]))

    @rule(key=st.sampled_from(["scsi0", "scsi1"]), pick=st.integers(0, 20))
    def put_a_copy_there(self, key: str, pick: int) -> None:
        if not self.copies:
            return
        self.stop_and_start(again=False)
        disk = copy.deepcopy(self.copies[pick % len(self.copies)])
        disk.disturbed = self.now
        self.disks[key] = disk

    @rule()
    def roll_back_under_the_bitmaps(self) -> None:
        """QEMU refuses that; the VM's new generation would tell all the same."""
        self.stop_and_start(again=False)
        self.generation += 1
        for disk in self.disks.values():
            disk.disturbed = self.now
            disk.blocks = [-self.now] * len(disk.blocks)

    @rule(resource=st.sampled_from(RESOURCES))
    def cbt_is_changed(self, resource: str) -> None:
        self.persistent[resource] = not self.persistent[resource]
        self.switched[resource] = self.tick()


History.TestCase.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None
)
PersistentHistory.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
test_no_history_makes_a_wrong_or_a_needlessly_large_incremental = pytest.mark.timeout(
    300
)(History.TestCase)
test_no_history_of_images_makes_a_wrong_incremental = pytest.mark.timeout(300)(
    PersistentHistory.TestCase
)
