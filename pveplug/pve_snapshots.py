# SPDX-License-Identifier: Apache-2.0
"""A VM's snapshots through the Proxmox VE REST API: the calls, typed.

Part of :class:`pveplug.pve.PveApi`; on a page of its own because each call says what
PVE does to the configuration and to the disks, which is more than its name tells. A
snapshot of a stopped VM is one of its disks and of its configuration. None of these
calls is repeated when its answer is lost: look at the list first.
"""

from __future__ import annotations

import re
from typing import Final

from pveplug.errors import LocalProtocolError
from pveplug.proto import pve_values as values
from pveplug.proto.pve import Value, path
from pveplug.proto.pve_values import Snapshot, VmConfig
from pveplug.pve_session import PveSession

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,39}", re.ASCII)
_RESERVED: Final = frozenset({"current", "pending"})


class SnapshotCalls(PveSession):
    """List, take, delete and go back to a VM's snapshots."""

    async def snapshot_list(self, node: str, vmid: int) -> list[Snapshot]:
        """Return the VM's snapshots, oldest first. Needs ``VM.Audit``."""
        where = path("nodes", node, "qemu", vmid, "snapshot")
        return values.parse_snapshots(await self.get(where))

    async def snapshots(self, node: str, vmid: int) -> list[str]:
        """Return the names of the VM's snapshots, oldest first."""
        return [found.name for found in await self.snapshot_list(node, vmid)]

    async def snapshot_config(self, node: str, vmid: int, name: str) -> VmConfig:
        """Return the configuration the snapshot holds.

        Needs one of ``VM.Snapshot``, ``VM.Snapshot.Rollback`` and ``VM.Audit``.

        Raises:
            PveRefusalError: ``Reason.MISSING`` when there is no such snapshot.
        """
        where = path("nodes", node, "qemu", vmid, "snapshot", name, "config")
        return values.parse_config(await self.get(where))

    async def snapshot_create(
        self,
        node: str,
        vmid: int,
        name: str,
        description: str = "",
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Take a snapshot of every disk, without memory; returns warnings.

        Needs ``VM.Snapshot``. The VM carries ``lock: snapshot`` meanwhile, and keeps it
        when the task dies. Nothing else may have a disk open: a qcow2 image that is
        written by two programs is lost.

        Args:
            node: where the VM is.
            vmid: the VM.
            name: a letter, then letters, digits, ``_`` and ``-``; 2 to 40 characters.
            description: free text.
            timeout_s: how long to wait for the task.

        Raises:
            PveRefusalError: ``Reason.EXISTS`` when the name is used,
                ``Reason.UNSUPPORTED`` when a disk is on a storage or in a format that
                has no snapshots.
        """
        if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise LocalProtocolError(f"not a name for a snapshot: {name!r}")
        params: dict[str, Value] = {"snapname": name}
        if description:
            params["description"] = description
        where = path("nodes", node, "qemu", vmid, "snapshot")
        return await self.task("POST", where, params, timeout_s=timeout_s)

    async def snapshot_delete(
        self,
        node: str,
        vmid: int,
        name: str,
        *,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Delete a snapshot from the configuration and every disk; returns warnings.

        Needs ``VM.Snapshot``. Its children become children of its parent, and a volume
        that only it held becomes ``unusedN``. ``force`` removes it from the
        configuration also when a disk's can't be removed.

        Raises:
            PveRefusalError: ``Reason.MISSING`` when there is no such snapshot.
        """
        where = path("nodes", node, "qemu", vmid, "snapshot", name)
        params: dict[str, Value] = {"force": True} if force else {}
        return await self.task("DELETE", where, params, timeout_s=timeout_s)

    async def rollback(
        self,
        node: str,
        vmid: int,
        name: str,
        *,
        start: bool = False,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Put disks and configuration back to a snapshot; returns warnings.

        Needs ``VM.Snapshot`` or ``VM.Snapshot.Rollback``; with ``start`` also
        ``VM.PowerMgmt``, and the start is a task of its own whose failure isn't seen.
        A running VM is stopped first, in 5 s. Of the configuration before it only the
        description and the ``unusedN`` stay: tags, name, ``onboot`` and NICs are
        the snapshot's. Disks that came after the snapshot become ``unusedN``, later
        snapshots stay, ``parent`` is the snapshot, and a ``vmgenid`` is made new. Until
        it ends the VM carries ``lock: rollback``, and keeps it when a disk refuses.

        Raises:
            PveRefusalError: ``Reason.MISSING`` when there is no such snapshot.
        """
        where = path("nodes", node, "qemu", vmid, "snapshot", name, "rollback")
        params: dict[str, Value] = {"start": True} if start else {}
        return await self.task("POST", where, params, timeout_s=timeout_s)
