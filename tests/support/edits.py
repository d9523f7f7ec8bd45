# SPDX-License-Identifier: Apache-2.0
"""Small inputs that become images: what fuzzers and property tests mutate.

An input is either an image itself, or edits on a good one::

    byte 0       0: the rest is the image; n: edits on image n - 1 follow
    an edit      1 byte what, 2 bytes where, then its bytes

Places count within the image's metadata first (``hot``), where they matter. Checksums
are mended afterwards, or every edit would end there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import struct
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from pveplug.images import detect
from pveplug.images.blockdelta import BlockDeltaWriter, DeltaHeader
from pveplug.images.detect import Format
from pveplug.images.stream import (
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    MemorySpill,
    feed,
    finish,
)
from pveplug.images.vmdk_set import VmdkSet
from tests.support import qcow2_images, vhd_images, vhdx_images, vmdk_images

MIB = 1 << 20


@dataclass(frozen=True)
class Base:
    """A good image, and where its metadata is: (start, length)."""

    image: bytes
    hot: tuple[tuple[int, int], ...]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def _vhdx() -> list[Base]:
    disk = (noise(4096) * 768)[: 3 * MIB]
    parent = uuid.UUID(int=77)
    present = [bool(i % 5) for i in range(3 * MIB // 512)]
    kinds = [
        vhdx_images.Vhdx(disk, "fnz"),
        vhdx_images.Vhdx(disk, "pfn", parent=parent, present=present),
        vhdx_images.Vhdx(
            disk,
            "nnp",
            parent=parent,
            present=present,
            order=("blocks", "bitmaps", "bat", "meta", "log"),
        ),
    ]
    images = [kind.make() for kind in kinds]
    log = vhdx_images.Vhdx(disk, "fnn")
    images.append(vhdx_images.with_pending_log(log))
    kinds.append(log)
    hot = []
    for kind in kinds:
        at = kind.places
        hot.append(
            (
                *((65536, 80), (131072, 80), (196608, 80), (262144, 80)),
                (at["meta"], 224),
                (at["meta"] + 65536, 256),
                *((at["bat"], 40), (at["bat"] + 8192 * 8, 8)),
                *((at["log"], 256), (at["log"] + 8192, 256)),
                (at.get("bitmaps", 0), 64),
            )
        )
    return [Base(image, place) for image, place in zip(images, hot, strict=True)]


def _vhd() -> list[Base]:
    disk = noise(5 * 4096)
    present = [i % 3 > 0 for i in range(40)]
    images = [
        vhd_images.sparse(disk, "d.d.d"),
        vhd_images.sparse(
            disk, "dd..d", present=present, parent=uuid.UUID(int=3), order=[4, 0, 1]
        ),
        vhd_images.sparse(disk, ".d.dd", table_last=True),
    ]
    return [Base(i, ((0, 2048), (len(i) - 1024, 1024))) for i in images]


def _raw() -> list[Base]:
    return [Base(i, ((len(i) - 512, 512),)) for i in (vhd_images.fixed(noise(4096)),)]


def _sparse() -> list[Base]:
    disk = noise(4096 * 20)
    child = vmdk_images.descriptor("monolithicSparse", parent=5, hint="p.vmdk")
    images = [
        vmdk_images.sparse(disk, "d.zdd...............", redundant=True),
        vmdk_images.sparse(
            disk, "d..d...........ddd..", text=child, order=[17, 3, 0], redundant=False
        ),
        vmdk_images.sparse(disk, "dd..................", tables_last=True),
    ]
    return [Base(i, ((0, 1100), (1024, 2048), (3072, 6000))) for i in images]


def _stream() -> list[Base]:
    disk = noise(512 * 8 * 6) + bytes(4096 * 600)
    states = "d.dd.d".ljust(606, ".")
    made = vmdk_images.stream(disk, states, grain=8)
    child = vmdk_images.descriptor("streamOptimized", parent=5)
    again = vmdk_images.stream(disk, states.replace(".", "z", 1), grain=8, text=child)
    return [
        Base(i, ((0, 1024), (65536, 64), (65536, len(i) - 65536)))
        for i in (made, again)
    ]


def _cowd() -> list[Base]:
    disk = noise(512 * 30)
    states = "d.dd.d".ljust(30, ".")
    images = [
        vmdk_images.cowd(disk, states),
        vmdk_images.cowd(disk, states, root=False, parent="x.vmdk"),
    ]
    return [Base(i, ((0, 40), (2048, 16), (2560, 200))) for i in images]


def _qcow2() -> list[Base]:
    disk = (noise(64) * 8) * 150
    states = ("dc.zcc.d" * 19)[:150]
    images = [
        qcow2_images.qcow2(disk, states, shuffle=False),
        qcow2_images.qcow2(disk, states, seed=4, backing="base.qcow2"),
        qcow2_images.qcow2(disk, states, seed=5, zstd=True),
        qcow2_images.qcow2(disk, states.replace("z", "."), version=2, seed=6),
    ]
    return [Base(i, ((0, 160), (1024, 1024), (0, len(i)))) for i in images]


def _delta() -> list[Base]:
    out = []
    for parent in (None, "before"):
        writer = BlockDeltaWriter()
        image = writer.begin(DeltaHeader(65536, "disk", "after", parent))
        image += writer.data(512, noise(1024)) + writer.zero(4096, 512)
        image += writer.data(8192, noise(512)) + writer.end()
        out.append(Base(image, ((0, 220), (0, len(image)))))
    return out


_MAKERS: dict[Format, Callable[[], list[Base]]] = {
    Format.RAW: _raw,
    Format.VMDK_SPARSE: _sparse,
    Format.VMDK_STREAM: _stream,
    Format.COWD: _cowd,
    Format.VHDX: _vhdx,
    Format.VHD: _vhd,
    Format.QCOW2: _qcow2,
    Format.BLOCK_DELTA: _delta,
}


@functools.cache
def bases(kind: Format) -> list[Base]:
    """Return the good images of a format."""
    return _MAKERS[kind]()


def image_of(kind: Format, data: bytes) -> bytes | bytearray:
    """Make the image that an input stands for."""
    if not data or not data[0]:
        return data[1:]
    base = bases(kind)[(data[0] - 1) % len(bases(kind))]
    image = bytearray(base.image)
    at = 1
    while at + 3 <= len(data):
        what = data[at]
        start, length = base.hot[(what >> 3) % len(base.hot)]
        where = start + int.from_bytes(data[at + 1 : at + 3], "big") % max(length, 1)
        at += 3
        size = (1, 2, 4, 8, 16, 0, 0, 0)[what & 7]
        new = data[at : at + size]
        at += len(new)
        if new:
            image[where : where + len(new)] = new
        elif what & 7 == 5:
            del image[where:]
        elif what & 7 == 6:
            del image[where : where + 512]
        elif what & 7 == 7:
            image[where:where] = image[where : where + 512]
    if kind is Format.VHDX:
        return image  # megabytes, of which nothing is mended
    return mended(kind, bytes(image))


def mended(kind: Format, image: bytes) -> bytes:
    """Put right checksums where an edit would only test them (not VHDX's: slow)."""
    out = bytearray(image)
    if kind in (Format.VHD, Format.RAW):
        for at, where, length in ((0, 64, 512), (512, 36, 1024), (-512, 64, 512)):
            start = at if at >= 0 else len(out) - 512
            part = out[start : start + length]
            if len(part) == length and part[:2] in (b"co", b"cx"):
                part[where : where + 4] = bytes(4)
                struct.pack_into(">I", out, start + where, ~sum(part) & 0xFFFFFFFF)
    elif kind is Format.BLOCK_DELTA and len(out) > 200:
        length = int.from_bytes(out[12:16], "little")
        at = 64 + length
        if at + 4 < len(out):
            struct.pack_into("<I", out, at, zlib.crc32(out[:at]))
        at += 4
        while at + 32 <= len(out):
            kind_of, _, _, size, _, _ = struct.unpack_from("<4sIQQII", out, at)
            body = size if kind_of == b"DATA" else 0
            if body and at + 32 + body <= len(out):
                struct.pack_into("<I", out, at + 24, zlib.crc32(out[at + 32 :][:body]))
            struct.pack_into("<I", out, at + 28, zlib.crc32(out[at : at + 28]))
            at += 32 + body
            if kind_of == b"END\0":
                out[at : at + 32] = hashlib.sha256(out[:at]).digest()
                break
    return bytes(out)


def set_of(data: bytes) -> dict[str, bytes]:
    """Make the files of a VMDK of several: byte 0 says in which order they come.

    The rest is the descriptor: itself after a zero, else edits of 3 bytes on one.
    """
    lines = ['RW 16 SPARSE "a.vmdk"', 'RW 30 VMFSSPARSE "b.vmdk"']
    lines += ['RW 8 FLAT "c.vmdk" 1', "RW 8 ZERO", 'RW 4 FLAT "c.vmdk" 9']
    text = bytearray(vmdk_images.descriptor("custom", lines, parent=9, hint="p.vmdk"))
    if data[1:2] == b"\0":
        text = bytearray(data[2:])
    else:
        for at in range(2, len(data) - 2, 3):
            where = int.from_bytes(data[at : at + 2], "big") % len(text)
            text[where] = data[at + 2]
    files = {
        "disk.vmdk": bytes(text),
        "a.vmdk": vmdk_images.sparse(noise(8192), "d.", text=b""),
        "b.vmdk": vmdk_images.cowd(noise(15360), "d.dd.d".ljust(30, ".")),
        "c.vmdk": noise(8192),
    }
    names = list(files)
    turn = data[0] % 4 if data else 0
    return {name: files[name] for name in names[turn:] + names[:turn]}


def run_set(files: dict[str, bytes], piece: int = 4096) -> None:
    """Read a VMDK of several files; its events must tile the disk.

    Raises:
        IntegrityError: it was refused, as it should be.
    """
    disk = VmdkSet(spill=MemorySpill(MIB))
    runs: list[tuple[int, int]] = []
    size = 0

    def take(events) -> None:
        nonlocal size
        while events or disk.pending:
            for event in events:
                if isinstance(event, ImageInfo):
                    size = event.size or 0
                elif isinstance(event, GuestData | GuestZero | GuestParent):
                    runs.append((event.offset, event.offset + event.length))
            events = disk.receive_data(b"") if disk.pending else []

    for name, content in files.items():
        disk.begin_file(name, len(content))
        for at in range(0, len(content), piece):
            take(disk.receive_data(content[at : at + piece]))
        take(disk.end_file())
    take(disk.receive_eof())
    runs.sort()
    assert [low for low, _ in runs] == [0, *(high for _, high in runs[:-1])]
    assert runs[-1][1] == size


def run(kind: Format, image: bytes | bytearray, piece: int = 65536) -> ImageInfo:
    """Read an image; check what every result must be, without keeping it.

    Raises:
        IntegrityError: the reader refused it, as it should.
    """
    reader = detect.reader_for(kind, file_size=len(image), spill=MemorySpill(4 * MIB))
    size, end, told = 0, None, 0
    runs: list[tuple[int, int]] = []

    def take(events) -> None:
        nonlocal size, end, told
        made = 0
        for event in events:
            if isinstance(event, ImageInfo):
                size = event.size if event.size is not None else 1 << 62
            elif isinstance(event, ImageEnd):
                end = event.info
            elif isinstance(event, GuestData | GuestZero | GuestParent):
                assert 0 <= event.offset
                assert 0 < event.length
                assert event.offset + event.length <= size
                told += event.length
                runs.append((event.offset, event.offset + event.length))
                made += event.length if isinstance(event, GuestData) else 200
        assert made <= 40 * MIB, "one call made too much"

    for at in range(0, len(image), piece):
        for events in feed(reader, image[at : at + piece]):
            take(events)
    for events in finish(reader):
        take(events)
    assert end is not None
    assert end.size == told
    runs.sort()
    assert all(low[1] == high[0] for low, high in itertools.pairwise(runs))
    return end
