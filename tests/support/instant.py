# SPDX-License-Identifier: Apache-2.0
"""A VM that is recovered while its guest writes, and the model of what it must hold.

The VM has no operating system: its device is written to and read from by QEMU's own
``qemu-io``, as a guest's driver would. What is on its disks is the backup's content
with all that was written since over it, whatever happens to the stream meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pveplug.ir.presence import HEAD
from tests.lab.errors import ApiError
from tests.lab.site import Site
from tests.lab.vm import LabVm
from tests.support.kills import until
from tests.support.truth import convert
from tests.support.world import World

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
SECTOR = 512
PATIENCE_S = 60.0
"""QEMU does nothing else while it switches a disk, on a machine that is busy."""


STANDS_STILL = b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"
"""A boot sector: cli, hlt, and again. Firmware that finds nothing to boot resets the
machine each second, and a reset waits, with all of QEMU, for reads under way."""


def noise(path: Path, size: int, seed: int) -> Path:
    """Make a raw image that boots, and that no compression makes smaller."""
    data = random.Random(seed).randbytes(size)
    path.write_bytes(STANDS_STILL + data[SECTOR:])
    return path


def contents(vm: LabVm, folder: Path) -> dict[str, bytearray]:
    """Return what the disks of a stopped VM hold, as qemu-img reads them."""
    found = {}
    for key in disk_keys(vm):
        path = vm.disk_path(key)
        flat = folder / f"{vm.vmid}-{key}.flat"
        form = "qcow2" if path.suffix == ".qcow2" else "raw"
        convert(path, form, flat)
        found[key] = bytearray(flat.read_bytes())
        flat.unlink()
    return found


def disk_keys(vm: LabVm) -> list[str]:
    return sorted(key for key in vm.conf.values if re.fullmatch(r"scsi\d+", key))


def compare(disks: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> None:
    """Assert that disks hold what they must; says where they don't."""
    assert disks.keys() == wanted.keys()
    for key, data in disks.items():
        other = wanted[key]
        assert len(data) == len(other), f"{key}: {len(data)} bytes, not {len(other)}"
        wrong = [
            f"{at >> 16}: {data[at]} not {other[at]}"
            for at in range(0, len(data), CLUSTER)
            if data[at : at + CLUSTER] != other[at : at + CLUSTER]
        ]
        assert not wrong, f"{key}: {len(wrong)} clusters are wrong: {wrong[:8]}"


@dataclass(frozen=True, slots=True)
class _Request:
    """One that QEMU has not answered yet."""

    key: str
    offset: int
    length: int
    said: str
    """How QEMU says that it is done."""


class Written:
    """A guest that reads and writes everywhere, and what its disks must hold.

    A write of a whole cluster needs nothing of the backup. One of a part of it, and
    every read, waits in QEMU where the cluster is still owed, and so they are left
    waiting; what they touch isn't touched again before.
    """

    def __init__(self, vm: LabVm, truth: Mapping[str, bytes], seed: int) -> None:
        self.vm = vm
        self.disks = {key: bytearray(data) for key, data in truth.items()}
        self.writes = self.reads = self.most_waiting = 0
        self._rng = random.Random(seed)
        self._waiting: list[_Request] = []
        self._log = vm.node.log_dir / f"{vm.vmid}.qemu"
        self._at = self._log.stat().st_size

    @property
    def waiting(self) -> int:
        """Requests that QEMU has not answered."""
        self._look()
        return len(self._waiting)

    async def step(self) -> None:
        """One request."""
        rng = self._rng
        key = rng.choice(sorted(self.disks))
        cluster = rng.randrange(1, len(self.disks[key]) // CLUSTER)
        if self._busy(key, cluster):
            return
        at, kind = cluster * CLUSTER, rng.random()
        if kind < 0.4:
            await self.write(key, at, CLUSTER)
        elif kind < 0.7:
            low = rng.randrange(CLUSTER // SECTOR)
            length = rng.randrange(1, CLUSTER // SECTOR - low + 1) * SECTOR
            await self.write_later(key, at + low * SECTOR, length)
        else:
            await self.read_later(key, at)

    async def write(self, key: str, offset: int, length: int) -> None:
        """Write whole clusters."""
        request = _Request(
            key, offset, length, f"wrote {length}/{length} bytes at offset {offset}"
        )
        if self._said_of(request):
            return
        pattern = self._rng.randrange(1, 256)
        await self._send(request, f"write -P {pattern} {offset} {length}")
        self._note(key, offset, length, pattern)

    async def write_later(self, key: str, offset: int, length: int) -> None:
        """Write a part of a cluster, which may wait for the rest of it."""
        request = _Request(
            key, offset, length, f"wrote {length}/{length} bytes at offset {offset}"
        )
        if self._said_of(request):
            return
        pattern = self._rng.randrange(1, 256)
        await self._send(request, f"aio_write -P {pattern} {offset} {length}")
        self._note(key, offset, length, pattern)

    async def read_later(self, key: str, offset: int) -> None:
        """Read a cluster, whenever it comes; QEMU compares it where it is one byte."""
        data = self.disks[key][offset : offset + CLUSTER]
        one = f"-P {data[0]} " if data.count(data[0]) == CLUSTER else ""
        request = _Request(
            key, offset, CLUSTER, f"read {CLUSTER}/{CLUSTER} bytes at offset {offset}"
        )
        if self._said_of(request):
            return
        await self._send(request, f"aio_read {one}{offset} {CLUSTER}")
        self.reads += 1

    @contextlib.asynccontextmanager
    async def going_on(self, pause_s: float = 0.03) -> AsyncIterator[None]:
        """Read and write within the block."""
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                await self.step()
                await asyncio.sleep(pause_s)

        task = asyncio.create_task(work(), name="guest")
        try:
            yield
        finally:
            stop.set()
            await task

    async def settled(self, timeout_s: float = 60) -> None:
        """Wait until every request is answered."""
        await until(lambda: not self.waiting, "the end of all requests", timeout_s, 0.1)

    def _note(self, key: str, offset: int, length: int, pattern: int) -> None:
        self.writes += 1
        self.disks[key][offset : offset + length] = bytes([pattern]) * length

    def _busy(self, key: str, cluster: int) -> bool:
        self._look()
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        low = cluster * CLUSTER
        return any(
            request.key == key and low <= request.offset < low + CLUSTER
            for request in self._waiting
        )

    def _said_of(self, request: _Request) -> bool:
        """Whether QEMU will say the same of another."""
        return any(request.said == other.said for other in self._waiting)

    async def _send(self, request: _Request, command: str) -> None:
        self._waiting.append(request)
        said = await self.vm.machine.qmp(
            "human-monitor-command",
            timeout_s=PATIENCE_S,
            command_line=f'qemu-io -d {request.key} "{command}"',
        )
        assert not said.strip(), said

    def _look(self) -> None:
        with self._log.open("rb") as stream:
            stream.seek(self._at)
            new = stream.read()
        whole = new.rpartition(b"\n")[0]
        self._at += len(whole)
        text = whole.decode(errors="replace")
        for bad in ("failed", "rror"):
            assert bad not in text, text
        for line in text.splitlines():
            done = [r for r in self._waiting if r.said == line.strip()]
            for request in done[:1]:
                self._waiting.remove(request)


# --- what the product shows -----------------------------------------------------------


def keeper_pid(site: Site, vmid: int) -> int | None:
    """The process that serves a VM's disks."""
    mine = str(site.root).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"pveplug.ir.keeper" not in words or words[-2] != str(vmid).encode():
                continue
            if mine in (path.parent / "environ").read_bytes():
                return int(path.parent.name)
    return None


async def kill_keeper(
    site: Site, vmid: int, number: signal.Signals = signal.SIGKILL
) -> None:
    """End the keeper, and wait until it is gone."""
    pid = keeper_pid(site, vmid)
    assert pid is not None, f"VM {vmid} has no keeper"
    os.kill(pid, number)
    await until(lambda: keeper_pid(site, vmid) is None, "the keeper's end")


def landed(site: Site, vmid: int) -> tuple[int, int]:
    """Clusters of a recovery's disks that are here, and how many there are."""
    here = total = 0
    for path in (site.root / f"ph/run/ir-{vmid}").glob("*.live"):
        with contextlib.suppress(OSError):
            marks = path.read_bytes()[HEAD:]
            here += len(marks) - marks.count(0)
            total += len(marks)
    return here, total


async def pveplug(world: World, *argv: str) -> tuple[int, str]:
    """Run our command on the node; return its exit status and all it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pveplug", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(world.node_file)},
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode(errors="replace")


def left(world: World, vmid: int) -> list[str]:
    """What is left of a recovery, its VM apart."""
    root = world.site.root
    found = [f"landing: {path}" for path in (root / "ph/landing").glob("*")]
    found += [f"journal: {path}" for path in root.glob("ph/lib/vms/*.json")]
    found += [f"runtime: {path}" for path in (root / "ph/run").glob("*")]
    if pid := keeper_pid(world.site, vmid):
        found.append(f"keeper: {pid}")
    return found


def traces(world: World, vmid: int) -> list[str]:
    """What a recovered VM still shows of its recovery."""
    vm = world.site.vm(vmid)
    values = vm.conf.values
    found = [
        f"{key}: {values[key]}"
        for key in ("lock", "protection")
        if values.get(key, "0") != "0"
    ]
    found += [
        f"{key}: {value}"
        for key, value in values.items()
        if "pveplug" in value or "rerror" in value
    ]
    used = " ".join(values.values())
    for storage in world.site.node.storages.values():
        for row in storage.volumes(vmid):
            if str(row["volid"]) not in used:
                found.append(f"volume {row['volid']}")
    return found


async def nbd_nodes(vm: LabVm) -> list[str]:
    """Nodes of a VM's QEMU that read from somebody's server."""
    nodes = await vm.machine.qmp(
        "query-named-block-nodes", timeout_s=PATIENCE_S, flat=True
    )
    return [node["node-name"] for node in nodes if node["drv"] == "nbd"]


async def status_of(vm: LabVm) -> str:
    """What QEMU says of its guest: running, paused, io-error …"""
    try:
        return str((await vm.qmp("query-status"))["status"])
    except (ApiError, TimeoutError, ConnectionError):
        return ""
