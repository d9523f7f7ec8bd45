# SPDX-License-Identifier: Apache-2.0
"""Serve a file over NBD until terminated: ``python -m bench.nbd_serve FILE SOCKET``."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from pveplug.nbd.client import UnixAddress
from pveplug.nbd.file_device import FileDevice
from pveplug.nbd.server import serve


async def main(file: str, path: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    with FileDevice(file) as device:
        async with serve({"disk": device}, UnixAddress(path)):
            await ended.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
