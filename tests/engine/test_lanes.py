# SPDX-License-Identifier: Apache-2.0
"""Two pytest beside each other do what one would, and say so.

The tests they run are made up here, in a directory of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.lanes import keep_failed, summary, verdict
from tests.support.requires import REPOSITORY

LOG = """
import os, pathlib, time
def log(word):
    with open({log!r}, "a") as file:
        file.write(f"{{word}} {{os.getpid()}}\\n")
"""

Make = Callable[..., None]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write modules: ``make(test_a="def test_it(): log('a')")``."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")

    def write(**modules: str) -> None:
        for name, text in modules.items():
            path = tmp_path / "tests" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(LOG.format(log=str(tmp_path / "log")) + text)

    return write


class Lanes:
    """``python -m tests.support.lanes`` in a directory."""

    def __init__(self, where: Path) -> None:
        self.where = where

    async def __aenter__(self) -> Lanes:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.lanes"),
            cwd=self.where,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
                "PYTHONPATH": str(REPOSITORY),
                "PVEPLUG_LANES": "2",
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    async def end(self) -> tuple[int, list[str]]:
        said, _ = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, said.decode().splitlines()

    def logged(self) -> list[list[str]]:
        """What the tests wrote down: word and process."""
        log = self.where / "log"
        return [line.split() for line in log.read_text().splitlines()]

    async def wrote(self, word: str, times: int) -> list[str]:
        """Wait until so many tests have; return their processes."""
        while True:
            if (self.where / "log").exists():
                found = [pid for each, pid in self.logged() if each == word]
                if len(found) == times:
                    return found
            await asyncio.sleep(0.02)

    def failed(self) -> list[str]:
        path = self.where / ".pytest_cache/v/cache/lastfailed"
        return list(json.loads(path.read_text()))


async def test_each_module_runs_once_and_whole(make: Make, tmp_path: Path) -> None:
    waits = """
def test_one():
    log({name!r})
    until = time.monotonic() + 20
    while {many} and time.monotonic() < until:  # until the other lane runs, too
        text = pathlib.Path({log!r}).read_text()
        if len({{line.split()[1] for line in text.splitlines()}}) == 2:
            break
        time.sleep(0.02)
def test_two():
    log({name!r})
"""
    log = str(tmp_path / "log")
    for letter in "abcdef":
        make(
            **{f"test_{letter}": waits.format(name=letter, many=letter < "c", log=log)}
        )
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
        assert status == 0, said
        assert said[-1].strip("=").startswith(" 12 passed in "), said[-1]
        by_module: dict[str, list[str]] = {}
        for name, pid in lanes.logged():
            by_module.setdefault(name, []).append(pid)
    assert sorted(by_module) == list("abcdef")
    assert all(len(pids) == 2 and len(set(pids)) == 1 for pids in by_module.values())
    assert len({pids[0] for pids in by_module.values()}) == 2


async def test_what_is_alone_runs_when_all_else_has_ended(
    make: Make, tmp_path: Path
) -> None:
    make(
        test_a="import pytest\npytestmark = pytest.mark.alone\n"
        "def test_it(): log('alone')",
        test_b="import pytest\n@pytest.mark.alone\ndef test_it(): log('alone')\n"
        "def test_other(): time.sleep(0.5); log('b')",
        test_c="def test_it(): time.sleep(0.2); log('c')",
        test_d="import pytest\npytestmark = pytest.mark.alone\n"
        "def test_it(): log('alone')",
    )
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
        assert status == 0, said
        words = [word for word, _ in lanes.logged()]
    assert sorted(words[:2]) == ["b", "c"]
    assert words[2:] == ["alone"] * 3


async def test_a_failure_in_any_lane_fails_all_and_is_remembered(
    make: Make, tmp_path: Path
) -> None:
    make(
        test_a="def test_it(): assert 'this' == 'that'",
        test_b="def test_it(): pass\ndef test_other(): pass",
        test_c="import pytest\n@pytest.fixture\ndef broken(): 1 / 0\n"
        "def test_it(broken): pass",
    )
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
        assert status == 1
        assert said[-1].strip("=").startswith(" 1 failed, 2 passed, 1 error in ")
        assert any("assert 'this' == 'that'" in line for line in said)
        assert lanes.failed() == [
            "tests/test_a.py::test_it",
            "tests/test_c.py::test_it",
        ]
    make(test_a="def test_it(): pass", test_c="def test_it(): pass")
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
        assert status == 0, said
        assert lanes.failed() == []


async def test_a_lane_that_dies_fails_all(make: Make, tmp_path: Path) -> None:
    make(
        test_a="def test_it(): os.kill(os.getpid(), 9)",
        test_b="def test_it(): os._exit(0)",
    )
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
    assert status == 3
    assert [line for line in said if line.endswith("died, exit status -9")]
    assert [line for line in said if line.endswith("died, exit status 0")]
    assert said[-1].strip("=").startswith(" 2 errors in ")


async def test_an_interrupt_ends_every_lane_and_undoes_its_fixtures(
    make: Make, tmp_path: Path
) -> None:
    text = """
import pytest
@pytest.fixture(scope="module", autouse=True)
def undone():
    yield
    log("undone")
def test_it():
    log("begun")
    time.sleep(60)
"""
    make(test_a=text, test_b=text, test_c=text)
    async with Lanes(tmp_path) as lanes:
        pids = await lanes.wrote("begun", 2)
        lanes.process.send_signal(signal.SIGINT)
        status, said = await lanes.end()
        assert status == 2, said
        assert sorted(await lanes.wrote("undone", 2)) == sorted(pids)
    assert any("KeyboardInterrupt" in line for line in said)


async def test_no_lane_outlives_whoever_started_it(make: Make, tmp_path: Path) -> None:
    text = "def test_it(): log('begun'); time.sleep(60)"
    make(test_a=text, test_b=text)
    async with Lanes(tmp_path) as lanes:
        pids = await lanes.wrote("begun", 2)
        lanes.process.kill()
        await lanes.process.communicate()  # the lanes hold the other end of the pipe
    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.02)


async def test_nothing_selected_is_not_a_success(make: Make, tmp_path: Path) -> None:
    make(test_a="")
    async with Lanes(tmp_path) as lanes:
        status, said = await lanes.end()
    assert status == 5
    assert said[-1].strip("=").startswith(" no tests ran in ")


def test_the_worst_status_is_that_of_the_whole() -> None:
    assert verdict([0, 0]) == 0
    assert verdict([0, 5]) == 0  # a lane may find all modules taken
    assert verdict([5, 5]) == 5
    assert verdict([1, 0]) == 1
    assert verdict([5, 1]) == 1
    assert verdict([1, 2]) == 2


def test_the_last_line_is_that_of_one_pytest() -> None:
    one = Counter({"passed": 3, "deselected": 7, "failed": 1, "warning": 1})
    other = Counter({"passed": 4, "deselected": 7, "error": 1, "warning": 1})
    assert summary([one, other], 3725.04).strip("= ") == (
        "1 failed, 7 passed, 7 deselected, 2 warnings, 1 error in 3725.04s (1:02:05)"
    )


def test_what_passed_in_one_lane_and_what_failed_in_another_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = {
        ".pytest_cache": ("old", "mended in one", "mended in two"),
        "one": ("old", "mended in two", "new in one"),
        "two": ("old", "mended in one"),
    }
    for name, failed in written.items():
        path = tmp_path / name / "v/cache/lastfailed"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(dict.fromkeys(failed, True)))
    keep_failed([Path("one"), Path("two")])
    kept = Path(".pytest_cache/v/cache/lastfailed").read_text()
    assert json.loads(kept) == {"new in one": True, "old": True}
