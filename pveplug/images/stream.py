# SPDX-License-Identifier: Apache-2.0
"""What all readers of foreign disk images share: bytes in, in order; events out.

A reader is a machine without input and output. Its caller feeds the file's bytes in
order, in pieces of any size, and takes events::

    receive_data(b"…") ─► [ImageInfo, GuestZero, GuestData, …]
    receive_data(b"…") ─► [GuestData, …]
    receive_eof()      ─► [ImageEnd]

Inside it is one generator, a *flow*, that asks for bytes where the format's text would
say "then follows": tables of several formats lead from one to the next in ways a table
of states would hide. ``yield`` means "no byte is left, or enough was told for now".

What comes out is bounded too: a compressed cluster may be a thousand times as large as
its bytes. When ``pending`` is true after a call, the reader has more to tell about what
it has; the caller takes it with ``receive_data(b"")`` before it feeds anything else.
:func:`feed` and :func:`finish` do that.

A file may have long parts that mean nothing. While the reader waits inside one,
``skippable`` says how long it still is, and a caller that can seek calls ``skip``
instead of reading it.

Every byte of the disk is told once, as data, as zeroes or as the parent's, in any
order; the lengths are counted, and an image whose events don't add up to its size ends
with an error, whatever its tables said.
"""

from __future__ import annotations

import abc
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeVar

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.clusters import MAX_SIZE
from pveplug.images.qcow2_reader import GuestData

__all__ = [
    "Event",
    "Flow",
    "GuestData",
    "GuestParent",
    "GuestZero",
    "ImageEnd",
    "ImageInfo",
    "ImageNote",
    "MemorySpill",
    "ParentLink",
    "Patches",
    "Spill",
    "SpillNeededError",
    "StreamReader",
    "feed",
    "finish",
]

T = TypeVar("T")
Flow = Generator[None, None, T]

PIECE: Final = 256 * 1024
OUTPUT: Final = 8 * 1024 * 1024
"""Bytes that one call may make of its own (events included) before it pauses."""
EVENT: Final = 200  # about what an event without bytes costs
EMPTY: Final = memoryview(b"")


@dataclass(frozen=True, slots=True)
class ParentLink:
    """By what an image knows its parent.

    Attributes:
        kind: ``vmdk-cid``, ``vhdx-guid``, ``vhd-uuid``, ``digest`` or ``name``.
        identities: any of these is the parent; empty where only a name is known.
        names: file names the image has for its parent, for the operator.
        modified: VHD: the parent's time of modification, in seconds since 2000.
    """

    kind: str
    identities: tuple[str, ...]
    names: tuple[str, ...] = ()
    modified: int | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The first event: what the image says of itself.

    Attributes:
        format: raw, vmdk, vhdx, vhd, qcow2 or block-delta.
        subformat: e.g. streamOptimized, dynamic, differencing.
        size: of the virtual disk in bytes; None for a raw stream of unknown length.
        sector: the disk's logical sector in bytes.
        identity: what a child names as its parent, or "" if the format has none.
        parent: the image that GuestParent events mean, or None if it stands alone.
    """

    format: str
    subformat: str
    size: int | None
    sector: int = 512
    identity: str = ""
    parent: ParentLink | None = None


@dataclass(frozen=True, slots=True)
class GuestZero:
    """A run of the disk that reads as zeroes, whatever the parent has there."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GuestParent:
    """A run that isn't allocated in this image: the parent's content shows."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ImageNote:
    """Something an operator should know of; the content is right all the same."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageEnd:
    """The last event: the image is complete, and this is what it was.

    For a raw stream only here it is known how long it is, and that it was a fixed VHD.
    """

    info: ImageInfo


Event = ImageInfo | GuestData | GuestZero | GuestParent | ImageNote | ImageEnd


class Spill(Protocol):
    """Where bytes wait whose place isn't known yet; the caller's file or memory."""

    @property
    def limit(self) -> int:
        """How many bytes one reader may append."""

    def append(self, data: memoryview) -> int:
        """Keep a copy of ``data``; return the offset by which it is found again."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes that were appended at ``offset``."""


class MemorySpill:
    """A spill for small needs: it keeps its bytes in memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bytes = bytearray()

    def append(self, data: memoryview) -> int:
        at = len(self._bytes)
        self._bytes += data
        return at

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._bytes[offset : offset + length])


class SpillNeededError(IntegrityError):
    """The image has a payload in front of its table; a (larger) spill could read it."""


class Patches(Protocol):
    """Bytes of the file that a log replaces (VHDX)."""

    def at(self, offset: int, length: int) -> tuple[int, memoryview | None]:
        """Say how many of ``length`` bytes are alike, and their patch if they have one.

        Returns: a length from 1 to ``length``, and that many bytes, or None where the
            file's own bytes are right.
        """


class StreamReader(abc.ABC):
    """The base of every reader: one file in, events out.

    Attributes:
        position: bytes of the file that have been used.
        pending: more can be told of what has been received: see the module.
        skippable: how many of the bytes that come next mean nothing: see the module.
    """

    format: ClassVar[str]

    def __init__(
        self,
        *,
        name: str = "image",
        file_size: int | None = None,
        spill: Spill | None = None,
    ) -> None:
        """Make a reader for one file.

        Args:
            name: what errors call it, e.g. its path in the backup.
            file_size: its length, where known: it must end there.
            spill: for bytes that come before the table that places them. Without one
                such images are refused with a SpillNeededError.
        """
        self._name = name
        self._file_size = file_size
        self._spill = spill
        self.position = 0
        self.pending = False
        self.skippable = 0
        self._what = "header"  # what is being read, for the error of a short file
        self._patches: Patches | None = None
        self._failure: IntegrityError | None = None
        self._view = EMPTY
        self._low = 0
        self._returned = b""  # bytes that a flow took and gave back
        self._eof = False
        self._over = False
        self._out: list[Event] = []
        self._made = 0
        self._told = 0
        self._size = 0
        self._flow = self._run()

    @abc.abstractmethod
    def _run(self) -> Flow[None]:
        """Read the file from its first byte to its end."""

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take the next bytes of the file; return what they told.

        Views in the events live as long as the caller leaves ``data`` unchanged; so
        must it be while ``pending`` is true.

        Raises:
            IntegrityError: the image is damaged, or of a kind that isn't read; the
                text names format, offset and reason, and the reader is finished.
            LocalProtocolError: there was more to take first, or the file had ended.
        """
        if len(data):
            if self.pending or self._eof:
                raise LocalProtocolError("the reader isn't ready for more of the file")
            self._view, self._low = memoryview(data).cast("B"), 0
        return self._resume()

    def receive_eof(self) -> list[Event]:
        """Note the file's end; while ``pending`` is true, more can be taken.

        Raises:
            IntegrityError: the image isn't complete.
        """
        if self.pending and not self._eof:
            raise LocalProtocolError("the reader has more to tell before the end")
        self._eof = True
        return self._resume()

    def skip(self, length: int) -> None:
        """Go on ``length`` bytes further in the file, without these.

        Raises:
            LocalProtocolError: they aren't all :attr:`skippable`.
        """
        if not 0 <= length <= self.skippable:
            raise LocalProtocolError(f"{length} bytes of the file aren't skippable")
        self.skippable -= length
        self.position += length

    def _resume(self) -> list[Event]:
        if self._failure:
            raise IntegrityError(str(self._failure), offset=self._failure.offset)
        self._out, self._made, self.pending = [], 0, False
        if self._over:
            return []
        try:
            next(self._flow)
        except StopIteration:
            self._over = True
        except IntegrityError as error:
            # Not the error itself: its traceback would keep all there is alive.
            self._failure = IntegrityError(str(error), offset=error.offset)
            self._view, self._low = EMPTY, 0
            self.skippable = 0
            self._flow.close()
            raise
        out, self._out = self._out, []
        return out

    def _error(self, offset: int, reason: str) -> IntegrityError:
        text = f"{self._name}: {self.format} at byte {offset}: {reason}"
        return IntegrityError(text, offset=offset)

    # --- bytes in ------------------------------------------------------------------

    def _ended(self, needless: int = 0) -> Flow[bool]:
        """Wait until there is a byte, or none any more; ``needless`` may be skipped."""
        while self._low == len(self._view) and not self._returned:
            self._view, self._low = EMPTY, 0
            if self._eof:
                return True
            before, self.skippable = self.position, needless
            yield
            needless -= self.position - before
            self.skippable = 0
        return False

    def _some(self, limit: int) -> Flow[memoryview]:
        """Return from 1 to ``limit`` bytes, as they came."""
        if self._low == len(self._view) and (yield from self._ended()):
            raise self._error(
                self.position, f"the file ends here, in the {self._what}: truncated"
            )
        if self._returned:
            view = memoryview(self._returned)[:limit]
            self._returned = self._returned[len(view) :]
            self.position += len(view)
            return view
        view = self._view[self._low : self._low + limit]
        if self._patches:
            length, patch = self._patches.at(self.position, len(view))
            view = view[:length] if patch is None else patch
        self._low += len(view)
        self.position += len(view)
        return view

    def _take(self, length: int) -> Flow[bytes]:
        """Return exactly ``length`` bytes; the caller has bounded it."""
        view = yield from self._some(length) if length else _nothing()
        if len(view) == length:
            return bytes(view)
        got = bytearray(view)
        while len(got) < length:
            got += yield from self._some(length - len(got))
        return bytes(got)

    def _give_back(self, data: bytes) -> None:
        """Put bytes back that were taken last; they come again."""
        self._returned = data + self._returned
        self.position -= len(data)

    def _skip(self, length: int) -> Flow[None]:
        end = self.position + length
        while left := end - self.position:
            yield from self._ended(left)
            if left := end - self.position:
                yield from self._some(min(left, PIECE))

    # --- events out ----------------------------------------------------------------

    def _begin(self, info: ImageInfo, at: int) -> None:
        """Tell what the image is; ``at`` is where its size stands in the file."""
        if info.size is None or not 0 < info.size <= MAX_SIZE or info.size % 512:
            raise self._error(at, f"a disk of {info.size} bytes")
        self._size = info.size
        self._out.append(info)

    def _tell(self, event: GuestZero | GuestParent) -> None:
        """Tell a run without bytes, joined to the one before it where it can be."""
        length = min(event.length, self._size - event.offset)
        if length <= 0:
            return
        self._told += length
        offset = event.offset
        kind = type(event)
        last = self._out[-1] if self._out else None
        if type(last) is kind and last.offset + last.length == offset:
            self._out.pop()
            offset, length = last.offset, last.length + length
        self._out.append(kind(offset, length))
        self._made += EVENT

    def _tell_data(self, guest: int, data: memoryview, *, made: bool) -> None:
        """Tell bytes of the disk, cut at its end.

        ``made`` says that they are ours, not the caller's: they count as output.
        """
        view = data[: max(self._size - guest, 0)]
        if len(view):
            self._told += len(view)
            self._out.append(GuestData(guest, view))
            self._made += EVENT + (len(view) if made else 0)

    def _note(self, text: str) -> None:
        self._out.append(ImageNote(f"{self._name}: {text}"))

    def _breathe(self) -> Flow[None]:
        """Pause when enough has been made for one call."""
        if self._made >= OUTPUT:
            self.pending = True
            yield

    def _pass(self, length: int, guest: int) -> Flow[None]:
        """Tell the next ``length`` bytes of the file as the disk's at ``guest``."""
        while length:
            view = yield from self._some(length)
            self._tell_data(guest, view, made=False)
            guest += len(view)
            length -= len(view)
            if self._made >= OUTPUT:
                yield from self._breathe()

    def _finish(self, info: ImageInfo) -> Flow[None]:
        """Let the rest of the file pass, judge the whole, tell the end."""
        file_size = self._file_size or 0
        while not (yield from self._ended(max(file_size - self.position, 0))):
            yield from self._some(PIECE)
        if self._file_size is not None and self._file_size != self.position:
            raise self._error(
                self.position, f"the file ends here, and should at {self._file_size}"
            )
        if self._told != self._size:
            raise self._error(
                self.position,
                f"{self._told} bytes of a disk of {self._size} were found",
            )
        self._out.append(ImageEnd(info))


def _nothing() -> Flow[memoryview]:
    return EMPTY
    yield


def feed(
    reader: StreamReader, data: bytes | bytearray | memoryview
) -> Iterator[list[Event]]:
    """Give a reader the next bytes; yield all that it tells of them."""
    yield reader.receive_data(data)
    while reader.pending:
        yield reader.receive_data(b"")


def finish(reader: StreamReader) -> Iterator[list[Event]]:
    """Tell a reader that the file has ended; yield all that it still tells."""
    yield reader.receive_eof()
    while reader.pending:
        yield reader.receive_eof()
