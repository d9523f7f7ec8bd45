# SPDX-License-Identifier: Apache-2.0
"""Digests: what counts, what they cost, and that a wrong chunk is named."""

from __future__ import annotations

import pytest
from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.extents import Extent, Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import (
    DigestVerifier,
    DigestWriter,
    chunks,
    compare,
    root_of,
)
from pveplug.images.qcow2_reader import GuestData, GuestZero, ImageHeader
from pveplug.units import GiB, KiB, MiB, TiB
from tests.support.images import scattered

C = 64 * KiB


def test_a_digest_covers_the_data_and_the_kinds():
    clusters = ClusterMap(3 * MiB + 512)
    clusters.mark(Extent(C, C, Kind.DATA))
    clusters.mark(Extent(3 * C, C, Kind.ZERO))
    clusters.mark(Extent(3 * MiB, 512, Kind.DATA))
    for overlay, letter in ((True, "z"), (False, ".")):
        writer = DigestWriter(clusters, overlay=overlay)
        first = blake3(b"x" * 512 + bytes(C - 512)).digest()
        last = blake3(b"y" * 512).digest()
        writer.add(1, first)
        writer.add(3 * MiB // C, last)
        sidecar, root = writer.finish()
        kinds = f".d.{letter}".ljust(16, ".").encode()
        assert dict(chunks(sidecar)) == {
            0: blake3(first + kinds).digest(16),
            3: blake3(last + b"d").digest(16),
        }
        assert root == root_of(sidecar)


def test_a_scattered_increment_has_a_small_sidecar():
    clusters = scattered(TiB, 512)
    sidecar, _ = DigestWriter(clusters, overlay=True).finish()
    assert len(sidecar) <= 16 + 512 * 24 + 16


def test_a_full_disk_costs_16_bytes_per_mib():
    clusters = ClusterMap.all_data(GiB)
    sidecar, _ = DigestWriter(clusters, overlay=False).finish()
    assert len(sidecar) == 16 + 8 + 1024 * 16 + 16


def test_clusters_without_data_or_out_of_order_are_refused():
    clusters = ClusterMap(4 * C)
    clusters.mark(Extent(0, 2 * C, Kind.DATA))
    writer = DigestWriter(clusters, overlay=True)
    writer.add(1, bytes(32))
    with pytest.raises(IntegrityError, match="come after"):
        writer.add(0, bytes(32))
    with pytest.raises(IntegrityError, match="in no data cluster"):
        writer.add(2, bytes(32))


def events(*data):
    header = ImageHeader(8 * MiB, None, 16, 9 * MiB)
    return [header, *(GuestData(at, memoryview(part)) for at, part in data)]


def sidecar_of(*data):
    verifier = DigestVerifier()
    verifier.receive(events(*data))
    return verifier.finish()[0]


def test_the_first_wrong_chunk_is_named():
    good = sidecar_of((0, b"a" * C), (5 * MiB, b"b" * C), (7 * MiB, b"c" * C))
    for wrong, where in (
        (((0, b"a" * C), (5 * MiB, b"B" * C), (7 * MiB, b"c" * C)), "MiB 5"),
        (((0, b"a" * C), (7 * MiB, b"c" * C)), "MiB 5"),
        (((0, b"a" * C), (5 * MiB, b"b" * C)), "MiB 7"),
        (((0, b"a" * C), (1 * MiB, b"b" * C)), "MiB 1"),
    ):
        with pytest.raises(IntegrityError, match=f"disk0: .*{where}.*digest differs"):
            compare(good, sidecar_of(*wrong), name="disk0")
        verifier = DigestVerifier(good, name="disk0")
        with pytest.raises(IntegrityError, match=f"disk0: .*{where}.*digest differs"):
            _run(verifier, events(*wrong))


def _run(verifier, told):
    verifier.receive(told)
    return verifier.finish()


def test_data_that_was_left_out_counts_as_zeroes():
    told = [*events(), GuestZero(0, C, Kind.DATA)]
    verifier = DigestVerifier(sidecar_of((0, bytes(C))))
    assert _run(verifier, told)[0] == sidecar_of((0, bytes(C)))


def zeroes(*runs):
    return [*events(), *(GuestZero(at, n, Kind.ZERO) for at, n in runs)]


def test_a_zero_cluster_that_is_lost_or_moved_is_found_far_from_any_data():
    verifier = DigestVerifier()
    verifier.receive(zeroes((C, 2 * C), (5 * MiB, C)))
    good, root = verifier.finish()
    clusters = ClusterMap(8 * MiB)
    for at, length in ((C, 2 * C), (5 * MiB, C)):
        clusters.mark(Extent(at, length, Kind.ZERO))
    assert DigestWriter(clusters, overlay=True).finish() == (good, root)
    # Cut as an image is read, in several events: the same.
    assert _run(DigestVerifier(good), zeroes((C, C), (2 * C, C), (5 * MiB, C)))
    for wrong in (
        zeroes((C, 2 * C)),
        zeroes((C, 2 * C), (6 * MiB, C)),
        zeroes((C, C), (3 * C, C), (5 * MiB, C)),
    ):
        with pytest.raises(IntegrityError, match="zero clusters are not those"):
            _run(DigestVerifier(good), wrong)
        with pytest.raises(IntegrityError, match="zero clusters are not those"):
            compare(good, _run(DigestVerifier(), wrong)[0])


@pytest.mark.parametrize("version", [1, 2])
def test_digests_of_older_versions_are_still_compared(version):
    told = events((0, b"a" * C), (5 * MiB, b"b" * C))
    old = DigestVerifier(version=version)
    old.receive(told)
    sidecar, root = old.finish()
    assert sidecar[4] == version
    assert root == root_of(sidecar)
    assert dict(chunks(sidecar))[0] == blake3(b"a" * C + b"d" + b"." * 15).digest(16)
    assert _run(DigestVerifier(sidecar), told) == (sidecar, root)
    with pytest.raises(IntegrityError, match="MiB 5"):
        _run(DigestVerifier(sidecar), events((0, b"a" * C), (5 * MiB, b"B" * C)))


def test_manifests_of_version_3_have_digests_of_version_2():
    verifiers = [DigestVerifier(version=version) for version in (2, 3)]
    for verifier in verifiers:
        verifier.receive(events((0, b"a" * C)))
    assert verifiers[0].finish() == verifiers[1].finish()


def test_a_cluster_in_pieces_has_the_digest_of_the_whole():
    whole = sidecar_of((0, b"a" * C + b"b" * C))
    parts = ((0, b"a" * 7), (7, b"a" * (C - 7) + b"b" * 9), (C + 9, b"b" * (C - 9)))
    assert sidecar_of(*parts) == whole


def test_a_damaged_sidecar_is_refused():
    good = sidecar_of((0, b"a" * C), (5 * MiB, b"b" * C))
    for bad in (b"", b"PHDG", good[:-1], good[:20], b"X" + good[1:], good + b"\0"):
        with pytest.raises(IntegrityError):
            list(chunks(bad))
        with pytest.raises(IntegrityError):
            compare(bad, good)
        with pytest.raises(IntegrityError):
            _run(DigestVerifier(bad), events((0, b"a" * C), (5 * MiB, b"b" * C)))
    with pytest.raises(IntegrityError, match="no header"):
        DigestVerifier().finish()
    with pytest.raises(IntegrityError, match="before the image's header"):
        DigestVerifier().receive(events((0, b"x"))[1:])
