# SPDX-License-Identifier: Apache-2.0
"""The replica VM: made once, kept like its source ever after.

:meth:`Provisioner.ensure` is told what the VM shall be and makes it so from whatever
it finds, since a cut may have happened anywhere::

    VM there? ── no: claim an id, create it without disks
    leftovers of an allocation ── freed
    keys that differ ── PUT      disks that went ── detached, kept for their points
    disks that grew ── resized   disks that are new ── allocated, attached
    boot order, onboot 0, protection 1

The VM is protected: PVE then neither destroys it nor removes its disks by mistake, and
both would be the end of all restore points. It doesn't keep snapshots from being taken,
deleted or gone back to. We lift it for as long as we remove something ourselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pveplug.dr.store import Record, ReplicaError, Volume
from pveplug.errors import (
    CommandError,
    ConfigError,
    IntegrityError,
    NbdError,
    PveplugError,
    TransportError,
)
from pveplug.events import Reporter
from pveplug.journal import VmBusyError
from pveplug.node import Node
from pveplug.proto.dr_frames import Describe, Open
from pveplug.proto.pve_refusal import PveRefusalError, Reason, one_line
from pveplug.proto.pve_values import FILE_STORAGES, volume_id
from pveplug.pve import PveApi, Resource, Storage
from pveplug.pve_local import PveLocal, run
from pveplug.units import GiB
from pveplug.values import Mapped
from pveplug.vmconfig import Drive, drives, parse_drive, smbios_uuid
from pveplug.vmrestore import (
    DiskPlan,
    Target,
    TargetStorage,
    Wishes,
    transform_for_restore,
)

TAG: Final = "pveplug-replica"
ENOSPC: Final = 28
"""As the NBD protocol numbers it."""
SNAPSHOT_FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    # What PVE can snapshot in place, by storage type, best first. Thick LVM has
    # qcow2 only with snapshot-as-volume-chain, and then says so in its formats.
    **dict.fromkeys(("dir", "nfs", "cifs", "glusterfs"), ("qcow2",)),
    "lvm": ("qcow2",),
    "btrfs": ("raw",),
    **dict.fromkeys(("lvmthin", "zfspool", "zfs", "rbd"), ("raw",)),
}
_RESIZE_S: Final = 120.0
_LOCK_WAIT_S: Final = 60.0
_LOCK_POLL_S: Final = 0.5
_MANAGED: Final = frozenset({"onboot", "protection", "tags", "description", "smbios1"})

Save = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Site:
    """The DR site as its receiver knows it: how to reach it, and its own rules.

    Attributes:
        here: this node's name in the cluster.
        storage: where new disks go unless a sender asks for another.
        bridge_map: wins over what a sender asks for.
        retention_min, retention_lock_days: restore points that no sender can delete.
        stage_dir: where increments are staged; "": in the replica's directory.
        keep_free: bytes that must stay free there.
    """

    node: Node
    api: PveApi
    local: PveLocal
    here: str
    storage: str = ""
    bridge_map: Mapped = field(default_factory=Mapped)
    pool: str = ""
    retention_min: int = 1
    retention_lock_days: float = 0
    stage_dir: str = ""
    keep_free: int = 1 * GiB
    version: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the replica VM shall be.

    Attributes:
        params: configuration without disks; ``late``: what names disks.
        disks: by key.
        sizes: bytes of the source's disks; a volume may have more.
        said: what is worth telling, as (kind, text).
        firewall: its rules, as PVE stores them.
    """

    params: Mapping[str, str]
    late: Mapping[str, str]
    disks: Mapping[str, DiskPlan]
    sizes: Mapping[str, int]
    said: tuple[tuple[str, str], ...]
    firewall: str | None


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn what an adapter raises into a :class:`ReplicaError` with its code."""
    try:
        yield
    except ReplicaError:
        raise
    except PveplugError as error:
        raise ReplicaError(code_of(error), f"{doing}: {error}") from error


def code_of(error: PveplugError) -> str:
    """Return the refusal's code for an error of an adapter."""
    match error:
        case ReplicaError():
            return error.code
        case PveRefusalError(reason=Reason.NO_SPACE) | NbdError(errno=28):
            return "space"
        case PveRefusalError(reason=Reason.UNSUPPORTED):
            return "storage"
        case CommandError() if "No space left" in error.stderr:
            return "space"
        case VmBusyError():
            return "busy"
        case NbdError():
            return "storage"
        case ConfigError():
            return "configuration"
        case IntegrityError():
            return "integrity"
        case PveRefusalError() | CommandError() | TransportError():
            return "pve"
    return "internal"


async def plan_replica(
    site: Site, record: Record, opening: Open, describe: Describe
) -> Plan:
    """Decide what the replica VM shall be.

    Raises:
        ReplicaError: ``storage`` where its disks can't have snapshots,
            ``configuration`` where there is no place for them.
    """
    with translated("the DR site"):
        storages = {s.name: s for s in await site.api.storages(site.here)}
        version = await site.api.version()
    usable = {
        s.name: TargetStorage(s.name, _formats(s))
        for s in storages.values()
        if s.holds_images and s.active and s.enabled
    }
    wanted = opening.storage or site.storage or record.storage
    wishes = Wishes(
        storage=wanted or None,
        bridge_map=site.bridge_map or _mapped(opening.bridge_map),
        mac="keep",
        uuid="keep",
    )
    try:
        found = transform_for_restore(
            describe.config,
            wishes,
            Target(usable, release=version.major),
            disk_sizes={disk.key: disk.size for disk in describe.disks},
            fresh_uuid=record.uuid,
            running_machine=describe.machine or None,
        )
    except ConfigError as error:
        text = str(error).replace("restore_storage", "dr_storage")
        raise ReplicaError("configuration", text.replace(" or storage_map", "")) from (
            error
        )
    disks = {}
    for disk in found.disks:
        if disk.key in record.disks:
            held = record.disks[disk.key]
            disks[disk.key] = replace(disk, storage=held.storage, format=held.format)
        else:
            form = _snapshot_format(storages[disk.storage], disk, version.text)
            disks[disk.key] = replace(disk, format=form)
    params = {k: v for k, v in found.params.items() if k not in _MANAGED}
    late = {k: v for k, v in found.late_params.items() if k not in _MANAGED}
    params["onboot"] = "0"
    params["smbios1"] = found.params.get("smbios1") or f"uuid={record.uuid}"
    if smbios_uuid(params) != record.uuid:
        raise ReplicaError(
            "identity",
            f"the source VM's SMBIOS UUID is {smbios_uuid(params)}, and the replica's "
            f"is {record.uuid}",
        )
    params.setdefault("name", opening.name)
    tags = [t for t in re.split(r"[;,\s]+", found.params.get("tags", "")) if t]
    params["tags"] = ";".join(dict.fromkeys([*tags, TAG]))
    params["description"] = _description(record, opening, found.params)
    said = [("info", f"{key} is not taken over: {why}") for key, why in found.dropped]
    said += [("warning", text) for text in found.warnings]
    sizes = {disk.key: disk.size for disk in describe.disks}
    return Plan(params, late, disks, sizes, tuple(said), describe.firewall)


def _description(record: Record, opening: Open, params: Mapping[str, str]) -> str:
    lines = [
        f"{TAG} link={record.link}",
        f"Replica of VM {opening.vmid} ({one_line(opening.name, 80)}) of "
        f"{one_line(opening.site, 80)}, "
        f"SMBIOS UUID {record.uuid}.",
        "Do not start it by hand: use failover-exec or failover-test.",
    ]
    if own := params.get("description", "").strip("\n"):
        lines += ["", own]
    return "\n".join(lines)


def is_ours(config: Mapping[str, str], record: Record) -> bool:
    """Whether a VM is this replica: another VM may have got its id."""
    said = config.get("description", "").split("\n", 1)[0]
    return smbios_uuid(config) == record.uuid and said.rstrip() == (
        f"{TAG} link={record.link}"
    )


def _snapshot_format(storage: Storage, disk: DiskPlan, release: str) -> str:
    """Return the format in which the storage can snapshot the disk.

    Raises:
        ReplicaError: it has none.
    """
    in_place = SNAPSHOT_FORMATS.get(storage.type, ())
    there = _formats(storage)
    form = next((f for f in in_place if f in there), None)
    if form is None:
        raise ReplicaError(
            "storage",
            f"disk {disk.source_key}: storage {storage.name} ({storage.type}) can't "
            f"snapshot a disk in the formats it has ({', '.join(there)}), and restore "
            "points are snapshots",
            remedy="name another dr_storage: a directory or NFS storage (qcow2), "
            "ZFS, LVM-thin or Ceph RBD"
            + (
                "; or set snapshot-as-volume-chain on it (Proxmox VE 9)"
                if storage.type == "lvm"
                else ""
            ),
        )
    if disk.key == "tpmstate0" and form == "qcow2" and not _at_least(release, 9, 1):
        raise ReplicaError(
            "storage",
            f"tpmstate0: Proxmox VE {release} keeps a TPM state on storage "
            f"{storage.name} as a raw file, which can't be snapshotted",
            remedy="name a dr_storage on ZFS, LVM-thin or Ceph RBD, or update the DR "
            "site to Proxmox VE 9.1.",
        )
    return form


def _at_least(release: str, major: int, minor: int) -> bool:
    found = re.match(r"(\d+)(?:\.(\d+))?", release)
    return found is not None and (int(found[1]), int(found[2] or 0)) >= (major, minor)


def _formats(storage: Storage) -> tuple[str, ...]:
    """Return a storage's formats, its default first."""
    default = [storage.default_format] if storage.default_format else []
    found = [f for f in (*default, *storage.formats) if f in ("raw", "qcow2")]
    return tuple(dict.fromkeys(found)) or ("raw",)


def _mapped(text: str) -> Mapped:
    """Return what a sender wants bridges mapped to; see ``values.Mapped``."""
    pairs, default = {}, None
    for item in re.split(r"[,;]", text):
        name, colon, target = item.strip().partition(":")
        if colon:
            pairs[name] = target
        elif name:
            default = name
    return Mapped(pairs, default)


class Provisioner:
    """Makes and keeps the VM of one replica.

    Args:
        site: the DR site.
        record: the replica's, changed as things happen.
        save: brings it onto stable storage.
        say: takes what PVE warns of.
    """

    def __init__(self, site: Site, record: Record, save: Save, say: Reporter) -> None:
        self._site = site
        self._api = site.api
        self._record = record
        self._save = save
        self._say = say
        self._unprotected = False
        self.lock_wait_s = _LOCK_WAIT_S

    # --- the VM ----------------------------------------------------------------------

    async def config(self) -> dict[str, str] | None:
        """Return the replica VM's configuration; None: there is none of ours."""
        if not self._record.vmid:
            return None
        try:
            found = await self._api.vm_config(self._site.here, self._record.vmid)
        except PveRefusalError as error:
            if error.reason is Reason.VM_MISSING:
                return None
            raise
        return dict(found.values) if is_ours(found.values, self._record) else None

    async def create(self, plan: Plan, target: int, own: int) -> None:
        """Create the VM without disks, unless it is there.

        Args:
            plan: what it shall be.
            target: the id that was asked for; 0: none.
            own: the source's, taken if it is free here.
        """
        if await self.config() is not None:
            return
        resources = {r.vmid: r for r in await self._api.resources(containers=True)}
        if target and target in resources:
            raise ReplicaError(
                "identity",
                f"the replica shall be VM {target}, and that is "
                f"{_shown(resources[target])}",
                remedy="choose another dr_target_vmid, or leave it out.",
            )
        choices = [target] if target else [v for v in [own] if v and v not in resources]
        refused: set[int] = set()
        while True:
            if choices:
                vmid = choices.pop()
            elif target or len(refused) > 20:
                raise ReplicaError("identity", f"VM {target or vmid} was just taken")
            else:
                vmid = await self._api.next_id()
                while vmid in refused:
                    vmid += 1
            self._record.vmid, self._record.created = vmid, True
            await self._save()
            extra = {"pool": self._site.pool} if self._site.pool else {}
            try:
                self._warn(
                    await self._api.create_vm(
                        self._site.here, vmid, {**plan.params, **extra}
                    )
                )
            except PveRefusalError as error:
                if error.reason is not Reason.EXISTS:
                    raise
                if await self.config() is not None:
                    return  # an earlier call of ours, whose answer was lost
                refused.add(vmid)
                continue
            return

    async def destroy(self) -> bool:
        """Remove the VM with all its volumes, only if it is surely ours.

        Returns: whether there was one.
        """
        config = await self.config()
        if config is None:
            return False
        here, vmid = self._site.here, self._record.vmid
        if config.get("protection") == "1":
            await self._api.update_config(here, vmid, delete=["protection"])
        self._warn(await self._api.destroy_vm(here, vmid, unreferenced=True))
        return True

    # --- what it is ------------------------------------------------------------------

    async def ensure(self, plan: Plan) -> None:
        """Make the VM what the plan says.

        Raises:
            ReplicaError: ``identity`` where the VM isn't there any more.
        """
        config = await self._unlocked(await self.must_be_there())
        await self._free_pending(config)
        await self._keys(plan, config)
        await self._remove(plan, config)
        for key, disk in plan.disks.items():
            await self._disk(key, disk, plan.sizes[key], config)
        await self._late(plan)
        if plan.firewall is not None:
            await asyncio.to_thread(self._firewall, plan.firewall)

    async def must_be_there(self) -> dict[str, str]:
        """Return the configuration of the VM.

        Raises:
            ReplicaError: ``identity``: it isn't there any more.
        """
        config = await self.config()
        if config is None:
            raise ReplicaError(
                "identity",
                f"the replica VM {self._record.vmid} is gone from node "
                f"{self._site.here}, or is another VM now",
                remedy="was it removed or moved to another node, or was the first line "
                "of its notes edited? Put that right; to begin anew, have the receiver "
                "forget the replica and seed again.",
            )
        return config

    async def _unlocked(self, config: dict[str, str]) -> dict[str, str]:
        """Wait until PVE has ended what it does with the VM.

        A task goes on when whoever asked for it was killed.
        """
        until = asyncio.get_running_loop().time() + self.lock_wait_s
        while lock := config.get("lock"):
            if asyncio.get_running_loop().time() >= until:
                raise ReplicaError(
                    "pve",
                    f"the replica VM {self._record.vmid} is locked ({lock})",
                    remedy="let that operation end; if it died, 'qm unlock "
                    f"{self._record.vmid}' on {self._site.here}.",
                )
            await asyncio.sleep(_LOCK_POLL_S)  # PVE tells nobody that a lock has gone
            config = await self.config() or {}
        return config

    def _firewall(self, rules: str) -> None:
        path = Path(self._site.node.firewall_dir) / f"{self._record.vmid}.fw"
        try:
            data = rules.encode("utf-8", "surrogateescape")
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
        except OSError as error:
            self._say.warning(
                f"VM {self._record.vmid}: its firewall rules could not be written to "
                f"{path}: {error.strerror or error}"
            )

    async def _keys(self, plan: Plan, config: Mapping[str, str]) -> None:
        changed = {
            key: value
            for key, value in plan.params.items()
            if config.get(key, "").rstrip("\n") != value
            and not (_allocates(value) and key in config)
        }
        gone = [
            key
            for key in self._record.keys
            if key in config and key not in plan.params and key not in plan.late
        ]
        known = set(self._record.keys)
        if new := sorted((set(plan.params) | set(plan.late)) - known - _MANAGED):
            self._record.keys += new
            await self._save()
        if changed or gone:
            await self._put(changed, gone)

    async def _remove(self, plan: Plan, config: Mapping[str, str]) -> None:
        """Detach what the source has no more; the volumes stay for their points."""
        for key, volume in list(self._record.disks.items()):
            if key in plan.disks and plan.sizes[key] >= volume.size:
                continue
            if volume.volid not in self._record.retired:
                self._record.retired.append(volume.volid)
                await self._save()
            if _file(config, key) == volume.volid:
                await self._detach(key, config)
            del self._record.disks[key]
            self._record.seeded.pop(key, None)
            await self._save()
        for drive in drives(config):
            if drive.file in self._record.pending and drive.key not in plan.disks:
                self._record.retired.append(drive.file)
                await self._detach(drive.key, config)
                self._record.pending.remove(drive.file)
                await self._save()

    async def _detach(self, key: str, config: Mapping[str, str]) -> None:
        await self._unprotect(config)
        await self._put({}, [key])

    async def _disk(
        self, key: str, disk: DiskPlan, size: int, config: Mapping[str, str]
    ) -> None:
        volume = self._record.disks.get(key)
        if volume is None:
            await self._attach_new(key, disk, size, _file(config, key))
            return
        value = disk.drive_value(volume.volid)
        if _file(config, key) != volume.volid or _options(
            parse_drive(key, config[key])
        ) != _options(parse_drive(key, value)):
            await self._put({key: value})
        if size > volume.size:
            await self._resize(key, disk, volume)
            volume.size = size
            await self._save()

    async def _attach_new(
        self, key: str, disk: DiskPlan, size: int, there: str
    ) -> None:
        """Give the VM a volume that reads as zeroes."""
        if there in self._record.pending:
            # Attached by us a moment before we died; nothing is in it yet.
            volid = there
        else:
            volid = await self._allocate(disk)
            await self._put({key: disk.drive_value(volid)})
        self._record.disks[key] = Volume(volid, size, disk.format, disk.storage)
        self._record.storage = self._record.storage or disk.storage
        if volid in self._record.pending:
            self._record.pending.remove(volid)
        await self._save()

    async def _allocate(self, disk: DiskPlan) -> str:
        site, vmid = self._site, self._record.vmid
        storage = next(
            s for s in await self._api.storages(site.here) if s.name == disk.storage
        )
        there = await self._api.volumes(site.here, storage.name, vmid=vmid)
        used = [v.volid for v in there] + self._record.pending
        number = 0
        while f"vm-{vmid}-disk-{number}" in {_stem(volid) for volid in used}:
            number += 1
        name = f"vm-{vmid}-disk-{number}"
        if storage.type in FILE_STORAGES or disk.format == "qcow2":
            name += f".{disk.format}"
        self._record.pending.append(volume_id(storage, vmid, name))
        await self._save()
        return await self._api.allocate_volume(
            site.here, storage.name, vmid, name, disk.size, disk.format
        )

    async def _free_pending(self, config: Mapping[str, str]) -> None:
        """Free what was allocated, and never attached, before we died."""
        attached = {drive.file for drive in drives(config)}
        for volid in list(self._record.pending):
            if volid in attached:
                continue
            there = await self._api.volumes(
                self._site.here, volid.partition(":")[0], vmid=self._record.vmid
            )
            if any(v.volid == volid for v in there):
                await self._api.delete_volume(self._site.here, volid)
            self._record.pending.remove(volid)
            await self._save()

    async def _resize(self, key: str, disk: DiskPlan, volume: Volume) -> None:
        here, vmid = self._site.here, self._record.vmid
        try:
            self._warn(await self._api.resize_disk(here, vmid, key, disk.size))
        except PveRefusalError as error:
            if "snapshot" not in f"{error.said} {error}" or volume.format != "qcow2":
                raise
            # PVE doesn't resize a qcow2 that has snapshots, and QEMU does: each
            # snapshot keeps the size it had, and going back to one restores it.
            where = await self._site.local.volume_path(volume.volid)
            argv = [self._site.node.qemu_img, "resize", "-q", "-f", "qcow2"]
            await run([*argv, where, str(disk.size)], timeout_s=_RESIZE_S)
            # PVE reads the size anew when the drive is set.
            await self._put({key: disk.drive_value(volume.volid)})

    async def _late(self, plan: Plan) -> None:
        config = await self.config() or {}
        wanted = {**plan.late, "protection": "1"}
        changed = {k: v for k, v in wanted.items() if config.get(k) != v}
        if changed:
            await self._put(changed)
        self._unprotected = False

    # --- volumes nobody needs any more -----------------------------------------------

    async def sweep(self) -> None:
        """Free detached volumes that no restore point holds any more."""
        if not self._record.retired:
            return
        config = await self.config()
        if config is None:
            return
        there: set[str] = set()
        for storage in {volid.partition(":")[0] for volid in self._record.retired}:
            found = await self._api.volumes(
                self._site.here, storage, vmid=self._record.vmid
            )
            there |= {v.volid for v in found}
        # PVE calls a volume unusedN only when no snapshot names it.
        unused = {
            value.partition(",")[0]: key
            for key, value in config.items()
            if key.startswith("unused")
        }
        free = [
            unused[volid]
            for volid in self._record.retired
            if volid in unused and volid in there
        ]
        if free:
            await self._unprotect(config)
            await self._put({}, free)
            await self._put({"protection": "1"})
            self._unprotected = False
        gone = {value for value, key in unused.items() if key in free}
        kept = [v for v in self._record.retired if v in there and v not in gone]
        if kept != self._record.retired:
            self._record.retired = kept
            await self._save()

    async def _unprotect(self, config: Mapping[str, str]) -> None:
        if config.get("protection") == "1" and not self._unprotected:
            await self._put({"protection": "0"})
            self._unprotected = True

    async def _put(
        self, params: Mapping[str, str], delete: list[str] | None = None
    ) -> None:
        self._warn(
            await self._api.update_config(
                self._site.here, self._record.vmid, params, delete=delete or []
            )
        )

    def _warn(self, texts: list[str]) -> None:
        for text in texts:
            self._say.warning(f"VM {self._record.vmid}: {text}")


def _allocates(value: str) -> bool:
    return value.endswith(":cloudinit")


def _file(config: Mapping[str, str], key: str) -> str:
    """Return the volume that a configuration has at a key, or nothing."""
    return parse_drive(key, config[key]).file if key in config else ""


def _options(drive: Drive) -> dict[str, str]:
    return {k: v for k, v in drive.options if k not in ("size", "format")}


def _stem(volid: str) -> str:
    return volid.partition(":")[2].rpartition("/")[2].partition(".")[0]


def _shown(resource: Resource) -> str:
    return f"{resource.type} guest {resource.name} on node {resource.node}"
