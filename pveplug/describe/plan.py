# SPDX-License-Identifier: Apache-2.0
"""From a foreign VM's description to a PVE VM that starts at the first attempt.

The first start is on hardware the guest surely has drivers for; what is faster comes
later, when the guest itself has installed the drivers. What decides is, in this order:
what was found on its disk, what the description says, what is usual.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pveplug.describe.bootability import Bootability
from pveplug.describe.choices import (
    Remarks,
    choose_bus,
    choose_firmware,
    choose_system,
)
from pveplug.describe.guest import (
    Family,
    Firmware,
    GuestDescription,
    GuestDisk,
    GuestNic,
    basename,
    one_line,
)
from pveplug.describe.steps import next_steps
from pveplug.describe.systems import Storage, System
from pveplug.errors import ConfigError
from pveplug.units import SECTOR
from pveplug.vmconfig import render_properties
from pveplug.vmrestore import DiskPlan, RestorePlan, Target, TargetStorage, Wishes

DEFAULT_BRIDGE: Final = "vmbr0"
MAX_NICS: Final = 32
MIN_MEMORY_MIB: Final = 16
MAX_DESCRIPTION: Final = 8192
_CD: Final = "ide2"
_PLACES: Final[dict[str, tuple[str, ...]]] = {
    "ide": ("ide0", "ide1", "ide3"),  # ide2 is the CD drive: drivers come from there
    "sata": tuple(f"sata{n}" for n in range(6)),
    "scsi": tuple(f"scsi{n}" for n in range(31)),
    "virtio": tuple(f"virtio{n}" for n in range(16)),
}
_TAIL: Final = re.compile(r"(-\d{6})?(-flat|-delta|-sesparse|-rdmp?|-[sf]\d{3})?$")
"""What VMware puts behind a disk's name: a snapshot's number, a kind of extent."""
_DATASTORE: Final = re.compile(r"\s*\[([^\]]{1,100})\]")


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What is known of a disk from its image.

    Attributes:
        size: bytes as the guest sees it; None: as the description says.
        sector: bytes of its logical sectors.
        boot: what :mod:`pveplug.describe.bootability` found; None: not looked at.
    """

    size: int | None = None
    sector: int = SECTOR
    boot: Bootability | None = None


@dataclass(frozen=True, slots=True)
class PvePlan:
    """How to make the VM.

    Attributes:
        restore: parameters, disks, what was dropped, warnings; as for our own backups.
            ``disks[i].source_key`` is a disk's ``key`` in the description.
        fresh: drives that PVE allocates itself in the create call (``efidisk0``,
            ``tpmstate0``): key -> value.
        firmware: BIOS or UEFI; ``why``: what decided.
        system: what the guest was taken for.
        boot_disk: the ``source_key`` of the disk it starts from; None without disks.
        notes: what was assumed, for the job's log.
        next_steps: what its operator does next, a line each; VMID stands for the id.
    """

    restore: RestorePlan
    fresh: dict[str, str]
    firmware: Firmware
    why: str
    system: System
    boot_disk: str | None
    notes: tuple[str, ...]
    next_steps: tuple[str, ...]

    def steps(self, vmid: int) -> tuple[str, ...]:
        """Return ``next_steps`` with the VM's id."""
        return tuple(line.replace("VMID", str(vmid)) for line in self.next_steps)


def to_pve(
    description: GuestDescription,
    wishes: Wishes,
    target: Target,
    *,
    disks: Mapping[str, DiskFacts],
    fresh_uuid: str,
) -> PvePlan:
    """Plan the VM.

    Source key, storage, format and size of the disks don't depend on ``boot`` in their
    facts: plan once, allocate and fill, look at what came, plan again, attach.

    Args:
        description: the foreign VM.
        wishes: the restore options; ``storage_map`` goes by VMware's datastores,
            ``bridge_map`` by the networks' names.
        target: what is known of the place the VM goes to.
        disks: the disks that are in the backup, by their key in the description.
        fresh_uuid: a random UUID, used when the VM gets a new identity.

    Raises:
        ConfigError: a disk has no storage to go to, its size isn't known, or there are
            more of them than PVE has places for.
    """
    return _Plan(description, wishes, target, dict(disks), fresh_uuid).run()


def match_disks(
    description: GuestDescription, names: Iterable[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find each disk's image among names of files.

    By file name without folders and case; then without VMware's ``-flat``, ``-delta``
    and ``-000001``; then by the disk's place in a name (``scsi0-1/…``); then, if there
    is just one disk and one image, those.

    Returns: key -> name for the disks found, and the names that are left.
    """
    left = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for plain in (_same, _stem):
        for disk in description.disks:
            if disk.key in found or not disk.file:
                continue
            fits = [name for name in left if plain(name) == plain(disk.file)]
            if len(fits) == 1:
                found[disk.key] = fits[0]
                left.remove(fits[0])
    for disk in description.disks:
        place = re.compile(rf"(?<![a-z]){disk.key.replace(':', '[-_:.]')}(?![0-9])")
        fits = [name for name in left if place.search(name.lower())]
        if disk.key not in found and len(fits) == 1:
            found[disk.key] = fits[0]
            left.remove(fits[0])
    if not found and len(left) == len(description.disks) == 1:
        found[description.disks[0].key] = left.pop()
    return found, tuple(left)


def _same(name: str) -> str:
    return basename(name).casefold()


def _stem(name: str) -> str:
    stem = re.sub(r"\.[a-z0-9]{2,7}$", "", _same(name))
    return re.sub(
        r"(-\d{6})?(-flat|-delta|-sesparse|-rdmp?|-s\d{3}|-f\d{3})?$", "", stem
    )


@dataclass
class _Plan:
    vm: GuestDescription
    wishes: Wishes
    target: Target
    facts: dict[str, DiskFacts]
    fresh_uuid: str
    params: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)

    def run(self) -> PvePlan:
        vm = self.vm
        self.dropped += vm.dropped
        self.remarks.notes += vm.notes
        disks = self.there()
        boot = self.boot_disk(disks)
        found = self.facts[boot.key].boot if boot else None
        firmware, why = choose_firmware(vm, found, self.remarks)
        system = choose_system(vm, found, self.remarks)
        bus, scsihw = choose_bus(vm, system, boot, firmware, self.remarks)
        places = self.places(disks, boot, bus)
        plans = tuple(self.disk(d, places[d.key], scsihw) for d in disks)
        self.processors()
        self.memory()
        self.hardware(system, firmware, bus, scsihw)
        self.cdroms()
        self.nics(system)
        self.identity()
        late = {"boot": f"order={places[boot.key]}"} if boot else {}
        fresh = self.fresh(firmware)
        restore = RestorePlan(
            self.params,
            late,
            plans,
            tuple(dict.fromkeys(self.dropped)),
            tuple(dict.fromkeys(self.remarks.warnings)),
        )
        return PvePlan(
            restore,
            fresh,
            firmware,
            why,
            system,
            boot.key if boot else None,
            tuple(dict.fromkeys(self.remarks.notes)),
            next_steps(vm, system, restore, firmware, found, bool(fresh)),
        )

    # ---- disks

    def there(self) -> list[GuestDisk]:
        """Return the disks that are in the backup, in the old machine's order."""
        known = {disk.key for disk in self.vm.disks}
        for key in self.facts:
            if key not in known:
                have = ", ".join(sorted(known)) or "none"
                raise ConfigError(
                    f"{self.vm.source} does not know disk {key}; it has {have}",
                    key="disks",
                )
        for disk in self.vm.disks:
            if disk.key not in self.facts:
                self.dropped.append(
                    (f"disk {disk.key}", f"not in the backup: {disk.file or 'no file'}")
                )
        return [disk for disk in self.vm.disks if disk.key in self.facts]

    def boot_disk(self, disks: list[GuestDisk]) -> GuestDisk | None:
        """The one described as such, unless only another one can start anything."""
        first = next((disk for disk in disks if disk.boot), next(iter(disks), None))
        if first is None:
            return None
        seen = self.facts[first.key].boot
        if seen is None or seen.bios or seen.loaders:
            return first
        for disk in disks:
            other = self.facts[disk.key].boot
            if other is not None and (other.bios or other.loaders):
                self.remarks.warnings.append(
                    f"disk {first.key} has nothing to start from, but {disk.key} has: "
                    "the VM starts from that"
                )
                return disk
        return first

    def disk(self, disk: GuestDisk, place: str, scsihw: str) -> DiskPlan:
        facts = self.facts[disk.key]
        size = facts.size or disk.capacity
        if not size:
            raise ConfigError(
                f"disk {disk.key} ({disk.basename}): neither its image nor "
                f"{self.vm.source} says how large it is",
                key="disks",
            )
        if facts.size and disk.capacity and facts.size != disk.capacity:
            self.remarks.warnings.append(
                f"disk {disk.key} has {facts.size} bytes, where {self.vm.source} says "
                f"{disk.capacity}: the image counts"
            )
        if facts.sector != SECTOR or (facts.boot and facts.boot.sector != SECTOR):
            self.remarks.warnings.append(
                f"disk {disk.key} was made for sectors of 4096 bytes and PVE shows 512:"
                " its partitions won't be found by the guest; copy its files instead"
            )
        storage = self.storage(disk)
        wanted = self.wishes.disk_format
        if wanted != "keep" and wanted not in storage.formats:
            raise ConfigError(
                f"disk_format={wanted}: storage {storage.name} can hold "
                f"{', '.join(storage.formats)}",
                key="disk_format",
            )
        form = storage.formats[0] if wanted == "keep" else wanted
        size = -(-size // SECTOR) * SECTOR
        options: tuple[tuple[str, str], ...] = ()
        if place.startswith("virtio"):
            options = (("iothread", "1"),)
        elif place.startswith("scsi") and scsihw == "virtio-scsi-single":
            options = (("discard", "on"), ("iothread", "1"))
        return DiskPlan(disk.key, place, size, storage.name, form, options)

    def storage(self, disk: GuestDisk | None) -> TargetStorage:
        found = _DATASTORE.match(disk.file or "") if disk else None
        source = found[1] if found else ""
        wishes = self.wishes
        wanted = (
            wishes.storage_map.pairs.get(source)
            or wishes.storage
            or wishes.storage_map.default
        )
        what = f"disk {disk.key}" if disk else "the firmware's settings"
        if not wanted:
            raise ConfigError(
                f"{what}: no storage of this site is named; give restore_storage",
                key="restore_storage",
            )
        there = self.target.storages.get(wanted)
        if there is None:
            have = ", ".join(sorted(self.target.storages)) or "none"
            raise ConfigError(
                f"{what}: no storage {wanted} for disk images on the target (or no "
                f"Datastore.AllocateSpace on /storage/{wanted}); it has {have}. Give "
                "restore_storage or storage_map",
                key="restore_storage",
            )
        return there

    def places(
        self, disks: list[GuestDisk], boot: GuestDisk | None, bus: str
    ) -> dict[str, str]:
        """Give each disk a place: on the sure bus while it has some, else beyond."""
        order = list(disks)
        if boot is not None and order.index(boot) >= len(_PLACES[bus]):
            order.remove(boot)
            order.insert(0, boot)
        beyond = {"ide": ("sata", "scsi"), "sata": ("scsi",)}.get(bus, ())
        free = [place for name in (bus, *beyond) for place in _PLACES[name]]
        if len(order) > len(free):
            raise ConfigError(
                f"{len(order)} disks; there are places for {len(free)} on {bus}"
                f"{''.join(f' and {name}' for name in beyond)}",
                key="disks",
            )
        found = {disk.key: place for disk, place in zip(order, free, strict=False)}
        late = [k for k, place in found.items() if not place.startswith(bus)]
        if late:
            self.remarks.warnings.append(
                f"{bus} has no place for {', '.join(late)}: "
                f"{', '.join(found[key] for key in late)} may need a driver before the "
                "guest sees them"
            )
        return found

    # ---- the rest

    def fresh(self, firmware: Firmware) -> dict[str, str]:
        made: dict[str, str] = {}
        if firmware is Firmware.UEFI:
            keys = 1 if self.vm.secure_boot else 0
            if self.vm.secure_boot is None:
                self.remarks.notes.append(
                    "nothing says whether Secure Boot was on: it is off"
                )
            made["efidisk0"] = (
                f"{self.state_storage()}:1,efitype=4m,pre-enrolled-keys={keys}"
            )
        elif self.vm.secure_boot:
            self.dropped.append(("Secure Boot", "there is none with a BIOS"))
        if self.vm.tpm:
            made["tpmstate0"] = f"{self.state_storage()}:1,version=v2.0"
            self.remarks.warnings.append(
                "the TPM is new and empty: what was sealed in the old one (BitLocker) "
                "asks for its recovery key"
            )
        return made

    def state_storage(self) -> str:
        disks = [disk for disk in self.vm.disks if disk.key in self.facts]
        return self.storage(disks[0] if disks else None).name

    def processors(self) -> None:
        sockets, cores = self.vm.sockets, self.vm.cores
        if cores is None:
            self.remarks.notes.append(
                "nothing says how many processors it has: 1 is assumed"
            )
        cores = (cores or 1) * self.vm.threads
        if self.vm.threads > 1:
            self.remarks.notes.append(f"{self.vm.threads} threads a core became cores")
        self.params["sockets"] = str(sockets or 1)
        self.params["cores"] = str(cores)

    def memory(self) -> None:
        size = self.vm.memory_mib
        if size is None:
            self.remarks.warnings.append(
                "nothing says how much memory it has: 2048 MiB are assumed"
            )
            size = 2048
        if size < MIN_MEMORY_MIB:
            self.remarks.notes.append(f"{size} MiB of memory became {MIN_MEMORY_MIB}")
        self.params["memory"] = str(max(size, MIN_MEMORY_MIB))
        if self.vm.memory_min_mib:
            self.dropped.append(
                (
                    "dynamic memory",
                    f"from {self.vm.memory_min_mib} MiB on; it may have used more than "
                    f"the {size} MiB it starts with",
                )
            )

    def hardware(
        self, system: System, firmware: Firmware, bus: str, scsihw: str
    ) -> None:
        uefi = firmware is Firmware.UEFI
        # IDE of the PIIX kind is only there in an i440fx: in a q35 it would be AHCI.
        if uefi and bus != "ide":
            self.params["machine"] = "q35"
        self.params["bios"] = "ovmf" if uefi else "seabios"
        self.params["ostype"] = system.ostype
        if self.vm.agent:
            self.params["agent"] = "1"
        self.params["scsihw"] = scsihw
        old = system.storage is Storage.IDE
        self.params["cpu"] = "kvm64" if old else "x86-64-v2-AES"
        local = self.vm.localtime
        if local is None:
            local = system.family is Family.WINDOWS
        if local or system.family is Family.WINDOWS:
            self.params["localtime"] = "1" if local else "0"

    def cdroms(self) -> None:
        self.params[_CD] = "none,media=cdrom"
        for number, cdrom in enumerate(self.vm.cdroms):
            name = f"CD drive {cdrom.bus.value}{cdrom.controller}:{cdrom.unit}"
            if number:
                self.dropped.append((name, "one CD drive is kept"))
            if cdrom.file:
                self.dropped.append((name, f"medium taken out: {cdrom.file}"))

    def nics(self, system: System) -> None:
        for number, nic in enumerate(self.vm.nics[:MAX_NICS]):
            self.params[f"net{number}"] = self.net(f"net{number}", nic, system)

    def net(self, key: str, nic: GuestNic, system: System) -> str:
        model = "virtio" if nic.model.startswith("virtio") else system.nic
        parts: dict[str, str] = {}
        if nic.mac and self.wishes.mac != "new":
            parts[model] = nic.mac.upper()
            if self.target.original_exists:
                self.remarks.warnings.append(
                    f"{key} keeps the MAC address {nic.mac} while the original VM still"
                    " exists; use mac=new to run both"
                )
        else:
            parts["model"] = model
        parts["bridge"] = self.bridge(key, nic)
        if nic.vlan:
            parts["tag"] = str(nic.vlan)
        if not nic.connected:
            parts["link_down"] = "1"
        return render_properties(parts, "model")

    def bridge(self, key: str, nic: GuestNic) -> str:
        table = self.wishes.bridge_map
        folded = {name.casefold(): to for name, to in table.pairs.items()}
        bridge = (
            table.pairs.get(nic.network)
            or folded.get(nic.network.casefold())
            or table.default
        )
        there = self.target.bridges
        if bridge is None:
            bridge = DEFAULT_BRIDGE
            if there and bridge not in there:
                bridge = min(there)
            self.remarks.notes.append(
                f"{key} was on {nic.network or 'no named network'} and is on {bridge}; "
                "bridge_map says otherwise"
            )
        if there is not None and bridge not in there:
            self.remarks.warnings.append(
                f"{key} needs bridge {bridge}, which the target does not have; the VM "
                "does not start without it (bridge_map)"
            )
        return bridge

    def identity(self) -> None:
        vm, wishes = self.vm, self.wishes
        name = wishes.name or vm.name
        plain = dns_name(name)
        if plain != name and name:
            self.remarks.notes.append(f"the name {one_line(name, 80)} became {plain}")
        if plain:
            self.params["name"] = plain
        text = vm.text.rstrip()
        if len(text) > MAX_DESCRIPTION:
            self.dropped.append(
                (
                    "description",
                    f"cut after {MAX_DESCRIPTION} of {len(text)} characters",
                )
            )
            text = text[:MAX_DESCRIPTION]
        if text:
            self.params["description"] = text
        fresh = wishes.uuid == "new" or (
            wishes.uuid == "auto" and self.target.original_exists
        )
        if fresh:
            self.params["smbios1"] = f"uuid={self.fresh_uuid}"
        elif vm.uuid:
            self.params["smbios1"] = f"uuid={vm.uuid}"


def dns_name(name: str) -> str:
    """Return a name as PVE takes it: labels of letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", name[:1024])
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    labels = (
        re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:63].rstrip("-")
        for label in plain.split(".")
    )
    return ".".join(label for label in labels if label)[:253].rstrip(".-")
