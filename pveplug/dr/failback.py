# SPDX-License-Identifier: Apache-2.0
"""Failback at the source: what the DR side wrote comes home, and may be undone.

::

    failback          replica shut down ─ digests of our disks go out ─ what differs is
                      staged ─ verified ─ what it replaces is kept ─ applied
    failback-commit   the replica stands by again, the source is started
    failback-undo     what was replaced is put back, the replica goes on

Beside the journal of the node stands one of the failback itself,
``<state_dir>/dr/failback-<uuid>/``: ``new.stage``, ``old.stage`` and ``phase``. A stage
is applied any number of times with one result, so what was cut is simply done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from pveplug.config import Capture, Replication
from pveplug.dr.conversation import Conversation
from pveplug.dr.delta import WINDOW, Leaves, Range
from pveplug.dr.stage import StageWriter, frames, verify
from pveplug.errors import IntegrityError, JobError, PveplugError, RemoteProtocolError
from pveplug.events import Reporter
from pveplug.journal import Journal, sync_directory
from pveplug.nbd.client import NbdClient, connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import OrderedReader
from pveplug.node import Node
from pveplug.proto.dr_digest import leaf_digest
from pveplug.proto.dr_frames import (
    MAX_BLOCK,
    Block,
    Command,
    Digests,
    Open,
    Result,
    SendBack,
    State,
    WindowEnd,
    Zero,
)
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.selection import VmSummary, select_disks
from pveplug.source import EFI_SIZES
from pveplug.units import MiB, human
from pveplug.vmconfig import Drive
from pveplug.vmhold import held

KEEP_FREE: Final = 256 * MiB
STAGED: Final = "staged"  # new.stage is whole
KEPT: Final = "kept"  # old.stage is whole, too: new.stage may be (half) applied
APPLIED: Final = "applied"
UNDONE: Final = "undone"  # old.stage may be (half) applied


class Failback:
    """One of the three modes for one VM; ``run`` once."""

    def __init__(
        self,
        talk: Conversation,
        state: State,
        opening: Open,
        capture: Capture,
        replication: Replication,
        node: Node,
        api: PveApi,
        local: PveLocal,
        here: str,
        vm: VmSummary,
        uuid: str,
        say: Reporter,
    ) -> None:
        self._talk = talk
        self._state = state
        self._opening = opening
        self._capture = capture
        self._replication = replication
        self._node = node
        self._api = api
        self._local = local
        self._here = here
        self._vm = vm
        self._say = say
        self._home = Path(node.state_dir) / "dr" / f"failback-{uuid}"
        self._new = self._home / "new.stage"
        self._old = self._home / "old.stage"

    async def run(self) -> tuple[int, Mapping[str, Any]]:
        """Do it; return the replica's epoch and what is to be reported.

        Raises:
            JobError: it was not done; what to do then is said.
        """
        match self._opening.mode:
            case "failback":
                return await self._bring_back()
            case "failback-commit":
                return await self._commit()
        return await self._undo()

    # --- the three modes -------------------------------------------------------------

    async def _bring_back(self) -> tuple[int, Mapping[str, Any]]:
        self._must_not_run()
        phase = self._phase()
        if phase == APPLIED:
            raise self._error(
                "what the DR side wrote is here already.",
                "failback-commit ends it, failback-undo takes it back.",
            )
        if phase == UNDONE:
            raise self._error("its undo was cut off.", "run failback-undo again.")
        async with self._held() as journal:
            result = await self._talk.ask(
                Command(
                    "failback",
                    {"dr_shutdown_timeout": str(self._replication.dr_shutdown_timeout)},
                ),
                Result,
            )
            if phase == KEPT:
                # What was staged then may be old by now: from the beginning.
                self._say.info(
                    f"VM {self._vm.vmid}: a cut failback is taken back first"
                )
                await self._apply(self._old, journal)
            sent = await self._stage(journal)
            await self._apply(self._new, journal)
            self._note(APPLIED)
        self._say.info(
            f"VM {self._vm.vmid}: {human(sent)} came back from the DR side. "
            "failback-commit makes it final and starts the VM; failback-undo takes it "
            "back"
        )
        return result.epoch, {"received": sent, **result.values}

    async def _commit(self) -> tuple[int, Mapping[str, Any]]:
        if self._phase() != APPLIED:
            raise self._error("no failback is to be committed.", "run failback first.")
        result = await self._talk.ask(Command("failback-commit"), Result)
        await asyncio.to_thread(self._forget)
        await self._start()
        return result.epoch, result.values

    async def _undo(self) -> tuple[int, Mapping[str, Any]]:
        phase = self._phase()
        if phase is None:
            raise self._error("no failback is to be undone.", "nothing is to be done.")
        self._must_not_run()
        if phase != STAGED:
            self._note(UNDONE)
            async with self._held() as journal:
                await self._apply(self._old, journal)
        options = {
            "dr_start": "yes" if self._replication.dr_start else "no",
            "dr_boot_timeout": str(self._replication.dr_boot_timeout),
        }
        result = await self._talk.ask(Command("failback-undo", options), Result)
        await asyncio.to_thread(self._forget)
        return result.epoch, result.values

    # --- their steps -----------------------------------------------------------------

    async def _stage(self, journal: Journal) -> int:
        """Fetch what differs, and keep what it will replace; return its bytes."""
        await asyncio.to_thread(self._forget)
        new = await StageWriter.create(self._new, {}, keep_free=KEEP_FREE)
        old: StageWriter | None = None
        try:
            async with self._volumes(journal, read_only=True) as clients:
                for number, (key, client) in enumerate(clients.items()):
                    await self._fetch(number, key, client, new)
                trailer = await new.finish()
                await verify(self._new)
                self._note(STAGED)
                old = await StageWriter.create(self._old, {}, keep_free=KEEP_FREE)
                numbered = list(clients.values())
                async with aclosing(frames(self._new)) as coming:  # type: ignore[type-var]
                    async for frame in coming:
                        await _keep(frame, numbered[frame.number], old)
                await old.finish()
                await verify(self._old)
        except BaseException:
            await new.discard()
            if old is not None:
                await old.discard()
            raise
        self._note(KEPT)
        return trailer.bytes

    async def _fetch(
        self, number: int, key: str, client: NbdClient, stage: StageWriter
    ) -> None:
        """Take what differs of one disk."""
        await self._talk.send(SendBack(number, key, client.size))
        reader, leaves = OrderedReader(client), Leaves()
        for start in range(0, client.size, WINDOW):
            window = Range(start, min(WINDOW, client.size - start))
            digests = bytearray()
            runs = [(window.offset, window.length)]
            async with aclosing(reader.read(runs)) as slots:  # type: ignore[type-var]
                async for slot in slots:
                    for _, leaf in leaves.of(slot, client.size):
                        digests += leaf_digest(leaf)
            await self._talk.send(Digests(number, window.offset, digests))
            await self._take(number, window, stage)

    async def _take(self, number: int, window: Range, stage: StageWriter) -> None:
        came = 0
        while True:
            message = await self._talk.next()
            if isinstance(message, WindowEnd):
                break
            if not isinstance(message, Block | Zero):
                raise RemoteProtocolError(
                    f"{type(message).__name__} came within a window of a disk"
                )
            inside = window.offset <= message.offset and message.end <= window.end
            if message.number != number or not inside:
                raise RemoteProtocolError(
                    f"a block at {message.offset} is not of the window"
                )
            await stage.add(message)
            came += 1
        if message.number != number or message.frames != came:
            raise RemoteProtocolError(
                f"{came} blocks came of a window of {message.frames}"
            )

    async def _apply(self, path: Path, journal: Journal) -> None:
        await verify(path)
        async with (
            self._volumes(journal, read_only=False) as clients,
            contextlib.AsyncExitStack() as stack,
        ):
            sinks = [
                await stack.enter_async_context(NbdSink(client))
                for client in clients.values()
            ]
            async with aclosing(frames(path)) as coming:  # type: ignore[type-var]
                async for frame in coming:
                    sink = sinks[frame.number]
                    if isinstance(frame, Zero):
                        await sink.zero(frame.offset, frame.length)
                    else:
                        await sink.write(frame.offset, memoryview(frame.data))
            for sink in sinks:
                await sink.finish()

    async def _start(self) -> None:
        if not self._replication.dr_start:
            return
        try:
            await self._api.start_vm(self._here, self._vm.vmid)
        except PveplugError as error:
            self._say.warning(
                f"VM {self._vm.vmid}: the failback is final, but the VM did not start: "
                f"{error}. Start it yourself"
            )
        else:
            self._say.info(f"VM {self._vm.vmid} ({self._vm.name}) was started")

    # --- the VM and its disks --------------------------------------------------------

    def _must_not_run(self) -> None:
        if self._local.vm_running(self._vm.vmid) is not None:
            raise self._error(
                "the source runs; what the DR side wrote can't be put under it.",
                "shut it down; what it wrote since the failover will be lost.",
            )

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[Journal]:
        async def lock_now() -> str:
            return (await self._api.vm_config(self._here, self._vm.vmid)).lock

        async with held(
            self._node,
            self._local,
            self._vm.vmid,
            job=self._opening.job,
            kind="failback",
            lock_wait_s=self._capture.lock_wait,
            lock_now=lock_now,
            say=self._say,
        ) as hold:
            self._must_not_run()
            yield hold.journal

    @contextlib.asynccontextmanager
    async def _volumes(
        self, journal: Journal, *, read_only: bool
    ) -> AsyncIterator[dict[str, NbdClient]]:
        """Serve the disks that the replica has, in the order of their keys."""
        vmid = self._vm.vmid
        config = dict((await self._api.vm_config(self._here, vmid)).values)
        drives = {d.key: d for d in select_disks(config, (), vmid=vmid).chosen}
        if missing := sorted(self._state.disks.keys() - drives.keys()):
            raise self._error(
                f"the replica has disks that the source hasn't: {', '.join(missing)}.",
                "add them to the source, of the same size.",
            )
        async with contextlib.AsyncExitStack() as stack:
            clients = {}
            for key in sorted(self._state.disks):
                client = await self._serve(stack, drives[key], journal, read_only)
                if client.size != self._state.disks[key]:
                    raise self._error(
                        f"{key} has {client.size} bytes, the replica's "
                        f"{self._state.disks[key]}.",
                        "resize the smaller one; then run failback again.",
                    )
                clients[key] = client
            yield clients

    async def _serve(
        self,
        stack: contextlib.AsyncExitStack,
        drive: Drive,
        journal: Journal,
        read_only: bool,
    ) -> NbdClient:
        async def deactivate() -> None:
            await asyncio.shield(self._local.deactivate(drive.file))
            journal.drop("active", drive.file)

        def announce() -> None:
            journal.add("active", drive.file)
            stack.push_async_callback(deactivate)

        await self._local.activate(drive.file, announce)
        raw = drive.format in (None, "raw")
        size = None
        if drive.key.startswith("efidisk") and raw:
            size = EFI_SIZES.get(dict(drive.options).get("efitype", "2m"))
        os.makedirs(self._node.runtime_dir, mode=0o700, exist_ok=True)
        address = await stack.enter_async_context(
            qemu_nbd(
                self._node,
                await self._local.volume_path(drive.file),
                drive.format or "raw",
                socket_dir=self._node.runtime_dir,
                read_only=read_only,
                size=size,
            )
        )
        client = await connect(address)
        stack.push_async_callback(client.aclose)
        return client

    # --- its own journal -------------------------------------------------------------

    def _phase(self) -> str | None:
        try:
            phase = (self._home / "phase").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
        if phase not in (STAGED, KEPT, APPLIED, UNDONE):
            raise IntegrityError(f"{self._home}/phase is damaged: {phase[:40]!r}")
        return phase

    def _note(self, phase: str) -> None:
        temporary = self._home / "phase.new"
        with temporary.open("w", encoding="ascii") as stream:
            stream.write(phase + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(self._home / "phase")
        sync_directory(self._home)

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._home / "phase").unlink()
            sync_directory(self._home)
        shutil.rmtree(self._home, ignore_errors=True)

    def _error(self, text: str, remedy: str) -> JobError:
        return JobError(
            text, vm=str(self._vm.vmid), phase=self._opening.mode, remedy=remedy
        )


async def _keep(frame: Block | Zero, client: NbdClient, old: StageWriter) -> None:
    """Keep what a frame will replace."""
    at = frame.offset
    while at < frame.end:
        length = min(MAX_BLOCK, frame.end - at)
        data = await client.read(at, length)
        if data == bytes(length):
            await old.add(Zero(frame.number, at, length))
        else:
            await old.add(Block(frame.number, at, data))
        at += length
