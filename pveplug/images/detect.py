# SPDX-License-Identifier: Apache-2.0
"""What a disk image is, by its first bytes and never by its name."""

from __future__ import annotations

import enum
from typing import Final

from pveplug.errors import IntegrityError
from pveplug.images import blockdelta, vhd_wire, vhdx_wire, vmdk_wire
from pveplug.images.blockdelta import BlockDeltaReader
from pveplug.images.increments import Adapter
from pveplug.images.qcow2_foreign import Qcow2Reader
from pveplug.images.raw import RawReader
from pveplug.images.stream import Spill, StreamReader
from pveplug.images.vhd import VhdReader
from pveplug.images.vhdx import VhdxReader
from pveplug.images.vmdk_sparse import CowdReader, VmdkSparseReader
from pveplug.images.vmdk_stream import VmdkStreamReader

FIRST: Final = 512
"""As many of the first bytes decide."""


class Format(enum.Enum):
    """A kind of file; those of several extents need all their files."""

    RAW = "raw"
    VMDK_SPARSE = "vmdk sparse"
    VMDK_STREAM = "vmdk stream"
    VMDK_DESCRIPTOR = "vmdk descriptor"
    COWD = "cowd"
    VHDX = "vhdx"
    VHD = "vhd"
    QCOW2 = "qcow2"
    BLOCK_DELTA = "block-delta"


READERS: Final[dict[Format, type[StreamReader]]] = {
    Format.RAW: RawReader,
    Format.VMDK_SPARSE: VmdkSparseReader,
    Format.VMDK_STREAM: VmdkStreamReader,
    Format.COWD: CowdReader,
    Format.VHDX: VhdxReader,
    Format.VHD: VhdReader,
    Format.QCOW2: Qcow2Reader,
    Format.BLOCK_DELTA: BlockDeltaReader,
}
_MAGIC: Final = (
    (vhdx_wire.SIGNATURE, Format.VHDX),
    (vhd_wire.COOKIE, Format.VHD),
    (b"QFI\xfb", Format.QCOW2),
    (vmdk_wire.COWD_MAGIC, Format.COWD),
    (blockdelta.MAGIC, Format.BLOCK_DELTA),
)
REFUSED: Final = (
    (b"VMA\0", 0, "a vzdump archive (VMA): restore it with qmrestore"),
    (b"\xbe\xba\xfe\xca", 0, "a VMware SESparse snapshot: consolidate it first"),
    (b"QED\0", 0, "a QED image: convert it to qcow2"),
    (b"\x7f\x10\xda\xbe", 64, "a VirtualBox VDI: export the VM as OVF"),
    (
        *(b"LUKS\xba\xbe", 0),
        "a LUKS container: it is encrypted (a guest's own disk? then name it in "
        "import_raw or --raw)",
    ),
    (
        b"ustar",
        257,
        "a tar archive (an OVA is one): pveplug import --to-vmid reads "
        "it; else unpack it, give what it holds",
    ),
    (b"PK\3\4", 0, "a zip archive: unpack it, give what it holds"),
    (b"\x1f\x8b\x08", 0, "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ\0", 0, "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", 0, "compressed with zstd: unpack it first"),
)
"""Magic, where it stands, what to say."""


def detect(first: bytes | bytearray | memoryview) -> Format:
    """Say what a file is that begins with ``first``.

    Args:
        first: FIRST bytes, or the whole of a shorter file.

    Returns: RAW where nothing else is known: a raw disk, a flat extent, a fixed VHD.

    Raises:
        IntegrityError: an image of a kind that isn't read; the text says which.
    """
    head = bytes(first[:FIRST])
    for magic, at, what in REFUSED:
        if head[at : at + len(magic)] == magic:
            raise IntegrityError(f"the file is {what}", offset=at)
    if head.startswith(vmdk_wire.MAGIC):
        stream = head[56:64] == b"\xff" * 8  # the grain directory is at the end
        return Format.VMDK_STREAM if stream else Format.VMDK_SPARSE
    if vmdk_wire.is_descriptor(head):
        return Format.VMDK_DESCRIPTOR
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), Format.RAW)


Kind = Format | Adapter
"""What a file is read as."""


def reader_for(
    kind: Kind,
    *,
    name: str = "image",
    file_size: int | None = None,
    spill: Spill | None = None,
) -> StreamReader:
    """Make the reader of a format that is one file.

    Raises:
        IntegrityError: the file is only a descriptor: see VmdkSet.
    """
    if kind is Format.VMDK_DESCRIPTOR:
        raise IntegrityError(
            f"{name} is a VMDK's descriptor; its extents hold the data", offset=0
        )
    make = kind.reader if isinstance(kind, Adapter) else READERS[kind]
    return make(name=name, file_size=file_size, spill=spill)
