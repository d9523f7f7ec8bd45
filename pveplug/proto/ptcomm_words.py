# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a PTCOMM session: what the texts in its packets say.

Command lines, ``STAT`` and ``TSTAMP``, the greeting with what both ends can do, and the
job's description. Everything that comes from the peer is checked here; what can't be
read is a :class:`RemoteProtocolError` that names what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import RemoteProtocolError
from pveplug.proto.ptcomm import PROTOCOL, elided

_COMMAND: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:[:=](.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """``KEY:VALUE``, ``KEY=VALUE``, or a bare word, whose value is None."""

    key: str
    value: str | None = None

    @property
    def number(self) -> int:
        """The value as a number that is not negative.

        Raises:
            RemoteProtocolError: it isn't one.
        """
        return _number(self.value or "", self.key)

    def __str__(self) -> str:
        return self.key if self.value is None else f"{self.key}:{self.value}"


def parse_command(text: str) -> Command:
    """Split a command line at its first ``:`` or ``=``.

    Raises:
        RemoteProtocolError: the line doesn't begin with a word.
    """
    match = _COMMAND.fullmatch(text)
    if match is None:
        raise RemoteProtocolError(
            f"PTCOMM: expected a command KEY:VALUE or KEY=VALUE, got "
            f"{elided(text.encode('utf-8', 'surrogateescape'))}"
        )
    return Command(match[1], match[2])


def _number(text: str, what: str, base: int = 10) -> int:
    digits = "01234567" if base == 8 else "0123456789"
    if not 0 < len(text) <= 20 or text.strip(digits):
        raise RemoteProtocolError(
            f"PTCOMM: expected a number for {what}, got "
            f"{elided(text.encode('utf-8', 'surrogateescape'))}"
        )
    value = int(text, base)
    if value >= 1 << 63:
        raise RemoteProtocolError(f"PTCOMM: {what} {value} is out of range")
    return value


@dataclass(frozen=True, slots=True)
class Stat:
    """``STAT:F 34359738368 0 0 100640 1``: type, size, owner, mode and links."""

    size: int
    kind: str = "F"
    """F file, E empty file, D directory, S symbolic link, L hard link."""
    uid: int = 0
    gid: int = 0
    mode: int = 0o100640
    links: int = 1

    def encode(self) -> str:
        return (
            f"STAT:{self.kind} {self.size} {self.uid} {self.gid} "
            f"{self.mode:o} {self.links}"
        )

    @classmethod
    def parse(cls, value: str) -> Stat:
        """Read the value of a STAT command.

        Raises:
            RemoteProtocolError: fields are missing or no numbers.
        """
        parts = value.split()
        # A seventh field, the index of a hard link's target, is of no use to us.
        if not 6 <= len(parts) <= 7 or parts[0] not in tuple("FEDSL"):
            raise RemoteProtocolError(
                "PTCOMM: expected STAT:type size uid gid mode links, got "
                f"{elided(value.encode('utf-8', 'surrogateescape'))}"
            )
        size, uid, gid, links = (
            _number(parts[at], f"STAT field {at + 1}") for at in (1, 2, 3, 5)
        )
        mode = _number(parts[4], "STAT mode", base=8)
        return cls(size, parts[0], uid, gid, mode, links)


@dataclass(frozen=True, slots=True)
class Times:
    """``TSTAMP:atime mtime ctime`` in seconds since 1970."""

    atime: int
    mtime: int
    ctime: int

    def encode(self) -> str:
        return f"TSTAMP:{self.atime} {self.mtime} {self.ctime}"

    @classmethod
    def parse(cls, value: str) -> Times:
        """Read the value of a TSTAMP command.

        Raises:
            RemoteProtocolError: these aren't three numbers.
        """
        parts = value.split()
        if len(parts) != 3:
            raise RemoteProtocolError(
                "PTCOMM: expected TSTAMP:atime mtime ctime, got "
                f"{elided(value.encode('utf-8', 'surrogateescape'))}"
            )
        # A file may be older than 1970; no negative time is worth a failed restore.
        atime, mtime, ctime = (
            0 if re.fullmatch(r"-\d{1,19}", part) else _number(part, "TSTAMP")
            for part in parts
        )
        return cls(atime, mtime, ctime)


@dataclass(frozen=True, slots=True)
class Hello:
    """``Hello podheitor-proxmox 3 offset jobstatus``: the plugin and what it can do.

    Words that are unknown to us are ignored; a peer without ours gets plain PTCOMM.
    """

    plugin: str
    protocol: int
    words: frozenset[str] = frozenset()

    @property
    def offset(self) -> bool:
        """``OFFSET:n`` is understood: data needn't be dense."""
        return "offset" in self.words

    @property
    def jobstatus(self) -> bool:
        """``JobStatus=X`` comes at the end of a backup."""
        return "jobstatus" in self.words

    @classmethod
    def parse(cls, text: str) -> Hello:
        """Read the first command of a session.

        Raises:
            RemoteProtocolError: it isn't a greeting, or of another protocol.
        """
        parts = text.split()
        if len(parts) < 3 or parts[0] != "Hello":
            raise RemoteProtocolError(
                "PTCOMM: expected Hello NAME NUMBER, got "
                f"{elided(text.encode('utf-8', 'surrogateescape'))}"
            )
        protocol = _number(parts[2], "the protocol")
        if protocol < PROTOCOL:
            raise RemoteProtocolError(
                f"PTCOMM: expected protocol {PROTOCOL} or later, the plugin speaks "
                f"{protocol}. Install plugin and backend from the same package."
            )
        return cls(parts[1], protocol, frozenset(parts[3:]))


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What Bacula says of the job; absent texts are empty, absent numbers 0."""

    name: str
    """The unique name, ``vm-job.2026-11-22_20.42.31_15``."""
    job_id: int
    type: str
    """B backup, R restore, E estimate."""
    level: str = ""
    """F, I, D; empty for a restore."""
    since: int = 0
    """Seconds since 1970 of the job this one builds on."""
    where: str = ""
    regex_where: str = ""
    replace: str = ""
    prev_job: str = ""
    working_dir: str = ""
    exe_path: str = ""
    client: str = ""
    accurate: bool = False
    interface: int = 0
    """Number of bacula-fd's plugin interface: 14 is 9.6, 21 is 11.0, 23 is 15.0."""
    others: dict[str, str] = field(default_factory=dict)
    """Lines we don't know, as they came."""

    @classmethod
    def parse(cls, lines: Sequence[Command]) -> JobInfo:
        """Read the commands between ``Job`` and ``F``.

        Raises:
            RemoteProtocolError: no job type, or a number that is none.
        """
        values = {line.key: line.value or "" for line in lines}

        def number(key: str) -> int:
            text = values.pop(key, "")
            return _number(text, key) if text else 0

        kind = values.pop("Type", "")
        if kind not in ("B", "R", "E"):
            raise RemoteProtocolError(f"PTCOMM: expected Type=B, R or E, got {kind!r}")
        name = values.pop("Name", "")
        if not name and kind != "E":
            raise RemoteProtocolError("PTCOMM: expected the job's Name, got none")
        return cls(
            name=name,
            job_id=number("JobID"),
            type=kind,
            level=values.pop("Level", ""),
            since=number("Since"),
            where=values.pop("Where", ""),
            regex_where=values.pop("RegexWhere", ""),
            replace=values.pop("Replace", ""),
            prev_job=values.pop("PrevJobName", ""),
            working_dir=values.pop("WorkingDir", ""),
            exe_path=values.pop("ExePath", ""),
            client=values.pop("Client", ""),
            accurate=values.pop("Accurate", "0") not in ("", "0"),
            interface=number("BaculaVersion"),
            others=values,
        )


def plugin_string(lines: Sequence[Command], plugin: str) -> str:
    """The plugin's command string from the commands between ``Params`` and ``F``.

    Ours is sent whole as ``Plugin=``. A stock plugin sends one line for each key; then
    the string is put together again, values quoted where needed.
    """
    parts = [f"{plugin}:"]
    for line in lines:
        if line.key == "Plugin":
            return line.value or ""
        if line.key == "Accurate":
            continue
        value = "1" if line.value is None else line.value
        if not value or re.search(r"[\s\"'\\]", value):
            value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
        parts.append(f"{line.key}={value}")
    return " ".join(parts)
