# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket

import pytest

from pveplug import sdnotify


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path, monkeypatch):
    if request.param == "path":
        name = shown = str(tmp_path / "notify")
    else:
        name = f"\0pveplug-test-{os.getpid()}"
        shown = f"@{name[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", shown)
        yield receiver


def test_lines_arrive_in_one_datagram(listener):
    assert sdnotify.notify("READY=1", "STATUS=listening on 9190")
    assert listener.recv(4096) == b"READY=1\nSTATUS=listening on 9190"


def test_a_reload_carries_the_clock(listener):
    sdnotify.reloading()
    first, second = listener.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")


@pytest.mark.parametrize("where", ["", "relative", "/nonexistent/notify", "vsock:2:1"])
def test_nobody_listening_is_no_error(where, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", where)
    assert not sdnotify.notify("READY=1")


def test_the_watchdog_is_fed_twice_in_its_time(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert sdnotify.watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert sdnotify.watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert sdnotify.watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    assert sdnotify.watchdog_interval_s() is None
