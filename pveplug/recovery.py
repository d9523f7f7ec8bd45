# SPDX-License-Identifier: Apache-2.0
"""Undoing what a dead job has left on a VM: from its journal, and from names.

Runs at the start of the next job on that VM, and as ``--cleanup JOB`` right after a job
that ended uncleanly. It has no credentials: everything goes through this node's own
sockets and root programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pveplug.cleanup import clean_up, find_ours, listens
from pveplug.errors import IntegrityError, JobError, PveplugError, TransportError
from pveplug.events import Reporter
from pveplug.ir.control import release, retire
from pveplug.ir.record import Recovery
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
from pveplug.scratch import directories, scratch_images, scratch_owner
from pveplug.storeprobe import StoreProbe, settled
from pveplug.vmconfig import drives, smbios_uuid

log = logging.getLogger(__name__)
NO_JOURNAL: Final = "(no journal)"
AGENT_S: Final = 5.0
STORE_S: Final = 5.0
SLOW_STORE_S: Final = 20.0
"""How long it may take what QEMU has begun to write."""
OWNER_GONE_S: Final = 25.0
SETTLE_S: Final = 5.0
"""How long PVE may take to begin what it was asked for."""


@dataclass(slots=True)
class Undone:
    """What came of undoing an entry; with ``dry``, what would."""

    did: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stays: list[str] = field(default_factory=list)
    """What is left alone on purpose, for somebody to look at."""
    silent: bool = False
    """Whether the guest could not be asked whether it is frozen."""


async def recover(node: Node, local: PveLocal, entry: Entry) -> list[str]:
    """Undo a dead job's traces; the caller holds the VM with ``own_vm``.

    Returns: what was done, for the job log.

    An agent that doesn't answer hinders nobody: PVE itself may hold its channel for an
    hour. What could not be asked stays in the journal, and is asked again next time.

    Raises:
        JobError: something is left; the journal stays for the next attempt.
    """
    undone = await undo(node, local, entry)
    if undone.failed:
        raise JobError(
            f"could not undo what job {entry.job} left: {'; '.join(undone.failed)}.",
            vm=str(entry.vmid),
            phase="recovery",
            remedy=f"mend that and run `pveplug repair --vmid {entry.vmid}`, or the "
            "next backup of the VM; or do it by hand and remove "
            f"{node.state_dir}/vms/{entry.vmid}.json.",
        )
    settle(node, entry, undone)
    return [*undone.stays, *undone.did]


def settle(node: Node, entry: Entry, undone: Undone) -> None:
    """Forget an entry that was undone but for what nobody could be asked about."""
    _forget_sockets(node, entry.pid)
    if undone.silent:
        left = Entry(entry.vmid, entry.job, entry.kind, frozen=True)
        write_entry(node.state_dir, left)
    else:
        forget(node.state_dir, entry.vmid)
    log.info(
        "recovered vm=%s job=%s did=%s", entry.vmid, entry.job, "; ".join(undone.did)
    )


async def undo(
    node: Node, local: PveLocal, entry: Entry, *, dry: bool = False
) -> Undone:
    """Undo what an entry names, as far as it is there; the journal is not touched.

    Args:
        dry: only look: nothing is changed, and no command is sent that could.
    """
    found = Undone()

    async def step(
        what: str,
        due: Callable[[], Awaitable[bool]],
        do: Callable[[], Awaitable[object]],
    ) -> None:
        try:
            if not await due():
                return
            if not dry:
                await do()
        except Exception as error:  # the other steps are done all the same
            log.warning("recovery vm=%s %s", entry.vmid, what, exc_info=True)
            found.failed.append(f"{what}: {error}")
        else:
            found.did.append(what)

    vmid = entry.vmid
    if entry.damage:
        found.stays.append(
            f"its journal can't be read ({entry.damage}), so only what has a name of "
            "ours is undone; look yourself for a lock, a frozen guest, an unfinished "
            "VM and volumes of scratch"
        )
    nbd_socket = _our_socket(entry)
    process = local.vm_running(vmid)
    if process and entry.frozen:
        await _thaw_step(node, vmid, found, dry=dry)
    freed = True
    if process and entry.touched:
        images = {path for path in entry.files if _named(vmid, path)}
        freed = await _qemu_step(
            node, vmid, process.pid, nbd_socket, images, found, dry=dry
        )
    elif nbd_socket and not dry and not listens(nbd_socket):
        _unlink(nbd_socket)  # QEMU was killed and could not
    for path in entry.files if freed else ():
        await step(
            f"removed {path}",
            functools.partial(_is_scratch, vmid, path, found),
            functools.partial(_remove, path),
        )
    for volid in entry.active if not process else ():
        await step(
            f"deactivated {volid}",
            functools.partial(local.volume_exists, volid),
            functools.partial(local.deactivate, volid),
        )
    recovery = Recovery(node, vmid)
    if entry.created and (unreadable := _why_unreadable(recovery)):
        # It may be its user's already, and its disks need what has landed.
        found.stays.append(
            f"VM {vmid} stays, with all that has landed: whether it had been handed "
            f"over isn't known. {unreadable}"
        )
        entry = dataclasses.replace(entry, created=False, volumes=[])
    elif entry.created and _was_handed_over(recovery, entry):
        # Killed between the record, which decides, and the end of the journal.
        found.did.append(f"left VM {vmid} to its user: it had been handed over")
        entry = dataclasses.replace(entry, created=False, volumes=[])
    if entry.created and recovery.exists() and not dry:
        await release(recovery)
    if entry.created and entry.kind == "prove":
        await step(
            f"stopped VM {vmid}, made for a proof",
            functools.partial(_is_proof_running, local, entry),
            functools.partial(local.stop_vm, vmid),
        )
    if entry.created:
        await step(
            f"destroyed the unfinished VM {vmid}",
            functools.partial(_is_unfinished, local, entry, found),
            functools.partial(_destroy, local, vmid),
        )

        async def landed() -> bool:
            return recovery.exists()

        await step(
            f"removed what had landed in {recovery.folder}",
            landed,
            functools.partial(retire, node, recovery),
        )
    for volid in entry.volumes:
        await step(
            f"freed {volid}",
            functools.partial(_is_surplus, local, entry, volid),
            functools.partial(local.free_volume, volid),
        )
    ours = entry.locked or (entry.asking and proven(node.state_dir, vmid))
    if ours and not entry.created:
        await step(
            "unlocked the VM",
            functools.partial(_is_locked, local, vmid),
            functools.partial(local.unlock, vmid),
        )
    return found


async def _thaw_step(node: Node, vmid: int, found: Undone, *, dry: bool) -> None:
    try:
        if await _thaw(node, vmid, dry=dry):
            found.did.append("thawed the guest")
    except (PveplugError, OSError) as error:
        found.silent = True
        found.stays.append(
            f"its guest agent can't be asked whether the guest is frozen: {error} "
            "Remedy: restart the agent in the guest, or reset the VM"
        )


async def _qemu_step(
    node: Node,
    vmid: int,
    pid: int,
    nbd_socket: str,
    images: set[str],
    found: Undone,
    *,
    dry: bool,
) -> bool:
    """Return whether nothing of ours is in QEMU any more, as far as we go.

    Args:
        pid: of the VM.
        images: our scratch images.
    """
    act = find_ours if dry else clean_up
    stores = directories(images)
    try:
        if stores and not dry:
            # QEMU closes a scratch image with the whole VM waiting.
            async with StoreProbe(stores) as probe:
                if not await probe.all_answer(STORE_S):
                    raise TransportError(
                        f"the scratch store {', '.join(sorted(stores))} does not answer"
                    )
            if not await settled(pid, images, SLOW_STORE_S):
                raise TransportError(
                    f"the scratch store {', '.join(sorted(stores))} is too slow"
                )
        names = await act(node.qmp_socket(vmid), nbd_socket)
    except VmGoneError as error:
        log.info("vm=%s went away: %s", vmid, error)
        return True
    except Exception as error:
        log.warning("recovery vm=%s QEMU", vmid, exc_info=True)
        found.failed.append(f"freed QEMU of what is ours: {error}")
        return False
    if names:
        found.did.append(f"freed QEMU of {', '.join(names)}")
    return True


async def _thaw(node: Node, vmid: int, *, dry: bool = False) -> bool:
    """Thaw the guest if it is frozen; whether it was."""
    agent = GuestAgent(node.qga_socket(vmid))
    deadline = asyncio.get_running_loop().time() + AGENT_S * 3
    while True:
        try:
            if await asyncio.to_thread(agent.freeze_status, AGENT_S) != "frozen":
                return False
            if not dry:
                await asyncio.to_thread(agent.thaw, AGENT_S)
        except TransportError:
            # The channel serves one client; PVE or our watchdog may be at it.
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return True


def _our_socket(entry: Entry) -> str:
    """Return where our NBD server listens, if the entry names a path that fits."""
    named = Path(entry.nbd_socket).name == f"{entry.vmid}.nbd"
    return entry.nbd_socket if named and "\0" not in entry.nbd_socket else ""


def _named(vmid: int, path: str) -> bool:
    """Whether a path can be one of the VM's scratch images."""
    named = scratch_owner(os.path.basename(path)) == vmid
    return named and os.path.isabs(path) and "\0" not in path


async def _is_scratch(vmid: int, path: str, found: Undone) -> bool:
    """Whether a scratch image of the VM is there, and nothing else of that name."""
    if _named(vmid, path):
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
    found.stays.append(f"{path!r} stays: it is no scratch image of this VM")
    return False


async def _remove(path: str) -> None:
    _unlink(path)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _forget_sockets(node: Node, pid: int) -> None:
    """Remove the sockets of a dead process's qemu-nbd, which died with it."""
    if pid == os.getpid():
        return  # a failed restore; other VMs of this job may go on
    for path in Path(node.runtime_dir).glob(f"{socket_prefix(pid)}*"):
        if not listens(str(path)):  # else its number is another process's by now
            path.unlink(missing_ok=True)


async def _is_unfinished(local: PveLocal, entry: Entry, found: Undone) -> bool:
    """Whether the VM is the one that a restore made, and nobody has used it since."""
    while (config := await _config(local, entry.vmid)) is None:
        if not await _may_still_come(entry):
            return False
    if not entry.uuid or smbios_uuid(config) != entry.uuid:
        log.warning("vm=%s is somebody else's and stays", entry.vmid)
        return False
    used = {drive.file for drive in drives(config) if not drive.is_cdrom}
    if strange := sorted(used - set(entry.volumes)):
        found.stays.append(
            f"VM {entry.vmid} stays: the restore was not finished, but it has disks "
            f"that the restore did not make: {', '.join(strange)}; if it is locked and "
            f"you want it: qm unlock {entry.vmid}"
        )
        return False
    return True


def _why_unreadable(recovery: Recovery) -> str:
    try:
        recovery.load()
    except IntegrityError as error:
        return str(error)
    return ""


def _was_handed_over(recovery: Recovery, entry: Entry) -> bool:
    """Whether the VM of an instant recovery is its user's already."""
    record = recovery.load()
    return record is not None and record.handed and record.uuid == entry.uuid


async def _destroy(local: PveLocal, vmid: int) -> None:
    """Destroy an unfinished VM, which may have got its protection already."""
    if (await _config(local, vmid) or {}).get("protection", "0") == "1":
        await local.set_values(vmid, {"protection": "0"}, skiplock=True)
    await local.destroy_vm(vmid)


async def _is_proof_running(local: PveLocal, entry: Entry) -> bool:
    config = await _config(local, entry.vmid)
    if config is None or not entry.uuid or smbios_uuid(config) != entry.uuid:
        return False
    return local.vm_running(entry.vmid) is not None


async def _is_surplus(local: PveLocal, entry: Entry, volid: str) -> bool:
    """Whether a volume is there, and the VM doesn't use it."""
    if volid in await _volumes_in_use(local, entry.vmid):
        # Killed just after it had been attached.
        log.warning("vm=%s uses %s, which stays", entry.vmid, volid)
        return False
    while not await local.volume_exists(volid):
        if not await _may_still_come(entry):
            return False
    return True


async def _is_locked(local: PveLocal, vmid: int) -> bool:
    return (await _config(local, vmid) or {}).get("lock") == "backup"


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
    """Recover a VM that the caller holds: what its journal names, and scratch images.

    What is in QEMU without a journal is found by every point in time that is prepared.
    """
    entry = read_entry(node.state_dir, vmid)
    stray = scratch_images([node.scratch_dir], vmid)
    if entry is None and not stray:
        return []
    return await recover(node, local, widened(node, vmid, entry, stray))


def widened(
    node: Node, vmid: int, entry: Entry | None, scratch: Iterable[str]
) -> Entry:
    """Return an entry with what has a name of ours added, journal or not."""
    if entry is None:
        entry = Entry(vmid, NO_JOURNAL, "backup")
    return dataclasses.replace(
        entry,
        touched=True,
        nbd_socket=_our_socket(entry) or f"{node.runtime_dir}/{vmid}.nbd",
        files=list(dict.fromkeys([*entry.files, *scratch])),
    )


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
                for line in await recover_vm(node, local, found.vmid):
                    say.info(f"VM {found.vmid}: {line}")
                well = well and read_entry(node.state_dir, found.vmid) is None
        except PveplugError as error:
            say.error(str(error))
            well = False
    return well
