# SPDX-License-Identifier: Apache-2.0
"""Reading a replica's volume to compare it: windows of digests, memory bounded."""

from __future__ import annotations

import asyncio
from typing import Final

from pveplug.nbd.client import NbdClient
from pveplug.proto.dr_digest import ZERO_DIGEST, leaf_digest, leaf_digests
from pveplug.proto.dr_frames import LEAF
from pveplug.proto.nbd_wire import BASE_ALLOCATION, STATE_ZERO
from pveplug.units import MiB

_READ: Final = 4 * MiB


async def read_padded(client: NbdClient, offset: int, length: int) -> bytearray:
    """Read; behind the volume's end there are zeroes."""
    data = bytearray(length)
    there = min(max(client.size - offset, 0), length)
    if there:
        await client.read_into(offset, memoryview(data)[:there])
    return data


async def _holes(client: NbdClient, offset: int, length: int) -> list[tuple[int, int]]:
    """Return the runs of a window that read as zeroes, as (start, end)."""
    found: list[tuple[int, int]] = []
    end = min(offset + length, client.size)
    if BASE_ALLOCATION not in client.contexts:
        return found
    at = offset
    while at < end:
        runs = (await client.block_status(at, end - at))[BASE_ALLOCATION]
        for count, flags in runs:
            stop = min(at + count, end)
            if flags & STATE_ZERO:
                if found and found[-1][1] == at:
                    found[-1] = (found[-1][0], stop)
                else:
                    found.append((at, stop))
            at = stop
    if offset + length > end:
        found.append((end, offset + length))
    return found


async def digest_window(client: NbdClient, offset: int, length: int) -> bytes:
    """Digest a window, reading ahead while a thread hashes."""
    holes = await _holes(client, offset, length)
    found: list[bytes] = []
    hashing: asyncio.Task[bytes] | None = None
    try:
        for at in range(offset, offset + length, _READ):
            count = min(_READ, offset + length - at)
            hole = any(low <= at and at + count <= high for low, high in holes)
            data = None if hole else await read_padded(client, at, count)
            if hashing is not None:
                found.append(await hashing)
                hashing = None
            if data is None:
                found.append(zero_digests(count))
            else:
                hashing = asyncio.create_task(asyncio.to_thread(leaf_digests, data))
        if hashing is not None:
            found.append(await hashing)
    finally:
        if hashing is not None and not hashing.done():
            hashing.cancel()
    return b"".join(found)


def zero_digests(length: int) -> bytes:
    """Return the digests of so many zero bytes."""
    whole, rest = divmod(length, LEAF)
    return ZERO_DIGEST * whole + (leaf_digest(bytes(rest)) if rest else b"")
