# SPDX-License-Identifier: Apache-2.0
"""The receiver's configuration: one TOML file per receiver, one frozen value here.

Every key is a row of :data:`KEYS`, from which the parser, its complaints, the example
file and docs/receiver.md follow. Secrets are files and are read when they are needed:
at the start, and again at every reload.
"""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pveplug.errors import ConfigError
from pveplug.node import Node
from pveplug.secrets import Origin, Secret, SecretSource, check_file
from pveplug.units import MiB
from pveplug.values import (
    HOST,
    MAPPED,
    NODE_NAME,
    POOL,
    STORAGE,
    TOKEN_ID,
    Mapped,
    fingerprint,
    matching,
)

DEFAULT_PORT: Final = 9190
STATE_ROOT: Final = "/var/lib/podheitor-proxmox/receiver"
"""Each receiver's ``state_dir`` is below it, under its name, unless it says more."""
_PORT_MAX: Final = 65535
_NAME: Final = matching(
    "receiver",
    "[A-Za-z0-9][A-Za-z0-9_.-]{0,39}",
    "letters, digits, '-', '_' and '.', at most 40",
)


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """One receiver. Paths are absolute, sizes in bytes; an empty text is "none"."""

    name: str
    bind: str
    port: int
    state_dir: str
    cert_file: str
    key_file: str
    token_file: str
    ca_file: str
    client_names: tuple[str, ...]
    pve_host: str
    pve_port: int
    pve_node: str
    pve_token_id: str
    pve_token_secret_file: str
    pve_fingerprints: tuple[str, ...]
    storage: str
    bridge_map: Mapped
    pool: str
    retention_min: int
    retention_lock_days: int
    sessions: int
    stage_dir: str
    keep_free: int
    metrics_port: int

    def token(self) -> Secret | None:
        """Read the shared token; None where only certificates count.

        Raises:
            ConfigError: its file can't be read, or others may read or change it.
        """
        if not self.token_file:
            return None
        return _secret("auth.token_file", self.token_file)

    def pve_secret(self) -> Secret:
        """Read the secret of the token for PVE's API.

        Raises:
            ConfigError: as :meth:`token`.
        """
        return _secret("pve.token_secret_file", self.pve_token_secret_file)

    def check_files(self) -> None:
        """See that every file it names can be used, without keeping what is in them.

        Raises:
            ConfigError: which key, which file, and what to do.
        """
        self.token()
        self.pve_secret()
        check_file("tls.key", self.key_file, private=True)
        check_file("tls.cert", self.cert_file, private=False)
        if self.ca_file:
            check_file("auth.ca_file", self.ca_file, private=False)


def load_receiver(path: Path, node: Node) -> ReceiverConfig:
    """Read a receiver's file; what it leaves out comes from the node and from KEYS.

    Raises:
        ConfigError: the file can't be read, isn't TOML, or a key is unknown, missing
            or ill-valued; the text names file and key.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; `pveplug receiver init` makes one"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return parse_receiver(found, node)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", key=error.key) from None


def parse_receiver(found: Mapping[str, Any], node: Node) -> ReceiverConfig:
    """Return what the tables of a file mean.

    Raises:
        ConfigError: a key is unknown, missing or ill-valued.
    """
    given = _flattened(found)
    values: dict[str, Any] = {}
    for key in KEYS:
        default = _from_node(key.name, node)
        values[key.field] = _value(
            key, given.get(key.name, key.default if default is None else default)
        )
    if not values["state_dir"]:
        values["state_dir"] = f"{STATE_ROOT}/{values['name']}"
    if not (values["token_file"] or values["ca_file"]):
        raise ConfigError(
            "neither auth.token_file nor auth.ca_file is set: nobody could be told "
            "from anybody; `pveplug receiver init` makes a token",
            key="auth.token_file",
        )
    if values["metrics_port"] and values["metrics_port"] == values["port"]:
        raise ConfigError(
            f"metrics.port and port are both {values['port']}; metrics need their own",
            key="metrics.port",
        )
    return ReceiverConfig(**values)


def _from_node(name: str, node: Node) -> object:
    match name:
        case "pve.host":
            return node.pve_host
        case "pve.port":
            return node.pve_port
        case "pve.node":
            return node.pve_node or None
    return None


def _flattened(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``table.key`` -> value; a table or key that isn't known is an error."""
    flat: dict[str, Any] = {}
    tables = {key.name.partition(".")[0] for key in KEYS if "." in key.name}
    for name, value in found.items():
        if isinstance(value, dict):
            if name not in tables:
                raise _unknown(name, tables)
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        elif name in tables:
            raise ConfigError(f"{name} must be a table: [{name}]", key=name)
        else:
            flat[name] = value
    names = {key.name for key in KEYS}
    for name in flat:
        if name not in names:
            raise _unknown(name, names)
    return flat


def _unknown(name: str, names: set[str]) -> ConfigError:
    text = f"unknown key {name}"
    near = difflib.get_close_matches(name, sorted(names), 1, 0.6)
    if not near:  # right key, wrong table
        last = name.rpartition(".")[2]
        near = [n for n in sorted(names) if n.rpartition(".")[2] == last]
    return ConfigError(f"{text}; did you mean {near[0]}?" if near else text, key=name)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file.

    Attributes:
        name: as in the file, ``table.key``; ``field``: of :class:`ReceiverConfig`.
        default: what a file that lacks it means; None: it must be there.
        parse: checks and converts what TOML gave, or raises ValueError.
        about: what it is for, one line.
    """

    name: str
    field: str
    default: object
    parse: Callable[[Any], Any]
    about: str


def _value(key: Key, value: object) -> Any:
    if value is None:
        raise ConfigError(f"{key.name} is missing: {key.about}", key=key.name)
    try:
        return key.parse(value)
    except ValueError as error:
        raise ConfigError(f"{key.name} {error}", key=key.name) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    if not value.isprintable():
        raise ValueError("holds a control character")
    return value


def _optional(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: "" if _text(value) == "" else parse(_text(value))


def _required(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: parse(_text(value))


def _integer(minimum: int, maximum: int, unit: int = 1) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return value * unit

    return parse


def _path(text: str) -> str:
    if not text.startswith("/") or "//" in text or "/../" in f"{text}/":
        raise ValueError("must be an absolute path")
    return text.rstrip("/") or "/"


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError(
            "must be an IP address of this node; 0.0.0.0 or :: for all"
        ) from None


def _map(value: Any) -> Mapped:
    text = _text(value)
    return MAPPED.parse(text) if text else Mapped()


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of names in quotes")
    return tuple(HOST.parse(_text(name)) for name in value)


def _pins(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError("must be a fingerprint in quotes, or a list of them")
    return tuple(fingerprint(_text(text)) for text in texts if text != "")


KEYS: Final = (
    Key("name", "name", "main", _required(_NAME.parse), "what this receiver is called"),
    Key("bind", "bind", "0.0.0.0", _required(_address), "address to listen on"),  # noqa: S104 - a service; TLS and a token guard it
    Key("port", "port", DEFAULT_PORT, _integer(1, _PORT_MAX), "TCP port"),
    Key(
        *("state_dir", "state_dir", "", _optional(_path)),
        "records of the replicas; must survive a reboot, mode 0700; empty: NAME below "
        f"{STATE_ROOT}",
    ),
    Key(
        *("tls.cert", "cert_file", None, _required(_path)),
        "certificate the receiver presents, PEM",
    ),
    Key("tls.key", "key_file", None, _required(_path), "its key, PEM, mode 0600"),
    Key(
        *("auth.token_file", "token_file", "", _optional(_path)),
        "token that senders must know, mode 0600",
    ),
    Key(
        *("auth.ca_file", "ca_file", "", _optional(_path)),
        "senders must also show a certificate of this CA, PEM",
    ),
    Key(
        *("auth.client_names", "client_names", [], _names),
        "DNS names of senders' certificates that need not resolve to their address",
    ),
    Key("pve.host", "pve_host", "127.0.0.1", _required(HOST.parse), "where PVE is"),
    Key("pve.port", "pve_port", 8006, _integer(1, _PORT_MAX), "its API's port"),
    Key(
        *("pve.node", "pve_node", "", _optional(NODE_NAME.parse)),
        "this node's name in the cluster; empty: the host name",
    ),
    Key(
        *("pve.token_id", "pve_token_id", None, _required(TOKEN_ID.parse)),
        "API token of the DR site, user@realm!name",
    ),
    Key(
        *("pve.token_secret_file", "pve_token_secret_file", None, _required(_path)),
        "its secret, mode 0600",
    ),
    Key(
        *("pve.fingerprint", "pve_fingerprints", "", _pins),
        "SHA-256 of PVE's certificate; empty: /etc/pve's CA or the system's trust",
    ),
    Key(
        *("replicas.storage", "storage", "", _optional(STORAGE.parse)),
        "storage for replicas' disks, unless a sender names one (dr_storage)",
    ),
    Key(
        *("replicas.bridge_map", "bridge_map", "", _map),
        "from:to,… bridges of the sources to those here",
    ),
    Key(
        *("replicas.pool", "pool", "", _optional(POOL.parse)),
        "resource pool the replicas are put in",
    ),
    Key(
        *("retention.min", "retention_min", 1, _integer(1, 100)),
        "restore points no sender can rotate away",
    ),
    Key(
        *("retention.lock_days", "retention_lock_days", 0, _integer(0, 3650)),
        "restore points younger than this are kept, whoever asks",
    ),
    Key(
        *("limits.sessions", "sessions", 16, _integer(1, 64)),
        "senders served at a time",
    ),
    Key(
        *("limits.stage_dir", "stage_dir", "", _optional(_path)),
        "where increments wait until they are whole; empty: beside the records",
    ),
    Key(
        *("limits.keep_free_mib", "keep_free", 1024, _integer(0, 1 << 30, MiB)),
        "MiB that staging leaves free there",
    ),
    Key(
        *("metrics.port", "metrics_port", 0, _integer(0, _PORT_MAX)),
        "loopback port for Prometheus; 0: none",
    ),
)


def _secret(key: str, path: str) -> Secret:
    return SecretSource(key, Origin.FILE, path).resolve()
