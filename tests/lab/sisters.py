# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the sister plug-ins: jobs as those of VMware and Hyper-V would be.

The real ones aren't ours to have. What stands in for them is our shim, built so that it
backs up under their names, with a backend that streams files which are given to it. So
the jobs are real ones in a real Bacula, and the plug-in that restores them is the copy
of ours that an administrator installs under that name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.bacula import JobResult
from tests.support.world import BACKEND, ROOT, SHIM, World

NAMES = ("podheitor-vsphere", "podheitor-hyperv")


class Sisters:
    """A world whose File Daemon has at one time the stand-ins, else our copies.

    Args:
        world: started.
        options: ``import_options`` of its node, beside the connection.
    """

    def __init__(self, world: World, options: str = "restore_storage=local") -> None:
        self.world = world
        self._plugins = world.base / "plugins"
        self._folder = world.base / "sisters"
        self._folder.mkdir()
        self._backend = self._folder / "backend"
        self._backend.write_text(
            f"#!/bin/sh\nexec {sys.executable} "
            f'{ROOT / "tests/support/sister_backend.py"} "$@"\n'
        )
        self._backend.chmod(0o755)
        self.options(options)

    def options(self, text: str) -> None:
        """Set the node's ``import_options``."""
        words = f"{self.world.connection} {text}"
        self.world.site.node_toml(import_options=words)

    async def install(self) -> None:
        """Build the stand-ins, and put our copies where they aren't installed."""
        build = self._folder / "build"
        await asyncio.to_thread(
            subprocess.run,
            [
                *("make", "-s", "-C", str(ROOT / "bacula_shim"), f"BUILD={build}"),
                """MORE_DEFINES=-DOWN_COMMANDS='"podheitor-"'""",
            ],
            check=True,
        )
        self._stand_in = build / SHIM.name
        self._copies()
        await self._restart(BACKEND)

    def _copies(self) -> None:
        for name in NAMES:
            shutil.copy(SHIM, self._plugins / f"{name}-fd.so")

    async def _restart(self, backend: Path) -> None:
        bacula = self.world.bacula
        await asyncio.to_thread(bacula.stop_daemon, "fd")
        bacula.set_environment(PODHEITOR_PROXMOX_BACKEND=str(backend))
        await asyncio.to_thread(bacula.start_daemon, "fd")

    @contextlib.asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """Have the stand-ins installed, and ours not, within the block."""
        for path in self._plugins.glob("*.so"):
            path.unlink()
        for name in NAMES:
            shutil.copy(self._stand_in, self._plugins / f"{name}-fd.so")
        await self._restart(self._backend)
        try:
            yield
        finally:
            for path in self._plugins.glob("*.so"):
                path.unlink()
            shutil.copy(SHIM, self._plugins / SHIM.name)
            self._copies()
            await self._restart(BACKEND)

    async def back_up(
        self, job: str, plugin: str, *runs: Sequence[Mapping[str, Any]]
    ) -> list[JobResult]:
        """Run a job of a stand-in: a Full, then an Incremental per further run.

        Args:
            plugin: ``podheitor-vsphere`` or ``podheitor-hyperv``.
            runs: for each job what it stores, see tests/support/sister_backend.py.
        """
        async with self._at_work():
            return await self._run(job, plugin, runs)

    async def _run(
        self, job: str, plugin: str, runs: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[JobResult]:
        scenario = self._folder / f"{job}.json"
        record = str(self._folder / "record")
        found = []
        await asyncio.to_thread(
            self.world.bacula.add_job, job, f"{plugin}: scenario={scenario}"
        )
        for number, entries in enumerate(runs):
            values = {"record": record, "entries": [dict(e) for e in entries]}
            scenario.write_text(json.dumps(values, default=str))
            level = "Incremental" if number else "Full"
            result = await self.world.run(job, level)
            assert result.termination == "Backup OK", result.text
            found.append(result)
        return found

    async def back_up_each(
        self,
        jobs: Mapping[str, Sequence[Mapping[str, Any]]],
        plugin: str = NAMES[1],
    ) -> dict[str, JobResult]:
        """Run a Full of each of these jobs; what each stores is given by its name."""
        found = {}
        async with self._at_work():
            for job, entries in jobs.items():
                (found[job],) = await self._run(job, plugin, [entries])
        return found
