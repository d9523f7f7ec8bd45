# SPDX-License-Identifier: Apache-2.0
"""Which given files make which disk, and which image is which described disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from pveplug.describe.guest import Bus, GuestDescription, GuestDisk
from pveplug.errors import ConfigError, IntegrityError
from pveplug.events import ListReporter
from pveplug.import_local import STDIN, survey
from pveplug.import_vm import bind, plain_name
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
