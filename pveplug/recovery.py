# SPDX-License-Identifier: Apache-2.0
"""Undoing what a dead job has left on a VM: from its journal, and from names.

Runs at the start of the next job on that VM, and as ``--cleanup JOB`` right after a job
that ended uncleanly. It has no credentials: everything goes through this node's own
sockets and root programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pveplug.cleanup import clean_up, listens
from pveplug.errors import JobError, PveplugError, TransportError
from pveplug.events import Reporter
from pveplug.journal import (
    Entry,
    entries_of,
    forget,
    own_vm,
    proven,
    read_entry,
    write_entry,
)
from pveplug.nbd.qemu_nbd import socket_prefix
from pveplug.node import Node
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError, PveLocal
from pveplug.qga import GuestAgent
from pveplug.qmp import VmGoneError
from pveplug.scratch import directories
from pveplug.storeprobe import StoreProbe
from pveplug.vmconfig import drives, smbios_uuid

log = logging.getLogger(__name__)
AGENT_S: Final = 5.0
STORE_S: Final = 5.0
OWNER_GONE_S: Final = 25.0
SETTLE_S: Final = 5.0
"""How long PVE may take to begin what it was asked for."""


async def recover(node: Node, local: PveLocal, entry: Entry) -> list[str]:
    """Undo a dead job's traces; the caller holds the VM with ``own_vm``.

    Returns: what was done, for the job log.

    An agent that doesn't answer hinders nobody: PVE itself may hold its channel for an
    hour. What could not be asked stays in the journal, and is asked again next time.

    Raises:
        JobError: something is left; the journal stays for the next attempt.
    """
    did: list[str] = []
    failed: list[str] = []
    silent = False

    async def step(what: str, action: Callable[[], object]) -> None:
        try:
            result = action()
            if asyncio.iscoroutine(result):
                result = await result
        except Exception as error:  # the other steps are done all the same
            log.warning("recovery vm=%s %s", entry.vmid, what, exc_info=True)
            failed.append(f"{what}: {error}")
        else:
            if result is not False:
                did.append(what)

    running = local.vm_running(entry.vmid) is not None
    if running and entry.frozen:
        try:
            if await _thaw(node, entry.vmid):
                did.append("thawed the guest")
        except (PveplugError, OSError) as error:
            silent = True
            did.append(
                f"its guest agent can't be asked whether the guest is frozen: {error} "
                "Remedy: restart the agent in the guest, or reset the VM"
            )
    if running and entry.touched:
        await step("freed QEMU of the backup's nodes", lambda: _free_qemu(node, entry))
    elif entry.nbd_socket and not listens(entry.nbd_socket):
        _remove(entry.nbd_socket)  # QEMU was killed and could not
    if not any(text.startswith("freed QEMU") for text in failed):
        for path in entry.files:
            await step(f"removed {path}", lambda path=path: _remove(path))  # type: ignore[misc]
    for volid in entry.active:
        if not running:
            await step(
                f"deactivated {volid}",
                lambda volid=volid: _deactivate(local, volid),  # type: ignore[misc]
            )
    if entry.created:
        await step(
            f"destroyed the unfinished VM {entry.vmid}", lambda: _destroy(local, entry)
        )
    for volid in entry.volumes:
        await step(
            f"freed {volid}",
            lambda volid=volid: _free(local, entry, volid),  # type: ignore[misc]
        )
    ours = entry.locked or (entry.asking and proven(node.state_dir, entry.vmid))
    if ours and not entry.created:
        await step("unlocked the VM", lambda: local.unlock(entry.vmid))
    if failed:
        raise JobError(
            f"could not undo what job {entry.job} left: {'; '.join(failed)}.",
            vm=str(entry.vmid),
            phase="recovery",
            remedy="mend that and run `podheitor-proxmox-backend --cleanup "
            f"{entry.job}` or the next backup of the VM; or do it by hand and remove "
            f"{node.state_dir}/vms/{entry.vmid}.json.",
        )
    _forget_sockets(node, entry.pid)
    if silent:
        left = Entry(entry.vmid, entry.job, entry.kind, frozen=True)
        write_entry(node.state_dir, left)
    else:
        forget(node.state_dir, entry.vmid)
    log.info("recovered vm=%s job=%s did=%s", entry.vmid, entry.job, "; ".join(did))
    return did


async def _thaw(node: Node, vmid: int) -> bool:
    agent = GuestAgent(node.qga_socket(vmid))
    deadline = asyncio.get_running_loop().time() + AGENT_S * 3
    while True:
        try:
            if await asyncio.to_thread(agent.freeze_status, AGENT_S) != "frozen":
                return False
            await asyncio.to_thread(agent.thaw, AGENT_S)
        except TransportError:
            # The channel serves one client; PVE or our watchdog may be at it.
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return True


async def _free_qemu(node: Node, entry: Entry) -> bool:
    # QEMU closes a scratch image with the whole VM waiting.
    stores = directories(set(entry.files))
    async with StoreProbe(stores) as probe:
        if stores and not await probe.all_answer(STORE_S):
            raise TransportError(
                f"the scratch store {', '.join(sorted(stores))} does not answer"
            )
    try:
        return bool(await clean_up(node.qmp_socket(entry.vmid), entry.nbd_socket))
    except VmGoneError as error:
        log.info("vm=%s went away: %s", entry.vmid, error)
        return False


def _remove(path: str) -> bool:
    there = Path(path).exists()
    Path(path).unlink(missing_ok=True)
    return there


def _forget_sockets(node: Node, pid: int) -> None:
    """Remove the sockets of a dead process's qemu-nbd, which died with it."""
    if pid == os.getpid():
        return  # a failed restore; other VMs of this job may go on
    for path in Path(node.runtime_dir).glob(f"{socket_prefix(pid)}*"):
        path.unlink(missing_ok=True)


async def _destroy(local: PveLocal, entry: Entry) -> bool:
    """Destroy the VM that a restore made, and no other that has its id now."""
    while (config := await _config(local, entry.vmid)) is None:
        if not await _may_still_come(entry):
            return False
    if entry.uuid and smbios_uuid(config) != entry.uuid:
        log.warning("vm=%s is somebody else's and stays", entry.vmid)
        return False
    return await local.destroy_vm(entry.vmid)


async def _free(local: PveLocal, entry: Entry, volid: str) -> bool:
    if volid in await _volumes_in_use(local, entry.vmid):
        # Killed just after it had been attached.
        log.warning("vm=%s uses %s, which stays", entry.vmid, volid)
        return False
    while not await local.volume_exists(volid):
        if not await _may_still_come(entry):
            return False
    await local.free_volume(volid)
    return True


async def _deactivate(local: PveLocal, volid: str) -> bool:
    if not await local.volume_exists(volid):
        return False
    await local.deactivate(volid)
    return True


async def _may_still_come(entry: Entry) -> bool:
    """Whether PVE may be at what a job asked for just before it died; wait a little."""
    age = time.time() - entry.changed
    if not 0 <= age < SETTLE_S:
        return False
    await asyncio.sleep(0.5)
    return True


async def _config(local: PveLocal, vmid: int) -> Mapping[str, str] | None:
    try:
        return (await local.config(vmid)).values
    except ProgramError as error:
        if error.reason is Reason.VM_MISSING:
            return None
        raise


async def _volumes_in_use(local: PveLocal, vmid: int) -> set[str]:
    config = await _config(local, vmid)
    return {drive.file for drive in drives(config or {})}


async def recover_vm(node: Node, local: PveLocal, vmid: int) -> list[str]:
    """Recover a VM that the caller holds, if a journal is there."""
    entry = read_entry(node.state_dir, vmid)
    return await recover(node, local, entry) if entry else []


async def clean_up_job(node: Node, job: str, say: Reporter) -> bool:
    """Undo everything a dead job left on this node; whether all of it went well."""
    local = PveLocal(node)
    well = True
    for found in list(entries_of(node.state_dir, job)):
        try:
            async with (
                own_vm(node.state_dir, found.vmid, OWNER_GONE_S) as fd,
                contextlib.AsyncExitStack() as stack,
            ):
                stack.enter_context(local.keeping(fd))
                entry = read_entry(node.state_dir, found.vmid)
                if entry is None or entry.job != job:
                    continue  # the next job has done it
                for line in await recover(node, local, entry):
                    say.info(f"VM {found.vmid}: {line}")
                well = well and read_entry(node.state_dir, found.vmid) is None
        except PveplugError as error:
            say.error(str(error))
            well = False
    return well
