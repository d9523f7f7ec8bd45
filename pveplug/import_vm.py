# SPDX-License-Identifier: Apache-2.0
"""A VM made of another hypervisor's disks and description, or nothing at all.

::

    first image ── claim an id, create a bare VM, lock it
    each image  ── a new disk: allocate, serve; or upon the disk it was made from
    commit      ── the configuration by description and boot disk, attach, hand over

The description may come before, between or after the disks, so the VM is bare until
all has come. :mod:`pveplug.newvm` undoes what isn't handed over.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pveplug.config import ImportConfig
from pveplug.errors import ConfigError, JobError, NbdError
from pveplug.events import Reporter
from pveplug.images.lineage import Link
from pveplug.images.stream import Event, ImageInfo
from pveplug.images.vmdk_set import base_name
from pveplug.import_disk import ImportDisk
from pveplug.newvm import NewVm
from pveplug.node import Node
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.units import MiB
from pveplug.vmrestore import DiskPlan, TargetStorage

_FOOTER: Final = 512
"""Of a fixed VHD, behind its disk."""


@dataclass(slots=True)
class _Volume:
    plan: DiskPlan
    disk: ImportDisk
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
        self._config = config
        self._api = api
        self._job = job
        self._say = say
        self._vm = NewVm(node, api, local, config.common.connection.node, say)
        self._storages: dict[str, TargetStorage] = {}
        self._volumes: list[_Volume] = []
        self._making = asyncio.Lock()  # of disks that begin at the same time

    @property
    def vmid(self) -> int:
        """The VM's id; 0 before there is one."""
        return self._vm.vmid

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
        self._storages = await self._vm.look()
        self._format()
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
        if config.common.pool:
            params["pool"] = config.common.pool
        await self._vm.create(self._job, config.vmid, params)
        await self._vm.lock()
        self._say.info(
            f"{self.name} is imported to VM {self.vmid}, its disks to "
            f"{config.common.storage} ({self._format()})"
        )

    def _format(self) -> str:
        name = self._config.common.storage or ""
        storage = self._storages.get(name)
        if storage is None:
            there = ", ".join(sorted(self._storages)) or "none"
            raise ConfigError(
                f"no storage {name} for disk images on this node (or no "
                f"Datastore.AllocateSpace on /storage/{name}); it has {there}. Give "
                "restore_storage",
                key="restore_storage",
            )
        wanted = self._config.common.disk_format
        if wanted == "keep":
            return storage.formats[0]
        if wanted not in storage.formats:
            raise ConfigError(
                f"disk_format={wanted}: storage {name} can hold "
                f"{', '.join(storage.formats)}",
                key="disk_format",
            )
        return wanted

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
        if size is None:
            size = info.size if info.size is not None else _raw_size(file_size)
        if not size:
            raise self._refused(
                file,
                "is a raw image of unknown length.",
                "import it with pveplug import --size.",
            )
        config = self._config
        async with self._making:
            if not self._volumes and not self.vmid:
                await self.begin()
            storage = config.common.storage or ""
            plan = DiskPlan(file, "", size, storage, self._format())
            disk = ImportDisk(
                file,
                size,
                zeroed=self._vm.zeroed(storage),
                verify=config.verify,
                clips=size is not None and info.size is not None and info.size > size,
            )
            volume = _Volume(plan, disk)
            self._volumes.append(volume)
            others = [v.volid for v in self._volumes]
            volume.volid = await self._vm.volume(plan, others)
            address = await self._vm.serve(volume.volid, plan.format)
            self._vm.before_serving_ends(disk.give_up)
            await disk.open(address)
        return disk

    async def take(self, disk: ImportDisk, events: Iterable[Event]) -> None:
        """Write what a reader told of the image that was begun on a disk.

        Raises:
            JobError: the image is damaged, or writing failed.
        """
        try:
            await disk.take(events)
        except NbdError as error:
            raise self._vm.write_failed(
                disk.name, self._config.common.storage or "", error
            ) from error

    async def end(self, disk: ImportDisk, modified: int | None = None) -> None:
        """Take the image that was begun on a disk for whole."""
        try:
            await disk.end(modified)
        except NbdError as error:
            raise self._vm.write_failed(
                disk.name, self._config.common.storage or "", error
            ) from error
        for text in disk.notes:
            self._say.warning(text)
        disk.notes.clear()

    def _refused(self, file: str, text: str, remedy: str) -> JobError:
        return JobError(
            f"{file} {text}",
            vm=str(self.vmid) if self.vmid else self.name,
            disk=base_name(file),
            phase="import",
            remedy=remedy,
        )

    # --- the end ---------------------------------------------------------------------

    async def aclose(self) -> None:
        """Undo what is unfinished; nothing where ``commit`` went through."""
        await self._vm.aclose()


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
