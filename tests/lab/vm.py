# SPDX-License-Identifier: Apache-2.0
"""What tests do with a VM of the lab."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import configops, lifecycle
from .qemu import Machine
from .relay import QmpRefused
from .storage import copy_image
from .tasks import Task
from .vmconfig import Drive, VmConf

if TYPE_CHECKING:
    from .site import LabNode, Site

OURS = "ph-"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class LabVm:
    """A handle on one VM; cheap, holds no state of its own."""

    def __init__(self, site: Site, node: LabNode, vmid: int) -> None:
        self.site = site
        self.node = node
        self.vmid = vmid

    @property
    def machine(self) -> Machine:
        return self.site.machine(self.vmid, self.node)

    @property
    def conf(self) -> VmConf:
        return self.site.load(self.node, self.vmid)

    @property
    def running(self) -> bool:
        return self.machine.running

    @property
    def pid(self) -> int | None:
        return self.machine.pid

    @property
    def modern(self) -> bool:
        """Whether the running QEMU has the ``-blockdev`` layout."""
        return self.machine.modern

    def set(self, **values: str | None) -> None:
        """Write keys straight into the configuration; None removes."""
        conf = self.conf
        for key, value in values.items():
            if value is None:
                conf.values.pop(key, None)
            else:
                conf.values[key] = value
        self.site.save(self.node, self.vmid, conf)

    def disk_path(self, key: str) -> Path:
        """The file behind a disk, active or not."""
        drive = Drive.parse(key, self.conf.values[key])
        return self.node.storage_of(drive.file).file(drive.file)

    # -- power

    async def start(self, *, paused: bool = False) -> None:
        await lifecycle.start_vm(self.site, self.node, self.vmid, paused=paused)

    async def stop(self) -> None:
        await lifecycle.stop_vm(self.site, self.node, self.vmid, skiplock=True)

    async def kill(self) -> None:
        """``kill -9`` QEMU."""
        await self.machine.kill()

    async def power_off_guest(self) -> None:
        """Let the guest power itself off (SHUTDOWN event with ``guest: true``).

        Through the agent where a guest answers; else a reset that QEMU takes as a
        shutdown, for VMs without an operating system.
        """
        if self.machine.agent_mode == "guest" and await lifecycle.agent_answers(
            self.site, self.node, self.vmid
        ):
            try:
                await self.guest_exec(["/bin/poweroff", "-f"], wait=False)
            except (TimeoutError, ConnectionError):
                pass  # it went off before it answered
            return
        await self.qmp("set-action", reboot="shutdown")
        await self.qmp("system_reset")

    async def wait_gone(self, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            await self.machine.gone.wait()

    async def wait_started(self, timeout_s: float = 60.0) -> None:
        """Wait until a start that somebody else ordered is over."""
        async with asyncio.timeout(timeout_s):
            while not self.running:
                await asyncio.sleep(0.02)
        async with self.site.lock_config(self.vmid):
            pass  # held until QEMU's monitor answers

    # -- talk

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """One QMP command through the relay, marked as the lab's own."""
        return await self.machine.qmp(command, **arguments)

    async def qemu_io(self, disk: str, command: str) -> None:
        """Write or read as the guest device would: ``write -P 1 0 64k``.

        Raises:
            AssertionError: qemu-io complained (its output is in ``log/ID.qemu``).
        """
        log = self.node.log_dir / f"{self.vmid}.qemu"
        before = log.stat().st_size
        device = disk
        if disk.startswith("virtio"):
            device = f"/machine/peripheral/{disk}/virtio-backend"
        said = await self.machine.hmp(f'qemu-io -d {device} "{command}"')
        assert not said.strip(), said
        with log.open("rb") as stream:
            stream.seek(before)
            text = stream.read().decode(errors="replace")
        # qemu-io speaks without a prefix. Behind QEMU's own name stands what its NBD
        # server says meanwhile of clients that leave, and is not of this request.
        answer = re.sub(r"^qemu-system-\S+: .*\n?", "", text, flags=re.M)
        for bad in ("failed", "error", "invalid", "not found"):
            assert bad not in answer.lower(), text
        match command.split():
            case ["read" | "write" | "discard" as verb, *rest] if "-q" not in rest:
                done = {"read": "read", "write": "wrote", "discard": "discard"}[verb]
                assert re.search(rf"^{done} (\d+)/\1 bytes", answer, re.M), text

    async def serial_wait(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait for a text on the serial console; return the line."""
        end = time.monotonic() + timeout_s
        while True:
            content = self.serial_text()
            for line in content.splitlines():
                if text in line:
                    return line
            if time.monotonic() > end or not self.running:
                raise TimeoutError(
                    f"no {text!r} on the console of VM {self.vmid}: {content[-800:]}"
                )
            await asyncio.sleep(0.1)

    def serial_text(self) -> str:
        try:
            return self.machine.serial.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    async def guest_exec(
        self,
        argv: list[str],
        *,
        data: bytes | None = None,
        timeout_s: float = 60.0,
        wait: bool = True,
    ) -> str:
        """Run a program in the guest; return its output.

        Raises:
            AssertionError: it ended with another status than 0.
        """
        more = {"input_data": base64.b64encode(data).decode()} if data else {}
        started = await self.machine.agent(
            "guest-exec", path=argv[0], arg=argv[1:], capture_output=True, **more
        )
        if not wait:
            return ""
        end = time.monotonic() + timeout_s
        while True:
            state = await self.machine.agent("guest-exec-status", pid=started["pid"])
            if state["exited"]:
                break
            if time.monotonic() > end:
                raise TimeoutError(f"{argv} still runs in the guest")
            await asyncio.sleep(0.1)
        out = base64.b64decode(state.get("out-data", "")).decode(errors="replace")
        err = base64.b64decode(state.get("err-data", "")).decode(errors="replace")
        assert state.get("exitcode") == 0, f"{argv}: {state} {out}{err}"
        return out

    # -- what is left over

    async def leftovers(self) -> list[str]:
        """Nodes, exports, jobs, bitmaps off their place, locks and freezes of ours.

        Segments (bitmaps on the drives' own nodes) are meant to stay.
        """
        found: list[str] = []
        if lock := self.conf.values.get("lock"):
            found.append(f"lock: {lock}")
        if self.running:
            nodes, exports, jobs, status = await self.machine.batch(
                [
                    {"execute": "query-named-block-nodes", "arguments": {"flat": True}},
                    {"execute": "query-block-exports"},
                    {"execute": "query-jobs"},
                    {"execute": "query-status"},
                ]
            )
            found += [
                f"node {n['node-name']}"
                for n in nodes
                if n["node-name"].startswith(OURS)
            ]
            found += [f"export {e['id']}" for e in exports]
            found += [f"job {j['id']}" for j in jobs]
            for node in nodes:
                for bitmap in node.get("dirty-bitmaps", []):
                    if str(bitmap.get("name", "")).endswith("-union"):
                        found.append(f"bitmap {bitmap['name']} on {node['node-name']}")
            if status["status"] not in ("running", "prelaunch", "shutdown"):
                found.append(f"status {status['status']}")
            found += await self._frozen()
        for volume in self._fleece():
            found.append(f"volume {volume}")
        return found

    async def _frozen(self) -> list[str]:
        machine = self.machine
        if machine.agent_mode in ("fake", "hang", "off"):
            return ["guest frozen"] if machine.fake_frozen else []
        if not self.conf.agent_enabled:
            return []
        try:
            state = await machine.agent("guest-fsfreeze-status", timeout_s=3)
        except (TimeoutError, ConnectionError, QmpRefused):
            return []  # no agent in this guest: nothing can be frozen
        return ["guest frozen"] if state == "frozen" else []

    def _fleece(self) -> list[str]:
        return [
            str(row["volid"])
            for storage in self.node.storages.values()
            for row in storage.volumes(self.vmid)
            if re.search(r"-fleece-|-ph-", str(row["volid"]))
        ]

    async def assert_clean(self) -> None:
        left = await self.leftovers()
        assert not left, f"VM {self.vmid}: {', '.join(left)}"

    def max_qmp_hold_s(self) -> float:
        """The longest time a client other than the lab held the QMP socket."""
        return self.machine.qmp_relay.max_hold_s()


async def make_vm(
    site: Site,
    node: LabNode,
    vmid: int,
    config: Mapping[str, str],
    disks: Mapping[str, Path | str],
    storage: str,
    fmt: str | None,
) -> LabVm:
    """Create a VM as root, disks copied from images where a path is given."""
    memory = "512" if config.get("bios") == "ovmf" else "128"
    values = {"memory": memory, "scsihw": "virtio-scsi-single", "name": f"vm{vmid}"}
    values |= config
    params: dict[str, Any] = {
        key: value for key, value in values.items() if key not in disks
    }
    upid = await configops.create(site, node, "root@pam", vmid, params)
    task = await site.tasks.wait(upid)
    assert task.exitstatus == "OK", task.lines
    conf = site.load(node, vmid)
    for key, wanted in disks.items():
        conf.values[key] = await _disk(
            site, node, vmid, key, wanted, storage, fmt, task
        )
    site.save(node, vmid, conf)
    return LabVm(site, node, vmid)


async def _disk(
    site: Site,
    node: LabNode,
    vmid: int,
    key: str,
    wanted: Path | str,
    storage: str,
    fmt: str | None,
    task: Task,
) -> str:
    options: dict[str, str] = {}
    if isinstance(wanted, str) and ":" in wanted:
        drive = Drive.parse(key, wanted)
        await configops.allocate(site, node, vmid, drive, task)
        return str(drive)
    target = node.storages[storage]
    form = fmt or ("raw" if target.type == "lvm" else "qcow2")
    source: Path | None = None
    if isinstance(wanted, str) and (match := re.fullmatch(r"(\d+)([KMGT]?)", wanted)):
        size = int(match[1]) * UNITS[match[2]]
    else:
        source = Path(wanted)
        source_format = "qcow2" if source.suffix == ".qcow2" else "raw"
        size = await asyncio.to_thread(
            configops._virtual_size, site, source, source_format
        )
    volid = await asyncio.to_thread(target.alloc, vmid, None, size, form)
    if source:
        await asyncio.to_thread(
            copy_image, site.qemu_img, source, source_format, target.file(volid), form
        )
    options["size"] = configops.human_size(target.size(volid))
    return str(Drive(key, volid, options))
