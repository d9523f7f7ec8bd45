# SPDX-License-Identifier: Apache-2.0
"""Crafts VHD files of all three types."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence

SECTOR = 512
ONE = uuid.UUID(int=1)


def _sealed(data: bytearray, at: int) -> bytes:
    data[at : at + 4] = bytes(4)
    struct.pack_into(">I", data, at, ~sum(data) & 0xFFFFFFFF)
    return bytes(data)


def footer(size: int, kind: int, identity: uuid.UUID = ONE) -> bytes:
    raw = bytearray(512)
    struct.pack_into(
        ">8sIIQI4sI4sQQHBBII16s",
        raw,
        0,
        b"conectix",
        2,
        0x10000,
        0xFFFFFFFFFFFFFFFF if kind == 2 else 512,
        1234,
        b"test",
        0x10000,
        b"Wi2k",
        size,
        size,
        16,
        4,
        17,
        kind,
        0,
        identity.bytes,
    )
    return _sealed(raw, 64)


def fixed(disk: bytes, identity: uuid.UUID = ONE) -> bytes:
    return disk + footer(len(disk), 2, identity)


def sparse(
    disk: bytes,
    states: str,
    *,
    block: int = 4096,
    present: Sequence[bool] | None = None,
    order: Sequence[int] | None = None,
    identity: uuid.UUID = ONE,
    parent: uuid.UUID | None = None,
    modified: int = 0,
    table_last: bool = False,
) -> bytes:
    """A dynamic or, with a parent, differencing disk; ``d`` for each stored block.

    ``present`` has a bool for each sector of the disk.
    """
    count = -(-len(disk) // block)
    ends = footer(len(disk), 4 if parent else 3, identity)
    table_size = -(-count * 4 // SECTOR) * SECTOR
    bitmap_size = -(-block // SECTOR // 8 // SECTOR) * SECTOR
    bitmap_size = max(bitmap_size, SECTOR)
    used = [i for i, state in enumerate(states) if state == "d"]
    order = [i for i in (order or used) if i in used]
    order += [i for i in used if i not in order]
    at = 1536 + (0 if table_last else table_size)
    bat = [0xFFFFFFFF] * count
    body = bytearray()
    for index in order:
        bat[index] = (at + len(body)) // SECTOR
        bits = bytearray(bitmap_size)
        for sector in range(block // SECTOR):
            number = index * block // SECTOR + sector
            if present is None or number >= len(present) or present[number]:
                bits[sector >> 3] |= 0x80 >> (sector & 7)
        body += bits
        body += disk[index * block : (index + 1) * block].ljust(block, b"\0")
    table = struct.pack(f">{count}I", *bat).ljust(table_size, b"\xff")
    head = bytearray(1024)
    name = ".\\parent.vhd".encode("utf-16-be") if parent else b""
    struct.pack_into(
        ">8sQQIIII16sII512s",
        head,
        0,
        b"cxsparse",
        0xFFFFFFFFFFFFFFFF,
        1536 + len(body) if table_last else 1536,
        0x10000,
        count,
        block,
        0,
        (parent or uuid.UUID(int=0)).bytes,
        modified,
        0,
        name,
    )
    middle = bytes(body) + table if table_last else table + bytes(body)
    return ends + _sealed(head, 36) + middle + ends
