# SPDX-License-Identifier: Apache-2.0
"""Readers of foreign images: what was crafted is read, however the stream is cut."""

from __future__ import annotations

import random
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.errors import IntegrityError
from pveplug.images.blockdelta import BlockDeltaWriter, DeltaHeader
from pveplug.images.detect import Format
from pveplug.images.stream import MemorySpill
from pveplug.images.vmdk_set import VmdkSet
from tests.support import edits, vhd_images, vhdx_images, vmdk_images
from tests.support.foreign import PARENT, Told, read_image, some_disk
from tests.support.qcow2_images import qcow2

SECTOR = 512
MIB = 1 << 20
NONE = 0xFFFFFFFF
FORMATS = [kind for kind in Format if kind is not Format.VMDK_DESCRIPTOR]


def letters(draw, alphabet, low, high):
    return "".join(
        draw(st.lists(st.sampled_from(alphabet), min_size=low, max_size=high))
    )


def cuts(draw, length):
    return draw(st.lists(st.integers(0, length), max_size=8))


def expected(disk, states, unit, *, parent=False):
    """Apply one letter for each unit: ``d``, ``c`` data, ``z`` zero, ``.`` parent's."""
    out = bytearray(len(disk))
    for index, state in enumerate(states):
        low, high = index * unit, min((index + 1) * unit, len(disk))
        if state in "dc":
            out[low:high] = disk[low:high]
        elif state == "." and parent:
            out[low:high] = bytes([PARENT]) * (high - low)
    return bytes(out)


def sized(draw, states, unit):
    """A disk for these units, the last of which may be cut."""
    size = len(states) * unit - SECTOR * draw(st.integers(0, unit // SECTOR - 1))
    return random.Random(draw(st.integers(0, 99))).randbytes(size)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_sparse_vmdk_is_read(data):
    states = letters(data.draw, "ddz..", 1, 40)
    disk = sized(data.draw, states, 4096)
    child = data.draw(st.booleans())
    image = vmdk_images.sparse(
        disk,
        states,
        text=vmdk_images.descriptor(
            "monolithicSparse", parent=7 if child else 0xFFFFFFFF
        ),
        order=data.draw(st.permutations(range(len(states)))),
        redundant=data.draw(st.booleans()),
        tables_last=data.draw(st.booleans()),
    )
    told = read_image(image, cuts(data.draw, len(image)))
    assert told.disk == expected(disk, states, 4096, parent=child)
    assert told.info.identity == "12345678"
    assert (told.info.parent is not None) is child


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_vmware_stream_is_read(data):
    states = letters(data.draw, "ddz..", 1, 12).ljust(
        data.draw(st.integers(12, 600)), "."
    )
    if "z" in states and "d" not in states:
        states = "d" + states[1:]
    disk = sized(data.draw, states, 4096)
    image = vmdk_images.stream(disk, states, grain=8)
    told = read_image(image, cuts(data.draw, len(image)))
    assert told.disk == expected(disk, states, 4096)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_cowd_is_read(data):
    states = letters(data.draw, "d..", 1, 30)
    disk = sized(data.draw, states, 1024)
    root = data.draw(st.booleans())
    image = vmdk_images.cowd(disk, states, grain=2, root=root, parent="base.vmdk")
    told = read_image(image, cuts(data.draw, len(image)))
    assert told.disk == expected(disk, states, 1024, parent=not root)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_vhd_is_read(data):
    states = letters(data.draw, "dd.", 1, 20)
    disk = sized(data.draw, states, 4096)
    parent = data.draw(st.sampled_from([None, uuid.UUID(int=9)]))
    present = data.draw(st.none() | st.lists(st.booleans(), min_size=160, max_size=160))
    image = vhd_images.sparse(
        disk,
        states,
        present=present,
        parent=parent,
        order=data.draw(st.permutations(range(len(states)))),
        table_last=data.draw(st.booleans()),
    )
    told = read_image(image, cuts(data.draw, len(image)))
    sectors = "".join(
        "d"
        if state == "d" and (present is None or present[index * 8 + sector])
        else "."
        for index, state in enumerate(states)
        for sector in range(8)
    )
    assert told.disk == expected(disk, sectors, SECTOR, parent=parent is not None)
    assert told.end.subformat == ("differencing" if parent else "dynamic")


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_raw_image_and_a_fixed_vhd_are_read(data):
    disk = data.draw(st.binary(min_size=1, max_size=3000))
    told = read_image(disk, cuts(data.draw, len(disk)))
    assert told.disk == disk.ljust(-(-len(disk) // 512) * 512, b"\0")
    assert told.end.format == "raw"
    disk = disk.ljust(3072, b"x")
    image = vhd_images.fixed(disk)
    told = read_image(image, cuts(data.draw, len(image)))
    assert (told.disk, told.end.subformat) == (disk, "fixed")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_vhdx_is_read(data):
    states = letters(data.draw, "nuzmffp", 1, 4)
    noise = random.Random(data.draw(st.integers(0, 99)))
    disk = (noise.randbytes(4096) * 1024)[: len(states) * MIB]
    disk = disk[: len(disk) - 4096 * data.draw(st.integers(0, 3))]
    parent = uuid.UUID(int=3) if "p" in states else None
    sector = data.draw(st.sampled_from([512, 4096]))
    present = [noise.random() < 0.5 for _ in range(len(disk) // sector)]
    image = vhdx_images.Vhdx(
        disk,
        states,
        sector=sector,
        parent=parent,
        present=present,
        order=data.draw(st.permutations(["log", "meta", "bat", "bitmaps", "blocks"])),
        blocks=data.draw(st.permutations(range(len(states)))),
        sequence=data.draw(st.sampled_from([(1, 2), (9, 3)])),
    )
    below = bytes([PARENT]) * len(disk)
    made = image.make()
    told = read_image(made, cuts(data.draw, len(made)), parent=below)
    assert told.disk == image.told(below)
    assert told.info.sector == sector


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 255), st.booleans(), st.data())
def test_a_pending_log_is_replayed(sector, old, data):
    """The log wraps around; an older sequence beside it is not applied."""
    disk = (random.Random(1).randbytes(4096) * 512)[: 2 * MIB]
    order = data.draw(st.permutations(["log", "meta", "bat", "blocks"]))
    image = vhdx_images.Vhdx(disk, "ff", order=order)
    made = vhdx_images.with_pending_log(image, start=sector * 4096, old=old)
    told = read_image(made, cuts(data.draw, len(made)))
    assert told.disk == disk
    assert any("log was applied" in note for note in told.notes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_qcow2_is_read_wherever_its_clusters_lie(data):
    version = data.draw(st.sampled_from([2, 3, 3]))
    states = letters(data.draw, "dc.z" if version == 3 else "dc.", 1, 150)
    bits = data.draw(st.sampled_from([9, 10]))
    unit = 1 << bits
    size = len(states) * unit - SECTOR * data.draw(st.integers(0, unit // SECTOR - 1))
    text = random.Random(data.draw(st.integers(0, 99))).randbytes(40)
    disk = (text * (size // 40 + 1))[:size]
    backing = data.draw(st.sampled_from(["", "base.qcow2"]))
    image = qcow2(
        disk,
        states,
        bits=bits,
        version=version,
        zstd=version == 3 and data.draw(st.booleans()),
        backing=backing,
        seed=data.draw(st.integers(0, 1000)),
    )
    told = read_image(image, cuts(data.draw, len(image)))
    assert told.disk == expected(disk, states, unit, parent=bool(backing))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_delta_is_read(data):
    states = letters(data.draw, "dz.", 1, 40)
    disk = random.Random(1).randbytes(len(states) * SECTOR)
    parent = data.draw(st.sampled_from([None, "before"]))
    writer = BlockDeltaWriter()
    image = writer.begin(DeltaHeader(len(disk), "scsi0", "after", parent))
    for index, state in enumerate(states):
        at = index * SECTOR
        if state == "d":
            image += writer.data(at, disk[at : at + SECTOR])
        elif state == "z":
            image += writer.zero(at, SECTOR)
    image += writer.end()
    told = read_image(image, cuts(data.draw, len(image)))
    assert told.disk == expected(disk, states, SECTOR, parent=parent is not None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_a_delta_is_noticed(data):
    """Every byte of the container is under a checksum."""
    image = bytearray(edits.bases(Format.BLOCK_DELTA)[1].image)
    at = data.draw(st.integers(0, len(image) - 1))
    image[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        edits.run(Format.BLOCK_DELTA, bytes(image))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.value)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same_events(kind, data):
    base = data.draw(st.sampled_from(edits.bases(kind)))
    where = st.lists(st.integers(0, len(base.image)), max_size=20)
    if len(base.image) < MIB:
        where |= st.sampled_from([97, 512, 4096])
    whole, split = read_image(base.image), read_image(base.image, data.draw(where))
    assert split.tiling() == whole.tiling()
    assert split.disk == whole.disk
    assert (split.info, split.end) == (whole.info, whole.end)
    assert split.notes == whole.notes


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.value)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=60))
def test_an_edited_image_is_refused_or_tiles_its_disk(kind, data):
    refused = None
    try:
        edits.run(kind, edits.image_of(kind, data))
    except IntegrityError as error:
        refused = error
    if refused:
        assert refused.offset is not None
        assert " at byte " in str(refused)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.value)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_cut_image_is_refused(kind, data):
    """A raw image can be cut unnoticed, by itself: its size is known from outside."""
    base = data.draw(st.sampled_from(edits.bases(kind)))
    end = data.draw(st.integers(0, len(base.image) - 1))
    if kind is Format.RAW:
        return
    whole = read_image(base.image)
    try:
        told = read_image(base.image[:end])
    except IntegrityError:
        return
    # What was cut off held nothing of the disk (qcow2 has no end mark).
    assert told.disk == whole.disk


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.value)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=2000))
def test_garbage_is_refused(kind, data):
    if kind is Format.RAW:
        return
    with pytest.raises(IntegrityError):
        edits.run(kind, data)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_vmdk_of_several_files_is_read_in_any_order(data):
    parts = [some_disk(65536, seed) for seed in range(3)]
    lines, files = [], {}
    for index, part in enumerate(parts):
        sectors = len(part) // SECTOR
        kind = data.draw(st.sampled_from(["FLAT", "SPARSE", "VMFSSPARSE", "ZERO"]))
        name = f"disk-{index}.vmdk"
        offset = ""
        if kind == "FLAT":
            offset = " 2"
            files[name] = bytes(1024) + part
        elif kind == "SPARSE":
            files[name] = vmdk_images.sparse(part, "d" * 16, text=b"")
        elif kind == "VMFSSPARSE":
            files[name] = vmdk_images.cowd(part, "d" * 128)
        else:
            parts[index] = bytes(len(part))
            lines.append(f"RW {sectors} ZERO")
            continue
        lines.append(f'RW {sectors} {kind} "{name}"{offset}')
    files["disk.vmdk"] = vmdk_images.descriptor("custom", lines)
    machine, told = VmdkSet(spill=MemorySpill(1 << 20)), Told()

    def take(events):
        told.take(events)
        while machine.pending:
            told.take(machine.receive_data(b""))

    for name in data.draw(st.permutations(sorted(files))):
        machine.begin_file(f"/@vsphere/vm/{name}", len(files[name]))
        step = data.draw(st.sampled_from([7, 4096, 1 << 20]))
        for at in range(0, len(files[name]), step):
            take(machine.receive_data(files[name][at : at + step]))
        take(machine.end_file())
    take(machine.receive_eof())
    told.tiling()
    assert told.disk == b"".join(parts)
