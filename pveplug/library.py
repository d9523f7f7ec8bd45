# SPDX-License-Identifier: Apache-2.0
"""pveplug as a library: a VM's disks at one instant, their extents, blocks and images.

A small front over the parts a backup is made of, for asyncio programs that run as root
on the VM's node::

    open_vm() ── vm.disks ── disk.open() ── reader.extents(), reader.blocks()
                     └────── write_image(disk, path)

While the VM is open it carries PVE's ``lock: backup``; on every way out it is free of
exports, nodes, scratch images and the lock. The names are exported by ``pveplug``
itself; docs/library.md has an example.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from pveplug.access import choose_vms, open_api
from pveplug.cbt import Level
from pveplug.config_parse import parse_backup
from pveplug.diskstream import DiskStream, FileSink, Progress, RateLimit, scan
from pveplug.errors import ConfigError
from pveplug.events import NullReporter, Reporter
from pveplug.extents import Block, Extent, Kind
from pveplug.nbd.client import NbdClient, connect
from pveplug.nbd.source import READERS, OrderedReader, extents
from pveplug.node import Node, load_node
from pveplug.pve_local import PveLocal
from pveplug.source import Opened, ReadableDisk, watched
from pveplug.source import open_vm as open_held_vm
from pveplug.units import CLUSTER, MiB, round_down
from pveplug.vmhold import held

UNNAMED: Final = "library"
BATCH_BYTES: Final = 8 * MiB
BATCH_EXTENTS: Final = 256


class Vm:
    """A VM at its point in time; made by :func:`open_vm`."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.disks = tuple(Disk(disk) for disk in opened.disks)

    @property
    def vmid(self) -> int:
        return self._opened.vm.vmid

    @property
    def name(self) -> str:
        return self._opened.vm.name

    @property
    def consistency(self) -> str:
        """The verdict, e.g. ``crash-consistent (…)``, as a job log has it."""
        return self._opened.consistency

    @property
    def config(self) -> str:
        """The VM's configuration, in the format of ``/etc/pve/qemu-server``."""
        return self._opened.config_text


class Disk:
    """One disk of an open VM; valid as long as the VM is open."""

    def __init__(self, source: ReadableDisk) -> None:
        self._source = source

    @property
    def key(self) -> str:
        """``scsi0``, ``efidisk0``, …"""
        return self._source.key

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""
        return self._source.size

    @property
    def parent(self) -> str | None:
        """The name that CLEAN extents are unchanged since; None: there are none."""
        return self._source.parent_job

    @property
    def whole(self) -> str | None:
        """Why there is no parent, in words; None when there is one."""
        return self._source.whole

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[DiskReader]:
        """Connect to the disk's export; several readers may be open at a time.

        Raises:
            TransportError, NbdError: the point in time has gone.
        """
        contexts = ["base:allocation"]
        if self._source.context:
            contexts.append(self._source.context)
        address, export = self._source.address, self._source.export
        async with await connect(
            address, export, contexts=contexts, readers=READERS
        ) as client:
            yield DiskReader(client, self._source)


class DiskReader:
    """Reads one disk; made by :meth:`Disk.open`."""

    def __init__(self, client: NbdClient, source: ReadableDisk) -> None:
        self._client = client
        self._source = source

    async def extents(self) -> AsyncIterator[Extent]:
        """Tile the disk with extents: DATA, ZERO, or CLEAN (unchanged since parent).

        Raises:
            NbdError: the server failed a request.
            TransportError, RemoteProtocolError: the connection is over.
        """
        size, context = self._client.size, self._source.context
        # A bitmap that grew with its disk calls the new tail clean; it isn't.
        tail = min(round_down(self._source.parent_size, CLUSTER), size)
        if context is not None and tail:
            async for extent in extents(self._client, dirty=context, end=tail):
                yield extent
        else:
            tail = 0
        async for extent in extents(self._client, start=tail):
            yield extent

    async def blocks(self) -> AsyncIterator[Block]:
        """Tile the disk with blocks: DATA with its bytes, at most 512 KiB each.

        ``block.data`` is valid until the iterator is asked for the next block. Reads
        run ahead by a few MiB. A loop that is left early should close the iterator
        (``contextlib.aclosing``).

        Raises: as :meth:`extents`; nothing is yielded after a failure.
        """
        reader = OrderedReader(self._client)
        batch: list[Extent] = []
        size = 0
        async for extent in self.extents():
            batch.append(extent)
            size += extent.length if extent.kind is Kind.DATA else 0
            if size >= BATCH_BYTES or len(batch) >= BATCH_EXTENTS:
                async with aclosing(_batch(reader, batch)) as found:  # type: ignore[type-var]
                    async for block in found:
                        yield block
                batch, size = [], 0
        async with aclosing(_batch(reader, batch)) as found:  # type: ignore[type-var]
            async for block in found:
                yield block


async def _batch(reader: OrderedReader, batch: list[Extent]) -> AsyncIterator[Block]:
    """Yield the blocks of a few extents; the data of all of them is read ahead."""
    runs = [(e.offset, e.length) for e in batch if e.kind is Kind.DATA]
    async with aclosing(reader.read(runs)) as slots:  # type: ignore[type-var]
        done = 0
        for extent in batch:
            if extent.kind is not Kind.DATA:
                yield Block(extent, None)
                continue
            # Touching runs are read as one: a slot may reach into the next extent.
            while done < extent.end:
                slot = await anext(slots)
                done = slot.offset + slot.length
                yield Block(Extent(slot.offset, slot.length, Kind.DATA), slot.view)


@contextlib.asynccontextmanager
async def open_vm(
    vmid: int,
    options: str = "",
    *,
    node: Node | None = None,
    name: str | None = None,
    since: str | None = None,
    say: Reporter | None = None,
) -> AsyncIterator[Vm]:
    """Open all disks of a VM of this node at one instant.

    Args:
        options: connection and capture keys as in a plug-in string, e.g.
            ``pve_token_id=… pve_token_secret_file=… quiesce=no`` (docs/parameters.md).
        node: this node's paths and API address; by default its node file.
        name: remember this point in time under a name of the form
            ``<chain>.2026-11-23_01.05.00_01``, unique for the VM; changes are tracked
            from now on. None: nothing is tracked.
        since: an earlier name of the same chain: what hasn't changed since is CLEAN.
            A disk for which that isn't known is whole, and ``disk.whole`` says why.
        say: hears what a job log would.

    A running VM must be closed soon: what the guest overwrites meanwhile is kept in
    scratch space. Cancellation closes it too. With QEMU before 10 (fleece) the guest's
    writes depend on that space: when it runs full or stalls, the block is cancelled.

    Raises:
        ConfigError: an option is wrong, or ``since`` came without ``name``.
        JobError, PveplugError: the VM can't be read, or no longer; nothing is left
            behind.
    """
    if since is not None and name is None:
        raise ConfigError("since needs a name for this point in time too", key="since")
    say = say or NullReporter()
    if node is None:
        node = await asyncio.to_thread(load_node)
    config, warnings = parse_backup(
        f"podheitor-proxmox: vmid={vmid} {options}", node=node
    )
    for text in warnings:
        say.warning(text)
    capture = config.capture
    if name is None:
        capture = dataclasses.replace(capture, cbt="off")
    local = PveLocal(node)
    here = config.connection.node
    async with await open_api(config.connection) as api:
        (vm,) = await choose_vms(api, config.selection, here, say)

        async def lock_now() -> str:
            return (await api.vm_config(here, vmid)).lock

        async with (
            held(
                node,
                local,
                vmid,
                job=name or UNNAMED,
                kind="backup",
                lock_wait_s=capture.lock_wait,
                lock_now=lock_now,
                say=say,
            ) as hold,
            open_held_vm(
                capture,
                config.selection.exclude_disk,
                node,
                api,
                local,
                here,
                vm,
                hold.journal,
                job=name or UNNAMED,
                level=Level("I" if since else "F", since),
                say=say,
            ) as opened,
            watched(opened, capture.cbw_timeout),
        ):
            yield Vm(opened)


@dataclass(frozen=True, slots=True)
class ImageWritten:
    """What :func:`write_image` has done; all in bytes."""

    read: int
    """Read from the disk."""
    zero: int
    """Read, found to be zero and left a hole."""
    file_size: int
    """Length of the image file; holes take no room."""


async def write_image(
    disk: Disk, path: str | os.PathLike[str], *, backing: str | None = None
) -> ImageWritten:
    """Write a disk as a sparse qcow2 image and bring it onto stable storage.

    Args:
        path: of a new file; it is removed again when the image can't be completed.
        backing: the image of ``disk.parent``, as it is to be found from ``path``'s
            directory. Needed where the disk has a parent, refused where it has none.

    Raises:
        ConfigError: ``backing`` doesn't fit the disk.
        OSError: the file exists, or can't be written.
        NbdError, TransportError: a read failed.
    """
    if (backing is None) != (disk.parent is None):
        raise ConfigError(
            f"{disk.key} has {disk.parent or 'no parent'}: give the image of that as "
            "backing, and none where there is no parent",
            key="backing",
        )
    source = disk._source
    async with disk.open() as reader:
        client = reader._client
        clusters = await scan(client, context=source.context, known=source.parent_size)
        stream = DiskStream(
            client, clusters, backing=backing, trim=False, limit=RateLimit(0)
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await stream.send(_File(fd))
            await asyncio.to_thread(os.fsync, fd)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            await stream.aclose()
            os.close(fd)
        progress: Progress = stream.progress
        return ImageWritten(progress.read, progress.zero, stream.file_size)


class _File(FileSink):
    """A file as the sink of a stream; what isn't written stays a hole."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def write(self, offset: int, *buffers: memoryview | bytes) -> None:
        # Shielded: the buffers are reused once this returns, also when cancelled.
        work = asyncio.ensure_future(asyncio.to_thread(self._write, offset, buffers))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _write(self, offset: int, buffers: tuple[memoryview | bytes, ...]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                done = os.pwrite(self._fd, view, offset)
                offset += done
                view = view[done:]
