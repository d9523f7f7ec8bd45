# SPDX-License-Identifier: Apache-2.0
"""A VM's configuration: the text PVE keeps, the map its API returns, and drives in it.

::

    #first line of the description          ← '%' and non-ASCII as %XX
    scsi0: local-lvm:vm-100-disk-0,iothread=1,size=32G
    …
    [PENDING]                               ← wanted, not yet in force; has "delete:"
    [before-upgrade]                        ← a snapshot's copy of the keys
    [special:cloudinit]
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import ConfigError
from pveplug.units import GiB, KiB, MiB, TiB

DRIVE_LIMITS: Final = {"ide": 4, "sata": 6, "scsi": 31, "virtio": 16}
"""Bus name to number of places; PVE's own limits."""
_SINGLE_DRIVES: Final = ("efidisk0", "tpmstate0")
_DRIVE_KEY: Final = re.compile(r"(ide|sata|scsi|virtio)([0-9]{1,2})")
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)")
_UNITS: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_CLOUDINIT: Final = re.compile(r"(?:.*/)?vm-[0-9]+-cloudinit(?:\.[a-z0-9]+)?|cloudinit")
_LINE: Final = re.compile(r"([a-z][a-z0-9_-]*):\s*(.*?)\s*")
_VOLID: Final = re.compile(r"([A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]):(.+)")


@dataclass(frozen=True, slots=True)
class VmConfigText:
    """The sections of a VM's configuration file; descriptions are decoded."""

    current: dict[str, str]
    pending: dict[str, str] = field(default_factory=dict)
    pending_delete: tuple[str, ...] = ()
    snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    special: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drive:
    """One drive line, e.g. ``scsi0: local-lvm:vm-100-disk-0,iothread=1,size=32G``."""

    key: str
    file: str
    """Volume id, absolute path, ``none`` or ``cdrom``."""
    options: tuple[tuple[str, str], ...] = ()
    """In the order they were written, without ``file``."""

    def get(self, option: str, default: str = "") -> str:
        """Return the value of one option."""
        return dict(self.options).get(option, default)

    @property
    def storage(self) -> str | None:
        """The storage's name; None for a path, ``none`` and ``cdrom``."""
        found = None if self.file.startswith("/") else _VOLID.fullmatch(self.file)
        return found[1] if found else None

    @property
    def volume(self) -> str:
        """The part of the volume id after the storage's name."""
        found = None if self.file.startswith("/") else _VOLID.fullmatch(self.file)
        return found[2] if found else ""

    @property
    def is_cloudinit(self) -> bool:
        """Whether PVE makes its content from the ci… keys."""
        return _CLOUDINIT.fullmatch(self.volume) is not None

    @property
    def is_cdrom(self) -> bool:
        """Whether it is a CD-ROM drive (a cloud-init drive is one, too)."""
        return self.get("media") == "cdrom" or self.file in ("none", "cdrom")

    @property
    def backup(self) -> bool:
        """Whether ``backup=0`` is absent."""
        return parse_bool(self.get("backup", "1"))

    @property
    def size(self) -> int | None:
        """Bytes by the ``size`` option, which is only informative."""
        text = self.get("size")
        return parse_size(text) if text else None

    @property
    def format(self) -> str | None:
        """Image format by option or file name; None where the storage knows it."""
        if named := self.get("format"):
            return named
        suffix = self.volume.rpartition(".")[2]
        return suffix if suffix in ("raw", "qcow2", "vmdk") else None

    def render(self) -> str:
        """Return the value as PVE writes it."""
        return ",".join([self.file, *(f"{k}={v}" for k, v in self.options)])


def parse_bool(text: str) -> bool:
    """Parse a boolean as PVE does.

    Raises:
        ConfigError: it is none.
    """
    if text.lower() in ("1", "on", "yes", "true"):
        return True
    if text.lower() in ("0", "off", "no", "false"):
        return False
    raise ConfigError(f"{text!r} in the VM's configuration is not a boolean")


def parse_size(text: str) -> int:
    """Return the bytes of ``32G``, ``528K`` or a plain number.

    Raises:
        ConfigError: it is no size.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise ConfigError(f"{text!r} in the VM's configuration is not a size")
    return int(float(found[1]) * _UNITS[found[2]])


def render_size(size: int) -> str:
    """Return bytes as PVE writes them: the largest unit that divides them."""
    for unit, count in (("T", TiB), ("G", GiB), ("M", MiB), ("K", KiB)):
        if size and size % count == 0:
            return f"{size // count}{unit}"
    return str(size)


def properties(text: str, default_key: str = "") -> dict[str, str]:
    """Split ``v,k=v,…``; the one part without ``=`` goes under ``default_key``.

    Raises:
        ConfigError: two such parts, or a key twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not equals:
            key, value = default_key, part
        if key in found or not key:
            raise ConfigError(f"{text!r} in the VM's configuration is malformed")
        found[key] = value
    return found


def render_properties(parts: Mapping[str, str], default_key: str = "") -> str:
    """Return the opposite of :func:`properties`, the default key bare."""
    return ",".join(v if k == default_key else f"{k}={v}" for k, v in parts.items())


def has_agent(config: Mapping[str, str]) -> bool:
    """Whether the VM's configuration says that a guest agent answers."""
    try:
        return parse_bool(properties(config.get("agent", "0"), "enabled")["enabled"])
    except (ConfigError, KeyError):
        return False


def is_drive_key(key: str) -> bool:
    """Whether the key holds a drive PVE can attach: scsi0, efidisk0, …."""
    if key in _SINGLE_DRIVES:
        return True
    found = _DRIVE_KEY.fullmatch(key)
    return found is not None and int(found[2]) < DRIVE_LIMITS[found[1]]


def parse_drive(key: str, value: str) -> Drive:
    """Parse one drive's value.

    Raises:
        ConfigError: it names no file, or is malformed.
    """
    parts = properties(value, "file")
    file = parts.pop("file", None) or parts.pop("volume", None)
    if not file:
        raise ConfigError(f"drive {key} names no volume: {value}", key=key)
    return Drive(key, file, tuple(parts.items()))


def drives(config: Mapping[str, str]) -> Iterator[Drive]:
    """Iterate over the drives of a configuration in the order of their keys."""
    for key in sorted((k for k in config if is_drive_key(k)), key=natural):
        yield parse_drive(key, config[key])


def natural(key: str) -> tuple[str, int]:
    """Sort key that puts scsi2 before scsi10."""
    stem = key.rstrip("0123456789")
    return stem, int(key[len(stem) :] or 0)


def from_api(values: Mapping[str, object]) -> dict[str, str]:
    """Return the API's configuration map as texts, without what isn't configuration.

    Booleans become 0 and 1; ``digest`` and keys without a value are left out.
    """
    texts: dict[str, str] = {}
    for key, value in values.items():
        if key == "digest" or value is None:
            continue
        texts[key] = str(int(value)) if isinstance(value, bool) else str(value)
    return texts


def parse_config(text: str) -> VmConfigText:
    """Parse the text of a VM's configuration file, or of our ``vm.conf``.

    Raises:
        ConfigError: a line that is none of PVE's; the text names its number.
    """
    parsed = VmConfigText(current={})
    section, comments, descriptions = parsed.current, list[str](), {}
    pending_delete: tuple[str, ...] = ()
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line:
            continue
        if line.startswith("#"):
            comments.append(urllib.parse.unquote(raw.lstrip()[1:].rstrip("\r")))
            continue
        if line.startswith("[") and line.endswith("]"):
            descriptions[id(section)] = (section, comments)
            section, comments = _open_section(parsed, line[1:-1]), []
            continue
        found = _LINE.fullmatch(line)
        if not found:
            raise ConfigError(f"line {number} of the VM's configuration is not PVE's")
        if section is parsed.pending and found[1] == "delete":
            pending_delete = tuple(re.split(r"[,;\s]+", found[2]))
        else:
            section[found[1]] = found[2]
    descriptions[id(section)] = (section, comments)
    for owner, lines in descriptions.values():
        if lines:
            owner["description"] = "\n".join(lines)
    return VmConfigText(
        parsed.current,
        parsed.pending,
        pending_delete,
        parsed.snapshots,
        parsed.special,
    )


def _open_section(parsed: VmConfigText, name: str) -> dict[str, str]:
    if name.upper() == "PENDING":
        return parsed.pending
    if name.startswith("special:"):
        return parsed.special.setdefault(name.removeprefix("special:"), {})
    return parsed.snapshots.setdefault(name, {})


def current_section_text(values: Mapping[str, str]) -> str:
    """Return ``vm.conf``: the current section as PVE writes it, keys in order.

    Raises:
        ConfigError: a value other than the description has a line break.
    """
    lines = []
    if description := values.get("description"):
        # PVE::Tools::encode_text() escapes ':', control and non-ASCII characters; it
        # leaves '%' alone and so can't read back its own text. We escape '%' as well.
        lines = [
            "#" + urllib.parse.quote(line, safe=_UNESCAPED)
            for line in description.rstrip("\n").split("\n")
        ]
    for key in sorted(values, key=natural):
        if key in ("description", "digest"):
            continue
        value = values[key]
        if "\n" in value or "\r" in value:
            raise ConfigError(f"{key} in the VM's configuration has a line break")
        lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"


_UNESCAPED: Final = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) not in "%:")


def smbios_uuid(config: Mapping[str, str]) -> str | None:
    """Return the SMBIOS UUID in lower case: what tells one VM from its successor."""
    text = config.get("smbios1", "")
    uuid = properties(text, "uuid").get("uuid") if text else None
    return uuid.lower() if uuid else None
