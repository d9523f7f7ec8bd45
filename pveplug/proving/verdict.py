# SPDX-License-Identifier: Apache-2.0
"""What is asked of a boot, and what came of it."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from pveplug.errors import ConfigError

MAX_PATTERN: Final = 400


class Evidence(enum.Enum):
    """What shows that a guest is up."""

    AGENT = "agent"
    SERIAL = "serial"
    SCREEN = "screen"


class Outcome(enum.Enum):
    """Only ``PASSED`` is a proof; the other two fail the job."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_PROVEN = "not proven"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to be seen, and by when.

    Attributes:
        evidence: one or more kinds.
        every: all of them; False: the first of them is enough.
        serial: regular expression (Python's), matched against single lines of the
            serial console; needed for ``Evidence.SERIAL``.
        timeout_s: seconds from the start of the watch.
        stable_s: seconds for which a screen must stay as it is.
    """

    evidence: frozenset[Evidence]
    every: bool = True
    serial: str = ""
    timeout_s: float = 300.0
    stable_s: float = 30.0

    def __post_init__(self) -> None:
        """Raise ConfigError for what could never be met, or proves nothing."""
        if not self.evidence:
            raise ConfigError(
                "prove_evidence names no evidence; agent, serial and screen are known",
                key="prove_evidence",
            )
        if self.timeout_s <= 0 or self.stable_s < 0:
            raise ConfigError("prove_timeout must be positive", key="prove_timeout")
        if Evidence.SERIAL in self.evidence:
            check_pattern(self.serial)

    def is_met(self, found: frozenset[Evidence]) -> bool:
        """Whether these kinds of evidence are enough."""
        if self.every:
            return self.evidence <= found
        return bool(self.evidence & found)

    def __str__(self) -> str:
        """Return ``agent and serial`` or ``agent or screen``."""
        names = [kind.value for kind in Evidence if kind in self.evidence]
        return (" and " if self.every else " or ").join(names)


def check_pattern(pattern: str) -> None:
    """Raise ConfigError unless the pattern can be a proof.

    That it can take for ever on some line isn't seen here: see ``ir/matcher.py``.
    """
    if not pattern:
        raise ConfigError(
            "evidence from the serial console needs prove_serial=REGEX, the text that "
            "shows that the guest is up, e.g. prove_serial=login:",
            key="prove_serial",
        )
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(
            f"prove_serial is longer than {MAX_PATTERN} characters", key="prove_serial"
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"prove_serial is no regular expression: {error}", key="prove_serial"
        ) from error
    if compiled.search(""):
        raise ConfigError(
            "prove_serial matches an empty line, so it would prove nothing",
            key="prove_serial",
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A piece of evidence.

    Attributes:
        after_s: seconds from the start of the watch.
        what: one line: the text that matched, how long the screen was stable.
    """

    kind: Evidence
    after_s: float
    what: str


@dataclass(frozen=True, slots=True)
class Screenshot:
    """The last picture of the screen, as a PNG file.

    Attributes:
        path: where it is; moves with the report.
        sha256: of the file, in hexadecimal.
        text: lines that could be read on it.
    """

    path: str
    sha256: str
    width: int
    height: int
    text: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a boot.

    Attributes:
        reason: one line: why it is so.
        found: evidence in the order it came, also what wasn't asked for.
        seconds: how long the watch took.
        notes: what else the reader should know, a line each.
        first_lines, last_lines: of the serial console, printable and bounded.
    """

    outcome: Outcome
    reason: str
    wanted: Wanted
    found: tuple[Found, ...] = ()
    seconds: float = 0.0
    screenshot: Screenshot | None = None
    notes: tuple[str, ...] = ()
    first_lines: tuple[str, ...] = ()
    last_lines: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the backup is proven."""
        return self.outcome is Outcome.PASSED
