# SPDX-License-Identifier: Apache-2.0
"""How long the guest's own disk requests take, by QEMU's counters.

``query-blockstats`` has, for each disk of the guest, how many reads, writes and flushes
ended and the time they took in all; the difference of two samples is their mean. The
backup's own reads are not in it. Histograms would tell more, but they'd have to be set
on the guest's disks, where a killed job would leave them, or take an administrator's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from pveplug.blockgraph import drive_key
from pveplug.errors import QmpError, TransportError
from pveplug.events import Reporter
from pveplug.pacing import Pace
from pveplug.qmp import qmp_session

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
BUSY_S: Final = 2.0
"""How long a sample may wait for the monitor; a missed one is no harm."""
SAY_EVERY_S: Final = 10.0
BLIND: Final = 10
KINDS: Final = ("rd", "wr", "flush")

Counters = Mapping[tuple[str, str], tuple[int, int]]
"""(disk, kind) -> requests that ended, and the nanoseconds they took."""


def counters(blockstats: list[Mapping[str, Any]]) -> Counters:
    """Return what ``query-blockstats`` says of the guest's disks."""
    found = {}
    for entry in blockstats:
        node = {"node-name": entry.get("node-name", "")}
        if (key := drive_key({**entry, "inserted": node})) is None:
            continue
        stats = entry["stats"]
        for kind in KINDS:
            found[key, kind] = (
                int(stats[f"{kind}_operations"]),
                int(stats[f"{kind}_total_time_ns"]),
            )
    return found


def slowest(before: Counters, after: Counters) -> float | None:
    """Return the seconds of the slowest disk's slowest kind of request; None: none."""
    means = []
    for what, (count, took) in after.items():
        old_count, old_took = before.get(what, (count, took))
        if count > old_count:  # a device that was plugged anew counts from 0
            means.append((took - old_took) / (count - old_count) / 1e9)
    return max(means, default=None)


async def keep_pace(
    qmp_path: str, pace: Pace, read: Callable[[], int], vm: str, say: Reporter
) -> None:
    """Sample every second and set the pace; ends by cancellation.

    Args:
        read: bytes read so far.
        vm: as the job log names it.
    """
    before: Counters = {}
    moved, at = read(), time.monotonic()
    said_at, blind = -SAY_EVERY_S, 0
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            async with qmp_session(qmp_path, connect_timeout_s=BUSY_S) as qmp:
                after = counters(await qmp.execute("query-blockstats"))
        except (QmpError, TransportError) as error:
            log.info("vm=%s no sample: %s", vm, error)
            blind += 1
            if blind == BLIND:
                say.warning(
                    f"{vm}: QEMU can't be asked how long the guest's requests take "
                    f"({error}); the pace stays at {pace}"
                )
            continue
        blind = 0
        now, total = time.monotonic(), read()
        latency = slowest(before, after)
        speed = (total - moved) / max(now - at, 0.001)
        before, moved, at = after, total, now
        if not pace.sample(latency, speed):
            continue
        took = "nothing" if latency is None else f"{latency * 1000:.0f} ms"
        log.info("vm=%s latency=%s pace=%s step=%d", vm, took, pace, pace.step)
        if now - said_at >= SAY_EVERY_S or not pace.step:
            said_at = now
            say.info(
                f"{vm}: the guest's requests take {took} (latency_budget_ms="
                f"{pace.budget_s * 1000:.0f}); the backup reads with {pace}"
            )
