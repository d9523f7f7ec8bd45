# SPDX-License-Identifier: Apache-2.0
"""The whole path: a PVE site over real QEMU, a real Bacula, our shim and backend.

::

    async with World() as world:
        vm = await world.site.create_vm(100, …)
        world.add_job("nightly", "vmid=100")
        result = await world.run("nightly", "Full")
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab.bacula import BaculaLab, JobResult
from tests.lab.site import Site, short_base

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("PVEPLUG_BUILD", ROOT / ".build"))
SHIM = BUILD / "shim" / "podheitor-proxmox-fd.so"
GUEST = BUILD / "guest"
BACKEND = Path(sys.prefix) / "bin" / "podheitor-proxmox-backend"
BACULA_9 = BUILD / "prefix" / "bacula-9.6.7"


class World:
    """A site and a Bacula that backs it up; an async context manager.

    Args:
        prefix: another Bacula's; None is the installed 15.0.3.
        site: arguments of :class:`tests.lab.site.Site`.
        bacula: arguments of :class:`tests.lab.bacula.BaculaLab`.
    """

    def __init__(
        self,
        *,
        prefix: Path | None = None,
        site: Mapping[str, Any] | None = None,
        bacula: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.base = short_base("pw")
        self.most_hold_s = 1.0
        """More only where a test itself keeps the processors busy all the time."""
        self.site = Site(self.base / "s", **(site or {}))
        self._prefix = prefix
        self._bacula_arguments = dict(bacula or {})
        self._environment = dict(environment or {})
        self.bacula: BaculaLab

    async def __aenter__(self) -> World:
        await self.site.start()
        plugins = self.base / "plugins"
        plugins.mkdir()
        if not SHIM.exists():
            subprocess.run(["make", "-s", "-C", str(ROOT / "bacula_shim")], check=True)
        shutil.copy(SHIM, plugins / SHIM.name)
        self.secret_file = self.base / "token"
        self.secret_file.write_text(self.site.token_secret + "\n")
        self.secret_file.chmod(0o600)
        self.node_file = self.site.node_toml()
        self.bacula = BaculaLab(
            self.base / "b",
            prefix=self._prefix,
            plugin_dir=plugins,
            env={
                "PODHEITOR_PROXMOX_BACKEND": str(BACKEND),
                "PODHEITOR_PROXMOX_NODE": str(self.node_file),
                **self._environment,
            },
            **self._bacula_arguments,
        )
        try:
            await asyncio.to_thread(self.bacula.start)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                await self.site.assert_clean()
                self.assert_polite()
        finally:
            await self._stop()

    def assert_polite(self) -> None:
        """Assert that nobody but PVE held a monitor for ``most_hold_s``."""
        for node in self.site.nodes.values():
            for vmid, machine in node.machines.items():
                longest = machine.qmp_relay.max_hold_s()
                assert longest < self.most_hold_s, (
                    f"VM {vmid}: monitor held for {longest:.2f} s"
                )

    async def _stop(self) -> None:
        try:
            await asyncio.to_thread(self.bacula.stop)
        finally:
            await self.site.stop()
            if not os.environ.get("PVEPLUG_KEEP"):
                shutil.rmtree(self.base, ignore_errors=True)

    @property
    def connection(self) -> str:
        """The part of a plug-in string that says how to reach the site."""
        return (
            f"pve_host=127.0.0.1 pve_port={self.site.api_port} "
            f"pve_token_id={self.site.token_id} "
            f"pve_token_secret_file={self.secret_file} "
            f"pve_fingerprint={self.site.fingerprint}"
        )

    def plugin(self, text: str) -> str:
        """Return a whole plug-in string."""
        return f"podheitor-proxmox: {self.connection} {text}"

    async def add_job(self, name: str, text: str, **more: Any) -> None:
        """Define a backup job; ``text`` selects VMs and sets options."""
        await asyncio.to_thread(self.bacula.add_job, name, self.plugin(text), **more)

    async def run(
        self, name: str, level: str = "Full", *, timeout_s: float = 180
    ) -> JobResult:
        return await asyncio.to_thread(self.bacula.run_job, name, level, timeout_s)

    def daemon_on(self, node: str) -> None:
        """Let the File Daemon be that of another node, as after a migration.

        The product runs on each node of a cluster; nothing it wrote down on one is
        there on another.
        """
        self.node_file.write_text(self.site.node_toml(node).read_text())

    async def restore(self, *, timeout_s: float = 180, **arguments: Any) -> JobResult:
        return await asyncio.to_thread(
            lambda: self.bacula.restore(timeout=timeout_s, **arguments)
        )

    @property
    def backend_log(self) -> str:
        logs = (node.log_dir / "backend.log" for node in self.site.nodes.values())
        return "".join(p.read_text(errors="replace") for p in logs if p.exists())
