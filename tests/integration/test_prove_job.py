# SPDX-License-Identifier: Apache-2.0
"""A backup is proven by booting it, and one that can't boot, or isn't whole, is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.bacula import JobResult
from tests.support.guest import Guest
from tests.support.requires import GUEST, requires, requires_file
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    requires_file(GUEST / "boot.raw"),
]

WATCHED = "prove_timeout=170,prove_evidence=agent"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def jobs(world: World) -> list[JobResult]:
    """A chain of three of VM 100, which boots, on one network."""
    await world.site.create_vm(
        100,
        {
            "name": "good",
            "agent": "1",
            "boot": "order=scsi0;net0",
            "vga": "std",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
        },
        disks={"scsi0": GUEST / "boot.raw"},
    )
    guest = Guest(world.site.vm(100), {})
    await guest.vm.start()
    await world.add_job("nightly", "vmid=100")
    taken = []
    for number, level in enumerate(("Full", "Incremental", "Incremental")):
        await guest.vm.qemu_io("scsi0", f"write -P {number + 1} 60M 64k")
        job = await world.run("nightly", level)
        assert job.termination == "Backup OK", job.text
        taken.append(job)
    await guest.vm.stop()
    return taken


async def proven(world: World, **selected: object) -> JobResult:
    job = await world.restore(where=f"/@pve/mode=prove,{WATCHED}", **selected)
    left = [vmid for _, vmid in world.site.vms() if vmid % 100]
    assert left == [], f"the VM of the proof is still there: {left}\n{job.text}"
    node = world.site.node_values()
    landing = Path(str(node["landing_dir"]))
    assert not landing.exists() or list(landing.iterdir()) == []
    return job


def report_of(world: World, job: JobResult) -> dict[str, object]:
    [line] = [line for line in job.log if ": report /" in line]
    path = Path(line.rpartition(": report ")[2].strip())
    found: dict[str, object] = json.loads(path.read_text())
    return found


async def test_a_good_chain_is_proven_and_reported(
    world: World, jobs: list[JobResult]
) -> None:
    job = await proven(world, job="nightly")
    assert job.termination == "Restore OK", job.text
    assert "net0 is not taken over: a proof is isolated" in job.text
    report = report_of(world, job)
    assert report["verdict"] == "passed"
    assert report["job"] == jobs[-1].name
    assert [one["jobid"] for one in report["chain"]] == [j.job_id for j in jobs]
    assert report["screenshot"]["sha256"] in job.text


async def test_a_missing_increment_is_no_proof(world: World) -> None:
    # Little data: Bacula's daemons wait two minutes for each other where much is left.
    vm = await world.site.create_vm(300, {"name": "small"}, disks={"scsi0": "4M"})
    await vm.start()
    await world.add_job("small", "vmid=300")
    jobs = []
    for number, level in enumerate(("Full", "Incremental", "Incremental")):
        await vm.qemu_io("scsi0", f"write -P {number + 1} 1M 64k")
        jobs.append(await world.run("small", level))
    await vm.stop()
    job = await proven(world, job_ids=[jobs[0].job_id, jobs[2].job_id])
    assert job.termination == "Restore Error", job.text
    assert f"builds on job {jobs[1].name}, which is missing" in job.text


async def test_a_zeroed_boot_sector_is_found_long_before_the_time_limit(
    world: World, jobs: list[JobResult]
) -> None:
    await broken_vm(world)
    job = await proven(world, job="weekly")
    assert job.termination == "Restore Error", job.text
    report = report_of(world, job)
    assert report["verdict"] == "failed"
    assert "bootable" in str(report["reason"]), report
    assert float(str(report["watch_seconds"])) < 120


async def broken_vm(world: World) -> None:
    """VM 200 is VM 100 with a boot sector of zeroes, and has a backup."""
    if world.site.find(200) is not None:
        return
    spoilt = world.base / "spoilt.raw"
    data = bytearray((GUEST / "boot.raw").read_bytes())
    data[:512] = bytes(512)
    await asyncio.to_thread(spoilt.write_bytes, data)
    await world.site.create_vm(
        200,
        {"name": "broken", "agent": "1", "boot": "order=scsi0", "vga": "std"},
        disks={"scsi0": spoilt},
    )
    await world.add_job("weekly", "vmid=200")
    job = await world.run("weekly")
    assert job.termination == "Backup OK", job.text


async def test_a_proof_is_a_bacula_job_of_one_line(
    world: World, jobs: list[JobResult]
) -> None:
    await broken_vm(world)
    console = world.base / "b/etc/bconsole.conf"
    options = WATCHED.replace(",", " ")
    # A storage of its own: what the restore reads must not wait for what this writes.
    await world.add_job(
        *("prove", f"mode=prove vmid=100 {options} prove_console={console}"),
        storage=2,
    )
    job = await world.run("prove")
    assert job.termination == "Backup OK", job.text
    assert "PASSED" in job.text
    [name] = [
        name
        for name in world.bacula.console(f"list files jobid={job.job_id}").splitlines()
        if "report.json" in name
    ]
    assert "/@proxmox-proofs/100-" in name
    await world.add_job(
        *("prove-both", f"mode=prove vmid=200,100 {options} prove_console={console}"),
        storage=2,
    )
    job = await world.run("prove-both")
    assert job.termination == "Backup Error", job.text
    assert "PASSED" in job.text, "the second VM is proven whatever came of the first"
    assert "the newest backup of VM 200 is not proven" in job.text
