# SPDX-License-Identifier: Apache-2.0
"""A pytest plug-in: run only the modules that no other process has taken yet.

``tests.support.lanes`` starts several pytest with it, ``-p tests.support.lane
--lane=DIRECTORY:COUNT``. Each collects all tests; who creates a module's file in the
directory runs it, whole. What takes long comes first, so that they end together.

A test marked ``alone`` asserts on times so short that a busy neighbour could fail it:
these come last, in whichever process ends last, when the others have nothing to do.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

FIRST = (
    *("tests/integration/", "tests/conformance/", "tests/shim/"),
    *("tests/property/", "tests/engine/"),
)
"""What takes minutes, then what takes seconds; all others fill what is left."""
PR_SET_PDEATHSIG = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", metavar="DIRECTORY:COUNT")


def pytest_configure(config: pytest.Config) -> None:
    # Whoever kills the parent wants no orphans that go on testing.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own loop, of the modules taken."""
    lane, config = session.config.getoption("--lane"), session.config
    if config.option.collectonly or not lane:
        return None
    if session.testsfailed and not config.option.continue_on_collection_errors:
        return None  # it says so and ends
    directory, _, count = lane.rpartition(":")
    for items in taken(session.items, Path(directory), int(count)):
        # Not the next module's first item: that one isn't taken before this one ends.
        for item, following in itertools.zip_longest(items, items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


def taken(
    items: list[pytest.Item], directory: Path, count: int
) -> Iterator[list[pytest.Item]]:
    """Yield the modules that are this process's to run, each taken when asked for."""
    alone = [item for item in items if item.get_closest_marker("alone")]
    for module in modules([item for item in items if item not in alone]):
        if _take(directory, module):
            yield module
    if _is_last(directory, count):
        yield from modules(alone)


def modules(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Return the items of each module, what takes long before what doesn't."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.partition("::")[0], []).append(item)
    return [found[name] for name in sorted(found, key=_rank)]


def _rank(name: str) -> int:
    for rank, start in enumerate(FIRST):
        if name.startswith(start):
            return rank
    return len(FIRST)


def _take(directory: Path, module: list[pytest.Item]) -> bool:
    name = module[0].nodeid.partition("::")[0].replace("/", "%")
    try:
        os.close(os.open(directory / name, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _is_last(directory: Path, count: int) -> bool:
    """Say that this process has no more to share; return whether all others said so.

    One that died never does: then nobody is the last, and its status tells.
    """
    with (directory / "ended").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(".")
        file.flush()
        return file.tell() == count
