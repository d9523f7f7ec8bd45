# SPDX-License-Identifier: Apache-2.0
"""How much longer do a guest's writes take while its disk is backed up?

One 4 KiB write at a time into random places, through the guest device's own backend
(``qemu-io`` in QEMU's monitor, throttle node and filters included), timed from outside:
without a backup (the floor), and while the disk is read through the point in time, with
and without ``latency_budget_ms``. Rounds alternate; the monitor's round trip is in all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pveplug.cbt import Level
from pveplug.diskstream import DiskStream, FileSink, RateLimit, scan
from pveplug.events import NullReporter
from pveplug.guestlatency import keep_pace
from pveplug.nbd.client import UnixAddress, connect
from pveplug.pacing import Pace
from pveplug.snapshot import Options, PointInTime, ScratchFile
from pveplug.units import MiB
from tests.support.bare_qemu import QEMU, BareQemu, DiskImage, make_image


class Scratch:
    """A qcow2 beside the disk."""

    def __init__(self, base: Path) -> None:
        self._path = base / "scratch.qcow2"

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        make_image(self._path, "qcow2", size)
        return ScratchFile(str(self._path), "qcow2", "file")

    async def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class Nowhere(FileSink):
    """Takes an image and keeps nothing."""

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def backed_up(
    vm: BareQemu, number: int, budget_ms: int, paces: list[Pace]
) -> AsyncIterator[None]:
    """Read the disk, again and again, within the block."""
    point = PointInTime(
        vm.qmp_path, str(vm.base / "nbd"), Scratch(vm.base), Options(mechanism="cbw")
    )
    await point.prepare(f"bench.2026-11-25_05.00.00_{number:02}", Level("F"), vm.volids)
    try:
        await point.switch()
        (disk,) = await point.publish()
        limit = RateLimit(0)
        limit.pace = Pace(budget_ms / 1000)
        paces.append(limit.pace)
        read = 0
        contexts = ["base:allocation"]

        async def reading() -> None:
            nonlocal read
            address = UnixAddress(disk.socket)
            async with await connect(address, disk.export, contexts=contexts) as client:
                clusters = await scan(client, context=None, known=0)
                while True:
                    stream = DiskStream(
                        client, clusters, backing=None, trim=False, limit=limit
                    )
                    try:
                        await stream.send(Nowhere())
                    finally:
                        await stream.aclose()
                    read += stream.progress.read

        tasks = [asyncio.create_task(reading())]
        if budget_ms:
            pacing = keep_pace(
                vm.qmp_path, limit.pace, lambda: read, "bench", NullReporter()
            )
            tasks.append(asyncio.create_task(pacing))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if not isinstance(result, asyncio.CancelledError):
                raise RuntimeError("the backup ended early") from result
    finally:
        await point.close()


def write(vm: BareQemu, rng: random.Random, size: int) -> float:
    """Time one write; before it one that only feeds QEMU's counters.

    Of qemu-io's writes only ``aio_write`` is counted, and only ``write`` is waited for.
    """
    vm.io("scsi0", f"aio_write -q -P 7 {rng.randrange(size // 4096) * 4096} 4096")
    at = rng.randrange(size // 4096) * 4096
    began = time.perf_counter()
    vm.io("scsi0", f"write -q -P 7 {at} 4096")
    return time.perf_counter() - began


async def writes(vm: BareQemu, seconds: float, seed: int, size: int) -> list[float]:
    """Write for so many seconds, some 100 times a second."""
    rng, found = random.Random(seed), []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found.append(await asyncio.to_thread(write, vm, rng, size))
        await asyncio.sleep(0.01)
    return found


async def measure(options: argparse.Namespace, base: Path) -> None:
    size = options.size_mib * MiB
    path = base / "disk.raw"
    with path.open("wb") as file:
        for _ in range(options.size_mib):
            file.write(os.urandom(MiB))
    kinds = {
        "no backup": None,
        "cbw": 0,
        f"cbw, latency_budget_ms={options.budget_ms}": options.budget_ms,
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    paces: list[Pace] = []
    with BareQemu(base, "blockdev", {"scsi0": DiskImage(path, "raw", size)}) as vm:
        await writes(vm, 2, 0, size)
        for number in range(options.rounds):
            for place, (kind, budget) in enumerate(kinds.items()):
                if budget is None:
                    times[kind] += await writes(vm, options.seconds, number, size)
                    continue
                async with backed_up(vm, number * 2 + place, budget, paces):
                    times[kind] += await writes(vm, options.seconds, number, size)
    show(times, paces)


def show(times: dict[str, list[float]], paces: list[Pace]) -> None:
    say = sys.stdout.write
    floor: tuple[float, float] | None = None
    say("| | writes | p50 ms | p99 ms | p50 ratio | p99 ratio |\n")
    say("|---|---|---|---|---|---|\n")
    for kind, took in times.items():
        cuts = statistics.quantiles(took, n=100)
        p50, p99 = cuts[49] * 1000, cuts[98] * 1000
        floor = floor or (p50, p99)
        say(f"| {kind} | {len(took)} | {p50:.2f} | {p99:.2f} ")
        say(f"| {p50 / floor[0]:.2f} | {p99 / floor[1]:.2f} |\n")
    for pace in paces:
        if pace.budget_s:
            say(f"{pace.summary()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--budget-ms", type=int, default=3)
    options = parser.parse_args()
    version = subprocess.run(
        [QEMU, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    say = sys.stdout.write
    say(f"$ {' '.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} CPUs, ")
    say(f"Python {platform.python_version()}; {version}\n")
    say(f"raw image, {options.size_mib} MiB, no holes; load before the run ")
    say(f"{os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        asyncio.run(measure(options, Path(directory)))


if __name__ == "__main__":
    main()
