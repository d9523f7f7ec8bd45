# SPDX-License-Identifier: Apache-2.0
"""Which processes this one has started and not yet ended."""

from __future__ import annotations

import os
import time
from pathlib import Path

_kept: set[int] = set()


def keep(pid: int) -> None:
    """Say that a child outlives its test on purpose: a session's fixture ends it."""
    _kept.add(pid)


def children() -> dict[int, str]:
    """Return pid -> command line of the direct children, zombies among them."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:  # a thread that has ended meanwhile
            continue
        for pid in pids:
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            found[int(pid)] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def left_behind(before: dict[int, str], *, patience_s: float = 3.0) -> dict[int, str]:
    """Return the children that are there now and weren't in ``before``.

    A child may need a moment to end after its fixture told it to; helpers of the
    interpreter itself don't count.
    """
    deadline = time.monotonic() + patience_s
    while True:
        left = {
            pid: line or "(a zombie: ended and never waited for)"
            for pid, line in children().items()
            if pid not in before
            and pid not in _kept
            and "multiprocessing.resource_tracker" not in line
            and "multiprocessing.forkserver" not in line
        }
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def end(pids: dict[int, str]) -> None:
    """Kill and reap what a test left, so that the next one isn't blamed."""
    for pid in pids:
        try:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
