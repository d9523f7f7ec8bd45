# SPDX-License-Identifier: Apache-2.0
"""Owners of any chain, against an ordered replay of its images byte by byte."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.errors import IntegrityError
from pveplug.extents import Kind
from pveplug.images.chain import (
    Chain,
    DiskEntry,
    Manifest,
    backing_name,
    decode_objects,
    encode_objects,
)
from pveplug.images.clusters import ClusterMap
from pveplug.images.qcow2_reader import GuestData, ImageHeader
from pveplug.images.qcow2_writer import Qcow2StreamWriter
from tests.support.images import map_of, pieces_of, read_all, without_zeroes

LETTERS = st.text("dz.", min_size=1, max_size=80)


@st.composite
def chains(draw):
    """Members with maps and sizes of their own; one may stand alone in the middle."""
    members = []
    for number in range(draw(st.integers(1, 6))):
        kinds = draw(LETTERS)
        size = 512 * len(kinds) * 2 - 512 * draw(st.integers(0, 1))
        alone = number == 0 or draw(st.integers(0, 5)) == 0
        members.append((map_of(kinds, size, 10), alone))
    return members


def replayed(members, disks):
    """What QEMU reads at the newest image: the model."""
    state = b""
    for (clusters, alone), disk in zip(members, disks, strict=True):
        size = clusters.size
        base = b"" if alone else state
        now = bytearray(base[:size].ljust(size, b"\0"))
        for run in clusters.runs():
            if run.kind is Kind.DATA:
                now[run.offset : run.end] = disk[run.offset : run.end]
            elif run.kind is Kind.ZERO:
                now[run.offset : run.end] = bytes(run.length)
        state = bytes(now)
    return state


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(0, 1000))
def test_writing_each_clusters_owner_once_gives_the_newest_disk(members, seed):
    noise = random.Random(seed)
    disks = [noise.randbytes(clusters.size) for clusters, _ in members]
    images, blobs = {}, []
    for number, ((clusters, alone), disk) in enumerate(
        zip(members, disks, strict=True)
    ):
        parent = f"job{number - 1}"
        backing = None if alone else backing_name(parent, "scsi0")
        writer = Qcow2StreamWriter(clusters, backing=backing)
        pieces = pieces_of(writer, lambda at, length, disk=disk: disk[at : at + length])
        images[f"job{number}"] = list(without_zeroes(pieces, 512))
        entry = DiskEntry("scsi0", clusters.size, backing=backing)
        manifest = Manifest(
            100, "", "vm", f"job{number}", parent if number else None, "I", number,
            "pve", "", "", disks=(entry,),
        )  # fmt: skip
        blobs += [b for _, b in encode_objects(manifest, {"scsi0": clusters})]
    noise.shuffle(blobs)
    records, problems = decode_objects(blobs)
    assert not problems
    chain = Chain(records)
    size = chain.final_size("scsi0")
    target = bytearray(b"\xa5" * size)
    writes = bytearray(size)
    for extent in chain.never_written("scsi0"):
        assert extent.kind is Kind.ZERO
        target[extent.offset : extent.end] = bytes(extent.length)
    jobs = list(chain.jobs)
    noise.shuffle(jobs)  # the order of arrival doesn't matter
    for job in jobs:
        owned = chain.owned(job, "scsi0")
        for event in read_all(images[job]):
            if isinstance(event, ImageHeader):
                continue
            for run in owned.runs(event.offset, event.offset + event.length):
                if run.kind is not Kind.DATA:
                    continue
                low = run.offset - event.offset
                target[run.offset : run.end] = (
                    event.data[low : low + run.length]
                    if isinstance(event, GuestData)
                    else bytes(run.length)
                )
                for at in range(run.offset, run.end):
                    writes[at] += 1
    assert target == replayed(members, disks)
    assert max(writes) <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=200)), st.integers(0, 1000))
def test_foreign_and_damaged_objects_are_told_and_never_raise(blobs, seed):
    noise = random.Random(seed)
    manifest = Manifest(1, "", "vm", "job", None, "F", 0, "", "", "")
    good = bytearray(encode_objects(manifest, {})[0][1])
    for _ in range(noise.randrange(1, 5)):
        good[noise.randrange(len(good))] = noise.randrange(256)
    records, problems = decode_objects([*blobs, bytes(good)])
    assert len(records) + len(problems) >= len(blobs) + 1


@given(st.binary(max_size=300))
def test_garbage_is_no_cluster_map(content):
    for packed in (content, b"PHCM\x01\x10\0\0" + content):
        with pytest.raises(IntegrityError):
            ClusterMap.from_bytes(packed)
