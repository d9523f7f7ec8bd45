# SPDX-License-Identifier: Apache-2.0
"""Hostile descriptions and boot disks out of a few bytes: for fuzzers and properties.

An input is::

    byte 0       0: the rest is the file; n: edits on good file n - 1 follow
    an edit      1 byte what, 2 bytes where, 1 byte how long, then as many bytes
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from pveplug.describe import sidecar
from pveplug.describe.bootability import MAX_BYTES, MAX_READ, MAX_READS, inspect
from pveplug.describe.guest import MAX_REPORTED, GuestDescription
from pveplug.describe.plan import DiskFacts, to_pve
from pveplug.describe.reading import detect, read_description, read_one
from pveplug.errors import ConfigError, DescriptionError
from pveplug.units import GiB
from pveplug.vmrestore import Target, TargetStorage, Wishes
from tests.support.boot_disks import BIOS_BOOT, ESP, LINUX, gpt, mbr

KEPT = Path(__file__).resolve().parents[1] / "unit" / "descriptions"
TARGET = Target({"nas": TargetStorage("nas")}, bridges=frozenset({"vmbr0"}))
_DISK = 1 << 20


@functools.cache
def descriptions() -> tuple[bytes, ...]:
    """The good ones, in the order of their names."""
    paths = sorted(path for path in KEPT.iterdir() if path.suffix != ".golden")
    return tuple(path.read_bytes() for path in paths)


@functools.cache
def disks() -> tuple[bytes, ...]:
    """Small ones: a GPT with an ESP of FAT16, an MBR with NTLDR, one FAT alone."""
    parts = {(34, 1900): ESP, (1901, 1950): BIOS_BOOT, (1951, 2000): LINUX}
    first = bytearray(_DISK)
    for at, data in {0: mbr(b"\x33\xc0" * 9), **gpt(_DISK, parts)}.items():
        first[at : at + len(data)] = data
    fat = _fat()
    first[34 * 512 : 34 * 512 + len(fat)] = fat
    second = bytearray(_DISK)
    second[:512] = mbr(b"\x33\xc0" * 9, [(0x80, 7, 64, 1000), (0, 0xEF, 1100, 900)])
    second[64 * 512 : 65 * 512] = b"\xebR\x90NTFS    NTLDR".ljust(510) + b"\x55\xaa"
    second[1100 * 512 : 1100 * 512 + len(fat)] = fat
    return bytes(first), bytes(second), fat.ljust(_DISK, b"\0")


def _fat() -> bytes:
    """A FAT12 with EFI/BOOT/BOOTX64.EFI and a folder of a long name."""
    head = bytearray(512)
    head[:3], head[510:] = b"\xeb\x3c\x90", b"\x55\xaa"
    head[11:24] = bytes.fromhex("0002 01 0100 01 1000 4006 f8 0500".replace(" ", ""))

    def entry(name: bytes, cluster: int, attribute: int = 0x10) -> bytes:
        low = cluster.to_bytes(2, "little")
        return name.ljust(11) + bytes([attribute]) + bytes(14) + low + bytes(4)

    wide = "systemd-loader".encode("utf-16-le").ljust(52, b"\xff")
    long = [
        bytes([number | (0x40 if number == 2 else 0)])
        + (part := wide[26 * (number - 1) : 26 * number])[:10]
        + b"\x0f\0\0"
        + part[10:22]
        + b"\0\0"
        + part[22:]
        for number in (2, 1)
    ]
    table = bytearray(5 * 512)
    table[:9] = bytes.fromhex("f8ffff ffffff ffffff".replace(" ", ""))
    root = entry(b"EFI", 2).ljust(512, b"\0")
    efi = entry(b"BOOT", 3) + b"".join(long) + entry(b"SYSTEM~1", 4)
    boot = entry(b"BOOTX64 EFI", 5, 0x20)
    return bytes(head + table) + b"".join(
        part.ljust(512, b"\0") for part in (root, efi, boot, boot)
    )


def edited(data: bytes, good: tuple[bytes, ...]) -> bytes:
    """Return the file an input means."""
    if not data or data[0] == 0:
        return data[1:]
    file = bytearray(good[(data[0] - 1) % len(good)])
    rest = data[1:]
    while len(rest) >= 4:
        what, length = rest[0] % 4, rest[3]
        at = int.from_bytes(rest[1:3], "little")
        at = at * 64 % len(file) if len(file) > 1 << 16 else at % max(len(file), 1)
        piece, rest = rest[4 : 4 + length], rest[4 + length :]
        if what == 0:
            file[at : at + len(piece)] = piece
        elif what == 1:
            file[at:at] = piece
        elif what == 2:
            del file[at : at + length]
        else:
            file[at:at] = file[at : at + length] * min(len(piece) + 1, 20)
    return bytes(file)


def describe(data: bytes) -> GuestDescription | None:
    """Read one file as an import would; everything must be a result or documented."""
    kind = detect(data)
    found, refused = _read(data)
    if found is None:
        assert len(refused) < 2000
        assert "\n" not in refused
        return None
    assert kind is not None
    assert len({disk.key for disk in found.disks}) == len(found.disks)
    assert [disk.order for disk in found.disks] == list(range(len(found.disks)))
    assert len(found.dropped) <= MAX_REPORTED + 1
    again = read_description({"x": sidecar.render(found)})
    assert again == found
    facts = {disk.key: DiskFacts(size=GiB) for disk in found.disks}
    try:
        plan = to_pve(found, Wishes(storage="nas"), TARGET, disks=facts, fresh_uuid="u")
    except ConfigError:
        return found
    keys = [disk.key for disk in plan.restore.disks]
    assert len(set(keys)) == len(keys) == len(found.disks)
    for key, value in plan.restore.params.items():
        assert key == "description" or value.isprintable(), (key, value)
    return found


def _read(data: bytes) -> tuple[GuestDescription | None, str]:
    try:
        return read_description({"a file": data}), ""
    except DescriptionError as error:
        with contextlib.suppress(DescriptionError):
            read_one("a file", data)
        return None, str(error)


def look(data: bytes) -> None:
    """Inspect one disk; reads must be bounded and within it."""
    reads: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    found = inspect(read, len(data))
    assert len(reads) <= MAX_READS
    assert sum(length for _, length in reads) <= MAX_BYTES
    for offset, length in reads:
        assert offset >= 0
        assert 0 < length <= MAX_READ
        assert offset + length <= len(data)
    assert len(found.loaders) <= 64 * 64 * 4
