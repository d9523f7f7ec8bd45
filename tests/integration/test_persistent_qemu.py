# SPDX-License-Identifier: Apache-2.0
"""Persistent segments on a real QEMU: what survives a stop, what isn't believed."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pveplug.cbt import home_id
from pveplug.snapshot import SnapshotDisk
from tests.support.bare_qemu import BareQemu, DiskImage, make_image
from tests.support.points import full_read, point, rebuilt, taken

pytestmark = pytest.mark.integration
MIB = 1 << 20
SIZE = 16 * MIB
LAYOUTS = ("blockdev", "drive")


class Story:
    """A VM that is started and stopped, and its backups, restored in memory."""

    def __init__(self, base: Path) -> None:
        self.base, self.layout = base, "blockdev"
        self.image = base / "a.qcow2"
        self.disks = {"scsi0": make_image(self.image, "qcow2", SIZE)}
        self.mechanism = "auto"
        self.persistent = True
        self.cbt = True
        self.generation = "first"
        self.taken: dict[tuple[str, str], bytes] = {}
        self.notes: list[str] = []
        self.vm: BareQemu | None = None

    def start(self) -> BareQemu:
        self.vm = BareQemu(self.base, self.layout, self.disks).start()
        return self.vm

    def stop(self) -> None:
        assert self.vm is not None
        self.vm.quit()
        self.vm = None

    def kill(self) -> None:
        assert self.vm is not None
        self.vm.stop()
        self.vm = None

    def write(self, pattern: int, at: int, key: str = "scsi0") -> None:
        assert self.vm is not None
        self.vm.io(key, f"write -P {pattern} {at} 64k")

    async def job(
        self, job: str, letter: str = "F", parent: str | None = None
    ) -> dict[str, tuple[SnapshotDisk, int]]:
        """Take a job, restore it and compare; return each disk and its dirty bytes."""
        vm = self.vm
        assert vm is not None
        homes = {key: home_id(100, "u", self.generation, key) for key in self.disks}
        snapshot = point(
            vm,
            self.mechanism,
            cbt=self.cbt,
            homes=homes if self.persistent else {},
        )
        found = {}
        async with taken(
            snapshot, vm, job, letter, parent,
            switched=lambda: self.write(255, 15 * MIB),  # not in this point in time
        ) as disks:  # fmt: skip
            for disk in disks:
                if disk.plan is None:
                    assert not self.cbt
                    continue
                truth = full_read(disk, self.base / "truth")
                old = self.taken.get((parent or "", disk.key))
                image, changed = rebuilt(disk, truth, old)
                assert image == truth, disk.key
                self.taken[job, disk.key] = truth
                found[disk.key] = disk, changed
        self.notes = snapshot.notes
        assert vm.ours() == []
        return found

    async def whole(
        self, job: str, letter: str, parent: str, key: str = "scsi0"
    ) -> str:
        """Take a job that must read the disk whole; return why it says it does."""
        disk, _ = (await self.job(job, letter, parent))[key]
        assert disk.plan is not None
        assert disk.plan.whole, "believed what must not be believed"
        return disk.plan.whole

    async def small(self, job: str, letter: str, parent: str) -> None:
        """Take a job that must be incremental, and small."""
        disk, changed = (await self.job(job, letter, parent))["scsi0"]
        assert disk.plan is not None
        assert disk.plan.whole is None
        assert changed <= 8 * 65536

    def in_image(self, path: Path | None = None) -> list[str]:
        """Return the names of the bitmaps in the image of the stopped VM."""
        argv = ["qemu-img", "info", "-U", "--output=json", str(path or self.image)]
        text = subprocess.run(argv, check=True, capture_output=True).stdout
        details = json.loads(text)["format-specific"]["data"]
        return [row["name"] for row in details.get("bitmaps", [])]


@pytest.fixture
def story(base: Path) -> Iterator[Story]:
    found = Story(base)
    yield found
    if found.vm is not None:
        found.vm.stop()


def qemu_img(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = ["qemu-img", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("layout", "mechanism"),
    [("blockdev", "cbw"), ("drive", "cbw"), ("blockdev", "fleece")],
)
async def test_an_incremental_after_a_clean_stop_is_small_and_right(
    story: Story, layout: str, mechanism: str
) -> None:
    story.layout = layout
    story.mechanism = mechanism
    story.disks["scsi1"] = make_image(story.base / "b.raw", "raw", SIZE)
    story.start()
    story.write(1, 0)
    await story.job("01")
    assert "scsi1: change tracking ends with a stop: a raw image" in story.notes[0]
    assert len(story.notes) == 1
    story.write(2, MIB)
    await story.small("02", "I", "01")
    story.write(3, 2 * MIB)
    story.stop()
    assert len(story.in_image()) == 2
    # What qemu's own programs write meanwhile is recorded, too.
    argv = ["qemu-io", "-c", "write -P 4 3M 64k", str(story.image)]
    subprocess.run(argv, check=True, capture_output=True)
    story.start()
    story.write(5, 4 * MIB)
    found = await story.job("03", "I", "02")
    disk, changed = found["scsi0"]
    assert disk.plan is not None
    assert disk.plan.whole is None
    assert changed <= 5 * 65536
    raw, _ = found["scsi1"]
    assert raw.plan is not None
    assert "no change tracking since job" in str(raw.plan.whole)
    await story.small("04", "D", "01")
    story.stop()
    story.start()
    await story.small("05", "I", "04")
    await story.small("06", "D", "01")
    story.stop()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_after_a_kill_a_disk_is_read_whole_once_and_is_free_again(
    story: Story, layout: str
) -> None:
    story.layout = layout
    story.start()
    await story.job("weekly.2026-11-22_20.42.31_09")
    await story.job("01")
    story.stop()
    vm = story.start()
    await story.small("02", "I", "01")
    story.write(2, MIB)
    story.kill()
    vm = story.start()
    named = {"device": "drive-scsi0"}
    if layout == "blockdev":
        named = {"node-name": "drive-scsi0"}
    with pytest.raises(RuntimeError, match="is inconsistent and cannot be used"):
        vm.command("block_resize", **named, size=SIZE)
    assert "(QEMU was killed)" in await story.whole("03", "I", "02")
    vm.command("block_resize", **named, size=SIZE)
    story.write(3, 2 * MIB)
    await story.small("04", "I", "03")
    story.stop()
    assert [name[-40:] for name in story.in_image() if "weekly" in name] == []
    assert len(story.in_image()) == 2


async def test_qemu_refuses_to_roll_back_until_the_bitmaps_are_dropped(
    story: Story,
) -> None:
    story.start()
    story.write(1, 0)
    await story.job("01")
    story.stop()
    assert qemu_img("snapshot", "-c", "before", story.image).returncode == 0
    story.start()
    story.write(2, 0)
    await story.small("02", "I", "01")
    story.stop()
    refused = qemu_img("snapshot", "-a", "before", story.image)
    assert "Device has active dirty bitmaps" in refused.stderr
    for name in story.in_image():
        removed = qemu_img("bitmap", "--remove", story.image, name)
        assert removed.returncode == 0, removed.stderr
    assert qemu_img("snapshot", "-a", "before", story.image).returncode == 0
    story.start()
    assert "no change tracking since job" in await story.whole("03", "I", "02")
    await story.small("04", "I", "03")
    story.stop()


async def test_an_older_copy_of_the_image_is_not_taken_for_the_newest(
    story: Story,
) -> None:
    story.start()
    await story.job("01")
    story.write(1, 0)
    story.stop()
    shutil.copy(story.image, story.base / "copy.qcow2")
    story.start()
    story.write(2, MIB)
    await story.small("02", "I", "01")
    story.write(3, 2 * MIB)
    story.stop()
    shutil.copy(story.base / "copy.qcow2", story.image)
    story.start()
    assert "is gone" in await story.whole("03", "I", "02")
    # What the copy does know is right: its own way from job 1 to what it holds.
    await story.small("04", "D", "01")
    story.stop()


async def test_images_that_changed_places_are_told_from_each_other(
    story: Story,
) -> None:
    story.disks["scsi1"] = make_image(story.base / "b.qcow2", "qcow2", SIZE)
    story.start()
    story.write(1, 0)
    story.write(2, 0, "scsi1")
    await story.job("01")
    story.stop()
    first, second = story.disks["scsi0"], story.disks["scsi1"]
    story.disks = {"scsi0": second, "scsi1": first}
    story.start()
    assert "is another disk's or VM's" in await story.whole("02", "I", "01")
    await story.small("03", "I", "02")
    story.stop()


async def test_a_new_generation_of_the_vm_believes_nothing_older(story: Story) -> None:
    story.start()
    await story.job("01")
    story.stop()
    story.generation = "after a rollback"
    story.start()
    assert "older than a rollback or restore" in await story.whole("02", "I", "01")
    await story.small("03", "I", "02")
    story.stop()
    assert len(story.in_image()) == 2


def written_by_a_stranger(path: Path) -> None:
    """Do what a program does that knows nothing of bitmaps: clear the autoclear bit."""
    with path.open("r+b") as file:
        file.seek(88)  # autoclear_features; bit 0 is "bitmaps extension"
        assert struct.unpack(">Q", file.read(8))[0] & 1
        file.seek(88)
        file.write(bytes(8))
    argv = ["qemu-io", "-c", "write -P 9 5M 64k", str(path)]
    subprocess.run(argv, check=True, capture_output=True)


async def test_bitmaps_are_gone_when_a_writer_did_not_know_them(story: Story) -> None:
    story.start()
    await story.job("01")
    story.stop()
    written_by_a_stranger(story.image)
    story.start()
    assert "no change tracking since job" in await story.whole("02", "I", "01")
    story.stop()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_switch_of_the_mode_breaks_the_chain_once_and_says_so(
    story: Story, layout: str
) -> None:
    story.layout = layout
    story.persistent = False
    story.start()
    await story.job("01")
    await story.small("02", "I", "01")
    story.persistent = True
    assert "is volatile (cbt was changed since)" in await story.whole("03", "I", "02")
    # The way back to job 1 went with its segment, also where it could still be seen.
    assert "is gone" in await story.whole("04", "D", "01")
    await story.small("05", "I", "04")
    story.stop()
    story.start()
    story.persistent = False
    assert "is persistent (cbt was changed since)" in await story.whole("06", "I", "05")
    await story.small("07", "I", "06")
    story.stop()
    assert story.in_image() == []


async def test_a_disk_without_room_for_bitmaps_is_tracked_while_it_runs(
    story: Story,
) -> None:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10"]
    subprocess.run([*argv, str(story.base / "old.qcow2"), str(SIZE)], check=True)
    story.disks = {"scsi0": DiskImage(story.base / "old.qcow2", "qcow2", SIZE)}
    story.start()
    await story.job("01")
    assert "compat 0.10" in story.notes[0]
    await story.small("02", "I", "01")
    story.stop()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_without_change_tracking_the_images_are_relieved_of_it(
    story: Story, layout: str
) -> None:
    story.layout = layout
    story.start()
    await story.job("01")
    await story.small("02", "I", "01")
    story.cbt = story.persistent = False
    await story.job("03")
    story.stop()
    assert story.in_image() == []
