# SPDX-License-Identifier: Apache-2.0
"""Foreign images: what our readers tell is what qemu-img reads, hash for hash."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import uuid
from pathlib import Path

import pytest

from pveplug.errors import IntegrityError
from pveplug.images.detect import FIRST, Format, detect, reader_for
from pveplug.images.lineage import Link, in_order, zeroes_after
from pveplug.images.stream import (
    Event,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    MemorySpill,
    feed,
    finish,
)
from pveplug.images.vmdk_set import VmdkSet
from tests.support import vhdx_images, vmdk_images
from tests.support.foreign import some_disk
from tests.support.requires import program, requires

pytestmark = [pytest.mark.integration, requires("qemu-img", "qemu-io")]

MIB = 1 << 20
PIECE = 777_777  # of no power of two
VARIANTS = [
    "raw",
    *("vmdk subformat=monolithicSparse", "vmdk subformat=streamOptimized"),
    *("vmdk subformat=monolithicFlat", "vmdk subformat=twoGbMaxExtentSparse"),
    *("vmdk subformat=twoGbMaxExtentFlat",),
    *("vmdk subformat=monolithicSparse,zeroed_grain=on",),
    *("vmdk subformat=monolithicSparse,compat6=on",),
    *("vhdx subformat=dynamic", "vhdx subformat=fixed", "vhdx block_size=1M"),
    *("vhdx block_size=16M", "vhdx block_state_zero=off"),
    *("vpc subformat=dynamic", "vpc subformat=fixed"),
    *("vpc subformat=dynamic,force_size=on", "vpc subformat=fixed,force_size=on"),
    *("qcow2", "qcow2 compat=0.10", "qcow2 cluster_size=512", "qcow2 cluster_size=2M"),
    *("qcow2 extended_l2=on", "qcow2 extended_l2=on,cluster_size=16k"),
    *("qcow2 preallocation=metadata", "qcow2 preallocation=full"),
    *("qcow2 lazy_refcounts=on", "qcow2 refcount_bits=1"),
    *("-c qcow2", "-c qcow2 compat=0.10", "-c qcow2 cluster_size=512"),
    *("-c qcow2 cluster_size=2M", "-c qcow2 compression_type=zstd"),
    *("-c qcow2 compression_type=zstd,cluster_size=4k", "-c qcow2 extended_l2=on"),
]


def qemu_img(*args) -> str:
    done = subprocess.run(
        [program("qemu-img"), *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    argv = [program("qemu-io")]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run([*argv, str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Target:
    """Writes a disk from events; what the parent has stays as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: ImageInfo | None = None
        path.touch()

    def take(self, events: list[Event]) -> None:
        with self.path.open("r+b") as file:
            for event in events:
                match event:
                    case ImageInfo(size=int()):
                        self.info = event
                        file.truncate(event.size)
                    case GuestData():
                        file.seek(event.offset)
                        file.write(event.data)
                    case GuestZero():
                        zero(file, event.offset, event.length)
                    case ImageEnd():
                        self.info = event.info
                        file.truncate(event.info.size)
                    case GuestParent():
                        pass

    def zero(self, start: int, end: int) -> None:
        with self.path.open("r+b") as file:
            zero(file, start, end - start)

    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def zero(file, offset: int, length: int) -> None:
    """Zero a range; holes are left as they are."""
    file.flush()
    end = offset + length
    while offset < end:
        try:
            offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
        except OSError:
            return
        step = min(MIB, end - offset)
        if step > 0:
            os.pwrite(file.fileno(), bytes(step), offset)
        offset += step


def read_files(files: list[Path], target: Target, spill: int = 4 << 20) -> None:
    """Read an image of one file, or of a descriptor and its extents."""
    if len(files) == 1:
        with files[0].open("rb") as file:
            first = file.read(FIRST)
        reader = reader_for(
            detect(first),
            name=files[0].name,
            file_size=files[0].stat().st_size,
            spill=MemorySpill(spill),
        )
        with files[0].open("rb") as file:
            while data := file.read(PIECE):
                for events in feed(reader, data):
                    target.take(events)
        for events in finish(reader):
            target.take(events)
        return
    disk = VmdkSet(name=files[0].name)
    for path in files:
        disk.begin_file(path.name, path.stat().st_size)
        with path.open("rb") as file:
            while data := file.read(PIECE):
                target.take(disk.receive_data(data))
                while disk.pending:
                    target.take(disk.receive_data(b""))
        target.take(disk.end_file())
        while disk.pending:
            target.take(disk.receive_data(b""))
    target.take(disk.receive_eof())


def digest_by_qemu(image: Path, raw: Path, kind: str) -> str:
    qemu_img("convert", "-f", kind, "-O", "raw", image, raw)
    with raw.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_as_qemu(image: Path, kind: str, files: list[Path] | None = None) -> Target:
    target = Target(image.parent / "ours.raw")
    read_files(files or [image], target)
    theirs = digest_by_qemu(image, image.parent / "theirs.raw", kind)
    assert target.digest() == theirs
    return target


@pytest.fixture(scope="module", params=["random", "structured"])
def disk(request, tmp_path_factory) -> Path:
    """8 MiB and some sectors: dense noise; or text, noise and holes of all lengths."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    size = 8 * MIB + 3 * 512
    if request.param == "random":
        path.write_bytes(random.Random(7).randbytes(size))
    else:
        path.write_bytes(some_disk(size, 5, holes=0.6))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_qemu_img_reads_the_same(variant, disk, tmp_path):
    packed, words = variant.startswith("-c "), variant.removeprefix("-c ").split(" ")
    image = tmp_path / "x.img"
    qemu_img(
        *("convert", "-f", "raw", "-O", words[0]),
        *(["-c"] if packed else []),
        *(["-o", words[1]] if len(words) > 1 else []),
        *(disk, image),
    )
    files = sorted(tmp_path.iterdir(), key=lambda path: (path != image, path.name))
    target = same_as_qemu(image, words[0], files)
    if "vpc" not in variant:  # qemu rounds a VHD up to a geometry
        assert target.digest() == hashlib.sha256(disk.read_bytes()).hexdigest()


def test_a_vmdk_of_two_extents_reads_the_same(tmp_path):
    image = tmp_path / "big.vmdk"
    size = "2200M"
    qemu_img(
        "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", image, size
    )
    qemu_io(image, "write -P 5 2146400000 100000", "write -P 6 0 512")
    files = sorted(tmp_path.iterdir(), key=lambda path: (path != image, path.name))
    assert len(files) == 3
    target = Target(tmp_path / "ours.raw")
    read_files(files, target)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", image, target.path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vmdk", "zeroed_grain=on"),
        ("qcow2", "cluster_size=4k"),
        ("qcow2", "extended_l2=on"),
        ("vhdx", "block_size=1M"),
    ],
)
def test_zeroes_written_and_data_discarded_read_the_same(kind, options, tmp_path):
    image = tmp_path / f"x.{kind}"
    qemu_img("create", "-f", kind, "-o", options, image, "32M")
    noise = random.Random(3)
    for _ in range(12):
        at, length = noise.randrange(500) * 65536, noise.choice([512, 65536, 200704])
        verb = noise.choice(["write -P 7", "write -P 9", "write -z", "write -z -u"])
        qemu_io(image, f"{verb} {at} {length}")
    same_as_qemu(image, kind)


def test_a_qcow2_with_snapshots_and_relocated_tables_reads_the_same(tmp_path):
    """A resize moves the L1 table behind the data: then the spill is used."""
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 2 100k 100k")
    qemu_img("resize", image, "64M")
    qemu_io(image, "write -P 3 60M 100k")
    target = Target(tmp_path / "ours.raw")
    read_files([image], target, 4 * MIB)
    assert target.digest() == digest_by_qemu(image, tmp_path / "t.raw", "qcow2")


def read_chain(files: list[Path], path: Path) -> Target:
    """Put a chain together, oldest first."""
    links = []
    for file in files:
        probe = Target(path.parent / "probe.raw")
        read_files([file], probe)
        links.append(Link(file.name, probe.info))
    order = in_order(random.Random(1).sample(links, len(links)))
    assert [link.name for link in order] == [file.name for file in files]
    target = Target(path)
    ranges = zeroes_after([link.info for link in order])
    for file, (start, end) in zip(files, ranges, strict=True):
        if start < end:
            target.zero(start, end)
        read_files([file], target)
    return target


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vmdk", "subformat=monolithicSparse,zeroed_grain=on"), ("qcow2", "")],
)
def test_a_chain_reads_the_same(kind, options, tmp_path):
    files = [tmp_path / f"{number}.{kind}" for number in range(3)]
    more = ["-o", options] if options else []
    qemu_img("create", "-f", kind, *more, files[0], "16M")
    qemu_io(files[0], "write -P 1 0 4M", "write -P 2 10M 1M")
    for number in (1, 2):
        base = ["-b", files[number - 1], "-F", kind]
        qemu_img("create", "-f", kind, *more, *base, files[number])
        qemu_io(
            files[number],
            f"write -P {number + 4} {number}M 300k",
            f"write -z {number + 9}M 128k",
        )
    target = read_chain(files, tmp_path / "ours.raw")
    assert target.digest() == digest_by_qemu(files[2], tmp_path / "t.raw", kind)
    # A parent that was changed after its child was made has another CID.
    if kind == "vmdk":
        qemu_io(files[0], "write -P 8 0 512")
        with pytest.raises(IntegrityError, match="nothing builds on 0"):
            read_chain(files, tmp_path / "again.raw")


@pytest.mark.parametrize("start", [0, 250, 255])
def test_a_pending_log_is_replayed_as_qemu_does(start, tmp_path):
    disk = some_disk(4 * MIB, 9)
    image = tmp_path / "x.vhdx"
    made = vhdx_images.with_pending_log(
        vhdx_images.Vhdx(disk, "fnfz"), start=start * 4096
    )
    image.write_bytes(made)
    target = Target(tmp_path / "ours.raw")
    read_files([image], target)
    qemu_img("check", "-r", "all", "-f", "vhdx", image)
    assert target.digest() == digest_by_qemu(image, tmp_path / "t.raw", "vhdx")
    assert any(disk[:MIB])


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_crafted_vhdx_is_one_to_qemu(sector, tmp_path):
    """The crafting that differencing disks are tested with makes what qemu reads."""
    image = tmp_path / "x.vhdx"
    disk = some_disk(5 * MIB, 2)
    kind = vhdx_images.Vhdx(disk, "fnzfu", sector=sector, blocks=[3, 0])
    kind.order = ("bat", "meta", "log", "blocks")
    image.write_bytes(kind.make())
    if sector == 512:
        same_as_qemu(image, "vhdx")
    else:  # qemu refuses other sectors than 512
        target = Target(tmp_path / "ours.raw")
        read_files([image], target)
        assert target.digest() == hashlib.sha256(kind.told(b"")).hexdigest()


def test_crafted_vmdks_are_ones_to_qemu(tmp_path):
    """Redundant tables, zeroed grains, COWD behind a descriptor, a VMware stream."""
    disk = some_disk(4 * MIB, 8)
    grains = "".join("dz."[n % 3] for n in range(1024))
    image = tmp_path / "x.vmdk"
    image.write_bytes(vmdk_images.sparse(disk, grains, grain=8))
    same_as_qemu(image, "vmdk")
    grains = "".join("d."[n % 2] for n in range(64))
    image.write_bytes(vmdk_images.stream(disk, grains))
    same_as_qemu(image, "vmdk")
    for path in tmp_path.iterdir():
        path.unlink()
    image.write_bytes(
        vmdk_images.descriptor("vmfsSparse", ['RW 8192 VMFSSPARSE "x-delta.vmdk"'])
    )
    extent = tmp_path / "x-delta.vmdk"
    extent.write_bytes(
        vmdk_images.cowd(disk, "".join("dd."[n % 3] for n in range(8192)))
    )
    same_as_qemu(image, "vmdk", [image, extent])


def test_a_differencing_vhdx_is_put_on_its_parent(tmp_path):
    parent, child = some_disk(3 * MIB, 1), some_disk(3 * MIB, 2)
    ids = [uuid.UUID(int=n) for n in (11, 12)]
    noise = random.Random(4)
    present = [noise.random() < 0.5 for _ in range(3 * MIB // 512)]
    delta = vhdx_images.Vhdx(child, "pnf", guid=ids[1], parent=ids[0], present=present)
    files = [tmp_path / "full.vhdx", tmp_path / "delta.avhdx"]
    files[0].write_bytes(vhdx_images.Vhdx(parent, "fff", guid=ids[0]).make())
    files[1].write_bytes(delta.make())
    target = read_chain(files, tmp_path / "ours.raw")
    assert target.digest() == hashlib.sha256(delta.told(parent)).hexdigest()
    stranger = Link("other.vhdx", ImageInfo("vhdx", "dynamic", 3 * MIB, identity="x"))
    with pytest.raises(IntegrityError, match="nothing builds on other"):
        in_order([stranger, Link("delta.avhdx", target.info)])


def test_what_is_not_read_is_refused_by_name(tmp_path):
    image = tmp_path / "x"
    for kind, options, match in [
        ("qcow2", "data_file=" + str(tmp_path / "data"), "external file"),
        ("vdi", "", "VDI"),
        ("qed", "", "QED"),
    ]:
        more = ["-o", options] if options else []
        qemu_img("create", "-f", kind, *more, image, "1M")
        target = Target(tmp_path / "ours.raw")
        with pytest.raises(IntegrityError, match=match):
            read_files([image], target)
        image.unlink()
    assert detect(b"") is Format.RAW
