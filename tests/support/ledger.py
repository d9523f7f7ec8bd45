# SPDX-License-Identifier: Apache-2.0
"""Writes to a VM's disks in a known order, and images judged by them.

Each write ends before the next begins, so whatever was on the disks at one instant is
the result of the first *k* writes, the same *k* for every disk. A backup taken while
the writes go on is right when its images are exactly that for some *k* of the job's
time; a block too new, too old or torn between two disks matches no *k*.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from tests.lab.vm import LabVm

KIB = 1 << 10
SECTOR = 512
LARGEST = 64 * KIB
"""One request, one cluster of CBT: QEMU lets it pass the filter whole."""


Image = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Write:
    key: str
    offset: int
    length: int
    pattern: int
    """The byte that fills it."""


class Ledger:
    """What was written to the disks of a VM that started out empty."""

    def __init__(self, vm: LabVm, sizes: Mapping[str, int], *, seed: int = 1) -> None:
        self._vm = vm
        self._sizes = dict(sizes)
        self._random = random.Random(seed)
        self._log: list[Write] = []

    @property
    def count(self) -> int:
        """Writes begun so far."""
        return len(self._log)

    async def write(self, key: str, offset: int, length: int, pattern: int) -> None:
        """Write as the guest's device would."""
        self._log.append(Write(key, offset, length, pattern))
        how = f"write -P {pattern}" if pattern else "write -z"
        await self._vm.qemu_io(key, f"{how} {offset} {length}")

    async def some(self, count: int) -> None:
        """Write at random places: data mostly, zeroes at times, aligned or not."""
        for _ in range(count):
            key = self._random.choice(list(self._sizes))
            length = SECTOR * self._random.randint(1, LARGEST // SECTOR)
            last = (self._sizes[key] - length) // SECTOR
            offset = SECTOR * self._random.randint(0, last)
            # Within one cluster, see LARGEST.
            length = min(length, LARGEST - offset % LARGEST)
            pattern = self._random.choice([0, *range(1, 256, 30)])
            await self.write(key, offset, length, pattern)

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Go on writing during the block."""
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                await self.some(1)
                await asyncio.sleep(0.01)

        task = asyncio.create_task(write(), name="ledger")
        try:
            yield
        finally:
            stop.set()
            await task

    def moment_of(self, images: Mapping[str, Image], earliest: int, latest: int) -> int:
        """Return the *k* in a range that the images are the result of.

        Raises:
            AssertionError: there is none; says how near the nearest one is.
        """
        for key, image in images.items():
            assert len(image) == self._sizes[key], f"{key}: {len(image)} bytes"
        disks = self.state(earliest)
        wrong = {
            (key, sector)
            for key, image in images.items()
            for sector in _differences(image, disks[key])
        }
        nearest = (len(wrong), earliest, sorted(wrong)[:8])
        for k in range(earliest, latest + 1):
            if k > earliest:
                write = self._log[k - 1]
                _judge(images[write.key], write, wrong)
                nearest = min(nearest, (len(wrong), k, sorted(wrong)[:8]))
            if not wrong:
                return k
        raise AssertionError(
            f"no state between writes {earliest} and {latest}; the nearest is "
            f"{nearest[1]}, where {nearest[0]} sectors differ: {nearest[2]}"
        )

    def state(self, k: int) -> dict[str, bytes]:
        """Return what the disks hold after the first ``k`` writes."""
        disks = {key: bytearray(size) for key, size in self._sizes.items()}
        for write in self._log[:k]:
            _apply(disks, write)
        return {key: bytes(disk) for key, disk in disks.items()}


def _apply(disks: dict[str, bytearray], write: Write) -> None:
    end = write.offset + write.length
    disks[write.key][write.offset : end] = bytes([write.pattern]) * write.length


def _judge(image: Image, write: Write, wrong: set[tuple[str, int]]) -> None:
    """Bring ``wrong`` up to date with a write that is now part of the state."""
    wanted = bytes([write.pattern]) * SECTOR
    for at in range(write.offset, write.offset + write.length, SECTOR):
        place = (write.key, at // SECTOR)
        if image[at : at + SECTOR] == wanted:
            wrong.discard(place)
        else:
            wrong.add(place)


def _differences(left: Image, right: Image) -> list[int]:
    """Return the sectors that differ."""
    one, other = bytes(left), bytes(right)
    return [
        at // SECTOR
        for start in range(0, len(one), LARGEST)
        if one[start : start + LARGEST] != other[start : start + LARGEST]
        for at in range(start, min(start + LARGEST, len(one)), SECTOR)
        if one[at : at + SECTOR] != other[at : at + SECTOR]
    ]
