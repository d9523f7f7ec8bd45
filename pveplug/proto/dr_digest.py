# SPDX-License-Identifier: Apache-2.0
"""Digests of replication: of a disk's run of frames, of a leaf, of a sample."""

from __future__ import annotations

import struct
from typing import Final

from blake3 import blake3

from pveplug.proto.dr_frames import DIGEST_SIZE, LEAF, Block, Buffer, Zero

_DATA: Final = struct.Struct(">cQQ")
_FNV_BASIS: Final = 0xCBF29CE484222325
_FNV_PRIME: Final = 0x100000001B3
_MASK: Final = (1 << 64) - 1
_ZEROES: Final = bytes(LEAF)


class RunDigest:
    """What ``DiskEnd`` says of a disk: frames, bytes and a BLAKE3 of all of them.

    The digest covers, per frame in order, ``D`` or ``Z``, offset and length (u64 each)
    and, of a block, its data.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.bytes = 0
        self._hash = blake3()

    def add(self, frame: Block | Zero) -> None:
        self.frames += 1
        if isinstance(frame, Zero):
            self._hash.update(_DATA.pack(b"Z", frame.offset, frame.length))
            return
        length = len(frame.data)
        self.bytes += length
        self._hash.update(_DATA.pack(b"D", frame.offset, length))
        self._hash.update(frame.data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def leaf_digest(leaf: Buffer) -> bytes:
    """Return the digest of one leaf."""
    return blake3(leaf).digest(DIGEST_SIZE)


def leaf_digests(data: Buffer) -> bytes:
    """Return the digests of all leaves of ``data``, the last of which may be short."""
    view = memoryview(data)
    return b"".join(
        blake3(view[at : at + LEAF]).digest(DIGEST_SIZE)
        for at in range(0, len(view), LEAF)
    )


def fnv1a_64(data: Buffer) -> int:
    """Return FNV-1a, 64 bits (Fowler, Noll, Vo)."""
    value = _FNV_BASIS
    if len(data) <= LEAF and data == _ZEROES[: len(data)]:
        # x ^ 0 is x: only the multiplications are left.
        return value * pow(_FNV_PRIME, len(data), 1 << 64) & _MASK
    for byte in memoryview(data).cast("B"):
        value = ((value ^ byte) * _FNV_PRIME) & _MASK
    return value


ZERO_DIGEST: Final = leaf_digest(_ZEROES)
"""Of a whole leaf of zeroes."""
