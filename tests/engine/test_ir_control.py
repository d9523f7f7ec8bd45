# SPDX-License-Identifier: Apache-2.0
"""How keepers are started and ended: they are real, systemd is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pveplug.errors import TransportError
from pveplug.ir import control
from pveplug.ir.control import State, ask, retire, start_keeper
from pveplug.ir.landing import Landing
from pveplug.ir.record import LandedDisk, Record, Recovery
from pveplug.node import Node

VMID = 120
SYSTEMCTL = """#!/bin/sh
echo "$*" >> {place}/said
[ -f {place}/refuses ] && {{ cat {place}/refuses >&2; exit 1; }}
case "$1 $2" in
"enable --now") {python} -m pveplug.ir.keeper {vmid} >/dev/null 2>&1 & ;;
esac
exit 0
"""


class Place:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.node = Node(
            landing_dir=f"{path}/l",
            runtime_dir=f"{path}/r",
            qemu_run_dir=str(path),
            qm="/bin/false",
            systemctl=f"{path}/systemctl",
            keeper="unit",
        )
        self.recovery = Recovery(self.node, VMID)
        program = path / "systemctl"
        program.write_text(
            SYSTEMCTL.format(place=path, python=sys.executable, vmid=VMID)
        )
        program.chmod(0o755)

    def make(self) -> None:
        """A recovery of one disk of which nothing is here."""
        self.recovery.make()
        record = Record(VMID, "u", "pve1", "/@proxmox/1", "n.1", "r.1", 1.0)
        record.disks = [
            LandedDisk("scsi0", "scsi0", 1 << 20, "lvm", "raw", "local:1/o.qcow2")
        ]
        record.handed = True
        folder, runtime = self.recovery.folder, self.recovery.runtime
        Landing.create(folder, runtime, "scsi0", 1 << 20).close()
        self.recovery.save(record)

    def said(self) -> list[str]:
        return (self.path / "said").read_text().splitlines()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # Not tmp_path: a socket's path has to be short.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        found = Place(Path(name))
        lines = [
            f'{key} = "{getattr(found.node, key)}"'
            for key in ("landing_dir", "runtime_dir", "qm", "systemctl", "keeper")
        ]
        (found.path / "node.toml").write_text("\n".join(lines))
        monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", f"{name}/node.toml")
        yield found


UNIT = "podheitor-proxmox-ir@120.service"


async def test_a_unit_is_enabled_for_the_next_boot_and_disabled_at_the_end(
    place: Place,
) -> None:
    place.make()
    try:
        state = await start_keeper(place.node, place.recovery)
        assert state.owed == 1 << 20
        assert place.said() == [f"enable --now {UNIT}"]
        # Who asks again starts no other.
        await start_keeper(place.node, place.recovery)
        assert len(place.said()) == 1
    finally:
        await retire(place.node, place.recovery)
    # Once, or twice: the keeper as well, where it sees that its recovery is gone.
    assert set(place.said()[1:]) == {f"disable {UNIT}"}
    assert not place.recovery.exists()
    assert not place.recovery.kept()


async def test_a_unit_that_systemd_does_not_start_says_what_else_there_is(
    place: Place,
) -> None:
    place.make()
    (place.path / "refuses").write_text("Unit not found.")
    with pytest.raises(TransportError) as raised:
        await start_keeper(place.node, place.recovery)
    text = str(raised.value)
    assert f"systemd does not start {UNIT}" in text
    assert "Unit not found." in text
    assert 'keeper = "child" in node.toml' in text


async def test_a_keeper_that_was_just_ending_gets_a_successor(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    monkeypatch.setattr(control, "BEGIN_S", 0.5)
    async with contextlib.AsyncExitStack() as stack:
        # It holds its lock still, and answers nobody any more.
        await stack.enter_async_context(place.recovery.keeping())
        starting = asyncio.create_task(start_keeper(place.node, place.recovery))
        await asyncio.sleep(0.3)
        assert not (place.path / "said").exists()
        await stack.aclose()
        try:
            assert (await starting).owed
        finally:
            await retire(place.node, place.recovery)


async def test_a_keeper_without_a_recovery_is_disabled_and_ends_well(
    place: Place,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pveplug.ir.keeper", str(VMID)
    )
    assert await process.wait() == 0
    assert place.said() == [f"disable {UNIT}"]


async def test_nobody_who_answers_is_said_with_the_way_to_start_one(
    place: Place,
) -> None:
    place.make()
    with pytest.raises(TransportError, match="pveplug ir resume --vmid 120"):
        await ask(place.recovery, "status")


def test_a_state_of_a_newer_keeper_is_understood() -> None:
    values = {**asdict(State("landed")), "mood": "fine"}
    assert State.parsed(values) == State("landed")
