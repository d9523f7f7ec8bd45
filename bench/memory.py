# SPDX-License-Identifier: Apache-2.0
"""How much memory a backup takes: for a disk, one more, a TiB, a million extents.

It is the peak of the process (``VmHWM``) that puts disks into a discarding pipe as a
job does: all of them are open and scanned, the next one is read ahead.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

from bench.harness import Row, bounded, full_image, say, workspace
from bench.images import CONTEXT, exported, speckled_image, tracked_image
from pveplug.units import GiB, MiB, TiB

FURTHER = 3


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size = 64 * MiB if small else GiB
    big, extents = (TiB // 64, 10_000) if small else (TiB, 1_000_000)
    with workspace(size + 512 * MiB) as base, ExitStack() as stack:
        full, little = base / "full.raw", base / "little.qcow2"
        full_image(full, size)
        tracked_image(little, GiB, dirty=32 * MiB)
        clean, speckled = base / "clean.qcow2", base / "speckled.qcow2"
        tracked_image(clean, big, dirty=32 * MiB)
        speckled_image(speckled, big, extents=extents, dirty=32 * MiB)
        disk = str(stack.enter_context(exported(full, "raw", bitmap=False)))
        low, high, dotted = (
            f"{stack.enter_context(exported(image))},{CONTEXT}"
            for image in (little, clean, speckled)
        )
        one = _peak(disk)
        more = (_peak(*[disk] * (1 + FURTHER)) - one) / FURTHER
        least = _peak(low)
        per = TiB / big
        tib = (_peak(high) - least) * per
        dots = (_peak(dotted) - least) * per
    say(f"a process with a disk of 1 GiB and 32 MiB dirty has {least:.1f} MiB")
    unit = " MiB"
    return [
        bounded("rss", "memory for one disk", one, 64.0, rss_mib=one, unit=unit),
        bounded("rss-disk", "memory per further disk", more, 8.0, unit=unit),
        bounded("rss-tib", "memory per TiB of disk", tib, 4.0, unit=unit),
        bounded(
            "rss-extents",
            f"the same with {extents} dirty extents",
            dots,
            4.0,
            unit=unit,
        ),
    ]


def _peak(*disks: str) -> float:
    """Return the most MiB that a backup of these disks took."""
    argv = [sys.executable, "-m", "bench.sides", "memory", *disks]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ours:
        drain = subprocess.Popen(["cat"], stdin=ours.stdout, stdout=subprocess.DEVNULL)
        assert ours.stderr is not None
        said = ours.stderr.read()
        drain.wait()
    if ours.returncode:
        raise SystemExit(f"{' '.join(argv)}: {said.decode()}")
    return float(said.split()[-1])
