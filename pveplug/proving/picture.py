# SPDX-License-Identifier: Apache-2.0
"""A VM's screen: read from the PPM that QEMU writes, compared, kept as PNG."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pveplug.errors import RemoteProtocolError

MAX_PIXELS: Final = 16 << 20
"""More than 5120 x 2880; QEMU's VGA of 16 MiB shows at most a quarter of it."""
MAX_FILE: Final = 3 * MAX_PIXELS + 64
_HEADER: Final = re.compile(
    rb"P6[ \t\r\n]+(?:#[^\n]{0,80}\n)?([0-9]{1,5})[ \t\r\n]+([0-9]{1,5})"
    rb"[ \t\r\n]+255[ \t\r\n]"
)
_CURSOR: Final = 16 * 32
"""Pixels of a cursor in the largest console font."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A screen; ``pixels`` are three bytes each, red, green, blue, row by row."""

    width: int
    height: int
    pixels: bytes

    def is_blank(self) -> bool:
        """Whether it is of one colour, but for a cursor or a mouse pointer."""
        plain = self.pixels[:3] * self.width
        return self._differs_by_at_most(_CURSOR, lambda at: plain)

    def is_like(self, other: Picture) -> bool:
        """Whether both show the same, but for a cursor that blinks.

        A thousandth of the pixels may differ, and always as many as two cursors have.
        """
        if (self.width, self.height) != (other.width, other.height):
            return False
        if self.pixels == other.pixels:
            return True
        allowed = max(2 * _CURSOR, self.width * self.height // 1000)
        stride = 3 * self.width
        return self._differs_by_at_most(
            allowed, lambda at: other.pixels[at : at + stride]
        )

    def _differs_by_at_most(self, allowed: int, row_of: Callable[[int], bytes]) -> bool:
        """Compare row by row and stop early: most pictures differ in their first rows.

        It is done on the event loop, beside a server that guests wait for.
        """
        stride = 3 * self.width
        changed = 0
        for at in range(0, len(self.pixels), stride):
            row, other = self.pixels[at : at + stride], row_of(at)
            if row != other:
                changed += _pixels_that_differ(row, other)
                if changed > allowed:
                    return False
        return True


def _pixels_that_differ(row: bytes, other: bytes) -> int:
    changed = (
        int.from_bytes(row, "little") ^ int.from_bytes(other, "little")
    ).to_bytes(len(row), "little")
    planes = (int.from_bytes(changed[plane::3], "little") for plane in range(3))
    merged = 0
    for plane in planes:
        merged |= plane
    pixels = len(row) // 3
    return pixels - merged.to_bytes(pixels, "little").count(0)


def parse_ppm(data: bytes) -> Picture:
    """Read a binary PPM with one byte per colour.

    Raises:
        RemoteProtocolError: it is none, is cut off, or has over ``MAX_PIXELS``.
    """
    header = _HEADER.match(data[:256])
    if not header:
        raise RemoteProtocolError("QEMU's picture of the screen is no PPM of 24 bits")
    width, height = int(header[1]), int(header[2])
    if not 0 < width * height <= MAX_PIXELS:
        raise RemoteProtocolError(f"QEMU's picture has {width} x {height} pixels")
    pixels = data[header.end() :]
    if len(pixels) != 3 * width * height:
        raise RemoteProtocolError(
            f"QEMU's picture of {width} x {height} pixels has {len(pixels)} bytes"
        )
    return Picture(width, height, pixels)


def as_png(picture: Picture) -> bytes:
    """Return the picture as a PNG file."""
    stride = 3 * picture.width
    rows = b"".join(
        b"\0" + picture.pixels[at : at + stride]
        for at in range(0, len(picture.pixels), stride)
    )
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows, 6)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
