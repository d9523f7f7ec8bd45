# SPDX-License-Identifier: Apache-2.0
"""The tools of the other tests: the guest boots and obeys, the old releases run."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.requires import BACULA_9, QEMU_7, program, requires, requires_file
from tests.support.tiny_guest import BLOCK, BOOT_DISK, EFI_DISK, pattern

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OVMF = Path("/usr/share/OVMF")
DATA_BLOCKS = 1024


class Guest:
    """A booted tiny guest: its console's markers, and its agent."""

    def __init__(self, directory: Path, markers: list[str]) -> None:
        self.markers = markers
        self.data = directory / "data.raw"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(directory / "qga"))
        self._replies = self._socket.makefile("rb")

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(self._replies.readline())["return"]

    def run(self, path: str, *arg: str) -> str:
        """Run a program of the guest to its end; return what it printed."""
        request = {"path": path, "arg": list(arg), "capture-output": True}
        pid = self.ask("guest-exec", **request)["pid"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            status = self.ask("guest-exec-status", pid=pid)
            if status["exited"]:
                assert status["exitcode"] == 0, status
                return base64.b64decode(status.get("out-data", "")).decode()
            time.sleep(0.1)
        pytest.fail(f"{path} took over a minute in the guest")


@contextlib.contextmanager
def booted(directory: Path, disk: Path, *machine: str) -> Iterator[Guest]:
    shutil.copyfile(disk, directory / "boot.raw")
    with (directory / "data.raw").open("wb") as file:
        file.truncate(DATA_BLOCKS * BLOCK)
    console = directory / "console"
    argv = [
        *(program("qemu-system-x86_64") or "", *machine, "-accel", "tcg"),
        *("-nodefaults", "-display", "none", "-serial", f"file:{console}"),
        *("-device", "virtio-scsi-pci", "-device", "virtio-serial-pci"),
        *("-drive", f"file={directory}/boot.raw,format=raw,if=none,id=boot"),
        *("-device", "scsi-hd,drive=boot,bootindex=1"),
        *("-drive", f"file={directory}/data.raw,format=raw,if=virtio"),
        *("-chardev", f"socket,id=agent,path={directory}/qga,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
    qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        guest = Guest(directory, wait_until_ready(qemu, console))
        with contextlib.closing(guest):
            yield guest
    finally:
        qemu.kill()
        qemu.wait()


def wait_until_ready(qemu: subprocess.Popen[bytes], console: Path) -> list[str]:
    """Return the markers the console showed, TG:READY the last."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and qemu.poll() is None:
        text = console.read_text(errors="replace") if console.exists() else ""
        markers = [
            line[line.index("TG:") :] for line in text.split("\n") if "TG:" in line
        ]
        if markers and re.fullmatch(r"TG:READY [\d.]+\s+", markers[-1] + " "):
            return [marker.strip() for marker in markers]
        time.sleep(0.1)
    pytest.fail(f"the guest isn't ready: {console.read_text(errors='replace')[-2000:]}")


@requires("qemu-system-x86_64")
@requires_file(BOOT_DISK)
def test_guest_boots_by_bios_and_does_as_told(short_tmp: Path) -> None:
    with booted(short_tmp, BOOT_DISK, "-m", "192") as guest:
        kinds = [marker.split(" ")[0] for marker in guest.markers]
        assert kinds == ["TG:INIT", "TG:DISKS", "TG:ROOT", "TG:FILE", "TG:READY"]
        assert guest.markers[1] == "TG:DISKS sda:131072 vda:8192"
        guest.ask("guest-ping")
        assert guest.ask("guest-fsfreeze-freeze") == 1
        assert guest.ask("guest-fsfreeze-status") == "frozen"
        assert guest.ask("guest-fsfreeze-thaw") == 1
        assert "TG:MARKED" in guest.run("tg-mark", "it", "was", "here")
        guest.run("tg-write", "/dev/vda", "7", "2", "spring")
        counted = guest.run("tg-writer", "/dev/vda", "1", "summer", "100").split()
        assert 1 <= int(counted[2]) <= 110
        took = guest.run("tg-latency", "/dev/vda", "1", "winter", "100").split()
        assert 1 <= len(took) <= 101
        assert all(int(one) > 0 for one in took)
        guest.run("tg-write", "/dev/vda", "7", "2", "autumn")
        seen = guest.run("tg-sum", "/dev/vda").strip()
        content = guest.data.read_bytes()
        assert hashlib.sha256(content).hexdigest() == seen
        assert content[7 * BLOCK : 9 * BLOCK] == pattern("autumn", 7) + pattern(
            "autumn", 8
        )
        written = {content[i * BLOCK : (i + 1) * BLOCK] for i in range(DATA_BLOCKS)}
        assert written & {pattern("summer", i) for i in range(DATA_BLOCKS)}


@requires("qemu-system-x86_64")
@requires_file(EFI_DISK, OVMF / "OVMF_CODE_4M.fd")
def test_guest_boots_by_uefi(short_tmp: Path) -> None:
    shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", short_tmp / "vars.fd")
    flash = "if=pflash,format=raw"
    machine = (
        *("-machine", "q35", "-m", "256"),
        *("-drive", f"{flash},readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
        *("-drive", f"{flash},file={short_tmp}/vars.fd"),
    )
    with booted(short_tmp, EFI_DISK, *machine) as guest:
        assert "TG:FILE tiny-guest" in guest.markers
        assert guest.ask("guest-fsfreeze-status") == "thawed"


@pytest.mark.parametrize(
    ("path", "arguments", "version"),
    [
        (BACULA_9 / "bin" / "bacula-fd", ["-?"], "9.6.7"),
        (BACULA_9 / "bin" / "bacula-dir", ["-?"], "9.6.7"),
        (QEMU_7 / "bin" / "qemu-system-x86_64", ["--version"], "version 7.2"),
        (QEMU_7 / "bin" / "qemu-nbd", ["--version"], "7.2"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_older_releases_run_from_their_prefix(
    path: Path, arguments: list[str], version: str
) -> None:
    if not path.exists():
        pytest.skip(f"needs {path}: ./dev setup makes it")
    ran = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30)
    assert version in ran.stdout + ran.stderr
