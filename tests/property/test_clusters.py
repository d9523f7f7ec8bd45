# SPDX-License-Identifier: Apache-2.0
"""What is true of every cluster map, against a model with one byte per byte."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pveplug.extents import Extent, Kind, tiles
from pveplug.images.clusters import ClusterMap
from tests.support.images import kinds_of, map_of

BITS = 4
SIZES = st.integers(1, 16 * 70)
KINDS = st.text("dz.", min_size=1, max_size=5000)


@st.composite
def marks(draw):
    size = draw(SIZES)
    runs = []
    for _ in range(draw(st.integers(0, 12))):
        start = draw(st.integers(0, size - 1))
        end = draw(st.integers(start + 1, size))
        runs.append(Extent(start, end - start, draw(st.sampled_from(Kind))))
    return size, runs


@given(marks())
def test_no_byte_is_lost_and_no_zero_is_invented(case):
    size, runs = case
    made = ClusterMap(size, BITS)
    made.mark_all(runs)
    for number in range(made.clusters):
        start, end = number << BITS, min((number + 1) << BITS, size)
        touching = [
            run
            for run in runs
            if run.kind is not Kind.CLEAN and run.offset < end and run.end > start
        ]
        if not touching:
            expected = Kind.CLEAN
        elif all(
            run.kind is Kind.ZERO and run.offset <= start and run.end >= end
            for run in touching
        ):
            expected = Kind.ZERO
        else:
            expected = Kind.DATA
        assert made.kind_at(number) is expected


@given(marks(), st.randoms())
def test_the_order_of_marks_does_not_matter(case, random):
    size, runs = case
    made, other = ClusterMap(size, BITS), ClusterMap(size, BITS)
    made.mark_all(runs)
    random.shuffle(runs)
    other.mark_all(runs)
    assert made == other


@given(KINDS, st.data())
def test_runs_say_what_was_marked(kinds, data):
    made = map_of(kinds)
    assert kinds_of(made) == kinds
    low = data.draw(st.integers(0, made.size - 1))
    high = data.draw(st.integers(low + 1, made.size))
    runs = list(made.runs(low, high))
    assert tiles((Extent(r.offset - low, r.length, r.kind) for r in runs), high - low)
    assert all(a.kind is not b.kind for a, b in itertools.pairwise(runs))
    for run in runs:
        for at in (run.offset, run.end - 1):
            assert made.kind_at(at >> 9) is run.kind
    assert list(made.data_runs(low, high)) == [r for r in runs if r.kind is Kind.DATA]
    assert list(made.zero_runs(low, high)) == [r for r in runs if r.kind is Kind.ZERO]


@given(st.integers(0, 40_000), st.integers(1, 40_000), st.integers(1, 60_000))
def test_long_runs_reach_their_edges(start, length, clusters):
    clusters = max(clusters, start + length)
    made = ClusterMap(clusters << 9, 9)
    made.mark(Extent(start << 9, length << 9, Kind.ZERO))
    assert made.counts() == (0, length)
    assert list(made.zero_runs()) == [Extent(start << 9, length << 9, Kind.ZERO)]
    made.mark(Extent(start << 9, length << 9, Kind.DATA))
    assert made.counts() == (length, 0)
    assert list(made.data_runs()) == [Extent(start << 9, length << 9, Kind.DATA)]


@given(KINDS, KINDS)
def test_combining_is_what_it_is_cluster_by_cluster(ours, theirs):
    mine, other = map_of(ours), map_of(theirs)
    padded = theirs.ljust(len(ours), ".")
    union = "".join(
        "d" if "d" in a + b else "z" if "z" in a + b else "."
        for a, b in zip(ours, padded, strict=False)
    )
    minus = "".join(a if b == "." else "." for a, b in zip(ours, padded, strict=False))
    assert kinds_of(mine.union(other)) == union
    assert kinds_of(mine.minus(other)) == minus
    assert kinds_of(mine) == ours


@given(KINDS)
def test_packing_comes_back(kinds):
    made = map_of(kinds, len(kinds) * 512 - 37)
    assert ClusterMap.from_bytes(made.to_bytes()) == made
