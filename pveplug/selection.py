# SPDX-License-Identifier: Apache-2.0
"""Which VMs and which of their disks a job takes: pure decisions, all explained."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pveplug.errors import ConfigError
from pveplug.values import VmidRange
from pveplug.vmconfig import Drive, drives

_SEEN_SHOWN = 12


@dataclass(frozen=True, slots=True)
class VmSummary:
    """A VM as ``/cluster/resources`` lists it."""

    vmid: int
    name: str
    node: str
    pool: str = ""
    tags: tuple[str, ...] = ()
    template: bool = False
    status: str = "unknown"


@dataclass(frozen=True, slots=True)
class Selection:
    """What the plug-in string asks for; see docs/parameters.md."""

    vmid: tuple[VmidRange, ...] = ()
    name: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    tag: tuple[str, ...] = ()
    all: bool = False
    exclude: tuple[VmidRange | str, ...] = ()
    exclude_disk: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{key}={','.join(str(item) for item in getattr(self, key))}"
            for key in ("vmid", "name", "pool", "tag", "exclude")
            if getattr(self, key)
        ]
        return " ".join(["all=yes", *parts] if self.all else parts)


@dataclass(frozen=True, slots=True)
class Selected:
    """The VMs of this job by ascending id, and what the job log says about it."""

    chosen: tuple[VmSummary, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectedDisks:
    """The drives to back up, and ``(key, reason)`` of each that is left out."""

    chosen: tuple[Drive, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def select(vms: Sequence[VmSummary], selection: Selection, *, node: str) -> Selected:
    """Choose among ``vms`` those that ``selection`` names and ``node`` runs.

    Args:
        vms: QEMU VMs of the whole cluster, as far as the credential may see them.
        selection: what the plug-in string asks for.
        node: the node we run on; only its VMs can be read.

    Raises:
        ConfigError: an id that isn't there, or is on another node; nothing matched.
    """
    _refuse_missing(vms, selection, node)
    notes: list[str] = []
    chosen: list[VmSummary] = []
    elsewhere: list[VmSummary] = []
    excluded: list[VmSummary] = []
    for vm in sorted(vms, key=lambda vm: vm.vmid):
        if not _wanted(vm, selection):
            continue
        if _excluded(vm, selection):
            excluded.append(vm)
        elif vm.node != node:
            elsewhere.append(vm)
        else:
            chosen.append(vm)
    for part in selection.vmid:
        if not any(vm.vmid in part for vm in vms):
            notes.append(f"no VM has an id from {part}")
    if excluded:
        notes.append(f"left out by exclude: {_listed(excluded)}")
    if elsewhere:
        places = ", ".join(sorted({vm.node for vm in elsewhere}))
        notes.append(
            f"left out because another node runs them ({places}): {_listed(elsewhere)}"
        )
    if not chosen:
        raise ConfigError(_nothing(vms, selection, node, notes))
    templates = [vm for vm in chosen if vm.template]
    if templates:
        notes.append(f"templates among them: {_listed(templates)}")
    return Selected(tuple(chosen), tuple(notes))


def select_disks(
    config: Mapping[str, str], exclude_disk: Iterable[str] = (), *, vmid: int
) -> SelectedDisks:
    """Choose the drives of one VM's current configuration.

    CD-ROMs, cloud-init drives, disks with ``backup=0`` and unused volumes stay out;
    EFI variables and TPM state belong to the VM and go with it.
    """
    chosen: list[Drive] = []
    left_out: list[tuple[str, str]] = []
    patterns = _disk_patterns(exclude_disk, vmid)
    used: set[str] = set()
    for drive in drives(config):
        by = next((p for p in patterns if fnmatch.fnmatchcase(drive.key, p)), None)
        if by is not None:
            used.add(by)
        reason = _left_out(drive, config, by)
        if reason:
            left_out.append((drive.key, reason))
        else:
            chosen.append(drive)
    left_out += [
        (key, f"is not attached to the VM ({value.split(',')[0]})")
        for key, value in sorted(config.items())
        if key.startswith("unused") and key[6:].isdigit()
    ]
    notes = [
        f"exclude_disk={pattern} matches no disk of VM {vmid}"
        for pattern in patterns
        if pattern not in used
    ]
    if not chosen:
        notes.append(f"VM {vmid} has no disk to back up, only its configuration")
    return SelectedDisks(tuple(chosen), tuple(left_out), tuple(notes))


def _refuse_missing(vms: Sequence[VmSummary], selection: Selection, node: str) -> None:
    by_id = {vm.vmid: vm for vm in vms}
    for part in selection.vmid:
        if part.first != part.last:
            continue
        vm = by_id.get(part.first)
        if vm is None:
            raise ConfigError(
                f"VM {part.first} is not there, or this credential lacks VM.Audit on "
                f"/vms/{part.first}; seen: {_listed(vms)}",
                key="vmid",
            )
        if vm.node != node and not _excluded(vm, selection):
            raise ConfigError(
                f"VM {part.first} ({vm.name}) is on node {vm.node}, and this File "
                f"Daemon is on {node}; back it up with the File Daemon of {vm.node}",
                key="vmid",
            )


def _wanted(vm: VmSummary, selection: Selection) -> bool:
    return (
        selection.all
        or any(vm.vmid in part for part in selection.vmid)
        or any(fnmatch.fnmatchcase(vm.name, glob) for glob in selection.name)
        or vm.pool in selection.pool
        or not set(vm.tags).isdisjoint(selection.tag)
    )


def _excluded(vm: VmSummary, selection: Selection) -> bool:
    return any(
        vm.vmid in part
        if isinstance(part, VmidRange)
        else fnmatch.fnmatchcase(vm.name, part)
        for part in selection.exclude
    )


def _nothing(
    vms: Sequence[VmSummary], selection: Selection, node: str, notes: Sequence[str]
) -> str:
    here = [vm for vm in vms if vm.node == node]
    why = f" ({'; '.join(notes)})" if notes else ""
    if not vms:
        seen = "none at all; this credential may lack VM.Audit on /vms"
    elif not here:
        seen = f"none on node {node}, and {_listed(vms)} on other nodes"
    else:
        seen = f"{_listed(here)} on node {node}"
    return f"no VM to back up matches {selection}{why}; seen: {seen}"


def _listed(vms: Sequence[VmSummary]) -> str:
    ordered = sorted(vms, key=lambda vm: vm.vmid)
    shown = [f"{vm.vmid} ({vm.name})" for vm in ordered[:_SEEN_SHOWN]]
    if len(ordered) > _SEEN_SHOWN:
        shown.append(f"and {len(ordered) - _SEEN_SHOWN} more")
    return ", ".join(shown) or "none"


def _disk_patterns(exclude_disk: Iterable[str], vmid: int) -> list[str]:
    patterns = []
    for entry in exclude_disk:
        owner, colon, glob = entry.partition(":")
        if not colon:
            patterns.append(entry)
        elif owner == str(vmid):
            patterns.append(glob)
    return patterns


def _left_out(drive: Drive, config: Mapping[str, str], pattern: str | None) -> str:
    if drive.is_cloudinit:
        return "is a cloud-init drive; a restore makes it anew"
    if drive.is_cdrom:
        return "is a CD-ROM drive"
    if pattern is not None:
        return f"is excluded by exclude_disk={pattern}"
    if not drive.backup:
        return "has backup=0"
    if drive.key == "efidisk0" and config.get("bios") != "ovmf":
        return "is not used without bios: ovmf"
    return ""
