# SPDX-License-Identifier: Apache-2.0
"""Crafts small qcow2 files whose clusters lie in any order."""

from __future__ import annotations

import random
import struct
import zlib

import zstandard

COPIED = 1 << 63


def qcow2(
    disk: bytes,
    states: str,
    *,
    bits: int = 9,
    version: int = 3,
    zstd: bool = False,
    backing: str = "",
    seed: int = 0,
    shuffle: bool = True,
    incompatible: int = 0,
    crypt: int = 0,
) -> bytes:
    """A letter for each cluster: ``d`` plain, ``c`` compressed, ``z`` zero, ``.``."""
    size = 1 << bits
    per = size // 8
    tables = -(-len(states) // per)
    l1_clusters = -(-tables * 8 // size)
    # What needs a cluster of its own: ("l1", i), ("l2", table), ("d", cluster),
    # ("c", clusters that share it).
    units: list[tuple[str, object]] = [("l1", None)]
    packed: dict[int, bytes] = {}
    group: list[int] = []
    used = 0
    for number, state in enumerate(states):
        plain = disk[number * size : (number + 1) * size].ljust(size, b"\0")
        if state == "d":
            units.append(("d", number))
        elif state == "c":
            if zstd:
                packed[number] = zstandard.compress(plain)
            else:
                machine = zlib.compressobj(9, zlib.DEFLATED, -12)
                packed[number] = machine.compress(plain) + machine.flush()
            assert len(packed[number]) < size
            if used + len(packed[number]) > size:
                units.append(("c", group))
                group, used = [], 0
            group.append(number)
            used += len(packed[number])
    if group:
        units.append(("c", group))
    mapped = [t for t in range(tables) if states[t * per : (t + 1) * per].strip(".")]
    units += [("l2", table) for table in mapped]
    if shuffle:
        random.Random(seed).shuffle(units)
    header_clusters = max(1, -(-1024 // size))
    at = header_clusters
    place: dict[tuple[str, int], int] = {}
    for kind, what in units:
        if kind == "l1":
            place["l1", 0] = at << bits
            at += l1_clusters
            continue
        if kind == "c":
            low = at << bits
            for number in what:
                place["c", number] = low
                low += len(packed[number])
        else:
            place[kind, what] = at << bits
        at += 1
    out = bytearray(at << bits)
    for number, content in packed.items():
        low = place["c", number]
        out[low : low + len(content)] = content
    shift = 62 - (bits - 8)
    for number, state in enumerate(states):
        entry = 0
        if state == "d":
            low = place["d", number]
            entry = low | COPIED
            out[low : low + size] = disk[number * size : (number + 1) * size].ljust(
                size, b"\0"
            )
        elif state == "c":
            low = place["c", number]
            last = low + len(packed[number]) - 1
            entry = 1 << 62 | (last // 512 - low // 512) << shift | low
        elif state == "z":
            entry = 1
        if entry:
            table = place["l2", number // per]
            struct.pack_into(">Q", out, table + number % per * 8, entry)
    for table in mapped:
        struct.pack_into(
            ">Q", out, place["l1", 0] + table * 8, place["l2", table] | COPIED
        )
    name = backing.encode()
    length = 72 if version == 2 else 112
    struct.pack_into(
        ">IIQIIQIIQQIIQ",
        out,
        0,
        0x514649FB,
        version,
        length + 8 if name else 0,
        len(name),
        bits,
        len(disk),
        crypt,
        tables,
        place["l1", 0],
        0,
        0,
        0,
        0,
    )
    if version == 3:
        features = incompatible | (8 if zstd else 0)
        struct.pack_into(">QQQIIB", out, 72, features, 0, 0, 4, length, int(zstd))
    out[length + 8 : length + 8 + len(name)] = name
    return bytes(out)
