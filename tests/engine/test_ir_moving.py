# SPDX-License-Identifier: Apache-2.0
"""A move that was cut: what it left is taken away only when QEMU says it is unused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pveplug.errors import JobError
from pveplug.ir.moving import INTENT, clear_cut_move
from pveplug.ir.record import Recovery
from pveplug.node import Node

NEW = "fast:200/vm-200-disk-1.raw"


class StoppedVm:
    """What is asked of a node on which VM 200 has stopped in the middle of a move."""

    def __init__(self) -> None:
        self.freed: list[str] = []

    async def config(self, vmid: int) -> Any:
        return SimpleNamespace(values={"scsi0": "local:200/vm-200-disk-0.qcow2"})

    async def volumes(self, storage: str) -> list[str]:
        return ["fast:200/vm-200-disk-0.raw", NEW]

    async def volume_path(self, volid: str) -> str:
        return f"/{volid}"

    def vm_running(self, vmid: int) -> None:
        return None

    async def free_volume(self, volid: str) -> None:
        self.freed.append(volid)


@pytest.mark.asyncio
async def test_a_cut_move_s_volume_stays_where_nobody_can_say_who_wrote_to_it(
    tmp_path: Path,
) -> None:
    node = Node(landing_dir=str(tmp_path / "l"), runtime_dir=str(tmp_path / "r"))
    recovery = Recovery(node, 200)
    recovery.make()
    before = ["fast:200/vm-200-disk-0.raw"]
    intent = {"key": "scsi0", "storage": "fast", "before": before}
    (recovery.folder / INTENT).write_text(json.dumps(intent))
    vm = StoppedVm()
    for _ in range(2):  # said again, until somebody has looked
        with pytest.raises(JobError, match="may hold the guest's last writes") as told:
            await clear_cut_move(node, vm, recovery)  # type: ignore[arg-type]
        assert f"pvesm free {NEW}" in str(told.value)
    assert vm.freed == []
