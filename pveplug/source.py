# SPDX-License-Identifier: Apache-2.0
"""Opening a VM for reading: running or stopped, all its disks at one instant.

``open_vm`` is where a running VM (point in time in QEMU), a stopped one (its volumes,
read by qemu-nbd while PVE's lock keeps it from starting) and the two odd disks (EFI
variables, TPM state) become the same thing: NBD exports to be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pveplug.cbt import Level, home_id
from pveplug.config import Capture
from pveplug.errors import (
    IntegrityError,
    JobError,
    PveplugError,
    QmpError,
    TransportError,
)
from pveplug.events import Reporter
from pveplug.journal import Journal
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.node import Node
from pveplug.proto.pve_values import volume_id
from pveplug.pve import PveApi, Storage, VmStatus
from pveplug.pve_local import PveLocal
from pveplug.quiesce import SETTLE_S, Verdict, Wish, frozen, run_hook
from pveplug.scratch import (
    LocalScratch,
    StorageScratch,
    directories,
    watch_answers,
    watch_space,
)
from pveplug.selection import SelectedDisks, VmSummary, select_disks
from pveplug.snapshot import Options, PointInTime, SnapshotDisk
from pveplug.storeprobe import StoreProbe, settled, stuck
from pveplug.tasks import first_failure, to_the_end
from pveplug.vmconfig import (
    Drive,
    current_section_text,
    parse_bool,
    properties,
    smbios_uuid,
)
from pveplug.watchdog import ThawWatchdog

log = logging.getLogger(__name__)

EFI_SIZES = {"4m": 540672, "2m": 131072}
"""What QEMU maps of an EFI volume, which block storages round up."""
ANSWER_S = 5.0
"""A store that takes longer for 4 KiB would hold the VM at least as long."""
STORE_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class ReadableDisk:
    """A disk that can be read over NBD now; sizes in bytes."""

    key: str
    size: int
    address: UnixAddress
    export: str
    mechanism: str
    format: str
    storage: str
    context: str | None = None
    """Meta context of what changed; None: all of it is read."""
    whole: str | None = None
    """Why all of it is read; None when the context tells what changed."""
    parent_job: str | None = None
    parent_size: int = 0
    trim: bool = False


@dataclass(slots=True)
class Opened:
    """A VM at its point in time."""

    vm: VmSummary
    uuid: str
    config_text: str
    firewall: str | None
    started: int
    consistency: str = ""
    disks: list[ReadableDisk] = field(default_factory=list)
    left_out: tuple[tuple[str, str], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)
    """Directories whose free space the guest's writes depend on."""
    fleeced: set[str] = field(default_factory=set)
    """Scratch images which the guest's writes wait for without a bound."""


@dataclass(frozen=True, slots=True)
class _Agent:
    """The VM's guest agent, through PVE."""

    api: PveApi
    node: str
    vmid: int

    async def ping(self) -> None:
        await self.api.agent_ping(self.node, self.vmid)

    async def freeze(self) -> int:
        return await self.api.fsfreeze_freeze(self.node, self.vmid)

    async def thaw(self) -> int:
        return await self.api.fsfreeze_thaw(self.node, self.vmid)


def segment_homes(
    capture: Capture, vmid: int, config: Mapping[str, str], keys: Iterable[str]
) -> dict[str, str]:
    """Return the homes of the disks whose segments are to survive a stop.

    Args:
        config: the VM's configuration in force.
    """
    if capture.cbt != "persistent":
        return {}
    uuid, generation = smbios_uuid(config) or "", config.get("vmgenid", "")
    return {key: home_id(vmid, uuid, generation, key) for key in keys}


class _Volumes:
    """Scratch volumes on a PVE storage."""

    def __init__(
        self, api: PveApi, local: PveLocal, node: str, storage: Storage, vmid: int
    ) -> None:
        self._api, self._local = api, local
        self._node, self._storage, self._vmid = node, storage, vmid

    def volid(self, name: str) -> str:
        return volume_id(self._storage, self._vmid, name)

    async def allocate(self, name: str, size: int, fmt: str) -> str:
        return await self._api.allocate_volume(
            self._node, self._storage.name, self._vmid, name, size, fmt
        )

    async def path(self, volid: str) -> str:
        await self._local.activate(volid)
        return await self._local.volume_path(volid)

    async def exists(self, volid: str) -> bool:
        return await self._local.volume_exists(volid)

    async def free(self, volid: str) -> None:
        if await self._local.volume_exists(volid):
            await self._local.free_volume(volid)


@contextlib.asynccontextmanager
async def open_vm(
    capture: Capture,
    exclude_disk: tuple[str, ...],
    node: Node,
    api: PveApi,
    local: PveLocal,
    here: str,
    vm: VmSummary,
    journal: Journal,
    *,
    job: str,
    level: Level,
    say: Reporter,
) -> AsyncIterator[Opened]:
    """Open all disks of a VM that the caller holds.

    Raises:
        JobError, PveplugError: it can't be read; nothing is left behind.
    """
    config = dict((await api.vm_config(here, vm.vmid)).values)
    status = await api.vm_status(here, vm.vmid)
    selected = select_disks(config, exclude_disk, vmid=vm.vmid)
    for key, why in selected.left_out:
        say.info(f"VM {vm.vmid} {key}: left out: {why}")
    for note in selected.notes:
        say.warning(note)
    opened = Opened(
        vm=vm,
        uuid=smbios_uuid(config) or "",
        config_text=current_section_text(config),
        firewall=await local.firewall(vm.vmid),
        started=int(time.time()),
        left_out=selected.left_out,
    )
    if status.running_machine:
        opened.versions["machine"] = status.running_machine
    opener = _Opener(capture, node, api, local, here, opened, journal, say)
    async with contextlib.AsyncExitStack() as stack:
        if local.vm_running(vm.vmid) is not None:
            await opener.live(stack, config, status, selected, job, level)
        else:
            await opener.stopped(stack, selected)
        yield opened


@contextlib.asynccontextmanager
async def watched(opened: Opened, bound_s: float) -> AsyncIterator[None]:
    """Watch the scratch stores that the guest's writes depend on; within, read.

    The block is cancelled when reading must end for the guest's sake.

    Args:
        bound_s: how long a store may take to answer.

    Raises:
        JobError: a store is almost full, or does not answer. What the block itself
            raises passes as it is.
    """
    own: Exception | None = None
    async with first_failure() as tasks:
        watching = [
            tasks.create_task(watch, name="scratch")
            for watch in _watches(opened, bound_s)
        ]
        try:
            yield
        except Exception as error:  # not for the group to unwrap: it may be one itself
            own = error
        finally:
            for task in watching:
                task.cancel()
    if own is not None:
        raise own


def _watches(opened: Opened, bound_s: float) -> Iterator[Coroutine[Any, Any, None]]:
    vmid = opened.vm.vmid
    if opened.counted:
        yield watch_space(vmid, opened.counted)
    if opened.fleeced:
        yield watch_answers(vmid, opened.fleeced, bound_s)


@contextlib.contextmanager
def _phase(vmid: int, phase: str) -> Iterator[None]:
    """Give an error of QEMU or of the scratch store its VM and its phase."""
    try:
        yield
    except JobError as error:
        if error.vm is not None:
            raise
        raise JobError(str(error), vm=str(vmid)) from error
    except TransportError as error:
        raise JobError(
            f"{error}.",
            vm=str(vmid),
            phase=phase,
            remedy="see whether the VM was stopped or QEMU died; then run the job "
            "again.",
        ) from error
    except QmpError as error:
        if error.command != "nbd-server-start":
            raise JobError(f"{error}.", vm=str(vmid), phase=phase) from error
        raise JobError(
            f"QEMU's only NBD server is in use by another operation ({error.desc}).",
            vm=str(vmid),
            phase=phase,
            remedy="run the job again when that has ended, a migration as a rule.",
        ) from error
    except PveplugError as error:
        raise JobError(str(error), vm=str(vmid), phase=phase) from error


class _Opener:
    """The two ways of opening a VM, with what they share."""

    def __init__(
        self,
        capture: Capture,
        node: Node,
        api: PveApi,
        local: PveLocal,
        here: str,
        opened: Opened,
        journal: Journal,
        say: Reporter,
    ) -> None:
        self._capture = capture
        self._node = node
        self._api = api
        self._local = local
        self._here = here
        self._opened = opened
        self._vmid = opened.vm.vmid
        self._journal = journal
        self._say = say

    async def live(
        self,
        stack: contextlib.AsyncExitStack,
        config: Mapping[str, str],
        status: VmStatus,
        selected: SelectedDisks,
        job: str,
        level: Level,
    ) -> None:
        """Take the point in time of a running VM and open its exports."""
        vmid, opened = self._vmid, self._opened
        drives = {drive.key: drive for drive in selected.chosen}
        tpm = [drive for key, drive in drives.items() if key.startswith("tpmstate")]
        scratch = await self._scratch()
        nbd_socket = f"{self._runtime_dir()}/{vmid}.nbd"
        point = PointInTime(
            self._node.qmp_socket(vmid),
            nbd_socket,
            scratch,
            Options(
                mechanism=self._capture.mechanism,
                cbw_timeout_s=self._capture.cbw_timeout,
                cbt=self._capture.cbt != "off",
                homes=segment_homes(self._capture, vmid, config, drives),
            ),
        )
        self._journal.note(touched=True, nbd_socket=nbd_socket)
        stack.push_async_callback(self._close, point, scratch.paths, scratch.devices)
        with _phase(vmid, "prepare"):
            await point.prepare(
                job, level, {k: d.file for k, d in drives.items() if d not in tpm}
            )
        for note in point.notes:
            self._say.info(f"VM {vmid}: {note}")
        if point.persistent:
            await self._warn_of_rollback(point.persistent)
        if point.missing:
            raise JobError(
                "QEMU has no such disk, though the VM's configuration names it "
                "(a change that waits for a restart?).",
                vm=str(vmid),
                disk=", ".join(point.missing),
                phase="prepare",
                remedy="restart the VM, or leave the disk out with exclude_disk.",
            )
        opened.versions["qemu"] = ".".join(map(str, point.version))
        verdict = await self._at_one_instant(point, config, status)
        opened.consistency = verdict.text
        opened.started = int(time.time())
        noted = len(point.notes)
        with _phase(vmid, "export"):
            published = await point.publish()
        for disk in published:
            opened.disks.append(self._snapshot_disk(disk, drives[disk.key]))
            if disk.plan and disk.plan.whole and level.letter != "F":
                self._say.warning(
                    f"VM {vmid} {disk.key}: read whole, not incrementally: "
                    f"{disk.plan.whole}"
                )
        for note in point.notes[noted:]:
            self._say.warning(f"VM {vmid} {note}")
        for drive in tpm:
            opened.disks.append(
                await self._volume(stack, drive, "read beside the running swtpm")
            )
        if point.mechanism == "fleece":
            opened.counted = set(scratch.counted)
            opened.fleeced = set(scratch.paths)

    async def _warn_of_rollback(self, disks: list[str]) -> None:
        """Say what persistent bitmaps do to Proxmox VE's rollback."""
        remedy = (
            f"Before 'qm rollback {self._vmid} …': pveplug bitmaps drop "
            f"--vmid {self._vmid}; the next backup then reads the disks whole"
        )
        images = f"bitmaps in the images of {', '.join(disks)} (cbt=persistent)"
        snapshots = await self._api.snapshots(self._here, self._vmid)
        if snapshots:
            self._say.warning(
                f"VM {self._vmid} has snapshots ({', '.join(snapshots)}) and {images}: "
                "Proxmox VE's rollback fails on such an image and leaves the VM "
                f"locked. {remedy}"
            )
            return
        self._say.info(
            f"VM {self._vmid}: {images}; they keep Proxmox VE from rolling back. "
            f"{remedy}"
        )

    async def _at_one_instant(
        self,
        point: PointInTime,
        config: Mapping[str, str],
        status: VmStatus,
    ) -> Verdict:
        """Run the hooks and the freeze around the switch."""
        capture, vmid = self._capture, self._vmid
        environment = {
            "PVEPLUG_VMID": str(vmid),
            "PVEPLUG_VM_NAME": self._opened.vm.name,
            "PVEPLUG_JOB": self._journal.entry.job,
        }
        agent = properties(config.get("agent", ""), "enabled")
        allowed = next(
            (
                agent[name]
                for name in ("freeze-fs", "freeze-fs-on-backup", "guest-fsfreeze")
                if name in agent
            ),
            "1",
        )
        wish = Wish(
            quiesce=capture.quiesce,
            timeout_s=capture.quiesce_timeout,
            agent=parse_bool(agent.get("enabled", "0")),
            freeze_allowed=parse_bool(allowed),
            running=status.qmpstatus == "running",
            windows=config.get("ostype", "").startswith(("win", "w2k")),
        )
        watchdog = ThawWatchdog(
            vmid,
            self._node.qga_socket(vmid),
            budget_s=wish.timeout_s + SETTLE_S,
            log_file=self._node.log_file,
        )
        try:
            if capture.pre_freeze_cmd:
                said = await run_hook(
                    capture.pre_freeze_cmd,
                    "pre_freeze_cmd",
                    environment,
                    capture.hook_timeout,
                )
                self._say.info(f"VM {vmid}: pre_freeze_cmd ended well. {said}".rstrip())
            async with frozen(
                _Agent(self._api, self._here, vmid),
                wish,
                watchdog,
                self._journal,
                self._say,
            ) as verdict:
                with _phase(vmid, "snapshot"):
                    await point.switch()
            return verdict
        finally:
            if capture.post_thaw_cmd:
                await self._post_thaw(capture.post_thaw_cmd, environment)

    async def _post_thaw(self, command: str, environment: Mapping[str, str]) -> None:
        try:
            said = await run_hook(
                command, "post_thaw_cmd", environment, self._capture.hook_timeout
            )
        except PveplugError as error:
            self._say.warning(str(error))
        else:
            self._say.info(
                f"VM {self._vmid}: post_thaw_cmd ended well. {said}".rstrip()
            )

    async def _close(
        self, point: PointInTime, images: set[str], devices: set[str]
    ) -> None:
        failing = sys.exception() is not None

        async def close() -> None:
            await self._store_answers(point, images)
            await self._store_has_all(images | devices)
            await point.close()
            # In here: a cancellation while it closes comes only after this.
            self._journal.undone(touched=False)

        try:
            await to_the_end(close())
        except (PveplugError, OSError) as error:
            # The journal still says so: the clean-up of a failed job tries again.
            if not failing:
                raise
            self._say.error(f"VM {self._vmid}: {error}")

    async def _store_answers(self, point: PointInTime, images: set[str]) -> None:
        """Wait until closing the scratch images won't hold the VM.

        Raises:
            JobError: they can't be closed now; the journal knows of them.
        """
        async with StoreProbe(directories(images)) as probe:
            if await probe.all_answer(ANSWER_S):
                return
            where = ", ".join(sorted(directories(images)))
            self._say.warning(
                f"VM {self._vmid}: the scratch store {where} does not answer; closing "
                "its images now would stop the VM for as long, so they stay in QEMU "
                "until it does"
            )
            process = self._local.vm_running(self._vmid)
            busy = process is not None and stuck(process.pid, images)
            log.info("vm=%s store=%s silent copying=%s", self._vmid, where, busy)
            if not busy:
                await point.let_go()
            if await probe.all_answer(STORE_PATIENCE_S):
                return
        raise self._still_in_qemu(f"the scratch store {where} does not answer")

    async def _store_has_all(self, images: set[str]) -> None:
        """Wait until the store has taken what QEMU has begun to write.

        Raises:
            JobError: it still takes; the journal knows of the images.
        """
        process = self._local.vm_running(self._vmid)
        if process is None or await settled(process.pid, images, ANSWER_S):
            return
        self._say.info(
            f"VM {self._vmid}: the scratch store still takes what it was given; the "
            "guest would wait for that, so its images stay in QEMU until it has all"
        )
        if await settled(process.pid, images, STORE_PATIENCE_S):
            return
        raise self._still_in_qemu("the scratch store is too slow")

    def _still_in_qemu(self, why: str) -> JobError:
        return JobError(
            f"{why}, so its images are still in QEMU.",
            vm=str(self._vmid),
            phase="clean-up",
            remedy="once it answers: podheitor-proxmox-backend --cleanup "
            f"{self._journal.entry.job}, or the VM's next backup.",
        )

    async def _scratch(self) -> LocalScratch | StorageScratch:
        local = LocalScratch(
            self._capture.scratch_dir or self._node.scratch_dir,
            self._vmid,
            self._node.qemu_img,
            self._journal,
        )
        name = self._capture.fleecing_storage
        if name is None:
            return local
        storages = {s.name: s for s in await self._api.storages(self._here)}
        storage = storages.get(name)
        if storage is None or not storage.active or not storage.holds_images:
            raise JobError(
                f"fleecing_storage={name} is not there, not active or holds no disk "
                "images, or this credential lacks Datastore.AllocateSpace on "
                f"/storage/{name}; seen: {', '.join(sorted(storages)) or 'none'}.",
                vm=str(self._vmid),
                phase="scratch",
                remedy="name another, leave it out, or grant the privilege.",
            )
        return StorageScratch(
            _Volumes(self._api, self._local, self._here, storage, self._vmid),
            self._vmid,
            qcow2="qcow2" in storage.formats,
            local=local,
            log=self._journal,
        )

    def _runtime_dir(self) -> str:
        os.makedirs(self._node.runtime_dir, mode=0o700, exist_ok=True)
        return self._node.runtime_dir

    def _snapshot_disk(self, disk: SnapshotDisk, drive: Drive) -> ReadableDisk:
        plan = disk.plan
        whole: str | None = "EFI variables are always read whole"
        if plan is not None:
            whole = plan.whole
        elif not disk.key.startswith("efidisk"):
            whole = "cbt=off"
        return ReadableDisk(
            key=disk.key,
            size=disk.size,
            address=UnixAddress(disk.socket),
            export=disk.export,
            mechanism=disk.mechanism,
            format=drive.format or "raw",
            storage=drive.storage or "",
            context=disk.context,
            whole=whole,
            parent_job=plan.parent_job if plan else None,
            parent_size=plan.parent_size if plan else 0,
            trim=disk.trim,
        )

    async def stopped(
        self, stack: contextlib.AsyncExitStack, selected: SelectedDisks
    ) -> None:
        """Open the volumes of a VM that doesn't run; PVE's lock keeps it so."""
        kind = "a template" if self._opened.vm.template else "stopped"
        self._opened.consistency = f"consistent (the VM is {kind})"
        for drive in selected.chosen:
            self._opened.disks.append(
                await self._volume(stack, drive, f"the VM is {kind}")
            )
        if self._local.vm_running(self._vmid) is not None:
            raise IntegrityError(
                f"VM {self._vmid} was started while its disks were being opened"
            )

    async def _volume(
        self, stack: contextlib.AsyncExitStack, drive: Drive, whole: str
    ) -> ReadableDisk:
        """Serve a volume by qemu-nbd, read-only; always read whole."""

        def announce() -> None:
            self._journal.add("active", drive.file)
            stack.push_async_callback(self._deactivate, drive.file)

        await self._local.activate(drive.file, announce)
        path = await self._local.volume_path(drive.file)
        size = None
        if drive.key.startswith("efidisk"):
            size = EFI_SIZES.get(dict(drive.options).get("efitype", "2m"))
        address = await stack.enter_async_context(
            qemu_nbd(
                self._node,
                path,
                drive.format or "raw",
                socket_dir=self._runtime_dir(),
                read_only=True,
                size=size if drive.format in (None, "raw") else None,
            )
        )
        async with await connect(address) as client:
            size = client.size
        return ReadableDisk(
            key=drive.key,
            size=size,
            address=address,
            export="",
            mechanism="qemu-nbd",
            format=drive.format or "raw",
            storage=drive.storage or "",
            whole=whole,
        )

    async def _deactivate(self, volid: str) -> None:
        # What the VM itself uses must stay active; a stopped one uses nothing.
        if self._local.vm_running(self._vmid) is None:
            await asyncio.shield(self._local.deactivate(volid))
        self._journal.drop("active", volid)
