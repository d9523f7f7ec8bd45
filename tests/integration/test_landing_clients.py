# SPDX-License-Identifier: Apache-2.0
"""QEMU and nbdcopy read a disk while it is fed: they wait, and all of it is right."""

from __future__ import annotations

import asyncio
import random

import pytest
import uvloop

from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import Landing
from pveplug.ir.sink import LandingSink
from pveplug.nbd.client import UnixAddress
from pveplug.nbd.server import serve
from tests.support.nbd_devices import MiB, until
from tests.support.requires import requires

pytestmark = [pytest.mark.integration, requires("qemu-io", "nbdcopy", "qemu-img")]

UNIT = 65536
SIZE = 24 * MiB + 4096
READS = 150


def byte_of(cluster: int) -> int:
    """What a cluster is full of; every third is zero."""
    return 0 if cluster % 3 == 0 else cluster % 251 + 1


def disk_bytes() -> bytes:
    clusters = -(-SIZE // UNIT)
    return b"".join(bytes([byte_of(n)]) * UNIT for n in range(clusters))[:SIZE]


async def run(*argv: object) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(30):
            said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, said.decode()
    return said.decode()


def test_qemu_and_nbdcopy_read_what_is_still_arriving(short_tmp):
    disk = disk_bytes()
    places = (short_tmp / "data", short_tmp / "live", "scsi0")
    url = f"nbd+unix:///disk?socket={short_tmp}/nbd.sock"
    copy, converted = short_tmp / "copy.raw", short_tmp / "converted.raw"
    rng = random.Random(2)

    def reads():
        for _ in range(READS):
            cluster = rng.randrange(SIZE // UNIT)
            low = cluster * UNIT + rng.randrange(128) * 512
            length = UNIT - low % UNIT
            yield from ("-c", f"aio_read -P {byte_of(cluster)} {low} {length}")
        yield from ("-c", "aio_flush")

    async def feed(landing):
        async with LandingSink(landing) as sink:
            starts = list(range(0, SIZE, 5 * UNIT + 777))
            rng.shuffle(starts)
            for start in starts:
                end = min(start + 5 * UNIT + 777, SIZE)
                await sink.write(start, disk[start:end])
                await asyncio.sleep(0.002)
            await sink.finish()

    async def work():
        with (
            Landing.create(*places, SIZE) as landing,
            Landing.open(*places) as keeper,
            LandingDevice(keeper) as device,
        ):
            async with serve({"disk": device}, UnixAddress(f"{short_tmp}/nbd.sock")):
                clients = asyncio.gather(
                    run("qemu-io", "-r", "-f", "raw", *reads(), url),
                    run("nbdcopy", url, copy),
                    run(
                        "qemu-img", "convert", "-f", "raw", "-O", "raw", url, converted
                    ),
                )
                await until(lambda: device.waiting >= 24 or clients.done(), 20)
                await feed(landing)
                said, _, _ = await clients
            assert said.count("read ") >= READS
            assert "Pattern verification failed" not in said
            assert device.waiting == 0

    uvloop.run(work())
    assert copy.read_bytes() == disk
    assert converted.read_bytes() == disk
