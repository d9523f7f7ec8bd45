# SPDX-License-Identifier: Apache-2.0
"""Starting a replica and seeing that its guest comes up; stopping it again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from pveplug.errors import PveplugError, TransportError
from pveplug.events import Reporter
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.pve import PveApi
from pveplug.vmconfig import has_agent

POLL_S: Final = 0.5
SETTLE_S: Final = 15.0
"""How long a VM without an agent must keep running to count as started."""
START_S: Final = 120.0

ALIVE: Final = "agent answers"
NO_AGENT: Final = "started, no agent"
SILENT: Final = "started, agent silent"


@dataclass(frozen=True, slots=True)
class Booted:
    """What came of a start.

    Attributes:
        verdict: ``agent answers``, ``started, no agent``: none is configured, or
            ``started, agent silent``: it is and didn't answer in time.
        seconds: until the agent answered; else until the VM ran.
    """

    verdict: str
    seconds: float


async def boot(
    api: PveApi,
    here: str,
    vmid: int,
    *,
    timeout_s: float,
    say: Reporter,
) -> Booted:
    """Start a VM, unless it runs, and wait for its guest.

    Raises:
        PveplugError: it did not start, or ended again; the text says so.
    """
    began = time.monotonic()
    config = dict((await api.vm_config(here, vmid)).values)
    if not (await api.vm_status(here, vmid)).running:
        for text in await api.start_vm(here, vmid, timeout_s=START_S):
            say.warning(f"VM {vmid}: {text}")
    started = time.monotonic() - began
    say.info(f"VM {vmid} runs after {started:.1f} s")
    agent = has_agent(config)
    until = began + (timeout_s if agent else min(timeout_s, started + SETTLE_S))
    while True:
        if agent and await _answers(api, here, vmid):
            seconds = time.monotonic() - began
            say.info(f"VM {vmid}: the guest agent answers after {seconds:.1f} s")
            return Booted(ALIVE, seconds)
        await _still_runs(api, here, vmid)
        if time.monotonic() >= until:
            break
        await asyncio.sleep(POLL_S)
    if not agent:
        say.info(f"VM {vmid} has no guest agent configured: it runs, more isn't known")
        return Booted(NO_AGENT, started)
    say.warning(
        f"VM {vmid} runs, but its guest agent did not answer within {timeout_s:g} s: "
        "look at its console"
    )
    return Booted(SILENT, started)


async def _answers(api: PveApi, here: str, vmid: int) -> bool:
    try:
        await api.agent_ping(here, vmid)
    except (PveRefusalError, TransportError):
        return False
    return True


async def _still_runs(api: PveApi, here: str, vmid: int) -> None:
    try:
        running = (await api.vm_status(here, vmid)).running
    except TransportError:
        return  # not known is not "ended"
    if not running:
        raise PveplugError(
            f"VM {vmid} started and ended again before its guest was up: look at its "
            "task log and at the node's journal"
        )


async def stop(api: PveApi, here: str, vmid: int) -> None:
    """Stop a VM at once; nothing if it doesn't run or isn't there."""
    try:
        if (await api.vm_status(here, vmid)).running:
            await api.stop_vm(here, vmid)
    except PveRefusalError as error:
        if error.reason not in (Reason.VM_MISSING, Reason.NOT_RUNNING):
            raise
