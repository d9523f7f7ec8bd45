# SPDX-License-Identifier: Apache-2.0
"""What a test needs from the machine, and where that is.

A tool comes from the environment where it names one (``QEMU_NBD=/opt/…/qemu-nbd``), so
that an unreleased one can be tried; otherwise from ``PATH``. What is missing skips a
test on a laptop and fails it in CI: ``./dev`` installs everything the tests need.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).resolve().parents[2]
BUILD: Final = REPOSITORY / ".build"
GUEST: Final = BUILD / "guest"
SHIM: Final = BUILD / "shim"
BACULA_9: Final = BUILD / "prefix" / "bacula-9.6.7"
QEMU_7: Final = BUILD / "prefix" / "qemu-7.2"
SYSTEM_PATH: Final = "/usr/sbin:/sbin"
"""Bacula's daemons live there, and an ordinary user's PATH leaves it out."""


def program(name: str) -> str | None:
    """Return the path of a tool, or None: ``QEMU_NBD`` before ``qemu-nbd`` in PATH."""
    variable = name.upper().replace("-", "_").replace(".", "_")
    if chosen := os.environ.get(variable):
        return chosen
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def requires(*names: str) -> pytest.MarkDecorator:
    """Mark a test, class or module that needs these programs."""
    missing = [name for name in names if program(name) is None]
    reason = f"needs {', '.join(missing)}: ./dev setup installs it"
    return pytest.mark.skipif(bool(missing), reason=reason)


def requires_file(*paths: Path | str) -> pytest.MarkDecorator:
    """Mark a test that needs what ``./dev setup`` makes: ``GUEST / "boot.raw"``."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    reason = f"needs {', '.join(missing)}: ./dev setup makes it"
    return pytest.mark.skipif(bool(missing), reason=reason)
