# SPDX-License-Identifier: Apache-2.0
"""Whose a foreign file is, what it is for, and what is no disk."""

from __future__ import annotations

import pytest

from pveplug.errors import IntegrityError
from pveplug.images.blockdelta import MAGIC
from pveplug.images.detect import Format
from pveplug.images.foreign_files import Role, kind_of, parse_name, role_of

MBR = bytes(510) + b"\x55\xaa" + bytes(128 * 1024)


@pytest.mark.parametrize(
    ("name", "source", "vm", "path"),
    [
        ("/@vsphere/web01/web01.ovf", "vsphere", "web01", "web01.ovf"),
        ("/@vsphere/@vsphere/web01/a/d.vmdk", "vsphere", "web01", "a/d.vmdk"),
        ("/srv/x/@hyperv/@hyperv/@hyperv/db/d.vhdx", "hyperv", "db", "d.vhdx"),
        ("/@pve/restore_vmid=9/@hyperv/db//d.vhdx", "hyperv", "db", "d.vhdx"),
        ("@vsphere/disk.vmdk", "vsphere", "", "disk.vmdk"),
    ],
)
def test_a_name_is_taken_apart(name: str, source: str, vm: str, path: str) -> None:
    found = parse_name(name)
    assert found is not None
    assert (found.source, found.vm, found.path) == (source, vm, path)


@pytest.mark.parametrize("name", ["/@proxmox/1/j/x", "/srv/vsphere/x", "/@vsphere/"])
def test_what_is_of_nobody_is_not_taken(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("file", "first", "role"),
    [
        ("web.ovf", b"<?xml", Role.DESCRIPTION),
        ("VM.XML", b"\xff\xfe<\0", Role.DESCRIPTION),
        ("web.nvram", b"MRVN", Role.COMPANION),
        ("web.mf", b"SHA256(", Role.COMPANION),
        ("disk.bin", MBR, Role.DISK),
        ("web.vmdk", b"# Disk DescriptorFile\n", Role.DISK),
        ("strange.xml", MAGIC, Role.DISK),
        ("anything", b"???", Role.DISK),
    ],
)
def test_content_says_more_than_a_name(file: str, first: bytes, role: Role) -> None:
    assert role_of(file, first) is role


def test_a_raw_disk_begins_like_one_or_is_empty() -> None:
    for first in (MBR, bytes(131072), bytes(1080) + b"\x53\xef" + bytes(4000)):
        assert kind_of("d-flat.vmdk", first, 1 << 20) is Format.RAW


@pytest.mark.parametrize(
    ("file", "first", "size"),
    [
        ("d.vmdk", b"HVRCT\1" + bytes(1000), 4096),  # no disk begins so
        ("d.delta", MBR, 4096),  # no disk is called so
        ("d.vmdk", MBR, 4097),  # no disk is so long
    ],
)
def test_an_unknown_delta_is_not_taken_for_a_raw_disk(
    file: str, first: bytes, size: int
) -> None:
    with pytest.raises(IntegrityError, match=r"first bytes are .* known are block-del"):
        kind_of(file, first, size)
    assert kind_of(file, first, size, trusted=True) is Format.RAW


def test_a_guests_own_encrypted_disk_is_taken_where_it_is_named() -> None:
    first = b"LUKS\xba\xbe" + bytes(4090)
    with pytest.raises(IntegrityError, match="import_raw"):
        kind_of("d-flat.vmdk", first, 4096)
    assert kind_of("d-flat.vmdk", first, 4096, trusted=True) is Format.RAW


def test_what_is_no_image_of_ours_to_read_says_what_it_is() -> None:
    with pytest.raises(IntegrityError, match="VMA"):
        role_of("x.vma", b"VMA\0" + bytes(600))
