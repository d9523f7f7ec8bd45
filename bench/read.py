# SPDX-License-Identifier: Apache-2.0
"""How fast is a disk read over NBD to nowhere, beside ``nbdcopy … null:``?

Scan, reads in order and the zero test are those of a backup. Rounds of both alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import uvloop

from pveplug.extents import Kind
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.source import OrderedReader, extents, is_zero
from pveplug.units import CLUSTER, MiB


def make_image(path: Path, size: int) -> None:
    """Write a raw image without a hole; its content can't be compressed."""
    piece = os.urandom(MiB)
    with path.open("wb") as file:
        for number in range(size // MiB):
            file.write(number.to_bytes(8, "big") + piece[8:])


async def read_all(socket: str) -> int:
    """Read what a Full would read; return the bytes."""
    total = 0
    address = UnixAddress(socket)
    async with await connect(address, contexts=["base:allocation"]) as client:
        runs = [
            (extent.offset, extent.length)
            async for extent in extents(client)
            if extent.kind is Kind.DATA
        ]
        async with aclosing(OrderedReader(client).read(runs)) as slots:  # type: ignore[type-var]
            async for slot in slots:
                for at in range(0, slot.length, CLUSTER):
                    is_zero(slot.buffer, at, min(CLUSTER, slot.length - at))
                total += slot.length
    return total


def ours(socket: str) -> tuple[float, float]:
    """Return seconds and CPU seconds of one round."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(read_all(socket))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def floor(socket: str) -> tuple[float, float]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["nbdcopy", f"nbd+unix:///?socket={socket}", "null:"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def version(program: str) -> str:
    said = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True
    )
    return said.stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = options.size_mib * MiB
    say = sys.stdout.write
    say(f"$ {' '.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} CPUs, ")
    say(f"Python {platform.python_version()}, uvloop {uvloop.__version__}\n")
    say(f"{version('qemu-nbd')}; {version('nbdcopy')}\n")
    say(f"raw image, {options.size_mib} MiB, no holes, in the page cache\n")
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        image, socket = Path(directory) / "disk.raw", f"{directory}/nbd"
        make_image(image, size)
        server = subprocess.Popen(
            ["qemu-nbd", "-r", "-t", "-e", "4", "-f", "raw", "-k", socket, str(image)]
        )
        try:
            while not os.path.exists(socket):
                if server.poll() is not None:
                    sys.exit("qemu-nbd did not start")
                time.sleep(0.02)
            results: dict[str, list[tuple[float, float]]] = {"nbdcopy": [], "ours": []}
            for number in range(options.rounds + 1):
                pair = {"nbdcopy": floor(socket), "ours": ours(socket)}
                for name, took in pair.items():
                    if number:  # the first round only warms the cache
                        results[name].append(took)
        finally:
            server.terminate()
            server.wait()
    speed = {}
    for name, rounds in results.items():
        speed[name] = size / 1e6 / statistics.median(seconds for seconds, _ in rounds)
        cpu = statistics.median(used for _, used in rounds) * 2**30 / size
        say(f"{name:8} median {speed[name]:6.0f} MB/s, {cpu:.2f} s CPU per GiB\n")
    say(f"ours / nbdcopy = {speed['ours'] / speed['nbdcopy']:.2f}\n")


if __name__ == "__main__":
    main()
