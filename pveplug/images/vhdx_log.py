# SPDX-License-Identifier: Apache-2.0
"""The log of a VHDX: what a crash left to be done, applied while the file goes by.

The log is a ring of entries in whole 4 KiB sectors, each with a CRC-32C and a rising
sequence number. [MS-VHDX] 2.3.3: of all runs of good entries with consecutive numbers
whose last entry's tail lies in the run, that with the highest number is the active
sequence. Its descriptors say which 4 KiB of the file are replaced, or are zero.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Final

from pveplug.images.crc32c import sealed
from pveplug.units import KiB, MiB

MAX_LOG: Final = 16 * MiB
MAX_DESCRIPTORS: Final = 64 * 1024
SECTOR: Final = 4 * KiB
ENTRY: Final = struct.Struct("<4sIIIQII16sQQ")
"""signature, checksum, length, tail, sequence, descriptors, reserved, log guid,
flushed and last file offset."""
ZERO: Final = struct.Struct("<4s4xQQQ")
"""signature, length, file offset, sequence."""
DATA: Final = struct.Struct("<4s4s8sQQ")
"""signature, trailing and leading bytes, file offset, sequence."""
DESCRIPTOR: Final = 32
_ZEROES: Final = memoryview(bytes(256 * KiB))


class LogPatches:
    """What the log puts over the file: a sorted map of runs that don't overlap.

    Attributes:
        flushed: the file must be at least this long.
    """

    def __init__(self) -> None:
        self.flushed = 0
        self._starts: list[int] = []
        self._runs: list[tuple[int, bytes | None]] = []  # end, bytes or zeroes

    def __len__(self) -> int:
        return len(self._starts)

    def put(self, start: int, end: int, data: bytes | None) -> None:
        """Replace ``[start, end)``; later calls win over earlier ones."""
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._runs[low][0] <= start:
            low += 1
        high = bisect_left(self._starts, end)
        starts: list[int] = [start]
        runs: list[tuple[int, bytes | None]] = [(end, data)]
        if low < high:
            first, (_, old) = self._starts[low], self._runs[low]
            if first < start:
                starts.insert(0, first)
                runs.insert(0, (start, old and old[: start - first]))
            last, (stop, old) = self._starts[high - 1], self._runs[high - 1]
            if stop > end:
                starts.append(end)
                runs.append((stop, old and old[end - last :]))
        self._starts[low:high] = starts
        self._runs[low:high] = runs

    def at(self, offset: int, length: int) -> tuple[int, memoryview | None]:
        """See :class:`pveplug.images.stream.Patches`."""
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._runs[index][0]:
            start, (end, data) = self._starts[index], self._runs[index]
            length = min(length, end - offset)
            if data is None:
                length = min(length, len(_ZEROES))
                return length, _ZEROES[:length]
            low = offset - start
            return length, memoryview(data)[low : low + length]
        if index + 1 < len(self._starts):
            length = min(length, self._starts[index + 1] - offset)
        return length, None

    def apply(self, data: bytes, offset: int) -> bytes:
        """Return bytes of the file that were read before the log was."""
        out = bytearray()
        while len(out) < len(data):
            length, patch = self.at(offset + len(out), len(data) - len(out))
            out += data[len(out) : len(out) + length] if patch is None else patch
        return bytes(out)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One good entry; its bytes are in the ring, from ``at``."""

    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    descriptors: tuple[tuple[int, int, int], ...]
    """File offset, length, and -1 for zeroes; else where in the entry the descriptor
    is (upper half) and its data sector."""


class Log:
    """Finds the active sequence in a log and makes patches of it."""

    def __init__(self, ring: bytes, guid: bytes) -> None:
        self._ring = ring
        self._guid = guid
        self._summed = 0

    def replay(self) -> LogPatches | str:
        """Return the patches, or why there is nothing to replay."""
        found: dict[int, _Entry] = {}
        for at in range(0, len(self._ring), SECTOR):
            # The lengths of good entries add up to the ring; a hostile ring could
            # have every sector claim the whole of it.
            if self._summed > 4 * len(self._ring) + MiB:
                return "its entries overlap beyond reason"
            if entry := self._entry(at):
                found[at] = entry
        sequence = self._active(found)
        if not sequence:
            return "it holds no valid sequence of entries"
        patches = LogPatches()
        first = next(i for i, e in enumerate(sequence) if e.at == sequence[-1].tail)
        count = 0
        patches.flushed = sequence[-1].flushed
        for entry in sequence[first:]:
            content = self._cut(entry.at, entry.length)
            count += len(entry.descriptors)
            if count > MAX_DESCRIPTORS:
                return f"it has more than {MAX_DESCRIPTORS} descriptors"
            for offset, length, sector in entry.descriptors:
                data = None if sector < 0 else _data(content, sector)
                if length:
                    patches.put(offset, offset + length, data)
        return patches

    def _active(self, found: dict[int, _Entry]) -> list[_Entry]:
        """Return the active sequence, oldest entry first."""
        size = len(self._ring)
        follows: dict[int, int] = {}
        for at, entry in found.items():
            after = found.get((at + entry.length) % size)
            if after and after.sequence == entry.sequence + 1:
                follows[at] = after.at
        # Each entry has one that may follow, and numbers rise: chains, no rings.
        best: list[_Entry] = []
        firsts = found.keys() - set(follows.values())
        for at in sorted(firsts):
            run = [found[at]]
            while run[-1].at in follows:
                run.append(found[follows[run[-1].at]])
            # A run of entries that would overlap in the ring is cut to its newest.
            total, low = 0, len(run)
            while low and total + run[low - 1].length <= size:
                low -= 1
                total += run[low].length
            run = run[low:]
            if run[-1].tail in {entry.at for entry in run} and (
                not best or run[-1].sequence > best[-1].sequence
            ):
                best = run
        return best

    def _cut(self, at: int, length: int) -> bytes:
        end = at + length
        if end <= len(self._ring):
            return self._ring[at:end]
        return self._ring[at:] + self._ring[: end - len(self._ring)]

    def _entry(self, at: int) -> _Entry | None:
        """Return the entry that begins at ``at``, if a good one does."""
        fields = ENTRY.unpack_from(self._ring, at)
        signature, checksum, length, tail, sequence, count, _, guid, flushed, _ = fields
        tables = -(-(ENTRY.size + count * DESCRIPTOR) // SECTOR) * SECTOR
        if (
            signature != b"loge"
            or guid != self._guid
            or not sequence
            or length % SECTOR
            or not tables <= length <= len(self._ring)
            or tail % SECTOR
            or tail >= len(self._ring)
        ):
            return None
        content = self._cut(at, length)
        self._summed += length
        if sealed(content, 4) != checksum:
            return None
        descriptors: list[tuple[int, int, int]] = []
        sector = tables
        for index in range(count):
            start = ENTRY.size + index * DESCRIPTOR
            kind = content[start : start + 4]
            if kind == b"zero":
                _, size, offset, number = ZERO.unpack_from(content, start)
                descriptors.append((offset, size, -1))
            elif kind == b"desc":
                _, _, _, offset, number = DATA.unpack_from(content, start)
                size = SECTOR
                if not self._sector_is_good(content, sector, sequence):
                    return None
                descriptors.append((offset, SECTOR, start << 32 | sector))
                sector += SECTOR
            else:
                return None
            if number != sequence or offset % SECTOR or size % SECTOR:
                return None
            if offset + size >= 1 << 62:
                return None
        return _Entry(at, length, tail, sequence, flushed, tuple(descriptors))

    @staticmethod
    def _sector_is_good(content: bytes, at: int, sequence: int) -> bool:
        if content[at : at + 4] != b"data" or at + SECTOR > len(content):
            return False
        (high,) = struct.unpack_from("<I", content, at + 4)
        (low,) = struct.unpack_from("<I", content, at + SECTOR - 4)
        return bool(high << 32 | low == sequence)


def _data(content: bytes, sector: int) -> bytes:
    """Put a data sector together: its ends stand in the descriptor."""
    start, at = sector >> 32, sector & 0xFFFFFFFF
    _, trailing, leading, _, _ = DATA.unpack_from(content, start)
    return bytes(leading + content[at + 8 : at + SECTOR - 4] + trailing)
