# SPDX-License-Identifier: Apache-2.0
"""The CRC of a disk told in pieces is zlib's of the whole, whatever the order."""

from __future__ import annotations

import itertools
import zlib

from hypothesis import given
from hypothesis import strategies as st

from pveplug.images.contentsum import ContentSum


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=8), st.data())
def test_pieces_in_any_order_give_the_sum_of_the_whole(
    disk: bytes, cuts: list[int], data: st.DataObject
) -> None:
    edges = sorted({0, len(disk), *(c for c in cuts if c < len(disk))})
    pieces = list(itertools.pairwise(edges))
    found = ContentSum()
    for start, end in data.draw(st.permutations(pieces)):
        found.add(start, disk[start:end])
    assert found.crc32(len(disk)) == zlib.crc32(disk)
    assert found.data == len(disk)


@given(st.integers(0, 5000), st.binary(min_size=1, max_size=500), st.integers(0, 5000))
def test_what_is_not_told_reads_as_zeroes(before: int, data: bytes, after: int) -> None:
    found = ContentSum()
    found.add(before, data)
    size = before + len(data) + after
    assert found.crc32(size) == zlib.crc32(bytes(before) + data + bytes(after))


def test_an_empty_disk_costs_nothing_to_sum() -> None:
    whole, piece = 0, bytes(1 << 20)
    for _ in range(64):
        whole = zlib.crc32(piece, whole)
    assert ContentSum().crc32(64 << 20) == whole


def test_a_byte_elsewhere_is_another_sum() -> None:
    one, other = ContentSum(), ContentSum()
    one.add(512, b"x")
    other.add(1024, b"x")
    assert one.crc32(4096) != other.crc32(4096)
