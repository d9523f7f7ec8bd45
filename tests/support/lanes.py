# SPDX-License-Identifier: Apache-2.0
"""Run pytest in several processes at once: ``python -m tests.support.lanes ARGUMENT…``.

Tests that run real daemons wait more than they compute: two lanes keep two processors
busy. Which runs what is decided as they go (:mod:`tests.support.lane`). Each lane's
progress is shown line by line behind its number, what it says at its end is shown
whole, and the last line is that of a single pytest: the sum. The exit status is 0 only
if every lane's was. SIGINT is passed on and lets each lane undo its fixtures.

``PVEPLUG_LANES`` is how many, 2 if it isn't set.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

FAILED = Path("v/cache/lastfailed")
CACHE = Path(".pytest_cache")
INTERNAL_ERROR, NO_TESTS = 3, 5
"""Exit statuses of pytest; the second is also that of a lane that took no module."""
SUMMARY = re.compile(r"(?:=+ )?(?P<said>.+) in [\d.]+s(?: \([\d:]+\))?(?: =+)?")
ORDER = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warning")


class Lane:
    """One pytest process."""

    def __init__(self, number: int, began: float) -> None:
        self.number = number
        self.counts: Counter[str] = Counter()
        self._began = began
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, *argv: str) -> int:
        """Run it to its end, show what it says; return pytest's exit status.

        One that ends without saying how its tests went has failed, whatever it returns.
        """
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A terminal's ^C is for us; who gets it twice doesn't undo its fixtures.
            start_new_session=True,
            limit=1 << 24,
        )
        assert self._process.stdout is not None
        ending: list[str] = []
        async for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            # Rules begin what comes after the last test: failures, times, the summary.
            if ending or (text[:1] in ("=", "!") and "test session starts" not in text):
                ending.append(text)
            else:
                seconds = time.monotonic() - self._began
                print(f"{seconds:5.0f} s {self.number}| {text}", flush=True)
        status = await self._process.wait()
        rule = f" lane {self.number} ends "
        print(rule.center(80, "-"), *ending, sep="\n", flush=True)
        found = [match for text in ending if (match := SUMMARY.fullmatch(text))]
        if not found or status < 0:
            print(f"lane {self.number} died, exit status {status}", flush=True)
            self.counts["error"] += 1
            return INTERNAL_ERROR
        for number, word in re.findall(r"(\d+) (\w+)", found[-1]["said"]):
            self.counts[re.sub(r"^(warning|error)s$", r"\1", word)] += int(number)
        return status

    def interrupt(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)


async def run(count: int, arguments: list[str]) -> int:
    """Run the tests in so many lanes; return the exit status of the whole."""
    began = time.monotonic()
    lanes = [Lane(number + 1, began) for number in range(count)]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: [lane.interrupt() for lane in lanes])
    with tempfile.TemporaryDirectory(prefix="pveplug-lanes-") as directory:
        modules = Path(directory) / "modules"
        modules.mkdir()
        caches = [Path(directory) / f"cache{lane.number}" for lane in lanes]
        for cache in caches:
            (cache / FAILED).parent.mkdir(parents=True)
            if (CACHE / FAILED).exists():
                shutil.copy(CACHE / FAILED, cache / FAILED)
        options = ("-p", "tests.support.lane", f"--lane={modules}:{count}")
        statuses = await asyncio.gather(
            *(
                lane.run(*options, "-o", f"cache_dir={cache}", *arguments)
                for lane, cache in zip(lanes, caches, strict=True)
            )
        )
        keep_failed(caches)
    print(summary([lane.counts for lane in lanes], time.monotonic() - began))
    return verdict(statuses)


def keep_failed(caches: list[Path]) -> None:
    """Let pytest's ``--last-failed`` know what failed in any of the lanes.

    Each began with what was known; what passed in one is missing in that one.
    """
    before = _failed(CACHE)
    after = [_failed(cache) for cache in caches]
    passed = {name for name in before if any(name not in failed for failed in after)}
    failed = set().union(*after) - passed
    (CACHE / FAILED).parent.mkdir(parents=True, exist_ok=True)
    (CACHE / FAILED).write_text(json.dumps(dict.fromkeys(sorted(failed), True)))


def _failed(cache: Path) -> set[str]:
    path = cache / FAILED
    return set(json.loads(path.read_text())) if path.exists() else set()


def verdict(statuses: list[int]) -> int:
    """Return 0 if all went well, 1 if tests failed, the worst status otherwise."""
    return max((one for one in statuses if one != NO_TESTS), default=NO_TESTS)


def summary(counts: list[Counter[str]], seconds: float) -> str:
    """Return pytest's last line, as if there had been one pytest."""
    total = sum(counts, Counter())
    # Every lane collects everything.
    total["deselected"] = max((each["deselected"] for each in counts), default=0)
    words = [word for word in (*ORDER, *sorted(total)) if total[word]]
    said = ", ".join(
        f"{total[word]} {word}"
        + ("s" if word in ("warning", "error") and total[word] > 1 else "")
        for word in dict.fromkeys(words)
    )
    minutes, rest = divmod(round(seconds), 60)
    clock = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    return f" {said or 'no tests ran'} in {seconds:.2f}s ({clock}) ".center(80, "=")


if __name__ == "__main__":
    sys.exit(asyncio.run(run(int(os.environ.get("PVEPLUG_LANES", "2")), sys.argv[1:])))
