# SPDX-License-Identifier: Apache-2.0
"""A replica on real qcow2 files and qemu-nbd, its PVE scripted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pveplug.dr.store import ReplicaStore
from tests.support.dr_sender import UUID, Sender
from tests.support.fake_pve import FakePve
from tests.support.requires import requires

pytestmark = requires("qemu-nbd", "qemu-img")


@pytest.fixture
def pve(short_tmp: Path) -> FakePve:
    return FakePve(short_tmp)


@pytest.fixture
def sender(pve: FakePve) -> Sender:
    return Sender(ReplicaStore(pve.node.state_dir), pve.site())


def holds(pve: FakePve, sender: Sender, point: str = "") -> dict[str, bytes]:
    """What the replica's disks hold, at a restore point if one is named."""
    record = sender.store.read(UUID)
    assert record is not None
    return {
        key: pve.content(volume.volid, point)[: volume.size]
        for key, volume in record.disks.items()
    }


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
