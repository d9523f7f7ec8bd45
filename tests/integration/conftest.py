# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that run real programs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory with a name so short that sockets fit into it."""
    path = Path(tempfile.mkdtemp(prefix="pb-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make file systems of a size: ``small_disk("2M")``."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "pveplug-test", where],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Make file systems of a kind, of so many MiB: ``file_system("ext2", 400)``."""
    mounted: list[Path] = []

    def make(kind: str, size_mib: int) -> Path:
        image = tmp_path / f"{kind}-{len(mounted)}.img"
        with image.open("wb") as file:
            file.truncate(size_mib << 20)
        argv = [f"/usr/sbin/mkfs.{kind}", "-q", "-m", "0", "-b", "4096", "-N", "64"]
        subprocess.run([*argv, str(image)], check=True)
        where = tmp_path / f"{kind}-{len(mounted)}"
        where.mkdir()
        done = subprocess.run(
            ["mount", "-o", "loop", image, where],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"nothing can be loop-mounted here: {done.stderr.strip()}")
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", "-l", where], check=True)
