# SPDX-License-Identifier: Apache-2.0
"""The main job: a running VM goes into Bacula and comes back, byte for byte.

On both block layouts and by both mechanisms, while it is being written to. What the
images must hold is told by :mod:`tests.support.ledger`, and they are read by qemu-img.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.bacula import JobResult
from tests.support import truth
from tests.support.ledger import Ledger
from tests.support.requires import GUEST, REPOSITORY, requires, requires_file
from tests.support.story import content
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

MIB = 1 << 20
SIZES = {"scsi0": 24 * MIB, "virtio1": 12 * MIB}
LEVELS = ("Full", "Incremental", "Differential", "Incremental")
CHAINS = ((0,), (0, 1), (0, 2), (0, 2, 3))
"""What a restore of each job needs, by place in ``LEVELS``."""

LAYOUTS = {"blockdev": "pc", "drive": "pc-i440fx-9.2+pve1"}
VMIDS = {
    ("blockdev", "cbw"): 100,
    ("blockdev", "fleece"): 110,
    ("drive", "cbw"): 120,
    ("drive", "fleece"): 130,
}


@dataclass(frozen=True, slots=True)
class Taken:
    """A backup, and how many writes had been begun before and after it."""

    job: JobResult
    earliest: int
    latest: int


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


async def backed_up(
    world: World, ledger: Ledger, name: str, levels: Iterable[str]
) -> list[Taken]:
    """Run jobs while the ledger goes on writing."""
    taken = []
    for level in levels:
        await ledger.some(30)
        earliest = ledger.count
        async with ledger.going_on():
            job = await world.run(name, level)
        assert job.termination == "Backup OK", f"{job.text}\n{world.backend_log}"
        taken.append(Taken(job, earliest, ledger.count))
    return taken


@pytest.mark.parametrize(("layout", "mechanism"), VMIDS)
async def test_every_job_of_a_chain_is_one_instant_byte_for_byte(
    world: World, layout: str, mechanism: str
) -> None:
    vmid = VMIDS[layout, mechanism]
    vm = await world.site.create_vm(
        vmid,
        {"agent": "0", "machine": LAYOUTS[layout]},
        disks={
            "scsi0": f"local:{24 / 1024},format=qcow2,iothread=1",
            "virtio1": f"local:{12 / 1024},format=raw",
        },
    )
    await vm.start()
    assert vm.modern == (layout == "blockdev")
    ledger = Ledger(vm, SIZES, seed=vmid)
    name = f"{layout}-{mechanism}"
    await world.add_job(name, f"vmid={vmid} mechanism={mechanism} bwlimit=8M")
    taken = await backed_up(world, ledger, name, LEVELS)
    for one, level in zip(taken, LEVELS, strict=True):
        for key in SIZES:
            line = re.search(rf"VM {vmid} {key}: (.*)", one.job.text)
            assert line, one.job.text
            assert f"; {mechanism};" in line[1]
            assert ("changes since" in line[1]) == (level != "Full")
    await vm.assert_clean()

    moments = await restored_as_files(world, ledger, taken)
    for number, chain in enumerate(CHAINS):
        await restored_as_a_vm(
            world,
            vmid + 1 + number,
            [taken[member].job.job_id for member in chain],
            ledger.state(moments[number]),
        )
    await vm.stop()


async def restored_as_files(
    world: World, ledger: Ledger, taken: list[Taken]
) -> list[int]:
    """Let Bacula write the images; return which moment each of the jobs is."""
    folder = world.base / f"files{taken[0].job.job_id}"
    job_ids = [one.job.job_id for one in taken]
    job = await world.restore(where=str(folder), job_ids=job_ids)
    assert job.termination == "Restore OK", job.text
    homes = {path.parent.name: path.parent for path in folder.rglob("scsi0.qcow2")}
    moments = []
    for one in taken:
        home = homes[one.job.name]
        for key in SIZES:
            await asyncio.to_thread(truth.check, home / f"{key}.qcow2")
        images = {k: await content(home / f"{k}.qcow2", "qcow2") for k in SIZES}
        moments.append(ledger.moment_of(images, one.earliest, one.latest))
    return moments


async def restored_as_a_vm(
    world: World, vmid: int, job_ids: list[int], wanted: dict[str, bytes]
) -> None:
    where = f"/@pve/restore_vmid={vmid}"
    job = await world.restore(where=where, job_ids=job_ids)
    assert job.termination == "Restore OK", f"{job.text}\n{world.backend_log}"
    vm = world.site.vm(vmid)
    for key, expected in wanted.items():
        path = vm.disk_path(key)
        found = await content(path, path.suffix.removeprefix("."))
        assert found == expected, f"{key} of VM {vmid}"


@requires_file(GUEST / "boot.raw")
async def test_the_demo_tells_its_whole_story() -> None:
    """A guest boots by GRUB, writes, is backed up, deleted, restored, boots again."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.lab.demo"),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(280):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGTERM)
            await process.communicate()
    text = said.decode()
    assert process.returncode == 0, text
    assert text.rstrip().endswith("demo: OK")
    base = re.search(r"everything below (\S+)", text)
    assert base, text
    assert not Path(base[1]).exists()
