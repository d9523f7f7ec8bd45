# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that run real programs."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.nbd_servers import nbdkit


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


class SlowStore:
    """A file system, without a cache before it, on a disk of a given speed.

    Every write is a synchronous one. The disk is fast until ``limit``.
    """

    def __init__(self, path: Path, rate: Path) -> None:
        self.path = path
        self._rate = rate

    def limit(self, bytes_per_s: int) -> None:
        """From now on the disk takes so much in a second; 0 is all it can."""
        self._rate.write_text(f"{bytes_per_s * 8}\n")


@pytest.fixture
def slow_store(base: Path) -> Iterator[Callable[..., SlowStore]]:
    """Make a store of so many MiB: ``slow_store(128)``.

    With ``write_s`` every request that writes takes so long, from the beginning, but
    they don't wait for one another as those of a limited rate do.
    """
    with contextlib.ExitStack() as stack:

        def make(size_mib: int, write_s: float = 0) -> SlowStore:
            image, rate, disk = base / "disk.img", base / "rate", base / "slow/disk"
            store = SlowStore(base / "store", rate)
            disk.parent.mkdir()
            store.path.mkdir()
            store.limit(0)
            with image.open("wb") as file:
                file.truncate(size_mib << 20)
            argv = ["/usr/sbin/mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-N", "64"]
            subprocess.run([*argv, "-O", "^has_journal", str(image)], check=True)
            kit = nbdkit(
                base, "--filter=delay", "--filter=rate", "file", str(image),
                f"rate-file={rate}", f"wdelay={write_s * 1000:.0f}ms",
            )  # fmt: skip
            uri = f"nbd+unix:///?socket={stack.enter_context(kit)}"
            stack.enter_context(_as_file(uri, disk))
            done = subprocess.run(
                ["mount", "-o", "loop,sync", disk, store.path],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "-l", store.path], check=True)
            stack.callback(store.limit, 0)
            return store

        yield make


@contextlib.contextmanager
def _as_file(uri: str, path: Path) -> Iterator[None]:
    """Have an NBD export look like a file until the block ends."""
    process = subprocess.Popen(["nbdfuse", str(path), uri], stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while not path.exists():
            if process.poll() is not None or time.monotonic() > until:
                pytest.skip("nbdfuse doesn't work here")
            time.sleep(0.02)
        yield
    finally:
        subprocess.run(["umount", path.parent], check=False)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
