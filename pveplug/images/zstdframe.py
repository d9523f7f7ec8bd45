# SPDX-License-Identifier: Apache-2.0
"""One zstd frame of known size: where it ends, and its content, both bounded.

A compressed cluster of a qcow2 image is followed by others; the frame's own structure
(RFC 8878) says where it ends, which a decompressor with a bounded output doesn't.
"""

from __future__ import annotations

from typing import Final

import zstandard

MAGIC: Final = b"\x28\xb5\x2f\xfd"
MAX_WINDOW: Final = 1 << 23  # what its level 19 uses; it is allocated as it is named


def frame_length(data: bytes) -> int | None:
    """Return the length of the frame ``data`` begins with; None if it is cut."""
    if len(data) < 6 or not data.startswith(MAGIC):
        return None
    descriptor = data[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    at += (single, 2, 4, 8)[descriptor >> 6]
    last = False
    while not last:
        if at + 3 > len(data):
            return None
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)
    at += 4 * checksum
    return at if at <= len(data) else None


def unpacked(frame: bytes, size: int) -> bytes | str:
    """Return the content, which must be ``size`` bytes; or what is wrong with it."""
    try:
        machine = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        with machine.stream_reader(frame) as reader:
            out = reader.read(size)
            more = reader.read(1)
    except zstandard.ZstdError as error:
        return f"is damaged ({error})"
    if len(out) != size or more:
        than = "more than " if more else ""
        return f"has {than}{len(out)} bytes instead of {size}"
    return out
