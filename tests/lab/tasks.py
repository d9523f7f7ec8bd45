# SPDX-License-Identifier: Apache-2.0
"""Background work with a UPID, a log and an exit status."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import ApiError, die

UPID = re.compile(
    r"UPID:(?P<node>[a-zA-Z0-9-]+):(?P<pid>[0-9A-F]{8}):(?P<pstart>[0-9A-F]{8,9}):"
    r"(?P<start>[0-9A-F]{8}):(?P<type>[^:\s]+):(?P<id>[^:\s]*):(?P<user>[^:\s]+):\Z"
)


class Killed(BaseException):
    """SIGKILL, or SIGPIPE at a word nobody hears: nothing is cleaned up."""


@dataclass(slots=True)
class Task:
    """One worker; ``exitstatus`` is None while it runs."""

    upid: str
    node: str
    type: str
    id: str
    user: str
    start: int
    pid: int
    pstart: int
    lines: list[str] = field(default_factory=list)
    warnings: int = 0
    exitstatus: str | None = None
    end: int | None = None
    work: asyncio.Task[None] | None = None
    say: Callable[[str], None] | None = None
    """Gets what is logged, too: the output of a program like ``qm``."""

    def log(self, text: str) -> None:
        """Write to the task's log.

        Raises:
            Killed: ``say`` found that nobody listens any more.
        """
        if self.say:
            self.say(text + "\n")
        self.lines += text.split("\n")

    def warn(self, text: str) -> None:
        self.warnings += 1
        self.log(f"WARN: {text}")

    def row(self) -> dict[str, Any]:
        """As task lists show it."""
        row: dict[str, Any] = {
            "upid": self.upid,
            "node": self.node,
            "pid": self.pid,
            "pstart": self.pstart,
            "starttime": self.start,
            "type": self.type,
            "id": self.id,
            "user": self.user.split("!")[0],
        }
        if "!" in self.user:
            row["tokenid"] = self.user.split("!")[1]
        return row

    def status(self) -> dict[str, Any]:
        state = {"status": "running" if self.exitstatus is None else "stopped"}
        if self.exitstatus is not None:
            state["exitstatus"] = self.exitstatus
        return {**self.row(), **state}


Work = Callable[[Task], Awaitable[None]]
Before = Callable[[Task], Awaitable[None]]


class Tasks:
    """All tasks of a site."""

    def __init__(self, before: Before) -> None:
        self._before = before
        self.all: dict[str, Task] = {}
        self._pid = 0x1000

    def start(
        self,
        node: str,
        kind: str,
        ident: str,
        user: str,
        work: Work,
        *,
        faults: bool = True,
    ) -> str:
        """Start ``work`` and return its UPID at once.

        With ``faults`` False the work asks for ordered faults itself.
        """
        self._pid += 1
        now = int(time.time())
        pstart = int(time.monotonic() * 100) & 0xFFFFFFFF
        upid = (
            f"UPID:{node}:{self._pid:08X}:{pstart:08X}:{now:08X}:{kind}:{ident}:{user}:"
        )
        task = Task(upid, node, kind, ident, user, now, self._pid, pstart)
        self.all[upid] = task
        task.work = asyncio.create_task(self._run(task, work, faults), name=upid)
        return upid

    async def _run(self, task: Task, work: Work, faults: bool) -> None:
        try:
            if faults:
                await self._before(task)
            await work(task)
        except (asyncio.CancelledError, Killed):
            # Swallowed on purpose: an aborted PVE task ends with this very status.
            status = "unexpected status"
        except ApiError as error:
            # An exception with a code is printed with it; a plain die has none.
            coded = error.status in (400, 403)
            status = f"{error.status} {error.message}" if coded else error.message
            for key, said in (error.errors or {}).items():
                status += f" {key}: {' '.join(said.split())}"
        except Exception as error:
            status = " ".join(str(error).split()) or type(error).__name__
        else:
            status = f"WARNINGS: {task.warnings}" if task.warnings else "OK"
        task.end = int(time.time())
        if status == "OK" or status.startswith("WARNINGS:"):
            task.lines.append(f"TASK {status}")
        else:
            task.lines.append(f"TASK ERROR: {status}")
        task.exitstatus = status

    def get(self, node: str, upid: str) -> Task:
        match = UPID.match(upid)
        if not match:
            raise ApiError(
                400,
                "Parameter verification failed.",
                {"upid": f"unable to parse worker upid '{upid}'"},
            )
        if match["node"] != node or upid not in self.all:
            raise die("no such task")
        return self.all[upid]

    async def wait(self, upid: str) -> Task:
        """Wait for the end of a task (for tests and local programs)."""
        task = self.all[upid]
        assert task.work
        await asyncio.shield(task.work)
        return task

    async def stop(self) -> None:
        works = [t.work for t in self.all.values() if t.work and not t.work.done()]
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
