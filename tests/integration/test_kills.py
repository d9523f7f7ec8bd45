# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at the worst moments: what is left is gone soon, nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.halt import halted_api, halted_program, halted_qmp
from tests.support.kills import Stage, kill, stage, until

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def modern() -> AsyncIterator[Stage]:
    async with stage() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def older() -> AsyncIterator[Stage]:
    """The layout of older machine types: a switch of two disks pauses the guest."""
    async with stage(machine="pc-i440fx-9.2+pve1") as found:
        yield found


async def failed_and_clean(on: Stage, job_id: int, daemon: int) -> None:
    """Assert what holds after every kill, and the time from the kill on."""
    await on.clean()
    result = await on.ended(job_id)
    assert result.status == "f", result.text
    assert on.world.bacula.pid("fd") == daemon
    assert on.world.bacula.alive("fd")


AFTER = {
    "the lock": ("api", r"GET .*/qemu/100/status/current"),
    "the freeze": ("qmp", "^transaction"),
    "the filters": ("qmp", "^blockdev-reopen"),
    "the switch": ("qmp", "^nbd-server-start"),
    "the first export": ("qmp", "^block-export-add"),
}


@pytest.mark.parametrize("moment", AFTER)
async def test_a_backup_killed_after(modern: Stage, moment: str) -> None:
    on = modern
    kind, regex = AFTER[moment]
    daemon = on.world.bacula.pid("fd")
    async with on.writing():
        with (
            halted_api(on.world.site, regex)
            if kind == "api"
            else halted_qmp(on.vm, regex)
        ) as halt:
            job_id = await on.start("Incremental")
            await halt.reached()
            entry = on.journal()
            assert entry["locked"]
            assert on.vm.conf.values["lock"] == "backup"
            assert entry["touched"] == (moment != "the lock")
            if moment in ("the freeze", "the filters"):
                assert on.vm.machine.fake_frozen
                assert entry["frozen"]
            await kill(int(entry["pid"]))
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()


@pytest.mark.parametrize("command", ["stop", "qom-set", "cont"])
async def test_a_guest_that_was_paused_for_the_switch_goes_on(
    older: Stage, command: str
) -> None:
    on = older
    assert not on.vm.modern
    daemon = on.world.bacula.pid("fd")
    async with on.writing():
        with halted_qmp(on.vm, f"^{command} ") as halt:
            job_id = await on.start("Incremental")
            await halt.reached()
            await kill(int(on.journal()["pid"]))
        await failed_and_clean(on, job_id, daemon)
        assert (await on.vm.qmp("query-status"))["status"] == "running"
    await on.next_is_exact()


async def test_a_fleecing_backup_killed_in_mid_read(older: Stage) -> None:
    on = older
    daemon = on.world.bacula.pid("fd")
    await on.options("mechanism=fleece bwlimit=2048")
    async with on.writing():
        job_id = await on.start("Full")
        pid = await on.backend()
        await on.has_moved(pid, 2 << 20)
        assert any(text.startswith("job ph-fl-") for text in await on.vm.leftovers())
        await kill(pid)
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()


@pytest.mark.parametrize("level", ["Full", "Incremental"])
async def test_a_backup_killed_in_mid_read(modern: Stage, level: str) -> None:
    on = modern
    daemon = on.world.bacula.pid("fd")
    await on.vm.qemu_io("scsi0", "write -P 99 2M 12M")
    await on.options("bwlimit=2048")
    async with on.writing():
        job_id = await on.start(level)
        pid = await on.backend()
        await on.has_moved(pid, 2 << 20)
        assert await on.vm.leftovers()
        await kill(pid)
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()


async def test_a_backup_killed_just_before_its_end(modern: Stage) -> None:
    on = modern
    daemon = on.world.bacula.pid("fd")
    async with on.writing():
        with halted_program(on.world.site, "^qm unlock 100") as halt:
            job_id = await on.start("Incremental")
            await halt.reached()
            pid = int(on.journal()["pid"])
            # bacula-fd may not ask for the end while we look.
            os.kill(daemon, signal.SIGSTOP)
        try:
            await until(lambda: not on.journal(), "the release of the VM")
            await kill(pid)
        finally:
            os.kill(daemon, signal.SIGCONT)
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()


RESTORES = {
    "before it is locked": ("program", "^qm set 200 --lock"),
    "while its first volume is allocated": ("api", "POST .*/storage/local/content"),
    "just before it is unlocked": ("program", "^qm unlock 200"),
    "just before its disks are attached": ("api", "PUT|POST .*/qemu/200/config"),
}


@pytest.mark.parametrize("moment", RESTORES)
async def test_a_restore_killed(modern: Stage, moment: str) -> None:
    on = modern
    kind, regex = RESTORES[moment]
    daemon = on.world.bacula.pid("fd")
    hold = halted_api if kind == "api" else halted_program
    async with on.writing():
        with hold(on.world.site, regex) as halt:
            job_id = await on.start_restore()
            await halt.reached()
            assert on.journal(200)["created"]
            assert on.world.site.find(200)
            await kill(int(on.journal(200)["pid"]))
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()


async def test_a_restore_killed_while_it_creates_the_vm(modern: Stage) -> None:
    on = modern
    daemon = on.world.bacula.pid("fd")
    with halted_api(on.world.site, "^POST .*/qemu$") as halt:
        job_id = await on.start_restore()
        await halt.reached()
        assert not on.world.site.find(200)
        await kill(int(on.journal(200)["pid"]))
    # PVE creates it now that nobody wants it any more.
    await failed_and_clean(on, job_id, daemon)
    await on.restores_exactly()


async def test_a_restore_killed_in_mid_write(modern: Stage) -> None:
    on = modern
    daemon = on.world.bacula.pid("fd")
    async with on.writing():
        job_id = await on.start_restore(",restore_bwlimit=4096")
        pid = await on.backend(200)
        await on.has_moved(pid, 4 << 20, field="rchar")
        await kill(pid)
        await failed_and_clean(on, job_id, daemon)
    await on.next_is_exact()
