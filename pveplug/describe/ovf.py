# SPDX-License-Identifier: Apache-2.0
"""OVF descriptors: DMTF DSP0243 1.x and 2.x, and what VMware and VirtualBox add.

::

    Envelope
      References / File            id, href             the images
      DiskSection / Disk           diskId, fileRef, capacity (in units)
      VirtualSystem
        OperatingSystemSection     id (a CIM number), vmw:osType, vbox:OSType
        VirtualHardwareSection
          System / VirtualSystemType                    vmx-19, virtualbox-2.2
          Item, StorageItem, EthernetPortItem           ResourceType says what it is
          vmw:Config, vmw:ExtraConfig                   firmware, Secure Boot
        vbox:Machine               VirtualBox's own settings, whole

Elements are known by their names without namespaces: drafts, releases and vendors
differ in those, and no two of them give one name two meanings.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pveplug.describe.guest import (
    MAX_CAPACITY,
    MAX_CPUS,
    MAX_DISKS,
    MAX_MEMORY_MIB,
    MAX_NICS,
    Bus,
    Firmware,
    GuestCdrom,
    GuestDescription,
    GuestDisk,
    GuestNic,
    bounded,
    lines,
    mac_address,
    one_line,
    plain,
    reported,
)
from pveplug.describe.safexml import Element
from pveplug.describe.systems import UNKNOWN, family_of, of_cim, system_of
from pveplug.errors import DescriptionError
from pveplug.units import MiB

_CPU, _MEMORY, _IDE, _SCSI, _NIC = 3, 4, 5, 6, 10
_FLOPPY, _CD, _DVD, _DISK, _STORAGE = 14, 15, 16, 17, 20
_EXTENT = 31  # of 2.x: a logical disk
_ITEMS: Final = ("Item", "StorageItem", "EthernetPortItem")
_UNIT: Final = re.compile(r"byte(?: ?\* ?(?:(\d{1,9})|(2|10) ?\^ ?(\d{1,2})))*")
_FACTOR: Final = re.compile(r"\* ?(?:(2|10) ?\^ ?(\d{1,2})|(\d{1,9}))")
_WORDS: Final = {
    **{"byte": 1, "bytes": 1, "kilobytes": 1 << 10, "kb": 1 << 10, "kib": 1 << 10},
    **{"megabytes": 1 << 20, "mb": 1 << 20, "mib": 1 << 20, "gigabytes": 1 << 30},
    **{"gb": 1 << 30, "gib": 1 << 30, "terabytes": 1 << 40, "tb": 1 << 40},
}
_TYPES: Final = {
    **{_FLOPPY: "floppy drive", 21: "serial port", 22: "parallel port"},
    **{23: "USB controller", 35: "sound card", 8: "host bus adapter"},
    **{9: "InfiniBand", 7: "Fibre Channel adapter", 18: "tape drive"},
}


def is_ovf(root: Element) -> bool:
    """Whether it is an OVF envelope."""
    return root.name == "Envelope" and any(_kind(c) in _PARTS for c in root.children)


_PARTS: Final = (
    *("References", "DiskSection", "VirtualSystem", "VirtualSystemCollection"),
    "NetworkSection",
)


def read(root: Element, file: str) -> GuestDescription:
    """Read a descriptor.

    Raises:
        DescriptionError: there is no VM in it or more than one; a number is absurd.
    """
    return _Ovf(root, file).run()


def _kind(element: Element) -> str:
    """The name; for drafts of 2007 that have it in ``xsi:type``, that."""
    if element.name in ("Section", "Content"):
        typed = element.get("type").rpartition(":")[2]
        return typed.removesuffix("_Type") or element.name
    return element.name


@dataclass(frozen=True, slots=True)
class _Controller:
    bus: Bus
    number: int
    model: str
    first: int = 0
    """Units of its bus taken before it: OVF's IDE controllers have two each."""


@dataclass(frozen=True, slots=True)
class _Image:
    file: str | None
    capacity: int | None


class _Ovf:
    def __init__(self, root: Element, file: str) -> None:
        self.root = root
        self.file = file
        self.dropped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.disks: list[GuestDisk] = []
        self.cdroms: list[GuestCdrom] = []
        self.taken: set[tuple[Bus, int, int]] = set()

    def wrong(self, why: str, element: Element) -> DescriptionError:
        return DescriptionError(why, file=self.file, line=element.line)

    def run(self) -> GuestDescription:
        vm = self.only_vm()
        self.sections(vm)
        self.chosen = self.configuration()
        images = self.images()
        hardware = [e for e in vm.children if _kind(e) == "VirtualHardwareSection"]
        if len(hardware) > 1:
            self.notes.append(
                f"{len(hardware)} hardware sections for one VM: the first was taken"
            )
        items = [
            item
            for section in hardware[:1]
            for item in section.all(*_ITEMS)
            if self.wanted(item)
        ]
        config = dict(self.config(hardware[:1]))
        machine = next((e for e in vm.children if e.name == "Machine"), None)
        self.drives(items, images, self.boot_instances(vm))
        sockets, cores = self.processors(items)
        memory, memory_min = self.memory(items)
        os_id = self.system(vm)
        kinds = [
            one_line(section.said("System", "VirtualSystemType"))
            for section in hardware[:1]
        ]
        name = vm.child("Name")
        firmware, secure = self.firmware(config, machine, kinds)
        hardware_uuid = _attribute(machine, "Hardware", "uuid") or (
            machine.get("uuid") if machine is not None else ""
        )
        local = _attribute(machine, "Hardware", "RTC", "localOrUTC") or _attribute(
            machine, "Hardware", "BIOS", "TimeOffset", "localOrUTC"
        )
        nics = tuple(self.nics(items))
        self.others(items)
        return GuestDescription(
            source=f"OVF {self.file}",
            name=one_line(name.text if name is not None else vm.get("id")),
            firmware=firmware,
            secure_boot=secure,
            tpm=self.tpm(items, machine),
            sockets=sockets,
            cores=cores,
            memory_mib=memory,
            memory_min_mib=memory_min,
            disks=tuple(self.disks),
            cdroms=tuple(self.cdroms),
            nics=nics,
            os_id=os_id,
            family=family_of(os_id),
            uuid=_uuid(hardware_uuid),
            machine=tuple(kind for kind in kinds if kind),
            localtime={"local": True, "utc": False}.get(local.lower()),
            text=self.annotation(vm),
            dropped=reported(self.dropped),
            notes=bounded(self.notes),
        )

    def only_vm(self) -> Element:
        found = []
        waiting = [self.root]
        while waiting:
            for element in waiting.pop().children:
                if _kind(element) == "VirtualSystem":
                    found.append(element)
                elif _kind(element) == "VirtualSystemCollection":
                    waiting.append(element)
        if len(found) != 1:
            names = ", ".join(one_line(vm.get("id"), 60) for vm in found[:10])
            raise self.wrong(
                f"it describes {len(found)} VMs ({names}); one at a time is read"
                if found
                else "it describes no VM",
                self.root,
            )
        return found[0]

    def sections(self, vm: Element) -> None:
        known = {
            *("Info", "Name", "OperatingSystemSection", "VirtualHardwareSection"),
            *("AnnotationSection", "Machine", "BootOrderSection"),
        }
        for section in vm.children:
            kind = _kind(section)
            if kind not in known:
                self.dropped.append((kind, "a section without a counterpart"))

    def wanted(self, item: Element) -> bool:
        """Bounds don't count, nor do items of other configurations than the default."""
        if item.get("bound") in ("min", "max"):
            return False
        wanted = item.get("configuration").split()
        return not wanted or not self.chosen or self.chosen in wanted

    def configuration(self) -> str:
        """Return the id of the default configuration; empty where there are none."""
        there = [e for e in self.root.walk() if e.name == "Configuration"]
        default = [e for e in there if e.get("default").lower() == "true"]
        return next((e.get("id") for e in (*default, *there)), "")

    def config(self, hardware: list[Element]) -> Iterator[tuple[str, str]]:
        for section in hardware:
            for element in section.all("Config", "ExtraConfig"):
                yield element.get("key").lower(), element.get("value").strip()

    # ---- numbers

    def number(self, text: str, element: Element, most: int) -> int | None:
        text = text.strip()
        if not text:
            return None
        if not re.fullmatch(r"\d{1,20}", text) or int(text) > most:
            raise self.wrong(
                f"{one_line(text, 40)!r} in {element.name} is no number up to {most}",
                element,
            )
        return int(text)

    def unit(self, text: str, element: Element, default: int) -> int:
        """Bytes of ``byte * 2^20``, ``MegaBytes`` (DSP0004, "Programmatic units")."""
        text = " ".join(text.lower().split())
        if not text:
            return default
        if text in _WORDS:
            return _WORDS[text]
        if not _UNIT.fullmatch(text):
            raise self.wrong(f"{one_line(text, 40)!r} isn't known as a unit", element)
        size = 1
        for base, power, factor in _FACTOR.findall(text):
            size *= int(base) ** int(power) if base else int(factor)
            if size > MAX_CAPACITY:
                raise self.wrong(f"a unit of {one_line(text, 40)}", element)
        return size

    # ---- parts

    def images(self) -> dict[str, _Image]:
        """Return disks by their id, with their files' names."""
        files: dict[str, str] = {}
        found: dict[str, _Image] = {}
        for section in self.root.children:
            if _kind(section) == "References":
                for file in section.all("File"):
                    files[file.get("id")] = plain(file.get("href"))
        for section in self.root.children:
            if _kind(section) != "DiskSection":
                continue
            for disk in section.all("Disk"):
                capacity = None
                said = disk.get("capacity")
                if said.startswith("${"):
                    self.notes.append(f"the size of {disk.get('diskId')} is {said}")
                elif said:
                    units = self.unit(disk.get("capacityAllocationUnits"), disk, 1)
                    amount = self.number(said, disk, MAX_CAPACITY) or 0
                    capacity = amount * units or None
                    if capacity and capacity > MAX_CAPACITY:
                        raise self.wrong(f"a disk of {capacity} bytes", disk)
                name = files.get(disk.get("fileRef")) or None
                found[disk.get("diskId")] = _Image(name, capacity)
                if parent := disk.get("parentRef"):
                    self.notes.append(
                        f"disk {disk.get('diskId')} builds on disk {parent}"
                    )
        for key, href in files.items():
            found.setdefault(f"\0{key}", _Image(href or None, None))
        return found

    def processors(self, items: list[Element]) -> tuple[int | None, int | None]:
        total = per = 0
        for item in self.of_type(items, _CPU):
            total += self.number(item.said("VirtualQuantity"), item, MAX_CPUS) or 0
            per = per or (self.number(item.said("CoresPerSocket"), item, MAX_CPUS) or 0)
        if not total:
            return None, None
        if per and total % per:
            self.notes.append(
                f"{total} processors in sockets of {per}: sockets of one core instead"
            )
            per = 1
        return total // (per or 1), per or 1

    def memory(self, items: list[Element]) -> tuple[int | None, int | None]:
        size = 0
        for item in self.of_type(items, _MEMORY):
            unit = self.unit(item.said("AllocationUnits"), item, MiB)
            size += (
                self.number(item.said("VirtualQuantity"), item, MAX_CAPACITY) or 0
            ) * unit
            if size > MAX_MEMORY_MIB * MiB:
                raise self.wrong(f"{size} bytes of memory", item)
        return (-(-size // MiB) if size else None), None

    def of_type(self, items: list[Element], *types: int) -> Iterator[Element]:
        for item in items:
            if self.type(item) in types:
                yield item

    def type(self, item: Element) -> int:
        return self.number(item.said("ResourceType"), item, 1 << 16) or 0

    def controllers(self, items: list[Element]) -> dict[str, _Controller]:
        found: dict[str, _Controller] = {}
        counts: dict[Bus, int] = {}
        for item in items:
            kind = self.type(item)
            subtype = item.said("ResourceSubType").lower()
            if kind == _IDE:
                bus = Bus.IDE
            elif kind == _SCSI:
                bus = Bus.VIRTIO if subtype.startswith("virtio") else Bus.SCSI
            elif kind == _STORAGE and "nvme" in subtype:
                bus = Bus.NVME
            elif kind == _STORAGE:
                bus = Bus.VIRTIO if "virtio" in subtype else Bus.SATA
            else:
                continue
            number = counts.get(bus, 0)
            counts[bus] = number + 1
            model = one_line({"virtualscsi": "pvscsi"}.get(subtype, subtype), 40)
            found[item.said("InstanceID")] = _Controller(bus, number, model)
        return found

    def boot_instances(self, vm: Element) -> list[str]:
        return [
            e.get("instanceId")
            for e in vm.walk()
            if e.name == "BootOrderSection" and e.get("type").lower() == "disk"
        ]

    def drives(
        self, items: list[Element], images: dict[str, _Image], boot: list[str]
    ) -> None:
        controllers = self.controllers(items)
        found: list[tuple[GuestDisk, str]] = []
        unplaced = 0
        for item in self.of_type(items, _CD, _DVD, _DISK, _EXTENT):
            name = one_line(item.said("ElementName") or item.said("Caption"), 60)
            controller = controllers.get(item.said("Parent"))
            if controller is None:
                controller = _Controller(Bus.UNKNOWN, 0, "")
            said = item.said("AddressOnParent")
            unit = self.number(said, item, 65535)
            if unit is None:
                unit, unplaced = 1000 + unplaced, unplaced + 1
            place = (controller.bus, controller.number, unit)
            while place in self.taken:
                place = (*place[:2], place[2] + 1)
            if len(self.taken) >= MAX_DISKS:
                self.dropped.append((name, f"more than {MAX_DISKS} drives"))
                continue
            self.taken.add(place)
            image, what = self.image_of(item, images)
            if self.type(item) in (_CD, _DVD):
                self.cdroms.append(GuestCdrom(*place, image.file if image else None))
            elif image is None and what:
                raise self.wrong(f"{name}: {what} isn't in the file", item)
            else:
                image = image or _Image(None, None)
                disk = GuestDisk(
                    0,
                    *place,
                    model=controller.model,
                    file=image.file,
                    capacity=image.capacity or self.capacity_of(item),
                    boot=item.said("InstanceID") in boot[:1],
                )
                if image.file is None:
                    self.notes.append(
                        f"{disk.key} ({name}) has no image: it was empty when exported"
                    )
                found.append((disk, name))
        # A BIOS counts SCSI before SATA before IDE; on one bus by controller and unit.
        rank = [Bus.SCSI, Bus.VIRTIO, Bus.SATA, Bus.IDE, Bus.NVME, Bus.UNKNOWN]
        found.sort(key=lambda f: (rank.index(f[0].bus), f[0].controller, f[0].unit))
        for order, (disk, _) in enumerate(found):
            self.disks.append(
                GuestDisk(
                    order,
                    disk.bus,
                    disk.controller,
                    disk.unit,
                    disk.model,
                    disk.file,
                    disk.capacity,
                    disk.boot,
                )
            )

    def image_of(
        self, item: Element, images: dict[str, _Image]
    ) -> tuple[_Image | None, str]:
        """Return what ``ovf:/disk/ID`` or ``ovf:/file/ID`` names, and that text."""
        said = item.said("HostResource")
        found = re.fullmatch(r"(?:ovf:)?/*(disk|file)/(.+)", said)
        if not found:
            return None, ""
        key = found[2] if found[1] == "disk" else f"\0{found[2]}"
        return images.get(key), one_line(said, 80)

    def capacity_of(self, item: Element) -> int | None:
        """2.x may say a disk's size only in its item."""
        unit = item.said("VirtualQuantityUnits") or item.said("AllocationUnits")
        if not unit:
            return None
        amount = self.number(item.said("VirtualQuantity"), item, MAX_CAPACITY)
        size = (amount or 0) * self.unit(unit, item, 1)
        return size if 1 < size <= MAX_CAPACITY else None

    def nics(self, items: list[Element]) -> Iterator[GuestNic]:
        for number, item in enumerate(self.of_type(items, _NIC)):
            name = one_line(item.said("ElementName") or item.said("Caption"), 60)
            if number >= MAX_NICS:
                self.dropped.append((name, f"more than {MAX_NICS} network cards"))
                continue
            said = item.said("Address") or item.said("MACAddress")
            if said and mac_address(said) is None:
                self.dropped.append((f"{name} MAC address", one_line(said, 40)))
            yield GuestNic(
                model=one_line(item.said("ResourceSubType").split(" ")[0].lower(), 40),
                mac=mac_address(said),
                network=one_line(item.said("Connection")),
                connected=item.said("AutomaticAllocation").lower() != "false",
            )

    def tpm(self, items: list[Element], machine: Element | None) -> bool | None:
        for item in items:
            if "tpm" in item.said("ResourceSubType").lower():
                return True
        kind = _attribute(machine, "Hardware", "TrustedPlatformModule", "type").lower()
        if kind:
            return kind != "none"
        return None

    def firmware(
        self, config: dict[str, str], machine: Element | None, kinds: list[str]
    ) -> tuple[Firmware, bool | None]:
        said = config.get("firmware", "").lower()
        secure = {"true": True, "false": False}.get(
            config.get("bootoptions.efisecurebootenabled", "").lower()
            or config.get("uefi.secureboot.enabled", "").lower()
        )
        if machine is not None:
            kind = _attribute(machine, "Hardware", "Firmware", "type").lower()
            said = "efi" if kind.startswith("efi") else "bios"
            for element in machine.walk():
                if element.name == "SecureBoot":
                    secure = element.get("enabled").lower() == "true"
        if said in ("efi", "uefi"):
            return Firmware.UEFI, secure
        if said == "bios" or any(
            kind.startswith(("vmx-", "virtualbox")) for kind in kinds
        ):
            return Firmware.BIOS, None  # what they mean when they say nothing
        return Firmware.UNKNOWN, secure

    def system(self, vm: Element) -> str:
        """The most telling name of the guest's system."""
        section = next(
            (e for e in vm.children if _kind(e) == "OperatingSystemSection"), None
        )
        if section is None:
            return ""
        number = section.get("id")
        names = [
            section.get("osType"),
            section.said("OSType"),
            section.said("Description"),
            of_cim(int(number)) if re.fullmatch(r"\d{1,5}", number) else "",
        ]
        names = [one_line(name, 100) for name in names if name]
        for name in names:
            if system_of(name) != UNKNOWN:
                return name
        return names[0] if names else ""

    def annotation(self, vm: Element) -> str:
        return lines(
            "\n".join(
                section.said("Annotation")
                for section in vm.children
                if _kind(section) == "AnnotationSection"
            )
        )

    def others(self, items: list[Element]) -> None:
        for item in items:
            kind = self.type(item)
            if kind in _TYPES and kind != 23:
                name = item.said("ElementName") or item.said("Caption")
                self.dropped.append((_TYPES[kind], one_line(name, 60)))
            elif kind not in (
                *(_CPU, _MEMORY, _IDE, _SCSI, _NIC, _CD, _DVD, _DISK, _STORAGE),
                *(_EXTENT, 23, 24),
            ):
                subtype = item.said("ResourceSubType")
                if not re.search("vmci|tpm|hdaudio|xhci|ehci", subtype, re.IGNORECASE):
                    name = item.said("ElementName") or subtype
                    self.dropped.append((f"device of type {kind}", one_line(name, 60)))


def _attribute(start: Element | None, *path: str) -> str:
    """Return an attribute of what stands below ``start``."""
    found = start.path(*path[:-1]) if start is not None else None
    return found.get(path[-1]) if found is not None else ""


def _uuid(text: str) -> str | None:
    try:
        return str(uuid.UUID(text.strip())) if text else None
    except ValueError:
        return None
