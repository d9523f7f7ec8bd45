# SPDX-License-Identifier: Apache-2.0
"""A power cut: QEMU, the backend and Bacula's daemons killed at once, all back again.

``./dev powercut`` runs this for a person, with what ``pveplug repair`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.errors import ApiError
from tests.lab.lifecycle import start_vm
from tests.support.kills import Stage, program, stage

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
PVEPLUG = Path(sys.prefix) / "bin" / "pveplug"
LEFT = 1
BUSY = 75


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared() -> AsyncIterator[Stage]:
    async with stage() as found:
        yield found


async def repair(on: Stage, *arguments: str) -> tuple[int, str]:
    """Run ``pveplug repair`` as a person would: its status, and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(str(PVEPLUG), "repair", *arguments),
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(on.world.node_file)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    text = said.decode()
    print(f"$ pveplug repair {' '.join(arguments)}\n{text}")
    return process.returncode or 0, text


async def in_mid_read(on: Stage, level: str) -> tuple[int, int]:
    """Start a job of an hour's reading; return its JobId and its backend."""
    for key in ("scsi0", "scsi1"):
        await on.vm.qemu_io(key, "write -P 77 4M 12M")
    await on.options("bwlimit=2048")
    job_id = await on.start(level)
    pid = await on.backend()
    await on.has_moved(pid, 2 << 20)
    entry = on.journal()
    assert entry["locked"]
    assert entry["touched"]
    assert len(entry["files"]) == 2
    assert await on.vm.leftovers()
    return job_id, pid


async def power_cut(on: Stage, pid: int) -> None:
    bacula = on.world.bacula
    os.kill(bacula.pid("fd"), signal.SIGSTOP)  # it may not say goodbye to anybody
    os.kill(pid, signal.SIGSTOP)
    await on.vm.kill()
    os.kill(pid, signal.SIGKILL)
    bacula.kill("fd")
    bacula.kill("sd")


async def power_is_back(on: Stage, job_id: int) -> None:
    for daemon in ("sd", "fd"):
        await asyncio.to_thread(on.world.bacula.start_daemon, daemon)
    # Its Director takes a minute to see that the job is dead.
    await asyncio.to_thread(on.world.bacula.cancel, job_id)
    assert on.vm.conf.values["lock"] == "backup"
    assert on.journal()["locked"]


async def next_ones_are_right(on: Stage) -> str:
    """Back up twice, restore to files, compare every byte; return the first's log."""
    await on.options()
    first = await on.world.run("nightly", "Incremental")
    assert first.ok, first.text + on.world.backend_log[-4000:]
    # QEMU's bitmaps died with it.
    assert first.text.count("read whole") == 2, first.text
    await on.clean(5)
    assert "lock" not in on.vm.conf.values
    await on.scribble()
    second = await on.world.run("nightly", "Incremental")
    assert second.ok, second.text
    assert "read whole" not in second.text
    folder = on.world.base / f"files{second.job_id}"
    restored = await on.world.restore(
        where=str(folder), job_ids=[first.job_id, second.job_id]
    )
    assert restored.ok, restored.text
    homes = {path.parent.name: path.parent for path in folder.rglob("scsi0.qcow2")}
    for key in ("scsi0", "scsi1"):
        await on.vm.qemu_io(key, "flush")
        disk = on.vm.disk_path(key)
        fmt = disk.suffix.removeprefix(".")
        image = homes[second.name] / f"{key}.qcow2"
        formats = ("-f", fmt, "-F", "qcow2")
        await program("qemu-img", "compare", "-U", *formats, str(disk), str(image))
    return first.text


async def test_after_a_power_cut_in_a_full_the_next_job_is_right(
    shared: Stage,
) -> None:
    on = shared
    async with on.writing(dies=True):
        job_id, pid = await in_mid_read(on, "Full")
        await power_cut(on, pid)
    await power_is_back(on, job_id)
    # PVE's lock outlives it; here an administrator starts the VM in spite of it.
    await start_vm(on.world.site, on.vm.node, 100, skiplock=True)
    said = await next_ones_are_right(on)
    assert "after an earlier job that was cut off: unlocked the VM" in said
    assert "ph-100-scsi0.qcow2" in said


async def test_after_a_power_cut_in_an_incremental_a_repair_lets_the_vm_start(
    shared: Stage,
) -> None:
    on = shared
    async with on.writing(dies=True):
        job_id, pid = await in_mid_read(on, "Incremental")
        status, said = await repair(on, "--vmid", "100")
        assert status == BUSY
        assert f"(pid {pid}) is working on this VM" in said
        assert await on.vm.leftovers()
        await power_cut(on, pid)
    await power_is_back(on, job_id)
    with pytest.raises(ApiError, match="locked"):
        await on.vm.start()
    before = on.journal()
    would_status, would = await repair(on, "--vmid", "100", "--dry-run")
    assert would_status == LEFT
    assert on.journal() == before
    assert on.vm.conf.values["lock"] == "backup"
    status, said = await repair(on, "--all")
    assert status == 0, said
    lines = said.splitlines()[:-1]
    assert [f"dry run: {line}" for line in lines] == would.splitlines()[:-1]
    assert "VM 100: unlocked the VM" in lines
    assert any(line.endswith("ph-100-scsi1.qcow2") for line in lines)
    assert not await on.left()
    assert await repair(on, "--all") == (0, "nothing of ours is left on this node\n")
    await on.vm.start()
    assert "after an earlier job" not in await next_ones_are_right(on)


async def test_a_backend_killed_beside_a_lost_journal_is_cleaned_up_by_names(
    shared: Stage,
) -> None:
    on = shared
    job_id, pid = await in_mid_read(on, "Full")
    bacula = on.world.bacula
    bacula.kill("fd")
    os.kill(pid, signal.SIGKILL)
    foreign = on.world.site.root / "ph/scratch/ph-1001-scsi0.qcow2"
    foreign.write_bytes(b"another's")
    for path in (on.world.site.root / "ph/lib/vms").glob("100.*"):
        path.unlink()
    try:
        status, said = await repair(on, "--vmid", "100")
        assert status == LEFT
        assert "freed QEMU of ph-cbw-scsi0" in said
        assert "ph-100-scsi0.qcow2" in said
        assert "left: the VM is locked (backup), not by a job of ours" in said
        assert on.vm.conf.values["lock"] == "backup"
        assert foreign.exists()
    finally:
        foreign.unlink()
        on.vm.set(lock=None)
        await asyncio.to_thread(bacula.start_daemon, "fd")
        await asyncio.to_thread(bacula.cancel, job_id)
    await on.clean(5)
    with contextlib.suppress(ApiError):
        await on.vm.qemu_io("scsi0", "flush")
    await on.next_is_exact()
