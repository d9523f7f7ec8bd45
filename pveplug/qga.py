# SPDX-License-Identifier: Apache-2.0
"""The guest agent over its socket on this node: ping, freeze, status, thaw.

For who has no API credential (the watchdog, the clean-up) or needs a bound: PVE's own
freeze call waits up to an hour for a dead agent. Standard library only and cheap to
import, because the watchdog has to be up before the freeze.

The channel serves one client at a time; the kernel lets the next one connect and wait.
So "busy", "hanging" and "no agent" look the same: silence until the deadline. What an
earlier client left unread comes first; ``guest-sync-delimited`` finds the seam: we send
0xFF (it resets the agent's parser) and the command with a number, and drop all we read
up to a 0xFF that is followed by our number.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pveplug.errors import RemoteProtocolError, RequestError, TransportError

_MAX_LINE: Final = 64 * 1024
_SYNC_ROUNDS: Final = 64
_SENTINEL: Final = b"\xff"

PING_S: Final = 3.0
"""What PVE allows an agent before it freezes."""
FREEZE_S: Final = 60.0
THAW_S: Final = 10.0

T = TypeVar("T")


class GuestAgentError(RequestError):
    """The agent answered with an error.

    Attributes:
        command: what was asked; ``desc``: the agent's words.
    """

    def __init__(self, command: str, desc: str) -> None:
        super().__init__(f"the guest agent refused {command}: {desc}")
        self.command = command
        self.desc = desc


class GuestAgent:
    """Short blocking sessions with one VM's agent: connect, ask, leave.

    Every method takes one deadline for all of it and raises :class:`TransportError`
    when nobody answers by then, :class:`GuestAgentError` when the agent refuses and
    :class:`RemoteProtocolError` when what comes back makes no sense.
    """

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path

    def ping(self, timeout_s: float = PING_S) -> None:
        """Return if the agent answers."""
        self.ask("guest-ping", timeout_s)

    def freeze_status(self, timeout_s: float = PING_S) -> str:
        """Return ``thawed`` or ``frozen``."""
        return str(self.ask("guest-fsfreeze-status", timeout_s))

    def freeze(self, timeout_s: float = FREEZE_S) -> int:
        """Freeze the guest's file systems; returns how many.

        After a :class:`TransportError` the guest may still freeze: thaw it.
        """
        return self._count("guest-fsfreeze-freeze", timeout_s)

    def thaw(self, timeout_s: float = THAW_S) -> int:
        """Thaw the guest's file systems; returns how many. Harmless when thawed."""
        return self._count("guest-fsfreeze-thaw", timeout_s)

    def _count(self, command: str, timeout_s: float) -> int:
        result = self.ask(command, timeout_s)
        if not isinstance(result, int):
            raise RemoteProtocolError(f"the guest agent answered {command} {result!r}")
        return result

    def ask(self, command: str, timeout_s: float) -> Any:
        """Open a session, synchronise, send one command and return its result."""
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            try:
                channel.settimeout(timeout_s)
                channel.connect(self.socket_path)
                session = _Session(channel, deadline)
                session.synchronise()
                session.send({"execute": command})
                answer = session.line()
            except TimeoutError:
                raise TransportError(
                    f"the guest agent at {self.socket_path} did not answer {command} "
                    f"within {timeout_s:g} s: it isn't running, hangs, or another "
                    "program holds its channel"
                ) from None
            except OSError as error:
                raise TransportError(
                    f"the guest agent's channel {self.socket_path}: "
                    f"{error.strerror or error}. Is the VM running with 'agent: 1'?"
                ) from error
        if isinstance(refused := answer.get("error"), dict):
            raise GuestAgentError(command, str(refused.get("desc"))[:300])
        if "return" not in answer:
            raise RemoteProtocolError(f"the guest agent answered {command} {answer!r}")
        return answer["return"]


class _Session:
    """One connection; raises TimeoutError at the deadline, OSError when it breaks."""

    def __init__(self, channel: socket.socket, deadline: float) -> None:
        self._channel = channel
        self._deadline = deadline
        self._buffer = bytearray()

    def send(self, message: dict[str, Any], prefix: bytes = b"") -> None:
        self._arm()
        self._channel.sendall(prefix + json.dumps(message).encode() + b"\n")

    def synchronise(self) -> None:
        """Skip what others left behind, up to the answer to our own number."""
        number = int.from_bytes(os.urandom(4), "big") >> 1
        self.send(
            {"execute": "guest-sync-delimited", "arguments": {"id": number}}, _SENTINEL
        )
        for _ in range(_SYNC_ROUNDS):
            while (cut := self._buffer.rfind(_SENTINEL)) < 0:
                self._buffer.clear()  # stale, however long: never kept
                self._receive()
            del self._buffer[: cut + 1]
            line = self._raw_line()
            if _SENTINEL in line:  # a second sentinel came behind a stale answer
                line = line.rpartition(_SENTINEL)[2]
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            if isinstance(answer, dict) and answer.get("return") == number:
                return
        raise RemoteProtocolError("the guest agent never answered our synchronisation")

    def line(self) -> dict[str, Any]:
        raw = self._raw_line()
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RemoteProtocolError(f"the guest agent sent {bytes(raw[:80])!r}")
        return answer

    def _raw_line(self) -> bytearray:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_LINE:
                raise RemoteProtocolError(
                    f"the guest agent's answer is longer than {_MAX_LINE} bytes"
                )
            self._receive()
        line = self._buffer[:end]
        del self._buffer[: end + 1]
        return line

    def _receive(self) -> None:
        self._arm()
        data = self._channel.recv(4096)
        if not data:
            raise ConnectionResetError("closed by QEMU; the VM ended or restarts")
        self._buffer += data

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._channel.settimeout(left)


class AsyncGuestAgent:
    """:class:`GuestAgent` for coroutines: each call runs in a thread.

    Cancelling leaves the thread to end by its own deadline; a cancelled ``freeze`` may
    still take effect, so thaw after it.
    """

    def __init__(self, socket_path: str) -> None:
        self.agent = GuestAgent(socket_path)

    async def ping(self, timeout_s: float = PING_S) -> None:
        """Return if the agent answers."""
        await self._threaded(lambda: self.agent.ping(timeout_s))

    async def freeze_status(self, timeout_s: float = PING_S) -> str:
        """Return ``thawed`` or ``frozen``."""
        return await self._threaded(lambda: self.agent.freeze_status(timeout_s))

    async def freeze(self, timeout_s: float = FREEZE_S) -> int:
        """Freeze the guest's file systems; returns how many."""
        return await self._threaded(lambda: self.agent.freeze(timeout_s))

    async def thaw(self, timeout_s: float = THAW_S) -> int:
        """Thaw the guest's file systems; returns how many."""
        return await self._threaded(lambda: self.agent.thaw(timeout_s))

    async def _threaded(self, function: Callable[[], T]) -> T:
        import asyncio  # here: the watchdog does without

        return await asyncio.to_thread(function)
