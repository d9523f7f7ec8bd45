# SPDX-License-Identifier: Apache-2.0
"""Ways out of an instant recovery and of a proof, and of a recovery given up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pveplug.config import Instant, RestoreConfig
from pveplug.errors import JobError
from pveplug.events import ListReporter
from pveplug.ir import removal
from pveplug.ir.prove_target import ProveTarget
from pveplug.ir.record import LandedDisk, Record, Recovery
from pveplug.ir.removal import discard
from pveplug.ir.target import InstantTarget
from pveplug.node import Node
from pveplug.pve_local import ProgramError, VmProcess
from pveplug.restore_vm import Goal
from pveplug.tasks import to_the_end
from pveplug.vmrestore import RestorePlan

UUID = "11111111-2222-3333-4444-555555555555"
OVERLAY = "local:120/vm-120-disk-0.qcow2"
MISSING = "Configuration file 'nodes/pve1/qemu-server/120.conf' does not exist"


class ScriptedLocal:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.values: dict[str, str] | None = None
        self.running = False
        self.there: set[str] = set()
        self.did: list[str] = []

    def vm_running(self, vmid: int) -> VmProcess | None:
        return VmProcess(os.getpid(), 0, "") if self.running else None

    @contextlib.contextmanager
    def keeping(self, fd: int) -> Iterator[None]:
        yield

    async def config(self, vmid: int) -> Any:
        if self.values is None:
            raise ProgramError(["qm", "config"], 2, MISSING)
        return SimpleNamespace(values=dict(self.values))

    async def set_values(self, vmid: int, values: Mapping[str, str]) -> None:
        self.did.append("set " + ",".join(f"{k}={v}" for k, v in values.items()))

    async def stop_vm(self, vmid: int) -> None:
        self.did.append("stop")

    async def destroy_vm(self, vmid: int) -> bool:
        self.did.append("destroy")
        return True

    async def volume_exists(self, volid: str) -> bool:
        return volid in self.there

    async def free_volume(self, volid: str) -> None:
        self.did.append(f"free {volid}")


@pytest.fixture
def local(node: Node) -> ScriptedLocal:
    return ScriptedLocal(node)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(
        state_dir=f"{tmp_path}/s",
        landing_dir=f"{tmp_path}/l",
        runtime_dir=f"{tmp_path}/r",
        firewall_dir=f"{tmp_path}/pve/firewall",
        keeper="child",
    )


def target_of(
    kind: type[InstantTarget],
    node: Node,
    local: ScriptedLocal,
    *,
    network: Any = "auto",
) -> Any:
    connection = cast(Any, SimpleNamespace(node="pve1", user="root@pam"))
    config = RestoreConfig(connection, "vm", "why")
    goal = Goal(cast(Any, SimpleNamespace(vmid=100, job="n.1")), None)
    common = (node, cast(Any, None), cast(Any, local), goal, cast(Any, None))
    return kind(config, Instant(network=network), *common, ListReporter())


# --- ways out -------------------------------------------------------------------------


async def test_a_start_under_way_is_awaited_though_the_job_is_cancelled(
    node: Node, local: ScriptedLocal
) -> None:
    """Else its VM would be undone while it is being started."""
    target = target_of(InstantTarget, node, local)
    done = asyncio.Event()

    async def start() -> None:
        await asyncio.sleep(0.2)
        done.set()

    target._starter = asyncio.create_task(to_the_end(start()))
    target._starting = True
    waits = asyncio.create_task(target._started_or_not())
    await asyncio.sleep(0.05)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    await target.aclose()
    assert done.is_set()


async def test_a_proof_never_stops_a_vm_that_took_its_id(
    node: Node, local: ScriptedLocal
) -> None:
    target = target_of(ProveTarget, node, local)
    target._watching = None
    target._made.vmid = 120
    local.running = True
    local.values = {"smbios1": "uuid=another"}
    await target.aclose()
    assert local.did == []
    await target._made.hold(120, "r.1")
    target._made.journal.note(created=True, uuid=UUID)
    await target.aclose()
    assert local.did == []


async def test_a_proof_whose_vm_does_not_start_says_that_at_once(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(ProveTarget, node, local)

    async def landed() -> None:
        return None

    monkeypatch.setattr(target, "_land", landed)
    target._watching = asyncio.get_running_loop().create_future()
    target._start_failed = "not enough memory"
    async with asyncio.timeout(5):
        with pytest.raises(JobError, match="was not started: not enough memory"):
            await target.commit()


# --- network cards --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "original", "unplugged"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("down", False, True),
        ("up", True, False),
    ],
)
def test_network_cards_are_unplugged_where_two_vms_could_meet(
    node: Node, local: ScriptedLocal, network: str, original: bool, unplugged: bool
) -> None:
    target = target_of(InstantTarget, node, local, network=network)
    target._original_exists = original
    plan = cast(
        RestorePlan,
        SimplePlan(
            {"net0": "virtio=AA:BB:CC:00:00:01,bridge=vmbr0", "netmask": "x"}, ()
        ),
    )
    shaped = target._shaped(plan)
    assert shaped.params["net0"].endswith(",link_down=1") is unplugged
    assert shaped.params["netmask"] == "x"
    assert len(shaped.warnings) == unplugged
    # One that was unplugged already is no news.
    assert target._shaped(shaped) == shaped


@dataclasses.dataclass(frozen=True)
class SimplePlan:
    params: dict[str, str]
    warnings: tuple[str, ...]


# --- given up -------------------------------------------------------------------------


@pytest.fixture
def recovery(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> Recovery:
    monkeypatch.setattr(removal, "PveLocal", lambda node: local)
    found = Recovery(node, 120)
    found.make()
    record = Record(120, UUID, "pve1", "/@proxmox/1", "n.1", "r.1", 1.0)
    record.disks = [LandedDisk("scsi0", "scsi0", 1 << 20, "lvm", "raw", OVERLAY)]
    found.save(record)
    return found


async def test_giving_up_takes_vm_overlays_and_all_that_landed(
    node: Node, local: ScriptedLocal, recovery: Recovery
) -> None:
    local.values = {"smbios1": f"uuid={UUID}", "protection": "1"}
    local.there = {OVERLAY}  # it was never attached, or detached
    said: list[str] = []
    await discard(node, 120, said.append)
    assert local.did == ["set protection=0", "destroy", f"free {OVERLAY}"]
    assert not recovery.exists()
    assert said[-1] == "VM 120: everything of the recovery is removed"


async def test_another_vm_of_the_id_is_not_given_up(
    node: Node, local: ScriptedLocal, recovery: Recovery
) -> None:
    local.values = {"smbios1": "uuid=another"}
    local.there = {OVERLAY}
    with pytest.raises(JobError, match="not the one that was recovered"):
        await discard(node, 120, lambda _: None)
    assert local.did == []
    assert recovery.load()


async def test_a_vm_that_another_node_has_is_not_given_up_here(
    node: Node, local: ScriptedLocal, recovery: Recovery, tmp_path: Path
) -> None:
    config = tmp_path / "pve/nodes/pve2/qemu-server/120.conf"
    config.parent.mkdir(parents=True)
    config.touch()
    local.there = {OVERLAY}
    with pytest.raises(JobError, match="node pve2 has it"):
        await discard(node, 120, lambda _: None)
    assert local.did == []
    assert recovery.load()


async def test_nothing_is_given_up_while_a_job_delivers(
    node: Node, local: ScriptedLocal, recovery: Recovery
) -> None:
    local.values = {"smbios1": f"uuid={UUID}"}
    async with recovery.feeding(1):
        with pytest.raises(JobError, match="cancel that job first"):
            await discard(node, 120, lambda _: None)
    assert local.did == []


async def test_no_job_begins_to_deliver_to_what_is_being_given_up(
    node: Node, local: ScriptedLocal, recovery: Recovery
) -> None:
    local.values = {"smbios1": f"uuid={UUID}"}
    seen: list[bool] = []
    destroy = local.destroy_vm

    async def destroy_vm(vmid: int) -> bool:
        seen.append(recovery.fed())
        return await destroy(vmid)

    local.destroy_vm = destroy_vm  # type: ignore[method-assign]
    await discard(node, 120, lambda _: None)
    assert seen == [True]


# --- what is proven -------------------------------------------------------------------


def test_data_that_was_cut_before_its_comparison_is_not_taken_for_whole(
    node: Node, local: ScriptedLocal
) -> None:
    """All clusters may be here of a job whose image never came to its digest."""
    target = target_of(InstantTarget, node, local)
    members = {"scsi0": ("full", "inc"), "scsi1": ("full",)}
    target._goal.chain = SimpleNamespace(
        jobs=("full", "inc"), keys=tuple(members), members=members.__getitem__
    )
    target._record = SimpleNamespace(verified=["scsi0/inc", "scsi1/full"])
    assert target._unverified() == ["full"]
    target._record.verified.append("scsi0/full")
    assert target._unverified() == []
