# SPDX-License-Identifier: Apache-2.0
"""The shape of the house: who may import whom, read from the syntax trees.

Imports point down only::

    cli, backend, library
      └─ engines: backup, restore, estimate, verify   each tells one story, alone
          └─ chapters                            what several of the stories tell
              ├─ configuration                   what a job was told
              └─ adapters                        plain arguments; all the rest
                  ├─ describe                    foreign VMs' descriptions, sans-I/O
                  │   └─ policy                  pure decisions on values
                  └─ proto, images               sans-I/O
                      └─ foundation              extents, errors, units, events, node

An import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = REPOSITORY / "pveplug"

LAYERS: Final = {
    "foundation": {"extents", "errors", "units", "events", "node", "texts"},
    "proto": {"proto"},
    "images": {"images", "proving"},
    "describe": {"describe"},
    "policy": {
        *("pacing", "values", "selection", "vmconfig", "vmrestore", "secrets"),
        "proveconfig",
    },
    "configuration": {
        *(
            "config",
            "config_parse",
            "parameter",
            "parameters",
            "parameters_dr",
            "parameters_ir",
        ),
        *("pluginstring",),
        *("manual", "dr.receiver_config"),
    },
    "chapters": {
        *("source", "access", "restore_vm", "ir.target", "ir.prove_target"),
        *("import_disk", "import_vm", "import_files"),
        *("dr.cycle", "dr.failback", "dr.failover", "dr.services"),
    },
    "engines": {
        *("backup", "restore", "restore_foreign", "import_local", "estimate", "verify"),
        *("dr.receiver", "dr.sender", "proofjob"),
    },
    "top": {
        "",
        "__main__",
        "cli",
        "command_bitmaps",
        "command_config",
        "command_dr",
        "command_help",
        "command_import",
        "command_ir",
        "command_ir_node",
        "command_pin",
        "command_receiver",
        "command_repair",
        "command_replicas",
        "command_verify",
        "backend",
        "library",
        "dr.receiver_main",
        "ir.keeper",
    },
}
ADAPTERS: Final = "adapters"
_BELOW: Final = {
    *(ADAPTERS, "configuration", "describe", "policy", "proto", "images", "foundation"),
}
MAY_IMPORT: Final = {
    "foundation": {"foundation"},
    "proto": {"proto", "foundation"},
    "images": {"images", "foundation"},
    "policy": {"policy", "images", "foundation"},
    "describe": {"describe", "policy", "foundation"},
    "configuration": {"configuration", "policy", "foundation"},
    ADAPTERS: {ADAPTERS, "describe", "policy", "proto", "images", "foundation"},
    "chapters": {"chapters", *_BELOW},
    "engines": {"chapters", *_BELOW},
    "top": {*LAYERS, ADAPTERS},
}
"""An engine may not even import its own layer: engines don't know each other."""
SANS_IO: Final = ("proto", "images", "describe")
IO_MODULES: Final = {
    *("asyncio", "os", "select", "selectors", "shutil", "socket", "ssl"),
    *("subprocess", "tempfile", "threading", "time", "uvloop", "aiohttp"),
}
GPL_PARTS: Final = ("qemu.qmp.legacy", "qemu.qmp.qmp_shell", "qemu.qmp.qmp_tui")
"""qemu.qmp is LGPL but for these."""
SOURCES: Final = {
    *(".py", ".c", ".h", ".sh", ".toml", ".yaml", ".yml", ".cfg", ".conf", ".in"),
    *(".service", ".socket", ".timer", ".example", ".mk"),
}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str

    def __str__(self) -> str:
        where = self.file.relative_to(REPOSITORY)
        return f"{where}:{self.line} imports {self.module}"


def layer_of(module: str) -> str:
    """``pveplug.proto.ptcomm`` -> ``proto``; ``pveplug`` itself is at the top.

    A module of a package may be in a layer of its own: ``dr.receiver``.
    """
    parts = module.split(".")[1:]
    for name in (".".join(parts[:2]), parts[0] if parts else ""):
        for layer, names in LAYERS.items():
            if name in names:
                return layer
    return ADAPTERS


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, source: str) -> Iterator[Import]:
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(source, filename=str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Import(file, node.lineno, full_name(base, alias.name))


def full_name(base: str, name: str) -> str:
    """Return ``base.name`` if that is a module of ours or a GPL part, else ``base``."""
    path = REPOSITORY.joinpath(*base.split("."), name)
    named = base == "pveplug" and any(name in names for names in LAYERS.values())
    if named or path.is_dir() or path.with_suffix(".py").exists():
        return f"{base}.{name}"
    if f"{base}.{name}".startswith(GPL_PARTS):
        return f"{base}.{name}"
    return base


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def all_imports() -> list[Import]:
    return [
        found
        for file in package_files()
        for found in imports_of(file, file.read_text(encoding="utf-8"))
    ]


def refused(found: Import) -> str | None:
    """Return why this import breaks the shape, or None."""
    here, target = module_of(found.file), found.module
    if target.startswith(GPL_PARTS):
        return "that part is GPL"
    if layer_of(here) in SANS_IO and target.split(".")[0] in IO_MODULES:
        return "protocols, images and descriptions do no input or output"
    if target.split(".")[0] != "pveplug" or target == "pveplug":
        return None  # `from pveplug import __version__` is everybody's
    if layer_of(target) not in MAY_IMPORT[layer_of(here)]:
        return f"{layer_of(here)} may not import {layer_of(target)}"
    return None


def tracked_files() -> list[Path]:
    if shutil.which("git") and (REPOSITORY / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True
        ).stdout.decode()
        return [REPOSITORY / name for name in listed.split("\0") if name]
    skipped = {".git", ".venv", ".build", ".cache", "__pycache__"}
    return [
        path
        for path in REPOSITORY.rglob("*")
        if path.is_file() and not skipped & set(path.relative_to(REPOSITORY).parts)
    ]


def is_source(path: Path) -> bool:
    if path.suffix in SOURCES or path.name == "Makefile":
        return True
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def test_imports_point_down_only() -> None:
    broken = [f"{found}: {why}" for found in all_imports() if (why := refused(found))]
    assert not broken, "\n" + "\n".join(broken)


def test_nothing_prints() -> None:
    broken = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno} calls print()"
        for file in package_files()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_every_source_file_names_its_licence() -> None:
    broken = []
    for path in tracked_files():
        if not path.is_file() or not is_source(path):
            continue
        head = path.read_text(encoding="utf-8").splitlines()[:3]
        # The fake host is built with the shim's own headers.
        shim = path.is_relative_to(REPOSITORY / "bacula_shim") or (
            path.parent == REPOSITORY / "tests" / "shim" and path.suffix in (".c", ".h")
        )
        licence = "AGPL-3.0-or-later" if shim else "Apache-2.0"
        if not any(f"SPDX-License-Identifier: {licence}" in line for line in head):
            broken.append(f"{path.relative_to(REPOSITORY)} lacks SPDX {licence}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("pveplug/proto/x.py", "import time", "no input or output"),
        ("pveplug/images/x.py", "from os import path", "no input or output"),
        ("pveplug/describe/x.py", "import os", "no input or output"),
        ("pveplug/describe/x.py", "from pveplug import pve", "may not import adapters"),
        ("pveplug/images/x.py", "from ..describe import guest", "may not import desc"),
        ("pveplug/proto/x.py", "from .. import qmp", "proto may not import adapters"),
        ("pveplug/backup.py", "from pveplug import restore", "engines may not"),
        ("pveplug/qmp.py", "from pveplug.config import x", "may not import config"),
        ("pveplug/nbd/x.py", "from ..backup import Backup", "may not import engines"),
        ("pveplug/qmp.py", "from qemu.qmp import legacy", "that part is GPL"),
        ("pveplug/qmp.py", "def f():\n import qemu.qmp.legacy", "that part is GPL"),
        ("pveplug/errors.py", "import pveplug.qmp", "foundation may not"),
        ("pveplug/dr/channel.py", "from pveplug.dr import sender", "adapters may not"),
        ("pveplug/dr/sender.py", "import pveplug.dr.receiver", "engines may not"),
        ("pveplug/dr/channel.py", "import pveplug.config", "adapters may not"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str, why: str) -> None:
    reasons = [refused(found) for found in imports_of(REPOSITORY / file, source)]
    assert any(reason and why in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pveplug/backup.py", "from pveplug.config import BackupConfig"),
        ("pveplug/cli.py", "from pveplug import backup, restore"),
        ("pveplug/nbd/client.py", "import asyncio\nfrom pveplug.proto import nbd_wire"),
        ("pveplug/images/x.py", "from pveplug.images.clusters import ClusterMap"),
        ("pveplug/describe/x.py", "from pveplug.vmrestore import Wishes"),
        ("pveplug/importing.py", "from pveplug.describe.reading import x"),
        ("pveplug/dr/sender.py", "from pveplug.dr.channel import connect"),
        ("pveplug/dr/sender.py", "from pveplug.dr.cycle import Cycle"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert not any(refused(i) for i in imports_of(REPOSITORY / file, source))
