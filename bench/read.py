# SPDX-License-Identifier: Apache-2.0
"""Row 1: an allocated disk over NBD into nothing, beside ``nbdcopy … null:``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.harness import Row, compare, full_image, say, serving, throughput

SIZE = 4 << 30
SMALL = 512 << 20


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the row; ``small`` is for seeing that it runs."""
    size = SMALL if small else SIZE
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        image, socket = Path(directory) / "disk.raw", Path(directory) / "nbd"
        full_image(image, size)
        say(f"raw image, {size >> 20} MiB, no holes, in the page cache")
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
    sides = min(best, key=lambda pair: pair[1].median)
    return [
        throughput("1", "NBD read of an allocated disk", size, sides, at_least=1.15)
    ]
