# SPDX-License-Identifier: Apache-2.0
"""``pveplug pin``: the fingerprint of the certificate that a host presents."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import socket
import ssl
import sys
from typing import Any, Final

from cryptography import x509

from pveplug.errors import ConfigError, TransportError
from pveplug.values import fingerprint

EX_OK: Final = 0

_TIMEOUT_S: Final = 10.0
_DEFAULT_PORT: Final = 8006


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pin",
        help=summary,
        description="Connect without sending anything and show the parameter that "
        "pins the certificate the host presents.",
    )
    parser.add_argument("host", metavar="HOST[:PORT]", help="port 8006 by default")
    parser.add_argument("--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS")


def run(arguments: argparse.Namespace) -> int:
    """Ask a host for its certificate; return the exit status."""
    return _pin(arguments.host, arguments.timeout)


def _pin(target: str, timeout_s: float) -> int:
    host, port = host_and_port(target)
    certificate = fetch_certificate(host, port, timeout_s)
    digest = fingerprint(hashlib.sha256(certificate).hexdigest())
    sys.stdout.write(f"pve_fingerprint={digest}\n")
    parsed = x509.load_der_x509_certificate(certificate)
    until = parsed.not_valid_after_utc.astimezone(datetime.UTC).date()
    sys.stderr.write(
        f"subject {parsed.subject.rfc4514_string() or '(none)'}, issued by "
        f"{parsed.issuer.rfc4514_string() or '(none)'}, valid until {until}\n"
        "Compare it with what the node itself says before you trust it:\n"
        "  openssl x509 -noout -fingerprint -sha256 -in /etc/pve/local/pve-ssl.pem\n"
        "  (or pveproxy-ssl.pem there, if that exists)\n"
    )
    return EX_OK


def host_and_port(target: str) -> tuple[str, int]:
    """Split ``HOST``, ``HOST:PORT``, ``[v6]:PORT`` or a bare IPv6 address.

    Raises:
        ConfigError: the port is none.
    """
    host, colon, port = target.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, port = target, str(_DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise ConfigError(f"{target!r} is not HOST or HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def fetch_certificate(host: str, port: int, timeout_s: float) -> bytes:
    """Return the certificate (DER) that a TLS server presents; send it nothing.

    Raises:
        TransportError: it doesn't answer, or speaks no TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # looking at it is the purpose
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            certificate = wrapped.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise TransportError(f"{host}:{port} speaks no TLS: {error.reason}") from error
    except OSError as error:
        reason = error.strerror or str(error) or "no answer in time"
        raise TransportError(f"cannot reach {host}:{port}: {reason}") from error
    if not certificate:
        raise TransportError(f"{host}:{port} shows no certificate")
    return certificate
