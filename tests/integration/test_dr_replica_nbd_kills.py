# SPDX-License-Identifier: Apache-2.0
"""qemu-nbd killed while it writes a replica: snapshots hold, and writing goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from pveplug.dr.replica import Replica
from pveplug.dr.store import ReplicaError, ReplicaStore
from tests.support.dr_sender import UUID, Sender, Source
from tests.support.fake_pve import FakePve
from tests.support.processes import children
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    requires("qemu-nbd", "qemu-img"),
]

SIZE = 96 << 20


async def killed(replica: Replica, sender: Sender, after_s: float) -> bool:
    """Run a cycle; kill the writing qemu-nbd after a while. Whether it was there."""
    cycle = asyncio.create_task(sender.cycle(replica))
    hit = False
    while not cycle.done() and not hit:
        servers = [pid for pid, line in children().items() if "lazy-refcounts" in line]
        if servers:
            await asyncio.sleep(after_s)
            for pid in servers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hit = True
        await asyncio.sleep(0.002)
    with contextlib.suppress(ReplicaError):
        await cycle
    return hit and cycle.done()


async def test_a_killed_qemu_nbd_costs_a_cycle_and_no_restore_point(short_tmp: Path):
    rng = random.Random(3)
    source = Source(disks={"scsi0": bytearray(SIZE)})
    lines = source.config.splitlines(True)
    source.config = "".join(line for line in lines if not line.startswith("scsi1"))
    pve = FakePve(short_tmp)
    sender = Sender(ReplicaStore(pve.node.state_dir), pve.site(), source)
    states = {}
    done = await sender.seed()
    assert done.point is not None
    states[done.cycle] = source.state()["scsi0"]
    hits = 0
    for _ in range(7):
        source.write("scsi0", 700)
        states[f"dr-x.2026-11-25_08.00.00_{source.cycle + 1:02d}"] = source.state()[
            "scsi0"
        ]
        async with sender.open(points=4) as replica:
            await replica.apply_pending(sender.say)
            hits += await killed(replica, sender, rng.random() * 0.6)
        record = sender.store.read(UUID)
        assert record is not None
        volid = record.disks["scsi0"].volid
        for point in record.points:
            assert pve.content(volid, point.name)[:SIZE] == states[point.cycle]
        if record.intent is None:
            source.changed.clear()
    await sender.increment()
    assert pve.content(volid)[:SIZE] == source.state()["scsi0"]
    check = [pve.node.qemu_img, "check", "-q", str(pve.file(volid))]
    status = subprocess.run(check, capture_output=True, check=False).returncode
    assert status in (0, 3)  # 3: clusters that nobody uses, which does no harm
    assert hits >= 2
