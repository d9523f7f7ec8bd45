# SPDX-License-Identifier: Apache-2.0
"""``pveplug receiver init``: what a receiver needs before its first start."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pveplug.errors import ConfigError

EX_OK: Final = 0
STATE_DIR: Final = "/var/lib/podheitor-proxmox/receiver"
PORT: Final = 9190
_SECRET: Final = 0o600
_PUBLIC: Final = 0o644
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")

CONFIGURATION: Final = """\
# Receiver of replicas {name}; written by `pveplug receiver init`.
# podheitor-proxmox-receiver --config {own}
# or: systemctl enable --now podheitor-proxmox-receiver@{bare}
name = {name}
# Where it listens. "::" takes IPv6 and IPv4.
bind = "0.0.0.0"
port = {port}
# Staged increments, journals, what is known of each replica. Must survive a reboot.
state_dir = {state_dir}

[tls]
# The certificate that senders see. TLS 1.3 only.
cert = {cert}
key = {key}

[auth]
# What senders must have. Both set: they need both.
# The token's file; white space around it doesn't count.
token_file = {token}
{ca}

[pve]
# The API of the Proxmox VE node that runs the replicas.
host = "127.0.0.1"
port = 8006
node = {node}
token_id = "podheitor@pve!receiver"
token_secret_file = {pve_secret}
# SHA-256 of the API's certificate; `pveplug pin 127.0.0.1` shows it.
fingerprint = ""

[replicas]
# The storage of the replicas' disks; empty: the one that the sender names.
storage = ""
# Bridges here for bridges there: "vmbr0:vmbr7,vmbr1:vmbr8"; one alone is for all.
bridge_map = ""
# The pool that replicas are put into.
pool = ""

[retention]
# Restore points that are kept whatever a sender asks for.
min = 3
# Days for which no restore point is removed; 0: none is locked.
lock_days = 0

[limits]
# Senders at the same time.
sessions = 16
# Where increments are staged; empty: below state_dir.
stage_dir = ""
# Free space that staging leaves on that file system, in MiB.
keep_free_mib = 1024

[metrics]
# Prometheus, on the loopback address only; 0: none.
port = 9191
"""


def add_parser(commands: Any, summary: str) -> None:
    """Add ``receiver`` and its actions."""
    parser = commands.add_parser(
        "receiver",
        help=summary,
        description="Prepare what the receiver of a disaster recovery site needs.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser(
        "init",
        help="make its key, certificate, token and configuration",
        description="Make a key, a certificate, a token and a configuration file in a "
        "directory, and say what a sender needs of it. Nothing that exists is "
        "overwritten.",
    )
    init.add_argument("--dir", required=True, metavar="DIR", help="made if missing")
    init.add_argument("--name", default="main", help="of the receiver [%(default)s]")
    init.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        help="name or address by which senders reach it, for the certificate; may be "
        "given several times [this host's name]",
    )
    init.add_argument(
        "--port", type=int, default=PORT, help="it listens on [%(default)s]"
    )
    init.add_argument(
        "--with-ca",
        action="store_true",
        help="also make a CA and a sender's certificate: senders then need both, the "
        "certificate and the token",
    )
    init.add_argument(
        "--client-host",
        action="append",
        default=[],
        metavar="HOST",
        help="name or address that the sender connects from; with --with-ca, may be "
        "given several times",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the action and return the exit status."""
    return _init(arguments)


@dataclass(frozen=True, slots=True)
class Made:
    """One file to be written."""

    path: Path
    data: bytes
    mode: int


def _init(arguments: argparse.Namespace) -> int:
    from pveplug.dr import keys  # cryptography is slow to load, and only wanted here

    name = arguments.name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: letters, digits, '-', '_' and '.', at most 40"
        )
    if not 0 < arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port} is none")
    if arguments.client_host and not arguments.with_ca:
        raise ConfigError("--client-host names a certificate that --with-ca makes")
    if arguments.with_ca and not arguments.client_host:
        raise ConfigError(
            "--with-ca needs --client-host: the address or name that the sender "
            "connects from, which its certificate must be for"
        )
    now = datetime.datetime.now(datetime.UTC)
    hosts = list(dict.fromkeys(arguments.host or [socket.gethostname()]))
    folder = Path(arguments.dir).absolute()
    base = folder / f"receiver-{name}"

    def at(suffix: str) -> Path:
        return base.with_name(base.name + suffix)

    token = secrets.token_hex(32)
    made = [Made(at(".token"), f"{token}\n".encode(), _SECRET)]
    authority = None
    if arguments.with_ca:
        authority = keys.make_ca(f"pveplug DR CA {name}", now)
        sender = keys.make_host(
            f"sender to {name}",
            arguments.client_host,
            now,
            issuer=authority,
            client=True,
        )
        made += [
            Made(at("-ca.crt"), authority.certificate_pem, _PUBLIC),
            Made(at("-ca.key"), authority.key_pem, _SECRET),
            Made(at("-sender.crt"), sender.certificate_pem, _PUBLIC),
            Made(at("-sender.key"), sender.key_pem, _SECRET),
        ]
    own = keys.make_host(f"receiver {name}", hosts, now, issuer=authority)
    made += [
        Made(at(".crt"), own.certificate_pem, _PUBLIC),
        Made(at(".key"), own.key_pem, _SECRET),
    ]
    text = CONFIGURATION.format(
        bare=name,
        name=_toml(name),
        own=at(".toml"),
        port=arguments.port,
        state_dir=_toml(f"{STATE_DIR}/{name}"),
        cert=_toml(at(".crt")),
        key=_toml(at(".key")),
        token=_toml(at(".token")),
        ca=(
            "# The CA that senders' certificates come from.\n"
            + ("" if authority else "# ")
            + f"ca_file = {_toml(at('-ca.crt'))}"
        ),
        node=_toml(socket.gethostname().partition(".")[0]),
        pve_secret=_toml(at(".secret")),
    )
    made.append(Made(at(".toml"), text.encode(), _PUBLIC))
    _write_all(folder, made)
    _tell(arguments, hosts, base, own.fingerprint)
    return EX_OK


def _toml(value: object) -> str:
    """Return a TOML string: JSON's escapes are a part of TOML's."""
    return json.dumps(str(value), ensure_ascii=False)


def _write_all(folder: Path, made: list[Made]) -> None:
    """Write all of it, or nothing.

    Raises:
        ConfigError: something is there already, or can't be written.
    """
    taken = [one.path for one in made if os.path.lexists(one.path)]
    if taken:
        raise ConfigError(
            f"{taken[0]} exists and is left as it is; remove it, or choose another "
            "--dir or --name"
        )
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in made:
            _write_new(one)
            written.append(one.path)
    except OSError as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise ConfigError(
            f"cannot write {error.filename or folder}: {error.strerror}"
        ) from error


def _write_new(one: Made) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(one.path, flags, one.mode)
    try:
        os.fchmod(handle, one.mode)  # whatever the umask is
        with os.fdopen(handle, "wb") as file:
            file.write(one.data)
    except OSError:
        one.path.unlink()
        raise


def _tell(
    arguments: argparse.Namespace, hosts: list[str], base: Path, pin: str
) -> None:
    """Say what the sender needs."""
    lines = [
        f"configuration  {base}.toml (check [pve] and [replicas] in it)",
        f"certificate    {base}.crt, for {', '.join(hosts)}",
        f"fingerprint    {pin}",
        f"token          {base}.token (secret; never printed)",
    ]
    needs = [f"dr_host={hosts[0]}"]
    if arguments.port != PORT:
        needs.append(f"dr_port={arguments.port}")
    carried = [f"{base}.token"]
    there = "/etc/podheitor-proxmox"
    needs.append(f"dr_auth_token_file={there}/{base.name}.token")
    if arguments.with_ca:
        lines += [
            f"CA             {base}-ca.crt; its key {base}-ca.key may be kept offline",
            f"sender         {base}-sender.crt and .key, for "
            + ", ".join(arguments.client_host),
        ]
        carried += [f"{base}-sender.crt", f"{base}-sender.key", f"{base}-ca.crt"]
        needs += [
            f"dr_auth_cert={there}/{base.name}-sender.crt",
            f"dr_auth_key={there}/{base.name}-sender.key",
            f"dr_auth_ca={there}/{base.name}-ca.crt",
        ]
    needs.append(f"dr_peer_fingerprint={pin}")
    lines += [
        "",
        f"Carry to the sender, over a way you trust, to {there} there (mode 0600):",
        *(f"  {path}" for path in carried),
        "and put into its plug-in string:",
        f"  {' '.join(needs)}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
