# SPDX-License-Identifier: Apache-2.0
"""What ``./dev torture`` found, one test each."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pveplug.cleanup import clean_up
from pveplug.journal import open_journal, read_entry
from pveplug.node import Node
from pveplug.pve_local import PveLocal
from pveplug.qmp import VmGoneError, qmp_session
from pveplug.recovery import recover
from pveplug.snapshot import PointInTime
from pveplug.source import _Opener

JOB = "nightly.2026-11-23_01.52.35_11"


def stale_socket(path: Path) -> Path:
    """What a server that was killed leaves behind."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


async def test_a_power_cut_leaves_no_nbd_socket(tmp_path: Path) -> None:
    """QEMU and backend were killed at once, and the VM stayed off."""
    node = Node(state_dir=str(tmp_path / "state"), runtime_dir=str(tmp_path))
    path = stale_socket(tmp_path / "100.nbd")
    journal = open_journal(node.state_dir, 100, JOB, "backup")
    journal.note(touched=True, nbd_socket=str(path), pid=1)
    local = SimpleNamespace(vm_running=lambda vmid: None)
    await recover(node, cast(PveLocal, local), journal.entry)
    assert not path.exists()
    assert read_entry(node.state_dir, 100) is None


async def test_a_killed_qemu_leaves_no_nbd_socket(tmp_path: Path) -> None:
    path = stale_socket(tmp_path / "100.nbd")
    with pytest.raises(VmGoneError):
        await clean_up(str(tmp_path / "100.qmp"), str(path))
    assert not path.exists()


async def test_a_file_daemon_killed_in_the_clean_up_leaves_no_journal(
    tmp_path: Path,
) -> None:
    """The clean-up went to its end, but the journal went on saying that it had not."""
    journal = open_journal(str(tmp_path), 100, JOB, "backup")
    journal.note(touched=True)
    began = asyncio.Event()

    async def close() -> None:
        began.set()
        await asyncio.sleep(0.01)

    opener: Any = SimpleNamespace(_journal=journal, _vmid=100, _say=None)
    point = cast(PointInTime, SimpleNamespace(close=close))
    task = asyncio.create_task(_Opener._close(opener, point))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not journal.entry.touched


async def test_a_qemu_killed_at_the_greeting_is_told_in_words(tmp_path: Path) -> None:
    path = str(tmp_path / "100.qmp")

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_unix_server(hang_up, path):
        with pytest.raises(VmGoneError, match="it closed the connection"):
            async with qmp_session(path):
                pass
