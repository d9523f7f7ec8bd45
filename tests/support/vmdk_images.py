# SPDX-License-Identifier: Apache-2.0
"""Crafts VMDK files: sparse, streamOptimized as VMware writes it, COWD, descriptors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

SECTOR = 512
HEADER = "<4sIIQQQQIQQQB4sH433x"


def descriptor(
    kind: str,
    extents: Sequence[str] = (),
    cid: int = 0x12345678,
    parent: int = 0xFFFFFFFF,
    hint: str = "",
) -> bytes:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={parent:08x}",
        f'createType="{kind}"',
        *([f'parentFileNameHint="{hint}"'] if hint else []),
        "",
        "# Extent description",
        *extents,
        "",
        "# The Disk Data Base",
        'ddb.adapterType = "lsilogic"',
    ]
    return "\n".join(lines).encode() + b"\n"


def header(
    capacity: int,
    grain: int,
    flags: int,
    *,
    directory: int,
    redundant: int,
    overhead: int,
    version: int = 1,
    described: int = 20,
    compression: int = 0,
) -> bytes:
    """All in sectors."""
    return struct.pack(
        HEADER,
        b"KDMV",
        version,
        flags,
        capacity,
        grain,
        1 if described else 0,
        described,
        512,
        redundant,
        directory,
        overhead,
        0,
        b"\n \r\n",
        compression,
    )


def _table_count(sectors: int, grain: int, entries: int = 512) -> int:
    return -(-sectors // (grain * entries))


def sparse(
    disk: bytes,
    states: str,
    *,
    grain: int = 8,
    text: bytes | None = None,
    redundant: bool = True,
    order: Sequence[int] | None = None,
    tables_last: bool = False,
) -> bytes:
    """A hosted sparse extent; a letter for each grain: ``d``, ``z`` or ``.``."""
    sectors = len(disk) // SECTOR
    text = descriptor("monolithicSparse") if text is None else text
    described = -(-len(text) // SECTOR) if text else 0
    count = _table_count(sectors, grain)
    directory_sectors = -(-count * 4 // SECTOR)
    copies = 2 if redundant else 1
    metadata = copies * (directory_sectors + 4 * count)
    used = [i for i, state in enumerate(states) if state == "d"]
    order = [i for i in (order or used) if i in used]
    order += [i for i in used if i not in order]
    front = 1 + described
    at = front if tables_last else front + metadata
    places: dict[int, int] = {}
    for index in order:
        places[index] = at
        at += grain
    tables_at = at if tables_last else front
    entries = []
    for index, state in enumerate(states):
        entries.append(places[index] if state == "d" else int(state == "z"))
    entries += [0] * (count * 512 - len(entries))
    packed = struct.pack(f"<{len(entries)}I", *entries)
    tables = b""
    starts = []
    for copy in range(copies):
        base = tables_at + copy * (directory_sectors + 4 * count)
        starts.append(base)
        first = base + directory_sectors
        places_of = [first + 4 * i for i in range(count)]
        directory = struct.pack(f"<{count}I", *places_of)
        tables += directory.ljust(directory_sectors * SECTOR, b"\0") + packed
    data = b"".join(
        disk[i * grain * SECTOR : (i + 1) * grain * SECTOR].ljust(grain * SECTOR, b"\0")
        for i in order
    )
    head = header(
        sectors,
        grain,
        1 | (2 if redundant else 0) | (4 if "z" in states else 0),
        directory=starts[-1],
        redundant=starts[0] if redundant else 0,
        overhead=front + metadata,
        described=described,
        version=2 if "z" in states else 1,
    )
    middle = data + tables if tables_last else tables + data
    return head + text.ljust(described * SECTOR, b"\0") + middle


def stream(
    disk: bytes, states: str, *, grain: int = 128, text: bytes | None = None
) -> bytes:
    """What VMware exports: grains behind markers, tables after them, a footer."""
    sectors = len(disk) // SECTOR
    text = descriptor("streamOptimized") if text is None else text
    count = _table_count(sectors, grain)
    more = {"described": 20, "version": 3, "compression": 1, "overhead": 128}
    end = 0xFFFFFFFFFFFFFFFF
    flags = 1 | 1 << 16 | 1 << 17 | (4 if "z" in states else 0)
    out = bytearray(header(sectors, grain, flags, directory=end, redundant=0, **more))
    out += text
    out += bytes(128 * SECTOR - len(out))

    def marker(value: int, kind: int) -> bytes:
        return struct.pack("<QII496x", value, 0, kind)

    directory = []
    for table in range(count):
        entries = []
        for index in range(table * 512, min((table + 1) * 512, len(states))):
            if states[index] != "d":
                entries.append(int(states[index] == "z"))
                continue
            low = index * grain * SECTOR
            plain = disk[low : low + grain * SECTOR].ljust(grain * SECTOR, b"\0")
            packed = zlib.compress(plain)
            entries.append(len(out) // SECTOR)
            out += struct.pack("<QI", index * grain, len(packed)) + packed
            out += bytes(-len(out) % SECTOR)
        if not any(entry > 1 for entry in entries):
            directory.append(0)
            continue
        out += marker(4, 1)
        directory.append(len(out) // SECTOR)
        out += struct.pack(f"<{len(entries)}I", *entries).ljust(2048, b"\0")
    body = struct.pack(f"<{count}I", *directory)
    body += bytes(-len(body) % SECTOR)
    out += marker(len(body) // SECTOR, 2)
    place = len(out) // SECTOR
    out += body
    out += marker(1, 3)
    out += header(sectors, grain, flags, directory=place, redundant=0, **more)
    return bytes(out + marker(0, 0))


def cowd(
    disk: bytes, states: str, *, grain: int = 1, root: bool = True, parent: str = ""
) -> bytes:
    """ESX's COWD: tables are made when they are needed, so they lie between grains."""
    sectors = len(disk) // SECTOR
    count = _table_count(sectors, grain, 4096)
    directory_sectors = -(-count * 4 // SECTOR)
    out = bytearray((4 + directory_sectors) * SECTOR)
    directory = []
    for table in range(count):
        mine = states[table * 4096 : (table + 1) * 4096]
        if "d" not in mine:
            directory.append(0)
            continue
        at = len(out)
        directory.append(at // SECTOR)
        out += bytes(4096 * 4)
        for slot, state in enumerate(mine):
            if state == "d":
                struct.pack_into("<I", out, at + 4 * slot, len(out) // SECTOR)
                low = (table * 4096 + slot) * grain * SECTOR
                plain = disk[low : low + grain * SECTOR]
                out += plain.ljust(grain * SECTOR, b"\0")
    struct.pack_into(
        "<4sIIIIIII",
        out,
        0,
        b"COWD",
        1,
        3 if root else 2,
        sectors,
        grain,
        4,
        count,
        len(out) // SECTOR,
    )
    out[32 : 32 + len(parent)] = parent.encode()
    struct.pack_into(f"<{count}I", out, 4 * SECTOR, *directory)
    return bytes(out)
