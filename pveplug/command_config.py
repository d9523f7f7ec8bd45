# SPDX-License-Identifier: Apache-2.0
"""``pveplug check-config``: what a plug-in string means."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from pveplug.config import shown
from pveplug.config_parse import level_warning, parse_backup, parse_restore
from pveplug.node import load_node
from pveplug.pluginstring import PLUGIN_NAME

EX_OK: Final = 0


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check-config",
        help=summary,
        description="Parse a plug-in string as a job would and show the result; "
        "nothing is contacted and secrets are shown as ***.",
    )
    parser.add_argument(
        "plugin_string",
        metavar="PLUGIN-STRING",
        help=f"what stands in Plugin = …; '{PLUGIN_NAME}:' may be left out; "
        "- reads it from standard input",
    )
    parser.add_argument(
        "--level", choices=("F", "I", "D"), help="Bacula's level, for backup_type"
    )
    parser.add_argument("--restore", action="store_true", help="as a restore job would")
    parser.add_argument(
        "--where", default="", help="the where= of a restore; implies --restore"
    )
    parser.add_argument(
        "--read-secrets",
        action="store_true",
        help="also read the secret's file or run its command",
    )


def run(arguments: argparse.Namespace) -> int:
    """Parse it as a job would and show the result; return the exit status."""
    text = arguments.plugin_string
    if text == "-":
        text = sys.stdin.read()
    if not text.lstrip().startswith(f"{PLUGIN_NAME}:"):
        text = f"{PLUGIN_NAME}: {text}"
    node = load_node()
    if arguments.restore or arguments.where:
        restore = parse_restore(text, arguments.where, node=node)
        connection, warnings = restore.connection, list(restore.warnings)
        sys.stdout.write(shown(restore))
    else:
        backup, warnings = parse_backup(text, node=node)
        connection = backup.connection
        if arguments.level:
            differs = level_warning(backup.backup_type, arguments.level)
            warnings += [differs] if differs else []
        sys.stdout.write(shown(backup))
    if arguments.read_secrets:
        connection.resolve()
        sys.stdout.write("the secret could be read\n")
    for warning in warnings:
        sys.stdout.write(f"warning: {warning}\n")
    return EX_OK
