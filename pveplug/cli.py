# SPDX-License-Identifier: Apache-2.0
"""``pveplug``, the administrator's command; docs/cli.md is its manual page.

Each command is a module with ``add_parser`` and ``run``. Only the one that is asked for
is imported: all of them together take a quarter of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final

from pveplug import __version__
from pveplug.errors import ConfigError, PveplugError

EX_OK: Final = 0
EX_USAGE: Final = 2
"""argparse's own."""
EX_UNAVAILABLE: Final = 69
EX_CONFIG: Final = 78

COMMANDS: Final = {
    "help": (
        "pveplug.command_help",
        "explain a command or the parameters",
    ),
    "check-config": (
        "pveplug.command_config",
        "show what a plug-in string means",
    ),
    "pin": (
        "pveplug.command_pin",
        "show the fingerprint of a host's certificate",
    ),
    "repair": (
        "pveplug.command_repair",
        "undo what a dead job has left on a VM",
    ),
    "verify": (
        "pveplug.command_verify",
        "compare restored files with their digests",
    ),
    "bitmaps": (
        "pveplug.command_bitmaps",
        "list or drop the change tracking bitmaps on VMs' disks",
    ),
    "replicas": (
        "pveplug.command_replicas",
        "list the replicas of this DR site",
    ),
    "dr": (
        "pveplug.command_dr",
        "replicate to a second site, fail over, fail back, see how replicas are",
    ),
    "import": (
        "pveplug.command_import",
        "read VMDK, VHDX, VHD, qcow2 and raw images into a file, or to a new VM",
    ),
    "ir": (
        "pveplug.command_ir",
        "instant recovery: run a VM while its disks still come from Bacula",
    ),
    "receiver": (
        "pveplug.command_receiver",
        "prepare a receiver of replicas on this host",
    ),
}
"""Module and summary of each command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pveplug`` and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    # Options of pveplug itself take no value, so the first other word is the command.
    name = next((word for word in words if not word.startswith("-")), None)
    parser = command_parser(name)
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return EX_USAGE
    if arguments.command == "help" and arguments.topic is None:
        parser.print_help()
        return EX_OK
    try:
        status: int = _module(arguments.command).run(arguments)
    except ConfigError as error:
        return _failed(error, EX_CONFIG)
    except PveplugError as error:
        return _failed(error, EX_UNAVAILABLE)
    except BrokenPipeError:  # `pveplug help parameters | head`
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return EX_OK
    return status


def receiver_main(argv: Sequence[str] | None = None) -> int:
    """Run ``podheitor-proxmox-receiver`` and return its exit status."""
    from pveplug.dr.receiver_main import main as receiver  # it brings much with it

    return receiver(argv)


def command_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser, which knows the arguments of one command."""
    parser = argparse.ArgumentParser(
        prog="pveplug",
        description="Look after the Proxmox VE plug-in for Bacula.",
        epilog="Exit status: 0 all well; 2 wrong arguments; 69 a host does not answer; "
        "78 the configuration is wrong; of repair also 1 and 75; of ir also 130.",
    )
    parser.add_argument("--version", action="version", version=f"pveplug {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        if name == command:
            _module(name).add_parser(commands, summary)
        else:
            commands.add_parser(name, help=summary)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(COMMANDS[command][0])


def _failed(error: PveplugError, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"pveplug: {error}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
