# SPDX-License-Identifier: Apache-2.0
"""Giving an instant recovery up: the VM goes, with what its guest has written since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from pveplug.errors import JobError
from pveplug.ir.control import release, retire
from pveplug.ir.record import Record, Recovery
from pveplug.node import Node
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError, PveLocal
from pveplug.vmconfig import smbios_uuid

FEED_WAIT_S: Final = 5.0


async def discard(node: Node, vmid: int, say: Callable[[str], None]) -> None:
    """Stop and destroy the VM, then remove keeper and landed data; as root.

    Every step looks first, so a second call goes on where one was cut off.

    Raises:
        JobError: there is no such recovery, a job is delivering to it, or the id is
            another VM's by now.
        ProgramError: PVE refuses a step; the rest stays.
    """
    recovery = Recovery(node, vmid)
    record = recovery.load()
    if record is None:
        raise JobError(
            "no instant recovery of it is under way.",
            vm=str(vmid),
            phase="discard",
            remedy="`pveplug ir status` lists them; a VM whose disks have moved is an "
            "ordinary one.",
        )
    if recovery.fed():
        raise JobError(
            "a restore job is delivering to it.",
            vm=str(vmid),
            phase="discard",
            remedy="cancel that job first (bconsole: cancel).",
        )
    local = PveLocal(node)
    async with recovery.feeding(FEED_WAIT_S):  # no job begins to deliver meanwhile
        await remove_vm(local, recovery, record, say)
        await _free_overlays(local, record, say)
        await remove_traces(node, recovery)
    say(f"VM {vmid}: everything of the recovery is removed")


async def remove_vm(
    local: PveLocal,
    recovery: Recovery,
    record: Record,
    say: Callable[[str], None],
) -> None:
    """Stop and destroy the VM of a recovery, if it is there and still that one.

    Raises:
        JobError: the id is another VM's by now, or another node has it.
    """
    vmid = record.vmid
    try:
        config = (await local.config(vmid)).values
    except ProgramError as error:
        if error.reason is not Reason.VM_MISSING:
            raise
        # Every node sees the configurations of all in /etc/pve.
        nodes = Path(local.node.firewall_dir).parent / "nodes"
        for found in nodes.glob(f"*/qemu-server/{vmid}.conf"):
            raise JobError(
                f"node {found.parent.parent.name} has it now.",
                vm=str(vmid),
                phase="discard",
                remedy="migrate it back, or destroy it there first.",
            ) from error
        return
    if smbios_uuid(config) != record.uuid:
        raise JobError(
            "the VM that has this id now is not the one that was recovered.",
            vm=str(vmid),
            phase="discard",
            remedy="if you are sure that the recovered one is gone, remove "
            "its folder below landing_dir by hand.",
        )
    if local.vm_running(vmid) is not None:
        # Reads that wait for what will not come would keep QEMU from ending.
        await release(recovery)
        await local.stop_vm(vmid)
        say(f"VM {vmid}: stopped")
    if config.get("protection", "0") == "1":
        await local.set_values(vmid, {"protection": "0"})
    if await local.destroy_vm(vmid):
        say(f"VM {vmid}: destroyed")


async def _free_overlays(
    local: PveLocal, record: Record, say: Callable[[str], None]
) -> None:
    """Free the overlays that were never the VM's, or are no more; it has gone."""
    for disk in record.served:
        if await local.volume_exists(disk.overlay):
            await local.free_volume(disk.overlay)
            say(f"VM {record.vmid}: freed {disk.overlay}")


async def remove_traces(node: Node, recovery: Recovery) -> None:
    """End the keeper and remove what has landed."""
    await retire(node, recovery)
