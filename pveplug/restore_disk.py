# SPDX-License-Identifier: Apache-2.0
"""One disk of a restore: images of its chain in, a volume written over NBD.

Two ways to get it right::

    owners known (restore objects)          owners not known
      Full    D D D D . .                     Full    D D D D . .   written
      Incr    . D . . D .                     Incr    . D . . D .   written over it
      written F I F F I .  each once          in the chain's order, or refused
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.chain import Chain
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import VERSION, DigestVerifier
from pveplug.images.edges import DiskEdges
from pveplug.images.evidence import check_counts, check_header
from pveplug.images.manifest import DiskEntry, parse_backing
from pveplug.images.qcow2_reader import (
    GuestData,
    GuestZero,
    ImageHeader,
    Qcow2StreamReader,
)
from pveplug.nbd.client import Address, connect
from pveplug.nbd.sink import NbdSink


class Limit(Protocol):
    async def spend(self, size: int) -> None: ...


class DiskSink(Protocol):
    """What a disk is written to; offsets and lengths in bytes.

    ``write`` has copied or written what it was given when it returns, later calls win
    over earlier ones, a failure is raised from the next call and every one after it,
    and only ``finish`` says that all is well.
    """

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def zero(self, offset: int, length: int) -> None: ...

    async def finish(self) -> None: ...


class Image(Protocol):
    """An image as Bacula gives it back."""

    size: int

    def data(self) -> AsyncIterator[tuple[int, memoryview]]:
        """Its bytes as (offset, view); a view is valid until the next step."""


@dataclass(slots=True)
class Written:
    """What was done, for the closing line."""

    received: int = 0
    superseded: int = 0
    """Bytes a later job has the last word on, not written."""
    jobs: list[str] = field(default_factory=list)


class DiskWriter:
    """Writes one disk; ``begin`` and ``finish`` an image for each member of its chain.

    Args:
        key: its name in the newest backup.
        size: bytes it shall have; None until the first image tells (owners unknown).
        chain: what the disk is made of; None: only the images tell. Without the owner
            of every cluster the images are replayed as they come.
        zeroed: a fresh volume of this storage reads as zeroes by itself.
    """

    def __init__(
        self,
        key: str,
        *,
        chain: Chain | None,
        zeroed: bool,
        limit: Limit,
    ) -> None:
        self.key = key
        self.written = Written()
        self.size = chain.final_size(key) if chain else 0
        self._chain = chain
        self._owners = chain is not None and chain.mapped(key)
        self._zeroed = zeroed
        self._limit = limit
        self._stack = contextlib.AsyncExitStack()
        self._sink: DiskSink | None = None
        self._room = 0  # bytes of what is written to
        self._missing = set(chain.members(key)) if chain else set[str]()

    @property
    def complete(self) -> bool:
        """Whether every image of the chain has come; always, where none is known."""
        return bool(self.written.jobs) and not self._missing

    @property
    def missing(self) -> list[str]:
        """Jobs whose image has not come."""
        return sorted(self._missing)

    async def open(self, address: Address) -> None:
        """Connect to the volume and zero what nobody will write."""
        client = await connect(address)
        self._stack.push_async_callback(client.aclose)
        await self.begin(NbdSink(client), client.size)

    async def begin(
        self, sink: contextlib.AbstractAsyncContextManager[DiskSink], room: int
    ) -> None:
        """Write to ``sink``, which has ``room`` bytes and is left by ``finish``."""
        if room < self.size:
            raise IntegrityError(f"the volume has {room} bytes, the disk {self.size}")
        self._room = room
        self._sink = await self._stack.enter_async_context(sink)
        if self._zeroed:
            return
        if self._chain is None or not self._owners:
            await self._sink.zero(0, room)
            return
        for extent in self._chain.never_written(self.key):
            await self._sink.zero(extent.offset, extent.length)
        if self.size < room:
            await self._sink.zero(self.size, room - self.size)

    async def receive(
        self,
        job: str,
        image: Image,
        digest_root: str | None = None,
        *,
        entry: DiskEntry | None = None,
        version: int = VERSION,
    ) -> str:
        """Take one image from its first byte to its last.

        Args:
            digest_root: of its digests; None where only a later file tells.
            entry: what its job's manifest says of it.
            version: of the digests.

        Returns: the root of the digests as the image gave them.

        Raises:
            IntegrityError: it is damaged, out of its turn, or not what was stored.
        """
        owned: ClusterMap | None = None
        if self._chain is not None and self._owners:
            owned = self._chain.owned(job, self.key)
        reader = Qcow2StreamReader(name=f"{job}/{self.key}.qcow2")
        verifier = DigestVerifier(name=f"{job}/{self.key}", version=version)
        async for offset, view in image.data():
            self.written.received += len(view)
            await self._limit.spend(len(view))
            events = reader.receive_data(offset, view)
            await self._take(job, events, owned, verifier, entry)
        events = reader.receive_eof(image.size)
        await self._take(job, events, owned, verifier, entry)
        root = verifier.finish()[1]
        if entry is not None:
            check_counts(job, entry, verifier)
        if digest_root and root != digest_root:
            raise IntegrityError(
                f"job {job}: the image's digests are not those of its manifest; "
                "what Bacula gave back is not what was stored"
            )
        self.written.jobs.append(job)
        self._missing.discard(job)
        return root

    async def copy(self, job: str, disk: DiskEdges) -> None:
        """Write what a job has the last word on of its copied runs, in any order.

        The image is as much needed as before. Only where the owners are known.

        Raises:
            IntegrityError: a copy isn't what was stored.
        """
        sink = self._sink
        if sink is None or self._chain is None or not self._owners:
            raise IntegrityError("the disk's volume was not opened for copies")
        owned = self._chain.owned(job, self.key)
        for run in disk.runs:
            event = GuestData(run.offset, memoryview(run.data()))
            await self._write_owned(sink, event, owned)

    async def _take(
        self,
        job: str,
        events: list[ImageHeader | GuestData | GuestZero],
        owned: ClusterMap | None,
        verifier: DigestVerifier,
        entry: DiskEntry | None,
    ) -> None:
        verifier.receive(events)
        sink = self._sink
        if sink is None:
            raise IntegrityError("the disk's volume was not opened")
        for event in events:
            if isinstance(event, ImageHeader):
                if entry is not None:
                    check_header(job, entry, event)
                await self._check_header(job, event, sink)
            elif owned is None:
                await self._replay(sink, event)
            elif isinstance(event, GuestData):
                await self._write_owned(sink, event, owned)
            elif not self._zeroed and event.kind is Kind.DATA:
                # A cluster found to be zero while it was read; on a volume that
                # reads zero by itself there is nothing to do, each is written once.
                await self._zero_owned(sink, event, owned)

    async def _check_header(
        self, job: str, header: ImageHeader, sink: DiskSink
    ) -> None:
        if self._owners:
            return  # the chain has checked the manifests, and order doesn't matter
        if header.backing is not None:
            parent, _ = parse_backing(header.backing)
            if parent not in self.written.jobs[-1:]:
                last = self.written.jobs[-1] if self.written.jobs else "nothing"
                raise IntegrityError(
                    f"job {job} builds on job {parent}, but what came before it is "
                    f"{last}; a member of the chain is missing, or comes out of order"
                )
        if self._room and header.size > self._room:
            raise IntegrityError(
                f"job {job}: the disk grew to {header.size} bytes within the chain and "
                "the catalogue has no restore objects; restore to files "
                "(where=/directory) and import those"
            )
        if header.backing is None and self.written.jobs:
            # It was read whole in mid chain: what came before counts no more.
            await sink.zero(0, self._room)

    async def _replay(self, sink: DiskSink, event: GuestData | GuestZero) -> None:
        if isinstance(event, GuestData):
            await sink.write(event.offset, event.data)
        elif self.written.jobs:
            await sink.zero(event.offset, event.length)

    async def _write_owned(
        self, sink: DiskSink, event: GuestData, owned: ClusterMap
    ) -> None:
        end = min(event.offset + event.length, owned.size)
        if end < event.offset + event.length:
            self.written.superseded += (
                event.offset + event.length - max(end, event.offset)
            )
        if event.offset >= end:
            return
        for run in owned.runs(event.offset, end):
            if run.kind is not Kind.DATA:
                self.written.superseded += run.length
                continue
            start = run.offset - event.offset
            await sink.write(run.offset, event.data[start : start + run.length])

    async def _zero_owned(
        self, sink: DiskSink, event: GuestZero, owned: ClusterMap
    ) -> None:
        end = min(event.offset + event.length, owned.size)
        if event.offset >= end:
            return
        for run in owned.runs(event.offset, end):
            if run.kind is Kind.DATA:
                await sink.zero(run.offset, run.length)

    async def finish(self) -> None:
        """Wait for every write and flush.

        Raises: the first failure of any write.
        """
        if self._sink is not None:
            await self._sink.finish()
        await self._stack.aclose()

    async def give_up(self) -> None:
        """Close without any promise."""
        error = IntegrityError("given up")
        with contextlib.suppress(Exception):
            await self._stack.__aexit__(type(error), error, None)
