# SPDX-License-Identifier: Apache-2.0
"""Instant recovery over real QEMU and real Bacula: the VM runs while its disks come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.guest import Guest
from tests.support.requires import GUEST, requires, requires_file
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    requires_file(GUEST / "boot.raw"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


async def test_a_guest_boots_while_its_data_is_still_coming(world: World) -> None:
    guest = await Guest.create(world.site, 100, GUEST / "boot.raw")
    await guest.boot()
    await guest.mark("before the backup")
    await guest.write("scsi1", 0, 4096, "data")
    await world.add_job("nightly", "vmid=100")
    job = await world.run("nightly")
    assert job.termination == "Backup OK", job.text
    sums = await guest.stand_still()
    await guest.vm.stop()
    where = "/@pve/restore_vmid=120,mode=instant,restore_bwlimit=2M"
    restoring = asyncio.create_task(world.restore(where=where, job="nightly"))
    try:
        while not (world.site.find(120) and world.site.vm(120).running):
            await asyncio.sleep(0.2)
            if restoring.done():
                print(restoring.result().text, world.backend_log)
        vm = world.site.vm(120)
        print(await vm.serial_wait("TG:READY", 120))
        print("restoring done?", restoring.done())
    finally:
        result = await restoring
        print(result.text)
        print(world.backend_log[-6000:])
    assert result.termination == "Restore OK"


async def test_a_good_backup_is_proven_and_nothing_is_left(world: World) -> None:
    job = await world.restore(where="/@pve/mode=prove,prove_timeout=2m", job="nightly")
    print(job.text)
    print(world.backend_log[-3000:])
    assert job.termination == "Restore OK", job.text
    assert [vmid for _, vmid in world.site.vms()] == [100, 120]
