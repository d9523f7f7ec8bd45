# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 between two sites: contexts from files, and what certificates must be."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509

from pveplug.errors import ConfigError
from pveplug.proto.dr_auth import (
    MIN_TOKEN,
    AuthenticationError,
    Identity,
    Method,
    certificate_hash,
)
from pveplug.proto.pve_login import colon_hex, parse_fingerprints

_END: Final = "-----END CERTIFICATE-----"
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_MAX_NAMES: Final = 16
"""So many DNS names of a certificate are looked up."""


@dataclass(frozen=True, slots=True)
class ClientAuth:
    """What a sender proves itself with, and how it knows its receiver.

    Attributes:
        token: the shared secret as it stands in its file, without white space.
        cert_file, key_file: PEM; what is shown to the receiver (mutual TLS).
        ca_file: PEM; the receiver's certificate must come from it and name the host.
        fingerprints: SHA-256; the receiver's certificate must be one of these.
    """

    token: bytes | None = field(default=None, repr=False)
    cert_file: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerAuth:
    """A receiver's certificate, and what it asks of senders.

    Attributes:
        ca_file: PEM; senders must show a certificate that comes from it.
        client_names: DNS names that need not resolve to the sender's address.
    """

    cert_file: str
    key_file: str | None = None
    token: bytes | None = field(default=None, repr=False)
    ca_file: str | None = None
    client_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """A ClientAuth whose files have been read."""

    context: ssl.SSLContext
    methods: Method
    token: bytes | None = field(repr=False)
    pins: tuple[str, ...]
    own: bytes
    """Hash of the certificate we show."""

    def identity(self, host: str, shown: bytes | None) -> Identity:
        """Check the certificate that the server has shown.

        Raises:
            AuthenticationError: it isn't one of the pinned.
        """
        digest = certificate_hash(shown)
        if self.pins and colon_hex(digest) not in self.pins:
            raise AuthenticationError(
                f"the receiver at {host} shows another certificate: expected "
                f"{' or '.join(self.pins)}, got {colon_hex(digest)}; nothing was sent"
            )
        return Identity(self.methods, digest, self.own, self.token)


@dataclass(frozen=True, slots=True)
class ServerTrust:
    """A ServerAuth whose files have been read."""

    context: ssl.SSLContext
    methods: Method
    token: bytes | None = field(repr=False)
    own: bytes
    client_names: tuple[str, ...]

    def identity(self, shown: bytes | None) -> Identity:
        """Return what the handshake goes by, given the client's certificate."""
        mutual = Method.MTLS in self.methods
        client = certificate_hash(shown if mutual else None)
        return Identity(self.methods, self.own, client, self.token)


def client_trust(auth: ClientAuth) -> ClientTrust:
    """Read the files of a sender.

    Raises:
        ConfigError: one can't be read, or together they don't suffice.
    """
    methods = Method.PSK if auth.token is not None else Method.NONE
    if auth.cert_file:
        methods |= Method.MTLS
    if not methods:
        raise ConfigError(
            "a sender needs a token (dr_auth_token), a certificate (dr_auth_cert) or "
            "both",
            key="dr_auth_token",
        )
    _check_token(auth.token, "dr_auth_token")
    pins = parse_fingerprints(",".join(auth.fingerprints), "dr_peer_fingerprint")
    if not (auth.ca_file or pins or auth.token is not None):
        raise ConfigError(
            "nothing would tell the receiver from an impostor: set dr_auth_ca, "
            "dr_peer_fingerprint or dr_auth_token",
            key="dr_auth_ca",
        )
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    if auth.ca_file:
        _load_ca(context, auth.ca_file, "dr_auth_ca")
    else:
        # The pin or the proof under the token says who it is.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    own = b""
    if auth.cert_file:
        own = _load_own(context, auth.cert_file, auth.key_file, "dr_auth_cert")
    return ClientTrust(context, methods, auth.token, pins, certificate_hash(own))


def server_trust(auth: ServerAuth) -> ServerTrust:
    """Read the files of a receiver.

    Raises:
        ConfigError: one can't be read, or nothing is asked of senders.
    """
    methods = Method.PSK if auth.token is not None else Method.NONE
    if auth.ca_file:
        methods |= Method.MTLS
    if not methods:
        raise ConfigError(
            "a receiver without a token (token_file) and without a CA (ca_file) would "
            "take anybody's disks",
            key="auth",
        )
    _check_token(auth.token, "token_file")
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nothing to resume a session with
    if auth.ca_file:
        _load_ca(context, auth.ca_file, "ca_file")
    own = _load_own(context, auth.cert_file, auth.key_file, "cert")
    names = tuple(name.lower().rstrip(".") for name in auth.client_names)
    return ServerTrust(context, methods, auth.token, certificate_hash(own), names)


def _context(side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    return context


def _check_token(token: bytes | None, key: str) -> None:
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(
            f"{key}: a token has at least {MIN_TOKEN} characters; `pveplug receiver "
            "init` makes a good one",
            key=key,
        )


def _load_ca(context: ssl.SSLContext, path: str, key: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{key} {path}: {_said(error)}", key=key) from error
    context.verify_mode = ssl.CERT_REQUIRED


def _load_own(context: ssl.SSLContext, cert: str, key: str | None, name: str) -> bytes:
    """Load a certificate with its key; return its DER."""
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password="")
        text = Path(cert).read_text(encoding="utf-8")
        begin = text.index(_BEGIN)
        return ssl.PEM_cert_to_DER_cert(text[begin : text.index(_END, begin)] + _END)
    except (OSError, ValueError) as error:
        files = f"{cert} with {key}" if key else cert
        raise ConfigError(f"{name} {files}: {_said(error)}", key=name) from error


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not usable ({error.reason or error})"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


async def client_complaint(der: bytes, address: str, names: Collection[str]) -> str:
    """Say what is wrong with a client's certificate, or ``""``; its chain is verified.

    It must be of version 3 and name, as a subject alternative name, the address that
    the client connects from, or a host that resolves to it or is one of ``names``.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.version is not x509.Version.v3:
            return "its certificate is of version 1"
        found = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        return "its certificate has no subject alternative name"
    except (ValueError, x509.InvalidVersion):
        return "its certificate can't be read"
    peer = plain_address(address)
    if peer in {str(ip) for ip in found.get_values_for_type(x509.IPAddress)}:
        return ""
    hosts = [h.lower().rstrip(".") for h in found.get_values_for_type(x509.DNSName)]
    for host in hosts[:_MAX_NAMES]:
        if host in names or ("*" not in host and peer in await _addresses(host)):
            return ""
    return "its certificate is for another address"


def plain_address(address: str) -> str:
    """Return an address without scope, and IPv4 as IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(parsed)


async def _addresses(host: str) -> set[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return set()
    return {plain_address(str(entry[4][0])) for entry in found}


def tls_words(error: ssl.SSLError) -> str:
    """Return why a TLS handshake failed, in a few words for the log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message or 'certificate not trusted'}"
    known = {
        "PEER_DID_NOT_RETURN_A_CERTIFICATE": "TLS: it shows no certificate",
        "UNSUPPORTED_PROTOCOL": "TLS below 1.3",
        "WRONG_VERSION_NUMBER": "not TLS",
        "HTTP_REQUEST": "not TLS but HTTP",
    }
    reason = error.reason or str(error)
    return known.get(reason, f"TLS: {reason.lower().replace('_', ' ')}")
