# SPDX-License-Identifier: Apache-2.0
"""A source VM whose content the test knows, and replication without Bacula.

::

    vm = await sites.site.create_vm(100, …)
    written = Written(vm, {"scsi0": 64 << 20}, folder=sites.base, seed=1)
    await written.some(20)
    ran = await replicate(sites, "seed", 100)
    assert ran.status == 0, ran.text
    assert point_content(replica, "ph-rp0001-…") == written.sums()

What is written are random bytes, which don't shrink: the channel is as long as the
data. The sender is ``pveplug dr MODE``, a process as an administrator runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lab.vm import LabVm
from tests.support import dr_truth
from tests.support.two_sites import TwoSites

PVEPLUG = Path(sys.prefix) / "bin" / "pveplug"
SECTOR = 512
CLUSTER = 64 << 10
PATIENCE_S = 150.0


class Written:
    """What stands on the disks of a VM that started out empty.

    Args:
        folder: where the bytes of a write stand while QEMU reads them.
    """

    def __init__(
        self, vm: LabVm, sizes: Mapping[str, int], *, folder: Path, seed: int = 1
    ) -> None:
        self.vm = vm
        self._disks = {key: bytearray(size) for key, size in sizes.items()}
        self._random = random.Random(seed)
        self._file = folder / f"written-{vm.vmid}"

    async def data(self, key: str, offset: int, length: int) -> None:
        """Write random bytes, as the guest's device would."""
        data = self._random.randbytes(length)
        self._file.write_bytes(data)
        await self.vm.qemu_io(key, f"write -s {self._file} {offset} {length}")
        self._file.unlink()
        self._disks[key][offset : offset + length] = data

    async def zero(self, key: str, offset: int, length: int) -> None:
        await self.vm.qemu_io(key, f"write -z {offset} {length}")
        self._disks[key][offset : offset + length] = bytes(length)

    async def some(self, count: int) -> None:
        """Write at random places: data mostly, zeroes at times, aligned or not."""
        for _ in range(count):
            key = self._random.choice(list(self._disks))
            length = SECTOR * self._random.randint(1, CLUSTER // SECTOR)
            last = (len(self._disks[key]) - length) // SECTOR
            offset = SECTOR * self._random.randint(0, last)
            # Within one cluster: QEMU lets it pass the filter whole.
            length = min(length, CLUSTER - offset % CLUSTER)
            if self._random.random() < 0.15:
                await self.zero(key, offset, length)
            else:
                await self.data(key, offset, length)

    def content(self, key: str) -> bytes:
        return bytes(self._disks[key])

    def sums(self) -> dict[str, str]:
        """Return the SHA-256 of each disk."""
        return {k: hashlib.sha256(d).hexdigest() for k, d in self._disks.items()}


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a sender."""

    status: int
    text: str
    seconds: float


class Sender:
    """A running ``pveplug dr MODE``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._began = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self, timeout_s: float = PATIENCE_S) -> Ran:
        """Wait for its end.

        Raises:
            AssertionError: it didn't come in time; the process was killed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                said, _ = await self._process.communicate()
        except TimeoutError:
            raise AssertionError(f"the sender runs after {timeout_s:g} s") from None
        finally:
            self.kill()
        seconds = time.monotonic() - self._began
        assert self._process.returncode is not None
        return Ran(self._process.returncode, said.decode(errors="replace"), seconds)


async def start_sender(
    sites: TwoSites, mode: str, vmid: int, more: str = "", *, port: int | None = None
) -> Sender:
    """Start a sender; ``port`` is that of a proxy before the receiver."""
    words = f"vmid={vmid} {sites.connection} {sites.dr_words(port)} {more}"
    return Sender(
        await asyncio.create_subprocess_exec(
            *(PVEPLUG, "dr", mode, *words.split()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(sites.node_file)},
        )
    )


async def replicate(
    sites: TwoSites, mode: str, vmid: int, more: str = "", *, port: int | None = None
) -> Ran:
    """Run a sender to its end."""
    sender = await start_sender(sites, mode, vmid, more, port=port)
    return await sender.ended()


def point_content(vm: LabVm, name: str) -> dict[str, str]:
    """Return the SHA-256 of each disk of a replica at a restore point."""
    return {key: found.sha256 for key, found in dr_truth.disks(vm, name).items()}
