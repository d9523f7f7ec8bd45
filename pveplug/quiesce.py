# SPDX-License-Identifier: Apache-2.0
"""Holding the guest's file systems still for the instant of a point in time.

A guest that stays frozen is as bad as one that lost data. So: the agent is pinged
first, the freeze has a budget, the thaw stands in ``finally``, and a watchdog process
that outlives us thaws if we don't come back. Whatever goes wrong degrades the backup to
crash-consistent and says so; it never fails the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import textwrap
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from pveplug.errors import JobError, PveplugError
from pveplug.events import Reporter
from pveplug.journal import Journal
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.tasks import to_the_end
from pveplug.watchdog import ThawWatchdog

log = logging.getLogger(__name__)

PING_S: Final = 8.0
"""PVE itself waits 3 s for an agent's answer."""
THAW_S: Final = 30.0
NEVER_ASKED: Final = (Reason.PERMISSION, Reason.LOGIN, Reason.AGENT_MISSING)
"""Refusals of PVE's own, before the guest hears of a freeze."""
SETTLE_S: Final = 15.0
"""What the watchdog grants beyond the freeze for the switch and the thaw."""


class Agent(Protocol):
    """The guest agent of one VM."""

    async def ping(self) -> None: ...

    async def freeze(self) -> int: ...

    async def thaw(self) -> int: ...


@dataclass(slots=True)
class Verdict:
    """How consistent the point in time is, and why."""

    text: str = "crash-consistent"
    frozen: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What the plug-in string and the VM's configuration ask for."""

    quiesce: Literal["auto", "yes", "no"]
    timeout_s: float
    agent: bool
    """The VM has ``agent: 1``."""
    freeze_allowed: bool
    """The VM doesn't say ``freeze-fs=0``."""
    running: bool
    """Running, not paused: a paused guest can't answer and writes nothing."""
    windows: bool = False


@contextlib.asynccontextmanager
async def frozen(
    agent: Agent, wish: Wish, watchdog: ThawWatchdog, journal: Journal, say: Reporter
) -> AsyncIterator[Verdict]:
    """Hold the guest still within the block, if that is possible.

    The block must be short. Yields the verdict; it may still get worse at the thaw.

    Args:
        watchdog: not started yet, with a budget of ``wish.timeout_s + SETTLE_S``.
    """
    verdict = Verdict()
    vmid = journal.entry.vmid
    why = _why_not(wish)
    if why is None:
        why = await _silent(agent)
    if why is not None:
        verdict.text = f"crash-consistent ({_brief(why)})"
        (say.warning if wish.quiesce == "yes" else say.info)(
            f"VM {vmid}: not frozen: {why}; the backup is crash-consistent"
        )
        yield verdict
        return
    async with contextlib.AsyncExitStack() as stack:
        try:
            await watchdog.start()
        except (PveplugError, OSError) as error:
            say.warning(
                f"VM {vmid}: not frozen: no watchdog could be started ({error}); the "
                "backup is crash-consistent"
            )
            verdict.text = "crash-consistent (no watchdog)"
            yield verdict
            return
        stack.push_async_callback(
            lambda: to_the_end(_thaw(agent, watchdog, journal, say, verdict))
        )
        journal.note(frozen=True)
        try:
            async with asyncio.timeout(wish.timeout_s):
                verdict.frozen = await agent.freeze()
        except (TimeoutError, PveplugError) as error:
            if isinstance(error, PveRefusalError) and error.reason in NEVER_ASKED:
                # Neither was the guest frozen, nor would a thaw be let through.
                stack.pop_all()
                await watchdog.disarm()
                journal.undone(frozen=False)
            reason = str(error) or f"no answer in {wish.timeout_s:.0f} s"
            verdict.text = f"crash-consistent (freeze failed: {_brief(reason)})"
            say.warning(
                f"VM {journal.entry.vmid}: the guest agent did not freeze: {reason}; "
                "the backup is crash-consistent"
            )
        else:
            kind = "application" if wish.windows else "filesystem"
            verdict.text = f"{kind}-consistent ({verdict.frozen} filesystems frozen)"
        yield verdict


def _brief(reason: str) -> str:
    """Return the head of a reason; the warning has all of it."""
    return textwrap.shorten(reason.partition(". ")[0], 120, placeholder=" …")


def _why_not(wish: Wish) -> str | None:
    if wish.quiesce == "no":
        return "quiesce=no"
    if not wish.running:
        return "the VM is paused"
    if not wish.agent:
        return "the VM has no guest agent configured (agent: 1)"
    if not wish.freeze_allowed and wish.quiesce == "auto":
        return "the VM's agent option says freeze-fs=0"
    return None


async def _silent(agent: Agent) -> str | None:
    try:
        async with asyncio.timeout(PING_S):
            await agent.ping()
    except TimeoutError:
        return "the guest agent hangs (no answer to a ping)"
    except PveplugError as error:
        return str(error)
    return None


async def _thaw(
    agent: Agent,
    watchdog: ThawWatchdog,
    journal: Journal,
    say: Reporter,
    verdict: Verdict,
) -> None:
    """Thaw; where that fails the watchdog goes on trying without us."""
    try:
        async with asyncio.timeout(THAW_S):
            thawed = await agent.thaw()
    except (TimeoutError, PveplugError) as error:
        say.warning(
            f"VM {journal.entry.vmid}: the thaw got no answer ({error or 'time-out'}); "
            "a watchdog goes on thawing for a minute"
        )
        watchdog.take_over()
        return
    fired = await watchdog.disarm()
    journal.undone(frozen=False)
    if verdict.frozen and (fired or not thawed):
        # Windows ends a freeze by itself after 10 s; somebody else may have thawed.
        verdict.text = "crash-consistent (the guest thawed before the snapshot)"
        say.warning(
            f"VM {journal.entry.vmid}: the guest had thawed itself before the thaw came"
        )


async def run_hook(
    command: str, what: str, environment: Mapping[str, str], timeout_s: float
) -> str:
    """Run a hook program; returns what it printed, one line.

    Raises:
        JobError: it failed, or ran too long and was killed with its children.
    """
    argv = shlex.split(command)
    remedy = f"see what {argv[0]} needs, or leave {what} out."
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except OSError as error:
        raise JobError(
            f"cannot run {argv[0]}: {error.strerror or error}.",
            vm=environment.get("PVEPLUG_VMID"),
            phase=what,
            remedy=remedy,
        ) from error
    try:
        async with asyncio.timeout(timeout_s):
            printed, _ = await process.communicate()
    except TimeoutError as error:
        raise JobError(
            f"{argv[0]} ran longer than {timeout_s:.0f} s and was killed.",
            vm=environment.get("PVEPLUG_VMID"),
            phase=what,
            remedy="mend the program or raise hook_timeout.",
        ) from error
    finally:
        if process.returncode is None:
            # Its children hold the pipe too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    text = printed.decode(errors="replace")
    if process.returncode:
        said = " ".join(text.split())[-400:] or "it said nothing"
        raise JobError(
            f"{argv[0]} ended with status {process.returncode}: {said}.",
            vm=environment.get("PVEPLUG_VMID"),
            phase=what,
            remedy=remedy,
        )
    return " ".join(text.split())[:400]
