# SPDX-License-Identifier: Apache-2.0
"""The QEMU command line PVE starts a VM with, in both block layouts.

``pve_argv`` is what real PVE prints (compared with recorded command lines in a test);
what the lab then changes, and why, is all in ``deviations``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from .errors import die
from .vmconfig import Drive, VmConf, parse_props

FIRMWARE = "/usr/share/pve-edk2-firmware/"
EFI_SIZE = {"4m": 540672, "2m": 131072}


@dataclass(frozen=True, slots=True)
class Volume:
    """Where a drive's volume is, as the storage layer answers."""

    path: str
    format: str
    storage_type: str = "dir"
    chain: bool = False
    """``snapshot-as-volume-chain`` of the storage."""

    @property
    def block(self) -> bool:
        return self.storage_type in ("lvm", "lvmthin", "zfspool")

    @property
    def aio(self) -> str:
        return "native" if self.storage_type == "lvm" else "io_uring"

    @property
    def cache(self) -> str | None:
        return None if self.storage_type == "btrfs" else "none"


@dataclass(frozen=True, slots=True)
class Context:
    """What decides the command line apart from the configuration."""

    vmid: int
    release: str
    qemu_version: tuple[int, int]
    resolve: Callable[[Drive], Volume]
    run_dir: str = "/var/run/qemu-server"
    qmeventd: str = "/var/run/qmeventd.sock"


def machine_type(conf: VmConf) -> str:
    return parse_props(conf.values.get("machine", "pc"), "type").get("type", "pc")


def machine_version(machine: str, qemu_version: tuple[int, int]) -> tuple[int, int]:
    """The version a machine type is pinned to, else QEMU's own."""
    match = re.search(r"-(\d+)\.(\d+)(?:\+pve\d+)?$", machine)
    return (int(match[1]), int(match[2])) if match else qemu_version


def uses_blockdev(conf: VmConf, context: Context) -> bool:
    """Layout of this start: ``-blockdev`` needs PVE 9 and a machine >= 10.0."""
    if not context.release.startswith("9"):
        return False
    version = machine_version(machine_type(conf), context.qemu_version)
    return version >= (10, 0)


def node_hash(drive: Drive) -> str:
    """The part of PVE's node names that follows ``f`` and ``e``."""
    text = f"drive={drive.key},volid={drive.file}"
    return hashlib.sha256(text.encode()).hexdigest()[:30]


def throttle_group(drive: Drive) -> dict[str, object]:
    limits: dict[str, int] = {}
    for kind, name in (("", "total"), ("_rd", "read"), ("_wr", "write")):
        if value := drive.options.get(f"mbps{kind}"):
            limits[f"bps-{name}"] = int(float(value) * 1024 * 1024)
        if value := drive.options.get(f"mbps{kind}_max"):
            limits[f"bps-{name}-max"] = int(float(value) * 1024 * 1024)
        if value := drive.options.get(f"iops{kind}"):
            limits[f"iops-{name}"] = int(value)
    return {
        "id": f"throttle-drive-{drive.key}",
        "limits": limits,
        "qom-type": "throttle-group",
    }


def _detect_zeroes(drive: Drive) -> str:
    if drive.options.get("detect_zeroes") == "0":
        return "off"
    return "unmap" if drive.options.get("discard") in ("on", "1") else "on"


def _cache(drive: Drive, volume: Volume) -> str | None:
    if drive.key == "efidisk0":
        return drive.options.get("cache")
    return drive.options.get("cache") or volume.cache


def blockdev(drive: Drive, volume: Volume, *, read_only: bool = False) -> dict:
    """The nested ``-blockdev`` of a drive: throttle, format, protocol."""
    cache = _cache(drive, volume)
    direct = cache in ("none", "directsync")
    common = {
        "cache": {"direct": direct, "no-flush": cache == "unsafe"},
        "detect-zeroes": _detect_zeroes(drive),
        "discard": "unmap" if drive.options.get("discard") == "on" else "ignore",
        "read-only": read_only or drive.options.get("ro") == "1",
    }
    name = node_hash(drive)
    protocol = {
        **common,
        "aio": drive.options.get("aio", volume.aio),
        "driver": "host_device" if volume.block else "file",
        "filename": volume.path,
        "node-name": f"e{name}",
    }
    form = {
        **common,
        "driver": volume.format,
        "file": protocol,
        "node-name": f"f{name}",
    }
    if drive.key == "efidisk0":
        form["size"] = EFI_SIZE[drive.options.get("efitype", "2m")]
    top = {
        "detect-zeroes": common["detect-zeroes"],
        "discard": common["discard"],
        "driver": "throttle",
        "file": form,
        "node-name": f"drive-{drive.key}",
        "read-only": common["read-only"],
        "throttle-group": f"throttle-drive-{drive.key}",
    }
    return top


def legacy_drive(
    drive: Drive, volume: Volume | None, *, read_only: bool = False
) -> str:
    """The value of ``-drive`` for a disk or cdrom in the old layout."""
    parts = [f"file={volume.path.replace(',', ',,')}"] if volume else []
    parts += ["if=none", f"id=drive-{drive.key}"]
    if drive.cdrom:
        return ",".join([*parts, "media=cdrom", "aio=io_uring"])
    parts += [
        f"{name}={drive.options[name]}"
        for name in ("cache", "rerror", "werror", "discard")
        if name in drive.options
    ]
    if read_only or drive.options.get("ro") == "1":
        parts.append("readonly=on")
    limits = throttle_group(drive)["limits"]
    assert isinstance(limits, dict)
    parts += [f"throttling.{name}={value}" for name, value in limits.items()]
    assert volume
    if volume.chain and volume.format == "qcow2":
        raise die(
            f"storage for '{drive.file}' is configured for snapshots as a volume chain "
            "- this requires QEMU machine version >= 10.0. See "
            "https://pve.proxmox.com/wiki/QEMU_Machine_Version_Upgrade"
        )
    parts.append(f"format={volume.format}")
    if "cache" not in drive.options and volume.cache:
        parts.append(f"cache={volume.cache}")
    parts.append(f"aio={drive.options.get('aio', volume.aio)}")
    parts.append(f"detect-zeroes={_detect_zeroes(drive)}")
    return ",".join(parts)


def controller(drive: Drive, conf: VmConf, context: Context) -> tuple[str, int, int]:
    """SCSI controller of a disk: its id, number and the disk's unit on it."""
    hw = conf.values.get("scsihw", "lsi")
    if hw == "virtio-scsi-single":
        return f"virtioscsi{drive.index}", drive.index, drive.index
    per = 7 if hw.startswith("lsi") else 256
    return f"scsihw{drive.index // per}", drive.index // per, drive.index % per


def controller_device(drive: Drive, conf: VmConf) -> str:
    """The ``-device`` of the SCSI controller a drive needs."""
    hw = conf.values.get("scsihw", "lsi")
    if hw == "virtio-scsi-single":
        thread = (
            f",iothread=iothread-virtioscsi{drive.index}"
            if drive.options.get("iothread") == "1"
            else ""
        )
        return (
            f"virtio-scsi-pci,id=virtioscsi{drive.index},bus=pci.3,"
            f"addr={drive.index + 1:#x}{thread}"
        )
    number = drive.index // (7 if hw.startswith("lsi") else 256)
    model = {"virtio-scsi-pci": "virtio-scsi-pci", "lsi": "lsi"}.get(hw, hw)
    return f"{model},id=scsihw{number},bus=pci.0,addr={0x5 + number:#x}"


def disk_device(
    drive: Drive, conf: VmConf, context: Context, *, modern: bool, bootindex: int | None
) -> str:
    """The ``-device`` of a disk or cdrom."""
    key = drive.key
    back = f"drive=drive-{key},id={key}"
    tail = ""
    match drive.interface:
        case "scsi":
            bus, _, unit = controller(drive, conf, context)
            model = "scsi-cd" if drive.cdrom else "scsi-hd"
            if conf.values.get("scsihw", "lsi").startswith("lsi"):
                head = f"{model},bus={bus}.0,scsi-id={unit}"
            else:
                head = f"{model},bus={bus}.0,channel=0,scsi-id=0,lun={unit}"
            if modern:
                back += f",device_id=drive-{key}"
        case "virtio":
            spot = (
                f"bus=pci.0,addr={0xA + drive.index:#x}"
                if drive.index < 6
                else f"bus=pci.2,addr={drive.index - 5:#x}"
            )
            thread = (
                f",iothread=iothread-{key}"
                if drive.options.get("iothread") == "1"
                else ""
            )
            head, tail = "virtio-blk-pci", f",{spot}{thread}"
        case "sata":
            head = f"ide-{'cd' if drive.cdrom else 'hd'},bus=ahci0.{drive.index}"
        case _:
            at, unit = divmod(drive.index, 2)
            head = f"ide-{'cd' if drive.cdrom else 'hd'},bus=ide.{at},unit={unit}"
    if modern and drive.cdrom and drive.file == "none":
        back = f"id={key}"
    text = f"{head},{back}{tail}"
    if drive.options.get("ssd") == "1":
        text += ",rotation_rate=1"
    if bootindex is not None:
        text += f",bootindex={bootindex}"
    if serial := drive.options.get("serial"):
        text += f",serial={serial}"
    if modern and not drive.cdrom:
        writeback = drive.options.get("cache") not in ("directsync", "writethrough")
        text += f",write-cache={'on' if writeback else 'off'}"
    if modern:
        for name in ("rerror", "werror"):
            if name in drive.options:
                text += f",{name}={drive.options[name]}"
    return text


def boot_order(conf: VmConf) -> dict[str, int]:
    props = parse_props(conf.values.get("boot", ""), "legacy")
    if "order" in props:
        names = [name for name in props["order"].split(";") if name]
    else:
        names = [d.key for d in conf.drives() if not d.cdrom][:1]
    return {name: 100 + at for at, name in enumerate(names)}


def _firmware(conf: VmConf, drive: Drive | None) -> str:
    four = drive and drive.options.get("efitype") == "4m"
    if not four:
        return f"{FIRMWARE}/OVMF_CODE.fd"
    secure = "q35" in machine_type(conf)
    return f"{FIRMWARE}/OVMF_CODE_4M{'.secboot' if secure else ''}.fd"


def _efi(conf: VmConf, context: Context, modern: bool) -> list[str]:
    if conf.values.get("bios") != "ovmf":
        return []
    found = [d for d in conf.drives() if d.key == "efidisk0"]
    drive = found[0] if found else None
    code = _firmware(conf, drive)
    if not modern:
        args = ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"]
        if drive:
            volume = context.resolve(drive)
            size = EFI_SIZE[drive.options.get("efitype", "2m")]
            sized = f",size={size}" if volume.format == "raw" else ""
            args += [
                "-drive",
                f"if=pflash,unit=1,id=drive-efidisk0,format={volume.format},"
                f"file={volume.path}{sized}",
            ]
        return args
    args = []
    if drive:
        args = ["-object", _json(throttle_group(drive))]
    flash = {
        "driver": "raw",
        "file": {"driver": "file", "filename": code},
        "node-name": "pflash0",
        "read-only": True,
    }
    args += ["-blockdev", _json(flash)]
    if drive:
        top = blockdev(drive, context.resolve(drive))
        if top["file"]["driver"] != "raw":
            del top["file"]["size"]
        args += ["-blockdev", _json(top)]
    return args


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _objects(drives: list[Drive], modern: bool, single: bool) -> list[str]:
    args = []
    for drive in drives:
        if drive.options.get("iothread") == "1":
            if drive.interface == "scsi" and single:
                args += ["-object", f"iothread,id=iothread-virtioscsi{drive.index}"]
            elif drive.interface == "virtio":
                args += ["-object", f"iothread,id=iothread-{drive.key}"]
        if modern and not (drive.cdrom and drive.file == "none"):
            args += ["-object", _json(throttle_group(drive))]
    return args


def _disks(
    conf: VmConf, drives: list[Drive], context: Context, modern: bool, template: bool
) -> list[str]:
    args: list[str] = []
    boot = boot_order(conf)
    seen: set[str] = set()
    for drive in drives:
        empty = drive.cdrom and drive.file == "none"
        line: list[str] = []
        if not empty:
            volume = context.resolve(drive)
            if modern:
                top = blockdev(drive, volume, read_only=template or drive.cdrom)
                line = ["-blockdev", _json(top)]
            else:
                line = ["-drive", legacy_drive(drive, volume, read_only=template)]
        elif not modern:
            line = ["-drive", legacy_drive(drive, None)]
        bridge: list[str] = []
        if drive.interface == "scsi":
            device = controller_device(drive, conf)
            if device not in seen:
                seen.add(device)
                bridge = ["-device", device]
        elif drive.interface == "sata" and "ahci" not in seen:
            seen.add("ahci")
            bridge = ["-device", "ahci,id=ahci0,multifunction=on,bus=pci.0,addr=0x7"]
        device = disk_device(
            drive, conf, context, modern=modern, bootindex=boot.get(drive.key)
        )
        args += [*bridge, *line, "-device", device]
    return args


def _nets(conf: VmConf, context: Context, modern: bool) -> list[str]:
    args = []
    boot = boot_order(conf)
    for index in range(32):
        value = conf.values.get(f"net{index}")
        if not value:
            continue
        model, _, mac = value.split(",")[0].partition("=")
        model = {"virtio": "virtio-net-pci"}.get(model, model)
        key = f"net{index}"
        args += [
            "-netdev",
            f"type=tap,id={key},ifname=tap{context.vmid}i{index},"
            "script=/usr/libexec/qemu-server/pve-bridge,"
            "downscript=/usr/libexec/qemu-server/pve-bridgedown",
        ]
        text = f"{model},mac={mac},netdev={key},bus=pci.0,addr={18 + index:#x},id={key}"
        if model == "virtio-net-pci":
            text += ",rx_queue_size=1024,tx_queue_size=256"
        if key in boot:
            text += f",bootindex={boot[key]}"
        if modern and model == "virtio-net-pci":
            text += ",host_mtu=1500"
        args += ["-device", text]
    return args


VGA = {
    "std": "VGA",
    "cirrus": "cirrus-vga",
    "vmware": "vmware-svga",
    "virtio": "virtio-vga",
}


def vga_device(conf: VmConf) -> str | None:
    """The ``-device`` of the display; None where the configuration wants none."""
    props = parse_props(conf.values.get("vga", "std"), "type")
    kind = props.get("type", "std")
    if kind == "none" or re.fullmatch(r"serial\d+", kind):
        return None
    if kind not in VGA:
        raise die(f"the lab has no display of type {kind}")
    text = f"{VGA[kind]},id=vga"
    if memory := props.get("memory"):
        if kind == "virtio":
            text += f",max_hostmem={int(memory) << 20}"
        else:
            text += f",vgamem_mb={memory}"
    q35 = "q35" in machine_type(conf)
    text += f",bus={'pcie.0,addr=0x1' if q35 else 'pci.0,addr=0x2'}"
    windows = re.match(r"w(xp|2k|in|vista)", conf.values.get("ostype", "other"))
    if kind == "std" and windows and conf.values.get("bios") != "ovmf":
        text += ",edid=off"
    return text


def pve_argv(conf: VmConf, context: Context, *, paused: bool = False) -> list[str]:
    """The whole argument vector, as PVE's ``config_to_command`` makes it."""
    values, vmid, run = conf.values, context.vmid, context.run_dir
    modern = uses_blockdev(conf, context)
    machine = machine_type(conf)
    q35 = "q35" in machine
    single = values.get("scsihw") == "virtio-scsi-single"
    drives = [
        d for d in conf.drives() if d.interface in ("ide", "scsi", "virtio", "sata")
    ]
    has_tpm = any(d.key == "tpmstate0" for d in conf.drives())
    template = values.get("template") == "1"
    new_reconnect = context.qemu_version >= (9, 2)
    reconnect = "reconnect-ms=5000" if new_reconnect else "reconnect=5"
    cores = int(values.get("cores", "1"))
    sockets = int(values.get("sockets", "1"))
    total = cores * sockets
    argv = ["/usr/bin/kvm", "-id", str(vmid)]
    argv += ["-name", f"{values.get('name', f'vm{vmid}')},debug-threads=on"]
    argv += ["-no-shutdown"]
    argv += ["-chardev", f"socket,id=qmp,path={run}/{vmid}.qmp,server=on,wait=off"]
    argv += ["-mon", "chardev=qmp,mode=control"]
    argv += ["-chardev", f"socket,id=qmp-event,path={context.qmeventd},{reconnect}"]
    argv += ["-mon", "chardev=qmp-event,mode=control"]
    argv += ["-pidfile", f"{run}/{vmid}.pid", "-daemonize"]
    if smbios := values.get("smbios1"):
        argv += ["-smbios", f"type=1,{smbios}"]
    argv += _efi(conf, context, modern)
    if q35:
        argv += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
    argv += ["-smp", f"{total},sockets={sockets},cores={cores},maxcpus={total}"]
    argv += ["-nodefaults", "-boot"]
    argv += [
        "menu=on,strict=on,reboot-timeout=1000,"
        "splash=/usr/share/qemu-server/bootsplash.jpg"
    ]
    if display := vga_device(conf):
        argv += ["-vnc", f"unix:{run}/{vmid}.vnc,password=on"]
    else:
        if values["vga"].startswith("none"):
            argv += ["-vga", "none"]
        argv += ["-nographic"]
    cpu = parse_props(values.get("cpu", ""), "cputype").get("cputype", "kvm64")
    no_kvm = values.get("kvm") == "0"
    argv += ["-cpu", "qemu64" if no_kvm and cpu == "kvm64" else cpu]
    argv += ["-m", parse_props(values.get("memory", "512"), "current")["current"]]
    argv += _objects(drives, modern, single)
    chip = "ICH9-LPC" if q35 else "PIIX4_PM"
    argv += ["-global", f"{chip}.disable_s3=1", "-global", f"{chip}.disable_s4=1"]
    if q35:
        argv += ["-readconfig", "/usr/share/qemu-server/pve-q35-4.0.cfg"]
    else:
        bridges = [(1, "0x1e"), (2, "0x1f")] + ([(3, "0x5")] if single else [])
        for number, address in bridges:
            argv += [
                "-device",
                f"pci-bridge,id=pci.{number},chassis_nr={number},bus=pci.0,addr={address}",
            ]
    if (generation := values.get("vmgenid", "0")) not in ("0", "1"):
        argv += ["-device", f"vmgenid,guid={generation}"]
    if not q35:
        argv += ["-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2"]
    if values.get("tablet", "1") == "1":
        bus = "ehci.0" if q35 else "uhci.0"
        argv += ["-device", f"usb-tablet,id=tablet,bus={bus},port=1"]
    if has_tpm:
        argv += ["-chardev", f"socket,id=tpmchar,path={run}/{vmid}.swtpm"]
        argv += ["-tpmdev", "emulator,id=tpmdev,chardev=tpmchar"]
        argv += ["-device", "tpm-tis,tpmdev=tpmdev"]
    if display:
        argv += ["-device", display]
    for index in range(4):
        if values.get(f"serial{index}") == "socket":
            path = f"{run}/{vmid}.serial{index}"
            argv += [
                "-chardev",
                f"socket,id=serial{index},path={path},server=on,wait=off",
            ]
            argv += ["-device", f"isa-serial,chardev=serial{index}"]
    if conf.agent_enabled:
        argv += ["-chardev", f"socket,path={run}/{vmid}.qga,server=on,wait=off,id=qga0"]
        argv += ["-device", "virtio-serial,id=qga0,bus=pci.0,addr=0x8"]
        argv += ["-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"]
    if values.get("balloon") != "0":
        argv += [
            "-device",
            "virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on",
        ]
    argv += _disks(conf, drives, context, modern, template)
    argv += _nets(conf, context, modern)
    flash = ""
    if modern and values.get("bios") == "ovmf":
        has_efi = any(d.key == "efidisk0" for d in conf.drives())
        flash = "pflash0=pflash0," + ("pflash1=drive-efidisk0," if has_efi else "")
    if not re.search(r"\+pve\d+$", machine):
        machine += "+pve0" if context.release.startswith("9") else "+pve1"
    accel = "accel=tcg," if no_kvm else ""
    argv += ["-machine", f"{flash}{'hpet=off,' if modern else ''}{accel}type={machine}"]
    if paused or values.get("freeze") == "1":
        argv += ["-S"]
    return argv
