# SPDX-License-Identifier: Apache-2.0
"""Looking out for the next request for some microseconds before the loop sleeps.

A guest that reads one block after the other asks again some microseconds after each
answer. To sleep and be woken for that takes longer than the answer itself, the more so
on a virtual machine, where it takes both sides through the hypervisor. So the server
looks for a moment whether the loop has something to do, as QEMU's iothreads do
(``poll-max-ns``), and like them gives up on a client that lets it wait.

While it looks, nothing else is held up but what is ready in the loop without an event:
any event, of anybody's, ends it. (With uvloop. asyncio's own loop has no number to be
polled by, so that another's event waits for those 100 us.)
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from typing import Final

POLL_S: Final = 100e-6
"""On a virtual machine one request in some took 50 us to come, and each that was slept
for 0.1 to 1.4 ms more. QEMU's iothreads poll for 32 us, KVM for a halted guest 200."""
MOST_SKIPPED: Final = 256
"""So many replies are sent without, after a row of vain ones: 0.2 us for each."""


class Lookout:
    """Polls a connection's event loop, or its socket where the loop has no number."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: int) -> None:
        number = getattr(loop, "_get_backend_id", None)  # uvloop's, for embedding it
        self._poll = select.poll()
        self._poll.register(sock if number is None else number(), select.POLLIN)
        self._skip = 0
        self._penalty = 0

    def look(self) -> bool:
        """Wait for an event, at most ``POLL_S``; whether there is one."""
        if self._skip:
            self._skip -= 1
            return False
        poll, now = self._poll.poll, time.perf_counter
        until = now() + POLL_S
        while not poll(0):
            if now() > until:
                self._penalty = min(2 * self._penalty + 1, MOST_SKIPPED)
                self._skip = self._penalty
                return False
        self._penalty = 0
        return True


def worth_polling() -> bool:
    """Whether a client can run while we poll."""
    return len(os.sched_getaffinity(0)) > 1
