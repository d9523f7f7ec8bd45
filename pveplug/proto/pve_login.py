# SPDX-License-Identifier: Apache-2.0
"""Credentials and certificates of the Proxmox VE API: forms, checks, headers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from pveplug.errors import ConfigError, RemoteProtocolError
from pveplug.proto.pve_refusal import PveRefusalError, Reason


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the API is and how its certificate is judged.

    ``fingerprints`` (SHA-256, any spelling) replace every other check; else
    ``ca_file``; else the system's store. ``insecure`` checks nothing: the caller warns.
    ``timeout_s`` bounds one request; pveproxy itself gives up at 30 s, so we wait a
    little longer to hear that.
    """

    host: str
    port: int = 8006
    fingerprints: tuple[str, ...] = ()
    ca_file: str | None = None
    insecure: bool = False
    timeout_s: float = 30.0

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def address(self) -> str:
        """The host as it stands in a URL."""
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class TokenAuth:
    """An API token: ``user@realm!name`` and its secret."""

    token_id: str
    secret: str = field(repr=False)

    @property
    def who(self) -> str:
        return self.token_id


@dataclass(frozen=True, slots=True)
class TicketAuth:
    """A user with a password; the login is renewed before its two hours end."""

    username: str
    password: str = field(repr=False)

    @property
    def who(self) -> str:
        return self.username


_TOKEN_ID: Final = re.compile(r"[^\s:/!=@]+@[A-Za-z][\w.\-]+![A-Za-z][\w.\-]+")
_USER: Final = re.compile(r"[^\s:/]+@[A-Za-z][\w.\-]+")


def token_header(token_id: str, secret: str) -> str:
    """Return the ``Authorization`` value of an API token.

    Raises:
        ConfigError: the id isn't ``user@realm!name`` or the secret can't be one.
    """
    if not _TOKEN_ID.fullmatch(token_id):
        raise ConfigError(
            f"pve_token_id must look like user@realm!name, not {token_id!r}",
            key="pve_token_id",
        )
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(
            "pve_token_secret is empty or holds characters no secret has",
            key="pve_token_secret",
        )
    return f"PVEAPIToken={token_id}={secret}"


def check_user(username: str) -> str:
    """Return ``username`` if it is ``user@realm``.

    Raises:
        ConfigError: it isn't.
    """
    if not _USER.fullmatch(username):
        raise ConfigError(
            f"pve_user must look like user@realm (root@pam), not {username!r}",
            key="pve_user",
        )
    return username


@dataclass(frozen=True, slots=True)
class Ticket:
    """A login: the cookie's value and the token every changing call repeats."""

    value: str
    csrf: str

    def __repr__(self) -> str:
        return "Ticket(***)"

    @property
    def cookie(self) -> str:
        """The ``Cookie`` header; PVE unescapes it, ordinary tickets need no escape."""
        return f"PVEAuthCookie={quote(self.value, safe=':@=/+!')}"


def parse_ticket(data: Any, username: str) -> Ticket:
    """Read the answer of ``POST /access/ticket``.

    Raises:
        PveRefusalError: the account asks for a second factor.
        RemoteProtocolError: there is no ticket in it.
    """
    if not isinstance(data, dict) or not isinstance(data.get("ticket"), str):
        raise RemoteProtocolError("POST /access/ticket: the answer holds no ticket")
    ticket = data["ticket"]
    if data.get("NeedTFA") or ticket.startswith("PVE:!tfa!"):
        raise PveRefusalError(
            f"{username} logs in with a second factor, which an unattended job can't "
            "give. Use an API token: pve_token_id and pve_token_secret",
            401,
            reason=Reason.LOGIN,
            said="second factor needed",
        )
    csrf = data.get("CSRFPreventionToken")
    if not isinstance(csrf, str):
        raise RemoteProtocolError("POST /access/ticket: no CSRFPreventionToken")
    return Ticket(ticket, csrf)


def colon_hex(digest: bytes) -> str:
    """Return ``AA:BB:…``, the form Proxmox VE shows fingerprints in."""
    return digest.hex(":").upper()


def parse_fingerprints(text: str, key: str = "pve_fingerprint") -> tuple[str, ...]:
    """Read SHA-256 fingerprints, colon or plain hex in any case, several by commas.

    ``key`` is the parameter they stand in.

    Returns: each as ``AA:BB:…``; nothing for an empty text.

    Raises:
        ConfigError: one of them isn't 32 bytes of hex.
    """
    found: list[str] = []
    # openssl prints "sha256 Fingerprint=AA:…"; no digit of a fingerprint is an "s".
    bare = re.sub(r"(?i)sha-?256(?:\s*fingerprint)?\s*[=:]?", " ", text)
    for item in re.split(r"[,;\s]+", bare):
        if not item:
            continue
        try:
            digest = bytes.fromhex(item.replace(":", ""))
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise ConfigError(
                f"{key} {item!r} is not a SHA-256 fingerprint: 64 hex "
                "digits, with or without colons",
                key=key,
            )
        if (shown := colon_hex(digest)) not in found:
            found.append(shown)
    return tuple(found)
