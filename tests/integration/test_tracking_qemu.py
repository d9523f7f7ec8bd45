# SPDX-License-Identifier: Apache-2.0
"""Segments through what a QEMU can go through, without Bacula: quick, one disk.

The rows of docs/cbt.md's table that need another QEMU, or what PVE's own build does.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pveplug import cbt
from pveplug.blockgraph import MARKER
from pveplug.cbt import Level
from pveplug.cleanup import clean_up
from pveplug.qmp import Qmp
from pveplug.snapshot import SnapshotDisk
from tests.support.bare_qemu import BareQemu, DiskImage, make_image
from tests.support.fatal_commands import Watch, roots
from tests.support.points import dirty, full_read, point, rebuilt, taken, unique
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "nbdcopy", "nbdinfo"),
]
SIZE = 24 << 20
NO_TRACKING = "no change tracking since job"
both_layouts = pytest.mark.parametrize("layout", ["blockdev", "drive"])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Record all that the product sends."""
    found = Watch()
    execute = Qmp.execute

    async def recorded(
        self: Qmp, command: str, arguments: dict[str, Any] | None = None
    ) -> Any:
        found.commands.append({"execute": command, "arguments": arguments or {}})
        return await execute(self, command, arguments)

    monkeypatch.setattr(Qmp, "execute", recorded)
    return found


class Chain:
    """One disk's backups as an archive would keep them."""

    def __init__(self, vm: BareQemu) -> None:
        self.vm = vm
        self.images: dict[str, bytes] = {}

    @contextlib.asynccontextmanager
    async def opened(
        self, job: str, letter: str, parent: str | None = None
    ) -> AsyncIterator[SnapshotDisk]:
        """Take a point in time; let it go at the block's end."""
        async with taken(point(self.vm), self.vm, job, letter, parent) as (disk,):
            yield disk

    async def take(self, job: str, letter: str, parent: str | None = None) -> str:
        """Back up, check the image, return why it was read whole ("" if it wasn't)."""
        async with self.opened(job, letter, parent) as disk:
            return self.read(disk, job)

    def read(self, disk: SnapshotDisk, job: str) -> str:
        """Build the job's image from its parent's and what the union says."""
        assert disk.plan is not None
        now = full_read(disk, self.vm.base / "truth")
        image, _ = rebuilt(
            disk, now, self.images.get((disk.plan.parent_job or "")[-2:])
        )
        assert image == now, f"job {job} is wrong"
        self.images[job] = now
        return disk.plan.whole or ""


def first_node(vm: BareQemu) -> Mapping[str, Any]:
    """What QEMU says of the only disk's top node."""
    (block,) = vm.command("query-block")  # type: ignore[misc]
    inserted: Mapping[str, Any] = block["inserted"]
    return inserted


def format_node(vm: BareQemu) -> str:
    nodes = vm.command("query-named-block-nodes", flat=True)
    (found,) = (
        n["node-name"]
        for n in nodes  # type: ignore[attr-defined]
        if n["drv"] in ("raw", "qcow2")
    )
    return str(found)


def disk(base: Path, name: str = "a.qcow2") -> dict[str, DiskImage]:
    return {"scsi0": make_image(base / name, "qcow2", SIZE)}


# -- snapshots


@both_layouts
async def test_an_external_snapshot_keeps_the_chain_on_blockdev_and_ends_it_on_drive(
    base: Path, layout: str
) -> None:
    with BareQemu(base, layout, disk(base)) as vm:
        chain = Chain(vm)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        vm.io("scsi0", "write -P 2 2M 64k")
        vm.command(
            "blockdev-snapshot-sync",
            **{
                "node-name": format_node(vm),
                "snapshot-file": str(base / "over.qcow2"),
                "snapshot-node-name": "over",
                "format": "qcow2",
            },
        )
        vm.io("scsi0", "write -P 3 3M 64k")
        said = await chain.take("02", "I", "01")
        assert (NO_TRACKING in said) == (layout == "drive"), said
        vm.io("scsi0", "write -P 4 4M 64k")
        assert await chain.take("03", "I", "02") == ""
        # The snapshot goes: what was written above it is written below it.
        vm.command(
            "block-commit",
            **{"job-id": "commit", "device": "drive-scsi0", "top-node": "over"},
        )
        ended(vm, "commit")
        vm.io("scsi0", "write -P 5 5M 64k")
        said = await chain.take("04", "I", "03")
        assert ("is gone" in said) == (layout == "drive"), said
        await chain.take("05", "D", "01")


def ended(vm: BareQemu, job: str, *, complete: bool = True) -> None:
    """Complete a block job once it is ready, or cancel it, and wait for its end."""
    asked = False
    while jobs := vm.command("query-block-jobs"):
        if jobs[0]["ready"] and not asked:  # type: ignore[index]
            vm.command("job-complete" if complete else "job-cancel", id=job)
            asked = True
        time.sleep(0.02)


# -- migration


async def migrated(source: BareQemu, target: BareQemu, *, bitmaps: bool = True) -> str:
    """Migrate; return QEMU's word for how it ended."""
    capability = [{"capability": "dirty-bitmaps", "state": bitmaps}]
    for vm in (source, target):
        vm.command("migrate-set-capabilities", capabilities=capability)
    try:
        source.command("migrate", uri=f"unix:{target.base / 'in'}")
    except RuntimeError as refused:
        return str(refused)
    while True:
        status: Any = source.command("query-migrate")
        if status.get("status") in ("completed", "failed"):
            break
        await asyncio.sleep(0.02)
    if status["status"] == "completed":
        target.command("cont")
    return str(status["status"])


@contextlib.contextmanager
def other_node(source: BareQemu, layout: str) -> Iterator[BareQemu]:
    """A QEMU that waits for the state, its volume a copy under another name."""
    base = source.base / "b"
    base.mkdir()
    path = base / "b.qcow2"
    source.io("scsi0", "flush")
    shutil.copy(source.disks["scsi0"].path, path)
    target = BareQemu(base, layout, {"scsi0": DiskImage(path, "qcow2", SIZE)})
    target.more = ["-S", "-incoming", f"unix:{base / 'in'}"]
    with target:
        yield target


@both_layouts
async def test_a_migration_to_another_volume_keeps_the_chain(
    base: Path, layout: str
) -> None:
    with BareQemu(base, layout, disk(base)) as source:
        chain = Chain(source)
        source.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        await chain.take("02", "I", "01")
        source.io("scsi0", "write -P 2 2M 64k")
        with other_node(source, layout) as target:
            assert await migrated(source, target) == "completed"
            chain.vm = target
            target.io("scsi0", "write -P 3 3M 64k")
            assert await chain.take("03", "I", "02") == ""
            assert await chain.take("04", "D", "01") == ""


async def test_bitmaps_that_a_migration_dropped_are_missed_and_not_taken_for_clean(
    base: Path,
) -> None:
    """Somebody's bitmap on the format node makes QEMU drop all, without a word."""
    with BareQemu(base, "blockdev", disk(base)) as source:
        chain = Chain(source)
        source.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        source.io("scsi0", "write -P 2 2M 64k")
        node = format_node(source)
        source.command("block-dirty-bitmap-add", node=node, name="somebodys")
        with other_node(source, "blockdev") as target:
            assert await migrated(source, target) == "completed"
            chain.vm = target
            assert NO_TRACKING in await chain.take("02", "I", "01")
            target.io("scsi0", "write -P 3 3M 64k")
            assert await chain.take("03", "I", "02") == ""


@both_layouts
async def test_a_migration_without_bitmaps_ends_the_chain(
    base: Path, layout: str
) -> None:
    with BareQemu(base, layout, disk(base)) as source:
        chain = Chain(source)
        await chain.take("01", "F")
        with other_node(source, layout) as target:
            assert await migrated(source, target, bitmaps=False) == "completed"
            chain.vm = target
            assert NO_TRACKING in await chain.take("02", "I", "01")


@both_layouts
async def test_a_migration_in_the_middle_of_a_backup_fails_and_harms_neither(
    base: Path, layout: str
) -> None:
    with BareQemu(base, layout, disk(base)) as source:
        chain = Chain(source)
        source.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        source.io("scsi0", "write -P 2 2M 64k")
        async with chain.opened("02", "I", "01") as opened:
            with other_node(source, layout) as target:
                assert await migrated(source, target) != "completed"
            status: Any = source.command("query-status")
            assert status["status"] == "running"
            source.io("scsi0", "write -P 3 3M 64k")
            assert chain.read(opened, "02") == ""
        assert await chain.take("03", "I", "02") == ""


# -- memory saved to a file: PVE's suspend to disk, and snapshots with memory


async def saved(vm: BareQemu, path: Path, *, bitmaps: bool = True) -> None:
    """Save the state as PVE's savevm does, bitmaps included; the guest is paused."""
    capability = [{"capability": "dirty-bitmaps", "state": bitmaps}]
    vm.command("migrate-set-capabilities", capabilities=capability)
    vm.io("scsi0", "flush")
    vm.command("migrate", uri=f"file:{path}")
    while True:
        status: Any = vm.command("query-migrate")
        assert status.get("status") != "failed", status
        if status.get("status") == "completed":
            return
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def resumed(
    vm: BareQemu, path: Path, *, bitmaps: bool = True
) -> AsyncIterator[BareQemu]:
    """Start the VM again from a saved state."""
    again = BareQemu(vm.base, vm.layout, vm.disks)
    again.more = ["-S", "-incoming", "defer"]
    with again:
        capability = [{"capability": "dirty-bitmaps", "state": bitmaps}]
        again.command("migrate-set-capabilities", capabilities=capability)
        again.command("migrate-incoming", uri=f"file:{path}")
        while True:
            status: Any = again.command("query-migrate")
            if status.get("status") == "completed":
                break
            await asyncio.sleep(0.02)
        again.command("cont")
        yield again


@pytest.mark.parametrize("bitmaps", [True, False])
async def test_after_a_suspend_to_disk_what_was_saved_counts_and_nothing_else(
    base: Path, bitmaps: bool
) -> None:
    with BareQemu(base, "blockdev", disk(base)) as vm:
        chain = Chain(vm)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        vm.io("scsi0", "write -P 2 2M 64k")
        await saved(vm, base / "state", bitmaps=bitmaps)
    async with resumed(vm, base / "state", bitmaps=bitmaps) as again:
        chain.vm = again
        again.io("scsi0", "write -P 3 3M 64k")
        said = await chain.take("02", "I", "01")
        assert (said == "") == bitmaps, said


async def test_a_rollback_with_memory_brings_back_the_bitmaps_of_that_time(
    base: Path,
) -> None:
    """Disk and bitmaps jump back together: jobs of before count, later ones don't."""
    with BareQemu(base, "blockdev", disk(base)) as vm:
        chain = Chain(vm)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        await chain.take("02", "I", "01")
        vm.io("scsi0", "write -P 2 2M 64k")
        await saved(vm, base / "state")
        path = vm.disks["scsi0"].path
        shutil.copy(path, base / "snapshot")
        vm.command("cont")
        vm.io("scsi0", "write -P 3 3M 64k")
        assert await chain.take("03", "I", "02") == ""
    shutil.copy(base / "snapshot", path)
    async with resumed(vm, base / "state") as again:
        chain.vm = again
        again.io("scsi0", "write -P 4 4M 64k")
        assert "is gone" in await chain.take("04", "I", "03")
        assert await chain.take("05", "I", "04") == ""
        # Had 3, 4 and 5 been disowned: from 2 on all is known.
        assert await chain.take("06", "I", "02") == ""


# -- others at work on the same disk


@both_layouts
async def test_others_bitmaps_backups_and_clones_change_nothing(
    base: Path, layout: str
) -> None:
    """vzdump with its bitmap, a replication's bitmap, a clone of the running VM."""
    with BareQemu(base, layout, disk(base)) as vm:
        chain = Chain(vm)
        others = ("pbs-incremental-dirty-bitmap", "repl_scsi0")
        for name in others:
            vm.command("block-dirty-bitmap-add", node="drive-scsi0", name=name)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        vm.io("scsi0", "write -P 2 2M 64k")
        source = format_node(vm) if layout == "blockdev" else "drive-scsi0"
        for job, device in (("blockdev-backup", source), ("blockdev-mirror", "")):
            vm.command(
                "blockdev-add",
                **{"driver": "null-co", "node-name": "copy", "size": SIZE},
            )
            vm.command(
                job,
                **{
                    "job-id": "copy",
                    "device": device or "drive-scsi0",
                    "target": "copy",
                    "sync": "full",
                },
            )
            ended(vm, "copy", complete=False)
            vm.command("blockdev-del", **{"node-name": "copy"})
        vm.io("scsi0", "write -P 3 3M 64k")
        assert await chain.take("02", "I", "01") == ""
        assert await chain.take("03", "I", "02") == ""
        left = {b.get("name"): b for b in first_node(vm)["dirty-bitmaps"]}
        for name in others:
            assert left[name]["recording"]
            assert left[name]["count"] == (1 << 20) + 2 * 65536


# -- what must not be sent, and in which order the rest


@both_layouts
@pytest.mark.parametrize("mechanism", ["cbw", "fleece"])
async def test_segments_are_added_before_the_instant_and_the_old_stopped_after_it(
    base: Path, watch: Watch, layout: str, mechanism: str
) -> None:
    with BareQemu(base, layout, disk(base)) as vm:
        for job, level in (("01", Level("F")), ("02", Level("I", unique("01")))):
            watch.commands.clear()
            snapshot = point(vm, mechanism)
            await snapshot.prepare(unique(job), level, vm.volids)
            await snapshot.switch()
            await snapshot.close()
    switch = [step for command in watch.commands for step in steps(command)]
    instant = {"cbw": "filter in", "fleece": "backup"}[mechanism]
    assert switch[:3] == ["add", instant, "disable"]
    # A fleecing switch is one transaction; else a block would be missed now and then.
    together = watch.sent("transaction")
    assert len(together) == {"cbw": 2, "fleece": 1}[mechanism]


def steps(command: Mapping[str, Any]) -> Iterator[str]:
    """Yield the steps of a switch that a command stands for."""
    arguments = command["arguments"]
    if command["execute"] == "transaction":
        for action in arguments["actions"]:
            yield (
                action["type"]
                .removeprefix("block-dirty-bitmap-")
                .removeprefix("blockdev-")
            )
    elif command["execute"] == "blockdev-reopen":
        filters = [n["file"] for n in arguments["options"]]
        yield "filter in" if filters == ["ph-cbw-scsi0"] else "filter out"
    elif command["execute"] == "qom-set":
        inserted = arguments["value"] == "ph-cbw-scsi0"
        yield "filter in" if inserted else "filter out"


@both_layouts
async def test_no_merge_of_nothing_is_sent_whatever_is_folded(
    base: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(cbt, "FOLD_ABOVE", 3)
    monkeypatch.setattr(cbt, "KEEP_AT_MOST", 5)
    with BareQemu(base, layout, disk(base)) as vm:
        watch.drives.update(roots([{**b} for b in vm.command("query-block")]))  # type: ignore[attr-defined]
        chain = Chain(vm)
        levels = "FFFFFFF" + "IIIII" + "FDDDDDD" + "I"
        newest = full = ""
        for number, letter in enumerate(levels, 1):
            vm.io("scsi0", f"write -P {number} {number * 64}k 64k")
            job = f"{number:02d}"
            parent = {"F": None, "I": newest, "D": full}[letter]
            assert (await chain.take(job, letter, parent) == "") == (letter != "F")
            newest, full = job, job if letter == "F" else full
        # A job that names an older P: the Full since then was disowned.
        assert await chain.take("40", "F") == "level Full"
        assert await chain.take("41", "I", newest) == ""
    assert watch.fatal() == []
    kinds = {step for command in watch.commands for step in steps(command)}
    assert {"merge", "remove", "add", "disable"} <= kinds


async def test_a_filter_that_was_never_put_in_is_not_taken_out(
    base: Path, watch: Watch
) -> None:
    """qom-set to the node that is there would abort QEMU."""
    with BareQemu(base, "drive", disk(base)) as vm:
        snapshot = point(vm, "cbw")
        await snapshot.prepare(unique("01"), Level("F"), vm.volids)
        for _ in range(2):
            await clean_up(vm.qmp_path, "")
        assert watch.sent("qom-set") == []
        assert vm.ours() == []
        status: Any = vm.command("query-status")
        assert status["status"] == "running"


@pytest.mark.parametrize("ours", [True, False])
async def test_a_guest_left_paused_goes_on_only_where_the_marker_says_it_was_us(
    base: Path, ours: bool
) -> None:
    with BareQemu(base, "drive", disk(base)) as vm:
        if ours:
            vm.command(
                "blockdev-add",
                **{"driver": "null-co", "node-name": MARKER, "size": 512},
            )
        vm.command("stop")
        await clean_up(vm.qmp_path, "")
        status: Any = vm.command("query-status")
        assert status["status"] == ("running" if ours else "paused")
        assert vm.ours() == []


async def test_a_throttle_node_has_after_a_backup_what_it_had_before(
    base: Path,
) -> None:
    with BareQemu(base, "blockdev", disk(base)) as vm:
        before = first_node(vm)
        await Chain(vm).take("01", "F")
        after = first_node(vm)
    for option in ("detect_zeroes", "cache", "ro", "drv", "node-name", "file"):
        assert after[option] == before[option], option
    assert after["detect_zeroes"] == "unmap"
    assert after["cache"]["direct"]


async def test_a_disk_moved_with_the_filter_in_place_stays_where_it_was_moved_to(
    base: Path, watch: Watch
) -> None:
    with BareQemu(base, "blockdev", disk(base)) as vm:
        chain = Chain(vm)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        moved = make_image(base / "moved.qcow2", "qcow2", SIZE)
        async with chain.opened("02", "I", "01"):
            mirrored(vm, moved)
            vm.io("scsi0", "write -P 2 2M 64k")
        assert str(moved.path) in first_node(vm)["file"]
        assert watch.fatal() == []
        reopened = [
            n["file"] for o in watch.sent("blockdev-reopen") for n in o["options"]
        ]
        assert reopened[-1] == "ph-cbw-scsi0", "the old volume was put back"
        assert vm.ours() == []
        # Job 2 failed; all since job 1 is still known.
        assert await chain.take("03", "I", "01") == ""


def mirrored(vm: BareQemu, image: DiskImage) -> None:
    """Move the disk to another volume as PVE does, the filter in place."""
    vm.command(
        "blockdev-add",
        **{
            "driver": "qcow2",
            "node-name": "moved",
            "file": {"driver": "file", "filename": str(image.path)},
        },
    )
    vm.command(
        "blockdev-mirror",
        **{
            "job-id": "mirror",
            "device": "drive-scsi0",
            "replaces": "ph-cbw-scsi0",
            "target": "moved",
            "sync": "full",
        },
    )
    ended(vm, "mirror")


@both_layouts
async def test_a_disk_that_grows_in_the_middle_of_a_backup_ends_no_qemu(
    base: Path, watch: Watch, layout: str
) -> None:
    with BareQemu(base, layout, disk(base)) as vm:
        chain = Chain(vm)
        vm.io("scsi0", "write -P 1 0 1M")
        await chain.take("01", "F")
        vm.io("scsi0", "write -P 2 2M 64k")
        async with chain.opened("02", "I", "01") as opened:
            assert opened.context
            name = {"node-name" if layout == "blockdev" else "device": "drive-scsi0"}
            vm.command("block_resize", **name, size=SIZE + (4 << 20))
            assert chain.read(opened, "02") == ""
        vm.io("scsi0", f"write -P 3 {SIZE} 64k")
        async with chain.opened("03", "I", "02") as opened:
            assert opened.plan is not None
            assert opened.plan.whole is None
            assert opened.plan.parent_size == SIZE
            assert dirty(opened) == [(SIZE, 65536)]
        assert watch.fatal() == []
