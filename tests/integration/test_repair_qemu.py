# SPDX-License-Identifier: Apache-2.0
"""Repairs of a real QEMU, with somebody else's things right beside ours."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pveplug.cbt import Level
from pveplug.cleanup import clean_up
from pveplug.journal import open_journal, read_entry
from pveplug.node import Node
from pveplug.proto.pve_values import VmConfig
from pveplug.pve_local import PveLocal, VmProcess
from pveplug.qmp import Qmp
from pveplug.repair import candidates, repair_vm
from pveplug.scratch import LocalScratch
from pveplug.snapshot import Options, PointInTime
from tests.support.bare_qemu import BareQemu, make_image

pytestmark = pytest.mark.integration
SIZE = 8 << 20
JOB = "nightly.2026-11-22_20.42.31_01"


class Local(PveLocal):
    """A VM that runs, with PVE's programs out of the way."""

    def __init__(self, node: Node, lock: str = "") -> None:
        super().__init__(node)
        self.lock = lock

    def vm_running(self, vmid: int) -> VmProcess | None:
        # Of a process whose calls can be looked at; it has none on our images.
        return VmProcess(os.getpid(), 1, "") if vmid == 100 else None

    async def config(self, vmid: int) -> VmConfig:
        lock = {"lock": self.lock} if self.lock else {}
        return VmConfig({"agent": "0", **lock}, "")

    async def unlock(self, vmid: int) -> bool:
        self.lock = ""
        return True

    async def fleecing_volumes(self, vmid: int) -> list[str]:
        return []


@pytest.fixture
def node(base: Path) -> Node:
    made = Node(
        qemu_run_dir=str(base),
        state_dir=str(base / "lib"),
        runtime_dir=str(base / "run"),
        scratch_dir=str(base / "scratch"),
    )
    for path in (made.state_dir, made.runtime_dir, made.scratch_dir):
        Path(path).mkdir()
    return made


@contextlib.contextmanager
def running(base: Path, layout: str) -> Iterator[BareQemu]:
    disks = {
        "scsi0": make_image(base / "a.raw", "raw", SIZE),
        "scsi1": make_image(base / "b.qcow2", "qcow2", SIZE),
    }
    with BareQemu(base, layout, disks) as vm:
        yield vm


async def die_in_a_backup(vm: BareQemu, node: Node, mechanism: str) -> None:
    """Leave what a job has left that is killed while it reads."""
    journal = open_journal(node.state_dir, 100, JOB, "backup")
    nbd_socket = f"{node.runtime_dir}/100.nbd"
    journal.note(touched=True, nbd_socket=nbd_socket, pid=1)
    scratch = LocalScratch(node.scratch_dir, 100, "qemu-img", journal)
    options = Options(mechanism=cast(Any, mechanism))
    point = PointInTime(vm.qmp_path, nbd_socket, scratch, options)
    await point.prepare(JOB, Level("F"), vm.volids)
    await point.switch()
    await point.publish()
    assert len(vm.ours()) >= 6
    assert len(list(Path(node.scratch_dir).glob("ph-100-scsi[01].qcow2"))) == 2


FOREIGN_FILES = ["ph-100-scsi0.qcow2.bak", "ph-1001-scsi0.qcow2", "ph-100.qcow2"]
FOREIGN_FILES += ["ph-100-scsi0.raw", "xph-100-scsi0.qcow2", "ph-10-scsi0.qcow2"]
FOREIGN_NODES = ["phoenix-1", "ph", "ph-other", "ph_sc-scsi0", "x-ph-sc-scsi0"]


def be_foreign(vm: BareQemu, node: Node) -> None:
    """Put things of somebody else's beside ours, named as awkwardly as can be."""
    for name in FOREIGN_FILES:
        (Path(node.scratch_dir) / name).write_bytes(b"another's")
    (Path(node.scratch_dir) / "ph-100-scsi9.qcow2").mkdir()
    for name in FOREIGN_NODES:
        null = {"driver": "null-co", "read-zeroes": True}
        vm.command("blockdev-add", **null, **{"node-name": name, "size": SIZE})
    vm.command(
        "blockdev-backup",
        **{"job-id": "ph-mirror", "device": "ph", "target": "phoenix-1"},
        sync="none",
    )
    top = tops(vm)["scsi0"]
    for name in ("foreign", "ph-backup"):
        vm.command("block-dirty-bitmap-add", node=top, name=name)


def tops(vm: BareQemu) -> dict[str, str]:
    blocks = cast(list[dict[str, Any]], vm.command("query-block"))
    return {
        (block["device"] or block["inserted"]["node-name"]).removeprefix(
            "drive-"
        ): block["inserted"]["node-name"]
        for block in blocks
        if "inserted" in block
    }


def bitmaps(vm: BareQemu) -> set[str]:
    nodes = cast(list[dict[str, Any]], vm.command("query-named-block-nodes", flat=True))
    return {
        bitmap["name"]
        for one in nodes
        for bitmap in one.get("dirty-bitmaps", ())
        if bitmap.get("name")
    }


def foreign_left(vm: BareQemu, node: Node) -> bool:
    """Whether all of it is as it was."""
    nodes = cast(list[dict[str, Any]], vm.command("query-named-block-nodes", flat=True))
    jobs = cast(list[dict[str, Any]], vm.command("query-jobs"))
    left = {path.name for path in Path(node.scratch_dir).iterdir()}
    return (
        {n["node-name"] for n in nodes} >= set(FOREIGN_NODES)
        and [job["id"] for job in jobs if job["id"] == "ph-mirror"] != []
        and bitmaps(vm) >= {"foreign", "ph-backup"}
        and left >= {*FOREIGN_FILES, "ph-100-scsi9.qcow2"}
    )


OURS = ("ph-sc-", "ph-cbw-", "ph-sa-", "ph-x-", "ph-fl-", "ph-paused")


def state(vm: BareQemu, base: Path) -> tuple[object, ...]:
    files = {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in base.rglob("*")
        if path.name != "qemu.err"
    }
    return sorted(vm.ours()), bitmaps(vm), files


@pytest.mark.parametrize("journal", ["kept", "lost", "broken"])
@pytest.mark.parametrize(
    ("layout", "mechanism"),
    [("blockdev", "cbw"), ("drive", "cbw"), ("drive", "fleece")],
)
async def test_a_repair_takes_all_that_is_ours_and_nothing_else(
    base: Path,
    node: Node,
    layout: str,
    mechanism: str,
    journal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(base, layout) as vm:
        be_foreign(vm, node)
        await die_in_a_backup(vm, node, mechanism)
        if journal == "lost":
            shutil.rmtree(Path(node.state_dir) / "vms")
        elif journal == "broken":
            (Path(node.state_dir) / "vms/100.json").write_bytes(b'{"vmid": 1\x00')
        local = Local(node, lock="backup")
        assert await candidates(node, local) == ([10, 100, 1001], {})
        before = state(vm, base)
        sent: list[str] = []
        execute = Qmp.execute

        async def listened(self: Qmp, command: str, *rest: Any) -> Any:
            sent.append(command)
            return await execute(self, command, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Qmp, "execute", listened)
            would = await repair_vm(node, local, 100, dry=True)
        assert sent
        assert all(command.startswith("query-") for command in sent)
        assert state(vm, base) == before
        segments = {name for name in bitmaps(vm) if name.startswith("ph-c")}
        assert segments

        found = await repair_vm(node, local, 100)
        assert found == would
        assert found.did
        assert [name for name in vm.ours() if name.startswith(OURS)] == []
        assert not list(Path(node.scratch_dir).glob("ph-100-scsi[01].qcow2"))
        assert read_entry(node.state_dir, 100) is None
        assert not (Path(node.runtime_dir) / "100.nbd").exists()
        assert foreign_left(vm, node)
        assert segments <= bitmaps(vm)
        assert local.lock == "backup"  # nothing says that it is ours
        assert any("locked (backup)" in text for text in found.left)
        assert ("can't be read" in str(found.left)) == (journal == "broken")
        again = await repair_vm(node, local, 100)
        assert again.did == []
        assert tops(vm).keys() == {"scsi0", "scsi1"}
        assert not any(top.startswith("ph-") for top in tops(vm).values())


async def test_an_export_of_others_on_our_server_outlives_the_clean_up(
    base: Path, node: Node
) -> None:
    with running(base, "blockdev") as vm:
        be_foreign(vm, node)
        await die_in_a_backup(vm, node, "cbw")
        vm.command(
            "block-export-add",
            **{"id": "ph-copy", "type": "nbd", "node-name": "ph-other"},
            name="ph-copy",
        )
        local = Local(node)
        would = await repair_vm(node, local, 100, dry=True)
        assert await repair_vm(node, local, 100) == would
        exports = cast(list[dict[str, Any]], vm.command("query-block-exports"))
        assert [one["id"] for one in exports] == ["ph-copy"]
        assert (Path(node.runtime_dir) / "100.nbd").exists()
        vm.command("block-export-del", id="ph-copy")
        assert "NBD server" in await clean_up(
            vm.qmp_path, f"{node.runtime_dir}/100.nbd"
        )


async def test_a_guest_that_was_paused_by_nobody_of_ours_stays_paused(
    base: Path, node: Node
) -> None:
    with running(base, "drive") as vm:
        vm.command("stop")
        assert (await repair_vm(node, Local(node), 100)).did == []
        assert cast(dict[str, Any], vm.command("query-status"))["status"] == "paused"
        vm.command(
            "blockdev-add", driver="null-co", **{"node-name": "ph-paused", "size": 512}
        )
        found = await repair_vm(node, Local(node), 100)
        assert found.did == ["freed QEMU of ph-paused"]
        assert cast(dict[str, Any], vm.command("query-status"))["status"] == "running"


async def test_our_lock_goes_where_the_journal_says_that_it_is_ours(
    base: Path, node: Node
) -> None:
    with running(base, "blockdev") as vm:
        await die_in_a_backup(vm, node, "cbw")
        entry = read_entry(node.state_dir, 100)
        assert entry is not None
        open_journal(node.state_dir, 100, JOB, "backup").note(
            **dataclasses.asdict(dataclasses.replace(entry, locked=True))
        )
        local = Local(node, lock="backup")
        would = await repair_vm(node, local, 100, dry=True)
        assert local.lock == "backup"
        assert await repair_vm(node, local, 100) == would
        assert would.did[-1] == "unlocked the VM"
        assert would.left == []
        assert local.lock == ""
        assert vm.ours() == []
