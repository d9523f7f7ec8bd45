# SPDX-License-Identifier: Apache-2.0
"""What a dead job left, field by field, with PVE's programs and QEMU scripted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug import recovery
from pveplug.errors import IntegrityError, JobError, TransportError
from pveplug.events import ListReporter
from pveplug.journal import Entry, open_journal, own_vm, read_entry
from pveplug.node import Node
from pveplug.pve_local import ProgramError, PveLocal, VmProcess
from pveplug.qmp import VmGoneError
from pveplug.recovery import clean_up_job, recover, recover_vm
from pveplug.vmhold import held, take_lock

MISSING = "Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist"
JOB = "nightly.2026-11-23_01.00.00_03"
WHOLE = json.dumps(
    dataclasses.asdict(
        Entry(100, JOB, "backup", 1, 1.5, locked=False, touched=True, files=["/x"])
    )
).encode()


class Config:
    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        self.lock = values.get("lock", "")


class ScriptedLocal:
    """PVE's root programs; ``did`` is what was done, in order."""

    def __init__(self) -> None:
        self.values: dict[str, str] | None = {}
        self.running = True
        self.volumes: set[str] = set()
        self.did: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.late: list[Any] = []
        """Done, one each, whenever somebody looks for a VM or a volume."""
        self.set_lock_first: Any = None

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]
        self.did.append(what)

    def vm_running(self, vmid: int) -> VmProcess | None:
        return VmProcess(os.getpid(), 0, "") if self.running else None

    async def config(self, vmid: int) -> Config:
        if self.late:
            self.late.pop(0)()
        if self.values is None:
            raise ProgramError(["qm", "config"], 2, MISSING)
        return Config(self.values)

    async def unlock(self, vmid: int) -> bool:
        if self.values is None or (await self.config(vmid)).lock != "backup":
            return False
        self._do("unlock")
        cast(dict[str, str], self.values).pop("lock")
        return True

    async def set_lock(self, vmid: int, proof: Path | None = None) -> None:
        if self.set_lock_first:
            await self.set_lock_first()
        values = cast(dict[str, str], self.values)
        if "lock" in values:
            raise ProgramError(["qm"], 255, f"VM is locked ({values['lock']})")
        self._do("lock")
        values["lock"] = "backup"
        if proof:
            proof.touch()

    async def destroy_vm(self, vmid: int) -> bool:
        self._do("destroy")
        self.values = None
        return True

    async def volume_exists(self, volid: str) -> bool:
        if self.late:
            self.late.pop(0)()
        return volid in self.volumes

    async def fleecing_volumes(self, vmid: int) -> list[str]:
        return sorted(v for v in self.volumes if f"vm-{vmid}-fleece-" in v)

    async def free_volume(self, volid: str) -> None:
        self._do(f"free {volid}")
        self.volumes.discard(volid)

    async def deactivate(self, volid: str) -> None:
        self._do(f"deactivate {volid}")

    @contextlib.contextmanager
    def keeping(self, fd: int) -> Iterator[None]:
        os.fstat(fd)
        yield

    @contextlib.asynccontextmanager
    async def register_qmeventd(self, vmid: int) -> Any:
        self._do("register")
        yield None
        self.did.append("unregister")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(
        qemu_run_dir=str(tmp_path),
        state_dir=str(tmp_path / "state"),
        runtime_dir=str(tmp_path / "run"),
    )


@pytest.fixture
def local() -> ScriptedLocal:
    return ScriptedLocal()


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the clean-up of QEMU answers, one after the other: a list, or an error."""
    answers: list[Any] = []

    async def clean_up(qmp: str, nbd: str) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast(list[str], answer)

    monkeypatch.setattr(recovery, "clean_up", clean_up)
    return answers


def dead(node: Node, kind: str = "backup", **fields: Any) -> Entry:
    """The journal of a job that died long ago."""
    journal = open_journal(node.state_dir, 100, JOB, kind)
    journal.note(pid=1, **fields)
    journal.entry.changed = time.time() - 60
    return journal.entry


async def undo(node: Node, local: ScriptedLocal, entry: Entry) -> list[str]:
    return await recover(node, cast(PveLocal, local), entry)


async def test_without_a_journal_there_is_nothing_to_do(
    node: Node, local: ScriptedLocal
) -> None:
    assert await recover_vm(node, cast(PveLocal, local), 100) == []
    assert local.did == []


async def test_an_empty_journal_is_forgotten(node: Node, local: ScriptedLocal) -> None:
    assert await undo(node, local, dead(node)) == []
    assert read_entry(node.state_dir, 100) is None


async def test_scratch_goes_after_qemu_and_the_lock_goes_last(
    node: Node, local: ScriptedLocal, qemu: list[Any], tmp_path: Path
) -> None:
    scratch = tmp_path / "ph-100-scsi0.qcow2"
    scratch.touch()
    local.values = {"lock": "backup"}
    local.volumes = {"s:vm-100-fleece-0"}
    qemu.append(["ph-cbw-scsi0"])
    entry = dead(
        node,
        touched=True,
        locked=True,
        files=[str(scratch), "/gone/ph-100-scsi1.qcow2"],
        volumes=["s:vm-100-fleece-0"],
    )
    did = await undo(node, local, entry)
    assert local.did == ["free s:vm-100-fleece-0", "unlock"]
    assert not scratch.exists()
    assert did == [
        "freed QEMU of ph-cbw-scsi0",
        f"removed {scratch}",
        "freed s:vm-100-fleece-0",
        "unlocked the VM",
    ]
    assert read_entry(node.state_dir, 100) is None


async def test_a_vm_that_is_gone_needs_no_clean_up_of_qemu(
    node: Node, local: ScriptedLocal, qemu: list[Any]
) -> None:
    qemu.append(VmGoneError("nobody listens"))
    assert await undo(node, local, dead(node, touched=True)) == []
    assert read_entry(node.state_dir, 100) is None


@pytest.mark.parametrize(
    "error", [TransportError("the monitor has been busy"), IntegrityError("still used")]
)
async def test_a_qemu_that_cannot_be_freed_keeps_scratch_and_journal(
    node: Node,
    local: ScriptedLocal,
    qemu: list[Any],
    tmp_path: Path,
    error: Exception,
) -> None:
    scratch = tmp_path / "ph-100-scsi0.qcow2"
    scratch.touch()
    local.values = {"lock": "backup"}
    qemu.append(error)
    entry = dead(node, touched=True, locked=True, files=[str(scratch)])
    with pytest.raises(JobError, match=r"Remedy.*100\.json"):
        await undo(node, local, entry)
    assert scratch.exists()
    assert local.did == ["unlock"]  # what can be undone is
    assert read_entry(node.state_dir, 100) is not None


async def test_a_step_that_fails_oddly_does_not_keep_the_others_from_it(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    local.volumes = {"s:a", "s:b"}
    local.fails["free s:a"] = RuntimeError("never expected")
    entry = dead(node, volumes=["s:a", "s:b"], locked=True)
    with pytest.raises(JobError, match="never expected"):
        await undo(node, local, entry)
    assert local.did == ["free s:b", "unlock"]


async def test_volumes_are_not_freed_while_nobody_knows_who_uses_them(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def config(vmid: int) -> Config:
        raise ProgramError(["qm", "config"], 255, "ipcc_send_rec failed")

    monkeypatch.setattr(local, "config", config)
    local.volumes = {"s:a"}
    with pytest.raises(JobError, match="ipcc_send_rec"):
        await undo(node, local, dead(node, volumes=["s:a"]))
    assert local.did == []


# --- locks ----------------------------------------------------------------------------


async def test_a_lock_that_is_gone_already_is_no_failure(
    node: Node, local: ScriptedLocal
) -> None:
    assert await undo(node, local, dead(node, locked=True)) == []
    local.values = None
    assert await undo(node, local, dead(node, locked=True)) == []
    assert local.did == []


@pytest.mark.parametrize("proof", [True, False])
async def test_a_lock_that_was_asked_for_is_ours_only_with_the_proof(
    node: Node, local: ScriptedLocal, proof: bool
) -> None:
    local.values = {"lock": "backup"}
    entry = dead(node, asking=True)
    if proof:
        Path(node.state_dir, "vms/100.held").touch()
    await undo(node, local, entry)
    assert local.did == (["unlock"] if proof else [])
    assert not Path(node.state_dir, "vms/100.held").exists()


async def test_a_lock_taken_while_we_are_cancelled_is_known(
    node: Node, local: ScriptedLocal
) -> None:
    journal = open_journal(node.state_dir, 100, JOB, "backup")
    begun = asyncio.Event()

    async def slowly() -> None:
        begun.set()
        await asyncio.sleep(0.05)

    local.set_lock_first = slowly
    task = asyncio.create_task(take_lock(cast(PveLocal, local), journal))
    await begun.wait()
    entry = read_entry(node.state_dir, 100)
    assert entry is not None
    assert entry.asking
    assert not entry.locked
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    entry = read_entry(node.state_dir, 100)
    assert entry is not None
    assert entry.locked
    assert not entry.asking


async def test_a_lock_of_another_is_neither_taken_nor_claimed(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    journal = open_journal(node.state_dir, 100, JOB, "backup")
    with pytest.raises(ProgramError):
        await take_lock(cast(PveLocal, local), journal)
    assert not journal.entry.locked
    await undo(node, local, journal.entry)
    assert local.did == []


async def hold(node: Node, local: ScriptedLocal, say: ListReporter, **more: Any) -> Any:
    values = cast(dict[str, str], local.values)

    async def lock_now() -> str:
        return values.get("lock", "")

    return held(
        node,
        cast(PveLocal, local),
        100,
        job=JOB,
        kind="backup",
        lock_wait_s=0.0,
        lock_now=lock_now,
        say=say,
        **more,
    )


async def test_a_vm_is_held_and_given_back(node: Node, local: ScriptedLocal) -> None:
    async with await hold(node, local, ListReporter()) as vm:
        assert vm.journal.entry.locked
        assert cast(dict[str, str], local.values)["lock"] == "backup"
    assert local.did == ["lock", "register", "unregister", "unlock"]
    assert not list(Path(node.state_dir, "vms").glob("*.json"))


async def test_a_locked_vm_is_refused_and_left_locked(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    with pytest.raises(JobError, match=r"locked \(backup\) by vzdump"):
        async with await hold(node, local, ListReporter()):
            pass
    assert local.values == {"lock": "backup"}
    assert read_entry(node.state_dir, 100) is None


async def test_a_failure_inside_is_not_hidden_by_one_of_the_way_out(
    node: Node, local: ScriptedLocal
) -> None:
    say = ListReporter()
    local.fails["unlock"] = ProgramError(["qm", "unlock"], 255, "no quorum")
    with pytest.raises(ValueError, match="the reason"):
        async with await hold(node, local, say):
            raise ValueError("the reason")
    assert "could not be unlocked" in str(say.lines)
    entry = read_entry(node.state_dir, 100)
    assert entry is not None
    assert entry.locked


async def test_what_a_dead_job_left_is_undone_before_a_vm_is_held(
    node: Node, local: ScriptedLocal
) -> None:
    say = ListReporter()
    local.values = {"lock": "backup"}
    dead(node, locked=True)
    async with await hold(node, local, say):
        pass
    assert local.did[:2] == ["unlock", "lock"]
    assert "after an earlier job" in str(say.lines)


# --- restores -------------------------------------------------------------------------


def restore(node: Node, **fields: Any) -> Entry:
    return dead(node, "restore", created=True, uuid="u-1", **fields)


async def test_an_unfinished_vm_is_destroyed_with_its_volumes(
    node: Node, local: ScriptedLocal
) -> None:
    local.running = False
    local.values = {"smbios1": "uuid=U-1", "lock": "backup"}
    local.volumes = {"s:a"}
    entry = restore(node, volumes=["s:a", "s:b"], active=["s:a", "s:b"], locked=True)
    await undo(node, local, entry)
    assert local.did == ["deactivate s:a", "destroy", "free s:a"]


async def test_somebody_elses_vm_under_the_same_id_stays(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"smbios1": "uuid=u-2"}
    await undo(node, local, restore(node))
    assert local.did == []


async def test_a_vm_of_an_unknown_identity_is_never_destroyed(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"smbios1": "uuid=u-2"}
    await undo(node, local, dead(node, "restore", created=True))
    assert local.did == []


async def test_a_half_restored_vm_that_somebody_uses_by_now_stays_and_is_named(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {
        "smbios1": "uuid=u-1",
        "scsi0": "s:vm-100-disk-0,size=1G",
        "scsi1": "s:vm-100-disk-7,size=1G",
        "ide2": "s:cloudinit,media=cdrom",
    }
    did = await undo(node, local, restore(node, volumes=["s:vm-100-disk-0"]))
    assert local.did == []
    assert did == [
        "VM 100 stays: the restore was not finished, but it has disks that the restore "
        "did not make: s:vm-100-disk-7; if it is locked and you want it: qm unlock 100"
    ]


async def test_a_vm_that_is_created_after_our_death_is_waited_for(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = None

    def appear() -> None:
        local.values = {"smbios1": "uuid=u-1"}

    local.late = [lambda: None, appear]
    entry = restore(node)
    entry.changed = time.time()
    await undo(node, local, entry)
    assert local.did == ["destroy"]


async def test_a_volume_that_is_allocated_after_our_death_is_waited_for(
    node: Node, local: ScriptedLocal
) -> None:
    entry = dead(node, volumes=["s:a"])
    entry.changed = time.time()
    local.late = [lambda: None, lambda: None, lambda: local.volumes.add("s:a")]
    await undo(node, local, entry)
    assert local.did == ["free s:a"]


async def test_volumes_that_were_attached_just_before_the_kill_stay(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"scsi1": "s:vm-100-disk-3,size=1G"}
    local.volumes = {"s:vm-100-disk-3", "s:vm-100-disk-4"}
    entry = dead(node, "restore", volumes=sorted(local.volumes))
    did = await undo(node, local, entry)
    assert local.did == ["free s:vm-100-disk-4"]
    assert did == ["freed s:vm-100-disk-4"]


async def test_sockets_of_the_dead_process_go_and_others_stay(
    node: Node, local: ScriptedLocal
) -> None:
    run = Path(node.runtime_dir)
    run.mkdir()
    for name in ("nbd-1-aa.sock", "nbd-12-aa.sock", "100.nbd"):
        (run / name).touch()
    await undo(node, local, dead(node))
    assert {path.name for path in run.iterdir()} == {"nbd-12-aa.sock", "100.nbd"}


async def test_a_socket_of_a_later_process_with_the_same_number_stays(
    node: Node, local: ScriptedLocal
) -> None:
    run = Path(node.runtime_dir)
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(run / "nbd-1-aa.sock"))
        alive.listen()
        await undo(node, local, dead(node))
        assert (run / "nbd-1-aa.sock").exists()


async def test_what_is_no_scratch_image_is_not_removed_and_named(
    node: Node, local: ScriptedLocal, tmp_path: Path
) -> None:
    odd = ["ph-101-scsi0.qcow2", "ph-100-scsi0.qcow2.bak", "passwd"]
    files = [str(tmp_path / name) for name in odd]
    for path in files:
        Path(path).touch()
    folder = tmp_path / "ph-100-scsi0.qcow2"
    folder.mkdir()
    files += [str(folder), "", "ph-100-scsi0.qcow2", "\0"]
    did = await undo(node, local, dead(node, files=files, nbd_socket="/etc/100.nb\0"))
    assert all(text.endswith("it is no scratch image of this VM") for text in did)
    assert all(Path(path).exists() for path in files[:4])
    assert len(did) == 7


async def test_scratch_images_without_a_journal_are_removed_by_the_next_job(
    node: Node, local: ScriptedLocal, qemu: list[Any]
) -> None:
    node = dataclasses.replace(node, scratch_dir=f"{node.state_dir}/scratch")
    scratch = Path(node.scratch_dir)
    scratch.mkdir(parents=True)
    for name in ("ph-100-scsi0.qcow2", "ph-1001-scsi0.qcow2"):
        (scratch / name).touch()
    qemu.append(["ph-sc-scsi0"])
    did = await recover_vm(node, cast(PveLocal, local), 100)
    assert did == [
        "freed QEMU of ph-sc-scsi0",
        f"removed {scratch}/ph-100-scsi0.qcow2",
    ]
    assert [path.name for path in scratch.iterdir()] == ["ph-1001-scsi0.qcow2"]


# --- damaged journals -----------------------------------------------------------------


@given(
    st.one_of(
        st.binary(),
        st.integers(0, 600).map(lambda cut: WHOLE[:cut]),
        st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=4)).map(
            lambda hit: WHOLE[: hit[0]] + hit[1] + WHOLE[hit[0] + len(hit[1]) :]
        ),
        st.just(b"[" * 100_000),
    )
)
def test_no_damage_to_a_journal_stops_a_recovery_or_goes_unsaid(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        node = Node(
            qemu_run_dir=folder,
            state_dir=f"{folder}/state",
            runtime_dir=f"{folder}/run",
            scratch_dir=f"{folder}/scratch",
        )
        local = ScriptedLocal()
        local.running = False
        local.values = {"lock": "backup"}
        Path(node.state_dir, "vms").mkdir(parents=True)
        path = Path(node.state_dir, "vms/100.json")
        path.write_bytes(data)
        readable = read_entry(node.state_dir, 100)
        assert readable is not None
        did = asyncio.run(recover_vm(node, cast(PveLocal, local), 100))
        if readable.damage:
            assert "can't be read" in did[0]
            assert local.did == []  # the lock may be anybody's
        assert not path.exists()


async def test_a_broken_journals_lock_is_ours_where_the_proof_is_there(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    dead(node, asking=True)
    Path(node.state_dir, "vms/100.json").write_bytes(b"\0" * 300)
    Path(node.state_dir, "vms/100.held").touch()
    did = await recover_vm(node, cast(PveLocal, local), 100)
    assert local.did == ["unlock"]
    assert "can't be read" in did[0]


async def test_a_proof_without_a_journal_proves_nothing(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    Path(node.state_dir, "vms").mkdir(parents=True)
    Path(node.state_dir, "vms/100.held").touch()
    assert await recover_vm(node, cast(PveLocal, local), 100) == []
    with pytest.raises(JobError, match="vzdump"):
        async with await hold(node, local, ListReporter()):
            pass
    assert local.values == {"lock": "backup"}


# --- freezes --------------------------------------------------------------------------


async def test_an_agent_that_is_silent_hinders_nobody(
    node: Node, local: ScriptedLocal
) -> None:
    local.values = {"lock": "backup"}
    recovery_s = recovery.AGENT_S
    assert recovery_s >= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "AGENT_S", 0.01)
        did = await undo(node, local, dead(node, frozen=True, locked=True))
    assert local.did == ["unlock"]
    assert "guest agent" in did[0]
    entry = read_entry(node.state_dir, 100)
    assert entry is not None
    assert entry.frozen  # it is asked again next time
    assert not entry.locked


async def test_a_stopped_vm_is_neither_thawed_nor_freed(
    node: Node, local: ScriptedLocal, qemu: list[Any]
) -> None:
    local.running = False
    assert await undo(node, local, dead(node, frozen=True, touched=True)) == []
    assert qemu == []


async def test_a_guest_that_could_not_be_asked_is_remembered_by_the_next_job(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "AGENT_S", 0.01)
    dead(node, frozen=True)
    async with await hold(node, local, ListReporter()):
        entry = read_entry(node.state_dir, 100)
        assert entry is not None
        assert entry.frozen
    journal = open_journal(node.state_dir, 100, JOB, "restore")
    journal.add("volumes", "s:a")
    journal.close()  # as a restore of a disk ends
    entry = read_entry(node.state_dir, 100)
    assert entry is not None
    assert (entry.frozen, entry.volumes) == (True, [])


# --- --cleanup ------------------------------------------------------------------------


async def clean_up(
    monkeypatch: pytest.MonkeyPatch, node: Node, local: ScriptedLocal, job: str
) -> tuple[bool, list[Any]]:
    monkeypatch.setattr(recovery, "PveLocal", lambda node: local)
    say = ListReporter()
    return await clean_up_job(node, job, say), list(say.lines)


async def test_an_unknown_job_is_no_failure(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(node, locked=True)
    assert await clean_up(monkeypatch, node, local, "another") == (True, [])
    assert read_entry(node.state_dir, 100) is not None


async def test_a_job_is_cleaned_up_once(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.values = {"lock": "backup"}
    dead(node, locked=True)
    well, lines = await clean_up(monkeypatch, node, local, JOB)
    assert well
    assert "unlocked the VM" in str(lines)
    assert await clean_up(monkeypatch, node, local, JOB) == (True, [])
    assert local.did == ["unlock"]


async def test_a_running_job_is_not_cleaned_up(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "OWNER_GONE_S", 0.1)
    dead(node, locked=True)
    async with own_vm(node.state_dir, 100, 0):
        well, lines = await clean_up(monkeypatch, node, local, JOB)
    assert not well
    assert "working on this VM" in str(lines)
    assert local.did == []


async def test_a_vm_whose_recovery_cannot_be_read_stays_with_all_that_landed(
    node: Node, local: ScriptedLocal
) -> None:
    """It may have been handed over: its user's writes are in its overlays."""
    node = dataclasses.replace(node, landing_dir=f"{node.state_dir}/landing")
    landed = Path(node.landing_dir) / "100"
    landed.mkdir(parents=True)
    (landed / "recovery.json").write_text("{")
    local.running = False
    local.values = {"smbios1": "uuid=abc", "scsi0": "local:100/o.qcow2"}
    local.volumes = {"local:100/o.qcow2"}
    entry = dead(
        node, "restore", created=True, uuid="abc", volumes=["local:100/o.qcow2"]
    )
    told = await undo(node, local, entry)
    assert local.did == []
    assert (landed / "recovery.json").exists()
    assert "whether it had been handed over isn't known" in told[0]
    assert str(landed) in told[0]
