# SPDX-License-Identifier: Apache-2.0
"""Instant recoveries that something stands in the way of: nothing written is lost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.lab.bacula import JobResult
from tests.lab.lifecycle import destroy_vm
from tests.lab.vm import LabVm
from tests.support.error_jobs import ErrorWorld, failed
from tests.support.halt import halted_api
from tests.support.instant import (
    CLUSTER,
    MIB,
    SECTOR,
    Written,
    compare,
    contents,
    kill_keeper,
    landed,
    left,
    nbd_nodes,
    noise,
    pveplug,
    status_of,
    traces,
)
from tests.support.kills import kill, until
from tests.support.requires import requires
from tests.support.stranger import program

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]
VMID = 200
EVENT_LOG = 256 << 10
"""Where OVMF's variable store (4m) has it."""
BARE = {"agent": "0", "boot": "order=scsi0", "description": "its own"}


@dataclass(frozen=True)
class Chain:
    """A Full and its Incremental, and what the disks held."""

    job_ids: list[int]
    disks: dict[str, bytearray]


class Stage:
    """VM 100 is backed up; VM 200 is to come out of it."""

    def __init__(self, world: ErrorWorld) -> None:
        self.world = world
        self.chain: Chain

    async def prepare(self) -> None:
        world = self.world
        disks: dict[str, Path | str] = {
            "scsi0": noise(world.base / "0.raw", MIB, 1),
            "scsi1": noise(world.base / "1.raw", 7 * MIB, 2),
        }
        vm = await world.site.create_vm(100, BARE, disks=disks)
        await vm.start()
        name = await world.define("vmid=100")
        full = await world.run(name, "Full")
        await vm.qemu_io("scsi1", "write -P 7 1M 300k")
        await vm.qemu_io("scsi1", "write -P 8 6M 300k")
        incremental = await world.run(name, "Incremental")
        assert full.ok, full.text
        assert incremental.ok, incremental.text
        await vm.stop()
        ids = [full.job_id, incremental.job_id]
        self.chain = Chain(ids, contents(vm, world.base))

    @property
    def vm(self) -> LabVm:
        return self.world.site.vm(VMID)

    async def start(self, options: str = "", job_ids: list[int] | None = None) -> int:
        """Begin the recovery; returns the JobId."""
        where = (
            f"/@pve/restore_vmid={VMID},mode=instant,restore_storage=local2,"
            f"ir_overlay_storage=local{options}"
        )
        ids = self.chain.job_ids if job_ids is None else job_ids
        return await asyncio.to_thread(
            lambda: self.world.bacula.start_restore(where=where, job_ids=ids)
        )

    async def restored(self, options: str = "", **more: Any) -> JobResult:
        return await self.world.wait(await self.start(options, **more))

    async def runs(self) -> LabVm:
        site = self.world.site
        await until(
            lambda: site.find(VMID) and site.vm(VMID).running, "the start", 60, 0.05
        )
        await self.vm.wait_started()
        return self.vm

    async def cut_off(self, options: str = "") -> Written:
        """Begin, and kill the backend when the VM runs: much is owed."""
        job_id = await self.start(f",restore_bwlimit=1536{options}")
        vm = await self.runs()
        await self.killed(job_id)
        here, total = landed(self.world.site, VMID)
        assert here < total, "all had come before"
        return Written(vm, self.chain.disks, 1)

    async def killed(self, job_id: int) -> None:
        """Kill the backend, and wait until its job has failed.

        bacula-fd is ended after it: with data still to come it would wait for two
        minutes, in the shutdown of its TLS session with a Storage Daemon that sends.
        """
        await kill(self.backend())
        bacula = self.world.bacula
        await asyncio.to_thread(bacula.kill, "fd")
        await asyncio.to_thread(bacula.start_daemon, "fd")
        assert (await self.world.wait(job_id)).status in "fE"

    def backend(self) -> int:
        journal = self.world.site.root / f"ph/lib/vms/{VMID}.json"
        if journal.exists():
            return int(json.loads(journal.read_text())["pid"])
        fd = self.world.bacula.pid("fd")
        children = Path(f"/proc/{fd}/task").glob("*/children")
        return max(int(pid) for path in children for pid in path.read_text().split())

    async def right(self, wanted: dict[str, bytearray]) -> None:
        """Assert that the VM stands on its own, and holds what it must."""
        world, vm = self.world, self.vm
        await until(lambda: not left(world, VMID), "the recovery's end", 60, 0.2)
        if vm.running:
            assert await nbd_nodes(vm) == []
            for key in wanted:
                await vm.qemu_io(key, "flush")
        assert traces(world, VMID) == []
        assert vm.conf.values.get("description", "").strip() == "its own"
        await vm.stop()
        compare(contents(vm, world.base), wanted)

    async def nothing_left(self) -> None:
        """Assert that nothing of the recovery is anywhere."""
        site = self.world.site
        await until(
            lambda: site.find(VMID) is None and not left(self.world, VMID),
            "the end of everything",
            45,
            0.2,
        )
        for storage in site.node.storages.values():
            assert list(storage.volumes(VMID)) == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Stage]:
    async with ErrorWorld() as world:
        world.most_hold_s = 30.0  # QEMU, told to pause, waits for reads under way
        stage = Stage(world)
        await stage.prepare()
        yield stage


@pytest_asyncio.fixture(loop_scope="module")
async def on(shared: Stage) -> AsyncIterator[Stage]:
    site = shared.world.site
    yield shared
    site.faults.clear()
    shared.world.damage("")
    if (site.root / f"ph/landing/{VMID}").exists():  # a test has failed
        await pveplug(shared.world, "ir", "discard", "--vmid", str(VMID), "--yes")
        shutil.rmtree(site.root / "ph/landing", ignore_errors=True)
    if site.find(VMID) is not None:
        shared.vm.set(protection=None)
        await shared.vm.stop()
        await destroy_vm(
            site, site.node, VMID, skiplock=True, unreferenced=True, purge=True
        )


async def test_a_full_landing_store_fails_the_job_and_reads_wait_until_there_is_room(
    on: Stage, small_disk: Callable[[str], Path]
) -> None:
    world = on.world
    disk = small_disk("13M")
    world.site.node_toml(landing_dir=str(disk / "landing"))
    try:
        job_id = await on.start(",restore_bwlimit=1536")
        vm = await on.runs()
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(13 * MIB))
        failed(await world.wait(job_id), "VM 200 disk scsi1 (land): ", "make room in ")
        written = Written(vm, on.chain.disks, 1)
        await written.write("scsi1", 3 * MIB, CLUSTER)
        await written.read_later("scsi1", 5 * MIB)
        assert written.waiting == 1
        assert await status_of(vm) == "running"
        (disk / "filler").unlink()
        again = await on.restored()
        assert again.ok, again.text
        await written.settled()
        await until(lambda: not os.listdir(disk / "landing"), "its end", 60)
    finally:
        world.site.node_toml()
    await on.right(written.disks)


def writes_by_itself(sectors: int) -> bytes:
    """A boot sector that writes itself into each cluster of its disk, by its BIOS."""
    code = bytes.fromhex(
        "31c0 8ed8"  # xor ax, ax; mov ds, ax
        "be307c"  # mov si, packet
        "b443 b000 cd13"  # write: extended write of interrupt 13h
        "8144088000"  # add word [si+8], 128
        f"817c08{sectors.to_bytes(2, 'little').hex()}"  # cmp word [si+8], sectors
        "72ee"  # jb write
        "f4 ebfd"  # hlt, and again
    )
    packet = bytes.fromhex("1000 0100 007c 0000 8000 0000 0000 0000")
    return (code.ljust(0x30, b"\0") + packet).ljust(510, b"\0") + b"\x55\xaa"


async def test_a_guest_whose_overlay_is_full_stops_and_goes_on_when_there_is_room(
    on: Stage, small_disk: Callable[[str], Path]
) -> None:
    world = on.world
    sector = writes_by_itself(4 * MIB // SECTOR)
    image = world.base / "w.raw"
    image.write_bytes(sector + bytes(range(256)) * ((4 * MIB - SECTOR) // 256))
    source = await world.site.create_vm(101, BARE, disks={"scsi0": image})
    backup = await world.backup("vmid=101")
    assert backup.ok, backup.text
    wanted = bytearray(contents(source, world.base)["scsi0"])
    for at in range(CLUSTER, len(wanted), CLUSTER):
        wanted[at : at + SECTOR] = sector
        # The packet is a part of what is written, its sector in it.
        wanted[at + 0x38 : at + 0x3A] = (at // SECTOR).to_bytes(2, "little")
    tiny = small_disk("2M")
    world.site.add_storage("tiny", root=tiny)
    try:
        where = (
            f"/@pve/restore_vmid={VMID},mode=instant,restore_storage=local2,"
            "ir_overlay_storage=tiny,ir_auto_migrate=no"
        )
        job = await world.restore(where=where, job_ids=[backup.job_id])
        assert job.ok, job.text
        vm = on.vm
        async with asyncio.timeout(60):
            while await status_of(vm) != "io-error":
                await asyncio.sleep(0.2)
            while (said := await pveplug(world, "ir", "status"))[0] == 0:
                await asyncio.sleep(0.5)
        assert "the guest is stopped: no room for its writes to scsi0" in said[1]
        subprocess.run(["mount", "-o", "remount,size=16M", tiny], check=True)
        assert await program(world.site, "qm", "resume", str(VMID)) == (0, "")
        async with asyncio.timeout(60):
            while await status_of(vm) != "running":
                await asyncio.sleep(0.1)
        await _halts(vm)
        status, text = await pveplug(world, "ir", "migrate", "--vmid", str(VMID))
        assert status == 0, text
        await on.right({"scsi0": wanted})
    finally:
        del world.site.storages["tiny"]
        await destroy_vm(
            world.site, world.site.node, 101, skiplock=True, unreferenced=True,
            purge=True,
        )  # fmt: skip


async def _halts(vm: LabVm) -> None:
    """Wait until its only processor has nothing more to do."""
    async with asyncio.timeout(60):
        while "HLT=1" not in await vm.machine.hmp("info registers"):
            await asyncio.sleep(0.1)


async def test_a_vm_whose_data_stays_away_is_paused_with_the_reason_and_goes_on(
    on: Stage,
) -> None:
    world = on.world
    written = await on.cut_off(",ir_timeout=15")
    vm = written.vm
    await written.read_later("scsi1", 6 * MIB + 512 * 1024)
    await until(lambda: "Paused by pveplug" in _description(vm), "the pause", 60)
    # QEMU answers nobody while it waits, its guest stopped, for a read under way.
    assert await status_of(vm) in ("paused", "")
    assert "ir_timeout" in _description(vm)
    status, said = await pveplug(world, "ir", "status", "--vmid", str(VMID))
    assert status == 1
    assert "Nothing is lost. Run the restore of job " in said
    # Another keeper knows that the pause was ours.
    await kill_keeper(world.site, VMID)
    status, said = await pveplug(world, "ir", "resume", "--vmid", str(VMID))
    assert status == 0, said
    assert await status_of(vm) in ("paused", "")
    again = await on.start(",restore_bwlimit=4M")
    await until(lambda: "Paused" not in _description(vm), "its going on", 40)
    job = await world.wait(again)
    assert job.ok, job.text
    await written.settled()
    async with asyncio.timeout(30):
        while await status_of(vm) != "running":
            await asyncio.sleep(0.2)
    await on.right(written.disks)


def _description(vm: LabVm) -> str:
    return vm.conf.values.get("description", "")


async def test_a_killed_keepers_vm_reads_on_when_another_serves(on: Stage) -> None:
    written = await on.cut_off()
    await kill_keeper(on.world.site, VMID)
    await written.read_later("scsi0", 2 * CLUSTER)
    await written.write("scsi1", 4 * MIB, CLUSTER)
    assert written.waiting == 1
    assert await status_of(written.vm) == "running"
    status, said = await pveplug(on.world, "ir", "resume", "--vmid", str(VMID))
    assert status == 0, said
    await written.settled(20)
    # Giving it up ends quickly, though a read waits for what will not come.
    await written.read_later("scsi1", 6 * MIB + 512 * 1024)
    async with asyncio.timeout(30):
        said = await pveplug(on.world, "ir", "discard", "--vmid", str(VMID), "--yes")
    assert said[0] == 0, said[1]
    await on.nothing_left()


async def test_what_was_killed_before_the_vm_was_handed_over_is_undone(
    on: Stage,
) -> None:
    with halted_api(on.world.site, "PUT|POST .*/qemu/200/config") as halt:
        job_id = await on.start()
        await halt.reached()
        await kill(on.backend())
    assert (await on.world.wait(job_id)).status in "fE"
    await on.nothing_left()


async def test_a_vm_whose_job_was_killed_at_its_start_is_started_by_the_next(
    on: Stage,
) -> None:
    site = on.world.site
    with halted_api(site, "POST .*/qemu/200/status/start") as halt:
        job_id = await on.start(",restore_bwlimit=1536")
        await halt.reached()
        await on.killed(job_id)
    await on.runs()
    await on.vm.stop()
    record = site.root / f"ph/landing/{VMID}/recovery.json"
    record.write_text(record.read_text().replace('"started": true', '"started": false'))
    job = await on.restored()
    assert job.ok, job.text
    assert on.vm.running
    await on.right(on.chain.disks)


async def test_a_vm_that_cannot_be_started_is_told_and_its_disks_come_all_the_same(
    on: Stage,
) -> None:
    on.world.site.faults.fail_task("qmstart", "bridge 'vmbr9' does not exist")
    job = await on.restored()
    assert "VM 200 was not started: " in job.text
    assert "bridge 'vmbr9' does not exist" in job.text
    assert "nothing of the recovery is left" in job.text
    await on.right(on.chain.disks)


async def test_a_full_target_storage_leaves_the_vm_on_its_overlay_until_there_is_room(
    on: Stage,
) -> None:
    world = on.world
    storage = world.site.storages["local2"]
    old, storage.total = storage.total, MIB // 2
    try:
        job = await on.restored()
    finally:
        storage.total = old
    assert "a disk could not be moved: " in job.text
    assert "No space left on device" in job.text
    assert "pveplug ir migrate --vmid 200" in _description(on.vm)
    status, said = await pveplug(world, "ir", "status")
    assert (status, "a disk could not be moved" in said) == (1, True)
    written = Written(on.vm, on.chain.disks, 1)
    async with written.going_on():
        status, said = await pveplug(world, "ir", "migrate", "--vmid", str(VMID))
        assert status == 0, said
    await written.settled()
    await on.right(written.disks)


async def test_a_second_restore_to_the_same_id_waits_for_the_first_and_harms_nothing(
    on: Stage,
) -> None:
    first = await on.start(",restore_bwlimit=1536")
    await on.runs()
    second = await on.start()
    one, other = await on.world.wait(first), await on.world.wait(second)
    assert one.ok, one.text
    # By then the first has delivered, and perhaps the VM stands on its own.
    if "everything of job" not in other.text:
        failed(other, "VM 200 (restore): VM 200 (vm100) exists. Remedy: ")
    await on.right(on.chain.disks)


async def test_a_vm_whose_data_is_not_what_was_stored_is_paused_and_never_goes_on(
    on: Stage,
) -> None:
    world = on.world
    # One small disk: bacula-fd takes two minutes to end a restore of which much is
    # left, in the shutdown of its TLS session with a Storage Daemon that still sends.
    small = {"scsi0": noise(world.base / "small.raw", MIB, 3)}
    if world.site.find(101) is None:
        await world.site.create_vm(101, BARE, disks=small)
    world.damage("data")
    name = await world.define("vmid=101")
    backup = await world.run(name, "Full")
    assert backup.ok, backup.text
    world.damage("")
    # So slowly that the VM runs when it turns out.
    slowly = ",restore_bwlimit=128"
    job = await on.restored(slowly, job_ids=[backup.job_id])
    failed(
        job, "VM 200 disk scsi0 (write): ", "the image's digests are not those of its"
    )
    await until(lambda: "Paused by pveplug" in _description(on.vm), "the pause", 30)
    assert await status_of(on.vm) == "paused"
    assert "its data is not what was backed up" in _description(on.vm)
    again = await on.restored(job_ids=[backup.job_id])
    failed(again, "what was recovered is not what was stored", "pveplug ir discard")
    assert await status_of(on.vm) == "paused"
    said = await pveplug(world, "ir", "discard", "--vmid", str(VMID), "--yes")
    assert said[0] == 0, said[1]
    await on.nothing_left()


async def test_without_restore_objects_the_vm_starts_when_everything_is_here(
    on: Stage,
) -> None:
    world = on.world
    world.damage("object")
    backup = await world.backup("vmid=100")
    assert backup.ok, backup.text
    world.damage("")
    job = await on.restored(job_ids=[backup.job_id])
    assert "the VM starts when everything is here" in job.text
    assert "8.0 MiB of 8.0 MiB are here" in job.text, job.text
    await on.right(on.chain.disks)


async def test_a_disk_that_grew_and_one_for_firmware_are_what_they_were(
    on: Stage,
) -> None:
    world = on.world
    disks: dict[str, Path | str] = {
        "scsi0": noise(world.base / "g.raw", 2 * MIB, 9),
        "efidisk0": "local:1,efitype=4m,pre-enrolled-keys=0",
    }
    vm = await world.site.create_vm(
        102, {**BARE, "machine": "q35", "bios": "ovmf"}, disks=disks
    )
    # In the store's event log, which the firmware leaves alone.
    mark = b"variables as they were backed up"
    with vm.disk_path("efidisk0").open("r+b") as file:
        file.seek(EVENT_LOG)
        file.write(mark)
    try:
        name = await world.define("vmid=102")
        full = await world.run(name, "Full")
        assert full.ok, full.text
        path = vm.disk_path("scsi0")
        subprocess.run(["qemu-img", "resize", "-q", str(path), "3M"], check=True)
        vm.set(scsi0=vm.conf.values["scsi0"].replace("size=2M", "size=3M"))
        await vm.start()
        await vm.qemu_io("scsi0", "write -P 5 2560k 128k")
        incremental = await world.run(name, "Incremental")
        assert incremental.ok, incremental.text
        await vm.stop()
        wanted = contents(vm, world.base)
        job = await on.restored(job_ids=[full.job_id, incremental.job_id])
        assert job.ok, job.text
        assert on.vm.running
        with on.vm.disk_path("efidisk0").open("rb") as file:
            file.seek(EVENT_LOG)
            assert file.read(len(mark)) == mark
        await on.right(wanted)
    finally:
        await vm.stop()
        await destroy_vm(
            world.site, world.site.node, 102, skiplock=True, unreferenced=True,
            purge=True,
        )  # fmt: skip
