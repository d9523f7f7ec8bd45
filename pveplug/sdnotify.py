# SPDX-License-Identifier: Apache-2.0
"""What a service tells systemd: sd_notify(3), without a library."""

from __future__ import annotations

import os
import socket
import time


def notify(*lines: str) -> bool:
    """Send ``READY=1``, ``STATUS=…``; returns whether anybody listens."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return False
    # "@" stands for the NUL byte that begins the name of an abstract socket.
    address = f"\0{where[1:]}" if where.startswith("@") else where
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        try:
            to.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, address)
        except OSError:
            return False  # never a reason to end
    return True


def reloading() -> None:
    """Say that a reload has begun, as ``Type=notify-reload`` would want it, too."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """Return how often to send ``WATCHDOG=1``: twice in the time given; None: never."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or not int(usec):
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(usec) / 2e6
