# SPDX-License-Identifier: Apache-2.0
"""Disaster recovery: the channel, a seed and an increment, on two lab sites."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import (
    Resident,
    Row,
    bounded,
    compare,
    full_image,
    run,
    say,
    throughput,
)
from tests.support.dr_certs import pair
from tests.support.two_sites import TwoSites

SIZE = 2 << 30
SMALL = 128 << 20
DIRTY = 64 << 20
PUBLISHED_SEED_MB_S = 19.0
PUBLISHED_INCREMENT_S = 14.5
MOST_MIB = 100.0


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows of issue "a second site", 5."""
    size = SMALL if small else SIZE
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        base = Path(directory)
        image = base / "disk.raw"
        full_image(image, size)
        tls = pair(base, "receiver", names=("127.0.0.1",))
        plain = [sys.executable, "-m", "bench.sides", "tls-plain", str(image)]
        plain += [tls.cert, tls.key]
        ours = [sys.executable, "-m", "bench.sides", "dr-channel", str(image)]
        ours += [tls.cert, tls.key]
        sides = compare(lambda: ours, lambda: plain, rounds=rounds)
        rows = [
            throughput(
                "dr-channel",
                "a seed's frames over the channel, digested on both sides",
                size,
                sides,
                at_least=0.85,
            )
        ]
        floor = sides[1].median
        rows += asyncio.run(_on_two_sites(image, size, floor, rounds, small=small))
    return rows


async def _on_two_sites(
    image: Path, size: int, floor: float, rounds: int, *, small: bool
) -> list[Row]:
    rows = []
    async with TwoSites() as sites:
        await sites.start_receiver()
        seeds: list[tuple[float, float, float]] = []
        sender = receiver = 0.0
        for number in range(rounds + 1):
            vmid = 200 + number
            vm = await sites.site.create_vm(
                vmid, {"name": f"bench{number}"}, disks={"scsi0": image}
            )
            await vm.start()
            with Resident(lambda: [sites.receiver_pid, *children()]) as memory:
                taken = await asyncio.to_thread(_dr, sites, "seed", vmid)
            if number:
                seeds.append(taken)
                receiver = max(receiver, memory.mib.pop(sites.receiver_pid))
                sender = max(sender, max(memory.mib.values()))
        seconds = statistics.median(seed[0] for seed in seeds)
        speed = size / 1e6 / seconds
        ratio = speed / PUBLISHED_SEED_MB_S
        cpu = statistics.median(seed[1] for seed in seeds) * 2**30 / size
        most = max(seed[2] for seed in seeds)
        spread = f"{min(s[0] for s in seeds):.1f}-{max(s[0] for s in seeds):.1f} s"
        say(
            f"     dr-seed whole seeds, process start to restore point: {speed:.0f} "
            f"MB/s ({spread}), {ratio:.1f} of the {PUBLISHED_SEED_MB_S} MB/s published "
            f"elsewhere, {floor / seconds:.2f} of plain TLS into nothing; {cpu:.2f} s "
            "CPU/GiB with the receiver's programs, without QEMU's"
        )
        rows.append(
            Row(
                *("dr-seed", "whole seed, beside the published 19 MB/s"),
                *(round(ratio, 3), 1.0, None, ratio >= 1, round(speed, 1)),
                *(PUBLISHED_SEED_MB_S, round(cpu, 3), round(most, 1)),
            )
        )
        for who, mib in (("sender", sender), ("receiver", receiver)):
            rows.append(
                bounded(
                    f"dr-rss-{who}",
                    f"memory of the {who}",
                    mib,
                    MOST_MIB,
                    rss_mib=mib,
                    unit=" MiB",
                )
            )
        rows.append(await _increments(sites, size, rounds, small=small))
    return rows


async def _increments(sites: TwoSites, size: int, rounds: int, *, small: bool) -> Row:
    vmid, rng, times = 200, random.Random(7), []
    vm = sites.site.vm(vmid)
    dirty = min(DIRTY, size // 4)
    report: dict[str, Any] = {}
    for number in range(rounds + 1):
        for at in rng.sample(range(size >> 16), dirty >> 16):
            await vm.qemu_io(
                "scsi0", f"write -P {rng.randrange(1, 255)} {at << 16} 64k"
            )
        path = sites.base / "report.json"
        seconds, _, _ = await asyncio.to_thread(_dr, sites, "incremental", vmid, path)
        report = json.loads(path.read_text())[0]
        if number:
            times.append(seconds)
    phases = ", ".join(f"{k} {v:.2f} s" for k, v in report["phases"].items())
    say(f"dr-increment {dirty >> 20} MiB of random 64 KiB blocks; the last: {phases}")
    return bounded(
        "dr-increment",
        f"{dirty >> 20} MiB in random 64 KiB blocks, end to end",
        statistics.median(times),
        PUBLISHED_INCREMENT_S,
        unit=" s",
    )


def _dr(
    sites: TwoSites, mode: str, vmid: int, report: Path | None = None
) -> tuple[float, float, float]:
    """Run ``pveplug dr``; return seconds, CPU seconds, peak MiB with the receiver."""
    words = [*sites.connection.split(), *sites.dr_words().split(), f"vmid={vmid}"]
    argv = [sys.executable, "-m", "pveplug", "dr", mode, *words]
    os.environ["PODHEITOR_PROXMOX_NODE"] = str(sites.node_file)
    if report is None:
        return run(argv, [sites.receiver_pid])
    shell = ["sh", "-c", 'exec "$@" > "$0"', str(report), *argv, "--json"]
    try:
        return run(shell, [sites.receiver_pid])
    except SystemExit:
        subprocess.run(argv, check=False)  # says why
        raise


def children() -> list[int]:
    """The programs this process has started: the sender among them, by its name."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"pveplug" in words and b"dr" in words:
                found.append(int(pid))
    return found
