# SPDX-License-Identifier: Apache-2.0
"""The exports of a point in time: our client and strangers see the same."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pveplug.cbt import Level
from pveplug.extents import Extent, Kind, coalesced, tiles
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.source import OrderedReader, extents
from pveplug.snapshot import Options, PointInTime, ScratchFile, SnapshotDisk
from tests.support import truth
from tests.support.bare_qemu import BareQemu, make_image
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "nbdinfo", "nbdcopy"),
]

SIZE = 24 << 20
ALLOCATION = "base:allocation"
FULL = Level("F", None)
INCREMENTAL = Level("I", "job.2026-11-22_20.42.31_01")


class Scratch:
    """Scratch images beside the disks."""

    def __init__(self, base: Path) -> None:
        self._base = base

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        path = self._base / f"scratch-{key}.qcow2"
        make_image(path, "qcow2", size)
        return ScratchFile(str(path), "qcow2", "file")

    async def remove(self) -> None:
        for path in self._base.glob("scratch-*"):
            path.unlink()


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="se-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("layout", ["blockdev", "drive"])
@pytest.mark.parametrize("mechanism", ["cbw", "fleece"])
async def test_strangers_agree_on_bytes_allocation_and_what_changed(
    base: Path, layout: str, mechanism: str
) -> None:
    disks = {
        "scsi0": make_image(base / "a.qcow2", "qcow2", SIZE),
        "scsi1": make_image(base / "b.raw", "raw", SIZE),
    }
    dice = random.Random(11)
    with BareQemu(base, layout, disks) as vm:

        def scribble(count: int) -> None:
            for _ in range(count):
                at = 4096 * dice.randrange(SIZE // 4096 - 32)
                key = dice.choice(["scsi0", "scsi1"])
                vm.io(key, f"write -P {dice.randrange(1, 255)} {at} 64k")
                vm.io(key, f"write -z -u {65536 * dice.randrange(300)} 64k")

        for level, number in ((FULL, "01"), (INCREMENTAL, "02")):
            scribble(20)
            point = PointInTime(
                vm.qmp_path,
                str(vm.base / "nbd"),
                Scratch(base),
                Options(mechanism=mechanism),  # type: ignore[arg-type]
            )
            try:
                await point.prepare(
                    f"job.2026-11-22_20.42.31_{number}", level, vm.volids
                )
                await point.switch()
                scribble(10)
                for disk in await point.publish():
                    assert (disk.context is not None) == (level is INCREMENTAL)
                    await all_agree(disk)
            finally:
                await point.close()


async def all_agree(disk: SnapshotDisk) -> None:
    """Raise unless ours is what nbdcopy, nbdinfo and qemu-img find on an export."""
    content, told, changed = await ours(disk)
    uri = f"nbd+unix:///{disk.export}?socket={disk.socket}"
    copy = Path(disk.socket).with_name("copy")
    await asyncio.to_thread(truth.run, "nbdcopy", uri, str(copy))
    assert await asyncio.to_thread(truth.sha256_of_file, copy) == content

    raw = json.loads(
        await asyncio.to_thread(truth.run, "nbdinfo", "--map", "--json", uri)
    )
    mapped = [Extent(e["offset"], e["length"], kind(e["type"] & 2)) for e in raw]
    assert list(coalesced(mapped)) == told

    options = f"driver=nbd,path={disk.socket},export={disk.export}"
    raw = json.loads(
        await asyncio.to_thread(
            truth.run, "qemu-img", "map", "--output=json", "--image-opts", options
        )
    )
    mapped = [Extent(e["start"], e["length"], kind(e["zero"])) for e in raw]
    assert list(coalesced(mapped)) == told

    if disk.context:
        argv = ("nbdinfo", f"--map={disk.context}", "--json", uri)
        raw = json.loads(await asyncio.to_thread(truth.run, *argv))
        theirs = {e["offset"]: e["length"] for e in raw if e["type"] & 1}
        assert theirs == changed
        assert 0 < sum(changed.values()) < SIZE


async def ours(disk: SnapshotDisk) -> tuple[str, list[Extent], dict[int, int]]:
    """Read with our client: digest of the whole, allocation, what changed."""
    contexts = [ALLOCATION, *([disk.context] if disk.context else [])]
    address = UnixAddress(disk.socket)
    async with await connect(address, disk.export, contexts=contexts) as client:
        told = [extent async for extent in extents(client)]
        assert tiles(told, SIZE)
        whole = bytearray(SIZE)
        runs = [(e.offset, e.length) for e in told if e.kind is Kind.DATA]
        async for slot in OrderedReader(client).read(runs):
            whole[slot.offset : slot.offset + slot.length] = slot.view
        changed: dict[int, int] = {}
        if disk.context:
            name = disk.context.removeprefix("qemu:dirty-bitmap:")
            end = -1
            async for extent in extents(client, dirty=name):
                if extent.kind is Kind.CLEAN:
                    continue
                if extent.offset == end:
                    start = max(changed)
                    changed[start] += extent.length
                else:
                    changed[extent.offset] = extent.length
                end = extent.end
    return hashlib.sha256(whole).hexdigest(), told, changed


def kind(zero: object) -> Kind:
    return Kind.ZERO if zero else Kind.DATA
