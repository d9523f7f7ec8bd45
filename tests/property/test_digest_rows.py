# SPDX-License-Identifier: Apache-2.0
"""Digests of clusters in a row are those of the clusters one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.leaves import Header, Keys, LeafWriter
from pveplug.units import CLUSTER

KEYS = Keys.of(bytes(32))
KINDS = {"d": Kind.DATA, "z": Kind.ZERO}


def made(states: str, size: int) -> ClusterMap:
    clusters = ClusterMap(size)
    for number, state in enumerate(states):
        if state in KINDS:
            length = min(CLUSTER, size - number * CLUSTER)
            clusters.mark_range(number * CLUSTER, length, KINDS[state])
    return clusters


@given(
    st.text("ddddddz.", min_size=1, max_size=70),
    st.integers(1, CLUSTER // 512),
    st.sets(st.integers(0, 69)),
    st.sets(st.integers(0, 69)),
    st.sets(st.integers(0, 69)),
    st.booleans(),
)
def test_a_row_is_its_clusters(
    states: str,
    tail: int,
    cuts: set[int],
    zeroes: set[int],
    left_out: set[int],
    overlay: bool,
) -> None:
    size = (len(states) - 1) * CLUSTER + tail * 512
    if not overlay:
        states = states.replace("z", ".")
    clusters = made(states, size)
    rows: list[tuple[int, list[bytes | None]]] = []
    for number, state in enumerate(states):
        if state != "d" or number in left_out:
            continue
        found = None if number in zeroes else bytes([number]) * 32
        if rows and rows[-1][0] + len(rows[-1][1]) == number and number not in cuts:
            rows[-1][1].append(found)
        else:
            rows.append((number, [found]))
    one, many = (DigestWriter(clusters, overlay=overlay) for _ in range(2))
    header = Header("v", "c", "d", "j", "F", size, 0, KEYS.name)
    singly, together = bytearray(), bytearray()
    leaf, leaves = (
        LeafWriter(header, clusters, KEYS, out.extend) for out in (singly, together)
    )
    for first, row in rows:
        for number, found in enumerate(row, first):
            one.add(number, found)
            leaf.add(number, found)
        many.add_all(first, row)
        leaves.add_all(first, row)
    assert many.finish() == one.finish()
    ends = []
    for writer in (leaf, leaves):
        try:
            writer.finish()
            ends.append("")
        except IntegrityError as error:
            ends.append(str(error))
    assert ends[0] == ends[1]
    assert singly == together
