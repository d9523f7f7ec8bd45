# SPDX-License-Identifier: Apache-2.0
"""Row 5: a whole job of the real Bacula to a volume in memory, beside its own bpipe.

A running VM's disk of random data, no compression. The bpipe job has ``nbdcopy DISK -``
feed the same daemons from a qemu-nbd on the same file; it makes no point in time, knows
no zeroes and keeps no digests. The memory and CPU time are those of both daemons and
all that the File Daemon started; QEMU's and qemu-nbd's are not in them.
"""

from __future__ import annotations

import asyncio
import subprocess

from bench.harness import Row, Side, full_image, say, serving, throughput
from bench.images import url
from bench.jobs import forget, run_jobs, world_in_memory
from pveplug.units import GiB, MiB

SIZE = 4 * GiB
SMALL = 128 * MiB


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the row; ``small`` is for seeing that it runs."""
    return asyncio.run(_measure(SMALL if small else SIZE, rounds))


async def _measure(size: int, rounds: int) -> list[Row]:
    sides = Side([], []), Side([], [])
    async with world_in_memory(3 * size) as world:
        image, socket = world.base / "disk.raw", world.base / "nbd"
        full_image(image, size)
        disks = {"scsi0": image}
        vm = await world.site.create_vm(100, {"agent": "0"}, disks=disks, fmt="raw")
        image.unlink()
        await vm.start()
        say(f"bacula-fd {_version()}")
        say(f"a disk of {size >> 20} MiB, no holes; volume and disk in {world.base}")
        await world.add_job("ours", "vmid=100")
        script = world.base / "read"
        script.write_text(f"#!/bin/sh\nexec nbdcopy '{url(socket)}' -\n")
        script.chmod(0o755)
        command = f"bpipe:/bench/disk.raw:{script}:/bin/cat"
        await asyncio.to_thread(world.bacula.add_job, "bpipe", command)
        file = f"driver=raw,file.driver=file,file.filename={vm.disk_path('scsi0')}"
        server = ["qemu-nbd", "-r", "-t", "-e", "8", "-k", str(socket), "--image-opts"]
        with serving([*server, f"{file},file.locking=off"], socket):
            for number in range(rounds + 1):
                for side, name in zip(sides, ("ours", "bpipe"), strict=True):
                    taken = await asyncio.to_thread(run_jobs, world, [name])
                    await asyncio.to_thread(forget, world)
                    if number:
                        side.seconds.append(taken.seconds)
                        side.cpu.append(taken.cpu)
                        side.rss_mib = max(side.rss_mib, taken.rss_mib)
        await vm.stop()
    name = "a job through bacula-fd and bacula-sd"
    return [throughput("5", f"{name}, bpipe", size, sides, at_least=1.0)]


def _version() -> str:
    """Return what bacula-fd calls itself in its usage."""
    done = subprocess.run(
        ["bacula-fd", "-?"], capture_output=True, text=True, check=False
    )
    lines = [t for t in done.stderr.splitlines() if "Version:" in t]
    return lines[0].partition("Version:")[2].strip() if lines else "of no known version"
