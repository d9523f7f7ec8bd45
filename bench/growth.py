# SPDX-License-Identifier: Apache-2.0
"""How the time of a backup grows: with the disk, its changes, with disks and jobs.

Each question varies one thing and leaves the others; its points go into the JSON and
the plots of ``docs/performance.md``. Sizes, changes and disks are measured on the
backup path into a discarding pipe, jobs on a real bacula-fd with VMs that run.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bench.harness import (
    Plumbing,
    Row,
    bounded,
    full_image,
    run,
    say,
    workspace,
)
from bench.images import CONTEXT, exported, tracked_image
from bench.jobs import Taken, forget, run_jobs, world_in_memory
from pveplug.units import GiB, MiB

Points = list[tuple[float, float]]
JOBS = (1, 2, 4, 8)


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    return [
        by_size(small, rounds),
        by_change(small, rounds),
        by_disks(small, rounds),
        *asyncio.run(by_jobs(small, rounds)),
    ]


def medians(
    varied: Sequence[float], argv: Callable[[int], list[str]], rounds: int
) -> Points:
    """Run one command for each value, round by round; return the median seconds."""
    times: list[list[float]] = [[] for _ in varied]
    for number in range(rounds + 1):
        for at, kept in enumerate(times):
            seconds, _, _ = run(argv(at), (), Plumbing(drain=True))
            if number:
                kept.append(seconds)
    points = [
        (value, round(statistics.median(kept), 3))
        for value, kept in zip(varied, times, strict=True)
    ]
    say("  ".join(f"{value:g}: {seconds:.2f} s" for value, seconds in points))
    return points


def backup_of(*disks: str) -> list[str]:
    return [sys.executable, "-m", "bench.sides", "backup", *disks]


def by_size(small: bool, rounds: int) -> Row:
    """The same 256 MiB changed on disks of 10 GiB to 1 TiB: it should take as long."""
    dirty = (32 if small else 256) * MiB
    sizes = (10, 100) if small else (10, 30, 100, 300, 1000)
    with workspace(len(sizes) * dirty * 2) as base, ExitStack() as stack:
        disks = []
        for size in sizes:
            image = base / f"{size}.qcow2"
            tracked_image(image, size * GiB, dirty=dirty)
            disks.append(f"{stack.enter_context(exported(image))},{CONTEXT}")
        say(f"{dirty >> 20} MiB changed; by GiB of disk")
        points = medians(sizes, lambda at: backup_of(disks[at]), rounds)
    name = f"time at {sizes[-1]} GiB / at {sizes[0]} GiB, {dirty >> 20} MiB changed"
    ratio = points[-1][1] / points[0][1]
    return bounded("growth-size", name, ratio, 1.2, points=points)


def by_change(small: bool, rounds: int) -> Row:
    """64 MiB to 2 GiB changed on 100 GiB: the time should grow in proportion."""
    sizes = (32, 64, 128) if small else (64, 256, 512, 1024, 2048)
    with workspace(2 * sum(sizes) * MiB) as base, ExitStack() as stack:
        disks = []
        for size in sizes:
            image = base / f"{size}.qcow2"
            tracked_image(image, 100 * GiB, dirty=size * MiB)
            disks.append(f"{stack.enter_context(exported(image))},{CONTEXT}")
        say("by MiB changed of 100 GiB, random 64 KiB")
        points = medians(sizes, lambda at: backup_of(disks[at]), rounds)
    # What is left when nothing changed is Python's start: from two points.
    (least, at_least), (middle, at_middle), (most, at_most) = (
        points[0],
        points[len(points) // 2],
        points[-1],
    )
    slope = (at_middle - at_least) / (middle - least)
    ratio = ((at_most - at_middle) / (most - middle)) / slope
    name = "time per changed MiB, upper half / lower half"
    return bounded("growth-change", name, ratio, 1.2, points=points)


def by_disks(small: bool, rounds: int) -> Row:
    """1 to 8 disks without holes in one job: each should take as long as one."""
    size = (32 if small else 512) * MiB
    counts = (1, 2, 4, 8)
    with workspace(size * counts[-1]) as base, ExitStack() as stack:
        disks = []
        for number in range(counts[-1]):
            image = base / f"{number}.raw"
            full_image(image, size)
            disks.append(str(stack.enter_context(exported(image, "raw", bitmap=False))))
        say(f"by disks of {size >> 20} MiB in one job")
        points = medians(counts, lambda at: backup_of(*disks[: counts[at]]), rounds)
    ratio = points[-1][1] / points[0][1] / counts[-1]
    name = "time per disk, of eight / of one"
    return bounded("growth-disks", name, ratio, 1.1, points=points)


async def by_jobs(small: bool, rounds: int) -> list[Row]:
    """1 to 8 jobs at a time on one bacula-fd: throughput stays, memory adds up."""
    size = (16 if small else 512) * MiB
    taken: dict[int, list[Taken]] = {count: [] for count in JOBS}
    async with world_in_memory(3 * JOBS[-1] * size) as world:
        image = world.base / "disk.raw"
        full_image(image, size)
        vms, names = [], []
        for number in range(JOBS[-1]):
            vm = await world.site.create_vm(
                100 + number, {"agent": "0"}, disks={"scsi0": image}, fmt="raw"
            )
            await vm.start()
            vms.append(vm)
            names.append(f"job{number}")
            await world.add_job(names[-1], f"vmid={vm.vmid}")
        for number in range(rounds + 1):
            for count in JOBS:
                one = await asyncio.to_thread(run_jobs, world, names[:count])
                await asyncio.to_thread(forget, world)
                if number:
                    taken[count].append(one)
        for vm in vms:
            await vm.stop()
    speeds, memory = [], []
    for count, every in taken.items():
        seconds = statistics.median(one.seconds for one in every)
        speeds.append((float(count), round(count * size / 1e6 / seconds, 1)))
        mib = statistics.median(one.backend_mib for one in every)
        memory.append((float(count), round(mib, 1)))
    say("  ".join(f"{n:g} jobs: {mb_s:.0f} MB/s" for n, mb_s in speeds))
    say("  ".join(f"{n:g} jobs: {mib:.0f} MiB" for n, mib in memory))
    kept = min(mb_s for _, mb_s in speeds) / speeds[0][1]
    added = memory[-1][1] / memory[0][1] / JOBS[-1]
    say(f" growth-jobs least total throughput / that of one job: {kept:.2f}")
    return [
        Row(
            *("growth-jobs", "least total throughput of 1, 2, 4, 8 jobs / of one job"),
            *(round(kept, 3), 1.0, None, kept >= 1.0, speeds[-1][1], speeds[0][1]),
            *(None, memory[-1][1], speeds),
        ),
        bounded(
            "growth-memory",
            "memory of eight backends / eight times that of one",
            added,
            1.05,
            rss_mib=memory[-1][1],
            points=memory,
        ),
    ]
