# SPDX-License-Identifier: Apache-2.0
"""Items made in a thread of their own, a few ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from pveplug.readahead import read_ahead


def numbers(made: list[int], end: int = 1000) -> Generator[int, None, None]:
    for number in range(end):
        made.append(number)
        yield number


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_all_comes_in_order_and_no_thread_is_left() -> None:
    with read_ahead(numbers([]), 2) as coming:
        assert list(coming) == list(range(1000))
    assert "read-ahead" not in names()


def test_never_more_are_made_than_is_said() -> None:
    made: list[int] = []
    with read_ahead(numbers(made), 2) as coming:
        for number in coming:
            time.sleep(0.001)
            # In hand, two that wait, one that was made and waits for room.
            assert len(made) <= number + 4
            if number == 50:
                break
    assert len(made) < 60
    assert "read-ahead" not in names()


def test_what_the_source_raises_comes_after_what_it_made() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise OSError("broken")

    with read_ahead(failing(), 1) as coming:
        assert [next(coming), next(coming)] == [1, 2]
        with pytest.raises(OSError, match="broken"):
            next(coming)
    assert "read-ahead" not in names()


def test_leaving_early_closes_the_source() -> None:
    closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with read_ahead(endless(), 1) as coming:
        next(coming)
    assert closed.is_set()
    assert "read-ahead" not in names()
