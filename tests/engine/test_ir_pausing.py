# SPDX-License-Identifier: Apache-2.0
"""Pausing a guest whose QEMU answers, or waits with its answer, or isn't there."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pveplug.errors import QmpError, TransportError
from pveplug.ir import pausing
from pveplug.ir.record import Recovery
from pveplug.node import Node


class Local:
    """A VM that runs, and keeps its notes."""

    def __init__(self) -> None:
        self.node = Node()
        self.values = {"description": "mine"}

    def vm_running(self, vmid: int) -> object:
        return self

    async def config(self, vmid: int) -> Any:
        return SimpleNamespace(values=dict(self.values))

    async def set_values(self, vmid: int, values: dict[str, str]) -> None:
        self.values.update(values)


@pytest.fixture
def recovery(tmp_path: Path) -> Recovery:
    found = Recovery(
        Node(landing_dir=f"{tmp_path}/l", runtime_dir=f"{tmp_path}/r"), 120
    )
    found.make()
    return found


def monitor(
    monkeypatch: pytest.MonkeyPatch,
    *,
    connect: Exception | None = None,
    stop: Exception | None = None,
) -> None:
    @contextlib.asynccontextmanager
    async def session(path: str) -> AsyncIterator[Any]:
        if connect:
            raise connect

        async def execute(command: str) -> None:
            if stop:
                raise stop

        yield SimpleNamespace(execute=execute)

    monkeypatch.setattr(pausing, "qmp_session", session)


async def test_an_order_without_an_answer_is_a_pause(
    recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU answers when reads under way have ended, and those wait for what is owed."""
    monitor(monkeypatch, stop=TransportError("QEMU gave no answer to stop in a minute"))
    local = Local()
    await pausing.pause(cast(Any, local), recovery, "late")
    assert pausing.why_paused(recovery) == "late"
    assert "late" in local.values["description"]


@pytest.mark.parametrize(
    "problem",
    [
        {"connect": TransportError("the QMP monitor has been busy for 30 s")},
        {"stop": QmpError("stop", "GenericError", "not now")},
    ],
)
async def test_a_guest_that_was_not_paused_is_not_said_to_be(
    recovery: Recovery, monkeypatch: pytest.MonkeyPatch, problem: dict[str, Exception]
) -> None:
    monitor(monkeypatch, **problem)
    local = Local()
    with pytest.raises(type(next(iter(problem.values())))):
        await pausing.pause(cast(Any, local), recovery, "late")
    assert pausing.why_paused(recovery) == ""
    assert local.values == {"description": "mine"}
