# SPDX-License-Identifier: Apache-2.0
"""Holding one VM for one job: our own lock, PVE's lock, qmeventd, the journal.

Written so that the way out stands next to the way in; what a kill leaves behind is
undone by ``pveplug.recovery`` from the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from pveplug.errors import JobError, PveplugError
from pveplug.events import Reporter
from pveplug.journal import Journal, open_journal, own_vm
from pveplug.node import Node
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.pve_local import ProgramError, PveLocal
from pveplug.recovery import recover_vm
from pveplug.tasks import to_the_end


@dataclass(frozen=True, slots=True)
class Held:
    """A VM that is ours until the block ends."""

    vmid: int
    journal: Journal


@contextlib.asynccontextmanager
async def held(
    node: Node,
    local: PveLocal,
    vmid: int,
    *,
    job: str,
    kind: str,
    lock_wait_s: float,
    lock_now: Callable[[], Awaitable[str]],
    say: Reporter,
) -> AsyncIterator[Held]:
    """Hold a VM that exists; it is unlocked and forgotten on every way out.

    Args:
        lock_now: asks for the lock that the VM's configuration carries; asked before
            each try, so that the journal never claims a lock that is somebody else's.

    Raises:
        JobError: somebody else has it: another job of ours, or PVE itself.
    """
    async with (
        own_vm(node.state_dir, vmid, lock_wait_s) as fd,
        contextlib.AsyncExitStack() as stack,
    ):
        stack.enter_context(local.keeping(fd))
        for line in await recover_vm(node, local, vmid):
            say.warning(f"VM {vmid}: after an earlier job that was cut off: {line}")
        journal = open_journal(node.state_dir, vmid, job, kind)
        try:
            await _lock(local, journal, lock_now, lock_wait_s)
            async with local.register_qmeventd(vmid) as warning:
                if warning:
                    say.warning(f"VM {vmid}: {warning}")
                yield Held(vmid, journal)
        finally:
            await to_the_end(_release(local, journal, say))


async def _lock(
    local: PveLocal,
    journal: Journal,
    lock_now: Callable[[], Awaitable[str]],
    wait_s: float,
) -> None:
    """Set ``lock: backup``, waiting for PVE's own operations on the VM to end."""
    vmid = journal.entry.vmid
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            lock = await lock_now()
        except PveRefusalError as error:
            if error.reason is Reason.VM_MISSING:
                raise _gone(vmid) from error
            raise
        if not lock:
            try:
                await take_lock(local, journal)
            except ProgramError as error:
                if error.reason is Reason.VM_MISSING:
                    raise _gone(vmid) from error
                if error.reason is not Reason.LOCKED:
                    raise
                lock = error.lock
            else:
                return
        if asyncio.get_running_loop().time() >= deadline:
            raise _locked(vmid, lock)
        await asyncio.sleep(1.0)


async def take_lock(local: PveLocal, journal: Journal) -> None:
    """Set ``lock: backup`` so that it is known, whatever happens, whether it is ours.

    Raises:
        ProgramError: it is not set.
    """
    journal.note(asking=True)
    try:
        await to_the_end(local.set_lock(journal.entry.vmid, journal.proof))
    finally:
        if journal.proof.exists():
            journal.entry.locked = True
        journal.undone(asking=False)


def _gone(vmid: int) -> JobError:
    return JobError(
        "the VM is gone, or another node has it now.",
        vm=str(vmid),
        phase="lock",
        remedy="check where it runs and whether it still exists.",
    )


def _locked(vmid: int, lock: str) -> JobError:
    holder = {
        "backup": "vzdump or another backup program",
        "migrate": "a migration",
        "snapshot": "a snapshot that is being taken",
        "snapshot-delete": "a snapshot that is being deleted",
        "rollback": "a rollback",
        "clone": "a clone",
        "create": "its creation or restore",
        "suspended": "its suspension to disk",
        "suspending": "its suspension to disk",
    }.get(lock, "another operation")
    return JobError(
        f"VM is locked ({lock}) by {holder}.",
        vm=str(vmid),
        phase="lock",
        remedy=f"wait for that task; if none runs any more: qm unlock {vmid}",
    )


async def _release(local: PveLocal, journal: Journal, say: Reporter) -> None:
    """Unlock; whatever is left stays in the journal for the recovery."""
    entry = journal.entry
    if entry.locked:
        try:
            await local.unlock(entry.vmid)
            journal.undone(locked=False)
        except PveplugError as error:
            say.error(
                f"VM {entry.vmid}: could not be unlocked: {error}. "
                f"Remedy: qm unlock {entry.vmid}"
            )
    clean = not (
        entry.locked
        or entry.frozen
        or entry.touched
        or entry.files
        or entry.volumes
        or entry.active
        or entry.created
    )
    if clean:
        journal.close()
