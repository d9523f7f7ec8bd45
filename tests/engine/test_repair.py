# SPDX-License-Identifier: Apache-2.0
"""``pveplug repair``: what it says, what it leaves alone, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from pveplug import command_repair, repair
from pveplug.cli import main
from pveplug.journal import own_vm
from pveplug.node import Node
from pveplug.pve_local import PveLocal
from pveplug.repair import repair_vm
from tests.engine.test_recovery import ScriptedLocal, dead
from tests.engine.test_watchdog import ScriptedAgent

LEFT = 1
BUSY = 75


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    found = Node(
        qemu_run_dir=str(tmp_path),
        state_dir=str(tmp_path / "state"),
        runtime_dir=str(tmp_path / "run"),
        scratch_dir=str(tmp_path / "scratch"),
    )
    Path(found.scratch_dir).mkdir()
    keys = ("qemu_run_dir", "state_dir", "runtime_dir", "scratch_dir")
    text = "".join(f"{key} = {json.dumps(getattr(found, key))}\n" for key in keys)
    (tmp_path / "node.toml").write_text(text)
    monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", str(tmp_path / "node.toml"))
    return found


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> ScriptedLocal:
    found = ScriptedLocal()
    found.running = False
    monkeypatch.setattr(command_repair, "PveLocal", lambda node: found)
    return found


def files(base: Path) -> dict[str, object]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in base.rglob("*")
    }


def says(
    capsys: pytest.CaptureFixture[str], *arguments: str, vm: str = "--vmid=100"
) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["repair", vm, *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out.splitlines()


def test_a_vm_with_nothing_of_ours_is_well(
    node: Node,
    local: ScriptedLocal,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = files(tmp_path)
    well = ["VM 100: nothing of ours is left"]
    assert says(capsys, "--dry-run") == (0, [f"dry run: {well[0]}"])
    assert files(tmp_path) == before  # not even a directory for the journals
    assert says(capsys) == (0, well)
    assert says(capsys, vm="--all") == (0, ["nothing of ours is left on this node"])
    assert local.did == []


def test_a_vm_that_is_gone_is_no_failure(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    local.values = None
    dead(node, locked=True)
    assert says(capsys) == (0, ["VM 100: nothing of ours is left"])


@pytest.mark.parametrize("vm", ["--vmid=100", "--all"])
def test_a_dry_run_says_the_same_and_changes_nothing(
    node: Node,
    local: ScriptedLocal,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    vm: str,
) -> None:
    scratch = [Path(node.scratch_dir) / f"ph-100-scsi{n}.qcow2" for n in (0, 1)]
    other = tmp_path / "elsewhere"
    other.mkdir()
    scratch.append(other / "ph-100-scsi2.qcow2")
    for path in scratch:
        path.touch()
    local.values = {"lock": "backup"}
    local.volumes = {"s:vm-100-fleece-0"}
    more = {"volumes": ["s:vm-100-fleece-0"], "active": ["s:vm-100-fleece-0"]}
    dead(node, locked=True, files=[str(scratch[0])], **more)
    directory = f"--scratch-dir={other}"
    before = files(tmp_path)
    status, would = says(capsys, "--dry-run", directory, vm=vm)
    assert status == LEFT
    assert local.did == []
    assert files(tmp_path) == before
    status, did = says(capsys, directory, vm=vm)
    assert status == 0
    assert did == [
        *(f"VM 100: removed {path}" for path in scratch),
        "VM 100: deactivated s:vm-100-fleece-0",
        "VM 100: freed s:vm-100-fleece-0",
        "VM 100: unlocked the VM",
        "6 things undone; 0 left; 0 with a running job",
    ]
    assert would[:-1] == [f"dry run: {line}" for line in did[:-1]]
    assert would[-1].startswith("dry run: 6 things would be undone, nothing was")
    assert says(capsys, directory)[0] == 0
    assert not any(path.exists() for path in scratch)


def test_an_unfinished_restore_goes_with_its_volumes(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    local.values = {"smbios1": "uuid=u-1", "lock": "backup"}
    dead(node, "restore", created=True, uuid="u-1", locked=True)
    status, would = says(capsys, "--dry-run")
    assert status == LEFT
    assert len(would) == 2
    assert local.did == []
    assert says(capsys)[0] == 0
    assert local.did == ["destroy"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
async def test_a_running_job_is_named_and_left_alone(
    node: Node,
    local: ScriptedLocal,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dry: list[str],
) -> None:
    dead(node, locked=True)
    local.values = {"lock": "backup"}
    argv = [sys.executable, "-m", "pveplug.cli", "repair", "--vmid", "100", *dry]
    async with own_vm(node.state_dir, 100, 0):
        before = files(tmp_path)
        done = subprocess.run(argv, capture_output=True, text=True)
        assert files(tmp_path) == before
    assert done.returncode == BUSY
    assert "job nightly.2026-11-23_01.00.00_03 (pid 1) is working on" in done.stdout
    assert done.stdout.endswith("0 left; 1 with a running job\n")
    assert local.did == []


def test_what_cannot_be_undone_is_named_and_stays_in_the_journal(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    local.values = {"lock": "backup"}
    dead(node, locked=True)
    local.fails["unlock"] = RuntimeError("no\nquorum")
    status, said = says(capsys)
    assert status == LEFT
    assert said == [
        "VM 100: left: could not be done: unlocked the VM: no quorum",
        "0 things undone; 1 left; 0 with a running job",
    ]
    del local.fails["unlock"]
    assert says(capsys)[0] == 0
    assert local.values == {}


def test_a_lock_that_no_journal_knows_stays_and_is_named(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    local.values = {"lock": "backup"}
    for _ in range(2):
        status, said = says(capsys)
        assert status == LEFT
        assert "left: the VM is locked (backup), not by a job of ours" in said[0]
        assert said[0].endswith("qm unlock 100")
        dead(node, asking=True)  # without the proof
    local.values = {"lock": "migrate"}
    assert says(capsys)[0] == 0
    assert local.did == []


def test_volumes_named_like_ours_and_vzdumps_stay_and_are_named(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    local.volumes = {"s:vm-100-fleece-0", "s:vm-100-fleece-1", "s:vm-1001-fleece-0"}
    dead(node, volumes=["s:vm-100-fleece-1"])
    status, said = says(capsys)
    assert status == LEFT
    assert said[0] == "VM 100: freed s:vm-100-fleece-1"
    assert "left: s:vm-100-fleece-0 is there, a scratch volume of ours or" in said[1]
    assert local.did == ["free s:vm-100-fleece-1"]


@contextlib.contextmanager
def agent(node: Node) -> Iterator[ScriptedAgent]:
    made = ScriptedAgent(Path(node.qga_socket(100)))
    made.frozen = 1
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("dry", [True, False])
async def test_a_guest_frozen_by_somebody_else_stays_frozen_and_is_named(
    node: Node, local: ScriptedLocal, dry: bool
) -> None:
    local.running = True
    local.values = {"agent": "1"}
    with agent(node) as guest:
        found = await repair_vm(node, cast(PveLocal, local), 100, dry=dry)
        assert found.did == []
        assert len(found.left) == 1
        assert "qm guest cmd 100 fsfreeze-thaw" in found.left[0]
        assert "guest-fsfreeze-thaw" not in guest.commands


async def test_a_guest_that_we_have_frozen_is_thawed(
    node: Node, local: ScriptedLocal
) -> None:
    local.running = True
    local.values = {"agent": "1"}
    dead(node, frozen=True)
    with agent(node) as guest:
        would = await repair_vm(node, cast(PveLocal, local), 100, dry=True)
        assert "guest-fsfreeze-thaw" not in guest.commands
        assert await repair_vm(node, cast(PveLocal, local), 100) == would
        assert would.did == ["thawed the guest"]
        assert "guest-fsfreeze-thaw" in guest.commands


async def test_a_silent_agent_is_left_for_the_next_repair_where_we_froze_it(
    node: Node, local: ScriptedLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pveplug.recovery.AGENT_S", 0.01)
    monkeypatch.setattr(repair, "AGENT_S", 0.01)
    local.running = True
    local.values = {"agent": "1"}
    assert (await repair_vm(node, cast(PveLocal, local), 100)).left == []
    dead(node, frozen=True)
    for _ in range(2):
        found = await repair_vm(node, cast(PveLocal, local), 100)
        assert "guest agent can't be asked" in found.left[0]


def test_sockets_of_dead_processes_go_and_others_stay(
    node: Node, local: ScriptedLocal, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(node.runtime_dir)
    run.mkdir()
    mine = f"nbd-{os.getpid()}-ab.sock"
    for name in (mine, "nbd-4194999-ab.sock", "nbd-x.sock", "nbd-4194999-ab.sock.1"):
        (run / name).touch()
    assert says(capsys, "--dry-run", vm="--all")[0] == LEFT
    status, said = says(capsys, vm="--all")
    assert status == 0
    assert said[0] == f"removed {run}/nbd-4194999-ab.sock"
    assert len(list(run.iterdir())) == 3


@pytest.mark.parametrize(
    "wrong", [[], ["--vmid=0"], ["--vmid=-1"], ["--vmid=1x"], ["--vmid=1", "--all"]]
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["repair", *wrong])
    assert caught.value.code == 2
