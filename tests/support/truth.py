# SPDX-License-Identifier: Apache-2.0
"""What is on a disk, said by somebody else than our own client."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

MIB = 1 << 20


def sha256_of_image(path: Path, fmt: str, *, size: int | None = None) -> str:
    """Return the SHA-256 of what a guest sees, as ``qemu-img convert`` reads it.

    Args:
        size: hash this many bytes from the start; a thick volume may be larger than
            the disk it holds.
    """
    flat = path.with_name(path.name + ".flat")
    try:
        convert(path, fmt, flat)
        return sha256_of_file(flat, size=size)
    finally:
        flat.unlink(missing_ok=True)


def convert(path: Path, fmt: str, flat: Path) -> None:
    """Write an image's content, its backing files included, to a raw file."""
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", str(path), str(flat))


def sha256_of_file(path: Path, *, size: int | None = None) -> str:
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left and (data := file.read(min(MIB, left))):
            digest.update(data)
            left -= len(data)
    assert not left, f"{path} is {left} bytes too short"
    return digest.hexdigest()


def check(path: Path) -> None:
    """Raise unless ``qemu-img check`` finds a qcow2 image in perfect order."""
    run("qemu-img", "check", "-q", "-f", "qcow2", str(path))


def backing_chain(path: Path) -> list[str]:
    """Return the names of an image and all it stands on, newest first."""
    said = run("qemu-img", "info", "--backing-chain", "--output=json", str(path))
    return [entry["filename"] for entry in json.loads(said)]


def run(*argv: str) -> str:
    """Run a program and return what it printed; raise with what it complained of."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(
            f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
    return done.stdout
