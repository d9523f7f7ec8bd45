# SPDX-License-Identifier: Apache-2.0
"""Crafts VHDX files: what qemu-img can't write, in any order, with a log.

Written from [MS-VHDX] alone, with a CRC of its own, so that it can disagree with the
reader.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
ONE = uuid.UUID(int=1)
BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
META = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
PAGE83 = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
LOGICAL = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
PHYSICAL = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le
LOG_GUID = uuid.UUID("11111111-2222-3333-4444-555555555555").bytes_le


def _crc_table():
    table = []
    for number in range(256):
        for _ in range(8):
            number = (number >> 1) ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


TABLE = _crc_table()


def crc(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = TABLE[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def sealed(data: bytes, at: int = 4) -> bytes:
    """Put the checksum in."""
    empty = data[:at] + bytes(4) + data[at + 4 :]
    return empty[:at] + struct.pack("<I", crc(empty)) + empty[at + 4 :]


@dataclass
class Vhdx:
    """A file to be.

    Attributes:
        states: for each block ``n`` not present, ``u`` undefined, ``z`` zero,
            ``m`` unmapped, ``f`` fully or ``p`` partially present.
        present: for partial blocks, a bool for each sector of the disk.
        order: of the parts of the file behind its first MiB.
        blocks: file order of the blocks with data.
    """

    disk: bytes
    states: str
    block: int = MIB
    sector: int = 512
    guid: uuid.UUID = ONE
    parent: uuid.UUID | None = None
    present: Sequence[bool] = ()
    order: Sequence[str] = ("log", "meta", "bat", "bitmaps", "blocks")
    blocks: Sequence[int] | None = None
    fixed: bool = False
    sequence: tuple[int, int] = (7, 8)
    log: bytes = b""
    size: int | None = None  # where the disk isn't as long as ``disk``
    places: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.sector // self.block

    def metadata(self) -> bytes:
        flags = self.fixed | (2 if self.parent else 0)
        items = [
            (PARAMETERS, struct.pack("<II", self.block, flags), 4),
            (SIZE, struct.pack("<Q", self.size or len(self.disk)), 6),
            (PAGE83, uuid.UUID(int=9).bytes_le, 6),
            (LOGICAL, struct.pack("<I", self.sector), 6),
            (PHYSICAL, struct.pack("<I", 4096), 6),
        ]
        if self.parent:
            pairs = {
                "parent_linkage": f"{{{self.parent}}}".upper(),
                "relative_path": ".\\parent.vhdx",
            }
            body = b""
            entries = b""
            at = 20 + 12 * len(pairs)
            for key, value in pairs.items():
                k, v = key.encode("utf-16-le"), value.encode("utf-16-le")
                entries += struct.pack("<IIHH", at, at + len(k), len(k), len(v))
                body += k + v
                at += len(k) + len(v)
            items.append(
                (
                    LOCATOR,
                    struct.pack("<16sHH", LOCATOR_TYPE, 0, len(pairs)) + entries + body,
                    4,
                )
            )
        table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        body, at = b"", 65536
        for guid, content, flags in items:
            table += struct.pack("<16sIIII", guid, at, len(content), flags, 0)
            body += content
            at += len(content)
        return (table.ljust(65536, b"\0") + body).ljust(MIB, b"\0")

    def make(self) -> bytes:
        count = -(-(self.size or len(self.disk)) // self.block)
        assert len(self.states) == count
        chunks = -(-count // self.ratio)
        per = len(range(0, chunks)) * (self.ratio + 1)
        bat = [0] * per
        out = bytearray(MIB)
        with_data = [i for i, state in enumerate(self.states) if state in "fp"]
        order = [i for i in (self.blocks or with_data) if i in with_data]
        order += [i for i in with_data if i not in order]
        bat_size = -(-len(bat) * 8 // MIB) * MIB
        for part in self.order:
            self.places[part] = len(out)
            if part == "log":
                out += self.log.ljust(MIB, b"\0")
            elif part == "meta":
                out += self.metadata()
            elif part == "bat":
                out += bytes(bat_size)
            elif part == "bitmaps" and self.parent:
                for chunk in range(chunks):
                    mine = self.states[chunk * self.ratio : (chunk + 1) * self.ratio]
                    if "p" not in mine:
                        continue
                    bits = bytearray(MIB)
                    first = chunk << 23
                    for number in range(min(len(self.present) - first, 1 << 23)):
                        if self.present[first + number]:
                            bits[number >> 3] |= 1 << (number & 7)
                    bat[chunk * (self.ratio + 1) + self.ratio] = len(out) | 6
                    out += bits
            elif part == "blocks":
                for index in order:
                    state = 6 if self.states[index] == "f" else 7
                    bat[index + index // self.ratio] = len(out) | state
                    start = index * self.block
                    out += self.disk[start : start + self.block].ljust(
                        self.block, b"\0"
                    )
        for index, state in enumerate(self.states):
            if state in "nuzm":
                bat[index + index // self.ratio] = "nuzm".index(state)
        at = self.places["bat"]
        out[at : at + len(bat) * 8] = struct.pack(f"<{len(bat)}Q", *bat)
        out[:8] = b"vhdxfile"
        for number, sequence in enumerate(self.sequence):
            head = struct.pack(
                "<4sIQ16s16s16sHHIQ",
                b"head",
                0,
                sequence,
                uuid.UUID(int=5).bytes_le,
                self.guid.bytes_le,
                LOG_GUID if self.log else bytes(16),
                0,
                1,
                MIB,
                self.places.get("log", 0),
            )
            start = 65536 * (number + 1)
            out[start : start + 4096] = sealed(head.ljust(4096, b"\0"))
        regions = struct.pack("<4sIII", b"regi", 0, 2, 0)
        regions += struct.pack("<16sQII", BAT, at, bat_size, 1)
        regions += struct.pack("<16sQII", META, self.places["meta"], MIB, 1)
        for start in (3 * 65536, 4 * 65536):
            out[start : start + 65536] = sealed(regions.ljust(65536, b"\0"))
        return bytes(out)

    def told(self, parent: bytes) -> bytes:
        """What the disk is, on a parent."""
        out = bytearray(len(self.disk))
        for index, state in enumerate(self.states):
            low, high = index * self.block, min((index + 1) * self.block, len(out))
            if state == "f":
                out[low:high] = self.disk[low:high]
            elif state == "p":
                for at in range(low, high, self.sector):
                    source = self.disk if self.present[at // self.sector] else parent
                    out[at : at + self.sector] = source[at : at + self.sector].ljust(
                        self.sector, b"\0"
                    )
            elif state == "n" and self.parent:
                out[low:high] = parent[low:high].ljust(high - low, b"\0")
        return bytes(out)


def log_entry(
    updates: Sequence[tuple[int, bytes | int]],
    sequence: int,
    tail: int,
    flushed: int,
    guid: bytes = LOG_GUID,
) -> bytes:
    """One entry: 4 KiB of bytes, or a length of zeroes, at file offsets."""
    descriptors, sectors = b"", b""
    for offset, what in updates:
        if isinstance(what, int):
            descriptors += struct.pack("<4s4xQQQ", b"zero", what, offset, sequence)
            continue
        descriptors += struct.pack(
            "<4s4s8sQQ", b"desc", what[-4:], what[:8], offset, sequence
        )
        high, low = sequence >> 32, sequence & 0xFFFFFFFF
        sectors += struct.pack("<4sI", b"data", high) + what[8:-4]
        sectors += struct.pack("<I", low)
    head = -(-(64 + len(descriptors)) // 4096) * 4096
    length = head + len(sectors)
    entry = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        length,
        tail,
        sequence,
        len(updates),
        0,
        guid,
        flushed,
        flushed,
    )
    return sealed((entry + descriptors).ljust(head, b"\0") + sectors)


def log_of(entries: Sequence[bytes], start: int = 0, size: int = MIB) -> bytes:
    """Put entries into the ring from ``start``, wrapping around."""
    ring = bytearray(size)
    at = start
    for byte_run in entries:
        for low in range(0, len(byte_run), 4096):
            ring[at : at + 4096] = byte_run[low : low + 4096]
            at = (at + 4096) % size
    return bytes(ring)


def with_pending_log(image: Vhdx, *, start: int = 0, old: bool = True) -> bytes:
    """Make the file as a crash leaves it: the BAT's changes are only in the log.

    ``old`` puts an older sequence in front that must not be applied.
    """
    image.log = b"\1"
    done = image.make()
    bat, log = image.places["bat"], image.places["log"]
    page = done[bat : bat + 4096]
    wrong = bytes(4096)
    entries = [
        log_entry([(bat, wrong)], 40, start, len(done)),
        log_entry([(bat, page)], 41, start, len(done)),
    ]
    ring = bytearray(log_of(entries, start))
    if old:
        at = (start + 5 * 8192) % MIB
        stale = log_entry([(bat, wrong)], 12, at, len(done))
        ring = bytearray(log_of([stale], at))
        for low, byte in enumerate(log_of(entries, start)):
            if byte:
                ring[low] = byte
    out = bytearray(done)
    out[log : log + MIB] = ring
    out[bat : bat + 4096] = wrong
    return bytes(out)
