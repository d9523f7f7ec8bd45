# SPDX-License-Identifier: Apache-2.0
"""Keeping others off a replica VM while we work on its disks.

Jobs of ours are kept off by the VM's lock file, from the moment it is changed until its
restore point is taken. PVE is kept off by ``lock: backup`` while a volume is open for
writing, so that nobody starts the VM: two writers destroy a qcow2, its snapshots
included. Only root's ``qm`` can set that lock; where we aren't root we do without.

A file beside the record proves that the lock is ours. What sets it inherits the lock
file's descriptor: whoever has the VM next finds either the proof, or no lock of ours.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

from pveplug.dr.provision import Site, translated
from pveplug.dr.store import Record, ReplicaError
from pveplug.errors import PveplugError
from pveplug.journal import own_vm
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError

log = logging.getLogger(__name__)

OWN_WAIT_S: Final = 60.0

HELD: Final = "held"
"""The file beside a replica's record that says that PVE's lock is ours."""


class Guard:
    """Of one replica; ``own``, then ``lock`` and ``unlock``, then ``release``."""

    def __init__(self, site: Site, record: Record, directory: Path) -> None:
        self._site = site
        self._record = record
        self._proof = directory / HELD
        self._owning = contextlib.AsyncExitStack()
        self._owned = 0

    async def own(self) -> None:
        """Be the only job of ours on the VM; a lock that we left there is removed.

        Raises:
            ReplicaError: ``busy``; ``role`` where the VM runs.
        """
        vmid = self._record.vmid
        if vmid and self._owned != vmid:
            await self.release()
            with translated(f"the replica VM {vmid}"):
                fd = await self._owning.enter_async_context(
                    own_vm(self._site.node.state_dir, vmid, OWN_WAIT_S)
                )
                self._owning.enter_context(self._site.local.keeping(fd))
                self._owned = vmid
                await self.unlock()
        self.must_be_off()

    def must_be_off(self) -> None:
        """Return if the VM doesn't run.

        Raises:
            ReplicaError: it does.
        """
        vmid = self._record.vmid
        if vmid and self._site.local.vm_running(vmid) is not None:
            raise ReplicaError(
                "role",
                f"the replica VM {vmid} runs, and nobody has failed over to it",
                remedy="stop it, or let a backup of it end; what it wrote is found by "
                "verification, or at once after going back to its newest snapshot. Use "
                "failover-test to try a replica.",
            )

    async def lock(self) -> None:
        """Keep PVE from starting or changing the VM; nothing if that was done.

        Raises:
            ReplicaError: ``pve``: somebody else holds it.
        """
        if self._proof.exists():
            return
        try:
            await self._site.local.set_lock(self._record.vmid, self._proof)
        except ProgramError as error:
            if error.reason is Reason.LOCKED:
                raise ReplicaError(
                    "pve", f"the replica VM {self._record.vmid}: {error}"
                ) from error
            log.info("replica vmid=%d not locked: %s", self._record.vmid, error)

    async def unlock(self) -> None:
        """Undo :meth:`lock`.

        Raises:
            ReplicaError: ``pve``: it can't be; the next opening tries again.
        """
        if not self._proof.exists():
            return
        with translated(f"the replica VM {self._record.vmid} can't be unlocked"):
            await self._site.local.unlock(self._record.vmid)
        with contextlib.suppress(OSError):
            self._proof.unlink()

    async def release(self) -> None:
        """Let others have the VM; never raises."""
        try:
            if self._owned:
                await self.unlock()
        except PveplugError as error:
            log.warning("replica vmid=%d: %s", self._owned, error)
        finally:
            self._owned = 0
            await self._owning.aclose()
