# SPDX-License-Identifier: Apache-2.0
"""The three choices a first start depends on: system, firmware, bus of the boot disk.

Each is made of the description and of what was found on the boot disk, and tells what
contradicted what.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pveplug.describe.bootability import Bootability
from pveplug.describe.guest import (
    Bus,
    Family,
    Firmware,
    GuestDescription,
    GuestDisk,
    one_line,
)
from pveplug.describe.systems import Storage, System, system_of


@dataclass(slots=True)
class Remarks:
    """What a plan tells besides: a warning is to be looked at, a note to be known."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_system(
    vm: GuestDescription, found: Bootability | None, remarks: Remarks
) -> System:
    """Choose by the description's word, checked against what the disk starts."""
    system = system_of(vm.os_id, vm.family)
    seen = found.family if found else Family.UNKNOWN
    if found is None or seen is Family.UNKNOWN:
        return system
    by_disk = system_of(found.os_id, seen)
    if system.family is Family.UNKNOWN:
        remarks.notes.append(f"by its boot disk the guest is {by_disk.label}")
        return by_disk
    if system.family is Family.OTHER:
        return system  # GRUB starts those, too
    if system.family is not seen:
        remarks.warnings.append(
            f"{vm.source} says {one_line(vm.os_id, 60)}, but its boot "
            f"disk starts {by_disk.label}: that is what drivers are chosen by"
        )
        return by_disk
    named = bool(found.os_id) and not vm.os_id
    vague = system in (system_of("", seen), system_of("linux"))
    return by_disk if named or (vague and found.os_id) else system


def choose_firmware(
    vm: GuestDescription, found: Bootability | None, remarks: Remarks
) -> tuple[Firmware, str]:
    """Choose; a description that contradicts the disk loses, and is named."""
    said = vm.firmware
    word = {Firmware.BIOS: "BIOS", Firmware.UEFI: "UEFI"}.get(said, "nothing")
    if found is None:
        if said is Firmware.UNKNOWN:
            remarks.notes.append(
                "nothing says whether it starts by BIOS or UEFI: BIOS is assumed"
            )
            return Firmware.BIOS, "nothing said, disk not looked at"
        return said, f"the description says {word}; disk not looked at"
    can_uefi, can_bios = bool(found.loaders), found.bios
    remarks.warnings += [f"boot disk: {note}" for note in found.notes]
    if not can_uefi and not can_bios:
        chosen = said
        if said is Firmware.UNKNOWN:
            uefi = found.esp or found.table == "gpt"
            chosen = Firmware.UEFI if uefi else Firmware.BIOS
        remarks.warnings.append(
            "nothing that could start was found on the boot disk (is it the right "
            f"one?): {chosen.value.upper()} is set, by "
            f"{'its partition table' if chosen is not said else vm.source}"
        )
        return chosen, "no boot loader found"
    if said is Firmware.UNKNOWN:
        if can_uefi and can_bios:
            chosen = Firmware.UEFI if found.table == "gpt" else Firmware.BIOS
            return chosen, f"both would start; its table is {found.table}"
        chosen = Firmware.UEFI if can_uefi else Firmware.BIOS
        return chosen, "by what its disk starts from"
    if can_uefi if said is Firmware.UEFI else can_bios:
        return said, f"the description says {word}, and so does the disk"
    chosen = Firmware.BIOS if said is Firmware.UEFI else Firmware.UEFI
    disk = "BIOS boot code" if chosen is Firmware.BIOS else "EFI loaders"
    remarks.warnings.append(
        f"{vm.source} says {word}, but its boot disk has only {disk}: "
        f"{chosen.value.upper()} is set"
    )
    return chosen, f"the disk has only {disk}"


def choose_bus(
    vm: GuestDescription,
    system: System,
    boot: GuestDisk | None,
    firmware: Firmware,
    remarks: Remarks,
) -> tuple[str, str]:
    """Return the bus the boot disk is surely found on, and ``scsihw``.

    A guest starts what it has started from before. Windows, too, switches drivers
    off at boot that it didn't need (StartOverride), and dracut leaves them out.
    """
    single = "virtio-scsi-single"
    if boot is not None and boot.bus is Bus.VIRTIO:
        return "virtio", single
    if system.storage is Storage.VIRTIO:
        return "scsi", single
    if boot is None:
        return ("ide" if system.storage is Storage.IDE else "sata"), single
    kept = system.storage is Storage.KEPT
    if kept and boot.model == "pvscsi" and firmware is Firmware.BIOS:
        return "scsi", "pvscsi"  # SeaBIOS starts from it, OVMF has no driver
    if boot.bus in (Bus.SATA, Bus.IDE):
        return boot.bus.value, single
    if system.storage is Storage.IDE:
        return "ide", single
    buses = {d.bus for d in vm.disks} | {c.bus for c in vm.cdroms}
    if Bus.SATA in buses:
        return "sata", single
    # VMware's and Hyper-V's first generation have Intel's PIIX in every VM: Linux
    # loads its driver even where nothing hangs on it.
    piix = kept and any(
        re.match(r"vmx-|hyper-v generation 1", hint) for hint in vm.machine
    )
    if piix or Bus.IDE in buses:
        return "ide", single
    if kept:
        remarks.warnings.append(
            "the guest's start-up image may lack a driver for SATA: if it doesn't "
            "find its disk, choose the rescue entry of its boot menu"
        )
    return "sata", single
