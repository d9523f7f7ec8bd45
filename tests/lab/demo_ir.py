# SPDX-License-Identifier: Apache-2.0
"""``./dev demo ir``: a lost VM runs again while most of its data is still in Bacula.

A guest with a chain of three backups is lost. ``pveplug ir start`` submits a restore
job for its increments and one for its Full; the guest boots from what has arrived
and writes while Bacula's Storage Daemon stands still, which must not hurt it; then the
rest comes, and the disks move to their storage under it. Before that the newest backup
is proven: it boots in isolation, and is removed again.

What is right is said by strangers: qemu-img reads the disks that came out, and compares
them with what Bacula alone makes of the same backups, overlaid by what the guest wrote.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

from pveplug.proto.pve_login import Endpoint, TicketAuth
from pveplug.pve import PveApi
from tests.lab.bacula import JobResult
from tests.lab.demo import DemoError, Screen, keep_logs
from tests.support import truth
from tests.support.guest import Guest
from tests.support.tiny_guest import pattern
from tests.support.world import GUEST, World

JOB = "nightly"
LEVELS = ("Full", "Incremental", "Incremental")
DATA_MIB = 192
RATE = "6M"
BLOCK = 4096
LIMIT_S = 900
MIB = 1 << 20


def main() -> int:
    """Tell the story; return an exit status."""
    try:
        asyncio.run(tell())
    except asyncio.CancelledError:
        print("\ndemo ir: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"\ndemo ir: FAILED: {text.removeprefix('DemoError: ')}", file=sys.stderr)
        return 1
    print("\ndemo ir: OK")
    return 0


async def tell() -> None:
    """Run the demo and, when it fails, keep the logs before all is removed."""
    told = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    boot_disk = GUEST / "boot.raw"
    if not boot_disk.exists():
        raise DemoError(f"{boot_disk} is missing: run ./dev setup")
    async with asyncio.timeout(LIMIT_S), World() as world:
        try:
            await Demo(world, Screen()).run(boot_disk)
        except BaseException:
            keep_logs(world)
            raise


class Demo:
    """The story, one method a chapter."""

    def __init__(self, world: World, screen: Screen) -> None:
        self._world = world
        self._site = world.site
        self._screen = screen
        self._jobs: list[JobResult] = []
        self._read = (0, "")
        self._writes: list[tuple[int, int, str]] = []
        """(block, count, seed) that the guest writes to scsi1 after its recovery."""

    async def run(self, boot_disk: Path) -> None:
        """Tell it from the loss to the last move."""
        step, say = self._screen.step, self._screen.say
        step(f"VM 100 with {DATA_MIB} MiB of data, and a chain of three backups")
        await self._make(boot_disk)
        step("the newest backup is proven: mode=prove")
        await self._prove()
        step("VM 100 and its disks are deleted through the API")
        await self._lose()
        step("what Bacula alone makes of the newest backup, for later")
        expected = await self._as_files()
        step("pveplug ir start: a restore job of the increments, then one of the Full")
        start = asyncio.create_task(self._start(), name="ir start")
        try:
            recovered = await self._boots(start)
            step("the guest writes, on what is here and on what is not")
            await self._write(recovered)
            await self._read_owed(recovered)
            await start
        finally:
            os.kill(self._world.bacula.pid("sd"), signal.SIGCONT)
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        step("the recovery is over: the VM is an ordinary one")
        await self._nothing_left()
        step("the disks that came out")
        await self._compare(recovered, expected)
        say("they hold what was backed up and what the guest wrote since, no more")

    # --- before ----------------------------------------------------------------------

    async def _make(self, boot_disk: Path) -> None:
        data = self._world.base / "data.raw"
        data.write_bytes(random.Random(5).randbytes(DATA_MIB * MIB))
        vm = await self._site.create_vm(
            100,
            {
                "name": "tiny-guest",
                "agent": "1",
                "boot": "order=scsi0",
                "ostype": "l26",
                "vga": "std",
            },
            disks={"scsi0": boot_disk, "scsi1": data},
        )
        data.unlink()
        guest = Guest(vm, {})
        self._screen.say(f"it boots: {await guest.boot()}")
        await self._world.add_job(JOB, "vmid=100")
        for number, level in enumerate(LEVELS, 1):
            await guest.mark(f"before job {number} ({level})")
            await guest.write("scsi1", 2000 * number, 256, f"before-{number}")
            await guest.sh("sync")
            job = await self._world.run(JOB, level)
            self._expect(job, "Backup OK")
            self._screen.say(f"{job.name}: {level}, {job.bytes:,} bytes")
            self._jobs.append(job)
        await guest.vm.stop()

    async def _prove(self) -> None:
        job = await self._world.restore(where="/@pve/mode=prove", job=JOB)
        self._expect(job, "Restore OK")
        for line in job.log:
            if found := re.search(r"prove VM .*|evidence .*|last screen .*", line):
                self._screen.say(found[0][:150])
        if [vmid for _, vmid in self._site.vms()] != [100]:
            raise DemoError("the VM of the proof is still there")

    async def _lose(self) -> None:
        endpoint = Endpoint("127.0.0.1", self._site.api_port, (self._site.fingerprint,))
        root = TicketAuth("root@pam", self._site.root_password)
        async with PveApi(endpoint, root) as api:
            await api.destroy_vm(self._site.node.name, 100)
        if self._site.vms():
            raise DemoError("VM 100 is still there")

    async def _as_files(self) -> dict[str, Path]:
        folder = self._world.base / "files"
        ids = [job.job_id for job in self._jobs]
        job = await self._world.restore(where=str(folder), job_ids=ids)
        self._expect(job, "Restore OK")
        flat = {}
        for image in folder.rglob(f"{self._jobs[-1].name}/*.qcow2"):
            flat[image.stem] = self._world.base / f"{image.stem}.flat"
            await asyncio.to_thread(truth.convert, image, "qcow2", flat[image.stem])
            self._screen.say(f"{image.stem}: {image.name} of {image.parent.name}")
        return flat

    # --- the recovery ----------------------------------------------------------------

    async def _start(self) -> None:
        bacula = self._world.bacula
        program, *_, config = bacula._bconsole()
        options = ["--option", f"restore_bwlimit={RATE}"]
        await self._pveplug(
            *("ir", "start", "--vmid", "100", "--new-vmid", "110"),
            *("--name", "back-again", "--target-storage", "local2", *options),
            *("--console", program, "--console-config", config),
        )

    async def _boots(self, start: asyncio.Task[None]) -> Guest:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not (self._site.find(110) and self._site.vm(110).running):
            if start.done():
                await start
                raise DemoError("the restore jobs ended and no VM was started")
            await asyncio.sleep(0.1)
        self._screen.say(f"VM 110 runs {loop.time() - began:.1f} s after the command")
        recovered = Guest(self._site.vm(110), {})
        while _owed(state := await self._status(), "scsi0"):
            await asyncio.sleep(0.2)
        # However slow this machine boots under emulation, it does so from what is here.
        os.kill(self._world.bacula.pid("sd"), signal.SIGSTOP)
        self._screen.say(
            "its boot disk is here; the Storage Daemon is stopped for a while"
        )
        await recovered.vm.serial_wait("TG:READY", 180)
        state = await self._status()
        owed = sum(disk["owed"] for disk in state["disks"])
        total = sum(job.bytes for job in self._jobs)
        await recovered._find_disks()
        line = await recovered.vm.serial_wait("TG:FILE", 5)
        marker = line.partition("TG:FILE ")[2].strip()
        self._screen.say(
            f"it boots: {marker!r}, {loop.time() - began:.1f} s after the command; "
            f"{owed / MIB:.0f} MiB of {total / MIB:.0f} MiB are still owed"
        )
        if marker != f"before job {len(LEVELS)} ({LEVELS[-1]})":
            raise DemoError(f"its root file system says {marker!r}")
        if owed * 2 < total:
            raise DemoError("more than half of its data was there already")
        return recovered

    async def _write(self, recovered: Guest) -> None:
        """Write while the stream stands still, then to what is owed.

        The guest writes 4 KiB at a time: the first of a cluster waits for its rest.
        """
        await recovered.mark("written while the disks were coming")
        last = DATA_MIB * MIB // BLOCK
        # What the second job brought, and what the job of the disks' ends did.
        places = [(4000, 64, "early"), (last - 70, 64, "end")]
        for at, count, seed in places:
            await recovered.write("scsi1", at, count, seed)
        state = await self._status()
        owed = sum(disk["owed"] for disk in state["disks"])
        self._screen.say(
            f"64 blocks at two places written and flushed, {owed / MIB:.0f} MiB owed"
        )
        middle = (last // 2 + 3, 64, "middle")
        writing = asyncio.create_task(recovered.write("scsi1", *middle))
        try:
            await asyncio.sleep(1)
            waited = not writing.done()
            os.kill(self._world.bacula.pid("sd"), signal.SIGCONT)
            await writing
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        if not waited:
            raise DemoError("a part of a cluster was written that had not come")
        self._screen.say("64 blocks more, whose clusters came only while it wrote")
        self._writes = [*places, middle]

    async def _read_owed(self, recovered: Guest) -> None:
        """Read what comes last, from within the guest: it waits, and is right."""
        device = recovered.names["scsi1"]
        skip = DATA_MIB - 8
        said = await recovered.sh(
            f"dd if={device} bs=1M skip={skip} count=4 2>/dev/null | sha256sum"
        )
        self._screen.say(f"it read 4 MiB that were owed: {said.split()[0][:16]}…")
        self._read = (skip, said.split()[0])

    async def _status(self) -> dict[str, Any]:
        said = await self._pveplug("ir", "status", "--json", loud=False)
        state: dict[str, Any] = json.loads(said)[0]["state"]
        return state

    async def _nothing_left(self) -> None:
        node = self._world.site.node_values()
        for key in ("landing_dir",):
            folder = Path(str(node[key]))
            if folder.exists() and any(folder.iterdir()):
                raise DemoError(f"{folder} is not empty")
        vm = self._site.vm(110)
        nodes = await vm.qmp("query-named-block-nodes")
        links = [one["node-name"] for one in nodes if one["drv"] == "nbd"]
        if links:
            raise DemoError(f"QEMU still has NBD nodes: {links}")
        values = vm.conf.values
        for key in ("scsi0", "scsi1"):
            self._screen.say(f"VM 110 {key}: {values[key]}")
            if not values[key].startswith("local2:"):
                raise DemoError(f"{key} has not moved")
        for key in ("protection", "tags", "description"):
            if values.get(key):
                raise DemoError(f"VM 110 still has {key}: {values[key]}")
        said = await self._pveplug("ir", "status", loud=False)
        self._screen.say(said.strip())

    async def _compare(self, recovered: Guest, expected: dict[str, Path]) -> None:
        sums = await recovered.stand_still()
        await recovered.vm.stop()
        for key, wanted in sums.items():
            path = recovered.vm.disk_path(key)
            form = path.suffix.removeprefix(".")
            found = await asyncio.to_thread(truth.sha256_of_image, path, form)
            if found != wanted:
                raise DemoError(f"{path} is {found}, the guest says {wanted}")
            self._screen.say(f"{key}: SHA-256 {found[:16]}… as the guest says")
        model = expected["scsi1"]
        skip, said = self._read
        with model.open("rb") as file:
            file.seek(skip * MIB)
            if hashlib.sha256(file.read(4 * MIB)).hexdigest() != said:
                raise DemoError("what the guest read while it was owed was wrong")
        with model.open("r+b") as file:
            for at, count, seed in self._writes:
                file.seek(at * BLOCK)
                for block in range(at, at + count):
                    file.write(pattern(seed, block))
        wanted = await asyncio.to_thread(truth.sha256_of_file, model)
        if wanted != sums["scsi1"]:
            raise DemoError(f"scsi1 is {sums['scsi1']}, the model {wanted}")
        self._screen.say(f"scsi1: SHA-256 {wanted[:16]}… as backup and writes make it")

    # --- helpers ---------------------------------------------------------------------

    async def _pveplug(self, *words: str, loud: bool = True) -> str:
        """Run the command as an administrator would; return what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pveplug", *words),
            env={
                **os.environ,
                **self._world.bacula._env,
                "PODHEITOR_PROXMOX_NODE": str(self._world.node_file),
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = []
        try:
            assert process.stdout is not None
            while line := (await process.stdout.readline()).decode():
                said.append(line)
                if loud:
                    self._screen.say(f"  | {line.rstrip()[:160]}")
            if status := await process.wait():
                raise DemoError(f"pveplug {' '.join(words)}: {status}: {''.join(said)}")
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        return "".join(said)

    def _expect(self, job: JobResult, termination: str) -> None:
        if job.status != "T" or job.termination != termination:
            raise DemoError(
                f"job {job.job_id} ended with {job.termination or job.status}:\n"
                f"{job.text}\n{self._world.backend_log[-4000:]}"
            )


def _owed(state: dict[str, Any], key: str) -> int:
    return sum(disk["owed"] for disk in state["disks"] if disk["key"] == key)


if __name__ == "__main__":
    os.environ.pop("PVEPLUG_KEEP", None)
    sys.exit(main())
