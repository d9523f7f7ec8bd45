# SPDX-License-Identifier: Apache-2.0
"""``pveplug import``: foreign disk images, what they are, into one file, or to a VM."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from pveplug.errors import (
    ConfigError,
    DescriptionError,
    IntegrityError,
    JobError,
    TransportError,
)
from pveplug.import_out import import_to_file
from pveplug.importing import Found, look
from pveplug.node import Node, load_node
from pveplug.units import human

EX_OK: Final = 0
EX_DATA: Final = 65
_OPTIONS: Final = {
    "storage": "restore_storage",
    "bridge_map": "bridge_map",
    "name": "restore_name",
    "pool": "restore_pool",
    "disk_format": "disk_format",
    "cores": "import_cores",
    "memory": "import_memory",
    "firmware": "import_firmware",
}
"""Options of the command, and the parameters they are."""


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "import",
        help=summary,
        description="Read disk images of VMware, Hyper-V and QEMU, known by their "
        "content: full ones and their increments in any order, a VMDK's descriptor "
        "with its extents. With --to-vmid a VM is made of them and of its description "
        "(OVF, VMX, Hyper-V XML, JSON), which may be among the files or with its "
        "disks in an OVA; - is one image "
        "on standard input. Nothing is guessed: what is damaged or of a kind that "
        "isn't read is refused, and then nothing is left. docs/import.md and "
        "docs/images.md say more.",
        epilog="Exit status: 0 done; 65 an image or description is damaged, refused, "
        "or not of the chain; 69 writing failed, or Proxmox VE refused; 78 a file "
        "can't be read or is there already, or an option is wrong.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--info", action="store_true", help="only say what they are, oldest first"
    )
    what.add_argument("--to-file", type=Path, metavar="OUT", help="write this file")
    what.add_argument(
        "--to-vmid", metavar="N|next", help="make a VM with this id, or the next free"
    )
    parser.add_argument(
        "--format", choices=("raw", "qcow2"), default="raw", help="of OUT [raw]"
    )
    parser.add_argument(
        "--raw",
        action="append",
        default=[],
        metavar="NAME",
        help="this file is a raw disk though it begins like none",
    )
    vm = parser.add_argument_group("with --to-vmid")
    vm.add_argument("--storage", metavar="S", help="storage for the disks")
    vm.add_argument(
        "--description",
        type=Path,
        metavar="FILE",
        help="what describes the VM; what else of FILE… would is not looked at",
    )
    vm.add_argument(
        "--bridge-map", metavar="A:B,…|B", help="its networks' names to bridges"
    )
    vm.add_argument("--name", metavar="NAME", help="name of the VM")
    vm.add_argument("--pool", metavar="POOL", help="resource pool of the VM")
    vm.add_argument(
        "--disk-format",
        choices=("raw", "qcow2", "vmdk"),
        help="of the volumes [the storage's own]",
    )
    vm.add_argument("--cores", metavar="N", help="cores, whatever is described")
    vm.add_argument("--memory", metavar="MIB", help="memory, whatever is described")
    vm.add_argument(
        "--firmware", choices=("auto", "bios", "uefi"), help="what starts it [auto]"
    )
    vm.add_argument("--size", metavar="SIZE", help="of a raw disk on standard input")
    vm.add_argument(
        "--parallel", type=int, default=2, metavar="N", help="disks read at once [2]"
    )
    vm.add_argument(
        "--verify", action="store_true", help="read the disks back and compare"
    )
    vm.add_argument("--start", action="store_true", help="start the VM")
    vm.add_argument(
        "-o",
        dest="words",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any parameter of a restore, as pve_token_id=…; over import_options in "
        "the node file",
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
        if arguments.to_vmid is not None:
            return _to_vm(arguments, load_node())
        chain = look(arguments.files, arguments.raw)
        if arguments.info:
            sys.stdout.write(described(chain))
            return EX_OK
        out: Path = arguments.to_file
        node = load_node()
        written = _until_signal(
            lambda: import_to_file(chain, out, arguments.format, node, _Lines())
        )
    except (IntegrityError, DescriptionError) as error:
        sys.stderr.write(f"pveplug: {error}\n")
        return EX_DATA
    except JobError as error:
        data = isinstance(error.__cause__, IntegrityError | DescriptionError)
        if not data and error.phase != "import":
            raise
        sys.stderr.write(f"pveplug: {error}\n")
        return EX_DATA
    sys.stdout.write(f"{out}: {arguments.format}, {human(written)} of data\n")
    return EX_OK


def _to_vm(arguments: argparse.Namespace, node: Node) -> int:
    # Not needed to write a file, and a good part of the time a small one takes.
    from pveplug.config_parse import parse_import
    from pveplug.import_local import import_to_vm, read_small, survey
    from pveplug.vmconfig import parse_size

    config = parse_import(node=node, given=_words(arguments))
    if arguments.parallel < 1:
        raise ConfigError("--parallel must be 1 or more")
    size = parse_size(arguments.size) if arguments.size else None
    found = survey(arguments.files, config.raw)
    if arguments.description is not None:
        path: Path = arguments.description
        found.descriptions = {path.name: read_small(path)}
        found.described = True
    say = _Lines()
    for text in config.common.warnings:
        say.warning(text)
    for path in found.passed_over:
        say.info(f"{path} is not needed and was passed over")
    now = datetime.datetime.now(datetime.UTC)
    named = [*(chain[0].paths[0] for chain in found.disks), *found.archives]
    first = named[0].stem if named else "imported"
    vmid = _until_signal(
        lambda: import_to_vm(
            found,
            config,
            node,
            f"pveplug-import.{now:%Y-%m-%d_%H.%M.%S}_00",
            say,
            name=arguments.name or first,
            parallel=arguments.parallel,
            stdin_size=size,
        )
    )
    sys.stdout.write(f"VM {vmid}\n")
    return EX_OK


def _until_signal(job: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a job to its end, or cancel it, which undoes it, at SIGTERM or SIGINT.

    Raises:
        TransportError: it was cancelled.
    """
    import uvloop

    async def work() -> int:
        made = asyncio.ensure_future(job())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, made.cancel)
        return await made

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(work())
        except asyncio.CancelledError:
            raise TransportError("interrupted; what was made is undone") from None


def _words(arguments: argparse.Namespace) -> str:
    """Return what the options say, as in a plug-in string."""
    from pveplug.pluginstring import quoted

    words = []
    for word in arguments.words:
        key, equals, value = word.partition("=")
        words.append(f"{key}={quoted(value)}" if equals else key)
    words.append(f"restore_vmid={quoted(arguments.to_vmid)}")
    for option, key in _OPTIONS.items():
        value = getattr(arguments, option)
        if value is not None:
            words.append(f"{key}={quoted(value)}")
    if arguments.raw:
        words.append(f"import_raw={quoted(';'.join(arguments.raw))}")
    if arguments.verify:
        words.append("import_verify=yes")
    if arguments.start:
        words.append("start_after=yes")
    return " ".join(words)


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
