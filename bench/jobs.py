# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real Bacula over a simulated PVE site, all of it in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Peak, cpu_of
from tests.lab.bacula import TERMINAL
from tests.support.world import World

BPIPE = Path("/usr/lib/bacula/bpipe-fd.so")


@dataclass(frozen=True)
class Taken:
    """What some jobs took together.

    Attributes:
        cpu: seconds of bacula-fd, bacula-sd and all that bacula-fd started.
        rss_mib: the most that these had; ``backend_mib``: without the two daemons.
    """

    seconds: float
    cpu: float
    rss_mib: float
    backend_mib: float


@contextlib.asynccontextmanager
async def world_in_memory(need: int, **arguments: object) -> AsyncIterator[World]:
    """A world for ``need`` bytes of disks and volumes, with Bacula's bpipe plug-in."""
    place = "/dev/shm" if shutil.disk_usage("/dev/shm").free > need else "/var/tmp"
    before = os.environ.get("PVEPLUG_LAB_DIR")
    os.environ["PVEPLUG_LAB_DIR"] = place
    try:
        world = World(**arguments)
    finally:
        os.environ.pop("PVEPLUG_LAB_DIR")
        if before is not None:
            os.environ["PVEPLUG_LAB_DIR"] = before
    async with world:
        if BPIPE.exists():
            shutil.copy(BPIPE, world.bacula.plugin_dir)
            await asyncio.to_thread(world.bacula.kill, "fd")
            await asyncio.to_thread(world.bacula.start_daemon, "fd")
        yield world


def run_jobs(world: World, names: Sequence[str], level: str = "Full") -> Taken:
    """Run jobs at the same time, then forget what they stored. Blocks.

    Raises:
        SystemExit: one of them did not end well.
    """
    bacula = world.bacula
    daemons = [bacula.pid("fd"), bacula.pid("sd")]
    before = sum(map(cpu_of, daemons))
    both, one = Peak(daemons), Peak([daemons[0]], below=True)
    began = time.perf_counter()
    try:
        ids = [bacula.start_job(name, level) for name in names]
        while not all(bacula.status(job_id) in TERMINAL for job_id in ids):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
    finally:
        both.stop()
        one.stop()
    cpu = sum(map(cpu_of, daemons)) - before
    for result in [bacula.wait(job_id) for job_id in ids]:
        if result.termination != "Backup OK":
            raise SystemExit(f"{result.text}\n{world.backend_log[-3000:]}")
    return Taken(seconds, cpu, both.mib, one.mib)


def forget(world: World) -> None:
    """Delete all volumes and what the catalogue knows of them. Blocks."""
    for (name,) in world.bacula.query("SELECT VolumeName FROM Media"):
        world.bacula.console(f"delete volume={name} yes")
        (world.bacula.volumes / str(name)).unlink(missing_ok=True)
