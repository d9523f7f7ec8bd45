# SPDX-License-Identifier: Apache-2.0
"""The VM of a failover test: boots a restore point, touches nothing, then goes.

Of the newest restore point the test VM has throw-away overlays::

    test VM ──► overlay.qcow2 ──► volume of the replica     read only, as it is
                writes stay here    (increments are staged beside it meanwhile)

Of an older one, and where the node has no storage for overlays, it is a full clone of
the snapshot. Either way it has no NIC, no link to any bridge, and a tag and a note by
which it is found again if we are killed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from pveplug.dr.boot import stop
from pveplug.dr.provision import Site
from pveplug.dr.store import Record, Volume
from pveplug.errors import PveplugError
from pveplug.events import Reporter
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import FILE_STORAGES
from pveplug.pve_local import run
from pveplug.vmconfig import drives, is_drive_key

TAG: Final = "pveplug-test"
_CLONE_S: Final = 24 * 3600.0
_IMG_S: Final = 60.0
_TRIES: Final = 20
_NOT_COPIED: Final = re.compile(
    r"net\d+|unused\d+|lock|parent|snaptime|snapstate|vmstate|vmgenid|meta|digest"
    r"|tags|description|name|onboot|protection|startup|template|args|hookscript"
    r"|running.*|boot|(?:host(?:pci|usb)|usb|hostpci|parallel|virtiofs)\d+"
)
_TAKEN: Final = (Reason.EXISTS,)


def note_of(record: Record) -> str:
    """Return the first line of a test VM's description."""
    return f"{TAG} link={record.link}"


def overlay_storage(record: Record, storages: Mapping[str, str]) -> str | None:
    """Return the storage to put overlays on; None: there is none.

    Args:
        record: of the replica.
        storages: usable storages that take qcow2 files, name -> type.
    """
    if any(key.startswith("tpmstate") for key in record.disks):
        return None  # swtpm takes no overlay before 9.1, and a clone is right always
    preferred = [volume.storage for volume in record.disks.values()]
    for name in (*preferred, *sorted(storages)):
        if storages.get(name) in FILE_STORAGES - {"btrfs"}:
            return name
    return None


class TestVm:
    """Makes and removes the test VM of one replica; ``vmid`` 0: none yet."""

    __test__ = False  # not a test of pytest's

    def __init__(
        self,
        site: Site,
        record: Record,
        announce: Callable[[int], Awaitable[None]],
        say: Reporter,
    ) -> None:
        """``announce`` writes down which id is about to be taken."""
        self._site = site
        self._record = record
        self._announce = announce
        self._say = say
        self._active: list[str] = []
        self.vmid = 0

    async def overlay(self, storage: str) -> None:
        """Make it of the replica's volumes as they are."""
        site, here = self._site, self._site.here
        config = dict((await site.api.vm_config(here, self._record.vmid)).values)
        await self._create(config)
        attached: dict[str, str] = {}
        for number, key in enumerate(sorted(self._record.disks)):
            volid = await self._overlay(storage, number, self._record.disks[key])
            attached[key] = _drive(config.get(key, ""), volid)
        boot = {"boot": config["boot"]} if "boot" in config else {}
        await site.api.update_config(here, self.vmid, {**attached, **boot})

    async def clone(self, snapshot: str) -> None:
        """Make it a full copy of a restore point's snapshot; takes its time."""
        api, here = self._site.api, self._site.here
        for _ in range(_TRIES):
            await self._take_id()
            try:
                await api.clone_vm(
                    here,
                    self._record.vmid,
                    self.vmid,
                    name=self._name(),
                    snapname=snapshot,
                    full=True,
                    pool=self._site.pool or None,
                    description=self._description(),
                    timeout_s=_CLONE_S,
                )
                break
            except PveRefusalError as error:
                if error.reason not in _TAKEN:
                    raise
        config = (await api.vm_config(here, self.vmid)).values
        gone = [key for key in config if re.fullmatch(r"net\d+", key)]
        gone += [key for key in ("protection", "startup") if key in config]
        changed = {"tags": TAG, "onboot": "0"}
        await api.update_config(here, self.vmid, changed, delete=gone)

    async def remove(self) -> None:
        """Stop it and remove it with its disks; nothing if there is none."""
        if self.vmid:
            await remove(self._site, self._record, self.vmid, self._say)
        for volid in self._active:
            await self._site.local.deactivate(volid)
        self._active.clear()
        self.vmid = 0

    # --- steps -----------------------------------------------------------------------

    async def _create(self, config: Mapping[str, str]) -> None:
        api, here = self._site.api, self._site.here
        params = {
            key: value
            for key, value in config.items()
            if not _NOT_COPIED.fullmatch(key) and not is_drive_key(key)
        }
        for drive in drives(config):
            if drive.is_cdrom:
                params[drive.key] = "none,media=cdrom"
        params |= {
            "name": self._name(),
            "tags": TAG,
            "description": self._description(),
            "onboot": "0",
        }
        if self._site.pool:
            params["pool"] = self._site.pool
        for _ in range(_TRIES):
            await self._take_id()
            try:
                for text in await api.create_vm(here, self.vmid, params):
                    self._say.warning(f"test VM {self.vmid}: {text}")
            except PveRefusalError as error:
                if error.reason not in _TAKEN:
                    raise
                continue
            return
        raise PveplugError(f"no free id for a test VM was found in {_TRIES} tries")

    async def _take_id(self) -> None:
        self.vmid = await self._site.api.next_id()
        await self._announce(self.vmid)

    async def _overlay(self, storage: str, number: int, volume: Volume) -> str:
        site, local = self._site, self._site.local
        name = f"vm-{self.vmid}-disk-{number}.qcow2"
        volid = await site.api.allocate_volume(
            site.here, storage, self.vmid, name, volume.size, "qcow2"
        )
        if await local.activate(volume.volid):
            self._active.append(volume.volid)
        base = await local.volume_path(volume.volid)
        where = await local.volume_path(volid)
        # What PVE has allocated is replaced by an image that reads through to the
        # replica; its directory, owner and mode are right by then.
        mode = os.stat(where).st_mode & 0o777
        argv = [site.node.qemu_img, "create", "-q", "-f", "qcow2"]
        argv += ["-b", base, "-F", volume.format, where]
        await run(argv, timeout_s=_IMG_S)
        os.chmod(where, mode)
        return volid

    def _name(self) -> str:
        name = re.sub(r"[^A-Za-z0-9-]", "-", self._record.origin.name) or "replica"
        return f"{name[:50].strip('-') or 'replica'}-test"

    def _description(self) -> str:
        return (
            f"{note_of(self._record)}\nA failover test of VM "
            f"{self._record.origin.vmid} ({self._record.origin.name}); it is removed "
            "when the test ends."
        )


def _drive(value: str, volid: str) -> str:
    """Return a drive's value with another volume, without what speaks of the old."""
    _, _, rest = value.partition(",")
    kept = [
        part
        for part in rest.split(",")
        if part and part.partition("=")[0] not in ("size", "format", "backup")
    ]
    return ",".join([volid, *kept])


async def is_test_of(site: Site, record: Record, vmid: int) -> bool:
    """Whether the VM with this id is a test VM of this replica."""
    try:
        found = (await site.api.vm_config(site.here, vmid)).values
    except PveRefusalError as error:
        if error.reason is Reason.VM_MISSING:
            return False
        raise
    return found.get("description", "").split("\n", 1)[0].rstrip() == note_of(record)


async def remove(site: Site, record: Record, vmid: int, say: Reporter) -> bool:
    """Remove a test VM of this replica; returns False if that id is no such VM."""
    if not await is_test_of(site, record, vmid):
        return False
    await stop(site.api, site.here, vmid)
    with contextlib.suppress(PveRefusalError):
        await site.api.update_config(site.here, vmid, delete=["protection"])
    for text in await site.api.destroy_vm(site.here, vmid, unreferenced=True):
        say.warning(f"test VM {vmid}: {text}")
    say.info(f"test VM {vmid} was removed")
    return True


async def leftovers(site: Site, record: Record) -> list[int]:
    """Return the test VMs of this replica that are there."""
    found = [
        resource.vmid
        for resource in await site.api.resources()
        if resource.node == site.here
        and (TAG in resource.tags or resource.name.endswith("-test"))
    ]
    return [vmid for vmid in found if await is_test_of(site, record, vmid)]
