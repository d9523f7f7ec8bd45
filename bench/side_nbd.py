# SPDX-License-Identifier: Apache-2.0
"""Sides that only read over NBD."""

from __future__ import annotations

import json
import sys
import time
from contextlib import aclosing

from pveplug.extents import Kind
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.source import READERS, OrderedReader, extents, is_zero
from pveplug.units import CLUSTER, MiB


async def read(socket: str, *dirty: str) -> None:
    """Read what a Full, or a job with a bitmap, would, zero test included."""
    address = UnixAddress(socket)
    contexts = ["base:allocation", *dirty]
    async with await connect(address, contexts=contexts, readers=READERS) as client:
        if dirty:
            from pveplug.diskstream import scan

            clusters = await scan(client, context=dirty[0], known=client.size)
            runs = ((run.offset, run.length) for run in clusters.data_runs())
        else:
            runs = iter(
                [
                    (extent.offset, extent.length)
                    async for extent in extents(client)
                    if extent.kind is Kind.DATA
                ]
            )
        reader = OrderedReader(client, request_bytes=MiB)  # as a backup's
        async with aclosing(reader.read(runs)) as slots:  # type: ignore[type-var]
            async for slot in slots:
                for at in range(0, slot.length, CLUSTER):
                    is_zero(slot.buffer, at, min(CLUSTER, slot.length - at))


async def scans(socket: str, context: str, times: str) -> None:
    """Scan a disk some times; print the seconds of each and how many extents it has."""
    from pveplug.diskstream import scan

    address = UnixAddress(socket)
    async with await connect(address, contexts=["base:allocation", context]) as client:
        seconds = []
        for _ in range(int(times)):
            began = time.perf_counter()
            await scan(client, context=context, known=client.size)
            seconds.append(time.perf_counter() - began)
        count = 0
        async for _extent in extents(client, dirty=context):
            count += 1
    sys.stdout.write(json.dumps({"seconds": seconds, "extents": count}))
