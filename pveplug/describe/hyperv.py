# SPDX-License-Identifier: Apache-2.0
r"""Hyper-V's descriptions: the XML of exports before 2016, and what PowerShell writes.

::

    <configuration>                       Windows Server 2008 to 2012 R2; UTF-16
      <_83f8638b-…_>                      a device, by the GUID of its kind or its own
        <controller0><drive0><pathname type="string">C:\…\web.vhd</pathname>…
      <_…_> <FriendlyName/> <MacAddress/> <Connection><AltSwitchName/>…    a card
      <properties> <name/> <subtype/> (0: generation 1, 1: generation 2) <notes/>
      <settings> <processors><count/> <memory><bank><size/> (MiB) …

    Get-VM web | Export-Clixml web.xml    or   … | ConvertTo-Json -Depth 3

From 2016 on the file is a binary one (.vmcx): its owner's tools can read it, not we.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pveplug.describe.guest import (
    MAX_CPUS,
    MAX_DISKS,
    MAX_MEMORY_MIB,
    MAX_NICS,
    Bus,
    Family,
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
from pveplug.describe.safexml import MAX_DEPTH, Element
from pveplug.errors import DescriptionError
from pveplug.units import MiB

CLIXML_SPACE: Final = "http://schemas.microsoft.com/powershell/2004/04"
_IDE: Final = "83f8638b-8dca-4152-9eda-2ca8b33039b4"
_SCSI: Final = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"
_LEGACY_NIC: Final = "8f0d2762-0b00-4e04-af4f-19010527cb93"
_TRUE: Final = ("true", "1", "-1", "on", "yes")


def is_configuration(root: Element) -> bool:
    """Whether it is the XML of a Hyper-V export."""
    return root.name.lower() == "configuration" and (
        root.path("properties") is not None or root.path("settings") is not None
    )


def read_configuration(root: Element, file: str) -> GuestDescription:
    """Read the XML of an export.

    Raises:
        DescriptionError: a number in it is absurd.
    """
    return _Configuration(root, file).run()


class _Configuration:
    def __init__(self, root: Element, file: str) -> None:
        self.root = root
        self.file = file
        self.dropped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.disks: list[GuestDisk] = []
        self.cdroms: list[GuestCdrom] = []
        self.nics: list[GuestNic] = []

    def run(self) -> GuestDescription:
        root = self.root
        generation = 2 if root.said("properties", "subtype") == "1" else 1
        kinds = self.kinds()
        scsi = 0
        for device in root.children:
            key = device.name.strip("_").lower()
            kind = kinds.get(key, key)
            if any(re.fullmatch(r"controller\d+", c.name) for c in device.children):
                ide = generation == 1 and kind == _IDE
                bus = Bus.IDE if ide else Bus.SCSI
                count = self.controllers(device, bus, 0 if ide else scsi)
                scsi += 0 if ide else count
            elif device.child("MacAddress") is not None:
                self.nic(device, kind)
        self.disks.sort(key=lambda d: (d.bus is not Bus.IDE, d.controller, d.unit))
        disks = tuple(
            GuestDisk(i, d.bus, d.controller, d.unit, d.model, d.file)
            for i, d in enumerate(self.disks)
        )
        memory = self.root.path("settings", "memory", "bank")
        dynamic = self.flag(memory, "dynamic_memory_enabled") is True
        secure = next(
            (e for e in root.walk() if e.name.lower() == "secure_boot_enabled"), None
        )
        return GuestDescription(
            source=f"Hyper-V XML {self.file}",
            name=one_line(root.said("properties", "name")),
            firmware=Firmware.UEFI if generation == 2 else Firmware.BIOS,
            secure_boot=self.secure_boot(secure, generation),
            tpm=self.tpm(),
            sockets=1,
            cores=self.number(root.path("settings", "processors", "count"), MAX_CPUS),
            memory_mib=self.number(
                memory.child("size") if memory else None, MAX_MEMORY_MIB
            ),
            memory_min_mib=self.number(
                memory.child("reservation") if dynamic and memory else None,
                MAX_MEMORY_MIB,
            ),
            disks=disks,
            cdroms=tuple(self.cdroms),
            nics=tuple(self.nics),
            uuid=self.smbios(),
            machine=(f"hyper-v generation {generation}",),
            text=self.remarks(),
            dropped=reported(self.dropped),
            notes=bounded(self.notes),
        )

    def kinds(self) -> dict[str, str]:
        """Which kind of device each instance is, by the manifest."""
        manifest = self.root.child("manifest")
        return {
            e.said("instance").strip("{}").lower(): e.said("device").strip("{}").lower()
            for e in (manifest.children if manifest is not None else ())
            if e.name.startswith("vdev")
        }

    def number(self, element: Element | None, most: int) -> int | None:
        if element is None or not element.text:
            return None
        if not re.fullmatch(r"\d{1,12}", element.text) or not (
            0 < int(element.text) <= most
        ):
            raise DescriptionError(
                f"{element.name} is {one_line(element.text, 40)!r}, no number from 1 "
                f"to {most}",
                file=self.file,
                line=element.line,
            )
        return int(element.text)

    @staticmethod
    def flag(parent: Element | None, name: str) -> bool | None:
        found = parent.child(name) if parent is not None else None
        return None if found is None else found.text.lower() in _TRUE

    def secure_boot(self, found: Element | None, generation: int) -> bool | None:
        if generation == 1:
            return False
        return None if found is None else found.text.lower() in _TRUE

    def tpm(self) -> bool | None:
        for element in self.root.walk():
            if element.name.lower() in ("tpm_enabled", "tpmenabled"):
                return element.text.lower() in _TRUE
        return None

    def smbios(self) -> str | None:
        for element in self.root.walk():
            if element.name.lower() == "bios_guid":
                return _guid(element.text)
        return None

    def remarks(self) -> str:
        element = self.root.path("properties", "notes") or self.root.child("notes")
        return lines(element.text) if element is not None else ""

    def controllers(self, device: Element, bus: Bus, first: int) -> int:
        count = 0
        for controller in device.children:
            found = re.fullmatch(r"controller(\d{1,2})", controller.name)
            if not found:
                continue
            count += 1
            number = first + int(found[1])
            for drive in controller.children:
                if place := re.fullmatch(r"drive(\d{1,3})", drive.name):
                    self.drive(drive, bus, number, int(place[1]))
        return count

    def drive(self, drive: Element, bus: Bus, controller: int, unit: int) -> None:
        kind, path = drive.said("type").upper(), plain(drive.said("pathname"))
        if kind in ("", "NONE") and not path:
            return
        what = f"{bus.value}{controller}:{unit}"
        taken = {(d.bus, d.controller, d.unit) for d in self.disks}
        taken |= {(c.bus, c.controller, c.unit) for c in self.cdroms}
        if (bus, controller, unit) in taken or len(taken) >= MAX_DISKS:
            self.dropped.append((what, f"one drive too many: {path}"))
        elif kind in ("ISO", "DVD", "ATAPI", "PHYSICALDVD") or (
            path.lower().endswith(".iso")
        ):
            self.cdroms.append(GuestCdrom(bus, controller, unit, path or None))
        elif kind in ("VHD", "VIRTUALDISK", "") or re.search(r"\.a?vhdx?$", path, re.I):
            self.disks.append(GuestDisk(0, bus, controller, unit, file=path or None))
        else:
            self.dropped.append((what, f"{one_line(kind, 40)}, not an image: {path}"))

    def nic(self, device: Element, kind: str) -> None:
        friendly = device.said("FriendlyName")
        legacy = kind == _LEGACY_NIC or re.search("legacy|emulated", friendly, re.I)
        if len(self.nics) >= MAX_NICS:
            self.dropped.append((friendly, f"more than {MAX_NICS} network cards"))
            return
        network = device.said("Connection", "AltSwitchName")
        mac = device.said("MacAddress")
        if mac and mac_address(mac) is None and set(mac) - set("0-:"):
            self.dropped.append((f"{friendly} MAC address", one_line(mac, 40)))
        self.nics.append(
            GuestNic(
                model="legacy" if legacy else "synthetic",
                mac=mac_address(mac),
                network=one_line(network or device.said("SwitchName")),
                connected=self.flag(device, "IsConnected") is not False,
                vlan=_vlan(device),
            )
        )


def _vlan(device: Element) -> int | None:
    for element in device.walk():
        if element.name.lower() in ("accessvlan", "accessvlanid", "vlanid"):
            if element.text.isdecimal() and 0 < int(element.text[:9]) < 4095:
                return int(element.text)
    return None


def _guid(text: str) -> str | None:
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        return None


# ---- PowerShell


def is_clixml(root: Element) -> bool:
    """Whether it is what Export-Clixml writes."""
    return root.name == "Objs" and root.space == CLIXML_SPACE


def clixml_vm(root: Element, file: str) -> Mapping[str, Any]:
    """Return the VM in it as the map that ConvertTo-Json would give.

    Raises:
        DescriptionError: there is none, or more than one.
    """
    ids: dict[str, Element] = {}
    for element in root.walk():
        if element.name == "Obj" and (ref := element.get("RefId")):
            ids.setdefault(ref, element)
    budget = [200_000]
    found = [
        value
        for element in root.children
        if isinstance(value := _clixml(element, ids, 0, budget), dict)
    ]
    flat = [vm for value in found for vm in (value.get("\0list") or [value])]
    return _only_vm([vm for vm in flat if isinstance(vm, dict)], file)


def _clixml(
    element: Element, ids: Mapping[str, Element], depth: int, budget: list[int]
) -> Any:
    """Bounded by depth and in all: references may go in circles, or multiply."""
    budget[0] -= 1
    if depth > MAX_DEPTH // 4 or budget[0] < 0:
        return None
    if element.name == "Ref":
        target = ids.get(element.get("RefId"))
        return None if target is None else _clixml(target, ids, depth + 1, budget)
    if element.name != "Obj":
        return None if element.name == "Nil" else _unescaped(element.text)
    value: dict[str, Any] = {}
    for part in element.children:
        if part.name in ("Props", "MS"):
            for prop in part.children:
                value[prop.get("N")] = _clixml(prop, ids, depth + 1, budget)
        elif part.name in ("LST", "IE", "QUE", "STK"):
            listed = [_clixml(item, ids, depth + 1, budget) for item in part.children]
            value["\0list"] = listed
        elif part.name == "DCT":
            for entry in part.all("En"):
                sides = {side.get("N"): side for side in entry.children}
                if "Key" in sides and "Value" in sides:
                    key = _clixml(sides["Key"], ids, depth + 1, budget)
                    value[str(key)] = _clixml(sides["Value"], ids, depth + 1, budget)
        elif part.name == "ToString":
            value["\0text"] = part.text
    if set(value) <= {"\0text"}:
        return value.get("\0text")
    return value


def _unescaped(text: str) -> str:
    """Undo how PowerShell writes what XML can't: ``_x000D_``."""
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda m: chr(int(m[1], 16)), text)


def is_powershell_vm(value: object) -> bool:
    """Whether JSON is what ConvertTo-Json makes of Get-VM."""
    one = value[0] if isinstance(value, list) and value else value
    if not isinstance(one, dict):
        return False
    keys = {str(key).lower() for key in one}
    return "harddrives" in keys and bool(keys & {"generation", "vmid", "vmname"})


def read_powershell(value: object, file: str) -> GuestDescription:
    """Read a VM as ``Get-VM`` tells it, by Export-Clixml or ConvertTo-Json.

    Raises:
        DescriptionError: a number in it is absurd; there are several VMs.
    """
    vms = value if isinstance(value, list) else [value]
    vm = _only_vm([one for one in vms if isinstance(one, dict)], file)
    return _PowerShell(vm, file).run()


def _only_vm(vms: list[dict[str, Any]], file: str) -> dict[str, Any]:
    if len(vms) != 1:
        raise DescriptionError(
            f"it holds {len(vms)} VMs; give a file of one (Get-VM -Name …)", file=file
        )
    return vms[0]


class _PowerShell:
    def __init__(self, vm: Mapping[str, Any], file: str) -> None:
        self.vm = _folded(vm)
        self.file = file
        self.dropped: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def run(self) -> GuestDescription:
        vm = self.vm
        generation = self.number(vm, "generation", 9) or 1
        disks, cdroms = self.drives()
        firmware = _folded(vm.get("firmware") or vm.get("vmfirmware") or {})
        security = _folded(vm.get("security") or vm.get("vmsecurity") or {})
        secure = _flag(firmware.get("secureboot"))
        dynamic = _flag(vm.get("dynamicmemoryenabled"))
        return GuestDescription(
            source=f"PowerShell {self.file}",
            name=one_line(_text(vm.get("name")) or _text(vm.get("vmname"))),
            firmware=Firmware.UEFI if generation == 2 else Firmware.BIOS,
            secure_boot=secure if generation == 2 else False,
            tpm=_flag(security.get("tpmenabled")),
            sockets=1,
            cores=self.number(vm, "processorcount", MAX_CPUS),
            memory_mib=self.mebibytes("memorystartup"),
            memory_min_mib=self.mebibytes("memoryminimum") if dynamic else None,
            disks=disks,
            cdroms=cdroms,
            nics=tuple(self.nics()),
            uuid=_guid(_text(vm.get("biosguid"))),
            machine=(f"hyper-v generation {generation}",),
            text=lines(_text(vm.get("notes"))),
            family=Family.UNKNOWN,
            dropped=reported(self.dropped),
            notes=bounded(self.notes),
        )

    def number(self, where: Mapping[str, Any], key: str, most: int) -> int | None:
        text = _text(where.get(key)).strip()
        if not text:
            return None
        if not re.fullmatch(r"\d{1,18}", text) or int(text) > most:
            raise DescriptionError(
                f"{key} is {one_line(text, 40)!r}, no number up to {most}",
                file=self.file,
            )
        return int(text)

    def mebibytes(self, key: str) -> int | None:
        size = self.number(self.vm, key, MAX_MEMORY_MIB * MiB)
        return -(-size // MiB) if size else None

    def drives(self) -> tuple[tuple[GuestDisk, ...], tuple[GuestCdrom, ...]]:
        disks: list[GuestDisk] = []
        cdroms: list[GuestCdrom] = []
        taken: set[tuple[Bus, int, int]] = set()
        for drive, make in (
            *((d, disks) for d in _list(self.vm.get("harddrives"))),
            *((d, cdroms) for d in _list(self.vm.get("dvddrives"))),
        ):
            path = plain(_text(drive.get("path")))
            kind = _text(drive.get("controllertype")).lower()
            bus = Bus.IDE if kind in ("ide", "0") else Bus.SCSI
            controller = self.number(drive, "controllernumber", 63) or 0
            unit = self.number(drive, "controllerlocation", 255) or 0
            place = (bus, controller, unit)
            what = f"{bus.value}{controller}:{unit}"
            if place in taken or len(taken) >= MAX_DISKS:
                self.dropped.append((what, f"one drive too many: {path}"))
                continue
            taken.add(place)
            if make is cdroms:
                cdroms.append(GuestCdrom(bus, controller, unit, path or None))
            elif not path or _text(drive.get("disknumber")):
                self.dropped.append((what, f"a passed-through disk: {path}"))
            else:
                disks.append(GuestDisk(0, bus, controller, unit, file=path))
        disks.sort(key=lambda d: (d.bus is not Bus.IDE, d.controller, d.unit))
        return (
            tuple(
                GuestDisk(i, d.bus, d.controller, d.unit, file=d.file)
                for i, d in enumerate(disks)
            ),
            tuple(cdroms),
        )

    def nics(self) -> Iterator[GuestNic]:
        for number, nic in enumerate(_list(self.vm.get("networkadapters"))):
            if number >= MAX_NICS:
                self.dropped.append(("network cards", f"more than {MAX_NICS}"))
                return
            vlan = _folded(nic.get("vlansetting") or {})
            tag = self.number(vlan, "accessvlanid", 4094) if vlan else None
            yield GuestNic(
                model="legacy" if _flag(nic.get("islegacy")) else "synthetic",
                mac=mac_address(_text(nic.get("macaddress"))),
                network=one_line(_text(nic.get("switchname"))),
                connected=_flag(nic.get("connected")) is not False,
                vlan=tag or None,
            )


def _folded(value: object) -> dict[str, Any]:
    """Return a map with its keys in lower case; of what isn't one, an empty map."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key).lower(): one for key, one in value.items()}


def _list(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        listed = value.get("\0list", value.get("value"))
        value = [value] if listed is None else listed
    return (_folded(v) for v in value) if isinstance(value, list) else iter(())


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        value = value.get("\0text") or value.get("value") or value.get("Value")
    if value is None or isinstance(value, Mapping | list):
        return ""
    return str(value)


def _flag(value: object) -> bool | None:
    text = _text(value).strip().lower()
    if text in _TRUE:
        return True
    return False if text in ("false", "0", "off", "no") else None
