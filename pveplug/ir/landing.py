# SPDX-License-Identifier: Apache-2.0
"""One disk that is still arriving: a sparse file, and a mark for each of its clusters.

Any number of processes have it open. *Feeders* write clusters as Bacula brings them,
one *keeper* serves them to a VM (:mod:`pveplug.ir.device`)::

    feeder    pwrite the cluster ──► mark it in the live map ──► ring the bell
    keeper    read that waits: look at the mark ◄── bell; read the file

    checkpoint    copy the live map ──► fdatasync the data ──► replace the durable map

A mark is made after its bytes are in the file, and what is marked is final: nobody
writes there any more. So a feeder, or the keeper, may be killed at any moment. The live
map lies below /run and is right as long as the page cache is; after a reboot only the
durable map counts, whose every mark stands for bytes that were on the disk before it.

Where the disk tells of writes it has lost (a checkpoint's fdatasync fails), the marks
made since the last checkpoint are taken back: they would outlive their bytes.

The formats are in ``docs/landing.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from blake3 import blake3

from pveplug.errors import IntegrityError, LocalProtocolError, RequestError
from pveplug.ir.bell import Ringer, make_bell
from pveplug.ir.locks import Locks, Place
from pveplug.ir.presence import (
    HEAD,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    RUN,
    WINDOW,
    Header,
    Mark,
    boot_id,
    check_marks,
    read_durable,
    read_live,
    write_durable,
    write_live,
)
from pveplug.journal import sync_directory
from pveplug.nbd.source import ZEROES, is_zero

TAG: Final = "user.pveplug.landing"
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DATA: Final = re.compile(rb"\x01+")
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZEROED: Final = bytes([Mark.ZERO, Mark.DATA, Mark.ZERO]) + bytes(range(3, 256))
"""Translation of marks: what is owed becomes zero, what is there stays."""

log = logging.getLogger(__name__)


class LandingError(RequestError):
    """The file system refused something; the landing stays as good as it was.

    Attributes:
        errno: the system's number, e.g. 28 for ENOSPC.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Files:
    """Where the parts of a landing are."""

    key: str
    folder: Path
    live_folder: Path
    data: Path
    map: Path
    live: Path
    bell: Path
    lock: Path

    @classmethod
    def of(cls, folder: Path, live_folder: Path, key: str) -> Files:
        if not _KEY.fullmatch(key):
            raise LocalProtocolError(f"{key!r} can't name a landing")
        return cls(
            *(key, folder, live_folder),
            *(folder / f"{key}.data", folder / f"{key}.map"),
            *(live_folder / f"{key}.{part}" for part in ("live", "bell", "lock")),
        )


class Landing:
    """An open landing; made by :meth:`create` or :meth:`open`.

    Its methods block; one thread may write while another makes a checkpoint. All raise
    LandingError where the file system refuses.

    Attributes:
        size: of the disk, in bytes; its last cluster may be shorter than the others.
        cluster_bits: log2 of the cluster size.
        fd: the data file, open for reading and writing.
    """

    def __init__(
        self, files: Files, header: Header, fd: int, live: int, locks: Locks
    ) -> None:
        self.files = files
        self.size: Final = header.size
        self.cluster_bits: Final = header.cluster_bits
        self.clusters: Final = header.clusters
        self.fd: Final = fd
        self.marks: Final = mmap.mmap(live, HEAD + header.clusters)
        """The live map, HEAD bytes before the mark of cluster 0."""
        self._header = header
        self._live = live
        self._locks = locks
        self._ringer = Ringer(files.bell)
        self._thread = threading.Lock()  # among those who share this object
        self._syncing = threading.Lock()
        self._synced = b""  # digest of what the last checkpoint wrote
        self._closed = False

    # -- making and opening -----------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: Path,
        live_folder: Path,
        key: str,
        size: int,
        *,
        cluster_bits: int = 16,
    ) -> Self:
        """Make a landing in which everything is owed.

        Args:
            folder: for data and durable map; made if it isn't there.
            live_folder: for what lives until the machine goes down, below /run; like
                ``folder`` for one VM alone.
            key: the disk's name.
            size: of the disk, in bytes.

        Raises:
            IntegrityError: there is one of this name.
        """
        files = Files.of(folder, live_folder, key)
        if not (size > 0 and MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS):
            text = f"a landing of {size} bytes in clusters of 2^{cluster_bits}"
            raise LocalProtocolError(text)
        with _translated(folder), _opening(files) as locks:
            if files.map.exists():
                raise IntegrityError(
                    f"{files.map} exists. Remedy: go on with this landing, or remove it"
                )
            header = Header.new(size, cluster_bits)
            # Without a map there is no landing: this is what a killed create() left.
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = os.open(files.data, flags, 0o600)
            try:
                os.ftruncate(fd, size)
                with contextlib.suppress(OSError):  # not every file system has them
                    os.setxattr(fd, TAG, header.instance)
                    header = replace(header, tagged=True)
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_directory(files.folder)
            sync_directory(files.folder.parent)
            write_durable(files.map, header, bytes(header.clusters))
            return cls._opened(files, locks)

    @classmethod
    def open(cls, folder: Path, live_folder: Path, key: str) -> Self:
        """Open a landing, after a reboot with what its last checkpoint holds.

        Raises:
            IntegrityError: there is none, or a file of it is damaged or foreign.
        """
        files = Files.of(folder, live_folder, key)
        if not files.map.exists():
            raise IntegrityError(
                f"{folder} has no landing of {key}. Remedy: start the recovery anew"
            )
        with _translated(folder), _opening(files) as locks:
            return cls._opened(files, locks)

    @staticmethod
    def exists(folder: Path, key: str) -> bool:
        """Whether :meth:`open` would find one."""
        return Files.of(folder, folder, key).map.exists()

    @classmethod
    def _opened(cls, files: Files, locks: Locks) -> Self:
        try:
            header, marks = read_durable(files.map)
        except FileNotFoundError:
            text = f"{files.map} is gone. Remedy: start the recovery anew"
            raise IntegrityError(text) from None
        fd = live = -1
        try:
            fd = _open_data(files, header)
            here = header.of_boot(boot_id())
            found = read_live(files.live)
            if found is None or found[0] != here:
                # Another boot's, or another landing's: it may be ahead of the data.
                log.info("landing-begins key=%s from=%s", files.key, files.map)
                write_live(files.live, here, marks)
            live = os.open(files.live, os.O_RDWR | os.O_CLOEXEC)
            make_bell(files.bell)
            return cls(files, header, fd, live, locks)
        except BaseException:
            for number in (fd, live):
                if number >= 0:
                    os.close(number)
            raise

    def close(self) -> None:
        """Close; what was marked stays marked. Makes no checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._ringer.close()
        self.marks.close()
        os.close(self._live)
        os.close(self.fd)
        self._locks.close()

    def remove(self) -> None:
        """Close, and remove every file of it; nobody may use it any more."""
        self.close()
        files = self.files
        with _translated(files.folder):
            # The durable map first: without it the rest is nothing.
            for path in (files.map, files.data, files.live, files.bell, files.lock):
                path.unlink(missing_ok=True)
            sync_directory(files.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- looking ----------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether nothing is owed."""
        return self.marks.find(b"\0", HEAD) < 0

    @property
    def owed_bytes(self) -> int:
        """Bytes that are still to come; looks at the whole map."""
        owed = sum(
            self.marks[at : at + WINDOW].count(0)
            for at in range(HEAD, HEAD + self.clusters, WINDOW)
        )
        total = owed << self.cluster_bits
        if self.marks[HEAD + self.clusters - 1] == Mark.OWED:
            total -= (self.clusters << self.cluster_bits) - self.size
        return total

    def kinds(self, offset: int, length: int) -> Iterator[tuple[int, int, Mark]]:
        """Yield (offset, length, mark) of the runs in a range, in bytes, in order.

        A long run may come in several pieces.
        """
        bits, end = self.cluster_bits, offset + length
        if offset < 0 or end > self.size:
            raise LocalProtocolError(f"{length} bytes at {offset} of {self.size}")
        while offset < end:
            first = HEAD + (offset >> bits)
            last = min(HEAD + ((end - 1) >> bits) + 1, first + WINDOW)
            found = RUN.match(self.marks, first, last)
            if found is None:
                raise self._spoilt()
            stop = min((found.end() - HEAD) << bits, end)
            yield offset, stop - offset, Mark(self.marks[first])
            offset = stop

    def _spoilt(self) -> IntegrityError:
        return IntegrityError(
            f"live map {self.files.live} has marks that are none. Remedy: stop what "
            "serves this landing, remove that file and run the restore again"
        )

    # -- writing ----------------------------------------------------------------

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write whole clusters and mark them; what is there already is final.

        Clusters that are all zero are marked ZERO and not written.

        Returns: how many bytes weren't there before.

        Raises:
            LandingError: nothing of what couldn't be written is marked.
        """
        view = memoryview(data).cast("B")
        first, last = self._whole(offset, len(view))
        bits, fresh = self.cluster_bits, 0
        with self._marking():
            for start, stop in self._owed(first, last):
                low = (start << bits) - offset
                high = min((stop << bits) - offset, len(view))
                fresh += high - low
                self._land(start, stop, view[low:high])
        if fresh:
            self._ring()
        return fresh

    def zero(self, offset: int, length: int) -> int:
        """Mark whole clusters that are owed as zero; writes no data.

        Returns: how many bytes weren't there before.
        """
        return self.zero_all([(offset, length)])

    def zero_all(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Do :meth:`zero` for many (offset, length) at the cost of one."""
        wanted = [self._whole(offset, length) for offset, length in ranges]
        fresh = 0
        with self._marking():
            for first, last in wanted:
                for start in range(HEAD + first, HEAD + last, WINDOW):
                    stop = min(start + WINDOW, HEAD + last)
                    before = self.marks[start:stop]
                    if owed := before.count(0):
                        fresh += owed << self.cluster_bits
                        if stop == HEAD + self.clusters and not before[-1]:
                            fresh -= (self.clusters << self.cluster_bits) - self.size
                        self.marks[start:stop] = before.translate(_ZEROED)
        if fresh:
            self._ring()
        return fresh

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write any bytes of what is owed, without marking; the rest is left alone."""
        view = memoryview(data).cast("B")
        with self._marking():
            for low, high in self._owed_bytes(offset, len(view)):
                self._pwrite(low, view[low - offset : high - offset])

    def put_zeroes(self, offset: int, length: int) -> None:
        """Make any range of what is owed read as zeroes, without marking."""
        with self._marking():
            for low, high in self._owed_bytes(offset, length):
                self._punch(low, high)

    def settle(self, offset: int, length: int) -> int:
        """Mark what is owed of whole clusters by what :meth:`put` made of them.

        Returns: how many bytes weren't there before.
        """
        first, last = self._whole(offset, length)
        bits, fresh = self.cluster_bits, 0
        with self._marking():
            for start, stop in self._owed(first, last):
                for low, high, hole in self._allocated(start << bits, stop << bits):
                    mark = Mark.ZERO if hole else Mark.DATA
                    count = (high - low) >> bits
                    at = HEAD + (low >> bits)
                    self.marks[at : at + count] = bytes([mark]) * count
                fresh += min(stop << bits, self.size) - (start << bits)
        if fresh:
            self._ring()
        return fresh

    def adopt(self, offset: int, length: int) -> int:
        """Mark whole clusters that :meth:`put` has filled to the last byte.

        Those that are all zero become ZERO. Returns: as :meth:`write`.
        """
        first, last = self._whole(offset, length)
        fresh = 0
        with self._marking():
            for start, stop in self._owed(first, last):
                for number in range(start, stop):
                    low = number << self.cluster_bits
                    size = min(1 << self.cluster_bits, self.size - low)
                    piece = memoryview(os.pread(self.fd, size, low))
                    zero = len(piece) == size and _all_zero(piece)
                    self.marks[HEAD + number] = Mark.ZERO if zero else Mark.DATA
                    fresh += size
        if fresh:
            self._ring()
        return fresh

    def clear_owed(self) -> None:
        """Make everything that is owed read as zeroes, before :meth:`put`."""
        self.put_zeroes(0, self.size)

    def reset(self) -> None:
        """Forget all that has arrived; never while somebody serves it.

        Raises:
            LocalProtocolError: somebody does.
        """
        with self._durable(), self._marking():
            if self._ringer.heard() and self.marks[HEAD:].count(0) != self.clusters:
                text = f"landing {self.files.data} is being served and can't be reset"
                raise LocalProtocolError(text)
            nothing = bytes(self.clusters)
            write_durable(self.files.map, self._header, nothing)
            self._synced = b""
            self.marks[HEAD:] = nothing
            self._punch(0, self.size)

    def checkpoint(self) -> bool:
        """Have all that is marked now survive a power failure.

        May run in one thread while another writes. False: there was nothing new.

        Raises:
            LandingError: the disk has lost writes, and what was marked since the last
                checkpoint is owed again; or the map couldn't be written.
        """
        with self._durable():
            # Each mark in this copy was made after its bytes were written.
            marks = self.marks[HEAD:]
            try:
                check_marks(marks)
            except ValueError:
                raise self._spoilt() from None
            digest = blake3(marks).digest()
            if digest == self._synced:
                return False
            try:
                os.fdatasync(self.fd)
            except OSError:
                self._take_back()
                raise
            write_durable(self.files.map, self._header, marks)
            self._synced = digest
        return True

    # -- for feeders ------------------------------------------------------------

    def begin_feeding(self, *, alone: bool) -> None:
        """Take part in writing, with others or alone, until :meth:`end_feeding`.

        Raises:
            LandingError: others do; errno EBUSY.
        """
        if not self._locks.take(Place.FEEDER, alone=alone):
            raise LandingError(
                f"another job writes to landing {self.files.data}. Remedy: wait for "
                "its end or cancel it, then run this one again",
                errno.EBUSY,
            )

    def end_feeding(self) -> None:
        self._locks.release(Place.FEEDER)

    # -- inside -----------------------------------------------------------------

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """Return the clusters of a range that must consist of whole ones."""
        bits, end = self.cluster_bits, offset + length
        rest = (1 << bits) - 1
        if offset < 0 or offset & rest or (end & rest and end != self.size):
            text = f"{length} bytes at {offset} are no whole clusters of 2^{bits}"
            raise LocalProtocolError(text)
        self._check_range(offset, length)
        return offset >> bits, (end + rest) >> bits

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            text = f"{length} bytes at {offset} are outside of {self.size}"
            raise LocalProtocolError(text)

    @contextlib.contextmanager
    def _marking(self) -> Iterator[None]:
        """Look, write and mark without another feeder in between."""
        with _translated(self.files.data), self._thread:
            with self._locks.held(Place.MARKS):
                if not self.is_live():
                    raise LandingError(
                        f"{self.files.live} was removed or replaced while a job wrote. "
                        "Remedy: run the restore job again, which goes on",
                        errno.ESTALE,
                    )
                yield

    @contextlib.contextmanager
    def _durable(self) -> Iterator[None]:
        with _translated(self.files.map), self._syncing:
            with self._locks.held(Place.DURABLE):
                yield

    def _ring(self) -> None:
        with _translated(self.files.bell), self._thread:
            self._ringer.ring()

    def is_live(self) -> bool:
        """Whether the map we have is still the one others find."""
        try:
            found = os.stat(self.files.live)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._live)
        return (found.st_ino, found.st_dev) == (mine.st_ino, mine.st_dev)

    def _owed(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the owed runs among clusters, as they are then."""
        find, stop = self.marks.find, first
        while (start := find(b"\0", HEAD + stop, HEAD + last)) >= 0:
            found = RUN.match(self.marks, start, HEAD + last)
            stop = found.end() - HEAD if found else last
            yield start - HEAD, stop

    def _owed_bytes(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) in bytes of what is owed in a range."""
        self._check_range(offset, length)
        if not length:
            return
        bits, end = self.cluster_bits, offset + length
        for start, stop in self._owed(offset >> bits, ((end - 1) >> bits) + 1):
            yield max(start << bits, offset), min(stop << bits, end)

    def _land(self, start: int, stop: int, view: memoryview) -> None:
        """Write clusters that are owed, and mark them."""
        bits = self.cluster_bits
        marks = bytearray(stop - start)
        for number in range(stop - start):
            piece = view[number << bits : (number + 1) << bits]
            marks[number] = Mark.ZERO if _all_zero(piece) else Mark.DATA
        for run in _DATA.finditer(marks):
            low, high = run.start() << bits, min(run.end() << bits, len(view))
            self._pwrite((start << bits) + low, view[low:high])
        self.marks[HEAD + start : HEAD + stop] = marks

    def _pwrite(self, offset: int, view: memoryview) -> None:
        while view:
            count = os.pwrite(self.fd, view, offset)
            offset, view = offset + count, view[count:]

    def _punch(self, start: int, end: int) -> None:
        """Make a range read as zeroes, where it holds anything."""
        while start < end:
            try:
                low = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            start = min(os.lseek(self.fd, low, os.SEEK_HOLE), end)
            if low < start:
                self._zero_out(low, start)

    def _zero_out(self, low: int, high: int) -> None:
        # The block in which the disk ends becomes a hole if its rest is punched, too.
        end = self.clusters << self.cluster_bits if high == self.size else high
        if _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, low, end - low) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        while low < high:
            piece = memoryview(ZEROES)[: high - low]
            self._pwrite(low, piece)
            low += len(piece)

    def _allocated(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut whole clusters into (start, end, is it nothing but holes), whole too."""
        unit = 1 << self.cluster_bits
        while start < end:
            try:
                data = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            low = min(data // unit * unit, end)
            if low > start:
                yield start, low, True
            if low < end:
                hole = os.lseek(self.fd, data, os.SEEK_HOLE)
                high = min(-(-hole // unit) * unit, end)
                yield low, high, False
                start = high
            else:
                start = end

    def _take_back(self) -> None:
        """After the disk has lost writes: only what it had before is there."""
        log.error("landing-lost-writes data=%s", self.files.data)
        try:
            marks = read_durable(self.files.map)[1]
        except (OSError, IntegrityError):
            marks = bytes(self.clusters)
        with self._thread, self._locks.held(Place.MARKS):
            self.marks[HEAD:] = marks
        self._synced = b""


@contextlib.contextmanager
def _opening(files: Files) -> Iterator[Locks]:
    """Hold the landing's files still; closes the locks if the block fails."""
    for folder in (files.folder, files.live_folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks = Locks(files.lock)
    try:
        with locks.held(Place.OPEN):
            yield locks
    except BaseException:
        locks.close()
        raise


def _open_data(files: Files, header: Header) -> int:
    """Open the data file, if it is the one of this landing."""
    remedy = "Remedy: remove this landing and start the recovery again"
    try:
        fd = os.open(files.data, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise IntegrityError(f"{files.data} is gone. {remedy}") from None
    try:
        size = os.fstat(fd).st_size
        if size != header.size:
            raise IntegrityError(
                f"{files.data} has {size} bytes instead of {header.size}. {remedy}"
            )
        if header.tagged and _tag(fd) != header.instance:
            raise IntegrityError(
                f"{files.data} is not the file that {files.map} was made for (its "
                f"attribute {TAG} differs). {remedy}"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _tag(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, TAG)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def _all_zero(piece: memoryview) -> bool:
    # Most clusters that aren't zero say so at their beginning, without a copy.
    return piece[:16] == ZEROES[: min(16, len(piece))] and is_zero(piece, 0, len(piece))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LandingError(
                f"no space left for {where}: {reason}. Remedy: free space there, then "
                "run the restore job again, which goes on",
                errno.ENOSPC,
            ) from error
        text = f"{where}: {reason}. Remedy: see the node's kernel log"
        raise LandingError(text, error.errno or errno.EIO) from error


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
