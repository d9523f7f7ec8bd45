# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path

import pytest

from pveplug.cli import main
from pveplug.dr.receiver_config import (
    KEYS,
    ReceiverConfig,
    load_receiver,
    parse_receiver,
)
from pveplug.errors import ConfigError
from pveplug.node import Node
from pveplug.secrets import check_file
from pveplug.units import MiB

REPOSITORY = Path(__file__).resolve().parents[2]
LEAST = {
    "tls": {"cert": "/etc/c.pem", "key": "/etc/k.pem"},
    "auth": {"token_file": "/etc/token"},
    "pve": {"token_id": "dr@pve!recv", "token_secret_file": "/etc/secret"},
}


def parsed(**tables) -> ReceiverConfig:
    merged = {name: dict(table) for name, table in LEAST.items()}
    for name, value in tables.items():
        if isinstance(value, dict):
            merged[name] = {**merged.get(name, {}), **value}
        else:
            merged[name] = value
    return parse_receiver(merged, Node())


def test_what_a_file_leaves_out_has_its_default():
    config = parsed()
    assert (config.name, config.bind, config.port) == ("main", "0.0.0.0", 9190)
    assert config.stage_dir == ""
    assert config.keep_free == 1024 * MiB
    assert config.sessions == 16
    assert config.state_dir == "/var/lib/podheitor-proxmox/receiver/main"
    assert parsed(name="dr2").state_dir == "/var/lib/podheitor-proxmox/receiver/dr2"
    assert config.pve_fingerprints == ()
    assert (config.retention_min, config.retention_lock_days) == (1, 0)


def test_what_the_node_file_says_of_pve_holds_unless_the_receivers_says_more():
    node = Node(pve_host="192.0.2.7", pve_port=18006, pve_node="dr1")
    config = parse_receiver(LEAST, node)
    assert (config.pve_host, config.pve_port, config.pve_node) == (
        *("192.0.2.7", 18006),
        "dr1",
    )
    table = {**LEAST, "pve": {**LEAST["pve"], "host": "localhost", "node": "x"}}
    config = parse_receiver(table, node)
    assert (config.pve_host, config.pve_node) == ("localhost", "x")


def test_every_key_is_a_field_and_every_field_a_key():
    fields = [field.name for field in dataclasses.fields(ReceiverConfig)]
    assert sorted(key.field for key in KEYS) == sorted(fields)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"prot": 1}, "unknown key prot; did you mean port?"),
        ({"limit": {"sessions": 1}}, "unknown key limit; did you mean limits?"),
        ({"limits": {"session": 1}}, "did you mean limits.sessions?"),
        ({"pve": {"storage": "x"}}, "did you mean replicas.storage?"),
        ({"wibble": 1}, "unknown key wibble"),
        ({"auth": 3}, "auth must be a table: [auth]"),
        ({"port": "9190"}, "port must be a whole number from 1 to 65535"),
        ({"port": True}, "port must be a whole number"),
        ({"port": 70000}, "port must be a whole number"),
        ({"bind": "dr.example"}, "bind must be an IP address"),
        ({"state_dir": "x"}, "state_dir must be an absolute path"),
        ({"state_dir": 1}, "state_dir must be a text in quotes"),
        ({"tls": {"cert": ""}}, "tls.cert must be an absolute path"),
        ({"auth": {"token_file": ""}}, "neither auth.token_file nor auth.ca_file"),
        ({"auth": {"client_names": "x"}}, "auth.client_names must be a list of names"),
        ({"auth": {"client_names": ["a b"]}}, "auth.client_names must be a host name"),
        ({"pve": {"token_id": "dr@pve"}}, "pve.token_id must be user@realm!token"),
        ({"pve": {"fingerprint": "AA"}}, "pve.fingerprint must be SHA-256"),
        ({"pve": {"fingerprint": 7}}, "pve.fingerprint must be a fingerprint"),
        ({"replicas": {"bridge_map": "a:b,a:c"}}, "replicas.bridge_map maps a twice"),
        ({"retention": {"min": 0}}, "retention.min must be a whole number from 1"),
        ({"metrics": {"port": 9190}}, "metrics.port and port are both 9190"),
        ({"name": "A b"}, "name must be letters, digits"),
    ],
)
def test_a_wrong_key_is_said_with_its_name(tables, said):
    with pytest.raises(ConfigError) as caught:
        parsed(**tables)
    assert said in str(caught.value)
    assert caught.value.key


def test_what_must_be_there_is_asked_for():
    with pytest.raises(ConfigError, match=r"tls\.cert is missing: certificate"):
        parse_receiver({**LEAST, "tls": {"key": "/k"}}, Node())


def test_certificates_alone_are_an_authentication():
    config = parsed(auth={"token_file": "", "ca_file": "/etc/ca.pem"})
    assert config.token() is None


def test_the_file_is_named_in_every_complaint(tmp_path):
    path = tmp_path / "receiver-x.toml"
    with pytest.raises(ConfigError, match="does not exist; `pveplug receiver init`"):
        load_receiver(path, Node())
    path.write_text("port =")
    with pytest.raises(ConfigError, match=r"receiver-x\.toml: "):
        load_receiver(path, Node())
    path.write_text("port = 0")
    with pytest.raises(ConfigError, match=r"receiver-x\.toml: "):
        load_receiver(path, Node())


def test_what_receiver_init_writes_is_read(tmp_path, capsys):
    assert main(["receiver", "init", "--dir", str(tmp_path), "--name", "dr"]) == 0
    (tmp_path / "receiver-dr.secret").write_text("s3cret")
    (tmp_path / "receiver-dr.secret").chmod(0o600)
    config = load_receiver(tmp_path / "receiver-dr.toml", Node())
    config.check_files()
    assert config.name == "dr"
    assert config.token() is not None


def files(tmp_path):
    made = {}
    for name in ("cert", "key", "token", "secret"):
        made[name] = tmp_path / name
        made[name].write_text("0123456789abcdef")
        made[name].chmod(0o600)
    return made, parsed(
        tls={"cert": str(made["cert"]), "key": str(made["key"])},
        auth={"token_file": str(made["token"])},
        pve={"token_secret_file": str(made["secret"])},
    )


def test_secrets_are_read_from_files_only_we_read(tmp_path):
    made, config = files(tmp_path)
    config.check_files()
    assert config.token().reveal() == "0123456789abcdef"
    assert config.pve_secret().reveal() == "0123456789abcdef"
    for name in ("key", "token", "secret"):
        made[name].chmod(0o640)
        with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
            config.check_files()
        made[name].chmod(0o600)
    made["cert"].chmod(0o644)
    config.check_files()
    made["cert"].unlink()
    with pytest.raises(ConfigError, match=r"tls.cert: cannot read .*cert"):
        config.check_files()


def test_the_example_shows_every_key_with_its_default():
    text = (REPOSITORY / "deploy" / "receiver-main.toml").read_text()
    active = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    found = tomllib.loads(active)
    shown = {
        f"{table}.{key}" if isinstance(values, dict) else table
        for table, values in found.items()
        for key in (values if isinstance(values, dict) else [""])
    }
    assert shown == {key.name for key in KEYS}
    as_shipped = parse_receiver(tomllib.loads(text), Node())
    assert parse_receiver(found, Node()) == as_shipped


def test_a_fifo_in_the_place_of_a_key_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "key"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(ConfigError, match=r"tls\.key: .* is not a regular file"):
        check_file("tls.key", str(pipe), private=True)
