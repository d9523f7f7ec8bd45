# SPDX-License-Identifier: Apache-2.0
"""``pveplug ir status|migrate|discard|resume`` on a node whose ``qm`` is scripted."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pveplug.cli import main
from pveplug.config import Instant
from pveplug.errors import JobError
from pveplug.ir.landing import Landing
from pveplug.ir.record import RECORD, LandedDisk, Record, Recovery
from pveplug.ir.target import _port
from pveplug.node import load_node

OVERLAY = "local:120/vm-120-disk-0.qcow2"
SIZE = 1 << 20
# A VM until it is destroyed; pvesm lists nothing.
QM = """#!/bin/sh
echo "$1" >> {place}/did
[ "$1" = config ] && [ -f {place}/gone ] && {{
    echo "Configuration file 'nodes/p/qemu-server/120.conf' does not exist" >&2
    exit 2
}}
[ "$1" = config ] && echo 'smbios1: uuid=u-1' && echo 'scsi0: {overlay}'
[ "$1" = destroy ] && : > {place}/gone
exit 0
"""


class Place:
    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [
            *(f'{key}_dir = "{path}/{key}"' for key in ("landing", "runtime")),
            *(f'{key} = "{path}/{key}"' for key in ("qm", "pvesm")),
            *(f'qemu_run_dir = "{path}"', f'firewall_dir = "{path}"'),
            'keeper = "child"',
        ]
        (path / "node.toml").write_text("\n".join(lines))
        self.recovery = Recovery(load_node(path / "node.toml"), 120)
        for name, text in (
            ("qm", QM.format(place=path, overlay=OVERLAY)),
            ("pvesm", "#!/bin/sh\nexit 0\n"),
        ):
            (path / name).write_text(text)
            (path / name).chmod(0o755)

    def make(self) -> None:
        self.recovery.make()
        record = Record(120, "u-1", "pve1", "/@proxmox/1", "n.1", "r.1", 1.0)
        record.disks = [LandedDisk("scsi0", "scsi0", SIZE, "lvm", "raw", OVERLAY)]
        record.handed = True
        folder, runtime = self.recovery.folder, self.recovery.runtime
        Landing.create(folder, runtime, "scsi0", SIZE).close()
        self.recovery.save(record)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # Not tmp_path: a socket's path has to be short.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        found = Place(Path(name))
        monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", f"{name}/node.toml")
        yield found
        found.recovery.remove()  # a keeper that runs sees that and ends


Capture = pytest.CaptureFixture[str]


def test_without_a_recovery_status_says_so(place: Place, capsys: Capture) -> None:
    assert main(["ir", "status"]) == 0
    assert capsys.readouterr().out == "no instant recovery is under way on this node\n"
    assert main(["ir", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("action", ["migrate", "discard", "resume"])
def test_without_a_recovery_nothing_is_done_to_the_vm(
    place: Place, capsys: Capture, action: str
) -> None:
    assert main(["ir", action, "--vmid", "120"]) == 69
    assert "no instant recovery of it is under way" in capsys.readouterr().err
    assert not (place.path / "did").exists()


def test_status_of_a_damaged_record_names_it_and_the_remedy(
    place: Place, capsys: Capture
) -> None:
    place.make()
    (place.recovery.folder / RECORD).write_text("{")
    assert main(["ir", "status"]) == 1
    out = capsys.readouterr().out
    assert f"VM 120: {place.recovery.folder / RECORD} can't be read" in out
    assert "stop and destroy the VM" in out
    assert main(["ir", "status", "--json"]) == 1
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["vmid"] == 120
    assert "can't be read" in shown["trouble"]


def test_status_without_a_keeper_says_how_to_start_one(
    place: Place, capsys: Capture
) -> None:
    place.make()
    assert main(["ir", "status"]) == 1
    out = capsys.readouterr().out
    assert "not served" in out
    assert "`pveplug ir resume --vmid 120` starts one" in out
    assert main(["ir", "status", "--json"]) == 1
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["served"] is False
    assert shown["state"] is None


def test_giving_up_asks_a_terminal_and_takes_nothing_else_for_a_yes(
    place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    monkeypatch.setattr("sys.stdin", io.StringIO("120\n"))  # no terminal
    assert main(["ir", "discard", "--vmid", "120"]) == 2
    assert "give --yes" in capsys.readouterr().err
    terminal = io.StringIO("yes\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["ir", "discard", "--vmid", "120"]) == 2
    assert "Type its id" in capsys.readouterr().out
    assert not (place.path / "did").exists()
    assert place.recovery.load()


def test_a_keeper_is_started_asked_and_ended_by_hand(
    place: Place, capsys: Capture
) -> None:
    place.make()
    # A process of its own, as the keeper's parent is in life.
    argv = [sys.executable, "-m", "pveplug", "ir", "resume", "--vmid", "120"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "1.0 MiB are owed: run its restore job again" in done.stdout
    assert main(["ir", "status", "--vmid", "120"]) == 0
    assert "landing" in capsys.readouterr().out
    # With data owed nothing moves; it is noted, and that is said.
    assert main(["ir", "migrate", "--vmid", "120"]) == 69
    err = capsys.readouterr().err
    assert "1.0 MiB of its data have not arrived" in err
    assert "run its restore job again" in err
    assert place.recovery.migration_wanted()
    assert main(["ir", "discard", "--vmid", "120", "--yes"]) == 0
    assert "everything of the recovery is removed" in capsys.readouterr().out
    assert "destroy" in (place.path / "did").read_text().split()
    assert not place.recovery.exists()


def test_a_port_in_use_is_said_before_anything_is_made() -> None:
    first = Instant(nbd_bind="127.0.0.1", nbd_port=0)
    assert _port(Instant()) == 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", _port(first)))
        other.listen()
        taken = Instant(nbd_bind="127.0.0.1", nbd_port=other.getsockname()[1])
        with pytest.raises(JobError, match="ir_nbd_port of its own"):
            _port(taken)
