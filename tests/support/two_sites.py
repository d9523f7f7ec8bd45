# SPDX-License-Identifier: Apache-2.0
"""A source with its Bacula, and a second site with our receiver.

::

    async with TwoSites() as sites:
        vm = await sites.site.create_vm(100, …)
        await sites.start_receiver()
        await sites.add_job("dr", f"mode=seed vmid=100 {sites.dr_words()}")
        result = await sites.run("dr")
        replica = sites.dr.vm(…)

``site`` and ``dr`` are two clusters that share nothing but this machine. The receiver
is a process of its own, with the node file of the DR site's node. When the block ends
well, the receiver is asked to end, and both sites are to be clean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from tests.lab.auth import receiver_acl
from tests.lab.site import Site
from tests.lab.storage import holders
from tests.support.cutting_proxy import CuttingProxy
from tests.support.dr_certs import pair
from tests.support.world import World

RECEIVER = Path(sys.prefix) / "bin" / "podheitor-proxmox-receiver"
RECEIVER_TOKEN = "receiver@pve!dr"
READY_S = 30.0
STOP_S = 30.0


class TwoSites(World):
    """A :class:`World` with a DR site; an async context manager.

    Args:
        dr: arguments of the DR site (:class:`tests.lab.site.Site`); its node is
            ``dr1`` unless they say otherwise.
        receiver: keys of the receiver's file that differ, ``{"retention.min": 3}``;
            None takes one out.
        argv: the receiver's program, to which ``--config FILE`` is added.
        auth: ``psk``, ``mtls`` or ``both``: how senders prove themselves.
        world: arguments of :class:`World`.

    Attributes:
        dr: the second site.
        receiver_port: where the receiver listens, the same after a restart.
        config_file: the receiver's file; written at each start from ``keys``.
        keys: what will stand in it; a test may change them between starts.
        notified: what the receiver told the service manager (``READY=1`` …).
    """

    def __init__(
        self,
        *,
        dr: Mapping[str, Any] | None = None,
        receiver: Mapping[str, Any] | None = None,
        argv: Sequence[str | Path] = (RECEIVER,),
        auth: str = "psk",
        **world: Any,
    ) -> None:
        super().__init__(**world)
        self.dr = Site(self.base / "d", **{"nodes": ("dr1",), **(dr or {})})
        self.argv = [str(word) for word in argv]
        self.auth = auth
        self.receiver_port = free_port()
        self.config_file = self.base / "receiver-lab.toml"
        self.state_dir = self.base / "rs"
        self.stage_dir = self.base / "stage"
        self.keys: dict[str, Any] = {}
        self._changes = dict(receiver or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._output = self.base / "receiver.log"
        self._output.touch()
        self._notify: socket.socket | None = None
        self._notified: list[str] = []

    async def __aenter__(self) -> Self:
        try:
            await self.dr.start()
            self._credentials()
            self._write_keys()
            self._listen_for_notifications()
        except BaseException:
            await self._stop_dr()
            raise
        # If this fails, World ends what is left through _stop().
        await super().__aenter__()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                await self.stop_receiver()
                await self.dr.assert_clean()
                await asyncio.to_thread(self.assert_volumes_free)
        finally:
            await super().__aexit__(kind, error or sys.exc_info()[1], trace)

    def assert_polite(self) -> None:
        """As World's, of both sites."""
        super().assert_polite()
        for node in self.dr.nodes.values():
            for vmid, machine in node.machines.items():
                longest = machine.qmp_relay.max_hold_s()
                assert longest < self.most_hold_s, (
                    f"DR VM {vmid}: monitor held for {longest:.2f} s"
                )

    def assert_volumes_free(self) -> None:
        """Assert that no process has a volume of a stopped VM of the DR site open."""
        for node, vmid in self.dr.vms():
            if self.dr.machine(vmid, node).running:
                continue
            for storage in node.storages.values():
                for row in storage.volumes(vmid):
                    found = holders(storage.file(str(row["volid"])))
                    assert not found, f"{row['volid']} is open in processes {found}"

    async def _stop(self) -> None:
        try:
            await self._stop_dr()
        finally:
            await super()._stop()

    async def _stop_dr(self) -> None:
        if self._process is not None:
            await self.kill_receiver()
        if self._notify is not None:
            asyncio.get_running_loop().remove_reader(self._notify)
            self._notify.close()
            self._notify = None
        await self.dr.stop()

    # --- what the sender is told -----------------------------------------------------

    def dr_words(self, port: int | None = None) -> str:
        """Return the words of a plug-in string that say how to reach the receiver.

        ``port`` is that of a proxy in between.
        """
        words = [
            "dr_host=127.0.0.1",
            f"dr_port={port or self.receiver_port}",
            f"dr_peer_fingerprint={self.receiver_fingerprint}",
        ]
        if self.auth in ("psk", "both"):
            words.append(f"dr_auth_token_file={self.token_file}")
        if self.auth in ("mtls", "both"):
            words += [
                f"dr_auth_cert={self.sender.cert}",
                f"dr_auth_key={self.sender.key}",
                f"dr_auth_ca={self.ca.cert}",
            ]
        return " ".join(words)

    @asynccontextmanager
    async def cutting(self) -> AsyncIterator[CuttingProxy]:
        """Put a proxy before the receiver: ``dr_words(proxy.port)``."""
        async with CuttingProxy(self.receiver_port) as proxy:
            yield proxy

    # --- the receiver ----------------------------------------------------------------

    async def start_receiver(self, *, ready: bool = True) -> None:
        """Write its file, start it, wait until it listens (unless ``ready`` is False).

        Raises:
            AssertionError: it ended, or doesn't listen within 30 s.
        """
        assert self._process is None, "the receiver was started already"
        self.config_file.write_text(toml(self.keys))
        self.config_file.chmod(0o600)
        self._notified.clear()
        environment = {
            **os.environ,
            "PODHEITOR_PROXMOX_NODE": str(self.dr_node_file),
            "NOTIFY_SOCKET": str(self.base / "notify"),
        }
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.argv, "--config", str(self.config_file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        end = time.monotonic() + READY_S
        while ready and not listens(self.receiver_port, self._process.pid):
            status = self._process.poll()
            if status is not None or time.monotonic() > end:
                await self.kill_receiver()
                raise AssertionError(
                    f"the receiver doesn't listen (status {status}):\n"
                    f"{self.receiver_log[-4000:]}"
                )
            await asyncio.sleep(0.05)

    async def stop_receiver(self, *, status: int | None = 0) -> int | None:
        """Ask it to end (SIGTERM) and wait; returns its exit status.

        Nothing happens where none runs. ``status`` is what it is to end with; None
        takes any.

        Raises:
            AssertionError: another status, or it doesn't end within 30 s.
        """
        return await self._ended(signal.SIGTERM, status)

    async def kill_receiver(self) -> None:
        """End it with SIGKILL and reap it."""
        await self._ended(signal.SIGKILL, None)

    async def restart_receiver(self) -> None:
        await self.stop_receiver()
        await self.start_receiver()

    async def reload_receiver(self) -> None:
        """Write its file again from ``keys`` and send SIGHUP."""
        assert self._process
        self.config_file.write_text(toml(self.keys))
        self._process.send_signal(signal.SIGHUP)

    @property
    def receiver_pid(self) -> int:
        assert self._process is not None, "no receiver runs"
        return self._process.pid

    @property
    def receiver_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def receiver_log(self) -> str:
        """All that the receivers so far said, on their own and as a node's log."""
        texts = [self._output.read_text(errors="replace")]
        for node in self.dr.nodes.values():
            log = node.log_dir / "backend.log"
            texts += [log.read_text(errors="replace")] if log.exists() else []
        return "".join(texts)

    @property
    def notified(self) -> list[str]:
        self._read_notifications()
        return list(self._notified)

    async def _ended(self, number: signal.Signals, wanted: int | None) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(number)
        try:
            status = await asyncio.to_thread(process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
            raise AssertionError(
                f"the receiver doesn't end:\n{self.receiver_log[-4000:]}"
            ) from None
        assert wanted in (None, status), (
            f"the receiver ended with {status}:\n{self.receiver_log[-4000:]}"
        )
        return status

    # --- its file and secrets --------------------------------------------------------

    def _credentials(self) -> None:
        self.dr_node_file = self.dr.node_toml()
        secret = self.dr.add_token(RECEIVER_TOKEN, receiver_acl(self.dr.release))
        self.dr_secret_file = self._private("dr-token", secret)
        self.token_file = self._private("channel-token", secrets.token_urlsafe(32))
        folder = self.base / "tls"
        folder.mkdir(mode=0o700)
        self.ca = pair(folder, "ca", ca=True)
        names = ("127.0.0.1", "localhost")
        self.certificate = pair(folder, "receiver", self.ca, names=names)
        self.sender = pair(folder, "sender", self.ca, names=names)
        for key in folder.glob("*.key"):
            key.chmod(0o600)
        raw = self.certificate.fingerprint.replace(":", "").upper()
        self.receiver_fingerprint = ":".join(
            raw[at : at + 2] for at in range(0, len(raw), 2)
        )

    def _private(self, name: str, text: str) -> Path:
        path = self.base / name
        path.touch(0o600)
        path.write_text(text + "\n")
        return path

    def _write_keys(self) -> None:
        self.stage_dir.mkdir(mode=0o700)
        self.keys = {
            "name": "lab",
            "bind": "127.0.0.1",
            "port": self.receiver_port,
            "state_dir": str(self.state_dir),
            "tls.cert": self.certificate.cert,
            "tls.key": self.certificate.key,
            "pve.host": "127.0.0.1",
            "pve.port": self.dr.api_port,
            "pve.node": self.dr.node.name,
            "pve.token_id": RECEIVER_TOKEN,
            "pve.token_secret_file": str(self.dr_secret_file),
            "pve.fingerprint": self.dr.fingerprint,
            "replicas.storage": "local",
            "limits.stage_dir": str(self.stage_dir),
            "limits.keep_free_mib": 0,
        }
        if self.auth in ("psk", "both"):
            self.keys["auth.token_file"] = str(self.token_file)
        if self.auth in ("mtls", "both"):
            self.keys["auth.ca_file"] = self.ca.cert
        self.keys |= self._changes

    def _listen_for_notifications(self) -> None:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setblocking(False)
        self._notify.bind(str(self.base / "notify"))
        # Read at once: a full queue would hold up who tells.
        asyncio.get_running_loop().add_reader(self._notify, self._read_notifications)

    def _read_notifications(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._notify is not None:
                said = self._notify.recv(65536).decode(errors="replace")
                self._notified += said.splitlines()


def toml(keys: Mapping[str, Any]) -> str:
    """Write dotted keys as tables; a value of None is left out."""
    top, tables = [], dict[str, list[str]]()
    for key, value in keys.items():
        if value is None:
            continue
        table, _, name = key.rpartition(".")
        # TOML's texts, numbers, booleans and lists are JSON's.
        line = f"{name} = {json.dumps(value)}"
        (tables.setdefault(table, []) if table else top).append(line)
    parts = ["\n".join(top)]
    parts += [f"[{name}]\n" + "\n".join(lines) for name, lines in tables.items()]
    return "\n\n".join(parts) + "\n"


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, pid: int) -> bool:
    """Tell whether the process listens there, without connecting.

    A connection without a handshake is one a receiver may count against the sender.
    """
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
                    inodes.add(f"socket:[{fields[9]}]")
    with contextlib.suppress(OSError):  # it has just ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry) in inodes:
                    return True
    return False
