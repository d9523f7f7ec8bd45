# SPDX-License-Identifier: Apache-2.0
"""Every kind of image that qemu-img writes, into a raw file, beside ``convert``.

Ours is the command an operator gives, ``pveplug import FILE --to-file OUT``, with its
start of Python. Both sides make their file durable (``-t writeback``: a flush at the
end) in memory, so that no disk is measured. Each output is compared once with what the
image was made of.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import Row, compare, say, throughput
from pveplug.units import KiB, MiB

SIZE = 2048 * MiB
SMALL = 32 * MiB
AT_LEAST = 0.8
KINDS = {
    "raw": "raw",
    "vmdk-sparse": "vmdk subformat=monolithicSparse",
    "vmdk-zeroed": "vmdk subformat=monolithicSparse,zeroed_grain=on",
    "vmdk-stream": "vmdk subformat=streamOptimized",
    "vmdk-flat": "vmdk subformat=monolithicFlat",
    "vmdk-2g-sparse": "vmdk subformat=twoGbMaxExtentSparse",
    "vmdk-2g-flat": "vmdk subformat=twoGbMaxExtentFlat",
    "vhdx": "vhdx subformat=dynamic",
    "vhdx-1m": "vhdx block_size=1M",
    "vhdx-fixed": "vhdx subformat=fixed",
    "vhd": "vpc subformat=dynamic,force_size=on",
    "vhd-fixed": "vpc subformat=fixed,force_size=on",
    "qcow2": "qcow2",
    "qcow2-zlib": "-c qcow2",
    "qcow2-zstd": "-c qcow2 compression_type=zstd",
    "qcow2-extended": "qcow2 extended_l2=on",
}
CONTENTS = ("noise", "structured")


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return a row for each kind and content; ``small``: only whether it runs."""
    size = SMALL if small else SIZE
    rows: list[Row] = []
    free = shutil.disk_usage("/dev/shm").free
    place = "/dev/shm" if free > 6 * size else "/var/tmp"
    say(f"{size >> 20} MiB of disk, files in {place}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as directory:
        base = Path(directory)
        node = base / "node.toml"
        node.write_text(f'runtime_dir = "{base / "r"}"\n')
        os.environ["PODHEITOR_PROXMOX_NODE"] = str(node)
        for content in CONTENTS:
            disk = base / "disk.raw"
            make_disk(disk, size, content)
            for name, words in KINDS.items():
                if wanted := os.environ.get("BENCH_FOREIGN"):
                    if name not in wanted.split(","):
                        continue
                rows.append(one(base, disk, f"{name}-{content}", words, rounds))
            disk.unlink()
    return rows


def one(base: Path, disk: Path, name: str, words: str, rounds: int) -> Row:
    """Measure one image."""
    folder = base / "image"
    folder.mkdir()
    flags = words.split()
    packed = flags[0] == "-c"
    kind, *options = flags[1:] if packed else flags
    image = folder / f"image.{'vhd' if kind == 'vpc' else kind}"
    make = ["qemu-img", "convert", *(["-c"] if packed else []), "-f", "raw"]
    make += ["-O", kind, *(w for o in options for w in ("-o", o))]
    subprocess.run([*make, str(disk), str(image)], check=True)
    out = base / "out.raw"
    files = [str(image), *(str(p) for p in folder.iterdir() if p != image)]
    ours = [sys.executable, "-m", "pveplug", "import", *files, "--to-file", str(out)]
    theirs = ["qemu-img", "convert", "-t", "writeback", "-f", kind, "-O", "raw"]
    theirs += [str(image), str(out)]
    subprocess.run(
        ours, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    subprocess.run(["cmp", str(disk), str(out)], check=True)
    size = disk.stat().st_size
    with quiet():
        sides = compare(
            lambda: ours,
            lambda: theirs,
            rounds=rounds,
            between=lambda: out.unlink(missing_ok=True),
            fresh=size,
        )
    row = throughput("foreign", name, size, sides, at_least=AT_LEAST)
    shutil.rmtree(folder)
    out.unlink(missing_ok=True)
    return row


class quiet:  # noqa: N801 - a verb in a with
    """Sends what commands say on stderr nowhere while a block lasts."""

    def __enter__(self) -> None:
        self._kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)


def make_disk(path: Path, size: int, content: str) -> None:
    """Write a disk: noise without a hole, or what file systems look like.

    That is runs of text-like and of binary bytes of 4 KiB to 4 MiB, a third of it
    zeroes or never written.
    """
    rng = random.Random(12)
    with path.open("wb") as file:
        if content == "noise":
            file.writelines(rng.randbytes(MiB) for _ in range(size // MiB))
        else:
            words = [
                rng.randbytes(rng.randint(2, 9)).hex().encode() for _ in range(999)
            ]
            text = b" ".join(rng.choices(words, k=MiB // 8))[:MiB]
            file.write(text[:510] + b"\x55\xaa")
            at = 4 * KiB
            while at < size:
                length = min(4 * KiB << rng.randrange(11), size - at)
                file.seek(at)
                chosen = rng.randrange(6)
                if chosen < 3:
                    file.write((text[rng.randrange(MiB) :] + text * 5)[:length])
                elif chosen == 3:
                    file.write(rng.randbytes(length))
                elif chosen == 4:
                    file.write(bytes(length))
                at += length
            file.truncate(size)
    with path.open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")
