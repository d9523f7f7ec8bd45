# SPDX-License-Identifier: Apache-2.0
"""One VM's processes: QEMU behind its relays, swtpm, the guest agent's ways to fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cmdline import Context, Volume, pve_argv, uses_blockdev
from .deviations import Bench, adapt
from .errors import die
from .relay import QmpRefused, Relay, Silence, exchange
from .vmconfig import Drive, VmConf

if TYPE_CHECKING:
    from .site import LabNode

TIMEOUTS_S = {
    **dict.fromkeys(("blockdev-add", "block-export-add", "device_add", "quit"), 60.0),
    **dict.fromkeys(("device_del", "object-add", "object-del", "eject"), 60.0),
    **dict.fromkeys(("blockdev-del", "blockdev-mirror", "drive-mirror"), 600.0),
    **dict.fromkeys(("job-complete", "block-job-cancel", "query-block-jobs"), 600.0),
}
"""PVE's patience per command; 5 s for all others."""

START_S = 90.0
"""How long QEMU may take to open its disks; PVE's own patience is 30 s and more."""


class Machine:
    """A VM on one node: its QEMU process, if any, and what belongs to it."""

    def __init__(self, node: LabNode, vmid: int) -> None:
        self.node = node
        self.vmid = vmid
        run = node.run_dir
        self.qmp_relay = Relay(run / f"{vmid}.qmp")
        self.qga_relay = Relay(run / f"{vmid}.qga", answer=self._agent, agent=True)
        self.agent_mode = "guest"
        """guest: pass on; fake: answer here; off: silence; hang: silent on freeze."""
        self.fake_frozen = False
        self.started_at = 0.0
        self.modern = False
        self.process: asyncio.subprocess.Process | None = None
        self._swtpm: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._active: list[str] = []
        self.gone = asyncio.Event()
        self.gone.set()

    # -- state

    @property
    def pid_file(self) -> Path:
        return self.node.run_dir / f"{self.vmid}.pid"

    @property
    def serial(self) -> Path:
        return self.node.log_dir / f"{self.vmid}.serial"

    @property
    def pid(self) -> int | None:
        """Process id, by PVE's rule: pid file, program name and ``-pidfile`` agree."""
        try:
            pid = int(self.pid_file.read_text())
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        name = os.path.basename(argv[0]).decode()
        named = name.endswith("kvm") or name.startswith("qemu-")
        return pid if named and str(self.pid_file).encode() in argv else None

    @property
    def running(self) -> bool:
        return self.pid is not None and not self.gone.is_set()

    def resolve(self, drive: Drive) -> Volume:
        """Where a drive's volume is; what ``pve_argv`` asks."""
        if drive.file.startswith("/"):
            return Volume(drive.file, drive.options.get("format", "raw"))
        storage = self.node.storage_of(drive.file)
        volume = Volume(
            storage.path(drive.file),
            storage.format(drive.file),
            storage.type,
            storage.chain,
        )
        return volume

    def context(self) -> Context:
        site = self.node.site
        return Context(
            vmid=self.vmid,
            release=site.release,
            qemu_version=site.qemu_version,
            resolve=self.resolve,
            run_dir=str(self.node.run_dir),
            qmeventd=str(self.node.qmeventd.path),
        )

    def bench(self, conf: VmConf | None = None) -> Bench:
        site = self.node.site
        return Bench(
            qemu=site.qemu,
            firmware=site.firmware,
            serial=self.serial,
            direct_io=site.direct_io,
            data_dirs=site.qemu_data_dirs,
            display=bool(conf and conf.values.get("vga")),
        )

    # -- start and end

    async def start(
        self, conf: VmConf, *, paused: bool = False, incoming: str | None = None
    ) -> None:
        """Start QEMU; volumes are activated first, and swtpm.

        Args:
            incoming: where the state of a migration will come from.

        Raises:
            ApiError: with PVE's text, and what QEMU said.
        """
        if self._watcher:
            await self._watcher
        drives = [d for d in conf.drives() if d.volume]
        await asyncio.to_thread(self._activate, drives)
        try:
            await self._launch(conf, paused or bool(incoming), incoming)
        except BaseException:
            await self._end()
            raise

    def _activate(self, drives: list[Drive]) -> None:
        for drive in drives:
            self.node.storage_of(drive.file).activate(drive.file)
            self._active.append(drive.file)

    async def _launch(self, conf: VmConf, paused: bool, incoming: str | None) -> None:
        for name in ("qmp", "qga"):
            (self.node.run_dir / f"{self.vmid}.{name}.real").unlink(missing_ok=True)
        for drive in conf.drives():
            if drive.key == "tpmstate0":
                await self._start_swtpm(self.resolve(drive).path)
        context = self.context()
        self.modern = uses_blockdev(conf, context)
        argv = adapt(pve_argv(conf, context, paused=paused), self.bench(conf))
        if extra := conf.values.get("args"):
            argv += extra.split()
        if incoming:
            argv += ["-incoming", incoming]
        log = (self.node.log_dir / f"{self.vmid}.qemu").open("ab")
        (self.node.log_dir / f"{self.vmid}.argv").write_text("\n".join(argv) + "\n")
        with log:
            self.process = await asyncio.create_subprocess_exec(
                "setpriv", "--pdeathsig", "KILL", *argv,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.started_at = time.time()
        self.gone.clear()
        self.fake_frozen = False
        real = Path(f"{self.qmp_relay.path}.real")
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self.process.returncode is not None:
                said = (self.node.log_dir / f"{self.vmid}.qemu").read_text()
                self.node.site.log(f"VM {self.vmid}: {said[-2000:].strip()}")
                raise die(
                    f"start failed: QEMU exited with code {self.process.returncode}"
                )
            if real.exists() and self.pid and await _answers(real):
                break
            await asyncio.sleep(0.02)
        else:
            raise die("start failed: command timed out")
        self.qmp_relay.start()
        if conf.agent_enabled:
            self.qga_relay.start()
        self._watcher = asyncio.create_task(self._watch(), name=f"vm {self.vmid}")

    async def _start_swtpm(self, state: str) -> None:
        run = self.node.run_dir
        log = (self.node.log_dir / f"{self.vmid}.swtpm").open("ab")
        control = run / f"{self.vmid}.swtpm"
        with log:
            self._swtpm = await asyncio.create_subprocess_exec(
                "setpriv", "--pdeathsig", "KILL",
                "swtpm", "socket", "--tpm2", "--terminate",
                "--tpmstate", f"backend-uri=file://{state}",
                "--ctrl", f"type=unixio,path={control},mode=0600",
                "--pid", f"file={run / f'{self.vmid}.swtpm.pid'}",
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(250):
            if control.exists():
                return
            if self._swtpm.returncode is not None:
                break
            await asyncio.sleep(0.02)
        raise die("start failed: command 'swtpm socket' failed: exit code 1")

    async def _watch(self) -> None:
        """What ``qm cleanup`` does once QEMU is gone, however it went."""
        assert self.process
        await self.process.wait()
        await self._end()

    async def _end(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.qmp_relay.stop()
        await self.qga_relay.stop()
        if self._swtpm:
            try:
                async with asyncio.timeout(5):
                    await self._swtpm.wait()
            except TimeoutError:
                self._swtpm.kill()
                await self._swtpm.wait()
            self._swtpm = None
        for name in ("pid", "swtpm", "swtpm.pid", "qmp.real", "qga.real", "serial0"):
            (self.node.run_dir / f"{self.vmid}.{name}").unlink(missing_ok=True)
        active, self._active = self._active, []
        for volid in active:
            try:
                storage = self.node.storage_of(volid)
                await asyncio.to_thread(storage.deactivate, volid)
            except Exception as error:
                self.node.site.log(f"VM {self.vmid}: {error}")
        self.process = self._watcher = None
        self.gone.set()

    def activated(self, volid: str) -> None:
        """Note a volume plugged in later, to be deactivated with the rest."""
        self._active.append(volid)

    async def kill(self) -> None:
        """``kill -9`` of QEMU; returns when everything is cleaned up."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.gone.wait()

    async def quit(self, timeout_s: float = 30.0) -> None:
        """Stop hard, as ``qm stop``: quit, then SIGTERM, then SIGKILL."""
        if not self.running:
            return
        try:
            await self.qmp("quit")
        except (TimeoutError, QmpRefused, ConnectionError):
            if pid := self.pid:
                os.kill(pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await self.gone.wait()
        except TimeoutError:
            await self.kill()

    # -- talk

    async def qmp(
        self, command: str, *, timeout_s: float | None = None, **arguments: Any
    ) -> Any:
        """One command through the relay, with PVE's time limit."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {
                k.replace("_", "-"): v for k, v in arguments.items()
            }
        return (await self.batch([message], timeout_s=timeout_s))[0]

    async def batch(
        self, messages: list[dict[str, Any]], *, timeout_s: float | None = None
    ) -> list[Any]:
        """Several commands in one short session."""
        if not self.running:
            raise die(f"VM {self.vmid} not running")
        wait = timeout_s or max(TIMEOUTS_S.get(m["execute"], 5.0) for m in messages)
        return await exchange(self.qmp_relay.path, messages, timeout_s=wait)

    async def hmp(self, line: str) -> str:
        text: str = await self.qmp("human-monitor-command", command_line=line)
        return text

    async def agent(
        self, command: str, *, timeout_s: float = 10.0, **arguments: Any
    ) -> Any:
        """One agent command in its own session."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {
                k.replace("_", "-"): v for k, v in arguments.items()
            }
        done = await exchange(
            self.qga_relay.path, [message], timeout_s=timeout_s, agent=True
        )
        return done[0]

    async def _agent(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The agent as the test wants it; None passes the command to the guest."""
        name = message["execute"]
        if self.agent_mode == "off":
            raise Silence
        if self.agent_mode == "hang" and name == "guest-fsfreeze-freeze":
            raise Silence
        if self.agent_mode == "guest":
            return None
        match name:
            case "guest-sync" | "guest-sync-delimited":
                return {"return": message["arguments"]["id"]}
            case "guest-ping":
                return {"return": {}}
            case "guest-fsfreeze-freeze":
                self.fake_frozen = True
                return {"return": 1}
            case "guest-fsfreeze-thaw":
                thawed, self.fake_frozen = int(self.fake_frozen), False
                return {"return": thawed}
            case "guest-fsfreeze-status":
                return {"return": "frozen" if self.fake_frozen else "thawed"}
            case "guest-info":
                return {"return": {"version": "10.0.2", "supported_commands": []}}
        text = f"The command {name} has not been found"
        return {"error": {"class": "CommandNotFound", "desc": text}}


async def _answers(monitor: Path) -> bool:
    """Whether QEMU is past its beginning: its disks are open, as ``-daemonize`` means.

    The socket and the pid file are there before.
    """
    try:
        await exchange(monitor, [{"execute": "query-status"}], timeout_s=2.0)
    except (OSError, TimeoutError, QmpRefused):
        return False
    return True


def qemu_version(program: str) -> tuple[int, int]:
    """Major and minor version of a QEMU binary."""
    said = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True
    )
    match = re.search(r"version (\d+)\.(\d+)", said.stdout)
    if not match:
        raise ValueError(f"{program} --version said {said.stdout!r}")
    return int(match[1]), int(match[2])
