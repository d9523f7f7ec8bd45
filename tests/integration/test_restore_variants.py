# SPDX-License-Identifier: Apache-2.0
"""Ways to choose what is backed up and where it comes back, through a real Bacula."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from pveplug.vmconfig import parse_config
from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support.ledger import Ledger
from tests.support.requires import requires
from tests.support.story import SIZES, backup, holds, restore, written_vm
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

MAC = "BC:24:11:00:00:01"


class Original:
    """A VM with a Full and an Incremental, and what its disks held at the second."""

    def __init__(
        self, vm: LabVm, ledger: Ledger, jobs: list[JobResult], state: dict[str, bytes]
    ) -> None:
        self.vm = vm
        self.ledger = ledger
        self.jobs = jobs
        self.state = state


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def original(world: World) -> Original:
    net = f"virtio={MAC},bridge=vmbr0,firewall=1"
    vm, ledger = await written_vm(world, 100, name="shop", net0=net)
    await world.add_job("shop", "vmid=100")
    jobs = [await backup(world, "shop")]
    await ledger.some(20)
    jobs.append(await backup(world, "shop", "Incremental"))
    await vm.stop()
    return Original(vm, ledger, jobs, ledger.state(ledger.count))


def config(vm: LabVm) -> dict[str, str]:
    """Return the configuration as it lies in /etc/pve."""
    return dict(parse_config(vm.node.conf_path(vm.vmid).read_text()).current)


async def test_options_of_the_where_word_choose_storage_bridge_format_and_mac(
    world: World, original: Original
) -> None:
    words = (
        "restore_vmid=200,restore_name=copy,storage_map=local:local2,"
        "bridge_map=vmbr0:vmbr1,mac=new,disk_format=qcow2"
    )
    await restore(world, where=f"/@pve/{words}", job="shop")
    vm = world.site.vm(200)
    found = config(vm)
    assert found["name"] == "copy"
    assert "bridge=vmbr1" in found["net0"]
    assert MAC not in found["net0"]
    assert "firewall=1" in found["net0"]
    for key in SIZES:
        assert re.match(r"local2:200/\S+\.qcow2,", found[key]), found[key]
    await holds(vm, original.state)


async def test_options_of_the_console_menu_do_the_same(
    world: World, original: Original
) -> None:
    options = {"restore_vmid": "210", "disk_format": "raw", "bridge_map": "vmbr1"}
    await restore(world, where="/", job="shop", plugin_options=options)
    vm = world.site.vm(210)
    found = config(vm)
    assert MAC in found["net0"], "mac=keep"
    assert "bridge=vmbr1" in found["net0"]
    for key in SIZES:
        assert re.match(r"local:210/\S+\.raw,", found[key]), found[key]
    await holds(vm, original.state)


async def test_a_single_disk_is_attached_to_a_vm_beside_its_own(
    world: World, original: Original
) -> None:
    vm, ledger = await written_vm(world, 220, start=False)
    before = config(vm)
    await restore(world, where="/@pve/disks=scsi1,restore_vmid=220", job="shop")
    after = config(vm)
    (fresh,) = set(after) - set(before)
    assert fresh.startswith("scsi")
    assert {key: after[key] for key in before} == before
    await holds(vm, ledger.state(ledger.count))
    await holds(vm, {fresh: original.state["scsi1"]})


async def test_overwrite_puts_a_vm_back_in_its_place(
    world: World, original: Original
) -> None:
    vm = original.vm
    before = config(vm)
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 66 0 6M")
    await vm.stop()
    where = "/@pve/restore_vmid=same,overwrite=yes"
    await restore(world, where=where, job="shop")
    after = config(vm)
    assert after["smbios1"] == before["smbios1"]
    assert after["net0"] == before["net0"]
    await holds(vm, original.state)
    volumes = [
        row["volid"]
        for storage in world.site.node.storages.values()
        for row in storage.volumes(100)
    ]
    assert len(volumes) == len(SIZES), f"the old ones are still there: {volumes}"


async def test_thick_volumes_are_a_source_and_a_target_whatever_they_held(
    world: World, original: Original
) -> None:
    vm, ledger = await written_vm(
        world, 230, scsi0=f"thick:{8 / 1024}", scsi1=f"thick:{4 / 1024}"
    )
    await world.add_job("thick", "vmid=230")
    await backup(world, "thick")
    await ledger.some(20)
    await backup(world, "thick", "Incremental")
    await vm.stop()
    for vmid, storage in ((231, "thick"), (232, "local")):
        where = f"/@pve/restore_vmid={vmid},restore_storage={storage}"
        await restore(world, where=where, job="thick")
        await holds(world.site.vm(vmid), ledger.state(ledger.count))
    await restore(
        world, where="/@pve/restore_vmid=233,restore_storage=thick", job="shop"
    )
    await holds(world.site.vm(233), original.state)
    assert not list((world.site.root / "dev/thick").iterdir()), "still active"


async def test_accurate_does_not_orphan_a_chain(world: World) -> None:
    vm, ledger = await written_vm(world, 300)
    await world.add_job("accurate", "vmid=300", accurate=True)
    for level in ("Full", "Incremental", "Incremental"):
        await ledger.some(20)
        job = await backup(world, "accurate", level)
        assert "Accurate:               yes" in job.text
    await vm.stop()
    await restore(world, where="/@pve/restore_vmid=301", job="accurate")
    await holds(world.site.vm(301), ledger.state(ledger.count))


@pytest.mark.parametrize(
    ("vmid", "options"),
    [
        (310, "compression = GZIP6\nsignature = SHA1"),
        (320, "compression = LZO\nsignature = MD5"),
    ],
    ids=["gzip", "lzo"],
)
async def test_the_file_set_compresses_and_signs(
    world: World, vmid: int, options: str
) -> None:
    vm, ledger = await written_vm(world, vmid)
    name = f"packed{vmid}"
    await world.add_job(name, f"vmid={vmid}", options=options)
    full = await backup(world, name)
    assert "Software Compression:   None" not in full.text, full.text
    await ledger.some(20)
    await backup(world, name, "Incremental")
    await vm.stop()
    await restore(world, where=f"/@pve/restore_vmid={vmid + 1}", job=name)
    await holds(world.site.vm(vmid + 1), ledger.state(ledger.count))


async def test_two_vms_go_into_parallel_jobs(world: World) -> None:
    made = {vmid: await written_vm(world, vmid) for vmid in (400, 410)}
    for number, vmid in enumerate(made, 1):
        text = f"vmid={vmid} bwlimit=512"
        await world.add_job(f"beside{vmid}", text, storage=number)
    for level in ("Full", "Incremental"):
        job_ids = [
            await asyncio.to_thread(world.bacula.start_job, f"beside{vmid}", level)
            for vmid in made
        ]
        for job_id in job_ids:
            job = await asyncio.to_thread(world.bacula.wait, job_id)
            assert job.termination == "Backup OK", job.text
        if level == "Full":
            rows = world.bacula.query(
                "SELECT max(StartTime) <= min(EndTime) FROM Job WHERE JobId IN (?, ?)",
                *job_ids,
            )
            assert rows == [(1,)], "they ran one after the other"
        for _, ledger in made.values():
            await ledger.some(10 if level == "Full" else 0)
    for vmid, (vm, ledger) in made.items():
        await vm.stop()
        where = f"/@pve/restore_vmid={vmid + 1}"
        await restore(world, where=where, job=f"beside{vmid}")
        await holds(world.site.vm(vmid + 1), ledger.state(ledger.count))


async def test_one_job_has_three_vms_stopped_running_and_a_template(
    world: World,
) -> None:
    running, ledger = await written_vm(world, 500, tags="shop")
    stopped, stopped_ledger = await written_vm(world, 510, tags="shop", start=False)
    template, template_ledger = await written_vm(world, 520, tags="shop", start=False)
    template.set(template="1")
    await world.add_job("three", "tag=shop")
    full = await backup(world, "three")
    assert "3 VMs selected: 500, 510, 520" in full.text, full.text
    assert "the VM is stopped" in full.text, full.text
    assert "the VM is a template" in full.text, full.text
    await ledger.some(20)
    second = await backup_with_warnings(world, "three", "Incremental")
    assert "VM 500 scsi0: changes since" in second.text, second.text
    assert "VM 510 scsi0: whole (the VM is stopped)" in second.text, second.text
    await running.stop()
    where = "/@pve/restore_vmid=500:501;510:511;520:521"
    job = await restore(world, where=where, job="three")
    assert "it is restored as a VM: convert it with qm template" in job.text
    for vmid, one in ((501, ledger), (511, stopped_ledger), (521, template_ledger)):
        await holds(world.site.vm(vmid), one.state(one.count))
    assert not stopped.running


async def backup_with_warnings(world: World, name: str, level: str) -> JobResult:
    job = await world.run(name, level)
    assert job.status == "T", job.text
    assert job.termination.startswith("Backup OK"), job.text
    return job


async def test_an_estimate_tells_files_and_sizes_and_leaves_nothing(
    world: World,
) -> None:
    vm, _ = await written_vm(world, 600)
    await world.add_job("guess", "vmid=600")
    said = await asyncio.to_thread(world.bacula.estimate, "guess")
    for key in SIZES:
        assert f"{key}.qcow2" in said, said
    assert re.search(r"OK estimate files=[1-9]", said), said
    await vm.assert_clean()
    await vm.stop()
