# SPDX-License-Identifier: Apache-2.0
"""Foreign images that are damaged, hostile or of a kind that isn't read."""

from __future__ import annotations

import contextlib
import gc
import struct
import tracemalloc
import uuid
import weakref
import zlib

import pytest

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.blockdelta import BlockDeltaReader, BlockDeltaWriter, DeltaHeader
from pveplug.images.crc32c import crc32c
from pveplug.images.detect import Format, detect, reader_for
from pveplug.images.increments import ADAPTERS, Adapter, Registry
from pveplug.images.lineage import Link, in_order, why_not, zeroes_after
from pveplug.images.stream import (
    GuestData,
    ImageInfo,
    ParentLink,
    SpillNeededError,
    feed,
    finish,
)
from pveplug.images.vhdx_log import LogPatches
from pveplug.images.vmdk_set import VmdkSet
from pveplug.images.vmdk_sparse import VmdkSparseReader
from pveplug.images.vmdk_wire import parse_descriptor
from tests.support import edits, qcow2_images, vhd_images, vhdx_images, vmdk_images
from tests.support.foreign import read, read_image, read_skipping

MIB = 1 << 20


def refused(image, match, **more):
    with pytest.raises(IntegrityError, match=match) as caught:
        read_image(bytes(image), **more)
    assert caught.value.offset is not None
    return caught.value


def changed(image, at, new):
    out = bytearray(image)
    out[at : at + len(new)] = new
    return bytes(out)


def peak_of(kind, image):
    """Return the most memory that reading took, without the image."""
    reader = reader_for(kind)
    tracemalloc.start()
    try:
        for at in range(0, len(image), 65536):
            for _ in feed(reader, memoryview(image)[at : at + 65536]):
                pass
        for _ in finish(reader):
            pass
    except IntegrityError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


# --- what it is -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(edits._MAKERS))
def test_formats_are_known_by_content(kind):
    for base in edits.bases(kind):
        assert detect(base.image[:512]) is kind


@pytest.mark.parametrize(
    ("first", "match"),
    [
        (b"VMA\0" + bytes(508), "vzdump"),
        (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(444), "VirtualBox"),
        (b"\xbe\xba\xfe\xca" + bytes(508), "SESparse"),
        (b"LUKS\xba\xbe" + bytes(506), "encrypted"),
    ],
)
def test_what_is_known_and_not_read_is_named(first, match):
    with pytest.raises(IntegrityError, match=match):
        detect(first)


def test_a_descriptor_alone_has_no_reader():
    assert detect(b"# Disk DescriptorFile\n") is Format.VMDK_DESCRIPTOR
    with pytest.raises(IntegrityError, match="its extents hold the data"):
        reader_for(Format.VMDK_DESCRIPTOR)


# --- the machine ----------------------------------------------------------------------


def test_a_reader_says_when_it_is_misused_and_stays_refused():
    reader = reader_for(Format.QCOW2)
    with pytest.raises(IntegrityError, match="not a qcow2"):
        reader.receive_data(bytes(1000))
    with pytest.raises(IntegrityError, match="not a qcow2"):
        reader.receive_eof()
    reader = reader_for(Format.RAW)
    reader.receive_data(bytes(1024))
    reader.receive_eof()
    with pytest.raises(LocalProtocolError, match="isn't ready"):
        reader.receive_data(b"x")
    assert reader.receive_eof() == []


def test_what_means_nothing_can_be_skipped():
    """A gap of a MiB before a block, and eight behind the last one."""
    order = ("meta", "bat", "log", "blocks")  # there is no log, only room for it
    image = vhdx_images.Vhdx(b"A" * MIB, "f", order=order).make() + bytes(8 * MIB)
    reader = reader_for(Format.VHDX, file_size=len(image))
    told, skipped = read_skipping(reader, image, 65536)
    assert told.disk == b"A" * MIB
    assert skipped > 8.7 * MIB


def test_nothing_else_can_be_skipped():
    image = vhdx_images.Vhdx(b"A" * MIB, "f").make()
    reader = reader_for(Format.VHDX, file_size=len(image))
    reader.receive_data(image[:MIB])
    with pytest.raises(LocalProtocolError, match="skippable"):
        reader.skip(reader.skippable + 1)
    with pytest.raises(LocalProtocolError, match="skippable"):
        reader.skip(-1)


def test_a_bomb_is_told_in_parts():
    """Clusters of 2 MiB from 2 KiB each: no call makes more than 8 MiB and one."""
    disk = b"A" * (32 * MIB)
    image = qcow2_images.qcow2(disk, "c" * 16, bits=21)
    reader = reader_for(Format.QCOW2)
    most = calls = 0
    for events in [*feed(reader, image), *finish(reader)]:
        made = sum(len(e.data) for e in events if isinstance(e, GuestData))
        most, calls = max(most, made), calls + 1
    assert most <= 10 * MIB
    assert calls > 3
    reader = reader_for(Format.QCOW2)
    reader.receive_data(image)
    assert reader.pending
    with pytest.raises(LocalProtocolError):
        reader.receive_data(b"x")
    with pytest.raises(LocalProtocolError):
        reader.receive_eof()


def test_a_cluster_that_never_ends_is_refused():
    image = bytearray(qcow2_images.qcow2(bytes(512), "c", shuffle=False))
    bomb = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = bomb.compress(bytes(100_000)) + bomb.flush()
    l2 = 1024 + 512 + 512
    (entry,) = struct.unpack_from(">Q", image, l2)
    at = entry & (1 << 61) - 1
    image[at : at + len(packed)] = packed
    refused(image, "larger than a cluster")


def test_sizes_in_headers_cost_nothing():
    stream = edits.bases(Format.VMDK_STREAM)[0].image
    image = changed(stream, 12, struct.pack("<Q", 1 << 36))
    assert peak_of(Format.VMDK_STREAM, image) < 4 * MIB
    refused(image, "grains")
    qcow2 = edits.bases(Format.QCOW2)[0].image
    for at, value in ((24, 1 << 45), (36, 1 << 31), (40, 1 << 40)):
        image = changed(qcow2, at, value.to_bytes(8 if at != 36 else 4, "big"))
        assert peak_of(Format.QCOW2, image) < 4 * MIB


def test_millions_of_entries_stay_within_the_bound():
    """A BAT whose every other block is zero: each entry is a run of its own."""
    count = 1 << 15
    image = vhdx_images.Vhdx(
        b"", "", parent=uuid.UUID(int=1), order=("meta", "bat"), size=count * MIB
    )
    image.states = "nz" * (count // 2)
    assert peak_of(Format.VHDX, image.make()) < 12 * MIB


def test_crc32c_is_right():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


# --- VMDK -----------------------------------------------------------------------------


def sparse(states="dd......", **more):
    return vmdk_images.sparse(edits.noise(4096 * len(states)), states, **more)


def test_overlapping_grains_are_refused():
    image = sparse(redundant=False)
    table = image.index(struct.pack("<2I", 7, 15))
    for place in (7, 8, 14, 1, 0xFFFFFFF0):
        refused(changed(image, table + 4, struct.pack("<I", place)), "twice|beyond")


def test_a_directory_that_points_to_itself_is_refused():
    image = sparse(redundant=False)
    refused(changed(image, 1024, struct.pack("<I", 2)), "twice")


def test_tables_that_differ_are_refused_unless_one_is_chosen():
    image = sparse()
    hit = image.rindex(struct.pack("<I", 12))
    broken = changed(image, hit, bytes(4))
    refused(broken, "redundant copy differ")
    told = read(VmdkSparseReader(tables="redundant"), broken)
    assert told.disk == read_image(image).disk
    assert read(VmdkSparseReader(tables="primary"), broken).disk != told.disk


def test_text_transfer_and_unclean_shutdown_are_said():
    image = sparse()
    refused(changed(image, 73, b"\n \n\n"), "transferred as text")
    told = read_image(changed(image, 72, b"\1"))
    assert any("not closed cleanly" in note for note in told.notes)


def test_a_stream_without_its_end_is_truncated():
    stream = edits.bases(Format.VMDK_STREAM)[0].image
    refused(stream[:-512], "truncated")
    refused(stream[:-1024], "truncated")


def test_tables_of_a_stream_must_name_what_came():
    stream = edits.bases(Format.VMDK_STREAM)[0].image
    table = stream.rindex(struct.pack("<I", 128), 0, len(stream) - 1536)
    refused(changed(stream, table, struct.pack("<I", 129)), "the table has grain")
    marker = struct.unpack_from("<QI", stream, 65536)
    assert marker[0] == 0
    refused(changed(stream, 65536, struct.pack("<Q", 16)), "comes twice|the table")


def test_tables_that_come_too_late_are_not_compared(monkeypatch):
    monkeypatch.setattr("pveplug.images.vmdk_stream.MAX_OPEN", 2)
    stream = edits.bases(Format.VMDK_STREAM)[0].image
    told = read_image(stream)
    assert any("too late" in note for note in told.notes)
    monkeypatch.undo()
    assert read_image(stream).disk == told.disk


def test_a_set_says_what_is_missing():
    lines = ['RW 8 FLAT "a-f1.vmdk" 0', 'RW 8 FLAT "a-f2.vmdk" 0']
    disk = VmdkSet(name="a")
    disk.begin_file("x/a.vmdk")
    disk.receive_data(vmdk_images.descriptor("twoGbMaxExtentFlat", lines))
    disk.end_file()
    while disk.pending:
        disk.receive_data(b"")
    disk.begin_file("c:\\vm\\A-F1.vmdk")
    disk.receive_data(bytes(4096))
    while disk.pending:
        disk.receive_data(b"")
    disk.end_file()
    while disk.pending:
        disk.receive_data(b"")
    with pytest.raises(IntegrityError, match=r"missing: a-f2\.vmdk"):
        disk.receive_eof()
    disk.begin_file("other.vmdk")
    with pytest.raises(IntegrityError, match="no extent of this disk"):
        disk.receive_data(bytes(4096))
    alone = VmdkSet()
    alone.begin_file("a-f1.vmdk")
    with pytest.raises(SpillNeededError, match="before the descriptor"):
        alone.receive_data(bytes(4096))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('RW 8 SESPARSE "x"', "SESPARSE"),
        ('NOACCESS 8 FLAT "x"', "NOACCESS"),
        ('RW 0 FLAT "x"', "disk of 0 bytes"),
        ("RW 999999999999999 ZERO", "a disk of"),
        ("nothing", "0 extents"),
    ],
)
def test_descriptors_are_judged(line, match):
    disk = VmdkSet()
    disk.begin_file("a.vmdk")
    disk.receive_data(vmdk_images.descriptor("custom", [line]))
    with pytest.raises(IntegrityError, match=match):
        disk.end_file()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("codec", ["punycode", "idna", "utf-7", "rot13", "zip"])
def test_a_descriptor_chooses_no_codec_that_is_none_of_files(codec):
    """Punycode takes quadratic time: a megabyte of it would take hours."""
    text = vmdk_images.descriptor("custom").replace(b"UTF-8", codec.encode())
    found = parse_descriptor(text + b"x-" + b"a" * 1000_000)
    assert not isinstance(found, str)
    assert found.create_type == "custom"


def test_a_descriptor_is_read_in_the_encoding_it_names():
    line = 'RW 8 FLAT "ディスク.vmdk" 0'
    text = vmdk_images.descriptor("custom").decode()
    text = text.replace("UTF-8", "Shift_JIS").replace(
        "createType", f"{line}\ncreateType"
    )
    found = parse_descriptor(text.encode("shift_jis"))
    assert not isinstance(found, str)
    assert [extent.file for extent in found.extents] == ["ディスク.vmdk"]


# --- VHD, VHDX ------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", [b"\n", b" ", b"a=", b'"', b"RW 1 ", b"x= \t"])
def test_a_descriptor_of_a_megabyte_takes_no_time(filler):
    text = vmdk_images.descriptor("custom") + filler * (1000_000 // len(filler))
    disk = VmdkSet()
    disk.begin_file("a.vmdk")
    disk.receive_data(text)
    with pytest.raises(IntegrityError, match=r"0 extents|is not read"):
        disk.end_file()


def test_damaged_vhds_are_refused():
    image = vhd_images.sparse(edits.noise(8192), "dd")
    refused(image[:-512], "truncated")
    refused(image[:-1], "truncated")
    refused(changed(image, 40, b"\xff"), "checksum")
    refused(changed(image, 512 + 28, b"\xff"), "checksum")
    refused(changed(image, 1540, image[1536:1540]), "twice")
    refused(image[512:], "its beginning is missing")
    fixed = vhd_images.fixed(edits.noise(4096))
    refused(fixed[512:], "truncated")


def test_a_vhd_that_hides_data_is_noted():
    image = vhd_images.sparse(edits.noise(4096), "d", present=[False] * 8)
    told = read_image(image)
    assert not any(told.disk)
    assert any("never written" in note for note in told.notes)


def vhdx(**more):
    return vhdx_images.Vhdx(edits.noise(4096) * 512, "ff", **more)


def test_the_newer_good_header_counts():
    image = vhdx(sequence=(3, 9)).make()
    torn = changed(image, 131072 + 100, b"\1")
    assert read_image(torn).disk == read_image(image).disk
    both = changed(torn, 65536 + 100, b"\1")
    refused(both, "the header at 65536 has a wrong checksum; the header at 131072")
    table = changed(image, 196608 + 100, b"\1")
    assert read_image(table).disk == read_image(image).disk
    refused(changed(table, 262144 + 100, b"\1"), "region table")


def test_a_log_that_is_named_and_not_there_is_refused():
    image = vhdx(log=b"\1").make()
    refused(image, "no valid sequence")
    pending = vhdx_images.with_pending_log(vhdx(), old=False)
    log = pending.index(b"loge")
    for at in (4, 16, 200, 4096 + 100):
        torn = changed(pending, log + 8192 + at, b"\xee")
        if at == 200:
            continue
        # The newest entry is torn: the one before it counts, which empties the BAT.
        assert not any(read_image(torn).disk)
    refused(changed(pending, log + 12, b"\xff"), "no valid sequence|a log")


def test_patches_cover_one_another():
    patches, plain = LogPatches(), bytearray(64)
    for start, end, fill in [
        (8, 40, 1),
        (16, 24, 2),
        (0, 12, 3),
        (20, 60, 0),
        (30, 31, 4),
    ]:
        patches.put(start, end, bytes([fill]) * (end - start) if fill else None)
        plain[start:end] = bytes([fill]) * (end - start)
    assert patches.apply(bytes(60), 0) == plain[:60]
    assert patches.apply(bytes(64), 0) == plain
    assert patches.at(60, 4) == (4, None)


def test_blocks_of_a_vhdx_are_judged():
    image = vhdx()
    made = image.make()
    bat = image.places["bat"]
    for entry, match in [
        (4, "state 4"),
        (7, "state 7"),
        (6, "twice"),
        (6 | 1 << 50, "beyond"),
    ]:
        refused(changed(made, bat + 8, struct.pack("<Q", entry)), match)
    refused(changed(made, bat + 8, made[bat : bat + 8]), "twice")
    parent = uuid.UUID(int=1)
    diff = vhdx_images.Vhdx(bytes(MIB), "p", parent=parent, present=[True] * 2048)
    made = diff.make()
    at = diff.places["bat"] + diff.ratio * 8
    refused(changed(made, at, bytes(8)), "sector bitmap 0 is needed")


# --- qcow2 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"incompatible": 2}, "corrupt"),
        ({"incompatible": 4}, "external file"),
        ({"incompatible": 1 << 40}, "unknown features"),
        ({"crypt": 1}, r"encrypted \(AES\)"),
        ({"crypt": 2}, r"encrypted \(LUKS\)"),
    ],
)
def test_features_of_qcow2_are_refused_by_name(more, match):
    refused(qcow2_images.qcow2(bytes(1024), "dd", **more), match)


def test_a_dirty_qcow2_is_read_and_said():
    told = read_image(qcow2_images.qcow2(bytes(1024), "dd", incompatible=1))
    assert any("marked dirty" in note for note in told.notes)


def test_a_payload_before_its_table_needs_a_spill():
    disk = edits.noise(512 * 20)
    for seed in range(20):
        image = qcow2_images.qcow2(disk, "d" * 20, seed=seed)
        if image.index(disk[:512]) < 2048:
            break
    error = refused(image, "a spill is needed", spill=None)
    assert isinstance(error, SpillNeededError)
    error = refused(image, "would have to be spilled", spill=100)
    assert isinstance(error, SpillNeededError)
    told = read_image(image)
    assert told.disk == disk
    assert any("waited in the spill" in note for note in told.notes)


def test_qcow2_tables_that_overlap_are_refused():
    image = qcow2_images.qcow2(edits.noise(1024), "dd", shuffle=False)
    l1, l2 = 1024, 1024 + 512 * 3
    (entry,) = struct.unpack_from(">Q", image, l2)
    for at, value in [(l2 + 8, entry), (l2, l1), (l2, l2), (l1, l1), (l2, 0x40000000)]:
        refused(changed(image, at, struct.pack(">Q", value)), "twice|beyond")


# --- increments and chains ------------------------------------------------------------


def test_a_delta_says_what_its_writer_was_told():
    writer = BlockDeltaWriter()
    image = writer.begin(DeltaHeader(MIB, "scsi0", "b", "a", 4096, "sister 1.0"))
    image += writer.data(4096, b"x" * 4096) + writer.zero(65536, 65536) + writer.end()
    told = read_image(image)
    assert told.info.parent == ParentLink("digest", ("a",))
    assert (told.info.identity, told.info.sector) == ("b", 4096)
    assert [run[0] for run in told.tiling()] == [
        "parent",
        "data",
        "parent",
        "zero",
        "parent",
    ]
    refused(image[:-1], "truncated")
    refused(image + b"x", "follows the trailer")
    for bad in [(0, b"x" * 4096), (70000, b"y" * 4096), (MIB, b"z" * 4096)]:
        with pytest.raises(LocalProtocolError):
            writer.data(*bad)


def test_an_unknown_increment_is_refused_with_what_was_found():
    with pytest.raises(
        IntegrityError, match=r"48 56 42 44 .*\(HVBD.*known are block-d"
    ):
        ADAPTERS.find(b"HVBD" + bytes(28), name="disk.delta")
    registry = Registry()
    sister = Adapter("hyperv-rct", lambda head: head[:4] == b"HVBD", BlockDeltaReader)
    registry.register(sister)
    assert registry.find(b"HVBD", name="x") is sister
    assert isinstance(reader_for(sister), BlockDeltaReader)
    assert [adapter.name for adapter in registry] == ["block-delta", "hyperv-rct"]
    with pytest.raises(LocalProtocolError):
        registry.register(sister)


def link(name, identity, *parents, kind="vmdk-cid", fmt="vmdk", size=100, **more):
    parent = ParentLink(kind, parents, **more) if parents or more else None
    return Link(name, ImageInfo(fmt, "x", size, identity=identity, parent=parent))


def test_chains_are_put_in_order():
    chain = [link("a", "1"), link("b", "2", "1"), link("c", "3", "2")]
    assert [x.name for x in in_order(reversed(chain))] == ["a", "b", "c"]
    with pytest.raises(
        IntegrityError, match="nothing builds on a: c was made from vmdk"
    ):
        in_order([chain[0], chain[2]])
    with pytest.raises(IntegrityError, match="several images build on a"):
        in_order([*chain[:2], link("d", "4", "1")])
    with pytest.raises(IntegrityError, match="several images that stand alone"):
        in_order([*chain, link("d", "4")])
    with pytest.raises(IntegrityError, match="no image stands alone"):
        in_order(chain[1:])
    with pytest.raises(IntegrityError):
        in_order([])


def test_parents_are_checked_by_all_that_a_format_offers():
    child = link("c", "2", "1", kind="vhd-uuid", fmt="vhd", modified=5)
    info = ImageInfo("vhd", "dynamic", 100, identity="1")
    assert why_not(Link("p", info), child) is None
    assert why_not(Link("p", info, 5), child) is None
    assert "was modified after" in str(why_not(Link("p", info, 6), child))
    named = link("c", "", kind="name", fmt="qcow2", names=("../x/base.qcow2",))
    assert why_not(link("y/base.qcow2", "", fmt="qcow2"), named) is None
    assert "names" in str(why_not(link("z.qcow2", "", fmt="qcow2"), named))
    assert "is a vhdx" in str(why_not(link("p", "1", fmt="vhdx"), child))


def test_a_disk_that_grew_shows_zeroes():
    infos = [ImageInfo("qcow2", "v3", size) for size in (100, 40, 100)]
    assert zeroes_after(infos) == [(0, 100), (100, 100), (40, 100)]


def test_a_reader_that_failed_keeps_nothing():
    class Bytes(bytearray):
        """Can be looked for."""

    gc.disable()
    try:
        for reader in (reader_for(Format.VHDX), reader_for(Format.VMDK_SPARSE)):
            data = Bytes(b"vhdxfile".ljust(MIB, b"\xff"))
            looked_for = weakref.ref(data)
            with contextlib.suppress(IntegrityError):
                reader.receive_data(data)
            del data
            assert looked_for() is None
            with pytest.raises(IntegrityError):
                reader.receive_data(b"x")
    finally:
        gc.enable()
