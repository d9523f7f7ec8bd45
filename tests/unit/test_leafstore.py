# SPDX-License-Identifier: Apache-2.0
"""The files of digests on a node: which there are, which go, which can be believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from pveplug import leafstore
from pveplug.extents import Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.leaves import WINDOW, windows
from pveplug.leafstore import LeafStore, NoDigestsError, VmLeaves
from pveplug.units import CLUSTER

COUNT = 6
SIZE = COUNT * CLUSTER


@pytest.fixture
def leaves(tmp_path: Path) -> VmLeaves:
    return LeafStore(str(tmp_path)).vm(100, "u", "c0")


def keep(
    leaves: VmLeaves,
    job: str,
    letters: str,
    parent: str | None = None,
    *,
    level: str = "I",
    began: int = 0,
    size: int = SIZE,
) -> None:
    """Send an image: a letter a cluster, ``.`` for clean, ``0`` for a hole."""
    clusters = ClusterMap(size)
    for number, letter in enumerate(letters):
        kind = {".": Kind.CLEAN, "0": Kind.ZERO}.get(letter, Kind.DATA)
        clusters.mark_range(number * CLUSTER, CLUSTER, kind)
    recording = leaves.record(
        "scsi0", clusters, job=job, level=level, parent=parent, began=began
    )
    assert recording is not None
    for number, letter in enumerate(letters):
        if letter not in ".0":
            recording.add(number, blake3(letter.encode() * CLUSTER).digest())
    recording.keep()
    recording.drop()
    assert not recording.problem
    leaves.shorten(recording.header)


def state(leaves: VmLeaves, job: str, size: int = SIZE) -> str:
    """What a disk held at a job: a letter a cluster, ``?`` for unknown."""
    names = {digest(leaves, letter): letter for letter in "abcdefgh"}
    found = ""
    with leaves.open("scsi0", job, size) as row:
        for window in windows(row.readers, size):
            for place in range(window.count):
                one = bytes(window.digests[place * 16 : place * 16 + 16])
                found += {0: "?", 1: "0"}.get(window.kinds[place]) or names[one]
    return found


def digest(leaves: VmLeaves, letter: str) -> bytes:
    cluster = blake3(letter.encode() * CLUSTER).digest()
    return blake3(cluster, key=leaves.keys.leaf).digest(16)


def reason(leaves: VmLeaves, job: str, size: int = SIZE) -> str:
    with pytest.raises(NoDigestsError) as caught:
        leaves.open("scsi0", job, size)
    return str(caught.value)


def file(leaves: VmLeaves, job: str) -> Path:
    return leaves.path("scsi0", job)


def test_a_row_is_followed_down_to_the_full(leaves: VmLeaves) -> None:
    keep(leaves, "F1", "aa00bb", level="F")
    keep(leaves, "I2", "c..d..", "F1")
    keep(leaves, "I3", "0....e", "I2")
    keep(leaves, "D4", ".f....", "F1", level="D")
    assert state(leaves, "F1") == "aa00bb"
    assert state(leaves, "I2") == "ca0dbb"
    assert state(leaves, "I3") == "0a0dbe"
    assert state(leaves, "D4") == "af00bb"
    assert state(leaves, "I3", SIZE + CLUSTER) == "0a0dbe?"


def test_a_row_with_a_gap_or_a_stranger_in_it_is_not_used(leaves: VmLeaves) -> None:
    keep(leaves, "F1", "aaaaaa", level="F")
    keep(leaves, "I2", "b.....", "F1")
    keep(leaves, "I3", "c.....", "I2")
    keep(leaves, "D4", "d.....", "F1", level="D")
    assert reason(leaves, "I9") == "this node has no digests of job I9"
    good = file(leaves, "I2").read_bytes()
    shutil.copy(file(leaves, "D4"), file(leaves, "I2"))
    assert "it is of job D4, disk scsi0 of VM 100-u" in reason(leaves, "I3")
    file(leaves, "I2").unlink()
    assert "job I3 builds on job I2, of which this node" in reason(leaves, "I3")
    # Another file of the same name, whose job was another one of that name.
    keep(leaves, "I2", "e.....", "F1")
    assert "not the one that its successor was made on" in reason(leaves, "I3")
    assert state(leaves, "I2") == "eaaaaa"
    file(leaves, "I2").write_bytes(good)
    assert state(leaves, "I3") == "caaaaa"


def test_files_of_another_vm_chain_or_disk_do_not_fit(
    leaves: VmLeaves, tmp_path: Path
) -> None:
    keep(leaves, "F1", "aaaaaa", level="F")
    store = LeafStore(str(tmp_path))
    for other in (
        store.vm(101, "u", "c0"),
        store.vm(100, "v", "c0"),
        store.vm(100, "u", "c1"),
    ):
        assert "no digests of job F1" in reason(other, "F1")
        other.folder.mkdir(parents=True)
        shutil.copy(file(leaves, "F1"), file(other, "F1"))
        assert "it is of job F1" in reason(other, "F1")
    shutil.copy(file(leaves, "F1"), leaves.path("scsi1", "F1"))
    with pytest.raises(NoDigestsError, match="disk scsi0"):
        leaves.open("scsi1", "F1", SIZE)


def test_a_disk_that_shrank_is_not_compared(leaves: VmLeaves) -> None:
    keep(leaves, "F1", "aaaaaa", level="F")
    assert "shrank" in reason(leaves, "F1", SIZE - 512)


def test_a_lost_or_damaged_key_costs_the_files_made_with_it(
    leaves: VmLeaves, tmp_path: Path
) -> None:
    keep(leaves, "F1", "aaaaaa", level="F")
    key = tmp_path / "digests/key"
    assert key.stat().st_mode & 0o777 == 0o600
    secret = key.read_bytes()
    assert len(secret) == 32
    for content in (None, b"short"):
        if content is None:
            key.unlink()
        else:
            key.write_bytes(content)
        again = LeafStore(str(tmp_path)).vm(100, "u", "c0")
        assert key.read_bytes() not in (secret, content)
        assert "made with another key" in reason(again, "F1")
        record = again.record(
            "scsi0", ClusterMap(SIZE), job="I2", level="I", parent="F1", began=0
        )
        assert record is None
    key.write_bytes(secret)
    assert state(LeafStore(str(tmp_path)).vm(100, "u", "c0"), "F1") == "aaaaaa"


def test_a_job_whose_name_there_was_already_is_never_a_parent(leaves: VmLeaves) -> None:
    """A clock that was set back, or one VM twice in a FileSet."""
    keep(leaves, "F1", "aaaaaa", level="F")
    clusters = ClusterMap(SIZE)
    clusters.mark_range(0, SIZE, Kind.ZERO)
    again = leaves.record("scsi0", clusters, job="F1", level="F", parent=None, began=0)
    assert again is not None
    again.keep()
    assert again.problem == "there were digests of job F1 already"
    assert "no digests of job F1" in reason(leaves, "F1")
    assert not list(leaves.folder.iterdir())


def test_a_job_that_fails_leaves_no_file(leaves: VmLeaves) -> None:
    clusters = ClusterMap.all_data(SIZE)
    recording = leaves.record(
        "scsi0", clusters, job="F1", level="F", parent=None, began=0
    )
    assert recording is not None
    recording.add(0, None)
    assert len(list(leaves.folder.iterdir())) == 1
    recording.drop()
    assert not list(leaves.folder.iterdir())


def test_a_store_that_cannot_be_written_is_a_problem_of_its_own(
    leaves: VmLeaves,
) -> None:
    leaves.folder.parent.write_text("in the way")
    recording = leaves.record(
        "scsi0", ClusterMap.all_data(SIZE), job="F1", level="F", parent=None, began=0
    )
    assert recording is not None
    recording.add(0, None)
    recording.keep()
    recording.drop()
    assert "Not a directory" in recording.problem or "exists" in recording.problem


def test_a_long_row_becomes_one_complete_file(leaves: VmLeaves) -> None:
    keep(leaves, "F0", "aabb00", level="F")
    last = leafstore.MERGE_ABOVE + 1
    wanted = {}
    now, parent = list("aabb00"), "F0"
    for number in range(1, last + 2):
        letters = ["."] * COUNT
        letters[number % COUNT] = now[number % COUNT] = "abcdefgh"[number % 8]
        keep(leaves, f"I{number}", "".join(letters), parent)
        parent = f"I{number}"
        wanted[parent] = "".join(now)
    for job, letters_then in wanted.items():
        assert state(leaves, job) == letters_then
    for number in range(last):
        file(leaves, f"I{number}" if number else "F0").unlink()
    assert state(leaves, f"I{last}") == wanted[f"I{last}"]
    assert state(leaves, f"I{last + 1}") == wanted[f"I{last + 1}"]
    with leaves.open("scsi0", f"I{last + 1}", SIZE) as row:
        assert len(row.readers) == 2


def test_what_the_director_may_still_name_is_kept_and_the_rest_goes(
    leaves: VmLeaves,
) -> None:
    began = 0
    fulls = leafstore.KEEP_FULLS + 2
    for full in range(fulls):
        keep(leaves, f"F{full}", "aaaaaa", level="F", began=(began := began + 1))
        keep(
            leaves,
            f"D{full}",
            "b.....",
            f"F{full}",
            level="D",
            began=(began := began + 1),
        )
    parent = f"F{fulls - 1}"
    others = leafstore.KEEP_OTHERS + 5
    for number in range(others):
        keep(leaves, f"I{number}", "c.....", parent, began=(began := began + 1))
        parent = f"I{number}"
    (leaves.folder / ".new-scsi0.killed").write_text("half")
    (leaves.folder / "scsi0.junk").write_text("junk")
    shutil.copy(file(leaves, "F0"), leaves.folder / "scsi1.F0")
    leaves.prune(["scsi0"])
    left = {path.name for path in leaves.folder.iterdir()}
    for full in range(fulls):
        assert (f"scsi0.F{full}" in left) == (full >= fulls - leafstore.KEEP_FULLS)
        assert f"scsi0.D{full}" not in left
    for number in range(others):
        wanted = number >= others - leafstore.KEEP_OTHERS
        if wanted:
            assert state(leaves, f"I{number}") == "caaaaa"
    bound = leafstore.KEEP_FULLS + leafstore.KEEP_OTHERS + leafstore.MERGE_ABOVE
    assert len(left) <= bound
    assert not left & {".new-scsi0.killed", "scsi0.junk", "scsi1.F0"}
    leaves.prune([])
    assert not list(leaves.folder.iterdir())


def test_incrementals_for_ever_stay_bounded(
    leaves: VmLeaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leafstore, "KEEP_OTHERS", 3)
    monkeypatch.setattr(leafstore, "MERGE_ABOVE", 3)
    keep(leaves, "F1", "aaaaaa", level="F")
    parent = "F1"
    for number in range(2, 40):
        keep(leaves, f"I{number}", "b.....", parent, began=number)
        parent = f"I{number}"
        leaves.prune(["scsi0"])
        assert len(list(leaves.folder.iterdir())) <= 3 + 3 + 3 + 1
        assert state(leaves, parent) == "baaaaa"
    assert state(leaves, "F1") == "aaaaaa", "a Differential may name it"


def test_chains_that_nobody_touches_any_more_are_forgotten(
    leaves: VmLeaves, tmp_path: Path
) -> None:
    store = LeafStore(str(tmp_path))
    keep(leaves, "F1", "aaaaaa", level="F")
    other = store.vm(101, "u", "c0")
    keep(other, "F1", "aaaaaa", level="F")
    now = other.folder.stat().st_mtime
    old = now - leafstore.FORGET_AFTER_S - 1
    os.utime(leaves.folder, (old, old))
    store.sweep(now)
    assert not leaves.folder.parent.exists()
    assert state(other, "F1") == "aaaaaa"
    assert (tmp_path / "digests/key").exists()


def test_a_large_sparse_disk_costs_a_window_of_memory(leaves: VmLeaves) -> None:
    size = 3 * WINDOW * CLUSTER
    clusters = ClusterMap(size)
    clusters.mark_range(0, size, Kind.ZERO)
    recording = leaves.record(
        "scsi0", clusters, job="F1", level="F", parent=None, began=0
    )
    assert recording is not None
    recording.keep()
    assert file(leaves, "F1").stat().st_size < 1024
    with leaves.open("scsi0", "F1", size) as row:
        found = [window.count for window in windows(row.readers, size)]
    assert found == [WINDOW] * 3
