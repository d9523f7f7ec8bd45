# SPDX-License-Identifier: Apache-2.0
"""Points in time of a QEMU without guest, read by a stranger (libnbd)."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from pveplug.cbt import Level
from pveplug.snapshot import Options, PointInTime, ScratchFile, SnapshotDisk
from tests.support.bare_qemu import BareQemu, make_image


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


def point(
    vm: BareQemu, mechanism: str = "auto", *, store: Path | None = None, **options: Any
) -> PointInTime:
    """A point in time of a VM, with scratch in ``store`` or beside its disks."""
    return PointInTime(
        vm.qmp_path,
        str(vm.base / "nbd"),
        TempScratch(store or vm.base),
        Options(mechanism=mechanism, **options),  # type: ignore[arg-type]
    )


@contextlib.asynccontextmanager
async def taken(
    snapshot: PointInTime,
    vm: BareQemu,
    job: str,
    letter: str = "F",
    parent: str | None = None,
    *,
    prepared: Callable[[], object] = lambda: None,
    switched: Callable[[], object] = lambda: None,
) -> AsyncIterator[list[SnapshotDisk]]:
    """Take it and let it go at the block's end.

    Args:
        job: as ``parent``, a unique name or the number of one.
        prepared: is called before the switch, ``switched`` right after it.
    """
    try:
        level = Level(letter, parent and unique(parent))
        await snapshot.prepare(unique(job), level, vm.volids)
        prepared()
        await snapshot.switch()
        switched()
        yield await snapshot.publish()
    finally:
        await snapshot.close()


def rebuilt(disk: SnapshotDisk, now: bytes, old: bytes | None) -> tuple[bytes, int]:
    """What a restore of the job makes of the disk, and how many bytes it carries.

    Args:
        now: the point in time, all of it.
        old: what the job it builds on had restored to.
    """
    assert disk.plan is not None
    image, carried = bytearray(now), len(now)
    if disk.plan.whole is None:
        assert old is not None
        image[: len(old)] = old
        carried = 0
        for at, length in dirty(disk):
            image[at : at + length] = now[at : at + length]
            carried += length
    return bytes(image), carried


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
    """Return the name of a job of which only the number is given."""
    return job if len(job) > 2 else f"nightly.2026-11-22_20.42.31_{job}"
