# SPDX-License-Identifier: Apache-2.0
"""``ir_boot``: from a restore's start to the guest's marker, beside restore plus boot.

A guest with a data disk without holes, whose restore is held at 50 MiB/s by
``restore_bwlimit``. Full: one restore job with ``mode=instant``. Chain (Full and two
Incrementals): ``pveplug ir start``. Both beside a restore of the same jobs to an
ordinary VM that is started when it is whole. The guest runs under emulation where there
is no KVM, and its boot alone then takes many seconds on both sides.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.harness import Row, bounded, full_image, say
from bench.jobs import world_in_memory
from pveplug.proto.pve_login import Endpoint, TicketAuth
from pveplug.pve import PveApi
from pveplug.units import GiB, MiB
from tests.support.guest import Guest
from tests.support.world import GUEST, World

JOB = "nightly"
SIZE = 4 * GiB
RATE = "50M"
BOOT_S = 600.0
SMALL, SMALL_RATE = 192 * MiB, "16M"
FULL, INSTANT, CHAIN = 120, 130, 140
"""Ids of the VMs that come out."""


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size, rate = (SMALL, SMALL_RATE) if small else (SIZE, RATE)
    return asyncio.run(_measure(size, rate, rounds))


async def _measure(size: int, rate: str, rounds: int) -> list[Row]:
    async with world_in_memory(5 * size) as world:
        ids = await _backed_up(world, size)
        say(f"{size >> 20} MiB of data, {rate}/s, in {world.base}")
        rows = []
        for name, chain in (("Full by one job", ids[:1]), ("chain F+I+I", ids)):
            mine, whole = [], []
            for _ in range(rounds):
                whole.append(await _whole(world, chain, rate))
                if len(chain) == 1:
                    mine.append(await _instant(world, chain, rate))
                else:
                    mine.append(await _started(world, rate))
            fast, slow = statistics.median(mine), statistics.median(whole)
            say(f"{name}: marker after {fast:.1f} s, restore and boot {slow:.1f} s")
            title = f"time to the guest's marker, {name}"
            rows.append(bounded("ir_boot", title, fast / slow, 0.2))
    return rows


async def _backed_up(world: World, size: int) -> list[int]:
    """Make the guest and its chain; return the JobIds."""
    data = world.base / "data.raw"
    full_image(data, size)
    config = {"name": "guest", "agent": "1", "boot": "order=scsi0", "ostype": "l26"}
    disks = {"scsi0": GUEST / "boot.raw", "scsi1": data}
    vm = await world.site.create_vm(100, config, disks=disks)
    data.unlink()
    guest = Guest(vm, {})
    await guest.boot()
    await world.add_job(JOB, "vmid=100")
    ids = []
    for number, level in enumerate(("Full", "Incremental", "Incremental"), 1):
        await guest.mark(f"before job {number}")
        await guest.write("scsi1", 2000 * number, 256, f"before-{number}")
        await guest.sh("sync")
        job = await world.run(JOB, level, timeout_s=600)
        if job.termination != "Backup OK":
            raise SystemExit(job.text)
        ids.append(job.job_id)
    await vm.stop()
    return ids


async def _whole(world: World, ids: Sequence[int], rate: str) -> float:
    """Restore to an ordinary VM and boot it; return the seconds."""
    began = time.monotonic()
    where = f"/@pve/restore_vmid={FULL},restore_bwlimit={rate}"
    job = await world.restore(where=where, job_ids=ids, timeout_s=BOOT_S)
    if job.termination != "Restore OK":
        raise SystemExit(f"{job.text}\n{world.backend_log[-3000:]}")
    vm = world.site.vm(FULL)
    await vm.start()
    await vm.serial_wait("TG:READY", BOOT_S)
    seconds = time.monotonic() - began
    await vm.stop()
    await _destroyed(world, FULL)
    return seconds


async def _destroyed(world: World, vmid: int) -> None:
    endpoint = Endpoint("127.0.0.1", world.site.api_port, (world.site.fingerprint,))
    root = TicketAuth("root@pam", world.site.root_password)
    async with PveApi(endpoint, root) as api:
        await api.destroy_vm(world.site.node.name, vmid)


async def _instant(world: World, ids: Sequence[int], rate: str) -> float:
    """Recover at once by one restore job; return the seconds to the marker."""
    began = time.monotonic()
    where = f"/@pve/restore_vmid={INSTANT},mode=instant,restore_bwlimit={rate}"
    job_id = await asyncio.to_thread(
        lambda: world.bacula.start_restore(where=where, job_ids=ids)
    )
    seconds = await _marker(world, INSTANT, began)
    await asyncio.to_thread(world.bacula.cancel, job_id)
    await asyncio.to_thread(world.bacula.wait, job_id)
    await _discarded(world, INSTANT)
    return seconds


async def _started(world: World, rate: str) -> float:
    """Recover a chain by ``pveplug ir start``; return the seconds to the marker."""
    bacula = world.bacula
    program, *_, config = bacula.bconsole[0]
    words = ["ir", "start", "--vmid", "100", "--new-vmid", str(CHAIN)]
    words += ["--option", f"restore_bwlimit={rate}"]
    words += ["--console", program, "--console-config", config]
    began = time.monotonic()
    process = await _pveplug(world, *words)
    seconds = await _marker(world, CHAIN, began)
    process.terminate()
    await process.wait()
    going = "SELECT JobId FROM Job WHERE Type = 'R' AND JobStatus IN ('R', 'C')"
    for (job_id,) in bacula.query(going):
        await asyncio.to_thread(bacula.cancel, job_id)
        await asyncio.to_thread(bacula.wait, job_id)
    await _discarded(world, CHAIN)
    return seconds


async def _marker(world: World, vmid: int, began: float) -> float:
    """Wait until a VM's guest has said that it is up; return the seconds since."""
    async with asyncio.timeout(BOOT_S):
        while not (world.site.find(vmid) and world.site.vm(vmid).running):
            await asyncio.sleep(0.05)
    await world.site.vm(vmid).serial_wait("TG:READY", BOOT_S)
    return time.monotonic() - began


async def _discarded(world: World, vmid: int) -> None:
    """Remove a recovered VM, also where all has arrived and its disks have moved."""
    process = await _pveplug(world, "ir", "discard", "--vmid", str(vmid), "--yes")
    if await process.wait() and world.site.find(vmid):
        say("the recovery was over before the guest was up")
        await world.site.vm(vmid).stop()
        await _destroyed(world, vmid)


async def _pveplug(world: World, *words: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, **world.bacula.bconsole[1]}
    environment["PODHEITOR_PROXMOX_NODE"] = str(world.node_file)
    with Path(world.base, "pveplug.out").open("ab") as out:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pveplug", *words),
            env=environment,
            stdout=out,
            stderr=out,
        )
