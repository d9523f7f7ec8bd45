# SPDX-License-Identifier: Apache-2.0
"""In the middle of a backup: what would end QEMU, or lose writes, is never sent.

Resize, move and clean-up are asked for while a real job reads; all that the product
says to QEMU meanwhile is looked through by :mod:`tests.support.fatal_commands`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from pveplug.proto.pve_refusal import PveRefusalError, Reason
from tests.lab import moves
from tests.lab.bacula import JobResult
from tests.lab.cmdline import Volume
from tests.lab.errors import ApiError
from tests.lab.vmconfig import Drive
from tests.support.course import MIB, Course, whole
from tests.support.fatal_commands import watched
from tests.support.kills import Stage, kill, until
from tests.support.requires import requires
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

LAYOUTS = {"blockdev": "pc", "drive": "pc-i440fx-9.2+pve1"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


class Midst(Course):
    """A course in which things happen in the midst of a job."""

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[int]:
        """Run an Incremental that stands still within the block, its exports open.

        Yields: the backend's process id.
        """
        for key in self.keys():
            await self.write(key, 4 * MIB, 2 * MIB)
        copies = await self.copies(f"midst{len(self.jobs)}")
        bacula, relay = self.world.bacula, self.vm.machine.qmp_relay
        before, name = len(relay.sessions), f"job{self.vmid}"
        job_id = await asyncio.to_thread(bacula.start_job, name, "Incremental")

        def exported() -> bool:
            done = [
                command
                for session in relay.sessions[before:]
                if session.ended and not session.lab
                for command in session.commands
            ]
            return done.count("block-export-add") == len(self.keys())

        await until(exported, "the exports", pause_s=0.005)
        pid = await Stage(self.world).backend(self.vmid)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.result = await asyncio.to_thread(bacula.wait, job_id)
            if self.result.ok:
                self.keep(self.result, copies)

    result: JobResult


async def test_resize_move_and_clean_up_in_the_middle_of_a_backup_end_no_qemu(
    world: World,
) -> None:
    await asyncio.gather(
        in_the_middle(world, "blockdev", 100, 1), in_the_middle(world, "drive", 110, 2)
    )


async def in_the_middle(world: World, layout: str, vmid: int, bacula: int) -> None:
    await world.site.create_vm(
        vmid,
        {"agent": "0", "machine": LAYOUTS[layout]},
        disks={
            "scsi0": f"local:{24 / 1024},format=qcow2,iothread=1",
            "scsi1": f"local:{12 / 1024},format=raw",
        },
    )
    run = Midst(world, vmid, "bwlimit=4M", bacula)
    await run.begin()
    vm, pid = run.vm, run.vm.pid
    async with watched(vm) as watch:
        await a_disk_grows_and_moves(run)
        await the_backend_is_killed(run)
    assert watch.fatal() == []
    exports = watch.sent("block-export-add")
    assert len(exports) >= 6
    assert all(export["bitmaps"] for export in exports)
    assert bool(watch.sent("qom-set")) == (layout == "drive")
    assert vm.pid == pid
    await run.every_image_is_exact()
    await vm.stop()


async def a_disk_grows_and_moves(run: Midst) -> None:
    vm = run.vm
    old = Drive.parse("scsi0", vm.conf.values["scsi0"])
    storage = vm.node.storages["local2"]
    async with run.reading():
        for method, call, more in (
            ("PUT", "resize", {"size": "+4M"}),
            ("POST", "move_disk", {"storage": "local2"}),
        ):
            with pytest.raises(PveRefusalError) as refused:
                await run.api(method, call, disk="scsi0", **more)
            assert refused.value.reason is Reason.LOCKED
        # The lock keeps PVE from it, not somebody at the monitor.
        name = {"node_name" if vm.modern else "device": "drive-scsi0"}
        await vm.qmp("block_resize", **name, size=28 * MIB)
        volid = await asyncio.to_thread(storage.alloc, vm.vmid, None, 28 * MIB, "qcow2")
        new = Drive("scsi0", volid, dict(old.options))
        volume = Volume(storage.path(volid), "qcow2", storage.type)
        mirror = moves.mirror(vm.machine, old, new, volume)
        if vm.modern:
            await mirror
            vm.set(scsi0=str(new))
            await run.write("scsi0", 8 * MIB)
        else:
            with pytest.raises(ApiError, match="Need a root block node"):
                await mirror
    await vm.assert_clean()
    await run.write("scsi0", 27 * MIB)
    if not vm.modern:
        assert run.result.ok, run.result.text
        return
    assert run.result.status == "f", run.result.text
    (inserted,) = [
        block["inserted"]
        for block in await vm.qmp("query-block")
        if block.get("qdev") == "scsi0"
    ]
    assert volume.path in str(inserted["file"]), "the guest is on the old volume"


async def the_backend_is_killed(run: Midst) -> None:
    async with run.reading() as pid:
        await kill(pid)
    assert run.result.status == "f", run.result.text
    stage = Stage(run.world)
    await until(lambda: not stage.journal(run.vmid), "the clean-up")
    await run.vm.assert_clean()
    job = await run.job()
    assert whole(job) == {}, job.text
