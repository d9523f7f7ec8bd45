# SPDX-License-Identifier: Apache-2.0
"""Stopping the product at an exact moment, without a hook in the product.

The lab stands between it and everything it talks to: a QMP command, a program or an
API call that matches is held until ``release``; then it *is* carried out, as what was
on its way when its sender died would be::

    with halted_qmp(vm, "blockdev-reopen") as halt:
        job = await world.start("nightly")
        await halt.reached()
        os.kill(pid, signal.SIGKILL)
    …                                   # the command takes effect now
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.lab.site import Site
from tests.lab.vm import LabVm

PATIENCE_S = 60.0


class Halt:
    """What is held: the first match of ``regex``, once."""

    def __init__(self, regex: str) -> None:
        self._regex = re.compile(regex)
        self._reached = asyncio.Event()
        self._released = asyncio.Event()
        self.held = ""

    async def gate(self, text: str) -> None:
        """Let ``text`` wait if it is the one."""
        if not self._reached.is_set() and self._regex.search(text):
            self.held = text
            self._reached.set()
            await self._released.wait()

    async def reached(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until somebody is held."""
        async with asyncio.timeout(timeout_s):
            await self._reached.wait()

    def release(self) -> None:
        self._released.set()


@contextlib.contextmanager
def halted_qmp(vm: LabVm, regex: str) -> Iterator[Halt]:
    """Hold a QMP command; ``regex`` is searched in ``NAME {"arguments": …}``."""
    halt = Halt(regex)
    relay = vm.machine.qmp_relay

    async def answer(command: dict[str, Any]) -> None:
        await halt.gate(f"{command['execute']} {json.dumps(command)}")

    relay.answer = answer
    try:
        yield halt
    finally:
        halt.release()
        relay.answer = None


@contextlib.contextmanager
def halted_program(site: Site, regex: str) -> Iterator[Halt]:
    """Hold a program of the node: ``qm set 100 --lock backup``."""
    halt = Halt(regex)
    site.node.control.gate = halt.gate
    try:
        yield halt
    finally:
        halt.release()
        site.node.control.gate = None


@contextlib.contextmanager
def halted_api(site: Site, regex: str) -> Iterator[Halt]:
    """Hold an API call: ``PUT .*/qemu/200/config``."""
    halt = Halt(regex)
    site.faults.gate = halt.gate
    try:
        yield halt
    finally:
        halt.release()
        site.faults.gate = None
