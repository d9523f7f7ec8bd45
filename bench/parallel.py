# SPDX-License-Identifier: Apache-2.0
"""Row 10: two disks at the same time beside one after the other, in one process.

Plain, and where each request to the source takes 2 ms longer (nbdkit's delay filter),
as a network storage's does.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from bench.harness import Row, compare, full_image, say, serving, throughput, workspace
from pveplug.units import GiB, MiB

SOURCES = (
    ("plain", (), 0.95),
    ("2 ms latency", ("--filter=delay", "rdelay=2ms"), 1.5),
)


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size = 128 * MiB if small else 2 * GiB
    rows = []
    with workspace(2 * size) as base:
        images = [base / "a.raw", base / "b.raw"]
        for image in images:
            full_image(image, size)
        say(f"two raw images of {size >> 20} MiB, no holes, in memory, from nbdkit")
        for name, words, bound in SOURCES:
            with ExitStack() as stack:
                sockets = []
                for image in images:
                    socket = image.with_suffix(".sock")
                    kit = ["nbdkit", "-f", "-r", "-U", str(socket), *words[:1]]
                    kit += ["file", str(image), *words[1:]]
                    stack.enter_context(serving(kit, socket))
                    sockets.append(str(socket))
                base_argv = [sys.executable, "-m", "bench.sides", "disks"]
                sides = compare(
                    lambda a=base_argv, s=sockets: [*a, "parallel", *s],
                    lambda a=base_argv, s=sockets: [*a, "serial", *s],
                    rounds=rounds,
                )
            title = f"two disks in parallel, {name}"
            rows.append(throughput("10", title, 2 * size, sides, at_least=bound))
    return rows
