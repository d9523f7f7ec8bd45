# SPDX-License-Identifier: Apache-2.0
"""Row 4: 2 GiB in random blocks of a 100 GiB disk: scan and read; the whole path.

The disk is a qcow2 with a persistent bitmap; the dirty blocks are all it holds, so that
nbdcopy, which knows only allocation, reads the same bytes. The whole path has blocks of
two clusters: a change that was right for one and for many halved their speed once, and
no other row told.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.harness import (
    Plumbing,
    Row,
    Side,
    better,
    compare,
    say,
    throughput,
    workspace,
)
from bench.images import CONTEXT, exported, tracked_image, url
from pveplug.units import CLUSTER, GiB, KiB, MiB

SIZE = 100 * GiB
BLOCK = 128 * KiB


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    dirty = 128 * MiB if small else 2 * GiB
    with workspace(dirty * 2) as base:
        read = _beside_nbdcopy(base / "read.qcow2", "read", dirty, CLUSTER, rounds)
    with workspace(dirty * 2) as base:
        path = _beside_nbdcopy(base / "path.qcow2", "backup", dirty, BLOCK, rounds)
    name = "incremental, scattered over 100 GiB"
    return [
        throughput("4", f"{name}, scan and read", dirty, read, at_least=1.3),
        throughput(
            "4-path", f"{name} in 128 KiB, whole path", dirty, path, at_least=0.4
        ),
    ]


def _beside_nbdcopy(
    image: Path, side: str, dirty: int, block: int, rounds: int
) -> tuple[Side, Side]:
    tracked_image(image, SIZE, dirty=dirty, block=block)
    say(f"qcow2, 100 GiB, {dirty >> 20} MiB dirty in {block >> 10} KiB, in memory")
    drained = Plumbing(drain=side == "backup")
    with exported(image) as socket:
        target = f"{socket},{CONTEXT}" if side == "backup" else str(socket)
        ours = [sys.executable, "-m", "bench.sides", side, target]
        ours += [CONTEXT] if side == "read" else []
        copies = [
            ["nbdcopy", "--connections", count, url(socket), "null:"]
            for count in ("1", "4")
        ]
        return better(
            [
                compare(
                    lambda: ours,
                    lambda copy=copy: copy,
                    rounds=rounds,
                    plumbing=(drained, Plumbing()),
                )
                for copy in copies
            ]
        )
