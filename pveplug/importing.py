# SPDX-License-Identifier: Apache-2.0
"""Foreign disk images, from files into a file: a chain is applied oldest first.

::

    FILE… ─ what are they? ─ oldest first ─ readers ─ data, zeroes ─► qemu-nbd ─► OUT

Reading is one forward pass over each file. Writing goes through qemu-nbd, whatever the
format of the target; it becomes visible under its name when all of it is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, Literal

from pveplug.errors import ConfigError, IntegrityError
from pveplug.events import Reporter
from pveplug.images import vhd_wire, vmdk_wire
from pveplug.images.detect import Format, reader_for
from pveplug.images.foreign_files import HEAD, kind_of
from pveplug.images.lineage import Link, in_order, zeroes_after
from pveplug.images.stream import (
    Event,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    ImageNote,
    feed,
    finish,
)
from pveplug.images.vmdk_set import VmdkSet, base_name
from pveplug.journal import sync_directory
from pveplug.nbd.client import connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.nbd.sink import NbdSink
from pveplug.node import Node
from pveplug.pve_local import run
from pveplug.spill import FileSpill
from pveplug.units import MiB, human

PIECE: Final = 1 * MiB
_2000: Final = 946684800
"""The epoch of a VHD's times, in seconds since 1970."""
_SECTOR: Final = 512


@dataclass(slots=True)
class Found:
    """One image: a file, or a VMDK's descriptor and its extents."""

    paths: tuple[Path, ...]
    kind: Format
    info: ImageInfo
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.paths[0])

    @property
    def modified(self) -> int:
        """When its file was modified, in seconds since 2000."""
        return int(self.paths[0].stat().st_mtime) - _2000

    @property
    def size(self) -> int:
        """Bytes of its disk; a raw file is as long as its disk."""
        if self.info.size is not None:
            return self.info.size
        return self.paths[0].stat().st_size


def events(found: Sequence[Path], kind: Format, spill: FileSpill) -> Iterator[Event]:
    """Read an image from its first byte to its last.

    Raises:
        IntegrityError: it is damaged, or of a kind that isn't read.
    """
    if kind is Format.VMDK_DESCRIPTOR:
        yield from _set_events(found, spill)
        return
    path = found[0]
    reader = reader_for(
        kind, name=path.name, file_size=path.stat().st_size, spill=spill
    )
    with path.open("rb") as file:
        while data := file.read(PIECE):
            for told in feed(reader, data):
                yield from told
    for told in finish(reader):
        yield from told


def _set_events(paths: Sequence[Path], spill: FileSpill) -> Iterator[Event]:
    reader = VmdkSet(name=paths[0].name, spill=spill)
    for path in paths:
        reader.begin_file(path.name, path.stat().st_size)
        with path.open("rb") as file:
            while data := file.read(PIECE):
                yield from reader.receive_data(data)
                while reader.pending:
                    yield from reader.receive_data(b"")
        yield from reader.end_file()
        while reader.pending:
            yield from reader.receive_data(b"")
    yield from reader.receive_eof()


def look(paths: Sequence[Path], raw: Sequence[str] = ()) -> list[Found]:
    """Say what files are, and put a chain in its order, oldest first.

    Args:
        raw: names of files that are raw disks, whatever they begin with.

    Raises:
        ConfigError: a file can't be read.
        IntegrityError: one is of a kind that isn't read; they are no chain.
    """
    kinds: dict[Path, Format] = {}
    for path in paths:
        try:
            kinds[path] = kind_of(
                path.name,
                first_of(path),
                path.stat().st_size,
                trusted=any(fnmatchcase(path.name, pattern) for pattern in raw),
            )
        except IntegrityError as error:
            raise IntegrityError(
                f"{path}: {error}; --raw {path.name} takes it for a raw disk"
            ) from error
    found = [one_image(files, kind) for files, kind in sets_of(kinds)]
    if len(found) == 1:
        return found
    _identify(found)
    links = {image.name: (_link(image), image) for image in found}
    return [links[link.name][1] for link in in_order(ln for ln, _ in links.values())]


def first_of(path: Path) -> bytes:
    """Return a file's first bytes, as many as say what it is.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def sets_of(kinds: dict[Path, Format]) -> list[tuple[tuple[Path, ...], Format]]:
    """Join each VMDK's descriptor with its extents; what is left stands alone.

    An extent lies beside its descriptor. One that lies elsewhere is taken where there
    is no other of its name: ESXi calls the disks of one VM alike on each datastore.

    Raises:
        IntegrityError: a descriptor is damaged; which file is its extent isn't sure.
    """
    left = dict(kinds)
    joined: dict[Path, tuple[Path, ...]] = {}
    for path, kind in kinds.items():
        if kind is not Format.VMDK_DESCRIPTOR:
            continue
        extents = _extents(path, [other for other in kinds if other != path])
        joined[path] = (path, *extents)
        for extent in extents:
            left.pop(extent, None)
    return [(joined.get(path, (path,)), kind) for path, kind in left.items()]


def _extents(path: Path, others: Sequence[Path]) -> list[Path]:
    with path.open("rb") as file:
        data = file.read(vmdk_wire.MAX_DESCRIPTOR + 1)
    if len(data) > vmdk_wire.MAX_DESCRIPTOR:
        raise IntegrityError(f"{path}: a VMDK's descriptor is not longer than 1 MiB")
    text = vmdk_wire.parse_descriptor(data)
    if isinstance(text, str):
        raise IntegrityError(f"{path}: {text}")
    found: list[Path] = []
    for name in dict.fromkeys(base_name(e.file or "").lower() for e in text.extents):
        called = [other for other in others if other.name.lower() == name]
        beside = [other for other in called if other.parent == path.parent]
        if len(beside or called) > 1:
            raise IntegrityError(
                f"{len(called)} files are called {name}, and which of them is the "
                f"extent of {path} is not sure: put it beside"
            )
        found += beside or called
    return found


def _identify(found: Sequence[Found]) -> None:
    """Give raw disks their identity where an increment asks for it: of all bytes."""
    parents = [image.info.parent for image in found if image.info.parent]
    if not any(i.startswith("sha256:") for link in parents for i in link.identities):
        return
    for image in found:
        if image.info.format != "raw":
            continue
        with image.paths[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(bytes(-image.size % _SECTOR))
        image.info = replace(image.info, identity=f"sha256:{digest.hexdigest()}")


def _link(image: Found) -> Link:
    return Link(image.name, image.info, image.modified)


def one_image(paths: tuple[Path, ...], kind: Format) -> Found:
    """Look at one image: read as far as it says what it is.

    Raises:
        IntegrityError: it is damaged.
    """
    if kind is Format.RAW and (fixed := _fixed_vhd(paths[0])):
        return Found(paths, kind, fixed)
    with FileSpill() as spill:
        for event in events(paths, kind, spill):
            if isinstance(event, ImageInfo):
                return Found(paths, kind, event)
    raise IntegrityError(f"{paths[0]} says nothing of itself")


def _fixed_vhd(path: Path) -> ImageInfo | None:
    """Return what the end of a fixed VHD says: its reader knows that last of all."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END) - vhd_wire.FOOTER.size
        if at <= 0:
            return None
        file.seek(at)
        footer = vhd_wire.parse_footer(file.read())
    if isinstance(footer, str) or footer.kind != vhd_wire.FIXED:
        return None
    return ImageInfo("vhd", "fixed", at, identity=footer.identity)


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
        CommandError, NbdError: qemu-nbd or the file system refused.
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
    made = False
    try:
        await _create(part, fmt, size, node)
        written = 0
        async with (
            qemu_nbd(
                node, str(part), fmt, socket_dir=node.runtime_dir, read_only=False
            ) as address,
            await connect(address) as client,
            NbdSink(client) as sink,
        ):
            fresh = zeroes_after([replace(i.info, size=i.size) for i in chain])
            for number, image in enumerate(chain):
                start, end = fresh[number]
                if number and start < min(end, size):
                    await sink.zero(start, min(end, size) - start)
                written += await _apply(image, sink, size, first=number == 0, say=say)
            await sink.finish()
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
        argv = [node.qemu_img, "create", "-q", "-f", fmt, str(part), str(size)]
        await run(argv, timeout_s=60)


async def _apply(
    image: Found, sink: NbdSink, size: int, *, first: bool, say: Reporter
) -> int:
    """Put one image upon what is there."""
    written = 0
    with FileSpill() as spill:
        async with aclosing(_in_thread(image, spill)) as coming:
            async for batch in coming:
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
                            raise IntegrityError(
                                f"{image.name} leaves {event.length} bytes at "
                                f"{event.offset} to a parent that was not given"
                            )
                        case ImageNote():
                            say.warning(f"{image.name}: {event.text}")
                        case ImageEnd():
                            say.info(
                                f"{image.name}: {event.info.format} "
                                f"{event.info.subformat}, {human(written)} written"
                            )
    return written


async def _in_thread(
    image: Found, spill: FileSpill
) -> AsyncGenerator[list[Event], None]:
    """Read and inflate in a thread, a batch of events at a time."""
    coming = events(image.paths, image.kind, spill)

    def next_batch() -> list[Event]:
        # A view of the piece lives until the reader is asked again: copy.
        batch: list[Event] = []
        size = 0
        for event in coming:
            if isinstance(event, GuestData):
                data = bytes(event.data)
                event = GuestData(event.offset, memoryview(data))
                size += len(data)
            batch.append(event)
            if size >= 4 * MiB or len(batch) >= 4096:
                break
        return batch

    while batch := await asyncio.to_thread(next_batch):
        yield batch


def _publish(part: Path, out: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(out)
    sync_directory(out.parent)
