# SPDX-License-Identifier: Apache-2.0
"""Replication between two sites, driven by real Bacula jobs."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys

import pytest

from pveplug.proto.pve_login import Endpoint, TicketAuth
from pveplug.pve import PveApi
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


async def dr(sites: TwoSites, mode: str, *words: str) -> tuple[int, str]:
    """Run ``pveplug dr`` against the two sites."""
    given = (*sites.connection.split(), *sites.dr_words().split(), *words)
    return await pveplug(sites, mode, *given)


async def pveplug(sites: TwoSites, mode: str, *words: str) -> tuple[int, str]:
    """Run ``pveplug dr``; return its exit status and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pveplug", "dr", mode, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(sites.node_file)},
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def point_of(said: str) -> str:
    found = re.search(r"restore point (\S+) ", said)
    assert found, said
    return found[1]


async def same(sites: TwoSites, said: str, *keys: str) -> None:
    """Assert that the restore point a cycle took is what the source's disks are."""
    vm, replica, point = sites.site.vm(100), sites.dr.vm(100), point_of(said)
    for key in keys:
        path = vm.disk_path(key)
        wanted = await asyncio.to_thread(truth.sha256_of_image, path, path.suffix[1:])
        found = await asyncio.to_thread(dr_truth.content, replica.disk_path(key), point)
        assert found.sha256 == wanted, (key, said)


@pytest.mark.parametrize("auth", ["mtls", "both"])
async def test_certificates_are_as_good_as_a_token(auth: str) -> None:
    async with TwoSites(auth=auth) as sites:
        vm = await source_vm(sites)
        await sites.start_receiver()
        await vm.qemu_io("scsi0", "write -P 1 0 1M")
        await vm.qemu_io("scsi0", "flush")
        status, said = await dr(sites, "seed", "vmid=100")
        assert status == 0, said
        await same(sites, said, "scsi0")
        methods = {"mtls": "mtls", "both": "psk+mtls"}[auth]
        assert f"methods={methods}" in sites.receiver_log

        # The same without what was given: refused before anything was said.
        words = [word for word in sites.dr_words().split() if "dr_auth" not in word]
        stranger = sites.base / "stranger"
        stranger.write_text("0" * 64)
        stranger.chmod(0o600)
        status, said = await pveplug(
            sites, "status", *words, f"dr_auth_token_file={stranger}"
        )
        assert status == 69, said
        assert "dr refused peer=127.0.0.1" in sites.receiver_log


async def test_what_changes_at_the_source_is_carried_over() -> None:
    async with TwoSites() as sites:
        vm = await source_vm(sites)
        await sites.start_receiver()
        await vm.qemu_io("scsi0", "write -P 1 0 6M")
        status, said = await dr(sites, "seed", "vmid=100")
        assert status == 0, said
        await same(sites, said, "scsi0", "scsi1")
        replica = sites.dr.vm(100)
        assert replica.conf.values["onboot"] == "0"
        assert "pveplug" in replica.conf.values["tags"]
        assert "BC:24:11:00:00:01" in replica.conf.values["net0"]

        # A disk that grew, a disk that is new, another configuration.
        async with root_api(sites) as api:
            node = sites.site.node.name
            await api.resize_disk(node, 100, "scsi0", 96 << 20)
            await api.update_config(
                node, 100, {"scsi2": "local:0.03125,format=qcow2", "name": "renamed"}
            )
            await vm.qemu_io("scsi0", "write -P 3 80M 1M")
            await vm.qemu_io("scsi2", "write -P 4 1M 1M")
            for key in ("scsi0", "scsi2"):
                await vm.qemu_io(key, "flush")
            status, said = await dr(sites, "incremental", "vmid=100")
            assert status == 0, said
            await same(sites, said, "scsi0", "scsi1", "scsi2")
            assert replica.conf.values["name"] == "renamed"
            assert "scsi2: all" in said

            # A disk that is gone.
            await api.unlink_disk(node, 100, "scsi2", destroy=True)
            status, said = await dr(sites, "incremental", "vmid=100")
            assert status == 0, said
            assert "scsi2" not in replica.conf.values

            # A VM that was stopped and started: what changed is found by digests.
            await vm.stop()
            await vm.start()
            await vm.qemu_io("scsi1", "write -P 5 3M 64k")
            await vm.qemu_io("scsi1", "flush")
            status, said = await dr(sites, "incremental", "vmid=100")
            assert status == 0, said
            assert "scsi1: compared with the replica" in said
            assert re.search(r"scsi1: .*sent 64\.0 KiB", said), said
            await same(sites, said, "scsi0", "scsi1")

            # And a stopped one.
            await vm.stop()
            status, said = await dr(sites, "incremental", "vmid=100")
            assert status == 0, said
            await same(sites, said, "scsi0", "scsi1")


async def test_a_source_that_comes_back_is_refused_until_somebody_decides() -> None:
    async with TwoSites() as sites:
        vm = await source_vm(sites)
        await sites.start_receiver()
        status, said = await dr(sites, "incremental", "vmid=100")
        assert (status, "run mode=seed" in said) == (69, True), said
        status, said = await dr(sites, "seed", "vmid=100")
        assert status == 0, said
        status, said = await dr(sites, "seed", "vmid=100")
        assert (status, "mode=incremental" in said) == (69, True), said

        status, said = await dr(sites, "failover-exec", "vmid=100")
        assert (status, "dr_final_sync=yes shuts it down" in said) == (69, True), said

        # The source is lost: nothing is asked of its Proxmox VE.
        words = ("vmid=100", "dr_unplanned=yes", "dr_boot_timeout=5s")
        status, said = await dr(sites, "failover-exec", *words)
        assert status == 0, said
        assert sites.dr.vm(100).running

        # It is back, and knows nothing of it.
        status, said = await dr(sites, "incremental", "vmid=100")
        assert status == 69, said
        assert "failed over" in said, said
        assert "failback" in said, said

        status, said = await dr(sites, "failover-undo", "vmid=100")
        assert status == 0, said
        assert not sites.dr.vm(100).running
        await vm.qemu_io("scsi0", "write -P 9 5M 64k")
        await vm.qemu_io("scsi0", "flush")
        status, said = await dr(sites, "incremental", "vmid=100")
        assert status == 0, said
        await same(sites, said, "scsi0", "scsi1")


async def test_a_failback_can_be_taken_back_and_be_done_again() -> None:
    async with TwoSites() as sites:
        vm = await source_vm(sites)
        await sites.start_receiver()
        await vm.qemu_io("scsi0", "write -P 1 0 6M")
        status, said = await dr(sites, "seed", "vmid=100")
        assert status == 0, said
        await vm.stop()
        before = contents(vm)
        boot = ("vmid=100", "dr_boot_timeout=5s")
        status, said = await dr(sites, "failover-exec", *boot)
        assert status == 0, said
        replica = sites.dr.vm(100)
        await replica.qemu_io("scsi0", "write -P 7 2M 64k")
        await replica.qemu_io("scsi1", "write -z 8M 64k")
        await replica.qemu_io("scsi1", "write -P 8 9M 64k")
        for key in ("scsi0", "scsi1"):
            await replica.qemu_io(key, "flush")

        await replica.stop()
        status, said = await dr(sites, "failback", "vmid=100")
        assert status == 0, said
        assert "received 131072" in said, said
        after = contents(vm)
        assert after != before

        status, said = await dr(sites, "failback-undo", "vmid=100", *boot[1:])
        assert status == 0, said
        assert contents(vm) == before
        assert replica.running

        await replica.stop()
        for mode in ("failback", "failback-commit"):
            status, said = await dr(sites, mode, "vmid=100")
            assert status == 0, said
        assert vm.running
        await vm.stop()
        assert contents(vm) == after

        await vm.start()
        status, said = await dr(sites, "incremental", "vmid=100")
        assert status == 0, said
        await same(sites, said, "scsi0", "scsi1")


def contents(vm: LabVm) -> dict[str, str]:
    """What a stopped VM's disks hold."""
    return {
        key: dr_truth.content(vm.disk_path(key)).sha256 for key in ("scsi0", "scsi1")
    }


def root_api(sites: TwoSites) -> PveApi:
    endpoint = Endpoint("127.0.0.1", sites.site.api_port, (sites.site.fingerprint,))
    return PveApi(endpoint, TicketAuth("root@pam", sites.site.root_password))


async def test_a_receiver_that_was_killed_tidies_up_when_it_starts_again() -> None:
    async with TwoSites() as sites:
        await source_vm(sites)
        await sites.start_receiver()
        status, said = await dr(sites, "seed", "vmid=100")
        assert status == 0, said
        await sites.kill_receiver()
        # As a kill in the middle of an increment leaves it.
        folder = next(sites.state_dir.rglob("record.json")).parent
        stage = sites.stage_dir / folder.name / "00000002.stage"
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.write_bytes(b"a part")
        sites.dr.vm(100).set(lock="backup")
        (folder / "held").touch()

        await sites.start_receiver()
        for _ in range(300):
            if not stage.exists() and "lock" not in sites.dr.vm(100).conf.values:
                break
            await asyncio.sleep(0.1)
        assert not stage.exists(), sites.receiver_log[-2000:]
        assert "lock" not in sites.dr.vm(100).conf.values, sites.receiver_log[-2000:]
        status, said = await dr(sites, "incremental", "vmid=100")
        assert status == 0, said
        await same(sites, said, "scsi0", "scsi1")
