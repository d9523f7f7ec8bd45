# SPDX-License-Identifier: Apache-2.0
"""Digests of what one job carries of one disk, a BLAKE3-128 per 1 MiB of the disk.

The digest of a chunk is taken over ::

    the BLAKE3-256 of each of its data clusters, in order, up to the disk's end
    then one letter per cluster: d (data), z (zero cluster of an overlay), . (nothing)

so it covers both what is carried and where. Bytes of a data cluster that weren't sent
are zeroes and count as such: the sender of a sparse and of a dense stream, and the
restore that reads either, come to the same. Chunks without a data cluster have no
digest; the zero clusters, wherever they are, have one together, over the offset and
length (u64 each) of every run of them. The sidecar file lists runs of chunks; its own
BLAKE3-128 is the root::

    PHDG, version 4, chunk bits, cluster bits, 0, size 16 bytes
    first chunk (u32), count (u32), count x 16 bytes   … repeated, rising
    digest of the zero clusters                        16 bytes, since version 2

Version 2 has the bytes of the data clusters themselves in place of their BLAKE3-256.
Version 1 moreover left zero clusters outside of chunks with data unguarded: one that
was lost let the parent's data show. It costs 16 bytes per MiB that has data. blake3
releases the GIL, so all of this may be called from a worker thread, by one thread at a
time.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.extents import Extent, Kind
from pveplug.images.clusterhash import hash_of_zeroes
from pveplug.images.clusters import ClusterMap
from pveplug.images.qcow2_reader import Event, GuestData, ImageHeader
from pveplug.units import MiB

CHUNK_BITS: Final = 20
DIGEST: Final = 16

_HEAD: Final = struct.Struct(">4sBBBBQ")
_MAGIC: Final = b"PHDG"
VERSION: Final = 4
_VERSIONS: Final = (1, 2, VERSION)
_RUN: Final = struct.Struct(">II")
_ZERO_RUN: Final = struct.Struct(">QQ")
_ZEROES: Final = bytes(1 * MiB)
_DATA: Final = ord("d")


def root_of(sidecar: bytes) -> str:
    """Return the root that the manifest keeps: the sidecar's BLAKE3-128 in hex."""
    return blake3(sidecar).hexdigest(DIGEST)


class _Hasher:
    """Takes a disk's content in order, whatever the pieces, and makes the sidecar."""

    def __init__(
        self,
        size: int,
        cluster_bits: int,
        on_digest: Callable[[int, bytes], None] | None = None,
        *,
        version: int = VERSION,
    ) -> None:
        self._on_digest = on_digest
        self._version = version
        self._bits = cluster_bits
        # A chunk holds whole clusters: with clusters of 2 MiB it is one of them.
        self.chunk_bits = max(CHUNK_BITS, cluster_bits)
        self._per_chunk = 1 << (self.chunk_bits - cluster_bits)
        self._size = size
        self._clusters = ((size - 1) >> cluster_bits) + 1
        self._chunk = -1
        self._hash = blake3()
        self._part = blake3()  # of a cluster that comes in several pieces
        self._part_done = 0
        self._kinds = bytearray()
        self._has_data = False
        self._run_at = 0
        self._next = -1  # the chunk that would continue the present run
        self._zeroes = blake3()
        self._zero_at = self._zero_end = 0  # the run of zero clusters so far
        self.data_bytes = self.zero_bytes = 0
        self.sidecar = bytearray(
            _HEAD.pack(_MAGIC, version, self.chunk_bits, cluster_bits, 0, size)
        )

    def add(
        self, offset: int, length: int, kind: Kind, view: memoryview | None
    ) -> None:
        """Add a run; runs rise, and what lies between two of them is CLEAN."""
        if kind is Kind.DATA:
            self.data_bytes += length
        elif kind is Kind.ZERO:
            self.zero_bytes += length
            if offset != self._zero_end:
                self._close_zeroes()
                self._zero_at = offset
            self._zero_end = offset + length
        taken = 0
        while taken < length:
            start = offset + taken
            chunk = start >> self.chunk_bits
            part = min(length - taken, ((chunk + 1) << self.chunk_bits) - start)
            if kind is Kind.DATA:
                self._open(chunk)
                self._has_data = True
                if self._version >= 4:
                    end = taken + part
                    self._hash_clusters(start, part, view and view[taken:end])
                elif view is None:
                    for done in range(0, part, len(_ZEROES)):
                        width = min(part - done, len(_ZEROES))
                        self._hash.update(memoryview(_ZEROES)[:width])
                else:
                    self._hash.update(view[taken : taken + part])
                self._mark(start, part, b"d")
            elif kind is Kind.ZERO:
                self._open(chunk)
                self._mark(start, part, b"z")
            taken += part

    def _hash_clusters(self, start: int, length: int, view: memoryview | None) -> None:
        """Add data of one chunk, which may begin and end within clusters."""
        at, end, size = start, start + length, 1 << self._bits
        while at < end:
            first = at & -size
            whole = min(size, self._size - first)
            step = min(first + whole, end) - at
            if step == whole:
                if view is None:
                    self._hash.update(hash_of_zeroes(whole))
                else:
                    low = at - start
                    self._hash.update(blake3(view[low : low + whole]).digest())
            else:
                if view is None:
                    self._part.update(bytes(step))
                else:
                    self._part.update(view[at - start : at - start + step])
                self._part_done += step
                if self._part_done == whole:
                    self._hash.update(self._part.digest())
                    self._part, self._part_done = blake3(), 0
            at += step

    def add_cluster(self, offset: int, length: int, found: bytes) -> None:
        """Add one whole data cluster by its BLAKE3-256; as :meth:`add` for all else."""
        self.data_bytes += length
        self._open(offset >> self.chunk_bits)
        self._has_data = True
        self._hash.update(found)
        place = (offset >> self._bits) - self._chunk * self._per_chunk
        self._kinds[place] = _DATA

    def add_clusters(self, offset: int, found: Sequence[bytes]) -> None:
        """Add whole data clusters of one chunk by their BLAKE3-256."""
        count = len(found)
        self.data_bytes += count << self._bits
        self._open(offset >> self.chunk_bits)
        self._has_data = True
        self._hash.update(b"".join(found))
        place = (offset >> self._bits) - self._chunk * self._per_chunk
        self._kinds[place : place + count] = b"d" * count

    def _open(self, chunk: int) -> None:
        if chunk == self._chunk:
            return
        self._close()
        self._chunk = chunk
        count = min(self._per_chunk, self._clusters - chunk * self._per_chunk)
        self._kinds = bytearray(b"." * count)

    def _mark(self, start: int, length: int, letter: bytes) -> None:
        first = (start >> self._bits) - self._chunk * self._per_chunk
        last = ((start + length - 1) >> self._bits) - self._chunk * self._per_chunk + 1
        self._kinds[first:last] = letter * (last - first)

    def _close(self) -> None:
        """Write the present chunk's digest, if it has one."""
        if not self._has_data:
            return
        self._hash.update(bytes(self._kinds))
        if self._chunk != self._next:
            self._run_at = len(self.sidecar)
            self.sidecar += _RUN.pack(self._chunk, 0)
        first, count = _RUN.unpack_from(self.sidecar, self._run_at)
        _RUN.pack_into(self.sidecar, self._run_at, first, count + 1)
        digest = self._hash.digest(DIGEST)
        self.sidecar += digest
        if self._on_digest:
            self._on_digest(self._chunk, digest)
        self._next = self._chunk + 1
        self._hash = blake3()
        self._has_data = False

    def _close_zeroes(self) -> None:
        """Add the present run of zero clusters to their digest."""
        if self._zero_at < self._zero_end:
            length = self._zero_end - self._zero_at
            self._zeroes.update(_ZERO_RUN.pack(self._zero_at, length))

    def finish(self) -> bytes:
        self._close()
        self._close_zeroes()
        self._chunk = -1
        self._zero_at = self._zero_end
        if self._version == 1:
            return bytes(self.sidecar)
        return bytes(self.sidecar) + self._zeroes.digest(DIGEST)


class DigestWriter:
    """Makes the digests while a disk is sent."""

    def __init__(self, clusters: ClusterMap, *, overlay: bool) -> None:
        """Begin with the map that the image's writer has.

        Args:
            overlay: whether the image has a backing file, and so zero clusters.
        """
        self._overlay = overlay
        self._size = clusters.size
        self._bits = clusters.cluster_bits
        self._hasher = _Hasher(clusters.size, clusters.cluster_bits)
        self._runs = self._carried(clusters)
        self._run = next(self._runs, None)
        self._at = 0  # how far into the disk the hasher has been told everything

    def _carried(self, clusters: ClusterMap) -> Iterator[Extent]:
        for run in clusters.runs():
            if run.kind is Kind.DATA or (run.kind is Kind.ZERO and self._overlay):
                yield run

    def add(self, cluster: int, found: bytes | None) -> None:
        """Add the hash of a data cluster that is sent, in order; None: all zeroes.

        Those that are left out count as zeroes.

        Raises:
            IntegrityError: they go backwards or one is no data cluster.
        """
        offset = cluster << self._bits
        if offset < self._at:
            raise IntegrityError(
                f"digest: bytes at {offset} come after those up to {self._at}"
            )
        run = self._run
        if run is None or run.end <= offset or self._at != offset:
            self._pass(offset)
            run = self._run
        if run is None or run.kind is not Kind.DATA or run.offset > offset:
            raise IntegrityError(f"digest: byte {offset} is in no data cluster")
        end = min(offset + (1 << self._bits), run.end)
        length = end - offset
        self._hasher.add_cluster(offset, length, found or hash_of_zeroes(length))
        self._at = end
        if end == run.end:
            self._run = next(self._runs, None)

    def add_all(self, first: int, found: Sequence[bytes | None]) -> None:
        """Add clusters in a row, as :meth:`add` each: those of a chunk at a time.

        Raises:
            IntegrityError: as :meth:`add`.
        """
        size, at = 1 << self._bits, 0
        while at < len(found):
            offset = (first + at) << self._bits
            run = self._run
            if run is None or offset != self._at or offset < run.offset:
                count = 1
            else:  # whole clusters of this run and this chunk
                chunk = 1 << self._hasher.chunk_bits
                end = min(run.end, (offset & -chunk) + chunk)
                count = min((end - offset) >> self._bits, len(found) - at)
            if run is None or run.kind is not Kind.DATA or count < 2:
                self.add(first + at, found[at])
                at += 1
                continue
            part = [one or hash_of_zeroes(size) for one in found[at : at + count]]
            self._hasher.add_clusters(offset, part)
            at += count
            self._at = offset + (count << self._bits)
            if self._at == run.end:
                self._run = next(self._runs, None)

    def _pass(self, offset: int) -> None:
        """Take what lies before ``offset`` as the map has it, data as zeroes."""
        while self._run is not None and self._run.offset < offset:
            start, end = max(self._at, self._run.offset), min(self._run.end, offset)
            if start < end:
                self._hasher.add(start, end - start, self._run.kind, None)
            if self._run.end > offset:
                break
            self._run = next(self._runs, None)
        self._at = max(self._at, offset)

    def finish(self) -> tuple[bytes, str]:
        """Return the sidecar file's content and its root, when all has been sent."""
        self._pass(self._size)
        sidecar = self._hasher.finish()
        return sidecar, root_of(sidecar)


class DigestVerifier:
    """Computes the digests of an image as a restore reads it.

    The sidecar may come before the image: a wrong chunk is then told as soon as it has
    passed. Or after it: then :func:`compare` it with what :meth:`finish` returns.
    """

    def __init__(
        self,
        sidecar: bytes | None = None,
        *,
        name: str = "image",
        version: int = VERSION,
    ) -> None:
        """Make one for an image that errors call ``name``.

        Args:
            version: of the digests, where there is no sidecar to tell: the
                manifest's own.

        Raises:
            IntegrityError: the sidecar isn't one.
        """
        if sidecar is not None:
            _check_head(sidecar)
            version = sidecar[4]
        self._name = name
        # With manifests of version 3 the digests were still those of version 2.
        self._version = VERSION if version >= VERSION else min(version, 2)
        self._sidecar = sidecar
        self._expected = None if sidecar is None else chunks(sidecar)
        self._hasher: _Hasher | None = None

    def receive(self, events: Iterable[Event]) -> None:
        """Take what the image's reader told, all of it and in order.

        Raises:
            IntegrityError: a chunk differs; the text names it.
        """
        for event in events:
            if isinstance(event, ImageHeader):
                self._hasher = _Hasher(
                    event.size,
                    event.cluster_bits,
                    self._compare,
                    version=self._version,
                )
                if self._sidecar is not None:
                    _same_disk(self._sidecar, self._hasher.sidecar, self._name)
                continue
            if self._hasher is None:
                raise IntegrityError(f"{self._name}: data before the image's header")
            if isinstance(event, GuestData):
                self._hasher.add(event.offset, event.length, Kind.DATA, event.data)
            else:
                self._hasher.add(event.offset, event.length, event.kind, None)

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes of the disk in data clusters and in zero clusters so far."""
        hasher = self._hasher
        return (hasher.data_bytes, hasher.zero_bytes) if hasher else (0, 0)

    def _compare(self, chunk: int, digest: bytes) -> None:
        if self._expected is None or self._hasher is None:
            return
        wanted = next(self._expected, None)
        if wanted != (chunk, digest):
            if wanted is not None:
                chunk = min(chunk, wanted[0])
            raise _differs(self._name, chunk << self._hasher.chunk_bits)

    def finish(self) -> tuple[bytes, str]:
        """Return the sidecar as computed, and its root, at the end of the image.

        Raises:
            IntegrityError: it differs from the one given; the text says where.
        """
        if self._hasher is None:
            raise IntegrityError(f"{self._name}: the image has no header")
        sidecar = self._hasher.finish()
        if self._expected is not None and (more := next(self._expected, None)):
            raise _differs(self._name, more[0] << self._hasher.chunk_bits)
        if self._sidecar is not None and sidecar[-DIGEST:] != self._sidecar[-DIGEST:]:
            raise _zeroes_differ(self._name)
        return sidecar, root_of(sidecar)


def _check_head(sidecar: bytes) -> None:
    if (
        len(sidecar) < _HEAD.size
        or not sidecar.startswith(_MAGIC)
        or sidecar[4] not in _VERSIONS
        or len(sidecar) < _HEAD.size + (DIGEST if sidecar[4] > 1 else 0)
    ):
        raise IntegrityError("digests: not in a known format")


def chunks(sidecar: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield ``(chunk number, digest)`` of a sidecar, rising.

    Raises:
        IntegrityError: it isn't one; raised while iterating.
    """
    _check_head(sidecar)
    at, least = _HEAD.size, 0
    end = len(sidecar) - (DIGEST if sidecar[4] > 1 else 0)
    while at < end:
        if at + _RUN.size > end:
            raise IntegrityError(f"digests: cut short at byte {at}")
        first, count = _RUN.unpack_from(sidecar, at)
        at += _RUN.size
        if first < least or not count or at + count * DIGEST > end:
            raise IntegrityError(f"digests: damaged before byte {at}")
        for number in range(count):
            yield first + number, sidecar[at : at + DIGEST]
            at += DIGEST
        least = first + count


def compare(expected: bytes, computed: bytes, *, name: str = "image") -> None:
    """Compare the sidecar of a backup with the one computed from its image.

    Raises:
        IntegrityError: they differ; the text names the first chunk that does.
    """
    if expected == computed:
        return
    _same_disk(expected, computed, name)
    bits = computed[5]
    for ours, theirs in itertools.zip_longest(chunks(computed), chunks(expected)):
        if ours != theirs:
            first = min(pair[0] for pair in (ours, theirs) if pair)
            raise _differs(name, first << bits)
    raise _zeroes_differ(name)


def _same_disk(expected: bytes, computed: bytes | bytearray, name: str) -> None:
    if expected[: _HEAD.size] != computed[: _HEAD.size]:
        raise IntegrityError(f"{name}: its digests are of another disk or format")


def _differs(name: str, offset: int) -> IntegrityError:
    return IntegrityError(
        f"{name}: the data of the disk near byte {offset} (MiB {offset // MiB}) is not "
        "what was backed up: its digest differs",
        offset=offset,
    )


def _zeroes_differ(name: str) -> IntegrityError:
    return IntegrityError(
        f"{name}: its zero clusters are not those that were backed up: their digest "
        "differs"
    )
