# SPDX-License-Identifier: Apache-2.0
"""The three texts that carry parameters, taken apart: pure, and with their opposites.

The plug-in string of the FileSet, ``where=/@pve/…`` of a restore, and the restore
options that bconsole's menu made. docs/parameters.md describes them for operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from pveplug.errors import ConfigError

PLUGIN_NAME: Final = "podheitor-proxmox"
WHERE_PREFIX: Final = "/@pve"
WHERE_MAX_BYTES: Final = 900
"""Bacula carries 3,500; the name of each restored file has it as its prefix."""

_KEY: Final = re.compile("[a-z][a-z0-9_]*")
_ESCAPABLE: Final = " \t'\"\\"
_WHERE_PLAIN: Final = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:;+@/-"
)


def plugin_words(text: str) -> dict[str, str | None]:
    """Return ``{key: value}`` of a plug-in string; None is a key without ``=``.

    Raises:
        ConfigError: another plug-in's string, a stray quote, a malformed or repeated
            key.
    """
    _refuse_broken_text(text)
    name, colon, rest = text.partition(":")
    if not colon or name.strip() != PLUGIN_NAME:
        raise ConfigError(
            f'the plug-in string must begin with "{PLUGIN_NAME}:", not with '
            f"{name.split()[0] if name.split() else 'nothing'!r}"
        )
    found: dict[str, str | None] = {}
    for word, at in _words(rest):
        # A quoted key would be strange, but the first "=" is a separator all the same.
        key, equals, value = word.partition("=")
        if not _KEY.fullmatch(key):
            raise ConfigError(_malformed(key, equals, at))
        if key in found:
            raise ConfigError(f"{key} is given twice", key=key)
        found[key] = value if equals else None
    return found


def _malformed(key: str, equals: str, at: int) -> str:
    if not key:
        return (
            f"character {at} of the parameters is a '=' without a key before it; "
            "write key=value without spaces around the '='"
        )
    if equals and _KEY.fullmatch(key.lower()):
        return f"{key} is not a parameter; parameters are lower-case: {key.lower()}"
    shown = key if key.isprintable() else ascii(key)
    return (
        f"{shown!r} (character {at} of the parameters) is not key=value; a value with "
        "spaces needs quotes: key='two words'"
    )


def _words(text: str) -> Iterable[tuple[str, int]]:
    """Yield the words with quotes taken off, and where each began (from 1)."""
    word: list[str] | None = None
    begin = 0
    quote = ""
    opened = 0
    at = 0
    while at < len(text):
        char = text[at]
        if not quote and char in " \t\r\n":
            if word is not None:
                yield "".join(word), begin
                word = None
            at += 1
            continue
        if word is None:
            word, begin = [], at + 1
        if quote and char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote, opened = char, at + 1
        elif (
            char == "\\"
            and quote != "'"
            and at + 1 < len(text)
            and text[at + 1] in _ESCAPABLE
        ):
            at += 1
            word.append(text[at])
        else:
            word.append(char)
        at += 1
    if quote:
        raise ConfigError(
            f"the quote {quote} at character {opened} of the parameters is not closed"
        )
    if word is not None:
        yield "".join(word), begin


def plugin_string(values: Mapping[str, str | None]) -> str:
    """Return the plug-in string of these values: the opposite of plugin_words()."""
    words = [f"{PLUGIN_NAME}:"]
    for key, value in values.items():
        words.append(key if value is None else f"{key}={quoted(value)}")
    return " ".join(words)


def quoted(value: str) -> str:
    """Return a value so that it survives the plug-in string.

    Single quotes are preferred: Bacula's own reader leaves them alone.
    """
    if value and not any(c in _ESCAPABLE or c.isspace() for c in value):
        return value
    if "'" not in value:
        return f"'{value}'"
    return '"' + re.sub(r"([\\\"])", r"\\\1", value) + '"'


def is_vm_where(where: str) -> bool:
    """Whether a restore's ``where`` addresses a VM: ``/@pve`` or ``/@pve/…``."""
    return where == WHERE_PREFIX or where.startswith(WHERE_PREFIX + "/")


def where_words(where: str) -> dict[str, str]:
    """Return ``{key: value}`` of ``where=/@pve/key=value,key=value``.

    Raises:
        ConfigError: it breaks the grammar; the text shows the place.
    """
    _refuse_broken_text(where)
    size = len(where.encode("utf-8"))
    if size > WHERE_MAX_BYTES:
        raise ConfigError(
            f"where= is {size} bytes long; at most {WHERE_MAX_BYTES} are allowed. Put "
            "restore options that never change into the FileSet's plug-in string"
        )
    found: dict[str, str] = {}
    text = where.removeprefix(WHERE_PREFIX).removeprefix("/").removesuffix("/")
    if not text:
        return found
    for part in text.split(","):
        key, equals, raw = part.partition("=")
        if not re.fullmatch("[a-z_]+", key) or not equals:
            raise ConfigError(
                f"where=: {part!r} is not key=value; a list inside a value is "
                "separated by ';'"
            )
        if key in found:
            raise ConfigError(f"where=: {key} is given twice", key=key)
        found[key] = _unescaped(key, raw)
    return found


def _unescaped(key: str, raw: str) -> str:
    data = bytearray()
    source = raw.encode("utf-8")
    shown = f"where=: {key}={raw if raw.isprintable() else ascii(raw)}"
    at = 0
    while at < len(source):
        byte = source[at]
        if byte == ord("%"):
            digits = source[at + 1 : at + 3]
            if not re.fullmatch(rb"[0-9A-Fa-f]{2}", digits):
                raise ConfigError(
                    f"{shown}: '%' needs two hex digits; a percent sign itself is %25",
                    key=key,
                )
            data.append(int(digits, 16))
            at += 3
        elif byte in _WHERE_PLAIN:
            data.append(byte)
            at += 1
        else:
            char = source[at:].decode("utf-8")[0]
            code = "".join(f"%{b:02X}" for b in char.encode("utf-8"))
            raise ConfigError(f"{shown}: write {char!r} as {code}", key=key)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{shown}: not UTF-8", key=key) from None


def where_string(values: Mapping[str, str]) -> str:
    """Return the ``where`` of these values: the opposite of where_words()."""
    parts = []
    for key, value in values.items():
        escaped = "".join(
            chr(b) if b in _WHERE_PLAIN else f"%{b:02X}" for b in value.encode("utf-8")
        )
        # A trailing '/' of the whole is not carried by Bacula's names.
        if escaped.endswith("/"):
            escaped = escaped[:-1] + "%2F"
        parts.append(f"{key}={escaped}")
    return f"{WHERE_PREFIX}/{','.join(parts)}"


def option_words(text: str) -> dict[str, str]:
    """Return ``{key: value}`` of a restore options object (type 28).

    Bacula writes ``key=value`` lines between comments; only what the operator set.

    Raises:
        ConfigError: a line is neither.
    """
    found: dict[str, str] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip(" \t\r\0")
        if not line or line.startswith(("#", "OptPrompt", "OptDefault", "OptRequired")):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not _KEY.fullmatch(key):
            raise ConfigError(f"restore options, line {number}: not key=value")
        if key in found:
            raise ConfigError(f"restore options: {key} is given twice", key=key)
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        if value:
            found[key] = value
    return found


def _refuse_broken_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("the parameters are not UTF-8 text") from None
    if "\0" in text:
        raise ConfigError("the parameters hold a NUL character")
