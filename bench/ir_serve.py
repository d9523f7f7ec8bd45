# SPDX-License-Identifier: Apache-2.0
"""Serve a landing until terminated: ``python -m bench.ir_serve DIR SOCKET``."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import Landing
from pveplug.nbd.client import UnixAddress
from pveplug.nbd.server import serve

KEY = "disk"


async def main(directory: str, path: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    base = Path(directory)
    with Landing.open(base, base, KEY) as landing, LandingDevice(landing) as device:
        async with serve({"disk": device}, UnixAddress(path)):
            await ended.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
