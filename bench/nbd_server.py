# SPDX-License-Identifier: Apache-2.0
"""Rows 8 and 9: our NBD server over a file, beside nbdkit's file plugin.

Row 8 is ``nbdcopy … null:`` with 1 and 4 connections. Row 9 asks both servers in turn
for 4 KiB somewhere, one request at a time, by a few lines of blocking socket code, so
that what the machine does otherwise happens to both.
"""

from __future__ import annotations

import contextlib
import random
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Row, bounded, compare, full_image, say, serving, throughput
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Command, Option

SIZE = 4 << 30
SMALL = 512 << 20
BLOCK = 4096
BURST = 100
"""Requests to one server before it is the other's turn."""


class Asker:
    """One connection with structured replies, one request at a time."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._buffer = bytearray(BLOCK + 28)
        self._take(18)
        self._sock.sendall(wire.CLIENT_FLAGS.pack(3))
        self._option(Option.STRUCTURED_REPLY)
        self._option(Option.GO, wire.named("") + b"\0\0")
        self.times: list[float] = []

    def _take(self, count: int) -> bytes:
        return self._sock.recv(count, socket.MSG_WAITALL)

    def _option(self, number: Option, data: bytes = b"") -> None:
        self._sock.sendall(wire.option(number, data))
        kind = 0
        while kind != wire.Reply.ACK:
            _, _, kind, length = wire.OPTION_REPLY.unpack(self._take(20))
            if length:
                self._take(length)
            if kind & wire.REPLY_ERROR:
                raise SystemExit(f"{number.name}: {wire.reply_name(kind)}")

    def read(self, offset: int, cookie: int) -> None:
        """Read one block and note how long it took."""
        head = (wire.REQUEST_MAGIC, 0, Command.READ, cookie, offset, BLOCK)
        request = wire.REQUEST.pack(*head)
        began = time.perf_counter()
        self._sock.sendall(request)
        got = self._sock.recv_into(self._buffer, 0, socket.MSG_WAITALL)
        self.times.append(time.perf_counter() - began)
        if got != len(self._buffer) or self._buffer[8:16] != struct.pack(">Q", cookie):
            raise SystemExit(f"{got} bytes for a block of {BLOCK}")

    def close(self) -> None:
        self._sock.close()

    def percentile(self, part: float) -> float:
        """Return a percentile of the times in microseconds, the first tenth apart."""
        warm = sorted(self.times[len(self.times) // 10 :])
        return warm[int(part * (len(warm) - 1))] * 1e6


@contextlib.contextmanager
def both(image: Path, base: Path) -> Iterator[tuple[Path, int, Path]]:
    """Run our server and nbdkit: our socket, our process, nbdkit's socket."""
    ours, theirs = base / "ours", base / "kit"
    argv = [sys.executable, "-m", "bench.nbd_serve", str(image), str(ours)]
    kit = ["nbdkit", "-f", "-r", "-U", str(theirs), "file", str(image)]
    with serving(argv, ours) as pid, serving(kit, theirs):
        yield ours, pid, theirs


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size = SMALL if small else SIZE
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        image = Path(directory) / "disk.raw"
        full_image(image, size)
        say(f"raw image, {size >> 20} MiB, no holes, in the page cache")
        with both(image, Path(directory)) as (ours, pid, theirs):
            for connections in ("1", "4"):
                copy = ["nbdcopy", "--connections", connections]
                sides = compare(
                    lambda copy=copy: [*copy, f"nbd+unix:///?socket={ours}", "null:"],
                    lambda copy=copy: [*copy, f"nbd+unix:///?socket={theirs}", "null:"],
                    rounds=rounds,
                    watch=lambda: [pid],
                )
                name = f"NBD server, sequential, {connections} connections"
                rows.append(throughput("8", name, size, sides, at_least=1.05))
            rows += latency(ours, theirs, size, 2000 if small else 20_000 * rounds)
    return rows


def latency(ours: Path, theirs: Path, size: int, requests: int) -> list[Row]:
    """Compare percentiles of single 4 KiB reads."""
    rng = random.Random(4)
    askers = [Asker(ours), Asker(theirs)]
    for number in range(requests // BURST):
        order = askers if number % 2 else askers[::-1]
        for asker in order:
            for cookie in range(BURST):
                asker.read(rng.randrange(size // BLOCK) * BLOCK, cookie)
    rows = []
    for part, name in ((0.5, "p50"), (0.99, "p99")):
        mine, his = (asker.percentile(part) for asker in askers)
        say(f"{name}: ours {mine:.1f} us, nbdkit {his:.1f} us")
        title = f"NBD server, 4 KiB random reads at depth 1, {name}"
        speeds = {"mb_s": BLOCK / mine, "yardstick_mb_s": BLOCK / his}
        rows.append(bounded("9", title, mine / his, 1.2, **speeds))
    mine, his = (statistics.fmean(asker.times) * 1e6 for asker in askers)
    say(f"mean: ours {mine:.1f} us, nbdkit {his:.1f} us")
    for asker in askers:
        asker.close()
    return rows
