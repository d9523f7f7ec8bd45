# SPDX-License-Identifier: Apache-2.0
"""``./dev demo import``: VMs of VMware and Hyper-V come out of Bacula as PVE VMs.

A simulated PVE node over real QEMU and a real Bacula. The jobs are stored by stand-ins
for the sister plug-ins (:mod:`tests.lab.sisters`); our copy under their names restores
them; and files on disk go the same way by ``pveplug import``. qemu-img writes the
images, and the guests themselves say that they boot.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import uuid
from pathlib import Path

from pveplug.importing import look
from tests.lab.bacula import JobResult
from tests.lab.demo import DemoError, Screen, keep_logs
from tests.lab.sisters import Sisters
from tests.lab.vm import LabVm
from tests.support import foreign_vms, truth
from tests.support.guest import BOOT_WAIT_S
from tests.support.vhdx_images import Vhdx
from tests.support.world import GUEST, World

LIMIT_S = 900
MARKER = b"tiny-guest\n"


def main() -> int:
    """Tell the story; return an exit status."""
    try:
        asyncio.run(tell())
    except asyncio.CancelledError:
        print("\ndemo import: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        text = f"{type(error).__name__}: {error}".removeprefix("DemoError: ")
        print(f"\ndemo import: FAILED: {text}", file=sys.stderr)
        return 1
    print("\ndemo import: OK")
    return 0


async def tell() -> None:
    """Run the demo and, when it fails, keep the logs before all is removed."""
    told = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    for name in ("boot.raw", "boot-efi.raw"):
        if not (GUEST / name).exists():
            raise DemoError(f"{GUEST / name} is missing: run ./dev setup")
    world = World()
    async with asyncio.timeout(LIMIT_S), world:
        try:
            await Demo(world, Screen()).run()
        except BaseException:
            keep_logs(world)
            raise


class Demo:
    """The story, one method a chapter."""

    def __init__(self, world: World, screen: Screen) -> None:
        self._world = world
        self._site = world.site
        self._screen = screen
        self._sisters = Sisters(world)
        self._files = world.base / "files"
        self._files.mkdir()

    async def run(self) -> None:
        """Tell it from the first job to the last boot."""
        step = self._screen.step
        step(f"a PVE node with QEMU {'.'.join(map(str, self._site.qemu_version))}")
        await self._sisters.install()
        self._screen.say(
            "in bacula-fd: podheitor-vsphere-fd.so, podheitor-hyperv-fd.so,"
        )
        self._screen.say(
            "copies of our plug-in; for the jobs, stand-ins of the sisters'"
        )

        step("a job of VMware's: web01, a streamOptimized VMDK and its VMX; BIOS")
        job = await self._vmware()
        step("restored by bconsole to VM 101, read back, started")
        await self._restore([job], 101, ",import_verify=yes,start_after=yes")
        await self._boots(101, "tiny-guest")

        step("jobs of Hyper-V's: app, a dynamic VHDX, then an AVHDX; UEFI")
        jobs, wanted = await self._hyperv()
        step("both restored to VM 102, oldest first")
        await self._restore(jobs, 102, "")
        await self._same(102, wanted)
        await self._site.vm(102).start()
        await self._boots(102, "checkpoint")

        step("pveplug import: files of an export, a VHD and an OVF, to VM 103")
        await self._command(103)
        await self._boots(103, "tiny-guest")

    async def _vmware(self) -> JobResult:
        disk = GUEST / "boot.raw"
        image = self._files / "web01.vmdk"
        await self._convert(disk, image, "vmdk", "subformat=streamOptimized")
        vmx = self._files / "web01.vmx"
        vmx.write_bytes(foreign_vms.vmx("web01", "web01.vmdk"))
        home = "/@vsphere/@vsphere/web01"
        (job,) = await self._sisters.back_up(
            "esx-web01",
            "podheitor-vsphere",
            [
                {"file": f"{home}/web01.vmdk", "path": image},
                {"file": f"{home}/web01.vmx", "path": vmx},
            ],
        )
        self._stored(job)
        return job

    async def _hyperv(self) -> tuple[list[JobResult], str]:
        disk = GUEST / "boot-efi.raw"
        image = self._files / "app.vhdx"
        await self._convert(disk, image, "vhdx")
        child, content = checkpoint(image, disk.read_bytes(), b"checkpoint")
        avhdx = self._files / "app.avhdx"
        avhdx.write_bytes(child)
        wanted = self._files / "wanted.raw"
        wanted.write_bytes(content)
        text = self._files / "app.json"
        text.write_bytes(foreign_vms.sidecar("app", "app.avhdx"))
        home = "/@hyperv/app"
        jobs = await self._sisters.back_up(
            "hv-app",
            "podheitor-hyperv",
            [
                {"file": f"{home}/app.vhdx", "path": image},
                {"file": f"{home}/app.json", "path": text},
            ],
            [{"file": f"{home}/app.avhdx", "path": avhdx}],
        )
        for job in jobs:
            self._stored(job)
        return jobs, await asyncio.to_thread(truth.sha256_of_image, wanted, "raw")

    async def _command(self, vmid: int) -> None:
        disk = GUEST / "boot.raw"
        image = self._files / "old.vhd"
        await self._convert(disk, image, "vpc", "force_size=on")
        ovf = self._files / "old.ovf"
        ovf.write_bytes(foreign_vms.ovf("old", "old.vhd", disk.stat().st_size))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pveplug", "import", str(ovf), str(image)),
            *("--to-vmid", str(vmid), "--storage", "local", "--verify", "--start"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(self._world.node_file)},
        )
        said = (await process.communicate())[0].decode()
        if process.returncode:
            raise DemoError(f"pveplug import ended with {process.returncode}:\n{said}")
        for line in said.splitlines():
            self._screen.say(line)

    async def _convert(
        self, source: Path, image: Path, fmt: str, *options: str
    ) -> None:
        words = [word for option in options for word in ("-o", option)]
        argv = ("qemu-img", "convert", "-f", "raw", "-O", fmt, *words)
        await asyncio.to_thread(truth.run, *argv, str(source), str(image))

    def _stored(self, job: JobResult) -> None:
        self._screen.say(
            f"JobId {job.job_id} {job.name}: {job.files} files, {job.bytes:,} bytes"
        )

    async def _restore(self, jobs: list[JobResult], vmid: int, more: str) -> None:
        where = f"/@pve/restore_vmid={vmid}{more}"
        result = await self._world.restore(
            where=where, job_ids=[job.job_id for job in jobs]
        )
        if not result.termination.startswith("Restore OK"):
            raise DemoError(f"{result.termination}:\n{result.text}")
        for line in result.log:
            if found := re.search(rf"JobId {result.job_id}: (.*)", line):
                if "lab-fd" in line and "onnected" not in line:
                    self._screen.say(found[1])

    async def _same(self, vmid: int, wanted: str) -> None:
        """Raise unless the boot disk has this SHA-256."""
        vm = self._site.vm(vmid)
        path = vm.disk_path(vm.conf.values["boot"].removeprefix("order="))
        fmt = path.suffix.removeprefix(".")
        found = await asyncio.to_thread(truth.sha256_of_image, path, fmt)
        if found != wanted:
            raise DemoError(f"{path} is {found}, not {wanted}")
        self._screen.say(f"its SHA-256 is {found[:16]}…, that of the disk as it was")

    async def _boots(self, vmid: int, marker: str) -> None:
        vm: LabVm = self._site.vm(vmid)
        line = await vm.serial_wait("TG:FILE", BOOT_WAIT_S)
        if not line.strip().endswith(f"TG:FILE {marker}"):
            raise DemoError(f"VM {vmid}: its root file system says {line.strip()!r}")
        await vm.serial_wait("TG:READY", 60)
        values = vm.conf.values
        firmware = "UEFI" if values["bios"] == "ovmf" else "BIOS"
        self._screen.say(
            f"VM {vmid} {values['name']} boots by {firmware}, {values['boot']}; "
            f"its root file system says: {marker}"
        )
        await vm.stop()


def checkpoint(image: Path, disk: bytes, marker: bytes) -> tuple[bytes, bytes]:
    """Return an AVHDX upon a VHDX, with another marker for the guest, and the disk.

    qemu-img can't write one; ours has just the sectors that differ.
    """
    content = bytearray(disk)
    at = content.index(MARKER + bytes(100))
    content[at : at + len(marker)] = marker
    states = ["n"] * (len(content) >> 20)
    states[at >> 20] = "p"
    parent = look([image])[0].info.identity
    child = Vhdx(
        bytes(content),
        "".join(states),
        parent=uuid.UUID(parent),
        present=[at <= n * 512 < at + 4096 for n in range(len(content) // 512)],
    )
    return child.make(), bytes(content)


if __name__ == "__main__":
    os.environ.pop("PVEPLUG_KEEP", None)
    sys.exit(main())
