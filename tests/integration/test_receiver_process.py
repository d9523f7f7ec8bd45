# SPDX-License-Identifier: Apache-2.0
"""The receiver as a process: how it starts, reloads, says how it is, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pveplug.dr.channel import (
    AuthenticationError,
    Channel,
    ClientAuth,
    connect,
)
from pveplug.errors import TransportError
from pveplug.proto import dr_frames as f
from tests.support.dr_certs import pair
from tests.support.nbd_servers import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
RECEIVER = (sys.executable, "-m", "pveplug.dr.receiver_main")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


class Daemon:
    """One receiver with its files, and a socket on which it talks to "systemd"."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.port = free_port()
        self.config = base / "receiver-x.toml"
        self.more: dict[str, str] = {}
        self.process: asyncio.subprocess.Process | None = None
        tls = base / "tls"
        tls.mkdir()
        self.certificate = pair(tls, "receiver", names=("127.0.0.1",))
        Path(self.certificate.key).chmod(0o600)
        self.new_token()
        self.private("secret", "s3cret-of-pve")
        self.write()
        self.node = base / "node.toml"
        self.node.write_text(
            f'state_dir = "{base}/state"\nruntime_dir = "{base}/run"\n'
        )
        name = f"\0pveplug-notify-{secrets.token_hex(6)}"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(name)
        self.notify.setblocking(False)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PODHEITOR_PROXMOX_NODE": str(self.node),
            "NOTIFY_SOCKET": f"@{name[1:]}",
            "WATCHDOG_USEC": "400000",
        }

    def private(self, name: str, text: str) -> Path:
        path = self.base / name
        path.write_text(f"{text}\n")
        path.chmod(0o600)
        return path

    def new_token(self) -> None:
        self.token = secrets.token_hex(32)
        self.private("token", self.token)

    def write(self, **changes: str) -> None:
        keys = {
            "port": str(self.port),
            "sessions": "2",
            "token": f'"{self.base}/token"',
            "metrics": "0",
            **changes,
        }
        self.config.write_text(
            f'name = "x"\nbind = "127.0.0.1"\nport = {keys["port"]}\n'
            f'state_dir = "{self.base}/replicas"\n'
            f'[tls]\ncert = "{self.certificate.cert}"\nkey = "{self.certificate.key}"\n'
            f"[auth]\ntoken_file = {keys['token']}\n"
            f'[pve]\nport = 1\ntoken_id = "a@pve!tok"\n'
            f'token_secret_file = "{self.base}/secret"\n'
            f"[limits]\nsessions = {keys['sessions']}\n"
            f"[metrics]\nport = {keys['metrics']}\n"
        )

    async def start(self) -> None:
        self.log = (self.base / "log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            *(*RECEIVER, "--config", str(self.config)),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=self.environment,
        )
        await self.said("READY=1")

    async def said(self, wanted: str) -> str:
        """Wait until it has told systemd so."""
        async with asyncio.timeout(20):
            while True:
                data = await asyncio.get_running_loop().sock_recv(self.notify, 4096)
                if wanted in data.decode().split("\n"):
                    return data.decode()

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(20):
            return await self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def logged(self) -> str:
        return (self.base / "log").read_text()

    async def connect(self, token: str = "") -> Channel:
        auth = ClientAuth(
            token=(token or self.token).encode(),
            fingerprints=(self.certificate.fingerprint,),
        )
        return await connect("127.0.0.1", self.port, auth=auth)

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        self.notify.close()
        with contextlib.suppress(AttributeError):
            self.log.close()


@pytest.fixture
async def daemon(short_tmp: Path) -> AsyncIterator[Daemon]:
    made = Daemon(short_tmp)
    yield made
    await made.close()


async def asked(channel: Channel, frame: f.Frame) -> f.Message | None:
    await channel.send(frame)
    raw = await channel.receive()
    return None if raw is None else f.decode(raw.type, raw.payload)


STATUS = f.Open("status", "", 0, "", "site", "job")


async def test_it_says_ready_feeds_the_watchdog_and_answers(daemon):
    await daemon.start()
    text = await daemon.said("WATCHDOG=1")
    assert f"STATUS=port {daemon.port}: 0 of 2 sessions" in text
    async with await daemon.connect() as channel:
        assert isinstance(await asked(channel, STATUS), f.State)
        result = await asked(channel, f.Command("status"))
        assert result == f.Result("status", 0, {"replicas": []})
        await channel.send(f.Bye())
        assert await channel.receive() is None
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert "receiver ended name=x" in daemon.logged()
    assert daemon.token not in daemon.logged()


async def test_a_reload_takes_a_new_token_and_limit_and_keeps_sessions(daemon):
    await daemon.start()
    old = daemon.token
    async with await daemon.connect() as before:
        assert isinstance(await asked(before, STATUS), f.State)
        daemon.new_token()
        daemon.write(sessions="1")
        daemon.signal(signal.SIGHUP)
        await daemon.said("RELOADING=1")
        await daemon.said("READY=1")
        with pytest.raises((AuthenticationError, TransportError)):
            await daemon.connect(old)
        async with await daemon.connect() as late:
            raw = await late.receive()  # it has no ear for more
            told = f.decode(raw.type, raw.payload)
            assert isinstance(told, f.Refusal)
            assert told.code == "busy"
        assert isinstance(await asked(before, f.Command("status")), f.Result)


async def test_a_broken_file_changes_nothing_at_a_reload(daemon):
    await daemon.start()
    daemon.write(sessions='"many"')
    daemon.signal(signal.SIGHUP)
    await daemon.said("RELOADING=1")
    await daemon.said("READY=1")
    assert "all stays as it was" in daemon.logged()
    assert "limits.sessions must be a whole number" in daemon.logged()
    async with await daemon.connect() as channel:
        assert isinstance(await asked(channel, STATUS), f.State)


async def test_what_needs_a_restart_is_said_at_a_reload(daemon):
    await daemon.start()
    daemon.write(port=str(free_port()))
    daemon.signal(signal.SIGHUP)
    await daemon.said("RELOADING=1")
    await daemon.said("READY=1")
    assert "reload ignores port: it needs a restart" in daemon.logged()


async def test_a_stop_ends_idle_sessions_at_once(daemon):
    await daemon.start()
    async with await daemon.connect() as channel:
        assert isinstance(await asked(channel, STATUS), f.State)
        daemon.signal(signal.SIGTERM)
        text = await daemon.said("STOPPING=1")
        assert "ending 1 sessions" in text
        with contextlib.suppress(TransportError):
            assert await channel.receive() is None
        async with asyncio.timeout(5):
            assert await daemon.ended() == 0


async def test_a_taken_port_is_said_in_so_many_words(daemon):
    with socket.socket() as other:
        other.bind(("127.0.0.1", daemon.port))
        other.listen()
        status, text = await run("--config", str(daemon.config), daemon=daemon)
    assert status == 69
    assert "a receiver and a sender (File Daemon) on one host clash" in text
    assert f"port {daemon.port} is taken" in text


async def test_a_taken_metrics_port_is_said(daemon):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        daemon.write(metrics=str(other.getsockname()[1]))
        status, text = await run("--config", str(daemon.config), daemon=daemon)
    assert status == 69
    assert "metrics.port" in text


async def test_metrics_are_served_on_loopback(daemon):
    port = free_port()
    daemon.write(metrics=str(port))
    await daemon.start()

    def scrape() -> str:
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as page:
            return page.read().decode()

    async with await daemon.connect() as channel:
        assert isinstance(await asked(channel, STATUS), f.State)
        assert "podheitor_proxmox_receiver_sessions 1.0" in (
            await asyncio.to_thread(scrape)
        )


async def run(*argv: str, daemon: Daemon) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(*RECEIVER, *argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=daemon.environment,
    )
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_a_check_finds_a_good_configuration_good_and_contacts_nobody(daemon):
    status, text = await run("--check", "--config", str(daemon.config), daemon=daemon)
    assert (status, text) == (*(0, f"{daemon.config}: receiver x can be started\n"),)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: d.config.unlink(), "does not exist"),
        (lambda d: d.write(sessions="0"), "limits.sessions must be"),
        (lambda d: (d.base / "token").chmod(0o644), "chmod 600"),
        (lambda d: d.private("token", "short"), "at least"),
        (lambda d: Path(d.certificate.key).write_text("x"), "not usable"),
        (lambda d: (d.base / "secret").unlink(), "pve.token_secret_file"),
        (lambda d: d.node.write_text("x = 1"), "unknown key x"),
    ],
)
async def test_a_wrong_configuration_is_status_78_and_one_line(daemon, spoil, said):
    spoil(daemon)
    for more in ((), ("--check",)):
        status, text = await run(*more, "--config", str(daemon.config), daemon=daemon)
        assert status == 78, text
        assert said in text
        assert len(text.splitlines()) == 1
        assert daemon.token not in text


@pytest.mark.parametrize(
    ("argv", "status"), [((), 2), (("--help",), 0), (("--version",), 0)]
)
async def test_its_command_line(daemon, argv, status):
    found, text = await run(*argv, daemon=daemon)
    assert found == status
    assert "podheitor-proxmox-receiver" in text


@pytest.mark.optional("a container without systemd has no unit to run either")
def test_systemd_finds_no_fault_with_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = REPOSITORY / "deploy" / "podheitor-proxmox-receiver@.service"
    text = unit.read_text().replace("/usr/bin/podheitor-proxmox-receiver", "/bin/true")
    copy = tmp_path / "podheitor-proxmox-receiver@main.service"
    copy.write_text(text)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "podheitor" in line]
    assert not ours
    assert done.returncode == 0


def test_each_hardening_directive_of_the_unit_has_a_reason():
    unit = REPOSITORY / "deploy" / "podheitor-proxmox-receiver@.service"
    service = unit.read_text().partition("[Service]")[2].partition("[Install]")[0]
    explained = False
    for line in service.splitlines():
        if line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        else:
            assert explained, f"no word of why: {line}"
    assert re.search(r"^User=root$", service, re.MULTILINE)
