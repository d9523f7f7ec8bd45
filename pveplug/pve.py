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
    Resource,
    Storage,
    Upid,
    Version,
    VmConfig,
    VmStatus,
    Volume,
    parse_upid,
)
from pveplug.pve_session import PveSession
from pveplug.units import KiB

__all__ = [
    "ClusterNode",
    "Endpoint",
    "NotSentError",
    "OutcomeUnknownError",
    "PveApi",
    "PveRefusalError",
    "Reason",
    "Resource",
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


class PveApi(PveSession):
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

    async def snapshots(self, node: str, vmid: int) -> list[str]:
        """Return the names of the VM's snapshots."""
        where = path("nodes", node, "qemu", vmid, "snapshot")
        return values.parse_snapshots(await self.get(where))

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
