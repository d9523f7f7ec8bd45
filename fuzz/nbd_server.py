# SPDX-License-Identifier: Apache-2.0
"""Hostile clients against the NBD server's machine, for as long as one likes.

Each example is a client's whole stream (see ``tests/support/nbd_garbage.py``), with a
few of its bytes changed, cut anywhere, before or behind TLS. The machines live in a
process of their own, so that its memory is theirs alone and not Hypothesis's. Any
exception but RemoteProtocolError, a bound that doesn't hold, a client that holds the
process up or memory that grows ends the run with exit status 1 and, where there is
one, the smallest example.

    python -m fuzz.nbd_server [--seconds 600]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.support.nbd_garbage import Hostile, wires

EXAMPLES = 1000
HANG_S = 30
GROWTH_MIB = 8

change = st.tuples(st.integers(0, 4000), st.integers(0, 255))
changes = st.just([]) | st.lists(change, max_size=4)
cuts = st.lists(st.integers(0, 4000), max_size=10)


@dataclass
class Tally:
    """What was seen, so that nobody takes a fuzzer for one that reaches nothing."""

    clients: int = 0
    sent: int = 0
    events: int = 0
    dropped: int = 0
    slowest_s: float = 0.0
    reasons: set[str] = field(default_factory=set)


def serve_one(pieces: list[bytes], tls: bool, most: int) -> tuple[int, str]:
    """Be the server of one client; return the number of events and how it ended."""
    server = Hostile(tls=tls, max_requests=most)
    if tls and len(pieces) % 4:
        server.secure(b"\0\0\0\3")
        pieces = [pieces[0][4:], *pieces[1:]]
    for piece in pieces:
        server.feed(piece)
        server.check()
    return len(server.events), server.broken


def serve(clients: Connection) -> None:
    """Serve one client after the other; tell how each ended, and our memory."""
    while True:
        pieces, tls, most = clients.recv()
        began = time.perf_counter()
        try:
            events, broken = serve_one(pieces, tls, most)
            failed = ""
        except BaseException:  # told to whom shrinks the example
            events, broken, failed = 0, "", traceback.format_exc()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        took_s = time.perf_counter() - began
        clients.send((events, broken, failed, took_s, rss))


class Server:
    """The process that serves."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.rss_mib = 0.0

    def __call__(self, pieces: list[bytes], tls: bool, most: int, tally: Tally) -> None:
        self.pipe.send((pieces, tls, most))
        if not self.pipe.poll(HANG_S):
            self.close()
            raise AssertionError(f"this client held the server up for {HANG_S} s")
        events, broken, failed, took_s, self.rss_mib = self.pipe.recv()
        if failed:
            raise AssertionError(failed)
        tally.clients += 1
        tally.sent += sum(map(len, pieces))
        tally.events += events
        tally.dropped += bool(broken)
        tally.slowest_s = max(tally.slowest_s, took_s)
        tally.reasons.add(" ".join(broken.split()[:5]))

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def one_round(number: int, server: Server, tally: Tally) -> None:
    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(wires, changes, cuts, st.booleans(), st.sampled_from([1, 2, 7, 1024]))
    def hostile(
        raw: bytes,
        changed: list[tuple[int, int]],
        cut_at: list[int],
        tls: bool,
        most: int,
    ) -> None:
        data = bytearray(raw)
        for at, byte in changed:
            if data:
                data[at % len(data)] = byte
        edges = sorted({0, len(data), *(at % (len(data) + 1) for at in cut_at)})
        pieces = [bytes(data[low:high]) for low, high in itertools.pairwise(edges)]
        if pieces:
            server(pieces, tls, most, tally)

    hostile()
    gc.collect()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.nbd_server")
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    began, tally, first = time.monotonic(), Tally(), 0.0
    server = Server()
    try:
        for number in itertools.count(int(time.time())):
            one_round(number, server, tally)
            first = first or server.rss_mib
            took = time.monotonic() - began
            say(
                f"{took:5.0f} s: {tally.clients} clients, {tally.sent >> 20} MiB, "
                f"{tally.events} events, {tally.dropped} dropped for "
                f"{len(tally.reasons) - 1} reasons, slowest "
                f"{tally.slowest_s * 1e3:.0f} ms, {server.rss_mib:.1f} MiB resident "
                f"({first:.1f} after the first round)"
            )
            if server.rss_mib > first + GROWTH_MIB:
                say("memory grows")
                return 1
            if took > options.seconds:
                return 0
    finally:
        server.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
