# SPDX-License-Identifier: Apache-2.0
"""The product's side of each comparison: ``python -m bench.sides NAME …``.

It is the feature path (scan, zero test, frames), not a special one for benchmarks.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing

import uvloop

from pveplug.extents import Kind
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.source import OrderedReader, extents, is_zero
from pveplug.units import CLUSTER


async def read(socket: str) -> None:
    """Read what a Full would read, with its zero test, to nowhere."""
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


SIDES = {"read": read}


def main() -> None:
    name, *arguments = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(SIDES[name](*arguments))


if __name__ == "__main__":
    main()
