# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: change tracking in the images (``cbt=persistent``)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pveplug.journal import own_vm
from pveplug.node import load_node
from tests.lab import snapshots
from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support.error_jobs import (
    WITHOUT_GUEST,
    ErrorWorld,
    informed,
    one_line,
    warned,
)
from tests.support.ledger import Ledger
from tests.support.requires import requires
from tests.support.story import content

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]
MIB = 1 << 20
SIZES = {"scsi0": 24 * MIB, "virtio1": 12 * MIB}
PVEPLUG = Path(sys.prefix) / "bin" / "pveplug"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[ErrorWorld]:
    async with ErrorWorld() as found:
        yield found


async def pveplug(world: ErrorWorld, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PODHEITOR_PROXMOX_NODE": str(world.node_file)}
    return await asyncio.to_thread(
        subprocess.run,
        [str(PVEPLUG), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


async def restored(
    world: ErrorWorld, vmid: int, jobs: list[JobResult], wanted: dict[str, bytes]
) -> None:
    result = await world.restored(f"restore_vmid={vmid}", [job.job_id for job in jobs])
    assert result.ok, result.text
    vm = world.site.vm(vmid)
    for key, expected in wanted.items():
        path = vm.disk_path(key)
        found = await content(path, path.suffix.removeprefix("."))
        assert found == expected, f"{key} of VM {vmid}"


def was_small(result: JobResult, key: str) -> None:
    """Assert that a few of the disk's clusters were read, and no more."""
    assert result.ok, result.text
    line = one_line(result, f" {key}: changes since ")
    read = re.search(r", read ([\d.]+) KiB,", line)
    assert read, line


async def test_changes_are_tracked_through_a_stop_and_not_through_a_kill(
    world: ErrorWorld,
) -> None:
    vm = await world.site.create_vm(
        100,
        WITHOUT_GUEST,
        disks={
            "scsi0": f"local:{24 / 1024},format=qcow2,iothread=1",
            "virtio1": f"local:{12 / 1024},format=raw",
        },
    )
    await vm.start()
    ledger = Ledger(vm, SIZES, seed=5)
    name = await world.define("vmid=100 cbt=persistent")
    await ledger.some(40)
    full = await world.run(name, "Full")
    informed(full, "VM 100: virtio1: change tracking ends with a stop: a raw image")
    informed(
        full,
        "VM 100: bitmaps in the images of scsi0 (cbt=persistent)",
        "pveplug bitmaps drop --vmid 100",
    )
    await ledger.some(10)
    await vm.stop()
    await vm.start()
    await ledger.some(10)
    first = await world.run(name, "Incremental")
    was_small(first, "scsi0")
    warned(first, "VM 100 virtio1: read whole, not incrementally: no change tracking")
    await restored(world, 101, [full, first], ledger.state(ledger.count))

    await vm.kill()
    await vm.start()
    await ledger.some(10)
    second = await world.run(name, "Incremental")
    warned(
        second,
        "VM 100 scsi0: read whole, not incrementally: the segment of job",
        "is lost (QEMU was killed)",
    )
    await vm.stop()
    await vm.start()
    await ledger.some(5)
    third = await world.run(name, "Incremental")
    was_small(third, "scsi0")
    await restored(world, 102, [full, first, second, third], ledger.state(ledger.count))
    await world.assert_nothing_left()
    await vm.stop()


async def roll_back(world: ErrorWorld, vm: LabVm, name: str) -> None:
    await snapshots.rollback(world.site, vm.node, vm.vmid, name)


async def test_a_vm_with_snapshots_is_rolled_back_after_its_bitmaps_were_dropped(
    world: ErrorWorld,
) -> None:
    site = world.site
    vm = await site.create_vm(
        110, WITHOUT_GUEST, disks={"scsi0": f"local:{12 / 1024},format=qcow2"}
    )
    await vm.start()
    ledger = Ledger(vm, {"scsi0": 12 * MIB}, seed=6)
    name = await world.define("vmid=110 cbt=persistent")
    await ledger.some(20)
    full = await world.run(name, "Full")
    at_snapshot = ledger.state(ledger.count)
    await snapshots.create(site, vm.node, 110, "before", "")
    await ledger.some(20)
    first = await world.run(name, "Incremental")
    warned(
        first,
        "VM 110 has snapshots (before) and bitmaps in the images of scsi0",
        "rollback fails on such an image and leaves the VM locked",
        "pveplug bitmaps drop --vmid 110",
    )
    listed = await pveplug(world, "bitmaps", "list", "--vmid", "110", "--json")
    rows = json.loads(listed.stdout)
    assert [row["job"] for row in rows] == [full.name, first.name], listed.stderr
    assert [row["state"] for row in rows] == ["closed", "recording"]
    assert all(row["persistent"] and row["dirty_bytes"] is not None for row in rows)

    with pytest.raises(Exception, match=r"snapshot -a before .* exit code 1"):
        await roll_back(world, vm, "before")
    assert vm.conf.values["lock"] == "rollback"
    everything = await pveplug(world, "bitmaps", "list")
    assert everything.returncode == 0, everything.stderr
    assert everything.stdout.count("110   scsi0") == 2, everything.stdout
    planned = await pveplug(world, "bitmaps", "drop", "--vmid", "110", "--dry-run")
    assert planned.stdout.count("would remove ph-") == 2, planned.stderr
    await asyncio.to_thread(
        subprocess.run,
        ["qemu-img", "bitmap", "--add", str(vm.disk_path("scsi0")), "somebody-elses"],
        check=True,
    )
    async with own_vm(load_node(world.node_file).state_dir, 110, 0):
        refused = await pveplug(world, "bitmaps", "drop", "--vmid", "110")
    assert refused.returncode == 69
    assert "VM 110 (lock): another job is working on this VM" in refused.stderr
    dropped = await pveplug(world, "bitmaps", "drop", "--vmid", "110")
    assert dropped.stdout.count("\n") == dropped.stdout.count("removed ph-") == 2
    again = await pveplug(world, "bitmaps", "drop", "--vmid", "110")
    assert again.stdout == "VM 110 has no such bitmap\n"
    await asyncio.to_thread(
        subprocess.run,
        [
            "qemu-img",
            "bitmap",
            "--remove",
            str(vm.disk_path("scsi0")),
            "somebody-elses",
        ],
        check=True,
    )
    vm.set(lock=None)  # qm unlock 110
    await roll_back(world, vm, "before")

    await vm.start()
    second = await world.run(name, "Incremental")
    warned(second, "VM 110 scsi0: read whole, not incrementally: no change tracking")
    await restored(world, 111, [full, first, second], at_snapshot)
    live = await pveplug(world, "bitmaps", "drop", "--vmid", "110", "--all")
    assert live.stdout.count("removed ph-") == 1, live.stderr
    await vm.stop()
    empty = await pveplug(world, "bitmaps", "list", "--vmid", "110")
    assert empty.stdout == "no bitmaps of ours\n"
