# SPDX-License-Identifier: Apache-2.0
r"""What could start from a disk: its partition table, boot code and EFI loaders.

::

    sector 0   boot code, 4 partitions, 55 AA      PC BIOS starts here
    LBA 1      "EFI PART", 128 entries             at 512 or at 4096 bytes
    ESP        FAT: \EFI\BOOT\BOOTX64.EFI,         UEFI starts here; what its NVRAM
               \EFI\Microsoft\…, \EFI\ubuntu\…     named isn't in a disk's image

:func:`inspection` is a generator: it yields ``(offset, length)`` it wants to see, is
sent the bytes there, and returns its finding. A disk of strangers: reads are bounded in
number and size, and chains that go in circles end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final

from pveplug.describe.guest import Family
from pveplug.units import KiB, MiB

Ask = Generator[tuple[int, int], bytes, "Bootability"]
_Bytes = Generator[tuple[int, int], bytes, bytes]

MAX_READS: Final = 512
MAX_READ: Final = 128 * KiB
MAX_BYTES: Final = 16 * MiB
"""Bounds of one inspection: reads, bytes of one, bytes of all."""
_ESP: Final = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
_BIOS_BOOT: Final = bytes.fromhex("4861682149646f6e744e656564454649")
_GPT: Final = struct.Struct("<8sIII4xQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ")
_LEGACY_BOOT: Final = 1 << 2
_MAX_ENTRIES: Final = 1024
_MAX_DIRECTORY: Final = 64  # clusters or pieces of one directory
_MAX_NAMES: Final = 4096
FALLBACK: Final = ("EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/BOOTIA32.EFI")
WINDOWS_LOADER: Final = "EFI/MICROSOFT/BOOT/BOOTMGFW.EFI"
_VENDORS: Final = {
    **{"UBUNTU": "ubuntu", "DEBIAN": "debian", "REDHAT": "rhel", "CENTOS": "centos"},
    **{"FEDORA": "fedora", "ROCKY": "rocky", "ALMALINUX": "alma", "ALMA": "alma"},
    **{"SLES": "sles 15", "OPENSUSE": "suse", "SLE_HPC": "sles 15", "KALI": "kali"},
    **{
        "AMZN": "amazonlinux",
        "OL": "oracle",
        "PROXMOX": "proxmox",
        "ARCH": "arch linux",
    },
    **{"GRUB": "linux", "SYSTEMD": "linux", "PHOTON": "photon", "ALPINE": "alpine"},
    **{"FREEBSD": "freebsd", "GENTOO": "gentoo"},
}
"""Directories below EFI and whose system they are."""


@dataclass(frozen=True, slots=True)
class Bootability:
    """What was found.

    Attributes:
        table: ``gpt``, ``mbr`` or ``none``; ``sector``: bytes its places count in.
        esp: whether there is an EFI system partition, with a FAT that could be read.
        loaders: EFI loaders, as ``EFI/BOOT/BOOTX64.EFI`` in upper case.
        boot_code: whether sector 0 has code that a BIOS would run to somewhere.
        bios_loader: ``grub``, ``bootmgr``, ``ntldr``, ``syslinux``, ``lilo`` or empty.
        family, os_id: what the loaders tell about the system; os_id may be empty.
        notes: what was odd.
    """

    table: str = "none"
    sector: int = 512
    esp: bool = False
    loaders: tuple[str, ...] = ()
    boot_code: bool = False
    bios_loader: str = ""
    family: Family = Family.UNKNOWN
    os_id: str = ""
    notes: tuple[str, ...] = ()

    @property
    def uefi(self) -> bool:
        """Whether UEFI would find a loader by the standard name, or Windows's."""
        return bool({*FALLBACK, WINDOWS_LOADER} & set(self.loaders))

    @property
    def uefi_by_nvram(self) -> bool:
        """Whether there are only loaders that UEFI's lost settings had named."""
        return bool(self.loaders) and not self.uefi

    @property
    def fallback(self) -> bool:
        """Whether UEFI finds it with empty settings (Windows's own name doesn't)."""
        return bool(set(FALLBACK) & set(self.loaders))

    @property
    def bios(self) -> bool:
        """Whether a BIOS would find something to start."""
        return self.boot_code


def inspect(read: Callable[[int, int], bytes], size: int) -> Bootability:
    """Inspect a disk by a function ``(offset, length) -> bytes``, short at its end."""
    asking = inspection(size)
    try:
        wanted = next(asking)
        while True:
            wanted = asking.send(read(*wanted))
    except StopIteration as end:
        found: Bootability = end.value
        return found


def inspection(size: int) -> Ask:
    """Inspect a disk of ``size`` bytes; see the module's text.

    What is sent may be shorter than asked for; what is missing counts as zeroes.
    """
    return _Inspection(size).run()


@dataclass(frozen=True, slots=True)
class _Partition:
    offset: int
    length: int
    esp: bool
    bios_boot: bool = False
    active: bool = False


class _EnoughError(Exception):
    """The bounds of an inspection are reached."""


class _Inspection:
    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0
        self.total = 0
        self.notes: list[str] = []

    def read(self, offset: int, length: int) -> _Bytes:
        if offset < 0 or length <= 0 or offset >= self.size:
            return bytes(max(length, 0))
        if self.reads >= MAX_READS or self.total + length > MAX_BYTES:
            raise _EnoughError
        if length > MAX_READ:
            raise _EnoughError
        self.reads += 1
        self.total += length
        within = min(length, self.size - offset)
        data = yield offset, within
        return bytes(data[:within]).ljust(length, b"\0")

    def run(self) -> Ask:
        table, sector = "none", 512
        partitions: list[_Partition] = []
        loaders: list[str] = []
        vendors: list[str] = []
        esp = False
        code, loader = False, ""
        try:
            first = yield from self.read(0, 512)
            gpt = yield from self.gpt()
            if gpt is not None:
                table, (sector, partitions) = "gpt", gpt
            elif first[510:512] == b"\x55\xaa" and not self.is_fat(first):
                partitions = self.mbr(first)
                table = "mbr" if partitions else "none"
            code, loader = yield from self.boot_code(first, table, partitions)
            if not partitions and self.is_fat(first):
                partitions = [_Partition(0, self.size, esp=True)]
            for partition in [p for p in partitions if p.esp][:4]:
                there = yield from self.esp(partition, loaders, vendors)
                esp = esp or there
        except _EnoughError:
            self.notes.append("the disk's structures are too large to be looked at")
        family, os_id = _system(loaders, vendors, loader)
        return Bootability(
            table,
            sector,
            esp,
            tuple(dict.fromkeys(loaders)),
            code,
            loader,
            family,
            os_id,
            tuple(self.notes),
        )

    # ---- partition tables

    def gpt(
        self,
    ) -> Generator[tuple[int, int], bytes, tuple[int, list[_Partition]] | None]:
        for sector in (512, 4096):
            for at in (sector, self.size - sector):
                found = yield from self.gpt_at(at, sector)
                if found is not None:
                    if at != sector:
                        self.notes.append(
                            "the first partition table (GPT) is damaged: its copy at "
                            "the end of the disk was used"
                        )
                    return sector, found
        return None

    def gpt_at(
        self, at: int, sector: int
    ) -> Generator[tuple[int, int], bytes, list[_Partition] | None]:
        data = yield from self.read(at, 512)
        header = _GPT.unpack_from(data)
        magic, _, header_size, crc, here = header[:5]
        if magic != b"EFI PART" or not 92 <= header_size <= 512:
            return None
        zeroed = data[:16] + bytes(4) + data[20:header_size]
        if zlib.crc32(zeroed) != crc or here * sector != at:
            return None
        entries_at, count, width, entries_crc = header[9:13]
        if not 128 <= width <= 4096 or width % 8 or not 0 < count <= _MAX_ENTRIES:
            return None
        if count * width > MAX_READ:
            return None
        table = yield from self.read(entries_at * sector, count * width)
        if zlib.crc32(table) != entries_crc:
            return None
        found = []
        for number in range(count):
            kind, _, first, last, flags = _ENTRY.unpack_from(table, number * width)
            if kind == bytes(16) or not first <= last < 1 << 55:
                continue
            found.append(
                _Partition(
                    first * sector,
                    (last - first + 1) * sector,
                    esp=kind == _ESP,
                    bios_boot=kind == _BIOS_BOOT,
                    active=bool(flags & _LEGACY_BOOT),
                )
            )
        return found

    def mbr(self, first: bytes) -> list[_Partition]:
        found = []
        for at in range(446, 510, 16):
            status, kind = first[at], first[at + 4]
            start, length = struct.unpack_from("<II", first, at + 8)
            if status not in (0, 0x80):
                return []  # no table: boot code of a file system, or nothing
            if kind and length:
                found.append(
                    _Partition(
                        start * 512,
                        length * 512,
                        esp=kind == 0xEF,
                        active=status == 0x80,
                    )
                )
        return found

    # ---- a BIOS's way

    def boot_code(
        self, first: bytes, table: str, partitions: list[_Partition]
    ) -> Generator[tuple[int, int], bytes, tuple[bool, str]]:
        code = first[:440]
        if first[510:512] != b"\x55\xaa" or not any(code) or code[:2] == b"\xf6\xf6":
            return False, ""
        active = [p for p in partitions if p.active]
        if b"GRUB" in code:
            return True, "grub"
        if b"LILO" in code[:16]:
            return True, "lilo"
        if table == "gpt":
            # Windows and others put code into a GPT disk's sector 0 that only says
            # that there is nothing to start.
            if any(p.bios_boot for p in partitions):
                return True, "grub"
            return bool(active), "syslinux" if active else ""
        if table == "none":
            name = "" if self.is_fat(first) else _loader_name(first)
            return bool(name), name
        if not active:
            return False, ""
        begin = yield from self.read(active[0].offset, 8 * KiB)
        if begin[510:512] != b"\x55\xaa":
            return False, ""
        return True, _loader_name(begin)

    # ---- UEFI's way

    @staticmethod
    def is_fat(first: bytes) -> bool:
        return _Fat.of(first) is not None

    def esp(
        self, partition: _Partition, loaders: list[str], vendors: list[str]
    ) -> Generator[tuple[int, int], bytes, bool]:
        first = yield from self.read(partition.offset, 512)
        fat = _Fat.of(first)
        if fat is None:
            self.notes.append("the EFI system partition has no FAT file system")
            return False
        root = yield from self.directory(partition.offset, fat, None)
        efi = root.get("EFI")
        if efi is None or not efi[0]:
            return True
        below = yield from self.directory(partition.offset, fat, efi[1])
        for name, (is_directory, cluster) in list(below.items())[:64]:
            if not is_directory or name in (".", ".."):
                continue
            inside = yield from self.directory(partition.offset, fat, cluster)
            if name == "MICROSOFT" and (boot := inside.get("BOOT")) and boot[0]:
                inside = yield from self.directory(partition.offset, fat, boot[1])
                name = "MICROSOFT/BOOT"
            programs = [
                f"EFI/{name}/{file}"
                for file, (folder, _) in inside.items()
                if not folder and file.endswith(".EFI")
            ]
            loaders += programs[:64]
            if programs:
                vendors.append(name)
        return True

    def directory(
        self, base: int, fat: _Fat, cluster: int | None
    ) -> Generator[tuple[int, int], bytes, dict[str, tuple[bool, int]]]:
        """Return a directory's entries: NAME -> (is a directory, first cluster)."""
        data = bytearray()
        if cluster is None and fat.root_size:
            size = min(fat.root_size, MAX_READ)
            data += yield from self.read(base + fat.root_offset, size)
        else:
            here = fat.root_cluster if cluster is None else cluster
            seen: set[int] = set()
            while 2 <= here < fat.clusters + 2 and here not in seen:
                if len(seen) >= _MAX_DIRECTORY:
                    break
                seen.add(here)
                at = fat.data_offset + (here - 2) * fat.cluster_size
                data += yield from self.read(base + at, fat.cluster_size)
                if bytes(32) in (data[-32:],):
                    break  # the rest of the chain is free entries
                here = yield from self.next_cluster(base, fat, here)
        return _entries(bytes(data), fat.bits)

    def next_cluster(
        self, base: int, fat: _Fat, cluster: int
    ) -> Generator[tuple[int, int], bytes, int]:
        at = cluster * fat.bits // 8
        piece = yield from self.read(base + fat.fat_offset + at, 4)
        value = int.from_bytes(piece, "little")
        if fat.bits == 12:
            return (value >> 4 if cluster & 1 else value) & 0xFFF
        return value & (0xFFFF if fat.bits == 16 else 0x0FFFFFFF)


@dataclass(frozen=True, slots=True)
class _Fat:
    """A FAT's geometry; places and lengths in bytes from the partition's start."""

    bits: int
    cluster_size: int
    clusters: int
    fat_offset: int
    root_offset: int
    root_size: int
    root_cluster: int
    data_offset: int

    @classmethod
    def of(cls, first: bytes) -> _Fat | None:
        """Read a boot sector (Microsoft's "FAT32 File System Specification" 1.03)."""
        width, per, reserved, fats, roots = struct.unpack_from("<HBHBH", first, 11)
        small, _, fat16 = struct.unpack_from("<HBH", first, 19)
        large, fat32 = struct.unpack_from("<II", first, 32)
        root_cluster = struct.unpack_from("<I", first, 44)[0]
        if first[510:512] != b"\x55\xaa" or first[0] not in (0xEB, 0xE9):
            return None
        if width not in (512, 1024, 2048, 4096) or per & (per - 1) or not per:
            return None
        sectors, fat = small or large, fat16 or fat32
        if not 1 <= fats <= 4 or not reserved or not fat or width * per > MAX_READ:
            return None
        root_size = -(-roots * 32 // width) * width
        data = (reserved + fats * fat) * width + root_size
        clusters = (sectors * width - data) // (width * per)
        if clusters <= 0:
            return None
        bits = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
        if not fat16:
            bits = 32
        return cls(
            bits,
            width * per,
            clusters,
            reserved * width,
            data - root_size,
            root_size if bits != 32 else 0,
            root_cluster,
            data,
        )


def _entries(data: bytes, bits: int) -> dict[str, tuple[bool, int]]:
    found: dict[str, tuple[bool, int]] = {}
    long: dict[int, bytes] = {}
    for at in range(0, len(data) - 31, 32):
        entry = data[at : at + 32]
        if entry[0] == 0 or len(found) >= _MAX_NAMES:
            break
        if entry[0] == 0xE5:
            long = {}
            continue
        if entry[11] & 0x3F == 0x0F:
            if entry[0] & 0x40:
                long = {}
            long[entry[0] & 0x1F] = entry[1:11] + entry[14:26] + entry[28:32]
            continue
        if not entry[11] & 8:
            cluster = int.from_bytes(entry[26:28], "little")
            if bits == 32:
                cluster |= int.from_bytes(entry[20:22], "little") << 16
            name = _short_name(entry[:11])
            parts = b"".join(long[number] for number in sorted(long))
            if wide := parts.decode("utf-16-le", "replace").split("\0")[0]:
                name = wide
            found.setdefault(name.upper(), (bool(entry[11] & 0x10), cluster))
        long = {}
    return found


def _short_name(raw: bytes) -> str:
    stem = raw[:8].decode("ascii", "replace").rstrip()
    suffix = raw[8:].decode("ascii", "replace").rstrip()
    return f"{stem}.{suffix}" if suffix else stem


def _loader_name(begin: bytes) -> str:
    """Name what a volume's first sectors start; empty where it isn't known."""
    for mark, name in (
        (b"GRUB", "grub"),
        (b"BOOTMGR", "bootmgr"),
        (b"B\0O\0O\0T\0M\0G\0R\0", "bootmgr"),
        (b"NTLDR", "ntldr"),
        (b"N\0T\0L\0D\0R\0", "ntldr"),
        (b"SYSLINUX", "syslinux"),
        (b"EXTLINUX", "syslinux"),
        (b"LILO", "lilo"),
    ):
        if mark in begin:
            return name
    return ""


def _system(loaders: list[str], vendors: list[str], bios: str) -> tuple[Family, str]:
    """Say whose loaders these are: the vendor's before what a BIOS would start."""
    names = [_VENDORS[name] for name in vendors if name in _VENDORS]
    if WINDOWS_LOADER in loaders and not names:
        return Family.WINDOWS, ""
    if names and WINDOWS_LOADER not in loaders:
        family = Family.OTHER if names == ["freebsd"] else Family.LINUX
        return family, "" if names[0] == "linux" else names[0]
    if names:
        return Family.UNKNOWN, ""  # two systems on one disk
    return {
        "grub": (Family.LINUX, ""),
        "lilo": (Family.LINUX, ""),
        "syslinux": (Family.LINUX, ""),
        "bootmgr": (Family.WINDOWS, ""),
        "ntldr": (Family.WINDOWS, "windows 2003"),
    }.get(bios, (Family.UNKNOWN, ""))
