# SPDX-License-Identifier: Apache-2.0
"""docs/cbt.md: every row names tests that exist, and no row calls doubt clean."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/cbt.md"
KNOWN_LOGS = re.compile(
    r"changes since|read whole|no change tracking|is gone|shrank|interrupted|"
    r"the VM is|always read whole"
)


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    text = [line.replace(r"\|", "\0").strip("|") for line in lines[2:]]
    return [[cell.strip() for cell in line.split("|")] for line in text]


def existing() -> set[str]:
    """Return the names of all tests, and of what hypothesis makes one."""
    found = set()
    for module in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.add(node.targets[0].id)
    return {name for name in found if name.startswith("test_")}


@pytest.mark.parametrize(
    ("heading", "columns", "least"),
    [("What happens to a VM", 4, 30), ("Regression tests", 3, 12)],
)
def test_each_row_is_whole_and_names_tests_that_exist(
    heading: str, columns: int, least: int
) -> None:
    rows, known = table(heading), existing()
    assert len(rows) >= least
    for row in rows:
        assert len(row) == columns, row
        assert all(row), row
        names = [name.strip().strip("`") for name in row[-1].split(",")]
        assert set(names) <= known, f"{row[0]}: {set(names) - known}"


def test_each_event_says_what_the_log_says() -> None:
    for row in table("What happens to a VM"):
        assert KNOWN_LOGS.search(row[2]), row


@pytest.mark.parametrize("module", ["test_tracking_events", "test_tracking_qemu"])
def test_each_test_of_an_event_stands_in_the_document(module: str) -> None:
    text = (ROOT / "tests/integration" / f"{module}.py").read_text()
    names = re.findall(r"^async def (test_\w+)", text, re.MULTILINE)
    assert names
    document = DOCUMENT.read_text()
    assert [name for name in names if f"`{name}`" not in document] == []
