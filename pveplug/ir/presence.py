# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a disk are here: the two maps of a landing, as files.

::

    durable map, beside the data        live map, below /run
      0  magic      "pveLandM"            0  magic      "pveLandL"
      8  version    1                     8  version    1
     10  cluster bits                    10  cluster bits
     11  flags      1: the data file     11  flags      as in the durable map
                    bears the instance
     12  zero                            12  zero
     16  disk size                       16  disk size
     24  instance   16 random bytes      24  instance   the same
     40  zero                            40  boot       the kernel's boot id
     64  a byte per cluster              64  a byte per cluster, mapped by everybody
      …  BLAKE3 of all before it

Numbers are little-endian. The durable map is replaced as a whole; the live one is
changed in place, byte by byte, and counts only until the machine goes down.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import struct
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.journal import sync_directory

HEAD: Final = 64
VERSION: Final = 1
TAGGED: Final = 1
"""Flag: the data file bears the instance as an extended attribute."""
DIGEST: Final = 32
MIN_CLUSTER_BITS: Final = 12
MAX_CLUSTER_BITS: Final = 20
_HEADER: Final = struct.Struct("<8sHBB4xQ16s16s8x")
_DURABLE: Final = b"pveLandM"
_LIVE: Final = b"pveLandL"
_NOBODY: Final = bytes(16)
_MARKS: Final = b"\0\1\2"
WINDOW: Final = 1 << 20
"""Clusters looked at in one go, so that a big disk costs no copy of its whole map."""

RUN: Final = re.compile(rb"\x00+|\x01+|\x02+")
"""Matches a run of one mark; what it doesn't match is no mark."""


class Mark(enum.IntEnum):
    """What a byte of a map says."""

    OWED = 0  # not here yet, or not known to be
    DATA = 1  # in the data file, and final
    ZERO = 2  # reads as zeroes whatever the data file has there, and final


@dataclass(frozen=True, slots=True)
class Header:
    """What both maps begin with; sizes in bytes."""

    size: int
    cluster_bits: int
    instance: bytes
    tagged: bool = False
    boot: bytes = _NOBODY

    @classmethod
    def new(cls, size: int, cluster_bits: int) -> Header:
        """Return the header of a landing that didn't exist before."""
        return cls(size, cluster_bits, uuid.uuid4().bytes)

    @property
    def clusters(self) -> int:
        return ((self.size - 1) >> self.cluster_bits) + 1

    def of_boot(self, boot: bytes) -> Header:
        return replace(self, boot=boot)

    def to_bytes(self) -> bytes:
        flags = TAGGED if self.tagged else 0
        magic = _DURABLE if self.boot == _NOBODY else _LIVE
        return _HEADER.pack(
            *(magic, VERSION, self.cluster_bits, flags),
            *(self.size, self.instance, self.boot),
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, live: bool) -> Header:
        """Read a header.

        Raises:
            ValueError: it is none of ours; the text says why.
        """
        if len(data) < HEAD:
            raise ValueError(f"it ends after {len(data)} bytes")
        magic, version, bits, flags, size, instance, boot = _HEADER.unpack_from(data)
        if magic != (_LIVE if live else _DURABLE):
            raise ValueError(f"it begins with {magic!r}")
        if version != VERSION:
            raise ValueError(f"version {version} is not known here")
        if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS or not size:
            raise ValueError(f"a disk of {size} bytes in clusters of 2^{bits}")
        found = cls(size, bits, instance, bool(flags & TAGGED), boot)
        if (boot == _NOBODY) is live or found.to_bytes() != data[:HEAD]:
            raise ValueError("its header holds what no header has")
        return found


def boot_id() -> bytes:
    """Return what tells this boot of the machine from every other."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    return uuid.UUID(text.strip()).bytes


def read_durable(path: Path) -> tuple[Header, bytes]:
    """Return header and marks of a durable map.

    Raises:
        IntegrityError: it is damaged, or none of ours.
        OSError: it can't be read; FileNotFoundError where there is none.
    """
    raw = memoryview(path.read_bytes())
    try:
        header = Header.from_bytes(bytes(raw[:HEAD]), live=False)
        expected = HEAD + header.clusters + DIGEST
        if len(raw) != expected:
            raise ValueError(f"it has {len(raw)} bytes instead of {expected}")
        if blake3(raw[:-DIGEST]).digest() != raw[-DIGEST:]:
            raise ValueError("its digest is another")
        marks = bytes(raw[HEAD:-DIGEST])
        check_marks(marks)
    except ValueError as error:
        raise _damaged(
            f"landing map {path} is damaged or not ours: {error}",
            "remove this landing and start the recovery again",
        ) from None
    return header, marks


def write_durable(path: Path, header: Header, marks: bytes) -> None:
    """Replace a durable map; file and name are on stable storage afterwards."""
    head = header.to_bytes()
    digest = blake3(head)
    digest.update(marks)
    _replace(path, [head, marks, digest.digest()], sync=True)


def read_live(path: Path) -> tuple[Header, int] | None:
    """Return the header of a live map and how many clusters it has; None: no file.

    Raises:
        IntegrityError: it is damaged, or none of ours.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            header = Header.from_bytes(file.read(HEAD), live=True)
            if length != HEAD + header.clusters:
                raise ValueError(
                    f"it has {length} bytes instead of {HEAD + header.clusters}"
                )
            while piece := file.read(WINDOW):
                check_marks(piece)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(
            f"live map {path} is damaged or not ours: {error}",
            "stop what serves this landing and remove that file; what arrived since "
            "the last checkpoint is then fetched again",
        ) from None
    return header, header.clusters


def write_live(path: Path, header: Header, marks: bytes) -> None:
    """Replace a live map by a new one; the old one goes on for who has it open.

    Every byte is written, so that a full tmpfs says so now and not by SIGBUS.
    """
    _replace(path, [header.to_bytes(), marks], sync=False)


def check_marks(marks: bytes) -> None:
    """Raise ValueError where a byte is no mark."""
    if other := marks.translate(None, _MARKS):
        raise ValueError(f"it marks {len(other)} clusters with what is no mark")


def _damaged(what: str, remedy: str) -> IntegrityError:
    return IntegrityError(f"{what}. Remedy: {remedy}")


def _replace(path: Path, pieces: list[bytes], *, sync: bool) -> None:
    # The caller holds a lock: nobody else uses this name.
    new = path.with_name(f"{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    if sync:
        sync_directory(path.parent)
