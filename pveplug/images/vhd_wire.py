# SPDX-License-Identifier: Apache-2.0
"""The structures of Microsoft's "Virtual Hard Disk Image Format Specification"."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final

COOKIE: Final = b"conectix"
FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
"""cookie, features, version, data offset, time stamp, creator application, version and
host OS, original and current size, cylinders, heads, sectors per track, type,
checksum, unique id, saved state."""
CHECKSUM_AT: Final = 64

HEADER_COOKIE: Final = b"cxsparse"
HEADER: Final = struct.Struct(">8sQQIIII16sII512s192s256x")
"""cookie, data offset, table offset, version, entries, block size, checksum, parent's
unique id and time stamp, reserved, parent's name, 8 parent locators."""
HEADER_CHECKSUM_AT: Final = 36

FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4
KINDS: Final = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

VERSION: Final = 0x00010000
UNUSED: Final = 0xFFFFFFFF  # a BAT entry


@dataclass(frozen=True, slots=True)
class Footer:
    """What of the footer says something."""

    kind: int
    size: int
    data_offset: int
    identity: str
    created: int  # seconds since 2000

    @property
    def kind_name(self) -> str:
        return KINDS.get(self.kind, f"type {self.kind}")


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """What of the dynamic disk header says something."""

    table: int
    entries: int
    block: int
    parent: str
    parent_modified: int
    parent_name: str


def parse_footer(data: bytes) -> Footer | str:
    """Read a footer; return what is wrong with it if it isn't one."""
    if len(data) != FOOTER.size or not data.startswith(COOKIE):
        return "there is no footer"
    fields = FOOTER.unpack(data)
    if fields[14] != _sum(data, CHECKSUM_AT):
        return "the footer's checksum is wrong"
    if fields[2] >> 16 != VERSION >> 16:
        return f"the footer has version 0x{fields[2]:08x}"
    return Footer(
        fields[13], fields[9], fields[3], str(uuid.UUID(bytes=fields[15])), fields[4]
    )


def parse_header(data: bytes) -> DynamicHeader | str:
    """Read a dynamic disk header; return what is wrong with it if it isn't one."""
    fields = HEADER.unpack(data)
    if fields[0] != HEADER_COOKIE:
        return "there is no dynamic disk header"
    if fields[6] != _sum(data, HEADER_CHECKSUM_AT):
        return "the dynamic disk header's checksum is wrong"
    if fields[3] >> 16 != VERSION >> 16:
        return f"the dynamic disk header has version 0x{fields[3]:08x}"
    return DynamicHeader(
        fields[2],
        fields[4],
        fields[5],
        str(uuid.UUID(bytes=fields[7])),
        fields[8],
        fields[10].decode("utf-16-be", "replace").split("\0")[0],
    )


def _sum(data: bytes, at: int) -> int:
    """Return the complement of the sum of all bytes but the sum's own."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF
