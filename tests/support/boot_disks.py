# SPDX-License-Identifier: Apache-2.0
"""Disks that start, or don't: made with sfdisk and mtools, or byte by byte."""

from __future__ import annotations

import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pveplug.units import MiB

ESP = "28732ac11ff8d211ba4b00a0c93ec93b"
LINUX = "af3dc60f838472478e793d69d8477de4"
BIOS_BOOT = "4861682149646f6e744e656564454649"


def run(*argv: str, stdin: str = "") -> None:
    subprocess.run(argv, check=True, input=stdin, text=True, capture_output=True)


def partitioned(path: Path, script: str, size: int = 48 * MiB) -> Path:
    """Make a disk with sfdisk's script."""
    with path.open("wb") as file:
        file.truncate(size)
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(path), stdin=script)
    return path


def esp(
    path: Path,
    files: Iterable[str],
    *,
    offset: int = MiB,
    size: int = 16 * MiB,
    options: tuple[str, ...] = (),
) -> Path:
    """Put a FAT with small files into a place of a disk, by mtools."""
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(offset + size)
    image = f"{path}@@{offset}"
    sectors = str(size // 512)
    run("mformat", "-i", image, "-T", sectors, "-h", "16", "-s", "32", *options, "::")
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            inside = Path(folder, name)
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.write_bytes(b"MZ loader")
        tops = [str(top) for top in Path(folder).iterdir()]
        run("mcopy", "-i", image, "-s", *tops, "::/")
    return path


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def gpt(
    size: int,
    partitions: Mapping[tuple[int, int], str],
    *,
    sector: int = 512,
    at_end: bool = False,
    count: int = 128,
    flags: int = 0,
) -> dict[int, bytes]:
    """Return a partition table as pieces of a disk: offset -> bytes.

    Args:
        partitions: (first, last) sectors -> the type's bytes in hex.
        at_end: the copy at the end of the disk instead of the first one.
    """
    last = size // sector - 1
    entries = b"".join(
        struct.pack("<16s16sQQQ72x", bytes.fromhex(kind), b"u" * 16, first, end, flags)
        for (first, end), kind in partitions.items()
    ).ljust(count * 128, b"\0")
    spread = -(-len(entries) // sector)
    here, other, table = (last, 1, last - spread) if at_end else (1, last, 2)
    fields = (here, other, 40, last - 40, b"d" * 16, table, count, 128)
    rest = struct.pack("<QQQQ16sQIII", *fields, zlib.crc32(entries))
    blank = struct.pack("<8sIIII", b"EFI PART", 0x10000, 92, 0, 0) + rest
    header = blank[:16] + struct.pack("<I", zlib.crc32(blank)) + blank[20:]
    return {here * sector: header, table * sector: entries}


class Disk:
    """A disk of pieces; what was read of it is noted."""

    def __init__(self, size: int, *pieces: Mapping[int, bytes]) -> None:
        self.size = size
        self.pieces = {at: data for piece in pieces for at, data in piece.items()}
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        data = bytearray(length)
        for at, piece in self.pieces.items():
            start, end = max(offset, at), min(offset + length, at + len(piece))
            if start < end:
                data[start - offset : end - offset] = piece[start - at : end - at]
        return bytes(data)


def mbr(
    code: bytes = b"", partitions: Iterable[tuple[int, int, int, int]] = ()
) -> bytes:
    """Return sector 0: code, and ``(status, kind, start, sectors)`` four times."""
    table = b"".join(
        struct.pack("<B3xB3xII", status, kind, start, sectors)
        for status, kind, start, sectors in partitions
    )
    return code.ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa"
