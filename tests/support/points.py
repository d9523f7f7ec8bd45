# SPDX-License-Identifier: Apache-2.0
"""Points in time of a QEMU without guest, read by a stranger (libnbd)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from pveplug.snapshot import ScratchFile, SnapshotDisk
from tests.support.bare_qemu import make_image


class TempScratch:
    def __init__(self, base: Path) -> None:
        self.base = base

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        path = self.base / f"scratch-{key}.qcow2"
        make_image(path, "qcow2", size)
        return ScratchFile(str(path), "qcow2", "file")

    async def remove(self) -> None:
        for path in self.base.glob("scratch-*"):
            path.unlink()


def uri(disk: SnapshotDisk) -> str:
    return f"nbd+unix:///{disk.export}?socket={disk.socket}"


def full_read(disk: SnapshotDisk, path: Path) -> bytes:
    subprocess.run(["nbdcopy", uri(disk), str(path)], check=True)
    return path.read_bytes()


def dirty(disk: SnapshotDisk) -> list[tuple[int, int]]:
    found = subprocess.run(
        ["nbdinfo", "--json", f"--map={disk.context}", uri(disk)],
        check=True,
        capture_output=True,
    )
    return [
        (e["offset"], e["length"]) for e in json.loads(found.stdout) if e["type"] & 1
    ]


def unique(job: str) -> str:
    return f"nightly.2026-11-22_20.42.31_{job}"
