# SPDX-License-Identifier: Apache-2.0
"""A keeper and the VM it looks after, with PVE's programs and QEMU scripted.

The landing store, its server and the record are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from pveplug.errors import TransportError
from pveplug.ir import keeper as keeper_module
from pveplug.ir import pausing
from pveplug.ir.control import State, ask
from pveplug.ir.keeper import Keeper
from pveplug.ir.landing import Landing
from pveplug.ir.notes import noted, running_note
from pveplug.ir.record import RECORD, LandedDisk, Record, Recovery
from pveplug.ir.sink import LandingSink
from pveplug.node import Node
from pveplug.pve_local import ProgramError, VmProcess

VMID = 120
UUID = "11111111-2222-3333-4444-555555555555"
OVERLAY = "local:120/vm-120-disk-0.qcow2"
SECOND = "local:120/vm-120-disk-1.qcow2"
SIZE = 256 * 1024
MISSING = "Configuration file 'nodes/pve1/qemu-server/120.conf' does not exist"
LOCKED = "VM is locked (backup)"


class ScriptedLocal:
    """PVE's root programs for one VM; ``did`` is what was done, in order."""

    def __init__(self) -> None:
        self.values: dict[str, str] | None = {
            "smbios1": f"uuid={UUID}",
            "scsi0": f"{OVERLAY},rerror=stop,werror=stop",
            "protection": "1",
            "onboot": "0",
            "tags": "pveplug-ir;web",
            "description": noted("# mine", running_note(VMID, "n.1")),
        }
        self.there = {OVERLAY, SECOND}
        self.did: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        self.run = ""
        """Identity of QEMU's run; empty: it doesn't run."""
        self.node = SimpleNamespace(qmp_socket=lambda vmid: "/nowhere")

    def _may(self, what: str) -> None:
        if self.fails.get(what):
            raise self.fails[what].pop(0)

    def vm_running(self, vmid: int) -> VmProcess | None:
        return VmProcess(os.getpid(), 0, self.run) if self.run else None

    async def config(self, vmid: int) -> Any:
        self._may("config")
        if self.values is None:
            raise ProgramError(["qm", "config"], 2, MISSING)
        return SimpleNamespace(values=dict(self.values))

    async def set_values(
        self, vmid: int, values: Mapping[str, str], *, delete: Any = ()
    ) -> None:
        self._may("set")
        assert self.values is not None
        self.did.append(f"set {','.join(sorted(values))} delete {','.join(delete)}")
        self.values.update(values)
        for key in delete:
            del self.values[key]

    async def volume_exists(self, volid: str) -> bool:
        return volid in self.there

    async def volumes(self, storage: str) -> list[str]:
        return []

    async def move_disk(
        self, vmid: int, key: str, storage: str, **options: Any
    ) -> None:
        self._may("move")
        assert self.values is not None
        volid, _, rest = self.values[key].partition(",")
        self.did.append(f"move {key} {storage}")
        self.there.discard(volid)
        self.values[key] = f"{storage}:vm-120-disk-9,{rest}"

    @contextlib.contextmanager
    def keeping(self, fd: int) -> Iterator[None]:
        yield


@dataclass
class Scene:
    """One recovery, whole and handed over unless a test says otherwise."""

    node: Node
    recovery: Recovery
    record: Record
    local: ScriptedLocal
    qemu: list[str]

    def save(self, **changes: Any) -> None:
        for key, value in changes.items():
            setattr(self.record, key, value)
        self.recovery.save(self.record)

    async def land(self, source: str = "scsi0", *, whole: bool = True) -> None:
        with Landing.create(
            self.recovery.folder, self.recovery.runtime, source, SIZE
        ) as landing:
            if whole:
                async with LandingSink(landing) as sink:
                    await sink.write(0, memoryview(os.urandom(SIZE)))
                    await sink.finish()

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[asyncio.Task[None]]:
        """A keeper that runs while the block does."""
        ready = asyncio.Event()
        work = asyncio.create_task(
            Keeper(self.node, self.recovery, self.record).run(ready)
        )
        started = asyncio.create_task(ready.wait())
        await asyncio.wait([work, started], return_when=asyncio.FIRST_COMPLETED)
        try:
            yield work
        finally:
            started.cancel()
            work.cancel()
            await asyncio.wait([work])
        if not work.cancelled():
            work.result()

    async def state(self) -> State:
        return await ask(self.recovery, "status")

    async def until(self, what: Callable[[State], bool]) -> State:
        async with asyncio.timeout(20):
            while not what(state := await self.state()):
                await asyncio.sleep(0.02)
        return state


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    # Not tmp_path: a socket's path has to be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        node = Node(landing_dir=f"{place}/l", runtime_dir=f"{place}/r", keeper="child")
        recovery = Recovery(node, VMID)
        recovery.make()
        local, qemu = ScriptedLocal(), []
        for name, value in (("TICK_S", 0.01), ("LOOK_S", 0.0), ("AGAIN_S", 0.05)):
            monkeypatch.setattr(keeper_module, name, value)
        monkeypatch.setattr(keeper_module, "PveLocal", lambda node: local)

        async def stop(*_: Any) -> None:
            qemu.append("stop")
            if local.fails.get("stop"):
                raise local.fails["stop"].pop(0)

        async def resume(*_: Any) -> None:
            qemu.append("cont")
            if local.fails.get("cont"):
                raise local.fails["cont"].pop(0)

        async def blocked(_: str) -> None:
            return None

        monkeypatch.setattr(pausing, "_stop", stop)
        monkeypatch.setattr(pausing, "resume", resume)
        monkeypatch.setattr(keeper_module, "query_blocked", blocked)
        disk = LandedDisk("scsi0", "scsi0", SIZE, "lvm", "raw", OVERLAY)
        record = Record(VMID, UUID, "pve1", "/@proxmox/1", "n.1", "r.1", 1.0)
        record.disks = [disk]
        record.handed = record.started = record.whole = True
        recovery.save(record)
        yield Scene(node, recovery, record, local, qemu)


async def test_the_disks_move_and_nothing_of_the_recovery_is_left(scene: Scene) -> None:
    await scene.land()
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert scene.local.values == {
        "smbios1": f"uuid={UUID}",
        "scsi0": "lvm:vm-120-disk-9",
        "tags": "web",
        "description": "# mine",
    }
    assert not scene.recovery.exists()


async def test_what_its_user_changed_meanwhile_stays(scene: Scene) -> None:
    await scene.land()
    assert scene.local.values is not None
    scene.local.values |= {"protection": "0", "onboot": "1"}
    scene.local.values["scsi0"] = f"{OVERLAY},rerror=report,werror=stop"
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert scene.local.values["protection"] == "0"
    assert scene.local.values["onboot"] == "1"
    assert scene.local.values["scsi0"] == "lvm:vm-120-disk-9,rerror=report"


@pytest.mark.parametrize("what", ["set", "config"])
async def test_the_end_waits_for_a_backup_that_has_the_vm(
    scene: Scene, what: str
) -> None:
    """Else protection, tag and notes would stay for ever, or until somebody looks."""
    await scene.land()
    refused: list[Exception] = [ProgramError(["qm"], 255, LOCKED) for _ in range(3)]
    moved = scene.local.move_disk

    async def move_disk(*args: Any, **options: Any) -> None:
        await moved(*args, **options)
        scene.local.fails[what] = refused

    scene.local.move_disk = move_disk  # type: ignore[method-assign]
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert not refused
    assert scene.local.values is not None
    assert "protection" not in scene.local.values
    assert scene.local.did.count("move scsi0 lvm") == 1
    assert not scene.recovery.exists()


async def test_another_vm_that_got_the_id_is_left_alone(scene: Scene) -> None:
    await scene.land(whole=False)
    scene.save(whole=False, timeout=0)
    scene.local.values = {"smbios1": "uuid=another", "scsi0": "lvm:vm-120-disk-0"}
    scene.local.run = "1"
    async with scene.kept():
        state = await scene.until(lambda s: "another SMBIOS UUID" in s.trouble)
        await asyncio.sleep(0.3)
        assert "qm set 120 --smbios1" in state.trouble
    assert scene.local.did == scene.qemu == []
    assert scene.recovery.load()


async def test_a_vm_that_another_node_has_keeps_what_it_depends_on(
    scene: Scene,
) -> None:
    await scene.land()
    scene.save(auto_migrate=False)
    scene.local.values = None
    async with scene.kept():
        state = await scene.until(lambda s: bool(s.trouble))
        assert "not on this node" in state.trouble
        assert OVERLAY in state.trouble
    assert scene.recovery.load()


async def test_a_vm_that_was_removed_takes_its_recovery_with_it(scene: Scene) -> None:
    await scene.land()
    scene.save(auto_migrate=False)
    scene.local.values = None
    scene.local.there = set()
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert not scene.recovery.exists()


async def test_disks_that_changed_places_are_both_moved_before_anything_goes(
    scene: Scene,
) -> None:
    """A keeper that had looked at the keys alone took both for moved."""
    other = LandedDisk("scsi1", "scsi1", SIZE, "lvm", "raw", SECOND)
    scene.save(disks=[*scene.record.disks, other])
    await scene.land()
    await scene.land("scsi1")
    assert scene.local.values is not None
    scene.local.values |= {"scsi0": SECOND, "scsi1": OVERLAY}
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert sorted(d for d in scene.local.did if d.startswith("move")) == [
        "move scsi0 lvm",
        "move scsi1 lvm",
    ]
    assert not scene.local.there


async def test_a_detached_disk_keeps_its_data_and_says_what_to_do(
    scene: Scene,
) -> None:
    await scene.land()
    assert scene.local.values is not None
    del scene.local.values["scsi0"]
    scene.local.values |= {"unused0": OVERLAY, "virtio0": "lvm:vm-120-disk-5"}
    async with scene.kept():
        state = await scene.until(lambda s: bool(s.trouble))
        assert "not attached (unused0)" in state.trouble
        assert "attach it again" in state.trouble
    assert scene.recovery.load()


async def test_a_guest_that_could_not_go_on_is_tried_again(scene: Scene) -> None:
    await scene.land(whole=False)
    scene.save(whole=False, timeout=0)
    scene.local.run = "1"
    async with scene.kept():
        await scene.until(lambda s: s.paused)
        scene.local.fails["cont"] = [TransportError("busy") for _ in range(3)]
        with Landing.open(
            scene.recovery.folder, scene.recovery.runtime, "scsi0"
        ) as landing:
            async with LandingSink(landing) as sink:
                await sink.write(0, memoryview(os.urandom(SIZE)))
                await sink.finish()
        await scene.until(lambda s: not s.paused)
    assert scene.qemu == ["stop", *["cont"] * 4]


async def test_a_pause_that_failed_is_tried_again(scene: Scene) -> None:
    await scene.land(whole=False)
    scene.save(whole=False, timeout=0)
    scene.local.run = "1"
    scene.local.fails["stop"] = [TransportError("the monitor is busy")]
    async with scene.kept():
        await scene.until(lambda s: s.paused)
    assert scene.qemu == ["stop", "stop"]


async def test_damage_pauses_each_run_of_the_vm_once_and_is_told(scene: Scene) -> None:
    """The job that found it may have been killed, or the node rebooted since."""
    await scene.land()
    scene.save(whole=False, damage="VM 120 scsi0: digest.")
    scene.local.run = "1"
    async with scene.kept():
        state = await scene.until(lambda s: s.paused)
        assert "not what was backed up" in state.trouble
        await asyncio.sleep(0.2)
        assert scene.qemu == ["stop"]
        scene.local.run = "2"
        await scene.until(lambda _: scene.qemu == ["stop", "stop"])
    assert not any(d.startswith("move") for d in scene.local.did)


async def test_a_spoiled_record_does_not_end_the_keeper(scene: Scene) -> None:
    await scene.land(whole=False)
    scene.save(whole=False)
    async with scene.kept() as work:
        (scene.recovery.folder / RECORD).write_text("{")
        state = await scene.until(lambda s: bool(s.trouble))
        assert RECORD in state.trouble
        assert not work.done()


async def test_data_that_nobody_compared_to_the_end_is_not_moved_and_told(
    scene: Scene,
) -> None:
    await scene.land()
    scene.save(whole=False)
    async with scene.kept():
        state = await scene.until(lambda s: bool(s.trouble))
        assert "run the restore of job n.1 again" in state.trouble
    assert scene.local.did == []


async def test_the_order_to_move_outlives_the_keeper(scene: Scene) -> None:
    await scene.land(whole=False)
    scene.save(whole=False, auto_migrate=False)
    async with scene.kept():
        await ask(scene.recovery, "migrate")
    with Landing.open(
        scene.recovery.folder, scene.recovery.runtime, "scsi0"
    ) as landing:
        async with LandingSink(landing) as sink:
            await sink.write(0, memoryview(os.urandom(SIZE)))
            await sink.finish()
    scene.save(whole=True)
    async with scene.kept() as work, asyncio.timeout(20):
        await work
    assert not scene.recovery.exists()


async def test_giving_up_ends_a_move_that_holds_the_vm(scene: Scene) -> None:
    await scene.land()
    begun, ended = asyncio.Event(), asyncio.Event()

    async def move_disk(*_: Any, **__: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    scene.local.move_disk = move_disk  # type: ignore[method-assign]
    async with scene.kept():
        async with asyncio.timeout(20):
            await begun.wait()
            await ask(scene.recovery, "release")
            await ended.wait()
        assert (await scene.until(lambda s: s.phase == "landed")).trouble == ""


async def test_why_a_disk_was_not_moved_is_told_though_its_notes_are_locked(
    scene: Scene,
) -> None:
    await scene.land()
    scene.local.fails["move"] = [ProgramError(["qm"], 5, "no space left")]
    scene.local.fails["set"] = [ProgramError(["qm"], 255, LOCKED)]
    async with scene.kept():
        state = await scene.until(lambda s: bool(s.trouble))
        assert "no space left" in state.trouble
        assert "pveplug ir migrate --vmid 120" in state.trouble


async def test_who_asks_whether_a_job_delivers_is_not_taken_for_one(
    scene: Scene,
) -> None:
    import fcntl

    async with scene.recovery.feeding(1):
        assert scene.recovery.fed()
    fd = os.open(scene.recovery.folder / "feed.lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # another who asks
        assert not scene.recovery.fed()
    finally:
        os.close(fd)
