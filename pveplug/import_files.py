# SPDX-License-Identifier: Apache-2.0
"""The files of one foreign VM as they come, each from its first byte to its last.

::

    file ── what is it? ─┬─ an image ── reader ── events ── the disk it belongs to
                         ├─ a VMDK's descriptor ── its extents are awaited
                         ├─ an extent that is awaited ── its place on that disk
                         ├─ a description ── kept, small
                         └─ anything that lies beside disks ── passed over
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Protocol

from pveplug.errors import IntegrityError, JobError
from pveplug.events import Reporter
from pveplug.images import vmdk_wire
from pveplug.images.detect import Format, Kind, reader_for
from pveplug.images.foreign_files import (
    HEAD,
    MAX_DESCRIPTION,
    Role,
    kind_of,
    role_of,
)
from pveplug.images.stream import Event, ImageInfo
from pveplug.images.vmdk_set import VmdkSet, base_name
from pveplug.import_disk import ImportDisk
from pveplug.import_vm import ImportVm
from pveplug.spill import FileSpill
from pveplug.units import MiB, human

Batch = bytes | memoryview
BATCH: Final = 1 * MiB
"""Bytes that are given to a reader at a time."""
PROGRESS_S: Final = 60.0
DESCRIPTIONS: Final = 64
"""Small files that are kept."""
_2000: Final = 946684800
"""The epoch of a VHD's times, in seconds since 1970."""


class Limit(Protocol):
    async def spend(self, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a file before its first byte.

    Attributes:
        name: with its folders, as the operator knows it.
        size: in bytes, None where nobody says.
        mtime: seconds since 1970, 0 where nobody says.
        disk_size: bytes of the disk after all of its chain, where that is known.
        raw: it was looked at and is a raw disk, whatever it begins with.
    """

    name: str
    size: int | None = None
    mtime: int = 0
    disk_size: int | None = None
    raw: bool = False

    @property
    def file(self) -> str:
        """The last part of its name."""
        return base_name(self.name)

    @property
    def folder(self) -> str:
        """What its name has before that, in lower case."""
        return _folder(self.name.lower())


class Progress:
    """A line about a long file every ``interval_s`` seconds."""

    def __init__(self, say: Reporter, vm: str, interval_s: float = PROGRESS_S) -> None:
        self._say = say
        self._vm = vm
        self._interval_s = interval_s
        self._read: dict[str, int] = {}
        self._last_at = time.monotonic()
        self._last = 0
        self._total = 0

    def add(self, arrival: Arrival, size: int) -> None:
        """Count ``size`` more bytes of a file."""
        self._total += size
        read = self._read[arrival.name] = self._read.get(arrival.name, 0) + size
        now = time.monotonic()
        if now - self._last_at < self._interval_s:
            return
        rate = (self._total - self._last) / (now - self._last_at)
        self._last, self._last_at = self._total, now
        of = f" of {human(arrival.size)}" if arrival.size else ""
        self._say.info(
            f"{self._vm} {arrival.file}: {human(read)}{of} read, {rate / 1e6:.0f} MB/s"
        )


@dataclass(slots=True)
class _Image:
    """An image that is being read; its disk is known with its first event."""

    arrival: Arrival
    vm: ImportVm
    disk: ImportDisk | None = None
    early: list[Event] = field(default_factory=list)

    async def take(self, events: Sequence[Event]) -> None:
        if self.disk is None:
            info = next((e for e in events if isinstance(e, ImageInfo)), None)
            if info is None:
                self.early += events
                return
            arrival = self.arrival
            self.disk = await self.vm.image(
                arrival.name, info, arrival.size, size=arrival.disk_size
            )
            events = [*self.early, *events]
        await self.vm.take(self.disk, events)

    async def end(self) -> None:
        if self.disk is None:
            raise IntegrityError(f"{self.arrival.name} says nothing of itself")
        mtime = self.arrival.mtime
        await self.vm.end(self.disk, mtime - _2000 if mtime > _2000 else None)


@dataclass(slots=True)
class _Set:
    """A VMDK of several files that hasn't all come."""

    machine: VmdkSet
    image: _Image
    stack: ExitStack


class ForeignFiles:
    """Takes the files of one VM: ``receive`` each, then ``all_came``.

    Files of different disks may be received at the same time.

    Args:
        raw: names of files that are raw disks, whatever they begin with.
        spill_dir: where bytes wait whose place isn't known yet.
        limit: paces the reading.
    """

    def __init__(
        self,
        vm: ImportVm,
        raw: Sequence[str],
        spill_dir: str,
        limit: Limit,
        progress: Progress,
        say: Reporter,
    ) -> None:
        self.descriptions: dict[str, bytes] = {}
        """Small files that may describe the VM, by their last names."""
        self._vm = vm
        self._raw = raw
        self._spill_dir = spill_dir
        self._limit = limit
        self._progress = progress
        self._say = say
        self._sets: list[_Set] = []
        self._flat: dict[str, ImportDisk] = {}  # raw files, by their whole name
        self._called: dict[str, set[str]] = {}  # disks' files, by their last name
        self._apart: dict[str, str] = {}  # extents that lie elsewhere -> descriptor

    async def receive(
        self, arrival: Arrival, pieces: AsyncIterator[memoryview]
    ) -> None:
        """Take a file from its first byte to its last.

        Raises:
            JobError: it is damaged, belongs to no disk, or can't be written.
        """
        try:
            async with aclosing(self._batches(arrival, pieces)) as batches:
                await self._receive(arrival, batches)
        except IntegrityError as error:
            vm = self._vm
            raise JobError(
                f"{error}.",
                vm=str(vm.vmid) if vm.vmid else vm.name,
                disk=arrival.file,
                phase="import",
                remedy="take another copy of it (another JobId), or leave it out.",
            ) from error

    async def _batches(
        self, arrival: Arrival, pieces: AsyncIterator[memoryview]
    ) -> AsyncGenerator[Batch, None]:
        """Join pieces; the first batch is at least HEAD long, or the whole file."""
        waiting = bytearray()
        async for view in pieces:
            self._progress.add(arrival, len(view))
            await self._limit.spend(len(view))
            if not waiting and len(view) >= BATCH:
                yield view  # as it is: it stays valid until the next is asked for
                continue
            waiting += view
            if len(waiting) >= BATCH:
                yield bytes(waiting)
                waiting.clear()
        yield bytes(waiting)

    async def _receive(
        self, arrival: Arrival, batches: AsyncGenerator[Batch, None]
    ) -> None:
        first = await anext(batches)
        owed = self._owed(arrival)
        if owed is not None:
            self._note_name(arrival)
            await self._extent(owed, arrival, first, batches)
            return
        head = bytes(first[:HEAD])
        trusted = arrival.raw or any(
            fnmatchcase(arrival.file, pattern) for pattern in self._raw
        )
        role = Role.DISK if trusted else role_of(arrival.file, head)
        if role is Role.DISK:
            kind = kind_of(arrival.file, head, arrival.size, trusted=trusted)
            self._note_name(arrival)
            if kind is Format.VMDK_DESCRIPTOR:
                await self._descriptor(arrival, first, batches)
            else:
                await self._image(arrival, kind, first, batches)
            return
        if role is Role.COMPANION:
            self._say.info(f"{arrival.name} is not needed and was passed over")
            await _drained(batches)
            return
        await self._description(arrival, first, batches)

    async def _description(
        self, arrival: Arrival, first: Batch, batches: AsyncGenerator[Batch, None]
    ) -> None:
        text = bytearray(first)
        async for batch in batches:
            if len(text) <= MAX_DESCRIPTION:
                text += batch
        known = arrival.file in self.descriptions
        if len(text) > MAX_DESCRIPTION:
            self._say.warning(
                f"{arrival.name} is longer than {human(MAX_DESCRIPTION)}, so it is no "
                "description of a VM, and was passed over"
            )
        elif len(self.descriptions) >= DESCRIPTIONS and not known:
            self._say.warning(f"{arrival.name} is one small file too many: passed over")
        else:
            # That of a later job is the VM as it was then.
            self.descriptions[arrival.file] = bytes(text)

    # --- images ----------------------------------------------------------------------

    async def _image(
        self,
        arrival: Arrival,
        kind: Kind,
        first: Batch,
        batches: AsyncGenerator[Batch, None],
    ) -> None:
        with ExitStack() as stack:
            spill = stack.enter_context(FileSpill(self._spill_dir))
            reader = reader_for(
                kind, name=arrival.file, file_size=arrival.size, spill=spill
            )
            image = _Image(arrival, self._vm)
            await _feed(image, reader.receive_data, lambda: reader.pending, first)
            async for batch in batches:
                await _feed(image, reader.receive_data, lambda: reader.pending, batch)
            await image.take(await asyncio.to_thread(reader.receive_eof))
            while reader.pending:
                await image.take(await asyncio.to_thread(reader.receive_eof))
            await image.end()
        if kind is Format.RAW and image.disk is not None:
            self._flat[arrival.name.lower()] = image.disk

    async def _descriptor(
        self, arrival: Arrival, first: Batch, batches: AsyncGenerator[Batch, None]
    ) -> None:
        text = bytearray(first)
        async for batch in batches:
            if len(text) <= vmdk_wire.MAX_DESCRIPTOR:
                text += batch
        if self._came_before(arrival, bytes(text)):
            return
        stack = ExitStack()
        spill = stack.enter_context(FileSpill(self._spill_dir))
        found = _Set(
            VmdkSet(name=arrival.file, spill=spill), _Image(arrival, self._vm), stack
        )
        machine = found.machine
        machine.begin_file(arrival.file, len(text))
        await _feed(found.image, machine.receive_data, lambda: machine.pending, text)
        await found.image.take(await asyncio.to_thread(machine.end_file))
        while machine.pending:
            await found.image.take(await asyncio.to_thread(machine.receive_data, b""))
        if machine.missing:
            self._sets.append(found)
        else:
            await self._set_came(found)

    def _came_before(self, arrival: Arrival, text: bytes) -> bool:
        """Whether a descriptor's one flat extent came already, and was a raw disk.

        Raises:
            IntegrityError: its extents came already, and can't be placed any more.
        """
        found = vmdk_wire.parse_descriptor(text)
        if isinstance(found, str):
            return False  # VmdkSet says so
        early: list[str] = []  # whole names
        for extent in found.extents:
            name = base_name(extent.file or "").lower()
            called = [flat for flat in self._flat if base_name(flat) == name]
            beside = [flat for flat in called if _folder(flat) == arrival.folder]
            if called and not beside:
                self._lies_apart(name, arrival.name)
            early += beside or called
        if not early:
            return False
        disk = self._flat[early[0]]
        whole = (
            len(found.extents) == 1
            and found.extents[0].kind in ("FLAT", "VMFS", "VMFSRAW")
            and not found.extents[0].offset
            and found.size == disk.size
            and found.parent is None
        )
        if not whole:
            names = ", ".join(map(base_name, early))
            raise IntegrityError(
                f"{arrival.file} came after {names}, which is a part of its "
                "disk; restore to files (where=/directory) and import those"
            )
        disk.adopt(ImageInfo("vmdk", found.create_type, found.size, 512, found.cid))
        return True

    def _owed(self, arrival: Arrival) -> _Set | None:
        """Return the set that a file is an extent of: that in its folder, if any."""
        name = arrival.file.lower()
        asking = [s for s in self._sets if name in s.machine.missing]
        beside = [s for s in asking if s.image.arrival.folder == arrival.folder]
        if asking and not beside:
            self._lies_apart(name, asking[0].image.arrival.name, arrival.name)
        return next(iter(beside or asking), None)

    def _note_name(self, arrival: Arrival) -> None:
        """Note a disk's file; two of one name must each lie beside its descriptor."""
        name = arrival.file.lower()
        self._called.setdefault(name, set()).add(arrival.name.lower())
        if name in self._apart:
            self._lies_apart(name, self._apart[name], arrival.name)

    def _lies_apart(self, name: str, descriptor: str, extent: str = "") -> None:
        """Take an extent that isn't beside its descriptor, while no other has its name.

        Raises:
            IntegrityError: there are several.
        """
        self._apart[name] = descriptor
        called = {*self._called.get(name, ()), *([extent.lower()] if extent else [])}
        asking = [s for s in self._sets if name in s.machine.missing]
        if len(called) > 1 or len(asking) > 1:
            raise IntegrityError(
                f"{extent or ' and '.join(sorted(called))} may belong to {descriptor} "
                f"or not: several files are called {name}, and it lies beside neither. "
                "Restore to files (where=/directory), put each beside its descriptor, "
                "and import those"
            )

    async def _extent(
        self,
        found: _Set,
        arrival: Arrival,
        first: Batch,
        batches: AsyncGenerator[Batch, None],
    ) -> None:
        machine = found.machine
        machine.begin_file(arrival.file, arrival.size)
        await _feed(found.image, machine.receive_data, lambda: machine.pending, first)
        async for batch in batches:
            await _feed(
                found.image, machine.receive_data, lambda: machine.pending, batch
            )
        await found.image.take(await asyncio.to_thread(machine.end_file))
        while machine.pending:
            await found.image.take(await asyncio.to_thread(machine.receive_data, b""))
        if not machine.missing:
            self._sets.remove(found)
            await self._set_came(found)

    async def _set_came(self, found: _Set) -> None:
        with found.stack:
            await found.image.take(found.machine.receive_eof())
            await found.image.end()

    def all_came(self) -> None:
        """Say that there is no other file.

        Raises:
            JobError: a VMDK's extents are missing.
        """
        for found in self._sets:
            raise JobError(
                f"the extents of {found.image.arrival.name} did not come: "
                f"{', '.join(found.machine.missing)}.",
                vm=str(self._vm.vmid) if self._vm.vmid else self._vm.name,
                disk=found.image.arrival.file,
                phase="import",
                remedy="select the whole directory of the VM.",
            )

    def close(self) -> None:
        """Free what waited for bytes that never came."""
        for found in self._sets:
            found.stack.close()
        self._sets.clear()


async def _feed(
    image: _Image,
    receive: Callable[[bytes | bytearray | memoryview], Iterable[Event]],
    pending: Callable[[], bool],
    data: bytes | bytearray | memoryview,
) -> None:
    """Give a reader a batch, in a thread, and write all that it tells."""
    await image.take(list(await asyncio.to_thread(receive, data)))
    while pending():
        await image.take(list(await asyncio.to_thread(receive, b"")))


def _folder(name: str) -> str:
    return name[: len(name) - len(base_name(name))]


async def _drained(batches: AsyncIterator[Batch]) -> None:
    async for _ in batches:
        pass
