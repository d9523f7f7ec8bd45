# SPDX-License-Identifier: Apache-2.0
"""The sockets of a VM that plays what a test wrote: monitor, agent, serial console."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pveplug.node import Node
from tests.support.screens import as_ppm, drawn, registers

VMID = 100
GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
        "capabilities": [],
    }
}


class WatchedVm:
    """``async with WatchedVm(folder) as vm``; change its attributes at any time.

    Attributes:
        status: what ``query-status`` says; bytes are sent as they are.
        registers: what ``info registers`` says.
        picture: what ``screendump`` writes; a callable does it by itself.
        agent: whether it answers pings, is silent, or sends bytes.
        serial: what the console sends to each that connects.
        commands: what the monitor was told.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = Node(qemu_run_dir=str(folder), runtime_dir=str(folder / "run"))
        self.status: str | bytes = "running"
        self.registers = registers("linux-idle")
        self.picture: bytes | Callable[[Path], None] | None = as_ppm(
            drawn("login:" * 9)
        )
        self.agent: bool | bytes = False
        self.serial: bytes = b""
        self.serial_ends = False
        self.flood: bytes = b""
        self.commands: list[str] = []
        self.console_clients = 0
        self._servers: dict[str, asyncio.Server] = {}
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        for name, serve in (
            ("qmp", self._monitor),
            ("qga", self._agent),
            ("serial0", self._console),
        ):
            await self.listen(name, serve)
        return self

    async def listen(self, name: str, serve: Any) -> None:
        async def client(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            task = asyncio.current_task()
            assert task
            self._tasks.add(task)
            self._clients.add(writer)
            try:
                with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                    await serve(reader, writer)
            finally:
                writer.close()
                self._clients.discard(writer)
                self._tasks.discard(task)

        path = self.folder / f"{VMID}.{name}"
        self._servers[name] = await asyncio.start_unix_server(client, str(path))

    async def looked(self, command: str, times: int = 1) -> None:
        """Wait until the monitor was told a command so many times more."""
        wanted = self.commands.count(command) + times
        async with asyncio.timeout(30):
            while self.commands.count(command) < wanted:
                await asyncio.sleep(0.01)

    async def vanish(self, *names: str) -> None:
        """Close sockets as QEMU does when it ends; all of them without names."""
        for name in names or tuple(self._servers):
            server = self._servers.pop(name)
            server.close()
            (self.folder / f"{VMID}.{name}").unlink(missing_ok=True)
        if not names:
            for writer in list(self._clients):
                writer.transport.abort()

    async def __aexit__(self, *_: object) -> None:
        await self.vanish()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def _monitor(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        buffer = ""
        while data := await reader.read(65536):
            buffer += data.decode()
            message, end = json.JSONDecoder().raw_decode(buffer)
            buffer = buffer[end:].lstrip()
            name = message["execute"]
            self.commands.append(name)
            answer = self._answer(name, message.get("arguments", {}))
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                tag = {"id": message["id"]} if "id" in message else {}
                writer.write(json.dumps({**answer, **tag}).encode() + b"\r\n")
            await writer.drain()

    def _answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any] | bytes:
        match name:
            case "query-status":
                if isinstance(self.status, bytes):
                    return self.status
                return {"return": {"status": self.status, "running": True}}
            case "cont":
                self.status = "running"
            case "human-monitor-command":
                return {"return": self.registers}
            case "screendump":
                path = Path(arguments["filename"])
                if self.picture is None:
                    return {
                        "error": {"class": "GenericError", "desc": "no VGA to dump"}
                    }
                if callable(self.picture):
                    self.picture(path)
                else:
                    path.write_bytes(self.picture)
        return {"return": {}}

    async def _agent(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while line := await reader.readline():
            if self.agent is False:
                await asyncio.Event().wait()
            if isinstance(self.agent, bytes):
                writer.write(self.agent)
                await writer.drain()
                continue
            found = re.search(rb'"id": *(\d+)', line)
            said = b"\xff" + b'{"return": %s}\n' % found[1] if found else b"{}"
            writer.write(said if found else b'{"return": {}}\n')
            await writer.drain()

    async def _console(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.console_clients += 1
        writer.write(self.serial)
        await writer.drain()
        while self.flood:
            writer.write(self.flood)
            await writer.drain()
            await asyncio.sleep(0)
        if not self.serial_ends:
            await reader.read()
