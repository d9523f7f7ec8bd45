# SPDX-License-Identifier: Apache-2.0
"""``pveplug verify``: restored files against their digests; see docs/cli.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any, Final

from pveplug.units import human
from pveplug.verify import DAMAGED, MISSING, OK, UNPROVEN, Finding, Verify

EX_OK: Final = 0
EX_DAMAGED: Final = 65
"""EX_DATAERR of sysexits(3)."""
EX_NOTHING: Final = 66
"""EX_NOINPUT."""

STEP_S: Final = 0.5


def add_parser(commands: Any, summary: str) -> None:
    """Add the command's arguments to ``pveplug``'s."""
    parser = commands.add_parser(
        "verify",
        help=summary,
        description="Read files of backups that Bacula restored into a directory, and "
        "say of each whether it is what was backed up, or where it isn't.",
        epilog="Exit status: 0 all is well; 65 something is damaged or missing; 66 "
        "there is no file of a backup at one of the places.",
    )
    parser.add_argument("paths", nargs="+", metavar="FILE|DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="only say what is wrong"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify, and return the exit status."""
    terminal = sys.stderr.isatty()
    shown = _Progress() if terminal else None

    def found(finding: Finding) -> None:
        if shown:
            shown.clear()
        if not arguments.json and not (arguments.quiet and finding.good):
            _write(_line(finding))

    verify = Verify(
        arguments.paths,
        on_finding=found,
        on_progress=lambda: shown.show(verify) if shown else None,
    )
    verify.run()
    if verify.count(DAMAGED) or verify.count(MISSING):
        status = EX_DAMAGED
    elif verify.nothing_at or not verify.findings:
        status = EX_NOTHING
    else:
        status = EX_OK
    if arguments.json:
        _write(json.dumps(_report(verify, status), indent=1))
    elif verify.findings:
        _write(_summary(verify))
    for path in verify.nothing_at:
        sys.stderr.write(f"pveplug: {_plain(path)}: no file of a backup is there\n")
    return status


def _line(finding: Finding) -> str:
    where = f"disk {finding.disk}: " if finding.disk and not finding.good else ""
    text = f"{finding.state.upper():<9}{finding.path}"
    said = f"{where}{finding.text}"
    return f"{text}: {said}" if said else text


def _summary(verify: Verify) -> str:
    counts = [
        f"{verify.count(state)} {state}"
        for state in (OK, UNPROVEN, DAMAGED, MISSING)
        if state in (OK, DAMAGED) or verify.count(state)
    ]
    jobs = "1 job" if verify.jobs == 1 else f"{verify.jobs} jobs"
    return f"{jobs}, {human(verify.done)} of images read: {', '.join(counts)}"


def _report(verify: Verify, status: int) -> dict[str, object]:
    verdict = {EX_OK: "good", EX_DAMAGED: "damaged", EX_NOTHING: "nothing"}[status]
    return {
        "verdict": verdict,
        "jobs": verify.jobs,
        "bytes_read": verify.done,
        "nothing_at": verify.nothing_at,
        "files": [dataclasses.asdict(finding) for finding in verify.findings],
    }


def _plain(text: str) -> str:
    """Return a text that any terminal takes: a file's name may be no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write(text: str) -> None:
    sys.stdout.write(_plain(text) + "\n")
    sys.stdout.flush()


class _Progress:
    """A line on a terminal's standard error, written over again and again."""

    def __init__(self) -> None:
        self._width = 0
        self._next = time.monotonic() + STEP_S

    def show(self, verify: Verify) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + STEP_S
        percent = 100 * verify.done // verify.total if verify.total else 100
        text = f"{human(verify.done)} of {human(verify.total)}, {percent} %"
        self._width = max(self._width, len(text))
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._width:
            sys.stderr.write(f"\r{'':<{self._width}}\r")
            self._width = 0
