# SPDX-License-Identifier: Apache-2.0
"""A recovered VM that we have paused: why is written down for as long as QEMU lives.

A keeper that was killed must know whether the pause was ours, and a user's own pause
must never be ended by us. The text is kept below /run: a reboot ends QEMU, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from pveplug.errors import PveplugError, TransportError
from pveplug.ir.notes import noted
from pveplug.ir.record import Recovery
from pveplug.pve_local import PveLocal
from pveplug.qmp import qmp_session
from pveplug.units import human

_FILE: Final = "paused"
RESUMES: Final = 20
SETTLE_S: Final = 0.5


def late(vmid: int, owed: int, timeout_s: int, head: str) -> str:
    """Return why a VM is paused whose data (``owed`` bytes) doesn't come."""
    return (
        f"Paused by pveplug: {human(owed)} of its disks have not come for {timeout_s} "
        f"s (ir_timeout). Nothing is lost. Run the restore of job {head} again: it "
        "goes on where it was, and so does this VM. Or give it up: pveplug ir discard "
        f"--vmid {vmid}"
    )


def damaged(vmid: int, why: str) -> str:
    """Return why a VM is paused whose data isn't what was stored."""
    return (
        f"Paused by pveplug: its data is not what was backed up: {why} The "
        f"guest must not go on with it. Give it up (pveplug ir discard --vmid {vmid}) "
        "and recover an older backup; what the guest wrote since its start is in its "
        "overlays until then"
    )


def why_paused(recovery: Recovery) -> str:
    """Return why we have paused the VM; empty: we have not."""
    try:
        return _place(recovery).read_text(encoding="utf-8")
    except OSError:
        return ""


async def pause(local: PveLocal, recovery: Recovery, text: str) -> None:
    """Pause the VM, if it runs, and tell why in its notes.

    Raises:
        PveplugError: PVE or this node refuses: it goes on, or is paused without a note.
    """
    try:
        _place(recovery).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TransportError(f"{_place(recovery)}: {error.strerror}") from error
    try:
        if local.vm_running(recovery.vmid) is not None:
            await _stop(local, recovery.vmid)
    except PveplugError:
        _place(recovery).unlink(missing_ok=True)  # it was never asked, or refuses
        raise
    await describe(local, recovery.vmid, text)


async def go_on(local: PveLocal, recovery: Recovery) -> None:
    """Let a VM go on that :func:`pause` has paused.

    Raises:
        PveplugError: PVE refuses; the pause stays ours.
    """
    if local.vm_running(recovery.vmid) is not None:
        await resume(local, recovery.vmid)
    with contextlib.suppress(OSError):
        _place(recovery).unlink()


async def _stop(local: PveLocal, vmid: int) -> None:
    # Not by `qm suspend`: a move holds the lock that it needs for as long as it lasts.
    # QEMU takes the order and answers when the reads under way have ended, which wait
    # for what doesn't come: no answer is no refusal.
    async with qmp_session(local.node.qmp_socket(vmid)) as qmp:
        with contextlib.suppress(TransportError):
            await qmp.execute("stop")


async def resume(local: PveLocal, vmid: int) -> None:
    """Continue a guest, again where QEMU has yet to find its server.

    Raises:
        PveplugError: it does not go on.
    """
    for _ in range(RESUMES):
        async with qmp_session(local.node.qmp_socket(vmid)) as qmp:
            await qmp.execute("cont")
        await asyncio.sleep(SETTLE_S)
        async with qmp_session(local.node.qmp_socket(vmid)) as qmp:
            if (await qmp.execute("query-status"))["status"] == "running":
                return
    raise PveplugError(f"VM {vmid} stays paused: look at it, then qm resume {vmid}")


async def describe(local: PveLocal, vmid: int, text: str) -> None:
    """Write our note into the VM's description; not where the VM can't be read."""
    try:
        values = (await local.config(vmid)).values
    except PveplugError:
        return
    described = noted(values.get("description", ""), text)
    await local.set_values(vmid, {"description": described})


def _place(recovery: Recovery) -> Path:
    return recovery.runtime / _FILE
