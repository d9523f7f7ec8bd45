# SPDX-License-Identifier: Apache-2.0
"""Staged increments: any frames come back, and what isn't whole never verifies."""

from __future__ import annotations

import asyncio
import random
import tempfile
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.dr.stage import StageSpaceError, StageWriter, frames, verify
from pveplug.errors import IntegrityError
from pveplug.proto.dr_digest import RunDigest
from pveplug.proto.dr_frames import MAX_BLOCK, Block, Zero

META = {"describe": {"cycle": "dr-x.1"}, "n": [1, 2]}

places = st.integers(0, 1 << 40)
data = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.integers(1, 20000).map(bytes),
    st.integers(1, 9000).map(lambda n: random.Random(n).randbytes(n)),
)
blocks = st.builds(Block, st.integers(0, 3), places, data)
zeroes = st.builds(Zero, st.integers(0, 3), places, st.integers(1, 1 << 41))
sequences = st.lists(st.one_of(blocks, zeroes), max_size=12)


async def written(path: Path, sent: list[Block | Zero]) -> None:
    stage = await StageWriter.create(path, META, keep_free=0)
    for frame in sent:
        await stage.add(frame)
    await stage.finish()


async def read(path: Path) -> list[Block | Zero]:
    found = []
    async with aclosing(frames(path)) as coming:
        async for frame in coming:
            if isinstance(frame, Block):
                frame = Block(frame.number, frame.offset, bytes(frame.data))
            found.append(frame)
    return found


@given(sequences)
@settings(max_examples=60, deadline=None)
def test_any_frames_come_back(sent: list[Block | Zero]) -> None:
    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "s" / "1.stage"

        async def there_and_back() -> None:
            await written(path, sent)
            whole = await verify(path)
            assert whole.meta == META
            assert whole.trailer.frames == len(sent)
            for number, run in whole.trailer.disks.items():
                digest = RunDigest()
                for frame in sent:
                    if frame.number == number:
                        digest.add(frame)
                assert (run.frames, run.bytes) == (digest.frames, digest.bytes)
                assert run.digest == digest.hexdigest()
            assert await read(path) == sent

        asyncio.run(there_and_back())


SENT: list[Block | Zero] = [
    Block(0, 0, b"abc" * 40),
    Zero(0, 1 << 20, 1 << 30),
    Block(1, 65536, bytes(5000)),  # compressed
    Block(0, 1 << 21, b"z"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("stage") / "good.stage"
    asyncio.run(written(path, SENT))
    return path.read_bytes()


def verdict(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        asyncio.run(verify(path))
    except IntegrityError:
        return False
    return True


def test_a_stage_cut_at_any_byte_never_verifies(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.stage"
    assert verdict(path, good)
    for end in range(len(good)):
        assert not verdict(path, good[:end]), end


def test_a_stage_with_any_bit_flipped_never_verifies(
    good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "flip.stage"
    for at in range(len(good)):
        bit = 1 << at % 8
        bad = good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
        assert not verdict(path, bad), at


def records(content: bytes) -> list[bytes]:
    """Cut a stage into its magic and its records."""
    found, at = [content[:8]], 8
    while at < len(content):
        stored = int.from_bytes(content[at + 22 : at + 26], "big")
        found.append(content[at : at + 30 + stored])
        at += 30 + stored
    return found


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_records_lost_doubled_or_moved_never_verify(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    magic, *parts = records(good)
    count = len(parts)
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=count + 2))
    content = magic + b"".join(parts[i] for i in chosen)
    # Frames of different disks may change places: what is on each is the same.
    disks = {1: "0", 2: "0", 3: "1", 4: "0"}
    order = ["".join(str(i) for i in chosen if disks.get(i) == d) for d in "01"]
    same = [chosen[:1], chosen[-1:], len(chosen), order] == [
        [0],
        [count - 1],
        count,
        ["124", "3"],
    ]
    path = tmp_path_factory.getbasetemp() / "moved.stage"
    assert verdict(path, content) is same


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_garbage_is_no_stage(garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as base:
        assert not verdict(Path(base) / "x", garbage)
        assert not verdict(Path(base) / "x", b"PVSTAGE1" + garbage)


async def test_large_stages_pass_in_bounded_batches(tmp_path: Path) -> None:
    rng = random.Random(1)
    sent = [Block(0, n << 20, rng.randbytes(MAX_BLOCK)) for n in range(12)]
    path = tmp_path / "large.stage"
    await written(path, sent)
    assert (await verify(path)).trailer.bytes == 12 << 20
    assert await read(path) == sent


async def test_what_arrives_may_be_reused_at_once(tmp_path: Path) -> None:
    buffer = bytearray(b"first")
    stage = await StageWriter.create(tmp_path / "1.stage", META, keep_free=0)
    await stage.add(Block(0, 0, memoryview(buffer)))
    buffer[:] = b"later"
    assert (await stage.run(0)).frames == 1
    await stage.finish()
    (block,) = await read(tmp_path / "1.stage")
    assert block == Block(0, 0, b"first")


async def test_room_is_kept_free(tmp_path: Path) -> None:
    with pytest.raises(StageSpaceError, match="must stay free"):
        await StageWriter.create(tmp_path / "1.stage", META, keep_free=1 << 60)
    assert list(tmp_path.iterdir()) == []


async def test_a_discarded_stage_is_gone(tmp_path: Path) -> None:
    stage = await StageWriter.create(tmp_path / "1.stage", META, keep_free=0)
    for number in range(6):
        await stage.add(Block(0, number << 20, bytes(MAX_BLOCK)))
    await stage.discard()
    assert list(tmp_path.iterdir()) == []


async def test_a_reader_may_stop_early(tmp_path: Path) -> None:
    sent = [Block(0, n << 20, bytes([n]) * MAX_BLOCK) for n in range(10)]
    await written(tmp_path / "1.stage", sent)
    async with aclosing(frames(tmp_path / "1.stage")) as coming:
        async for frame in coming:
            assert frame.offset == 0
            break
