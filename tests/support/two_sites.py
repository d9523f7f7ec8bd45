# SPDX-License-Identifier: Apache-2.0
"""Two sites: a source with Bacula, and a DR site with our receiver as a process.

::

    async with TwoSites() as sites:
        vm = await sites.site.create_vm(100, …)
        await sites.start_receiver()
        await sites.add_job("cycle", f"mode=seed vmid=100 {sites.dr_words()}")
        result = await sites.run("cycle")
        replica = sites.dr.vm(100)

The two know nothing of each other but the receiver's address, token and certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab.auth import receiver_acl
from tests.lab.site import Site
from tests.support.dr_certs import pair
from tests.support.nbd_servers import free_port
from tests.support.world import World

RECEIVER = Path(sys.prefix) / "bin" / "podheitor-proxmox-receiver"
TOKEN_ID = "replica@pve!receiver"


class TwoSites(World):
    """A :class:`World` with a second site ``dr``; an async context manager.

    Args:
        dr: arguments of the DR :class:`tests.lab.site.Site`.
        receiver: keys of the receiver's configuration, as ``"retention.min": 1``.
    """

    def __init__(
        self,
        *,
        dr: Mapping[str, Any] | None = None,
        receiver: Mapping[str, Any] | None = None,
        **world: Any,
    ) -> None:
        super().__init__(**world)
        self.dr = Site(self.base / "d", **{"nodes": ("dr1",), **(dr or {})})
        self.receiver_keys = dict(receiver or {})
        self.receiver_port = free_port()
        self.receiver: asyncio.subprocess.Process | None = None
        self.state_dir = self.base / "r"
        self._log = self.base / "receiver.log"

    async def __aenter__(self) -> TwoSites:
        await super().__aenter__()
        try:
            await self.dr.start()
            secret = self.dr.add_token(TOKEN_ID, receiver_acl(self.dr.release))
            self._private("dr-secret", secret)
            self.token_file = self._private("dr-token", secrets.token_hex(32))
            tls = self.base / "tls"
            tls.mkdir(mode=0o700)
            self.certificate = pair(tls, "receiver", names=("127.0.0.1",))
            Path(self.certificate.key).chmod(0o600)
            self.dr_node_file = self.dr.node_toml()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                await self.stop_receiver()
                await self.dr.assert_clean()
        finally:
            await super().__aexit__(kind, error, trace)

    async def _stop(self) -> None:
        try:
            await self.kill_receiver()
            await self.dr.stop()
        finally:
            await super()._stop()

    # -- the receiver

    @property
    def config_file(self) -> Path:
        return self.base / "receiver-lab.toml"

    def write_config(self) -> None:
        """Write the receiver's configuration, with ``receiver_keys``."""
        keys: dict[str, Any] = {
            "name": "lab",
            "bind": "127.0.0.1",
            "port": self.receiver_port,
            "state_dir": str(self.state_dir),
            "tls.cert": self.certificate.cert,
            "tls.key": self.certificate.key,
            "auth.token_file": str(self.token_file),
            "pve.host": "127.0.0.1",
            "pve.port": self.dr.api_port,
            "pve.node": "dr1",
            "pve.token_id": TOKEN_ID,
            "pve.token_secret_file": str(self.base / "dr-secret"),
            "pve.fingerprint": self.dr.fingerprint,
            "replicas.storage": "local",
            "retention.min": 1,
            "limits.keep_free_mib": 64,
            "metrics.port": 0,
            **self.receiver_keys,
        }
        tables: dict[str, list[str]] = {"": []}
        for key, value in keys.items():
            table, _, name = key.rpartition(".")
            text = str(value) if isinstance(value, int) else f'"{value}"'
            tables.setdefault(table, []).append(f"{name} = {text}")
        lines = tables.pop("")
        for table, rows in tables.items():
            lines += ["", f"[{table}]", *rows]
        self.config_file.write_text("\n".join(lines) + "\n")

    async def start_receiver(self) -> None:
        """Start the process and wait until it listens."""
        self.write_config()
        with self._log.open("ab") as log:
            self.receiver = await asyncio.create_subprocess_exec(
                *(str(RECEIVER), "--config", str(self.config_file)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(self.dr_node_file)},
            )
        async with asyncio.timeout(30):
            while True:
                if self.receiver.returncode is not None:
                    raise AssertionError(f"no receiver: {self.receiver_log[-2000:]}")
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(
                        "127.0.0.1", self.receiver_port
                    )
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    async def stop_receiver(self) -> None:
        """End it as systemd would, and wait."""
        await self._end(signal.SIGTERM)

    async def kill_receiver(self) -> None:
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> None:
        process, self.receiver = self.receiver, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
        async with asyncio.timeout(30):
            await process.wait()

    @property
    def receiver_log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    # -- the sender

    def dr_words(self, *, port: int | None = None) -> str:
        """The part of a plug-in string that says where the receiver is."""
        return (
            f"dr_host=127.0.0.1 dr_port={port or self.receiver_port} "
            f"dr_auth_token_file={self.token_file} "
            f"dr_peer_fingerprint={self.certificate.fingerprint}"
        )

    def _private(self, name: str, text: str) -> Path:
        path = self.base / name
        path.write_text(text + "\n")
        path.chmod(0o600)
        return path
