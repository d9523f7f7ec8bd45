# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pveplug.errors import TransportError
from pveplug.storeprobe import StoreProbe, settled, stuck


async def test_a_store_that_answers_is_heard_and_nothing_is_left_in_it(
    tmp_path: Path,
) -> None:
    async with StoreProbe([str(tmp_path)], every_s=0.01) as probe:
        assert await probe.all_answer(30)
        assert await probe.all_answer(30)
    assert list(tmp_path.iterdir()) == []


async def test_a_directory_that_has_gone_answers(tmp_path: Path) -> None:
    async with StoreProbe([str(tmp_path / "gone"), str(tmp_path)]) as probe:
        assert await probe.all_answer(30)


async def test_a_store_that_says_nothing_is_named(tmp_path: Path) -> None:
    async with StoreProbe([str(tmp_path)], every_s=0.01) as probe:
        assert await probe.all_answer(30)
        process = probe._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert await probe.silent(0.2) == str(tmp_path)
        assert not await probe.all_answer(0.05)


async def test_a_probe_that_was_killed_is_no_answer(tmp_path: Path) -> None:
    async with StoreProbe([str(tmp_path)]) as probe:
        process = probe._process
        assert process is not None
        process.kill()
        with pytest.raises(TransportError, match="has died"):
            await probe.silent(30)


async def test_without_a_directory_there_is_nothing_to_wait_for() -> None:
    async with StoreProbe([]) as probe:
        assert await probe.all_answer(1)


async def test_a_process_that_reads_a_file_of_ours_is_stuck_in_it(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "ph-100-scsi0.qcow2"
    os.mkfifo(fifo)
    child = os.fork()
    if not child:
        os.read(os.open(fifo, os.O_RDWR), 1)
        os._exit(0)
    try:
        for _ in range(2000):
            if stuck(child, [f"/by/a/link/{fifo.name}"]):
                break
            os.sched_yield()
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG)
        assert stuck(child, [f"/by/a/link/{fifo.name}"])
        assert not stuck(child, [str(tmp_path / "another")])
        assert not await settled(child, [str(fifo)], 0.2)
        assert await settled(child, [str(tmp_path / "another")], 30)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not stuck(child, [str(fifo)])
    assert await settled(child, [str(fifo)], 30)
