# SPDX-License-Identifier: Apache-2.0
"""``pveplug import``: what foreign disk images are, and one file made of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pveplug.errors import IntegrityError
from pveplug.importing import Found, import_to_file, look
from pveplug.node import load_node
from pveplug.units import human

EX_OK: Final = 0
EX_DATA: Final = 65


def add_parser(commands: Any) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "import",
        help="read VMDK, VHDX, VHD, qcow2 and raw images into a raw or qcow2 file",
        description="Read disk images of VMware, Hyper-V and QEMU, known by their "
        "content: one image, a full one and its increments in any order, or a VMDK's "
        "descriptor with its extents. Nothing is guessed: what is damaged or of a kind "
        "that isn't read is refused. docs/images.md says what is read.",
        epilog="Exit status: 0 done; 65 an image is damaged, refused, or not of the "
        "chain; 69 writing failed; 78 a file can't be read or is there already.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--info", action="store_true", help="only say what they are, oldest first"
    )
    what.add_argument("--to-file", type=Path, metavar="OUT", help="write this file")
    parser.add_argument(
        "--format", choices=("raw", "qcow2"), default="raw", help="of OUT [raw]"
    )


class _Lines:
    def info(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def warning(self, text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")

    def error(self, text: str) -> None:
        sys.stderr.write(f"error: {text}\n")


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    try:
        chain = look(arguments.files)
        if arguments.info:
            sys.stdout.write(described(chain))
            return EX_OK
        out: Path = arguments.to_file
        written = asyncio.run(
            import_to_file(chain, out, arguments.format, load_node(), _Lines())
        )
    except IntegrityError as error:
        sys.stderr.write(f"pveplug: {error}\n")
        return EX_DATA
    sys.stdout.write(f"{out}: {arguments.format}, {human(written)} of data\n")
    return EX_OK


def described(chain: Sequence[Found]) -> str:
    """Return what ``--info`` says, an image a paragraph."""
    lines = []
    for image in chain:
        info = image.info
        lines += [
            f"{image.name}",
            f"  format        {info.format} {info.subformat}".rstrip(),
            f"  virtual size  {image.size} bytes ({human(image.size)})",
            f"  sector        {info.sector} bytes",
        ]
        if info.identity:
            lines.append(f"  identity      {info.identity}")
        if info.parent is not None:
            known = [*info.parent.identities, *info.parent.names]
            lines.append(f"  parent        {info.parent.kind} {', '.join(known)}")
        lines += [f"  extent        {path}" for path in image.paths[1:]]
    return "\n".join(lines) + "\n"
