# SPDX-License-Identifier: Apache-2.0
"""``pveplug``, the administrator's command; docs/cli.md is its manual page."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Final

from cryptography import x509

from pveplug import (
    __version__,
    command_bitmaps,
    command_dr,
    command_import,
    command_ir,
    command_receiver,
    command_repair,
    command_replicas,
    command_verify,
)
from pveplug.config import shown
from pveplug.config_parse import level_warning, parse_backup, parse_restore
from pveplug.errors import ConfigError, PveplugError, TransportError
from pveplug.manual import explain
from pveplug.node import load_node
from pveplug.parameters import GROUPS, PARAMETERS, default_shown, lookup
from pveplug.pluginstring import PLUGIN_NAME
from pveplug.values import fingerprint

EX_OK: Final = 0
EX_USAGE: Final = 2
"""argparse's own."""
EX_UNAVAILABLE: Final = 69
EX_CONFIG: Final = 78

_PIN_TIMEOUT_S: Final = 10.0
_DEFAULT_PORT: Final = 8006


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pveplug`` and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        match arguments.command:
            case "help":
                return _help(parser, arguments.topic, arguments.names)
            case "check-config":
                return _check_config(arguments)
            case "repair":
                return command_repair.run(arguments)
            case "bitmaps":
                return command_bitmaps.run(arguments)
            case "dr":
                return command_dr.run(arguments)
            case "import":
                return command_import.run(arguments)
            case "ir":
                return command_ir.run(arguments)
            case "pin":
                return _pin(arguments.host, arguments.timeout)
            case "replicas":
                return command_replicas.run(arguments)
            case "verify":
                return command_verify.run(arguments)
            case "receiver":
                return command_receiver.run(arguments)
    except ConfigError as error:
        return _failed(error, EX_CONFIG)
    except PveplugError as error:
        return _failed(error, EX_UNAVAILABLE)
    except BrokenPipeError:  # `pveplug help parameters | head`
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return EX_OK
    parser.print_help()
    return EX_USAGE


def receiver_main(argv: Sequence[str] | None = None) -> int:
    """Run ``podheitor-proxmox-receiver`` and return its exit status."""
    from pveplug.dr.receiver_main import main as receiver  # it brings much with it

    return receiver(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pveplug",
        description="Look after the Proxmox VE plug-in for Bacula.",
        epilog="Exit status: 0 all well; 2 wrong arguments; 69 a host does not answer; "
        "78 the configuration is wrong; of repair also 1 and 75; of ir also 130.",
    )
    parser.add_argument("--version", action="version", version=f"pveplug {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    topic = commands.add_parser("help", help="explain a command or the parameters")
    topic.add_argument(
        "topic", nargs="?", choices=("parameters",), help="what to explain"
    )
    topic.add_argument("names", nargs="*", metavar="NAME", help="only these parameters")
    check = commands.add_parser(
        "check-config",
        help="show what a plug-in string means",
        description="Parse a plug-in string as a job would and show the result; "
        "nothing is contacted and secrets are shown as ***.",
    )
    check.add_argument(
        "plugin_string",
        metavar="PLUGIN-STRING",
        help=f"what stands in Plugin = …; '{PLUGIN_NAME}:' may be left out; "
        "- reads it from standard input",
    )
    check.add_argument(
        "--level", choices=("F", "I", "D"), help="Bacula's level, for backup_type"
    )
    check.add_argument("--restore", action="store_true", help="as a restore job would")
    check.add_argument(
        "--where", default="", help="the where= of a restore; implies --restore"
    )
    check.add_argument(
        "--read-secrets",
        action="store_true",
        help="also read the secret's file or run its command",
    )
    pin = commands.add_parser(
        "pin",
        help="show the fingerprint of a host's certificate",
        description="Connect without sending anything and show the parameter that "
        "pins the certificate the host presents.",
    )
    pin.add_argument("host", metavar="HOST[:PORT]", help="port 8006 by default")
    pin.add_argument("--timeout", type=float, default=_PIN_TIMEOUT_S, metavar="SECONDS")
    command_repair.add_parser(commands)
    command_verify.add_parser(commands)
    command_bitmaps.add_parser(commands)
    command_replicas.add_parser(commands)
    command_dr.add_parser(commands)
    command_import.add_parser(commands)
    command_ir.add_parser(commands)
    command_receiver.add_parser(commands)
    return parser


def _failed(error: PveplugError, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"pveplug: {error}\n")
    return status


def _help(
    parser: argparse.ArgumentParser, topic: str | None, names: Sequence[str]
) -> int:
    if topic is None:
        parser.print_help()
        return EX_OK
    if names:
        sys.stdout.write("\n".join(explain(lookup(name)) for name in names))
        return EX_OK
    for group, title in GROUPS.items():
        sys.stdout.write(f"{title}\n")
        for row in PARAMETERS.values():
            if row.group == group:
                sys.stdout.write(
                    f"  {row.name:<22} {row.summary} [{default_shown(row)}]\n"
                )
        sys.stdout.write("\n")
    sys.stdout.write("`pveplug help parameters NAME` explains one.\n")
    return EX_OK


def _check_config(arguments: argparse.Namespace) -> int:
    text = arguments.plugin_string
    if text == "-":
        text = sys.stdin.read()
    if not text.lstrip().startswith(f"{PLUGIN_NAME}:"):
        text = f"{PLUGIN_NAME}: {text}"
    node = load_node()
    if arguments.restore or arguments.where:
        restore = parse_restore(text, arguments.where, node=node)
        connection, warnings = restore.connection, list(restore.warnings)
        sys.stdout.write(shown(restore))
    else:
        backup, warnings = parse_backup(text, node=node)
        connection = backup.connection
        if arguments.level:
            differs = level_warning(backup.backup_type, arguments.level)
            warnings += [differs] if differs else []
        sys.stdout.write(shown(backup))
    if arguments.read_secrets:
        connection.resolve()
        sys.stdout.write("the secret could be read\n")
    for warning in warnings:
        sys.stdout.write(f"warning: {warning}\n")
    return EX_OK


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


if __name__ == "__main__":
    sys.exit(main())
