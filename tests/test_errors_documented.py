# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md: every row names the tests that make it happen, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/errors.md"
MODULES = sorted((ROOT / "tests/integration").glob("test_errors_*.py"))
OTHERS = (
    *("test_instant_failures.py", "test_prove_job.py", "test_ir_console.py"),
    "test_import_bacula.py",
)
"""Of instant recoveries, proofs and imports: some of what goes wrong is only there."""
COLUMNS = 5
STATUS = re.compile(r"(f|T(, (warning|error))?)( \(.+\))?")


def rows() -> list[list[str]]:
    lines = [ln for ln in TABLE.read_text().splitlines() if ln.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def provoking(modules: list[Path]) -> set[str]:
    """Names of the tests that run real Bacula jobs which go wrong."""
    found = set()
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
    return {name for name in found if name.startswith("test_")}


def test_each_row_is_whole() -> None:
    assert len(rows()) > 40
    for row in rows():
        assert len(row) == COLUMNS, row
        assert all(row), row
        assert STATUS.fullmatch(row[2]), row


def test_each_row_names_tests_that_exist() -> None:
    others = [ROOT / "tests/integration" / name for name in OTHERS]
    known = provoking([*MODULES, *others])
    for row in rows():
        names = [name.strip().strip("`") for name in row[4].split(",")]
        assert set(names) <= known, f"{row[0]}: {set(names) - known}"


def test_each_test_stands_in_a_row() -> None:
    named = {name for row in rows() for name in re.findall(r"`(test_\w+)`", row[4])}
    assert provoking(MODULES) <= named
