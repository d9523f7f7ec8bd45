# SPDX-License-Identifier: Apache-2.0
"""The target of an instant recovery: a VM that runs while its disks still come.

Takes the place of :class:`~pveplug.restore_vm.VmTarget` in a restore job::

    claim the VMID ── create without disks ── lock ── overlays, landing store, keeper
        images ──► landing store ──► (keeper) ──► VM
        EFI and TPM complete, first clusters here ── unlock ── attach ── start
    end of the job: everything is here ── the keeper moves the disks ── done

Until the VM is handed over (which is before its start) a failure undoes everything.
From then on nothing is undone: what is owed makes the guest wait, and the next run of
the restore job goes on where this one ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Final

from pveplug.config import Instant, RestoreConfig
from pveplug.errors import (
    IntegrityError,
    JobError,
    PveplugError,
    RequestError,
    TransportError,
    TruncatedError,
)
from pveplug.events import Reporter
from pveplug.images.edges import Edges
from pveplug.ir import overlay, pausing
from pveplug.ir.control import State, ask, retire, start_keeper
from pveplug.ir.firmware import copy_landed
from pveplug.ir.landing import Landing, LandingError
from pveplug.ir.notes import noted, running_note, tagged
from pveplug.ir.presence import Mark
from pveplug.ir.record import LandedDisk, Record, Recovery, recoveries
from pveplug.ir.sink import LandingSink
from pveplug.node import Node
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.restore_disk import DiskWriter, Limit
from pveplug.restore_vm import Goal, VmTarget, Volume
from pveplug.tasks import to_the_end
from pveplug.units import human
from pveplug.values import Mapped
from pveplug.vmconfig import drives, properties, render_properties, smbios_uuid
from pveplug.vmrestore import DiskPlan, RestorePlan, Wishes

log = logging.getLogger(__name__)

FEED_WAIT_S: Final = 60.0
LOOK_S: Final = 0.1
MIGRATION_LOOK_S: Final = 1.0
PROGRESS_S: Final = 30.0
START_S: Final = 300.0
FIRMWARE: Final = ("efidisk0", "tpmstate0")
SYNC_STORAGES: Final = frozenset({"lvm", "cifs"})
"""On which PVE refuses io_uring, QEMU's default, in a move."""


class InstantTarget(VmTarget):
    """One VM being recovered; used as :class:`VmTarget` is."""

    def __init__(
        self,
        config: RestoreConfig,
        instant: Instant,
        node: Node,
        api: PveApi,
        local: PveLocal,
        goal: Goal,
        limit: Limit,
        say: Reporter,
    ) -> None:
        super().__init__(config, node, api, local, goal, limit, say)
        self._instant = instant
        self._landings: dict[str, Landing] = {}
        self._sinks: dict[str, LandingSink] = {}
        self._blank: set[str] = set()
        """Disks of which all that reads as zeroes is marked."""
        self._feeding = contextlib.AsyncExitStack()
        self._recovery: Recovery | None = None
        self._record: Record | None = None
        self._resumed = False
        self._starter: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._start_failed = ""
        self._starting = False
        self._job = ""

    @property
    def recovery(self) -> Recovery:
        """Where its things are."""
        if self._recovery is None:
            raise JobError("the recovery has not begun", phase="instant recovery")
        return self._recovery

    @property
    def record(self) -> Record:
        """What is written down of it."""
        if self._record is None:
            raise JobError("the recovery has not begun", phase="instant recovery")
        return self._record

    @property
    def vmid(self) -> int:
        """The VM's id; 0 until it is known."""
        return self._record.vmid if self._resumed and self._record else super().vmid

    # --- the beginning ---------------------------------------------------------------

    async def begin(self, job: str) -> None:
        """Make the VM, or find the one that an earlier job has begun."""
        if self._goal.chain is not None and await self._resume(job):
            return
        self._job = job
        await super().begin(job)
        self._recovery = Recovery(self._node, self.vmid)
        await self._clear_old()
        self.recovery.make()
        await self._feeding.enter_async_context(self.recovery.feeding(FEED_WAIT_S))
        if self._goal.chain is None:
            self._say.info(
                f"VM {self.vmid}: without restore objects it is not known which job "
                "has the last word on a cluster: the VM starts when everything is here"
            )
            return
        self._check_room()
        await self._establish(job)
        self._starter = asyncio.create_task(self._start_early(), name="start the VM")

    def _wishes(self) -> Wishes:
        """As in a restore; ``ir_target_storage`` is where all disks end."""
        wishes = super()._wishes()
        if self._instant.target_storage is None:
            return wishes
        return dataclasses.replace(
            wishes, storage=self._instant.target_storage, storage_map=Mapped()
        )

    def _shaped(self, plan: RestorePlan) -> RestorePlan:
        """Unplug the network cards where two VMs of one address could meet."""
        wish = self._instant.network
        if wish == "up" or (wish == "auto" and not self._original_exists):
            return plan
        params = {
            key: _unplugged(value) if re.fullmatch(r"net\d+", key) else value
            for key, value in plan.params.items()
        }
        if params == plan.params:
            return plan
        why = "ir_network=down" if wish == "down" else "the original VM still exists"
        warning = (
            f"its network cards are unplugged (link_down=1), for {why}; plug them in "
            "in Proxmox VE, or give ir_network=up"
        )
        return dataclasses.replace(
            plan, params=params, warnings=(*plan.warnings, warning)
        )

    async def _resume(self, job: str) -> bool:
        """Go on with a recovery of the same backup that isn't complete.

        Raises:
            JobError: the id that is wanted is under another recovery, or under this
                one and it can't go on.
        """
        wanted = self._config.vmid_for(self._goal.manifest.vmid)
        for vmid in recoveries(self._node):
            recovery = Recovery(self._node, vmid)
            if wanted not in (None, vmid):
                continue
            try:
                record = recovery.load()
            except IntegrityError:
                if wanted is not None:
                    raise
                continue  # somebody else's affair
            if record is None or not await self._can_go_on(record, wanted):
                continue
            await self._feeding.enter_async_context(recovery.feeding(FEED_WAIT_S))
            if (record := recovery.load()) is None:
                # It came to its end, or was discarded, while we waited.
                await self._feeding.aclose()
                continue
            self._recovery, self._record, self._resumed = recovery, record, True
            recovery.make_runtime()
            state = await start_keeper(self._node, recovery)
            if not state.owed:
                self._say.info(
                    f"VM {vmid}: everything of job {record.head} is here already"
                )
            else:
                self._say.info(
                    f"VM {vmid}: goes on where an earlier job ended, "
                    f"{human(state.owed)} are owed"
                )
            self._goal.volumes = {
                disk.source: Volume(_plan_of(disk)) for disk in record.disks
            }
            for disk in record.disks:
                self._goal.volumes[disk.source].volid = disk.overlay
                self._landings[disk.source] = self._opened(disk.source)
            if not record.started:
                await self._resume_start(job)
            return True
        return False

    async def _resume_start(self, job: str) -> None:
        """Have a VM started that no earlier job came to start."""
        self._storages = {s.name: s for s in await self._api.storages(self._here)}
        await self._made.hold(self.vmid, job)
        self._starter = asyncio.create_task(self._start_early(), name="start the VM")

    async def _can_go_on(self, record: Record, wanted: int | None) -> bool:
        """Whether a recovery is the one to go on with.

        Raises:
            JobError: it has the id that is wanted, and can't be gone on with.
        """
        manifest = self._goal.manifest
        vmid = record.vmid
        try:
            config = await self._api.vm_config(self._here, vmid)
        except PveRefusalError as error:
            if error.reason is Reason.VM_MISSING:
                return False  # removed by its user; what is left goes with its keeper
            raise
        if smbios_uuid(config.values) != record.uuid or not record.handed:
            return False  # whoever makes a VM of this id will say so
        same = (
            record.head == manifest.job
            and record.directory == manifest.directory.rsplit("/", 1)[0]
        )
        if same and not record.damage:
            return True
        if wanted is None:
            return False
        raise JobError(
            f"what was recovered is not what was stored: {record.damage}"
            if same
            else f"it is being recovered from another backup, {record.head}.",
            vm=str(vmid),
            phase="instant recovery",
            remedy=f"pveplug ir discard --vmid {vmid}, then restore an older backup."
            if same
            else f"name another restore_vmid, or give that recovery up: pveplug ir "
            f"discard --vmid {vmid}.",
        )

    async def _clear_old(self) -> None:
        """Remove what a VM that had this id before has left in the landing store."""
        if self.recovery.exists():
            await retire(self._node, self.recovery)

    def _check_room(self) -> None:
        """Refuse early what can't end well.

        Raises:
            JobError: the landing store is too small for what will come.
        """
        chain = self._goal.chain
        assert chain is not None  # noqa: S101 - asked for before
        need = sum(
            chain.owned(job, key).data_bytes
            for key in chain.keys
            if chain.mapped(key)
            for job in chain.members(key)
        )
        found = os.statvfs(self.recovery.folder)
        free = found.f_bavail * found.f_frsize
        if need > free:
            raise JobError(
                f"its disks hold {human(need)}, and {self._node.landing_dir} has only "
                f"{human(free)} free.",
                vm=str(self.vmid),
                phase="instant recovery",
                remedy="name a place with more room by landing_dir in node.toml, or "
                "restore without mode=instant.",
            )

    async def _establish(self, job: str) -> None:
        """Make overlays, landing store and keeper; nothing of it is the VM's yet."""
        instant = self._instant
        settings = await self._api.storage_settings()
        where = overlay.choose(
            instant.overlay_storage, self._storages.values(), settings
        )
        manifest = self._goal.manifest
        plan = self._plan
        assert plan is not None  # noqa: S101 - begin() has made it
        made = self._made.journal.entry
        record = Record(
            vmid=self.vmid,
            uuid=made.uuid,
            node=self._here,
            directory=manifest.directory.rsplit("/", 1)[0],
            head=manifest.job,
            job=job,
            created=time.time(),
            timeout=instant.timeout,
            jobs=list(self._goal.chain.jobs) if self._goal.chain else [],
            auto_migrate=instant.auto_migrate,
            bwlimit=instant.bwlimit,
            bind=instant.nbd_bind or "",
            port=_port(instant),
            notes={
                key: plan.late_params.get(key, "") for key in ("onboot", "protection")
            },
            config=self._told(plan),
            stale=self._stale,
            prove=self._config.prove is not None,
        )
        self._record = record
        record.disks = [
            LandedDisk(
                volume.plan.source_key,
                volume.plan.key,
                volume.plan.size,
                volume.plan.storage,
                volume.plan.format,
                "" if volume.plan.key in FIRMWARE else where.name,  # volume id below
                volume.plan.options,
            )
            for volume in self._goal.volumes.values()
        ]
        for disk in record.disks:
            if disk.source not in self._landings:
                self._landings[disk.source] = Landing.create(
                    self.recovery.folder, self.recovery.runtime, disk.source, disk.size
                )
        for number, disk in enumerate(record.disks):
            if not disk.overlay:
                continue
            volume = self._goal.volumes[disk.source]
            volume.volid = await self._made.allocate(
                where,
                disk.size,
                "qcow2",
                used=[v.volid for v in self._goal.volumes.values() if v.volid],
                disk=disk.source,
                key="ir_overlay_storage",
            )
            record.disks[number] = dataclasses.replace(disk, overlay=volume.volid)
            await overlay.write_overlay(
                self._node,
                await self._local.volume_path(volume.volid),
                disk.size,
                overlay.backing_name(record, self.recovery, disk.source),
            )
        self.recovery.save(record)
        await start_keeper(self._node, self.recovery)

    def _told(self, plan: RestorePlan) -> dict[str, str]:
        """Return what the VM is told besides its disks when it gets them."""
        told = dict(plan.params) if self._adopted else {}
        told.update(plan.late_params)
        told["onboot"] = "0"
        if self._config.prove is None:
            told["protection"] = "1"
            told["tags"] = tagged(plan.params.get("tags", ""))
            told["description"] = noted(
                plan.params.get("description", ""),
                running_note(self.vmid, self._goal.manifest.job),
            )
        return told

    # --- disks -----------------------------------------------------------------------

    async def writer(self, key: str) -> DiskWriter:
        """Return the open writer of a disk; a start that can't be is told now."""
        starter = self._starter
        if starter is not None and starter.done() and not starter.cancelled():
            starter.result()
        return await super().writer(key)

    def _opened(self, key: str) -> Landing:
        return Landing.open(self.recovery.folder, self.recovery.runtime, key)

    async def _open(self, volume: Volume) -> DiskWriter:
        plan = volume.plan
        key = plan.source_key
        chain = self._goal.chain
        final = chain is not None and chain.mapped(key)
        if key not in self._landings:
            self._landings[key] = Landing.create(
                self.recovery.folder, self.recovery.runtime, key, plan.size
            )
        writer = DiskWriter(key, chain=chain, zeroed=False, limit=self._limit)
        self._serving.push_async_callback(writer.give_up)
        sink = self._sinks[key] = LandingSink(self._landings[key], final=final)
        await writer.begin(sink, self._landings[key].size)
        return writer

    async def take_edges(self, job: str, edges: Edges) -> None:
        """Land the copies of which a job has the last word, ahead of its images.

        With them all that reads as zeroes in the end: no job brings that.

        Raises:
            IntegrityError: they are not of this job's disks, or not what was stored.
            JobError: the landing store refused a write.
        """
        chain = self._goal.chain
        if chain is None:
            return
        for key, volume in self._goal.volumes.items():
            if not chain.mapped(key):
                continue
            entry = chain.disk(job, key)
            copies = edges.disks.get(entry.key) if entry else None
            if entry and copies and copies.size != entry.size:
                raise IntegrityError(
                    f"job {job}: edges are of a disk {entry.key} of {copies.size} "
                    f"bytes, its manifest says {entry.size}"
                )
            known = key in self._blank
            if known and (copies is None or not copies.runs):
                continue
            # A writer of its own, for the one of the images keeps its buffers.
            writer = volume.writer or DiskWriter(
                key, chain=chain, zeroed=known, limit=self._limit
            )
            try:
                if writer is not volume.writer:
                    landing = self._landings[key]
                    await writer.begin(LandingSink(landing), landing.size)
                if copies is not None:
                    await writer.copy(job, copies)
                if writer is not volume.writer:
                    await writer.finish()
            except LandingError as error:
                raise self.write_failed(key, error) from error
            finally:
                if writer is not volume.writer:
                    await writer.give_up()
            self._blank.add(key)

    def write_failed(self, key: str, error: RequestError) -> JobError:
        """Return the error for what the landing store refused."""
        return JobError(
            f"{error}.",
            vm=str(self.vmid),
            disk=key,
            phase="land",
            remedy=f"make room in {self._node.landing_dir}, then run the restore "
            "again; the VM's own writes are safe, and its reads wait.",
        )

    # --- the VM ----------------------------------------------------------------------

    async def _start_early(self) -> None:
        """Start the VM as soon as the beginning of each of its disks is here.

        QEMU reads a disk's first sector, to guess its geometry, before it answers
        anybody: were that owed, PVE would give the start up.
        """
        served = [disk.source for disk in self.record.served]
        firmware = [d.source for d in self.record.disks if not d.overlay]
        while True:
            if all(self._landings[key].complete for key in firmware) and all(
                self._begun(key) for key in served
            ):
                break
            await asyncio.sleep(LOOK_S)
        self._starting = True
        await to_the_end(self._start_vm())

    def _begun(self, key: str) -> bool:
        """Whether a disk's first cluster is here."""
        return next(self._landings[key].kinds(0, 1))[2] is not Mark.OWED

    async def _start_vm(self) -> None:
        """Give the VM its disks, hand it over, start it."""
        await self._attach()
        await self._before_start()
        here = sum(
            landing.size - landing.owed_bytes for landing in self._landings.values()
        )
        size = sum(landing.size for landing in self._landings.values())
        self._note(started=True)
        try:
            await self._api.start_vm(self._here, self.vmid, timeout_s=START_S)
        except PveplugError as error:
            self._start_failed = str(error)
            self._say.error(
                f"VM {self.vmid} was not started: {error}. Its disks go on landing; "
                f"mend that and start it (qm start {self.vmid})"
            )
        else:
            self._say.info(
                f"VM {self.vmid} runs, {time.monotonic() - self._began:.1f} s after "
                f"this job began on it; {human(here)} of {human(size)} are here"
            )

    async def _before_start(self) -> None:
        """Hand the VM over: from here on nothing of it is undone."""
        for volid in self._surplus:
            await self._local.free_volume(volid)
        self._note(handed=True)
        self._made.handed_over()

    def _note(self, **changes: bool | str | list[str]) -> None:
        """Change the record; it says what has been written down, and nothing else.

        Raises:
            TransportError: it can't be written down.
        """
        changed = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]
        self.recovery.save(changed)
        self._record = changed

    async def _attach(self) -> None:
        for disk in self.record.disks:
            if not disk.overlay:
                await self._place_firmware(disk)
        await self._made.unlock()
        params = dict(self.record.config)
        for disk in self.record.disks:
            volume = self._goal.volumes[disk.source]
            value = dataclasses.replace(
                volume.plan, options=_patient(disk, self._kind_of(disk.storage))
            ).drive_value(volume.volid)
            params[disk.key] = (
                value if disk.overlay else volume.plan.drive_value(volume.volid)
            )
        for text in await self._api.update_config(
            self._here, self.vmid, params, delete=self.record.stale
        ):
            self._say.warning(f"VM {self.vmid}: {text}")
        self._write_firewall()

    def _kind_of(self, storage: str) -> str:
        found = self._storages.get(storage)
        return found.type if found else ""

    async def _place_firmware(self, disk: LandedDisk) -> None:
        """Copy EFI variables or TPM state, now whole, to a volume of their own."""
        volume = self._goal.volumes[disk.source]
        if self._resumed:
            # The job before may have been killed when it had just been placed.
            config = await self._api.vm_config(self._here, self.vmid)
            there = {drive.key: drive.file for drive in drives(config.values)}
            if disk.key in there:
                volume.volid = there[disk.key]
                return
        storage = self._storages[disk.storage]
        volume.volid = await self._made.allocate(
            storage,
            disk.size,
            disk.form,
            used=[v.volid for v in self._goal.volumes.values() if v.volid],
            disk=disk.source,
        )
        path = await self._made.activate(volume.volid)
        await copy_landed(self._node, self._landings[disk.source], path, disk.form)
        await self._made.deactivate_all()

    # --- the end ---------------------------------------------------------------------

    async def commit(self) -> None:
        """See that all has landed that this job brought, and lead the VM on."""
        await self._land()
        self._note(verified=sorted({*self.record.verified, *self._compared()}))
        owed = {
            key: landing.owed_bytes
            for key, landing in self._landings.items()
            if landing.owed_bytes
        }
        if not self._resumed and not self.record.handed:
            # Not startable yet, and more jobs may follow: it is the user's now.
            await self._hand_over_unstarted()
        if owed:
            self._tell_owed(owed)
            return
        if unproven := self._unverified():
            self._say.warning(
                f"VM {self.vmid}: all of its data is here, but what came of "
                f"{', '.join(unproven)} was cut before it could be compared with its "
                "digests; its disks stay where they are until that is restored again "
                "(pveplug ir start does)"
            )
            return
        self._note(whole=True)
        self._say.info(f"VM {self.vmid}: all of its data is here")
        await self._feeding.aclose()
        await self._see_it_move()

    def _compared(self) -> set[str]:
        """Return the images that came whole and were as stored, as ``scsi0/JOB``."""
        return {
            f"{key}/{job}"
            for key, volume in self._goal.volumes.items()
            if volume.writer is not None
            for job in volume.writer.written.jobs
        }

    def _unverified(self) -> list[str]:
        """Return the jobs of which an image was never compared as a whole."""
        chain = self._goal.chain
        if chain is None:
            return []
        seen = set(self.record.verified)
        return [
            job
            for job in chain.jobs
            if any(
                job in chain.members(key) and f"{key}/{job}" not in seen
                for key in chain.keys
            )
        ]

    async def _land(self) -> None:
        """Bring what this job delivered to its end, and start the VM if it can run."""
        for key, volume in self._goal.volumes.items():
            if volume.writer is not None:
                try:
                    await volume.writer.finish()
                except LandingError as error:
                    raise self.write_failed(key, error) from error
        await self._serving.aclose()
        for key, sink in self._sinks.items():
            self._say.info(f"VM {self.vmid} {key}: {sink.landed} bytes landed")
        if self._goal.chain is None:
            self._check_delivered()
            await self._establish(self._job)
            await self._start_vm()
        elif self._starter is not None:
            await self._started_or_not()

    async def _hand_over_unstarted(self) -> None:
        await self._made.unlock()
        self._note(handed=True)
        self._made.handed_over()

    async def _started_or_not(self) -> None:
        """Let the starter end; it has nothing to wait for any more."""
        starter = self._starter
        assert starter is not None  # noqa: S101 - asked for before
        done, _ = await asyncio.wait([starter], timeout=5 * LOOK_S)
        if not done and not self._starting:
            starter.cancel()
            await asyncio.wait([starter])
        await asyncio.wait([starter])
        self._starter = None  # not before: who is cancelled here must wait for it
        if not starter.cancelled():
            starter.result()

    def _check_delivered(self) -> None:
        for key, volume in self._goal.volumes.items():
            if volume.writer is None or not volume.writer.complete:
                raise JobError(
                    "Bacula did not deliver the whole disk.",
                    vm=str(self.vmid),
                    disk=key,
                    phase="instant recovery",
                    remedy="select the whole directory of the VM, in every job of the "
                    "chain.",
                )

    def _tell_owed(self, owed: Mapping[str, int]) -> None:
        chain = self._goal.chain
        missing = sorted(
            {
                job
                for key in owed
                for job in (chain.members(key) if chain else ())
                if self._owes(job, key)
            }
        )
        listed = ", ".join(f"{key} {human(size)}" for key, size in sorted(owed.items()))
        self._say.warning(
            f"VM {self.vmid}: still owed: {listed}"
            + (f", of {', '.join(missing)}" if missing else "")
            + "; the guest waits where it reads that. Restore those jobs, too "
            "(pveplug ir start does)"
        )

    def _owes(self, job: str, key: str) -> bool:
        """Whether something that only this job has is still to come."""
        chain = self._goal.chain
        if chain is None or not chain.mapped(key):
            return True
        landing = self._landings[key]
        return any(
            mark is Mark.OWED
            for run in chain.owned(job, key).data_runs()
            for *_, mark in landing.kinds(run.offset, run.length)
        )

    async def _see_it_move(self) -> None:
        """Wait for the keeper's migration and tell how it goes."""
        if not self.record.auto_migrate:
            self._say.info(
                f"VM {self.vmid} stays on its overlays (ir_auto_migrate=no): "
                f"`pveplug ir migrate --vmid {self.vmid}` moves it, "
                f"`pveplug ir discard --vmid {self.vmid}` gives it up"
            )
            return
        told = time.monotonic()
        while (state := await self._state()) is not None:
            if state.trouble:
                self._say.error(f"VM {self.vmid}: {state.trouble}")
                return
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                for disk in state.disks:
                    if disk.moving:
                        self._say.info(f"VM {self.vmid} {disk.key}: {disk.moving}")
            await asyncio.sleep(MIGRATION_LOOK_S)
        self._say.info(
            f"VM {self.vmid}: its disks are on their storage; nothing of the recovery "
            "is left"
        )

    async def _state(self) -> State | None:
        """Return what the keeper says; None: the recovery is over."""
        for _ in range(20):
            if self.recovery.load() is None:
                return None
            try:
                return await ask(self.recovery, "status")
            except TransportError as error:
                log.warning("ir-keeper vm=%s: %s", self.vmid, error)
                if self.recovery.load() is None:
                    return None
                await start_keeper(self._node, self.recovery)
        raise TransportError(
            f"the keeper of VM {self.vmid} ends again and again; its log says why"
        )

    async def failed(self, error: BaseException) -> None:
        """Pause a VM whose data isn't what was stored; it must not go on with it."""
        record = self._record
        if (
            record is None
            or not record.handed
            or not isinstance(error, JobError)
            or error.vm != str(self.vmid)
            or error.disk is None
            or not _is_damage(error)
        ):
            return
        text = pausing.damaged(self.vmid, f"{error}".rstrip(".") + ".")
        try:
            self._note(damage=str(error))
        except PveplugError as problem:
            self._say.error(f"VM {self.vmid}: {problem}")
        try:
            await pausing.pause(self._local, self.recovery, text)
        except PveplugError as problem:
            self._say.error(f"VM {self.vmid} could not be paused: {problem}")
        self._say.error(f"VM {self.vmid}: {text}")

    async def _undo(self) -> None:
        """Undo what the VM doesn't depend on yet; else tell what waits."""
        if self._starter is not None:
            self._starter.cancel()
            await asyncio.wait([self._starter])
            self._starter = None
        with contextlib.suppress(Exception):
            await self._serving.aclose()
        handed = self._resumed or bool(self._record and self._record.handed)
        for landing in self._landings.values():
            landing.close()
        if self._recovery is not None and not handed:
            with contextlib.suppress(PveplugError):
                await retire(self._node, self._recovery)
        await self._feeding.aclose()
        await self._made.undo()


def _unplugged(value: str) -> str:
    parts = properties(value, "model")
    return render_properties({**parts, "link_down": "1"}, "model")


def _is_damage(error: BaseException) -> bool:
    """Whether an error says that data isn't what was stored, not that it is missing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, IntegrityError):
            return not isinstance(cause, TruncatedError)
        cause = cause.__cause__
    return False


def _plan_of(disk: LandedDisk) -> DiskPlan:
    return DiskPlan(
        disk.source, disk.key, disk.size, disk.storage, disk.form, disk.options
    )


def _patient(disk: LandedDisk, target: str) -> tuple[tuple[str, str], ...]:
    """Return a drive's options while it depends on us.

    rerror and werror pause the guest instead of failing its requests.
    """
    options = dict(disk.options)
    options.update(rerror="stop", werror="stop")
    if target in SYNC_STORAGES and "aio" not in options:
        options["aio"] = "threads"
    return tuple(options.items())


def _port(instant: Instant) -> int:
    """Return the TCP port to serve on, which must outlive a keeper; 0: a socket.

    Raises:
        JobError: it can't be listened on.
    """
    host = instant.nbd_bind
    if host is None:
        return 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, instant.nbd_port))
        except OSError as error:
            raise JobError(
                f"cannot listen on {host} port {instant.nbd_port}: {error.strerror}.",
                phase="instant recovery",
                remedy="another recovery may be served there: give each an "
                "ir_nbd_port of its own, ir_nbd_port=0, or leave ir_nbd_bind out.",
            ) from error
        return int(probe.getsockname()[1])
