# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes and how people read them."""

from __future__ import annotations

from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB

SECTOR: Final = 512
CLUSTER: Final = 64 * KiB
"""Granularity of change tracking and cluster size of the backup format."""


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is at least ``value``."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    """Return the largest multiple of ``unit`` that is at most ``value``."""
    return value // unit * unit


def human(size: float) -> str:
    """Return ``size`` bytes as an operator reads it: ``"1.5 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < KiB:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= KiB
    return f"{size:.1f} TiB"
