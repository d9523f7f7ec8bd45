# SPDX-License-Identifier: Apache-2.0
"""Any row of files of digests says what a model of the disk says, or nothing."""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.clusterhash import ClusterCutter
from pveplug.images.clusters import ClusterMap
from pveplug.images.leaves import (
    Header,
    Keys,
    LeafWriter,
    RunReader,
    merge,
    verify,
    windows,
)
from pveplug.units import CLUSTER, SECTOR

QUICK = settings(deadline=None)
KEYS = Keys.of(b"k" * 32)


@dataclass(frozen=True)
class Made:
    """One image: the disk's size, and a letter per cluster: 0 zero, . clean, or data.

    ``z`` is a cluster that was thought to hold data and was found to be zero.
    """

    size: int
    clusters: str


def content(letter: str, length: int) -> bytes:
    return bytes(length) if letter in "0z" else letter.encode() * length


def sized(count: int, cut: int) -> int:
    return count * CLUSTER - cut * SECTOR


@st.composite
def histories(draw: st.DrawFn) -> list[Made]:
    count = draw(st.integers(1, 9))
    size = sized(count, draw(st.integers(0, 3)))
    made = [Made(size, draw(st.text("0zab", min_size=count, max_size=count)))]
    for _ in range(draw(st.integers(0, 5))):
        new = draw(st.integers(count, count + 2))
        new_size = max(size, sized(new, draw(st.integers(0, 3))))
        letters = draw(st.text("0zab...", min_size=new, max_size=new))
        # A job reads whatever lies beyond the disk's size at the job before.
        kept = new if new_size == size else size // CLUSTER
        tail = "".join("0" if c == "." else c for c in letters[kept:])
        made.append(Made(new_size, letters[:kept] + tail))
        count, size = new, new_size
    return made


def written(image: Made, header: Header, *, piece: int = CLUSTER) -> bytes:
    clusters = ClusterMap(image.size)
    for number, letter in enumerate(image.clusters):
        at = number * CLUSTER
        kind = (
            Kind.CLEAN if letter == "." else Kind.ZERO if letter == "0" else Kind.DATA
        )
        clusters.mark_range(at, min(CLUSTER, image.size - at), kind)
    out = io.BytesIO()
    writer = LeafWriter(header, clusters, KEYS, out.write)
    cutter = ClusterCutter(image.size)
    disk = b"".join(content(letter, CLUSTER) for letter in image.clusters)
    for run in clusters.data_runs():
        for at in range(run.offset, run.end, piece):
            length = min(piece, run.end - at)
            data = bytearray(b"xy" + disk[at : at + length])
            for cluster, found in cutter.take(at, data, 2, length):
                writer.add(cluster, found)
    writer.finish()
    return out.getvalue()


@given(st.text("0ab", min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 9))
def test_whole_clusters_have_the_same_hashes_taken_at_once(letters, tail, start):
    size = sized(len(letters), tail)
    disk = b"".join(content(letter, CLUSTER) for letter in letters)[:size]
    buffer = bytearray(b"y" * start + disk)
    one, other = ClusterCutter(size), ClusterCutter(size)
    apart = list(one.take(0, buffer, start, size))
    at_once = other.take_whole(0, buffer, start, size)
    if size % CLUSTER:
        assert at_once is None
        assert list(other.take(0, buffer, start, size)) == apart
    else:
        assert list(enumerate(at_once)) == apart
    assert other.take_whole(512, buffer, start, CLUSTER) is None


def test_a_cluster_that_is_not_whole_yet_is_not_passed_over():
    cutter, disk = ClusterCutter(2 * CLUSTER), bytearray(b"a" * 2 * CLUSTER)
    assert not list(cutter.take(0, disk, 0, 512))
    assert cutter.take_whole(CLUSTER, disk, 0, CLUSTER) is None
    with pytest.raises(IntegrityError, match="was left at byte 512"):
        list(cutter.take(CLUSTER, disk, 0, CLUSTER))


def row_of(history: list[Made], *, piece: int = CLUSTER) -> list[bytes]:
    files: list[bytes] = []
    for number, image in enumerate(history):
        header = Header(
            vm="100-u", chain="c", disk="scsi0", job=f"j{number}", level="I",
            size=image.size, began=number, key=KEYS.name,
            parent=f"j{number - 1}" if number else None,
            parent_mac=files[-1][-32:].hex() if number else "", depth=number,
        )  # fmt: skip
        files.append(written(image, header, piece=piece))
    return files


def readers(files: list[bytes]) -> list[RunReader]:
    return [RunReader(io.BytesIO(file), len(file), KEYS) for file in files]


def state(history: list[Made]) -> list[str]:
    """The model: the letter of each cluster at the last job."""
    now: list[str] = []
    for image in history:
        now += ["?"] * (len(image.clusters) - len(now))
        for number, letter in enumerate(image.clusters):
            if letter != ".":
                now[number] = "0" if letter == "z" else letter
    return now


@functools.cache
def digest_of(letter: str, length: int) -> bytes | None:
    cutter_map = Made(length, letter)
    file = written(cutter_map, row_header(length))
    (window,) = windows(readers([file]), length)
    return None if window.kinds[0] == 1 else bytes(window.digests)


def row_header(size: int) -> Header:
    return Header("v", "c", "d", "j", "F", size, 0, KEYS.name)


def check(files: list[bytes], history: list[Made], size: int, step: int) -> None:
    last, letters = history[-1].size, state(history)
    known = len(letters) if size == last else last // CLUSTER
    seen = 0
    for window in windows(readers(files), size, step=step):
        for cluster in range(window.first, window.first + window.count):
            seen += 1
            length = min(CLUSTER, size - cluster * CLUSTER)
            for letter in "0ab":
                same = window.same(cluster, digest_of(letter, length))
                truth = cluster < known and letters[cluster] == letter
                assert same == truth, (cluster, letter)
        not_zero = {
            n
            for low, high in window.not_zero(window.first, window.first + window.count)
            for n in range(low, high)
        }
        for cluster in range(window.first, window.first + window.count):
            zero = cluster < known and letters[cluster] == "0"
            assert (cluster not in not_zero) == zero
    assert seen == -(-size // CLUSTER)


@QUICK
@given(histories(), st.integers(1, 7), st.integers(0, 2), st.integers(0, 3))
def test_a_row_says_what_the_disk_held_and_nothing_of_what_grew_since(
    history: list[Made], step: int, more: int, cut: int
) -> None:
    size = history[-1].size
    grown = max(size, sized(-(-size // CLUSTER) + more, cut))
    check(row_of(history), history, grown, step)


@QUICK
@given(histories(), st.integers(1, 7))
def test_a_merged_file_says_the_same_as_its_row(history: list[Made], step: int) -> None:
    files = row_of(history)
    size = history[-1].size
    out = io.BytesIO()
    header = replace(row_header(size), job="merged")
    merge(readers(files), header, KEYS, out.write)
    merged = out.getvalue()
    assert verify(io.BytesIO(merged), len(merged), KEYS)[0] == header
    check([merged], history, size, step)


@QUICK
@given(histories(), st.sampled_from([4096, 24 * 1024, 3 * CLUSTER]))
def test_the_pieces_in_which_data_comes_make_no_difference(
    history: list[Made], piece: int
) -> None:
    assert row_of(history, piece=piece) == row_of(history)


@QUICK
@given(histories(), st.randoms(use_true_random=False), st.booleans())
def test_any_damage_to_a_file_is_told(
    history: list[Made], rng: random.Random, cut: bool
) -> None:
    file = bytearray(rng.choice(row_of(history)))
    at = rng.randrange(len(file))
    if cut:
        del file[at:]
    else:
        file[at] ^= 1 << rng.randrange(8)
    with pytest.raises(IntegrityError):
        verify(io.BytesIO(file), len(file), KEYS)


def read_all(files: list[bytes], lengths: list[int], size: int) -> None:
    row = [
        RunReader(io.BytesIO(file), length, KEYS)
        for file, length in zip(files, lengths, strict=True)
    ]
    for _ in windows(row, size):
        pass


@QUICK
@given(histories(), st.randoms(use_true_random=False), st.booleans())
def test_a_file_that_is_damaged_after_it_was_verified_is_told_at_the_end_at_the_latest(
    history: list[Made], rng: random.Random, cut: bool
) -> None:
    files = row_of(history)
    which = rng.randrange(len(files))
    file = bytearray(files[which])
    at = rng.randrange(len(file))
    if cut:
        del file[at:]
    else:
        file[at] ^= 1 << rng.randrange(8)
    lengths = [len(one) for one in files]
    files[which] = bytes(file)
    with pytest.raises(IntegrityError):
        read_all(files, lengths, history[-1].size)


def test_a_file_made_with_another_key_is_told_as_such() -> None:
    other = Keys.of(b"l" * 32)
    file = written(Made(CLUSTER, "a"), replace(row_header(CLUSTER), key=other.name))
    with pytest.raises(IntegrityError, match="another key"):
        verify(io.BytesIO(file), len(file), KEYS)


def test_an_image_that_was_not_sent_to_its_end_has_no_file() -> None:
    clusters = ClusterMap.all_data(3 * CLUSTER)
    writer = LeafWriter(row_header(3 * CLUSTER), clusters, KEYS, lambda _: None)
    writer.add(0, bytes(32))
    with pytest.raises(IntegrityError, match="2 clusters have no digest"):
        writer.finish()
