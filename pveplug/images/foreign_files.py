# SPDX-License-Identifier: Apache-2.0
"""The files of a VM that another hypervisor's backup holds: whose they are, what for.

::

    /srv/@vsphere/@vsphere/web01/2026-11-30/web01-flat.vmdk
         └ where    prefix, repeated  └ VM   └ path: of the VM's files
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from pveplug.errors import IntegrityError
from pveplug.images.detect import FIRST, Format, Kind, detect
from pveplug.images.increments import ADAPTERS
from pveplug.images.vmdk_set import base_name
from pveplug.units import KiB, MiB

HEAD: Final = 128 * KiB
"""As many of the first bytes as :func:`kind_of` wants to see."""
MAX_DESCRIPTION: Final = 16 * MiB
_PREFIX: Final = re.compile(r"(?:^|/)@(vsphere|hyperv)(?=/)")
_DESCRIPTIONS: Final = frozenset({"ovf", "vmx", "xml", "json", "ps1", "vmcx"})
_COMPANIONS: Final = frozenset(
    "bin cert hlog lck log md5 mf mrt nvram psf rct scoreboard sha1 sha256 sha512 txt "
    "vmem vmgs vmrs vmsd vmsn vmss vmxf vsv vswp".split()
)
"""What lies beside a VM's disks and nothing is made of."""
_RAW: Final = frozenset({"raw", "img", "dd", "vmdk", "vhd", "vhdx", "bin", ""})
_SECTOR: Final = 512


class Role(enum.Enum):
    """What a file is for."""

    DISK = "disk"
    DESCRIPTION = "description"
    COMPANION = "companion"


@dataclass(frozen=True, slots=True)
class ForeignName:
    """A name taken apart.

    Attributes:
        source: ``vsphere`` or ``hyperv``.
        vm: its first folder, empty where it has none.
        path: the rest, ``disks/web01.vmdk``.
    """

    source: str
    vm: str
    path: str

    @property
    def file(self) -> str:
        """The last part of the path, whichever way its slashes lean."""
        return base_name(self.path)

    def __str__(self) -> str:
        return f"/@{self.source}/{self.vm}/{self.path}".replace("//", "/")


def parse_name(name: str) -> ForeignName | None:
    """Take a file's name apart; None where it is of no sister plug-in.

    Whatever ``where`` stands in front, and however often the prefix is repeated.
    """
    found = list(_PREFIX.finditer(name))
    if not found:
        return None
    parts = [part for part in name[found[-1].end() :].split("/") if part]
    if not parts:
        return None
    source = found[-1][1]
    if len(parts) == 1:
        return ForeignName(source, "", parts[0])
    return ForeignName(source, parts[0], "/".join(parts[1:]))


def suffix_of(file: str) -> str:
    """Return what follows a file name's last dot, in lower case."""
    _, dot, suffix = base_name(file).rpartition(".")
    return suffix.lower() if dot else ""


def role_of(file: str, first: bytes) -> Role:
    """Say what a file is for, by its first bytes and then by its name.

    Raises:
        IntegrityError: an image of a kind that isn't read.
    """
    if detect(first[:FIRST]) is not Format.RAW or ADAPTERS.known(first):
        return Role.DISK
    suffix = suffix_of(file)
    if suffix in _DESCRIPTIONS:
        return Role.DESCRIPTION
    if suffix in _COMPANIONS and not _known_content(first):
        return Role.COMPANION
    return Role.DISK


def kind_of(
    file: str, first: bytes, size: int | None, *, trusted: bool = False
) -> Kind:
    """Say of what format a disk's image is.

    What no format's magic tells may be a raw disk, or an increment in a format that
    isn't published, and the one must not pass for the other: its first bytes must be
    those of a disk, or empty.

    Args:
        first: HEAD bytes, or the whole of a shorter file.
        size: of the file in bytes, where known.
        trusted: the operator says that it is a raw disk.

    Raises:
        IntegrityError: it is of a kind that isn't read, or of none that is known; the
            text has its first bytes and the names of what would be known.
    """
    try:
        kind = detect(first[:FIRST])
    except IntegrityError:
        if not trusted:
            raise
        return Format.RAW  # a guest may have LUKS on its whole disk
    if kind is not Format.RAW or trusted:
        return kind
    whole = size is None or not size % _SECTOR
    if whole and suffix_of(file) in _RAW and _like_a_disk(first):
        return kind
    return ADAPTERS.find(first, name=file)


def _like_a_disk(first: bytes) -> bool:
    return _known_content(first) or not any(first)


def _known_content(first: bytes) -> bool:
    """Whether these are the first bytes of a partitioned disk or a file system."""
    return any(first[at : at + len(magic)] == magic for at, magic in _MAGICS)


_MAGICS: Final = (
    (510, b"\x55\xaa"),  # MBR, FAT, NTFS
    (512, b"EFI PART"),
    (4096, b"EFI PART"),
    (3, b"ReFS\0"),
    (0, b"XFSB"),
    (1080, b"\x53\xef"),  # ext2, ext3, ext4
    (65600, b"_BHRfS_M"),  # btrfs
    *((sector * 512, b"LABELONE") for sector in range(4)),  # LVM
    (4096, b"\xfc\x4e\x2b\xa9"),  # Linux RAID 1.2
    (4086, b"SWAPSPACE2"),
    (4086, b"SWAP-SPACE"),
    (32, b"ORCLDISK"),  # Oracle ASM
    (9564, b"\x54\x19\x01\x00"),  # UFS 1
    (66908, b"\x19\x01\x54\x19"),  # UFS 2
)
"""Where a magic stands, and what it is."""
