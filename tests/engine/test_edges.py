# SPDX-License-Identifier: Apache-2.0
"""Edges in a restore: an instant recovery lands them first, the others leave them out.

A recorded chain goes through the Restore engine into real landings; QEMU, PVE and the
keeper aren't there.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pveplug.diskstream import RateLimit
from pveplug.errors import IntegrityError, JobError
from pveplug.images.edges import Edges
from pveplug.images.manifest import EDGES_FILE
from pveplug.ir.landing import Landing, LandingError
from pveplug.ir.presence import Mark
from pveplug.ir.sink import LandingSink
from pveplug.ir.target import InstantTarget
from pveplug.restore_disk import DiskWriter
from pveplug.restore_vm import Goal, Volume
from pveplug.units import CLUSTER
from tests.engine.test_integrity import GivenFile, MemoryRestore, home_of, same
from tests.support.stored import StoredChain, StoredFile, a_chain

EDGE = 3 * CLUSTER


class LandingTarget(InstantTarget):
    """A recovery of which only the landing store is there."""

    def __init__(self, base: Path, chain: Any) -> None:
        plans = {key: SimpleNamespace(source_key=key) for key in chain.keys}
        self._goal = Goal(
            chain.head,
            chain,
            {k: Volume(p) for k, p in plans.items()},  # type: ignore[arg-type]
        )
        self._limit = RateLimit(0)
        self._starter = None
        self._landings = {
            key: Landing.create(base / "l", base / "r", key, chain.final_size(key))
            for key in chain.keys
        }
        self._node = SimpleNamespace(landing_dir=str(base))  # type: ignore[assignment]
        self._blank = set()
        self.begun: list[str] = []

    @property
    def vmid(self) -> int:
        return 9100

    async def _open(self, volume: Volume) -> DiskWriter:
        key = volume.plan.source_key
        self.begun.append(key)
        writer = DiskWriter(
            key, chain=self._goal.chain, zeroed=False, limit=self._limit
        )
        landing = self._landings[key]
        await writer.begin(LandingSink(landing), landing.size)
        return writer

    async def end(self) -> None:
        for volume in self._goal.volumes.values():
            if volume.writer is not None:
                await volume.writer.finish()
                assert volume.writer.complete

    def here(self, key: str, start: int, end: int) -> bool:
        found = self._landings[key].kinds(start, end - start)
        return all(mark is not Mark.OWED for *_, mark in found)


class InstantRestore(MemoryRestore):
    def __init__(self, base: Path) -> None:
        super().__init__(zeroed=True)
        self.base = base
        self.target: LandingTarget

    async def _begin(self, vm: Any, *_: Any) -> Any:
        self.target = LandingTarget(self.base, vm.chain)
        return self.target

    async def give(self, chain: StoredChain, *, edges: bool) -> list[str]:
        """Give all edges, or all files; return the answers."""
        config: Any = SimpleNamespace(instant=object())
        nothing: Any = SimpleNamespace()
        answers = []
        for job in chain.jobs:
            for name, stored in job.files.items():
                if edges and name != EDGES_FILE:
                    continue
                file: Any = GivenFile(f"/where{home_of(job)}/{name}", stored)
                await self._take(file, config, nothing, nothing, nothing)
                answers.append(file.answer)
        return answers


def planned(base: Path, chain: StoredChain) -> InstantRestore:
    engine = InstantRestore(base)
    engine._plan([blob for job in chain.jobs for blob in job.objects])
    return engine


def warnings(engine: InstantRestore) -> list[str]:
    return [text for kind, text in engine.said.lines if kind == "warning"]


@pytest.fixture(scope="module")
def chain() -> StoredChain:
    return a_chain(edges=EDGE)


async def test_edges_land_before_any_image_and_the_disks_come_out_the_same(
    chain: StoredChain, tmp_path: Path
) -> None:
    engine = planned(tmp_path, chain)
    assert await engine.give(chain, edges=True) == ["OK"] * 3
    target = engine.target
    assert target.begun == []
    for key, truth in chain.truth.items():
        landing = target._landings[key]
        size = landing.size
        whole = -(-size // CLUSTER) * CLUSTER
        assert target.here(key, 0, EDGE)
        assert target.here(key, whole - EDGE, size)
        for offset, length, mark in landing.kinds(0, size):
            if mark is not Mark.OWED:
                with landing.files.data.open("rb") as file:
                    file.seek(offset)
                    assert file.read(length) == truth[offset : offset + length]
    assert target._landings["scsi0"].owed_bytes > 0
    await engine.give(chain, edges=False)
    await target.end()
    for key, truth in chain.truth.items():
        assert target._landings[key].complete
        assert target._landings[key].files.data.read_bytes() == truth
    assert warnings(engine) == []


async def test_edges_that_come_while_an_image_is_open_land_too(
    chain: StoredChain, tmp_path: Path
) -> None:
    """One restore job brings a whole chain, oldest first."""
    engine = planned(tmp_path, chain)
    await engine.give(chain, edges=False)
    assert set(engine.target.begun) == set(chain.truth)
    await engine.target.end()
    for key, truth in chain.truth.items():
        assert engine.target._landings[key].files.data.read_bytes() == truth


async def test_zeroes_anywhere_are_there_with_the_edges(
    chain: StoredChain, tmp_path: Path
) -> None:
    engine = planned(tmp_path, chain)
    await engine.give(chain, edges=True)
    found = engine._vms[chain.jobs[0].manifest.directory.rsplit("/", 1)[0]].chain
    assert found is not None
    for key in found.keys:
        for extent in found.never_written(key):
            low = -(-extent.offset // CLUSTER) * CLUSTER
            high = extent.end // CLUSTER * CLUSTER
            assert low >= high or engine.target.here(key, low, high)


@pytest.mark.parametrize("objects", [True, False])
async def test_a_plain_restore_leaves_edges_out(objects: bool) -> None:
    plan = ({"scsi0": "dd.dd", "scsi1": "d.d"}, {"scsi0": ".dz..", "scsi1": "..d"})
    bad = a_chain(plan, edges=EDGE)
    for job in bad.jobs:
        job.files[EDGES_FILE] = StoredFile([(0, b"rubbish")], 7)
    found, _ = await restored_plainly(bad, objects)
    assert same(found, bad)


async def restored_plainly(chain: StoredChain, objects: bool) -> Any:
    class Plain(MemoryRestore):
        async def _take(self, file: Any, config: Any, *rest: Any) -> None:
            config = SimpleNamespace(instant=None)
            await super()._take(file, config, *rest)
            assert not file.name.endswith(EDGES_FILE) or file.answer == "SKIP"

    engine = Plain(True)
    blobs = [blob for job in chain.jobs for blob in job.objects] if objects else []
    engine._plan(blobs)
    nothing: Any = SimpleNamespace()
    for job in chain.jobs:
        for name, stored in job.files.items():
            file: Any = GivenFile(f"/where{home_of(job)}/{name}", stored)
            await engine._take(file, nothing, nothing, nothing, nothing)
    (vm,) = engine._vms.values()
    target: Any = vm.target
    return {k: bytes(w.disk.content) for k, w in target.writers.items()}, engine.said


@pytest.mark.parametrize("how", ["a bit", "cut", "longer", "out of order", "another's"])
async def test_edges_that_are_not_those_of_the_manifest_are_said_and_not_used(
    chain: StoredChain, tmp_path: Path, how: str
) -> None:
    bad = copy.deepcopy(chain)
    file = bad.jobs[1].files[EDGES_FILE]
    ((_, content),) = file.pieces
    match how:
        case "a bit":
            at = random.Random(1).randrange(len(content))
            turned = bytes([content[at] ^ 4])
            file.pieces = [(0, content[:at] + turned + content[at + 1 :])]
        case "cut":
            file.pieces = [(0, content[:-1])]
        case "longer":
            file.pieces = [(0, content + b"more")]
        case "out of order":
            file.pieces = [(5, content[5:]), (0, content[:5])]
        case _:
            bad.jobs[1].files[EDGES_FILE] = bad.jobs[0].files[EDGES_FILE]
    engine = planned(tmp_path, bad)
    assert await engine.give(bad, edges=True) == ["OK"] * 3
    (said,) = warnings(engine)
    assert f"VM 9100: job {chain.jobs[1].name}: edges.bin: it is not the file" in said
    assert "the guest waits for the ends of its disks" in said
    await engine.give(bad, edges=False)
    await engine.target.end()
    for key, truth in chain.truth.items():
        assert engine.target._landings[key].files.data.read_bytes() == truth


async def test_edges_of_a_disk_of_another_size_are_not_used(
    chain: StoredChain, tmp_path: Path
) -> None:
    """Their digest is the manifest's: only we can have made them so."""
    engine = planned(tmp_path, chain)
    await engine.give(chain, edges=True)
    ((_, content),) = chain.jobs[0].files[EDGES_FILE].pieces
    edges = Edges.decode(content)
    disk = edges.disks["scsi0"]
    wrong = Edges({"scsi0": dataclasses.replace(disk, size=disk.size + CLUSTER)})
    with pytest.raises(IntegrityError, match="edges are of a disk scsi0"):
        await engine.target.take_edges(chain.jobs[0].name, wrong)


async def test_a_full_landing_store_is_said_like_that(
    chain: StoredChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise LandingError("no space left", 28)

    monkeypatch.setattr(Landing, "write", full)
    engine = planned(tmp_path, chain)
    with pytest.raises(JobError, match=r"no space left.*make room in"):
        await engine.give(chain, edges=True)


async def test_a_chain_without_edges_is_restored_as_ever(tmp_path: Path) -> None:
    old = a_chain()
    engine = planned(tmp_path, old)
    assert await engine.give(old, edges=True) == []
    await engine.give(old, edges=False)
    await engine.target.end()
    for key, truth in old.truth.items():
        assert engine.target._landings[key].files.data.read_bytes() == truth
