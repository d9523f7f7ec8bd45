# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time

import pytest

from pveplug import secrets
from pveplug.errors import ConfigError
from pveplug.secrets import Origin, Secret, SecretSource


def from_file(path):
    return SecretSource("pve_token_secret_file", Origin.FILE, str(path)).resolve()


def from_command(line):
    return SecretSource("pve_token_secret_cmd", Origin.COMMAND, line).resolve()


def test_a_secret_shows_itself_nowhere_but_in_reveal():
    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {secret:>10} {[secret]}"
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2")


def test_a_file_only_its_owner_reads_gives_its_one_line(tmp_path):
    path = tmp_path / "token"
    path.write_text("11111111-2222\n")
    path.chmod(0o600)
    assert from_file(path).reveal() == "11111111-2222"
    path.chmod(0o400)
    assert from_file(path).reveal() == "11111111-2222"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_others_can_read_is_refused_with_the_command_that_helps(tmp_path, mode):
    path = tmp_path / "token"
    path.write_text("x")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        from_file(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a\nb\n", "one line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * 20000, "longer than"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused(tmp_path, content, said):
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=said):
        from_file(path)


def test_a_missing_file_a_directory_and_a_fifo_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        from_file(tmp_path / "gone")
    with pytest.raises(ConfigError, match="not a regular file"):
        from_file(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        from_file(tmp_path / "fifo")


def test_a_command_runs_without_a_shell_and_in_the_c_locale():
    assert from_command("echo '$HOME;' ok").reveal() == "$HOME; ok"
    assert from_command("sh -c 'echo $LC_ALL'").reveal() == "C"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("false", "status 1: it said nothing"),
        ("sh -c 'echo no vault >&2; exit 3'", "status 3: no vault"),
        ("true", "is empty"),
        ("/no/such/program", "cannot run /no/such/program: No such file"),
        ("echo 'open", "not a command line"),
        ("yes", "printed more than"),
    ],
)
def test_a_command_that_gives_no_secret_is_refused(line, said):
    with pytest.raises(ConfigError, match=said):
        from_command(line)


def test_a_command_that_hangs_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(secrets, "COMMAND_LIMIT_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="did not finish"):
        from_command("sh -c 'sleep 60; echo x'")
    with pytest.raises(ConfigError, match="did not finish"):
        from_command("sh -c 'exec >&- 2>&-; sleep 60'")
    assert time.monotonic() - begun < 10
