# SPDX-License-Identifier: Apache-2.0
"""A disk of an import: chains of images upon it, its sum, what is refused."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from pveplug.errors import IntegrityError
from pveplug.images.lineage import Link
from pveplug.images.stream import (
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    ParentLink,
)
from pveplug.import_disk import ImportDisk
from tests.support.nbd_model import ModelServer, serving

SIZE = 1 << 20
SECTOR = 512
Run = tuple[int, bytes | int]


class Volume:
    """A volume in memory that another VM's data is left in, and its address."""

    def __init__(self, address: object, content: bytearray) -> None:
        self.address = address
        self.content = content


@pytest_asyncio.fixture
async def volume(short_tmp: Path) -> AsyncIterator[Volume]:
    content = bytearray(b"\xee" * (SIZE + 4096))
    async with serving(str(short_tmp / "v"), lambda: ModelServer(content)) as address:
        yield Volume(address, content)


async def opened(volume: Volume, **more: bool) -> ImportDisk:
    settings = {"zeroed": False, "verify": True, **more}
    disk = ImportDisk("base", SIZE, **settings)
    await disk.open(volume.address)  # type: ignore[arg-type]
    return disk


def info(identity: str, parent: str | None = None, size: int = SIZE) -> ImageInfo:
    link = None if parent is None else ParentLink("digest", (parent,))
    return ImageInfo("block-delta", "delta", size, SECTOR, identity, link)


async def put(
    disk: ImportDisk, what: ImageInfo, runs: Sequence[Run], file: str = "x"
) -> None:
    """Put an image upon it; what no run mentions is zero, or the parent's."""
    size = what.size or SIZE
    hole = GuestZero if what.parent is None else GuestParent
    await disk.begin(file, what, size)
    at = 0
    for offset, run in sorted(runs, key=lambda run: run[0]):
        if offset > at:
            await disk.take([hole(at, offset - at)])
        length = run if isinstance(run, int) else len(run)
        if isinstance(run, int):
            await disk.take([GuestZero(offset, run)])
        else:
            await disk.take([GuestData(offset, memoryview(run))])
        at = offset + length
    if at < size:
        await disk.take([hole(at, size - at)])
    await disk.take([ImageEnd(what)])
    await disk.end(None)


def random_runs(rng: random.Random, size: int) -> list[Run]:
    runs: list[Run] = []
    at = 0
    while at < size:
        length = min(rng.choice((1, 3, 64, 200)) * SECTOR, size - at)
        kind = rng.random()
        if kind < 0.3:
            runs.append((at, rng.randbytes(length)))
        elif kind < 0.5:
            runs.append((at, length))
        at += length
    return runs


def applied(content: bytearray, runs: Sequence[Run]) -> None:
    for offset, run in runs:
        data = bytes(run) if isinstance(run, int) else run
        content[offset : offset + len(data)] = data


@pytest.mark.parametrize("seed", range(4))
async def test_a_chain_gives_what_its_images_say_and_reads_back(
    volume: Volume, seed: int
) -> None:
    rng = random.Random(seed)
    disk = await opened(volume)
    wanted = bytearray(SIZE)
    for number in range(4):
        runs = random_runs(rng, SIZE)
        parent = f"state-{number - 1}" if number else None
        await put(disk, info(f"state-{number}", parent), runs)
        applied(wanted, runs)
    await disk.read_back()
    assert disk.crc32 == zlib.crc32(wanted)
    assert disk.sha256 == hashlib.sha256(wanted).hexdigest()
    await disk.finish()
    assert volume.content[:SIZE] == wanted
    assert not any(volume.content[SIZE:]), "what was left there shines through"
    assert disk.counted.told == 4 * SIZE


async def test_a_storage_that_loses_a_write_is_found_out(volume: Volume) -> None:
    disk = await opened(volume)
    await put(disk, info("one"), [(0, b"x" * 4096)])
    await put(disk, info("two", "one"), [(8192, b"y" * 4096)])
    volume.content[100] ^= 1
    with pytest.raises(IntegrityError, match="does not give back what was written"):
        await disk.read_back()
    await disk.give_up()


async def test_without_verify_a_single_image_has_a_sum_and_a_chain_none(
    volume: Volume,
) -> None:
    disk = await opened(volume, verify=False)
    await put(disk, info("one"), [(512, b"x" * 4096)])
    wanted = bytearray(SIZE)
    wanted[512:4608] = b"x" * 4096
    assert disk.crc32 == zlib.crc32(wanted)
    await put(disk, info("two", "one"), [(8192, b"y" * 4096)])
    assert disk.crc32 is None
    assert "CRC" not in disk.summary()
    await disk.finish()


async def test_a_full_copy_again_replaces_everything(volume: Volume) -> None:
    disk = await opened(volume, zeroed=True)
    volume.content[:] = bytes(len(volume.content))
    await put(disk, info("one"), [(0, b"x" * 65536), (500_224, b"z" * 512)])
    await put(disk, info("other"), [(4096, b"y" * 512)], "later")
    assert "later is a full copy again and replaces what was read" in disk.notes
    await disk.read_back()
    await disk.finish()
    wanted = bytearray(SIZE)
    wanted[4096:4608] = b"y" * 512
    assert volume.content[:SIZE] == wanted


async def test_what_a_disk_lost_when_it_shrank_does_not_come_back(
    volume: Volume,
) -> None:
    disk = await opened(volume)
    half = SIZE // 2
    await put(disk, info("one"), [(half + 4096, b"x" * 4096)])
    await put(disk, info("two", "one", half), [(0, b"y" * 512)])
    await put(disk, info("three", "two"), [(512, b"z" * 512)])
    await disk.read_back()
    await disk.finish()
    wanted = bytearray(SIZE)
    wanted[:1024] = b"y" * 512 + b"z" * 512
    assert volume.content[:SIZE] == wanted


async def test_a_disk_that_grew_is_refused_unless_its_end_is_known(
    volume: Volume,
) -> None:
    disk = await opened(volume)
    await put(disk, info("one"), [(0, b"x" * 512)])
    with pytest.raises(IntegrityError, match="the disk grew from 1048576 to 1052672"):
        await disk.begin("two", info("two", "one", SIZE + 4096), SIZE + 4096)
    await disk.give_up()
    clipping = await opened(volume, clips=True)
    longer = SIZE + 4096
    await put(clipping, info("one", size=longer), [(SIZE - 512, b"x" * 2048)])
    await put(clipping, info("two", "one"), [])
    await clipping.finish()
    assert volume.content[SIZE - 512 : SIZE] == b"x" * 512
    assert not any(volume.content[SIZE:])


async def test_a_raw_disk_is_known_by_its_content(volume: Volume) -> None:
    disk = await opened(volume)
    content = random.Random(1).randbytes(SIZE)
    await disk.begin("flat", ImageInfo("raw", "flat", None), SIZE)
    for at in range(0, SIZE, 65536):
        await disk.take([GuestData(at, memoryview(content)[at : at + 65536])])
    await disk.take([ImageEnd(ImageInfo("raw", "flat", SIZE))])
    await disk.end(None)
    digest = hashlib.sha256(content).hexdigest()
    assert disk.why_not(Link("d", info("two", f"sha256:{digest}"))) is None
    assert "is sha256:" in str(disk.why_not(Link("d", info("two", "sha256:no"))))
    await disk.finish()


async def test_an_image_that_leaves_out_what_nobody_has_is_refused(
    volume: Volume,
) -> None:
    disk = await opened(volume)
    await disk.begin("x", info("one"), SIZE)
    with pytest.raises(IntegrityError, match="leaves 512 bytes at 0 to a parent"):
        await disk.take([GuestParent(0, 512)])
    await disk.give_up()
