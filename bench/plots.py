# SPDX-License-Identifier: Apache-2.0
"""Small SVG plots by hand: bars beside their bounds, a line over what was varied."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LINE = 760, 20
INK, FAINT, GOOD, BAD = "#333", "#bbb", "#3a7d44", "#b3412f"


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def bars(values: Sequence[tuple[str, float, bool]]) -> str:
    """Plot how far each is from its bound: ``(name, share of the bound, ok)``.

    Above 1 is better than the bound; a bar ends at twice it.
    """
    left, unit = 400, 150.0
    parts = []
    for number, (name, share, ok) in enumerate(values):
        y = 10 + number * LINE
        width = min(share, 2.0) * unit
        parts += [
            _text(left - 8, y + 13, name[:64], "end"),
            f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="{LINE - 5}" '
            f'fill="{GOOD if ok else BAD}"/>',
            _text(left + width + 4, y + 13, f"{share:.2f}"),
        ]
    height = 20 + len(values) * LINE
    x = left + unit
    parts.append(
        f'<line x1="{x}" y1="6" x2="{x}" y2="{height - 8}" stroke="{INK}" '
        'stroke-dasharray="4 3"/>'
    )
    return _svg(height, parts)


def line(points: Sequence[tuple[float, float]], along: str, up: str) -> str:
    """Plot points over equal steps of what was varied; the scale begins at 0."""
    left, right, top, bottom = 60.0, WIDTH - 30.0, 30.0, 220.0
    most = max(value for _, value in points) * 1.15 or 1.0
    step = (right - left) / max(len(points) - 1, 1)
    places = [
        (left + number * step, bottom - value / most * (bottom - top))
        for number, (_, value) in enumerate(points)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" '
        f'fill="none" stroke="{FAINT}"/>',
        f'<polyline points="{path}" fill="none" stroke="{GOOD}" stroke-width="2"/>',
        _text(left - 40, top - 12, up),
        _text((left + right) / 2, bottom + 40, along, "middle"),
    ]
    for (x, y), (varied, value) in zip(places, points, strict=True):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{GOOD}"/>',
            _text(x, y - 8, f"{value:g}", "middle"),
            _text(x, bottom + 18, f"{varied:g}", "middle"),
        ]
    return _svg(bottom + 52, parts)
