# SPDX-License-Identifier: Apache-2.0
"""``pveplug dr``: what is refused before anything is contacted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pveplug.cli import main
from pveplug.command_dr import status_table


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("")
    monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", str(file))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["status", "vmid=100"], 78, "mode=status needs dr_host"),
        (["seed", "dr_host=b", "vmid=100"], 78, "no credential for the receiver"),
        (["seed", "dr_host=b", "dr_auth_token_file=/t"], 78, "no credential for the"),
        (["failover-test", "dr_host=b", "dr_auth_token_file=/t"], 78, "no VM is"),
        (["status", "dr_hots=b"], 78, "did you mean dr_host?"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dr", *words]) == status
    assert said in capsys.readouterr().err


def test_a_token_file_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "token"
    assert main(["dr", "status", "dr_host=b", f"dr_auth_token_file={missing}"]) == 78
    assert f"dr_auth_token_file: cannot read {missing}" in capsys.readouterr().err


def test_a_receiver_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("t" * 64)
    token.chmod(0o600)
    words = ["dr_host=127.0.0.1", "dr_port=1", f"dr_auth_token_file={token}"]
    assert main(["dr", "status", *words]) == 69
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_mode_that_is_none_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dr", "backup", "vmid=100"])
    assert caught.value.code == 2
    assert "failover-exec" in capsys.readouterr().err


def test_status_is_a_table_for_people() -> None:
    found = {
        "source_vmid": 100,
        "source_name": "web",
        "site": "pve1",
        "vmid": 9100,
        "role": "standby",
        "epoch": 2,
        "points": [{"name": "ph-rp0001", "instant": 5}],
        "health": "ok",
        "late": False,
    }
    head, *rows = status_table([found, {**found, "points": [], "late": True}]).split(
        "\n"
    )
    assert head.split() == [
        *("SOURCE", "SITE", "REPLICA", "ROLE", "EPOCH", "POINTS", "NEWEST", "LAG"),
        "HEALTH",
    ]
    assert rows[0].split()[:8] == "100 web pve1 9100 standby 2 1 ph-rp0001".split()
    assert rows[0].endswith(" d  ok")
    assert rows[1].split()[-4:] == ["0", "-", "-", "late"]
    assert status_table([]) == ""
