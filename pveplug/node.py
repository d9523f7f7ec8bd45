# SPDX-License-Identifier: Apache-2.0
"""Where things are on this Proxmox VE node: programs, sockets, our own state.

The defaults are those of a Proxmox VE 8 or 9 installation. A file can change any of
them: ``/etc/podheitor-proxmox/node.toml``, or what ``PODHEITOR_PROXMOX_NODE`` names.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pveplug.errors import ConfigError

DEFAULT_FILE: Final = Path("/etc/podheitor-proxmox/node.toml")
ENVIRONMENT: Final = "PODHEITOR_PROXMOX_NODE"


@dataclass(frozen=True, slots=True)
class Node:
    """Paths of this node; every field may stand in ``node.toml`` under its name."""

    qemu_run_dir: str = "/var/run/qemu-server"
    """Holds VMID.qmp, VMID.qga and VMID.pid."""
    qmeventd_socket: str = "/var/run/qmeventd.sock"
    firewall_dir: str = "/etc/pve/firewall"
    dev_dir: str = "/dev"
    """Where the links VG/LV of active logical volumes appear."""
    qm: str = "/usr/sbin/qm"
    pvesm: str = "/usr/sbin/pvesm"
    lvchange: str = "/usr/sbin/lvchange"
    qemu_nbd: str = "/usr/bin/qemu-nbd"
    qemu_img: str = "/usr/bin/qemu-img"
    state_dir: str = "/var/lib/podheitor-proxmox"
    """Job journals and what must survive a reboot; mode 0700."""
    runtime_dir: str = "/run/podheitor-proxmox"
    """Sockets and locks of running jobs; mode 0700."""
    scratch_dir: str = "/var/lib/podheitor-proxmox/scratch"
    """Where copy-before-write scratch images go unless fleecing_storage is set."""
    landing_dir: str = "/var/lib/podheitor-proxmox/landing"
    """Where the disks of instant recoveries land; needs room for their data."""
    bconsole: str = "bconsole"
    """Bacula's console, for proofs as jobs of their own."""
    systemctl: str = "/usr/bin/systemctl"
    keeper: str = "unit"
    """What serves the disks of an instant recovery: ``unit``, the systemd unit
    podheitor-proxmox-ir@VMID.service; ``child``: a process of its own, for a system
    without systemd."""
    pve_host: str = "127.0.0.1"
    pve_port: int = 8006
    pve_node: str = ""
    """This node's name in the cluster; empty: the host name."""
    import_options: str = ""
    """Parameters of imports, as in a plug-in string: a job of another plug-in doesn't
    say how this node's API is reached, nor where disks shall go."""
    log_file: str = ""
    """Where the backend logs; empty: the systemd journal's socket or nowhere."""

    def qmp_socket(self, vmid: int) -> str:
        """Path of the VM's QMP monitor."""
        return f"{self.qemu_run_dir}/{vmid}.qmp"

    def qga_socket(self, vmid: int) -> str:
        """Path of the VM's guest agent channel."""
        return f"{self.qemu_run_dir}/{vmid}.qga"

    def pid_file(self, vmid: int) -> str:
        """Path of the VM's pid file."""
        return f"{self.qemu_run_dir}/{vmid}.pid"


def load_node(path: Path | None = None) -> Node:
    """Read the node file, or return the defaults where there is none.

    Raises:
        ConfigError: the file is unreadable, not TOML, or a key is unknown or ill-typed.
    """
    named = path or (Path(p) if (p := os.environ.get(ENVIRONMENT)) else None)
    source = named or DEFAULT_FILE
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            raise ConfigError(f"node file {source} does not exist") from None
        return Node()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"node file {source}: {error}") from error
    types = {field.name: field.type for field in dataclasses.fields(Node)}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"node file {source}: unknown key {key}", key=key)
        if type(value).__name__ != types[key]:
            wanted = types[key]
            raise ConfigError(f"node file {source}: {key} must be {wanted}", key=key)
    return Node(**values)
