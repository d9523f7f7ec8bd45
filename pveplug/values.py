# SPDX-License-Identifier: Apache-2.0
"""The types a parameter's value may have: how each is written, parsed and explained.

A parser takes the text after ``key=`` and returns the value, or raises ``ValueError``
with what it must be instead; the caller adds the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

VMID_MIN: Final = 100
VMID_MAX: Final = 999_999_999

_YES: Final = frozenset({"yes", "1", "true", "on"})
_NO: Final = frozenset({"no", "0", "false", "off"})
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_KIB: Final = {"": 1, "K": 1, "M": 1024, "G": 1024 * 1024}
_SHA256_HEX: Final = 64


@dataclass(frozen=True, slots=True)
class Type:
    """One kind of value.

    Attributes:
        name: short, for the tables; ``explain``: how to write it, one sentence.
        parse: text to value.
        menu: its type in bconsole's Plugin Options menu, without the ``@``.
        bare: the value of ``key`` without ``=``, where that has a meaning.
    """

    name: str
    explain: str
    parse: Callable[[str], Any]
    menu: str = "STR"
    bare: str | None = None


@dataclass(frozen=True, slots=True)
class Mapped:
    """A ``a:b,c:d`` table; a lone value is the answer for everything else."""

    pairs: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None

    def get(self, name: str) -> str | None:
        """Return what ``name`` maps to, or the lone value, or None."""
        return self.pairs.get(name, self.default)

    def __bool__(self) -> bool:
        return bool(self.pairs) or self.default is not None

    def __str__(self) -> str:
        parts = [f"{a}:{b}" for a, b in self.pairs.items()]
        return ",".join([*parts, self.default] if self.default else parts)


@dataclass(frozen=True, slots=True)
class VmidRange:
    """``first`` to ``last``, both included; one id has both equal."""

    first: int
    last: int

    def __contains__(self, vmid: object) -> bool:
        return isinstance(vmid, int) and self.first <= vmid <= self.last

    def __str__(self) -> str:
        if self.first == self.last:
            return str(self.first)
        return f"{self.first}-{self.last}"


def items(text: str) -> list[str]:
    """Split a list at commas or semicolons; empty members are an error."""
    parts = [part.strip() for part in re.split("[,;]", _text(text))]
    if not all(parts):
        raise ValueError("has an empty member; write a,b or a;b")
    return parts


def integer(minimum: int, maximum: int, unit: str = "") -> Type:
    """Return the type of whole numbers from ``minimum`` to ``maximum``."""
    shown = f"{minimum} to {maximum}" + (f" {unit}" if unit else "")

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text):
            raise ValueError(f"must be a whole number from {shown}")
        if not minimum <= int(text) <= maximum:
            raise ValueError(f"must be from {shown}")
        return int(text)

    return Type("number", f"a whole number from {shown}", parse, menu="PINT32")


def choice(
    *names: str,
    later: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
) -> Type:
    """Return the type of one of ``names``; ``later`` explains names we refuse.

    Args:
        also: other spellings -> the name each stands for.
    """

    def parse(text: str) -> str:
        text = (also or {}).get(text, text)
        if text in names:
            return text
        if later and text in later:
            raise ValueError(later[text])
        several = "one of " if len(names) > 1 else ""
        raise ValueError(f"must be {several}{', '.join(names)}")

    return Type("choice", "one of " + ", ".join(names), parse)


def _boolean(text: str) -> bool:
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise ValueError("must be yes or no")


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a control character")
    return text


def matching(name: str, pattern: str, explain: str) -> Type:
    """Return the type of texts that match ``pattern`` wholly."""
    expression = re.compile(pattern)

    def parse(text: str) -> str:
        if not expression.fullmatch(text):
            raise ValueError(f"must be {explain}")
        return text

    return Type(name, explain, parse)


def _path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise ValueError("must be an absolute path")
    return text


def _vmid(text: str) -> int:
    if not re.fullmatch("[0-9]{3,9}", text) or int(text) < VMID_MIN:
        raise ValueError(f"{text!r} is no VM id; ids are from {VMID_MIN} to {VMID_MAX}")
    return int(text)


def vmid_range(text: str) -> VmidRange:
    """Parse ``100`` or ``100-105``."""
    first, dash, last = text.partition("-")
    low = _vmid(first.strip())
    high = _vmid(last.strip()) if dash else low
    if high < low:
        raise ValueError(f"the range {text} runs backwards")
    return VmidRange(low, high)


def _vmids(text: str) -> tuple[VmidRange, ...]:
    return tuple(vmid_range(part) for part in items(text))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_text(part) for part in items(text))


def _excluded(text: str) -> tuple[VmidRange | str, ...]:
    return tuple(
        vmid_range(part) if re.fullmatch(r"[0-9]+( *- *[0-9]+)?", part) else _text(part)
        for part in items(text)
    )


def _rate(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([KMG]?)", text)
    if not found:
        raise ValueError("must be KiB/s, or a number with K, M or G; 0 is unlimited")
    return int(found[1]) * _KIB[found[2]]


def duration(minimum: int, maximum: int) -> Type:
    """Return the type of durations, in seconds, from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
        if not found:
            raise ValueError("must be seconds, or a number with s, m, h or d")
        seconds = int(found[1]) * _SECONDS[found[2]]
        if not minimum <= seconds <= maximum:
            raise ValueError(f"must be from {minimum} to {maximum} seconds")
        return seconds

    explain = f"seconds from {minimum} to {maximum}, or a number with s, m, h or d"
    return Type("duration", explain, parse)


def _mapped(text: str) -> Mapped:
    pairs: dict[str, str] = {}
    default: str | None = None
    for part in items(text):
        source, colon, target = (word.strip() for word in part.partition(":"))
        if not colon:
            if default is not None:
                raise ValueError(f"has two values for the rest: {default}, {source}")
            default = source
        elif not source or not target:
            raise ValueError(f"{part!r} must be from:to")
        elif source in pairs:
            raise ValueError(f"maps {source} twice")
        else:
            pairs[source] = target
    return Mapped(pairs, default)


def _vmid_target(text: str) -> Mapped:
    mapped = _mapped(text)
    for source, target in mapped.pairs.items():
        _vmid(source)
        if target not in ("next", "same"):
            _vmid(target)
    if mapped.default not in (None, "next", "same"):
        _vmid(str(mapped.default))
    ids = [t for t in mapped.pairs.values() if t.isdigit()]
    if len(set(ids)) != len(ids):
        raise ValueError("gives one VM id to two VMs")
    return mapped


def fingerprint(text: str) -> str:
    """Return a SHA-256 fingerprint as ``AA:BB:…``, from colon or plain hex."""
    plain = text.strip().replace(":", "").upper()
    if plain.startswith("SHA256="):
        plain = plain.removeprefix("SHA256=")
    if len(plain) != _SHA256_HEX or not re.fullmatch("[0-9A-F]+", plain):
        raise ValueError(
            "must be SHA-256 fingerprints, 32 bytes in hex such as AA:BB:…; "
            "`pveplug pin HOST` prints it"
        )
    return ":".join(plain[i : i + 2] for i in range(0, _SHA256_HEX, 2))


def _fingerprints(text: str) -> tuple[str, ...]:
    return tuple(fingerprint(part) for part in items(text))


BOOLEAN: Final = Type(
    "yes/no", "yes, no, 1, 0, true, false, on or off", _boolean, "BOOL", bare="yes"
)
TEXT: Final = Type("text", "any text", _text)
HOST: Final = matching(
    "host",
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})|\[?[0-9A-Fa-f:]*:[0-9A-Fa-f:.%a-z0-9]*\]?",
    "a host name or an IP address, without https:// and port",
)
NODE_NAME: Final = matching(
    "node", r"[A-Za-z0-9]([A-Za-z0-9-]{0,62})", "a node's name as the cluster knows it"
)
STORAGE: Final = matching(
    "storage", r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]", "a Proxmox VE storage's name"
)
POOL: Final = matching(
    "pool", r"[A-Za-z0-9._/-]{1,120}", "a Proxmox VE resource pool's name"
)
VM_NAME: Final = matching(
    "VM name",
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*",
    "a DNS name (letters, digits, hyphens and dots)",
)
USER: Final = matching(
    "user", r"[^\s:/@!]+@[A-Za-z][A-Za-z0-9._-]+", "a user with realm, as root@pam"
)
TOKEN_ID: Final = matching(
    "token id",
    r"[^\s:/@!]+@[A-Za-z][A-Za-z0-9._-]+![A-Za-z][A-Za-z0-9._-]+",
    "user@realm!tokenname, without the secret",
)
PATH: Final = Type("path", "an absolute path", _path)
COMMAND: Final = Type(
    "command", "a command with its arguments; it is run without a shell", _text
)
VMIDS: Final = Type("VM ids", "ids and ranges, as 100,103-105", _vmids)
VMID_TARGET: Final = Type(
    "VM id",
    "an id, next, same, or a list as 100:9100,101:next",
    _vmid_target,
)
WORDS: Final = Type("list", "names, separated by commas or semicolons", _words)
GLOBS: Final = Type("names", "names with * ? [ ], separated by commas", _words)
EXCLUDED: Final = Type(
    "ids and names",
    "ids, ranges and names with * ? [ ], separated by commas",
    _excluded,
)
RATE: Final = Type("KiB/s", "KiB/s, or a number with K, M or G; 0 is unlimited", _rate)
MAPPED: Final = Type(
    "map", "from:to,from:to (or with ;); a lone value is for all others", _mapped
)
FINGERPRINTS: Final = Type(
    "fingerprints",
    "SHA-256 of the certificate as AA:BB:… or plain hex; several for rotation",
    _fingerprints,
)
