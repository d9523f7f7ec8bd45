# SPDX-License-Identifier: Apache-2.0
"""Disk images with dirty bitmaps, made by QEMU's own tools."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness import serving
from pveplug.nbd.client import UnixAddress, connect
from pveplug.units import CLUSTER, GiB

BITMAP = "dirty"
CONTEXT = f"qemu:dirty-bitmap:{BITMAP}"


def tracked_image(
    path: Path, size: int, *, dirty: int = 0, block: int = CLUSTER, seed: int = 7
) -> None:
    """Make a qcow2 of ``size`` whose random blocks are its only data, and dirty.

    Args:
        dirty: bytes of them; bitmap granularity is 64 KiB.
        block: bytes of each, whole clusters.
    """
    _create(path, size)
    _scatter(path, size, dirty, block, seed)
    _freeze(path)


def _scatter(path: Path, size: int, dirty: int, block: int, seed: int) -> None:
    if dirty:
        blocks = random.Random(seed).sample(range(size // block), dirty // block)
        lines = [f"write -q -P {1 + n % 255} {n * block} {block}\n" for n in blocks]
        subprocess.run(
            ["qemu-io", "-f", "qcow2", str(path)],
            input="".join(lines),
            text=True,
            stdout=subprocess.DEVNULL,
            check=True,
        )


def speckled_image(path: Path, size: int, *, extents: int, dirty: int = 0) -> None:
    """Make a qcow2 with so many dirty extents of 64 KiB that have no data.

    Args:
        dirty: bytes of blocks that have, besides.
    """
    _create(path, size)
    _scatter(path, size, dirty, CLUSTER, 7)
    socket = path.with_suffix(".make")
    argv = ["qemu-nbd", "-t", "-f", "qcow2", "--discard=unmap", "--cache=unsafe"]
    with serving([*argv, "-k", str(socket), str(path)], socket):
        asyncio.run(_speckle(socket, size, extents))
    _freeze(path)


async def _speckle(socket: Path, size: int, extents: int) -> None:
    step = size // CLUSTER // extents * CLUSTER
    async with await connect(UnixAddress(str(socket))) as client:
        under_way: deque[asyncio.Task[None]] = deque()
        for number in range(extents):
            if len(under_way) >= 32:
                await under_way.popleft()
            trim = client.trim(number * step, CLUSTER)
            under_way.append(asyncio.create_task(trim))
        for task in under_way:
            await task


def _create(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    for argv in (
        ["create", "-q", "-f", "qcow2", str(path), str(size)],
        ["bitmap", "--add", "-g", "64k", str(path), BITMAP],
    ):
        subprocess.run(["qemu-img", *argv], check=True)


def _freeze(path: Path) -> None:
    argv = ["qemu-img", "bitmap", "--disable", str(path), BITMAP]
    subprocess.run(argv, check=True)


@contextmanager
def exported(path: Path, fmt: str = "qcow2", *, bitmap: bool = True) -> Iterator[Path]:
    """Serve an image read-only, its bitmap too; yields the socket."""
    socket = path.with_suffix(".sock")
    argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", fmt, "-k", str(socket)]
    argv += ["-B", BITMAP] if bitmap else []
    with serving([*argv, str(path)], socket):
        yield socket


def url(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"


def gib(size: int) -> str:
    return f"{size / GiB:g} GiB"
