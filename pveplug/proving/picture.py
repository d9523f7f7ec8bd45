# SPDX-License-Identifier: Apache-2.0
"""A VM's screen: read from the PPM that QEMU writes, compared, kept as PNG."""

from __future__ import annotations

import re
import struct
import zlib
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
        for plane in range(3):
            values = self.pixels[plane::3]
            if len(values) - values.count(values[0]) > _CURSOR:
                return False
        return True

    def is_like(self, other: Picture) -> bool:
        """Whether both show the same, but for a cursor that blinks.

        A thousandth of the pixels may differ, and always as many as two cursors have.
        """
        if (self.width, self.height) != (other.width, other.height):
            return False
        if self.pixels == other.pixels:
            return True
        allowed = max(2 * _CURSOR, self.width * self.height // 1000)
        size = len(self.pixels)
        changed = (
            int.from_bytes(self.pixels, "little")
            ^ int.from_bytes(other.pixels, "little")
        ).to_bytes(size, "little")
        return all(
            size // 3 - changed[plane::3].count(0) <= allowed for plane in range(3)
        )


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
