# SPDX-License-Identifier: Apache-2.0
"""The structures of VMware's "Virtual Disk Format" 1.1 and 5.0, and its descriptor."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from pveplug.images.stream import ParentLink
from pveplug.texts import known_encoding
from pveplug.units import SECTOR, MiB

MAGIC: Final = b"KDMV"
HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH433x")
"""magic, version, flags, capacity, grain size, descriptor's place and size, entries of
a grain table, redundant and primary grain directory, overhead, unclean shutdown, line
ends, compression."""
LINE_ENDS: Final = b"\n \r\n"
GD_AT_END: Final = 0xFFFFFFFFFFFFFFFF
VERSIONS: Final = (1, 2, 3)

LINE_TEST: Final = 1
REDUNDANT: Final = 2
ZEROED_GRAINS: Final = 4
COMPRESSED: Final = 1 << 16
MARKERS: Final = 1 << 17
DEFLATE: Final = 1

ENTRIES: Final = 512  # of a grain table; VMware makes no other
MIN_GRAIN: Final = 8  # sectors
MAX_GRAIN: Final = 2048
MAX_DESCRIPTOR: Final = MiB
ZEROED: Final = 1  # a grain table entry

MARKER: Final = struct.Struct("<QII")
"""sectors or place, size, type (or the first bytes of a grain)."""
GRAIN_MARKER: Final = struct.Struct("<QI")
EOS, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)

COWD_MAGIC: Final = b"COWD"
COWD: Final = struct.Struct("<4sIIIIIII1024s")
"""magic, version, flags, sectors, grain size, directory's place and entries, free
sector, the parent's name if this isn't a root."""
COWD_SIZE: Final = 2048
COWD_ROOT: Final = 1
COWD_ENTRIES: Final = 4096

DESCRIPTOR: Final = b"# disk descriptorfile"
NO_PARENT: Final = "ffffffff"
_EXTENT: Final = re.compile(
    r"""^\s*(RW|RDONLY|NOACCESS)\s+(\d{1,15})\s+(\w+)"""
    r"""(?:\s+"([^"]*)"(?:\s+(\d{1,15}))?)?""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Header:
    """A sparse extent's header; lengths and places in bytes."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_size: int
    redundant: int
    directory: int | None
    """None: at the end, where a footer says so."""
    overhead: int
    unclean: bool

    @property
    def table_span(self) -> int:
        """Bytes of the disk that one grain table maps."""
        return self.grain * ENTRIES

    @property
    def tables(self) -> int:
        return -(-self.capacity // self.table_span)


@dataclass(frozen=True, slots=True)
class Extent:
    """A line of the descriptor; lengths in bytes."""

    access: str
    length: int
    kind: str
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says."""

    create_type: str
    cid: str
    parent: ParentLink | None
    extents: tuple[Extent, ...]

    @property
    def size(self) -> int:
        return sum(extent.length for extent in self.extents)


def parse_header(data: bytes) -> Header | tuple[int, str]:
    """Read a sparse header; or say where it is wrong, and how."""
    (
        magic,
        version,
        flags,
        capacity,
        grain,
        descriptor,
        descriptor_size,
        entries,
        redundant,
        directory,
        overhead,
        unclean,
        line_ends,
        compression,
    ) = HEADER.unpack(data)
    if magic != MAGIC:
        return 0, "there is no sparse header"
    if version not in VERSIONS:
        return 4, f"version {version}"
    if flags & LINE_TEST and line_ends != LINE_ENDS:
        return 73, "line ends were converted: the file was transferred as text"
    if not 0 < capacity < 1 << 40:
        return 12, f"a disk of {capacity} sectors"
    if grain & (grain - 1) or not MIN_GRAIN <= grain <= MAX_GRAIN:
        return 20, f"grains of {grain} sectors"
    if entries != ENTRIES:
        return 44, f"grain tables of {entries} entries"
    if max(descriptor, descriptor_size, overhead, redundant) >= 1 << 50:
        return 28, "a table beyond the file"
    if descriptor_size * SECTOR > MAX_DESCRIPTOR:
        return 36, f"a descriptor of {descriptor_size} sectors"
    if flags & COMPRESSED and compression != DEFLATE:
        return 77, f"compression {compression}"
    if directory != GD_AT_END and not 0 < directory < 1 << 50:
        return 56, f"a grain directory at sector {directory}"
    return Header(
        version,
        flags,
        capacity * SECTOR,
        grain * SECTOR,
        descriptor * SECTOR,
        descriptor_size * SECTOR,
        redundant * SECTOR if flags & REDUNDANT else 0,
        None if directory == GD_AT_END else directory * SECTOR,
        overhead * SECTOR,
        bool(unclean),
    )


def is_descriptor(data: bytes) -> bool:
    return data[: len(DESCRIPTOR)].lower() == DESCRIPTOR


def parse_descriptor(data: bytes) -> Descriptor | str:
    """Read a descriptor, embedded or a file of its own; or say what is wrong."""
    if not is_descriptor(data):
        return "there is no descriptor"
    text = _text(data.split(b"\0", 1)[0])
    keys: dict[str, str] = {}
    extents: list[Extent] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        if found := _EXTENT.match(line):
            access, sectors, kind, file, offset = found.groups()
            extents.append(
                Extent(
                    access.upper(),
                    int(sectors) * SECTOR,
                    kind.upper(),
                    file or "",
                    int(offset or 0) * SECTOR,
                )
            )
        else:
            key, equals, value = line.partition("=")
            if equals:
                keys.setdefault(key.strip().lower(), value.strip().strip('"'))
    if "createtype" not in keys:
        return "the descriptor names no createType"
    cid = keys.get("cid", "").lower()
    parent_cid = keys.get("parentcid", NO_PARENT).lower()
    for name, value in (("CID", cid), ("parentCID", parent_cid)):
        if not re.fullmatch("[0-9a-f]{1,8}", value):
            return f"the descriptor's {name} is {value!r}"
    parent = None
    if parent_cid.zfill(8) != NO_PARENT:
        hint = keys.get("parentfilenamehint")
        parent = ParentLink("vmdk-cid", (parent_cid.zfill(8),), (hint,) if hint else ())
    return Descriptor(keys["createtype"], cid.zfill(8), parent, tuple(extents))


def _text(data: bytes) -> str:
    """Decode by what the text itself says, or as UTF-8, or as anything."""
    named = re.search(
        rb'^[ \t]*encoding[ \t]*=[ \t]*"?([\w.-]{1,40})', data, re.M | re.I
    )
    wanted = known_encoding(named[1].decode("ascii", "replace")) if named else None
    for encoding in (wanted or "utf-8", "utf-8"):
        try:
            return data.decode(encoding)
        except UnicodeError:
            continue
    return data.decode("latin-1")


def inflated(data: bytes, grain: int, inside: int) -> bytes | str:
    """Inflate one grain of at most ``grain`` bytes, ``inside`` of them on the disk."""
    machine = zlib.decompressobj()
    try:
        out = machine.decompress(data, grain + 1)
    except zlib.error as error:
        return f"the grain's compressed bytes are damaged ({error})"
    if not inside <= len(out) <= grain:
        more = "more than " if len(out) > grain else ""
        return f"a grain of {more}{min(len(out), grain)} bytes instead of {grain}"
    if not machine.eof:
        return "the grain's compressed bytes are cut"
    return out


def longest(grain: int) -> int:
    """Bytes that one grain may take when it doesn't compress."""
    return grain + grain // 100 + 1024
