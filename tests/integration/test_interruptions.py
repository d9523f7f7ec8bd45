# SPDX-License-Identifier: Apache-2.0
"""Cancels, daemons that die, locks of others, restores that can't go on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.halt import halted_program, halted_qmp
from tests.support.kills import Stage, kill, stage, until
from tests.support.world import BACKEND

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared() -> AsyncIterator[Stage]:
    async with stage() as found:
        yield found
        for job_id in found.lost:
            assert (await found.ended(job_id)).status in "fEA"


async def reading(on: Stage, options: str = "") -> tuple[int, int]:
    """Start a Full that is in mid-read for many seconds; return JobId and pid."""
    await on.options(f"bwlimit=2048 {options}")
    job_id = await on.start("Full")
    pid = await on.backend()
    await on.has_moved(pid, 2 << 20)
    return job_id, pid


async def clean_up(on: Stage, job: str) -> int:
    """Run what the shim runs after an unclean end; return its status."""
    process = await asyncio.create_subprocess_exec(
        str(BACKEND),
        "--cleanup",
        job,
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(on.world.node_file)},
    )
    return await process.wait()


async def both_killed(on: Stage, pid: int) -> None:
    """Kill bacula-fd, which would start the clean-up, and then the backend."""
    on.world.bacula.kill("fd")
    await kill(pid)


async def back_again(on: Stage, daemon: str) -> None:
    await asyncio.to_thread(on.world.bacula.start_daemon, daemon)


async def lost(on: Stage, job_id: int) -> None:
    """Cancel a job whose File Daemon died; its Director takes a minute to see it."""
    on.lost.append(job_id)
    await asyncio.to_thread(on.world.bacula.cancel, job_id)


async def test_a_cancel_in_mid_read_frees_the_vm(shared: Stage) -> None:
    on = shared
    async with on.writing():
        job_id, _ = await reading(on)
        await asyncio.to_thread(on.world.bacula.cancel, job_id)
        result = await on.ended(job_id)
        assert result.status == "A", result.text
        await on.clean()
    await on.next_is_exact()


async def test_a_cancel_while_the_guest_is_frozen_thaws_it(shared: Stage) -> None:
    on = shared
    await on.options()
    with halted_qmp(on.vm, "^transaction") as halt:
        job_id = await on.start("Incremental")
        await halt.reached()
        assert on.vm.machine.fake_frozen
        await asyncio.to_thread(on.world.bacula.cancel, job_id)
        await until(lambda: not on.vm.machine.fake_frozen, "the thaw", 30)
    result = await on.ended(job_id)
    assert result.status == "A", result.text
    await on.clean()
    await on.next_is_exact()


async def test_a_storage_daemon_that_dies_fails_the_job_only(shared: Stage) -> None:
    on = shared
    daemon = on.world.bacula.pid("fd")
    job_id, _ = await reading(on)
    on.world.bacula.kill("sd")
    try:
        await on.clean()
    finally:
        await back_again(on, "sd")
    result = await on.ended(job_id)
    assert result.status in "fE", result.text
    assert on.world.bacula.pid("fd") == daemon
    assert on.world.bacula.alive("fd")
    await on.next_is_exact()


async def test_a_backend_whose_daemon_died_cleans_up_by_itself(shared: Stage) -> None:
    on = shared
    job_id, pid = await reading(on)
    on.world.bacula.kill("fd")
    try:
        await on.clean()
        await until(lambda: not Path(f"/proc/{pid}").exists(), "the backend's end")
    finally:
        await back_again(on, "fd")
    await lost(on, job_id)
    await on.next_is_exact()


async def test_a_backend_that_waits_notices_that_its_daemon_died(shared: Stage) -> None:
    on = shared
    on.vm.set(lock="backup")
    await on.options("lock_wait=300")
    job_id = await on.start("Incremental")
    pid = await on.backend()
    on.world.bacula.kill("fd")
    try:
        await until(lambda: not Path(f"/proc/{pid}").exists(), "the backend's end", 10)
        assert on.vm.conf.values["lock"] == "backup"
    finally:
        await back_again(on, "fd")
        on.vm.set(lock=None)
    await lost(on, job_id)
    await on.next_is_exact()


async def test_where_nobody_can_clean_up_the_next_job_does_and_says_so(
    shared: Stage,
) -> None:
    on = shared
    job_id, pid = await reading(on)
    await both_killed(on, pid)
    await back_again(on, "fd")
    await lost(on, job_id)
    assert await on.left()
    result = await on.next_is_exact()
    assert "after an earlier job" in result.text
    assert "unlocked the VM" in result.text


async def test_the_watchdog_thaws_where_nobody_else_can(shared: Stage) -> None:
    on = shared
    await on.options()
    with halted_qmp(on.vm, "^transaction") as halt:
        job_id = await on.start("Incremental")
        await halt.reached()
        assert on.vm.machine.fake_frozen
        await both_killed(on, int(on.journal()["pid"]))
        await until(lambda: not on.vm.machine.fake_frozen, "the thaw", 5)
    await back_again(on, "fd")
    await lost(on, job_id)
    await on.next_is_exact()


async def test_two_clean_ups_at_once_are_as_good_as_one(shared: Stage) -> None:
    on = shared
    job_id, pid = await reading(on)
    job = on.journal()["job"]
    await both_killed(on, pid)
    assert await asyncio.gather(clean_up(on, job), clean_up(on, job)) == [0, 0]
    assert not await on.left()
    assert await clean_up(on, job) == 0
    await back_again(on, "fd")
    await lost(on, job_id)
    await on.next_is_exact()


async def test_a_clean_up_of_a_job_that_left_nothing_does_nothing(
    shared: Stage,
) -> None:
    on = shared
    before = len(on.world.site.node.control.calls)
    assert await clean_up(on, "never-heard-of.2026-01-01_00.00.00_00") == 0
    assert len(on.world.site.node.control.calls) == before


async def test_a_clean_up_leaves_a_running_job_alone(shared: Stage) -> None:
    on = shared
    await on.world.add_job("other", "vmid=100 lock_wait=1")
    job_id, _ = await reading(on)
    owner = on.journal()["job"]
    result = await on.world.run("other")
    assert result.status == "f"
    assert owner in result.text, result.text
    assert on.journal()["job"] == owner
    assert "lock" in on.vm.conf.values
    await on.options()
    first = await on.ended(job_id)
    assert first.ok, first.text
    await on.next_is_exact()


async def test_a_disowned_job_costs_the_next_one_nothing(shared: Stage) -> None:
    on = shared
    for _ in range(3):
        await on.scribble()
    result = await on.next_is_exact()
    await asyncio.to_thread(
        on.world.bacula.console, f"delete jobid={result.job_id} yes"
    )
    for _ in range(3):
        await on.scribble()
    await on.next_is_exact()


# --- locks of others ------------------------------------------------------------------


async def test_a_lock_of_vzdump_outlives_a_job_that_is_killed_waiting_for_it(
    shared: Stage,
) -> None:
    on = shared
    on.vm.set(lock="backup")
    try:
        await on.options("lock_wait=300")
        job_id = await on.start("Incremental")
        pid = await on.backend()
        await kill(pid)
        assert (await on.ended(job_id)).status == "f"
        await until(lambda: not on.journal(), "the clean-up", 30)
        assert on.vm.conf.values["lock"] == "backup"
    finally:
        on.vm.set(lock=None)
    await on.next_is_exact()


async def test_a_lock_that_vzdump_got_first_is_not_taken_for_ours(
    shared: Stage,
) -> None:
    on = shared
    await on.options()
    with halted_program(on.world.site, "^qm set 100 --lock") as halt:
        job_id = await on.start("Incremental")
        await halt.reached()
        on.vm.set(lock="backup")
        await kill(int(on.journal()["pid"]))
    try:
        assert (await on.ended(job_id)).status == "f"
        await until(lambda: not on.journal(), "the clean-up", 30)
        assert on.vm.conf.values["lock"] == "backup"
    finally:
        on.vm.set(lock=None)
    await on.next_is_exact()


async def test_a_lock_that_comes_after_our_death_is_undone(shared: Stage) -> None:
    on = shared
    await on.options()
    with halted_program(on.world.site, "^qm set 100 --lock") as halt:
        job_id = await on.start("Incremental")
        await halt.reached()
        await kill(int(on.journal()["pid"]))
        assert (await on.ended(job_id)).status == "f"
        assert "lock" not in on.vm.conf.values
    await on.clean()
    await on.next_is_exact()


# --- restores that fail ---------------------------------------------------------------


async def failed_restore(on: Stage, said: str) -> None:
    result = await on.ended(await on.start_restore())
    assert result.status == "f", result.text
    assert said in result.text, result.text
    await on.clean(5)


async def test_a_restore_whose_vm_cannot_be_created(shared: Stage) -> None:
    on = shared
    on.world.site.faults.fail_task("qmcreate", "no such bridge")
    await failed_restore(on, "no such bridge")


async def test_a_restore_whose_second_volume_is_refused(shared: Stage) -> None:
    on = shared
    faults = on.world.site.faults
    faults.delay("POST", "/storage/local/content", 0)
    faults.fail_next("POST", "/storage/local/content", 500, "not enough free space")
    await failed_restore(on, "not enough free space")


async def test_a_restore_whose_disks_cannot_be_attached(shared: Stage) -> None:
    on = shared
    on.world.site.faults.fail_next(
        "*", r"/qemu/200/config$", 500, "got timeout", times=-1
    )
    try:
        await failed_restore(on, "got timeout")
    finally:
        on.world.site.faults.clear()


async def test_a_restore_that_is_cancelled_in_mid_write(shared: Stage) -> None:
    on = shared
    job_id = await on.start_restore(",restore_bwlimit=4096")
    await on.has_moved(await on.backend(200), 4 << 20, field="rchar")
    await asyncio.to_thread(on.world.bacula.cancel, job_id)
    assert (await on.ended(job_id)).status == "A"
    await on.clean()
    await on.restores_exactly()


# --- VMs that end meanwhile -----------------------------------------------------------


async def test_a_qemu_that_dies_fails_the_job_and_leaves_nothing() -> None:
    async with stage() as on:
        job_id, _ = await reading(on)
        await on.vm.kill()
        result = await on.ended(job_id)
        assert result.status == "f"
        assert "Remedy" in result.text, result.text
        await on.clean()
        await on.options()
        await on.vm.start()
        after = await on.world.run("nightly", "Incremental")
        assert after.ok, after.text
        assert "read whole" in after.text
        await on.restores_exactly()
