# SPDX-License-Identifier: Apache-2.0
"""Which privilege a configuration key needs; which keys only root may set."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .auth import Auth
from .errors import bad_params, die
from .vmconfig import DRIVE, UNUSED, Drive, parse_props

if TYPE_CHECKING:
    from .site import LabNode, Site

CPU = "cores cpu cpulimit cpuunits numa sockets vcpus smp"
MEMORY = "memory balloon shares allow-ksm"
HARDWARE = "acpi hotplug kvm machine scsihw smbios1 tablet vga watchdog audio0 rng0"
OPTIONS = (
    "agent autostart bios description keyboard localtime migrate_downtime "
    "migrate_speed name onboot ostype protection reboot startdate startup tdf template "
    "tags"
)
DISK = "boot bootdisk vmstatestorage"
CLOUDINIT = (
    "cicustom cipassword citype ciupgrade ciuser nameserver searchdomain sshkeys"
)
_PLAIN = {
    key: f"VM.Config.{kind}"
    for kind, keys in (
        ("CPU", CPU),
        ("Memory", MEMORY),
        ("HWType", HARDWARE),
        ("Options", OPTIONS),
        ("Disk", DISK),
    )
    for key in keys.split()
}
_CLOUDINIT = set(CLOUDINIT.split())


def check_key(auth: Auth, user: str, vmid: int, key: str, value: str | None) -> None:
    """Demand the privilege to set (or, with ``value`` None, delete) a key.

    Raises:
        ApiError: 403 with the privilege, or 500 ``only root can set '…' config``.
    """
    if user == "root@pam":
        return
    path = f"/vms/{vmid}"
    if DRIVE.fullmatch(key) or UNUSED.fullmatch(key):
        cdrom = bool(value) and "media=cdrom" in str(value)
        auth.check(user, path, "VM.Config.CDROM" if cdrom else "VM.Config.Disk")
    elif key in _PLAIN or re.fullmatch(r"numa\d", key):
        auth.check(user, path, _PLAIN.get(key, "VM.Config.CPU"))
        if key == "startup":
            auth.check(user, "/", "Sys.Modify")
    elif re.fullmatch(r"net\d+", key):
        auth.check(user, path, "VM.Config.Network")
    elif key in _CLOUDINIT or re.fullmatch(r"ipconfig\d+", key):
        auth.check_any(user, path, "VM.Config.Cloudinit", "VM.Config.Network")
    elif key == "freeze":
        auth.check(user, path, "VM.PowerMgmt")
    elif re.fullmatch(r"serial\d", key) and value in (None, "socket"):
        auth.check(user, path, "VM.Config.HWType")
    elif re.fullmatch(r"(usb|hostpci)\d+", key) and "mapping=" in str(value):
        auth.check(user, path, "VM.Config.HWType")
        name = parse_props(str(value), "host").get("mapping", "")
        kind = "usb" if key.startswith("usb") else "pci"
        auth.check(user, f"/mapping/{kind}/{name}", "Mapping.Use")
    else:
        raise die(f"only root can set '{key}' config")


def check_bridge(auth: Auth, user: str, value: str) -> None:
    """Demand SDN.Use on the bridge (or its VLAN) of a ``netN`` value."""
    if user == "root@pam":
        return
    props = parse_props(value, "model")
    if bridge := props.get("bridge"):
        path = f"/sdn/zones/localnetwork/{bridge}"
        if tag := props.get("tag"):
            path += f"/{tag}"
        auth.check(user, path, "SDN.Use")


def check_volume(
    site: Site, node: LabNode, user: str, vmid: int, drive: Drive, what: str
) -> None:
    """Demand access to an existing volume, or space for a new one."""
    file = drive.file
    if file in ("none", "cdrom") or (drive.cdrom and file.startswith("none")):
        return
    source = drive.options.get("import-from")
    for path in (file, source):
        if path and path.startswith("/") and user != "root@pam":
            raise die("Only root can pass arbitrary filesystem paths.")
    if file.startswith("/"):
        return
    if ":" not in file:
        raise bad_params(**{what: "invalid format - unable to parse volume ID"})
    name, _, rest = file.partition(":")
    if name not in node.storages:
        raise die(f"storage '{name}' does not exist")
    if new_volume(file):
        site.auth.check(user, f"/storage/{name}", "Datastore.AllocateSpace")
        node.storages[name].require_images()
        if source and not source.startswith("/"):
            _existing(site, node, user, vmid, source)
        return
    if rest.startswith("iso/"):
        site.auth.check_any(
            user, f"/storage/{name}", "Datastore.AllocateSpace", "Datastore.Audit"
        )
        return
    _existing(site, node, user, vmid, file)


def _existing(site: Site, node: LabNode, user: str, vmid: int, volid: str) -> None:
    storage = node.storage_of(volid)
    owner = storage.owner(volid)
    path = f"/storage/{storage.name}"
    if user != "root@pam" and not site.auth.has(user, path, "Datastore.Allocate"):
        if owner != vmid:
            site.auth.check(user, path, "Datastore.Audit")
            site.auth.check(user, f"/vms/{owner}", "VM.Config.Disk")
    if not storage.exists(volid):
        raise die(f"volume '{volid}' does not exist")


def new_volume(file: str) -> bool:
    """Whether ``STORAGE:SIZE`` asks for a new volume."""
    return bool(re.fullmatch(r"[^/\s:]+:\d+(\.\d+)?", file))
