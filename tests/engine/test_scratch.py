# SPDX-License-Identifier: Apache-2.0
"""Scratch: what is announced before it is made, and what is somebody else's."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pveplug import scratch
from pveplug.errors import JobError
from pveplug.journal import Journal, open_journal, read_entry
from pveplug.scratch import LocalScratch, StorageScratch, scratch_owner
from pveplug.selection import VmSummary
from pveplug.source import Opened, watched


class Store:
    """A storage with volumes of others; ``named`` is what the journal ever said."""

    def __init__(self, state: str, *there: str) -> None:
        self.state = state
        self.there = set(there)
        self.named: set[str] = set()
        self.freed: list[str] = []

    def volid(self, name: str) -> str:
        return f"s:{name}"

    def _look(self) -> None:
        entry = read_entry(self.state, 100)
        assert entry is not None
        self.named |= set(entry.volumes)

    async def exists(self, volid: str) -> bool:
        self._look()
        return volid in self.there

    async def allocate(self, name: str, size: int, fmt: str) -> str:
        self._look()
        assert f"s:{name}" in self.named
        assert f"s:{name}" not in self.there
        self.there.add(f"s:{name}")
        return f"s:{name}"

    async def path(self, volid: str) -> str:
        return f"/dev/{volid}"

    async def free(self, volid: str) -> None:
        self.freed.append(volid)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(str(tmp_path / "state"), 100, "job", "backup")


async def test_a_volume_of_others_is_never_in_the_journal(
    journal: Journal, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "state"), "s:vm-100-fleece-0", "s:vm-100-fleece-2")
    local = LocalScratch(str(tmp_path), 100, "qemu-img", journal)
    made = StorageScratch(store, 100, qcow2=False, local=local, log=journal)
    for key in ("scsi0", "scsi1"):
        await made.create(key, 1 << 20, backing=False)
    await made.remove()
    assert store.named == {"s:vm-100-fleece-1", "s:vm-100-fleece-3"}
    assert sorted(store.freed) == sorted(store.named)
    assert journal.entry.volumes == []


async def test_an_image_is_announced_before_it_is_made_and_strays_go_with_it(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray, other = (tmp_path / f"ph-{n}-virtio7.qcow2" for n in (100, 1001))
    for path in (stray, other):
        path.touch()
    made = LocalScratch(str(tmp_path), 100, "qemu-img", journal)
    announced: list[Any] = []

    async def create(program: str, path: str, size: int) -> None:
        assert not Path(path).exists()
        announced.append(dataclasses.asdict(read_entry(str(tmp_path / "state"), 100)))  # type: ignore[arg-type]
        Path(path).touch()

    monkeypatch.setattr(scratch, "_qemu_img_create", create)
    image = await made.create("scsi0", 1 << 20, backing=True)
    assert announced[0]["files"] == [image.path]
    assert scratch_owner(Path(image.path).name) == 100
    await made.remove()
    assert other.exists()
    assert not stray.exists()
    assert not Path(image.path).exists()


async def test_a_storage_full_of_such_names_is_an_error_in_the_end(
    journal: Journal, tmp_path: Path
) -> None:
    names = [f"s:vm-100-fleece-{n}" for n in range(scratch.MOST_NAMES + 1)]
    store = Store(str(tmp_path / "state"), *names)
    local = LocalScratch(str(tmp_path), 100, "qemu-img", journal)
    made = StorageScratch(store, 100, qcow2=False, local=local, log=journal)
    with pytest.raises(JobError, match=r"fleece-63 and all .*Remedy"):
        await made.create("scsi0", 1 << 20, backing=False)
    assert store.named == set()


def opened(*counted: str) -> Opened:
    vm = VmSummary(100, "vm100", "pve1")
    return Opened(vm, "uuid", "", None, 0, counted=set(counted))


async def test_who_reads_is_cancelled_before_the_store_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = scratch.RESERVE
    monkeypatch.setattr(scratch, "WATCH_S", 0.01)
    monkeypatch.setattr(scratch, "_free", lambda directory: free)
    cancelled = False

    async def read() -> None:
        nonlocal free, cancelled
        async with watched(opened(str(tmp_path)), 10):
            await asyncio.sleep(0.05)
            free -= 1
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled = True
                raise

    with pytest.raises(JobError, match=r"VM 100 .*left in .*Remedy"):
        await read()
    assert cancelled
    assert len(asyncio.all_tasks()) == 1


async def test_what_a_watched_reader_raises_passes_as_it_is(tmp_path: Path) -> None:
    theirs = ExceptionGroup("theirs", [ValueError("a"), KeyError("b")])
    for raised in (theirs, ValueError("c"), asyncio.CancelledError()):
        with pytest.raises(type(raised)) as caught:
            async with watched(opened(str(tmp_path)), 10):
                raise raised
        assert caught.value is raised
    assert len(asyncio.all_tasks()) == 1
