# SPDX-License-Identifier: Apache-2.0
"""Feeders that are killed, and a server that goes on: processes and a real client."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys

import pytest
import uvloop

from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import Landing
from pveplug.ir.sink import LandingSink
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.server import serve
from tests.support.landings import content, read
from tests.support.nbd_devices import until
from tests.support.requires import REPOSITORY

UNIT = 65536
SIZE = 150 * UNIT + 12345
KEY = "scsi0"


@pytest.fixture
def places(short_tmp):
    return short_tmp / "data", short_tmp / "live", KEY


@pytest.fixture
def disk():
    return bytes(content(SIZE, 7, UNIT))


@contextlib.asynccontextmanager
async def feeder(places, image, seed, pause_s):
    """A process that feeds; killed at the end of the block if it is still there."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.landing_feeder"),
        *(*map(str, places), str(image), str(seed), str(pause_s)),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def fed_while_killed(places, image, keeper):
    """Feed with processes killed at any moment, two at a time, until one has ended."""
    rng = random.Random(11)
    for seed in range(4):
        before = keeper.owed_bytes
        async with (
            feeder(places, image, seed, 0.005),
            feeder(places, image, seed + 100, 0.005),
        ):
            await until(lambda before=before: keeper.owed_bytes < before or not before)
            await asyncio.sleep(rng.random() * 0.1)
    async with feeder(places, image, 99, 0) as last:
        said, _ = await last.communicate()
        assert said == b"done\n"


def test_feeders_may_be_killed_at_any_moment_and_every_read_is_right(
    places, disk, short_tmp
):
    image = short_tmp / "image"
    image.write_bytes(disk)
    Landing.create(*places, SIZE).close()

    async def one(client, offset, length):
        data = await client.read(offset, length)
        assert bytes(data) == disk[offset : offset + length]

    async def work():
        rng = random.Random(3)
        address = UnixAddress(str(short_tmp / "nbd.sock"))
        with Landing.open(*places) as keeper, LandingDevice(keeper) as device:
            async with serve({"disk": device}, address):
                async with contextlib.AsyncExitStack() as stack:
                    reads = []
                    for _ in range(2):
                        client = await connect(address, "disk")
                        stack.push_async_callback(client.aclose)
                        for _ in range(200):
                            length = rng.randrange(1, 4 * UNIT)
                            offset = rng.randrange(SIZE - length)
                            reads.append(one(client, offset, length))
                    feeding = fed_while_killed(places, image, keeper)
                    async with asyncio.timeout(60):
                        await asyncio.gather(feeding, *reads)
            assert keeper.complete
            assert device.waiting == 0
            assert await read(device, 0, SIZE) == disk

    uvloop.run(work())


def test_a_killed_keeper_is_followed_by_another_that_knows_all(places, disk):
    """Marks are in the live map: who comes anew finds what others have marked."""

    async def work():
        Landing.create(*places, SIZE).close()
        with Landing.open(*places) as landing:
            async with LandingSink(landing) as sink:
                await sink.write(0, disk[: 40 * UNIT])
                await until(lambda: landing.owed_bytes == SIZE - 40 * UNIT)
                with Landing.open(*places) as keeper, LandingDevice(keeper) as device:
                    assert await read(device, 0, 40 * UNIT) == disk[: 40 * UNIT]
                    waits = asyncio.create_task(read(device, 40 * UNIT, UNIT))
                    await asyncio.sleep(0)
                    assert device.waiting == 1
                    waits.cancel()
                with Landing.open(*places) as keeper, LandingDevice(keeper) as device:
                    waits = asyncio.create_task(read(device, 39 * UNIT, 2 * UNIT))
                    await asyncio.sleep(0)
                    await sink.write(40 * UNIT, disk[40 * UNIT :])
                    assert await waits == disk[39 * UNIT : 41 * UNIT]
                    await sink.finish()
                    assert await read(device, 0, SIZE) == disk

    asyncio.run(work(), debug=True)


def test_hundreds_of_reads_wait_and_those_given_up_leave_nothing(places, disk):
    async def work():
        rng = random.Random(5)
        Landing.create(*places, SIZE).close()
        with (
            Landing.open(*places) as landing,
            Landing.open(*places) as keeper,
            LandingDevice(keeper) as device,
        ):
            tasks = {}
            for _ in range(2000):
                length = rng.randrange(1, 3 * UNIT)
                offset = rng.randrange(SIZE - length)
                task = asyncio.create_task(read(device, offset, length))
                tasks[task] = disk[offset : offset + length]
            await asyncio.sleep(0)
            assert device.waiting == 2000
            for task in rng.sample(list(tasks), 700):
                task.cancel()
                del tasks[task]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert device.waiting == 1300
            async with LandingSink(landing) as sink:
                for at in range(0, SIZE, 10 * UNIT):
                    await sink.write(at, disk[at : at + 10 * UNIT])
                await sink.finish()
            for task, expected in tasks.items():
                assert await task == expected
            assert device.waiting == 0

    asyncio.run(work(), debug=True)


def test_a_keeper_whose_map_was_removed_says_so_once(places, caplog):
    async def work():
        Landing.create(*places, SIZE).close()
        with Landing.open(*places) as keeper, LandingDevice(keeper) as device:
            waiting = device.ready(0, UNIT)
            keeper.files.live.unlink()
            await until(lambda: "landing-removed" in caplog.text)
            device._look_again()
            assert caplog.text.count("landing-removed") == 1
            waiting.cancel()

    asyncio.run(work(), debug=True)


def test_a_mark_nobody_rang_for_is_found_within_a_second_or_two(places):
    """A feeder was killed between marking and ringing."""

    async def work():
        Landing.create(*places, SIZE).close()
        with (
            Landing.open(*places) as landing,
            Landing.open(*places) as keeper,
            LandingDevice(keeper) as device,
        ):
            landing._ringer.ring = lambda: False
            waiting = device.ready(0, UNIT)
            landing.write(0, b"x" * UNIT)
            assert not waiting.done()
            async with asyncio.timeout(20):
                await waiting
            assert await read(device, 0, UNIT) == b"x" * UNIT

    asyncio.run(work(), debug=True)
