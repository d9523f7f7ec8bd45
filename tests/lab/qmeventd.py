# SPDX-License-Identifier: Apache-2.0
"""qmeventd's stand-in: ends QEMU after a guest shutdown unless a backup is registered.

QEMU connects to the socket as a monitor (chardev ``qmp-event``); a backup connects and
writes ``{"vzdump":{"vmid":"ID"}}`` and stays connected for the job's length.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any


class Qmeventd:
    """The service on ``/var/run/qmeventd.sock`` of one node."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backups: Counter[int] = Counter()
        """VM id -> registered backups."""
        self.events: list[tuple[int, str]] = []
        self._down: dict[int, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._client, str(self.path))

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        vmid: int | None = None
        registered: int | None = None
        try:
            async for message in _messages(reader):
                if "QMP" in message:
                    vmid = _vmid_of(writer.get_extra_info("socket"))
                    writer.write(b'{"execute":"qmp_capabilities"}\n')
                elif "vzdump" in message:
                    registered = int(message["vzdump"]["vmid"])
                    self.backups[registered] += 1
                elif vmid and "event" in message:
                    self.events.append((vmid, message["event"]))
                    if message["event"] == "SHUTDOWN":
                        self._down[vmid] = writer
                        self._quit_unless_backup(vmid)
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # a client that broke off; the clean-up below is the answer
        finally:
            if registered is not None:
                self.backups[registered] -= 1
                self._quit_unless_backup(registered)
            if vmid is not None and self._down.get(vmid) is writer:
                del self._down[vmid]
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._tasks.discard(task)

    def _quit_unless_backup(self, vmid: int) -> None:
        writer = self._down.get(vmid)
        if writer and not self.backups[vmid]:
            writer.write(b'{"execute":"quit"}\n')


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Objects one after the other; no end of line is needed, as with json-c."""
    parse = json.JSONDecoder().raw_decode
    text = ""
    while data := await reader.read(65536):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                message, end = parse(text)
            except ValueError:
                break  # the rest of it is still to come
            text = text[end:].lstrip()
            yield message


def _vmid_of(connection: socket.socket) -> int | None:
    """The VM whose QEMU is at the other end, from its ``-pidfile``."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = struct.unpack("3i", raw)[0]
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    for option, value in itertools.pairwise(argv):
        if option == b"-pidfile":
            return int(Path(value.decode()).stem)
    return None
