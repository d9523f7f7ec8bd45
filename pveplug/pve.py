# SPDX-License-Identifier: Apache-2.0
"""The Proxmox VE REST API: the calls we use, typed.

::

    async with PveApi(Endpoint("127.0.0.1"), TokenAuth("b@pve!plug", secret)) as api:
        config = await api.vm_config("pve1", 100)

Only reads, and calls that do no harm twice, are repeated after a failure. A changing
call whose answer was lost raises :class:`OutcomeUnknownError`: look before repeating.
aiohttp is imported when the first :class:`PveApi` is entered, not with this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pveplug.errors import (
    LocalProtocolError,
    RemoteProtocolError,
)
from pveplug.proto import pve_values as values
from pveplug.proto.pve import (
    NotSentError,
    OutcomeUnknownError,
    TlsTrustError,
    Value,
    path,
)
from pveplug.proto.pve_login import (
    Endpoint,
    TicketAuth,
    TokenAuth,
    colon_hex,
    parse_fingerprints,
)
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import (
    ClusterNode,
    ExecStatus,
    Resource,
    Snapshot,
    Storage,
    Upid,
    Version,
    VmConfig,
    VmStatus,
    Volume,
    parse_upid,
)
from pveplug.pve_snapshots import SnapshotCalls
from pveplug.units import KiB

__all__ = [
    "ClusterNode",
    "Endpoint",
    "ExecStatus",
    "NotSentError",
    "OutcomeUnknownError",
    "PveApi",
    "PveRefusalError",
    "Reason",
    "Resource",
    "Snapshot",
    "Storage",
    "TicketAuth",
    "TlsTrustError",
    "TokenAuth",
    "Upid",
    "Version",
    "VmConfig",
    "VmStatus",
    "Volume",
    "colon_hex",
    "parse_fingerprints",
    "parse_upid",
    "path",
]

# A value that makes PVE allocate or import a volume takes longer than pveproxy waits.
_ALLOCATES: Final = re.compile(
    r"(?:file=)?[A-Za-z][\w.\-]*:(?:\d+(?:\.\d+)?|cloudinit)(?:,|$)"
)
_VOLUME_KEY: Final = re.compile(r"(?:scsi|virtio|sata|ide|unused|efidisk|tpmstate)\d+")


class PveApi(SnapshotCalls):
    """The calls this product makes, each returning a value.

    See :class:`~pveplug.pve_session.PveSession` for what any of them may raise.
    """

    # --- the cluster ---------------------------------------------------------------

    async def version(self) -> Version:
        """Return the version of Proxmox VE."""
        return values.parse_version(await self.get("/version"))

    async def resources(self, *, containers: bool = False) -> list[Resource]:
        """Return the cluster's VMs that the user may see, by VMID.

        An empty list may mean "no privilege": PVE hides instead of refusing. With
        ``containers`` the LXC guests are in it too.
        """
        found = values.parse_resources(await self.get("/cluster/resources", type="vm"))
        return [item for item in found if containers or item.type == "qemu"]

    async def nodes(self) -> list[ClusterNode]:
        """Return the cluster's nodes."""
        return values.parse_nodes(await self.get("/nodes"))

    async def next_id(self) -> int:
        """Return a free VMID; another client may take it first."""
        data = await self.get("/cluster/nextid")
        try:
            return int(data)
        except (TypeError, ValueError):
            raise RemoteProtocolError(f"next VMID: {data!r} is not a number") from None

    async def permissions(self, path: str | None = None) -> dict[str, frozenset[str]]:
        """Return the caller's privileges, by object path."""
        data = (await self.call("GET", "/access/permissions", {"path": path})).data
        return values.parse_permissions(data)

    # --- a VM ----------------------------------------------------------------------

    async def vm_config(
        self, node: str, vmid: int, *, current: bool = True
    ) -> VmConfig:
        """Return the configuration in force; with ``current=False`` pending applied."""
        where = path("nodes", node, "qemu", vmid, "config")
        return values.parse_config(await self.get(where, current=current))

    async def vm_status(self, node: str, vmid: int) -> VmStatus:
        """Return what the VM is doing."""
        where = path("nodes", node, "qemu", vmid, "status", "current")
        return values.parse_status(await self.get(where))

    async def create_vm(
        self,
        node: str,
        vmid: int,
        params: Mapping[str, Value],
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Create a VM and wait until it is there; returns warnings.

        Raises:
            PveRefusalError: ``Reason.EXISTS`` when another client took the VMID.
        """
        where = path("nodes", node, "qemu")
        sent = {**params, "vmid": vmid}
        return await self.task("POST", where, sent, timeout_s=timeout_s)

    async def update_config(
        self,
        node: str,
        vmid: int,
        params: Mapping[str, Value] | None = None,
        *,
        delete: Sequence[str] = (),
        digest: str | None = None,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Change a configuration; returns warnings.

        What allocates or frees a volume runs as a task, because pveproxy gives up on
        the synchronous form after 30 s. Guest settings that can't be changed live end
        up as pending without a word from PVE.
        """
        sent: dict[str, Value] = dict(params or {})
        slow = any(
            _VOLUME_KEY.fullmatch(key)
            and isinstance(value, str)
            and (_ALLOCATES.match(value) or "import-from=" in value)
            for key, value in sent.items()
        ) or any(_VOLUME_KEY.fullmatch(key) for key in delete)
        if delete:
            sent["delete"] = ",".join(delete)
        if digest:
            sent["digest"] = digest
        where = path("nodes", node, "qemu", vmid, "config")
        return await self.task(
            "POST" if slow else "PUT", where, sent, timeout_s=timeout_s
        )

    async def destroy_vm(
        self,
        node: str,
        vmid: int,
        *,
        purge: bool = True,
        unreferenced: bool = False,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Remove a stopped VM with the volumes its configuration names.

        ``unreferenced`` removes every volume whose name says it belongs to this VMID.
        """
        return await self.task(
            "DELETE",
            path("nodes", node, "qemu", vmid),
            {"purge": purge, "destroy-unreferenced-disks": unreferenced},
            timeout_s=timeout_s,
        )

    async def start_vm(
        self, node: str, vmid: int, *, timeout_s: float | None = None
    ) -> list[str]:
        """Start a VM and wait until QEMU runs; returns warnings."""
        where = path("nodes", node, "qemu", vmid, "status", "start")
        return await self.task("POST", where, timeout_s=timeout_s)

    async def stop_vm(
        self, node: str, vmid: int, *, timeout_s: float | None = None
    ) -> list[str]:
        """Stop a VM at once, as if unplugged; returns warnings."""
        where = path("nodes", node, "qemu", vmid, "status", "stop")
        return await self.task("POST", where, timeout_s=timeout_s)

    async def shutdown_vm(
        self, node: str, vmid: int, *, timeout_s: int = 60, force: bool = False
    ) -> list[str]:
        """Ask the guest to shut down; ``force`` stops it when it doesn't in time."""
        where = path("nodes", node, "qemu", vmid, "status", "shutdown")
        params: dict[str, Value] = {"timeout": timeout_s, "forceStop": force}
        return await self.task("POST", where, params, timeout_s=timeout_s + 60.0)

    async def clone_vm(
        self,
        node: str,
        vmid: int,
        newid: int,
        *,
        name: str | None = None,
        snapname: str | None = None,
        full: bool = True,
        storage: str | None = None,
        fmt: str | None = None,
        pool: str | None = None,
        description: str | None = None,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Copy a VM, or one of its snapshots, to a new VMID; returns warnings.

        Needs ``VM.Clone`` on the VM, ``VM.Allocate`` on the new one or on ``pool``, and
        ``Datastore.AllocateSpace`` on every storage written to; ``SDN.Use`` on the
        bridges of its NICs. Both VMs carry a lock meanwhile (``clone`` and ``create``).
        The copy has new MAC addresses, a new ``vmgenid`` and ``smbios1`` UUID, and no
        snapshots.

        Args:
            node: where the VM is.
            vmid: the VM to copy.
            newid: the copy's VMID.
            name: the copy's name; PVE calls it ``Copy-of-VM-…`` otherwise.
            snapname: the snapshot to copy; the current state if it is not given.
            full: copy the disks; otherwise a linked clone, of a template only.
            storage: where to; only with ``full``. Otherwise where the disks are.
            fmt: ``raw``, ``qcow2`` or ``vmdk`` on file storages; only with ``full``.
            pool: the pool the copy goes into.
            description: the copy's description.
            timeout_s: how long to wait; copying takes as long as the disks are large.

        Raises:
            PveRefusalError: ``Reason.EXISTS`` when the VMID is taken,
                ``Reason.MISSING`` when there is no such snapshot.
        """
        params: dict[str, Value] = {"newid": newid, "full": full}
        given = {
            "name": name,
            "snapname": snapname,
            "storage": storage,
            "format": fmt,
            "pool": pool,
            "description": description,
        }
        params |= {key: value for key, value in given.items() if value is not None}
        where = path("nodes", node, "qemu", vmid, "clone")
        return await self.task("POST", where, params, timeout_s=timeout_s)

    async def has_feature(
        self, node: str, vmid: int, feature: str, *, snapname: str | None = None
    ) -> bool:
        """Tell whether every disk of the VM can do that; needs ``VM.Audit``.

        Args:
            node: where the VM is.
            vmid: the VM.
            feature: ``snapshot``, ``clone`` (linked) or ``copy`` (a full clone).
            snapname: ask for the disks of this snapshot.
        """
        where = path("nodes", node, "qemu", vmid, "feature")
        answer = await self.get(where, feature=feature, snapname=snapname)
        return values.parse_feature(answer)

    async def resize_disk(
        self,
        node: str,
        vmid: int,
        key: str,
        size_bytes: int,
        *,
        digest: str | None = None,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Grow the disk ``key`` to ``size_bytes``; returns warnings.

        Needs ``VM.Config.Disk``, and ``Datastore.AllocateSpace`` on its storage. PVE
        refuses to shrink. What a snapshot holds keeps its size.
        """
        params: dict[str, Value] = {"disk": key, "size": str(size_bytes)}
        if digest:
            params["digest"] = digest
        where = path("nodes", node, "qemu", vmid, "resize")
        return await self.task("PUT", where, params, timeout_s=timeout_s)

    async def unlink_disk(
        self,
        node: str,
        vmid: int,
        key: str,
        *,
        destroy: bool = False,
        digest: str | None = None,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Take a disk out of the configuration; returns warnings.

        Needs ``VM.Config.Disk``, to free also ``Datastore.AllocateSpace``. The volume
        stays as ``unusedN``, or is freed with ``destroy``. An ``unusedN`` itself is
        always freed. PVE refuses to free a volume that a snapshot holds, and anything
        of a VM with ``protection: 1``.
        """
        # Not PUT …/unlink: that is the same work without a task, given up after 30 s.
        params: dict[str, Value] = {"force": True} if destroy else {}
        return await self.update_config(
            node, vmid, params, delete=[key], digest=digest, timeout_s=timeout_s
        )

    async def convert_to_template(self, node: str, vmid: int) -> list[str]:
        """Make a stopped VM a template; returns warnings."""
        return await self.task("POST", path("nodes", node, "qemu", vmid, "template"))

    # --- its guest agent -----------------------------------------------------------

    async def agent_ping(self, node: str, vmid: int) -> None:
        """Return if the agent answers.

        Raises:
            PveRefusalError: ``Reason.AGENT_MISSING`` or ``Reason.AGENT_SILENT``.
        """
        await self._agent(node, vmid, "ping", repeatable=True)

    async def agent_exec(
        self, node: str, vmid: int, command: Sequence[str], *, stdin: str | None = None
    ) -> int:
        """Start a program in the guest; returns its process id there.

        Needs ``VM.GuestAgent.Unrestricted`` (8.4: ``VM.Monitor``). Not repeated when
        the answer is lost: the program may run.
        """
        if not command:
            raise LocalProtocolError("no program to run in the guest")
        params: dict[str, Value] = {"command": list(command), "input-data": stdin}
        where = path("nodes", node, "qemu", vmid, "agent", "exec")
        return values.parse_exec((await self.call("POST", where, params)).data)

    async def agent_exec_status(self, node: str, vmid: int, pid: int) -> ExecStatus:
        """Return how a program of :meth:`agent_exec` fares.

        Needs what :meth:`agent_exec` needs. The guest forgets a program whose end it
        has told once.
        """
        where = path("nodes", node, "qemu", vmid, "agent", "exec-status")
        return values.parse_exec_status(await self.get(where, pid=pid))

    async def fsfreeze_status(self, node: str, vmid: int) -> str:
        """Return ``thawed`` or ``frozen``."""
        return str(await self._agent(node, vmid, "fsfreeze-status", repeatable=True))

    async def fsfreeze_freeze(self, node: str, vmid: int) -> int:
        """Freeze the guest's file systems; returns how many.

        Have a watchdog running first (:mod:`pveplug.watchdog`): a lost answer leaves
        the guest frozen.
        """
        return _count(await self._agent(node, vmid, "fsfreeze-freeze"))

    async def fsfreeze_thaw(self, node: str, vmid: int) -> int:
        """Thaw the guest's file systems; returns how many. Safe to repeat."""
        return _count(await self._agent(node, vmid, "fsfreeze-thaw", repeatable=True))

    async def _agent(
        self, node: str, vmid: int, command: str, *, repeatable: bool = False
    ) -> Any:
        where = path("nodes", node, "qemu", vmid, "agent", command)
        answer = await self.call("POST", where, repeatable=repeatable)
        return values.parse_agent_result(answer.data)

    # --- storage -------------------------------------------------------------------

    async def storages(self, node: str) -> list[Storage]:
        """Return the storages a node knows, with the image formats they take."""
        where = path("nodes", node, "storage")
        return values.parse_storages(await self.get(where, format=True))

    async def storage_settings(self) -> dict[str, dict[str, str]]:
        """Return what ``storage.cfg`` says of each storage one may see, by name."""
        rows = await self.get(path("storage"))
        return {
            str(row["storage"]): {str(k): str(v) for k, v in row.items()}
            for row in rows or []
            if isinstance(row, dict) and "storage" in row
        }

    async def volumes(
        self, node: str, storage: str, *, vmid: int | None = None
    ) -> list[Volume]:
        """Return a storage's VM images, of one VM if ``vmid`` is given."""
        where = path("nodes", node, "storage", storage, "content")
        data = await self.get(where, content="images", vmid=vmid)
        return values.parse_volumes(data)

    async def allocate_volume(
        self,
        node: str,
        storage: str,
        vmid: int,
        filename: str,
        size_bytes: int,
        fmt: str | None = None,
    ) -> str:
        """Allocate a volume and return its id.

        Args:
            node: a node on which the storage is active.
            storage: its name.
            vmid: the VM that will own it.
            filename: ``vm-<vmid>-disk-<n>``, with ``.<fmt>`` on file storages and for
                qcow2 on LVM. PVE doesn't check it against ``vmid`` everywhere: we do.
            size_bytes: rounded up to KiB here, and to its own unit by the storage.
            fmt: ``raw`` or ``qcow2``; None leaves it to the file name's suffix.

        The volume may hold old data (thick LVM isn't zeroed) and belongs to no
        configuration yet: attach or delete it.
        """
        if not re.fullmatch(rf"vm-{vmid}-[\w-]+(?:\.\w+)?", filename, re.ASCII):
            raise LocalProtocolError(f"volume name {filename!r} is not of VM {vmid}")
        if size_bytes <= 0:
            raise LocalProtocolError(f"volume {filename}: size {size_bytes}")
        data = await self.post(
            path("nodes", node, "storage", storage, "content"),
            vmid=vmid,
            filename=filename,
            size=str(-(-size_bytes // KiB)),
            format=fmt,
        )
        if not isinstance(data, str) or not data.startswith(f"{storage}:"):
            raise RemoteProtocolError(f"allocating {filename}: answered {data!r}")
        return data

    async def delete_volume(
        self, node: str, volid: str, *, timeout_s: float | None = None
    ) -> None:
        """Free a volume, whether or not a configuration still names it."""
        storage, colon, _ = volid.partition(":")
        if not colon:
            raise LocalProtocolError(f"not a volume id: {volid!r}")
        where = path("nodes", node, "storage", storage, "content", volid)
        await self.task("DELETE", where, timeout_s=timeout_s)


def _count(result: Any) -> int:
    try:
        return int(result)
    except (TypeError, ValueError):
        raise RemoteProtocolError(
            f"guest agent: {result!r} is not a number of file systems"
        ) from None
