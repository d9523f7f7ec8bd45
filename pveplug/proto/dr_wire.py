# SPDX-License-Identifier: Apache-2.0
"""The frames of the replication channel: what every byte between two sites is part of.

::

    0      1      2          4                 8                12          12 + length
    | type | flags | reserved | payload length  | payload CRC-32 | payload ... |
      u8     u8      u16 = 0    u32 big endian    u32 big endian

Bit 0 of the flags says that the payload is one zstd frame that names its content's
size. Length and checksum are those of the payload as it travels. TLS lies below and
keeps an attacker out; the checksum is for memory and for us: a frame that is wrong
ends the connection instead of reaching a disk. What the types mean is in dr_auth
(1 to 5), the channel (6) and dr_frames; docs/protocols/dr.md has all of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import zstandard
from isal.isal_zlib import crc32  # 13 GB/s; zlib's 3 are a third of a frame's cost

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.units import KiB, MiB

Buffer = bytes | bytearray | memoryview

HEADER: Final = struct.Struct(">BBHII")
MAX_PAYLOAD: Final = MiB + 64 * KiB
"""A block of 1 MiB and what is said of it; also the bound of what is decompressed."""
ZSTD: Final = 0x01
"""The one flag: the payload is compressed."""
ZSTD_LEVEL: Final = 1
"""What doesn't compress costs nothing at this level (5 GB/s); the next one that is
smaller by more than a few percent, 3, halves the speed of what does (600 MB/s)."""
WORTH_COMPRESSING: Final = 4 * KiB
"""Shorter payloads are mostly numbers and digests."""
_STAGE: Final = 16 * KiB
"""A TLS record. As much is copied of a payload at most; the rest is read in place."""


@dataclass(frozen=True, slots=True)
class RawFrame:
    """One frame that was checked; ``payload`` is decompressed and the caller's own."""

    type: int
    payload: bytes | memoryview = b""


def encode_frame(
    type: int,
    *buffers: Buffer,
    compress: bool = False,
    compressor: zstandard.ZstdCompressor | None = None,
) -> list[Buffer]:
    """Return a frame as buffers to write: its header, then the payload uncopied.

    Args:
        compress: try to, and keep the result if it saves at least an eighth.
        compressor: one to use again and again, by one thread; else one is made.

    Raises:
        LocalProtocolError: the type or the payload is none a frame can carry.
    """
    length = sum(memoryview(buffer).nbytes for buffer in buffers)
    if not 0 < type < 256 or length > MAX_PAYLOAD:
        raise LocalProtocolError(f"no frame has type {type} and {length} bytes")
    payload = [buffer for buffer in buffers if len(buffer)]
    flags = 0
    if compress and length >= WORTH_COMPRESSING:
        whole = payload[0] if len(payload) == 1 else b"".join(payload)
        packed = (compressor or new_compressor()).compress(whole)
        if len(packed) <= length - length // 8:
            payload, length, flags = [packed], len(packed), ZSTD
    crc = 0
    for buffer in payload:
        crc = crc32(buffer, crc)
    return [HEADER.pack(type, flags, 0, length, crc), *payload]


def new_compressor() -> zstandard.ZstdCompressor:
    """Make a compressor for :func:`encode_frame`; 30 microseconds each."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)


class FrameReader:
    """Bytes in, frames out.

    An adapter receives into :meth:`get_buffer` and tells :meth:`buffer_updated` how
    much came; whoever doesn't care for copies uses :meth:`receive_data`.

    Attributes:
        limit: the longest payload that is taken, compressed or not. A stranger is
            given less (dr_auth.MAX_PAYLOAD) than a peer that has proved itself.
    """

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._stage = memoryview(bytearray(_STAGE))
        self._staged = 0
        self._head: tuple[int, int, int] | None = None  # type, flags, CRC
        self._payload = memoryview(b"")
        self._filled = 0
        self._decompressor = zstandard.ZstdDecompressor()
        self._error: str | None = None

    def get_buffer(self) -> memoryview:
        """Where to receive next; never empty, and bounded by what is expected."""
        if self._head is not None:
            return self._payload[self._filled :]
        return self._stage[self._staged :]

    def buffer_updated(self, count: int) -> list[RawFrame]:
        """``count`` bytes came into :meth:`get_buffer`; return the completed frames.

        Raises:
            RemoteProtocolError: the peer isn't speaking this protocol; frames that
                the same call completed are lost, the connection is over anyway.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        if self._head is not None:
            self._filled += count
            if self._filled < len(self._payload):
                return []
            return [self._finished(*self._head, self._payload)]
        self._staged += count
        return self._unpack_stage()

    def receive_data(self, data: Buffer) -> list[RawFrame]:
        """Take what arrived; return the frames it completed.

        Raises:
            RemoteProtocolError: as :meth:`buffer_updated`.
        """
        frames: list[RawFrame] = []
        rest = memoryview(data)
        while rest:
            space = self.get_buffer()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            frames += self.buffer_updated(count)
            rest = rest[count:]
        return frames

    def receive_eof(self) -> None:
        """The peer closed its end.

        Raises:
            RemoteProtocolError: it did so within a frame, or was wrong before.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        if self._head is not None:
            raise self._broken(
                f"the connection was closed after {self._filled} of "
                f"{len(self._payload)} bytes of a frame of type {self._head[0]}"
            )
        if self._staged:
            raise self._broken(
                f"the connection was closed after {self._staged} bytes of a header"
            )

    def _unpack_stage(self) -> list[RawFrame]:
        """Take every whole frame off the stage, and the beginning of a longer one."""
        frames: list[RawFrame] = []
        at, end = 0, self._staged
        while end - at >= HEADER.size:
            type, flags, reserved, length, crc = HEADER.unpack_from(self._stage, at)
            self._check(type, flags, reserved, length)
            at += HEADER.size
            if length > end - at:
                self._head = (type, flags, crc)
                self._payload = memoryview(bytearray(length))
                self._filled = end - at
                self._payload[: self._filled] = self._stage[at:end]
                at = end
                break
            payload = bytes(self._stage[at : at + length])
            frames.append(self._finished(type, flags, crc, payload))
            at += length
        self._staged = end - at
        if at and self._staged:
            self._stage[: self._staged] = bytes(self._stage[at:end])
        return frames

    def _check(self, type: int, flags: int, reserved: int, length: int) -> None:
        if not type or reserved or flags & ~ZSTD:
            raise self._broken(
                f"expected a frame, got type {type}, flags {flags:#04x} and "
                f"reserved {reserved:#06x}"
            )
        if length > self.limit:
            raise self._broken(
                f"a frame of type {type} announces {length} bytes, at most "
                f"{self.limit} are taken"
            )

    def _finished(
        self, type: int, flags: int, crc: int, payload: bytes | memoryview
    ) -> RawFrame:
        self._head = None
        self._payload = memoryview(b"")
        got = crc32(payload)
        if got != crc:
            raise self._broken(
                f"a frame of type {type} and {len(payload)} bytes was damaged: its "
                f"CRC-32 is {got:#010x}, announced was {crc:#010x}"
            )
        if flags & ZSTD:
            payload = self._decompressed(type, payload)
        return RawFrame(type, payload)

    def _decompressed(self, type: int, payload: bytes | memoryview) -> bytes:
        """Decompress within the limit: the size is known before a byte is made."""
        # Skippable frames have other magics; they would be nothing, at some length.
        if bytes(payload[:4]) != zstandard.FRAME_HEADER:
            raise self._broken(f"a frame of type {type} is flagged zstd and isn't")
        try:
            size = zstandard.get_frame_parameters(payload).content_size
            # CONTENTSIZE_UNKNOWN is the largest number there is, so it fails here too.
            if size > self.limit:
                raise self._broken(
                    f"a frame of type {type} would grow beyond {self.limit} bytes or "
                    "doesn't say its size"
                )
            data = self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._broken(
                f"a frame of type {type} can't be decompressed: {error}"
            ) from error
        if len(data) != size:
            raise self._broken(
                f"a frame of type {type} holds {len(data)} bytes, it announced {size}"
            )
        return data

    def _broken(self, text: str) -> RemoteProtocolError:
        self._error = f"DR channel: {text}"
        return RemoteProtocolError(self._error)
