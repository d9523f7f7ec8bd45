# SPDX-License-Identifier: Apache-2.0
"""Turn a backed-up configuration into one that the target accepts.

Positive list: a key is sent because it is known to be portable; what isn't is dropped
and reported, so a restore never fails over a key it could have done without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pveplug.errors import ConfigError
from pveplug.values import Mapped
from pveplug.vmconfig import (
    DRIVE_LIMITS,
    Drive,
    drives,
    parse_config,
    properties,
    render_properties,
)

_PORTABLE: Final = frozenset(
    "acpi agent allow-ksm audio0 autostart balloon bios cipassword citype ciupgrade "
    "ciuser cores cpu cpulimit cpuunits description freeze hotplug keyboard kvm "
    "localtime machine memory migrate_downtime migrate_speed name nameserver numa "
    "ostype reboot rng0 scsihw searchdomain shares smp sockets sshkeys startdate "
    "startup tablet tags tdf vcpus vga watchdog".split()
)
_ROOT_ONLY: Final = frozenset("amd-sev arch args intel-tdx spice_enhancements".split())
_HOST_BOUND: Final = frozenset("affinity hugepages ivshmem keephugepages".split())
# PVE makes these itself, or they describe a moment that is gone: no loss to report.
_ROUTINE: Final = re.compile(
    "digest|lock|meta|parent|running.*|snapstate|snaptime|vmgenid|vmstate"
)
_LATE: Final = frozenset("boot bootdisk onboot protection".split())
_DROPPED_OPTIONS: Final = frozenset(
    "file format import-from media replicate size snapshot volume".split()
)
TPM_STATE_SIZE: Final = 4 << 20
"""Bytes Proxmox VE gives every TPM state."""
# Proxmox VE 8 refuses the whole call over one of these; None is the key itself.
_SINCE_9: Final[dict[str, str | None]] = {
    "allow-ksm": None,
    "intel-tdx": None,
    "agent": "guest-fsfreeze",
    "machine": "aw-bits",
    "net": "host-tunnel",
}
_INDEXED: Final = re.compile(r"([a-z]+)([0-9]+)")
_NET_MODELS: Final = frozenset(
    "e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e i82551 i82557b i82559er "
    "ne2k_isa ne2k_pci pcnet rtl8139 virtio vmxnet3".split()
)


@dataclass(frozen=True, slots=True)
class TargetStorage:
    """A storage of the target that may hold disk images.

    Attributes:
        formats: what it can allocate, its own default first.
    """

    name: str
    formats: tuple[str, ...] = ("raw",)


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the place the VM goes to.

    Attributes:
        storages: those with content type "images", by name.
        is_root: whether the credential is root@pam with a ticket; a token never is.
        original_exists: a VM with the backup's SMBIOS UUID is still there and is not
            the one being replaced.
        bridges: bridges and vnets of the node; None when not known.
        machines: machine types its QEMU has; None when not known.
        volumes: volume ids known to exist (ISO images, snippets).
        mappings: names in /cluster/mapping that exist.
        release: major version of its Proxmox VE; None when not known.
    """

    storages: Mapping[str, TargetStorage]
    is_root: bool = False
    original_exists: bool = False
    bridges: frozenset[str] | None = None
    machines: frozenset[str] | None = None
    volumes: frozenset[str] = frozenset()
    mappings: frozenset[str] = frozenset()
    release: int | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asked for; the fields are those of RestoreConfig."""

    storage: str | None = None
    storage_map: Mapped = field(default_factory=Mapped)
    bridge_map: Mapped = field(default_factory=Mapped)
    mac: str = "keep"
    uuid: str = "auto"
    name: str | None = None
    disk_format: str = "keep"


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """One volume to allocate, fill and attach.

    Attributes:
        source_key: the disk in the backup; ``key``: where it is attached.
        size: bytes of the disk as the guest saw it.
        options: of the drive, without those PVE computes.
    """

    source_key: str
    key: str
    size: int
    storage: str
    format: str
    options: tuple[tuple[str, str], ...] = ()

    def drive_value(self, volid: str) -> str:
        """Return the configuration value that attaches ``volid``."""
        return Drive(self.key, volid, self.options).render()


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How to make the VM: create, allocate and fill disks, attach, finish.

    Attributes:
        params: for the create call, without any disk.
        late_params: to be set when all disks are attached: the boot order must name
            existing drives, and a protected VM could not be removed after a failure.
        dropped: ``(key, why)`` of what was not taken over.
    """

    params: dict[str, str]
    late_params: dict[str, str]
    disks: tuple[DiskPlan, ...]
    dropped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def transform_for_restore(
    vm_conf_text: str,
    wishes: Wishes,
    target: Target,
    *,
    disk_sizes: Mapping[str, int],
    fresh_uuid: str,
    running_machine: str | None = None,
) -> RestorePlan:
    """Plan the restore of a whole VM.

    Args:
        vm_conf_text: ``vm.conf`` of the backup.
        wishes: the restore options.
        target: what is known of the place the VM goes to.
        disk_sizes: bytes of each disk that is in the backup, by key.
        fresh_uuid: a random UUID, used when the VM gets a new identity.
        running_machine: machine version the VM ran with when it was backed up.

    Raises:
        ConfigError: a disk has no storage to go to, or a wish cannot be met.
    """
    return _Transform(wishes, target, fresh_uuid).run(
        parse_config(vm_conf_text).current, disk_sizes, running_machine
    )


def plan_single_disks(
    vm_conf_text: str,
    keys: Sequence[str],
    existing: Mapping[str, str],
    wishes: Wishes,
    target: Target,
    *,
    disk_sizes: Mapping[str, int],
) -> tuple[DiskPlan, ...]:
    """Plan the restore of single disks as new ones of an existing VM.

    Each gets the first free place on the bus it had.

    Raises:
        ConfigError: a disk isn't in the backup, or there is no place for it.
    """
    source = {drive.key: drive for drive in drives(parse_config(vm_conf_text).current)}
    transform = _Transform(wishes, target, "")
    taken = set(existing)
    plans = []
    for key in dict.fromkeys(keys):
        if key not in disk_sizes or key not in source:
            there = ", ".join(sorted(disk_sizes)) or "none"
            raise ConfigError(
                f"disks={key}: the backup has no such disk; it has {there}",
                key="disks",
            )
        place = _free_place(key, taken)
        taken.add(place)
        plans.append(transform.disk(source[key], disk_sizes[key], place))
    return tuple(plans)


def _free_place(key: str, taken: set[str]) -> str:
    if key in ("efidisk0", "tpmstate0"):
        if key in taken:
            raise ConfigError(
                f"disks={key}: the VM has one already; detach it first", key="disks"
            )
        return key
    bus = key.rstrip("0123456789")
    for number in range(DRIVE_LIMITS[bus]):
        if f"{bus}{number}" not in taken:
            return f"{bus}{number}"
    raise ConfigError(f"disks={key}: no free place on {bus}", key="disks")


class _Transform:
    def __init__(self, wishes: Wishes, target: Target, fresh_uuid: str) -> None:
        self.wishes = wishes
        self.target = target
        self.fresh_uuid = fresh_uuid
        self.params: dict[str, str] = {}
        self.late: dict[str, str] = {}
        self.dropped: list[tuple[str, str]] = []
        self.warnings: list[str] = []

    def run(
        self,
        config: Mapping[str, str],
        disk_sizes: Mapping[str, int],
        running_machine: str | None,
    ) -> RestorePlan:
        disks = []
        all_drives = {drive.key: drive for drive in drives(config)}
        for key in sorted(disk_sizes):
            if key not in all_drives:
                raise ConfigError(f"vm.conf of the backup does not know disk {key}")
        for key, value in config.items():
            if key not in all_drives:
                understood = self._for_release(key, value)
                if understood is not None:
                    self._key(key, understood)
        for key, drive in all_drives.items():
            if key in disk_sizes:
                disks.append(self.disk(drive, disk_sizes[key], key))
            else:
                self._drive_without_data(drive)
        self._identity(config)
        self._machine(config, running_machine)
        self._boot({d.key for d in disks} | set(self.params))
        if self.wishes.name:
            self.params["name"] = self.wishes.name
        return RestorePlan(
            self.params,
            self.late,
            tuple(disks),
            tuple(self.dropped),
            tuple(self.warnings),
        )

    def disk(self, drive: Drive, size: int, place: str) -> DiskPlan:
        """Plan one disk that is in the backup."""
        storage = self._storage(drive)
        wanted = self.wishes.disk_format
        form = drive.format or storage.formats[0]
        if place == "tpmstate0":
            form = "raw"
            # swtpm cuts a file down to what it needs, and can't lengthen a volume.
            size = max(size, TPM_STATE_SIZE)
        elif wanted != "keep":
            if wanted not in storage.formats:
                raise ConfigError(
                    f"disk_format={wanted}: storage {storage.name} can hold "
                    f"{', '.join(storage.formats)}",
                    key="disk_format",
                )
            form = wanted
        if form not in storage.formats:
            form = storage.formats[0]
        options = tuple(o for o in drive.options if o[0] not in _DROPPED_OPTIONS)
        return DiskPlan(drive.key, place, size, storage.name, form, options)

    def _storage(self, drive: Drive) -> TargetStorage:
        wishes = self.wishes
        source = drive.storage or ""
        wanted = (
            wishes.storage_map.pairs.get(source)
            or wishes.storage
            or wishes.storage_map.default
            or source
        )
        if not wanted:
            raise ConfigError(
                f"disk {drive.key} was {drive.file}, on no storage; "
                "give restore_storage",
                key="restore_storage",
            )
        found = self.target.storages.get(wanted)
        if found is None:
            there = ", ".join(sorted(self.target.storages)) or "none"
            raise ConfigError(
                f"disk {drive.key}: no storage {wanted} for disk images on the target "
                f"(or no Datastore.AllocateSpace on /storage/{wanted}); it has {there}"
                ". Give restore_storage or storage_map",
                key="storage_map" if wishes.storage_map else "restore_storage",
            )
        return found

    def _drive_without_data(self, drive: Drive) -> None:
        key = drive.key
        if drive.is_cloudinit:
            self.params[key] = f"{self._storage(drive).name}:cloudinit"
        elif drive.is_cdrom:
            if drive.file in self.target.volumes:
                self.params[key] = drive.render()
                return
            self.params[key] = "none,media=cdrom"
            if drive.file != "none":
                self._drop(key, f"medium {drive.file} taken out of the drive")
        else:
            self._drop(key, "disk is not in the backup")

    def _for_release(self, key: str, value: str) -> str | None:
        """Return the value as the target's release knows it, or None."""
        stem = key.rstrip("0123456789")
        if self.target.release is None or self.target.release >= 9:
            return value
        if stem not in _SINCE_9:
            return value
        option = _SINCE_9[stem]
        if option is None:
            self._drop(key, f"Proxmox VE {self.target.release} does not have it")
            return None
        parts = properties(value, "\0")
        if parts.pop(option, None) is None:
            return value
        self._drop(
            key, f"{option} taken out: Proxmox VE {self.target.release} lacks it"
        )
        return render_properties(parts, "\0")

    def _key(self, key: str, value: str) -> None:
        indexed = _INDEXED.fullmatch(key)
        stem = indexed[1] if indexed else key
        if key in _LATE:
            self.late[key] = value
        elif key == "smbios1" or _ROUTINE.fullmatch(key):
            pass  # smbios1 has its own step
        elif key == "cipassword" and set(value) <= {"*"}:
            self._drop(key, "the API shows it only as asterisks; set it again")
        elif key in _PORTABLE:
            self.params[key] = value
        elif key in _ROOT_ONLY and self.target.is_root:
            self.params[key] = value
        elif key in _ROOT_ONLY:
            self._drop(key, f"only root@pam may set it, a token may not: {value}")
        elif key in _HOST_BOUND or stem in ("parallel", "virtiofs"):
            self._drop(key, f"bound to the old host: {value}")
        elif stem in ("hostpci", "usb", "serial", "numa", "net", "ipconfig", "unused"):
            self._indexed(stem, key, value)
        else:
            self._other(key, value)

    def _indexed(self, stem: str, key: str, value: str) -> None:
        match stem:
            case "net":
                self.params[key] = self._net(key, value)
            case "ipconfig":
                self.params[key] = value
            case "serial" if value == "socket":
                self.params[key] = value
            case "usb" if properties(value, "host").get("host", "").lower() == "spice":
                self.params[key] = value
            case "hostpci" | "usb" if (
                properties(value, "host").get("mapping") in self.target.mappings
            ):
                self.params[key] = value
            case "numa":
                parts = properties(value)
                if parts.pop("hostnodes", None) is not None:
                    parts.pop("policy", None)
                    self._drop(key, "host nodes taken out, bound to the old host")
                self.params[key] = render_properties(parts)
            case "unused":
                self._drop(key, f"was not attached and is not in the backup: {value}")
            case _:
                self._drop(key, f"bound to the old host: {value}")

    def _other(self, key: str, value: str) -> None:
        if key == "template":
            self.warnings.append(
                "the backup is of a template; it is restored as a VM: "
                "convert it with qm template VMID"
            )
        elif key == "vmstatestorage":
            mapped = self.wishes.storage_map.pairs.get(value, value)
            if mapped in self.target.storages:
                self.params[key] = mapped
            else:
                self._drop(key, f"no storage {mapped} on the target")
        elif key == "cicustom":
            volumes = properties(value).values()
            if all(volume in self.target.volumes for volume in volumes):
                self.params[key] = value
            else:
                self._drop(key, f"its snippets are not on the target: {value}")
        elif key == "hookscript":
            if self.target.is_root and value in self.target.volumes:
                self.params[key] = value
            else:
                self._drop(key, f"only root@pam may set it, if it exists: {value}")
        else:
            self._drop(key, f"not known to this version: {value}")

    def _net(self, key: str, value: str) -> str:
        rendered = properties(value, "model")
        # "virtio=MAC" is short for "model=virtio,macaddr=MAC"; both are accepted.
        model = next((m for m in rendered if m in _NET_MODELS), None)
        mac = rendered[model] if model else rendered.get("macaddr")
        if self.wishes.mac == "new":
            rendered.pop("macaddr", None)
            if model:
                del rendered[model]
                rendered = {"model": model, **rendered}
        elif mac and self.target.original_exists:
            self.warnings.append(
                f"{key} keeps the MAC address {mac} while the original VM still "
                "exists; use mac=new to run both"
            )
        bridge = rendered.get("bridge")
        if bridge:
            bridge = self.wishes.bridge_map.get(bridge) or bridge
            rendered["bridge"] = bridge
            if self.target.bridges is not None and bridge not in self.target.bridges:
                self.warnings.append(
                    f"{key} needs bridge {bridge}, which the target does not have; "
                    "the VM does not start without it (bridge_map)"
                )
        return render_properties(rendered, "model")

    def _identity(self, config: Mapping[str, str]) -> None:
        text = config.get("smbios1")
        wish = self.wishes.uuid
        fresh = wish == "new" or (wish == "auto" and self.target.original_exists)
        if fresh:
            parts = properties(text, "uuid") if text else {}
            self.params["smbios1"] = render_properties(
                {
                    "uuid": self.fresh_uuid,
                    **{k: v for k, v in parts.items() if k != "uuid"},
                }
            )
            if wish == "auto":
                self.warnings.append(
                    "the original VM still exists: the restored one gets a new SMBIOS "
                    "UUID (uuid=keep to prevent that)"
                )
        elif text:
            self.params["smbios1"] = text
        if self.target.original_exists and self.late.pop("onboot", "0") == "1":
            self._drop("onboot", "the original VM still exists and starts at boot")

    def _machine(self, config: Mapping[str, str], running: str | None) -> None:
        machine = self.params.get("machine", "")
        kind = properties(machine, "type").get("type", "") if machine else ""
        pinned = re.search(r"-[0-9]+\.[0-9]+", kind) is not None
        available = self.target.machines
        windows = re.match("w(in|xp|vista|2k)", config.get("ostype", ""))
        if windows and not pinned and running:
            if available is not None and _plain(running) not in available:
                self.warnings.append(
                    f"the VM ran as machine {running}, which the target does not have; "
                    "Windows may see new hardware"
                )
                return
            parts = properties(machine, "type") if machine else {}
            self.params["machine"] = render_properties(
                {**parts, "type": running}, "type"
            )
            self.warnings.append(
                f"machine is pinned to {running}, so that Windows sees no new hardware"
            )
        elif pinned and available is not None and _plain(kind) not in available:
            self.warnings.append(
                f"machine {kind} is not known to the target's QEMU; the VM does not "
                "start until machine is changed"
            )
        cpu = properties(config.get("cpu", ""), "cputype").get("cputype", "")
        if cpu.startswith("custom-"):
            self.warnings.append(
                f"cpu model {cpu} must exist in the target's cpu-models.conf"
            )

    def _boot(self, there: set[str]) -> None:
        text = self.late.get("boot", "")
        parts = properties(text, "legacy") if text else {}
        if "order" in parts:
            devices = [d for d in parts["order"].split(";") if d]
            kept = [d for d in devices if d in there]
            if gone := [d for d in devices if d not in there]:
                self._drop("boot", f"{', '.join(gone)} taken out of the boot order")
            parts["order"] = ";".join(kept)
            self.late["boot"] = render_properties(parts, "legacy")
            if not kept:
                del self.late["boot"]
        if self.late.get("bootdisk", "") not in there:
            self.late.pop("bootdisk", None)

    def _drop(self, key: str, why: str) -> None:
        self.dropped.append((key, why))


def _plain(machine: str) -> str:
    """Return ``pc-q35-9.2`` of ``pc-q35-9.2+pve1``."""
    return machine.partition("+")[0]
