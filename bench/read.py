# SPDX-License-Identifier: Apache-2.0
"""Row 1: an allocated disk over NBD into nothing, beside ``nbdcopy … null:``."""

from __future__ import annotations

import sys

from bench.harness import (
    Row,
    better,
    compare,
    cpu_row,
    full_image,
    say,
    serving,
    throughput,
    workspace,
)

SIZE = 4 << 30
SMALL = 512 << 20


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the row; ``small`` is for seeing that it runs."""
    size = SMALL if small else SIZE
    with workspace(size) as base:
        image, socket = base / "disk.raw", base / "nbd"
        full_image(image, size)
        say(f"raw image, {size >> 20} MiB, no holes, in memory")
        server = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", str(socket)]
        with serving([*server, str(image)], socket):
            url = f"nbd+unix:///?socket={socket}"
            ours = [sys.executable, "-m", "bench.sides", "read", str(socket)]
            best = []
            for connections in ("1", "4"):
                yardstick = ["nbdcopy", "--connections", connections, url, "null:"]
                best.append(
                    compare(lambda: ours, lambda argv=yardstick: argv, rounds=rounds)
                )
    sides = better(best)
    name = "NBD read of an allocated disk"
    return [
        throughput("1", name, size, sides, at_least=1.15),
        cpu_row("1-cpu", f"{name}, CPU", size, sides[0], 0.35),
    ]
