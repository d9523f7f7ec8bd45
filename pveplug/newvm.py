# SPDX-License-Identifier: Apache-2.0
"""A VM that comes into being, or nothing at all: what restores and imports share.

::

    claim the id ── create without disks ── lock ── per disk: allocate, activate, serve
        ── (the caller fills) ── stop serving ── unlock ── (attach) ── hand over

Everything made is in the journal before it is made, so a failure at any point (a kill
included) ends with no VM, no volume and no lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final

from pveplug.errors import JobError, NbdError, PveplugError
from pveplug.events import Reporter
from pveplug.journal import Journal, open_journal, own_vm
from pveplug.nbd.client import UnixAddress
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.node import Node
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import FILE_STORAGES, volume_id
from pveplug.pve import PveApi, Storage
from pveplug.pve_local import PveLocal
from pveplug.recovery import recover, recover_vm
from pveplug.tasks import to_the_end
from pveplug.vmconfig import smbios_uuid
from pveplug.vmhold import take_lock
from pveplug.vmrestore import DiskPlan, TargetStorage

log = logging.getLogger(__name__)

LOCK_WAIT_S: Final = 60.0
ENOSPC: Final = 28
"""As the NBD protocol numbers it."""
ZEROED_STORAGES: Final = FILE_STORAGES | {"lvmthin", "zfspool", "rbd", "zfs"}
"""Where a fresh volume reads as zeroes; thick LVM shows what was there before."""
_MANY_IDS: Final = 20


class NewVm:
    """One VM in the making; ``aclose`` undoes what was not handed over.

    Args:
        here: this node's name in the cluster.
    """

    def __init__(
        self, node: Node, api: PveApi, local: PveLocal, here: str, say: Reporter
    ) -> None:
        self.here = here
        self.vmid = 0
        self.storages: dict[str, Storage] = {}
        self._node = node
        self._api = api
        self._local = local
        self._say = say
        self._holding = contextlib.AsyncExitStack()
        self._serving = contextlib.AsyncExitStack()
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        """The open journal."""
        if self._journal is None:
            raise JobError("the restore has not begun", phase="restore")
        return self._journal

    # --- the VM ----------------------------------------------------------------------

    async def look(self) -> dict[str, TargetStorage]:
        """Learn of this node's storages; return those that may hold disks."""
        self.storages = {s.name: s for s in await self._api.storages(self.here)}
        return {
            s.name: TargetStorage(s.name, formats_of(s))
            for s in self.storages.values()
            if s.holds_images and s.active and s.enabled
        }

    async def hold(self, vmid: int, job: str) -> None:
        """Be the only job on the VM; what a killed one has left there is undone."""
        fd = await self._holding.enter_async_context(
            own_vm(self._node.state_dir, vmid, LOCK_WAIT_S)
        )
        self._holding.enter_context(self._local.keeping(fd))
        for line in await recover_vm(self._node, self._local, vmid):
            self._say.warning(
                f"VM {vmid}: after an earlier job that was killed: {line}"
            )
        self.vmid = vmid
        self._journal = open_journal(self._node.state_dir, vmid, job, "restore")

    async def create(
        self, job: str, wanted: int | None, params: Mapping[str, str]
    ) -> None:
        """Create the VM without disks; the id is ours from then on.

        Args:
            wanted: its id; None takes the next free one.
        """
        identity = smbios_uuid(params)
        if identity is None:  # PVE would make one up
            identity = str(uuid.uuid4())
            params = {**params, "smbios1": f"uuid={identity}"}
        taken: set[int] = set()
        while True:
            vmid = wanted or await self._next_id(taken)
            await self.hold(vmid, job)
            # Somebody else may take this id in the same moment, and their VM must never
            # be destroyed by our recovery: that one will have another UUID.
            try:
                self.journal.note(created=True, uuid=identity)
                for text in await self._api.create_vm(self.here, vmid, params):
                    self._say.warning(f"VM {vmid}: {text}")
            except PveRefusalError as error:
                if error.status or error.reason is Reason.EXISTS:
                    self.journal.undone(created=False)
                if error.reason is not Reason.EXISTS:
                    raise
                if wanted is not None or len(taken) > _MANY_IDS:
                    raise
                self.journal.close()
                self._journal = None
                await self._holding.aclose()
                taken.add(vmid)
                continue
            return

    async def _next_id(self, taken: set[int]) -> int:
        vmid = await self._api.next_id()
        while vmid in taken:
            vmid += 1
        return vmid

    async def lock(self) -> None:
        """Keep PVE from starting or changing the VM until it is whole."""
        await take_lock(self._local, self.journal)

    async def unlock(self) -> None:
        """Take our lock away again, where we have it."""
        if self.journal.entry.locked:
            await self._local.unlock(self.vmid)
            self.journal.undone(locked=False)

    # --- its volumes -----------------------------------------------------------------

    def zeroed(self, storage: str) -> bool:
        """Whether a fresh volume of a storage reads as zeroes by itself."""
        return self.storages[storage].type in ZEROED_STORAGES

    async def volume(self, plan: DiskPlan, others: Collection[str]) -> str:
        """Allocate and activate a volume; return its id.

        Args:
            others: ids of volumes that are there, whatever the storage lists.
        """
        volid = await self._allocate(plan, self.storages[plan.storage], others)
        await self._local.activate(volid, lambda: self.journal.add("active", volid))
        return volid

    async def _allocate(
        self, plan: DiskPlan, storage: Storage, others: Collection[str]
    ) -> str:
        there = await self._api.volumes(self.here, storage.name, vmid=self.vmid)
        used = {v.volid for v in there} | {volid for volid in others if volid}
        number = 0
        while any(f"vm-{self.vmid}-disk-{number}" in volid for volid in used):
            number += 1
        name = f"vm-{self.vmid}-disk-{number}"
        in_files = storage.type in FILE_STORAGES
        if in_files or plan.format == "qcow2":
            name += f".{plan.format}"
        expected = volume_id(storage, self.vmid, name)
        self.journal.add("volumes", expected)
        try:
            volid = await self._api.allocate_volume(
                self.here, storage.name, self.vmid, name, plan.size, plan.format
            )
        except PveRefusalError as error:
            if error.status or error.reason is Reason.EXISTS:
                self.journal.drop("volumes", expected)
            raise JobError(
                str(error),
                vm=str(self.vmid),
                disk=plan.source_key,
                phase="allocate",
                remedy=f"make room on {storage.name} or name another restore_storage.",
            ) from error
        if volid != expected:
            self.journal.add("volumes", volid)
            self.journal.drop("volumes", expected)
        return volid

    async def serve(self, volid: str, fmt: str) -> UnixAddress:
        """Serve a volume for writing until ``stop_serving``; return where."""
        os.makedirs(self._node.runtime_dir, mode=0o700, exist_ok=True)
        return await self._serving.enter_async_context(
            qemu_nbd(
                self._node,
                await self._local.volume_path(volid),
                fmt,
                socket_dir=self._node.runtime_dir,
                read_only=False,
            )
        )

    def before_serving_ends(self, callback: Callable[[], Awaitable[Any]]) -> None:
        """Have something closed before the qemu-nbd served last, on every way out."""
        self._serving.push_async_callback(callback)

    def write_failed(self, disk: str, storage: str, error: NbdError) -> JobError:
        """Return the error for a write that the target storage refused."""
        full = error.errno == ENOSPC
        return JobError(
            f"No space left on storage {storage}: {error}."
            if full
            else f"storage {storage} refused a write: {error}.",
            vm=str(self.vmid),
            disk=disk,
            phase="write",
            remedy="free space there or name another restore_storage."
            if full
            else "see the node's kernel log, or name another restore_storage.",
        )

    async def stop_serving(self) -> None:
        """End every qemu-nbd, which says whether its image is whole."""
        await self._serving.aclose()
        for volid in list(self.journal.entry.active):
            with contextlib.suppress(PveplugError):
                await self._local.deactivate(volid)
            self.journal.drop("active", volid)

    # --- the end ---------------------------------------------------------------------

    async def handed_over(self, surplus: Collection[str] = ()) -> None:
        """The volumes are the VM's: nothing is taken back any more but ``surplus``."""
        self.journal.undone(volumes=list(surplus), created=False, active=[])
        for volid in surplus:
            await self._local.free_volume(volid)
            self.journal.drop("volumes", volid)

    def done(self) -> None:
        """Forget the journal: all is as it shall be."""
        self.journal.close()
        self._journal = None

    async def start(self) -> None:
        """Start the VM; it is there all the same where that fails."""
        try:
            await self._api.start_vm(self.here, self.vmid)
        except PveplugError as error:
            self._say.error(f"VM {self.vmid} is restored, but was not started: {error}")
        else:
            self._say.info(f"VM {self.vmid} was started")

    async def aclose(self) -> None:
        """Undo what is unfinished; nothing after ``done``."""
        await to_the_end(self._undo())

    async def _undo(self) -> None:
        """Never raise: what brought us here is what the job log must end with."""
        try:
            await self._serving.aclose()
        except Exception as error:
            log.warning("restore not served to its end: %s", error)
        journal, self._journal = self._journal, None
        try:
            if journal is not None:
                for line in await recover(self._node, self._local, journal.entry):
                    self._say.info(f"VM {self.vmid}: undone: {line}")
        except PveplugError as error:
            self._say.error(str(error))
        finally:
            await self._holding.aclose()


def formats_of(storage: Storage) -> tuple[str, ...]:
    """Return a storage's image formats, its default first."""
    default = storage.default_format
    found = [
        f for f in storage.formats if f in ("raw", "qcow2", "vmdk") and f != default
    ]
    first = [default] if default in ("raw", "qcow2", "vmdk") else []
    return tuple(first + found) or ("raw",)
