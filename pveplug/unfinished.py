# SPDX-License-Identifier: Apache-2.0
"""A VM that comes into being, or nothing at all: what every way of making one shares.

::

    hold the id ── create without disks ── lock ── allocate volumes … ── unlock ── done
       └───────── each step is in the journal before it is made ─────────┘

Whatever ends it before :meth:`UnfinishedVm.handed_over` (an error, a cancelled job, a
kill) leaves no VM, no volume and no lock: ``aclose`` undoes it from the journal, and
after a kill the next job or ``--cleanup`` does.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterable, Mapping
from typing import Final

from pveplug.errors import JobError, PveplugError
from pveplug.events import Reporter
from pveplug.journal import Entry, Journal, open_journal, own_vm
from pveplug.node import Node
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import FILE_STORAGES, volume_id
from pveplug.pve import PveApi, Storage
from pveplug.pve_local import PveLocal
from pveplug.recovery import recover, recover_vm
from pveplug.vmconfig import smbios_uuid
from pveplug.vmhold import take_lock

log = logging.getLogger(__name__)

LOCK_WAIT_S: Final = 60.0
_TRIES: Final = 20


class UnfinishedVm:
    """One VM being made; ``vmid`` is 0 until its id is held."""

    def __init__(
        self,
        node: Node,
        here: str,
        api: PveApi,
        local: PveLocal,
        say: Reporter,
        *,
        kind: str = "restore",
    ) -> None:
        """``here`` is this node's name in the cluster, ``kind`` the journal's."""
        self._node = node
        self._here = here
        self._api = api
        self._local = local
        self._say = say
        self._kind = kind
        self._holding = contextlib.AsyncExitStack()
        self._journal: Journal | None = None
        self.vmid = 0

    @property
    def journal(self) -> Journal:
        """The open journal."""
        if self._journal is None:
            raise JobError("the restore has not begun", phase="restore")
        return self._journal

    @property
    def entry(self) -> Entry | None:
        """What the journal says; None: nothing is held, or it was handed over."""
        return self._journal.entry if self._journal else None

    async def hold(self, vmid: int, job: str) -> None:
        """Take an id for this job; what a dead one left there is undone first.

        Raises:
            JobError: another job has it, or its leavings can't be undone.
        """
        fd = await self._holding.enter_async_context(
            own_vm(self._node.state_dir, vmid, LOCK_WAIT_S)
        )
        self._holding.enter_context(self._local.keeping(fd))
        for line in await recover_vm(self._node, self._local, vmid):
            self._say.warning(
                f"VM {vmid}: after an earlier job that was killed: {line}"
            )
        self.vmid = vmid
        self._journal = open_journal(self._node.state_dir, vmid, job, self._kind)

    async def create(
        self, job: str, wanted: int | None, params: Mapping[str, str], pool: str | None
    ) -> None:
        """Create the VM without disks; the id is ours from then on.

        Args:
            wanted: its id; None: the next that is free.
        """
        identity = smbios_uuid(params)
        if identity is None:  # PVE would make one up
            identity = str(uuid.uuid4())
            params = {**params, "smbios1": f"uuid={identity}"}
        taken: set[int] = set()
        while True:
            vmid = wanted or await self._next_id(taken)
            await self.hold(vmid, job)
            extra = {"pool": pool} if pool else {}
            # Somebody else may take this id in the same moment, and their VM must never
            # be destroyed by our recovery: that one will have another UUID.
            try:
                self.journal.note(created=True, uuid=identity)
                for text in await self._api.create_vm(
                    self._here, vmid, {**params, **extra}
                ):
                    self._say.warning(f"VM {vmid}: {text}")
            except PveRefusalError as error:
                if error.status or error.reason is Reason.EXISTS:
                    self.journal.undone(created=False)
                if error.reason is not Reason.EXISTS:
                    raise
                if wanted is not None or len(taken) > _TRIES:
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
        """Let PVE change the VM again."""
        if self.journal.entry.locked:
            await self._local.unlock(self.vmid)
            self.journal.undone(locked=False)

    async def allocate(
        self,
        storage: Storage,
        size: int,
        form: str,
        *,
        used: Iterable[str],
        disk: str,
        key: str = "restore_storage",
    ) -> str:
        """Allocate a volume of the VM; return its id.

        Args:
            size: bytes.
            form: raw, qcow2 or vmdk.
            used: volume ids that are taken, whether the storage lists them or not.
            disk: what errors call it.
            key: the parameter that names another storage.
        """
        there = await self._api.volumes(self._here, storage.name, vmid=self.vmid)
        taken = {v.volid for v in there} | set(used)
        number = 0
        while any(f"vm-{self.vmid}-disk-{number}" in volid for volid in taken):
            number += 1
        name = f"vm-{self.vmid}-disk-{number}"
        in_files = storage.type in FILE_STORAGES
        if in_files or form == "qcow2":
            name += f".{form}"
        expected = volume_id(storage, self.vmid, name)
        self.journal.add("volumes", expected)
        try:
            volid = await self._api.allocate_volume(
                self._here, storage.name, self.vmid, name, size, form
            )
        except PveRefusalError as error:
            if error.status or error.reason is Reason.EXISTS:
                self.journal.drop("volumes", expected)
            raise JobError(
                str(error),
                vm=str(self.vmid),
                disk=disk,
                phase="allocate",
                remedy=f"make room on {storage.name} or name another {key}.",
            ) from error
        if volid != expected:
            self.journal.add("volumes", volid)
            self.journal.drop("volumes", expected)
        return volid

    async def activate(self, volid: str) -> str:
        """Make a volume readable here; return its path."""
        await self._local.activate(volid, lambda: self.journal.add("active", volid))
        return await self._local.volume_path(volid)

    async def deactivate_all(self) -> None:
        """Give back what :meth:`activate` took."""
        for volid in list(self.journal.entry.active):
            with contextlib.suppress(PveplugError):
                await self._local.deactivate(volid)
            self.journal.drop("active", volid)

    def handed_over(self) -> None:
        """From now on the VM is its user's, and nothing is undone any more."""
        self.journal.close()
        self._journal = None

    async def undo(self) -> None:
        """Undo what isn't handed over, and let go of the id.

        Never raises: what brought us here is what the job log must end with.
        """
        journal, self._journal = self._journal, None
        try:
            if journal is not None:
                for line in await recover(self._node, self._local, journal.entry):
                    self._say.info(f"VM {self.vmid}: undone: {line}")
        except PveplugError as error:
            self._say.error(str(error))
        finally:
            await self._holding.aclose()
