# SPDX-License-Identifier: Apache-2.0
"""The lines about progress and the closing summary, as an operator reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from pveplug.diskstream import Progress
from pveplug.events import Reporter
from pveplug.images.clusters import ClusterMap
from pveplug.units import human


class Described(Protocol):
    """What the summary says of a disk."""

    @property
    def size(self) -> int: ...
    @property
    def mechanism(self) -> str: ...
    @property
    def whole(self) -> str | None: ...
    @property
    def parent_job(self) -> str | None: ...


async def reporting(
    say: Reporter, vm: str, disks: Sequence[tuple[str, Progress]], interval_s: float
) -> None:
    """Say every ``interval_s`` seconds how far the disks are; ends by cancellation."""
    last, at = 0, time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        read = sum(progress.read for _, progress in disks)
        total = sum(progress.total for _, progress in disks)
        sent = sum(progress.sent for _, progress in disks)
        now = time.monotonic()
        rate = (read - last) / max(now - at, 0.001)
        last, at = read, now
        key = next((k for k, p in disks if p.read < p.total), disks[-1][0])
        percent = 100 * read // total if total else 100
        say.info(
            f"{vm} {key}: {percent} %, {rate / 1e6:.0f} MB/s, "
            f"dirty {human(total)}, sent {human(sent)}, remaining {human(total - read)}"
        )


async def comparing(
    say: Reporter, vm: str, disks: Sequence[tuple[str, Progress]], interval_s: float
) -> None:
    """Say every ``interval_s`` seconds how far disks are compared; as `reporting`.

    ``disks`` grows as one after the other begins.
    """
    last, at = 0, time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        read = sum(progress.read for _, progress in disks)
        now = time.monotonic()
        rate = (read - last) / max(now - at, 0.001)
        last, at = read, now
        for key, progress in disks:
            if progress.read < progress.total:
                say.info(
                    f"{vm} {key}: compared {100 * progress.read // progress.total} %, "
                    f"{rate / 1e6:.0f} MB/s, changed {human(progress.sent)}, "
                    f"remaining {human(progress.total - progress.read)}"
                )


def summary(
    name: str,
    disk: Described,
    clusters: ClusterMap,
    progress: Progress,
    consistency: str,
    seconds: float,
    compared: Progress | None = None,
) -> str:
    """Return the closing line of one disk.

    Args:
        seconds: what sending took.
        compared: what the disk was compared with its digests for, where it was.
    """
    if not disk.whole:
        level = f"changes since {disk.parent_job}"
    elif compared is None:
        level = f"whole ({disk.whole})"
    else:
        level = f"whole ({disk.whole}), compared with the digests of {disk.parent_job}"
    rate = progress.read / max(seconds, 0.001) / 1e6
    # Of a disk that is sent whole, holes are no news; of changes, a discard is one.
    changes = not disk.whole or compared is not None
    dirty = clusters.data_bytes + (clusters.zero_bytes if changes else 0)
    twice = "" if compared is None else f"compared {human(compared.read)}, "
    read = progress.read + (0 if compared is None else compared.read)
    return (
        f"{name}: {level}; {disk.mechanism}; {consistency}; size {human(disk.size)}, "
        f"{twice}dirty {human(dirty)}, read {human(read)}, "
        f"sent {human(progress.sent)}, {seconds:.1f} s, {rate:.0f} MB/s"
    )
