# SPDX-License-Identifier: Apache-2.0
"""A chain of foreign images into one file: applied oldest first.

A raw file is written as the images are read; any other format goes through qemu-nbd.
It gets its name when all of it is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pveplug.errors import ConfigError, IntegrityError, RequestError
from pveplug.events import Reporter
from pveplug.images.lineage import zeroes_after
from pveplug.images.stream import (
    Event,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageNote,
)
from pveplug.importing import PIECE, Found, batches
from pveplug.journal import sync_directory
from pveplug.node import Node
from pveplug.readahead import read_ahead
from pveplug.spill import FileSpill
from pveplug.tasks import to_the_end
from pveplug.units import CLUSTER, MiB, human, round_up

if TYPE_CHECKING:
    from pveplug.nbd.sink import NbdSink

_SECTOR: Final = 512
_TURN: Final = 16 * MiB  # bytes that are written between two looks for a signal
_AHEAD: Final = 6  # batches that wait: half a MiB of the file, or 8 MiB inflated
_ZEROES: Final = bytes(1 * MiB)
_NOUGHT: Final = bytes(CLUSTER)


async def import_to_file(
    chain: Sequence[Found],
    out: Path,
    fmt: Literal["raw", "qcow2"],
    node: Node,
    say: Reporter,
) -> int:
    """Write a chain's disk to a file; return the bytes of data written.

    Cancelled or failed, no file is left.

    Raises:
        ConfigError: the file is there, or can't be made.
        IntegrityError: an image is damaged, or its parent is missing.
        RequestError: qemu-nbd or the file system refused.
    """
    if chain[0].info.parent is not None:
        hints = ", ".join(chain[0].info.parent.names) or "one that is not named"
        raise IntegrityError(
            f"{chain[0].name} builds on another image ({hints}); give that, too"
        )
    if await asyncio.to_thread(out.exists):
        raise ConfigError(f"{out} is there already")
    size = -(-chain[-1].size // _SECTOR) * _SECTOR
    part = out.with_name(f".{out.name}.part")
    made, written = False, 0
    try:
        await _create(part, fmt, size, node)
        fresh = zeroes_after([replace(i.info, size=i.size) for i in chain])
        async with _target(part, fmt, size, node) as target:
            for number, image in enumerate(chain):
                start, end = fresh[number][0], min(fresh[number][1], size)
                if number and start < end:
                    await target.zero(start, end - start)
                written += await target.apply(image, first=number == 0, say=say)
            await target.finish()
        await asyncio.to_thread(_publish, part, out)
        made = True
    finally:
        if not made:
            part.unlink(missing_ok=True)
    return written


async def _create(part: Path, fmt: str, size: int, node: Node) -> None:
    def make() -> None:
        try:
            part.unlink(missing_ok=True)
            with part.open("xb") as file:
                file.truncate(size if fmt == "raw" else 0)
        except OSError as error:
            raise ConfigError(f"{part}: {error.strerror or error}") from error

    await asyncio.to_thread(make)
    if fmt != "raw":
        from pveplug.pve_local import run

        argv = [node.qemu_img, "create", "-q", "-f", fmt, str(part), str(size)]
        await run(argv, timeout_s=60)


class _Target(Protocol):
    """A file that images are put upon, one after the other."""

    async def apply(self, image: Found, *, first: bool, say: Reporter) -> int: ...
    async def zero(self, offset: int, length: int) -> None: ...
    async def finish(self) -> None: ...


@contextlib.asynccontextmanager
async def _target(
    part: Path, fmt: str, size: int, node: Node
) -> AsyncGenerator[_Target, None]:
    if fmt == "raw":
        with part.open("r+b", buffering=0) as file:
            yield RawFile(file.fileno(), size, str(part))
        return
    # A raw file needs none of these, which take longer to load than a small one.
    from pveplug.nbd.client import connect
    from pveplug.nbd.qemu_nbd import qemu_nbd
    from pveplug.nbd.sink import NbdSink

    async with (
        qemu_nbd(
            node, str(part), fmt, socket_dir=node.runtime_dir, read_only=False
        ) as address,
        await connect(address) as client,
        NbdSink(client) as sink,
    ):
        yield _Served(sink, size)


class RawFile:
    """A raw file: what a reader tells is written from where it lies.

    Args:
        fd: of an empty file of ``size`` bytes; zeroes stay holes where they can.
    """

    def __init__(self, fd: int, size: int, name: str) -> None:
        self._fd = fd
        self._name = name  # for errors
        self._size = size

    async def apply(self, image: Found, *, first: bool, say: Reporter) -> int:
        """Put one image upon what is there; return the bytes of data in it."""
        written = 0
        with FileSpill() as spill, _coming(image, spill) as coming:
            more = True
            while more:
                # The thread is waited for: the file is closed behind us.
                more, count, last = await to_the_end(
                    asyncio.to_thread(self._some, image, coming, first)
                )
                written += count
                for event in last:
                    _tell(image, event, written, say)
        return written

    async def zero(self, offset: int, length: int) -> None:
        await to_the_end(asyncio.to_thread(self._zero, offset, offset + length))

    async def finish(self) -> None:
        """All is written; :func:`_publish` makes it durable."""

    def _some(
        self, image: Found, coming: Iterator[list[Event]], first: bool
    ) -> tuple[bool, int, list[Event]]:
        """Write for a while: whether more comes, bytes of data, what else was told."""
        count = 0
        others: list[Event] = []
        for number, batch in enumerate(coming):
            for event in batch:
                match event:
                    case GuestData():
                        data = event.data[: max(self._size - event.offset, 0)]
                        self._write(event.offset, data, sparse=first)
                        count += len(data)
                    case GuestZero() if not first:
                        self._zero(event.offset, event.offset + event.length)
                    case GuestParent() if first:
                        raise _orphan(image, event)
                    case ImageNote() | ImageEnd():
                        others.append(event)
            if count >= _TURN or number >= _TURN // PIECE:
                return True, count, others
        return False, count, others

    def _write(self, offset: int, data: memoryview, *, sparse: bool) -> None:
        """Write bytes, but for whole clusters of zeroes if they are holes anyway."""
        start = at = 0
        while sparse and at < len(data):
            stop = min(round_up(offset + at + 1, CLUSTER) - offset, len(data))
            piece = data[at:stop]
            if bytes(piece[:64]).count(0) == len(piece[:64]) and not _any(piece):
                self._pwrite(offset + start, data[start:at])
                start = stop
            at = stop
        self._pwrite(offset + start, data[start:])

    def _pwrite(self, offset: int, data: memoryview) -> None:
        while data:
            try:
                count = os.pwrite(self._fd, data, offset)
            except OSError as error:
                reason = error.strerror or str(error)
                raise RequestError(
                    f"{self._name} can't be written: {reason}"
                ) from error
            offset, data = offset + count, data[count:]

    def _zero(self, offset: int, end: int) -> None:
        """Write zeroes where the file has data."""
        end = min(end, self._size)
        while offset < end:
            try:
                offset = max(os.lseek(self._fd, offset, os.SEEK_DATA), offset)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # there is none up to its end
            length = min(len(_ZEROES), end - offset)
            if length > 0:
                self._pwrite(offset, memoryview(_ZEROES)[:length])
            offset += max(length, 1)


class _Served:
    """Any other file, written through qemu-nbd."""

    def __init__(self, sink: NbdSink, size: int) -> None:
        self._sink = sink
        self._size = size
        self.zero = sink.zero
        self.finish = sink.finish

    async def apply(self, image: Found, *, first: bool, say: Reporter) -> int:
        """Put one image upon what is there; return the bytes of data in it."""
        written, size, sink = 0, self._size, self._sink
        with FileSpill() as spill, _coming(image, spill) as coming:
            while batch := await to_the_end(asyncio.to_thread(_next_told, coming)):
                for event in batch:
                    match event:
                        case GuestData() if event.offset < size:
                            data = event.data[: size - event.offset]
                            await sink.write(event.offset, data)
                            written += len(data)
                        case GuestZero() if not first and event.offset < size:
                            length = min(event.length, size - event.offset)
                            await sink.zero(event.offset, length)
                        case GuestParent() if first:
                            raise _orphan(image, event)
                        case _:
                            _tell(image, event, written, say)
        return written


def _next_told(coming: Iterator[list[Event]]) -> list[Event]:
    """Return the next batch that has events; an empty one at the end."""
    return next(filter(None, coming), [])


def _any(data: memoryview) -> bool:
    """Whether a byte isn't zero; compared as bytes, which is a hundred times faster."""
    nought = _NOUGHT if len(data) == CLUSTER else _NOUGHT[: len(data)]
    return bytes(data) != nought


def _orphan(image: Found, event: GuestParent) -> IntegrityError:
    return IntegrityError(
        f"{image.name} leaves {event.length} bytes at {event.offset} to a parent that "
        "was not given"
    )


def _tell(image: Found, event: Event, written: int, say: Reporter) -> None:
    """Say what an operator should know of."""
    if isinstance(event, ImageNote):
        say.warning(f"{image.name}: {event.text}")
    elif isinstance(event, ImageEnd):
        say.info(
            f"{image.name}: {event.info.format} {event.info.subformat}, "
            f"{human(written)} written"
        )


@contextlib.contextmanager
def _coming(
    image: Found, spill: FileSpill
) -> Generator[Iterator[list[Event]], None, None]:
    """Read and inflate in a thread, a little ahead; yields what is told of an image.

    The bytes of a batch are valid until the next is asked for.
    """
    source = batches(image.paths, image.kind, spill, keep=_AHEAD + 1)
    with read_ahead(source, _AHEAD) as coming:
        yield coming


def _publish(part: Path, out: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(out)
    sync_directory(out.parent)
