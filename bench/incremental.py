# SPDX-License-Identifier: Apache-2.0
"""Row 4: 2 GiB in random 64 KiB blocks of a 100 GiB disk, scan and read.

The disk is a qcow2 with a persistent bitmap; the dirty blocks are all it holds, so that
nbdcopy, which knows only allocation, reads the same bytes.
"""

from __future__ import annotations

import sys

from bench.harness import Row, better, compare, say, throughput, workspace
from bench.images import CONTEXT, exported, tracked_image, url
from pveplug.units import GiB, MiB

SIZE = 100 * GiB


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the row; ``small`` is for seeing that it runs."""
    dirty = 128 * MiB if small else 2 * GiB
    with workspace(dirty * 2) as base:
        image = base / "disk.qcow2"
        tracked_image(image, SIZE, dirty=dirty)
        say(f"qcow2, 100 GiB, {dirty >> 20} MiB dirty in random 64 KiB, in memory")
        with exported(image) as socket:
            ours = [sys.executable, "-m", "bench.sides", "read", str(socket), CONTEXT]
            copies = [
                ["nbdcopy", "--connections", count, url(socket), "null:"]
                for count in ("1", "4")
            ]
            sides = better(
                [
                    compare(lambda: ours, lambda copy=copy: copy, rounds=rounds)
                    for copy in copies
                ]
            )
    name = "incremental, scattered over 100 GiB, scan and read"
    return [throughput("4", name, dirty, sides, at_least=1.3)]
