# SPDX-License-Identifier: Apache-2.0
"""Where an image's bytes wait whose place on the disk isn't known yet."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType
from typing import BinaryIO, Final, Self

from pveplug.errors import IntegrityError
from pveplug.units import GiB

SPILL: Final = 4 * GiB


class FileSpill:
    """An unnamed temporary file, made when it is needed; a context manager.

    Args:
        directory: where; the system's own place where that isn't there.
        limit: bytes it may hold.
    """

    def __init__(self, directory: str | None = None, limit: int = SPILL) -> None:
        self.limit = limit
        self._directory = directory
        self._file: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, data: memoryview) -> int:
        """Keep bytes; return where.

        Raises:
            IntegrityError: there is no room for them.
        """
        at = self._end
        try:
            if self._file is None:
                where = self._directory
                if where is not None and not os.path.isdir(where):
                    where = None
                self._file = tempfile.TemporaryFile(prefix="pveplug-spill-", dir=where)
            self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            raise IntegrityError(
                f"bytes whose place comes later can't wait in {where}: "
                f"{error.strerror or error}"
            ) from error
        self._end += len(data)
        return at

    def read(self, offset: int, length: int) -> bytes:
        """Return what was kept."""
        if self._file is None:
            return b""
        self._file.flush()
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        """Forget all."""
        if self._file is not None:
            self._file.close()
            self._file = None
