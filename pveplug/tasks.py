# SPDX-License-Identifier: Apache-2.0
"""Tasks: a group that raises what went wrong, and work that is always finished."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.asynccontextmanager
async def first_failure() -> AsyncIterator[asyncio.TaskGroup]:
    """Own tasks; when one fails the others are cancelled and its error is raised.

    What a task raises while it is being cancelled is not the reason, the first is.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        error = _first(group)
        raise error from error.__cause__


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run what must not be left half done; a cancellation is delivered after it.

    For short things that give back what was taken, or whose effect would otherwise be
    unknown. What it raises is worth more than that we were cancelled meanwhile.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
