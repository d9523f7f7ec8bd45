# SPDX-License-Identifier: Apache-2.0
"""A verdict as the job log's lines, as JSON and as a text to read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from pveplug.proving.verdict import Verdict

FORMAT: Final = "pveplug-prove-1"
_MAX_LOG_LINES: Final = 8


@dataclass(frozen=True, slots=True)
class ChainMember:
    """One job of the chain that was restored."""

    jobid: int
    level: str = ""
    job: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What was proven, or wasn't.

    Attributes:
        vmid, name: of the VM that was backed up.
        proved_as: id of the VM that was made for it.
        job: name of the backup job; ``chain``: its jobs, the Full first.
        started, ended: when the proof began and ended, ISO 8601 with time zone.
        restore_s: seconds from the restore's start to the VM's.
    """

    vmid: int
    name: str
    job: str
    chain: tuple[ChainMember, ...]
    started: str
    ended: str
    proved_as: int = 0
    restore_s: float = 0.0

    @property
    def file_name(self) -> str:
        """Name of the report's files without a suffix: ``100-20260314T031500Z``."""
        started = self.started.replace("+00:00", "Z")
        moment = re.sub(r"[^0-9A-Za-z]", "", started)[:24] or "undated"
        return f"{self.vmid}-{moment}"


def summary(subject: Subject, verdict: Verdict) -> str:
    """Return the one line that says it all."""
    return (
        f"prove VM {subject.vmid} ({subject.name}), {subject.job} "
        f"{_jobids(subject)}: {verdict.outcome.value.upper()}: {verdict.reason}"
    )


def log_lines(subject: Subject, verdict: Verdict) -> list[str]:
    """Return the lines for the job log; the first is :func:`summary`."""
    lines = [summary(subject, verdict)]
    for one in verdict.found:
        asked = "" if one.kind in verdict.wanted.evidence else " (not asked for)"
        lines.append(
            f"evidence {one.kind.value} after {one.after_s:.1f} s: {one.what}{asked}"
        )
    if shot := verdict.screenshot:
        lines.append(
            f"last screen {shot.width}x{shot.height}, SHA-256 of its PNG {shot.sha256}"
        )
    lines += [f"note: {note}" for note in verdict.notes]
    if not verdict.passed:
        lines += [f"screen: {line}" for line in _last_text(verdict)]
        lines += [
            f"serial: {line.strip()}" for line in verdict.last_lines[-_MAX_LOG_LINES:]
        ]
    return [_printable(line) for line in lines]


def as_json(subject: Subject, verdict: Verdict, picture: str | None) -> str:
    """Return the report as JSON; ``docs/prove.md`` describes it.

    Args:
        subject: what was proven.
        verdict: what came of it.
        picture: name of the picture's file beside the report.
    """
    shot = verdict.screenshot
    value: dict[str, Any] = {
        "format": FORMAT,
        "verdict": verdict.outcome.value,
        "reason": verdict.reason,
        "vmid": subject.vmid,
        "name": subject.name,
        "proved_as": subject.proved_as or None,
        "job": subject.job,
        "chain": [
            {"jobid": one.jobid, "level": one.level, "job": one.job}
            for one in subject.chain
        ],
        "started": subject.started,
        "ended": subject.ended,
        "restore_seconds": round(subject.restore_s, 3),
        "watch_seconds": round(verdict.seconds, 3),
        "wanted": {
            "evidence": sorted(kind.value for kind in verdict.wanted.evidence),
            "every": verdict.wanted.every,
            "serial": verdict.wanted.serial or None,
            "timeout_seconds": verdict.wanted.timeout_s,
            "stable_seconds": verdict.wanted.stable_s,
        },
        "evidence": [
            {
                "kind": one.kind.value,
                "after_seconds": round(one.after_s, 3),
                "what": one.what,
            }
            for one in verdict.found
        ],
        "screenshot": {
            "file": picture,
            "sha256": shot.sha256,
            "width": shot.width,
            "height": shot.height,
            "text": list(shot.text),
        }
        if shot
        else None,
        "serial": {
            "first_lines": list(verdict.first_lines),
            "last_lines": list(verdict.last_lines),
        },
        "notes": list(verdict.notes),
    }
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


def as_text(subject: Subject, verdict: Verdict, picture: str | None) -> str:
    """Return the report for people; arguments as for :func:`as_json`."""
    rows = [
        ("verdict", verdict.outcome.value),
        ("reason", verdict.reason),
        ("VM", f"{subject.vmid} ({subject.name})"),
        ("backup job", f"{subject.job} {_jobids(subject)}"),
        ("wanted", f"{verdict.wanted}, within {verdict.wanted.timeout_s:g} s"),
        ("started", subject.started),
        ("ended", subject.ended),
        ("restore", f"{subject.restore_s:.1f} s until the VM was started"),
        ("watch", f"{verdict.seconds:.1f} s"),
    ]
    rows += [
        (f"{one.kind.value} after", f"{one.after_s:.1f} s: {one.what}")
        for one in verdict.found
    ]
    if shot := verdict.screenshot:
        rows.append(("screen", f"{picture}, {shot.width} x {shot.height}"))
        rows.append(("SHA-256", shot.sha256))
    rows += [("note", note) for note in verdict.notes]
    lines = [f"{key + ':':<14}{value}" for key, value in rows]
    readable = shot.text if shot else ()
    for title, block in (
        ("Text on the last screen", readable),
        ("Serial console, first lines", verdict.first_lines),
        ("Serial console, last lines", verdict.last_lines),
    ):
        if any(line.strip("\ufffd ") for line in block):
            lines += ["", f"{title}:", *(f"  {line}" for line in block)]
    return "\n".join(_printable(line) for line in lines) + "\n"


def _jobids(subject: Subject) -> str:
    ids = ", ".join(str(one.jobid) for one in subject.chain)
    return f"JobId {ids}" if ids else "without JobIds"


def _last_text(verdict: Verdict) -> list[str]:
    shot = verdict.screenshot
    lines = [
        line.replace("\ufffd", " ").strip()
        for line in (shot.text if shot else ())
        if _is_words(line)
    ]
    return lines[-_MAX_LOG_LINES:]


def _is_words(line: str) -> bool:
    """Whether more than half of what stands in a line could be read."""
    filled = line.replace(" ", "")
    return bool(filled) and 2 * filled.count("\ufffd") < len(filled)


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)[:1000]
