# SPDX-License-Identifier: Apache-2.0
"""How long the scan of a disk takes: per clean 100 GiB, and per dirty extent."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from bench.harness import Row, bounded, say, told, workspace
from bench.images import CONTEXT, exported, speckled_image, tracked_image
from pveplug.units import GiB, MiB, TiB

SIZE = 100 * GiB


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size, extents = (TiB // 64, 10_000) if small else (TiB, 1_000_000)
    with workspace(256 * MiB) as base:
        clean, speckled = base / "clean.qcow2", base / "speckled.qcow2"
        tracked_image(clean, SIZE)
        speckled_image(speckled, size, extents=extents)
        still, _ = _scan(clean, rounds)
        dense, found = _scan(speckled, rounds)
    say(f"{found} extents on {size >> 30} GiB: {dense:.3f} s")
    each = (dense - still * size / SIZE) / found
    return [
        bounded("scan", "scan of clean 100 GiB", still * 1e3, 5.0, unit=" ms"),
        bounded(
            "scan-extent", f"scan per extent, of {found}", each * 1e6, 1.0, unit=" us"
        ),
    ]


def _scan(image: Path, rounds: int) -> tuple[float, int]:
    """Return the median seconds of a scan, and the extents it found."""
    with exported(image) as socket:
        argv = [sys.executable, "-m", "bench.sides", "scans", str(socket), CONTEXT]
        said = told([*argv, str(rounds + 1)])
    return statistics.median(said["seconds"][1:]), said["extents"]
