# SPDX-License-Identifier: Apache-2.0
"""A DR site whose VMs start: what :mod:`pveplug.dr.failover` uses beyond a replica's.

No guest runs. ``boots`` is told each start and may write to the VM's disks as a guest
would; ``agents`` says after how many questions a guest agent answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pveplug.proto.pve_refusal import Reason
from pveplug.proto.pve_values import Resource, VmStatus
from pveplug.vmconfig import drives, is_drive_key
from tests.support.fake_pve import FakePve, refused


class FakeDrSite(FakePve):
    """:class:`FakePve` with power, an agent and clones."""

    def __init__(self, base: Path, **more: Any) -> None:
        super().__init__(base, **more)
        self.boots: Callable[[int], None] = lambda vmid: None
        self.agents = 1
        """Answers at this question; 0: never."""
        self.dies = False
        """A VM that is started ends at once."""
        self.deaf = False
        """A shutdown is not heard."""
        self._asked: dict[int, int] = {}

    async def resources(self, *, containers: bool = False) -> list[Resource]:
        return [
            Resource(
                *(vmid, "pve1", config.get("name", ""), "qemu"),
                "running" if vmid in self.running else "stopped",
                *(False, "", tuple(config.get("tags", "").split(";")), ""),
            )
            for vmid, config in self.vms.items()
        ]

    async def vm_status(self, node: str, vmid: int) -> VmStatus:
        config = self._vm(vmid)
        status = "running" if vmid in self.running else "stopped"
        return VmStatus(
            *(status, status, "", "", "", 1, bool(config.get("agent"))),
            *(config.get("name", ""), 1, False, False),
        )

    async def start_vm(self, node: str, vmid: int, **more: Any) -> list[str]:
        self.before(f"start {vmid}")
        self._vm(vmid)
        if not self.dies:
            self.running.add(vmid)
        self._asked[vmid] = 0
        self.boots(vmid)
        self._did(f"start {vmid}")
        return []

    async def stop_vm(self, node: str, vmid: int, **more: Any) -> list[str]:
        self.before(f"stop {vmid}")
        self.running.discard(vmid)
        self._did(f"stop {vmid}")
        return []

    async def shutdown_vm(self, node: str, vmid: int, **more: Any) -> list[str]:
        self.before(f"shutdown {vmid}")
        if self.deaf:
            raise refused("VM quit/powerdown failed - got timeout", Reason.BUSY)
        self.running.discard(vmid)
        self._did(f"shutdown {vmid}")
        return []

    async def agent_ping(self, node: str, vmid: int) -> None:
        self._asked[vmid] = self._asked.get(vmid, 0) + 1
        silent = vmid not in self.running or not self.agents
        if silent or self._asked[vmid] < self.agents:
            raise refused("QEMU guest agent is not running", Reason.AGENT_SILENT)

    async def destroy_vm(self, node: str, vmid: int, **more: Any) -> list[str]:
        if vmid in self.running:
            raise refused(f"VM {vmid} is running - destroy failed")
        return await super().destroy_vm(node, vmid, **more)

    async def clone_vm(
        self,
        node: str,
        vmid: int,
        newid: int,
        *,
        snapname: str | None = None,
        name: str | None = None,
        description: str | None = None,
        **more: Any,
    ) -> list[str]:
        self.before(f"clone {vmid} {snapname}")
        assert more["full"]
        body = dict(self.snaps[vmid][snapname] if snapname else self._vm(vmid))
        for gone in ("snaptime", "own-description", "smbios1", "parent"):
            body.pop(gone, None)
        for drive in drives(body):
            if drive.storage:
                target = self.base / drive.storage / str(newid)
                target.mkdir(parents=True, exist_ok=True)
                file = target / Path(drive.file).name.replace(str(vmid), str(newid))
                at = ["-l", f"snapshot.name={snapname}"] if snapname else []
                where = str(self.file(drive.file))
                self.img("convert", "-O", "qcow2", *at, where, str(file))
                body[drive.key] = f"{drive.storage}:{newid}/{file.name}"
        body |= {"name": name or "", "description": description or ""}
        self.vms[newid], self.snaps[newid] = body, {}
        self._did(f"clone {vmid} {snapname}")
        return []

    # --- for tests

    def write(self, volid: str, offset: int, data: bytes) -> None:
        """Write to a disk as its guest would."""
        piece = self.base / "written"
        piece.write_bytes(data)
        program = self.node.qemu_img.replace("qemu-img", "qemu-io")
        program = shutil.which(program) or program
        command = f"write -s {piece} {offset} {len(data)}"
        self._run(program, "-f", "qcow2", "-c", command, str(self.file(volid)))

    def _run(self, *argv: str) -> None:
        import subprocess

        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def disks(self, vmid: int) -> dict[str, str]:
        """Volume ids by key, of the VM as it is configured."""
        return {
            drive.key: drive.file
            for drive in drives(self.vms[vmid])
            if is_drive_key(drive.key) and drive.storage
        }
