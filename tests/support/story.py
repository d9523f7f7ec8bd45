# SPDX-License-Identifier: Apache-2.0
"""Short words for the story of a VM that goes into Bacula and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support import truth
from tests.support.ledger import Ledger
from tests.support.world import World

MIB = 1 << 20
SIZES = {"scsi0": 8 * MIB, "scsi1": 4 * MIB}


async def written_vm(
    world: World, vmid: int, *, start: bool = True, **config: str
) -> tuple[LabVm, Ledger]:
    """Make a running VM without a guest: ``scsi0`` qcow2, ``scsi1`` raw, both written.

    Args:
        start: False stops it again afterwards.
    """
    disks = {
        "scsi0": config.pop("scsi0", f"local:{8 / 1024},format=qcow2"),
        "scsi1": config.pop("scsi1", f"local:{4 / 1024},format=raw"),
    }
    vm = await world.site.create_vm(vmid, {"agent": "0", **config}, disks=disks)
    await vm.start()
    ledger = Ledger(vm, SIZES, seed=vmid)
    # A thick volume is born with what was there before.
    for key, size in SIZES.items():
        await vm.qemu_io(key, f"write -z 0 {size}")
    await ledger.some(40)
    if not start:
        await vm.stop()
    return vm, ledger


def went_well(world: World, job: JobResult, words: str = "Backup OK") -> JobResult:
    """Return the job; raise with its log unless it ended without any warning."""
    assert job.termination == words, f"{job.text}\n{world.backend_log[-6000:]}"
    return job


async def backup(world: World, name: str, level: str = "Full") -> JobResult:
    return went_well(world, await world.run(name, level))


async def restore(world: World, **arguments: object) -> JobResult:
    return went_well(world, await world.restore(**arguments), "Restore OK")


async def content(path: Path, fmt: str) -> bytes:
    """Return what qemu-img finds in an image."""
    flat = path.with_name(path.name + ".flat")
    try:
        await asyncio.to_thread(truth.convert, path, fmt, flat)
        return flat.read_bytes()
    finally:
        flat.unlink(missing_ok=True)


async def holds(vm: LabVm, wanted: Mapping[str, bytes]) -> None:
    """Raise unless a stopped VM's disks begin with these bytes.

    A thick volume may be larger than its disk was; what is behind it is not looked at.
    """
    assert not vm.running
    for key, expected in wanted.items():
        path = vm.disk_path(key)
        if path.suffix == ".qcow2":
            found = await content(path, "qcow2")
        else:
            found = path.read_bytes()
        assert len(found) >= len(expected), f"{key} of VM {vm.vmid} is too short"
        assert found[: len(expected)] == expected, f"{key} of VM {vm.vmid}"


async def images_hold(home: Path, wanted: Mapping[str, bytes]) -> None:
    """Raise unless one job's image files are sound and hold these bytes."""
    for key, expected in wanted.items():
        image = home / f"{key}.qcow2"
        await asyncio.to_thread(truth.check, image)
        assert await content(image, "qcow2") == expected, image
