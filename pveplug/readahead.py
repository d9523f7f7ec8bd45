# SPDX-License-Identifier: Apache-2.0
"""Items made in a thread of their own, a few ahead of whoever takes them.

Reading and inflating leave the interpreter to others, and so does writing: a reader in
front of a writer is what makes use of a second processor.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

_LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class _End:
    """Nothing more comes; ``error`` is why, unless all has come."""

    error: BaseException | None = None


@contextlib.contextmanager
def read_ahead(
    source: Generator[T, None, None], depth: int
) -> Generator[Iterator[T], None, None]:
    """Run ``source`` in a thread; yield an iterator of what it makes, in order.

    What ``source`` raises is raised by the iterator, which waits in ``next``. When the
    context is left the source has been closed and no thread is left.

    Args:
        depth: items that may wait. While one is being made, up to ``depth`` + 1 that
            were made before are still in use.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    over = threading.Event()

    def make() -> None:
        end = _End()
        try:
            with contextlib.closing(source):
                for item in source:
                    ready.put(item)
                    if over.is_set():
                        break
        except BaseException as error:
            end = _End(error)
        ready.put(end)

    def take() -> Iterator[T]:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        over.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=_LOOK_S)  # who waits for room finds some
        thread.join()
