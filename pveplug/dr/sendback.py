# SPDX-License-Identifier: Apache-2.0
"""A replica's disks on the way back: what differs from the source's digests.

The source sends the digests of a window of its disk, leaf by leaf; this reads the same
window of the replica's and returns the leaves that differ. Nothing of a disk is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Final

from pveplug.dr.provision import Site
from pveplug.dr.store import ReplicaError, Volume
from pveplug.errors import PveplugError, RemoteProtocolError
from pveplug.nbd.client import NbdClient, connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.proto.dr_digest import leaf_digest
from pveplug.proto.dr_frames import (
    DIGEST_SIZE,
    LEAF,
    MAX_BLOCK,
    Block,
    Digests,
    SendBack,
    Zero,
)
from pveplug.units import MiB

_ZEROES: Final = bytes(MAX_BLOCK)
_EXTENT: Final = 4 * MiB
"""What LVM rounds up to; a volume that is so much larger has been resized."""


class SendingBack:
    """The disks of one replica that is shut down; made by :func:`sending_back`."""

    def __init__(
        self,
        site: Site,
        volumes: Mapping[str, Volume],
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._site = site
        self._volumes = volumes
        self._outer = stack
        self._inner: contextlib.AsyncExitStack | None = None
        self._disk: SendBack | None = None
        self._client: NbdClient | None = None

    async def disk(self, disk: SendBack) -> None:
        """Turn to a disk.

        Raises:
            ReplicaError: the replica has none of that key and size.
        """
        volume = self._volumes.get(disk.key)
        if volume is None:
            raise ReplicaError(
                "configuration",
                f"the replica has no disk {disk.key}",
                remedy="take the disk off the source, or copy it by hand; then run "
                "failback again.",
            )
        if self._inner is not None:
            await self._inner.aclose()
        self._inner = await self._outer.enter_async_context(contextlib.AsyncExitStack())
        self._client = await serve(self._site, volume, self._inner)
        self._disk = disk
        grown = self._client.size - volume.size >= _EXTENT
        if disk.size != volume.size or disk.size > self._client.size or grown:
            raise ReplicaError(
                "configuration",
                f"disk {disk.key} has {disk.size} bytes at the source and "
                f"{self._client.size} here",
                remedy="resize the smaller one, then run failback again.",
            )

    async def window(self, digests: Digests) -> AsyncIterator[Block | Zero]:
        """Yield what differs from these digests, in order.

        Raises:
            RemoteProtocolError: they aren't of whole leaves within the disk.
        """
        disk, client = self._disk, self._client
        if disk is None or client is None or digests.number != disk.number:
            raise RemoteProtocolError(f"digests of disk {digests.number}, unannounced")
        theirs = memoryview(digests.data)
        leaves = len(theirs) // DIGEST_SIZE
        end = min(digests.offset + leaves * LEAF, disk.size)
        if digests.offset % LEAF or end <= digests.offset + (leaves - 1) * LEAF:
            raise RemoteProtocolError(
                f"{leaves} digests at {digests.offset} of {disk.key}, {disk.size} bytes"
            )
        for at in range(digests.offset, end, MAX_BLOCK):
            data = memoryview(await client.read(at, min(MAX_BLOCK, end - at)))
            first = (at - digests.offset) // LEAF
            for start, stop in _differing(data, theirs, first):
                piece = data[start:stop]
                if piece == _ZEROES[: len(piece)]:
                    yield Zero(disk.number, at + start, len(piece))
                else:
                    yield Block(disk.number, at + start, piece)


def _differing(
    data: memoryview, theirs: memoryview, first: int
) -> list[tuple[int, int]]:
    """Return the runs of leaves whose digests differ, as places in ``data``."""
    runs: list[tuple[int, int]] = []
    for number, start in enumerate(range(0, len(data), LEAF), first):
        stop = min(start + LEAF, len(data))
        wanted = theirs[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
        if leaf_digest(data[start:stop]) == wanted:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


@contextlib.asynccontextmanager
async def sending_back(
    site: Site, volumes: Mapping[str, Volume]
) -> AsyncIterator[SendingBack]:
    """Have the disks of a replica for a failback; nothing may run on them."""
    async with contextlib.AsyncExitStack() as stack:
        yield SendingBack(site, volumes, stack)


async def serve(
    site: Site,
    volume: Volume,
    stack: contextlib.AsyncExitStack,
    *,
    snapshot: str | None = None,
) -> NbdClient:
    """Open a volume read only, or a snapshot within a qcow2, until the stack ends."""
    local = site.local
    if await local.activate(volume.volid):
        stack.push_async_callback(_deactivate, site, volume.volid)
    address = await stack.enter_async_context(
        qemu_nbd(
            site.node,
            await local.volume_path(volume.volid),
            volume.format,
            socket_dir=site.node.runtime_dir,
            read_only=True,
            snapshot=snapshot,
        )
    )
    client = await connect(address)
    stack.push_async_callback(client.aclose)
    return client


async def _deactivate(site: Site, volid: str) -> None:
    with contextlib.suppress(PveplugError):
        await site.local.deactivate(volid)


async def same(site: Site, volume: Volume, snapshot: str) -> bool | None:
    """Whether a qcow2 volume still is what its snapshot holds; None: can't be told.

    Reads both to the first difference.
    """
    if volume.format != "qcow2":
        return None
    async with contextlib.AsyncExitStack() as stack:
        now = await serve(site, volume, stack)
        then = await serve(site, volume, stack, snapshot=snapshot)
        if now.size != then.size:
            return False
        for at in range(0, now.size, MAX_BLOCK):
            length = min(MAX_BLOCK, now.size - at)
            if await now.read(at, length) != await then.read(at, length):
                return False
    return True
