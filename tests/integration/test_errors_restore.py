# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: restores that can't be, and leave nothing behind."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab import api_cluster
from tests.lab.storage import DirStorage
from tests.support.error_jobs import (
    WITHOUT_GUEST,
    ErrorWorld,
    failed,
    informed,
    warned,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Chain:
    """JobIds of a Full and its Incremental."""

    full: int
    incremental: int

    @property
    def all(self) -> list[int]:
        return [self.full, self.incremental]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[ErrorWorld]:
    async with ErrorWorld(site={"nodes": ("pve1", "pve2")}) as world:
        vm = await world.site.create_vm(
            100,
            {**WITHOUT_GUEST, "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0"},
            disks={"scsi0": "32M"},
        )
        vm.set(args="-S", hostpci0="0000:01:00.0")
        await world.site.create_vm(160, WITHOUT_GUEST, disks={"scsi0": "8M"})
        await world.site.create_vm(161, WITHOUT_GUEST, node="pve2")
        yield world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain(world: ErrorWorld) -> Chain:
    vm = world.site.vm(100)
    vm.set(args=None, hostpci0=None)
    await vm.start()
    vm.set(args="-S", hostpci0="0000:01:00.0")
    await vm.qemu_io("scsi0", "write -P 7 0 12M")
    name = await world.define("vmid=100")
    full = await world.run(name, "Full")
    await vm.qemu_io("scsi0", "write -P 8 4M 1M")
    incremental = await world.run(name, "Incremental")
    assert full.ok, full.text
    assert incremental.ok, incremental.text
    return Chain(full.job_id, incremental.job_id)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(world: ErrorWorld, chain: Chain) -> AsyncIterator[None]:
    before = world.inventory()
    yield
    world.site.faults.clear()
    world.damage("")
    await world.assert_nothing_left()
    assert world.inventory() == before


async def test_wrong_restore_options_are_named_before_anything_is_touched(
    world: ErrorWorld, chain: Chain
) -> None:
    cases = {
        "restore_vmdi=200": "where=: unknown parameter restore_vmdi; did you mean "
        "restore_vmid?",
        "restore_vmid=zwei": "where=: restore_vmid=zwei",
        "vmid=100": "where=: vmid cannot be given at restore time",
        "overwrite=yes": "overwrite=yes needs restore_vmid",
    }
    results = await asyncio.gather(
        *(world.restored(options, chain.all) for options in cases)
    )
    for result, sentence in zip(results, cases.values(), strict=True):
        failed(result, sentence)


async def test_a_storage_that_is_not_there_is_named_with_those_that_are(
    world: ErrorWorld, chain: Chain
) -> None:
    result = await world.restored("restore_storage=nowhere", chain.all)
    failed(result, "disk scsi0: no storage nowhere", "it has local, local2, thick")


async def test_an_existing_vm_is_not_replaced_unless_that_is_said_and_safe(
    world: ErrorWorld, chain: Chain
) -> None:
    cases = {
        "restore_vmid=100": "VM 100 (restore): VM 100 (vm100) exists. Remedy: choose "
        "another restore_vmid",
        "restore_vmid=100,overwrite=yes": "VM 100 (restore): the VM runs; only a "
        "stopped VM is overwritten. Remedy: shut it down first",
        "restore_vmid=160,overwrite=yes": "VM 160 (restore): the VM that has this id "
        "now is another one (SMBIOS UUID ",
        "restore_vmid=161,overwrite=yes": "VM 161 (restore): the VM is on node pve2",
        "disks=scsi0,restore_vmid=999": "VM 999 (restore): disks=scsi0 attaches to an "
        "existing VM, and there is no VM 999",
    }
    for options, sentence in cases.items():
        failed(await world.restored(options, chain.all), sentence)


async def test_a_chain_without_a_member_names_the_missing_job(
    world: ErrorWorld, chain: Chain
) -> None:
    full = world.bacula.result(chain.full).name
    result = await world.restored("restore_vmid=200", [chain.incremental])
    failed(
        result,
        "VM 100 (restore): ",
        f"builds on job {full}, which is missing",
        "Remedy: restore with 'select current'",
    )


async def test_settings_that_cannot_be_restored_are_named_with_the_reason(
    world: ErrorWorld, chain: Chain
) -> None:
    result = await world.restored("restore_vmid=201", chain.all)
    informed(result, "args is not taken over: ")
    informed(result, "hostpci0 is not taken over: ")
    await world.destroy(201)


async def test_a_target_storage_that_is_full_gets_nothing(
    world: ErrorWorld, chain: Chain, small_disk: Callable[[str], Path]
) -> None:
    storage = world.site.storages["local2"]
    old, storage.total = storage.total, 1 << 20
    try:
        result = await world.restored("restore_storage=local2", chain.all)
    finally:
        storage.total = old
    failed(
        result,
        "disk scsi0 (allocate): ",
        "No space left on device",
        "Remedy: make room on local2 or name another restore_storage",
    )
    tiny = DirStorage("tiny", small_disk("4M"))
    world.site.storages["tiny"] = tiny
    try:
        result = await world.restored(
            "restore_storage=tiny,disk_format=raw,restore_vmid=202", chain.all
        )
        assert not tiny.volumes()
    finally:
        del world.site.storages["tiny"]
    failed(
        result,
        "VM 202 disk scsi0 (write): No space left on storage tiny: ",
        "Remedy: free space there or name another restore_storage",
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("data", "the image's digests are not those of its manifest; what Bacula"),
        ("header", "/scsi0.qcow2: qcow2 at byte 0: this is not a qcow2 image"),
        ("truncated", "the stream ends here of "),
    ],
)
async def test_a_damaged_image_is_told_and_no_vm_is_made_of_it(
    world: ErrorWorld, chain: Chain, damage: str, sentence: str
) -> None:
    world.damage(damage)
    backup = await world.backup("vmid=100")
    assert backup.ok, backup.text
    world.damage("")
    result = await world.restored("restore_vmid=203", [backup.job_id])
    failed(
        result,
        "VM 203 disk scsi0 (write): ",
        sentence,
        "Remedy: the backup is damaged: try another JobId",
    )


async def test_an_image_that_builds_on_another_than_it_should_is_refused(
    world: ErrorWorld, chain: Chain
) -> None:
    name = await world.define("vmid=100")
    full = await world.run(name, "Full")
    world.damage("parent")
    bad = await world.run(name, "Incremental")
    assert full.ok, full.text
    assert bad.ok, bad.text
    world.damage("")
    failed(
        await world.restored("restore_vmid=206", [full.job_id, bad.job_id]),
        "VM 206 disk scsi0 (write): ",
        f"job {bad.name}: the image of scsi0 names ../",
        f"its manifest says ../{full.name}/scsi0.qcow2: it is the image of another job",
    )


async def test_a_damaged_small_file_is_told_with_its_name(
    world: ErrorWorld, chain: Chain
) -> None:
    world.damage("config")
    backup = await world.backup("vmid=100")
    assert backup.ok, backup.text
    world.damage("")
    failed(
        await world.restored("restore_vmid=207", [backup.job_id]),
        f"job {backup.name}: vm.conf: it is not the text that the manifest has of it",
        "try another JobId, or leave this file out of the selection",
    )


async def test_a_node_that_lost_the_parents_manifest_says_so(
    world: ErrorWorld, chain: Chain
) -> None:
    name = await world.define("vmid=100")
    full = await world.run(name, "Full")
    assert full.ok, full.text
    manifests = Path(world.site.node.root / "ph/lib/manifests")
    shutil.rmtree(manifests)
    manifests.write_text("in the way")
    try:
        result = await world.run(name, "Incremental")
    finally:
        manifests.unlink()
    informed(
        result,
        f"VM 100: this node does not know the manifest of job {full.name}; this job's "
        "does not vouch for it",
    )
    warned(
        result,
        f"VM 100: cannot write below {manifests.parent}/manifests: ",
        "the next job's manifest will not vouch for this one. Remedy: make room there",
    )


async def test_a_damaged_restore_object_is_told_and_the_images_are_replayed(
    world: ErrorWorld,
) -> None:
    world.damage("object")
    backup = await world.backup("vmid=100")
    assert backup.ok, backup.text
    world.damage("")
    result = await world.restored("restore_vmid=204", [backup.job_id])
    warned(result, "bytes is damaged; where that leaves a gap the images are replayed")
    await world.destroy(204)


async def test_a_restore_to_another_proxmox_ve_than_known_is_warned_of(
    world: ErrorWorld, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"version": "10.0.1", "release": "10.0", "repoid": "0123456789abcdef"}
    monkeypatch.setattr(api_cluster, "version_of", lambda _: answer)
    result = await world.restored("restore_vmid=205", chain.all)
    warned(result, "Proxmox VE 10.0.1 is newer than this plug-in knows (8.x and 9.x)")
    await world.destroy(205)
