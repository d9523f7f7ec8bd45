# SPDX-License-Identifier: Apache-2.0
"""A QEMU with disks and no guest, in both of PVE's block layouts.

Guest-side writes are made with HMP ``qemu-io -d``, which goes through the guest
device's own block backend, so through throttle and any filter. A second monitor is the
"guest", so that the product has the first one to itself, as on a PVE node.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

QEMU = os.environ.get("QEMU_SYSTEM", "qemu-system-x86_64")


@dataclass(frozen=True)
class DiskImage:
    path: Path
    format: str
    size: int


def make_image(path: Path, fmt: str, size: int) -> DiskImage:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", fmt, str(path), str(size)], check=True
    )
    return DiskImage(path, fmt, size)


class BareQemu:
    """``with BareQemu(tmp, "blockdev", {"scsi0": image}) as vm: vm.io("scsi0", …)``."""

    def __init__(self, base: Path, layout: str, disks: dict[str, DiskImage]) -> None:
        self.base, self.layout, self.disks = base, layout, disks
        self.qmp_path = str(base / "100.qmp")
        self.guest_path = str(base / "guest.qmp")
        self.more: list[str] = []
        """More arguments for QEMU."""

    @property
    def volids(self) -> dict[str, str]:
        return {key: f"local:100/{d.path.name}" for key, d in self.disks.items()}

    def arguments(self) -> list[str]:
        found = ["-device", "virtio-scsi-pci,id=scsihw0"]
        for index, (key, disk) in enumerate(self.disks.items()):
            drive = f"drive-{key}"
            if self.layout == "drive":
                found += [
                    "-drive",
                    f"if=none,id={drive},file={disk.path},format={disk.format},"
                    "cache=none,aio=threads,discard=on,detect-zeroes=unmap",
                ]
            else:
                text = f"drive={key},volid={self.volids[key]}"
                name = hashlib.sha256(text.encode()).hexdigest()[:30]
                cache = {"direct": True, "no-flush": False}
                found += ["-object", f"throttle-group,id=throttle-{drive}"]
                node = {
                    "driver": "throttle",
                    "node-name": drive,
                    "throttle-group": f"throttle-{drive}",
                    "discard": "unmap",
                    "detect-zeroes": "unmap",
                    "cache": cache,
                    "file": {
                        "driver": disk.format,
                        "node-name": f"f{name}",
                        "discard": "unmap",
                        "cache": cache,
                        "file": {
                            "driver": "file",
                            "node-name": f"e{name}",
                            "filename": str(disk.path),
                            "aio": "threads",
                            "discard": "unmap",
                            "cache": cache,
                        },
                    },
                }
                found += ["-blockdev", json.dumps(node)]
            found += [
                "-device",
                f"scsi-hd,bus=scsihw0.0,scsi-id={index},drive={drive},id={key}",
            ]
        return found

    def start(self) -> BareQemu:
        self._errors = (self.base / "qemu.err").open("wb")
        self.process = subprocess.Popen(
            [
                *(QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64"),
                *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
                *("-qmp", f"unix:{self.guest_path},server=on,wait=off"),
                *self.arguments(),
                *self.more,
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                self._guest = socket.socket(socket.AF_UNIX)
                self._guest.connect(self.guest_path)
                break
            except OSError:
                self._guest.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.base / "qemu.err").read_text()) from None
                time.sleep(0.02)
        self._file = self._guest.makefile("rw")
        self._file.readline()
        self.command("qmp_capabilities")
        return self

    def command(self, name: str, /, **arguments: object) -> object:
        message = {"execute": name, "arguments": arguments}
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()
        while True:
            reply = json.loads(self._file.readline())
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise RuntimeError(f"{name}: {reply['error']['desc']}")

    def io(self, key: str, text: str) -> None:
        """Write as the guest would: ``io("scsi0", "write -P 1 0 64k")``."""
        line = f'qemu-io -d {key} "{text}"'
        self.command("human-monitor-command", **{"command-line": line})

    def ours(self) -> list[str]:
        nodes = self.command("query-named-block-nodes", flat=True)
        names = [n["node-name"] for n in nodes]  # type: ignore[attr-defined]
        for query in ("query-block-exports", "query-jobs"):
            names += [e["id"] for e in self.command(query)]  # type: ignore[attr-defined]
        return [n for n in names if n.startswith("ph-")]

    def quit(self) -> None:
        """Have it end by itself, as a VM that is shut down."""
        self.command("quit")
        self.process.wait(20)
        self.stop()

    def stop(self) -> None:
        """Kill it."""
        self._file.close()
        self._guest.close()
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def __enter__(self) -> BareQemu:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
