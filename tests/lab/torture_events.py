# SPDX-License-Identifier: Apache-2.0
"""What happens to the VM, to Bacula and to the backend of a torture run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pveplug.errors import PveplugError
from tests.lab.errors import ApiError
from tests.lab.relay import QmpRefused
from tests.lab.torture_plan import MAIN, OTHER, Instant
from tests.support import truth
from tests.support.kills import until

if TYPE_CHECKING:
    from tests.lab.torture import Torture

MIB = 1 << 20
BOUND_S = 30.0


class Clock:
    """Waits for an instant in the life of a job."""

    def __init__(
        self, torture: Torture, instant: Instant, *, hold: bool, reading: bool
    ) -> None:
        self._torture, self._instant = torture, instant
        self._reading = reading
        """The instant is one while the exports are there."""
        self._reached = asyncio.Event()
        self._released = asyncio.Event()
        self._count = 0
        self._hold = hold
        """The command is carried out only once the event has happened."""

    @contextlib.contextmanager
    def ticking(self) -> Iterator[Clock]:
        """Count the product's commands, and nobody else's."""
        relay = self._torture.vm.machine.qmp_relay

        async def answer(command: dict[str, Any]) -> None:
            if str(command.get("id", "")).startswith("lab-"):
                return
            self._count += 1
            if self._reading:
                due = command["execute"] == "block-export-add"
            else:
                due = self._count == self._instant.command
            if due:
                self._reached.set()
                if self._hold:
                    await self._released.wait()

        relay.answer = answer
        try:
            yield self
        finally:
            self._released.set()
            relay.answer = None

    async def reached(self) -> None:
        if self._reading:
            await self._reached.wait()
            await asyncio.sleep(self._instant.after_s / 2)
        elif self._instant.command is None:
            await until(self._torture.backend_pids, "a backend", BOUND_S)
            await asyncio.sleep(self._instant.after_s)
        else:
            await self._reached.wait()

    def release(self) -> None:
        self._released.set()


class Events:
    """Each event is a method: ``before_…`` between jobs, ``during_…`` a job."""

    def __init__(self, torture: Torture) -> None:
        self._t = torture
        self._snapshots: list[tuple[str, int]] = []
        self._numbers = iter(range(1, 1 << 30))
        self.foreign: dict[str, str] = {}
        """Bitmap -> disk: what must still be there, and recording."""

    def before(self, name: str) -> Callable[[random.Random], Awaitable[str]]:
        found: Callable[[random.Random], Awaitable[str]] = getattr(
            self, f"before_{name.replace(' ', '_')}"
        )
        return found

    def during(self, name: str) -> Callable[[random.Random], Awaitable[str]]:
        found: Callable[[random.Random], Awaitable[str]] = getattr(
            self, f"during_{name.replace(' ', '_')}"
        )
        return found

    # -- between jobs

    async def before_stop_and_start(self, rng: random.Random) -> str:
        await self._stop()
        await self._t.vm.start()
        return "the VM was stopped and started"

    async def before_stay_stopped(self, rng: random.Random) -> str:
        await self._stop()
        return "the VM is stopped for the next job"

    async def before_reboot(self, rng: random.Random) -> str:
        if self._t.vm.running:
            await self._t.vm.qmp("system_reset")
        return "the guest rebooted"

    async def before_kill_qemu(self, rng: random.Random) -> str:
        await self._t.vm.kill()
        self.gone("QEMU was killed")
        await self._t.vm.start()
        return "QEMU was killed, the VM started"

    async def before_grow(self, rng: random.Random) -> str:
        t = self._t
        key = rng.choice(t.keys)
        more = rng.choice((rng.randrange(4, 2048, 4), rng.randrange(64, 2048, 64)))
        async with t.writer.still():
            await t.api("PUT", "resize", disk=key, size=f"+{more}K")
            await t.sizes()
        return f"{key} grew by {more} KiB"

    async def before_move(self, rng: random.Random) -> str:
        t = self._t
        await self._drop_snapshots()
        key = rng.choice(t.keys)
        volid = t.vm.conf.values[key].split(",")[0]
        target = "local2" if volid.startswith("local:") else "local"
        fmt = rng.choice(("raw", "qcow2", "qcow2"))
        # The guest goes on writing while its disk is mirrored.
        await t.api("POST", "move_disk", disk=key, storage=target, format=fmt, delete=1)
        # Only the throttle node of the -blockdev layout outlives its image.
        if t.vm.running and not t.vm.modern:
            t.tracking.lost("moved", key)
            self.foreign = {n: k for n, k in self.foreign.items() if k != key}
        return f"{key} moved to {target} as {fmt}"

    async def before_snapshot(self, rng: random.Random) -> str:
        t = self._t
        for key in t.keys:
            if t.vm.disk_path(key).suffix != ".qcow2":
                return f"no snapshot: {key} is raw"
        name = f"s{next(self._numbers)}"
        async with t.writer.still():
            await t.api("POST", "snapshot", snapname=name)
        self._snapshots.append((name, sum(t.writer.sizes.values())))
        return f"snapshot {name}"

    async def before_rollback(self, rng: random.Random) -> str:
        t = self._t
        # An image can't be put back to another size by qemu-img.
        fitting = [n for n, s in self._snapshots if s == sum(t.writer.sizes.values())]
        if not fitting:
            if "no snapshot" in (said := await self.before_snapshot(rng)):
                return said
            await t.writer.burst(40)
            fitting = [self._snapshots[-1][0]]
        name = rng.choice(fitting)
        async with t.writer.still():
            again = rng.randrange(2)
            await t.api("POST", f"snapshot/{name}/rollback", start=again)
            self.gone("rolled back")
            if again:
                await t.vm.wait_started()  # by a task of its own
            await t.sizes()
        return f"rolled back to {name}" + ("" if t.vm.running else ", stopped")

    async def before_disown(self, rng: random.Random) -> str:
        return await self._disown(1)

    async def before_disown_several(self, rng: random.Random) -> str:
        return await self._disown(rng.randint(2, 3))

    async def before_foreign_bitmap(self, rng: random.Random) -> str:
        t = self._t
        if not t.vm.running:
            return "no foreign bitmap: the VM is stopped"
        key, name = rng.choice(t.keys), f"foreign{next(self._numbers)}"
        await t.vm.qmp("block-dirty-bitmap-add", node=f"drive-{key}", name=name)
        self.foreign[name] = key
        return f"{name} on {key}"

    async def foreign_left(self) -> None:
        """Assert that nobody touched what isn't ours."""
        if not self.foreign or not self._t.vm.running:
            return
        nodes = await self._t.vm.qmp("query-named-block-nodes", flat=True)
        recording = {
            bitmap.get("name")
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap["recording"]
        }
        gone = set(self.foreign) - recording
        assert not gone, f"foreign bitmaps touched: {gone}"

    async def _stop(self) -> None:
        async with self._t.writer.still():
            if self._t.vm.running:
                await self._t.vm.stop()
        self.gone("stopped")

    def gone(self, why: str) -> None:
        """QEMU's process ended, and all bitmaps with it."""
        self._t.tracking.lost(why)
        self.foreign = {}

    async def _drop_snapshots(self) -> None:
        for name, _ in self._snapshots:
            await self._t.api("DELETE", f"snapshot/{name}")
        self._snapshots = []

    async def _disown(self, count: int) -> str:
        """Delete the newest good jobs: the Director names an older one from now on."""
        t = self._t
        await t.checker.check_all()
        newest = (await t.good_jobs())[-count:]
        for job_id, name, _ in newest:
            await t.console(f"delete jobid={job_id} yes")
            t.checker.disowned(name)
        left = {name for _, name, _ in await t.good_jobs()}
        assert not left & {name for _, name, _ in newest}, "a job was not deleted"
        return f"disowned {', '.join(name for _, name, _ in newest)}"

    # -- while a job runs

    async def during_kill_backend(self, rng: random.Random) -> str:
        pids = self._t.backend_pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return f"killed backend {pids}" if pids else "too late: no backend"

    async def during_cancel(self, rng: random.Random) -> str:
        said = await asyncio.to_thread(self._t.bacula.cancel, self._t.running_job)
        return f"cancelled: {said.strip().splitlines()[-1]}"

    async def during_kill_sd(self, rng: random.Random) -> str:
        bacula = self._t.bacula
        await asyncio.to_thread(bacula.kill, "sd")
        await asyncio.sleep(rng.uniform(0, 1))
        await asyncio.to_thread(bacula.start_daemon, "sd")
        return "killed the Storage Daemon, started it again"

    async def during_kill_fd(self, rng: random.Random) -> str:
        """The backend lives on, without anybody to talk to."""
        bacula = self._t.bacula
        await asyncio.to_thread(bacula.kill, "fd")
        await asyncio.sleep(rng.uniform(0, 1))
        await asyncio.to_thread(bacula.start_daemon, "fd")
        return "killed the File Daemon, started it again"

    async def during_power_cut(self, rng: random.Random) -> str:
        """All at once; what is left is the next job's to find."""
        t = self._t
        t.vm_died = t.left_behind = True
        pids = t.backend_pids()
        await asyncio.to_thread(t.bacula.kill, "fd")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await t.vm.kill()
        await asyncio.to_thread(t.bacula.start_daemon, "fd")
        return f"killed QEMU, the File Daemon and backend {pids} at once"

    async def during_cut_nbd(self, rng: random.Random) -> str:
        vm = self._t.vm
        exports = await vm.qmp("query-block-exports")
        if not exports:
            return "no NBD export is there"
        name = rng.choice(sorted(export["id"] for export in exports))
        try:
            await vm.qmp("block-export-del", id=name, mode="hard")
        except QmpRefused as error:
            return f"too late: {error}"
        return f"cut the NBD connections of {name}"

    async def during_full_scratch(self, rng: random.Random) -> str:
        """The store is small from the beginning; now the guest fills it."""
        await self._t.writer.burst(60)
        return "the guest wrote much"

    async def during_kill_qemu(self, rng: random.Random) -> str:
        self._t.vm_died = True
        await self._t.vm.kill()
        return "killed QEMU"

    async def during_reboot(self, rng: random.Random) -> str:
        await self._t.vm.qmp("system_reset")
        return "the guest rebooted"

    async def during_power_off(self, rng: random.Random) -> str:
        self._t.vm_died = True
        async with self._t.writer.still():
            await self._t.vm.power_off_guest()
        return "the guest powered itself off"

    async def during_grow(self, rng: random.Random) -> str:
        """PVE's lock forbids it through the API; somebody at the monitor may.

        Not while filters are about to be put in: they are made for the old size, and
        until they go the guest can't write to what is new. The exports, which come
        last, say that this is past.
        """
        t = self._t
        if not await t.vm.qmp("query-block-exports"):
            return "not grown: the point in time is being prepared"
        key = rng.choice(t.keys)
        size = t.writer.sizes[key] + rng.randrange(4, 1024, 4) * 1024
        name = {"node_name": f"drive-{key}"} if t.vm.modern else {
            "device": f"drive-{key}"
        }  # fmt: skip
        try:
            async with t.writer.still():
                await t.vm.qmp("block_resize", **name, size=size)
        except QmpRefused as error:
            return f"{key} can't grow: {error}"
        t.grew = True
        return f"{key} grew to {size} bytes"

    async def during_other_job(self, rng: random.Random) -> str:
        return await self._t.start_other(rng.choice((MAIN, OTHER)))


class SmallScratch:
    """A scratch directory of a few MiB: a file system of its own."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self._size = folder, size

    async def __aenter__(self) -> SmallScratch:
        self.folder.mkdir()
        options = f"size={self._size},mode=700"
        await asyncio.to_thread(
            truth.run, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(truth.run, "umount", "-l", str(self.folder))
        self.folder.rmdir()


REFUSED = (QmpRefused, PveplugError, ApiError, TimeoutError, ConnectionError)
"""What an event may meet that comes too early or too late."""
