# SPDX-License-Identifier: Apache-2.0
"""How long do writes take as a program inside the guest sees them, during a backup?

The lab's tiny Linux runs ``tg-latency``: one 4 KiB write (O_DIRECT) at a random place
of its data disk, then fdatasync, timed in the guest by its own clock, at most so many a
second. Meanwhile a real Bacula job backs the VM up with the whole product: not at all
(the floor), with ``latency_budget_ms=0``, and with a budget. Only what was written
while the disks were exported counts. Rounds alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pveplug.units import MiB
from tests.support.bare_qemu import QEMU
from tests.support.guest import Guest
from tests.support.tiny_guest import BOOT_DISK
from tests.support.world import World

VMID = 100
LONG_S = 600


class Bench:
    """A booted guest in a world, and what its writer has measured."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self._options = options
        self._world = world
        self.times: dict[str, list[float]] = {}
        self.rounds: dict[str, list[float]] = {}
        """The 99th percentile of each round."""
        self.paces: list[str] = []

    async def run(self) -> None:
        self.guest = await Guest.create(
            self._world.site, VMID, BOOT_DISK, data_mib=self._options.size_mib
        )
        path = self.guest.vm.disk_path("scsi1")
        await asyncio.to_thread(fill, path, self._options.size_mib)
        await self.guest.boot()
        kinds = {
            "no backup": "",
            f"{self._options.mechanism}, no budget": "latency_budget_ms=0",
            f"{self._options.mechanism}, latency_budget_ms={self._options.budget_ms}": (
                f"latency_budget_ms={self._options.budget_ms}"
            ),
        }
        for name, more in kinds.items():
            if more:
                text = f"vmid={VMID} mechanism={self._options.mechanism} quiesce=no"
                await self._world.add_job(job_name(name), f"{text} {more}")
        for number in range(self._options.rounds):
            for name, more in kinds.items():
                took = await self._one(name, f"{number}", backup=bool(more))
                self.times.setdefault(name, []).extend(took)
                p99 = statistics.quantiles(took, n=100)[98]
                self.rounds.setdefault(name, []).append(p99)
                sys.stderr.write(f"{number} {name}: {len(took)}, p99 {p99:.1f} ms\n")

    async def _one(self, name: str, seed: str, *, backup: bool) -> list[float]:
        """Return the milliseconds of each write."""
        if not backup:
            writing = await self._write(seed)
            await asyncio.sleep(self._options.seconds)
            return await self._stop(writing)
        bacula = self._world.bacula
        job = await asyncio.to_thread(bacula.start_job, job_name(name), "Full")
        await self._exported(True)
        writing = await self._write(seed)
        await self._exported(False)
        took = await self._stop(writing)
        result = await asyncio.to_thread(bacula.wait, job, 600)
        assert result.ok, result.text
        self.paces += [
            line.partition("latency budget ")[2]
            for line in result.log
            if ": latency budget " in line
        ]
        return took

    async def _write(self, seed: str) -> asyncio.Task[str]:
        argv = ["tg-latency", self.guest.names["scsi1"], str(LONG_S), seed]
        argv.append(str(self._options.per_second))
        run = self.guest.vm.guest_exec(argv, timeout_s=LONG_S)
        return asyncio.create_task(run)

    async def _stop(self, writing: asyncio.Task[str]) -> list[float]:
        await self.guest.sh("killall tg-latency")
        return [int(line) / 1000 for line in (await writing).split()]

    async def _exported(self, wanted: bool) -> None:
        async with asyncio.timeout(LONG_S):
            exports = await self.guest.vm.qmp("query-block-exports")
            while bool(exports) != wanted:
                await asyncio.sleep(0.2)
                exports = await self.guest.vm.qmp("query-block-exports")


def job_name(kind: str) -> str:
    return "budget" if "budget_ms" in kind else "plain"


def fill(path: Path, size_mib: int) -> None:
    """Make a disk without holes."""
    with path.open("r+b") as file:
        for _ in range(size_mib):
            file.write(os.urandom(MiB))
        os.fsync(file.fileno())


def show(bench: Bench) -> None:
    say = sys.stdout.write
    say("| | writes | p50 ms | p99 ms | p50 ratio | p99 ratio | p99 of each round |\n")
    say("| --- | --- | --- | --- | --- | --- | --- |\n")
    floor: tuple[float, float] | None = None
    for kind, took in bench.times.items():
        cuts = statistics.quantiles(took, n=100)
        p50, p99 = cuts[49], cuts[98]
        floor = floor or (p50, p99)
        say(f"| {kind} | {len(took)} | {p50:.2f} | {p99:.1f} ")
        say(f"| {p50 / floor[0]:.2f} | {p99 / floor[1]:.2f} ")
        say(f"| {', '.join(f'{one:.1f}' for one in bench.rounds[kind])} |\n")
    for text in bench.paces:
        say(f"\nlatency budget {text}\n")


async def measure(options: argparse.Namespace) -> None:
    async with World() as world:
        bench = Bench(options, world)
        await bench.run()
        await bench.guest.vm.stop()
    show(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--per-second", type=int, default=50)
    parser.add_argument("--budget-ms", type=int, default=5)
    parser.add_argument("--mechanism", choices=("cbw", "fleece"), default="cbw")
    options = parser.parse_args()
    version = subprocess.run(
        [QEMU, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    say, began = sys.stdout.write, time.monotonic()
    say(f"$ {' '.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} CPUs, ")
    say(f"Python {platform.python_version()}; {version}, the guest emulated (TCG)\n")
    say(f"raw data disk of {options.size_mib} MiB, no holes; load before the run ")
    say(f"{os.getloadavg()[0]:.1f}\n\n")
    asyncio.run(measure(options))
    say(f"\nload after the run {os.getloadavg()[0]:.1f}, ")
    say(f"{time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
