# SPDX-License-Identifier: Apache-2.0
"""A replica's volumes while they are read or written: one qemu-nbd each, never two.

A volume is open for reading or for writing. Who wants to write one that is read gets it
after the reader was closed; who wants to read one that is written reads through the
writer's own connection, when all that was written has landed. PVE's snapshots come when
all are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pveplug.dr.provision import Site, translated
from pveplug.dr.store import Record, ReplicaError
from pveplug.errors import CommandError, IntegrityError, PveplugError
from pveplug.nbd.client import NbdClient, UnixAddress, connect
from pveplug.nbd.qemu_nbd import qemu_nbd, socket_owner
from pveplug.nbd.sink import NbdSink

log = logging.getLogger(__name__)

LOCK_WAIT_S: Final = 15.0
"""A qemu-nbd of a session that was killed may need as long to end."""
_AGAIN_S: Final = 0.2


@dataclass(slots=True)
class Served:
    """A volume somebody serves to us."""

    volid: str
    client: NbdClient
    sink: NbdSink | None
    stack: contextlib.AsyncExitStack


class Volumes:
    """The open volumes of one replica, by disk key; for one task."""

    def __init__(self, site: Site, record: Record) -> None:
        self._site = site
        self._record = record
        self._open: dict[str, Served] = {}

    @property
    def writing(self) -> list[str]:
        """Keys of the disks that are open for writing."""
        return [key for key, served in self._open.items() if served.sink is not None]

    async def writer(self, key: str) -> NbdSink:
        """Return the sink of a disk, opened for writing if it isn't yet.

        Raises:
            ReplicaError: it can't be.
        """
        served = self._open.get(key)
        if served is not None and served.sink is None:
            await self.close(key)
            served = None
        if served is None:
            served = await self._serve(key, read_only=False)
        if served.sink is None:
            raise ReplicaError("internal", f"{key} was opened for reading only")
        return served.sink

    async def reader(self, key: str) -> NbdClient:
        """Return a connection that reads what was written so far."""
        served = self._open.get(key)
        if served is None:
            served = await self._serve(key, read_only=True)
        elif served.sink is not None:
            with self._named(key):
                await served.sink.finish()
        return served.client

    async def close(self, key: str) -> None:
        """Bring what was written onto stable storage and end the volume's server.

        Raises:
            ReplicaError: it can't be relied on; the volume is closed all the same.
        """
        served = self._open.pop(key, None)
        if served is None:
            return
        with self._named(key):
            if served.sink is not None:
                try:
                    await served.sink.finish()
                except BaseException:
                    await _give_up(served)
                    raise
            await served.stack.aclose()

    async def close_all(self) -> None:
        """Close every volume; the first failure is raised when all are closed."""
        first: Exception | None = None
        for key in list(self._open):
            try:
                await self.close(key)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    async def drop(self) -> None:
        """Close every volume without any promise; never raises."""
        while self._open:
            _, served = self._open.popitem()
            await _give_up(served)

    async def _serve(self, key: str, *, read_only: bool) -> Served:
        volume = self._record.disks.get(key)
        if volume is None:
            raise ReplicaError("protocol", f"the replica has no disk {key}")
        async with contextlib.AsyncExitStack() as stack:
            with self._named(key):
                path = await self._site.local.volume_path(volume.volid)
                if await self._site.local.activate(volume.volid):
                    stack.push_async_callback(self._deactivate, volume.volid)
                address = await self._address(stack, path, volume.format, read_only)
                contexts = ["base:allocation"]
                client = await connect(address, contexts=contexts)
                stack.push_async_callback(client.aclose)
                sink: NbdSink | None = None
                if not read_only:
                    sink = await stack.enter_async_context(NbdSink(client))
            served = Served(volume.volid, client, sink, stack.pop_all())
        self._open[key] = served
        return served

    async def _address(
        self, stack: contextlib.AsyncExitStack, path: str, fmt: str, read_only: bool
    ) -> UnixAddress:
        until = asyncio.get_running_loop().time() + LOCK_WAIT_S
        while True:
            try:
                return await stack.enter_async_context(
                    qemu_nbd(
                        self._site.node,
                        path,
                        fmt,
                        socket_dir=self._site.node.runtime_dir,
                        read_only=read_only,
                        lazy_refcounts=not read_only,
                    )
                )
            except CommandError as error:
                late = asyncio.get_running_loop().time() >= until
                if late or "lock" not in error.stderr:
                    raise
                await asyncio.sleep(_AGAIN_S)  # no event tells of another's end

    async def _deactivate(self, volid: str) -> None:
        with contextlib.suppress(PveplugError):
            await self._site.local.deactivate(volid)

    @contextlib.contextmanager
    def _named(self, key: str) -> Iterator[None]:
        volume = self._record.disks.get(key)
        where = f" ({volume.volid})" if volume else ""
        with translated(f"disk {key} of the replica{where}"):
            yield


def forget_dead_sockets(directory: str) -> None:
    """Remove the sockets of qemu-nbds whose owner was killed; never raises."""
    with contextlib.suppress(OSError):
        for path in Path(directory).iterdir():
            pid = socket_owner(path.name)
            if pid is not None and not os.path.exists(f"/proc/{pid}"):
                path.unlink(missing_ok=True)


async def _give_up(served: Served) -> None:
    error = IntegrityError("given up")
    try:
        await served.stack.__aexit__(type(error), error, None)
    except Exception as failed:
        log.debug("volume volid=%s given up: %s", served.volid, failed)
