# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that cuts, hangs, delays and slows what passes through it.

::

    async with CuttingProxy(receiver_port) as proxy:
        proxy.cut_next(Way.UP, 100_000)      # after exactly so many bytes
        …                                    # connect to proxy.port
        assert proxy.connections[0].cut

``UP`` is from who connects to who listens. A cut by ``How.CLOSE`` lets exactly so many
bytes of that way arrive, then both ends see the end of the stream. ``How.RESET`` sends
RST, which may also take away what the peers had not read yet. ``How.HANG`` leaves the
connection open and silent in both ways, as a firewall that has forgotten it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Self

CHUNK = 64 << 10


class Way(enum.Enum):
    UP = "up"
    DOWN = "down"


class How(enum.Enum):
    CLOSE = "close"
    RESET = "reset"
    HANG = "hang"


@dataclass(frozen=True)
class Cut:
    """What ends a connection: so many bytes in one way."""

    way: Way
    after: int
    how: How


@dataclass(eq=False)
class Connection:
    """One connection; ``passed`` counts the bytes handed on, by way.

    Attributes:
        cut: it was cut, or hangs, by us.
        over: nothing is forwarded any more.
    """

    plan: Cut | None
    writers: dict[Way, asyncio.StreamWriter]
    passed: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(Way, 0))
    cut: bool = False
    hangs: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def up(self) -> int:
        return self.passed[Way.UP]

    @property
    def down(self) -> int:
        return self.passed[Way.DOWN]


class CuttingProxy:
    """Listens on a free loopback port while its block lasts.

    Attributes:
        port: where to connect to; ``target``: the port of who really listens.
        connections: all there have been, in order.
        rate: bytes per second and way; 0 is no limit.
        delay_s: how long each piece waits before it is handed on.
    """

    def __init__(self, target: int, *, host: str = "127.0.0.1") -> None:
        self.target = target
        self.host = host
        self.port = 0
        self.connections: list[Connection] = []
        self.rate = 0
        self.delay_s = 0.0
        self._plans: deque[Cut | None] = deque()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self.connections:
            _end(connection, How.CLOSE)
            for writer in connection.writers.values():
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        await self._server.wait_closed()

    # --- orders ----------------------------------------------------------------------

    def cut_next(self, way: Way, after: int, how: How = How.CLOSE) -> None:
        """Cut the next connection that has no order yet after exactly ``after`` bytes.

        Called several times, each order is for one connection more.
        """
        self._plans.append(Cut(way, after, how))

    def spare_next(self) -> None:
        """Let the next connection without an order be."""
        self._plans.append(None)

    def cut_now(self, how: How = How.CLOSE) -> None:
        """Cut every connection there is."""
        for connection in self.connections:
            if not connection.over.is_set():
                self._cut(connection, how)

    def hang(self) -> None:
        """Hand nothing on, of any connection, until :meth:`go_on`."""
        self._flows.clear()

    def go_on(self) -> None:
        self._flows.set()

    def passed(self, way: Way) -> int:
        """Return the bytes of all connections together."""
        return sum(connection.passed[way] for connection in self.connections)

    # --- what passes -----------------------------------------------------------------

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            try:
                far_reader, far = await asyncio.open_connection(self.host, self.target)
            except OSError:
                _reset(writer)  # as if nobody listened
                return
            plan = self._plans.popleft() if self._plans else None
            connection = Connection(plan, {Way.UP: far, Way.DOWN: writer})
            self.connections.append(connection)
            if plan and plan.after == 0:
                self._cut(connection, plan.how)
            pumps = [
                asyncio.create_task(self._pump(connection, way, source))
                for way, source in ((Way.UP, reader), (Way.DOWN, far_reader))
            ]
            over = asyncio.create_task(connection.over.wait())
            try:
                both = asyncio.gather(*pumps, return_exceptions=True)
                await asyncio.wait({both, over}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in (*pumps, over):
                    pump.cancel()
                await asyncio.gather(*pumps, over, return_exceptions=True)
            if connection.hangs:
                await asyncio.Event().wait()  # until the proxy itself ends
            connection.over.set()
            _end(connection, How.CLOSE)
        except asyncio.CancelledError:
            writer.close()
        finally:
            self._tasks.discard(task)

    async def _pump(
        self, connection: Connection, way: Way, source: asyncio.StreamReader
    ) -> None:
        writer, plan = connection.writers[way], connection.plan
        limit = plan.after if plan and plan.way is way else None
        with contextlib.suppress(OSError):
            while True:
                await self._flows.wait()
                wanted = CHUNK
                if self.rate:
                    wanted = max(1, min(CHUNK, self.rate // 20))
                if limit is not None:
                    # Never more than may pass: the rest stays with the peer's kernel.
                    wanted = min(wanted, limit - connection.passed[way])
                data = await source.read(wanted)
                if not data:
                    break
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
                connection.passed[way] += len(data)
                if connection.passed[way] == limit:
                    assert plan
                    self._cut(connection, plan.how)
                    return
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
            writer.write_eof()
            return
        connection.over.set()  # one end is gone without a word: the other hears it

    def _cut(self, connection: Connection, how: How) -> None:
        connection.cut = True
        connection.hangs = how is How.HANG
        connection.over.set()
        if how is not How.HANG:
            _end(connection, how)


def _end(connection: Connection, how: How) -> None:
    """Close both ends; what was written before still goes out, but for a reset."""
    for writer in connection.writers.values():
        if how is How.RESET:
            _reset(writer)
        else:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    if (raw := writer.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            now = struct.pack("ii", 1, 0)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
    writer.transport.abort()
