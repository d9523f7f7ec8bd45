# SPDX-License-Identifier: Apache-2.0
"""Sessions of the receiver with real replicas: many at once, and cut at any frame."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pveplug.dr import boot
from pveplug.dr.receiver import Receiver
from pveplug.dr.services import ReplicaServices
from pveplug.dr.store import ReplicaStore
from pveplug.proto import dr_frames as f
from pveplug.proto.dr_digest import RunDigest
from tests.support.dr_fakes import FakePeer
from tests.support.dr_sender import CONFIG, UUID, Source
from tests.support.fake_dr_site import FakeDrSite
from tests.support.requires import requires

pytestmark = requires("qemu-nbd", "qemu-img")


def source(number: int) -> Source:
    """A VM of its own: another identity, other data."""
    made = Source(CONFIG.replace(UUID, uuid(number)), random=random.Random(number))
    made.set("name", f"vm{number}")
    return made


def uuid(number: int) -> str:
    return f"{UUID[:-2]}{number:02x}"


def opening(number: int, mode: str) -> f.Open:
    return f.Open(mode, uuid(number), 100 + number, f"vm{number}", "site", "job", 1)


def said(made: Source, first: f.Open) -> Iterator[f.Message]:
    """All that a sender says in a cycle."""
    yield first
    yield made.describe()
    for number, (key, data) in enumerate(made.disks.items()):
        yield f.Disk(number, key, len(data))
        digest = RunDigest()
        for frame in made.frames(key, number, whole=first.mode == "seed"):
            digest.add(frame)
            yield frame
        yield f.DiskEnd(number, digest.frames, digest.bytes, digest.hexdigest())
    yield f.Commit(len(made.disks))
    yield f.Finish()
    yield f.Bye()


class Site:
    def __init__(self, base: Path) -> None:
        self.pve = FakeDrSite(base)
        self.store = ReplicaStore(self.pve.node.state_dir)
        services = ReplicaServices(self.store, self.pve.site())
        self.receiver = Receiver(services, 16)

    async def cycle(self, made: Source, first: f.Open, cut: int = 0) -> FakePeer:
        """Let a sender say it all, or hang up after so many frames."""
        frames = list(said(made, first))
        peer = FakePeer(*(frames[:cut] if cut else frames), cut=bool(cut))
        await self.receiver.serve(peer)
        return peer

    def holds(self, number: int, point: str = "") -> dict[str, bytes]:
        record = self.store.read(uuid(number))
        assert record is not None
        return {
            key: self.pve.content(volume.volid, point)[: volume.size]
            for key, volume in record.disks.items()
        }


@pytest.fixture
def site(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(boot, "SETTLE_S", 0.01)
    return Site(short_tmp)


async def test_eight_replicas_at_once_are_eight_sources(site):
    sources = {number: source(number) for number in range(8)}

    async def seed_and_increment(number: int) -> None:
        made = sources[number]
        for mode in ("seed", "incremental"):
            peer = await site.cycle(made, opening(number, mode))
            assert isinstance(peer.told[-1], f.Done), peer.told[-1]
            made.changed.clear()
            if mode == "seed":
                made.write("scsi0")

    await asyncio.gather(*(seed_and_increment(number) for number in sources))
    vmids = set()
    for number, made in sources.items():
        assert site.holds(number) == made.state()
        record = site.store.read(uuid(number))
        vmids.add(record.vmid)
        assert len(record.points) == 2
    assert len(vmids) == 8


async def test_a_second_session_for_a_replica_is_busy(site):
    made = source(1)
    frames = list(said(made, opening(1, "seed")))
    first = FakePeer(*frames[:5], wait=True)
    serving = asyncio.create_task(site.receiver.serve(first))
    await first.taken.wait()
    second = FakePeer(opening(1, "seed"))
    await site.receiver.serve(second)
    assert second.refusal.code == "busy"
    assert "job" in second.refusal.text
    first.hang_up()
    await serving


@pytest.mark.parametrize("mode", ["seed", "incremental"])
async def test_a_cycle_cut_at_any_frame_leaves_the_last_point(site, mode):
    made = source(2)
    point = ""
    if mode == "incremental":
        peer = await site.cycle(made, opening(2, "seed"))
        point = peer.told[-1].point.name
        made.changed.clear()
        made.write("scsi0")
        made.write("scsi1", 2)
    before = site.holds(2, point) if point else {}
    count = len(list(said(made, opening(2, mode)))) - 2  # neither Finish nor Bye
    for cut in random.Random(3).sample(range(2, count), 4):
        peer = await site.cycle(made, opening(2, mode), cut)
        assert not any(isinstance(told, f.Done) for told in peer.told)
        if point:
            assert site.holds(2, point) == before
    peer = await site.cycle(made, opening(2, mode))
    if isinstance(peer.told[-1], f.Refusal):
        # A cut behind Commit was a cycle that was finished at the next opening.
        assert peer.told[-1].code == "role"
    assert site.holds(2) == made.state()
    stages = list(site.store.directory(uuid(2)).glob("*.stage"))
    assert stages == []


async def test_an_old_source_is_refused_after_a_failover(site):
    made = source(3)
    await site.cycle(made, opening(3, "seed"))
    exec_ = FakePeer(opening(3, "failover-exec"), f.Command("failover-exec"), f.Bye())
    await site.receiver.serve(exec_)
    assert isinstance(exec_.told[-1], f.Result)
    old = FakePeer(opening(3, "incremental"))
    await site.receiver.serve(old)
    assert old.refusal.code in ("epoch", "role")
    assert "failback" in old.refusal.text
    undo = FakePeer(opening(3, "failover-undo"), f.Command("failover-undo"), f.Bye())
    await site.receiver.serve(undo)
    made.changed.clear()
    peer = await site.cycle(made, replace(opening(3, "incremental"), epoch=1))
    assert isinstance(peer.told[-1], f.Done)
    assert peer.told[-1].epoch == 2
    late = FakePeer(replace(opening(3, "incremental"), epoch=1))
    await site.receiver.serve(late)
    assert late.refusal.code == "epoch"
