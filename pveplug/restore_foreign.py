# SPDX-License-Identifier: Apache-2.0
"""The engine for restores of other hypervisors' backups: files of Bacula jobs to VMs.

::

    /@vsphere/web01/web01.ovf          kept, small
    /@vsphere/web01/web01.vmdk         a descriptor: what its extents will be
    /@vsphere/web01/web01-flat.vmdk    read once, forwards, written where it belongs
    …the increments' jobs…             upon the disks they were made from
    FINISH ──► every VM gets its configuration and is handed over

Jobs come oldest first, as Bacula delivers them. Which image belongs to which disk is
never told by names where its format has better: see :mod:`pveplug.import_vm`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from pveplug.access import check_version, open_api
from pveplug.bacula import BaculaSession
from pveplug.bacula_files import IncomingFile
from pveplug.config import ImportConfig
from pveplug.config_parse import parse_import
from pveplug.diskstream import RateLimit
from pveplug.errors import JobError, RemoteProtocolError
from pveplug.images.foreign_files import parse_name
from pveplug.import_files import Arrival, ForeignFiles, Progress
from pveplug.import_vm import ImportVm
from pveplug.node import Node
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.units import KiB, MiB

OPTIONS_OBJECT: Final = 28
SISTERS: Final = ("podheitor-vsphere", "podheitor-hyperv")
"""Plug-ins whose jobs are restored here."""
_HOLE: Final = bytes(1 * MiB)


def is_sisters(plugin_string: str) -> bool:
    """Whether a job was made by one of the sister plug-ins."""
    return plugin_string.partition(":")[0].strip() in SISTERS


@dataclass(slots=True)
class _Vm:
    """One VM of the selection."""

    target: ImportVm
    files: ForeignFiles


class RestoreForeign:
    """One restore job; ``run`` once."""

    def __init__(self, session: BaculaSession, node: Node) -> None:
        self._session = session
        self._node = node
        self._vms: dict[str, _Vm] = {}

    async def run(self) -> None:
        """Make VMs of what the job delivers.

        Raises:
            JobError, PveplugError: it can't be; nothing half-made is left behind.
        """
        session = self._session
        options = [
            found.data.decode("utf-8", "replace").rstrip("\0")
            async for found in session.restore_objects()
            if found.type == OPTIONS_OBJECT
        ]
        config = parse_import(session.job.where, options, node=self._node)
        session.info(config.common.reason)
        for text in config.common.warnings:
            session.warning(text)
        if config.common.target == "files":
            await session.objects_done()
            async for file in session.files():
                await file.accept("CORE")
            session.info(
                "Bacula writes these files by itself; 'pveplug import FILE…' makes a "
                "VM of them, or another image"
            )
            await session.finish_done()
            return
        api = await open_api(config.common.connection)
        async with api, contextlib.AsyncExitStack() as stack:
            local = PveLocal(self._node)
            await check_version(api, session)
            await session.objects_done()
            limit = RateLimit(config.common.bwlimit * KiB)
            async for file in session.files():
                await self._take(file, config, api, local, limit, stack)
            if not self._vms:
                raise JobError(
                    "Bacula delivered nothing of a VM.",
                    phase="import",
                    remedy="select files below /@vsphere/ or /@hyperv/.",
                )
            for vm in self._vms.values():
                vm.files.all_came()
                vm.target.check_all_came(vm.files.descriptions)
            for vm in self._vms.values():
                await vm.target.commit(vm.files.descriptions)
            await session.finish_done()

    async def _take(
        self,
        file: IncomingFile,
        config: ImportConfig,
        api: PveApi,
        local: PveLocal,
        limit: RateLimit,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        name = parse_name(file.name)
        if name is None or file.kind not in ("F", "E"):
            if file.kind != "D":
                self._session.warning(f"{file.name} is no file of a VM; left out")
            await file.accept("SKIP")
            return
        vm = self._vms.get(name.vm)
        if vm is None:
            vm = self._vms[name.vm] = self._new(name.vm, config, api, local, limit)
            stack.push_async_callback(vm.target.aclose)
            stack.callback(vm.files.close)
        await file.accept("OK")
        # Its time is the plug-in's word, not that of the file it was made from.
        arrival = Arrival(str(name), file.size or None)
        await vm.files.receive(arrival, _without_holes(file))
        await file.done()

    def _new(
        self,
        name: str,
        config: ImportConfig,
        api: PveApi,
        local: PveLocal,
        limit: RateLimit,
    ) -> _Vm:
        if self._vms and config.vmid is not None:
            raise JobError(
                f"restore_vmid={config.vmid} names one id, and several VMs are being "
                f"restored: {', '.join([*self._vms, name])}.",
                phase="import",
                remedy="leave it out, or select the files of one VM.",
            )
        session = self._session
        called = name or session.job.name.partition(".")[0]
        target = ImportVm(
            called, config, self._node, api, local, session.job.name, session
        )
        progress = Progress(session, called)
        files = ForeignFiles(
            target, config.raw, self._node.scratch_dir, limit, progress, session
        )
        return _Vm(target, files)


async def _without_holes(file: IncomingFile) -> AsyncIterator[memoryview]:
    """Yield a file's bytes in a row, what Bacula left out as zeroes.

    Raises:
        RemoteProtocolError: Bacula goes back in it.
    """
    position = 0
    async for offset, view in file.data():
        if offset < position:
            raise RemoteProtocolError(
                f"{file.name}: Bacula goes back from {position} to {offset}"
            )
        while position < offset:
            step = min(offset - position, len(_HOLE))
            yield memoryview(_HOLE)[:step]
            position += step
        yield view
        position += len(view)
