# SPDX-License-Identifier: Apache-2.0
"""Replicas that rot are found, mended or refused; those that don't are let be."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.lab.vm import LabVm
from tests.support.dr_truth import restore_points
from tests.support.dr_written import Ran, Written, point_content, replicate
from tests.support.requires import requires
from tests.support.truth import run
from tests.support.two_sites import TwoSites

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-io"),
]
MIB = 1 << 20
LEAF = 64 << 10
SAMPLES = 150


@asynccontextmanager
async def seeded(size: int) -> AsyncIterator[tuple[TwoSites, Written, LabVm]]:
    """A source and its replica, which has one restore point."""
    async with TwoSites() as sites:
        vm = await sites.site.create_vm(100, disks={"scsi0": f"{size // MIB}M"})
        await vm.start()
        written = Written(vm, {"scsi0": size}, folder=sites.base)
        await written.data("scsi0", size // 4, size // 8)
        await written.some(10)
        await sites.start_receiver()
        ran = await replicate(sites, "seed", 100)
        assert not ran.status, ran.text + sites.receiver_log[-3000:]
        yield sites, written, sites.dr.vm(sites.dr.vms()[0][1])


def flip_a_bit(replica: LabVm, written: Written, offset: int, folder: Path) -> None:
    """Turn one bit of what the replica has at ``offset``, behind everybody's back."""
    sector = bytearray(written.content("scsi0")[offset : offset + 512])
    sector[77] ^= 4
    file = folder / "flipped"
    file.write_bytes(sector)
    path = replica.disk_path("scsi0")
    assert path.suffix == ".qcow2"
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {file} {offset} 512", str(path))
    file.unlink()


async def judged(ran: Ran, written: Written, replica: LabVm, points: int) -> None:
    """Assert that a cycle ended well and its restore point is what the source is."""
    assert not ran.status, ran.text
    names = restore_points(replica)
    assert len(names) == points
    found = await asyncio.to_thread(point_content, replica, names[-1])
    assert found == written.sums()


async def test_fifteen_increments_with_290_samples_never_differ() -> None:
    async with seeded(24 * MIB) as (sites, written, replica):
        for number in range(15):
            await written.some(8)
            # Many at once take a second of each side, and prove no more than few do.
            samples = SAMPLES if number == 14 else 10
            words = f"verify_sample_blocks={samples} dr_restore_points=20"
            ran = await replicate(sites, "incremental", 100, words)
            assert f"and {samples} samples" in ran.text, ran.text
            assert "differ" not in ran.text
            await judged(ran, written, replica, number + 2)


async def test_a_flipped_bit_is_found_within_16_cycles_and_mended() -> None:
    async with seeded(16 * MIB) as (sites, written, replica):
        # The seed has looked at slice 0, the next cycles look at 1, 2, 3 …
        offset = 11 * MIB + 5 * LEAF + 512
        flip_a_bit(replica, written, offset, sites.base)
        for _ in range(16):
            words = "verify_slice=1/16 dr_restore_points=20"
            ran = await replicate(sites, "incremental", 100, words)
            if "the replica differed" in ran.text:
                break
            assert not ran.status, ran.text
            assert "warning" not in ran.text, ran.text
        said = re.search(
            r"^warning: VM 100 scsi0: the replica differed.*", ran.text, re.M
        )
        assert said, f"not found in 16 cycles: {ran.text}"
        assert f"in 1 blocks of 64 KiB, the first at {offset // LEAF * LEAF}" in said[0]
        assert "sent again" in said[0]
        await judged(ran, written, replica, len(restore_points(replica)))


async def test_a_sample_that_differs_fails_the_job_and_is_no_restore_point() -> None:
    async with seeded(4 * MIB) as (sites, written, replica):
        before = restore_points(replica)
        offset = 1 * MIB + 3 * LEAF + 1024  # in what the seed has sent
        flip_a_bit(replica, written, offset, sites.base)
        words = "verify_sample_blocks=64 verify_slice=off"
        ran = await replicate(sites, "incremental", 100, words)
        assert ran.status == 69, ran.text
        assert "scsi0" in ran.text
        assert f"the replica differs at offset {offset // LEAF * LEAF}" in ran.text
        assert "verify_slice=1/1" in ran.text
        assert restore_points(replica) == before
        await written.vm.assert_clean()
        # What is known to be wrong isn't made a restore point by who comes next.
        ran = await replicate(sites, "incremental", 100, "verify_slice=1/1")
        assert f"the first at {offset // LEAF * LEAF}" in ran.text, ran.text
        await judged(ran, written, replica, 2)
