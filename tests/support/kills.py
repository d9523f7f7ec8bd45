# SPDX-License-Identifier: Apache-2.0
"""What the tests that kill, cancel and break things have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.lab.bacula import JobResult
from tests.lab.errors import ApiError
from tests.support.world import World

CLEAN_WITHIN_S = 30.0
DISK = 24 << 20


async def until(
    true: Callable[[], Any], what: str, timeout_s: float = 60.0, pause_s: float = 0.02
) -> None:
    """Poll what nobody announces."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s:.0f} s"
        await asyncio.sleep(pause_s)


class Stage:
    """A world with VM 100, its job ``nightly``, and what the tests ask of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.vm = world.site.vm(100)
        self.lost: list[int] = []
        """Jobs that are to have failed by the end."""
        self._rng = random.Random(1)
        self._number = 0

    # --- jobs ------------------------------------------------------------------------

    async def options(self, text: str = "") -> None:
        """Give the job other options; to Bacula it stays the same job."""
        await self.world.add_job("nightly", f"vmid=100 {text}")

    async def start(self, level: str, name: str = "nightly") -> int:
        return await asyncio.to_thread(self.world.bacula.start_job, name, level)

    async def ended(self, job_id: int, timeout_s: float = 120) -> JobResult:
        return await asyncio.to_thread(self.world.bacula.wait, job_id, timeout_s)

    async def start_restore(self, options: str = "", vmid: int = 200) -> int:
        return await asyncio.to_thread(
            lambda: self.world.bacula.start_restore(
                where=f"/@pve/restore_vmid={vmid}{options}", job="nightly"
            )
        )

    # --- what the product wrote down -------------------------------------------------

    def journal(self, vmid: int = 100) -> dict[str, Any]:
        """The VM's journal, empty where there is none."""
        path = self.world.site.root / f"ph/lib/vms/{vmid}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        return found

    async def backend(self, vmid: int = 100) -> int:
        """The pid of the backend that works on a VM."""
        await until(lambda: self.journal(vmid).get("pid"), "a journal")
        return int(self.journal(vmid)["pid"])

    async def has_moved(self, pid: int, size: int, *, field: str = "sent") -> None:
        """Wait until a backend has sent ``size`` bytes to its bacula-fd.

        The kernel doesn't count what is lent to a pipe, but what the other end reads.
        With ``field="rchar"`` it has read them itself.
        """

        def moved() -> int:
            process, counter = pid, field
            if field == "sent":
                status = Path(f"/proc/{pid}/status").read_text()
                process, counter = int(status.split("PPid:")[1].split()[0]), "rchar"
            text = Path(f"/proc/{process}/io").read_text()
            return int(text.split(f"{counter}: ")[1].split()[0])

        start = moved()
        await until(lambda: moved() - start > size, "its progress")

    # --- the guest -------------------------------------------------------------------

    async def scribble(self, keys: tuple[str, ...] = ("scsi0", "scsi1")) -> None:
        """One write of the guest, of another byte, somewhere."""
        self._number += 1
        at = self._rng.randrange(0, DISK - (256 << 10), 4096)
        size = self._rng.choice((4, 64, 192)) << 10
        await self.vm.qemu_io(
            self._rng.choice(keys), f"write -P {self._number % 255 + 1} {at} {size}"
        )

    @contextlib.asynccontextmanager
    async def writing(self, *, dies: bool = False) -> AsyncIterator[None]:
        """A guest that writes within the block; ``dies``: the VM may end meanwhile."""
        gone = (ApiError,) if dies else ()
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError, ConnectionError, *gone):
                    await self.scribble()
                await asyncio.sleep(0.02)

        task = asyncio.create_task(write())
        try:
            yield
        finally:
            stop.set()
            await task

    # --- judging ---------------------------------------------------------------------

    async def left(self) -> list[str]:
        """Everything of ours that is still somewhere."""
        site = self.world.site
        found = await self.vm.leftovers()
        found += [f"journal of {p.stem}" for p in site.root.glob("ph/lib/vms/*.json")]
        found += [str(p) for p in (site.root / "ph/scratch").glob("*")]
        found += [str(p) for p in (site.root / "ph/run").glob("*")]
        if +site.node.qmeventd.backups:
            found.append(f"qmeventd: {site.node.qmeventd.backups}")
        for _, vmid in site.vms():
            if vmid != 100:
                found.append(f"VM {vmid}")
        for storage in site.node.storages.values():
            for row in storage.volumes():
                if row["vmid"] != 100:
                    found.append(f"volume {row['volid']}")
        return found

    async def clean(self, within_s: float = CLEAN_WITHIN_S) -> None:
        """Assert that nothing of ours is left before the time is up."""
        end = time.monotonic() + within_s
        while left := await self._left_now():
            if time.monotonic() > end:
                raise AssertionError(f"{left}\n{self.world.backend_log[-4000:]}")
            await asyncio.sleep(0.2)

    async def _left_now(self) -> list[str]:
        try:
            return await self.left()
        except TimeoutError:
            return ["a busy monitor"]

    async def next_is_exact(self) -> JobResult:
        """Run an Incremental and restore it: byte for byte what the guest has."""
        await self.options()
        result = await self.world.run("nightly", "Incremental")
        assert result.ok, result.text + self.world.backend_log[-4000:]
        assert "read whole" not in result.text, result.text
        await self.clean(5)
        await self.restores_exactly()
        return result

    async def restores_exactly(self) -> None:
        vm = self.vm
        for key in ("scsi0", "scsi1"):
            if vm.running:
                await vm.qemu_io(key, "flush")
        result = await self.world.restore(where="/@pve/restore_vmid=200", job="nightly")
        assert result.ok, result.text + self.world.backend_log[-4000:]
        copy = self.world.site.vm(200)
        for key in ("scsi0", "scsi1"):
            pair = _formats(vm.disk_path(key), copy.disk_path(key))
            await program("qemu-img", "compare", "-U", *pair)
        await self.destroy(200)

    async def destroy(self, vmid: int) -> None:
        qm = self.world.site.root / "usr/sbin/qm"
        await program(str(qm), "destroy", str(vmid), "--purge", "1")


def _formats(one: Path, other: Path) -> list[str]:
    pair = []
    for option, path in (("-f", one), ("-F", other)):
        pair += [option, "qcow2" if path.suffix == ".qcow2" else "raw"]
    return [*pair, str(one), str(other)]


async def program(*argv: str) -> str:
    """Run a program; its failure is the test's."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, f"{argv}: {said.decode(errors='replace')}"
    return said.decode(errors="replace")


@contextlib.asynccontextmanager
async def stage(**vm_config: str) -> AsyncIterator[Stage]:
    """A world, VM 100 with two disks running, and a Full of it."""
    async with World() as world:
        vm = await world.site.create_vm(
            100,
            {"agent": "1", **vm_config},
            disks={"scsi0": "24M", "scsi1": "local:1,format=raw"},
        )
        world.site.faults.agent(100, "fake")
        await vm.start()
        await vm.qemu_io("scsi0", "write -P 1 0 20M")
        await vm.qemu_io("scsi1", "write -P 2 1M 3M")
        found = Stage(world)
        await found.options()
        result = await world.run("nightly", "Full")
        assert result.ok, result.text + world.backend_log
        yield found
        await found.clean(5)


async def kill(pid: int) -> None:
    """``kill -9``, and wait until the process is gone."""
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not _runs(pid), "the end of a process")


def _runs(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"
