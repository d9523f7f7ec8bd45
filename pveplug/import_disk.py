# SPDX-License-Identifier: Apache-2.0
"""One disk of an import: its volume, and the images that are put upon it in order.

::

    full        data, zeroes ─► sink            what it leaves out reads as zeroes
    increment   data, zeroes ─► sink            what it leaves to its parent stays

An image is put upon a disk only if it was made from what is there: by the identities
that its format has (:mod:`pveplug.images.lineage`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.contentsum import ContentSum
from pveplug.images.lineage import Link, why_not
from pveplug.images.stream import (
    Event,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    ImageNote,
)
from pveplug.nbd.client import Address, NbdClient, connect
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import extents
from pveplug.tasks import first_failure
from pveplug.units import MiB, human

PIECE: Final = 1 * MiB


@dataclass(slots=True)
class Counted:
    """What was read of images, and what was written for it."""

    images: list[str] = field(default_factory=list)
    told: int = 0
    """Bytes of the disk the images told of: data, zeroes and what is their parent's."""
    data: int = 0
    """Bytes of data in them."""


class ImportDisk:
    """A disk that comes into being; ``begin`` and ``take`` and ``end`` per image.

    Args:
        name: of its first image.
        size: bytes of the disk.
        zeroed: a fresh volume of this storage reads as zeroes by itself.
        verify: keep a sum of all, to be compared by ``read_back``.
        clips: the size is that of the newest of known images: what older and longer
            ones have behind it is not wanted.
    """

    def __init__(
        self, name: str, size: int, *, zeroed: bool, verify: bool, clips: bool = False
    ) -> None:
        self.name = name
        self.size = size
        self.counted = Counted()
        self.notes: list[str] = []
        self.sha256: str | None = None
        """Of the whole disk as it was read back; None until that was done."""
        self.top: Link | None = None
        """The image that was put upon it last; None before the first is whole."""
        self._zeroed = zeroed
        self._verify = verify
        self._clips = clips
        self._stack = contextlib.AsyncExitStack()
        self._client: NbdClient | None = None
        self._sink: NbdSink | None = None
        self._sum: ContentSum | None = ContentSum()
        self._info: ImageInfo | None = None  # of the image that comes
        self._file = ""
        self._first = True
        self._by_file = False
        self._digest: hashlib._Hash | None = None
        self._digested = 0

    async def open(self, address: Address) -> None:
        """Connect to the volume.

        Raises:
            IntegrityError: it is smaller than the disk.
        """
        client = await connect(address)
        self._stack.push_async_callback(client.aclose)
        if client.size < self.size:
            raise IntegrityError(
                f"the volume has {client.size} bytes, the disk {self.size}"
            )
        self._client = client
        self._sink = await self._stack.enter_async_context(NbdSink(client))

    @property
    def client(self) -> NbdClient:
        """The connection to its volume."""
        if self._client is None:
            raise IntegrityError(f"the volume of {self.name} was not opened")
        return self._client

    @property
    def sink(self) -> NbdSink:
        """Where it is written."""
        if self._sink is None:
            raise IntegrityError(f"the volume of {self.name} was not opened")
        return self._sink

    @property
    def busy(self) -> bool:
        """Whether an image has begun and not ended."""
        return self._info is not None

    @property
    def _overlays(self) -> bool:
        """Whether the image that comes is put upon another."""
        return self._info is not None and self._info.parent is not None

    def why_not(self, child: Link) -> str | None:
        """Return why an image was not made from what is here, None if it was."""
        if self.top is None:
            return f"{self.name} is not complete yet"
        return why_not(self.top, child)

    # --- an image --------------------------------------------------------------------

    async def begin(self, file: str, info: ImageInfo, size: int) -> None:
        """Put another image upon it, whose disk has ``size`` bytes.

        Raises:
            IntegrityError: it needs a larger volume.
        """
        if size > self.size and not self._clips:
            raise IntegrityError(
                f"{file}: the disk grew from {self.size} to {size} bytes, and its "
                "volume is made already; restore to files (where=/directory) and give "
                "all of the chain to pveplug import"
            )
        again = not self._first and info.parent is None
        if again:
            self.notes.append(f"{file} is a full copy again and replaces what was read")
        self._file, self._info = file, info
        self._by_file = info.size is None  # a raw disk, or a fixed VHD
        whole = info.parent is None
        if self._first or again:
            self._sum = ContentSum()
        elif not self._verify:
            self._sum = None  # would have to be read back to stay true
        if again or (self._first and not self._zeroed):
            await self.sink.zero(0, self.client.size)
        elif not whole and size < self.size:
            # It shrank: nothing of the longer parent may come back when it grows.
            await self._clear(size, self.size - size)
        if whole and info.format == "raw" and not info.identity:
            self._digest, self._digested = hashlib.sha256(), 0
        else:
            self._digest = None

    async def take(self, events: Sequence[Event]) -> None:
        """Write what a reader told.

        Raises:
            IntegrityError: it leaves something to a parent that isn't there.
            NbdError, TransportError: writing failed.
        """
        data = [
            (e.offset, self._clipped(e)) for e in events if isinstance(e, GuestData)
        ]
        # Sums are made in a thread, while what they are of is written.
        async with first_failure() as tasks:
            if data and not self._overlays:
                tasks.create_task(asyncio.to_thread(self._add_up, data), name="sums")
            for event in events:
                match event:
                    case GuestData():
                        self.counted.told += len(event.data)
                        self.counted.data += len(event.data)
                        await self._write(event.offset, self._clipped(event))
                    case GuestZero():
                        self.counted.told += event.length
                        if self._overlays:
                            await self._clear(event.offset, event.length)
                    case GuestParent():
                        self.counted.told += event.length
                        if not self._overlays:
                            raise IntegrityError(
                                f"{self._file} leaves {event.length} bytes at "
                                f"{event.offset} to a parent, and names none"
                            )
                    case ImageNote():
                        self.notes.append(event.text)
                    case ImageEnd():
                        self._info = event.info
                    case ImageInfo():
                        pass

    def _clipped(self, event: GuestData) -> memoryview:
        """Return an event's bytes as far as the disk goes.

        Raises:
            IntegrityError: they go further, and should not.
        """
        room = max(self.size - event.offset, 0)
        if len(event.data) > room and not self._clips:
            raise IntegrityError(
                f"{self._file} has data at {event.offset} of a disk of {self.size} "
                "bytes"
            )
        return event.data[:room]

    def _add_up(self, data: Sequence[tuple[int, memoryview]]) -> None:
        """Keep the sums of a whole image's bytes."""
        for offset, view in data:
            if self._sum is not None:
                self._sum.add(offset, view)
            if self._digest is not None and offset == self._digested:
                self._digest.update(view)
                self._digested += len(view)

    async def _write(self, offset: int, data: memoryview) -> None:
        if self._overlays and self._sum is not None:
            # Added once more, what was there is taken out of the sum again.
            self._sum.add(offset, await self.client.read(offset, len(data)))
            self._sum.add(offset, data)
        await self.sink.write(offset, data)

    async def _clear(self, offset: int, length: int) -> None:
        """Zero what an older image has there."""
        length = min(length, self.size - offset)
        if length <= 0:
            return
        if self._sum is not None:
            async for at, data in _data(self.client, offset, offset + length):
                self._sum.add(at, data)
        await self.sink.zero(offset, length)

    async def end(self, modified: int | None) -> None:
        """Take an image for whole: all its bytes came and are written.

        Args:
            modified: when its file was, in seconds since 2000, where known.
        """
        info = self._info
        if info is None:
            raise IntegrityError(f"no image of {self.name} has begun")
        await self.sink.finish()
        if self._by_file and info.size is not None and info.size < self.size:
            self.notes.append(
                f"{self._file} has a disk of {info.size} bytes; its volume has "
                f"{self.size}"
            )
            self.size = info.size
        if self._digest is not None and self._digested == self.size:
            # A raw image has no identity but its content.
            digest = f"sha256:{self._digest.hexdigest()}"
            info = ImageInfo(
                info.format, info.subformat, info.size, info.sector, digest
            )
        self.top = Link(self._file, info, modified)
        self.counted.images.append(self._file)
        self._first = False
        self._info = None

    def adopt(self, info: ImageInfo) -> None:
        """Learn from a descriptor that came later what a flat image's identity is."""
        if self.top is not None:
            self.top = Link(self.top.name, info, self.top.modified)

    # --- the end ---------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Return what was written there; shorter at the end of the disk."""
        length = min(length, self.size - offset)
        return bytes(await self.client.read(offset, length)) if length > 0 else b""

    @property
    def crc32(self) -> int | None:
        """The CRC-32 of the disk's content as it was read; None: not known."""
        return None if self._sum is None else self._sum.crc32(self.size)

    async def read_back(self) -> None:
        """Read the whole disk, and compare it with what the images said.

        Raises:
            IntegrityError: it isn't what was written.
        """
        digest, found = hashlib.sha256(), ContentSum()
        at = 0
        zeroes = bytes(PIECE)
        async for offset, data in _data(self.client, 0, self.size):
            while at < offset:
                step = min(offset - at, PIECE)
                await asyncio.to_thread(digest.update, memoryview(zeroes)[:step])
                at += step
            await asyncio.to_thread(digest.update, data)
            found.add(offset, data)
            at += len(data)
        while at < self.size:
            step = min(self.size - at, PIECE)
            await asyncio.to_thread(digest.update, memoryview(zeroes)[:step])
            at += step
        if self.crc32 is not None and self.crc32 != found.crc32(self.size):
            raise IntegrityError(
                f"{self.name} reads back as CRC-32 {found.crc32(self.size):08x}, what "
                f"was read of its images is {self.crc32:08x}: the storage does not "
                "give back what was written"
            )
        self.sha256 = digest.hexdigest()

    def summary(self) -> str:
        """Return what was done, for the job log."""
        count = self.counted
        parts = [
            f"{len(count.images)} image{'s' if len(count.images) != 1 else ''}",
            f"{human(self.size)} ({self.size} bytes), data {human(count.data)}",
        ]
        if self.crc32 is not None:
            parts.append(f"CRC-32 {self.crc32:08x}")
        if self.sha256:
            parts.append(f"read back and compared, SHA-256 {self.sha256}")
        return ", ".join(parts)

    async def finish(self) -> None:
        """Close it for good.

        Raises: the first failure of any write.
        """
        await self.sink.finish()
        await self._stack.aclose()

    async def give_up(self) -> None:
        """Close without any promise."""
        error = IntegrityError("given up")
        with contextlib.suppress(Exception):
            await self._stack.__aexit__(type(error), error, None)


async def _data(
    client: NbdClient, start: int, end: int
) -> AsyncGenerator[tuple[int, bytearray], None]:
    """Yield ``(offset, bytes)`` of what isn't zero in a range."""
    if start >= end:
        return
    async for extent in extents(client, start=start, end=end):
        if extent.kind is Kind.ZERO:
            continue
        at = extent.offset
        while at < extent.offset + extent.length:
            step = min(PIECE, extent.offset + extent.length - at)
            yield at, await client.read(at, step)
            at += step
