# SPDX-License-Identifier: Apache-2.0
"""A tar archive, as an OVA is one: its files in a row, in one forward pass.

Nothing of it is written anywhere; names are only names.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO, Final

from pveplug.errors import IntegrityError
from pveplug.units import MiB

_MAGIC: Final = b"ustar"
_MAGIC_AT: Final = 257
_MAX_EXTENDED: Final = 1 * MiB
"""Longest extended header: tarfile takes all of one into memory."""
_EXTENDED: Final = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def is_archive(first: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar archive (POSIX.1)."""
    return first[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


class _DamagedError(Exception):
    """tarfile takes its own errors in a header for the end of the archive."""


class _Header(tarfile.TarInfo):
    """A header that is whole, and can't ask for memory without bound."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # it ends as it should
        except tarfile.HeaderError as error:
            raise _DamagedError(
                f"it ends without its end mark, or a header is bad: {error}"
            ) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDED and found.size > _MAX_EXTENDED:
            raise _DamagedError(f"an extended header of {found.size} bytes")
        return found


class Content:
    """The bytes of a file in an archive, forwards."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at its end.

        Raises:
            IntegrityError: the archive is cut.
        """
        try:
            return self._file.read(size)
        except tarfile.TarError as error:
            raise IntegrityError(
                f"{self._name}: the archive ends within it: truncated"
            ) from error


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive; read ``content`` before the next is asked for.

    Attributes:
        name: with the archive's own in front.
        size: in bytes.
        mtime: seconds since 1970.
    """

    name: str
    size: int
    mtime: int
    content: Content


def members(file: BinaryIO, name: str) -> Iterator[Member]:
    """Go through an archive's regular files, in their order.

    Args:
        name: of the archive, for errors.

    Raises:
        IntegrityError: it is damaged or cut.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as archive:
            for info in archive:
                content = archive.extractfile(info) if info.isreg() else None
                if content is None:
                    continue
                whole = f"{name}/{info.name}"
                if info.issparse() or info.size < 0:
                    raise _DamagedError(
                        f"{info.name} is stored with holes, or has no length"
                    )
                # An extended header may say that it was made at "inf".
                mtime = int(info.mtime) if math.isfinite(info.mtime) else 0
                found = Content(content, whole)
                yield Member(whole, info.size, mtime, found)
    except (tarfile.TarError, _DamagedError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{name}: a damaged tar archive: {error}") from error
