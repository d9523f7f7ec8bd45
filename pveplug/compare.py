# SPDX-License-Identifier: Apache-2.0
"""A disk whose changes no bitmap knows, compared with what it held at job P.

The layout of an image comes before its first cluster, so what has changed must be
known before anything is sent. The disk is read twice, but only what changed::

    pass 1   all that isn't a hole:  digest, compared with the row of P  ─► ClusterMap
    pass 2   what differs:           the ordinary overlay, P's image below it

Both read the same point in time. What pass 1 found unchanged is given back to it as it
goes, what differs is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Final

from pveplug.diskstream import (
    TRIM_AHEAD,
    TRIM_RUNS,
    TRIM_STEP,
    Progress,
    RateLimit,
    trim_range,
)
from pveplug.extents import Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.leaves import Cutter, Keys, RunReader, Window, windows
from pveplug.nbd.client import NbdClient
from pveplug.nbd.source import OrderedReader
from pveplug.tasks import to_the_end
from pveplug.units import CLUSTER

_BITS: Final = CLUSTER.bit_length() - 1


class _GiveBack:
    """TRIMs what will not be read again, a run at a time; short ones are left."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self._shortest = max(TRIM_AHEAD, client.size // TRIM_RUNS)
        self._step = max(TRIM_STEP, self._shortest)
        self._run = 0  # where the present run began
        self._first = self._end = 0  # what of it is still to be given back

    async def unchanged(self, cluster: int) -> None:
        """Add a cluster; they rise."""
        if cluster != self._end:
            await self.flush()
            self._run = self._first = cluster
        self._end = cluster + 1
        if (self._end - self._first) * CLUSTER >= self._step:
            await self.flush()

    async def flush(self) -> None:
        start, end = self._first * CLUSTER, min(self._end * CLUSTER, self._client.size)
        if start < end and end - self._run * CLUSTER >= self._shortest:
            await trim_range(self._client, start, end - start)
            self._first = self._end


async def compare(
    client: NbdClient,
    found: ClusterMap,
    row: Sequence[RunReader],
    keys: Keys,
    *,
    trim: bool,
    limit: RateLimit,
    progress: Progress,
) -> ClusterMap:
    """Return the map of what differs from the row: of an overlay on P's image.

    Args:
        found: the disk's allocation: every cluster DATA or ZERO.
        row: P's files of digests, verified, oldest first.
        progress: ``read`` counts what was compared, ``sent`` what of it differs.

    A cancellation leaves the row's files at rest and the point in time as it is.

    Raises:
        NbdError, TransportError: a read failed.
        IntegrityError: a file of digests changed while it was read. A part of the point
            in time may have been given back by then: the disk can't be read again.
    """
    changed = ClusterMap(client.size)
    cutter = Cutter(client.size, keys)
    reader = OrderedReader(
        client, request_bytes=limit.request_bytes, allowed=limit.in_flight
    )
    given = _GiveBack(client) if trim else None
    progress.total = found.data_bytes
    told: Iterator[Window] = windows(row, client.size)
    # The last one reads the files' ends, whatever is at the end of the disk.
    while (window := await to_the_end(asyncio.to_thread(next, told, None))) is not None:
        start = window.first * CLUSTER
        end = min(start + window.count * CLUSTER, client.size)
        for hole in found.zero_runs(start, end):
            last = ((hole.end - 1) >> _BITS) + 1
            for a, b in window.not_zero(hole.offset >> _BITS, last):
                stop = min(b * CLUSTER, client.size)
                changed.mark_range(a * CLUSTER, stop - a * CLUSTER, Kind.ZERO)
        runs = ((run.offset, run.length) for run in found.data_runs(start, end))
        async with aclosing(reader.read(runs)) as slots:  # type: ignore[type-var]
            async for slot in slots:
                await limit.spend(slot.length)
                progress.read += slot.length
                for cluster, digest in cutter.take(
                    slot.offset, slot.buffer, 0, slot.length
                ):
                    if window.same(cluster, digest):
                        if given is not None:
                            await given.unchanged(cluster)
                        continue
                    at = cluster * CLUSTER
                    length = min(CLUSTER, client.size - at)
                    kind = Kind.ZERO if digest is None else Kind.DATA
                    changed.mark_range(at, length, kind)
                    progress.sent += length if digest is not None else 0
    if given is not None:
        await given.flush()
    return changed
