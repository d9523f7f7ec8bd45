# SPDX-License-Identifier: Apache-2.0
"""Jobs that shall go wrong, run by a real Bacula, and what must hold after each.

::

    async with ErrorWorld() as world:
        result = await world.backup("vmid=999")
        failed(result, "VM 999 is not there")
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab import lifecycle
from tests.lab.bacula import JobResult
from tests.support.damaging_backend import install
from tests.support.world import BACKEND, World

WITHOUT_GUEST: Mapping[str, str] = {"agent": "0"}
"""A VM that only has disks: it runs in 0.3 s."""

FAILURES = "fE"
"""What Bacula says of a job that failed."""

_PREFIX = re.compile(r"^(?:\S+ \S+ )?(lab-fd JobId \d+: )")
_INTERNAL = re.compile(r"Traceback|internal error|object at 0x|<class |Error\(|\\n")


class ErrorWorld(World):
    """A world whose jobs get names of their own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._numbers = itertools.count(1)
        self._orders = self.base / "damage"

    async def __aenter__(self) -> ErrorWorld:
        program = self.base / "backend"
        install(program, BACKEND, self._orders)
        self._environment["PODHEITOR_PROXMOX_BACKEND"] = str(program)
        await super().__aenter__()
        return self

    def damage(self, what: str) -> None:
        """Damage what later backups send, see :mod:`tests.support.damaging_backend`."""
        self._orders.write_text(what)

    def connect(self, *without: str, **changes: str) -> str:
        """Return the connection with keys left out or changed."""
        words = dict(word.split("=", 1) for word in self.connection.split())
        for key in without:
            del words[key]
        words.update(changes)
        return " ".join(f"{key}={value}" for key, value in words.items())

    async def define(
        self, text: str, *, connection: str | None = None, **more: Any
    ) -> str:
        """Define a backup job; returns its name."""
        name = f"job{next(self._numbers)}"
        shown = self.connection if connection is None else connection
        plugin = f"podheitor-proxmox: {shown} {text}"
        await self._in_thread(self.bacula.add_job, name, plugin, **more)
        return name

    async def backup(
        self,
        text: str,
        level: str = "Full",
        *,
        connection: str | None = None,
        timeout_s: float = 120,
        **more: Any,
    ) -> JobResult:
        """Define a job, run it and wait for its end."""
        name = await self.define(text, connection=connection, **more)
        return await self.run(name, level, timeout_s=timeout_s)

    async def start(self, name: str, level: str = "Full") -> int:
        """Queue a job; returns its JobId."""
        return int(await self._in_thread(self.bacula.start_job, name, level))

    async def restored(self, options: str, job_ids: Sequence[int]) -> JobResult:
        """Restore what these jobs hold, with ``where=/@pve/OPTIONS``."""
        return await self.restore(where=f"/@pve/{options}", job_ids=job_ids)

    def token(self, name: str, acl: Mapping[str, Iterable[str]]) -> tuple[str, Path]:
        """Make a token with these privileges; returns its id and its secret's file."""
        token_id = f"{self.site.token_id.partition('!')[0]}!{name}"
        secret = self.base / f"token-{name}"
        secret.write_text(self.site.add_token(token_id, acl))
        secret.chmod(0o600)
        return token_id, secret

    async def wait(self, job_id: int, timeout_s: float = 120) -> JobResult:
        result = await self._in_thread(self.bacula.wait, job_id, timeout_s)
        assert isinstance(result, JobResult)
        return result

    async def said(self, job_id: int) -> str:
        """What the job log has so far."""
        return "\n".join(await self._in_thread(self.bacula.joblog, job_id))

    async def _in_thread(self, function: Any, *arguments: Any, **more: Any) -> Any:
        return await asyncio.to_thread(function, *arguments, **more)

    async def destroy(self, vmid: int) -> None:
        """Remove a stopped VM, as root."""
        site, node = self.site, self.site.node
        upid = site.tasks.start(
            node.name,
            "qmdestroy",
            str(vmid),
            "root@pam",
            lambda task: lifecycle.destroy_vm(
                site, node, vmid, skiplock=False, unreferenced=False
            ),
        )
        task = await site.tasks.wait(upid)
        assert task.exitstatus == "OK", task.lines

    def inventory(self) -> dict[str, str]:
        """Every VM's configuration, and every volume of every storage."""
        found = {}
        for node in self.site.nodes.values():
            for path in node.conf_dir.glob("*.conf"):
                found[f"{node.name}/{path.name}"] = path.read_text()
            for storage in node.storages.values():
                for row in storage.volumes():
                    found[f"{node.name}:{row['volid']}"] = "volume"
        return found

    async def assert_nothing_left(self) -> None:
        """Nothing of ours is anywhere: VMs, nodes, scratch, journals, sockets.

        Where bacula-fd itself ends a job the backend is still tidying up: 30 s.
        """
        until = time.monotonic() + 30
        while True:
            try:
                return await self._assert_nothing_left()
            except (AssertionError, ConnectionResetError):
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.25)

    async def _assert_nothing_left(self) -> None:
        await self.site.assert_clean()
        for node in self.site.nodes.values():
            state = Path(node.root / "ph/lib")
            journals = [p.name for p in state.rglob("*.json")] if state.exists() else []
            assert not journals, f"journals left: {journals}"
            run = Path(node.root / "ph/run")
            sockets = [p.name for p in run.iterdir()] if run.exists() else []
            assert not sockets, f"sockets left: {sockets}"


def messages(result: JobResult) -> list[str]:
    """What the File Daemon and the plug-in said, without date and JobId."""
    return [_PREFIX.sub("", line) for line in result.log if _PREFIX.search(line)]


def one_line(result: JobResult, *sentence: str) -> str:
    """Return the one message that holds all these texts, as an operator reads it."""
    found = [line for line in messages(result) if all(s in line for s in sentence)]
    said = "\n".join(messages(result))
    assert found, f"no message with {sentence!r} in:\n{said}"
    for line in found:
        assert not _INTERNAL.search(line), line
    return found[0]


def _shown(result: JobResult) -> str:
    return "\n".join([f"status {result.status}", *messages(result)])


def failed(result: JobResult, *sentence: str) -> str:
    """Assert that a job failed with a fatal error of one line; returns that line."""
    assert result.status in FAILURES, _shown(result)
    line = one_line(result, "rror: ", *sentence)
    assert line.startswith(("Fatal error: ", "Error: ")), line
    return line


def warned(result: JobResult, *sentence: str) -> str:
    """Assert that a job went well with this warning; returns the line."""
    assert result.ok, _shown(result)
    return one_line(result, "Warning: ", *sentence)


def informed(result: JobResult, *sentence: str) -> str:
    """Assert that a job went well and mentions this, not as a warning."""
    assert result.ok, _shown(result)
    line = one_line(result, *sentence)
    assert not line.startswith("Warning: "), line
    return line
