# SPDX-License-Identifier: Apache-2.0
"""The main job elsewhere: older programs, an encrypting Bacula, no plug-in at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.requires import BACULA_9, QEMU_7, requires, requires_file
from tests.support.story import (
    SIZES,
    backup,
    content,
    holds,
    images_hold,
    restore,
    went_well,
    written_vm,
)
from tests.support.world import SHIM, World

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

OLD_QEMU = QEMU_7 / "bin/qemu-system-x86_64"
OLD_IMG = QEMU_7 / "bin/qemu-img"


@requires_file(BACULA_9)
async def test_bacula_9_takes_a_chain_and_gives_it_back() -> None:
    async with World(prefix=BACULA_9) as world:
        vm, ledger = await written_vm(world, 100)
        await world.add_job("nightly", "vmid=100")
        states = []
        for level in ("Full", "Incremental", "Differential"):
            await ledger.some(20)
            states.append(ledger.state(ledger.count))
            job = await backup(world, "nightly", level)
            # Said each time: 9.6 would store such data unencrypted and not tell.
            assert "offsets=no" in job.text
        assert vm.running
        for vmid, job_ids, state in (
            (200, [1], states[0]),
            (201, [1, 2], states[1]),
            (202, [1, 3], states[2]),
        ):
            where = f"/@pve/restore_vmid={vmid}"
            await restore(world, where=where, job_ids=job_ids)
            await holds(world.site.vm(vmid), state)


@requires_file(OLD_QEMU)
async def test_qemu_7_is_fleeced_while_it_writes() -> None:
    site = {"release": "8.4", "qemu": str(OLD_QEMU), "qemu_img": str(OLD_IMG)}
    async with World(site=site) as world:
        vm, ledger = await written_vm(world, 100)
        assert not vm.modern
        await world.add_job("nightly", "vmid=100 bwlimit=4M")
        for level in ("Full", "Incremental", "Incremental"):
            await ledger.some(20)
            earliest = ledger.count
            async with ledger.going_on():
                job = await backup(world, "nightly", level)
            assert job.text.count("; fleece;") == len(SIZES), job.text
        await vm.assert_clean()
        await restore(world, where="/@pve/restore_vmid=200", job="nightly")
        restored = world.site.vm(200)
        images = {
            key: await content(path, path.suffix[1:])
            for key in SIZES
            for path in [restored.disk_path(key)]
        }
        ledger.moment_of(images, earliest, ledger.count)


async def test_what_bacula_encrypts_without_offsets_cannot_be_read() -> None:
    marker = b"\x5a" * 4096
    async with World(bacula={"pki": True}) as world:
        _, ledger = await written_vm(world, 100)
        await ledger.write("scsi0", 1 << 20, 65536, 0x5A)
        await world.add_job("nightly", "vmid=100 offsets=no")
        job = await backup(world, "nightly")
        assert "Encryption:             yes" in job.text
        await ledger.some(20)
        await backup(world, "nightly", "Incremental")
        assert not holding(world.bacula.volumes, marker)
        assert not holding(world.bacula.volumes, b"QFI\xfb")
        await restore(world, where="/@pve/restore_vmid=200", job="nightly")
        await holds(world.site.vm(200), ledger.state(ledger.count))

        # What was looked for would have been found.
        await world.add_job("plain", "vmid=100 exclude_disk=scsi1", storage=2)
        world.bacula.kill("fd")
        conf = world.bacula.base / "etc/bacula-fd.conf"
        lines = conf.read_text().splitlines()
        conf.write_text("\n".join(x for x in lines if "PKI" not in x))
        world.bacula.start_daemon("fd")
        await backup(world, "plain")
        assert holding(world.bacula.volumes, marker)


def holding(volumes: Path, marker: bytes) -> list[Path]:
    """Return the volumes in which these bytes can be read."""
    return [path for path in volumes.iterdir() if marker in path.read_bytes()]


@pytest.mark.parametrize("options", ["signature = MD5", "compression = GZIP"])
async def test_without_the_plugin_qemu_img_rebuilds_every_disk(options: str) -> None:
    async with World() as world:
        vm, ledger = await written_vm(world, 100)
        await world.add_job("nightly", "vmid=100", options=options)
        states = {}
        for level in ("Full", "Incremental"):
            await ledger.some(20)
            job = await backup(world, "nightly", level)
            states[job.name] = ledger.state(ledger.count)
        await vm.stop()

        world.bacula.kill("fd")
        (world.bacula.plugin_dir / SHIM.name).unlink()
        world.bacula.start_daemon("fd")
        folder = world.base / "files"
        job = await world.restore(where=str(folder), job="nightly")
        went_well(world, job, "Restore OK")
        homes = {path.parent.name: path.parent for path in folder.rglob("scsi0.qcow2")}
        assert homes.keys() == states.keys()
        for name, state in states.items():
            await images_hold(homes[name], state)
        newest = homes[max(homes)]
        for name in ("vm.conf", "manifest.json"):
            assert (newest / name).stat().st_size > 0
        shutil.rmtree(folder)
