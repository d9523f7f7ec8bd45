# SPDX-License-Identifier: Apache-2.0
"""The guest of a torture run: it writes to all its disks, all the time.

It has a monitor of its own, so that it never stands in the product's way. Each request
ends before the next begins and is logged: what all disks hold at one instant is the
result of the first *k* requests, the same *k* for every disk. Now and then it writes a
counter to all disks in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.vm import LabVm

SECTOR = 512
KIB, MIB = 1 << 10, 1 << 20
FAILED = re.compile(
    r"^(?:(?:write|discard|flush) failed|qemu-io|.*non-numeric|.*nvalid arg).*$",
    re.MULTILINE,
)
"""What qemu-io says on QEMU's output, where QEMU itself speaks as well."""
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Write:
    """One request; ``pattern`` is the byte it fills with, None is a discard."""

    key: str
    offset: int
    length: int
    pattern: int | None


class GuestError(Exception):
    """The guest's disk said no: a backup must never cause that."""


class Writer:
    """Writes at random until told to stand still.

    Args:
        socket: of a QMP monitor that is the writer's alone.
    """

    def __init__(self, vm: LabVm, socket: Path, keys: tuple[str, ...], seed: int):
        self._vm, self._socket, self._keys = vm, socket, keys
        self._rng = random.Random(f"writer {seed}")
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._held = False
        self._said = 0
        self._counter = 0
        self._hot = 0.0
        self.pause_s = 0.008
        self.sizes: dict[str, int] = {}
        self.log: list[Write] = []
        self.failure: str | None = None

    @property
    def _qemu_log(self) -> Path:
        return self._vm.node.log_dir / f"{self._vm.vmid}.qemu"

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="guest")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._hang_up()

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Nothing is written within the block; all before is in the image files."""
        async with self._turn:
            await self.flush()
            yield

    async def hold(self) -> None:
        """Stand still until :meth:`let_go`."""
        await self._turn.acquire()
        self._held = True
        await self.flush()

    def let_go(self) -> None:
        """Write on; may be called without need."""
        if self._held:
            self._held = False
            self._turn.release()

    async def flush(self) -> None:
        """Have QEMU write down what it has; the caller holds the writer still."""
        if self._vm.running:
            with contextlib.suppress(OSError, EOFError):
                for key in self._keys:
                    await self._io(key, "flush")

    async def burst(self, count: int) -> None:
        """Write somewhere else than before, if the VM runs."""
        async with self._turn:
            self._hot = self._rng.random()
            for _ in range(count):
                if not self._vm.running:
                    return
                with contextlib.suppress(OSError, EOFError):
                    await self._some()

    def check(self) -> None:
        """Raise if the guest ever saw an error."""
        if self.failure is None and self._task and self._task.done():
            self.failure = f"the writer ended: {self._task.exception()!r}"
        if self.failure:
            raise GuestError(self.failure)

    async def _run(self) -> None:
        while self.failure is None:
            if self._vm.running and self.sizes:
                async with self._turn:
                    with contextlib.suppress(OSError, EOFError):
                        await self._some()
            else:
                self._hang_up()
            await asyncio.sleep(self.pause_s)

    async def _some(self) -> None:
        if self._rng.random() < 0.05:
            self._counter += 1
            for key in self._keys:
                await self._write(Write(key, 0, 4 * KIB, self._counter % 255 + 1))
            return
        rng = self._rng
        key = rng.choice(self._keys)
        size = self.sizes[key]
        match rng.randrange(4):
            case 0:  # whole clusters
                length = 64 * KIB * rng.randint(1, 8)
                unit = 64 * KIB
            case 1:  # a file system's page
                length = unit = 4 * KIB
            case _:
                length = SECTOR * rng.randint(1, 300)
                unit = SECTOR
        place = rng.random()
        if rng.random() < 0.7:
            place = (self._hot + place / 8) % 1.0
        elif rng.random() < 0.1:
            place = 1.0  # the end, which may lie within a cluster
        offset = min(int(place * size), size - length) // unit * unit
        offset = max(offset, 4 * KIB)  # the counter's
        length = min(length, size - offset)
        pattern: int | None = rng.choice((None, 0, *[rng.randint(1, 255)] * 5))
        await self._write(Write(key, offset, length, pattern))

    async def _write(self, write: Write) -> None:
        if write.pattern is None:
            text = "discard -q"
        elif write.pattern == 0:
            text = self._rng.choice(("write -q -z", "write -q -z -u"))
        else:
            text = f"write -q -P {write.pattern}"
        # First: a request that is cut off may be carried out all the same.
        self.log.append(write)
        await self._io(write.key, f"{text} {write.offset} {write.length}")

    async def _io(self, key: str, command: str) -> None:
        device = key
        if key.startswith("virtio"):
            device = f"/machine/peripheral/{key}/virtio-backend"
        line = f'qemu-io -d {device} "{command}"'
        try:
            said = await self._ask("human-monitor-command", {"command-line": line})
        except BaseException:
            self._hang_up()
            raise
        complaint = said.strip() or self._complaint()
        # Of a QEMU that is being killed nothing is known.
        if complaint and self._vm.running:
            self.failure = f"{key} {command}: {complaint}"

    def _complaint(self) -> str:
        with self._qemu_log.open("rb") as file:
            file.seek(self._said)
            text = file.read()
        self._said += len(text)
        found = FAILED.search(text.decode(errors="replace"))
        return found[0] if found else ""

    async def _ask(self, command: str, arguments: dict[str, Any]) -> str:
        if self._stream is None:
            stream = await asyncio.open_unix_connection(str(self._socket))
            self._stream = stream
            await self._line(stream[0])
            await self._say(stream, {"execute": "qmp_capabilities"})
            self._said = self._qemu_log.stat().st_size
        reply = await self._say(
            self._stream, {"execute": command, "arguments": arguments}
        )
        if "error" in reply:
            return str(reply["error"]["desc"])
        return str(reply["return"])

    async def _say(
        self, stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], message: Any
    ) -> dict[str, Any]:
        stream[1].write(json.dumps(message).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S):
            while True:
                reply: dict[str, Any] = json.loads(await self._line(stream[0]))
                if "event" not in reply:
                    return reply

    @staticmethod
    async def _line(reader: asyncio.StreamReader) -> bytes:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("QEMU hung up")
        return line

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None
