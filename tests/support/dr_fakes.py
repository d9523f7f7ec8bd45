# SPDX-License-Identifier: Apache-2.0
"""A sender and a replica that exist in memory, for the receiver's session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from pveplug.errors import TransportError
from pveplug.events import Reporter
from pveplug.proto import dr_frames as f


class Raw:
    def __init__(self, message: f.Message) -> None:
        kind, buffers, _ = message.encode()
        self.type = kind
        self.payload = b"".join(bytes(buffer) for buffer in buffers)


class FakePeer:
    """Says what it was given, one message per read; keeps what it is told.

    Read to its end it hangs up, or fails as a cut does with ``cut``, or waits with
    ``wait`` until :meth:`hang_up`.
    """

    peer = "192.0.2.9:40000"

    def __init__(self, *said: f.Message, cut: bool = False, wait: bool = False) -> None:
        self.said = list(said)
        self.told: list[f.Message] = []
        self.cut = cut
        self.deaf = False
        self.taken = asyncio.Event()
        self._gone = asyncio.Event()
        if not wait:
            self._gone.set()

    async def receive(self) -> Raw | None:
        await asyncio.sleep(0)
        if self.said:
            return Raw(self.said.pop(0))
        self.taken.set()
        await self._gone.wait()
        if self.cut:
            raise TransportError("connection reset by peer")
        return None

    async def send(self, frame: f.Frame) -> None:
        await asyncio.sleep(0)
        if self.deaf:
            raise TransportError("broken pipe")
        raw = Raw(frame)  # type: ignore[arg-type]
        self.told.append(f.decode(raw.type, raw.payload))

    def hang_up(self) -> None:
        self._gone.set()

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.told]

    @property
    def refusal(self) -> f.Refusal:
        assert isinstance(self.told[-1], f.Refusal), self.told
        return self.told[-1]


class FakeReplica:
    """Keeps what it is asked; ``fails`` maps a method's name to what it raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.durable: list[f.Durable] = []
        self.lines: list[str] = []
        self.slow: asyncio.Event | None = None

    def _did(self, name: str) -> None:
        self.calls.append(name)
        if error := self.fails.get(name):
            raise error

    def state(self) -> f.State:
        return f.State(link="ab12", role="standby", epoch=1, vmid=900)

    async def apply_pending(self, say: Reporter) -> None:
        self._did("apply_pending")

    async def begin(self, describe: f.Describe, say: Reporter) -> f.Ready:
        self._did("begin")
        for line in self.lines:
            say.info(line)
        return f.Ready(900)

    async def disk(self, disk: f.Disk) -> None:
        self._did("disk")

    async def take(self, block: f.Block | f.Zero) -> None:
        if self.slow:
            await self.slow.wait()
        self._did("take")

    async def disk_end(self, end: f.DiskEnd) -> None:
        self._did("disk_end")

    async def commit(self, commit: f.Commit) -> f.Applied:
        self._did("commit")
        return f.Applied()

    async def digests(self, ask: f.AskDigests) -> f.Digests:
        self._did("digests")
        return f.Digests(0, ask.offset, bytes(16))

    async def samples(self, ask: f.AskSamples) -> f.Samples:
        self._did("samples")
        return f.Samples(ask.key, (1,))

    async def repair(self, block: f.Block) -> None:
        self._did("repair")

    async def finish(self, finish: f.Finish) -> f.Done:
        self._did("finish")
        return f.Done("dr-ab12.1", 1, f.Point("p1", "dr-ab12.1", 1, 1))

    async def reject(self) -> None:
        self._did("reject")

    async def abandon(self) -> None:
        self._did("abandon")


class FakeBack:
    def __init__(self) -> None:
        self.disks: list[f.SendBack] = []
        self.closed = False

    async def disk(self, disk: f.SendBack) -> None:
        self.disks.append(disk)

    async def window(self, digests: f.Digests) -> AsyncIterator[f.Block | f.Zero]:
        yield f.Block(digests.number, digests.offset, b"x" * 512)
        yield f.Zero(digests.number, digests.offset + 512, 512)


class FakeServices:
    """Opens one replica; ``opened`` counts, ``closed`` too."""

    def __init__(self, replica: FakeReplica | None = None) -> None:
        self.replica = replica or FakeReplica()
        self.back_ = FakeBack()
        self.opened = self.closed = 0
        self.acted: list[f.Command] = []
        self.held: list[bool] = []
        self.fails: BaseException | None = None
        self.refuses: BaseException | None = None

    @contextlib.asynccontextmanager
    async def open(self, opening: f.Open, say: Reporter) -> AsyncIterator[FakeReplica]:
        if self.refuses:
            raise self.refuses
        self.opened += 1
        try:
            yield self.replica
        finally:
            self.closed += 1

    def look(self, opening: f.Open) -> f.State:
        return f.State("", "none", 0)

    async def act(
        self, opening: f.Open, replica: Any, command: f.Command, say: Reporter
    ) -> f.Result:
        self.acted.append(command)
        self.held.append(replica is not None)
        say.info(f"{command.action} begins")
        if self.fails:
            raise self.fails
        return f.Result(command.action, 2, {"verdict": "ok"})

    @contextlib.asynccontextmanager
    async def back(self, replica: Any) -> AsyncIterator[FakeBack]:
        try:
            yield self.back_
        finally:
            self.back_.closed = True


OPEN = f.Open("incremental", "6b1f", 100, "web", "site/pve1", "job.1", epoch=1)
DESCRIBE = f.Describe("dr-ab12.1", 2, 1, "", "crash", (f.DiskInfo("scsi0", 1 << 20),))
CYCLE = (
    *(OPEN, DESCRIBE, f.Disk(0, "scsi0", 1 << 20), f.Block(0, 0, b"a" * 4096)),
    *(f.Zero(0, 4096, 4096), f.DiskEnd(0, 2, 4096, "00"), f.Commit(1), f.Finish()),
    f.Bye(),
)
EVERY: dict[type, f.Message] = {
    type(message): message
    for message in (
        *CYCLE,
        *(f.AskDigests("scsi0", 0, 65536), f.AskSamples("scsi0", (0,))),
        *(f.Command("failover-exec"), f.SendBack(0, "scsi0", 1 << 20)),
        *(f.Digests(0, 0, bytes(16)), f.Say("info", "x"), f.Refusal("busy", "x")),
        *(f.State("", "none", 0), f.Ready(1), f.Durable(0, 1), f.Applied()),
        *(f.Samples("k", ()), f.Done("c", 1), f.Result("a", 1), f.WindowEnd(0, 0)),
    )
}
"""One of each message there is."""
