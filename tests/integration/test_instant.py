# SPDX-License-Identifier: Apache-2.0
"""Instant recovery over real QEMU and real Bacula: the VM runs while its disks come."""

from __future__ import annotations

import asyncio

import pytest

from tests.lab import demo_ir
from tests.support import truth
from tests.support.requires import GUEST, requires, requires_file
from tests.support.world import BACULA_9, World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    requires_file(GUEST / "boot.raw"),
]


async def test_a_lost_vm_runs_from_its_chain_writes_moves_and_stands_alone() -> None:
    """``./dev demo ir``, whose every step is a check."""
    await demo_ir.tell()


OPTIONS = {"mode": "instant", "restore_vmid": "110", "restore_storage": "local2"}
WAYS = {
    "the console's menu": (None, {"where": "/ignored", "plugin_options": OPTIONS}),
    "Bacula 9.6": (
        BACULA_9,
        {"where": "/@pve/" + ",".join(f"{k}={v}" for k, v in OPTIONS.items())},
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_however_it_is_asked_for_a_vm_is_recovered_the_same(way: str) -> None:
    prefix, asked = WAYS[way]
    async with World(prefix=prefix) as world:
        vm = await world.site.create_vm(
            100, {"name": "small"}, disks={"scsi0": "8M", "virtio1": "4M"}
        )
        await vm.start()
        await vm.qemu_io("scsi0", "write -P 17 1M 3M")
        await vm.qemu_io("virtio1", "write -P 18 3M 1M")
        await world.add_job("nightly", "vmid=100")
        job = await world.run("nightly")
        assert job.termination == "Backup OK", job.text
        await vm.stop()
        wanted = {
            key: await asyncio.to_thread(
                truth.sha256_of_image, vm.disk_path(key), "qcow2"
            )
            for key in ("scsi0", "virtio1")
        }
        job = await world.restore(job="nightly", **asked)
        assert job.termination == "Restore OK", f"{job.text}\n{world.backend_log}"
        recovered = world.site.vm(110)
        assert recovered.running
        await recovered.stop()
        for key, digest in wanted.items():
            path = recovered.disk_path(key)
            assert recovered.conf.values[key].startswith("local2:")
            form = path.suffix.removeprefix(".")
            found = await asyncio.to_thread(truth.sha256_of_image, path, form)
            assert found == digest, key
