# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: a File Daemon that encrypts, and data with offsets."""

from __future__ import annotations

import pytest

from tests.support.error_jobs import (
    WITHOUT_GUEST,
    ErrorWorld,
    failed,
    informed,
    warned,
)
from tests.support.world import BACULA_9

pytestmark = pytest.mark.integration

needs_bacula_9 = pytest.mark.skipif(
    not BACULA_9.exists(), reason="needs Bacula 9.6.7: ./dev setup unpacks it"
)


async def with_a_vm(world: ErrorWorld) -> None:
    vm = await world.site.create_vm(100, WITHOUT_GUEST, disks={"scsi0": "8M"})
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 7 1M 1M")


@needs_bacula_9
async def test_bacula_9_is_warned_of_plain_text_when_it_encrypts() -> None:
    async with ErrorWorld(prefix=BACULA_9, bacula={"pki": True}) as world:
        await with_a_vm(world)
        result = await world.backup("vmid=100")
        warned(
            result,
            "Bacula 9.6 stores data with offsets unencrypted even when the FileSet "
            "encrypts; set offsets=no if it does",
        )
        result = await world.backup("vmid=100 offsets=no")
        informed(result, "VM 100 (vm100) is in this job")
        await world.assert_nothing_left()


async def test_bacula_15_fails_a_job_with_offsets_when_it_encrypts() -> None:
    async with ErrorWorld(bacula={"pki": True}) as world:
        await with_a_vm(world)
        result = await world.backup("vmid=100")
        failed(result, "Encrypting sparse or offset data not supported")
        await world.assert_nothing_left()
        result = await world.backup("vmid=100 offsets=no")
        informed(result, "VM 100 (vm100) is in this job")
        await world.assert_nothing_left()
