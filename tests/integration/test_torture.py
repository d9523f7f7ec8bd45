# SPDX-License-Identifier: Apache-2.0
"""Change tracking under random events, and that a planted fault would be found.

``./dev torture`` runs the same for longer and with other seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requires import REPOSITORY, requires
from tests.support.sabotaged_backend import FAULTS, install

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(480),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

QUIET_SEED = 131
"""A Full, an Incremental while the guest writes, a Differential; no events."""
RESTARTED_SEED = 123
"""A Full, a restart of the VM, an Incremental of what the digests tell."""


async def torture(*options: str, limit_s: float = 420) -> tuple[int, str]:
    """Run it; return its exit status and all it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.lab.torture", *options),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(limit_s):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


PAIRS = (
    # Together the two seeds deal all events but one in 12 rounds.
    ((2456, "blockdev", "cbw"), (2456, "drive", "fleece")),
    ((2556, "blockdev", "fleece"), (2556, "drive", "cbw")),
)
"""Two at once: a run mostly waits for Bacula."""


@pytest.mark.parametrize("pair", PAIRS, ids=("2456", "2556"))
async def test_no_block_is_lost_whatever_happens(
    pair: tuple[tuple[int, str, str], ...],
) -> None:
    runs = [
        torture(
            *("--seed", str(seed), "--rounds", "12"),
            *("--layout", layout, "--mechanism", mechanism),
        )
        for seed, layout, mechanism in pair
    ]
    for status, said in await asyncio.gather(*runs):
        assert status == 0, said
        last = said.rstrip().splitlines()[-1]
        assert re.fullmatch(
            r"torture: 12 rounds, \d+ jobs, \d+ escalations, 0 lost blocks", last
        ), said


WHAT_IS_FOUND = {
    "union": (QUIET_SEED, 3, "LostBlocksError"),
    "instant": (QUIET_SEED, 2, "LostBlocksError"),
    "escalate": (QUIET_SEED, 2, "needless escalation"),
    "digest": (RESTARTED_SEED, 2, "LostBlocksError"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    backend = install(tmp_path / "podheitor-proxmox-backend", fault)
    seed, rounds, complaint = WHAT_IS_FOUND[fault]
    status, said = await torture(
        *("--seed", str(seed), "--rounds", str(rounds)),
        *("--backend", str(backend)),
    )
    assert status == 1, said
    assert complaint in said
