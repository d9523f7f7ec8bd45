# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a clean environment, short paths, nothing left running."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import processes

# The same examples in every run: what a longer, random search finds is a bug to be
# mended with a test of its own, not a submission that fails by chance.
settings.register_profile(
    "steady",
    derandomize=True,
    # A busy machine draws slowly, which says nothing of the code.
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

# The product's own variables and Bacula's must not leak in from the caller's shell.
for _name in [name for name in os.environ if name.startswith("PODHEITOR_PROXMOX_")]:
    del os.environ[_name]
# Proxies of the caller's shell must not stand between a test and 127.0.0.1.
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
os.environ["LC_ALL"] = "C.UTF-8"
os.environ["TZ"] = "UTC"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "optional(reason): may be skipped in CI too, and why"
    )
    config.addinivalue_line(
        "markers", "alone: asserts on times so short that no test may run beside it"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that was skipped has failed: what it needs should be there."""
    report = yield
    expected_failure = hasattr(report, "wasxfail")
    optional = item.get_closest_marker("optional") is not None
    if IN_CI and report.skipped and not expected_failure and not optional:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself while it is imported."""
    report = yield
    if IN_CI and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Quick tests run on loops in debug mode; the real programs keep their speed."""
    quick = item.get_closest_marker("integration") is None
    item.config.option.asyncio_debug = quick  # pytest-asyncio reads it for each loop


@pytest.fixture(scope="module", autouse=True)
def _no_module_leaves_processes() -> Iterator[None]:
    """Whatever a module's fixtures started is gone when the module is done."""
    before = processes.children()
    yield
    _complain(before)


@pytest.fixture(autouse=True)
def _no_test_leaves_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A quick test has no long-lived fixture: its processes end with it."""
    if request.node.get_closest_marker("integration"):
        yield
        return
    before = processes.children()
    yield
    _complain(before)


def _complain(before: dict[int, str]) -> None:
    left = processes.left_behind(before)
    if left:
        processes.end(left)
        lines = "\n".join(f"  {pid}: {line}" for pid, line in left.items())
        pytest.fail(f"left running:\n{lines}", pytrace=False)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory of mode 0700 whose path leaves room for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
