# SPDX-License-Identifier: Apache-2.0
"""A process that thaws the guest when the job can't any more.

Started before the freeze, in its own session, so that it outlives a killed backend::

    async with ThawWatchdog(vmid, node.qga_socket(vmid), budget_s=20) as watchdog:
        await agent.freeze()
        …                                # the point in time
        await agent.thaw()
    if watchdog.fired: …                 # the freeze ended early: not consistent

The child waits for ``disarm`` on its stdin. End of file (the parent died), SIGTERM or
the end of the budget make it thaw through the agent's socket, trying for a minute. It
runs as a plain script with ``python -I -S`` and imports next to nothing: it is ready in
well under 100 ms, and says so before the freeze begins.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # a script: make "pveplug" importable without running it
    import types

    _package = types.ModuleType("pveplug")
    _package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["pveplug"] = _package

import signal
import syslog
import time
from typing import TYPE_CHECKING, Final

from pveplug.errors import PveplugError, TransportError
from pveplug.qga import GuestAgent

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType
    from typing import Self

_SCRIPT: Final = os.path.abspath(__file__)
DISARMED: Final = 0
THAWED: Final = 3
FAILED: Final = 4
RETRY_S: Final = 60.0
LATE_S: Final = 2.0
_START_S: Final = 10.0
_STEP_S: Final = 5.0


class _TerminatedError(Exception):
    """SIGTERM arrived: whoever stops us wants the guest left alone, thawed."""


def main(
    vmid: int, qga_socket: str, budget_s: float, *, retry_s: float = RETRY_S
) -> int:
    """Watch until disarmed, or thaw; returns the process's exit status."""

    def terminated(signum: int, frame: object) -> None:
        raise _TerminatedError

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal.signal(signal.SIGTERM, terminated)
        _write(1, b"ready\n")
        why = _wait(0, budget_s)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except _TerminatedError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        why = "it was told to end"
    if not why:
        return DISARMED
    _log(f"vm={vmid} thawing the guest because {why}")
    agent = GuestAgent(qga_socket)
    if not _thaw(vmid, agent, retry_s):
        return FAILED
    # A freeze that was on its way when its sender died comes after our thaw.
    time.sleep(LATE_S)
    return THAWED if _thaw(vmid, agent, retry_s) else FAILED


def _wait(fd: int, budget_s: float) -> str:
    """Return why the guest must be thawed, or nothing if the parent did it."""
    import select

    deadline = time.monotonic() + budget_s
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([fd], [], [], left)
        if not ready:
            break
        try:
            data = os.read(fd, 64)
        except OSError:
            data = b""
        if not data:
            return "the job's process died"
        said = (said + data)[-64:]
        if b"disarm\n" in said or b"thawed\n" in said:
            return ""
    return f"the freeze lasted over {budget_s:g} s"


def _thaw(vmid: int, agent: GuestAgent, retry_s: float) -> bool:
    deadline = time.monotonic() + retry_s
    while True:
        try:
            count = agent.thaw(_STEP_S)
            if (state := agent.freeze_status(_STEP_S)) == "thawed":
                _log(f"vm={vmid} thawed file_systems={count}")
                return True
            problem = f"the guest says it is {state}"
        except PveplugError as error:
            if not os.path.exists(agent.socket_path):
                _log(f"vm={vmid} ended; there is nothing to thaw")
                return True
            problem = str(error)
        if time.monotonic() >= deadline:
            _log(
                f"vm={vmid} STILL FROZEN: {problem}. Run: qm agent {vmid} fsfreeze-thaw"
            )
            return False
        time.sleep(0.5)


def _log(text: str) -> None:
    syslog.openlog("podheitor-proxmox-watchdog", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, text)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    _write(2, f"{stamp} watchdog {text}\n".encode("utf-8", "backslashreplace"))


def _write(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError:
        pass  # nobody listens any more: that is why we are here


class ThawWatchdog:
    """Starts the watchdog process and tells it that all went well.

    An async context manager: entered, the process watches (``start``); left, it has
    ended (``disarm``), also when the body raised. Thaw inside, in a ``finally``.

    Attributes:
        fired: the process thawed the guest before it was disarmed, or died: what was
            done meanwhile can't count on a frozen guest.
    """

    def __init__(
        self,
        vmid: int,
        qga_socket: str,
        *,
        budget_s: float,
        log_file: str = "",
        retry_s: float = RETRY_S,
    ) -> None:
        self._arguments = [str(vmid), qga_socket, repr(budget_s), repr(retry_s)]
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None
        self.fired = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.disarm()

    async def start(self) -> None:
        """Return when the process watches.

        Raises:
            TransportError: it didn't come up: don't freeze.
        """
        import asyncio
        import subprocess

        log = self._log_fd()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                _SCRIPT,
                *self._arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if log is None else log,
                start_new_session=True,
            )
        except OSError as error:
            raise TransportError(f"the thaw watchdog can't start: {error}") from error
        finally:
            if log is not None:
                os.close(log)
        self._process = process
        said = b""
        try:
            async with asyncio.timeout(_START_S):
                if process.stdout is not None:
                    said = await process.stdout.readline()
        except TimeoutError:
            pass
        finally:
            if said != b"ready\n":  # also when cancelled
                self._process = None
                _kill(process)
                await asyncio.shield(process.wait())
        if said != b"ready\n":
            raise TransportError("the thaw watchdog did not come up: not freezing")

    async def disarm(self) -> bool:
        """Tell the process that the guest is thawed; returns ``fired``.

        A process that is busy thawing is left to it for a while, then left alone: it
        ends by itself. Calling this twice does no harm.
        """
        import asyncio

        process, self._process = self._process, None
        if process is None:
            return self.fired
        if (channel := process.stdin) is not None:
            try:
                channel.write(b"disarm\n")
                await channel.drain()
            except OSError:
                pass  # it has ended: its status tells how
        try:
            async with asyncio.timeout(_START_S):
                self.fired = await process.wait() != DISARMED
        except TimeoutError:
            self.fired = True
        finally:
            if channel is not None:
                channel.close()
        return self.fired

    def take_over(self) -> None:
        """Let the process thaw now, and by itself: we can't."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            self.fired = True
            process.stdin.close()

    def _log_fd(self) -> int | None:
        if not self._log_file:
            return None
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(self._log_file, flags, 0o640)
        except OSError:
            return None  # syslog has it too


def _kill(process: asyncio.subprocess.Process) -> None:
    try:
        process.kill()
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(
        main(
            int(sys.argv[1]),
            sys.argv[2],
            float(sys.argv[3]),
            retry_s=float(sys.argv[4]),
        )
    )
