# SPDX-License-Identifier: Apache-2.0
"""A feeder as a process of its own, to be killed.

``python -m tests.support.landing_feeder FOLDER LIVE KEY IMAGE SEED PAUSE_S``: write
the image's clusters in an order of its own, cut at any byte; say "done" at the end.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from pveplug.ir.landing import Landing
from pveplug.ir.sink import LandingSink


async def feed(landing: Landing, image: bytes, seed: int, pause_s: float) -> None:
    rng = random.Random(seed)
    unit = 1 << landing.cluster_bits
    run = 8 * unit
    starts = list(range(0, landing.size, run))
    rng.shuffle(starts)
    async with LandingSink(landing, checkpoint_s=0.05) as sink:
        for start in starts:
            at, end = start, min(start + run, landing.size)
            while at < end:
                stop = min(at + rng.randrange(1, 3 * unit), end)
                piece = image[at:stop]
                if any(piece):
                    await sink.write(at, piece)
                else:
                    await sink.zero(at, stop - at)
                at = stop
            await asyncio.sleep(pause_s)
        await sink.finish()


def main() -> None:
    folder, live, key, image, seed, pause_s = sys.argv[1:]
    with Landing.open(Path(folder), Path(live), key) as landing:
        data = Path(image).read_bytes()
        asyncio.run(feed(landing, data, int(seed), float(pause_s)))
    print("done", flush=True)


if __name__ == "__main__":
    main()
