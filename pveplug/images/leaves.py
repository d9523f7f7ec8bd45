# SPDX-License-Identifier: Apache-2.0
"""What a disk held at a job: a keyed digest of each 64 KiB, in files that build a row.

One file describes exactly one image of one job. Beside a Full's it is complete; beside
an overlay's it holds the clusters of that overlay and names the job below::

    image   F1 ◄──── I2 ◄──── I3          what I3's row says of a cluster is what the
    file    F1 ◄──── I2 ◄──── I3          newest of the three says that knows it

A cluster is *data* (its BLAKE3-128 is there) or *zero*; what no file of the row tells
is *unknown*, and unknown is never "unchanged". The format::

    PHLD, version, cluster bits, 0, length of the header     12 bytes
    header                                                   JSON
    first cluster (u32), count (u32), count x 16 bytes       … repeated, rising
    BLAKE3 over all that, keyed                              32 bytes

The count's highest bit marks a run of zero clusters, which has no digests. The digests
are keyed as well: who reads the files learns nothing about what a disk holds. They are
taken over the cluster's BLAKE3-256, see :mod:`pveplug.images.clusterhash` (in version 1
over its bytes; such a file is not read: the disk is sent whole once). A file
names its parent *and* the parent's last 32 bytes, so that another file cannot take the
place of one in the row. It costs 16 bytes per 64 KiB, on disk; in memory a
row is looked at through a window that moves over the disk once.

blake3 releases the GIL; all of this may run in a worker thread, one at a time.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.images.clusterhash import ClusterCutter
from pveplug.images.clusters import MAX_SIZE, ClusterMap, set_runs
from pveplug.units import CLUSTER, KiB, MiB

DIGEST: Final = 16
MAC: Final = 32
KEY: Final = 32
MAX_ROW: Final = 128
"""A row of more files is not followed; the store merges long before that."""
WINDOW: Final = 16 * KiB
"""Clusters looked at together: 1 GiB of disk, 272 KiB of memory."""

ZERO: Final = 1
DATA: Final = 2
"""Kinds of clusters in a window; 0 is unknown."""

_BITS: Final = CLUSTER.bit_length() - 1
_HEAD: Final = struct.Struct(">4sBBHI")
_MAGIC: Final = b"PHLD"
_VERSION: Final = 2
_MAX_HEADER: Final = 16 * KiB
_RUN: Final = struct.Struct(">II")
_ZERO_RUN: Final = 1 << 31
_MAX_RUN: Final = 4096  # data clusters in one run: 64 KiB of digests
_NOT_ZERO: Final = re.compile(rb"[^\x01]+")
_ALIKE: Final = re.compile(rb"\x00+|\x01+|\x02+")


class Readable(Protocol):
    """A file that is open for reading, as far as it is needed here."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """What is made of the node's secret."""

    leaf: bytes = dataclasses.field(repr=False)
    file: bytes = dataclasses.field(repr=False)
    name: str
    """Tells one secret's files from another's, and nothing of the secret."""

    @classmethod
    def of(cls, secret: bytes) -> Keys:
        """Derive them from the 32 secret bytes."""

        def derived(purpose: bytes, length: int) -> bytes:
            return blake3(b"pveplug leaves " + purpose, key=secret).digest(length)

        return cls(
            derived(b"leaf", KEY), derived(b"file", KEY), derived(b"name", 8).hex()
        )

    def leaf_of(self, found: bytes) -> bytes:
        """Return the digest of a leaf, from its cluster's hash."""
        return blake3(found, key=self.leaf).digest(DIGEST)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file is about."""

    vm: str
    """Which VM, as its images are filed: id and SMBIOS UUID."""
    chain: str
    disk: str
    job: str
    """Unique name of the job that sent the image."""
    level: str
    size: int
    """Of the disk at that job, in bytes."""
    began: int
    """Seconds since the epoch; only the order in which files are forgotten."""
    key: str
    """The name of the keys it was made with."""
    parent: str | None = None
    """The job whose image lies below; None: the file is complete."""
    parent_mac: str = ""
    depth: int = 0
    """How many files lie below."""

    def to_bytes(self) -> bytes:
        """Return the beginning of a file."""
        text = json.dumps(dataclasses.asdict(self)).encode()
        return _HEAD.pack(_MAGIC, _VERSION, _BITS, 0, len(text)) + text


def read_header(file: Readable) -> tuple[Header, bytes]:
    """Read a file's beginning; return what it says and its bytes. Nothing is proven.

    Raises:
        IntegrityError: it isn't one.
    """
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise IntegrityError("it is cut short")
    magic, version, bits, nought, length = _HEAD.unpack(head)
    if (magic, version, bits, nought) != (_MAGIC, _VERSION, _BITS, 0):
        raise IntegrityError("it is not in a known format")
    if length > _MAX_HEADER or len(text := file.read(length)) != length:
        raise IntegrityError("it is cut short")
    try:
        return _header(json.loads(text)), head + text
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"its header is damaged: {error}") from error


def _header(values: dict[str, Any]) -> Header:
    header = Header(**values)
    texts = (header.vm, header.chain, header.disk, header.job, header.level)
    numbers = (header.size, header.began, header.depth)
    if (
        not all(isinstance(text, str) for text in (*texts, header.key))
        or not all(isinstance(number, int) for number in numbers)
        or not isinstance(header.parent_mac, str)
        or not isinstance(header.parent, str | None)
    ):
        raise TypeError(f"a field is of another type: {values}")
    if not 0 < header.size <= MAX_SIZE or not 0 <= header.depth <= MAX_ROW:
        raise ValueError(f"size {header.size}, depth {header.depth}")
    if (header.parent is None) != (header.depth == 0):
        raise ValueError(f"parent {header.parent}, depth {header.depth}")
    return header


def verify(file: Readable, length: int, keys: Keys) -> tuple[Header, bytes]:
    """Read a file of ``length`` bytes to its end; return its header and its MAC.

    Raises:
        IntegrityError: it was made with another key, or any byte of it differs.
    """
    header, raw = read_header(file)
    if header.key != keys.name:
        raise IntegrityError("it was made with another key")
    left = length - len(raw) - MAC
    if left < 0:
        raise IntegrityError("it is cut short")
    seen = blake3(raw, key=keys.file)
    while left:
        part = file.read(min(left, MiB))
        if not part:
            raise IntegrityError("it is cut short")
        seen.update(part)
        left -= len(part)
    mac = file.read(MAC)
    if not hmac.compare_digest(mac, seen.digest(MAC)):
        raise IntegrityError("it is damaged")
    return header, mac


class Cutter:
    """Cuts a disk's bytes, as they come in order, into leaves."""

    def __init__(self, size: int, keys: Keys) -> None:
        self._clusters = ClusterCutter(size)
        self._keys = keys

    def take(
        self, offset: int, buffer: bytearray, start: int, length: int
    ) -> Iterator[tuple[int, bytes | None]]:
        """Yield ``(cluster, digest)`` of each leaf completed; None for one of zeroes.

        Args:
            offset: of the bytes on the disk; ``start`` and ``length``: in the buffer.

        Raises:
            IntegrityError: a leaf doesn't go on where it was left.
        """
        for cluster, found in self._clusters.take(offset, buffer, start, length):
            yield cluster, None if found is None else self._keys.leaf_of(found)


class RunWriter:
    """Writes one file, runs rising; ``write`` takes its bytes in order."""

    def __init__(
        self, header: Header, keys: Keys, write: Callable[[bytes], object]
    ) -> None:
        self._write = write
        self._mac = blake3(key=keys.file)
        self._first = self._count = 0
        self._digests = bytearray()
        self._zero = False
        self._put(header.to_bytes())

    def _put(self, content: bytes) -> None:
        self._mac.update(content)
        self._write(content)

    def data(self, first: int, digests: bytes | bytearray) -> None:
        """Add data clusters from ``first`` on."""
        if (
            len(digests) == DIGEST
            and first == self._first + self._count
            and 0 < self._count < _MAX_RUN
            and not self._zero
        ):  # the next one, as nearly always while an image is sent
            self._digests += digests
            self._count += 1
            return
        at = 0
        while at < len(digests):
            room = _MAX_RUN - self._count
            if self._zero or first != self._first + self._count or not room:
                self._flush()
                self._first, room = first, _MAX_RUN
            part = digests[at : at + room * DIGEST]
            self._digests += part
            self._count += len(part) // DIGEST
            first += len(part) // DIGEST
            at += len(part)

    def zeroes(self, first: int, count: int) -> None:
        """Add zero clusters."""
        if not self._zero or first != self._first + self._count:
            self._flush()
            self._first, self._zero = first, True
        self._count += count

    def _flush(self) -> None:
        if self._count:
            flag = _ZERO_RUN if self._zero else 0
            self._put(_RUN.pack(self._first, self._count | flag) + self._digests)
        self._count, self._zero = 0, False
        self._digests.clear()

    def finish(self) -> None:
        """Write what is left, and the MAC."""
        self._flush()
        self._write(self._mac.digest(MAC))


class LeafWriter:
    """Writes the file of an image while that is sent."""

    def __init__(
        self,
        header: Header,
        clusters: ClusterMap,
        keys: Keys,
        write: Callable[[bytes], object],
    ) -> None:
        """Begin with the map that the image's writer has; it must not change."""
        self._runs = RunWriter(header, keys, write)
        self._keys = keys
        self._zeroes = set_runs(clusters.zero, 0, clusters.clusters)
        self._zero = next(self._zeroes, None)
        self._end = clusters.clusters
        self._missing = clusters.counts()[0]

    def add(self, cluster: int, found: bytes | None) -> None:
        """Add the hash of a data cluster, in order, as it is sent; None for zeroes."""
        if self._zero is not None and self._zero[0] < cluster:
            self._pass(cluster)
        self._missing -= 1
        if found is None:
            self._runs.zeroes(cluster, 1)
        else:
            self._runs.data(cluster, self._keys.leaf_of(found))

    def add_all(self, first: int, found: Sequence[bytes | None]) -> None:
        """Add clusters in a row, as :meth:`add` each."""
        zero = self._zero is not None and self._zero[0] < first + len(found)
        if zero or None in found:
            for cluster, one in enumerate(found, first):
                self.add(cluster, one)
            return
        self._missing -= len(found)
        leaf_of = self._keys.leaf_of
        self._runs.data(first, b"".join([leaf_of(one) for one in found if one]))

    def _pass(self, cluster: int) -> None:
        while self._zero is not None and self._zero[0] < cluster:
            first, end = self._zero
            self._runs.zeroes(first, end - first)
            self._zero = next(self._zeroes, None)

    def finish(self) -> None:
        """Write the end.

        Raises:
            IntegrityError: not all data clusters have passed.
        """
        self._pass(self._end)
        if self._missing:
            raise IntegrityError(f"{self._missing} clusters have no digest")
        self._runs.finish()


@dataclass(slots=True)
class Window:
    """What a row says of ``count`` clusters from ``first`` on."""

    first: int
    count: int
    kinds: bytearray
    digests: bytearray

    def same(self, cluster: int, digest: bytes | None) -> bool:
        """Whether the cluster held this; None is zeroes."""
        place = cluster - self.first
        if digest is None:
            return self.kinds[place] == ZERO
        at = place * DIGEST
        return self.kinds[place] == DATA and (self.digests[at : at + DIGEST] == digest)

    def not_zero(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs ``(start, end)`` that aren't known to have held zeroes."""
        part = bytes(self.kinds[first - self.first : end - self.first])
        for found in _NOT_ZERO.finditer(part):
            yield first + found.start(), first + found.end()


class RunReader:
    """Reads the runs of one file that :func:`verify` has passed, and verifies again.

    Between the two the file could have changed on its disk; so what was used is only
    to be trusted once the end is reached.
    """

    def __init__(self, file: Readable, length: int, keys: Keys) -> None:
        """Begin at the file's first byte.

        Raises:
            IntegrityError: it isn't such a file.
        """
        self.header, raw = read_header(file)
        self._file = file
        self._left = length - len(raw) - MAC
        self._mac = blake3(raw, key=keys.file)
        self._clusters = ((self.header.size - 1) >> _BITS) + 1
        self._at = 0  # clusters told so far
        self._end = 0  # of the present run
        self._digests: bytes | None = None  # of the present run, from its first
        self._first = 0
        self.done = False
        self._next()

    def _read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0 or len(part := self._file.read(size)) != size:
            raise IntegrityError("the file of digests changed while it was read")
        self._mac.update(part)
        return part

    def _next(self) -> None:
        if not self._left:
            if not hmac.compare_digest(self._file.read(MAC), self._mac.digest(MAC)):
                raise IntegrityError("the file of digests changed while it was read")
            self.done = True
            return
        first, count = _RUN.unpack(self._read(_RUN.size))
        zero, count = count & _ZERO_RUN, count & ~_ZERO_RUN
        if not count or first < self._end or first + count > self._clusters:
            raise IntegrityError(f"the file of digests has no run at {first}")
        self._digests = None if zero else self._read(count * DIGEST)
        self._first = self._at = first
        self._end = first + count

    def put_into(self, window: Window, limit: int) -> None:
        """Put what the file says into the window, of clusters below ``limit``."""
        stop = window.first + window.count
        while not self.done and self._at < stop:
            low, end = self._at, min(self._end, stop)
            high = min(end, limit)
            if low < high:
                a, b = low - window.first, high - window.first
                if self._digests is None:
                    window.kinds[a:b] = bytes((ZERO,)) * (b - a)
                else:
                    window.kinds[a:b] = bytes((DATA,)) * (b - a)
                    window.digests[a * DIGEST : b * DIGEST] = self._digests[
                        (low - self._first) * DIGEST : (high - self._first) * DIGEST
                    ]
            self._at = end
            if end == self._end:
                self._next()


def windows(
    row: Sequence[RunReader], size: int, *, step: int = WINDOW
) -> Iterator[Window]:
    """Yield what a row says of a disk that now has ``size`` bytes, in order.

    What lies beyond the disk's size at a job is not taken from that job's file, nor is
    the cluster in which it ended, if the disk has grown since.

    Args:
        row: oldest first; each at its beginning.

    Raises:
        IntegrityError: a file changed since it was verified; at the latest after the
            last window.
    """
    clusters = ((size - 1) >> _BITS) + 1
    limits = [
        clusters if reader.header.size == size else reader.header.size >> _BITS
        for reader in row
    ]
    for first in range(0, clusters, step):
        count = min(step, clusters - first)
        window = Window(first, count, bytearray(count), bytearray(count * DIGEST))
        for reader, limit in zip(row, limits, strict=True):
            reader.put_into(window, limit)
        yield window
    if not all(reader.done for reader in row):
        raise IntegrityError("a file of digests reaches beyond its disk")


def merge(
    row: Sequence[RunReader],
    header: Header,
    keys: Keys,
    write: Callable[[bytes], object],
) -> None:
    """Write the complete file that says the same as a row.

    Raises:
        IntegrityError: as :func:`windows`, or a cluster is unknown.
    """
    made = RunWriter(header, keys, write)
    for window in windows(row, header.size):
        for run in _ALIKE.finditer(bytes(window.kinds)):
            low, high = run.span()
            first = window.first + low
            match run[0][0]:
                case 1:
                    made.zeroes(first, high - low)
                case 2:
                    made.data(first, window.digests[low * DIGEST : high * DIGEST])
                case _:
                    raise IntegrityError(f"cluster {first} is unknown")
    made.finish()
