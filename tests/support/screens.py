# SPDX-License-Identifier: Apache-2.0
"""Screens and registers recorded from QEMU 10.0, and screens drawn for a test."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Final

from pveplug.proving.picture import Picture
from pveplug.proving.vgafont import GLYPHS, ROWS

FOLDER: Final = Path(__file__).resolve().parent.parent / "unit" / "screens"


def recorded(name: str) -> Picture:
    """A picture of ``tests/unit/screens``."""
    return from_png((FOLDER / f"{name}.png").read_bytes())


def from_png(data: bytes) -> Picture:
    """Read a PNG that ``as_png`` wrote."""
    width, height = struct.unpack(">II", data[16:24])
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    rows = zlib.decompress(packed)
    stride = 3 * width + 1
    assert not any(rows[::stride]), "as_png filters no row"
    pixels = b"".join(
        rows[row * stride + 1 : (row + 1) * stride] for row in range(height)
    )
    return Picture(width, height, pixels)


def registers(name: str) -> str:
    """What ``info registers -a`` said, with the line ends of the monitor."""
    text = (FOLDER / f"{name}.registers").read_text()
    return re.sub("\n", "\r\n", text)


def drawn(
    text: str,
    *,
    width: int = 640,
    height: int = 400,
    ink: bytes = b"\xaa\xaa\xaa",
    paper: bytes = b"\0\0\0",
) -> Picture:
    """A screen with this text at its top left, in cells of 8 x 16."""
    shapes = {character: glyph for glyph, character in reversed(GLYPHS.items())}
    pixels = bytearray(paper * (width * height))
    for row, line in enumerate(text.split("\n")):
        for column, character in enumerate(line):
            for y, bits in enumerate(shapes[character]):
                for x in range(8):
                    if bits & (0x80 >> x):
                        at = 3 * ((row * ROWS + y) * width + column * 8 + x)
                        pixels[at : at + 3] = ink
    return Picture(width, height, bytes(pixels))


def as_ppm(picture: Picture) -> bytes:
    """The picture as QEMU writes it."""
    return b"P6\n%d %d\n255\n" % (picture.width, picture.height) + picture.pixels
