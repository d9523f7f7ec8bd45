# SPDX-License-Identifier: Apache-2.0
"""``./dev bench [NAME…|all] [--json FILE]``: every question, or those named."""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import sys
from pathlib import Path

from bench.harness import Row, say, say_machine, write_json

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "read",
    "backup",
    "incremental",
    "bacula",
    "restore",
    "nbd_server",
    "parallel",
    "scan",
    "memory",
    "startup",
    "growth",
    "dr",
    "ir",
    "ir_boot",
    "foreign",
)
"""Modules of this package with ``measure(*, small, rounds)``, in the rows' order."""


def main() -> int:
    """Measure; the exit status is 1 when a row misses its target."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, "all", []], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="small images: only whether it runs"
    )
    options = parser.parse_args()
    compiled()
    say_machine()
    rows: list[Row] = []
    everything = not options.names or "all" in options.names
    for name in NAMES if everything else options.names:
        module = importlib.import_module(f"bench.{name}")
        say(f"\n{name}: {module.__doc__.splitlines()[0]}")
        rows += module.measure(small=options.small, rounds=options.rounds)
        if options.json:  # what is measured stays, whatever happens to the next
            write_json(options.json, rows)
    missed = [row for row in rows if not row.ok]
    say(f"\nbench: {len(rows)} rows, {len(missed)} below their target")
    return 1 if missed else 0


def compiled() -> None:
    """Give the package its byte code, as an installed one has it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for folder in ("pveplug", "bench", "tests"):
        compileall.compile_dir(ROOT / folder, quiet=1)


if __name__ == "__main__":
    sys.exit(main())
