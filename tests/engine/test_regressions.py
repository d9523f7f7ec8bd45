# SPDX-License-Identifier: Apache-2.0
"""What ``./dev torture`` and experiments found, one test each.

Those of change tracking are listed in docs/cbt.md, "Regression tests".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pveplug.cleanup import clean_up
from pveplug.errors import QmpError, TransportError
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

    async def answers(*_: object) -> None:
        pass  # the scratch store

    opener: Any = SimpleNamespace(
        _journal=journal, _vmid=100, _say=None, _store_answers=answers,
        _store_has_all=answers,
    )  # fmt: skip
    point = cast(PointInTime, SimpleNamespace(close=close))
    task = asyncio.create_task(_Opener._close(opener, point, set(), set()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not journal.entry.touched


async def test_a_broken_greeting_is_told_in_words_and_proves_nothing(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "100.qmp")

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_unix_server(hang_up, path):
        with pytest.raises(TransportError, match="it closed the connection") as caught:
            async with qmp_session(path):
                pass
    assert not isinstance(caught.value, VmGoneError)


async def test_a_full_backlog_is_waited_for_and_is_no_dead_qemu(tmp_path: Path) -> None:
    """asyncio takes EAGAIN for success; the clean-up then deleted scratch in use."""
    path = str(tmp_path / "100.qmp")
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind(path)
        monitor.listen(0)
        with pytest.raises(BlockingIOError):
            fill(path, waiting)
        served = asyncio.create_task(asyncio.to_thread(serve, monitor, waiting))
        try:
            async with qmp_session(path) as qmp:
                assert qmp.version == (10, 0, 2)
                assert await qmp.execute("query-status") == {"status": "running"}
        finally:
            await served


def fill(path: str, waiting: list[socket.socket]) -> None:
    """Connect until the backlog is full."""
    while True:
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].setblocking(False)
        waiting[-1].connect(path)


def serve(monitor: socket.socket, waiting: list[socket.socket]) -> None:
    """Let the waiting ones go after a while, then speak QMP to the next."""
    time.sleep(0.4)
    for one in waiting:
        one.close()
    monitor.settimeout(10)
    while not answered(monitor.accept()[0]):
        pass


def answered(channel: socket.socket) -> bool:
    """Speak QMP to one client; whether it asked for anything."""
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
    with channel:
        try:
            say(channel, {"QMP": {"version": version, "capabilities": []}})
            while data := channel.recv(65536):
                asked = json.loads(data)
                running = asked["execute"] == "query-status"
                result = {"status": "running"} if running else {}
                asked_by = {"id": asked["id"]} if "id" in asked else {}
                say(channel, {"return": result, **asked_by})
                if running:
                    return True
        except (BrokenPipeError, ConnectionResetError):
            pass
    return False


def say(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\r\n")


async def test_a_filter_that_is_in_use_but_not_under_the_guest_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``qom-set`` to the node that the device has already would abort QEMU (C4)."""
    image = {"file": "/images/a.raw"}
    replies: dict[str, Any] = {
        "query-status": {"status": "running"},
        "query-block": [
            {
                "device": "drive-scsi0",
                "inserted": {"node-name": "#block142", "drv": "raw", **image},
            }
        ],
        "query-named-block-nodes": [
            {"node-name": "#block142", "drv": "raw", **image},
            {"node-name": "ph-cbw-scsi0", "drv": "copy-before-write", **image},
        ],
    }
    sent: list[str] = []

    async def execute(command: str, arguments: dict[str, Any] | None = None) -> Any:
        sent.append(command)
        if command == "blockdev-del":
            raise QmpError(command, "GenericError", "Node 'ph-cbw-scsi0' is in use")
        return replies.get(command, [])

    @contextlib.asynccontextmanager
    async def session(path: str) -> AsyncIterator[Any]:
        yield SimpleNamespace(execute=execute)

    monkeypatch.setattr("pveplug.cleanup.qmp_session", session)
    with pytest.raises(QmpError, match="in use"):
        await clean_up("100.qmp", "")
    assert sent.count("blockdev-del") == 2
    assert "qom-set" not in sent


async def test_a_monitor_session_cancelled_while_it_connects_closes_its_socket(
    short_tmp: Path,
) -> None:
    connected, ended = asyncio.Event(), asyncio.Event()

    async def silent(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connected.set()
        await reader.read()
        ended.set()
        writer.close()

    path = str(short_tmp / "100.qmp")
    async with await asyncio.start_unix_server(silent, path):

        async def session() -> None:
            async with qmp_session(path):
                raise AssertionError("it never greets")

        task = asyncio.create_task(session())
        await connected.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            await ended.wait()
