# SPDX-License-Identifier: Apache-2.0
"""Strangers' NBD servers, run for a test and ended by their own pid."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NBDKIT = os.environ.get("NBDKIT", "nbdkit")
QEMU_NBD = os.environ.get("QEMU_NBD", "qemu-nbd")
QSD = os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")


@contextlib.contextmanager
def running(argv: list[str], ready: str | int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; ``ready`` is its unix socket or TCP port."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        _wait_for(process, ready)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], ready: str | int) -> None:
    until = time.monotonic() + 15
    while True:
        family = socket.AF_UNIX if isinstance(ready, str) else socket.AF_INET
        place = ready if isinstance(ready, str) else ("127.0.0.1", ready)
        with socket.socket(family) as sock:
            try:
                sock.connect(place)
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise
            else:
                return
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def nbdkit(base: Path, *arguments: str) -> Iterator[str]:
    """nbdkit on a unix socket; the arguments name filters, plugin and its settings."""
    path = str(base / "kit.sock")
    with running([NBDKIT, "--foreground", "--unix", path, *arguments], path):
        yield path
    Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def qemu_nbd_server(base: Path, image: Path, fmt: str, *more: str) -> Iterator[str]:
    path = str(base / "qnbd.sock")
    argv = [QEMU_NBD, "-t", "-e", "8", "-f", fmt, "-k", path, *more, str(image)]
    with running(argv, path):
        yield path


@contextlib.contextmanager
def storage_daemon(base: Path, image: Path, fmt: str) -> Iterator[str]:
    path = str(base / "qsd.sock")
    argv = [QSD, "--blockdev", f"driver=file,node-name=f,filename={image}"]
    argv += ["--blockdev", f"driver={fmt},node-name=d,file=f"]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
    argv += ["--export", "type=nbd,id=x,node-name=d,name=disk,writable=on"]
    with running(argv, path):
        yield path
