# SPDX-License-Identifier: Apache-2.0
"""Failover, its test, its undo and the receiver's death, between two lab sites.

The VMs have disks and no guest: what they hold is written by qemu-io and read by
qemu-img. A guest boots in ``./dev demo dr``.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support import dr_truth
from tests.support.requires import requires
from tests.support.two_sites import TwoSites

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd", "bacula-fd"),
]


class Story:
    """A VM with two disks of a few MiB and a job for each mode."""

    def __init__(self, sites: TwoSites, vm: LabVm) -> None:
        self.sites = sites
        self.vm = vm
        self.sums: dict[str, dict[str, str]] = {}
        self._number = 0

    @classmethod
    async def begin(cls, sites: TwoSites) -> Story:
        vm = await sites.site.create_vm(
            100,
            {"name": "web", "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0"},
            disks={
                "scsi0": "local:0.03125,format=qcow2",
                "scsi1": "local:0.015625,format=raw",
            },
        )
        await vm.start()
        await sites.start_receiver()
        for mode in ("seed", "incremental"):
            await sites.add_job(mode, f"mode={mode} vmid=100 {sites.dr_words()}")
        return cls(sites, vm)

    @property
    def replica(self) -> LabVm:
        return self.sites.dr.vm(100)

    @property
    def points(self) -> list[str]:
        return list(self.sums)

    async def write(self, vm: LabVm, value: int) -> None:
        for key in ("scsi0", "scsi1"):
            await vm.qemu_io(key, f"write -P {value} {value % 8}M 256k")
            await vm.qemu_io(key, "flush")

    async def cycle(self) -> JobResult:
        """Write, replicate; remember what the restore point is to hold."""
        self._number += 1
        await self.write(self.vm, self._number)
        job = await self.run("seed" if self._number == 1 else "incremental")
        if found := re.search(r"restore point (\S+) ", job.text):
            self.sums[found[1]] = self.holds(self.replica)
            assert self.sums[found[1]] == self.holds(self.vm)
        return job

    def holds(self, vm: LabVm, snapshot: str = "") -> dict[str, str]:
        return {
            key: dr_truth.content(vm.disk_path(key), snapshot or None).sha256
            for key in ("scsi0", "scsi1")
        }

    async def run(self, name: str, *, well: bool = True) -> JobResult:
        job = await self.sites.run(name, timeout_s=240)
        if well:
            assert job.termination == "Backup OK", (
                f"{job.text}\n{self.sites.receiver_log[-3000:]}"
            )
        else:
            assert job.termination != "Backup OK", job.text
        return job

    async def act(self, mode: str, text: str = "", *, well: bool = True) -> JobResult:
        name = f"{mode}-{len(text)}-{abs(hash(text)) % 1000}"
        words = f"mode={mode} vmid=100 {text} {self.sites.dr_words()}"
        await self.sites.add_job(name, words)
        return await self.run(name, well=well)

    def replicas(self) -> list[dict]:
        """What ``pveplug replicas`` says, as a process."""
        done = subprocess.run(
            [
                *(str(Path(sys.prefix) / "bin" / "pveplug"), "replicas", "--json"),
                *("--state-dir", str(self.sites.state_dir)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(done.stdout)

    def others(self) -> list[int]:
        """VMs of the DR site that aren't the replica."""
        return [vmid for _, vmid in self.sites.dr.vms() if vmid != 100]


async def test_failover_to_an_older_point_and_back_to_standby() -> None:
    async with TwoSites() as sites:
        story = await Story.begin(sites)
        for _ in range(3):
            await story.cycle()
        oldest, newest = story.points[0], story.points[-1]

        # Nobody there has an agent: this is how long it must keep running.
        soon = "dr_boot_timeout=5s"
        job = await story.act("failover-test", f"dr_restore_point={oldest} {soon}")
        assert f"point {oldest}" in job.text
        assert "full clone" in job.text
        assert story.others() == []

        words = f"dr_unplanned=yes dr_restore_point={oldest} {soon}"
        job = await story.act("failover-exec", words)
        assert "verdict started, no agent" in job.text
        assert story.replica.running
        (told,) = story.replicas()
        assert (told["role"], told["epoch"]) == ("active", 2)

        job = await story.run("incremental", well=False)
        assert "failed over" in job.text  # an old source is refused, with what to do
        assert "failback" in job.text

        await story.write(story.replica, 201)
        await story.replica.stop()  # no guest hears a shutdown
        job = await story.act("failback-pre", well=False)
        assert "failback brings the changes to the source" in job.text

        await story.act("failover-undo")
        (told,) = story.replicas()
        assert (told["role"], told["welcome"]) == ("standby", True)
        assert story.holds(story.replica) == story.sums[newest]
        for point in story.points:
            assert story.holds(story.replica, point) == story.sums[point]

        await story.cycle()
        (told,) = story.replicas()
        assert (told["health"], told["epoch"]) == ("ok", 2)

        await story.act("failover-exec", f"dr_unplanned=yes {soon}")
        await story.act("failover-permanent")
        values = story.replica.conf.values
        assert "pveplug" not in values.get("tags", "")
        assert "pveplug" not in values.get("description", "")
        assert values.get("protection", "0") == "0"
        await story.replica.stop()


async def test_a_receiver_killed_in_a_test_tidies_up_when_it_starts_again() -> None:
    async with TwoSites() as sites:
        story = await Story.begin(sites)
        await story.cycle()
        await story.cycle()
        await sites.add_job("test", f"mode=failover-test vmid=100 {sites.dr_words()}")
        testing = asyncio.create_task(sites.run("test", timeout_s=240))
        try:
            async with asyncio.timeout(60):
                while not any(sites.dr.vm(v).running for v in story.others()):
                    await asyncio.sleep(0.05)
            # A cycle comes while the test runs: it is staged.
            job = await story.cycle()
            assert "staged, to be applied when the test there ends" in job.text
            (told,) = story.replicas()
            assert told["testing"]
            assert told["staged"] == 1
            await sites.kill_receiver()
        finally:
            job = await testing
        assert job.termination != "Backup OK"
        assert story.others() != []
        await sites.start_receiver()
        async with asyncio.timeout(60):
            while story.others() or story.replicas()[0]["health"] != "ok":
                await asyncio.sleep(0.1)
        assert story.holds(story.replica) == story.holds(story.vm)
        (told,) = story.replicas()
        assert len(told["points"]) == 3
        images = Path(story.replica.disk_path("scsi0")).parents[1]
        assert sorted(p.name for p in images.iterdir() if any(p.iterdir())) == ["100"]
        await story.cycle()
