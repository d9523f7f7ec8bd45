# SPDX-License-Identifier: Apache-2.0
"""``pveplug receiver init``: what it makes, and that it overwrites nothing."""

from __future__ import annotations

import datetime
import stat
import tomllib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from pveplug.cli import main
from pveplug.dr.receiver_config import load_receiver
from pveplug.dr.tls import ClientAuth, ServerAuth, client_trust, server_trust
from pveplug.node import Node

CA = ("--with-ca", "--client-host", "192.0.2.1")


def init(folder, *options):
    return main(["receiver", "init", "--dir", str(folder), *options])


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(loaded, kind):
    return loaded.extensions.get_extension_for_class(kind).value


def test_it_makes_what_a_receiver_reads(tmp_path, capsys):
    hosts = ("--host", "dr.example.org", "--host", "192.0.2.7")
    assert init(tmp_path / "etc", "--name", "b", *hosts, "--port", "9999") == 0
    base = tmp_path / "etc" / "receiver-b"
    written = tomllib.loads(base.with_name("receiver-b.toml").read_text())
    token = base.with_name("receiver-b.token").read_text()
    assert written == {
        "name": "b",
        "bind": "0.0.0.0",
        "port": 9999,
        "state_dir": "/var/lib/podheitor-proxmox/receiver/b",
        "tls": {"cert": f"{base}.crt", "key": f"{base}.key"},
        "auth": {"token_file": f"{base}.token"},
        "pve": {
            "host": "127.0.0.1",
            "port": 8006,
            "node": written["pve"]["node"],
            "token_id": "podheitor@pve!receiver",
            "token_secret_file": f"{base}.secret",
            "fingerprint": "",
        },
        "replicas": {"storage": "", "bridge_map": "", "pool": ""},
        "retention": {"min": 3, "lock_days": 0},
        "limits": {"sessions": 16, "stage_dir": "", "keep_free_mib": 1024},
        "metrics": {"port": 9191},
    }
    assert len(bytes.fromhex(token)) == 32
    said = capsys.readouterr().out
    made = certificate(base.with_name("receiver-b.crt"))
    pin = made.fingerprint(hashes.SHA256()).hex()
    assert pin.upper() in said.replace(":", "")
    assert f"{base}.token" in said
    assert "dr_host=dr.example.org dr_port=9999" in said
    assert token.strip() not in said
    auth = ServerAuth(f"{base}.crt", f"{base}.key", token.strip().encode())
    assert server_trust(auth).own == bytes.fromhex(pin)


@pytest.mark.parametrize("options", [(), CA], ids=["token", "token and CA"])
def test_the_receiver_reads_its_own_configuration(tmp_path, options):
    assert init(tmp_path, *options) == 0
    (tmp_path / "receiver-main.secret").touch(0o600)
    (tmp_path / "receiver-main.secret").write_text("aaaa-bbbb\n")
    config = load_receiver(tmp_path / "receiver-main.toml", Node())
    config.check_files()
    assert config.name == "main"
    assert (config.port, config.retention_min, config.metrics_port) == (9190, 3, 9191)
    assert bool(config.ca_file) == bool(options)
    assert len(config.token().reveal()) == 64


def test_its_certificate_is_of_version_3_and_names_the_hosts(tmp_path):
    assert init(tmp_path, "--host", "dr.example.org", "--host", "192.0.2.7") == 0
    made = certificate(tmp_path / "receiver-main.crt")
    assert made.version is x509.Version.v3
    assert isinstance(made.public_key().curve, ec.SECP256R1)
    assert made.issuer == made.subject
    names = extension(made, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["dr.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["192.0.2.7"]
    years = made.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 3650 <= years.days <= 3654


def test_with_a_ca_both_ends_have_certificates_from_it(tmp_path, capsys):
    assert init(tmp_path, "--host", "192.0.2.7", *CA) == 0
    at = {path.name: path for path in tmp_path.iterdir()}
    ca = certificate(at["receiver-main-ca.crt"])
    assert extension(ca, x509.BasicConstraints).ca
    for name, host in (
        ("receiver-main", "192.0.2.7"),
        ("receiver-main-sender", "192.0.2.1"),
    ):
        made = certificate(at[f"{name}.crt"])
        made.verify_directly_issued_by(ca)
        names = extension(made, x509.SubjectAlternativeName)
        assert list(map(str, names.get_values_for_type(x509.IPAddress))) == [host]
    written = tomllib.loads(at["receiver-main.toml"].read_text())
    assert written["auth"] == {
        "token_file": str(at["receiver-main.token"]),
        "ca_file": str(at["receiver-main-ca.crt"]),
    }
    sender = at["receiver-main-sender.crt"], at["receiver-main-sender.key"]
    client_trust(ClientAuth(None, *map(str, sender), str(at["receiver-main-ca.crt"])))
    assert "dr_auth_ca=" in capsys.readouterr().out


def test_only_the_owner_reads_what_is_secret(tmp_path):
    assert init(tmp_path, *CA) == 0
    secret = {
        path.suffix
        for path in tmp_path.iterdir()
        if stat.S_IMODE(path.stat().st_mode) == 0o600
    }
    assert secret == {".key", ".token"}


@pytest.mark.parametrize(
    "name", ["receiver-main.token", "receiver-main.crt", "receiver-main.toml"]
)
def test_what_exists_is_left_as_it_is(tmp_path, name, capsys):
    (tmp_path / name).symlink_to("/nowhere")
    assert init(tmp_path) == 78
    assert f"{tmp_path / name} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_run_changes_nothing(tmp_path):
    assert init(tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert init(tmp_path) == 78
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_fails_halfway_leaves_nothing(tmp_path, monkeypatch, capsys):
    from pveplug import command_receiver

    write, count = command_receiver._write_new, iter(range(9))

    def full(one):
        if next(count) == 2:
            raise OSError(28, "No space left on device", str(one.path))
        write(one)

    monkeypatch.setattr(command_receiver, "_write_new", full)
    assert init(tmp_path) == 78
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--name", "../x"), "--name"),
        (("--name", ""), "--name"),
        (("--host", "a b"), "neither a host name nor an address"),
        (("--host", ""), "neither a host name nor an address"),
        (("--port", "0"), "--port 0"),
        (("--with-ca",), "--client-host"),
        (("--client-host", "192.0.2.1"), "--with-ca"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, text, capsys):
    assert init(tmp_path / "new", *options) == 78
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_odd_paths_survive_the_configuration(tmp_path):
    folder = tmp_path / 'a "b" \\ ü'
    assert init(folder) == 0
    written = tomllib.loads((folder / "receiver-main.toml").read_text())
    assert written["tls"]["cert"] == str(folder / "receiver-main.crt")
