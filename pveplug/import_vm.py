# SPDX-License-Identifier: Apache-2.0
"""A VM made of another hypervisor's disks and description, or nothing at all.

::

    first image ── claim an id, create a bare VM, lock it
    each image  ── a new disk: allocate, serve; or upon the disk it was made from
    commit      ── the configuration by description and boot disk, attach, hand over

The description may come before, between or after the disks, so the VM is bare until
all has come. :mod:`pveplug.unfinished` undoes what isn't handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pveplug.config import ImportConfig
from pveplug.describe.bootability import inspection
from pveplug.describe.guest import Bus, Firmware, GuestDescription, GuestDisk
from pveplug.describe.plan import DiskFacts, PvePlan, match_disks, to_pve
from pveplug.describe.reading import detect as describes
from pveplug.describe.reading import read_description
from pveplug.errors import (
    ConfigError,
    DescriptionError,
    IntegrityError,
    JobError,
    NbdError,
    PveplugError,
)
from pveplug.events import Reporter
from pveplug.images.lineage import Link
from pveplug.images.stream import Event, ImageInfo
from pveplug.images.vmdk_set import base_name
from pveplug.import_disk import ImportDisk
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.node import Node
from pveplug.proto.pve_values import volume_id
from pveplug.pve import PveApi, Storage
from pveplug.pve_local import PveLocal
from pveplug.restore_vm import ZEROED_STORAGES, formats_of, write_refused
from pveplug.tasks import to_the_end
from pveplug.unfinished import UnfinishedVm
from pveplug.units import SECTOR, MiB
from pveplug.vmrestore import Target, TargetStorage

log = logging.getLogger(__name__)

CORES: Final = 2
MEMORY_MIB: Final = 2048
"""What a VM gets that nothing describes."""
_FOOTER: Final = 512
"""Of a fixed VHD, behind its disk."""


@dataclass(slots=True)
class _Volume:
    disk: ImportDisk
    form: str
    volid: str = ""


class ImportVm:
    """One VM: ``image`` per image, ``commit``, ``aclose``.

    Args:
        name: what it was called; for messages, and for the VM where no description
            names it.
        job: unique name of the job, for the journal.
    """

    def __init__(
        self,
        name: str,
        config: ImportConfig,
        node: Node,
        api: PveApi,
        local: PveLocal,
        job: str,
        say: Reporter,
    ) -> None:
        self.name = name
        self.order: Sequence[str] = ()
        """Names of first images, as their disks shall stand; else as they came."""
        self._config = config
        self._api = api
        self._job = job
        self._say = say
        self._node = node
        self._local = local
        self._here = config.common.connection.node
        self._made = UnfinishedVm(node, self._here, api, local, say)
        self._serving = contextlib.AsyncExitStack()
        self._storages: dict[str, Storage] = {}
        self._volumes: list[_Volume] = []
        self._making = asyncio.Lock()  # of disks that begin at the same time

    @property
    def vmid(self) -> int:
        """The VM's id; 0 before there is one."""
        return self._made.vmid

    @property
    def disks(self) -> tuple[ImportDisk, ...]:
        """Its disks, in the order their first images came."""
        return tuple(volume.disk for volume in self._volumes)

    # --- the beginning ---------------------------------------------------------------

    async def begin(self) -> None:
        """Claim an id and create a VM with nothing in it; once only.

        Raises:
            ConfigError: the storage can't hold disks, or the format isn't its own.
            JobError: the id is taken.
        """
        config = self._config
        self._storages = {s.name: s for s in await self._api.storages(self._here)}
        form = self._format()
        if config.vmid is not None:
            for found in await self._api.resources():
                if found.vmid == config.vmid:
                    raise JobError(
                        f"VM {found.vmid} ({found.name}) exists.",
                        vm=str(found.vmid),
                        phase="import",
                        remedy="choose another restore_vmid, or leave it out for the "
                        "next free one.",
                    )
        params = {
            "name": "import-" + plain_name(self.name),
            "smbios1": f"uuid={uuid.uuid4()}",
        }
        await self._made.create(self._job, config.vmid, params, config.common.pool)
        await self._made.lock()
        self._say.info(
            f"{self.name} is imported to VM {self.vmid}, its disks to "
            f"{config.common.storage} ({form})"
        )

    def _targets(self) -> dict[str, TargetStorage]:
        return {
            s.name: TargetStorage(s.name, formats_of(s))
            for s in self._storages.values()
            if s.holds_images and s.active and s.enabled
        }

    def _format(self) -> str:
        name, targets = self._config.common.storage or "", self._targets()
        if name not in targets:
            raise ConfigError(
                f"no storage {name} for disk images on this node (or no "
                f"Datastore.AllocateSpace on /storage/{name}); it has "
                f"{', '.join(sorted(targets)) or 'none'}. Give restore_storage",
                key="restore_storage",
            )
        formats, wanted = targets[name].formats, self._config.common.disk_format
        if wanted != "keep" and wanted not in formats:
            raise ConfigError(
                f"disk_format={wanted}: storage {name} can hold {', '.join(formats)}",
                key="disk_format",
            )
        return formats[0] if wanted == "keep" else wanted

    # --- disks -----------------------------------------------------------------------

    async def image(
        self,
        file: str,
        info: ImageInfo,
        file_size: int | None,
        *,
        size: int | None = None,
    ) -> ImportDisk:
        """Find or make the disk an image belongs to, and begin the image there.

        Args:
            file: its name, with folders.
            info: what it says of itself.
            file_size: bytes of the file; a raw image's disk is as long.
            size: bytes of the disk after all of its chain, where that is known.

        Raises:
            JobError: it belongs to no disk, or to several; there is no room for it.
        """
        link = Link(file, info)
        own = _raw_size(file_size) if info.size is None else info.size
        if info.parent is not None:
            disk = self._parent_of(link)
        elif (again := self._again(file)) is not None:
            disk = again
            if info.size is None and own != disk.size:
                # Of a raw disk nothing but its length tells it from anything else.
                raise self._refused(
                    file,
                    f"came before as a disk of {disk.size} bytes, and is {file_size} "
                    "bytes long now: no full copy of it, and no increment of a format "
                    "that is known.",
                    "restore the full backup alone, or convert the increment: "
                    "docs/protocols/block-delta.md.",
                )
        else:
            disk = await self._make(file, info, file_size, size)
        await disk.begin(file, info, own or disk.size)
        return disk

    def _parent_of(self, link: Link) -> ImportDisk:
        reasons = {disk: disk.why_not(link) for disk in self.disks}
        found = [disk for disk, reason in reasons.items() if reason is None]
        if len(found) > 1:
            same = [d for d in found if base_name(d.name) == base_name(link.name)]
            found = same or found
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(disk.name for disk in found)
            raise self._refused(
                link.name,
                f"is an increment that fits {len(found)} disks: {names}.",
                "restore to files (where=/directory) and import one disk at a time.",
            )
        said = "; ".join(str(reason) for reason in list(reasons.values())[:4])
        raise self._refused(
            link.name,
            f"is an increment, and what it was made from did not come before it: "
            f"{said or 'there is no disk yet'}.",
            "select the full backup and all increments up to the one you want, and "
            "none that was made after another.",
        )

    def _again(self, file: str) -> ImportDisk | None:
        """Return the disk of which another full copy comes."""
        return next((disk for disk in self.disks if disk.name == file), None)

    async def _make(
        self, file: str, info: ImageInfo, file_size: int | None, size: int | None
    ) -> ImportDisk:
        known = size is not None
        if size is None:
            size = info.size if info.size is not None else _raw_size(file_size)
        if not size:
            raise self._refused(
                file,
                "is a raw image of unknown length.",
                "import it with pveplug import --size.",
            )
        twins = [d.name for d in self.disks if base_name(d.name) == base_name(file)]
        if twins:
            self._say.warning(
                f"{file} is taken for another disk than {twins[0]}; if both are full "
                "backups of one, select the newer job alone"
            )
        async with self._making:
            if not self._volumes and not self.vmid:
                await self.begin()
            volume = await self._volume(file, size, clips=known)
        return volume.disk

    async def _volume(self, file: str, size: int, *, clips: bool) -> _Volume:
        storage = self._storages[self._config.common.storage or ""]
        form = self._format()
        disk = ImportDisk(
            file,
            size,
            zeroed=storage.type in ZEROED_STORAGES,
            verify=self._config.verify,
            clips=clips,
        )
        volume = _Volume(disk, form)
        used = [v.volid for v in self._volumes]
        self._volumes.append(volume)
        volume.volid = await self._made.allocate(
            storage, size, form, used=used, disk=base_name(file)
        )
        address = await self._serving.enter_async_context(
            qemu_nbd(
                self._node,
                await self._made.activate(volume.volid),
                form,
                socket_dir=self._node.runtime_dir,
                read_only=False,
            )
        )
        # Closed before its qemu-nbd is, on every way out.
        self._serving.push_async_callback(disk.give_up)
        await disk.open(address)
        return volume

    async def take(self, disk: ImportDisk, events: Sequence[Event]) -> None:
        """Write what a reader told of the image that was begun on a disk.

        Raises:
            JobError: the image is damaged, or writing failed.
        """
        try:
            await disk.take(events)
        except NbdError as error:
            raise self._write_refused(disk, error) from error

    async def end(self, disk: ImportDisk, modified: int | None = None) -> None:
        """Take the image that was begun on a disk for whole."""
        try:
            await disk.end(modified)
        except NbdError as error:
            raise self._write_refused(disk, error) from error
        for text in disk.notes:
            self._say.warning(text)
        disk.notes.clear()

    def _write_refused(self, disk: ImportDisk, error: NbdError) -> JobError:
        storage = self._config.common.storage or ""
        return write_refused(self.vmid, base_name(disk.name), storage, error)

    def _refused(self, file: str, text: str, remedy: str) -> JobError:
        return JobError(
            f"{file} {text}",
            vm=str(self.vmid) if self.vmid else self.name,
            disk=base_name(file),
            phase="import",
            remedy=remedy,
        )

    # --- the end ---------------------------------------------------------------------

    async def commit(self, files: Mapping[str, bytes]) -> None:
        """Give the VM its configuration and its disks, and hand it over.

        Args:
            files: small files that may describe it.

        Raises:
            JobError: a disk isn't whole, or isn't what was read.
        """
        self.check_all_came(files)
        self._volumes.sort(key=lambda volume: self._place(volume.disk.name))
        described = self._described(files)
        names = {volume.disk.name: volume for volume in self._volumes}
        described, bound = bind(described, list(names), self._say)
        facts = {k: await self._facts(names[n].disk) for k, n in bound.items()}
        plan = self._plan(described, facts)
        if self._config.verify:
            for volume in self._volumes:
                await self._read_back(volume.disk)
        for volume in self._volumes:
            try:
                await volume.disk.finish()
            except NbdError as error:
                raise self._write_refused(volume.disk, error) from error
        await self._serving.aclose()
        await self._made.deactivate_all()
        await self._made.unlock()
        params = {**plan.restore.params, **plan.fresh, **plan.restore.late_params}
        places = {}
        for place in plan.restore.disks:
            volume = names[bound[place.source_key]]
            params[place.key] = place.drive_value(volume.volid)
            places[volume.disk.name] = place.key
        await self._expect(plan.fresh)
        for text in await self._api.update_config(self._here, self.vmid, params):
            self._say.warning(f"VM {self.vmid}: {text}")
        # From here on the volumes are the VM's; nothing is taken back any more.
        self._made.journal.undone(volumes=[], created=False, active=[])
        for volume in self._volumes:
            disk = volume.disk
            self._say.info(
                f"VM {self.vmid} {places[disk.name]}: {disk.name} imported to "
                f"{volume.volid}: {disk.summary()}"
            )
        self._made.handed_over()
        self._tell(plan)
        if self._config.common.start_after:
            await self._start()

    def _place(self, name: str) -> int:
        known = name in self.order
        return self.order.index(name) if known else len(self.order)

    def check(self, files: Mapping[str, bytes]) -> None:
        """Read the description before there is a VM, for what is wrong with it.

        Raises:
            JobError: it is damaged, or there are two.
        """
        self._described(files, quiet=True)

    def check_all_came(self, files: Mapping[str, bytes]) -> None:
        """Check what ``commit`` needs, while other VMs of the job can be taken back.

        Raises:
            JobError: there is no disk; what describes it is damaged, or there are two.
        """
        if not self._volumes:
            raise JobError(
                "no disk came.",
                vm=self.name,
                phase="import",
                remedy="select the VM's disks, too.",
            )
        self.check(files)

    def _described(
        self, files: Mapping[str, bytes], *, quiet: bool = False
    ) -> GuestDescription:
        """Return the description with the operator's wishes laid over it.

        Raises:
            JobError: it is damaged, or there are two.
        """
        config = self._config
        try:
            found = read_description(files)
        except DescriptionError as error:
            if any(describes(data) for data in files.values()):
                raise JobError(
                    f"{error}.",
                    vm=str(self.vmid) if self.vmid else self.name,
                    phase="import",
                    remedy="leave that file out: the VM is then made by import_cores, "
                    "import_memory and import_firmware.",
                ) from error
            found = GuestDescription(
                "no description",
                name=plain_name(self.name),
                cores=config.cores or CORES,
                memory_mib=config.memory_mib or MEMORY_MIB,
            )
            text = (
                f"no description of {self.name} came (OVF, VMX, Hyper-V XML, JSON): "
                f"the VM gets {found.cores} cores, {found.memory_mib} MiB, no network "
                "card, and its firmware by the boot disk; import_cores, import_memory "
                "and import_firmware say otherwise"
            )
            if not quiet:
                self._say.warning(text)
        if config.cores:
            found = replace(found, sockets=1, cores=config.cores, threads=1)
        if config.memory_mib:
            found = replace(found, memory_mib=config.memory_mib, memory_min_mib=None)
        if config.firmware != "auto":
            found = replace(found, firmware=Firmware(config.firmware))
        return found

    async def _facts(self, disk: ImportDisk) -> DiskFacts:
        """Look at a disk as it was written: what could start from it?"""
        sector = disk.top.info.sector if disk.top else SECTOR
        asking = inspection(disk.size)
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(await disk.read(*wanted))
        except StopIteration as end:
            return DiskFacts(disk.size, sector, end.value)

    def _plan(
        self, description: GuestDescription, facts: Mapping[str, DiskFacts]
    ) -> PvePlan:
        connection = self._config.common.connection
        target = Target(storages=self._targets(), is_root=connection.user == "root@pam")
        return to_pve(
            description,
            self._config.common.wishes,
            target,
            disks=facts,
            fresh_uuid=str(uuid.uuid4()),
        )

    async def _read_back(self, disk: ImportDisk) -> None:
        try:
            await disk.read_back()
        except IntegrityError as error:
            raise JobError(
                f"{error}.",
                vm=str(self.vmid),
                disk=base_name(disk.name),
                phase="verify",
                remedy="see the node's kernel log; name another restore_storage.",
            ) from error

    async def _expect(self, fresh: Mapping[str, str]) -> None:
        """Note the volumes that PVE may make itself, should we be killed meanwhile.

        What has such a name already is left over from another VM, and isn't ours.
        """
        expected = list(self._made.journal.entry.volumes)
        for name in {value.partition(":")[0] for value in fresh.values()}:
            storage = self._storages[name]
            there = await self._api.volumes(self._here, name, vmid=self.vmid)
            taken = {volume.volid for volume in there}
            for number in range(len(there) + len(fresh)):
                stem = f"vm-{self.vmid}-disk-{number}"
                for suffix in ("", *(f".{form}" for form in formats_of(storage))):
                    volid = volume_id(storage, self.vmid, stem + suffix)
                    if volid not in taken and volid not in expected:
                        expected.append(volid)
        self._made.journal.note(volumes=expected)

    def _tell(self, plan: PvePlan) -> None:
        """Say what became of the description, and what to do next."""
        for what, why in plan.restore.dropped:
            self._say.info(f"{what} is not taken over: {why}")
        for text in plan.notes:
            self._say.info(text)
        for text in plan.restore.warnings:
            self._say.warning(text)
        self._say.info(
            f"VM {self.vmid}: {plan.system.label}, starts by "
            f"{plan.firmware.value.upper()} ({plan.why})"
        )
        for text in plan.steps(self.vmid):
            self._say.info(f"next: {text}")

    async def _start(self) -> None:
        """Start the VM; it is there all the same where that fails."""
        try:
            await self._api.start_vm(self._here, self.vmid)
        except PveplugError as error:
            self._say.error(f"VM {self.vmid} is imported, but was not started: {error}")
        else:
            self._say.info(f"VM {self.vmid} was started")

    async def aclose(self) -> None:
        """Undo what is unfinished; nothing where ``commit`` went through."""
        await to_the_end(self._undo())

    async def _undo(self) -> None:
        try:
            await self._serving.aclose()
        except Exception as error:
            log.warning("import not served to its end: %s", error)
        await self._made.undo()


def bind(
    description: GuestDescription, names: list[str], say: Reporter
) -> tuple[GuestDescription, dict[str, str]]:
    """Find each described disk's image.

    Args:
        names: of the images, in the order they came.

    Returns: the description, with disks that it didn't know added, and the image of
        each disk by its key.
    """
    bound, left = match_disks(description, names)
    free = [disk for disk in description.disks if disk.key not in bound]
    if left and len(left) == len(free):
        for disk, name in zip(free, left, strict=True):
            bound[disk.key] = name
        pairs = ", ".join(f"{n} for {d.file}" for d, n in zip(free, left, strict=True))
        say.warning(
            f"{description.source} calls its disks otherwise; by their order these "
            f"were taken: {pairs}"
        )
        return description, bound
    added = []
    for number, name in enumerate(left):
        order = len(description.disks) + number
        disk = GuestDisk(order, Bus.UNKNOWN, 0, number, file=name)
        added.append(disk)
        bound[disk.key] = name
    if left and description.disks:
        say.warning(
            f"{description.source} does not know {', '.join(left)}: attached as "
            "further disks"
        )
    return replace(description, disks=(*description.disks, *added)), bound


def plain_name(text: str) -> str:
    """Return a text as a name that Proxmox VE takes: letters, digits and dashes."""
    found = re.sub("[^A-Za-z0-9]+", "-", text).strip("-")[:50].strip("-")
    return found or "vm"


def _raw_size(file_size: int | None) -> int | None:
    """Return how long a raw image's disk is, or a fixed VHD's that looks like one.

    Which of both it is only its end tells; but nobody's disks end half a KiB behind a
    whole MiB.
    """
    if file_size and file_size % MiB == _FOOTER:
        return file_size - _FOOTER
    return -(-file_size // _FOOTER) * _FOOTER if file_size else None
