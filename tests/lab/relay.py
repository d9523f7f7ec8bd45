# SPDX-License-Identifier: Apache-2.0
"""In front of a QEMU socket: one client at a time, and who held it for how long.

QEMU serves one client per monitor; others wait in the kernel's backlog. The relay
keeps exactly that (``listen(1)``, next client only when the last one is gone) and
records each session: seconds, commands, and whether it was the lab's own PVE code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAB_MARK = b"\0pve-lab-"
"""Abstract address the lab's own clients bind to before they connect."""
_serial = iter(range(1 << 62))


@dataclass(slots=True)
class Session:
    """One client's hold of the socket."""

    started: float
    lab: bool
    ended: float | None = None
    waited: float = 0.0
    """Seconds that an ``Answer`` took, which are not the client's."""
    commands: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started - self.waited


Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
"""May answer a command itself (a dict), or leave it to QEMU (None)."""


class Silence(Exception):
    """Raised by an ``Answer``: say nothing, as a dead agent does."""


class Relay:
    """Listens at ``path``, passes one client at a time on to ``path.real``."""

    def __init__(
        self, path: Path, *, answer: Answer | None = None, agent: bool = False
    ) -> None:
        self.path = path
        self.answer = answer
        self.agent = agent
        self.sessions: list[Session] = []
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        self._socket.bind(str(self.path))
        os.chmod(self.path, 0o660)
        self._socket.listen(1)
        self._task = asyncio.create_task(self._serve(), name=f"relay {self.path.name}")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._socket:
            self._socket.close()
        self.path.unlink(missing_ok=True)
        self._task = self._socket = None

    def holds(self, *, lab: bool = False) -> list[Session]:
        """Sessions of others (``lab=False``) or of the lab's own PVE code."""
        return [s for s in self.sessions if s.lab == lab]

    def max_hold_s(self) -> float:
        """The longest time anybody but the lab itself held the socket."""
        return max((s.seconds for s in self.holds()), default=0.0)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._socket
        while True:
            client, address = await loop.sock_accept(self._socket)
            lab = isinstance(address, bytes) and address.startswith(LAB_MARK)
            session = Session(time.monotonic(), lab)
            self.sessions.append(session)
            try:
                await self._one(client, session)
            except OSError:
                pass  # the client or QEMU went away: the next one is served
            finally:
                client.close()
                session.ended = time.monotonic()

    async def _one(self, client: socket.socket, session: Session) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket(socket.AF_UNIX)
        server.setblocking(False)
        try:
            try:
                await self._connect(server)
            except (FileNotFoundError, ConnectionRefusedError):
                return
            up = asyncio.create_task(self._up(client, server, session))
            down = asyncio.create_task(_pump(loop, server, client))
            _, pending = await asyncio.wait(
                (up, down), return_when=asyncio.FIRST_COMPLETED
            )
            for task in pending:
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        finally:
            server.close()

    async def _connect(self, server: socket.socket) -> None:
        """Wait as long as QEMU has not noticed yet that the last client is gone."""
        while True:
            try:
                server.connect(f"{self.path}.real")
            except BlockingIOError:  # its backlog of one is full
                await asyncio.sleep(0.01)
            else:
                return

    async def _up(
        self, client: socket.socket, server: socket.socket, session: Session
    ) -> None:
        """Client to QEMU: command by command, so that they can be recorded."""
        loop = asyncio.get_running_loop()
        buffer = ""
        decoder = json.JSONDecoder()
        while data := await loop.sock_recv(client, 1 << 16):
            buffer += data.decode("latin-1")
            while True:
                text = buffer.lstrip(" \r\n\t\xff")
                if not text:
                    buffer = "\xff" if "\xff" in buffer else ""
                    break
                lead = buffer[: len(buffer) - len(text)]
                try:
                    command, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    break
                buffer = text[end:]
                raw = (lead + text[:end] + "\n").encode("latin-1")
                name = str(command.get("execute", "?"))
                session.commands.append(name)
                asked = time.monotonic()
                try:
                    reply = await self.answer(command) if self.answer else None
                except Silence:
                    continue
                finally:
                    session.waited += time.monotonic() - asked
                if reply is None:
                    await loop.sock_sendall(server, raw)
                else:
                    start = b"\xff" if name == "guest-sync-delimited" else b""
                    line = json.dumps(reply).encode() + b"\n"
                    await loop.sock_sendall(client, start + line)


async def _pump(
    loop: asyncio.AbstractEventLoop, source: socket.socket, target: socket.socket
) -> None:
    while data := await loop.sock_recv(source, 1 << 16):
        await loop.sock_sendall(target, data)


class QmpRefused(Exception):
    """QEMU answered with an error."""


async def lab_connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect as the lab, with PVE's patience: every 0.1 s until the time is up."""
    end = time.monotonic() + max(timeout_s, 1.0)
    tries = 0
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.bind(LAB_MARK + f"{os.getpid()}-{next(_serial)}".encode())
        tries += 1
        try:
            client.connect(str(path))
        except (BlockingIOError, FileNotFoundError, ConnectionRefusedError) as error:
            client.close()
            if time.monotonic() > end:
                raise TimeoutError(
                    f"unable to connect to {path.name} socket - timeout after "
                    f"{tries} retries"
                ) from error
            await asyncio.sleep(0.1)
        else:
            return client


async def exchange(
    path: Path,
    commands: list[dict[str, Any]],
    *,
    timeout_s: float,
    agent: bool = False,
) -> list[Any]:
    """One short session: connect, say ``commands``, return their answers, leave.

    Raises:
        TimeoutError: nobody answered in time. QmpRefused: an error was answered.
    """
    reader, writer = await _greeted(path, timeout_s, agent)
    results = []
    try:
        async with asyncio.timeout(timeout_s):
            if agent:
                ident = next(_serial) + 1
                sync = {"execute": "guest-sync-delimited", "arguments": {"id": ident}}
                writer.write(b"\xff" + json.dumps(sync).encode() + b"\n")
                while (
                    json.loads(
                        (await _line(reader)).rpartition(b"\xff")[2] or b"{}"
                    ).get("return")
                    != ident
                ):
                    pass
            else:
                commands = [{"execute": "qmp_capabilities"}, *commands]
            for command in commands:
                # QEMU gives the answer to a command whose sender died to the next
                # client: by its number we know our own.
                number = {} if agent else {"id": f"lab-{next(_serial)}"}
                writer.write(json.dumps({**command, **number}).encode() + b"\n")
                reply = {"event": ""}
                while "event" in reply or reply.get("id") != number.get("id"):
                    reply = json.loads(await _line(reader))
                if "error" in reply:
                    raise QmpRefused(reply["error"]["desc"])
                results.append(reply["return"])
    except TimeoutError:
        raise TimeoutError("got timeout") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return results if agent else results[1:]


async def _greeted(
    path: Path, timeout_s: float, agent: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect and, at a monitor, read the greeting.

    QEMU may close the next client's connection while it is still at the last one's;
    before the greeting nothing was said that could be lost.
    """
    until = time.monotonic() + timeout_s
    while True:
        async with asyncio.timeout(timeout_s + 1):
            client = await lab_connect(path, timeout_s)
        reader, writer = await asyncio.open_unix_connection(sock=client, limit=1 << 26)
        try:
            if not agent:
                async with asyncio.timeout(timeout_s):
                    await _line(reader)
        except BaseException as error:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            if isinstance(error, TimeoutError):
                raise TimeoutError("got timeout") from None
            if not isinstance(error, ConnectionError) or time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)
        else:
            return reader, writer


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("client closed connection")
    return line
