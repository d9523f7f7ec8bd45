# SPDX-License-Identifier: Apache-2.0
"""Replication between two sites, driven by real Bacula jobs."""

from __future__ import annotations

import re

import pytest

from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support import dr_truth, truth
from tests.support.requires import requires
from tests.support.two_sites import TwoSites

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd", "bacula-fd"),
]


async def source_vm(sites: TwoSites, vmid: int = 100) -> LabVm:
    vm = await sites.site.create_vm(
        vmid,
        {"name": f"vm{vmid}", "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0"},
        disks={
            "scsi0": "local:0.0625,format=qcow2",
            "scsi1": "local:0.03125,format=raw",
        },
    )
    await vm.start()
    return vm


def done(job: JobResult, sites: TwoSites) -> str:
    """Assert that a job ended well; return the restore point it took."""
    assert job.termination == "Backup OK", (
        f"{job.text}\n{sites.receiver_log[-3000:]}\n{sites.backend_log[-3000:]}"
    )
    found = re.search(r"restore point (\S+) ", job.text)
    return found[1] if found else ""


async def test_a_seed_and_increments_are_what_the_source_was() -> None:
    async with TwoSites() as sites:
        vm = await source_vm(sites)
        await sites.start_receiver()
        await sites.add_job("seed", f"mode=seed vmid=100 {sites.dr_words()}")
        await sites.add_job(
            "cycle",
            f"mode=incremental vmid=100 verify_sample_blocks=8 {sites.dr_words()}",
        )
        await vm.qemu_io("scsi0", "write -P 1 0 6M")
        await vm.qemu_io("scsi1", "write -P 2 20M 2M")
        points = {}
        for number in range(4):
            for key in ("scsi0", "scsi1"):
                await vm.qemu_io(key, f"write -P {number + 10} {number * 3}M 128k")
                await vm.qemu_io(key, "flush")
            job = await sites.run("seed" if number == 0 else "cycle")
            name = done(job, sites)
            if number:
                assert "changes since dr-" in job.text, job.text
            sums = {}
            for key in ("scsi0", "scsi1"):
                path = vm.disk_path(key)
                sums[key] = truth.sha256_of_image(path, path.suffix[1:])
            points[name] = sums
        replica = sites.dr.vm(100)
        assert not replica.running
        for name, sums in points.items():
            for key, wanted in sums.items():
                found = dr_truth.content(replica.disk_path(key), name)
                assert found.sha256 == wanted, (name, key)
