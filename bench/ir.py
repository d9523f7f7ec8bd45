# SPDX-License-Identifier: Apache-2.0
"""Rows 10 and 11: what a guest reads while its disk arrives, beside qemu-nbd.

Row 10 asks our server over a landing and ``qemu-nbd`` over the same file in turn for
4 KiB somewhere that has arrived, one request at a time, as row 9 does. Row 11 is the
memory of a serving process whose disk of 1 TiB has arrived, half of it data.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from pathlib import Path

from bench.harness import Row, bounded, full_image, say, serving
from bench.ir_serve import KEY
from bench.nbd_server import BLOCK, BURST, Asker
from pveplug.ir.landing import Landing
from pveplug.ir.presence import HEAD, WINDOW, Mark
from pveplug.units import GiB, MiB, TiB

SIZE = 4 * GiB
SMALL = 256 * MiB
READS = 20_000


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        base = Path(directory)
        rows = latency(
            base, SMALL if small else SIZE, 2000 if small else 20_000 * rounds
        )
        rows.append(memory(base / "big", 5 * GiB if small else TiB))
    return rows


def served(base: Path, socket: Path):
    argv = [sys.executable, "-m", "bench.ir_serve", str(base), str(socket)]
    return serving(argv, socket)


def latency(base: Path, size: int, requests: int) -> list[Row]:
    """Compare percentiles of single 4 KiB reads of what has arrived."""
    image, ours, theirs = base / "disk.raw", base / "ours", base / "qemu"
    full_image(image, size)
    say(f"raw image, {size >> 20} MiB, no holes, in the page cache, as a landing")
    with Landing.create(base, base, KEY, size) as landing:
        with image.open("rb") as file:
            for at in range(0, size, MiB):
                landing.write(at, file.read(MiB))
        image.unlink()
        data = landing.files.data
    argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", str(theirs)]
    argv += ["--cache=writeback", str(data)]
    with served(base, ours), serving(argv, theirs):
        rng = random.Random(4)
        askers = [Asker(ours), Asker(theirs)]
        for number in range(requests // BURST):
            for asker in askers:
                for cookie in range(number * BURST, (number + 1) * BURST):
                    asker.read(rng.randrange(size // BLOCK) * BLOCK, cookie)
    rows = []
    for part, name in ((0.5, "p50"), (0.99, "p99")):
        mine, his = (asker.percentile(part) for asker in askers)
        say(f"{name}: ours {mine:.1f} us, qemu-nbd {his:.1f} us")
        title = f"reads of arrived clusters, 4 KiB random, {name}"
        rows.append(bounded("ir_read", title, mine / his, 1.2))
    mine, his = (statistics.fmean(asker.times) * 1e6 for asker in askers)
    say(f"mean: ours {mine:.1f} us, qemu-nbd {his:.1f} us")
    for asker in askers:
        asker.close()
    return rows


def memory(base: Path, size: int) -> Row:
    """Return the peak memory of a process that serves a big disk."""
    with Landing.create(base, base, KEY, size) as landing:
        # By the marks alone: every second GiB is data, which the file has as holes.
        for number, at in enumerate(range(0, landing.clusters, WINDOW // 64)):
            count = min(WINDOW // 64, landing.clusters - at)
            mark = Mark.DATA if number % 2 else Mark.ZERO
            landing.marks[HEAD + at : HEAD + at + count] = bytes([mark]) * count
        landing.checkpoint()
    socket = base / "sock"
    with served(base, socket) as pid:
        asker = Asker(socket)
        rng = random.Random(5)
        for cookie in range(READS):
            odd = rng.randrange(size // GiB // 2) * 2 + 1
            asker.read(odd * GiB + rng.randrange(GiB // BLOCK) * BLOCK, cookie)
        asker.close()
        mib = _peak_mib(pid)
    title = f"memory of a server of {size >> 30} GiB, {READS} reads"
    return bounded("ir_memory", title, mib, 100, rss_mib=mib, unit=" MiB")


def _peak_mib(pid: int) -> float:
    """Return the most a process has had in memory, its beginning included."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(ln for ln in status.splitlines() if ln.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
