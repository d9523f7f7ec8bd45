# SPDX-License-Identifier: Apache-2.0
"""What a job tells the world.

Engines speak to a :class:`Reporter`; who listens (Bacula's job log through PTCOMM,
systemd's status line, a test) is decided where the engine is started.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Takes finished one-line texts, without a trailing newline."""

    def info(self, text: str) -> None:
        """Say what happens; the job goes on."""

    def warning(self, text: str) -> None:
        """Say what was degraded or left out; the job ends "OK -- with warnings"."""

    def error(self, text: str) -> None:
        """Say what failed without ending the job."""


class NullReporter:
    """A reporter for library callers who don't listen."""

    def info(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def error(self, text: str) -> None:
        pass


class ListReporter:
    """Keeps what was said as ``(kind, text)``, for tests and the command line."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, text: str) -> None:
        self.lines.append(("info", text))

    def warning(self, text: str) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str) -> None:
        self.lines.append(("error", text))
