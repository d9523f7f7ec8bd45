# SPDX-License-Identifier: Apache-2.0
"""QEMU's own tools judge what we write, and our reader takes it back."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import pytest

from pveplug.extents import Extent, Kind
from pveplug.images.clusters import ClusterMap
from pveplug.images.qcow2_writer import Metadata, Qcow2StreamWriter
from pveplug.units import CLUSTER, GiB, KiB, MiB, TiB
from tests.support.images import (
    apply,
    pieces_of,
    read_all,
    scattered,
    without_zeroes,
    write_file,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not here"),
]

SIZES = [512, 540672, 4 * MiB, 64 * MiB + 512, 514 * MiB - 1536]


def qemu_img(*args) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checked(path) -> dict:
    """Run qemu-img check; no error, no leak, and the file ends where it should."""
    report = json.loads(qemu_img("check", "--output=json", path))
    assert report["check-errors"] == 0
    assert "corruptions" not in report
    assert "leaks" not in report
    assert report["image-end-offset"] == path.stat().st_size
    return report


def same(image, raw) -> None:
    """The image reads as the raw file does, to the last byte."""
    info = json.loads(qemu_img("info", "--output=json", image))
    assert info["virtual-size"] == raw.stat().st_size
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)


def random_disk(size, seed, share):
    """A sparse disk of which about ``share`` of the clusters hold something."""
    noise = random.Random(seed)
    content = {}
    for number in range(-(-size // CLUSTER)):
        if noise.random() < share:
            length = min(CLUSTER, size - number * CLUSTER)
            content[number] = noise.randbytes(length)
    return content


def reader_of(content, size):
    def read(offset, length):
        out = bytearray(length)
        at = offset
        while at < offset + length:
            number, skip = divmod(at, CLUSTER)
            part = min(CLUSTER - skip, offset + length - at)
            if number in content:
                low = at - offset
                out[low : low + part] = content[number][skip : skip + part]
            at += part
        return bytes(out)

    return read


def write_raw(path, content, size):
    with path.open("wb") as file:
        file.truncate(size)
        for number, data in content.items():
            file.seek(number * CLUSTER)
            file.write(data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_an_image_is_clean_and_equals_the_disk(tmp_path, size, share):
    if share == 1.0:
        size = min(size, 64 * MiB + 512)
    content = random_disk(size, 1, share)
    clusters = ClusterMap(size)
    for number, data in content.items():
        clusters.mark(Extent(number * CLUSTER, len(data), Kind.DATA))
    writer = Qcow2StreamWriter(clusters)
    image, raw = tmp_path / "scsi0.qcow2", tmp_path / "disk.raw"
    pieces = list(pieces_of(writer, reader_of(content, size)))
    write_file(image, pieces)
    assert image.stat().st_size == writer.file_size
    checked(image)
    write_raw(raw, content, size)
    same(image, raw)
    events = read_all(pieces, writer.file_size, zero_unallocated=True)
    if size < 100 * MiB:
        target = bytearray(b"\xa5" * size)
        apply(events, target)
        assert target == raw.read_bytes()


def make_chain(tmp_path, seed):
    """Write a Full and three increments with changing sizes; return the last state."""
    noise = random.Random(seed)
    size = 40 * MiB + 512 * noise.randrange(128)
    content = random_disk(size, seed, 0.3)
    parent = None
    streams = []
    for name in ("full.2026-01-01_01.00.00_01", "job:1", "vm_job.3", "job 4"):
        zeroed, changed = [], []
        if parent:
            grown = 0 if name == "job:1" else noise.randrange(-40, 80) * 1536
            old, size = size, size + grown
            for number in noise.sample(range(size // CLUSTER), 40):
                changed.append(number)
                content[number] = noise.randbytes(CLUSTER)
            for number in noise.sample(range(size // CLUSTER), 40):
                if number not in changed:
                    zeroed.append(number)
                    content.pop(number, None)
            # A changed size shows up as change from the smaller of both ends on.
            for number in range(min(old, size) // CLUSTER, -(-size // CLUSTER)):
                changed.append(number)
                length = min(CLUSTER, size - number * CLUSTER)
                content[number] = noise.randbytes(length)
            content = {n: c for n, c in content.items() if n * CLUSTER < size}
        clusters = ClusterMap(size)
        for number in changed if parent else content:
            length = min(CLUSTER, size - number * CLUSTER)
            clusters.mark(Extent(number * CLUSTER, length, Kind.DATA))
        for number in zeroed:
            length = min(CLUSTER, size - number * CLUSTER)
            clusters.mark(Extent(number * CLUSTER, length, Kind.ZERO))
        backing = f"../{parent}/scsi0.qcow2" if parent else None
        writer = Qcow2StreamWriter(clusters, backing=backing)
        folder = tmp_path / name
        folder.mkdir()
        pieces = list(without_zeroes(pieces_of(writer, reader_of(content, size)), 4096))
        write_file(folder / "scsi0.qcow2", pieces)
        checked(folder / "scsi0.qcow2")
        streams.append((pieces, writer))
        parent = name
    return size, content, folder / "scsi0.qcow2", streams


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_chain_opens_by_its_backing_names_and_equals_the_disk(tmp_path, seed):
    size, content, newest, streams = make_chain(tmp_path, seed)
    raw, flat = tmp_path / "disk.raw", tmp_path / "flat.raw"
    write_raw(raw, content, size)
    listed = json.loads(qemu_img("info", "--backing-chain", "--output=json", newest))
    assert [entry["format"] for entry in listed] == ["qcow2"] * 4
    assert [entry.get("backing-filename-format") for entry in listed] == [
        "qcow2",
        "qcow2",
        "qcow2",
        None,
    ]
    same(newest, raw)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", newest, flat)
    assert flat.read_bytes() == raw.read_bytes()

    target = bytearray(b"\xa5" * 64 * MiB)
    for pieces, writer in streams:  # an ordered replay by our own reader
        events = read_all(pieces, writer.file_size, zero_unallocated=True)
        apply(events, target)
    assert target[:size] == raw.read_bytes()


def test_a_chain_can_be_flattened_with_rebase(tmp_path):
    size, content, newest, _ = make_chain(tmp_path, 9)
    raw = tmp_path / "disk.raw"
    write_raw(raw, content, size)
    qemu_img("rebase", "-f", "qcow2", "-b", "", newest)
    info = json.loads(qemu_img("info", "--output=json", newest))
    assert "backing-filename" not in info
    same(newest, raw)


def test_qemu_can_write_to_an_image_of_ours(tmp_path):
    clusters = scattered(GiB, 40)
    writer = Qcow2StreamWriter(clusters)
    image = tmp_path / "scsi0.qcow2"
    write_file(image, pieces_of(writer, lambda at, length: os.urandom(length)))
    script = [
        "-c",
        "write -P 7 0 1M",
        "-c",
        "write -P 8 1023M 1M",
        "-c",
        "read -P 7 0 1M",
    ]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *script, str(image)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Pattern verification failed" not in done.stdout
    report = json.loads(qemu_img("check", "--output=json", image))
    assert "corruptions" not in report
    assert "leaks" not in report


@pytest.mark.parametrize("size", [100 * GiB, TiB, 64 * TiB])
def test_512_scattered_clusters_of_a_huge_disk_cost_little(tmp_path, size):
    if size == 64 * TiB:
        clusters = ClusterMap(size)
        for number in random.Random(1).sample(range(clusters.clusters), 512):
            clusters.mark(Extent(number * CLUSTER, CLUSTER, Kind.DATA))
    else:
        clusters = scattered(size, 512)
    writer = Qcow2StreamWriter(clusters, backing="../parent/scsi0.qcow2")
    metadata = sum(p.length for p in writer.pieces() if isinstance(p, Metadata))
    assert metadata <= 512 * CLUSTER // 50 + MiB
    if size > TiB:
        return
    base = tmp_path / "parent" / "scsi0.qcow2"
    base.parent.mkdir()
    write_file(base, pieces_of(Qcow2StreamWriter(ClusterMap(size)), None))
    checked(base)
    overlay = tmp_path / "job" / "scsi0.qcow2"
    overlay.parent.mkdir()
    write_file(overlay, pieces_of(writer, lambda at, length: b"x" * length))
    checked(overlay)
    mapped = json.loads(qemu_img("map", "--output=json", overlay))
    data = [run for run in mapped if run["data"]]
    assert sum(run["length"] for run in data) == 512 * CLUSTER
    ours = [(run.offset, run.length) for run in clusters.data_runs()]
    joined: list[list[int]] = []
    for run in data:
        if joined and sum(joined[-1]) == run["start"]:
            joined[-1][1] += run["length"]
        else:
            joined.append([run["start"], run["length"]])
    assert [tuple(pair) for pair in joined] == ours


def test_a_full_image_with_many_refcount_blocks_is_clean(tmp_path):
    size = 9 * GiB + 512
    clusters = ClusterMap.all_data(size)
    writer = Qcow2StreamWriter(clusters)
    image = tmp_path / "scsi0.qcow2"
    # All its clusters turn out to be zero, so nothing but metadata is sent.
    pieces = without_zeroes(
        ((p.file_offset, p.data) for p in writer.pieces() if isinstance(p, Metadata)),
        64 * KiB,
    )
    write_file(image, pieces)
    report = checked(image)
    assert report["allocated-clusters"] == clusters.clusters
    assert report.get("fragmented-clusters", 0) <= 20
