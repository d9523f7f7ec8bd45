# SPDX-License-Identifier: Apache-2.0
"""What became of a backup on its way is refused by name, wherever it was hit.

A recorded chain goes through the Restore engine, with and without the catalogue's
restore objects, into disks in memory. Then one thing of it is changed, and the restore
must fail and name the job, or else be the same byte for byte.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pveplug.diskstream import RateLimit
from pveplug.errors import IntegrityError, JobError, PveplugError
from pveplug.events import ListReporter
from pveplug.images.manifest import MANIFEST_FILE, Manifest
from pveplug.node import Node
from pveplug.restore import Restore
from pveplug.restore_disk import DiskWriter
from tests.support.stored import StoredChain, StoredFile, StoredJob, a_chain

KEYS = ("scsi0", "scsi1")
FLIPS = 400
"""Each is a whole restore, about 25 ms."""


class MemoryDisk:
    """A sink for blocks; what nobody writes stays as it was."""

    def __init__(self, size: int, fill: bytes) -> None:
        self.content = bytearray(fill * size)
        self.size = size

    async def write(self, offset: int, data: memoryview) -> None:
        assert offset + len(data) <= self.size
        self.content[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int) -> None:
        assert offset + length <= self.size
        self.content[offset : offset + length] = bytes(length)

    async def finish(self) -> None:
        """Memory has nothing to flush."""


class MemoryWriter(DiskWriter):
    """The real writer, over a disk in memory."""

    async def begin_in_memory(self, size: int) -> None:
        self.disk = MemoryDisk(size, b"\0" if self._zeroed else b"\xa5")
        await self.begin(contextlib.nullcontext(self.disk), size)


class MemoryTarget:
    """Stands for the VM that a restore makes."""

    vmid = 9100

    def __init__(self, chain: Any, zeroed: bool) -> None:
        self.chain = chain
        self.zeroed = zeroed
        self.wanted = KEYS
        self.writers: dict[str, MemoryWriter] = {}
        self.adopted: list[Manifest] = []

    async def writer(self, key: str) -> DiskWriter:
        if key not in self.writers:
            made = MemoryWriter(
                key, chain=self.chain, zeroed=self.zeroed, limit=RateLimit(0)
            )
            # Without objects nobody knows how large the disk will be.
            await made.begin_in_memory(made.size or 48 << 16)
            self.writers[key] = made
        return self.writers[key]

    async def adopt(self, manifest: Manifest) -> None:
        self.adopted.append(manifest)


class GivenFile:
    """A file as Bacula gives it back."""

    def __init__(self, name: str, stored: StoredFile) -> None:
        self.name, self.size = name, stored.size
        self.pieces = stored.pieces
        self.answer = ""

    async def accept(self, answer: str = "OK") -> None:
        self.answer = answer

    async def data(self) -> AsyncIterator[tuple[int, memoryview]]:
        assert self.answer == "OK"
        for offset, piece in self.pieces:
            for at in range(0, len(piece), 65536):
                yield offset + at, memoryview(piece)[at : at + 65536]

    async def done(self) -> None:
        pass


class MemoryRestore(Restore):
    """The real engine; only what it restores to is in memory."""

    def __init__(self, zeroed: bool) -> None:
        self.said = ListReporter()
        super().__init__(self.said, Node())  # type: ignore[arg-type]
        self.zeroed = zeroed

    async def _begin(self, vm: Any, *_: Any) -> Any:
        return MemoryTarget(vm.chain, self.zeroed)


async def restored(
    chain: StoredChain, *, objects: bool = True, zeroed: bool = True
) -> tuple[dict[str, bytes], ListReporter]:
    """Restore all of a chain; return what the disks hold and what was said."""
    engine = MemoryRestore(zeroed)
    blobs = [blob for job in chain.jobs for blob in job.objects] if objects else []
    engine._plan(blobs)
    nothing: Any = SimpleNamespace()
    for job in chain.jobs:
        home = home_of(job)
        for name, stored in job.files.items():
            file: Any = GivenFile(f"/where{home}/{name}", stored)
            await engine._take(file, nothing, nothing, nothing, nothing)
    found = {}
    for vm in engine._vms.values():
        engine._check_whole(vm)
        target: Any = vm.target
        for key, writer in target.writers.items():
            if not writer.complete:
                raise JobError(f"missing: {', '.join(writer.missing)}")
            found[key] = bytes(writer.disk.content)
    return found, engine.said


def home_of(job: StoredJob) -> str:
    return getattr(job, "home", job.manifest.directory)


def same(found: dict[str, bytes], chain: StoredChain) -> bool:
    """Whether the disks hold what they held; the rest of a larger one is zero."""
    return found.keys() == set(KEYS) and all(
        found[key][: len(truth)] == truth and not any(found[key][len(truth) :])
        for key, truth in chain.truth.items()
    )


@pytest.fixture(scope="module")
def chain() -> StoredChain:
    return a_chain()


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("objects", [True, False])
async def test_an_unharmed_chain_comes_back(
    chain: StoredChain, objects: bool, zeroed: bool
) -> None:
    found, said = await restored(chain, objects=objects, zeroed=zeroed)
    assert same(found, chain)
    warnings = [text for kind, text in said.lines if kind == "warning"]
    assert bool(warnings) != objects, warnings


def flipped(chain: StoredChain, noise: random.Random) -> tuple[StoredChain, str, str]:
    """Turn one bit of one file; return the chain, the job and the file."""
    chain = copy.deepcopy(chain)
    job = noise.choice(chain.jobs)
    name = noise.choice(list(job.files))
    stored = job.files[name]
    if name.endswith(".qcow2") and noise.random() < 0.5:
        # Metadata is a hundredth of an image; half of the hits are for it.
        last = len(stored.pieces) - 1
        number = noise.choice((0, 1, 2, 3, last - 1, last))
    else:
        number = noise.randrange(len(stored.pieces))
    offset, piece = stored.pieces[number]
    at = noise.randrange(len(piece))
    turned = bytes([piece[at] ^ 1 << noise.randrange(8)])
    stored.pieces[number] = (offset, piece[:at] + turned + piece[at + 1 :])
    return chain, job.name, name


async def refusal(work: Any) -> PveplugError | None:
    """Return how a restore was refused, or None."""
    try:
        await work
    except (JobError, IntegrityError) as error:
        return error
    return None


@pytest.mark.parametrize("objects", [True, False])
async def test_a_flipped_bit_anywhere_in_a_stream_is_refused_by_name(
    chain: StoredChain, objects: bool
) -> None:
    for seed in range(FLIPS // 2):
        noise = random.Random(seed * 2 + objects)
        bad, job, name = flipped(chain, noise)
        error = await refusal(restored(bad, objects=objects))
        what = f"seed {seed}: {job}/{name}"
        if name == "scsi1.qcow2" and job == chain.jobs[0].name and objects:
            # The next job read that disk whole: this image isn't even read.
            assert error is None
            assert same((await restored(bad))[0], chain)
            continue
        assert error is not None, what
        assert job in str(error), f"{what}: {error}"
        if isinstance(error, JobError):
            assert error.remedy, f"{what}: {error}"
        if name.endswith((".qcow2", ".digests")):
            key = name.partition(".")[0]
            assert key in str(error), f"{what}: {error}"
        else:
            assert name in str(error), f"{what}: {error}"


async def test_a_flipped_bit_in_a_restore_object_costs_only_time(
    chain: StoredChain,
) -> None:
    for seed in range(60):
        noise = random.Random(seed)
        bad = copy.deepcopy(chain)
        job = noise.choice(bad.jobs)
        blob = bytearray(job.objects[0])
        at = noise.randrange(len(blob.rstrip(b"\0")))
        blob[at] ^= 1 << noise.randrange(8)
        job.objects[0] = bytes(blob)
        found, said = await restored(bad)
        assert same(found, chain), f"seed {seed}: byte {at} of {job.name}"
        assert any("images are replayed in order" in text for _, text in said.lines)


async def test_a_flipped_bit_is_found_without_digests_but_for_the_data(
    chain: StoredChain,
) -> None:
    plain = a_chain(digests=False)
    for seed in range(100):
        bad, job, name = flipped(plain, random.Random(seed))
        error = await refusal(restored(bad, objects=bool(seed % 2)))
        if error is not None:
            assert job in str(error)
            continue
        # One bit of the data of that disk, and nothing else.
        found, _ = await restored(bad, objects=bool(seed % 2))
        key = name.removesuffix(".qcow2")
        assert key in KEYS, name
        for other in KEYS:
            truth = plain.truth[other]
            wrong = int.from_bytes(found[other][: len(truth)])
            wrong ^= int.from_bytes(truth)
            assert wrong.bit_count() <= (other == key), f"seed {seed}: {job}/{name}"


# --- members -----------------------------------------------------------------------


def without(number: int) -> Callable[[StoredChain], None]:
    def change(chain: StoredChain) -> None:
        del chain.jobs[number]

    return change


def reordered(chain: StoredChain) -> None:
    chain.jobs[1:] = chain.jobs[:0:-1]


def swapped(chain: StoredChain) -> None:
    one, two = chain.jobs[0].files, chain.jobs[1].files
    one["scsi0.qcow2"], two["scsi0.qcow2"] = two["scsi0.qcow2"], one["scsi0.qcow2"]


def renamed(chain: StoredChain) -> None:
    chain.jobs[1].files["scsi0.qcow2"] = chain.jobs[2].files["scsi0.qcow2"]


def of_another_vm(chain: StoredChain) -> None:
    other = a_chain(vmid=101, seed=2)
    chain.jobs[1].files["scsi0.qcow2"] = other.jobs[1].files["scsi0.qcow2"]


def of_another_disk(chain: StoredChain) -> None:
    files = chain.jobs[0].files
    files["scsi0.qcow2"], files["scsi1.qcow2"] = (
        files["scsi1.qcow2"],
        files["scsi0.qcow2"],
    )


def all_of_another_vm(chain: StoredChain) -> None:
    job = a_chain(vmid=101, seed=2).jobs[1]
    job.home = chain.jobs[1].manifest.directory  # type: ignore[attr-defined]
    chain.jobs[1] = job


def from_another_life(chain: StoredChain) -> None:
    """A job of the same name, VM and sizes, whole in itself."""
    chain.jobs[1] = a_chain(seed=3).jobs[1]


def without_an_image(chain: StoredChain) -> None:
    del chain.jobs[2].files["scsi1.qcow2"]


CHANGES: dict[str, tuple[Callable[[StoredChain], None], int]] = {
    "the full is missing": (without(0), 0),
    "the middle one is missing": (without(1), 1),
    "the newest image of a disk is missing": (without_an_image, 2),
    "images of two jobs are swapped": (swapped, 0),
    "another job's image has its name": (renamed, 1),
    "another VM's image has its name": (of_another_vm, 1),
    "another disk's image has its name": (of_another_disk, 0),
    "another VM's job has its name": (all_of_another_vm, 1),
    "it is of another life of the chain": (from_another_life, 1),
}


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("case", CHANGES)
async def test_a_missing_or_foreign_member_is_refused_by_name(
    chain: StoredChain, case: str, objects: bool
) -> None:
    change, number = CHANGES[case]
    name = chain.jobs[number].name
    bad = copy.deepcopy(chain)
    change(bad)
    error = await refusal(restored(bad, objects=objects))
    assert error is not None
    assert name in str(error), error


async def test_members_out_of_order_are_refused_unless_owners_are_known(
    chain: StoredChain,
) -> None:
    bad = copy.deepcopy(chain)
    reordered(bad)
    error = await refusal(restored(bad, objects=False))
    assert chain.jobs[2].name in str(error)
    # With the objects each cluster is written once, whatever the order.
    found, _ = await restored(bad)
    assert same(found, chain)


async def test_a_parent_with_another_manifest_is_refused_in_a_replay_too(
    chain: StoredChain,
) -> None:
    """All that the parent says of itself fits; only the hash chain tells."""
    bad = copy.deepcopy(chain)
    job = bad.jobs[1]
    for name in ("layout.json", MANIFEST_FILE):
        made = Manifest.from_json(job.files[name].pieces[0][1])
        text = dataclasses.replace(made, consistency="forged").to_json()
        job.files[name] = StoredFile([(0, text)], len(text))
    error = await refusal(restored(bad, objects=False))
    assert f"manifest of job {job.name} is not the one that job" in str(error)
    assert chain.jobs[2].name in str(error)


async def test_a_job_without_a_restore_object_is_never_left_out_silently(
    chain: StoredChain,
) -> None:
    """The others' objects make a chain that ends before it."""
    bad = copy.deepcopy(chain)
    bad.jobs[2].objects = []
    error = await refusal(restored(bad))
    assert f"job {chain.jobs[2].name} is in the selection" in str(error)
    assert "no restore object" in str(error)


async def test_without_a_manifest_a_replay_says_that_digests_were_not_compared(
    chain: StoredChain,
) -> None:
    bad = copy.deepcopy(chain)
    del bad.jobs[1].files[MANIFEST_FILE]
    found, said = await restored(bad, objects=False)
    assert same(found, chain)
    (warning,) = [text for _, text in said.lines if "could not be compared" in text]
    assert chain.jobs[1].name in warning
    assert "scsi0, scsi1" in warning
