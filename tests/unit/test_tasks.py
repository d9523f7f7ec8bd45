# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

import pytest

from pveplug.tasks import first_failure, to_the_end


async def test_work_is_finished_before_a_cancellation_arrives() -> None:
    done: list[str] = []
    begun = asyncio.Event()

    async def work() -> str:
        begun.set()
        await asyncio.sleep(0.05)
        done.append("work")
        return "result"

    async def engine() -> None:
        await to_the_end(work())
        done.append("never")

    task = asyncio.create_task(engine())
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work"]


async def test_its_result_and_its_failure_come_through() -> None:
    async def good() -> int:
        return 5

    async def bad() -> None:
        raise ValueError("the reason")

    assert await to_the_end(good()) == 5
    with pytest.raises(ValueError, match="the reason"):
        await to_the_end(bad())


async def test_a_failure_is_worth_more_than_a_cancellation() -> None:
    begun = asyncio.Event()

    async def bad() -> None:
        begun.set()
        await asyncio.sleep(0.02)
        raise ValueError("the reason")

    task = asyncio.create_task(to_the_end(bad()))
    await begun.wait()
    task.cancel()
    with pytest.raises(ValueError, match="the reason"):
        await task


async def test_the_first_failure_is_the_one_that_is_raised() -> None:
    async def bad() -> None:
        raise ValueError("first")

    async def worse() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            raise KeyError("while being cancelled")

    async def both() -> None:
        async with first_failure() as tasks:
            tasks.create_task(worse())
            await asyncio.sleep(0)
            tasks.create_task(bad())

    with pytest.raises(ValueError, match="first"):
        await both()
