# SPDX-License-Identifier: Apache-2.0
"""A VMDK of several files: a descriptor, and extents that hold the disk's parts.

::

    disk.vmdk          RW 4192256 SPARSE "disk-s001.vmdk"
                       RW 4192256 SPARSE "disk-s002.vmdk"     and so on
    disk-s001.vmdk     the disk's bytes from 0, in its own format
    disk-s002.vmdk     the disk's bytes from 2146435072

Files may come in any order. What comes before the descriptor waits in the spill, whole,
so whoever can choose gives the descriptor first. FLAT and VMFS extents are the bytes
themselves; SPARSE and VMFSSPARSE have tables; ZERO has no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Final

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images import vmdk_wire as wire
from pveplug.images.clusters import MAX_SIZE
from pveplug.images.stream import (
    PIECE,
    Event,
    Flow,
    GuestData,
    GuestParent,
    GuestZero,
    ImageEnd,
    ImageInfo,
    ImageNote,
    Spill,
    SpillNeededError,
    StreamReader,
    feed,
    finish,
)
from pveplug.images.vmdk_sparse import CowdReader, VmdkSparseReader

FLAT: Final = ("FLAT", "VMFS", "VMFSRAW")
MAX_EXTENTS: Final = 32 * 1024
MAX_SHARED: Final = 64  # extents in one file, each of which sees all of it


class _FlatReader(StreamReader):
    """Tells the bytes of a flat extent: ``size`` of them from ``start``."""

    format = "vmdk"

    def __init__(
        self, start: int, size: int, *, name: str, file_size: int | None
    ) -> None:
        super().__init__(name=name, file_size=file_size)
        self._start, self._length = start, size

    def _run(self) -> Flow[None]:
        self._what = "data"
        info = ImageInfo("vmdk", "flat", self._length)
        self._begin(info, 0)
        yield from self._skip(self._start)
        yield from self._pass(self._length, 0)
        yield from self._finish(info)


class VmdkSet:
    """Tells a disk whose files are given one after the other.

    For each file: :meth:`begin_file`, :meth:`receive_data` until it is over,
    :meth:`end_file`; at last :meth:`receive_eof`. As with a StreamReader, while
    ``pending`` is true there is more to take with ``receive_data(b"")``.
    """

    def __init__(self, *, name: str = "image", spill: Spill | None = None) -> None:
        self._name = name
        self._spill = spill
        self._spilled = 0
        self._descriptor: wire.Descriptor | None = None
        self._info: ImageInfo | None = None
        self._owed: dict[str, list[tuple[int, wire.Extent]]] = {}  # by file, lower case
        self._early: list[tuple[str, int | None, list[tuple[int, int]]]] = []
        self._file = ""
        self._file_size: int | None = None
        self._text: bytearray | None = None  # of the descriptor, while it comes
        self._head: bytes | None = None  # first bytes of a file that isn't known yet
        self._readers: list[tuple[int, StreamReader]] = []
        self._lengths: dict[int, int] = {}  # of the extents, by their place
        self._failure: IntegrityError | None = None
        self._more: Iterator[list[Event]] = iter(())
        self.pending = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the extents' files that have not come."""
        return tuple(sorted(self._owed))

    def begin_file(self, file: str, file_size: int | None = None) -> None:
        """Say that another file begins; only the last part of its path counts."""
        if self.pending:
            raise LocalProtocolError("there is more to take of the file before")
        self._file, self._file_size = base_name(file), file_size
        self._head, self._text, self._readers = b"", None, []

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take the next bytes of the present file.

        Raises:
            IntegrityError: an extent is damaged, or no extent of this disk.
        """
        if len(data):
            if self.pending or not self._file:
                raise LocalProtocolError("no file was begun, or more is to be taken")
            self._more = self._take(memoryview(data).cast("B"))
        return self._advance()

    def end_file(self) -> list[Event]:
        """Say that the present file is over."""
        if self.pending or not self._file:
            raise LocalProtocolError("no file was begun, or more is to be taken")
        self._more = self._end()
        return self._advance()

    def receive_eof(self) -> list[Event]:
        """Say that there is no other file.

        Raises:
            IntegrityError: extents are missing; the text names them.
        """
        if self._failure:
            return self._advance()
        if not self._descriptor or not self._info:
            raise IntegrityError(f"{self._name}: vmdk: the descriptor did not come")
        if self._owed:
            raise IntegrityError(
                f"{self._name}: vmdk: extents are missing: {', '.join(self.missing)}"
            )
        return [ImageEnd(self._info)]

    def _advance(self) -> list[Event]:
        if self._failure:
            raise IntegrityError(str(self._failure), offset=self._failure.offset)
        try:
            out = next(self._more, None)
        except IntegrityError as error:
            # Not the error itself: its traceback would keep all there is alive.
            self._failure = IntegrityError(str(error), offset=error.offset)
            self._readers, self.pending = [], False
            raise
        self.pending = out is not None
        return out or []

    # --- a file --------------------------------------------------------------------

    def _take(self, view: memoryview) -> Iterator[list[Event]]:
        if self._head is not None:
            before = self._head
            if len(before) + len(view) < len(wire.DESCRIPTOR):
                self._head = before + bytes(view)
                return
            self._head = None
            yield from self._open(before, view)
        else:
            yield from self._pass(view)

    def _open(self, before: bytes, view: memoryview) -> Iterator[list[Event]]:
        """Decide what the present file is, by its first bytes."""
        first = before + bytes(view[: len(wire.DESCRIPTOR)])
        if wire.is_descriptor(first):
            if self._descriptor:
                raise self._error(f"{self._file} is a second descriptor")
            self._text = bytearray()
        elif self._descriptor:
            self._readers = self._make_readers(self._file, self._file_size, first)
        else:
            self._early.append((self._file, self._file_size, []))
        yield from self._pass(memoryview(before))
        yield from self._pass(view)

    def _pass(self, view: memoryview) -> Iterator[list[Event]]:
        if not len(view):
            return
        if self._text is not None:
            self._text += view
            if len(self._text) > wire.MAX_DESCRIPTOR:
                raise self._error(f"{self._file} is a descriptor of more than 1 MiB")
        elif self._descriptor:
            for base, reader in self._readers:
                for events in feed(reader, view):
                    yield self._placed(events, base)
        else:
            self._keep(view)

    def _end(self) -> Iterator[list[Event]]:
        if self._head:  # shorter than any extent
            head, self._head = self._head, None
            yield from self._open(head, memoryview(b""))
        self._file = ""
        if self._text is not None:
            yield self._judge_descriptor(bytes(self._text))
            self._text = None
            yield from self._catch_up()
            return
        for base, reader in self._readers:
            for events in finish(reader):
                yield self._placed(events, base)
        self._readers = []

    def _catch_up(self) -> Iterator[list[Event]]:
        """Read the files that came before the descriptor, from the spill."""
        early, self._early = self._early, []
        for file, file_size, parts in early:
            if self._spill is None:
                raise AssertionError("nothing was kept without a spill")
            first = b""
            if parts:
                first = self._spill.read(parts[0][0], min(parts[0][1], PIECE))
            readers = self._make_readers(file, file_size, first)
            for place, length in parts:
                for at in range(place, place + length, PIECE):
                    size = min(PIECE, place + length - at)
                    data = self._spill.read(at, size)
                    for base, reader in readers:
                        for events in feed(reader, data):
                            yield self._placed(events, base)
            for base, reader in readers:
                for events in finish(reader):
                    yield self._placed(events, base)

    def _keep(self, view: memoryview) -> None:
        if self._spill is None or self._spilled + len(view) > self._spill.limit:
            raise SpillNeededError(
                f"{self._name}: vmdk: {self._file} comes before the descriptor: a "
                "(larger) spill is needed, or the descriptor first",
                offset=0,
            )
        place = self._spill.append(view)
        self._spilled += len(view)
        parts = self._early[-1][2]
        if parts and sum(parts[-1]) == place:
            parts[-1] = (parts[-1][0], parts[-1][1] + len(view))
        else:
            parts.append((place, len(view)))

    # --- the descriptor ------------------------------------------------------------

    def _judge_descriptor(self, text: bytes) -> list[Event]:
        found = wire.parse_descriptor(text)
        if isinstance(found, str):
            raise self._error(found)
        if not 0 < len(found.extents) <= MAX_EXTENTS:
            raise self._error(f"a descriptor with {len(found.extents)} extents")
        info = ImageInfo(
            "vmdk",
            found.create_type,
            found.size,
            identity=found.cid,
            parent=found.parent,
        )
        if not 0 < found.size <= MAX_SIZE:
            raise self._error(f"a disk of {found.size} bytes")
        out: list[Event] = [info]
        at = 0
        for extent in found.extents:
            if not extent.length:
                raise self._error(f"extent {extent.file} has no length")
            if extent.access == "NOACCESS":
                raise self._error(f"extent {extent.file} must not be read (NOACCESS)")
            if extent.kind == "ZERO":
                out.append(GuestZero(at, extent.length))
            elif extent.kind in (*FLAT, "SPARSE", "VMFSSPARSE") and extent.file:
                key = base_name(extent.file).lower()
                owed = self._owed.setdefault(key, [])
                owed.append((at, extent))
                if len(owed) > MAX_SHARED:
                    raise self._error(f"{extent.file} holds {len(owed)} extents")
            else:
                raise self._error(f"an extent of type {extent.kind} is not read")
            at += extent.length
        self._descriptor, self._info = found, info
        return out

    def _make_readers(
        self, file: str, file_size: int | None, first: bytes
    ) -> list[tuple[int, StreamReader]]:
        """Return the readers of a file: as many as extents lie in it."""
        owed = self._owed.pop(file.lower(), None)
        if owed is None:
            names = ", ".join(self.missing) or "none any more"
            raise self._error(f"{file} is no extent of this disk; missing are: {names}")
        readers: list[tuple[int, StreamReader]] = []
        for base, extent in owed:
            reader: StreamReader
            if extent.kind in FLAT:
                reader = _FlatReader(
                    extent.offset, extent.length, name=file, file_size=file_size
                )
            else:
                kind = (
                    CowdReader
                    if first.startswith(wire.COWD_MAGIC)
                    else (VmdkSparseReader)
                )
                reader = kind(
                    name=file,
                    file_size=file_size,
                    spill=self._spill,
                    extent_of=self._info,
                )
            readers.append((base, reader))
            self._lengths[base] = extent.length
        return readers

    def _placed(self, events: list[Event], base: int) -> list[Event]:
        """Move an extent's events to its place on the disk."""
        out: list[Event] = []
        for event in events:
            match event:
                case ImageInfo(size=size):
                    if size != self._lengths[base]:
                        raise self._error(
                            f"the extent at {base} has {size} bytes, the descriptor "
                            f"says {self._lengths[base]}"
                        )
                case ImageEnd():
                    pass
                case GuestData():
                    out.append(GuestData(base + event.offset, event.data))
                case GuestZero():
                    out.append(GuestZero(base + event.offset, event.length))
                case GuestParent():
                    out.append(GuestParent(base + event.offset, event.length))
                case ImageNote():
                    out.append(event)
        return out

    def _error(self, reason: str) -> IntegrityError:
        return IntegrityError(f"{self._name}: vmdk at byte 0: {reason}", offset=0)


def base_name(path: str) -> str:
    """Return the last part of a path of either kind."""
    return PureWindowsPath(PurePosixPath(path).name).name
