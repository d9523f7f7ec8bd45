# SPDX-License-Identifier: Apache-2.0
"""``./dev demo dr``: a VM is replicated to a second site, fails over and comes home.

Two simulated PVE sites over real QEMU; at the source a real Bacula with our shim and
backend, at the DR site our receiver. Every step is a Bacula job run by bconsole. What
is right is said by strangers: the guest tells the SHA-256 of both whole disks at each
instant, and qemu-img reads the restore points.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

from tests.lab.bacula import JobResult
from tests.lab.demo import DemoError, Screen, keep_logs
from tests.lab.vm import LabVm
from tests.support import dr_truth, truth
from tests.support.guest import Guest
from tests.support.moment import Moment
from tests.support.two_sites import TwoSites
from tests.support.world import GUEST

CYCLES = 5
SAMPLES = 16
LIMIT_S = 1500


def main() -> int:
    """Tell the story; return an exit status."""
    try:
        asyncio.run(tell())
    except asyncio.CancelledError:
        print("\ndemo dr: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"\ndemo dr: FAILED: {text.removeprefix('DemoError: ')}", file=sys.stderr)
        return 1
    print("\ndemo dr: OK")
    return 0


async def tell() -> None:
    """Run the demo and, when it fails, keep the logs before all is removed."""
    told = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    boot_disk = GUEST / "boot.raw"
    if not boot_disk.exists():
        raise DemoError(f"{boot_disk} is missing: run ./dev setup")
    sites = TwoSites()
    async with asyncio.timeout(LIMIT_S), sites:
        try:
            await Demo(sites, Screen()).run(boot_disk)
        except BaseException:
            keep_logs(sites)
            raise


class Demo:
    """The story, one method a chapter."""

    def __init__(self, sites: TwoSites, screen: Screen) -> None:
        self._sites = sites
        self._screen = screen
        self._moment = Moment(sites.base / "moment")
        self._sums: dict[str, str] = {}
        self._marker = ""

    async def run(self, boot_disk: Path) -> None:
        """Tell it from the seed to the way home."""
        step, say = self._screen.step, self._screen.say
        step("two sites: a source with Bacula, and a DR site with our receiver")
        await self._sites.start_receiver()
        say(f"source API {self._sites.site.url}, DR API {self._sites.dr.url}")
        guest = await Guest.create(self._sites.site, 100, boot_disk)
        say(f"VM 100 boots: {await guest.boot()}")
        await self._jobs()

        step("seed: the replica VM is made, both disks go over while the guest writes")
        replica = await self._cycle(guest, "dr-seed", 0)
        for key in guest.names:
            say(f"replica VM {replica.vmid} {key}: {replica.conf.values[key]}")
        for number in range(1, CYCLES + 1):
            step(
                f"increment {number} of {CYCLES}, while the guest writes to both disks"
            )
            await self._cycle(guest, "dr-cycle", number)

        step("status: the restore points")
        self._show(await self._run("dr-status"), r"replica VM .*")
        for point in await self._points(replica):
            say(point)

        step("failover-test: the newest point boots, without any network")
        self._show(await self._run("dr-test"), r"failover-test: .*")

        step("planned failover: source shut down, a last increment, the replica boots")
        await guest.mark("last words at the source")
        await guest.sh("sync")
        self._show(
            await self._run("dr-failover"), r"replicated to .*|failover-exec: .*"
        )
        moved = Guest(replica, {})
        marker = await _booted(replica, 0)
        if marker != "last words at the source":
            raise DemoError(f"the replica's root file system says {marker!r}")
        say(f"its root file system says: {marker}")
        if self._sites.site.vm(100).running:
            raise DemoError("the source still runs")

        step("the DR side writes")
        await moved._find_disks()
        await moved.mark("written at the DR site")
        await moved.write("scsi1", 3000, 64, "dr-side")
        sums = await moved.stand_still()
        for key, value in sums.items():
            say(f"{key}: the guest at the DR site says {value[:16]}…")

        step("failback: only what differs comes home; then it is made final")
        source = self._sites.site.vm(100)
        before = len(source.serial_text())
        job = await self._run("dr-failback")
        self._show(job, r"failback: .*|came back.*")
        for key, wanted in sums.items():
            path = source.disk_path(key)
            fmt = path.suffix.removeprefix(".")
            found = await asyncio.to_thread(truth.sha256_of_image, path, fmt)
            if found != wanted:
                raise DemoError(f"{path} is {found}, the guest said {wanted}")
            say(f"source {key}: SHA-256 {found[:16]}… as the guest at the DR site said")
        self._show(await self._run("dr-commit"), r"failback-commit: .*|was started")
        marker = await _booted(source, before)
        if marker != "written at the DR site":
            raise DemoError(f"the source's root file system says {marker!r}")
        say(f"VM 100 boots at the source: its root file system says: {marker}")

        step("and replication goes on")
        home = Guest(source, {})
        await home._find_disks()
        await self._cycle(home, "dr-cycle", CYCLES + 1)

    async def _jobs(self) -> None:
        dr = f"vmid=100 {self._sites.dr_words()}"
        cycle = f"{dr} verify_sample_blocks={SAMPLES} {self._moment.options}"
        for name, text in {
            "dr-seed": f"mode=seed {cycle}",
            "dr-cycle": f"mode=incremental {cycle}",
            "dr-status": f"mode=status {dr}",
            "dr-test": f"mode=failover-test {dr}",
            "dr-failover": f"mode=failover-exec dr_final_sync=yes {dr}",
            "dr-failback": f"mode=failback {dr}",
            "dr-commit": f"mode=failback-commit {dr}",
        }.items():
            await self._sites.add_job(name, text)

    async def _run(self, name: str) -> JobResult:
        job = await self._sites.run(name, "Full", timeout_s=400)
        if job.status != "T" or job.termination != "Backup OK":
            raise DemoError(
                f"job {job.job_id} {name} ended with {job.termination}:\n{job.text}\n"
                f"{self._sites.receiver_log[-4000:]}"
            )
        self._screen.say(f"JobId {job.job_id} {job.name}: {job.termination}")
        return job

    async def _cycle(self, guest: Guest, job_name: str, number: int) -> LabVm:
        """Run a cycle under writes; its restore point is what the guest said."""
        self._marker = f"before cycle {number}"
        await guest.mark(self._marker)
        await guest.write("scsi1", 500 * number, 64, f"cycle-{number}")
        await guest.start_writers()
        sums: dict[str, str] = {}

        async def before() -> str:
            sums.update(await guest.stand_still())
            return "The guest stands still and has told its sums."

        async def after() -> str:
            await guest.go_on()
            return "The guest writes on."

        async with self._moment.attended(before, after):
            job = await self._run(job_name)
        await guest.stop_writers()
        self._show(job, r"(changes since|all;|compared with the replica).*verified.*")
        found = re.search(r"replicated to VM (\d+): restore point (\S+) ", job.text)
        if not found:
            raise DemoError(f"the job log has no restore point:\n{job.text}")
        replica = self._sites.dr.vm(int(found[1]))
        for key, wanted in sums.items():
            path = replica.disk_path(key)
            told = await asyncio.to_thread(dr_truth.content, path, found[2])
            if told.sha256 != wanted:
                raise DemoError(f"{path} at {found[2]} is {told.sha256}, not {wanted}")
            self._screen.say(
                f"{key}: {found[2]} is {told.sha256[:16]}…, as the guest said"
            )
        self._sums = sums
        return replica

    async def _points(self, replica: LabVm) -> list[str]:
        return sorted(name for name in replica.conf.snapshots if name.startswith("ph-"))

    def _show(self, job: JobResult, pattern: str) -> None:
        for line in job.log:
            if found := re.search(pattern, line):
                self._screen.say(found[0])


async def _booted(vm: LabVm, before: int) -> str:
    """Wait until a VM that somebody started has booted; return its marker."""
    async with asyncio.timeout(180):
        while "TG:READY" not in vm.serial_text()[before:]:
            await asyncio.sleep(0.2)
    said = vm.serial_text()[before:]
    found = re.search(r"TG:FILE (.*)", said)
    if not found:
        raise DemoError(f"the guest told no marker: {said[-400:]}")
    return found[1].strip()


if __name__ == "__main__":
    os.environ.pop("PVEPLUG_KEEP", None)
    sys.exit(main())
