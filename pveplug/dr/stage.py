# SPDX-License-Identifier: Apache-2.0
"""A staged increment in a file: written to its end, verified whole, then read.

::

    stage = await StageWriter.create(path, meta, keep_free=1 << 30)
    await stage.add(frame)            # any number of times
    await stage.finish()              # trailer, fsync of file and directory
    whole = await verify(path)        # reads all of it; IntegrityError says it isn't
    async for frame in frames(path): …

The format is :mod:`pveplug.proto.dr_stage`'s. Only a file that :func:`verify` has read
may be applied: before that it is what arrived, after that it is what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from pveplug.errors import IntegrityError, PveplugError
from pveplug.journal import sync_directory
from pveplug.proto.dr_frames import Block, Zero
from pveplug.proto.dr_stage import (
    HEADER,
    MAGIC,
    Decoder,
    Encoder,
    Meta,
    Record,
    Run,
    Tally,
    Trailer,
)
from pveplug.tasks import to_the_end
from pveplug.units import MiB, human

BATCH: Final = 4 * MiB
"""What is collected before a thread is asked to write it."""
BATCH_FRAMES: Final = 4096
_LOOK_EVERY: Final = 64 * MiB
"""How often the free space is looked at."""
_BUFFER: Final = 1 * MiB


class StageSpaceError(PveplugError):
    """There is no room for the increment."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a verified file holds."""

    path: Path
    meta: Mapping[str, Any]
    trailer: Trailer


class StageWriter:
    """Writes one stage; for one task.

    ``add`` keeps a copy, and a thread digests, compresses and writes while the next
    frames come: at most two batches are in memory. Cancelled, the stage can only be
    discarded.
    """

    def __init__(self, path: Path, file: BinaryIO, keep_free: int) -> None:
        self.path = path
        self._file = file
        self._keep_free = keep_free
        self._encoder = Encoder()
        self._tally = Tally()
        self._batch: list[Block | Zero] = []
        self._batch_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._size = 0
        self._looked = 0

    @classmethod
    async def create(
        cls, path: Path, meta: Mapping[str, Any], *, keep_free: int
    ) -> StageWriter:
        """Begin a stage; what was there under this name is gone.

        Args:
            path: its file; the directory is made if it isn't there.
            meta: found again by :func:`verify`.
            keep_free: bytes that must stay free on that file system.

        Raises:
            StageSpaceError: there is no room.
        """

        def begin() -> StageWriter:
            with _translated(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_room(path.parent, keep_free)
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                file = open(os.open(path, flags, 0o600), "wb", buffering=_BUFFER)
                stage = cls(path, file, keep_free)
                try:
                    stage._put([MAGIC, *stage._encoder.meta(meta)])
                except BaseException:
                    file.close()
                    raise
                return stage

        return await to_the_end(asyncio.to_thread(begin))

    async def add(self, frame: Block | Zero) -> None:
        """Take a frame; its data may be reused when this returns.

        Raises:
            StageSpaceError: there is no room for it or for one before it.
        """
        if isinstance(frame, Block):
            data = bytes(frame.data)
            self._batch_bytes += len(data)
            frame = Block(frame.number, frame.offset, data)
        self._batch.append(frame)
        if self._batch_bytes >= BATCH or len(self._batch) >= BATCH_FRAMES:
            await self._hand_over()

    async def run(self, number: int) -> Run:
        """Return what has come of a disk so far."""
        await self._drain()
        return self._tally.run(number)

    async def finish(self) -> Trailer:
        """Write the trailer; file and name are on stable storage when this returns."""
        await self._drain()
        trailer = self._tally.trailer()

        def end() -> None:
            with _translated(self.path):
                self._put(self._encoder.trailer(trailer))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                sync_directory(self.path.parent)

        await to_the_end(asyncio.to_thread(end))
        return trailer

    async def discard(self) -> None:
        """Remove the stage; never raises."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with contextlib.suppress(Exception):
                await to_the_end(_ended(writing))
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    async def _drain(self) -> None:
        await self._hand_over()
        await self._hand_over()

    async def _hand_over(self) -> None:
        """Wait for the batch being written, then have the next one written."""
        if self._writing is not None:
            # The thread goes on when we are cancelled: nobody may think it has ended.
            await asyncio.shield(self._writing)
            self._writing = None
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            self._writing = asyncio.create_task(
                asyncio.to_thread(self._write, batch), name="stage"
            )

    def _write(self, batch: list[Block | Zero]) -> None:
        with _translated(self.path):
            for frame in batch:
                self._tally.add(frame)
                self._put(self._encoder.frame(frame))
            if self._size - self._looked >= _LOOK_EVERY:
                self._looked = self._size
                _check_room(self.path.parent, self._keep_free)

    def _put(self, buffers: list[Any]) -> None:
        for buffer in buffers:
            self._file.write(buffer)
            self._size += len(buffer)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


async def verify(path: Path) -> Stage:
    """Read a stage from its first byte to its last.

    Raises:
        IntegrityError: it isn't whole.
    """
    return await asyncio.to_thread(_verify, path)


def _verify(path: Path) -> Stage:
    tally = Tally()
    meta: Meta | None = None
    trailer: Trailer | None = None
    with _translated(path), path.open("rb", buffering=_BUFFER) as file:
        for number, record in enumerate(_records(file)):
            if trailer is not None:
                raise IntegrityError(f"{path}: something follows its end")
            match record:
                case Meta():
                    if number:
                        raise IntegrityError(f"{path}: its beginning comes twice")
                    meta = record
                case Trailer():
                    trailer = record
                case _:
                    tally.add(record)
    if meta is None or trailer is None:
        raise IntegrityError(f"{path} is not whole: it has no end")
    if trailer != tally.trailer():
        raise IntegrityError(f"{path}: its frames are not those it was made of")
    return Stage(path, meta.values, trailer)


async def frames(path: Path) -> AsyncIterator[Block | Zero]:
    """Iterate over the frames of a stage that was verified; bounded memory.

    Raises:
        IntegrityError: it was changed since.
    """
    with _translated(path):
        file = await asyncio.to_thread(path.open, "rb", _BUFFER)
    with file:
        records = _records(file)
        coming = asyncio.create_task(asyncio.to_thread(_next, records))
        try:
            while batch := await asyncio.shield(coming):
                coming = asyncio.create_task(asyncio.to_thread(_next, records))
                for record in batch:
                    if isinstance(record, Block | Zero):
                        yield record
        finally:
            # The file is closed after the thread that reads it has ended.
            await to_the_end(_over(coming))


async def _over(task: asyncio.Task[list[Record]]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _next(records: Iterator[Record]) -> list[Record]:
    batch: list[Record] = []
    size = 0
    with _translated(None):
        for record in records:
            batch.append(record)
            size += len(record.data) if isinstance(record, Block) else 0
            if size >= BATCH or len(batch) >= BATCH_FRAMES:
                break
    return batch


def _records(file: BinaryIO) -> Iterator[Record]:
    decoder = Decoder()
    if file.read(len(MAGIC)) != MAGIC:
        raise IntegrityError("it is no staged increment")
    while head := file.read(HEADER):
        header = decoder.header(head)
        yield decoder.record(header, file.read(header.stored))


def _check_room(directory: Path, keep_free: int) -> None:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < keep_free:
        raise StageSpaceError(
            f"{directory} has {human(free)} free, and {human(keep_free)} must stay free"
        )


@contextlib.contextmanager
def _translated(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{path}: " if path else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{where}no space left on the file system of staged increments"
            raise StageSpaceError(text) from error
        raise IntegrityError(f"{where}{error.strerror or error}") from error
