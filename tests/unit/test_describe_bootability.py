# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pveplug.describe.bootability import MAX_READ, MAX_READS, Bootability, inspect
from pveplug.describe.guest import Family
from pveplug.units import GiB, MiB, TiB
from tests.support.boot_disks import (
    BIOS_BOOT,
    ESP,
    LINUX,
    Disk,
    esp,
    gpt,
    mbr,
    partitioned,
    write_at,
)

GPT_SCRIPT = "label: gpt\nstart=2048, size=32768, type=uefi\nstart=34816, type=linux\n"
WINDOWS = (
    "EFI/Microsoft/Boot/bootmgfw.efi",
    "EFI/Microsoft/Boot/de-DE/bootmgfw.efi.mui",
    "EFI/Boot/bootx64.efi",
)
UBUNTU = ("EFI/ubuntu/shimx64.efi", "EFI/ubuntu/grub.cfg", "EFI/BOOT/BOOTX64.EFI")


def looked_at(path):
    data = path.read_bytes()
    return inspect(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.parametrize(
    ("size", "options"),
    [(2, ()), (16, ()), (40, ("-F",))],
    ids=["FAT12", "FAT16", "FAT32"],
)
def test_windows_is_known_by_its_esp(tmp_path, size, options):
    script = f"label: gpt\nstart=2048, size={size * 2048}, type=uefi\n"
    disk = partitioned(tmp_path / "d", script, (size + 8) * MiB)
    found = looked_at(esp(disk, WINDOWS, size=size * MiB, options=options))
    assert (found.table, found.sector, found.esp) == ("gpt", 512, True)
    assert found.loaders == (
        "EFI/MICROSOFT/BOOT/BOOTMGFW.EFI",
        "EFI/BOOT/BOOTX64.EFI",
    )
    assert found.uefi
    assert found.fallback
    assert not found.bios
    assert found.family is Family.WINDOWS


def test_a_linux_is_known_by_its_vendors_folder(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    found = looked_at(esp(disk, UBUNTU))
    assert (found.family, found.os_id) == (Family.LINUX, "ubuntu")
    assert found.uefi


def test_a_folder_with_a_long_name_and_many_entries_is_read_to_its_end(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    files = [f"EFI/almalinux/a-rather-long-name-{n}.txt" for n in range(40)]
    found = looked_at(esp(disk, [*files, "EFI/almalinux/shimx64.efi"]))
    assert found.loaders == ("EFI/ALMALINUX/SHIMX64.EFI",)
    assert found.uefi_by_nvram
    assert not found.fallback
    assert found.os_id == "alma"


def test_a_long_folder_of_fat12_is_read_to_its_end(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    files = [f"EFI/debian/another-long-name-{n}.txt" for n in range(60)]
    names = [*files, "EFI/debian/shimx64.efi"]
    assert looked_at(esp(disk, names, size=2 * MiB)).os_id == "debian"


def test_structures_beyond_the_bounds_are_given_up_and_said(tmp_path, monkeypatch):
    disk = esp(partitioned(tmp_path / "d", GPT_SCRIPT), WINDOWS)
    for name, value in (("MAX_READS", 5), ("MAX_READ", 600), ("MAX_BYTES", 20_000)):
        with monkeypatch.context() as patched:
            patched.setattr(f"pveplug.describe.bootability.{name}", value)
            found = looked_at(disk)
            assert not found.uefi
            assert name == "MAX_READ" or "too large" in found.notes[-1]


def test_two_systems_on_one_disk_are_not_told_apart(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    found = looked_at(esp(disk, [*WINDOWS, *UBUNTU[:2]]))
    assert found.uefi
    assert found.family is Family.UNKNOWN


def test_an_empty_esp_starts_nothing(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    assert "no FAT" in looked_at(disk).notes[0]
    found = looked_at(esp(disk, ["readme.txt"]))
    assert found.esp
    assert not found.uefi
    assert not found.bios


def test_an_esp_in_an_mbr_is_found(tmp_path):
    disk = partitioned(tmp_path / "d", "label: dos\nstart=2048, size=32768, type=ef\n")
    found = looked_at(esp(disk, UBUNTU))
    assert (found.table, found.uefi, found.bios) == ("mbr", True, False)


def test_grub_in_sector_0_starts_by_bios(tmp_path):
    disk = partitioned(tmp_path / "d", "label: dos\nstart=2048, type=83\n")
    assert not looked_at(disk).bios  # a table without code starts nothing
    write_at(disk, 0, b"\xeb\x63\x90" + bytes(300) + b"GRUB \0Geom\0Hard Disk\0Read")
    found = looked_at(disk)
    assert (found.bios, found.bios_loader, found.table) == (True, "grub", "mbr")
    assert found.family is Family.LINUX


@pytest.mark.parametrize(
    ("mark", "name", "os_id"),
    [(b"BOOTMGR is missing", "bootmgr", ""), (b"NTLDR is miss", "ntldr", "windows")],
)
def test_windows_by_bios_is_known_by_its_active_partition(tmp_path, mark, name, os_id):
    disk = partitioned(tmp_path / "d", "label: dos\nstart=2048, type=7, bootable\n")
    write_at(disk, 0, b"\x33\xc0\x8e\xd0" + bytes(200) + b"Missing operating system")
    assert not looked_at(disk).bios  # the partition holds no boot sector
    write_at(disk, MiB, (b"\xebR\x90NTFS    " + bytes(400) + mark).ljust(510, b"\0"))
    write_at(disk, MiB + 510, b"\x55\xaa")
    found = looked_at(disk)
    assert (found.bios, found.bios_loader) == (True, name)
    assert found.family is Family.WINDOWS
    assert found.os_id.startswith(os_id)


def test_code_before_a_gpt_counts_only_with_a_place_for_it_to_go():
    size = 64 * MiB
    code = {0: mbr(b"\x33\xc0" * 20, [(0, 0xEE, 1, size // 512 - 1)])}
    plain = gpt(size, {(2048, 4095): LINUX})
    assert not inspect(Disk(size, code, plain).read, size).bios
    with_place = gpt(size, {(40, 2047): BIOS_BOOT, (2048, 4095): LINUX})
    assert inspect(Disk(size, code, with_place).read, size).bios_loader == "grub"
    legacy = gpt(size, {(2048, 4095): LINUX}, flags=4)
    assert inspect(Disk(size, code, legacy).read, size).bios_loader == "syslinux"


def test_a_table_for_4096_byte_sectors_is_found(tmp_path):
    size = 64 * MiB
    table = gpt(size, {(256, 4351): ESP}, sector=4096)
    volume = esp(tmp_path / "v", UBUNTU, offset=0, size=16 * MiB)
    disk = Disk(size, table, {256 * 4096: volume.read_bytes()})
    found = inspect(disk.read, size)
    assert (found.sector, found.table, found.uefi) == (4096, "gpt", True)


def test_the_copy_at_the_end_serves_when_the_first_table_is_damaged():
    size = 64 * MiB
    first = gpt(size, {(2048, 4095): ESP})
    broken = {at: data[:-1] + b"\xff" for at, data in first.items()}
    second = gpt(size, {(2048, 4095): ESP}, at_end=True)
    found = inspect(Disk(size, broken, second).read, size)
    assert found.table == "gpt"
    assert "copy" in found.notes[0]
    assert inspect(Disk(size, broken).read, size).table == "none"


def test_a_disk_of_nothing_says_nothing():
    assert inspect(Disk(TiB).read, TiB) == Bootability()
    assert inspect(Disk(0).read, 0) == Bootability()
    assert inspect(lambda offset, length: b"", 10 * GiB) == Bootability()


def test_a_file_system_without_a_table_is_no_table(tmp_path):
    found = looked_at(esp(tmp_path / "v", UBUNTU, offset=0))
    assert (found.table, found.esp, found.uefi) == ("none", True, True)


def test_a_folder_that_is_its_own_next_cluster_ends(tmp_path):
    data = bytearray(esp(tmp_path / "v", UBUNTU, offset=0).read_bytes())
    reserved = int.from_bytes(data[14:16], "little") * 512
    for cluster in range(2, 60):  # FAT16: every chain is a ring of itself
        at = reserved + 2 * cluster
        data[at : at + 2] = cluster.to_bytes(2, "little")
    disk = Disk(len(data), {0: bytes(data)})
    assert inspect(disk.read, len(data)).uefi
    assert len(disk.reads) < 100


def test_reads_are_bounded_and_lie_within_the_disk(tmp_path):
    disk = partitioned(tmp_path / "d", GPT_SCRIPT)
    esp(disk, [f"EFI/vendor{n}/x.efi" for n in range(20)])
    seen = Disk(disk.stat().st_size, {0: disk.read_bytes()})
    inspect(seen.read, seen.size)
    assert len(seen.reads) <= MAX_READS
    assert all(0 < n <= MAX_READ and at + n <= seen.size for at, n in seen.reads)
