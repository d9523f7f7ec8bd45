# SPDX-License-Identifier: Apache-2.0
"""Stands between bacula-fd and the backend and damages what a backup sends.

A program of its own (:func:`install` writes it): with an empty orders file it becomes
the backend itself; otherwise it passes PTCOMM on packet by packet, and does to the
image of ``scsi0``, to ``vm.conf`` or to the restore objects what the orders file says:
``data``, ``header``, ``parent`` (the name of the image it builds on), ``truncated``,
``config`` or ``object``. What Bacula stores is then damaged in a way
that its own checksums can't notice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HEADER = 8


def install(program: Path, backend: Path, orders: Path) -> None:
    """Write the program; it damages what ``orders`` says when a job begins."""
    orders.touch()
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import damaging_backend\n"
        f"damaging_backend.main({str(backend)!r}, {str(orders)!r})\n"
    )
    program.chmod(0o755)


def main(backend: str, orders: str) -> None:
    wish = Path(orders).read_text().strip()
    if not wish or len(sys.argv) > 1:
        os.execv(backend, [backend, *sys.argv[1:]])
    process = subprocess.Popen([backend], stdout=subprocess.PIPE)
    assert process.stdout is not None
    damage = Damage(wish)
    while head := process.stdout.read(HEADER):
        length = int(head[1:7]) if head[:1].isalpha() else 0
        payload = process.stdout.read(length) if head[1:7].isdigit() else b""
        for packet in damage.packet(head[:1], payload):
            os.write(1, packet)
    os._exit(process.wait())


class Damage:
    """What becomes of each packet."""

    def __init__(self, wish: str) -> None:
        self.wish = wish
        self.image = self.config = self.object = False
        self.cut = self.done = False

    def packet(self, letter: bytes, payload: bytes) -> list[bytes]:
        if letter == b"C":
            if payload.startswith((b"FNAME:", b"RESTOREOBJ:", b"PLUGINCONFIG:")):
                self.image = payload.rstrip().endswith(b"/scsi0.qcow2")
                self.config = payload.rstrip().endswith(b"/vm.conf")
                self.object = payload.startswith(b"RESTOREOBJ:")
                self.cut = False
            elif self.cut and payload.startswith(b"OFFSET:"):
                return []
        elif letter == b"D":
            if self.cut:
                return []
            payload = self._data(payload)
        return [b"%b%06d\n" % (letter, len(payload)) + payload]

    def _data(self, payload: bytes) -> bytes:
        big = len(payload) >= 65536
        if self.image and big and self.wish == "truncated":
            self.cut = True
            return payload[:65536]
        hit = (
            (self.image and self.wish == "header")
            or (self.image and big and self.wish == "data")
            or (self.image and self.wish == "parent" and b"../" in payload)
            or (self.config and self.wish == "config")
            or (self.object and self.wish == "object")
        )
        if not hit or self.done:
            return payload
        self.done = True
        at = 0 if self.wish == "header" else len(payload) // 2
        if self.wish == "parent":
            at = payload.index(b"../") + 4
            return payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        return payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :]
