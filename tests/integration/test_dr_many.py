# SPDX-License-Identifier: Apache-2.0
"""Several senders at one receiver: side by side, too many, and two of one replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.lab.vm import LabVm
from tests.support.cutting_proxy import CuttingProxy
from tests.support.dr_truth import restore_points
from tests.support.dr_written import (
    Ran,
    Sender,
    Written,
    point_content,
    replicate,
    start_sender,
)
from tests.support.kills import until
from tests.support.requires import requires
from tests.support.two_sites import TwoSites

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(480),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]
MIB = 1 << 20
SIZES = {"scsi0": 16 * MIB}
SLOW = 16 << 10
"""Bytes per second at which a seed of ours takes two minutes."""


async def source(sites: TwoSites, vmid: int) -> Written:
    vm = await sites.site.create_vm(vmid, disks={"scsi0": "16M"})
    await vm.start()
    written = Written(vm, SIZES, folder=sites.base, seed=vmid)
    await written.data("scsi0", 1 * MIB, 2 * MIB)
    await written.some(5)
    return written


def replica_of(sites: TwoSites, vmid: int) -> LabVm:
    """The replica, found by the name it has of its source."""
    found = [
        sites.dr.vm(there)
        for _, there in sites.dr.vms()
        if sites.dr.vm(there).conf.values["name"].startswith(f"vm{vmid}")
    ]
    assert len(found) == 1, [vm.conf.values["name"] for vm in found]
    return found[0]


async def judged(sites: TwoSites, ran: Ran, written: Written, points: int) -> None:
    """Assert that a cycle ended well and its restore point is what the source is."""
    assert not ran.status, ran.text + sites.receiver_log[-3000:]
    replica = replica_of(sites, written.vm.vmid)
    names = restore_points(replica)
    assert len(names) == points
    found = await asyncio.to_thread(point_content, replica, names[-1])
    assert found == written.sums(), f"VM {written.vm.vmid}"


def opened(sites: TwoSites) -> int:
    return sites.receiver_log.count("session opened")


@contextlib.asynccontextmanager
async def held_up(
    sites: TwoSites, proxy: CuttingProxy, mode: str, vmids: list[int]
) -> AsyncIterator[list[asyncio.Task[Ran]]]:
    """Have senders of all these VMs in a session each, hardly moving.

    When the block ends they are let go, and may be awaited.
    """
    proxy.rate = SLOW
    before = opened(sites)
    senders: list[Sender] = []
    for vmid in vmids:
        senders.append(await start_sender(sites, mode, vmid, port=proxy.port))
    running = [asyncio.create_task(sender.ended()) for sender in senders]
    try:
        await until(lambda: opened(sites) == before + len(vmids), "all sessions", 150)
        assert "cycle acknowledged" not in sites.receiver_log.rpartition("opened")[2]
        assert not any(task.done() for task in running)
        yield running
    finally:
        proxy.rate = 0
        await asyncio.wait(running)


async def test_two_replicas_are_made_and_brought_up_to_date_side_by_side() -> None:
    async with TwoSites() as sites, sites.cutting() as proxy:
        sources = [await source(sites, vmid) for vmid in (100, 101)]
        await sites.start_receiver()
        for number, mode in enumerate(("seed", "incremental", "incremental"), 1):
            for written in sources:
                await written.some(20)
            async with held_up(sites, proxy, mode, [100, 101]) as running:
                pass
            for task, written in zip(running, sources, strict=True):
                await judged(sites, await task, written, number)


async def test_eight_at_once_lose_nothing_and_a_ninth_is_told_why() -> None:
    receiver = {"limits.sessions": 8}
    async with TwoSites(receiver=receiver) as sites, sites.cutting() as proxy:
        sites.most_hold_s = 10.0  # nine QEMUs and their senders on two processors
        vmids = list(range(100, 109))
        sources = [await source(sites, vmid) for vmid in vmids]
        await sites.start_receiver()
        async with held_up(sites, proxy, "seed", vmids[:8]) as running:
            ninth = await replicate(sites, "seed", vmids[8])
            assert ninth.status == 69, ninth.text
            assert "8 senders are being served, which is limits.sessions" in ninth.text
            assert "try again later" in ninth.text
        for task, written in zip(running, sources[:8], strict=True):
            await judged(sites, await task, written, 1)
        for written in sources:
            await written.some(10)
        later = [replicate(sites, "incremental", vmid) for vmid in vmids[:8]]
        for ran, written in zip(await asyncio.gather(*later), sources, strict=False):
            await judged(sites, ran, written, 2)
        ninth = await replicate(sites, "seed", vmids[8])
        await judged(sites, ninth, sources[8], 1)


async def test_a_replica_takes_one_sender_and_tells_the_other_who_that_is() -> None:
    async with TwoSites() as sites, sites.cutting() as proxy:
        written = await source(sites, 100)
        await sites.start_receiver()
        for number, mode in enumerate(("seed", "incremental"), 1):
            await written.some(20)
            async with held_up(sites, proxy, mode, [100]) as (first,):
                second = await replicate(sites, mode, 100)
                assert second.status == 69, second.text
                assert "is being worked on by pveplug-dr" in second.text, second.text
                assert f"({mode}) since" in second.text
                assert "code=busy" in sites.receiver_log
            await judged(sites, await first, written, number)
            await written.vm.assert_clean()
