# SPDX-License-Identifier: Apache-2.0
"""Everything the lab does differently from PVE when it starts QEMU, and why.

==============================  ====================================================
PVE                             the lab
==============================  ====================================================
KVM, CPU of the configuration   TCG with ``qemu64``/``max``: must run anywhere
``-daemonize``                  a child that dies with the lab, so nothing is left over
``ID.qmp``, ``ID.qga``          QEMU listens at ``….real``, the lab's relay before it
tap network                     ``-netdev user,restrict=on``: no bridges are made
VNC, USB, boot splash           none: less memory, quicker boot
VGA                             only where the configuration names one (``vga: std``)
``reboot-timeout=1000``         10 s: a VM without a system resets itself all the time,
                                and its firmware, under TCG, would take a tenth of a CPU
``aio=io_uring``/``native``     ``threads``: io_uring is often forbidden in containers
``host_device`` (thick LVM)     ``file``: the volume is a file behind a symbolic link
``cache=none`` where the file   buffered
system has no O_DIRECT
pve-q35-4.0.cfg, firmware       bridges by ``-device``, Debian's OVMF
``pc+pve0``, ``-id``            ``pc``, none: stock QEMU knows neither
QEMU built without file locks   ``locking=off`` on every file of a VM
qemu-img, qemu-nbd without      with: two programs on one image are an error here,
file locks                      and an image lost in silence there
no serial port                  ``isa-serial`` into ``log/ID.serial``
``serial0: socket``             the same, and all that is said goes into that file, too
==============================  ====================================================
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cmdline import FIRMWARE

DROPPED = ("usb-tablet,", "piix3-usb-uhci,")
SWITCHES = ("-daemonize", "-S", "-nodefaults", "-no-shutdown", "-nographic")
Q35_BRIDGES = (
    "i82801b11-bridge,id=pcidmi,bus=pcie.0,addr=1e.0",
    *(
        f"pci-bridge,id=pci.{n},bus=pcidmi,addr={n + 1}.0,chassis_nr={n + 1}"
        for n in range(4)
    ),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What this machine offers the lab."""

    qemu: str
    firmware: Path
    serial: Path
    direct_io: bool
    data_dirs: tuple[str, ...] = ()
    display: bool = False


def supports_direct_io(folder: Path) -> bool:
    """Whether files below ``folder`` may be opened with O_DIRECT."""
    probe = folder / ".direct-io"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def adapt(argv: list[str], bench: Bench) -> list[str]:
    """Turn PVE's argument vector into the one the lab runs."""
    out = [bench.qemu]
    for folder in bench.data_dirs:
        out += ["-L", folder]
    at = 1
    has_serial = any("isa-serial" in arg for arg in argv)
    while at < len(argv):
        option = argv[at]
        if option in SWITCHES:
            if option not in ("-daemonize", "-nographic"):
                out.append(option)
            at += 1
            continue
        value = argv[at + 1]
        at += 2
        if option == "-readconfig":
            for bridge in Q35_BRIDGES:
                out += ["-device", bridge]
        elif changed := _changed(option, value, bench):
            out += [option, changed]
    out += ["-display", "none"]
    if not has_serial:
        out += ["-chardev", f"file,id=labserial,path={bench.serial},append=on"]
        out += ["-device", "isa-serial,chardev=labserial"]
    return out


def _changed(option: str, value: str, bench: Bench) -> str | None:
    match option:
        case "-vnc" | "-id":
            return None
        case "-device":
            if value.startswith(DROPPED):
                return None
            if ",id=vga," in value and not bench.display:
                return None
            if value.startswith("virtio-net-pci"):
                return value + ",romfile="
            return value
        case "-chardev":
            if value.startswith("socket,id=serial0,"):
                return f"{value},logfile={bench.serial},logappend=on"
            return re.sub(r"(path=\S+?\.(?:qmp|qga))(?=,)", r"\1.real", value)
        case "-boot":
            return "strict=on,reboot-timeout=10000"
        case "-cpu":
            return "qemu64" if value in ("qemu64", "kvm64") else "max"
        case "-netdev":
            match = re.search(r"id=(net\d+)", value)
            assert match
            return f"user,id={match[1]},restrict=on"
        case "-machine":
            value = re.sub(r"\+pve\d+", "", value)
            return value if "accel=" in value else f"accel=tcg,{value}"
        case "-drive":
            value = value.replace("aio=io_uring", "aio=threads")
            value = value.replace("aio=native", "aio=threads")
            if not bench.direct_io:
                value = re.sub(r"cache=(none|directsync)", "cache=writeback", value)
            if re.search(r"(^|,)file=", value):
                value += ",file.locking=off"
            return value.replace(f"{FIRMWARE}/", f"{bench.firmware}/")
        case "-blockdev":
            return json.dumps(adapt_node(json.loads(value), bench))
        case _:
            return value


def adapt_node(node: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The same for one block node, also when it is plugged in later."""
    result = dict(node)
    if isinstance(result.get("file"), dict):
        result["file"] = adapt_node(result["file"], bench)
    if result.get("aio") in ("io_uring", "native"):
        result["aio"] = "threads"
    if not bench.direct_io and "cache" in result:
        result["cache"] = {**result["cache"], "direct": False}
    if result.get("driver") in ("file", "host_device"):
        result["locking"] = "off"
    if filename := result.get("filename"):
        filename = filename.replace(f"{FIRMWARE}/", f"{bench.firmware}/")
        result["filename"] = filename
        if result.get("driver") == "host_device" and not _is_block(filename):
            result["driver"] = "file"
    return result


def _is_block(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
