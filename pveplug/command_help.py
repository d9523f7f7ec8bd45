# SPDX-License-Identifier: Apache-2.0
"""``pveplug help``: what the parameters mean."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from pveplug.manual import explain
from pveplug.parameters import GROUPS, PARAMETERS, default_shown, lookup

EX_OK: Final = 0


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser("help", help=summary)
    parser.add_argument(
        "topic", nargs="?", choices=("parameters",), help="what to explain"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these parameters"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain parameters; return the exit status."""
    if names := arguments.names:
        sys.stdout.write("\n".join(explain(lookup(name)) for name in names))
        return EX_OK
    for group, title in GROUPS.items():
        sys.stdout.write(f"{title}\n")
        for row in PARAMETERS.values():
            if row.group == group:
                sys.stdout.write(
                    f"  {row.name:<22} {row.summary} [{default_shown(row)}]\n"
                )
        sys.stdout.write("\n")
    sys.stdout.write("`pveplug help parameters NAME` explains one.\n")
    return EX_OK
