# SPDX-License-Identifier: Apache-2.0
"""Devices for the NBD server: a disk in memory whose parts may be still to come."""

from __future__ import annotations

import asyncio
import itertools
import random

from pveplug.proto.nbd_server import Hole
from pveplug.proto.nbd_wire import STATE_HOLE, STATE_ZERO

KiB, MiB = 1024, 1024 * 1024
UNIT = 64 * KiB


def pattern(size, seed=1, holes=0.5):
    """A disk of 64 KiB units, about ``holes`` of them zero."""
    rng = random.Random(seed)
    disk = bytearray()
    while len(disk) < size:
        disk += bytes(UNIT) if rng.random() < holes else rng.randbytes(UNIT)
    return disk[:size]


class MemoryDevice:
    """Serves a bytearray; zero units are holes, held units are waited for.

    ``waiting`` counts those who wait now, ``cancelled`` those who gave up, ``reading``
    and ``peak`` the bytes that slow reads had in their hands.
    """

    minimum_block = 1
    preferred_block = 4096
    maximum_block = 32 * MiB

    def __init__(self, disk, *, held=(), slow=False):
        self.disk = bytes(disk)
        self.size = len(disk)
        self.zero = [
            not any(self.disk[at : at + UNIT]) for at in range(0, self.size, UNIT)
        ]
        self.held = set(held)
        self.slow = slow
        self.go_on = asyncio.Event()
        self.changed = asyncio.Event()
        self.waiting = self.cancelled = self.reading = self.peak = self.reads = 0
        self.fail = None

    def units(self, offset, length):
        return range(offset // UNIT, -(-(offset + length) // UNIT))

    def ready(self, offset, length):
        if self.held.isdisjoint(self.units(offset, length)):
            return None
        return self._arrived(offset, length)

    async def _arrived(self, offset, length):
        self.waiting += 1
        try:
            while not self.held.isdisjoint(self.units(offset, length)):
                await self.changed.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    def release(self, units=None):
        """Let these units arrive, or all."""
        self.held -= set(self.held if units is None else units)
        self.changed.set()
        self.changed.clear()

    def read(self, offset, length):
        self.reads += 1
        if self.fail:
            raise self.fail
        return (
            self._slowly(offset, length) if self.slow else self.pieces(offset, length)
        )

    async def _slowly(self, offset, length):
        self.reading += length
        self.peak = max(self.peak, self.reading)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.reading -= length
        return self.pieces(offset, length)

    def pieces(self, offset, length):
        view = memoryview(self.disk)
        end, out = offset + length, []
        while offset < end:
            unit = offset // UNIT
            stop = min((unit + 1) * UNIT, end)
            out.append(Hole(stop - offset) if self.zero[unit] else view[offset:stop])
            offset = stop
        return out

    def block_status(self, offset, length):
        end, runs = offset + length, []
        for zero, group in itertools.groupby(
            self.units(offset, length), self.zero.__getitem__
        ):
            units = list(group)
            low, high = max(units[0] * UNIT, offset), min((units[-1] + 1) * UNIT, end)
            runs.append((high - low, STATE_HOLE | STATE_ZERO if zero else 0))
        return runs


async def until(condition, timeout_s=20.0):
    """Let the loop turn until ``condition()``."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
