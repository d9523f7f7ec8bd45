# SPDX-License-Identifier: Apache-2.0
"""Jobs of VMware's and Hyper-V's plug-ins, restored by a real Bacula to PVE VMs.

What backs up is a stand-in (:mod:`tests.lab.sisters`); what restores is our copy under
its name. What the disks must hold is told by qemu-img.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.bacula import JobResult
from tests.lab.sisters import Sisters
from tests.lab.vm import LabVm
from tests.support import foreign_vms, truth
from tests.support.guest import BOOT_WAIT_S
from tests.support.requires import GUEST, requires, requires_file
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sisters() -> AsyncIterator[Sisters]:
    async with World() as world:
        found = Sisters(world)
        await found.install()
        yield found


async def converted(source: Path, image: Path, fmt: str, *options: str) -> Path:
    """Have qemu-img write an image of another hypervisor."""
    words = [word for option in options for word in ("-o", option)]
    await asyncio.to_thread(
        truth.run,
        *("qemu-img", "convert", "-f", "raw", "-O", fmt, *words),
        *(str(source), str(image)),
    )
    return image


async def imported(sisters: Sisters, **arguments: object) -> JobResult:
    """Restore; the job must end well."""
    result = await sisters.world.restore(**arguments)
    assert result.termination.startswith("Restore OK"), (
        f"{result.text}\n{sisters.world.backend_log[-6000:]}"
    )
    return result


async def holds(vm: LabVm, key: str, source: Path) -> None:
    """Raise unless a disk holds what a raw file holds."""
    path = vm.disk_path(key)
    fmt = path.suffix.removeprefix(".")
    found = await asyncio.to_thread(truth.sha256_of_image, path, fmt)
    assert found == await asyncio.to_thread(truth.sha256_of_image, source, "raw")


async def boots(vm: LabVm) -> None:
    await vm.start()
    line = await vm.serial_wait("TG:FILE", BOOT_WAIT_S)
    assert line.strip().endswith("TG:FILE tiny-guest")
    await vm.serial_wait("TG:READY", 60)
    await vm.stop()


@requires_file(GUEST / "boot.raw")
async def test_a_vmware_job_becomes_a_vm_that_boots_by_bios(
    sisters: Sisters, tmp_path: Path
) -> None:
    disk = GUEST / "boot.raw"
    image = await converted(
        disk, tmp_path / "web01.vmdk", "vmdk", "subformat=streamOptimized"
    )
    vmx = tmp_path / "web01.vmx"
    vmx.write_bytes(foreign_vms.vmx("web01", "web01.vmdk"))
    (job,) = await sisters.back_up(
        "esx-web01",
        "podheitor-vsphere",
        [
            {"file": "/@vsphere/@vsphere/web01/web01.vmdk", "path": image},
            {"file": "/@vsphere/@vsphere/web01/web01.vmx", "path": vmx},
        ],
    )
    await imported(sisters, where="/@pve/restore_vmid=200", job_ids=[job.job_id])
    vm = sisters.world.site.vm(200)
    await holds(vm, "scsi0", disk)
    await boots(vm)
