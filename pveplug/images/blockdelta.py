# SPDX-License-Identifier: Apache-2.0
"""The neutral block-delta container: docs/protocols/block-delta.md.

For increments whose own format isn't published: whoever can read such a format writes
this one.

::

    header      64 bytes, JSON, CRC-32 of both
    extent      32 bytes, then its data if it has any        as many as there are
    trailer     32 bytes, SHA-256 of everything before
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from pveplug.errors import LocalProtocolError
from pveplug.images.clusters import MAX_SIZE
from pveplug.images.stream import (
    Flow,
    GuestParent,
    GuestZero,
    ImageInfo,
    ParentLink,
    StreamReader,
)
from pveplug.units import SECTOR, KiB, MiB

MAGIC: Final = b"PVEDELTA"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQII32s")
"""magic, version, length of the JSON, disk size, sector size, reserved, reserved."""
RECORD: Final = struct.Struct("<4sIQQII")
"""kind, reserved, offset, length, CRC-32 of the data, CRC-32 of this record before."""
TRAILER: Final = struct.Struct("<4sIQQII")
"""kind, reserved, number of extents, bytes of data, reserved, CRC-32 as a record."""
DATA: Final = b"DATA"
ZERO: Final = b"ZERO"
END: Final = b"END\0"
MAX_JSON: Final = 64 * KiB
MAX_EXTENT: Final = MiB
CRC_AT: Final = 28


@dataclass(frozen=True, slots=True)
class DeltaHeader:
    """What a container says of itself.

    Attributes:
        size: of the disk, in bytes; ``sector``: 512 or 4096.
        disk: an identifier of the disk, for people.
        identity: of the state that this delta leads to: what a child names.
        parent: identity of the state that it is put upon; None for a full copy.
        origin: what made the original increment, for people.
    """

    size: int
    disk: str
    identity: str
    parent: str | None
    sector: int = SECTOR
    origin: str = ""


class BlockDeltaWriter:
    """Makes a container: :meth:`begin`, extents in order, :meth:`end`.

    Each returns bytes to write.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._extents = self._bytes = self._at = self._size = 0
        self._sector = SECTOR

    def begin(self, header: DeltaHeader) -> bytes:
        if not 0 < header.size <= MAX_SIZE or header.size % header.sector:
            raise LocalProtocolError(f"a delta of a disk of {header.size} bytes")
        self._size, self._sector = header.size, header.sector
        text = json.dumps(
            {
                "disk": header.disk,
                "identity": header.identity,
                "parent": header.parent,
                "origin": header.origin,
            },
            sort_keys=True,
        ).encode()
        if len(text) > MAX_JSON:
            raise LocalProtocolError("the delta's names are too long")
        fixed = HEADER.pack(
            MAGIC, VERSION, len(text), header.size, header.sector, 0, bytes(32)
        )
        return self._sent(fixed + text + struct.pack("<I", zlib.crc32(fixed + text)))

    def data(self, offset: int, data: bytes) -> bytes:
        """Return the extent of ``data``, at most MAX_EXTENT bytes of whole sectors."""
        if len(data) > MAX_EXTENT:
            raise LocalProtocolError(f"an extent of {len(data)} bytes")
        self._bytes += len(data)
        return self._record(DATA, offset, len(data), zlib.crc32(data)) + self._sent(
            data
        )

    def zero(self, offset: int, length: int) -> bytes:
        """Return the extent of zeroes."""
        return self._record(ZERO, offset, length, 0)

    def end(self) -> bytes:
        raw = TRAILER.pack(END, 0, self._extents, self._bytes, 0, 0)
        raw = self._sent(raw[:CRC_AT] + struct.pack("<I", zlib.crc32(raw[:CRC_AT])))
        return raw + self._digest.digest()

    def _record(self, kind: bytes, offset: int, length: int, crc: int) -> bytes:
        end = offset + length
        if offset < self._at or end > self._size or length <= 0:
            raise LocalProtocolError(f"an extent at {offset} of {length} bytes")
        if offset % self._sector or length % self._sector:
            raise LocalProtocolError(f"an extent at {offset} of {length} bytes")
        self._at = end
        self._extents += 1
        raw = RECORD.pack(kind, 0, offset, length, crc, 0)
        return self._sent(raw[:CRC_AT] + struct.pack("<I", zlib.crc32(raw[:CRC_AT])))

    def _sent(self, data: bytes) -> bytes:
        self._digest.update(data)
        return data


class BlockDeltaReader(StreamReader):
    """Tells a container; what it doesn't mention is the parent's."""

    format = "block-delta"

    def _run(self) -> Flow[None]:
        self._digest = hashlib.sha256()
        fixed = yield from self._read(HEADER.size)
        magic, version, length, size, sector, _, _ = HEADER.unpack(fixed)
        if magic != MAGIC:
            raise self._error(0, "this is not a block-delta container")
        if version != VERSION:
            raise self._error(8, f"version {version}")
        if length > MAX_JSON:
            raise self._error(12, f"a description of {length} bytes")
        text = yield from self._read(length)
        (crc,) = struct.unpack("<I", (yield from self._read(4)))
        if crc != zlib.crc32(fixed + text):
            raise self._error(self.position - 4, "the header's checksum is wrong")
        if sector not in (512, 4096) or size % sector:
            raise self._error(24, f"sectors of {sector} bytes, a disk of {size}")
        info = self._describe(text, size, sector)
        self._begin(info, 16)
        hole = GuestZero if info.parent is None else GuestParent
        at = extents = total = 0
        self._what = "extents"
        while True:
            start = self.position
            raw = yield from self._read(RECORD.size)
            kind, reserved, offset, length, crc, own = RECORD.unpack(raw)
            if own != zlib.crc32(raw[:CRC_AT]):
                raise self._error(start, "an extent's own checksum is wrong")
            if kind == END:
                break
            if kind not in (DATA, ZERO) or reserved:
                raise self._error(start, f"an extent of kind {kind!r}")
            if (
                offset < at
                or not 0 < length <= size - offset
                or offset % sector
                or length % sector
            ):
                raise self._error(start, f"an extent at {offset} of {length} bytes")
            if offset > at:
                self._tell(hole(at, offset - at))
            if kind == ZERO:
                self._tell(GuestZero(offset, length))
            elif length > MAX_EXTENT:
                raise self._error(start, f"data of {length} bytes in one extent")
            else:
                data = yield from self._read(length)
                if zlib.crc32(data) != crc:
                    raise self._error(start, "an extent's data has a wrong checksum")
                self._tell_data(offset, memoryview(data), made=True)
                total += length
            extents += 1
            at = offset + length
            yield from self._breathe()
        if (offset, length) != (extents, total):
            raise self._error(
                start,
                f"{extents} extents with {total} bytes came, the trailer says {offset} "
                f"with {length}",
            )
        digest = self._digest.digest()
        if (yield from self._take(len(digest))) != digest:
            raise self._error(start, "the container's digest is wrong")
        if not (yield from self._ended()):
            raise self._error(self.position, "something follows the trailer")
        if at < size:
            self._tell(hole(at, size - at))
        yield from self._finish(info)

    def _read(self, length: int) -> Flow[bytes]:
        data = yield from self._take(length)
        self._digest.update(data)
        return data

    def _describe(self, text: bytes, size: int, sector: int) -> ImageInfo:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._error(HEADER.size, "the description is not a JSON object")
        identity, parent = found.get("identity"), found.get("parent")
        if not isinstance(identity, str) or not isinstance(parent, str | None):
            raise self._error(HEADER.size, "the description lacks an identity")
        link = None if parent is None else ParentLink("digest", (parent,))
        kind = "full" if link is None else "delta"
        return ImageInfo("block-delta", kind, size, sector, identity, link)
