# SPDX-License-Identifier: Apache-2.0
"""Watching the backend processes that bacula-fd starts: when, and how much memory.

::

    with BackendWatch(world.bacula.pid("fd")) as watch:
        await world.run("nightly")
    watch.seen[0].peak_bytes
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
EVERY_S = 0.01


@dataclass
class Seen:
    """One backend process."""

    pid: int
    started: float
    """``time.monotonic()`` when it was forked, at most one clock tick too early."""
    peak_bytes: int = 0
    """The most memory it had resident (VmHWM) when it was last looked at."""


class BackendWatch:
    """Looks at bacula-fd's children every 10 ms, from a thread."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backend watch")
        self.seen: list[Seen] = []

    def __enter__(self) -> BackendWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return max(one.peak_bytes for one in self.seen)

    def _run(self) -> None:
        known: dict[int, Seen] = {}
        while not self._end.wait(EVERY_S):
            for pid in self._children():
                if pid not in known and (started := _started(pid)) is not None:
                    known[pid] = Seen(pid, started)
                    self.seen.append(known[pid])
                if pid in known:
                    peak = _peak(pid)
                    known[pid].peak_bytes = max(known[pid].peak_bytes, peak)

    def _children(self) -> list[int]:
        found: list[int] = []
        for path in Path(f"/proc/{self._parent}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                continue  # the thread has ended
        return found


def _started(pid: int) -> float | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks * TICK_S - asleep


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
