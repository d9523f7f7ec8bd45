# SPDX-License-Identifier: Apache-2.0
"""``./dev demo``: a running VM goes into Bacula and comes back.

A simulated PVE node over real QEMU, a real Bacula, our shim and backend between them. A
guest boots by GRUB from its own disk and writes all the time; four jobs back it up; it
is deleted and restored; the restored one boots. What is right is never our own word:
just before each snapshot the guest itself stops its writers, mounts its file system
read-only and tells the SHA-256 of both whole disks; afterwards it writes on, while the
backup reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pveplug.proto.pve_login import Endpoint, TicketAuth
from pveplug.pve import PveApi
from tests.lab.bacula import JobResult
from tests.support import truth
from tests.support.guest import Guest
from tests.support.moment import Moment
from tests.support.world import GUEST, World

LEVELS = ("Full", "Incremental", "Differential", "Incremental")
JOB = "nightly"
SUMMARY = r"VM 100 {key}: ([^;]+);.*(filesystem-consistent).*(dirty.*), [0-9.]+ s,"
LIMIT_S = 900
"""A machine that needs longer is stuck; two idle cores need two minutes."""


class DemoError(Exception):
    """What was shown is not what was promised."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One backup and what the guest said its disks held then."""

    marker: str
    job: JobResult
    sums: dict[str, str]


class Screen:
    """Short lines with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        print(f"\n{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def say(self, text: str) -> None:
        print(f"          {text}", flush=True)


def main() -> int:
    """Tell the story; return an exit status."""
    try:
        asyncio.run(tell())
    except asyncio.CancelledError:
        print("\ndemo: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"\ndemo: FAILED: {text.removeprefix('DemoError: ')}", file=sys.stderr)
        return 1
    print("\ndemo: OK")
    return 0


async def tell() -> None:
    """Run the demo and, when it fails, keep the logs before all is removed."""
    # A signal must undo everything as an error does: no QEMU may be left behind.
    told = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    boot_disk = GUEST / "boot.raw"
    if not boot_disk.exists():
        raise DemoError(f"{boot_disk} is missing: run ./dev setup")
    world = World()
    try:
        async with asyncio.timeout(LIMIT_S), world:
            try:
                await Demo(world, Screen()).run(boot_disk)
            except BaseException:
                keep_logs(world)
                raise
    finally:
        shutil.rmtree(world.base, ignore_errors=True)


def keep_logs(world: World) -> None:
    """Copy the logs of all programs to a place that stays."""
    place = Path(tempfile.mkdtemp(prefix="pveplug-demo-"))
    for name, folder in (("site", world.site.root), ("bacula", world.base / "b")):
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(folder / "log", place / name)
    print(f"\nthe logs are kept in {place}", file=sys.stderr)


class Demo:
    """The story, one method a chapter."""

    def __init__(self, world: World, screen: Screen) -> None:
        self._world = world
        self._site = world.site
        self._screen = screen
        self._moment = Moment(world.base / "moment")
        self._copies: list[Copy] = []

    async def run(self, boot_disk: Path) -> None:
        """Tell it from the first boot to the last."""
        step = self._screen.step
        step(f"a PVE node with QEMU {'.'.join(map(str, self._site.qemu_version))}")
        self._screen.say(
            f"API at {self._site.url}, everything below {self._world.base}"
        )
        guest = await Guest.create(self._site, 100, boot_disk)
        for key in guest.names:
            self._screen.say(f"VM 100 {key}: {guest.vm.conf.values[key]}")

        step("VM 100 boots by GRUB from its own disk (without KVM: emulated)")
        self._screen.say(f"its root file system says: {await guest.boot()}")

        # Slowly enough that the guest overwrites what is still to be read.
        options = f"vmid=100 bwlimit=8M {self._moment.options}"
        await self._world.add_job(JOB, options)
        self._screen.step("four jobs; in each, around its snapshot")
        self._screen.say("- the guest stops its writers, mounts / read-only and tells")
        self._screen.say("  the SHA-256 of both whole disks: the truth, by a stranger;")
        self._screen.say("- after it the writers go on, while the backup reads slowly.")
        for number, level in enumerate(LEVELS, 1):
            step(f"job {number}: {level}, while the guest writes to both disks")
            await self._back_up(guest, number, level)

        step("VM 100 and its disks are deleted through the API")
        await self._delete()

        step("the four backups as plain files: Bacula writes them, qemu-img reads them")
        await self._as_files()

        step("the newest backup to a new VM, by Bacula's console")
        restored = await self._as_vm()

        step("VM 101 boots by GRUB from the restored disk")
        await self._boots(restored)

    async def _back_up(self, guest: Guest, number: int, level: str) -> None:
        marker = f"before job {number} ({level})"
        await guest.mark(marker)
        await guest.write("scsi1", 1000 * number, 64, f"job-{number}")
        await guest.start_writers()
        sums: dict[str, str] = {}

        async def before() -> str:
            sums.update(await guest.stand_still())
            return "The guest stands still and has told its sums."

        async def after() -> str:
            await guest.go_on()
            return "The guest writes on."

        began = time.monotonic()
        async with self._moment.attended(before, after):
            job = await self._world.run(JOB, level)
        if job.status != "T" or job.termination != "Backup OK":
            raise DemoError(f"job {job.job_id} ended with {job.status}:\n{job.text}")
        if set(sums) != set(guest.names):
            raise DemoError(f"the guest told no sums during the job:\n{job.text}")
        await guest.stop_writers()
        now = await guest.stand_still()
        await guest.sh("mount -o remount,rw /mnt")
        if now == sums:
            raise DemoError("the guest wrote nothing while the backup ran")
        for key in guest.names:
            line = self._summary(job, key)
            if (level == "Full") is ("changes since" in line):
                raise DemoError(f"{key}: a {level} of another kind: {line}")
            self._screen.say(f"{key}: {line}")
            self._screen.say(f"       the guest says {sums[key][:16]}…")
        self._screen.say(
            f"{job.name}: {job.files} files, {job.bytes:,} bytes, "
            f"{time.monotonic() - began:.1f} s"
        )
        left = await guest.vm.leftovers()
        if left:
            raise DemoError(f"the job left something in the VM: {', '.join(left)}")
        self._copies.append(Copy(marker, job, dict(sums)))

    def _summary(self, job: JobResult, key: str) -> str:
        for line in job.log:
            if found := re.search(SUMMARY.format(key=key), line):
                return ", ".join(found.groups())
        raise DemoError(f"the job log has no summary of {key}:\n{job.text}")

    async def _delete(self) -> None:
        disks = [self._site.vm(100).disk_path(key) for key in ("scsi0", "scsi1")]
        endpoint = Endpoint("127.0.0.1", self._site.api_port, (self._site.fingerprint,))
        root = TicketAuth("root@pam", self._site.root_password)
        async with PveApi(endpoint, root) as api:
            await api.stop_vm(self._site.node.name, 100)
            await api.destroy_vm(self._site.node.name, 100)
        if any(path.exists() for path in disks) or self._site.vms():
            raise DemoError("VM 100 is still there")
        self._screen.say("gone; what is left of it is on Bacula's volumes")

    async def _as_files(self) -> None:
        folder = self._world.base / "files"
        job_ids = [copy.job.job_id for copy in self._copies]
        job = await self._world.restore(where=str(folder), job_ids=job_ids)
        self._expect(job, "Restore OK")
        images = {path.parent.name: path.parent for path in folder.rglob("scsi0.qcow2")}
        for copy in self._copies:
            home = images[copy.job.name]
            for key, wanted in copy.sums.items():
                image = home / f"{key}.qcow2"
                await asyncio.to_thread(truth.check, image)
                chain = await asyncio.to_thread(truth.backing_chain, image)
                found = await asyncio.to_thread(truth.sha256_of_image, image, "qcow2")
                if found != wanted:
                    raise DemoError(f"{image} is {found}, the guest said {wanted}")
                self._screen.say(
                    f"{copy.job.name} {key}: check clean, {len(chain)} file(s), "
                    f"SHA-256 {found[:16]}… as the guest said"
                )
        shutil.rmtree(folder)

    async def _as_vm(self) -> Guest:
        where = "/@pve/restore_vmid=101,restore_name=back-again"
        began = time.monotonic()
        job = await self._world.restore(where=where, job=JOB)
        self._expect(job, "Restore OK")
        self._screen.say(
            f"restore … where={where}: {job.bytes:,} bytes, "
            f"{time.monotonic() - began:.1f} s"
        )
        vm = self._site.vm(101)
        for key, wanted in self._copies[-1].sums.items():
            path = vm.disk_path(key)
            fmt = path.suffix.removeprefix(".")
            found = await asyncio.to_thread(truth.sha256_of_image, path, fmt)
            if found != wanted:
                raise DemoError(f"{path} is {found}, the guest said {wanted}")
            self._screen.say(
                f"{key} ({fmt}): SHA-256 {found[:16]}… as the guest said at job "
                f"{len(self._copies)}"
            )
        return Guest(vm, {})

    async def _boots(self, restored: Guest) -> None:
        marker = await restored.boot()
        if marker != self._copies[-1].marker:
            raise DemoError(
                f"its root file system says {marker!r} instead of "
                f"{self._copies[-1].marker!r}"
            )
        self._screen.say(f"its root file system says: {marker}")
        await restored.vm.stop()

    def _expect(self, job: JobResult, termination: str) -> None:
        if job.status != "T" or job.termination != termination:
            raise DemoError(
                f"job {job.job_id} ended with {job.termination or job.status}:\n"
                f"{job.text}\n{self._world.backend_log[-4000:]}"
            )


if __name__ == "__main__":
    os.environ.pop("PVEPLUG_KEEP", None)
    sys.exit(main())
