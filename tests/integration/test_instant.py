# SPDX-License-Identifier: Apache-2.0
"""Instant recovery over real QEMU and real Bacula: the VM runs while its disks come."""

from __future__ import annotations

import pytest

from tests.lab import demo_ir
from tests.support.requires import GUEST, requires, requires_file

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    requires_file(GUEST / "boot.raw"),
]


async def test_a_lost_vm_runs_from_its_chain_writes_moves_and_stands_alone() -> None:
    """``./dev demo ir``, whose every step is a check."""
    await demo_ir.tell()
