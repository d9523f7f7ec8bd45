# SPDX-License-Identifier: Apache-2.0
"""Foreign disk images as files: what they are, which chain they are, what they tell.

::

    FILE… ─ what are they? ─ oldest first ─ readers ─ data, zeroes

Reading is one forward pass over each file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from pveplug.errors import ConfigError, IntegrityError
from pveplug.images import vhd_wire, vmdk_wire
from pveplug.images.detect import Format, Kind, reader_for
from pveplug.images.foreign_files import HEAD, kind_of
from pveplug.images.lineage import Link, in_order
from pveplug.images.stream import (
    Event,
    ImageInfo,
    StreamReader,
    finish,
)
from pveplug.images.vmdk_set import VmdkSet, base_name
from pveplug.spill import FileSpill
from pveplug.units import KiB

PIECE: Final = 512 * KiB  # with those ahead of it, less than a cache of 4 MiB
_2000: Final = 946684800
"""The epoch of a VHD's times, in seconds since 1970."""
_SECTOR: Final = 512


@dataclass(slots=True)
class Found:
    """One image: a file, or a VMDK's descriptor and its extents."""

    paths: tuple[Path, ...]
    kind: Kind
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


def events(
    found: Sequence[Path], kind: Kind, spill: FileSpill
) -> Generator[Event, None, None]:
    """Read an image from its first byte to its last.

    An event's bytes are valid until the next event is asked for.

    Raises:
        IntegrityError: it is damaged, or of a kind that isn't read.
    """
    for batch in batches(found, kind, spill):
        yield from batch


def batches(
    found: Sequence[Path], kind: Kind, spill: FileSpill, *, keep: int = 0
) -> Generator[list[Event], None, None]:
    """Read an image as :func:`events` does, some events at a time.

    The bytes of a batch are valid until ``keep`` more batches have come and another is
    asked for.
    """
    if kind is Format.VMDK_DESCRIPTOR:
        yield from _set_batches(found, spill, keep)
        return
    path = found[0]
    reader = reader_for(
        kind, name=path.name, file_size=path.stat().st_size, spill=spill
    )
    for data in _pieces(path, keep, reader):
        yield from _all_of(reader, reader.receive_data(data))
    yield from finish(reader)


def _set_batches(
    paths: Sequence[Path], spill: FileSpill, keep: int
) -> Generator[list[Event], None, None]:
    reader = VmdkSet(name=paths[0].name, spill=spill)
    for path in paths:
        reader.begin_file(path.name, path.stat().st_size)
        for data in _pieces(path, keep):
            yield from _all_of(reader, reader.receive_data(data))
        yield from _all_of(reader, reader.end_file())
    yield reader.receive_eof()


def _all_of(
    reader: StreamReader | VmdkSet, batch: list[Event]
) -> Iterator[list[Event]]:
    """Yield a batch and what is pending, but no empty one behind others."""
    while reader.pending:
        if more := reader.receive_data(b""):
            yield batch
            batch = more
    yield batch


def _pieces(
    path: Path, keep: int, reader: StreamReader | None = None
) -> Iterator[memoryview]:
    """Yield a file's bytes; a piece is valid until ``keep`` more have come.

    What the reader they are for can skip is left out.
    """
    # Always the same buffers: a fresh one each time is a fresh mapping, too.
    buffers = [bytearray(PIECE) for _ in range(keep + 1)]
    try:
        with path.open("rb", buffering=0) as file:
            for buffer in itertools.cycle(buffers):
                count = file.readinto(buffer)
                if not count:
                    return
                yield memoryview(buffer)[:count]
                if reader and reader.skippable:
                    file.seek(reader.skippable, os.SEEK_CUR)
                    reader.skip(reader.skippable)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def look(paths: Sequence[Path], raw: Sequence[str] = ()) -> list[Found]:
    """Say what files are, and put a chain in its order, oldest first.

    Args:
        raw: names of files that are raw disks, whatever they begin with.

    Raises:
        ConfigError: a file can't be read.
        IntegrityError: one is of a kind that isn't read; they are no chain.
    """
    heads = {path: first_of(path) for path in paths}
    parts = parts_of(heads)
    kinds: dict[Path, Kind] = {}
    for path in parts:
        try:
            kinds[path] = kind_of(
                path.name,
                heads[path],
                path.stat().st_size,
                trusted=is_raw(path, raw),
            )
        except IntegrityError as error:
            raise IntegrityError(
                f"{path}: {error}; --raw {path.name} takes it for a raw disk"
            ) from error
    found = [one_image((p, *parts[p]), kind) for p, kind in kinds.items()]
    if len(found) == 1:
        return found
    _identify(found)
    links = {image.name: (_link(image), image) for image in found}
    return [links[link.name][1] for link in in_order(ln for ln, _ in links.values())]


def is_raw(path: Path, raw: Sequence[str]) -> bool:
    """Whether a file is a raw disk whatever it begins with: by name, or as a VHD.

    Args:
        raw: names, with wildcards.
    """
    named = any(fnmatchcase(path.name, pattern) for pattern in raw)
    return named or _fixed_vhd(path) is not None


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


def parts_of(heads: Mapping[Path, bytes]) -> dict[Path, tuple[Path, ...]]:
    """Return files that stand by themselves, and the extents of VMDKs' descriptors.

    An extent lies beside its descriptor. One that lies elsewhere is taken where there
    is no other of its name: ESXi calls the disks of one VM alike on each datastore.
    What an extent begins with is its guest's, and tells nothing.

    Args:
        heads: files and their first bytes.

    Raises:
        IntegrityError: a descriptor is damaged; which file is its extent isn't sure.
    """
    found: dict[Path, tuple[Path, ...] | IntegrityError] = {}
    for path, head in heads.items():
        found[path] = ()
        if vmdk_wire.is_descriptor(head):
            try:
                found[path] = _extents(path, heads)
            except IntegrityError as error:
                found[path] = error  # unless it is an extent
    taken = {p for parts in found.values() if isinstance(parts, tuple) for p in parts}
    alone: dict[Path, tuple[Path, ...]] = {}
    for path, parts in found.items():
        if path in taken:
            continue
        if isinstance(parts, IntegrityError):
            raise parts
        alone[path] = parts
    return alone


def _extents(path: Path, given: Iterable[Path]) -> tuple[Path, ...]:
    others = [other for other in given if other != path]
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
    return tuple(found)


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


def one_image(paths: tuple[Path, ...], kind: Kind) -> Found:
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
    try:
        with path.open("rb") as file:
            at = file.seek(0, os.SEEK_END) - vhd_wire.FOOTER.size
            if at <= 0:
                return None
            file.seek(at)
            footer = vhd_wire.parse_footer(file.read(vhd_wire.FOOTER.size))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    if isinstance(footer, str) or footer.kind != vhd_wire.FIXED:
        return None
    return ImageInfo("vhd", "fixed", at, identity=footer.identity)
