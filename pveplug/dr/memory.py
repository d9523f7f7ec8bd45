# SPDX-License-Identifier: Apache-2.0
"""What the source's node remembers of a replica: the epoch it last replicated in.

One small file per source VM and receiver, ``<state_dir>/dr/<uuid>@<host>_<port>.json``.
Each failover raises the replica's epoch, so a source that was given up for lost and
comes back is told by its old one. A file that is gone makes the node a stranger: the
receiver then takes it only if there never was a failover.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Final

from pveplug.errors import JobError
from pveplug.journal import sync_directory

_STRANGE: Final = re.compile(r"[^A-Za-z0-9.-]")


class EpochMemory:
    """Of one replica; reads and writes block for a moment."""

    def __init__(self, state_dir: str, uuid: str, host: str, port: int) -> None:
        name = f"{_STRANGE.sub('_', uuid)}@{_STRANGE.sub('_', host)}_{port}.json"
        self._path = Path(state_dir) / "dr" / name

    def recall(self) -> int | None:
        """Return the epoch, None where it is not known.

        Raises:
            JobError: the file is damaged; it is not taken for a missing one.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        try:
            epoch = json.loads(text)["epoch"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._unreadable("it is damaged") from error
        if type(epoch) is not int or epoch < 1:
            raise self._unreadable("it is damaged")
        return epoch

    def remember(self, epoch: int) -> None:
        """Keep the epoch; it is on disk when this returns.

        Raises:
            JobError: it could not be written.
        """
        text = json.dumps({"epoch": epoch}) + "\n"
        temporary = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            raise JobError(
                f"cannot write {self._path}: {error.strerror or error}.",
                phase="epoch",
                remedy="make room there; then run the job again.",
            ) from error

    def _unreadable(self, why: str) -> JobError:
        return JobError(
            f"cannot read {self._path}: {why}.",
            phase="epoch",
            remedy="remove it and run one cycle with dr_takeover=yes.",
        )
