# SPDX-License-Identifier: Apache-2.0
"""An overlay that becomes a disk of its own where it is."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pveplug.errors import JobError
from pveplug.ir import streaming
from pveplug.ir.record import LandedDisk
from pveplug.ir.streaming import has_snapshots, make_independent, stands_alone
from pveplug.node import Node
from tests.support.requires import requires

DISK = LandedDisk("scsi0", "scsi0", 1 << 20, "local", "qcow2", "local:1/o.qcow2")
NODE = Node(qemu_img="qemu-img")


class Local:
    def __init__(self, path: Path, *, running: bool = False) -> None:
        self.path, self.running = path, running

    async def volume_path(self, volid: str) -> str:
        return str(self.path)

    def vm_running(self, vmid: int) -> object:
        return self if self.running else None


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    (tmp_path / "landed").write_bytes(b"\7" * (1 << 20))
    path = tmp_path / "o.qcow2"
    qemu_img(*("create", "-q", "-f", "qcow2", "-F", "raw"), "-b", "landed", path)
    return path


@requires("qemu-img")
async def test_an_overlay_with_a_snapshot_keeps_its_link(overlay: Path) -> None:
    """QEMU would cut it, and what the snapshot reads through it were zeroes."""
    qemu_img("snapshot", "-c", "mine", overlay)
    assert has_snapshots(str(overlay))
    with pytest.raises(JobError, match="qm delsnapshot"):
        await make_independent(
            NODE, cast(Any, Local(overlay)), 120, DISK, 0, lambda _: None
        )
    assert not stands_alone(str(overlay))


@requires("qemu-img")
async def test_an_overlay_without_one_stands_alone(overlay: Path) -> None:
    await make_independent(
        NODE, cast(Any, Local(overlay)), 120, DISK, 0, lambda _: None
    )
    assert stands_alone(str(overlay))
    flat = overlay.with_suffix(".raw")
    qemu_img("convert", "-O", "raw", overlay, flat)
    assert flat.read_bytes() == b"\7" * (1 << 20)


@requires("qemu-img")
async def test_a_stream_that_an_earlier_keeper_cancelled_is_begun_anew(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job stays in QEMU, concluded, until somebody dismisses it."""
    name = streaming.job_id("scsi0")
    jobs: dict[str, dict[str, Any]] = {
        name: {"id": name, "status": "concluded", "error": "Operation canceled"}
    }
    said: list[str] = []

    class Monitor:
        async def execute(self, command: str, arguments: Any = None) -> Any:
            if command == "query-jobs":
                return list(jobs.values())
            said.append(command)
            if command == "job-dismiss":
                del jobs[arguments["id"]]
            if command == "block-stream":
                qemu_img("rebase", "-b", "", overlay)
                jobs[name] = {"id": name, "status": "concluded"}
            return {}

    @contextlib.asynccontextmanager
    async def session(path: str) -> AsyncIterator[Monitor]:
        yield Monitor()

    async def graph(_: object) -> None:
        return None

    monkeypatch.setattr(streaming, "qmp_session", session)
    monkeypatch.setattr(streaming, "query_graph", graph)
    found = {"scsi0": SimpleNamespace(image="#block1")}
    monkeypatch.setattr(streaming, "find_disks", lambda graph, wanted: found)
    local = cast(Any, Local(overlay, running=True))
    await make_independent(NODE, local, 120, DISK, 0, lambda _: None)
    assert said == ["job-dismiss", "block-stream", "job-dismiss"]
