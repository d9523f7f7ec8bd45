# SPDX-License-Identifier: Apache-2.0
"""The CRC-32 of a disk whose parts are told in any order.

A CRC is linear: that of a whole is the sum (XOR) of its parts', each moved over what
follows it, and zeroes add nothing but their length::

    disk   |  A  |000000|  B  |      crc(A 0 B) = crc(A)·x^|0B| + crc(B) + crc(zeroes)

So it can be kept while a disk is written as its image has it, and compared with what is
read back from one end to the other. It is the CRC-32 of zlib, gzip and ``crc32``.
"""

from __future__ import annotations

import zlib
from typing import Final

_POLYNOMIAL: Final = 0xEDB88320  # reflected: bit 31 is x^0
_ONE: Final = 1 << 31


def _times(a: int, b: int) -> int:
    """Multiply two polynomials modulo the CRC's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _powers() -> list[int]:
    """Return x^8, x^16, x^32, …: what moves over 1, 2, 4, … bytes."""
    found = [_ONE >> 8]
    while len(found) < 63:
        found.append(_times(found[-1], found[-1]))
    return found


_MOVES: Final = _powers()


def _moved(crc: int, length: int) -> int:
    """Return a part's CRC with ``length`` bytes of zero behind it."""
    bit = 0
    while length:
        if length & 1:
            crc = _times(_MOVES[bit], crc)
        length >>= 1
        bit += 1
    return crc


class ContentSum:
    """What was told of a disk; what wasn't reads as zeroes."""

    def __init__(self) -> None:
        self.data = 0
        """Bytes of data it was told of."""
        self._sum = 0  # of all ended runs, as if the disk ended at _base
        self._base = 0
        self._start = self._end = 0  # the run that goes on
        self._crc = 0

    def add(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the disk; none of them may be told twice."""
        if offset != self._end:
            self._close()
            self._start = self._end = offset
        # Without the usual inversion of the first bits, which isn't linear.
        self._crc = zlib.crc32(data, self._crc ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
        self._end += len(data)
        self.data += len(data)

    def _close(self) -> None:
        if self._end == self._start:
            return
        if self._end > self._base:
            self._sum = _moved(self._sum, self._end - self._base)
            self._base = self._end
        self._sum ^= _moved(self._crc, self._base - self._end)
        self._start, self._crc = self._end, 0

    def crc32(self, size: int) -> int:
        """Return the CRC-32 of the disk, ``size`` bytes long."""
        self._close()
        body = _moved(self._sum, size - self._base)
        return body ^ _moved(0xFFFFFFFF, size) ^ 0xFFFFFFFF
