# SPDX-License-Identifier: Apache-2.0
"""A sender of replication cycles without a channel: disks in memory, calls in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from pveplug.dr.provision import Site
from pveplug.dr.replica import Replica, open_replica
from pveplug.dr.store import ReplicaStore
from pveplug.events import ListReporter
from pveplug.proto.dr_digest import RunDigest
from pveplug.proto.dr_frames import (
    LEAF,
    Block,
    Commit,
    Describe,
    Disk,
    DiskEnd,
    DiskInfo,
    Done,
    Finish,
    Open,
    Zero,
)

UUID = "0a1b2c3d-0000-4000-8000-00000000abcd"
CONFIG = """\
#the shop
boot: order=scsi0;net0
cores: 2
memory: 512
name: shop
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0
onboot: 1
scsi0: local:100/vm-100-disk-0.qcow2,iothread=1,size=4M
scsi1: local:100/vm-100-disk-1.qcow2,size=2M
scsihw: virtio-scsi-single
smbios1: uuid=0a1b2c3d-0000-4000-8000-00000000abcd
"""


@dataclass
class Source:
    """A VM that changes, and what of it was not sent yet."""

    config: str = CONFIG
    disks: dict[str, bytearray] = field(
        default_factory=lambda: {
            "scsi0": bytearray(4 << 20),
            "scsi1": bytearray(2 << 20),
        }
    )
    changed: dict[str, set[int]] = field(default_factory=dict)
    cycle: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        for key in self.disks:
            self.write(key, 20)

    def write(self, key: str, count: int = 5) -> None:
        """Write some clusters of a disk, one of them as zeroes."""
        disk = self.disks[key]
        for number in range(count):
            at = self.random.randrange(len(disk) // LEAF) * LEAF
            data = self.random.randbytes(LEAF) if number else bytes(LEAF)
            disk[at : at + LEAF] = data
            self.changed.setdefault(key, set()).add(at)

    def add(self, key: str, size: int) -> None:
        """Give it another disk, in its configuration too."""
        self.disks[key] = bytearray(size)
        self.config += f"{key}: local:100/vm-100-disk-9.qcow2,size={size >> 20}M\n"
        self.write(key)

    def grow(self, key: str, size: int) -> None:
        old = len(self.disks[key])
        self.disks[key] += bytearray(size - old)
        self.changed.setdefault(key, set()).update(range(old, size, LEAF))

    def remove(self, key: str) -> None:
        del self.disks[key]
        lines = self.config.splitlines(True)
        self.config = "".join(x for x in lines if not x.startswith(f"{key}:"))

    def set(self, key: str, value: str) -> None:
        lines = [x for x in self.config.splitlines(True) if not x.startswith(f"{key}:")]
        self.config = "".join([*lines, f"{key}: {value}\n"])

    def state(self) -> dict[str, bytes]:
        return {key: bytes(data) for key, data in self.disks.items()}

    def describe(self) -> Describe:
        self.cycle += 1
        name = f"dr-x.2026-11-25_08.00.00_{self.cycle:02d}"
        disks = tuple(DiskInfo(k, len(d)) for k, d in self.disks.items())
        when = 1_790_000_000 + self.cycle
        return Describe(name, self.cycle, when, self.config, "crash-consistent", disks)

    def frames(self, key: str, number: int, *, whole: bool) -> Iterator[Block | Zero]:
        """What of a disk is to be sent."""
        disk = self.disks[key]
        places = range(0, len(disk), LEAF)
        for at in places if whole else sorted(self.changed.get(key, ())):
            data = bytes(disk[at : at + LEAF])
            yield Block(number, at, data) if any(data) else Zero(number, at, len(data))


@dataclass
class Sender:
    """Runs cycles against one receiver's store; each opens the replica anew."""

    store: ReplicaStore
    site: Site
    source: Source = field(default_factory=Source)
    opening: Open = field(
        default_factory=lambda: Open(
            "incremental", UUID, 100, "shop", "main/pve9", "nightly.1", 1
        )
    )
    say: ListReporter = field(default_factory=ListReporter)

    def open(
        self, mode: str = "incremental", **more: Any
    ) -> AbstractAsyncContextManager[Replica]:
        return open_replica(
            self.store, self.site, replace(self.opening, mode=mode, **more)
        )

    async def seed(self, **more: Any) -> Done:
        async with self.open("seed", **more) as replica:
            await replica.apply_pending(self.say)
            return await self.cycle(replica, whole=True)

    async def increment(self, **more: Any) -> Done:
        async with self.open(**more) as replica:
            await replica.apply_pending(self.say)
            return await self.cycle(replica)

    async def cycle(self, replica: Replica, *, whole: bool = False) -> Done:
        await self.send(replica, whole=whole)
        done = await replica.finish(Finish())
        self.source.changed.clear()
        return done

    async def send(self, replica: Replica, *, whole: bool = False) -> None:
        """All of a cycle up to and with the commit."""
        ready = await replica.begin(self.source.describe(), self.say)
        for number, key in enumerate(self.source.disks):
            every = whole or key in ready.fresh
            await self.disk(replica, key, number, whole=every)
        await replica.commit(Commit(len(self.source.disks)))

    async def disk(
        self, replica: Replica, key: str, number: int, *, whole: bool
    ) -> None:
        await replica.disk(Disk(number, key, len(self.source.disks[key])))
        digest = RunDigest()
        for frame in self.source.frames(key, number, whole=whole):
            digest.add(frame)
            await replica.take(frame)
        end = DiskEnd(number, digest.frames, digest.bytes, digest.hexdigest())
        await replica.disk_end(end)
