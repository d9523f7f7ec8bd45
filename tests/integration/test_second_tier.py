# SPDX-License-Identifier: Apache-2.0
"""The second tier: where no bitmap tells what changed, digests do.

Through a real Bacula and a real QEMU. What a job's image holds is told by qemu-img,
from files that Bacula itself restores, and compared with the disk of that moment.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pveplug.units import KiB, MiB
from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support import truth
from tests.support.requires import requires
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

CLUSTER = 64 * KiB
PAPERS = 300 * KiB
"""What a job carries beside the disks' clusters: configuration, manifest, tables."""
COMPARED = re.compile(
    r"VM \d+ scsi0: whole \((?P<why>.+)\), compared with the digests of "
    r"(?P<parent>\S+); (?P<mechanism>\S+); .*compared (?P<compared>.+?), "
    r"dirty (?P<dirty>.+?), read (?P<read>.+?), sent (?P<sent>.+?), "
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


async def filled_vm(world: World, vmid: int, fmt: str = "qcow2", **more: str) -> LabVm:
    """Start a VM with 24 MiB on its only disk, of which 8 MiB are data."""
    vm = await world.site.create_vm(
        vmid,
        {"agent": "0", **more},
        disks={"scsi0": f"local:{24 / 1024},format={fmt}"},
    )
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 1 0 6M")
    await vm.qemu_io("scsi0", "write -P 2 20M 2M")
    return vm


async def run(world: World, name: str, level: str) -> JobResult:
    job = await world.run(name, level)
    assert job.ok, f"{job.text}\n{world.backend_log[-6000:]}"
    return job


def flat(world: World, vm: LabVm, name: str) -> Path:
    """Copy what the stopped VM's disk holds."""
    path, to = vm.disk_path("scsi0"), world.base / f"{name}.raw"
    truth.convert(path, path.suffix.removeprefix("."), to)
    return to


async def images(world: World, *jobs: JobResult) -> list[Path]:
    """Let Bacula restore the jobs' files; return the images, one per job."""
    folder = world.base / f"files{jobs[-1].job_id}"
    job_ids = [job.job_id for job in jobs]
    job = await world.restore(where=str(folder), job_ids=job_ids)
    assert job.termination == "Restore OK", job.text
    found = {path.parent.name: path for path in folder.rglob("scsi0.qcow2")}
    return [found[job.name] for job in jobs]


async def equals(image: Path, disk: Path, depth: int) -> None:
    """Assert what an image and all below it hold, and on how many it stands."""
    assert len(await asyncio.to_thread(truth.backing_chain, image)) == depth + 1
    argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(disk)]
    assert "identical" in await asyncio.to_thread(truth.run, *argv)


def compared(job: JobResult) -> re.Match[str]:
    found = COMPARED.search(job.text)
    assert found, job.text
    return found


@pytest.mark.parametrize(("vmid", "mechanism"), [(100, "cbw"), (110, "fleece")])
async def test_after_a_restart_only_what_changed_is_sent_and_it_is_the_disk(
    world: World, vmid: int, mechanism: str
) -> None:
    vm = await filled_vm(world, vmid)
    name = f"restarted{vmid}"
    await world.add_job(name, f"vmid={vmid} mechanism={mechanism}")
    full = await run(world, name, "Full")
    for command in ("write -P 3 1M 64k", "write -P 4 12M 100k", "write -z 3M 256k"):
        await vm.qemu_io("scsi0", command)
    await vm.stop()
    second_disk = flat(world, vm, f"{name}2")
    await vm.start()
    second = await run(world, name, "Incremental")
    line = compared(second)
    assert line["mechanism"] == mechanism
    assert "no change tracking since" in line["why"]
    assert "read whole, not incrementally: no change tracking" in second.text
    assert line["parent"] == full.name
    # 1 cluster, 2 clusters, and 4 that became zeroes; what is a hole is not read.
    assert line["dirty"] == "448.0 KiB"
    # Of a write of zeroes QEMU makes a hole; cbw reads the clusters it keeps.
    assert 3 * CLUSTER < second.bytes < 3 * CLUSTER + PAPERS
    assert full.bytes > 8 * MiB

    # The bitmaps take it from here, on an image that the tier has made …
    await vm.qemu_io("scsi0", "write -P 5 2M 64k")
    third = await run(world, name, "Incremental")
    assert f"changes since {second.name}" in third.text
    # … and what they found is in the next row.
    await vm.qemu_io("scsi0", "write -P 6 21M 64k")
    await vm.stop()
    last_disk = flat(world, vm, f"{name}4")
    await vm.start()
    fourth = await run(world, name, "Incremental")
    assert compared(fourth)["dirty"] == "64.0 KiB"
    differential = await run(world, name, "Differential")
    await vm.stop()

    files = await images(world, full, second, third, fourth, differential)
    await equals(files[1], second_disk, 1)
    await equals(files[3], last_disk, 3)
    await equals(files[4], last_disk, 1)
    for image in files:
        await asyncio.to_thread(truth.check, image)


async def test_a_stopped_vm_and_one_without_bitmaps_send_what_changed(
    world: World,
) -> None:
    vm = await filled_vm(world, 120, "raw")
    await world.add_job("quiet", "vmid=120 cbt=off")
    full = await run(world, "quiet", "Full")
    await vm.qemu_io("scsi0", "write -P 7 5M 128k")
    live = await run(world, "quiet", "Incremental")
    assert compared(live)["why"] == "cbt=off"
    assert live.bytes < 2 * CLUSTER + PAPERS
    await vm.qemu_io("scsi0", "write -P 8 22M 64k")
    await vm.stop()
    path = vm.disk_path("scsi0")
    with path.open("r+b") as file:
        file.truncate(25 * MiB + 512)
        file.seek(25 * MiB)
        file.write(b"end")
    disk = flat(world, vm, "quiet")
    stopped = await run(world, "quiet", "Incremental")
    line = compared(stopped)
    assert line["why"] == "the VM is stopped"
    assert line["parent"] == live.name
    assert stopped.bytes < 3 * CLUSTER + PAPERS
    again = await run(world, "quiet", "Incremental")
    assert compared(again)["dirty"] == "0 B"
    assert again.bytes < PAPERS
    await equals((await images(world, full, live, stopped, again))[3], disk, 3)


async def test_with_compare_off_nothing_is_kept_and_all_is_sent(world: World) -> None:
    vm = await filled_vm(world, 130)
    await world.add_job("off", "vmid=130 compare=no")
    await run(world, "off", "Full")
    await vm.stop()
    second = await run(world, "off", "Incremental")
    assert "VM 130 scsi0: whole (the VM is stopped); qemu-nbd;" in second.text
    assert second.bytes > 8 * MiB
    assert not folder(world, 130).exists()


def folder(world: World, vmid: int) -> Path:
    return world.site.root / f"ph/lib/digests/{vmid}"


async def test_digests_of_an_older_job_in_the_place_of_the_parents_are_told(
    world: World,
) -> None:
    vm = await filled_vm(world, 140)
    await world.add_job("stale", "vmid=140")
    jobs = [await run(world, "stale", "Full")]
    for place in (9, 10):
        # The disk goes back to what it was: the older job's digests would fit it.
        await vm.qemu_io("scsi0", f"write -P {place} 1M 1M")
        jobs.append(await run(world, "stale", "Incremental"))
    await vm.qemu_io("scsi0", "write -P 9 1M 1M")
    await vm.stop()
    disk = flat(world, vm, "stale")
    (kept,) = folder(world, 140).iterdir()
    old, parent = (kept / f"scsi0.{job.name}" for job in jobs[1:])
    assert old.stat().st_mode & 0o777 == 0o600
    shutil.copy(old, parent)
    job = await run(world, "stale", "Incremental")
    assert "VM 140 scsi0: not compared, all of it is sent: " in job.text
    assert f"it is of job {jobs[1].name}" in job.text
    assert "VM 140 scsi0: whole (the VM is stopped); qemu-nbd;" in job.text
    await equals((await images(world, *jobs, job))[3], disk, 0)
    # That job's own digests are complete, and all is well again.
    after = await run(world, "stale", "Incremental")
    assert compared(after)["dirty"] == "0 B"
