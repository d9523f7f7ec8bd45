# SPDX-License-Identifier: Apache-2.0
"""The target of a restore: a VM that comes into being, or nothing at all.

::

    claim the VMID ── create without disks ── lock ── per disk: allocate, serve, fill
        ── unlock ── attach the disks, set what must come last ── firewall ── start

Everything made is in the journal before it is made, so a failure at any point (a kill
included) ends with no VM, no volume and no lock. An existing VM is only touched at the
very end, when all its new disks are whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pveplug.config import RestoreConfig
from pveplug.errors import JobError, NbdError, PveplugError, RequestError
from pveplug.events import Reporter
from pveplug.images.chain import Chain
from pveplug.images.manifest import Manifest
from pveplug.nbd.client import UnixAddress
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.node import Node
from pveplug.proto.pve_values import FILE_STORAGES
from pveplug.pve import PveApi, Resource, Storage
from pveplug.pve_local import PveLocal
from pveplug.restore_disk import DiskWriter, Limit
from pveplug.tasks import to_the_end
from pveplug.unfinished import UnfinishedVm
from pveplug.vmconfig import drives, smbios_uuid
from pveplug.vmrestore import (
    DiskPlan,
    RestorePlan,
    Target,
    TargetStorage,
    Wishes,
    plan_single_disks,
    transform_for_restore,
)

log = logging.getLogger(__name__)

ENOSPC: Final = 28
"""As the NBD protocol numbers it."""
ZEROED_STORAGES: Final = FILE_STORAGES | {"lvmthin", "zfspool", "rbd", "zfs"}
"""Where a fresh volume reads as zeroes; thick LVM shows what was there before."""


@dataclass(slots=True)
class Volume:
    """A disk on its way to its volume."""

    plan: DiskPlan
    volid: str = ""
    writer: DiskWriter | None = None


@dataclass(slots=True)
class Goal:
    """What is to be made of one VM of the backup."""

    manifest: Manifest
    """Of the newest backup; where it is unknown, what is known so far."""
    chain: Chain | None
    volumes: dict[str, Volume] = field(default_factory=dict)
    job_ids: dict[str, int] = field(default_factory=dict)
    """JobIds of the chain's jobs, as far as they are known."""


class VmTarget:
    """One VM being restored: ``begin``, ``writer`` per disk, ``commit``, ``aclose``."""

    def __init__(
        self,
        config: RestoreConfig,
        node: Node,
        api: PveApi,
        local: PveLocal,
        goal: Goal,
        limit: Limit,
        say: Reporter,
    ) -> None:
        self._config = config
        self._node = node
        self._api = api
        self._local = local
        self._goal = goal
        self._limit = limit
        self._say = say
        self._here = config.connection.node
        self._made = UnfinishedVm(
            *(node, config.connection.node, api, local, say),
            kind="prove" if config.prove is not None else "restore",
        )
        self._serving = contextlib.AsyncExitStack()
        self._storages: dict[str, Storage] = {}
        self._replaced: dict[str, str] = {}
        self._plan: RestorePlan | None = None
        self._adopted = False
        self._original_exists = False
        self._stale: list[str] = []
        """Keys the VM was created with that its newest configuration doesn't have."""
        self._surplus: list[str] = []
        """Volumes of disks that its newest configuration doesn't have."""

    @property
    def vmid(self) -> int:
        """The VM's id; 0 until it is known."""
        return self._made.vmid

    @property
    def wanted(self) -> tuple[str, ...]:
        """Keys of the backup's disks that are restored."""
        return tuple(self._goal.volumes)

    # --- the beginning ---------------------------------------------------------------

    async def begin(self, job: str) -> None:
        """Claim the VMID and make what the disks will be attached to."""
        manifest = self._goal.manifest
        self._storages = {s.name: s for s in await self._api.storages(self._here)}
        resources = {r.vmid: r for r in await self._api.resources()}
        if self._config.disks:
            await self._begin_disks(job, resources)
        else:
            await self._begin_vm(job, resources)
        disks = ", ".join(
            f"{v.plan.source_key} as {v.plan.key} on {v.plan.storage} ({v.plan.format})"
            for v in self._goal.volumes.values()
        )
        self._say.info(
            f"VM {manifest.vmid} ({manifest.vm_name}) is restored to VM {self.vmid}: "
            f"{disks or 'configuration only'}"
        )

    async def _begin_vm(self, job: str, resources: Mapping[int, Resource]) -> None:
        manifest = self._goal.manifest
        wanted = self._config.vmid_for(manifest.vmid)
        if wanted is not None and wanted in resources:
            await self._check_overwrite(wanted, resources[wanted])
        target = await self._target(resources, replaced=wanted)
        self._plan = self._shaped(
            transform_for_restore(
                manifest.config,
                self._wishes(),
                target,
                disk_sizes=self._sizes(),
                fresh_uuid=str(uuid.uuid4()),
                running_machine=manifest.versions.get("machine"),
            )
        )
        for key, why in self._plan.dropped:
            self._say.info(f"{key} is not taken over: {why}")
        for text in self._plan.warnings:
            self._say.warning(text)
        self._goal.volumes = {p.source_key: Volume(p) for p in self._plan.disks}
        if wanted is not None and wanted in resources:
            await self._made.hold(wanted, job)
            config = await self._api.vm_config(self._here, wanted)
            self._replaced = {
                d.key: d.file for d in drives(config.values) if not d.is_cdrom
            }
            await self._made.lock()
            return
        await self._made.create(job, wanted, self._plan.params, self._config.pool)
        await self._made.lock()

    async def _begin_disks(self, job: str, resources: Mapping[int, Resource]) -> None:
        manifest = self._goal.manifest
        wanted = self._config.vmid_for(manifest.vmid)
        if wanted is None or wanted not in resources:
            raise JobError(
                f"disks={','.join(self._config.disks)} attaches to an existing VM, and "
                f"there is no VM {wanted or manifest.vmid}.",
                vm=str(wanted or manifest.vmid),
                phase="restore",
                remedy="name one with restore_vmid, or leave disks out for a new VM.",
            )
        if resources[wanted].node != self._here:
            raise self._elsewhere(wanted, resources[wanted].node)
        target = await self._target(resources, replaced=wanted)
        await self._made.hold(wanted, job)
        existing = await self._api.vm_config(self._here, wanted)
        plans = plan_single_disks(
            manifest.config,
            self._config.disks,
            existing.values,
            self._wishes(),
            target,
            disk_sizes=self._sizes(),
        )
        self._goal.volumes = {p.source_key: Volume(p) for p in plans}

    def _shaped(self, plan: RestorePlan) -> RestorePlan:
        """Return the plan as this kind of target wants it."""
        return plan

    def _sizes(self) -> dict[str, int]:
        chain = self._goal.chain
        if chain is not None:
            return {key: chain.final_size(key) for key in chain.keys}
        return {disk.key: disk.size for disk in self._goal.manifest.disks}

    def _wishes(self) -> Wishes:
        config = self._config
        return Wishes(
            storage=config.storage,
            storage_map=config.storage_map,
            bridge_map=config.bridge_map,
            mac=config.mac,
            uuid=config.uuid,
            name=config.name,
            disk_format=config.disk_format,
        )

    async def _target(
        self, resources: Mapping[int, Resource], replaced: int | None
    ) -> Target:
        storages = {
            s.name: TargetStorage(s.name, formats_of(s))
            for s in self._storages.values()
            if s.holds_images and s.active and s.enabled
        }
        manifest = self._goal.manifest
        twin = resources.get(manifest.vmid)
        there = False
        if twin is not None and manifest.vmid != replaced:
            with contextlib.suppress(PveplugError):
                config = await self._api.vm_config(twin.node, twin.vmid)
                there = smbios_uuid(config.values) == manifest.uuid
        self._original_exists = there
        return Target(
            storages=storages,
            is_root=self._config.connection.user == "root@pam",
            original_exists=there,
        )

    async def _check_overwrite(self, vmid: int, resource: Resource) -> None:
        manifest = self._goal.manifest
        if not self._config.overwrite:
            raise JobError(
                f"VM {vmid} ({resource.name}) exists.",
                vm=str(vmid),
                phase="restore",
                remedy="choose another restore_vmid, leave it out for the next free "
                "one, or set overwrite=yes to replace this VM's disks.",
            )
        if resource.node != self._here:
            raise self._elsewhere(vmid, resource.node)
        if resource.status != "stopped" or self._local.vm_running(vmid) is not None:
            raise JobError(
                "the VM runs; only a stopped VM is overwritten.",
                vm=str(vmid),
                phase="restore",
                remedy="shut it down first.",
            )
        config = await self._api.vm_config(self._here, vmid)
        if (smbios_uuid(config.values) or "") != manifest.uuid:
            raise JobError(
                f"the VM that has this id now is another one (SMBIOS UUID "
                f"{smbios_uuid(config.values) or 'none'}, the backup's is "
                f"{manifest.uuid or 'none'}).",
                vm=str(vmid),
                phase="restore",
                remedy="restore to another id.",
            )

    def _elsewhere(self, vmid: int, node: str) -> JobError:
        return JobError(
            f"the VM is on node {node}, and this File Daemon is on {self._here}.",
            vm=str(vmid),
            phase="restore",
            remedy=f"restore with restoreclient= the File Daemon of {node}.",
        )

    async def adopt(self, manifest: Manifest) -> None:
        """Take over a later job's description, where the newest wasn't known before.

        Only without owners: images are then replayed as they come, and so is what
        describes the VM.
        """
        self._goal.manifest = manifest
        self._adopted = True
        if self._config.disks:
            return
        resources = {r.vmid: r for r in await self._api.resources()}
        before = self._plan
        smbios = before.params.get("smbios1", "") if before else ""
        self._plan = self._shaped(
            transform_for_restore(
                manifest.config,
                self._wishes(),
                await self._target(resources, replaced=self.vmid),
                disk_sizes=self._sizes(),
                fresh_uuid=smbios_uuid({"smbios1": smbios}) or str(uuid.uuid4()),
                running_machine=manifest.versions.get("machine"),
            )
        )
        planned = {p.source_key: p for p in self._plan.disks}
        for key in [k for k in self._goal.volumes if k not in planned]:
            await self._drop(self._goal.volumes.pop(key))
        for key, plan in planned.items():
            if key not in self._goal.volumes:
                self._goal.volumes[key] = Volume(plan)
        if before is not None:
            self._stale = sorted(
                (before.params.keys() | set(self._stale)) - self._plan.params.keys()
            )

    async def _drop(self, volume: Volume) -> None:
        """Forget a disk that the VM no longer had; its volume goes at once."""
        if volume.writer is not None:
            await volume.writer.give_up()
        if volume.volid:
            self._surplus.append(volume.volid)
        self._say.info(f"{volume.plan.source_key} was removed from the VM later on")

    # --- disks -----------------------------------------------------------------------

    async def writer(self, key: str) -> DiskWriter:
        """Return the open writer of a disk; its volume is allocated at first."""
        volume = self._goal.volumes[key]
        if volume.writer is None:
            volume.writer = await self._open(volume)
        return volume.writer

    async def _open(self, volume: Volume) -> DiskWriter:
        plan = volume.plan
        storage = self._storages[plan.storage]
        volume.volid = await self._made.allocate(
            storage,
            plan.size,
            plan.format,
            used=[v.volid for v in self._goal.volumes.values() if v.volid],
            disk=plan.source_key,
        )
        path = await self._made.activate(volume.volid)
        os.makedirs(self._node.runtime_dir, mode=0o700, exist_ok=True)
        chain = self._goal.chain
        writer = DiskWriter(
            plan.source_key,
            chain=chain,
            zeroed=storage.type in ZEROED_STORAGES,
            limit=self._limit,
        )
        address: UnixAddress = await self._serving.enter_async_context(
            qemu_nbd(
                self._node,
                path,
                plan.format,
                socket_dir=self._node.runtime_dir,
                read_only=False,
            )
        )
        # Closed before its qemu-nbd is, on every way out.
        self._serving.push_async_callback(writer.give_up)
        await writer.open(address)
        return writer

    def write_failed(self, key: str, error: RequestError) -> JobError:
        """Return the error for a write that the target storage refused."""
        storage = self._goal.volumes[key].plan.storage
        return write_refused(self.vmid, key, storage, error)

    # --- the end ---------------------------------------------------------------------

    async def commit(self) -> None:
        """Attach the disks and hand the VM over; only now is it a VM again."""
        for key, volume in self._goal.volumes.items():
            if volume.writer is None or not volume.writer.complete:
                missing = volume.writer.missing if volume.writer else []
                raise JobError(
                    "Bacula did not deliver the whole disk"
                    + (f"; missing: {', '.join(missing)}." if missing else "."),
                    vm=str(self.vmid),
                    disk=key,
                    phase="restore",
                    remedy="select the whole directory of the VM, in every job of the "
                    "chain, or name the disks you want with disks=.",
                )
            try:
                await volume.writer.finish()
            except NbdError as error:
                raise self.write_failed(key, error) from error
        await self._stop_serving()
        await self._made.unlock()
        params: dict[str, str] = {}
        if self._plan is not None and (self._replaced or self._adopted):
            params.update(self._plan.params)
        for volume in self._goal.volumes.values():
            params[volume.plan.key] = volume.plan.drive_value(volume.volid)
        if self._plan is not None:
            params.update(self._plan.late_params)
        for text in await self._api.update_config(
            self._here, self.vmid, params, delete=self._stale
        ):
            self._say.warning(f"VM {self.vmid}: {text}")
        # From here on the volumes are the VM's; nothing is taken back any more.
        journal = self._made.journal
        journal.undone(volumes=list(self._surplus), created=False, active=[])
        for volid in self._surplus:
            await self._local.free_volume(volid)
            journal.drop("volumes", volid)
        await self._remove_replaced()
        self._write_firewall()
        for key, volume in self._goal.volumes.items():
            written = volume.writer.written if volume.writer else None
            if written is not None:
                self._say.info(
                    f"VM {self.vmid} {volume.plan.key}: {key} restored from "
                    f"{len(written.jobs)} jobs to {volume.volid}, received "
                    f"{written.received} bytes, superseded {written.superseded}"
                )
        self._made.handed_over()
        if self._config.start_after and not self._config.disks:
            await self._start()

    async def _start(self) -> None:
        """Start the VM; it is restored all the same where that fails."""
        try:
            await self._api.start_vm(self._here, self.vmid)
        except PveplugError as error:
            self._say.error(f"VM {self.vmid} is restored, but was not started: {error}")
        else:
            self._say.info(f"VM {self.vmid} was started")

    async def _stop_serving(self) -> None:
        """End every qemu-nbd, which says whether its image is whole."""
        await self._serving.aclose()
        await self._made.deactivate_all()

    async def _remove_replaced(self) -> None:
        """Free the old disks of an overwritten VM; PVE keeps them as unusedN."""
        if not self._replaced:
            return
        gone = [
            key
            for key in self._replaced
            if key not in {v.plan.key for v in self._goal.volumes.values()}
        ]
        if gone:
            await self._api.update_config(self._here, self.vmid, delete=gone)
        config = await self._api.vm_config(self._here, self.vmid)
        unused = [
            key
            for key, value in config.values.items()
            if key.startswith("unused") and value in self._replaced.values()
        ]
        if unused:
            await self._api.update_config(self._here, self.vmid, delete=unused)

    def _write_firewall(self) -> None:
        rules = self._goal.manifest.firewall
        if not rules or self._config.disks:
            return
        path = Path(self._node.firewall_dir) / f"{self.vmid}.fw"
        try:
            path.write_text(rules, encoding="utf-8")
        except OSError as error:
            self._say.warning(
                f"VM {self.vmid}: its firewall rules could not be written: {error}; "
                "they are in firewall.fw of the backup"
            )

    async def failed(self, error: BaseException) -> None:
        """Take note of why the restore ends, before everything is undone."""

    async def aclose(self) -> None:
        """Undo what is unfinished; nothing where ``commit`` went through."""
        await to_the_end(self._undo())

    async def _undo(self) -> None:
        """Never raise: what brought us here is what the job log must end with."""
        try:
            await self._serving.aclose()
        except Exception as error:
            log.warning("restore not served to its end: %s", error)
        await self._made.undo()


def formats_of(storage: Storage) -> tuple[str, ...]:
    """Return a storage's formats, its default first."""
    default = storage.default_format
    found = [
        f for f in storage.formats if f in ("raw", "qcow2", "vmdk") and f != default
    ]
    first = [default] if default in ("raw", "qcow2", "vmdk") else []
    return tuple(first + found) or ("raw",)


def write_refused(vmid: int, disk: str, storage: str, error: RequestError) -> JobError:
    """Return the error for a write that a storage refused."""
    full = isinstance(error, NbdError) and error.errno == ENOSPC
    return JobError(
        f"No space left on storage {storage}: {error}."
        if full
        else f"storage {storage} refused a write: {error}.",
        vm=str(vmid),
        disk=disk,
        phase="write",
        remedy="free space there or name another restore_storage."
        if full
        else "see the node's kernel log, or name another restore_storage.",
    )
