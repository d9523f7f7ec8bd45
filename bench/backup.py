# SPDX-License-Identifier: Apache-2.0
"""Rows 2 and 3: the full backup path into a pipe, beside nbdcopy and qemu-img.

The whole path of a Full: scan, read, zero test, digest, qcow2 layout, PTCOMM frames.
Whoever reads the pipe throws away. ``nbdcopy DISK - | cat`` carries the bare bytes;
``qemu-img convert`` makes a qcow2 on tmpfs and needs no pipe.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.harness import (
    Plumbing,
    Row,
    compare,
    cpu_row,
    full_image,
    say,
    serving,
    throughput,
    workspace,
)

SIZE = 4 << 30
SMALL = 256 << 20


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size = SMALL if small else SIZE
    with workspace(2 * size) as base:
        image, socket, qcow2 = base / "disk.raw", base / "nbd", base / "out.qcow2"
        full_image(image, size)
        say(f"raw image, {size >> 20} MiB, no holes, in memory")
        server = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", str(socket)]
        url = f"nbd+unix:///?socket={socket}"
        ours = [sys.executable, "-m", "bench.sides", "backup", str(socket)]
        copy = ["nbdcopy", url, "-"]
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", url, str(qcow2)]
        drained = Plumbing(drain=True)
        with serving([*server, str(image)], socket):
            piped = compare(
                lambda: ours,
                lambda: copy,
                rounds=rounds,
                plumbing=(drained, drained),
            )
            converted = compare(
                lambda: ours,
                lambda: convert,
                rounds=rounds,
                between=lambda: Path(qcow2).unlink(missing_ok=True),
                fresh=size,
                plumbing=(drained, Plumbing()),
            )
    name = "full backup path into a pipe"
    return [
        throughput("2", f"{name}, nbdcopy - | cat", size, piped, at_least=1.2),
        cpu_row("2-cpu", f"{name}, CPU", size, piped[0], 0.6),
        throughput(
            "3", f"{name}, qemu-img convert to qcow2", size, converted, at_least=1.0
        ),
    ]
