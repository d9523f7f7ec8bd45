# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: what the VM, its guest and its storages are up to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pveplug.access import open_api
from pveplug.config_parse import parse_backup
from pveplug.node import load_node
from pveplug.pve import PveRefusalError, Reason
from pveplug.qmp import Qmp, qmp_session
from tests.integration.conftest import SlowStore
from tests.lab.vm import LabVm
from tests.support.error_jobs import (
    WITHOUT_GUEST,
    ErrorWorld,
    failed,
    informed,
    messages,
    one_line,
    warned,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MiB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[ErrorWorld]:
    async with ErrorWorld() as world:
        for vmid, config in ((100, WITHOUT_GUEST), (101, {"agent": "1"})):
            vm = await world.site.create_vm(vmid, config, disks={"scsi0": "64M"})
            await vm.start()
            await vm.qemu_io("scsi0", "write -P 7 0 24M")
        yield world


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(world: ErrorWorld) -> AsyncIterator[None]:
    yield
    world.site.faults.clear()
    await world.assert_nothing_left()


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


async def reading(vm: LabVm) -> None:
    """Wait until the disks of a VM are being exported."""
    async with asyncio.timeout(30):
        while not vm.running or not await vm.qmp("query-block-exports"):
            await asyncio.sleep(0.1)


# --- who else has the VM --------------------------------------------------------------


async def test_a_locked_vm_names_the_holder(world: ErrorWorld) -> None:
    locks = {
        "snapshot": "VM is locked (snapshot) by a snapshot that is being taken. "
        "Remedy: wait for that task; if none runs any more: qm unlock 100",
        "backup": "VM is locked (backup) by vzdump or another backup program",
    }
    vm = world.site.vm(100)
    for lock, sentence in locks.items():
        vm.set(lock=lock)
        try:
            failed(
                await world.backup("vmid=100 lock_wait=1"), "VM 100 (lock): ", sentence
            )
            assert vm.conf.values["lock"] == lock, "somebody else's lock was taken away"
        finally:
            vm.set(lock=None)


async def test_a_vm_that_another_job_of_ours_has_names_that_job(
    world: ErrorWorld,
) -> None:
    first = await world.define("vmid=100 pre_freeze_cmd='/bin/sleep 6'")
    second = await world.define("vmid=100 lock_wait=1")
    first_id = await world.start(first)
    await until(lambda: bool(world.site.vm(100).conf.values.get("lock")))
    result = await world.wait(await world.start(second))
    failed(
        result,
        f"VM 100 (lock): job {first}.",
        "is working on this VM and did not end in 1 s",
    )
    informed(await world.wait(first_id), "VM 100 (vm100) is in this job")


async def test_a_vm_that_is_gone_meanwhile_fails_alone(world: ErrorWorld) -> None:
    await world.site.create_vm(150, WITHOUT_GUEST, disks={"scsi0": "8M"})
    world.site.faults.delay("GET", r"/qemu/150/config", 1.5)
    job_id = await world.start(await world.define("vmid=150"))
    calls = world.site.node.proxy.requests
    await until(lambda: any("/qemu/150/config" in path for _, path, _ in calls))
    await world.destroy(150)
    result = await world.wait(job_id)
    failed(result, "VM 150 (lock): the VM is gone, or another node has it now")


async def test_the_nbd_server_in_use_by_somebody_else_is_left_alone(
    world: ErrorWorld,
) -> None:
    vm, path = world.site.vm(100), world.base / "foreign.nbd"
    address = {"type": "unix", "data": {"path": str(path)}}
    await vm.qmp("nbd-server-start", addr=address)
    try:
        # A migration starts the server first and exports its disks after that.
        failed(
            await world.backup("vmid=100"),
            "VM 100 (export): QEMU's only NBD server is in use by another operation",
            "Remedy: ",
        )
        blocks = await vm.qmp("query-block")
        node = next(b["inserted"]["node-name"] for b in blocks if "inserted" in b)
        await vm.qmp(
            "block-export-add", id="migration", type="nbd", **{"node-name": node}
        )
        failed(
            await world.backup("vmid=100"),
            "VM 100 (prepare): QEMU's only NBD server is in use by another operation "
            "(migration); wait for it to end",
        )
        assert [e["id"] for e in await vm.qmp("query-block-exports")] == ["migration"]
    finally:
        await vm.qmp("nbd-server-stop")


async def test_a_disk_cannot_be_resized_while_it_is_read(world: ErrorWorld) -> None:
    plugin = world.plugin("vmid=100")
    config, _ = parse_backup(plugin, node=load_node(world.node_file))
    name = await world.define("vmid=100 pre_freeze_cmd='/bin/sleep 2'")
    job_id = await world.start(name)
    await until(lambda: bool(world.site.vm(100).conf.values.get("lock")))
    async with await open_api(config.connection) as api:
        with pytest.raises(PveRefusalError) as refused:
            await api.task(
                "PUT", "/nodes/pve1/qemu/100/resize", {"disk": "scsi0", "size": "+8M"}
            )
    assert refused.value.reason is Reason.LOCKED
    informed(await world.wait(job_id), "VM 100 (vm100) is in this job")


# --- disks ----------------------------------------------------------------------------


async def test_a_disk_that_qemu_does_not_have_is_named(world: ErrorWorld) -> None:
    vm = world.site.vm(100)
    vm.set(scsi7=vm.conf.values["scsi0"])
    try:
        result = await world.backup("vmid=100")
    finally:
        vm.set(scsi7=None)
    failed(
        result,
        "VM 100 disk scsi7 (prepare): QEMU has no such disk, though the VM's "
        "configuration names it",
        "Remedy: restart the VM, or leave the disk out with exclude_disk",
    )


async def test_disks_left_out_are_said_and_a_vm_without_any_is_warned_of(
    world: ErrorWorld,
) -> None:
    await world.site.create_vm(
        151,
        {**WITHOUT_GUEST, "ide2": "none,media=cdrom"},
        disks={"scsi0": "8M", "scsi1": "8M", "scsi2": "8M"},
    )
    vm = world.site.vm(151)
    vm.set(scsi1=vm.conf.values["scsi1"] + ",backup=0")
    vm.set(unused0="local:151/vm-151-disk-9.qcow2")
    await world.site.create_vm(152, WITHOUT_GUEST)
    some, none = await asyncio.gather(
        world.backup("vmid=151 exclude_disk=scsi2,sata*"), world.backup("vmid=152")
    )
    informed(some, "VM 151 scsi1: left out: has backup=0")
    informed(some, "VM 151 scsi2: left out: is excluded by exclude_disk=scsi2")
    informed(some, "VM 151 ide2: left out: is a CD-ROM drive")
    informed(some, "VM 151 unused0: left out: is not attached to the VM")
    warned(some, "exclude_disk=sata* matches no disk of VM 151")
    warned(none, "VM 152 has no disk to back up, only its configuration")


async def test_a_restarted_vm_is_read_whole_and_says_why(world: ErrorWorld) -> None:
    name = await world.define("vmid=100")
    assert (await world.run(name, "Full")).ok
    vm = world.site.vm(100)
    await vm.stop()
    await vm.start()
    result = await world.run(name, "Incremental")
    warned(result, "VM 100 scsi0: read whole, not incrementally: ")


async def test_a_damaged_file_of_digests_costs_a_whole_image(
    world: ErrorWorld,
) -> None:
    name = await world.define("vmid=100")
    full = await world.run(name, "Full")
    assert full.ok
    digests = world.site.root / "ph/lib/digests/100"
    (file,) = digests.glob(f"*/scsi0.{full.name}")
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    vm = world.site.vm(100)
    await vm.stop()
    await vm.start()
    result = await world.run(name, "Incremental")
    warned(result, "VM 100 scsi0: not compared, all of it is sent: ", "it is damaged")
    assert "compared with the digests" not in result.text


async def test_digests_that_cannot_be_kept_are_warned_of(world: ErrorWorld) -> None:
    digests = world.site.root / "ph/lib/digests"
    await asyncio.to_thread(shutil.rmtree, digests / "100", ignore_errors=True)
    (digests / "100").write_text("in the way")
    try:
        result = await world.backup("vmid=100")
    finally:
        (digests / "100").unlink()
    warned(result, "VM 100 scsi0: no digests are kept of this job: ")


# --- room -----------------------------------------------------------------------------


async def test_a_full_scratch_store_ends_the_backup_and_not_the_guest(
    world: ErrorWorld, small_disk: Callable[[str], Path]
) -> None:
    vm = world.site.vm(100)
    name = await world.define(
        f"vmid=100 mechanism=cbw bwlimit=4096 scratch_dir={small_disk('2M')}"
    )
    job_id = await world.start(name)
    await reading(vm)
    await asyncio.sleep(0.5)
    for at in range(16, 24):  # old content that is still to be read
        await vm.qemu_io("scsi0", f"write -P 9 {at}M 1M")
    result = await world.wait(job_id)
    failed(
        result,
        "VM 100 disk scsi0 (read): the point in time broke: its scratch store was full",
        "the guest is unharmed",
        "Remedy: more or faster scratch space",
    )
    await vm.qemu_io("scsi0", "read -P 9 16M 8M")


async def test_a_fleecing_backup_without_room_for_the_worst_case_is_refused(
    world: ErrorWorld, small_disk: Callable[[str], Path]
) -> None:
    vm, where = world.site.vm(100), small_disk("64M")
    result = await world.backup(f"vmid=100 mechanism=fleece scratch_dir={where}")
    failed(
        result,
        f"VM 100 disk scsi0 (scratch): scratch needs 65.0 MiB in {where}, where ",
        "are free: were it to run full",
        "The guest was not touched",
        "Remedy: set scratch_dir or fleecing_storage to a larger place",
    )
    await vm.qemu_io("scsi0", "write -P 9 16M 8M")


async def test_a_full_store_does_not_hurt_the_guest_of_a_fleecing_backup(
    world: ErrorWorld, small_disk: Callable[[str], Path]
) -> None:
    vm, where = world.site.vm(100), small_disk("80M")
    name = await world.define(
        f"vmid=100 mechanism=fleece bwlimit=8192 scratch_dir={where}"
    )
    job_id = await world.start(name)
    await reading(vm)
    with (where / "somebody else's").open("wb") as file:
        with contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(MiB))
    assert os.statvfs(where).f_bavail == 0
    for at in range(0, 24, 2):
        await vm.qemu_io("scsi0", f"write -P 8 {at}M 2M")
    informed(await world.wait(job_id), "VM 100 (vm100) is in this job")
    await vm.qemu_io("scsi0", "read -P 8 0 24M")


async def test_a_fleecing_backup_ends_before_its_scratch_store_is_full(
    world: ErrorWorld, file_system: Callable[[str, int], Path]
) -> None:
    vm = world.site.vm(100)
    where = file_system("ext2", 345)  # it can't reserve
    name = await world.define(
        f"vmid=100 mechanism=fleece bwlimit=2048 scratch_dir={where}"
    )
    job_id = await world.start(name)
    await reading(vm)
    (where / "filler").write_bytes(bytes(96 * MiB))
    failed(
        await world.wait(job_id),
        "VM 100 (scratch): only ",
        f"left in {where}; the backup is ended before a full scratch store hurts the "
        "guest",
        "Remedy: set scratch_dir or fleecing_storage to a larger place",
    )
    await vm.qemu_io("scsi0", "write -P 9 16M 8M")


@pytest.mark.parametrize("copying", [False, True], ids=["idle", "copying"])
async def test_a_scratch_store_that_stalls_ends_a_fleecing_backup(
    world: ErrorWorld, file_system: Callable[[str, int], Path], copying: bool
) -> None:
    vm, where = world.site.vm(100), file_system("ext4", 128)
    name = await world.define(
        "vmid=100 mechanism=fleece cbw_timeout=2 bwlimit=1024 lock_wait=0 "
        f"scratch_dir={where}"
    )
    job_id = await world.start(name)
    await reading(vm)
    subprocess.run(["fsfreeze", "-f", where], check=True)
    try:
        if copying:  # this write waits for the store whatever anybody does
            await vm.qemu_io("scsi0", "aio_write -q -P 6 16M 8M")
        async with asyncio.timeout(30):
            while "does not answer" not in await world.said(job_id):
                await asyncio.sleep(0.2)
        if not copying:
            await asyncio.sleep(0.5)
            began = time.monotonic()
            await vm.qemu_io("scsi0", "write -q -P 6 16M 8M")
            assert time.monotonic() - began < 1, "the guest still waits for the store"
    finally:
        subprocess.run(["fsfreeze", "-u", where], check=True)
    began = time.monotonic()
    await vm.qmp("query-status")
    assert time.monotonic() - began < 2, "the guest waits longer than the store"
    failed(
        await world.wait(job_id),
        f"VM 100 (scratch): the scratch store {where} has not answered for 2 s, and "
        "guest writes wait for it; the backup is ended",
        "Remedy: see what is wrong with it",
    )
    await vm.qemu_io("scsi0", "read -P 6 16M 8M")


@contextlib.asynccontextmanager
async def guest_of(world: ErrorWorld, vmid: int) -> AsyncIterator[Qmp]:
    """Start a VM with 24 MiB of data; its guest is who has a monitor of its own."""
    socket = world.base / f"guest{vmid}"
    args = f"-chardev socket,id=guest,path={socket},server=on,wait=off"
    args += " -mon chardev=guest,mode=control"
    vm = await world.site.create_vm(
        vmid, {**WITHOUT_GUEST, "args": args}, disks={"scsi0": "64M"}
    )
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 7 0 24M")
    # The firmware finds no system and resets all devices again and again, which waits
    # for whatever is under way.
    await vm.qmp("stop")
    async with qmp_session(str(socket)) as guest:
        yield guest
    await vm.stop()


async def took(guest: Qmp, command: str) -> float:
    """Let the guest write; return the seconds it waited for that."""
    began = time.monotonic()
    line = {"command-line": f'qemu-io -d scsi0 "{command}"'}
    assert not await guest.execute("human-monitor-command", line)
    return time.monotonic() - began


@pytest.mark.alone  # another lane's fsyncs hold the store's disk, too
async def test_a_slow_scratch_store_holds_the_guest_no_longer_than_the_timeout(
    world: ErrorWorld, slow_store: Callable[..., SlowStore]
) -> None:
    store = slow_store(128, write_s=0.1)
    name = await world.define(
        "vmid=153 mechanism=cbw cbw_timeout=1 bwlimit=1024 lock_wait=0 "
        f"scratch_dir={store.path}"
    )
    async with guest_of(world, 153) as guest:
        job_id = await world.start(name)
        await reading(world.site.vm(153))
        waited = [await took(guest, "write -q -P 6 16M 8M")]
        ended = asyncio.create_task(world.wait(job_id))
        # What was begun to be copied takes the store long; the job ends meanwhile.
        while not ended.done():
            waited.append(await took(guest, "write -q -P 5 40M 4k"))
            await asyncio.sleep(0.02)
        failed(
            await ended,
            "VM 153 disk scsi0 (",
            "the point in time broke: its scratch store was full or too slow",
            "the guest is unharmed",
        )
        await took(guest, "read -q -P 6 16M 8M")
    assert max(waited) < 2, (sorted(waited)[-4:], world.backend_log[-3000:])


@pytest.mark.alone  # another lane's fsyncs hold the store's disk, too
async def test_a_slow_scratch_store_holds_a_write_while_it_is_fleeced_and_no_other(
    world: ErrorWorld, slow_store: Callable[..., SlowStore]
) -> None:
    store = slow_store(128, write_s=0.1)
    name = await world.define(
        "vmid=154 mechanism=fleece cbw_timeout=3 bwlimit=2048 lock_wait=0 "
        f"scratch_dir={store.path}"
    )
    async with guest_of(world, 154) as guest:
        job_id = await world.start(name)
        await reading(world.site.vm(154))
        first = [await took(guest, f"write -q -P 6 {at}M 64k") for at in range(16, 20)]
        again = [await took(guest, f"write -q -P 5 {at}M 64k") for at in range(16, 20)]
        informed(await world.wait(job_id), "VM 154 (vm154) is in this job")
        await took(guest, "read -q -P 5 16M 64k")
    # What the store needs for a cluster and its tables, more for the first; no limit.
    assert all(0.1 < waited < 20 for waited in first), first
    assert max(again) < min(first), (first, again)


async def test_scratch_that_cannot_be_made_says_where_and_why(
    world: ErrorWorld,
) -> None:
    storage = world.site.storages["local2"]
    old, storage.total = storage.total, MiB
    try:
        full, missing = await asyncio.gather(
            world.backup("vmid=100 fleecing_storage=local2"),
            world.backup("vmid=101 scratch_dir=/proc/nowhere"),
        )
    finally:
        storage.total = old
    failed(full, "VM 100", "No space left on device", "Free space on that storage")
    failed(
        missing,
        "VM 101",
        "cannot use the scratch directory /proc/nowhere",
        "Remedy: set scratch_dir or fleecing_storage",
    )


def slow_guest(vm: LabVm) -> None:
    """Have QEMU say that the guest's requests take 50 ms."""
    counted = 0

    async def answer(command: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal counted
        if command["execute"] != "query-blockstats":
            return None
        counted += 1  # each second one request more, of 50 ms
        stats = {f"{kind}_operations": 0 for kind in ("rd", "wr", "flush")}
        stats |= {f"{kind}_total_time_ns": 0 for kind in ("rd", "wr", "flush")}
        stats |= {"wr_operations": counted, "wr_total_time_ns": counted * 50_000_000}
        found = [{"node-name": "drive-scsi0", "stats": stats}]
        return {"return": found, "id": command["id"]}

    vm.machine.qmp_relay.answer = answer


async def test_a_guest_over_its_latency_budget_is_read_gently(
    world: ErrorWorld,
) -> None:
    vm = world.site.vm(100)
    slow_guest(vm)
    try:
        result = await world.backup("vmid=100 latency_budget_ms=20 bwlimit=4096")
    finally:
        vm.machine.qmp_relay.answer = None
    informed(
        result,
        "VM 100: the guest's requests take 50 ms (latency_budget_ms=20); the backup "
        "reads with 4 requests in flight",
    )
    informed(result, "VM 100: latency budget 20 ms: ", "at worst 50 ms")


async def test_a_guest_over_its_latency_budget_is_compared_gently(
    world: ErrorWorld,
) -> None:
    vm = world.site.vm(100)
    name = await world.define("vmid=100 latency_budget_ms=20 bwlimit=4096")
    assert (await world.run(name, "Full")).ok
    await vm.stop()
    await vm.start()
    slow_guest(vm)
    try:
        result = await world.run(name, "Incremental")
    finally:
        vm.machine.qmp_relay.answer = None
    # Nothing has changed: all the job reads, it reads to compare.
    informed(result, "VM 100 scsi0: whole (", "compared with the digests", "dirty 0 B")
    informed(result, "the backup reads with 4 requests in flight")
    informed(result, "VM 100: latency budget 20 ms: ", "at worst 50 ms")


# --- the guest ------------------------------------------------------------------------


async def test_no_agent_with_quiesce_yes_degrades_with_a_warning(
    world: ErrorWorld,
) -> None:
    world.site.faults.agent(101, "off")
    missing, silent, automatic = await asyncio.gather(
        world.backup("vmid=100 quiesce=yes"),
        world.backup("vmid=101 quiesce=yes"),
        world.backup("vmid=100"),
    )
    warned(
        missing,
        "VM 100: not frozen: the VM has no guest agent configured (agent: 1); the "
        "backup is crash-consistent",
    )
    warned(silent, "VM 101: not frozen: ", "the backup is crash-consistent")
    informed(automatic, "VM 100: not frozen: the VM has no guest agent configured")


async def test_an_agent_that_hangs_in_the_freeze_is_not_waited_for(
    world: ErrorWorld,
) -> None:
    world.site.faults.agent(101, "hang")
    result = await world.backup("vmid=101 quiesce=yes quiesce_timeout=3")
    warned(
        result,
        "VM 101: the guest agent did not freeze: no answer in 3 s; the backup is "
        "crash-consistent",
    )
    # PVE's own call holds the agent's channel for ten minutes more.
    again = await world.backup("vmid=101")
    warned(
        again,
        "VM 101: after an earlier job that was cut off: its guest agent can't be asked "
        "whether the guest is frozen",
        "Remedy: restart the agent in the guest, or reset the VM",
    )
    vm = world.site.vm(101)
    await vm.stop()
    world.site.faults.agent(101, "fake")
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 7 0 24M")
    informed(await world.backup("vmid=101 quiesce=yes"), "VM 101 scsi0: ")


async def test_a_vm_stopped_in_the_job_fails_it(world: ErrorWorld) -> None:
    vm = world.site.vm(100)
    name = await world.define("vmid=100 bwlimit=4096")
    job_id = await world.start(name)
    await reading(vm)
    await vm.stop()
    result = await world.wait(job_id)
    failed(
        result,
        "VM 100 disk scsi0 (read): ",
        "Remedy: see whether the VM was stopped or QEMU died",
    )
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 7 0 24M")
    result = await world.run(name, "Incremental")
    informed(result, "VM 100 (vm100) is in this job")


# --- hooks ----------------------------------------------------------------------------


async def test_a_hook_that_fails_or_hangs_is_named(world: ErrorWorld) -> None:
    program = world.base / "hook"
    program.write_text("#!/bin/sh\necho database is not ready\nexit 4\n")
    program.chmod(0o700)
    broken, hanging = await asyncio.gather(
        world.backup(f"vmid=100 pre_freeze_cmd={program}"),
        world.backup("vmid=101 pre_freeze_cmd='/bin/sleep 60' hook_timeout=1"),
    )
    failed(
        broken,
        f"VM 100 (pre_freeze_cmd): {program} ended with status 4: database is not "
        "ready. Remedy: see what",
    )
    failed(
        hanging,
        "VM 101 (pre_freeze_cmd): /bin/sleep ran longer than 1 s and was killed",
        "Remedy: mend the program or raise hook_timeout",
    )
    result = await world.backup(
        f"vmid=100 pre_freeze_cmd=/bin/true post_thaw_cmd={program}"
    )
    warned(result, "VM 100 (post_thaw_cmd): ", "ended with status 4")


# --- several VMs ----------------------------------------------------------------------


async def test_one_vm_that_fails_does_not_keep_others_from_their_backup(
    world: ErrorWorld,
) -> None:
    world.site.vm(100).set(lock="migrate")
    try:
        result = await world.backup("vmid=100,101 lock_wait=0")
    finally:
        world.site.vm(100).set(lock=None)
    failed(result, "1 of 2 VMs were not backed up: 100 (vm100)")
    one_line(result, "Error: VM 100 (lock): VM is locked (migrate) by a migration")
    one_line(result, "VM 101 (vm101) is in this job")
    assert len([m for m in messages(result) if m.startswith("Fatal error: ")]) == 1
