# SPDX-License-Identifier: Apache-2.0
"""The structures of [MS-VHDX], Virtual Hard Disk v2 file format."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, field
from typing import Final

from pveplug.images.crc32c import sealed
from pveplug.units import KiB, MiB

SIGNATURE: Final = b"vhdxfile"
HEADERS: Final = (64 * KiB, 128 * KiB)
REGIONS: Final = (192 * KiB, 256 * KiB)
HEADER_SIZE: Final = 4 * KiB
REGION_SIZE: Final = 64 * KiB
FRONT: Final = MiB
"""The header section: nothing else lies in the first MiB."""

HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
"""signature, checksum, sequence, file write guid, data write guid, log guid, log
version, version, log length, log offset."""
REGION_TABLE: Final = struct.Struct("<4sIII")
REGION: Final = struct.Struct("<16sQII")
METADATA_SIZE: Final = 64 * KiB  # of the table at the metadata region's beginning
METADATA_TABLE: Final = struct.Struct("<8sHH20x")
METADATA: Final = struct.Struct("<16sIIII")
MAX_ENTRIES: Final = 2047


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


BAT: Final = _guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION: Final = _guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")

FILE_PARAMETERS: Final = _guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
DISK_SIZE: Final = _guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
LOGICAL_SECTOR: Final = _guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR: Final = _guid("cda348c7-445d-4471-9cc9-e9885251c556")
PAGE_83: Final = _guid("beca12ab-b2e6-4523-93ef-c309e000c746")
PARENT_LOCATOR: Final = _guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
LOCATOR_TYPE: Final = _guid("b04aefb7-d19e-4a81-b789-25b8e9445913")
KNOWN_ITEMS: Final = {
    *(FILE_PARAMETERS, DISK_SIZE, LOGICAL_SECTOR, PHYSICAL_SECTOR, PAGE_83),
    PARENT_LOCATOR,
}
LOCATOR: Final = struct.Struct("<16sHH")
LOCATOR_ENTRY: Final = struct.Struct("<IIHH")

LEAVE_ALLOCATED: Final = 1
HAS_PARENT: Final = 2
REQUIRED: Final = 4  # of a metadata entry's flags

STATE: Final = 7
PLACE: Final = ~0xFFFFF & 0xFFFFFFFFFFFFFFFF
NOT_PRESENT: Final = 0
UNDEFINED: Final = 1
ZERO: Final = 2
UNMAPPED: Final = 3
FULLY_PRESENT: Final = 6
PARTIALLY_PRESENT: Final = 7
BITMAP_SECTORS: Final = 1 << 23  # sectors that one sector bitmap block describes


@dataclass(frozen=True, slots=True)
class Header:
    sequence: int
    data_write: str
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """The items of the metadata region, judged."""

    block: int
    leave_allocated: bool
    has_parent: bool
    size: int
    sector: int
    locator: dict[str, str] = field(default_factory=dict)


def text_of(guid: bytes) -> str:
    return str(uuid.UUID(bytes_le=guid))


def parse_header(data: bytes) -> Header | str:
    """Read one of the two headers; return what is wrong with it."""
    fields = HEADER.unpack_from(data)
    if fields[0] != b"head":
        return "has no signature"
    if fields[1] != sealed(data, 4):
        return "has a wrong checksum"
    return Header(
        fields[2],
        text_of(fields[4]),
        fields[5],
        fields[6],
        fields[7],
        fields[8],
        fields[9],
    )


def parse_regions(data: bytes) -> dict[bytes, tuple[int, int]] | str:
    """Return the regions' places, or what is wrong with this table."""
    signature, checksum, count, _ = REGION_TABLE.unpack_from(data)
    if signature != b"regi":
        return "has no signature"
    if checksum != sealed(data, 4):
        return "has a wrong checksum"
    if count > MAX_ENTRIES:
        return f"has {count} entries"
    found: dict[bytes, tuple[int, int]] = {}
    for index in range(count):
        at = REGION_TABLE.size + index * REGION.size
        guid, offset, length, required = REGION.unpack_from(data, at)
        if guid in found:
            return f"names region {text_of(guid)} twice"
        if guid in (BAT, METADATA_REGION):
            if offset < FRONT or offset % MiB or length % MiB or not length:
                return f"has region {text_of(guid)} at {offset}, {length} bytes long"
        elif required & 1:
            return f"requires the unknown region {text_of(guid)}"
        found[guid] = (offset, length)
    for guid in (BAT, METADATA_REGION):
        if guid not in found:
            return f"lacks region {text_of(guid)}"
    return found


def parse_metadata(data: bytes) -> Metadata | str:
    """Read the metadata region, or say what is wrong with it."""
    signature, _, count = METADATA_TABLE.unpack_from(data)
    if signature != b"metadata":
        return "the metadata table has no signature"
    if count > MAX_ENTRIES:
        return f"the metadata table has {count} entries"
    items: dict[bytes, bytes] = {}
    for index in range(count):
        at = METADATA_TABLE.size + index * METADATA.size
        guid, offset, length, flags, _ = METADATA.unpack_from(data, at)
        if guid not in KNOWN_ITEMS or flags & 1:
            if flags & REQUIRED:
                return f"the unknown metadata item {text_of(guid)} is required"
            continue
        if guid in items:
            return f"the metadata item {text_of(guid)} is there twice"
        if offset < METADATA_SIZE or offset + length > len(data) or length > MiB:
            return f"the metadata item {text_of(guid)} lies outside of its region"
        items[guid] = data[offset : offset + length]
    for guid, size in ((FILE_PARAMETERS, 8), (DISK_SIZE, 8), (LOGICAL_SECTOR, 4)):
        if len(items.get(guid, b"")) != size:
            return f"the metadata item {text_of(guid)} is missing or of wrong length"
    block, flags = struct.unpack("<II", items[FILE_PARAMETERS])
    (size,) = struct.unpack("<Q", items[DISK_SIZE])
    (sector,) = struct.unpack("<I", items[LOGICAL_SECTOR])
    if block & (block - 1) or not MiB <= block <= 256 * MiB:
        return f"blocks of {block} bytes"
    if sector not in (512, 4096):
        return f"sectors of {sector} bytes"
    if not size or size % sector:
        return f"a disk of {size} bytes"
    locator: dict[str, str] = {}
    if flags & HAS_PARENT:
        if PARENT_LOCATOR not in items:
            return "a differencing disk without a parent locator"
        found = parse_locator(items[PARENT_LOCATOR])
        if isinstance(found, str):
            return found
        locator = found
    return Metadata(
        block,
        bool(flags & LEAVE_ALLOCATED),
        bool(flags & HAS_PARENT),
        size,
        sector,
        locator,
    )


def parse_locator(data: bytes) -> dict[str, str] | str:
    """Return the parent locator's keys and values."""
    if len(data) < LOCATOR.size:
        return "the parent locator is too short"
    kind, _, count = LOCATOR.unpack_from(data)
    if kind != LOCATOR_TYPE:
        return f"the parent locator is of the unknown type {text_of(kind)}"
    if LOCATOR.size + count * LOCATOR_ENTRY.size > len(data):
        return f"the parent locator has {count} entries"
    found: dict[str, str] = {}
    for index in range(count):
        at = LOCATOR.size + index * LOCATOR_ENTRY.size
        key_at, value_at, key_size, value_size = LOCATOR_ENTRY.unpack_from(data, at)
        if max(key_at + key_size, value_at + value_size) > len(data):
            return "an entry of the parent locator lies outside of it"
        key = data[key_at : key_at + key_size].decode("utf-16-le", "replace")
        value = data[value_at : value_at + value_size].decode("utf-16-le", "replace")
        found[key] = value
    return found
