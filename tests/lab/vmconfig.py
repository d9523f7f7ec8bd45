# SPDX-License-Identifier: Apache-2.0
"""VM configuration files as PVE writes them: keys, sections, property strings."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

BUSES = {"ide": 4, "scsi": 31, "virtio": 16, "sata": 6}
DRIVE = re.compile(
    r"(ide[0-3]|sata[0-5]|scsi([0-9]|[12][0-9]|30)|virtio([0-9]|1[0-5])"
    r"|efidisk0|tpmstate0)\Z"
)
UNUSED = re.compile(r"unused([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])\Z")
LOCKS = (
    "backup",
    "clone",
    "create",
    "migrate",
    "rollback",
    "snapshot",
    "snapshot-delete",
    "suspending",
    "suspended",
)


def parse_props(value: str, default_key: str | None = None) -> dict[str, str]:
    """Split ``a,k=v,…``; a bare word belongs to ``default_key``.

    Raises:
        ValueError: a bare word where the format has no default key.
    """
    props: dict[str, str] = {}
    for part in value.split(","):
        if not part:
            continue
        key, sep, text = part.partition("=")
        if not sep:
            if default_key is None or default_key in props:
                raise ValueError(
                    f"value without key, but schema does not define a default key: "
                    f"{part}"
                )
            key, text = default_key, part
        props[key] = text
    return props


def format_props(props: dict[str, str], default_key: str | None = None) -> str:
    """Join a property string; the default key goes first and bare."""
    parts = [props[default_key]] if default_key and default_key in props else []
    parts += [f"{k}={v}" for k, v in sorted(props.items()) if k != default_key]
    return ",".join(parts)


@dataclass(slots=True)
class Drive:
    """One drive line: the volume id (or ``none``, a path) and its options."""

    key: str
    file: str
    options: dict[str, str]

    @classmethod
    def parse(cls, key: str, value: str) -> Drive:
        props = parse_props(value, "file")
        file = props.pop("file", None) or props.pop("volume", "")
        return cls(key, file, props)

    def __str__(self) -> str:
        return format_props({"file": self.file, **self.options}, "file")

    @property
    def cdrom(self) -> bool:
        return self.options.get("media") == "cdrom"

    @property
    def interface(self) -> str:
        return self.key.rstrip("0123456789")

    @property
    def index(self) -> int:
        return int(self.key[len(self.interface) :])

    @property
    def volume(self) -> bool:
        """Whether this is a volume of a storage."""
        return ":" in self.file and not self.file.startswith("/")


@dataclass(slots=True)
class VmConf:
    """A configuration: current values, pending changes, snapshots."""

    values: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    pending_delete: dict[str, int] = field(default_factory=dict)
    snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    special: dict[str, dict[str, str]] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> VmConf:
        conf = cls(digest=hashlib.sha1(text.encode()).hexdigest())
        section, name = conf.values, ""
        description: dict[str, list[str]] = {}
        for line in text.splitlines():
            if not line.strip():
                continue
            if match := re.fullmatch(r"\[(.+)\]", line.strip()):
                name = match[1]
                if name == "PENDING":
                    section = conf.pending
                elif name.startswith("special:"):
                    section = conf.special.setdefault(name[8:], {})
                else:
                    section = conf.snapshots.setdefault(name, {})
            elif line.startswith("#"):
                description.setdefault(name, []).append(unquote(line[1:]))
            else:
                key, sep, value = line.partition(":")
                if not sep:
                    raise ValueError(f"vm config: unable to parse line: {line}")
                section[key.strip()] = value.strip()
        for where, lines in description.items():
            target = (
                conf.values
                if not where
                else conf.pending
                if where == "PENDING"
                else conf.snapshots[where]
            )
            target["description"] = "\n".join(lines) + "\n"
        for key in conf.pending.pop("delete", "").split(","):
            if key:
                forced = key.startswith("!")
                conf.pending_delete[key.lstrip("!")] = 2 if forced else 1
        return conf

    def text(self) -> str:
        parts = [_section(self.values)]
        if self.pending or self.pending_delete:
            pending = dict(self.pending)
            if self.pending_delete:
                pending["delete"] = ",".join(
                    ("!" if n == 2 else "") + k for k, n in self.pending_delete.items()
                )
            parts.append("[PENDING]\n" + _section(pending))
        parts += [
            f"[{name}]\n{_section(body)}"
            for name, body in sorted(self.snapshots.items())
        ]
        parts += [
            f"[special:{name}]\n{_section(body)}"
            for name, body in sorted(self.special.items())
        ]
        return "\n".join(parts)

    def drives(self) -> list[Drive]:
        """All drives in PVE's order, ``unusedN`` left out."""
        return drives_of(self.values)

    @property
    def agent_enabled(self) -> bool:
        props = parse_props(self.values.get("agent", "0"), "enabled")
        return props.get("enabled", "0") in ("1", "yes", "on", "true")

    def volumes(self) -> set[str]:
        """Every volume id this configuration refers to, snapshots included."""
        found = set()
        for body in [self.values, self.pending, *self.snapshots.values()]:
            found |= {d.file for d in drives_of(body) if d.volume and not d.cdrom}
            found |= {
                unused_volume(value)
                for key, value in body.items()
                if UNUSED.fullmatch(key)
            }
        return found

    def drop_used(self) -> None:
        """Forget ``unusedN`` whose volume a drive uses, as each write of PVE's does.

        Snapshots don't count: what only they hold may stand as ``unusedN``.
        """
        used = {d.file for body in (self.values, self.pending) for d in drives_of(body)}
        for key, value in list(self.values.items()):
            if UNUSED.fullmatch(key) and unused_volume(value) in used:
                del self.values[key]


def drives_of(values: dict[str, str]) -> list[Drive]:
    """The drives among ``values``: ide, scsi, virtio, sata, efidisk0, tpmstate0."""
    order = {name: at for at, name in enumerate([*BUSES, "efidisk", "tpmstate"])}
    found = [Drive.parse(key, v) for key, v in values.items() if DRIVE.fullmatch(key)]
    return sorted(found, key=lambda d: (order[d.interface], d.index))


def unused_volume(value: str) -> str:
    """The volume of an ``unusedN`` value."""
    return parse_props(value, "file")["file"]


def add_unused(values: dict[str, str], volid: str) -> str:
    """Note a volume as ``unusedN``; return the key."""
    for key, value in values.items():
        if UNUSED.fullmatch(key) and unused_volume(value) == volid:
            return key
    for n in range(256):
        if f"unused{n}" not in values:
            values[f"unused{n}"] = volid
            return f"unused{n}"
    raise ValueError("too many unused volumes")


def _section(values: dict[str, str]) -> str:
    lines = []
    if description := values.get("description"):
        lines = [
            "#"
            + quote(line, safe=" !$&'()*+,/:;=?@[]~<>|{}^\"`äöü%#").replace("%25", "%")
            for line in description.rstrip("\n").split("\n")
        ]
    lines += [f"{k}: {v}" for k, v in sorted(values.items()) if k != "description"]
    return "".join(line + "\n" for line in lines)
