# SPDX-License-Identifier: Apache-2.0
"""What the operator does after the import: lines for the job's log, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pveplug.describe.bootability import Bootability
from pveplug.describe.guest import Family, Firmware, GuestDescription
from pveplug.describe.systems import Storage, System
from pveplug.vmrestore import RestorePlan

_OLD_WINDOWS: Final = ("w2k", "wxp", "w2k3", "other")
"""For those there is no driver any more that could be advised."""


def next_steps(
    vm: GuestDescription,
    system: System,
    plan: RestorePlan,
    firmware: Firmware,
    found: Bootability | None,
    has_state: bool,
) -> tuple[str, ...]:
    """Return the lines; VMID stands for the VM's id."""
    lines = list(_start(vm, firmware, found))
    if system.family is Family.WINDOWS:
        lines += _windows(vm, system, plan, has_state)
    elif system.family is Family.LINUX:
        lines += _linux(vm, system, plan)
    elif not system.ostype == "solaris":
        lines.append(
            "it starts on SATA and an Intel network card; if the guest has VirtIO "
            "drivers, switch to VirtIO when it is shut down"
        )
    return tuple(lines)


def _start(
    vm: GuestDescription, firmware: Firmware, found: Bootability | None
) -> Iterator[str]:
    yield (
        "keep the old VM switched off: the new one has its addresses"
        if any(nic.mac for nic in vm.nics)
        else "keep the old VM switched off while the new one runs"
    )
    if firmware is Firmware.UEFI and found is not None and not found.fallback:
        if found.loaders:
            path = "\\" + _best(found.loaders).replace("/", "\\")
            yield (
                "UEFI starts without its old settings and there is no "
                "\\EFI\\BOOT\\BOOTX64.EFI: at its logo press Esc, Boot Maintenance "
                f"Manager, Boot From File, {path}; then make that entry permanent"
            )


def _best(loaders: tuple[str, ...]) -> str:
    for name in ("SHIMX64.EFI", "GRUBX64.EFI", "BOOTMGFW.EFI"):
        for loader in loaders:
            if loader.endswith(f"/{name}"):
                return loader
    return loaders[0]


def _windows(
    vm: GuestDescription, system: System, plan: RestorePlan, has_state: bool
) -> Iterator[str]:
    disks = list(plan.disks)
    if has_state or vm.firmware is Firmware.UEFI:
        yield "have BitLocker's recovery keys at hand for the first start"
    if any(disk.key == "sata0" for disk in disks) and _hyperv(vm):
        yield (
            "should Windows stop with INACCESSIBLE_BOOT_DEVICE: let it come to its "
            "recovery menu and start once in safe mode, which switches the driver on"
        )
    if _vmware(vm):
        yield (
            "in the guest: uninstall VMware Tools (do it before the export if you can: "
            "the uninstaller may refuse elsewhere)"
        )
    if system.ostype in _OLD_WINDOWS:
        yield "this system starts on IDE and stays there: it has no VirtIO drivers"
        return
    storage = disks[0].storage if disks else "STORAGE"
    dummy = "scsi30" if disks and disks[0].key != "scsi30" else "scsi29"
    yield (
        f"VirtIO, for speed: qm set VMID --{dummy} {storage}:1 (a small disk, so that "
        "Windows loads the driver at boot), put the virtio-win ISO into ide2, start, "
        "run virtio-win-guest-tools.exe, see the small disk in Disk Management, "
        "shut down"
    )
    for disk in disks:
        if disk.key.startswith(("sata", "ide")):
            number = disks.index(disk)
            yield (
                f"then: qm set VMID --delete {disk.key}; qm set VMID --scsi{number} "
                f"VOLUME (the one now shown as unused){_boot(plan, disk.key, number)}"
            )
    yield f"and: qm set VMID --delete {dummy}, and remove the small disk it leaves"
    nets = [key for key in plan.params if key.startswith("net")]
    if nets:
        yield (
            f"network: set {', '.join(nets)} to virtio with the same MAC address and "
            "enter fixed IP addresses again: Windows sees new cards"
        )
    if not vm.agent:
        yield "when the guest agent runs (virtio-win has it): qm set VMID --agent 1"


def _linux(vm: GuestDescription, system: System, plan: RestorePlan) -> Iterator[str]:
    nets = [value for key, value in plan.params.items() if key.startswith("net")]
    if nets:
        yield (
            "network interfaces may get other names (ens192 becomes ens18): log in at "
            "the console and mend netplan, ifcfg or interfaces"
        )
    slow = [disk for disk in plan.disks if not disk.key.startswith("virtio")]
    pvscsi = plan.params.get("scsihw") == "pvscsi"
    on_virtio = plan.params.get("scsihw") == "virtio-scsi-single" and all(
        disk.key.startswith(("scsi", "virtio")) for disk in plan.disks
    )
    if slow and not on_virtio and system.ostype == "l26":
        if system.storage is Storage.KEPT:
            yield (
                "VirtIO, for speed: in the guest, dracut --force --regenerate-all "
                "--no-hostonly (or mkinitrd, mkinitcpio -P); shut down"
            )
        else:
            yield (
                "VirtIO, for speed: if the guest's kernel has virtio_scsi, make its "
                "initial RAM disk again with it; shut down"
            )
        if pvscsi:
            yield "then: qm set VMID --scsihw virtio-scsi-single"
        for number, disk in enumerate([] if pvscsi else slow):
            yield (
                f"then: qm set VMID --delete {disk.key}; qm set VMID --scsihw "
                f"virtio-scsi-single --scsi{number} VOLUME (the one now shown as "
                f"unused){_boot(plan, disk.key, number)}"
            )
    if any(not value.startswith("virtio") for value in nets):
        yield "network: virtio in place of the present model is faster"
    if vm.agent:
        return
    tools = "open-vm-tools" if _vmware(vm) else "hyperv-daemons"
    if _vmware(vm) or _hyperv(vm):
        yield (
            f"in the guest: remove {tools} if it is there, install qemu-guest-agent; "
            "then qm set VMID --agent 1"
        )
    else:
        yield "in the guest: install qemu-guest-agent; then qm set VMID --agent 1"


def _boot(plan: RestorePlan, key: str, number: int) -> str:
    first = plan.late_params.get("boot", "") == f"order={key}"
    return f"; qm set VMID --boot order=scsi{number}" if first else ""


def _vmware(vm: GuestDescription) -> bool:
    return vm.source.startswith("VMX") or any(m.startswith("vmx-") for m in vm.machine)


def _hyperv(vm: GuestDescription) -> bool:
    return any(m.startswith("hyper-v") for m in vm.machine)
