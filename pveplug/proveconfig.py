# SPDX-License-Identifier: Apache-2.0
"""The configuration of a VM that boots from a backup only to prove it; what to ask.

It must not be taken for the original, reach anybody, start by itself or hold on to
this host. What the guest needs to come up stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pveplug.errors import ConfigError
from pveplug.proving.verdict import Evidence, Wanted
from pveplug.vmconfig import drives, has_agent, properties, render_properties

_DROPPED: Final = re.compile(
    r"net\d+|ipconfig\d+|hostpci\d+|usb\d+|parallel\d+|virtiofs\d+|unused\d+"
    r"|affinity|hugepages|keephugepages|ivshmem|hookscript|args|watchdog|protection"
    r"|startup|autostart|lock|template|parent|snaptime|snapstate|vmstate|vmgenid|meta"
    r"|digest|running.*|tags|description|bootdisk"
)
_ROUTINE: Final = re.compile(
    r"lock|template|parent|snaptime|snapstate|vmstate|vmgenid|meta|digest|running.*"
    r"|tags|description|protection|startup|autostart|bootdisk|unused\d+|ipconfig\d+"
)
"""What is taken out without a word."""
_MIN_MEMORY: Final = 16
_CIRRUS: Final = ("wxp", "w2k", "w2k3")
"""Guests whose display is another one unless their configuration names it."""
_VGA_WITHOUT_PICTURE: Final = re.compile(r"none|serial\d")


@dataclass(frozen=True, slots=True)
class ProveConfig:
    """A configuration to make the VM with, and what was taken out of it.

    Attributes:
        values: key -> value, drives as they were: whoever makes the VM gives them
            their volumes.
        dropped: ``(key, why)``, for the report's notes.
    """

    values: dict[str, str]
    dropped: tuple[tuple[str, str], ...] = ()


def config_for_proof(
    config: Mapping[str, str], *, memory_mib: int | None = None, freeze: bool = True
) -> ProveConfig:
    """Return the configuration for the VM of a proof.

    Args:
        config: the current section of the backup's ``vm.conf``, or the parameters that
            :func:`pveplug.vmrestore.transform_for_restore` made of it.
        memory_mib: the most it may have; None: what the original had.
        freeze: let the VM wait until :func:`pveplug.ir.proof.watch` continues it, so
            that the serial console's first line is seen.

    Raises:
        ConfigError: ``memory_mib`` is too little for anything to boot, or a drive is
            malformed.
    """
    if memory_mib is not None and memory_mib < _MIN_MEMORY:
        raise ConfigError(
            f"prove_memory={memory_mib}: nothing boots with less than {_MIN_MEMORY} "
            "MiB",
            key="prove_memory",
        )
    values: dict[str, str] = {}
    dropped: list[tuple[str, str]] = []
    for key, value in config.items():
        if re.fullmatch(r"net\d+", key):
            dropped.append((key, "a proof is isolated"))
        elif _DROPPED.fullmatch(key):
            if not _ROUTINE.fullmatch(key):
                dropped.append((key, f"bound to the host or not needed: {value}"))
        elif re.fullmatch(r"serial\d+", key) and value != "socket":
            if key != "serial0":
                dropped.append((key, f"bound to the host or not needed: {value}"))
        else:
            values[key] = value
    for drive in drives(values):
        if drive.is_cdrom and not drive.is_cloudinit:
            values[drive.key] = "none,media=cdrom"
    _without_nics_in_boot_order(values)
    values["name"] = f"prove-{values.get('name') or 'vm'}"[:63].rstrip("-.")
    values["onboot"] = "0"
    values["serial0"] = "socket"
    # A screen is looked at whatever the evidence is: it is in the report.
    if _VGA_WITHOUT_PICTURE.fullmatch(values.get("vga", "").partition(",")[0]):
        dropped.append(("vga", f"{values['vga']} has no picture: std instead"))
        values["vga"] = "std"
    elif "vga" not in values and values.get("ostype") not in _CIRRUS:
        values["vga"] = "std"
    if freeze:
        values["freeze"] = "1"
    else:
        values.pop("freeze", None)
    if memory_mib is not None:
        _cap_memory(values, memory_mib)
    return ProveConfig(values, tuple(dropped))


def _without_nics_in_boot_order(values: dict[str, str]) -> None:
    text = values.get("boot", "")
    parts = properties(text, "legacy") if text else {}
    if "order" not in parts:
        return
    # By their kind: the disks may be attached later, as in a restore.
    kept = [d for d in parts["order"].split(";") if d and not _DROPPED.fullmatch(d)]
    if kept:
        values["boot"] = render_properties({**parts, "order": ";".join(kept)}, "legacy")
    else:
        del values["boot"]


def _cap_memory(values: dict[str, str], most: int) -> None:
    parts = properties(values.get("memory", "512"), "current")
    current = parts.get("current", "512")
    if not current.isascii() or not current.isdigit():
        raise ConfigError(f"memory: {values['memory']} in vm.conf is no number")
    if int(current) <= most:
        return
    parts["current"] = str(most)
    values["memory"] = render_properties(parts, "current")
    # NUMA nodes and hot-plugging are laid out for all of it; the balloon's floor, too.
    for key in [k for k in values if re.fullmatch(r"numa\d*|balloon|shares", k)]:
        del values[key]
    values["balloon"] = "0"
    hotplug = values.get("hotplug")
    if hotplug is not None:
        kept = [part for part in hotplug.split(",") if part != "memory"]
        values["hotplug"] = ",".join(kept) or "0"


def wanted_for(
    config: Mapping[str, str],
    *,
    evidence: str = "",
    serial: str = "",
    timeout_s: float = 300.0,
) -> Wanted:
    """Return what to ask of this VM.

    Args:
        config: of the VM that was backed up.
        evidence: ``prove_evidence``: ``agent``, ``serial``, ``screen``, several with
            ``+`` (all of them), or ``any`` (the first that comes). Empty: ``agent``
            where the VM has one, else ``serial`` where a pattern is given, else
            ``screen``.
        serial: ``prove_serial``.
        timeout_s: ``prove_timeout``.

    Raises:
        ConfigError: it can't be met by this VM, or isn't understood.
    """
    agent = has_agent(config)
    if evidence == "any":
        kinds = {Evidence.SCREEN}
        if agent:
            kinds.add(Evidence.AGENT)
        if serial:
            kinds.add(Evidence.SERIAL)
        return Wanted(frozenset(kinds), False, serial, timeout_s)
    if not evidence:
        chosen = "agent" if agent else "serial" if serial else "screen"
        return Wanted(frozenset({Evidence(chosen)}), True, serial, timeout_s)
    try:
        named = frozenset(Evidence(part.strip()) for part in evidence.split("+"))
    except ValueError:
        raise ConfigError(
            f"prove_evidence={evidence}: one of agent, serial, screen, several of them "
            "with + between, or any",
            key="prove_evidence",
        ) from None
    if Evidence.AGENT in named and not agent:
        raise ConfigError(
            "prove_evidence=agent: the VM's configuration has no guest agent "
            "(agent: 1); ask for serial or screen",
            key="prove_evidence",
        )
    return Wanted(named, True, serial, timeout_s)
