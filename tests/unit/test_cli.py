# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datetime
import hashlib
import io
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pveplug import __version__
from pveplug.cli import COMMANDS, main, receiver_main
from pveplug.command_pin import host_and_port
from pveplug.errors import ConfigError
from pveplug.parameters import PARAMETERS
from pveplug.values import fingerprint

STRING = "vmid=100 pve_token_id=bacula@pve!backup pve_token_secret=hunter2"


@pytest.fixture(autouse=True)
def _node_file(tmp_path, monkeypatch):
    path = tmp_path / "node.toml"
    path.write_text('pve_node = "lab"\n')
    monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", str(path))


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"pveplug {__version__}\n"


def test_help_lists_every_parameter_and_explains_one(capsys):
    assert main(["help", "parameters"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in PARAMETERS)
    assert main(["help", "parameters", "quiesce", "vmid"]) == 0
    out = capsys.readouterr().out
    assert "quiesce: freeze" in out
    assert "default:  auto" in out
    assert main(["help"]) == 0
    assert "check-config" in capsys.readouterr().out


def test_help_for_an_unknown_parameter_suggests_one(capsys):
    assert main(["help", "parameters", "quiese"]) == 78
    assert "did you mean quiesce?" in capsys.readouterr().err


def test_without_a_command_the_usage_is_shown_and_the_status_says_so(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "podheitor-proxmox: "])
def test_check_config_shows_the_result_without_secrets(capsys, prefix):
    assert main(["check-config", prefix + STRING]) == 0
    out = capsys.readouterr().out
    assert "selection.vmid = 100\n" in out
    assert "connection.node = lab\n" in out
    assert "connection.secret = *** (from pve_token_secret)\n" in out
    assert "warning: pve_token_secret is stored in the catalogue" in out
    assert "hunter2" not in out


def test_check_config_reads_standard_input_and_compares_the_level(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{STRING} backup_type=full\n"))
    assert main(["check-config", "--level", "I", "--read-secrets", "-"]) == 0
    out = capsys.readouterr().out
    assert "backup_type=full is not what Bacula runs" in out
    assert "the secret could be read" in out


def test_check_config_shows_a_restore(capsys):
    where = "/@pve/restore_vmid=120,storage_map=a:b;c:d"
    assert main(["check-config", "--where", where, STRING]) == 0
    out = capsys.readouterr().out
    assert "target = vm\n" in out
    assert "storage_map = a:b,c:d\n" in out


def test_check_config_ends_with_78_and_one_line_for_a_wrong_string(capsys):
    assert main(["check-config", "vmid=1OO"]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pveplug: vmid=1OO: ")
    assert captured.err.count("\n") == 1


@pytest.fixture
def tls_server(tmp_path):
    """A TLS server on loopback; yields its port and its certificate's SHA-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pve1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.num_tickets = 0  # unread tickets turn the client's close into a reset
    received: list[bytes] = []

    def serve(listener):
        plain, _ = listener.accept()
        with plain, context.wrap_socket(plain, server_side=True) as wrapped:
            received.append(wrapped.recv(100))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        der = certificate.public_bytes(serialization.Encoding.DER)
        digest = fingerprint(hashlib.sha256(der).hexdigest())
        yield listener.getsockname()[1], digest, received
        thread.join(10)
    assert received == [b""], "pin must not send anything"


def test_pin_shows_the_parameter_to_paste(capsys, tls_server):
    port, digest, _ = tls_server
    assert main(["pin", f"127.0.0.1:{port}"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"pve_fingerprint={digest}\n"
    assert "CN=pve1" in captured.err
    assert PARAMETERS["pve_fingerprint"].parse(digest) == (digest,)


def test_pin_says_why_it_got_no_certificate(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["pin", "--timeout", "0.2", f"127.0.0.1:{port}"]) == 69
    assert main(["pin", f"127.0.0.1:{port}"]) == 69
    said = capsys.readouterr().err.splitlines()
    assert "timed out" in said[0]
    assert "Connection refused" in said[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pve1", ("pve1", 8006)),
        ("pve1:443", ("pve1", 443)),
        ("2001:db8::1", ("2001:db8::1", 8006)),
        ("[2001:db8::1]", ("2001:db8::1", 8006)),
        ("[2001:db8::1]:443", ("2001:db8::1", 443)),
    ],
)
def test_hosts_are_split_from_ports(text, expected):
    assert host_and_port(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "h:", "h:0", "h:x", "h:70000"])
def test_what_is_no_host_is_refused(text):
    with pytest.raises(ConfigError):
        host_and_port(text)


def test_the_receiver_has_a_program_of_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        receiver_main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("podheitor-proxmox-receiver ")


def test_a_command_brings_only_what_it_needs() -> None:
    code = (
        "import sys\n"
        "from pveplug.cli import command_parser\n"
        "command_parser(None).format_help()\n"
        "print(sorted(m for m in sys.modules if m.startswith('pveplug.')))\n"
        "command_parser('import')\n"
        "print('aiohttp' in sys.modules, 'pveplug.command_dr' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "['pveplug.cli', 'pveplug.errors']",
        "False False",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"pveplug {command}" in capsys.readouterr().out
