# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: a guest that switches its machine off in mid job."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.error_jobs import ErrorWorld, informed
from tests.support.guest import Guest
from tests.support.requires import GUEST

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not (GUEST / "boot.raw").exists(), reason="needs the tiny guest: ./dev setup"
    ),
]


async def test_a_guest_that_powers_off_is_backed_up_to_the_end() -> None:
    async with ErrorWorld() as world:
        guest = await Guest.create(world.site, 100, GUEST / "boot.raw")
        await guest.boot()
        job_id = await world.start(await world.define("vmid=100 bwlimit=4096"))
        async with asyncio.timeout(60):
            while not await guest.vm.qmp("query-block-exports"):
                await asyncio.sleep(0.1)
        await guest.vm.power_off_guest()
        async with asyncio.timeout(30):
            while (await guest.vm.qmp("query-status"))["status"] != "shutdown":
                await asyncio.sleep(0.1)
        assert world.bacula.status(job_id) == "R", "the job was over too early"
        result = await world.wait(job_id)
        informed(result, "VM 100 (tiny-guest) is in this job")
        # Nobody needs QEMU any more: qmeventd ends it as it would have at once.
        await guest.vm.wait_gone(30)
        await world.assert_nothing_left()
