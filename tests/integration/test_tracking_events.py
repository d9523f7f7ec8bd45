# SPDX-License-Identifier: Apache-2.0
"""What Proxmox VE does to a VM between two jobs, and what the next one then reads.

The rows of docs/cbt.md's table, on both block layouts: where the chain lives on, the
Incremental is small; where it doesn't, the log says why; the images are right in either
case.
"""

from __future__ import annotations

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


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    site = {"nodes": ("pve1", "pve2"), "shared": ("nas",)}
    async with World(site=site) as found:
        yield found


async def course(world: World, vmid: int, layout: str, storage: str) -> Course:
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
    found = Course(world, vmid)
    await found.begin()
    assert found.vm.modern == (layout == "blockdev")
    return found


@pytest.mark.parametrize(("layout", "vmid"), [("blockdev", 100), ("drive", 110)])
async def test_what_leaves_qemus_nodes_in_place_leaves_the_next_job_small(
    world: World, layout: str, vmid: int
) -> None:
    run = await course(world, vmid, layout, "nas")
    vm = run.vm

    await vm.qmp("system_reset")
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

    await run.write("scsi0", 8 * MIB)
    await run.api("POST", "migrate", target="pve2", online=1)
    assert run.vm.node.name == "pve2"
    assert run.vm.running
    assert not vm.running
    await run.write("virtio1", 8 * MIB)
    world.daemon_on("pve2")
    await run.reads_only_what_was_written("a live migration")
    await run.every_image_is_exact()
    await run.vm.stop()


@pytest.mark.parametrize(("layout", "vmid"), [("blockdev", 120), ("drive", 130)])
async def test_a_moved_disk_is_read_in_part_on_blockdev_and_whole_on_drive(
    world: World, layout: str, vmid: int
) -> None:
    run = await course(world, vmid, layout, "local")
    await run.write("scsi0", 5 * MIB)
    await run.api("POST", "move_disk", disk="scsi0", storage="local2", format="raw",
                  delete=1)  # fmt: skip
    await run.write("scsi0", 6 * MIB)
    await run.write("virtio1", 5 * MIB)
    if layout == "blockdev":
        await run.reads_only_what_was_written("a move")
    else:
        await run.reads_whole("a move", scsi0=NO_TRACKING)
    await run.every_image_is_exact()
    await run.vm.stop()


async def test_a_new_disk_or_a_new_qemu_is_read_whole_and_the_reason_said(
    world: World,
) -> None:
    run = await course(world, 140, "blockdev", "local")
    both = {"scsi0": NO_TRACKING, "virtio1": NO_TRACKING}

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
    await run.reads_whole("kill -9, and another machine type", **both)

    await run.api("POST", "snapshot", snapname="before")
    await run.write("scsi0", 6 * MIB)
    await run.api("POST", "snapshot/before/rollback", start=1)
    await run.write("virtio1", 6 * MIB)
    await run.reads_whole("a rollback", **both)

    await run.api("DELETE", "snapshot/before")
    await run.api("POST", "status/shutdown", forceStop=1, timeout=0)
    where = f"/@pve/restore_vmid={run.vmid},overwrite=yes"
    newest = await world.restore(where=where, job=f"job{run.vmid}")
    assert newest.termination == "Restore OK", newest.text
    await run.vm.start()
    await run.reads_whole("a restore over it", **both)

    await run.vm.stop()
    await run.api("DELETE", "")
    await world.site.create_vm(
        run.vmid, {"agent": "0"}, disks={"scsi0": "24M", "virtio1": "12M"}
    )
    await run.vm.start()
    await run.write("scsi0", 5 * MIB)
    await run.reads_whole("another VM got the id", **both)
    await run.every_image_is_exact()
    await run.vm.stop()
