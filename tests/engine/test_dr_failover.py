# SPDX-License-Identifier: Apache-2.0
"""What a DR site does with a replica: each action in each role, and cut anywhere."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pveplug.dr import boot
from pveplug.dr.failover import ACTIONS, Operation
from pveplug.dr.services import ReplicaServices
from pveplug.dr.store import Record, ReplicaError, ReplicaStore
from pveplug.events import ListReporter
from pveplug.proto import dr_frames as f
from pveplug.proto.dr_digest import leaf_digests
from pveplug.proto.pve_refusal import PveRefusalError
from tests.support.dr_sender import UUID, Sender
from tests.support.fake_dr_site import FakeDrSite
from tests.support.requires import requires

pytestmark = requires("qemu-nbd", "qemu-img", "qemu-io")


class Dr:
    """A seeded replica with three restore points, and its receiver's services."""

    def __init__(self, pve: FakeDrSite) -> None:
        self.pve = pve
        self.store = ReplicaStore(pve.node.state_dir)
        self.services = ReplicaServices(self.store, pve.site(), busy_s=0.5)
        self.sender = Sender(self.store, pve.site())
        self.sender.source.set("agent", "1")
        self.say = ListReporter()
        self.states: dict[str, dict[str, bytes]] = {}

    async def make(self, points: int = 3) -> Dr:
        done = await self.sender.seed()
        self.states[done.point.name] = self.sender.source.state()
        for _ in range(points - 1):
            self.sender.source.write("scsi0")
            done = await self.sender.increment()
            self.states[done.point.name] = self.sender.source.state()
        return self

    @property
    def record(self) -> Record:
        record = self.store.read(UUID)
        assert record is not None
        return record

    @property
    def vmid(self) -> int:
        return self.record.vmid

    @property
    def points(self) -> list[str]:
        return [point.name for point in self.record.points]

    async def act(self, action: str, **options: str) -> f.Result:
        opening = f.Open(action, UUID, 100, "shop", "main/pve9", "dr.1")
        command = f.Command(action, options)
        if action == "failover-test":
            return await self.services.act(opening, None, command, self.say)
        async with self.services.open(opening, self.say) as replica:
            return await self.services.act(opening, replica, command, self.say)

    async def refused(self, action: str, **options: str) -> ReplicaError:
        with pytest.raises(ReplicaError) as caught:
            await self.act(action, **options)
        return caught.value

    def holds(self, vmid: int = 0) -> dict[str, bytes]:
        """What a VM's disks hold, the replica's by default."""
        sizes = {key: volume.size for key, volume in self.record.disks.items()}
        return {
            key: self.pve.content(volid)[: sizes.get(key, None)]
            for key, volid in self.pve.disks(vmid or self.vmid).items()
        }

    def guest_writes(self, data: bytes = b"dr" * 4096) -> None:
        self.pve.write(self.pve.disks(self.vmid)["scsi0"], 65536, data)


_MADE: dict[int, tuple[Path, tuple[Any, ...]]] = {}
"""Points -> where a replica with so many was kept, and what is in memory of it."""


async def made(base: Path, points: int, keep: pytest.TempPathFactory) -> Dr:
    """Return a replica; it is made once and then copied, for that is much quicker."""
    dr = Dr(FakeDrSite(base))
    if points in _MADE:
        kept, values = _MADE[points]
        shutil.copytree(kept, base, dirs_exist_ok=True)
        pve = dr.pve
        pve.vms, pve.snaps, dr.sender.source, dr.states = copy.deepcopy(values)
        return dr
    await dr.make(points)
    kept = keep.mktemp("replica") / "base"
    shutil.copytree(base, kept)
    values = (dr.pve.vms, dr.pve.snaps, dr.sender.source, dr.states)
    _MADE[points] = kept, copy.deepcopy(values)
    return dr


@pytest.fixture
async def dr(
    short_tmp: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Dr:
    monkeypatch.setattr(boot, "POLL_S", 0.001)
    monkeypatch.setattr(boot, "SETTLE_S", 0.01)
    return await made(short_tmp, 3, tmp_path_factory)


@pytest.fixture
async def seeded(
    short_tmp: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Dr:
    """The same with one restore point."""
    monkeypatch.setattr(boot, "POLL_S", 0.001)
    monkeypatch.setattr(boot, "SETTLE_S", 0.01)
    return await made(short_tmp, 1, tmp_path_factory)


# --- failover-exec


async def test_a_failover_boots_the_newest_restore_point(dr):
    result = await dr.act("failover-exec")
    assert result.epoch == 2
    assert result.values["point"] == dr.points[-1]
    assert result.values["verdict"] == boot.ALIVE
    assert result.values["vmid"] == dr.vmid
    assert dr.pve.running == {dr.vmid}
    assert dr.pve.vms[dr.vmid]["onboot"] == "1"
    assert dr.record.role == "active"
    assert not dr.record.welcome
    assert dr.record.failover["point"] == dr.points[-1]
    assert dr.holds() == dr.states[dr.points[-1]]


async def test_the_role_is_durable_before_the_vm_starts(dr):
    seen = []

    def before(call: str) -> None:
        if call.startswith("start"):
            seen.append((dr.record.role, dr.record.epoch))

    dr.pve.before = before
    await dr.act("failover-exec")
    assert seen == [("active", 2)]


async def test_a_failover_to_an_older_restore_point(dr):
    result = await dr.act("failover-exec", dr_restore_point=dr.points[0])
    assert result.values["point"] == dr.points[0]
    assert dr.holds() == dr.states[dr.points[0]]


async def test_an_interrupted_rollback_is_not_taken_for_the_newest_point(dr):
    def before(call: str) -> None:
        if call.startswith("start"):
            raise AssertionError

    def after(call: str) -> None:
        if call.startswith("rollback"):
            raise PveRefusalError("the answer was lost")

    dr.pve.after = after
    error = await dr.refused("failover-exec", dr_restore_point=dr.points[0])
    assert error.code == "pve"
    assert dr.record.role == "standby"
    assert dr.record.acked is None
    assert dr.record.dirty
    dr.pve.after = lambda call: None
    await dr.act("failover-exec")
    assert dr.holds() == dr.states[dr.points[-1]]


async def test_a_lock_that_a_killed_session_left_is_in_nobodys_way(dr):
    await dr.pve.set_lock(dr.vmid, dr.store.directory(UUID) / "held")
    assert dr.pve.vms[dr.vmid]["lock"] == "backup"
    await dr.act("failover-exec")
    assert "lock" not in dr.pve.vms[dr.vmid]


async def test_no_such_restore_point_names_those_there_are(dr):
    error = await dr.refused("failover-exec", dr_restore_point="yesterday")
    assert error.code == "configuration"
    assert dr.points[0] in str(error)
    assert dr.record.role == "standby"


async def test_a_replica_that_somebody_started_is_no_place_to_fail_over_to(dr):
    dr.pve.running.add(dr.vmid)
    error = await dr.refused("failover-exec")
    assert error.code == "role"
    assert "stop it" in str(error)


async def test_a_failed_start_leaves_it_active_and_may_be_repeated(dr):
    def before(call: str) -> None:
        if call.startswith("start"):
            raise PveRefusalError("no bridge vmbr0")

    dr.pve.before = before
    error = await dr.refused("failover-exec")
    assert error.code == "pve"
    assert "is the active one now" in str(error)
    assert dr.record.role == "active"
    dr.pve.before = lambda call: None
    result = await dr.act("failover-exec")
    assert result.epoch == 2
    assert result.values["verdict"] == boot.ALIVE


async def test_failing_over_twice_changes_nothing(dr):
    first = await dr.act("failover-exec")
    dr.guest_writes()
    again = await dr.act("failover-exec")
    assert again.epoch == first.epoch
    assert dr.pve.calls.count(f"start {dr.vmid}") == 1
    error = await dr.refused("failover-exec", dr_restore_point=dr.points[0])
    assert "failover-undo first" in str(error)


@pytest.mark.parametrize(
    ("agent", "asked", "verdict"),
    [("1", 3, boot.ALIVE), ("1", 0, boot.SILENT), ("0", 1, boot.NO_AGENT)],
)
async def test_the_verdict_says_what_is_known_of_the_guest(dr, agent, asked, verdict):
    dr.pve.vms[dr.vmid]["agent"] = agent
    dr.pve.agents = asked
    result = await dr.act("failover-exec", dr_boot_timeout="0" if not asked else "9")
    assert result.values["verdict"] == verdict


async def test_a_vm_that_ends_at_once_is_no_success(dr):
    dr.pve.dies = True
    error = await dr.refused("failover-exec")
    assert "ended again" in str(error)


# --- failover-undo, failback-pre


async def test_undo_is_a_standby_at_the_newest_point_with_a_welcome(dr):
    await dr.act("failover-exec", dr_restore_point=dr.points[0])
    dr.guest_writes()
    result = await dr.act("failover-undo")
    assert result.epoch == 2
    assert dr.pve.running == set()
    record = dr.record
    assert (record.role, record.welcome, record.failover) == ("standby", True, None)
    assert record.acked == record.points[-1].cycle
    assert dr.holds() == dr.states[dr.points[-1]]
    assert dr.pve.vms[dr.vmid]["onboot"] == "0"
    dr.sender.source.write("scsi1")
    await dr.sender.increment()
    assert dr.holds() == dr.sender.source.state()


async def test_failback_pre_discards_only_when_told_to(dr):
    await dr.act("failover-exec")
    dr.guest_writes()
    error = await dr.refused("failback-pre")
    assert error.code == "role"
    assert "failback brings" in str(error)
    assert dr.record.role == "active"
    assert dr.pve.running == set()
    await dr.act("failback-pre", dr_discard="yes")
    assert dr.record.role == "standby"
    assert dr.holds() == dr.states[dr.points[-1]]


async def test_failback_pre_of_what_has_not_changed_needs_no_word(dr):
    await dr.act("failover-exec")
    result = await dr.act("failback-pre")
    assert result.values["verdict"] == "stands by"
    assert dr.record.welcome


async def test_failback_pre_compares_with_the_point_that_was_booted(dr):
    await dr.act("failover-exec", dr_restore_point=dr.points[0])
    await dr.act("failback-pre")
    assert dr.holds() == dr.states[dr.points[-1]]


# --- failover-permanent


@pytest.mark.parametrize("keep", ["yes", "no"])
async def test_a_permanent_failover_is_an_ordinary_vm(dr, keep):
    await dr.act("failover-exec")
    await dr.act("failover-permanent", dr_keep_points=keep)
    config = dr.pve.vms[dr.vmid]
    assert "pveplug" not in config.get("tags", "")
    assert config["description"].strip() == "the shop"
    assert config["protection"] == "0"
    assert len(dr.pve.snaps[dr.vmid]) == (3 if keep == "yes" else 0)
    assert dr.record.role == "permanent"
    assert dr.pve.running == {dr.vmid}
    await dr.act("failover-permanent")
    error = await dr.refused("failover-undo")
    assert error.code == "role"


# --- failback


async def sent_back(dr, opening) -> dict[str, bytes]:
    """Do at the source what it does in a failback: return its disks afterwards."""
    disks = dict(dr.sender.source.state())
    async with dr.services.open(opening, dr.say) as replica:
        await dr.services.act(opening, replica, f.Command("failback"), dr.say)
        async with dr.services.back(replica) as back:
            for number, (key, data) in enumerate(disks.items()):
                mine = bytearray(data)
                await back.disk(f.SendBack(number, key, len(mine)))
                step = 16 * f.LEAF
                for at in range(0, len(mine), step):
                    digests = leaf_digests(mine[at : at + step])
                    async for frame in back.window(f.Digests(number, at, digests)):
                        assert at <= frame.offset < frame.end <= at + step
                        mine[frame.offset : frame.end] = (
                            frame.data
                            if isinstance(frame, f.Block)
                            else bytes(frame.length)
                        )
                disks[key] = bytes(mine)
    return disks


FAILBACK = f.Open("failback", UUID, 100, "shop", "main/pve9", "dr.2")


async def test_a_failback_brings_home_what_was_written(dr):
    await dr.act("failover-exec")
    dr.guest_writes()
    dr.pve.write(dr.pve.disks(dr.vmid)["scsi1"], 0, bytes(65536))
    home = await sent_back(dr, FAILBACK)
    assert home == dr.holds()
    assert home["scsi0"][65536:65540] == b"drdr"
    assert dr.pve.running == set()
    assert dr.record.role == "active"

    result = await dr.act("failback-commit")
    record = dr.record
    assert (record.role, record.welcome, record.acked) == ("standby", True, None)
    assert result.values["point"] == dr.points[-1]
    assert len(dr.points) == 4
    assert (
        dr.pve.content(dr.pve.disks(dr.vmid)["scsi0"], dr.points[-1]) == (home["scsi0"])
    )
    await dr.act("failback-commit")  # its answer may have been lost
    assert len(dr.points) == 4
    dr.sender.source.disks = {k: bytearray(v) for k, v in home.items()}
    dr.sender.source.write("scsi0")
    await dr.sender.increment()
    assert dr.holds() == dr.sender.source.state()


async def test_a_cut_failback_commit_takes_one_restore_point(dr):
    await dr.act("failover-exec")
    await sent_back(dr, FAILBACK)

    def after(call: str) -> None:
        if call.startswith("snapshot"):
            raise PveRefusalError("the answer was lost")

    dr.pve.after = after
    await dr.refused("failback-commit")
    assert dr.record.role == "active"
    dr.pve.after = lambda call: None
    await dr.act("failback-commit")
    assert len(dr.pve.snaps[dr.vmid]) == len(dr.points) == 4


@pytest.mark.parametrize("start", ["yes", "no"])
async def test_an_undone_failback_goes_on_at_the_dr_site(dr, start):
    await dr.act("failover-exec")
    dr.guest_writes()
    before = dr.holds()
    await sent_back(dr, FAILBACK)
    error = await dr.refused("failover-undo")
    assert "failback-commit ends it" in str(error)
    await dr.act("failback-undo", dr_start=start)
    assert dr.pve.running == ({dr.vmid} if start == "yes" else set())
    assert dr.record.role == "active"
    assert dr.holds() == before
    error = await dr.refused("failback-commit")
    assert "run failback first" in str(error)


async def test_a_replica_that_does_not_shut_down_is_not_sent_back(dr):
    await dr.act("failover-exec")
    dr.pve.deaf = True
    error = await dr.refused("failback")
    assert "shut it down yourself" in str(error)
    assert "back" not in dr.record.failover


async def test_a_disk_of_another_size_is_not_sent_back(dr):
    await dr.act("failover-exec")
    async with dr.services.open(FAILBACK, dr.say) as replica:
        await dr.services.act(FAILBACK, replica, f.Command("failback"), dr.say)
        async with dr.services.back(replica) as back:
            for disk in (f.SendBack(0, "scsi0", 1 << 20), f.SendBack(0, "scsi7", 1)):
                with pytest.raises(ReplicaError) as caught:
                    await back.disk(disk)
                assert caught.value.code == "configuration"


async def test_a_started_replica_is_not_committed(dr):
    await dr.act("failover-exec")
    await sent_back(dr, FAILBACK)
    dr.pve.running.add(dr.vmid)
    error = await dr.refused("failback-commit")
    assert "run failback again" in str(error)


# --- failover-test


async def test_the_newest_point_is_tested_on_overlays_while_cycles_come(dr):
    during = {}

    async def cycle() -> None:
        dr.sender.source.write("scsi0")
        during["done"] = await dr.sender.increment()

    def boots(vmid: int) -> None:
        during["vmid"] = vmid
        during["config"] = dict(dr.pve.vms[vmid])
        during["holds"] = dr.holds(vmid)
        dr.pve.write(dr.pve.disks(vmid)["scsi0"], 0, b"t" * 4096)

    ping = dr.pve.agent_ping

    async def agent_ping(node: str, vmid: int) -> None:
        if "done" not in during:
            await cycle()
        await ping(node, vmid)

    dr.pve.boots, dr.pve.agent_ping = boots, agent_ping
    state, newest = dr.sender.source.state(), dr.points[-1]
    result = await dr.act("failover-test")
    assert result.values["verdict"] == boot.ALIVE
    assert result.values["point"] == newest
    assert result.values["rto_s"] >= 0
    assert result.epoch == 1
    assert during["holds"] == state
    config = during["config"]
    assert not [key for key in config if key.startswith("net")]
    assert config["tags"] == "pveplug-test"
    assert config["name"] == "shop-test"
    assert config["boot"] == "order=scsi0;net0"
    assert during["done"].point is None  # it was staged
    assert set(dr.pve.vms) == {dr.vmid}
    assert dr.pve.volids(during["vmid"]) == set()
    assert dr.record.testing is None
    assert dr.record.staged == []
    assert len(dr.points) == 4
    assert dr.holds() == dr.sender.source.state()


async def test_an_older_point_is_tested_on_a_clone(dr):
    during = {}

    def boots(vmid: int) -> None:
        during["holds"] = dr.holds(vmid)
        during["config"] = dict(dr.pve.vms[vmid])
        during["testing"] = dr.record.testing

    dr.pve.boots = boots
    await dr.act("failover-test", dr_restore_point=dr.points[0])
    assert during["holds"] == dr.states[dr.points[0]]
    assert during["testing"] is None  # cycles needn't be staged
    assert not [key for key in during["config"] if key.startswith("net")]
    assert set(dr.pve.vms) == {dr.vmid}


async def test_a_failing_test_leaves_nothing(dr):
    dr.pve.dies = True
    with pytest.raises(Exception, match="ended again"):
        await dr.act("failover-test")
    assert set(dr.pve.vms) == {dr.vmid}
    assert dr.record.testing is None


@pytest.mark.parametrize("call", ["create", "allocate", "config", "clone"])
async def test_a_test_that_cannot_be_made_leaves_nothing(dr, call):
    def before(said: str) -> None:
        if said.startswith(call):
            raise PveRefusalError(f"no {said}")

    dr.pve.before = before
    options = {"dr_restore_point": dr.points[0]} if call == "clone" else {}
    await dr.refused("failover-test", **options)
    dr.pve.before = lambda said: None
    assert set(dr.pve.vms) == {dr.vmid}
    assert dr.record.testing is None


async def killed_in_a_test(dr) -> int:
    """Leave what a receiver leaves that is killed while a test VM boots."""
    opening = f.Open("failover-test", UUID, 100, "shop", "", "dr.1")
    async with dr.services.open(opening, dr.say) as replica:
        vm, _ = await Operation(replica, dr.say).begin_test("")
    dr.pve.running.add(vm.vmid)
    return vm.vmid


async def test_what_a_killed_test_left_goes_at_the_next_start(dr):
    vmid = await killed_in_a_test(dr)
    dr.sender.source.write("scsi0")
    async with dr.sender.open() as replica:  # not through the services: as if staged
        done = await dr.sender.cycle(replica)
    assert done.point is None
    assert await dr.services.recover(dr.say)
    assert vmid not in dr.pve.vms
    assert dr.record.testing is None
    assert dr.holds() == dr.sender.source.state()
    assert await dr.services.recover(dr.say)


async def test_what_a_killed_test_left_goes_when_the_next_cycle_opens(dr):
    vmid = await killed_in_a_test(dr)
    opening = f.Open("incremental", UUID, 100, "shop", "main/pve9", "x", 1)
    async with dr.services.open(opening, dr.say) as replica:
        assert not replica.state().testing
    assert vmid not in dr.pve.vms


async def test_a_vm_that_only_has_the_id_of_a_test_is_left_alone(dr):
    vmid = await killed_in_a_test(dr)
    dr.pve.vms[vmid] = {"name": "somebody-elses-test", "tags": "pveplug-test"}
    assert await dr.services.recover(dr.say)
    assert vmid in dr.pve.vms
    assert vmid in dr.pve.running


async def test_one_test_at_a_time_and_nothing_else_meanwhile(dr):
    told = []

    async def agent_ping(node: str, vmid: int) -> None:
        for action in ("failover-test", "failover-exec", "failover-undo"):
            told.append(await dr.refused(action))

    dr.pve.agent_ping = agent_ping
    await dr.act("failover-test")
    assert {error.code for error in told} == {"busy"}
    assert len(told) == 3


# --- each action in each role


LEGAL = {
    "failover-exec": {"standby", "active"},
    "failover-test": {"standby"},
    "failover-undo": {"standby", "active"},
    "failover-permanent": {"active", "permanent"},
    "failback-pre": {"standby", "active"},
    "failback": {"active"},
    "failback-commit": {"standby", "active"},
    "failback-undo": {"active"},
}


@pytest.mark.parametrize("role", ["none", "seeding", "standby", "active", "permanent"])
@pytest.mark.parametrize("action", LEGAL)
async def test_each_action_in_each_role_is_done_or_refused(seeded, role, action):
    dr = seeded
    assert set(LEGAL) == {*ACTIONS, "failover-test"}
    record = dr.record
    record.role = role
    record.failover = None
    if role in ("active", "permanent"):
        record.failover = {"point": dr.points[-1], "time": 1, "job": "x", "back": 0}
        if action == "failback-commit":
            record.failover["back"] = 1
    dr.store.write(record)
    if role in LEGAL[action]:
        result = await dr.act(action)
        assert result.action == action
        return
    error = await dr.refused(action)
    assert error.code == "role"
    assert "Remedy: " in str(error)
    assert dr.record.role == role
    assert dr.pve.running == set()


async def test_an_unknown_action_is_refused_with_those_there_are(dr):
    error = await dr.refused("failover-maybe")
    assert error.code == "protocol"
    assert "failover-exec" in str(error)


@pytest.mark.parametrize("name", ["dr_boot_timeout", "dr_shutdown_timeout"])
async def test_a_wrong_number_of_seconds_is_refused(dr, name):
    await dr.act("failover-exec")
    action = "failover-exec" if name == "dr_boot_timeout" else "failback"
    error = await dr.refused(action, **{name: "soon"})
    assert error.code == "protocol"


# --- status


async def test_status_tells_of_one_or_of_all(dr):
    opening = f.Open("status", "", 0, "", "", "")
    result = await dr.services.act(opening, None, f.Command("status"), dr.say)
    (replica,) = result.values["replicas"]
    assert replica["source_vmid"] == 100
    assert replica["source_name"] == "shop"
    assert [point["name"] for point in replica["points"]] == dr.points
    assert replica["health"] == "ok"
    late = f.Command("status", {"dr_rpo": "60"})
    one = f.Open("status", UUID, 0, "", "", "")
    result = await dr.services.act(one, None, late, dr.say)
    assert result.values["replicas"][0]["health"] == "late"
    # It is what the channel can carry.
    assert f.decode(f.Result.TYPE, b"".join(bytes(b) for b in result.encode()[1]))


async def test_a_status_of_very_much_still_fits_into_a_frame(dr):
    record = dr.record
    point = record.points[0]
    record.points = [replace(point, name=f"ph-rp{n:04d}-x") for n in range(600)]
    for number in range(7):
        record.uuid = f"0a1b2c3d-0000-4000-8000-0000000000{number:02d}"
        dr.store.write(record)
    opening = f.Open("status", "", 0, "", "", "")
    result = await dr.services.act(opening, None, f.Command("status"), dr.say)
    payload = b"".join(bytes(part) for part in result.encode()[1])
    assert isinstance(f.decode(f.Result.TYPE, payload), f.Result)
    assert result.values["replicas"][0]["points"][-1]["name"] == "ph-rp0599-x"
