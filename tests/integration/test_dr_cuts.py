# SPDX-License-Identifier: Apache-2.0
"""Replication whose channel is cut and whose ends are killed.

``./dev drcuts`` runs the same for longer and with other seeds.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from tests.lab.drcuts import plan
from tests.support.requires import REPOSITORY, requires

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]
SEED = 4


async def drcuts(*options: str, limit_s: float) -> tuple[int, str]:
    """Run it; return its exit status and all it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.lab.drcuts", *options),
        cwd=REPOSITORY,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        async with asyncio.timeout(limit_s):
            said, _ = await process.communicate()
    except TimeoutError:
        process.terminate()
        said, _ = await process.communicate()
        raise AssertionError(
            f"it runs after {limit_s:g} s:\n{said.decode()[-6000:]}"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode()


@pytest.mark.timeout(700)
async def test_cut_at_any_byte_and_killed_at_any_moment_no_restore_point_is_lost():
    kinds = [event.kind for event in plan(SEED, 12, 3)]
    assert kinds.count("cut") == 12
    assert {"kill sender", "kill receiver"} <= set(kinds)
    status, said = await drcuts(
        *("--seed", str(SEED), "--cuts", "12", "--kills", "3"), limit_s=660
    )
    last = said.splitlines()[-1]
    assert last == "drcuts: 12 cuts, 3 kills, 0 restore points lost, 0 cycles wrong", (
        said[-6000:]
    )
    assert status == 0
