# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pveplug import watchdog
from pveplug.errors import RemoteProtocolError, TransportError
from pveplug.qga import AsyncGuestAgent, GuestAgent, GuestAgentError
from pveplug.watchdog import ThawWatchdog


class ScriptedAgent:
    """A guest agent on a unix socket that serves one client at a time, as QEMU does.

    ``stale`` is what an earlier client left unread: it comes before anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.frozen = 0
        self.commands: list[str] = []
        self.sessions = 0
        self.stale = b""
        self.silent_sessions = 0
        self.answers: dict[str, Callable[[], bytes]] = {}
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(8)
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.sessions += 1
            with client:
                self._clients.append(client)
                try:
                    self._session(client)
                except OSError:
                    pass

    def _session(self, client: socket.socket) -> None:
        silent = self.silent_sessions > 0
        self.silent_sessions -= silent
        if self.stale:
            client.sendall(self.stale)
            self.stale = b""
        buffer = b""
        while data := client.recv(4096):
            if silent:
                continue
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                client.sendall(self._answer(line))

    def _answer(self, line: bytes) -> bytes:
        # Like qemu-ga: 0xFF makes its parser complain and start afresh.
        _, mark, rest = line.rpartition(b"\xff")
        message = json.loads(rest)
        command = message["execute"]
        if command == "guest-sync-delimited":
            complaint = b'{"error":{"class":"GenericError","desc":"x"}}\n'
            sync = json.dumps({"return": message["arguments"]["id"]}).encode()
            return (complaint if mark else b"") + b"\xff" + sync + b"\n"
        self.commands.append(command)
        if command in self.answers:
            return self.answers[command]()
        result: object
        match command:
            case "guest-ping":
                result = {}
            case "guest-fsfreeze-status":
                result = "frozen" if self.frozen else "thawed"
            case "guest-fsfreeze-freeze":
                self.frozen = result = 2
            case "guest-fsfreeze-thaw":
                result, self.frozen = self.frozen, 0
            case _:
                return b'{"error":{"class":"CommandNotFound","desc":"unknown"}}\n'
        return json.dumps({"return": result}).encode() + b"\n"

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for client in self._clients:
            try:
                client.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._thread.join(5)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[ScriptedAgent]:
    scripted = ScriptedAgent(tmp_path / "100.qga")
    yield scripted
    scripted.close()


# --- GuestAgent --------------------------------------------------------------------


def test_each_call_is_a_session_of_its_own(agent):
    guest = GuestAgent(agent.path)
    guest.ping()
    assert guest.freeze_status() == "thawed"
    assert guest.freeze() == 2
    assert guest.freeze_status() == "frozen"
    assert guest.thaw() == 2
    assert guest.thaw() == 0
    assert agent.sessions == 6


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": {}}\n',
        b'{"return": 7}\n\xff{"return": 12345}\n',
        b'\xff{"return": 1}\n\xff{"return": 2}\n{"return": "frozen"}\n',
        b'{"half of an ans',
        b"\xff" * 50,
        b"x" * 200_000 + b"\n",
        b'\xff\xff{"ret',
    ],
)
def test_what_an_earlier_client_left_is_skipped(agent, stale):
    agent.stale = stale
    assert GuestAgent(agent.path).freeze_status(5.0) == "thawed"


def test_a_refusal_is_the_agents_own_words(agent):
    refused = b'{"error":{"class":"GenericError","desc":"The command is disabled"}}\n'
    agent.answers["guest-fsfreeze-freeze"] = lambda: refused
    with pytest.raises(GuestAgentError, match="The command is disabled") as caught:
        GuestAgent(agent.path).freeze()
    assert caught.value.command == "guest-fsfreeze-freeze"


@pytest.mark.parametrize(
    "answer", [b"garbage\n", b"[]\n", b"{}\n", b'{"return":"many"}\n', b"x" * 70_000]
)
def test_nonsense_is_the_peers_fault(agent, answer):
    agent.answers["guest-fsfreeze-thaw"] = lambda: answer
    with pytest.raises(RemoteProtocolError):
        GuestAgent(agent.path).thaw(2.0)


def test_a_channel_held_by_another_client_ends_by_the_deadline(agent):
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(agent.path)
        started = time.monotonic()
        with pytest.raises(TransportError, match="another program holds"):
            GuestAgent(agent.path).ping(0.3)
        assert 0.25 < time.monotonic() - started < 20
    GuestAgent(agent.path).ping(5.0)


def test_an_agent_that_trickles_is_bounded_as_a_whole(agent):
    agent.answers["guest-ping"] = lambda: time.sleep(0.2) or b"{"
    with pytest.raises(TransportError, match="did not answer"):
        GuestAgent(agent.path).ping(0.4)


def test_a_closed_channel_is_told(agent):
    def close():
        raise OSError("gone")

    agent.answers["guest-ping"] = close
    with pytest.raises(TransportError, match="closed by QEMU"):
        GuestAgent(agent.path).ping()


def test_no_channel_is_told(tmp_path):
    with pytest.raises(TransportError, match="agent: 1"):
        GuestAgent(str(tmp_path / "none.qga")).ping()


async def test_coroutines_have_the_same_calls(agent):
    guest = AsyncGuestAgent(agent.path)
    await guest.ping()
    assert await guest.freeze() == 2
    assert await guest.freeze_status() == "frozen"
    assert await guest.thaw() == 2


# --- watchdog ----------------------------------------------------------------------


def dog(agent: ScriptedAgent, tmp_path: Path, **options) -> ThawWatchdog:
    options.setdefault("budget_s", 30)
    options.setdefault("retry_s", 10)
    log = str(tmp_path / "dog.log")
    return ThawWatchdog(100, agent.path, log_file=log, **options)


async def test_a_disarmed_watchdog_does_nothing(agent, tmp_path):
    agent.frozen = 1
    async with dog(agent, tmp_path) as watching:
        pass
    assert watching.fired is False
    assert agent.commands == []


async def test_a_freeze_over_budget_is_ended_and_known(agent, tmp_path):
    agent.frozen = 1
    async with dog(agent, tmp_path, budget_s=0.2) as watching:
        await until(lambda: not agent.frozen)
    assert watching.fired is True
    assert "the freeze lasted over 0.2 s" in (tmp_path / "dog.log").read_text()


async def test_a_busy_channel_is_tried_until_it_is_free(agent, tmp_path, monkeypatch):
    agent.frozen = 1
    other = socket.socket(socket.AF_UNIX)
    other.connect(agent.path)
    async with dog(agent, tmp_path, budget_s=0.1) as watching:
        await asyncio.sleep(0.5)
        assert agent.frozen
        other.close()
        await until(lambda: not agent.frozen)
    assert watching.fired


async def test_a_vm_that_ended_needs_no_thaw(tmp_path):
    watching = ThawWatchdog(100, str(tmp_path / "none.qga"), budget_s=0.05, retry_s=1)
    await watching.start()
    await asyncio.sleep(0.3)
    assert await watching.disarm() is True


async def test_a_guest_that_stays_frozen_is_reported(agent, tmp_path):
    agent.frozen = 1
    agent.answers["guest-fsfreeze-thaw"] = lambda: (
        b'{"error":{"class":"GenericError","desc":"EIO"}}\n'
    )
    async with dog(agent, tmp_path, budget_s=0.05, retry_s=0.2):
        await until(lambda: "STILL FROZEN" in read(tmp_path / "dog.log"))
    assert "qm agent 100 fsfreeze-thaw" in read(tmp_path / "dog.log")


async def test_an_error_in_the_job_still_disarms(agent, tmp_path):
    watching = dog(agent, tmp_path)
    with pytest.raises(ValueError, match="boo"):
        async with watching:
            raise ValueError("boo")
    assert watching.fired is False
    assert await watching.disarm() is False


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def until(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


PARENT = """
import asyncio, sys
from pveplug.qga import AsyncGuestAgent
from pveplug.watchdog import ThawWatchdog
async def main():
    async with ThawWatchdog(100, sys.argv[1], budget_s=60, log_file=sys.argv[2]):
        await AsyncGuestAgent(sys.argv[1]).freeze()
        print("frozen", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
def test_a_killed_job_leaves_a_thawed_guest(agent, tmp_path, number, group):
    log = tmp_path / "dog.log"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, agent.path, str(log)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"frozen\n"
        assert agent.frozen
        if group:
            os.killpg(parent.pid, number)
        else:
            parent.send_signal(number)
        killed = time.monotonic()
        while agent.frozen:
            assert time.monotonic() - killed < 10
            time.sleep(0.02)
    assert "the job's process died" in read(log)


def test_the_watchdog_is_up_fast_and_imports_next_to_nothing(agent):
    script = str(Path(watchdog.__file__))
    started = time.monotonic()
    child = subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            "-X",
            "importtime",
            script,
            "100",
            agent.path,
            "9",
            "1",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        took = time.monotonic() - started
        _, err = child.communicate(b"disarm\n")
    assert child.returncode == 0
    loaded = {line.rpartition(b"|")[2].strip().decode() for line in err.splitlines()}
    assert not loaded & {"asyncio", "aiohttp", "logging", "dataclasses", "ssl"}
    assert took < 10  # 0.04 s on an idle machine


@pytest.mark.parametrize("word", [b"disarm\n", b"thawed\n"])
def test_both_words_disarm(agent, word):
    assert script(agent, word).returncode == watchdog.DISARMED


def test_any_other_end_of_input_thaws(agent):
    agent.frozen = 1
    assert script(agent, b"disar").returncode == watchdog.THAWED
    assert not agent.frozen


def test_sigterm_thaws(agent):
    agent.frozen = 1
    child = start(agent)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == watchdog.THAWED
    assert not agent.frozen


def start(agent: ScriptedAgent) -> subprocess.Popen[bytes]:
    script = str(Path(watchdog.__file__))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", script, "100", agent.path, "20", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def script(agent: ScriptedAgent, said: bytes) -> subprocess.Popen[bytes]:
    child = start(agent)
    child.communicate(said, timeout=15)
    return child


async def test_a_watchdog_that_does_not_come_up_forbids_the_freeze(
    agent, tmp_path, monkeypatch
):
    monkeypatch.setattr(watchdog, "_SCRIPT", str(tmp_path / "gone.py"))
    with pytest.raises(TransportError, match="not freezing"):
        await dog(agent, tmp_path).start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(TransportError, match="can't start"):
        await dog(agent, tmp_path).start()
