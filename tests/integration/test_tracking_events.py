# SPDX-License-Identifier: Apache-2.0
"""What Proxmox VE does to a VM between two jobs, and what the next one then reads.

The rows of docs/cbt.md's table, on both block layouts: where the chain lives on, the
Incremental is small; where it doesn't, the log says why; the images are right in either
case.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.course import MIB, Course
from tests.support.requires import requires
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

LAYOUTS = {"blockdev": "pc", "drive": "pc-i440fx-9.2+pve1"}
NO_TRACKING = "no change tracking since job"
BOTH = {"scsi0": NO_TRACKING, "virtio1": NO_TRACKING}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    site = {"nodes": ("pve1", "pve2"), "shared": ("nas",)}
    async with World(site=site) as found:
        yield found


async def course(
    world: World, vmid: int, layout: str, storage: str, *, bacula: int = 1
) -> Course:
    """Begin with a VM of two disks, on node pve1."""
    world.daemon_on("pve1")
    await world.site.create_vm(
        vmid,
        {"agent": "0", "machine": LAYOUTS[layout]},
        disks={
            "scsi0": f"{storage}:{24 / 1024},format=qcow2,iothread=1",
            "virtio1": f"{storage}:{12 / 1024},format=qcow2",
        },
    )
    found = Course(world, vmid, storage=bacula)
    await found.begin()
    assert found.vm.modern == (layout == "blockdev")
    return found


async def both_layouts(world: World, vmid: int, storage: str) -> list[Course]:
    """Begin with a VM in each layout; most of a job's time is Bacula's."""
    return await asyncio.gather(
        course(world, vmid, "blockdev", storage, bacula=1),
        course(world, vmid + 1, "drive", storage, bacula=2),
    )


async def test_what_leaves_qemus_nodes_in_place_leaves_the_next_job_small(
    world: World,
) -> None:
    courses = await both_layouts(world, 100, "nas")
    await asyncio.gather(*map(much_happens, courses))
    # One node's File Daemon after the other's.
    await asyncio.gather(*map(migrates, courses))
    world.daemon_on("pve2")
    await asyncio.gather(*map(goes_on_there, courses))


async def much_happens(run: Course) -> None:
    await run.vm.qmp("system_reset")
    await run.write("scsi0", 5 * MIB)
    await run.api("POST", "status/suspend")
    await run.api("POST", "status/resume")
    await run.write("virtio1", 5 * MIB)
    await run.api("PUT", "resize", disk="scsi0", size="+8M")
    await run.write("scsi0", 31 * MIB)
    await run.api("POST", "snapshot", snapname="before")
    await run.write("scsi0", 6 * MIB)
    await run.api("DELETE", "snapshot/before")
    await run.write("scsi0", 7 * MIB)
    await run.reads_only_what_was_written("reset, pause, growth and a snapshot")


async def migrates(run: Course) -> None:
    before = run.vm
    await run.write("scsi0", 8 * MIB)
    await run.api("POST", "migrate", target="pve2", online=1)
    assert run.vm.node.name == "pve2"
    assert run.vm.running
    assert not before.running
    await run.write("virtio1", 8 * MIB)


async def goes_on_there(run: Course) -> None:
    await run.reads_only_what_was_written("a live migration")
    await run.every_image_is_exact()
    await run.vm.stop()


async def test_a_moved_disk_is_read_in_part_on_blockdev_and_whole_on_drive(
    world: World,
) -> None:
    await asyncio.gather(*map(a_disk_moves, await both_layouts(world, 120, "local")))


async def a_disk_moves(run: Course) -> None:
    await run.write("scsi0", 5 * MIB)
    await run.api("POST", "move_disk", disk="scsi0", storage="local2", format="raw",
                  delete=1)  # fmt: skip
    await run.write("scsi0", 6 * MIB)
    await run.write("virtio1", 5 * MIB)
    if run.vm.modern:
        await run.reads_only_what_was_written("a move")
    else:
        await run.reads_whole("a move", scsi0=NO_TRACKING)
    await run.every_image_is_exact()
    await run.vm.stop()


async def test_a_new_disk_or_a_new_qemu_is_read_whole_and_the_reason_said(
    world: World,
) -> None:
    first, second = await asyncio.gather(
        course(world, 140, "blockdev", "local", bacula=1),
        course(world, 150, "blockdev", "local", bacula=2),
    )
    await asyncio.gather(disks_are_new(first), contents_are_new(second))


async def disks_are_new(run: Course) -> None:
    await run.api("PUT", "config", scsi2="local:0.0078125,format=raw")
    await run.write("scsi2", 0, MIB)
    await run.reads_whole("a disk was plugged in", scsi2=NO_TRACKING)
    await run.api("PUT", "config", delete="scsi2", force=1)
    await run.api("PUT", "config", scsi2="local:0.0078125,format=raw")
    await run.write("scsi2", 0, MIB)
    await run.reads_whole("another disk came under the same key", scsi2=NO_TRACKING)
    await run.api("PUT", "config", delete="scsi2", force=1)

    await run.vm.kill()
    run.vm.set(machine=LAYOUTS["drive"])
    await run.vm.start()
    assert not run.vm.modern
    await run.write("scsi0", 5 * MIB)
    await run.reads_whole("kill -9, and another machine type", **BOTH)
    await run.every_image_is_exact()
    await run.vm.stop()


async def contents_are_new(run: Course) -> None:
    await run.api("POST", "snapshot", snapname="before")
    await run.write("scsi0", 6 * MIB)
    await run.api("POST", "snapshot/before/rollback", start=1)
    await run.vm.wait_started()  # by a task of its own
    await run.write("virtio1", 6 * MIB)
    await run.reads_whole("a rollback", **BOTH)

    await run.api("DELETE", "snapshot/before")
    await run.vm.stop()
    where = f"/@pve/restore_vmid={run.vmid},overwrite=yes"
    newest = await run.world.restore(where=where, job=f"job{run.vmid}")
    assert newest.termination == "Restore OK", newest.text
    await run.vm.start()
    await run.reads_whole("a restore over it", **BOTH)

    await run.vm.stop()
    await run.api("DELETE", "")
    await run.world.site.create_vm(
        run.vmid, {"agent": "0"}, disks={"scsi0": "24M", "virtio1": "12M"}
    )
    await run.vm.start()
    await run.write("scsi0", 5 * MIB)
    await run.reads_whole("another VM got the id", **BOTH)
    await run.every_image_is_exact()
    await run.vm.stop()
