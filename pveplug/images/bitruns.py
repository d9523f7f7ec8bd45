# SPDX-License-Identifier: Apache-2.0
"""Bitmaps and tables as they stand in images: runs of equal bits, words of a table."""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator
from typing import Final

_ZEROES: Final = re.compile(rb"\0+")
_ONES: Final = re.compile(rb"\xff+")


def bit_runs(
    bitmap: bytes | bytearray, first: int, count: int, *, high_first: bool
) -> Iterator[tuple[bool, int]]:
    """Yield ``(bit, length)`` of the runs of ``count`` bits from bit ``first``.

    Args:
        high_first: bit 0 of the map is the highest of the first byte (VHD); otherwise
            the lowest (VHDX).
    """
    at, end = first, first + count
    value, length = False, 0
    while at < end:
        byte = bitmap[at >> 3]
        if at & 7 == 0 and end - at >= 8 and byte in (0, 0xFF):
            bit = byte == 0xFF
            found = (_ONES if bit else _ZEROES).match(bitmap, at >> 3, end >> 3)
            step = 8 * len(found[0]) if found else 8
        else:
            shift = 7 - (at & 7) if high_first else at & 7
            bit, step = bool(byte >> shift & 1), 1
        if length and bit is not value:
            yield value, length
            length = 0
        value = bit
        length += step
        at += step
    if length:
        yield value, length


def words(data: bytes | bytearray, code: str, order: str) -> array[int]:
    """Return a table's numbers: ``code`` is ``I`` or ``Q``, ``order`` big or little."""
    table = array(code, bytes(data))
    if order != sys.byteorder:
        table.byteswap()
    return table
