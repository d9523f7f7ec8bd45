# SPDX-License-Identifier: Apache-2.0
"""A replica on real qcow2 files and qemu-nbd, its PVE scripted."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pveplug.dr import guard, provision
from pveplug.dr import replica as replica_module
from pveplug.dr.replica import UNKNOWN
from pveplug.dr.store import ReplicaError, ReplicaStore
from pveplug.dr.volumes import Volumes
from pveplug.errors import TransportError
from pveplug.journal import own_vm
from pveplug.proto.dr_digest import ZERO_DIGEST, RunDigest, fnv1a_64, leaf_digests
from pveplug.proto.dr_frames import (
    LEAF,
    AskDigests,
    AskSamples,
    Block,
    Commit,
    Disk,
    DiskEnd,
    Durable,
    Finish,
    Zero,
)
from pveplug.proto.pve_refusal import Reason
from tests.support.dr_sender import UUID, Sender, Source
from tests.support.fake_pve import FakePve, refused
from tests.support.requires import requires
from tests.support.truth import run

pytestmark = requires("qemu-nbd", "qemu-img")


@pytest.fixture
def pve(short_tmp: Path) -> FakePve:
    return FakePve(short_tmp)


@pytest.fixture
def sender(pve: FakePve) -> Sender:
    return Sender(ReplicaStore(pve.node.state_dir), pve.site())


def holds(
    pve: FakePve, sender: Sender, point: str = "", keys: Any = None
) -> dict[str, bytes]:
    """What the replica's disks hold, at a restore point if one is named."""
    record = sender.store.read(UUID)
    assert record is not None
    return {
        key: pve.content(volume.volid, point)[: volume.size]
        for key, volume in record.disks.items()
        if keys is None or key in keys
    }


def qemu_io(path: str, command: str) -> None:
    run("qemu-io", "-f", "qcow2", "-c", command, path)


def set_testing(sender: Sender, value: dict[str, Any] | None) -> None:
    record = sender.store.read(UUID)
    assert record is not None
    record.testing = value
    sender.store.write(record)


async def test_a_seed_and_increments_are_restore_points(pve, sender):
    states = {}
    done = await sender.seed()
    states[done.point.name] = sender.source.state()
    for _ in range(3):
        sender.source.write("scsi0")
        sender.source.write("scsi1", 2)
        done = await sender.increment()
        states[done.point.name] = sender.source.state()
    assert holds(pve, sender) == sender.source.state()
    assert len(done.points) == 4
    for name, state in states.items():
        assert holds(pve, sender, name) == state
    (config,) = pve.vms.values()
    assert config["onboot"] == "0"
    assert config["protection"] == "1"
    assert config["net0"] == "virtio=BC:24:11:00:00:01,bridge=vmbr0"
    assert config["tags"] == "pveplug-replica"
    assert "the shop" in config["description"]


# --- verification --------------------------------------------------------------------


async def test_digests_and_samples_are_those_of_the_source(pve, sender):
    sender.source.disks["scsi1"] = bytearray((2 << 20) + 1536)
    sender.source.set("scsi1", "local:100/vm-100-disk-1.qcow2,size=2M")
    sender.source.write("scsi1", 9)
    sender.source.disks["scsi1"][-700:] = b"x" * 700
    await sender.seed()
    async with sender.open() as replica:
        await replica.begin(sender.source.describe(), sender.say)
        for key, data in sender.source.state().items():
            found = await replica.digests(AskDigests(key, 0, len(data)))
            assert found.data == leaf_digests(data)
            part = data[3 * LEAF : 8 * LEAF]
            found = await replica.digests(AskDigests(key, 3 * LEAF, len(part)))
            assert (found.offset, found.data) == (3 * LEAF, leaf_digests(part))
            places = tuple(range(0, len(data), 4 * LEAF))
            samples = await replica.samples(AskSamples(key, places))
            wanted = tuple(fnv1a_64(data[at : at + LEAF]) for at in places)
            assert samples.values == wanted


@pytest.mark.parametrize(
    "ask",
    [
        AskDigests("scsi9", 0, LEAF),
        AskDigests("scsi0", 5, LEAF),
        AskDigests("scsi0", 0, 5),
        AskDigests("scsi0", 0, 8 << 20),
        AskDigests("scsi0", 4 << 20, LEAF),
        AskSamples("scsi0", (5,)),
        AskSamples("scsi0", (4 << 20,)),
        AskSamples("scsi9", (0,)),
    ],
)
async def test_what_isnt_there_is_not_digested(pve, sender, ask):
    await sender.seed()
    async with sender.open() as replica:
        what = replica.digests if isinstance(ask, AskDigests) else replica.samples
        with pytest.raises(ReplicaError) as caught:
            await what(ask)
        assert caught.value.code == "protocol"


async def test_a_flipped_bit_is_found_and_mended_before_the_restore_point(pve, sender):
    await sender.seed()
    record = sender.store.read(UUID)
    where = str(pve.file(record.disks["scsi0"].volid))
    qemu_io(where, "write -P 7 640k 64k")
    sender.source.write("scsi1", 2)
    truth = sender.source.state()["scsi0"]
    async with sender.open() as replica:
        await sender.send(replica)
        found = await replica.digests(AskDigests("scsi0", 0, len(truth)))
        ours = leaf_digests(truth)
        differ = [
            at
            for at in range(0, len(ours), 16)
            if ours[at:][:16] != found.data[at:][:16]
        ]
        assert differ == [160]
        await replica.repair(Block(0, 640 << 10, truth[640 << 10 :][:LEAF]))
        found = await replica.digests(AskDigests("scsi0", 0, len(truth)))
        assert found.data == ours
        done = await replica.finish(Finish(True, LEAF))
    assert holds(pve, sender, done.point.name) == sender.source.state()
    assert sender.store.read(UUID).slice == 1


async def test_a_grown_disk_is_zero_behind_its_old_end(pve, sender):
    await sender.seed()
    old = sender.source.state()["scsi0"]
    sender.source.grow("scsi0", 6 << 20)
    sender.source.add("scsi5", 1 << 20)
    async with sender.open() as replica:
        ready = await replica.begin(sender.source.describe(), sender.say)
        assert ready.fresh == ("scsi5",)
        found = await replica.digests(AskDigests("scsi0", 0, 6 << 20))
        assert found.data == leaf_digests(old + bytes(2 << 20))
        found = await replica.digests(AskDigests("scsi5", 0, 1 << 20))
        assert found.data == ZERO_DIGEST * 16


# --- a test runs ---------------------------------------------------------------------


async def test_increments_wait_while_the_newest_point_is_tested(pve, sender):
    await sender.seed()
    set_testing(sender, {"point": "x", "vmid": 900})
    states = []
    for number in range(2):
        sender.source.write("scsi0", 3)
        if number:
            sender.source.add("scsi7", 1 << 20)
        states.append(sender.source.state())
        done = await sender.increment()
        assert done.point is None
    record = sender.store.read(UUID)
    assert [item.cycle for item in record.staged] == [
        "dr-x.2026-11-25_08.00.00_02",
        "dr-x.2026-11-25_08.00.00_03",
    ]
    assert record.acked == record.staged[-1].cycle
    async with sender.open() as replica:
        assert replica.state().staged == tuple(i.cycle for i in record.staged)
        data = states[-1]["scsi0"]
        found = await replica.digests(AskDigests("scsi0", 0, len(data)))
        ours = leaf_digests(data)
        theirs = [found.data[at : at + 16] for at in range(0, len(ours), 16)]
        assert UNKNOWN in theirs
        for number, digest in enumerate(theirs):
            assert digest in (ours[number * 16 :][:16], UNKNOWN)
    set_testing(sender, None)
    sender.source.write("scsi1", 2)
    done = await sender.increment()
    names = [point.name for point in done.points]
    assert len(names) == 4
    for state, name in zip(states, names[1:3], strict=True):
        assert holds(pve, sender, name, state) == state
    assert holds(pve, sender) == sender.source.state()
    assert not list(sender.store.directory(UUID).glob("*.stage"))


async def test_a_test_that_ends_in_mid_cycle_defers_it_all_the_same(pve, sender):
    await sender.seed()
    set_testing(sender, {"point": "x"})
    sender.source.write("scsi0")
    await sender.increment()
    sender.source.write("scsi0")
    async with sender.open() as replica:
        await sender.send(replica)
        replica.record.testing = None
        done = await replica.finish(Finish())
    assert done.point is None
    sender.source.changed.clear()
    async with sender.open() as replica:
        assert await replica.apply_pending(sender.say)
        assert replica.state().acked == done.cycle
    assert holds(pve, sender) == sender.source.state()


# --- what goes wrong -----------------------------------------------------------------


async def test_a_damaged_stage_falls_back_to_the_newest_point(pve, sender):
    first = await sender.seed()
    before = sender.source.state()
    sender.source.write("scsi0")
    sender.source.add("scsi4", 1 << 20)
    sender.source.grow("scsi1", 3 << 20)
    async with sender.open() as replica:
        await sender.send(replica)  # applied, but its restore point is never taken
    (stage,) = sender.store.directory(UUID).glob("*.stage")
    data = bytearray(stage.read_bytes())
    data[len(data) // 2] ^= 4
    stage.write_bytes(data)
    async with sender.open() as replica:
        await replica.apply_pending(sender.say)
        state = replica.state()
    assert state.acked == first.cycle
    assert state.disks == {"scsi0": 4 << 20, "scsi1": 2 << 20}
    assert holds(pve, sender) == before
    assert any("went back to restore point" in text for _, text in sender.say.lines)
    done = await sender.increment()
    assert holds(pve, sender, done.point.name) == sender.source.state()
    record = sender.store.read(UUID)
    assert pve.volids(record.vmid) == {v.volid for v in record.disks.values()} | set(
        record.retired
    )


async def test_what_was_sent_must_be_what_came(pve, sender):
    await sender.seed()
    async with sender.open() as replica:
        await replica.begin(sender.source.describe(), sender.say)
        await replica.disk(Disk(0, "scsi0", 4 << 20))
        await replica.take(Block(0, 0, b"x" * LEAF))
        with pytest.raises(ReplicaError, match="came") as caught:
            await replica.disk_end(DiskEnd(0, 2, 2 * LEAF, "00"))
        assert caught.value.code == "integrity"
    assert holds(pve, sender) == sender.source.state()


@pytest.mark.parametrize("mode", ["seed", "incremental"])
async def test_frames_out_of_place_are_refused(pve, sender, mode):
    if mode == "incremental":
        await sender.seed()
    describe = sender.source.describe()
    async with sender.open(mode) as replica:
        for early in (
            replica.disk(Disk(0, "scsi0", 4 << 20)),
            replica.take(Zero(0, 0, 5)),
            replica.commit(Commit(0)),
            replica.finish(Finish()),
            replica.repair(Block(0, 0, b"x")),
        ):
            with pytest.raises(ReplicaError):
                await early
        await replica.begin(describe, sender.say)
        await replica.disk(Disk(0, "scsi0", 4 << 20))
        for wrong in (
            replica.begin(describe, sender.say),
            replica.disk(Disk(0, "scsi1", 2 << 20)),
            replica.disk(Disk(1, "scsi0", 4 << 20)),
            replica.disk(Disk(1, "scsi1", 3 << 20)),
            replica.disk(Disk(1, "scsi9", 3 << 20)),
            replica.take(Block(1, 0, b"x")),
            replica.take(Block(0, (4 << 20) - 1, b"xy")),
            replica.take(Zero(0, 0, 5 << 20)),
            replica.disk_end(DiskEnd(1, 0, 0, "")),
            replica.commit(Commit(1)),
            replica.repair(Block(0, 0, b"x")),
            replica.finish(Finish()),
        ):
            with pytest.raises(ReplicaError) as caught:
                await wrong
            assert caught.value.code in ("protocol", "integrity")


async def test_a_new_disk_that_doesnt_come_is_no_cycle(pve, sender):
    await sender.seed()
    sender.source.add("scsi5", 1 << 20)
    async with sender.open() as replica:
        await replica.begin(sender.source.describe(), sender.say)
        await sender.disk(replica, "scsi0", 0, whole=False)
        with pytest.raises(ReplicaError, match="scsi5 did not come"):
            await replica.commit(Commit(1))
    (config,) = pve.vms.values()
    assert "scsi5" not in config


async def test_a_seed_that_is_cut_goes_on_where_it_was(pve, sender):
    async with sender.open("seed") as replica:
        ready = await replica.begin(sender.source.describe(), sender.say)
        assert ready.fresh == ("scsi0", "scsi1")
        await sender.disk(replica, "scsi0", 0, whole=True)
        assert list(replica.durable) == [Durable(0, 4 << 20)]
        await replica.disk(Disk(1, "scsi1", 2 << 20))
        for frame in list(sender.source.frames("scsi1", 1, whole=True))[:9]:
            await replica.take(frame)
    at = sender.store.read(UUID)
    assert at.role == "seeding"
    assert at.seeded["scsi0"] == 4 << 20
    assert 0 < at.seeded["scsi1"] <= 9 * LEAF
    async with sender.open("seed") as replica:
        state = replica.state()
        assert state.seed_cycle == "dr-x.2026-11-25_08.00.00_01"
        ready = await replica.begin(sender.source.describe(), sender.say)
        assert ready.fresh == ()
        assert ready.seeded == at.seeded
        await replica.disk(Disk(0, "scsi0", 4 << 20))
        await replica.disk_end(DiskEnd(0, 0, 0, RunDigest().hexdigest()))
        await sender.disk(replica, "scsi1", 1, whole=True)
        await replica.commit(Commit(2))
        done = await replica.finish(Finish())
    assert holds(pve, sender, done.point.name) == sender.source.state()


async def test_a_seed_is_durable_while_it_goes_on(pve, sender, monkeypatch):
    monkeypatch.setattr(replica_module, "DURABLE_BYTES", 1 << 20)
    said = []
    async with sender.open("seed") as replica:
        await replica.begin(sender.source.describe(), sender.say)
        await replica.disk(Disk(0, "scsi0", 4 << 20))
        for at in range(0, 4 << 20, LEAF):
            await replica.take(Block(0, at, b"\x05" * LEAF))
            said += [durable.offset for durable in replica.durable]
            seeded = sender.store.read(UUID).seeded.get("scsi0", 0)
            assert not said or said[-1] <= seeded <= at + LEAF
            await asyncio.sleep(0.002)
    assert said == sorted(set(said))
    assert len(said) >= 2


async def test_zeroes_of_a_seed_dont_count_as_progress(pve, sender):
    async with sender.open("seed") as replica:
        await replica.begin(sender.source.describe(), sender.say)
        await replica.disk(Disk(0, "scsi0", 4 << 20))
        await replica.take(Zero(0, 1 << 20, 3 << 20))
        await replica.take(Block(0, 0, b"x" * LEAF))
    assert sender.store.read(UUID).seeded == {"scsi0": LEAF}


async def test_one_who_has_it_keeps_others_out(pve, sender):
    async with sender.open("seed"):
        with pytest.raises(ReplicaError, match=r"nightly\.1 \(seed\) since") as caught:
            await sender.seed()
    assert caught.value.code == "busy"


async def test_pve_out_of_reach_is_said_and_the_next_cycle_is_right(pve, sender):
    await sender.seed()
    sender.source.write("scsi0")

    def down(call: str) -> None:
        if call.startswith("snapshot"):
            raise TransportError("cannot connect to 127.0.0.1:8006")

    pve.before = down
    with pytest.raises(ReplicaError, match="8006") as caught:
        await sender.increment()
    assert caught.value.code == "pve"
    with pytest.raises(ReplicaError) as caught:
        await sender.increment()
    assert caught.value.code == "pve"
    pve.before = lambda call: None
    done = await sender.increment()
    assert len(done.points) == 3
    assert holds(pve, sender, done.point.name) == sender.source.state()


async def test_a_job_of_ours_on_the_replica_is_waited_for(pve, sender, monkeypatch):
    monkeypatch.setattr(guard, "OWN_WAIT_S", 0.3)
    await sender.seed()
    record = sender.store.read(UUID)
    async with own_vm(pve.node.state_dir, record.vmid, 1):
        with pytest.raises(ReplicaError) as caught:
            await sender.increment()
    assert caught.value.code == "busy"
    await sender.increment()


async def test_a_lock_of_pves_is_waited_for(pve, sender, monkeypatch):
    monkeypatch.setattr(provision, "_LOCK_WAIT_S", 0.2)
    monkeypatch.setattr(provision, "_LOCK_POLL_S", 0.05)
    await sender.seed()
    (config,) = pve.vms.values()
    config["lock"] = "snapshot"
    with pytest.raises(ReplicaError, match=r"locked \(snapshot\).*qm unlock") as caught:
        await sender.increment()
    assert caught.value.code == "pve"
    asyncio.get_running_loop().call_later(0.1, config.pop, "lock")
    await sender.increment()


async def test_a_vm_that_is_another_one_now_is_not_touched(pve, sender):
    await sender.seed()
    (vmid,) = pve.vms
    pve.vms[vmid]["smbios1"] = "uuid=11111111-0000-4000-8000-00000000abcd"
    before = dict(pve.vms[vmid])
    with pytest.raises(ReplicaError, match="is another VM now") as caught:
        await sender.increment()
    assert caught.value.code == "identity"
    assert pve.vms[vmid] == before


async def test_a_seed_that_cant_be_provisioned_leaves_nothing(pve, sender):
    def full(call: str) -> None:
        if call.startswith("allocate vm-100-disk-1"):
            raise refused("qemu-img: No space left on device", Reason.NO_SPACE)

    pve.before = full
    with pytest.raises(ReplicaError, match="No space") as caught:
        await sender.seed()
    assert caught.value.code == "space"
    assert pve.vms == {}
    assert pve.volids(100) == set()
    assert sender.store.uuids() == []
    pve.before = lambda call: None
    await sender.seed()


async def test_points_removed_by_hand_are_said(pve, sender):
    first = await sender.seed()
    (vmid,) = pve.vms
    await pve.snapshot_delete("pve1", vmid, first.point.name)
    done = await sender.increment()
    assert first.point.name not in [p.name for p in done.points]
    assert any("removed by others" in text for _, text in sender.say.lines)


async def test_a_commands_opening_rotates_nothing(pve, sender):
    for number in range(3):
        await (sender.increment() if number else sender.seed())
    async with sender.open() as replica:
        await sender.send(replica)
    async with sender.open("failover-exec", points=1) as replica:
        await replica.apply_pending(sender.say)
        assert len(replica.record.points) == 4


async def test_welcome_ends_with_the_first_cycle(pve, sender):
    await sender.seed()
    record = sender.store.read(UUID)
    record.epoch, record.welcome = 4, True
    sender.store.write(record)
    done = await sender.increment(epoch=1)
    assert done.epoch == 4
    with pytest.raises(ReplicaError) as caught:
        await sender.increment(epoch=1)
    assert caught.value.code == "epoch"
    await sender.increment(epoch=4)


async def test_the_stages_room_is_kept(pve, sender):
    await sender.seed()
    tight = Sender(sender.store, pve.site(keep_free=1 << 60), sender.source)
    with pytest.raises(ReplicaError, match="must stay free") as caught:
        await tight.increment()
    assert caught.value.code == "space"
    await sender.increment()


async def test_the_configuration_follows_the_source(pve, sender):
    await sender.seed()
    (config,) = pve.vms.values()
    config["cores"] = "3"  # by somebody on the DR site
    sender.source.set("memory", "1024")
    sender.source.set("net1", "virtio=BC:24:11:00:00:02,bridge=vmbr0")
    await sender.increment(bridge_map="vmbr0:vmbr7")
    assert config["cores"] == "2"
    assert config["memory"] == "1024"
    assert config["net1"] == "virtio=BC:24:11:00:00:02,bridge=vmbr7"
    source = sender.source
    source.config = "".join(
        line for line in source.config.splitlines(True) if not line.startswith("net1")
    )
    source.set("scsi0", "local:100/vm-100-disk-0.qcow2,discard=on,size=4M")
    await sender.increment()
    assert "net1" not in config
    assert "discard=on" in config["scsi0"]
    assert "iothread" not in config["scsi0"]


async def test_a_disk_replaced_by_a_smaller_one_begins_anew(pve, sender):
    first = await sender.seed()
    before = sender.source.state()
    sender.source.disks["scsi0"] = bytearray(1 << 20)
    sender.source.changed.clear()
    sender.source.write("scsi0", 4)
    done = await sender.increment()
    assert holds(pve, sender, done.point.name) == sender.source.state()
    record = sender.store.read(UUID)
    (old,) = record.retired
    assert pve.content(old, first.point.name) == before["scsi0"]


async def test_two_seeds_at_once_get_two_vms(pve, sender):
    other_uuid = UUID.replace("abcd", "abce")
    source = Source()
    source.config = source.config.replace(UUID, other_uuid)
    opening = dataclasses.replace(sender.opening, uuid=other_uuid)
    other = Sender(sender.store, sender.site, source, opening)
    await asyncio.gather(sender.seed(), other.seed())
    assert len(pve.vms) == 2
    for one, uuid in ((sender, UUID), (other, other_uuid)):
        record = sender.store.read(uuid)
        for key, volume in record.disks.items():
            assert pve.content(volume.volid) == one.source.state()[key]
    await asyncio.gather(sender.increment(), other.increment())


async def test_what_a_sender_calls_itself_doesnt_forge_the_notes(pve, sender):
    await sender.seed(site="x\npveplug-replica link=00000000", name="shop")
    (config,) = pve.vms.values()
    first, second, *_ = config["description"].split("\n")
    assert first == f"pveplug-replica link={sender.store.read(UUID).link}"
    assert "of x pveplug-replica link=00000000" in second


async def test_an_increment_that_has_no_room_touches_nothing(pve, sender):
    await sender.seed()
    before = sender.source.state()
    sender.source.write("scsi0", 9)
    pve.avail = 3 * LEAF
    with pytest.raises(ReplicaError, match="increment needs") as caught:
        await sender.increment()
    assert caught.value.code == "space"
    assert sender.store.read(UUID).intent is None
    assert not list(sender.store.directory(UUID).glob("*.stage"))
    assert holds(pve, sender) == before
    pve.avail = 1 << 40
    await sender.increment()
    assert holds(pve, sender) == sender.source.state()


async def test_a_vm_started_while_it_is_written_gets_no_restore_point(
    pve, sender, monkeypatch
):
    await sender.seed()
    sender.source.write("scsi0")
    close_all = Volumes.close_all

    async def and_start(volumes: Volumes) -> None:
        await close_all(volumes)
        if volumes._record.intent is not None:
            pve.running.update(pve.vms)

    monkeypatch.setattr(Volumes, "close_all", and_start)
    for _ in range(2):
        with pytest.raises(ReplicaError, match="runs, and nobody"):
            await sender.increment()
    monkeypatch.undo()
    pve.running.clear()
    done = await sender.increment()
    assert len(done.points) == 3
    assert holds(pve, sender) == sender.source.state()


async def test_pve_is_locked_out_while_a_volume_is_written(pve, sender):
    def config() -> dict[str, str]:
        (found,) = pve.vms.values()
        return found

    async with sender.open("seed") as replica:
        await replica.begin(sender.source.describe(), sender.say)
        assert config()["lock"] == "backup"
        for number, key in enumerate(sender.source.disks):
            await sender.disk(replica, key, number, whole=True)
        await replica.commit(Commit(2))
        assert "lock" not in config()
        await replica.finish(Finish())
    data = sender.source.state()["scsi0"]
    async with sender.open() as replica:
        await sender.send(replica)
        await replica.repair(Block(0, 0, data[:LEAF]))
        assert config()["lock"] == "backup"
        await replica.finish(Finish())
    assert "lock" not in config()
    locked = [call for call in pve.calls if call in ("lock", "unlock")]
    assert locked == ["lock", "unlock"] * 3


async def test_who_isnt_root_goes_without_pves_lock(pve, sender):
    pve.root = False
    await sender.seed()
    sender.source.write("scsi0")
    await sender.increment()
    assert holds(pve, sender) == sender.source.state()


async def test_a_seed_that_is_given_up_leaves_no_lock(pve, sender):
    async with sender.open("seed") as replica:
        await replica.begin(sender.source.describe(), sender.say)
    (config,) = pve.vms.values()
    assert "lock" not in config
