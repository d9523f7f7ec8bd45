# SPDX-License-Identifier: Apache-2.0
"""Landings for tests: disks to feed, ways to feed them, and what reading gives."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable
from contextlib import contextmanager
from pathlib import Path

from pveplug.ir import landing as landing_module
from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import Landing
from pveplug.ir.presence import Mark
from pveplug.proto.nbd_server import Hole

BITS = 12
UNIT = 1 << BITS


def content(size: int, seed: int, unit: int = UNIT) -> bytearray:
    """A disk of ``size`` bytes; some of its clusters are zero, some nearly."""
    rng = random.Random(seed)
    disk = bytearray()
    while len(disk) < size:
        match rng.randrange(4):
            case 0:
                disk += bytes(unit)
            case 1:
                disk += bytes(unit - 1) + b"\1"
            case _:
                disk += rng.randbytes(unit)
    return disk[:size]


def joined(data) -> bytes:
    """What a device's answer to a read is on the wire."""
    if isinstance(data, list | tuple):
        return b"".join(
            bytes(piece.length) if isinstance(piece, Hole) else bytes(piece)
            for piece in data
        )
    return bytes(data)


async def read(device, offset: int, length: int) -> bytes:
    """Read as the server does, waiting for what is owed."""
    waiting = device.ready(offset, length)
    if waiting is not None:
        await waiting
    data = device.read(offset, length)
    return joined(await data if isinstance(data, Awaitable) else data)


async def check(landing: Landing, disk: bytes) -> int:
    """Everything that is here reads as ``disk`` has it; returns bytes that are owed."""
    owed = 0
    with LandingDevice(landing) as device:
        for offset, length, mark in landing.kinds(0, landing.size):
            if mark is Mark.OWED:
                owed += length
                waiting = device.ready(offset, length)
                assert waiting is not None
                waiting.cancel()
                continue
            assert device.ready(offset, length) is None
            assert await read(device, offset, length) == disk[offset : offset + length]
        for _ in range(0 if owed else 5):
            low, high = sorted(random.choices(range(landing.size + 1), k=2))
            if low < high:
                assert await read(device, low, high - low) == disk[low:high]
    assert owed == landing.owed_bytes
    assert landing.complete is (owed == 0)
    return owed


class Power:
    """Remembers what of a data file was on the disk for certain, and cuts it off."""

    def __init__(self, folder: Path, live_folder: Path, key: str) -> None:
        self.folder, self.live_folder, self.key = folder, live_folder, key
        self.boots = 0
        self._data = folder / f"{key}.data"
        self._synced = self._data.read_bytes()

    @contextmanager
    def watching(self):
        """Within the block a sync of the file is seen, and a boot has an id of its own.

        What is on the disk for certain is what was there before the sync began.
        """
        genuine, boot = os.fdatasync, landing_module.boot_id

        def fdatasync(fd: int) -> None:
            before = os.pread(fd, os.fstat(fd).st_size, 0)
            genuine(fd)
            self._synced = before

        os.fdatasync = fdatasync
        landing_module.boot_id = lambda: bytes(15) + bytes([1 + self.boots])
        try:
            yield
        finally:
            os.fdatasync, landing_module.boot_id = genuine, boot

    def cut(self, rng: random.Random) -> None:
        """The machine goes down: of what was not synced any sector may be missing."""
        now = self._data.read_bytes()
        with self._data.open("r+b") as file:
            for at in range(0, len(now), 512):
                if rng.random() < 0.5:
                    file.seek(at)
                    file.write(self._synced[at : at + 512])
        self._synced = self._data.read_bytes()
        self.boots += 1
        if rng.random() < 0.5:  # below /run it is gone; elsewhere it is of another boot
            (self.live_folder / f"{self.key}.live").unlink(missing_ok=True)
