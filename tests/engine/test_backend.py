# SPDX-License-Identifier: Apache-2.0
"""Signals to the backend: the job is cancelled once, its way out never."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from pveplug import backend
from pveplug.errors import JobError


class Session:
    """A bacula-fd that is cancelled whenever it is told something."""

    def __init__(self) -> None:
        self.job = SimpleNamespace(name="nightly.2026-11-23_01.52.35_11")
        self.closed = asyncio.Event()
        self.told: list[str] = []
        self.ended = False

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancelled_by_signal()
        self.ended = True

    async def abort(self, text: str) -> None:
        await cancelled_by_signal()
        self.told.append(text)


async def cancelled_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)


@pytest.fixture
async def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    found = Session()

    async def open_session(fd_in: int, fd_out: int) -> Session:
        return found

    monkeypatch.setattr("pveplug.bacula.open_session", open_session)
    monkeypatch.setattr("pveplug.node.load_node", lambda: SimpleNamespace(log_file=""))
    monkeypatch.setattr("pveplug.log.setup_backend", lambda path: None)
    return found


async def test_a_cancel_while_the_failure_is_told_changes_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> None:
        raise JobError("the disk is gone.")

    monkeypatch.setattr(backend, "_job", fails)
    assert await backend._session(0, 1) == backend.EX_FAILED
    assert session.told == ["the disk is gone."]
    assert session.ended


async def test_a_second_cancel_does_not_interrupt_the_way_out(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    way_out: list[str] = []

    async def works(*_: Any) -> None:
        try:
            await cancelled_by_signal()
            await asyncio.sleep(60)
        finally:
            await cancelled_by_signal()
            way_out.append("unlocked")

    monkeypatch.setattr(backend, "_job", works)
    assert await backend._session(0, 1) == backend.EX_FAILED
    assert way_out == ["unlocked"]
    assert session.told == []
    assert session.ended
