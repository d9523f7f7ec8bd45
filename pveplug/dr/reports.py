# SPDX-License-Identifier: Apache-2.0
"""Where the reports of replication go: into the Bacula job, or to a person."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from pveplug.bacula import BaculaSession, FileInfo
from pveplug.images.manifest import job_directory


class BaculaReports:
    """The job's log, and a file ``dr-MODE.json`` per VM beside where its images are."""

    def __init__(self, session: BaculaSession) -> None:
        self._session = session

    def info(self, text: str) -> None:
        self._session.info(text)

    def warning(self, text: str) -> None:
        self._session.warning(text)

    def error(self, text: str) -> None:
        self._session.error(text)

    async def report(self, vmid: int, uuid: str, values: Mapping[str, Any]) -> None:
        content = _text(values)
        directory = job_directory(vmid, uuid, self._session.job.name)
        info = FileInfo(
            f"{directory}/dr-{values['mode']}.json",
            len(content),
            mtime=int(time.time()),
        )
        async with self._session.file(info, offsets=False) as out:
            await out.write(0, content)


class TerminalReports:
    """Lines on standard output, warnings and errors on standard error.

    With ``as_json`` the lines go to standard error, and ``values`` are kept for the
    caller to print as one document; ``quiet`` leaves the lines out.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._lines = sys.stderr if as_json else sys.stdout
        self._quiet = quiet
        self.values: list[Mapping[str, Any]] = []

    def info(self, text: str) -> None:
        if not self._quiet:
            self._lines.write(f"{text}\n")
            self._lines.flush()

    def warning(self, text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")

    def error(self, text: str) -> None:
        sys.stderr.write(f"error: {text}\n")

    async def report(self, vmid: int, uuid: str, values: Mapping[str, Any]) -> None:
        self.values.append({"vmid": vmid, "uuid": uuid, **values})


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
