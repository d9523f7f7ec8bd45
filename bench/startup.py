# SPDX-License-Identifier: Apache-2.0
"""Starting: ``import pveplug``, and a job's backend up to its first QMP command.

The latter contains what lies between: bacula-fd's greeting, the node's configuration,
and some calls of a simulated PVE's API, which is about as fast as a real one.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

from bench.harness import Row, bounded, told, workspace
from bench.jobs import forget, run_jobs, world_in_memory
from pveplug.units import GiB, MiB
from tests.support.world import BACKEND

IMPORT = (
    "import json, time; t = time.perf_counter(); import pveplug; "
    "print(json.dumps(time.perf_counter() - t))"
)
WRAPPER = """\
#!/bin/sh
: >"{stamp}"
exec "{backend}" "$@"
"""


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    times = [told([sys.executable, "-c", IMPORT]) for _ in range(2 * rounds + 1)]
    first = asyncio.run(_first_command(rounds))
    return [
        bounded(
            "start-import",
            "import pveplug",
            statistics.median(times[1:]) * 1e3,
            80.0,
            unit=" ms",
        ),
        bounded(
            "start-qmp",
            "backend start to its first QMP command",
            first,
            0.25,
            unit=" s",
        ),
    ]


async def _first_command(rounds: int) -> float:
    """Return the median seconds until somebody but PVE opens the VM's monitor."""
    found = []
    with workspace(MiB) as folder:
        stamp, wrapper = folder / "started", folder / "backend"
        wrapper.write_text(WRAPPER.format(stamp=stamp, backend=BACKEND))
        wrapper.chmod(0o755)
        environment = {"PODHEITOR_PROXMOX_BACKEND": str(wrapper)}
        async with world_in_memory(GiB, environment=environment) as world:
            vm = await world.site.create_vm(100, {"agent": "0"}, disks={"scsi0": "64M"})
            await vm.start()
            await world.add_job("job", "vmid=100")
            for number in range(rounds + 1):
                since = time.monotonic()
                await asyncio.to_thread(run_jobs, world, ["job"])
                await asyncio.to_thread(forget, world)
                to_wall = time.time() - time.monotonic()
                held = vm.machine.qmp_relay.holds()
                first = next(one.started for one in held if one.started > since)
                if number:
                    found.append(first + to_wall - stamp.stat().st_mtime)
            await vm.stop()
    return statistics.median(found)
