# SPDX-License-Identifier: Apache-2.0
"""A forward-only reader of the qcow2 images that our writer makes.

The file comes in pieces of any size at rising offsets; what lies between them was a
hole and reads as zeroes (a dense stream has no holes: the same thing). The machine
knows at each moment what the file holds at its position::

    HEADER ─► NAMES ─► L1 ─► TABLE ─► DATA ─┬─► REFCOUNTS ─► END
                               ▲            │
                               └────────────┘ while there are tables

Metadata is gathered up to the end of its region and then judged; data goes out as it
came, without a copy. The image is ours, so every number in it can be foreseen from
the numbers before it, and one that differs is refused: no table is read twice, none
lies behind us, nothing is allocated on a stranger's word beyond 2 MiB of L1 table.
"""

from __future__ import annotations

import enum
import sys
from array import array
from dataclasses import dataclass
from typing import Final

from pveplug.errors import IntegrityError, LocalProtocolError, TruncatedError
from pveplug.extents import Extent, Kind
from pveplug.images import qcow2_layout as qcow2
from pveplug.images.clusters import MAX_SIZE
from pveplug.units import SECTOR


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The first event: the disk's virtual size and the parent's image, if any."""

    size: int
    backing: str | None
    cluster_bits: int
    file_size: int
    """Where the file must end, known this early from the refcount table's place."""


@dataclass(frozen=True, slots=True)
class GuestData:
    """Bytes of the disk; ``data`` is a view of the buffer given to receive_data()."""

    offset: int
    data: memoryview

    @property
    def length(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class GuestZero:
    """A run of the disk that reads as zeroes.

    ``kind`` says what the image has there: DATA for a data cluster of which these
    bytes weren't sent because they are zero, ZERO for a zero cluster, CLEAN for
    unallocated space (only with ``zero_unallocated``).
    """

    offset: int
    length: int
    kind: Kind


Event = ImageHeader | GuestData | GuestZero


_UNKNOWN: Final = qcow2.Layout(1, qcow2.MIN_CLUSTER_BITS, 0)


class _State(enum.Enum):
    HEADER = "header"
    NAMES = "header's names"
    L1 = "L1 table"
    TABLE = "L2 table"
    DATA = "data clusters"
    REFCOUNTS = "refcounts"
    END = "end"


class Qcow2StreamReader:
    """Turns one image's stream into events, in guest order.

    Attributes:
        position: the end of the last piece received, in the file.
    """

    def __init__(self, *, name: str = "image", zero_unallocated: bool = False) -> None:
        """Make a reader for one image.

        Args:
            name: what errors call the image, e.g. its path in the backup.
            zero_unallocated: tell unallocated space of an image without a backing
                file as GuestZero too, for a target that isn't known to be zero.
        """
        self._name = name
        self._zero_unallocated = zero_unallocated
        self._failure: str | None = None
        self._layout = _UNKNOWN
        self._header: ImageHeader | None = None
        self._overlay = False
        self.position = 0
        self._state = _State.HEADER
        self._start = 0  # where the present region of metadata begins
        self._region = bytearray(qcow2.HEADER.size)  # gathers it
        self._l1: array[int] = array("Q")
        self._table = -1  # index in the L1 table of the present L2 table
        self._segments: list[Extent] = []  # of that table, whole clusters, in order
        self._segment = 0
        self._done = 0  # bytes of the present data segment that have passed
        self._refcount_cluster = 0

    @property
    def header(self) -> ImageHeader | None:
        """What the header said, None until it has been read."""
        return self._header

    @property
    def complete(self) -> bool:
        """Whether everything up to the file's last byte has arrived."""
        return self._state is _State.END

    def receive_data(
        self, file_offset: int, data: bytes | bytearray | memoryview
    ) -> list[Event]:
        """Take a piece of the file; return what it told.

        Views in the events live as long as the caller leaves ``data`` unchanged.

        Raises:
            IntegrityError: the stream isn't an image of ours, or goes backwards; the
                reader is finished.
        """
        if self._failure:
            raise IntegrityError(self._failure)
        out: list[Event] = []
        view = memoryview(data)
        try:
            if not len(view):
                return out
            if file_offset < self.position:
                raise self._error(file_offset, f"{self.position} bytes have passed")
            self._take(file_offset - self.position, None, out)
            self._take(len(view), view, out)
        except IntegrityError as error:
            self._fail(error)
            raise
        return out

    def receive_eof(self, file_size: int | None = None) -> list[Event]:
        """Note the end of the stream.

        Args:
            file_size: the length that the file's attributes claim, where known.

        Returns: no events: a complete image has told everything before its last byte.

        Raises:
            IntegrityError: the image isn't complete.
        """
        if self._failure:
            raise IntegrityError(self._failure)
        try:
            if self._state is not _State.END or not self._header:
                size = self._header.file_size if self._header else None
                at = self.position
                raise TruncatedError(
                    f"{self._name}: qcow2 at byte {at}: the stream ends here"
                    f"{f' of {size}' if size else ''}, in the {self._state.value}",
                    offset=at,
                )
            if file_size is not None and file_size != self._header.file_size:
                raise self._error(
                    self._header.file_size,
                    f"the image ends here, its attributes say at {file_size}",
                )
        except IntegrityError as error:
            self._fail(error)
            raise
        return []

    def _error(self, offset: int, reason: str) -> IntegrityError:
        return IntegrityError(
            f"{self._name}: qcow2 at byte {offset}: {reason}", offset=offset
        )

    def _fail(self, error: IntegrityError) -> None:
        """Remember the failure and let go of everything else."""
        self._failure = str(error)
        self._region = bytearray()
        self._l1 = array("Q")
        self._segments = []

    def _take(self, length: int, view: memoryview | None, out: list[Event]) -> None:
        """Pass ``length`` bytes of the file; without a view they are a hole."""
        taken = 0
        while taken < length:
            if self._state is _State.END:
                raise self._error(self.position, "the image ends, the stream goes on")
            if self._state is _State.DATA:
                used = self._take_data(length - taken, view and view[taken:], out)
                self.position += used
                if self._segment == len(self._segments):
                    self._next_table(out)
            else:
                low = self.position - self._start
                used = min(length - taken, len(self._region) - low)
                if view is not None:
                    self._region[low : low + used] = view[taken : taken + used]
                self.position += used
                if self.position == self._start + len(self._region):
                    self._judge(out)
            taken += used

    # --- data ----------------------------------------------------------------------

    def _take_data(self, length: int, view: memoryview | None, out: list[Event]) -> int:
        """Pass bytes of the present data segment; return how many."""
        segment = self._segments[self._segment]
        used = min(length, segment.length - self._done)
        guest = segment.offset + self._done
        inside = max(min(used, self._layout.size - guest), 0)
        if inside:
            out.append(
                GuestZero(guest, inside, Kind.DATA)
                if view is None
                else GuestData(guest, view[:inside])
            )
        if view is not None and any(view[inside:used]):
            raise self._error(
                self.position + inside, "bytes after the end of the disk are not zero"
            )
        self._done += used
        if self._done == segment.length:
            self._done = 0
            self._segment += 1
            self._tell_zeroes(out)
        return used

    def _tell_zeroes(self, out: list[Event]) -> None:
        """Tell the segments without data that come next."""
        while self._segment < len(self._segments):
            segment = self._segments[self._segment]
            if segment.kind is Kind.DATA:
                return
            length = min(segment.end, self._layout.size) - segment.offset
            out.append(GuestZero(segment.offset, length, segment.kind))
            self._segment += 1

    # --- metadata ------------------------------------------------------------------

    def _gather(self, state: _State, length: int) -> None:
        """Begin a region of metadata at the present position."""
        self._state = state
        self._start = self.position
        self._region = bytearray(length)

    def _judge(self, out: list[Event]) -> None:
        """Read the region of metadata that is complete now; move to what follows."""
        match self._state:
            case _State.HEADER:
                self._judge_header()
            case _State.NAMES:
                self._judge_names(out)
            case _State.L1:
                self._judge_l1(out)
            case _State.TABLE:
                self._judge_table(out)
            case _State.REFCOUNTS:
                self._judge_refcounts()
            case _State.DATA | _State.END:  # they gather nothing
                raise AssertionError(self._state)

    def _judge_header(self) -> None:
        """Take from the fixed part what everything else follows from."""
        fields = qcow2.HEADER.unpack(self._region)
        magic, version, _, _, bits, size = fields[:6]
        if magic != qcow2.MAGIC:
            raise self._error(0, "this is not a qcow2 image")
        if version != qcow2.VERSION:
            raise self._error(4, f"version {version} is not one of ours")
        if not qcow2.MIN_CLUSTER_BITS <= bits <= qcow2.MAX_CLUSTER_BITS:
            raise self._error(20, f"clusters of 2^{bits} bytes")
        if not 0 < size <= MAX_SIZE or size % SECTOR:
            raise self._error(24, f"a disk of {size} bytes")
        l1_clusters = qcow2.l1_clusters(size, bits)
        if l1_clusters << bits > max(qcow2.MAX_L1_BYTES, 1 << bits):
            raise self._error(36, f"an L1 table of {l1_clusters << bits} bytes")
        refcounts = fields[9]
        body, rest = divmod(refcounts, 1 << bits)
        least = 1 + l1_clusters
        most = least + qcow2.l1_entries(size, bits) + ((size - 1) >> bits) + 1
        if rest or not least <= body <= most:
            raise self._error(48, f"a refcount table at byte {refcounts}")
        self._layout = qcow2.Layout(size, bits, body)
        # The names follow in the same cluster.
        self._state = _State.NAMES
        self._region.extend(bytes((1 << bits) - len(self._region)))

    def _judge_names(self, out: list[Event]) -> None:
        """Read the backing file's name; all else must be what we would have written."""
        at, length = qcow2.HEADER.unpack_from(self._region)[2:4]
        backing: str | None = None
        if at or length:
            if not 0 < length <= qcow2.MAX_BACKING_NAME or at > len(self._region):
                raise self._error(8, f"a backing name of {length} bytes at {at}")
            try:
                backing = self._region[at : at + length].decode()
            except UnicodeDecodeError:
                raise self._error(at, "the backing name is not UTF-8") from None
        try:
            expected = qcow2.header(self._layout, backing)
        except LocalProtocolError as error:
            raise self._error(at, str(error)) from None
        self._expect(expected.ljust(len(self._region), b"\0"), "header")
        self._header = ImageHeader(
            self._layout.size,
            backing,
            self._layout.cluster_bits,
            self._layout.file_size,
        )
        self._overlay = backing is not None
        out.append(self._header)
        bits = self._layout.cluster_bits
        self._gather(_State.L1, qcow2.l1_clusters(self._layout.size, bits) << bits)

    def _judge_l1(self, out: list[Event]) -> None:
        """Take the places of the L2 tables, which must rise."""
        table, count = _entries(self._region), self._l1_entries
        last = self.position - 1
        for index, entry in enumerate(table):
            if not entry:
                continue
            place = entry ^ qcow2.COPIED
            if (
                index >= count
                or not last < place < self._layout.refcount_table
                or place % self._layout.cluster_size
            ):
                raise self._error(
                    self._start + index * qcow2.ENTRY, f"L1 entry 0x{entry:016x}"
                )
            last = place
        self._l1 = table[:count]
        self._next_table(out)

    @property
    def _l1_entries(self) -> int:
        return qcow2.l1_entries(self._layout.size, self._layout.cluster_bits)

    def _next_table(self, out: list[Event]) -> None:
        """Move to the next L2 table, which begins here, or to the refcounts."""
        bits = self._layout.cluster_bits
        per_table = 1 << (2 * bits - 3)  # bytes of the disk
        first = index = self._table + 1
        while index < len(self._l1) and not self._l1[index]:
            index += 1
        self._table = index
        if first < index and self._tells_unallocated:
            start = first * per_table
            end = min(index * per_table, self._layout.size)
            out.append(GuestZero(start, end - start, Kind.CLEAN))
        if index < len(self._l1):
            place, what = self._l1[index] ^ qcow2.COPIED, f"L2 table {index}"
            state = _State.TABLE
        else:
            place, what = self._layout.refcount_table, "the refcount table"
            state = _State.REFCOUNTS
        if place != self.position:
            raise self._error(
                self.position, f"{what} belongs here, but is said to be at {place}"
            )
        self._gather(state, 1 << bits)

    @property
    def _tells_unallocated(self) -> bool:
        return self._zero_unallocated and not self._overlay

    def _judge_table(self, out: list[Event]) -> None:
        """Turn an L2 table into segments; its data clusters follow it in order."""
        bits, size = self._layout.cluster_bits, self._layout.cluster_size
        table = _entries(self._region)
        first = self._table * len(table)  # cluster of the disk
        clusters = min(len(table), ((self._layout.size - 1) >> bits) + 1 - first)
        segments: list[Extent] = []
        start, kind = 0, Kind.CLEAN
        expected = self.position | qcow2.COPIED

        def turn(index: int, to: Kind) -> None:
            """Close the run before ``index`` and begin one of another kind."""
            nonlocal start, kind
            if kind is not Kind.CLEAN or self._tells_unallocated:
                if start < index:
                    length = (index - start) << bits
                    segments.append(Extent((first + start) << bits, length, kind))
            start, kind = index, to

        # Most of an increment's table is zero: only its used sectors are looked at.
        sectors = qcow2.used_sectors(self._region, 0)
        if not sectors:
            raise self._error(self._start, f"L2 table {self._table} is empty or lost")
        at = 0
        for low, high in sectors:
            if at < low // qcow2.ENTRY and kind is not Kind.CLEAN:
                turn(at, Kind.CLEAN)
            at = high // qcow2.ENTRY
            for index in range(low // qcow2.ENTRY, at):
                entry = table[index]
                if entry == expected:
                    now = Kind.DATA
                    expected += size
                elif not entry:
                    now = Kind.CLEAN
                elif entry == qcow2.ZERO_FLAG and self._overlay:
                    now = Kind.ZERO
                else:
                    raise self._bad_entry(index, entry, expected)
                if entry and index >= clusters:
                    raise self._bad_entry(index, entry, 0)
                if now is not kind:
                    turn(index, now)
        if at < clusters and kind is not Kind.CLEAN:
            turn(at, Kind.CLEAN)
        turn(clusters, Kind.CLEAN)
        data_end = expected ^ qcow2.COPIED
        if data_end > self._layout.refcount_table:
            raise self._error(
                self._start, f"L2 table {self._table} has data up to {data_end}"
            )
        self._segments, self._segment, self._done = segments, 0, 0
        self._region = bytearray()
        self._state = _State.DATA
        self._tell_zeroes(out)
        if self._segment == len(segments):
            self._next_table(out)

    def _bad_entry(self, index: int, entry: int, expected: int) -> IntegrityError:
        if entry & qcow2.COMPRESSED:
            reason = "a compressed cluster"
        elif expected == 0:
            reason = "a cluster beyond the end of the disk"
        else:
            reason = f"0x{expected:016x} would follow"
        return self._error(
            self._start + index * qcow2.ENTRY,
            f"entry {index} of L2 table {self._table} is 0x{entry:016x}: {reason}",
        )

    def _judge_refcounts(self) -> None:
        """Every cluster is used once; anything else is not our file."""
        self._expect(
            self._layout.refcount_cluster(self._refcount_cluster), "refcount area"
        )
        self._refcount_cluster += 1
        if self._refcount_cluster < sum(self._layout.refcount_clusters):
            self._gather(_State.REFCOUNTS, self._layout.cluster_size)
        else:
            self._region = bytearray()
            self._state = _State.END

    def _expect(self, content: bytes, what: str) -> None:
        """Compare the region with what it must be."""
        if self._region == content:
            return
        at = next(
            index
            for index, (got, wanted) in enumerate(
                zip(self._region, content, strict=True)
            )
            if got != wanted
        )
        raise self._error(
            self._start + at,
            f"the {what} has 0x{self._region[at]:02x} instead of 0x{content[at]:02x}",
        )


def _entries(region: bytearray) -> array[int]:
    """Return a table's 64-bit big-endian entries."""
    table = array("Q", bytes(region))
    if sys.byteorder == "little":
        table.byteswap()
    return table
