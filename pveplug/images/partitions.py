# SPDX-License-Identifier: Apache-2.0
"""Where a disk's partitions begin and end, read from its first 64 KiB.

GPT of 512-byte and of 4096-byte sectors (UEFI specification, "GUID Partition Table"),
and the four entries of an MBR; partitions within an extended one stand elsewhere on the
disk and are not found. Nothing depends on the answer being right or complete.
"""

from __future__ import annotations

import struct
from typing import Final

_MBR_ENTRY: Final = struct.Struct("<B3sB3sII")
_MBR_AT: Final = 446
_GPT_MAGIC: Final = b"EFI PART"
_GPT_TABLE: Final = struct.Struct("<QII")
_GPT_TABLE_AT: Final = 72
_GPT_ENTRY: Final = struct.Struct("<16s16sQQ")
_MOST: Final = 128


def partitions(
    first: bytes | bytearray | memoryview, size: int
) -> list[tuple[int, int]]:
    """Return ``(start, end)`` in bytes of each partition, rising by start.

    Args:
        first: the disk's beginning, as much of it as there is; may be empty.
        size: of the disk. What reaches beyond it is left out.
    """
    start = bytes(first[: 64 * 1024])
    if len(start) < 512 or start[510:512] != b"\x55\xaa":
        return []
    for sector in (512, 4096):
        if start[sector : sector + len(_GPT_MAGIC)] == _GPT_MAGIC:
            return _kept(_gpt(start, sector), size)
    return _kept(_mbr(start), size)


def _gpt(start: bytes, sector: int) -> list[tuple[int, int]]:
    if len(start) < sector + _GPT_TABLE_AT + _GPT_TABLE.size:
        return []
    table, count, width = _GPT_TABLE.unpack_from(start, sector + _GPT_TABLE_AT)
    if width < _GPT_ENTRY.size:
        return []
    found = []
    for number in range(min(count, _MOST)):
        at = table * sector + number * width
        if at + _GPT_ENTRY.size > len(start):
            break
        kind, _, low, high = _GPT_ENTRY.unpack_from(start, at)
        if any(kind):
            found.append((low * sector, (high + 1) * sector))
    return found


def _mbr(start: bytes) -> list[tuple[int, int]]:
    entries = [_MBR_ENTRY.unpack_from(start, _MBR_AT + 16 * n) for n in range(4)]
    return [(low * 512, (low + n) * 512) for _, _, kind, _, low, n in entries if kind]


def _kept(found: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    return sorted((low, high) for low, high in found if 0 < low < high <= size)
