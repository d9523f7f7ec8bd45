# SPDX-License-Identifier: Apache-2.0
"""Read the text on a screen that shows characters of VGA's font.

Text mode draws cells of 9 x 16 pixels (720 wide) or 8 x 16; the frame buffer console
of Linux draws 8 x 16 as long as nobody has chosen another font. A cell either is a
glyph, pixel by pixel, or it isn't: nothing is guessed, so what is read was there.
"""

from __future__ import annotations

from typing import Final

from pveplug.proving.picture import Picture
from pveplug.proving.vgafont import GLYPHS, ROWS

UNKNOWN: Final = "\ufffd"
"""Stands for a cell that is not empty and no character of ours."""
_LIT: Final = bytes(int(value >= 0x50) for value in range(256))
_KNOWN: Final = {
    **GLYPHS,
    # Inverse video: menus' chosen line, and a block cursor.
    **{bytes(0xFF ^ row for row in glyph): text for glyph, text in GLYPHS.items()},
}


def read_text(picture: Picture) -> tuple[str, ...]:
    """Return the lines of text on the screen, without trailing blanks.

    ``UNKNOWN`` stands in each cell that isn't understood; a screen without any text of
    VGA's font gives lines of nothing else.
    """
    width = picture.width
    cell = 9 if width == 720 else 8
    lit = _lit(picture)
    lines = []
    for top in range(0, picture.height - ROWS + 1, ROWS):
        rows = [
            _packed(lit[at * width : (at + 1) * width], cell)
            for at in range(top, top + ROWS)
        ]
        text = "".join(
            _KNOWN.get(bytes(glyph), UNKNOWN) for glyph in zip(*rows, strict=True)
        )
        lines.append(text.rstrip())
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def joined(lines: tuple[str, ...], columns: int) -> str:
    """Return the lines as one text: a line that fills the screen goes on in the next.

    Args:
        lines: as :func:`read_text` returns them.
        columns: characters that a line of that screen holds.
    """
    return "".join(line if len(line) >= columns > 0 else line + "\n" for line in lines)


def columns_of(picture: Picture) -> int:
    """Return how many characters a line of this screen holds."""
    return picture.width // (9 if picture.width == 720 else 8)


def _lit(picture: Picture) -> bytes:
    """Return a byte per pixel: 1 where any of its colours is bright."""
    planes = [picture.pixels[plane::3].translate(_LIT) for plane in range(3)]
    merged = 0
    for plane in planes:
        merged |= int.from_bytes(plane, "little")
    return merged.to_bytes(len(planes[0]), "little")


def _packed(row: bytes, cell: int) -> bytes:
    """Return a byte per cell: its first eight pixels, the leftmost the highest bit."""
    cells = len(row) // cell
    row = row[: cells * cell]
    packed = 0
    for at in range(8):
        # Each byte is 0 or 1, so no bit leaves its byte.
        packed |= int.from_bytes(row[at::cell], "little") << (7 - at)
    return packed.to_bytes(cells, "little")
