# SPDX-License-Identifier: Apache-2.0
"""Small disks that can't wait: EFI variables and TPM state.

QEMU and swtpm read them at the start, and swtpm takes no overlay. So they are landed
like every disk, and when they are whole copied to an ordinary volume.
"""

from __future__ import annotations

import os
from typing import Final

from pveplug.errors import IntegrityError
from pveplug.ir.landing import Landing
from pveplug.ir.presence import Mark
from pveplug.nbd.client import connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.nbd.sink import NbdSink
from pveplug.node import Node
from pveplug.units import MiB

PIECE: Final = 1 * MiB


async def copy_landed(node: Node, landing: Landing, path: str, form: str) -> None:
    """Write a whole landing to a volume.

    Args:
        path: of the volume; ``form``: its image format. It may be larger than the disk.

    Raises:
        IntegrityError: the landing isn't whole, or the volume too small.
        NbdError: a write failed.
    """
    if not landing.complete:
        raise IntegrityError(f"{landing.files.key} is not here yet")
    async with (
        qemu_nbd(
            node, path, form, socket_dir=node.runtime_dir, read_only=False
        ) as address,
        await connect(address) as client,
    ):
        if client.size < landing.size:
            raise IntegrityError(
                f"the volume has {client.size} bytes, the disk {landing.size}"
            )
        async with NbdSink(client) as sink:
            await sink.zero(0, client.size)
            for offset, length, mark in landing.kinds(0, landing.size):
                if mark is Mark.DATA:
                    await _copy(landing, sink, offset, length)
            await sink.finish()


async def _copy(landing: Landing, sink: NbdSink, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        # A few hundred KiB that were written a moment ago: no thread is worth it.
        data = os.pread(landing.fd, min(PIECE, end - offset), offset)
        if not data:
            raise IntegrityError(f"{landing.files.data} is shorter than it was")
        await sink.write(offset, memoryview(data))
        offset += len(data)
