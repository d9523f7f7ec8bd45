# SPDX-License-Identifier: Apache-2.0
"""Repairing VMs by hand: what a job does at its start, without a job.

A journal tells what is ours. Where it is lost, names tell, as far as they can: nodes,
exports and jobs in QEMU, scratch images in the scratch directories. What can't be told
from somebody else's (a lock, a frozen guest, a volume named as vzdump names its own) is
named and left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pveplug.cleanup import find_ours
from pveplug.errors import PveplugError
from pveplug.journal import Entry, own_vm, proven, read_entry, unowned_vm, vmids_of
from pveplug.nbd.qemu_nbd import socket_owner
from pveplug.node import Node
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError, PveLocal
from pveplug.qga import GuestAgent
from pveplug.qmp import VmGoneError
from pveplug.recovery import AGENT_S, settle, undo, widened
from pveplug.scratch import scratch_images, scratch_owner
from pveplug.vmconfig import parse_bool, properties

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Repaired:
    """What came of it; where nothing was to be changed, what would."""

    did: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


async def repair_vm(
    node: Node,
    local: PveLocal,
    vmid: int,
    *,
    scratch_dirs: Sequence[str] = (),
    dry: bool = False,
) -> Repaired:
    """Undo everything of ours on a VM of this node that no job of ours holds.

    Args:
        scratch_dirs: where to look for scratch images besides the node's directory.
        dry: only look; nothing is written, and nothing is sent that changes anything.

    Raises:
        VmBusyError: a job of ours has the VM; nothing was touched.
        JobError: the state directory can't be used.
    """
    async with _held(node, local, vmid, dry=dry):
        entry = read_entry(node.state_dir, vmid)
        stray = scratch_images([node.scratch_dir, *scratch_dirs], vmid)
        wide = widened(node, vmid, entry, stray)
        proof = wide.asking and proven(node.state_dir, vmid)
        undone = await undo(node, local, wide, dry=dry)
        if not undone.failed and not dry:
            settle(node, wide, undone)
        found = Repaired(list(undone.did), [*undone.stays])
        found.left += [f"could not be done: {text}" for text in undone.failed]
        await _look(
            node, local, wide, found, lock=not (wide.locked or proof or wide.created)
        )
        found.left += await _fleeced(local, vmid, set(wide.volumes))
        return found


@contextlib.asynccontextmanager
async def _held(
    node: Node, local: PveLocal, vmid: int, *, dry: bool
) -> AsyncIterator[None]:
    if dry:
        with unowned_vm(node.state_dir, vmid):
            yield
        return
    async with own_vm(node.state_dir, vmid, 0) as fd:
        with local.keeping(fd):
            yield


async def _look(
    node: Node, local: PveLocal, entry: Entry, found: Repaired, *, lock: bool
) -> None:
    """Name what may be ours and can't be told; ``lock``: also PVE's lock."""
    vmid = entry.vmid
    try:
        config = await local.config(vmid)
    except ProgramError as error:
        if error.reason is not Reason.VM_MISSING:
            found.left.append(f"its configuration can't be read: {error}")
        return
    if lock and config.lock == "backup":
        found.left.append(
            "the VM is locked (backup), not by a job of ours that is known; if neither "
            f"vzdump nor another backup is at it: qm unlock {vmid}"
        )
    enabled = properties(config.values.get("agent", ""), "enabled").get("enabled", "0")
    known = entry.frozen or local.vm_running(vmid) is None
    if parse_bool(enabled) and not known:
        asked = GuestAgent(node.qga_socket(vmid))
        try:
            state = await asyncio.to_thread(asked.freeze_status, AGENT_S)
        except (PveplugError, OSError) as error:
            log.info("vm=%s agent=%s", vmid, error)
            return
        if state == "frozen":
            found.left.append(
                "the guest is frozen, not by a job of ours that is known; if no other "
                f"backup is at it: qm guest cmd {vmid} fsfreeze-thaw"
            )


async def _fleeced(local: PveLocal, vmid: int, ours: set[str]) -> list[str]:
    """Name volumes that are called as our scratch volumes are, and vzdump's too."""
    try:
        volumes = await local.fleecing_volumes(vmid)
    except ProgramError as error:
        return [f"its storages can't be searched for scratch volumes: {error}"]
    return [
        f"{volid} is there, a scratch volume of ours or of vzdump; if neither runs: "
        f"pvesm free {volid}"
        for volid in volumes
        if volid not in ours
    ]


async def candidates(
    node: Node, local: PveLocal, scratch_dirs: Sequence[str] = ()
) -> tuple[list[int], dict[int, str]]:
    """Return the VMs of this node that have something of ours.

    Returns: them, and those that could not be looked at, with the reason.
    """
    found = set(vmids_of(node.state_dir))
    for path in scratch_images([node.scratch_dir, *scratch_dirs]):
        if (owner := scratch_owner(os.path.basename(path))) is not None:
            found.add(owner)
    failed: dict[int, str] = {}
    for vmid in _monitors(node):
        if vmid in found or local.vm_running(vmid) is None:
            continue
        try:
            if await find_ours(node.qmp_socket(vmid), f"{node.runtime_dir}/{vmid}.nbd"):
                found.add(vmid)
        except VmGoneError:
            continue
        except PveplugError as error:
            failed[vmid] = f"could not be looked at: {error}"
    return sorted(found), failed


def _monitors(node: Node) -> list[int]:
    found = Path(node.qemu_run_dir).glob("*.qmp")
    return sorted(int(path.stem) for path in found if path.stem.isdecimal())


def dead_sockets(node: Node) -> list[str]:
    """Return the sockets of processes of ours that have died."""
    return [
        str(path)
        for path in sorted(Path(node.runtime_dir).glob("nbd-*.sock"))
        if (pid := socket_owner(path.name)) and not os.path.exists(f"/proc/{pid}")
    ]
