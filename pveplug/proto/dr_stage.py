# SPDX-License-Identifier: Apache-2.0
"""A staged increment, byte by byte: records one after another, the last tells all.

::

    magic 8    "PVSTAGE1"
    record     kind u8 · flags u8 · disk u32 · offset u64 · length u64 · stored u32
               · crc32 u32 (of the fields before it and the payload) · payload
    …
    trailer    a record whose payload is JSON: frames, bytes, and of each disk what a
               RunDigest of its frames says; nothing follows

Integers are big-endian. A file that was cut has no trailer; a changed bit is in a
record that its crc32 covers, a lost or doubled record is in its disk's digest.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import zstandard

from pveplug.errors import IntegrityError
from pveplug.proto.dr_digest import RunDigest
from pveplug.proto.dr_frames import MAX_BLOCK, Block, Buffer, Zero
from pveplug.units import KiB, MiB

MAGIC: Final = b"PVSTAGE1"
_FIELDS: Final = struct.Struct(">BBIQQI")
_CRC: Final = struct.Struct(">I")
HEADER: Final = _FIELDS.size + _CRC.size
MAX_META: Final = 2 * MiB
_BLOCK, _ZERO, _META, _TRAILER = 1, 2, 3, 4
_ZSTD: Final = 1
_TRY_FROM: Final = 4 * KiB
_MAX_OFFSET: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Run:
    """What a stage holds of one disk; see :class:`RunDigest`."""

    frames: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Meta:
    """What the stage's owner wants to find beside the frames."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last record: what must have come before it."""

    frames: int
    bytes: int
    disks: Mapping[int, Run] = field(default_factory=dict)


Record = Block | Zero | Meta | Trailer


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a record; ``stored`` bytes of payload follow it."""

    kind: int
    flags: int
    number: int
    offset: int
    length: int
    stored: int
    crc: int
    seed: int
    """The crc32 of the fields, to be continued over the payload."""


class Encoder:
    """Turns frames into records; not for two threads at a time."""

    def __init__(self, *, compress: bool = True) -> None:
        self._zstd = zstandard.ZstdCompressor(level=1) if compress else None

    def frame(self, frame: Block | Zero) -> list[Buffer]:
        """Return the record of a frame as buffers to be written in order."""
        if isinstance(frame, Zero):
            return _record(_ZERO, 0, frame.number, frame.offset, frame.length, b"")
        length = len(frame.data)
        stored, flags = frame.data, 0
        if self._zstd is not None and length >= _TRY_FROM:
            packed = self._zstd.compress(frame.data)
            if len(packed) <= length - length // 8:
                stored, flags = packed, _ZSTD
        return _record(_BLOCK, flags, frame.number, frame.offset, length, stored)

    def meta(self, values: Mapping[str, Any]) -> list[Buffer]:
        """Return the record of what the owner wants to find again."""
        return _json_record(_META, values)

    def trailer(self, trailer: Trailer) -> list[Buffer]:
        """Return the last record."""
        disks = {
            str(number): [run.frames, run.bytes, run.digest]
            for number, run in trailer.disks.items()
        }
        return _json_record(
            _TRAILER,
            {"frames": trailer.frames, "bytes": trailer.bytes, "disks": disks},
        )


class Decoder:
    """Turns records back; not for two threads at a time."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def header(self, data: Buffer) -> Header:
        """Read the ``HEADER`` bytes of a record.

        Raises:
            IntegrityError: it is cut, or says what no record says.
        """
        if len(data) != HEADER:
            raise IntegrityError("the staged increment ends within a record")
        view = memoryview(data)
        kind, flags, number, offset, length, stored = _FIELDS.unpack_from(view)
        (crc,) = _CRC.unpack_from(view, _FIELDS.size)
        good = flags in (0, _ZSTD) and offset <= _MAX_OFFSET and length <= _MAX_OFFSET
        match kind:
            case 1:
                good = good and 0 < length <= MAX_BLOCK and 0 < stored <= length
                good = good and (flags == _ZSTD or stored == length)
            case 2:
                good = good and length > 0 and not stored and not flags
            case 3 | 4:
                good = good and stored <= MAX_META and stored == length and not flags
            case _:
                good = False
        if not good:
            raise IntegrityError(f"the staged increment has a damaged record ({kind})")
        seed = zlib.crc32(view[: _FIELDS.size])
        return Header(kind, flags, number, offset, length, stored, crc, seed)

    def record(self, header: Header, payload: Buffer) -> Record:
        """Return the record of a header and its payload.

        Raises:
            IntegrityError: it is cut or damaged.
        """
        if len(payload) != header.stored:
            raise IntegrityError("the staged increment ends within a record")
        if zlib.crc32(payload, header.seed) != header.crc:
            raise IntegrityError("the staged increment is damaged: a crc32 differs")
        if header.kind == _ZERO:
            return Zero(header.number, header.offset, header.length)
        if header.kind == _BLOCK:
            data = payload
            if header.flags == _ZSTD:
                try:
                    data = self._zstd.decompress(payload, header.length)
                except zstandard.ZstdError as error:
                    raise IntegrityError(f"the staged increment: {error}") from error
            if len(data) != header.length:
                raise IntegrityError("the staged increment has a block of another size")
            return Block(header.number, header.offset, data)
        try:
            values = json.loads(bytes(payload))
            if header.kind == _META:
                return Meta(dict(values))
            disks = {int(n): Run(*run) for n, run in values["disks"].items()}
            return Trailer(int(values["frames"]), int(values["bytes"]), disks)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"the staged increment's end: {error}") from error


class Tally:
    """Counts and digests what passes, per disk and all in all."""

    def __init__(self) -> None:
        self.disks: dict[int, RunDigest] = {}

    def add(self, frame: Block | Zero) -> None:
        """Take one frame."""
        self.disks.setdefault(frame.number, RunDigest()).add(frame)

    def run(self, number: int) -> Run:
        """Return what has come of a disk; of one that had no frames: nothing."""
        found = self.disks.get(number) or RunDigest()
        return Run(found.frames, found.bytes, found.hexdigest())

    def trailer(self) -> Trailer:
        """Return what a trailer would say."""
        return Trailer(
            sum(run.frames for run in self.disks.values()),
            sum(run.bytes for run in self.disks.values()),
            {number: self.run(number) for number in sorted(self.disks)},
        )


def _record(
    kind: int, flags: int, number: int, offset: int, length: int, payload: Buffer
) -> list[Buffer]:
    fields = _FIELDS.pack(kind, flags, number, offset, length, len(payload))
    crc = zlib.crc32(payload, zlib.crc32(fields))
    head = fields + _CRC.pack(crc)
    return [head, payload] if payload else [head]


def _json_record(kind: int, values: Mapping[str, Any]) -> list[Buffer]:
    text = json.dumps(values, separators=(",", ":")).encode()
    if len(text) > MAX_META:
        raise IntegrityError(f"{len(text)} bytes are too much beside an increment")
    return _record(kind, 0, 0, 0, len(text), text)
