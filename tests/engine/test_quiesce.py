# SPDX-License-Identifier: Apache-2.0
"""The freeze: every way an agent can behave, and every moment to be cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pveplug import quiesce
from pveplug.errors import JobError, PveError, TransportError
from pveplug.events import ListReporter
from pveplug.journal import Journal, open_journal, read_entry
from pveplug.quiesce import Verdict, Wish, frozen, run_hook
from pveplug.watchdog import ThawWatchdog


class ScriptedAgent:
    def __init__(self) -> None:
        self.frozen = False
        self.calls: list[str] = []
        self.ping_fails: Exception | None = None
        self.freeze_fails: Exception | None = None
        self.thaw_fails: Exception | None = None
        self.thaws_itself = False
        self.slow: dict[str, float] = {}
        self.began: dict[str, asyncio.Event] = {}

    async def _call(self, name: str, error: Exception | None) -> None:
        self.calls.append(name)
        self.began.setdefault(name, asyncio.Event()).set()
        await asyncio.sleep(self.slow.get(name, 0))
        if error:
            raise error

    async def ping(self) -> None:
        await self._call("ping", self.ping_fails)

    async def freeze(self) -> int:
        await self._call("freeze", self.freeze_fails)
        self.frozen = not self.thaws_itself
        return 2

    async def thaw(self) -> int:
        await self._call("thaw", self.thaw_fails)
        was, self.frozen = self.frozen, False
        return 2 * was

    async def reached(self, name: str) -> None:
        await self.began.setdefault(name, asyncio.Event()).wait()


class ScriptedWatchdog:
    def __init__(self) -> None:
        self.did: list[str] = []
        self.start_fails: Exception | None = None
        self.fires = False

    async def start(self) -> None:
        if self.start_fails:
            raise self.start_fails
        self.did.append("start")

    async def disarm(self) -> bool:
        self.did.append("disarm")
        return self.fires

    def take_over(self) -> None:
        self.did.append("take over")


class Scene:
    """One freeze with everything around it scripted."""

    def __init__(self, state: Path) -> None:
        self.state = str(state)
        self.agent = ScriptedAgent()
        self.watchdog = ScriptedWatchdog()
        self.journal: Journal = open_journal(self.state, 100, "job", "backup")
        self.say = ListReporter()
        self.frozen_inside: bool | None = None

    async def run(
        self, inside: Callable[[], Any] | None = None, **wish: Any
    ) -> Verdict:
        values: dict[str, Any] = {
            "quiesce": "auto",
            "timeout_s": 1.0,
            "agent": True,
            "freeze_allowed": True,
            "running": True,
        }
        async with frozen(
            self.agent,
            Wish(**{**values, **wish}),
            cast(ThawWatchdog, self.watchdog),
            self.journal,
            self.say,
        ) as verdict:
            self.frozen_inside = self.agent.frozen
            if inside:
                await inside()
        return verdict

    @property
    def noted(self) -> bool:
        entry = read_entry(self.state, 100)
        assert entry is not None
        return entry.frozen

    @property
    def warnings(self) -> str:
        return "\n".join(text for kind, text in self.say.lines if kind == "warning")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_the_guest_is_frozen_inside_and_thawed_after(scene: Scene) -> None:
    async def inside() -> None:
        assert scene.noted

    verdict = await scene.run(inside)
    assert scene.frozen_inside
    assert verdict.text == "filesystem-consistent (2 filesystems frozen)"
    assert scene.agent.calls == ["ping", "freeze", "thaw"]
    assert scene.watchdog.did == ["start", "disarm"]
    assert not scene.noted
    assert not scene.warnings


async def test_windows_is_application_consistent(scene: Scene) -> None:
    assert (await scene.run(windows=True)).text.startswith("application-consistent")


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"quiesce": "no"}, "quiesce=no"),
        ({"running": False}, "paused"),
        ({"agent": False}, "no guest agent configured"),
        ({"freeze_allowed": False}, "freeze-fs=0"),
    ],
)
async def test_nothing_is_frozen_where_it_cannot_or_must_not_be(
    scene: Scene, wish: dict[str, Any], why: str
) -> None:
    verdict = await scene.run(**wish)
    assert why in verdict.text
    assert verdict.text.startswith("crash-consistent")
    assert scene.agent.calls == []
    assert scene.watchdog.did == []
    assert not scene.warnings


async def test_who_asked_for_it_is_warned(scene: Scene) -> None:
    await scene.run(quiesce="yes", agent=False)
    assert "crash-consistent" in scene.warnings


async def test_a_silent_agent_is_never_asked_to_freeze(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "PING_S", 0.02)
    scene.agent.slow["ping"] = 5
    assert "hangs" in (await scene.run()).text
    assert scene.agent.calls == ["ping"]


async def test_no_freeze_without_a_watchdog(scene: Scene) -> None:
    scene.watchdog.start_fails = TransportError("no python")
    verdict = await scene.run()
    assert verdict.text == "crash-consistent (no watchdog)"
    assert scene.agent.calls == ["ping"]
    assert not scene.noted


async def test_a_freeze_that_hangs_is_thawed_all_the_same(scene: Scene) -> None:
    scene.agent.slow["freeze"] = 5
    verdict = await scene.run(timeout_s=0.02)
    assert "freeze failed" in verdict.text
    assert scene.agent.calls[-1] == "thaw"
    assert scene.watchdog.did == ["start", "disarm"]
    assert not scene.noted


async def test_a_freeze_that_fails_is_thawed_all_the_same(scene: Scene) -> None:
    scene.agent.freeze_fails = PveError("one of the file systems is busy")
    assert "busy" in (await scene.run()).text
    assert scene.agent.calls[-1] == "thaw"
    assert "busy" in scene.warnings


async def test_a_thaw_without_answer_is_left_to_the_watchdog_at_once(
    scene: Scene,
) -> None:
    scene.agent.thaw_fails = TransportError("no answer")
    await scene.run()
    assert scene.watchdog.did == ["start", "take over"]
    assert scene.noted  # the clean-up asks again
    assert "watchdog goes on" in scene.warnings


@pytest.mark.parametrize("itself", ["the guest", "the watchdog"])
async def test_a_guest_that_thawed_early_is_not_consistent(
    scene: Scene, itself: str
) -> None:
    scene.agent.thaws_itself = itself == "the guest"
    scene.watchdog.fires = itself == "the watchdog"
    assert (await scene.run()).text.startswith("crash-consistent")
    assert "thawed itself" in scene.warnings


async def test_a_failure_inside_thaws_and_comes_out(scene: Scene) -> None:
    async def inside() -> None:
        raise ValueError("the switch failed")

    with pytest.raises(ValueError, match="the switch failed"):
        await scene.run(inside)
    assert not scene.agent.frozen
    assert scene.watchdog.did == ["start", "disarm"]


@pytest.mark.parametrize("moment", ["ping", "freeze", "inside", "thaw"])
async def test_a_cancel_at_any_moment_leaves_a_thawed_guest(
    scene: Scene, moment: str
) -> None:
    inside = asyncio.Event()

    async def body() -> None:
        inside.set()
        await asyncio.sleep(0.05 if moment == "inside" else 0)

    scene.agent.slow[moment] = 0.05
    task = asyncio.create_task(scene.run(body))
    await (inside.wait() if moment == "inside" else scene.agent.reached(moment))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not scene.agent.frozen
    assert not scene.noted
    if moment != "ping":
        assert scene.agent.calls[-1] == "thaw"
        assert scene.watchdog.did == ["start", "disarm"]


# --- hooks ----------------------------------------------------------------------------


async def test_a_hook_says_what_it_printed() -> None:
    said = await run_hook("sh -c 'echo hello $NAME'", "hook", {"NAME": "you"}, 10)
    assert said == "hello you"


async def test_a_hook_that_fails_is_named_with_its_words() -> None:
    with pytest.raises(JobError, match="status 3: no such database"):
        await run_hook("sh -c 'echo no such database; exit 3'", "hook", {}, 10)


async def test_a_hook_that_is_missing_is_named() -> None:
    with pytest.raises(JobError, match="/nowhere/hook"):
        await run_hook("/nowhere/hook", "hook", {}, 10)


async def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! >{pid_file}; wait"
    began = time.monotonic()
    with pytest.raises(JobError, match="longer than"):
        await run_hook(f"sh -c '{script}'", "hook", {}, 0.5)
    assert time.monotonic() - began < 60
    await _gone(pid_file)


async def test_a_hook_is_killed_with_its_children_when_the_job_is_cancelled(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! >{pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    task = asyncio.create_task(run_hook(f"sh -c '{script}'", "hook", {}, 60))
    while not pid_file.exists():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _gone(pid_file)


async def _gone(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    for _ in range(200):
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        if text.rpartition(")")[2].split()[0] == "Z":
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{pid} still runs")
