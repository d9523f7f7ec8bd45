# SPDX-License-Identifier: Apache-2.0
"""A landing against a bytearray: whatever comes in whatever order, killed anywhere."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.ir.landing import Landing
from pveplug.ir.sink import LandingSink
from tests.support.landings import BITS, UNIT, Power, check, content

MANY = settings(max_examples=80, deadline=None)
sizes = st.builds(
    lambda clusters, rest: clusters * UNIT + rest,
    st.integers(0, 12),
    st.sampled_from([1, 511, 512, UNIT - 1, UNIT]),
)
ends = st.sampled_from(["finish", "finish", "error", "kill", "power"])


class Killed(Exception):
    """The process is gone: nothing more is done."""


class Story:
    """One landing and everything that befalls it."""

    def __init__(self, size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.base = Path(tempfile.mkdtemp(prefix="landing-"))
        self.places = (self.base / "d", self.base / "l", "scsi0")
        self.disk = content(size, seed)
        Landing.create(*self.places, size, cluster_bits=BITS).close()
        self.power = Power(*self.places)

    def open(self) -> Landing:
        return Landing.open(*self.places)

    async def feed(self, calls, end: str, *, final: bool, every: int) -> None:
        """Run a feeder over (offset, bytes or length of zeroes) until ``end``."""
        clock = itertools.count()
        landing = self.open()
        sink = LandingSink(
            landing,
            final=final,
            clock=lambda: float(next(clock)),
            checkpoint_s=every,
            in_flight_bytes=1,
        )
        try:
            async with sink:
                for offset, what in calls:
                    if isinstance(what, int):
                        await sink.zero(offset, what)
                    else:
                        # The buffer is the caller's again at once.
                        buffer = bytearray(what)
                        await sink.write(offset, memoryview(buffer))
                        buffer[:] = b"\xff" * len(buffer)
                    if self.rng.random() < 0.2:
                        await asyncio.sleep(0)
                if end == "finish":
                    await sink.finish()
                else:
                    if self.rng.random() < 0.5:
                        await asyncio.sleep(0.001)  # the thread gets on with it
                    raise Killed
        except Killed:
            pass
        finally:
            landing.close()

    async def owed(self, disk: bytes | None = None) -> int:
        with self.open() as landing:
            return await check(landing, self.disk if disk is None else disk)


def told(story, runs, rng):
    """Runs of the disk as calls: split at any byte, zeroes as zeroes or as bytes."""
    calls = []
    for start, end in runs:
        cuts = {start, end, *(rng.randint(start, end) for _ in range(rng.randrange(5)))}
        for low, high in itertools.pairwise(sorted(cuts)):
            data = bytes(story.disk[low:high])
            zero = not any(data) and rng.random() < 0.5
            calls.append((low, high - low if zero else data))
    return calls


def run(story, work):
    try:
        with story.power.watching():
            asyncio.run(work())
    finally:
        shutil.rmtree(story.base)


@MANY
@given(size=sizes, seed=st.integers(0, 1 << 32), stories=st.lists(ends, max_size=5))
def test_what_is_here_is_right_and_nothing_that_was_here_is_owed_again(
    size, seed, stories
):
    """Jobs own clusters; feeders come in any order and end in any way."""
    story = Story(size, seed)
    rng = story.rng
    clusters = -(-size // UNIT)
    owners = [rng.randrange(3) for _ in range(clusters)]

    def runs_of(job, most):
        runs = [
            (n * UNIT, min((n + 1) * UNIT, size))
            for n, owner in enumerate(owners)
            if owner == job
        ]
        return runs[:most]

    async def work():
        owed = size
        for end in stories:
            job = rng.randrange(3)
            calls = told(story, runs_of(job, rng.randint(0, clusters)), rng)
            if end != "finish":
                calls = calls[: rng.randint(0, len(calls))]
            if rng.random() < 0.3:
                rng.shuffle(calls)
            every = rng.choice([1, 3, 1000])
            if rng.random() < 0.3:  # two at once, of which one dies at any time
                other = told(story, runs_of(rng.randrange(3), clusters), rng)
                other = other[: rng.randint(0, len(other))]
                await asyncio.gather(
                    story.feed(calls, end, final=True, every=every),
                    story.feed(other, "kill", final=True, every=1),
                )
            else:
                await story.feed(calls, end, final=True, every=every)
            if end == "power":
                story.power.cut(rng)
            left = await story.owed()
            assert left <= owed or end == "power"
            owed = left
        for job in range(3):
            calls = told(story, runs_of(job, clusters), rng)
            await story.feed(calls, "finish", final=True, every=1000)
        assert await story.owed() == 0
        story.power.cut(rng)
        assert await story.owed() == 0

    run(story, work)


@MANY
@given(size=sizes, seed=st.integers(0, 1 << 32), stories=st.lists(ends, max_size=4))
def test_a_replay_is_nothing_until_it_is_everything(size, seed, stories):
    """Images come oldest first, and later ones overwrite; only the end counts."""
    story = Story(size, seed)
    rng = story.rng
    images = [(content(size, seed + n), n) for n in range(rng.randint(1, 3))]

    def calls_of_all():
        result, calls = bytearray(size), []
        for image, number in images:
            for at in range(0, size, UNIT):
                end = min(at + UNIT, size)
                if number and rng.random() < 0.5:
                    continue
                result[at:end] = image[at:end]
                if any(image[at:end]) or rng.random() < 0.5:
                    middle = rng.randint(at, end)
                    calls += [(at, bytes(image[at:middle]))]
                    calls += [(middle, bytes(image[middle:end]))]
                elif number or rng.random() < 0.5:
                    calls.append((at, end - at))
        return calls, result

    async def work():
        expected = None
        for end in [*stories, "finish"]:
            calls, result = calls_of_all()
            whole = end == "finish"
            if not whole:
                calls = calls[: rng.randint(0, len(calls))]
            await story.feed(calls, end, final=False, every=1)
            if end == "power":
                story.power.cut(rng)
            if whole and expected is None:
                expected = result
            left = await story.owed(expected or result)
            assert left == (0 if expected else size)
        story.power.cut(rng)
        assert await story.owed(expected) == 0

    run(story, work)
