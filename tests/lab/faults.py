# SPDX-License-Identifier: Apache-2.0
"""Faults a test orders in advance; each strikes once unless told otherwise."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ApiError, die
from .tasks import Task

if TYPE_CHECKING:
    from .site import Site


@dataclass(slots=True)
class _Call:
    method: str
    path: re.Pattern[str]
    times: int
    error: ApiError | None = None
    delay_s: float = 0.0

    def hits(self, method: str, path: str) -> bool:
        wanted = self.method in ("*", method)
        return self.times != 0 and wanted and bool(self.path.search(path))


@dataclass(slots=True)
class _Work:
    type: str
    ident: str
    times: int
    message: str = ""
    warning: bool = False
    delay_s: float = 0.0


class Faults:
    """What goes wrong next."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._calls: list[_Call] = []
        self._works: list[_Work] = []
        self.quorum = True
        """False: every write of the cluster file system fails."""
        self.gate: Callable[[str], Awaitable[None]] | None = None
        """Awaited with ``METHOD path`` before anything is done."""
        self.copy_gate: Callable[[str], Awaitable[None]] | None = None
        """Awaited with the source's id before each disk of a clone is copied."""

    def fail_next(
        self, method: str, path_regex: str, status: int, message: str, *, times: int = 1
    ) -> None:
        """Answer the next matching call with this status; ``times=-1``: always."""
        error = ApiError(status, message)
        self._calls.append(_Call(method, re.compile(path_regex), times, error))

    def delay(
        self, method: str, path_regex: str, delay_s: float, *, times: int = 1
    ) -> None:
        """Let the next matching call take longer (596 from ``proxy_limit_s`` on)."""
        self._calls.append(
            _Call(method, re.compile(path_regex), times, delay_s=delay_s)
        )

    def fail_task(
        self, kind: str, message: str, *, vmid: int | str = "", times: int = 1
    ) -> None:
        """Let the next task of this type (``qmstart``, ``qmcreate`` …) fail."""
        self._works.append(_Work(kind, str(vmid), times, message))

    def warn_task(self, kind: str, message: str, *, vmid: int | str = "") -> None:
        """Let the next task of this type end with ``WARNINGS: 1``."""
        self._works.append(_Work(kind, str(vmid), 1, message, warning=True))

    def delay_task(self, kind: str, delay_s: float, *, vmid: int | str = "") -> None:
        self._works.append(_Work(kind, str(vmid), 1, delay_s=delay_s))

    def expire_tickets(self) -> None:
        """Two hours pass: no ticket given out so far is valid."""
        self._site.auth.clock_offset_s += 7201

    def agent(self, vmid: int, mode: str) -> None:
        """``guest``, ``fake``, ``off`` or ``hang`` (see ``Machine.agent_mode``)."""
        self._site.machine(vmid).agent_mode = mode

    def clear(self) -> None:
        self._calls.clear()
        self._works.clear()
        self.quorum = True

    # -- asked by the site

    async def before_call(self, method: str, path: str) -> None:
        if self.gate:
            await self.gate(f"{method} {path}")
        for call in self._calls:
            if call.hits(method, path):
                call.times -= 1
                if call.delay_s:
                    await asyncio.sleep(call.delay_s)
                if call.error:
                    raise call.error
                return

    async def before_task(self, task: Task) -> None:
        for work in self._works:
            if work.times and work.type == task.type and work.ident in ("", task.id):
                work.times -= 1
                await asyncio.sleep(work.delay_s)
                if work.warning:
                    task.warn(work.message)
                elif work.message:
                    raise die(work.message)
                return

    async def before_copy(self, task: Task) -> None:
        """Wait, if a test holds the copying of a clone's disks."""
        if self.copy_gate:
            await self.copy_gate(task.id)

    def require_quorum(self) -> None:
        if not self.quorum:
            raise die("cluster not ready - no quorum?")
