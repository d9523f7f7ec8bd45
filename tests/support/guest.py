# SPDX-License-Identifier: Apache-2.0
"""A VM of the lab with the tiny guest in it: it writes, stands still and tells sums."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from tests.lab.site import Site
from tests.lab.vm import LabVm

STILL = """
killall tg-writer 2>/dev/null
while pidof tg-writer >/dev/null; do usleep 20000; done
sync
mount -o remount,ro /mnt
"""
"""Whole disks have no content of their own while ext4 is writable: even freezing it
writes to the journal and the superblock. Read-only, it leaves the disk alone."""

BOOT_WAIT_S = 180
"""Under emulation, with other work on the machine; a quiet one needs 8 s."""


class Guest:
    """The tiny guest on a boot disk ``scsi0`` and a data disk ``scsi1``.

    Attributes:
        names: disk key -> device in the guest, as told by their sizes.
    """

    def __init__(self, vm: LabVm, names: dict[str, str]) -> None:
        self.vm = vm
        self.names = names
        self._seeds = itertools.count(1)

    @classmethod
    async def create(
        cls,
        site: Site,
        vmid: int,
        boot_disk: Path,
        *,
        data_mib: int = 48,
        **config: str,
    ) -> Guest:
        """Make a VM that boots from ``scsi0``, a qcow2; its data disk is raw."""
        vm = await site.create_vm(
            vmid,
            {
                "name": "tiny-guest",
                "agent": "1",
                "boot": "order=scsi0",
                "ostype": "l26",
                **config,
            },
            disks={"scsi0": boot_disk, "scsi1": f"local:{data_mib / 1024},format=raw"},
        )
        # Under /dev the order of the two is the bus's; here it is by target.
        return cls(vm, {"scsi0": "/dev/sda", "scsi1": "/dev/sdb"})

    async def boot(self) -> str:
        """Start; return the marker its root file system had when it was mounted."""
        await self.vm.start()
        await self.vm.serial_wait("TG:READY", BOOT_WAIT_S)
        await self._find_disks()
        return (
            (await self.vm.serial_wait("TG:FILE", 5)).partition("TG:FILE ")[2].strip()
        )

    async def _find_disks(self) -> None:
        line = await self.vm.serial_wait("TG:ROOT ", 5)
        device = line.partition("TG:ROOT ")[2].strip().rstrip("0123456789")
        other = "/dev/sdb" if device == "/dev/sda" else "/dev/sda"
        self.names = {"scsi0": device, "scsi1": other}

    async def sh(self, script: str, *, timeout_s: float = 120) -> str:
        return await self.vm.guest_exec(["/bin/sh", "-c", script], timeout_s=timeout_s)

    async def mark(self, text: str) -> None:
        """Leave a marker: the next boot prints it."""
        await self.vm.guest_exec(["tg-mark", text])

    async def write(self, key: str, block: int, count: int, seed: str) -> None:
        """Write blocks of 4 KiB to a disk, past the guest's page cache."""
        device = self.names[key]
        await self.vm.guest_exec(["tg-write", device, str(block), str(count), seed])

    async def start_writers(self, *, per_second: int = 40) -> None:
        """Let programs write at random: to the data disk, and to a file on /mnt."""
        number = next(self._seeds)
        file = "/mnt/busy"
        await self.sh(f"test -e {file} || tg-write {file} 0 512 first")
        for target, seed in ((self.names["scsi1"], "data"), (file, "file")):
            await self.vm.guest_exec(
                ["tg-writer", target, "600", f"{seed}-{number}", str(per_second)],
                wait=False,
            )

    async def stop_writers(self) -> None:
        await self.sh(STILL.replace("mount -o remount,ro /mnt", ""))

    async def stand_still(self) -> dict[str, str]:
        """Stop everything that writes; return the SHA-256 of each whole disk."""
        await self.sh(STILL)
        return {
            key: (await self.sh(f"tg-sum {device}")).strip()
            for key, device in self.names.items()
        }

    async def go_on(self) -> None:
        """Make the root file system writable again and let the writers write."""
        await self.sh("mount -o remount,rw /mnt")
        await self.start_writers()
        await asyncio.sleep(0.2)
