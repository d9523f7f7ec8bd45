# SPDX-License-Identifier: Apache-2.0
"""Which given files make which disk, and which image is which described disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pveplug.describe.guest import Bus, GuestDescription, GuestDisk
from pveplug.errors import ConfigError, IntegrityError, RequestError
from pveplug.events import ListReporter
from pveplug.images.blockdelta import BlockDeltaReader
from pveplug.images.increments import ADAPTERS, Adapter
from pveplug.images.stream import Flow
from pveplug.import_local import STDIN, survey
from pveplug.import_out import RawFile
from pveplug.import_vm import bind, plain_name
from pveplug.importing import look
from tests.support import vhd_images, vmdk_images
from tests.support.foreign_vms import delta, vmx

SIZE = 1 << 20


def raw(path: Path) -> Path:
    path.write_bytes(bytes(510) + b"\x55\xaa" + bytes(SIZE - 512))
    return path


def test_increments_stand_behind_what_they_were_made_from(tmp_path: Path) -> None:
    runs = [(0, b"x" * 512)]
    one = delta(tmp_path / "one", None, "one", SIZE, runs)
    two = delta(tmp_path / "two", None, "two", SIZE, runs)
    one_a = delta(tmp_path / "one-a", "one", "one-a", SIZE, runs)
    one_b = delta(tmp_path / "one-b", "one-a", "one-b", 2 * SIZE, runs)
    two_a = delta(tmp_path / "two-a", "two", "two-a", SIZE, runs)
    found = survey([one_b, two, two_a, one_a, one])
    names = [[image.paths[0].name for image in chain] for chain in found.disks]
    assert names == [["two", "two-a"], ["one", "one-a", "one-b"]]


def test_an_increment_of_a_raw_disk_goes_to_the_only_one(tmp_path: Path) -> None:
    child = delta(tmp_path / "c", "sha256:00", "c", SIZE, [(0, b"x" * 512)])
    found = survey([child, raw(tmp_path / "a.raw")])
    assert [len(chain) for chain in found.disks] == [2]
    with pytest.raises(IntegrityError, match="c is an increment of nothing"):
        survey([child, raw(tmp_path / "a.raw"), raw(tmp_path / "b.raw")])


def flat_vmdk(folder: Path, name: str, extent: str, size: int = SIZE) -> list[Path]:
    folder.mkdir(exist_ok=True)
    line = f'RW {size // 512} VMFS "{extent}" 0'
    text = folder / f"{name}.vmdk"
    text.write_bytes(vmdk_images.descriptor("vmfs", [line]))
    return [text, raw(folder / extent)]


def test_disks_of_one_name_in_two_folders_stay_two(tmp_path: Path) -> None:
    one = flat_vmdk(tmp_path / "ds1", "web", "web-flat.vmdk")
    two = flat_vmdk(tmp_path / "ds2", "web", "web-flat.vmdk")
    found = survey([two[1], one[0], two[0], one[1]])
    assert [list(chain[0].paths) for chain in found.disks] == [one, two]
    assert [list(i.paths) for i in look(one)] == [one]


def test_an_extent_may_lie_elsewhere_if_there_is_but_one(tmp_path: Path) -> None:
    text, extent = flat_vmdk(tmp_path / "ds1", "web", "web-flat.vmdk")
    other = extent.rename(tmp_path / "web-flat.vmdk")
    assert survey([text, other]).disks[0][0].paths == (text, other)
    _, more = flat_vmdk(tmp_path / "ds2", "x", "web-flat.vmdk")
    with pytest.raises(IntegrityError, match=r"2 files are called web-flat\.vmdk"):
        survey([text, other, more])


def test_a_descriptor_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    path = tmp_path / "web.vmdk"
    with path.open("wb") as file:
        file.write(vmdk_images.descriptor("vmfs", ['RW 8 VMFS "x"']))
        file.truncate(1 << 40)
    for see in (survey, look):
        with pytest.raises(IntegrityError, match=r"web\.vmdk: .*longer than 1"):
            see([path])


def test_a_snapshot_of_a_flat_vmdk_is_a_chain(tmp_path: Path) -> None:
    """Each with its descriptor, as VMware has them in one folder."""
    full = flat_vmdk(tmp_path, "web", "web-flat.vmdk")
    line = f'RW {SIZE // 512} SPARSE "web-000001-delta.vmdk"'
    text = tmp_path / "web-000001.vmdk"
    text.write_bytes(
        vmdk_images.descriptor(
            "twoGbMaxExtentSparse", [line], 2, 0x12345678, "web.vmdk"
        )
    )
    sparse = tmp_path / "web-000001-delta.vmdk"
    sparse.write_bytes(vmdk_images.sparse(bytes(SIZE), "." * (SIZE >> 16)))
    for chain in (
        look([sparse, text, *full]),
        survey([sparse, text, *full]).disks[0],
    ):
        assert [list(image.paths) for image in chain] == [full, [text, sparse]]


def test_a_fixed_vhd_has_its_identity_at_its_end(tmp_path: Path) -> None:
    parent = tmp_path / "full.vhd"
    content = raw(tmp_path / "raw").read_bytes()
    parent.write_bytes(vhd_images.fixed(content))
    os.utime(parent, (946684800 + 77, 946684800 + 77))
    child = tmp_path / "child.avhd"
    child.write_bytes(
        vhd_images.sparse(
            content, "." * (SIZE // 4096), parent=vhd_images.ONE, modified=77
        )
    )
    for chain in (look([child, parent]), survey([child, parent]).disks[0]):
        assert [image.paths[0] for image in chain] == [parent, child]
        assert (chain[0].info.format, chain[0].info.size) == ("vhd", SIZE)


def test_a_fixed_vhd_may_begin_like_nothing(tmp_path: Path) -> None:
    path = tmp_path / "web.avhd"
    path.write_bytes(vhd_images.fixed(b"\x07" * SIZE))
    assert look([path])[0].info.subformat == "fixed"
    assert survey([path]).disks[0][0].size == SIZE


def test_a_raw_disk_is_found_by_its_digest(tmp_path: Path) -> None:
    full = raw(tmp_path / "full.raw")
    digest = hashlib.sha256(full.read_bytes()).hexdigest()
    child = delta(tmp_path / "c", f"sha256:{digest}", "c", SIZE, [(0, b"x" * 512)])
    assert [i.paths[0] for i in look([child, full])] == [full, child]
    wrong = delta(tmp_path / "w", "sha256:00", "w", SIZE, [(0, b"x" * 512)])
    with pytest.raises(IntegrityError, match="nothing builds on"):
        look([wrong, full])


async def test_a_write_that_is_refused_is_an_error(tmp_path: Path) -> None:
    found = look([raw(tmp_path / "a.raw")])[0]
    with Path("/dev/full").open("wb", buffering=0) as full:
        target = RawFile(full.fileno(), SIZE, "a.out")
        with pytest.raises(RequestError, match=r"a\.out can't be written: No space"):
            await target.apply(found, first=True, say=ListReporter())


async def test_a_raw_file_keeps_holes_and_zeroes_what_an_increment_zeroes(
    tmp_path: Path,
) -> None:
    size = 1 << 20
    content = bytearray(size)
    content[65536:131072] = b"x" * 65536
    content[200_000:200_001] = b"y"
    content[510:512] = b"\x55\xaa"
    full = tmp_path / "full.raw"
    full.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    runs: list[tuple[int, bytes | int]] = [(69632, 8192), (1 << 19, b"z" * 512)]
    child = delta(tmp_path / "c", f"sha256:{digest}", "c", size, runs)
    out = tmp_path / "out"
    with out.open("x+b", buffering=0) as file:
        file.truncate(size)
        target = RawFile(file.fileno(), size, "out")
        chain = look([child, full])
        assert await target.apply(chain[0], first=True, say=ListReporter()) == size
        assert out.stat().st_blocks * 512 < size // 2
        await target.apply(chain[1], first=False, say=ListReporter())
        await target.zero(200_000, 4096)
    content[69632:77824] = bytes(8192)
    content[1 << 19 : (1 << 19) + 512] = b"z" * 512
    content[200_000:204_096] = bytes(4096)
    assert out.read_bytes() == content


def test_what_nobody_knows_is_no_raw_disk(tmp_path: Path) -> None:
    path = tmp_path / "web.cbt"
    path.write_bytes(b"HVRCT\1" + bytes(4090))
    with pytest.raises(IntegrityError, match=r"web\.cbt.*--raw"):
        look([path])
    assert look([path], ["*.cbt"])[0].size == 4096


@pytest.mark.parametrize("first", [b"\x1f\x8b\x08", b"PK\3\4", bytes(257) + b"ustar"])
def test_archives_are_named(first: bytes, tmp_path: Path) -> None:
    path = tmp_path / "web.ova"
    path.write_bytes(first.ljust(512, b"\0") + bytes(512))
    with pytest.raises(IntegrityError, match="unpack it"):
        look([path])
    if first.endswith(b"ustar"):
        assert survey([path]).archives == [path]
        assert survey([path], ["*.ova"]).archives == []  # a raw disk, it is said
    else:
        with pytest.raises(IntegrityError, match="unpack it"):
            survey([path])


def test_what_files_are_for_is_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "web.vmx"
    text.write_bytes(vmx("web", "web.raw"))
    log = tmp_path / "vmware.log"
    log.write_text("x")
    found = survey([raw(tmp_path / "web.raw"), text, log])
    assert len(found.disks) == 1
    assert list(found.descriptions) == ["web.vmx"]
    assert found.passed_over == [log]
    assert not found.stdin
    assert survey([STDIN, text]).stdin


def test_standard_input_is_the_only_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="standard input"):
        survey([STDIN, raw(tmp_path / "a.raw")])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.vmdk: No such file"):
        survey([tmp_path / "none.vmdk"])


def test_extents_belong_to_the_descriptor_beside_them(tmp_path: Path) -> None:
    """Whatever they begin with: the second holds the middle of a disk."""
    given = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        lines = ["# Disk DescriptorFile", "version=1", "CID=1234abcd"]
        lines += ["parentCID=ffffffff", 'createType="twoGbMaxExtentFlat"']
        for number in (1, 2):
            extent = folder / f"d-f00{number}.vmdk"
            extent.write_bytes(bytes([number]) * SIZE)
            given.append(extent)
            lines.append(f'RW {SIZE // 512} FLAT "{extent.name}" 0')
        text = folder / "d.vmdk"
        text.write_text("\n".join(lines) + "\n")
        given.append(text)
    found = survey(given)
    assert [[p.parent.name for p in c[0].paths] for c in found.disks] == [
        ["a"] * 3,
        ["b"] * 3,
    ]
    assert [chain[0].size for chain in found.disks] == [2 * SIZE] * 2


def described(*files: str) -> GuestDescription:
    disks = [GuestDisk(n, Bus.SCSI, 0, n, file=file) for n, file in enumerate(files)]
    return GuestDescription("VMX web.vmx", disks=tuple(disks))


def test_images_are_found_by_name_then_by_order() -> None:
    say = ListReporter()
    _, bound = bind(
        described("[ds] web/b.vmdk", "a.vmdk"), ["/x/a.vmdk", "b.vmdk"], say
    )
    assert bound == {"scsi0:0": "b.vmdk", "scsi0:1": "/x/a.vmdk"}
    assert say.lines == []
    _, bound = bind(described("b.vmdk", "a.vmdk"), ["disk-0", "disk-1"], say)
    assert bound == {"scsi0:0": "disk-0", "scsi0:1": "disk-1"}
    assert "by their order" in say.lines[0][1]


def test_a_disk_nobody_described_is_attached_all_the_same() -> None:
    say = ListReporter()
    found, bound = bind(described("a.vmdk"), ["a.vmdk", "more.vmdk"], say)
    assert len(found.disks) == 2
    assert set(bound.values()) == {"a.vmdk", "more.vmdk"}
    assert "does not know more.vmdk" in say.lines[0][1]
    found, bound = bind(GuestDescription("no description"), ["x", "y"], ListReporter())
    assert list(bound.values()) == ["x", "y"]
    assert [disk.order for disk in found.disks] == [0, 1]


@pytest.mark.parametrize(
    ("text", "name"),
    [("web 01", "web-01"), ("../x", "x"), ("äöü", "vm"), ("a" * 80, "a" * 50)],
)
def test_a_name_is_made_fit_for_proxmox(text: str, name: str) -> None:
    assert plain_name(text) == name


class SisterReader(BlockDeltaReader):
    """An increment in a format of somebody's own: the container behind eight bytes."""

    def _run(self) -> Flow[None]:
        yield from self._skip(8)
        yield from super()._run()


async def test_an_adapter_reads_what_it_knows_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [*ADAPTERS]
    monkeypatch.setattr(ADAPTERS, "_adapters", known)
    full = raw(tmp_path / "full.raw")
    digest = hashlib.sha256(full.read_bytes()).hexdigest()
    # Of whole sectors, beside the disks' own companions in name.
    child = delta(
        tmp_path / "web.rct", f"sha256:{digest}", "c", SIZE, [(0, b"x" * 512)]
    )
    child.write_bytes(b"HVRCTLOG" + child.read_bytes())
    assert survey([full, child]).passed_over == [child]
    ADAPTERS.register(
        Adapter("rct-log", lambda head: head.startswith(b"HVRCTLOG"), SisterReader)
    )
    chain = look([child, full])
    assert [image.name for image in chain] == [str(full), str(child)]
    assert [i.name for i in survey([child, full]).disks[0]] == [str(full), str(child)]
    out = tmp_path / "out"
    with out.open("x+b", buffering=0) as file:
        file.truncate(SIZE)
        target = RawFile(file.fileno(), SIZE, "out")
        for number, image in enumerate(chain):
            await target.apply(image, first=not number, say=ListReporter())
    assert out.read_bytes() == b"x" * 512 + full.read_bytes()[512:]
