# SPDX-License-Identifier: Apache-2.0
"""Instant recoveries whose stream is cut while the guest writes.

``./dev ircuts`` runs the same for longer and with other seeds.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from tests.lab.ircuts import plan
from tests.support.requires import REPOSITORY, requires

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]
SEED, CUTS = 1, 4


@pytest.mark.timeout(400)
async def test_cut_at_any_byte_the_stream_goes_on_and_no_write_is_lost() -> None:
    assert len({cut.means for cut in plan(SEED, CUTS)}) == CUTS
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.lab.ircuts"),
        *("--seed", str(SEED), "--cuts", str(CUTS)),
        cwd=REPOSITORY,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        async with asyncio.timeout(360):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    said = output.decode()
    last = said.splitlines()[-1]
    assert last.startswith(f"ircuts: {CUTS} cuts, "), said[-6000:]
    assert last.endswith(" 0 bytes landed twice, 0 wrong"), said[-6000:]
    assert process.returncode == 0, said[-6000:]
