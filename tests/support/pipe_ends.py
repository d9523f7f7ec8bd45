# SPDX-License-Identifier: Apache-2.0
"""The other ends of the two pipes to bacula-fd, and what came out of them."""

from __future__ import annotations

import os
import threading
import time

from pveplug.bacula_pipe import PtcommPipe
from pveplug.proto import ptcomm
from pveplug.proto.ptcomm import PtcommConnection
from pveplug.units import KiB


class Ends:
    """A pipe to us that stays silent, and one from us whose other end is read here."""

    def __init__(self) -> None:
        self.silent_in, self.silent_out = os.pipe()
        self.reading, self.writing = os.pipe()
        self.got = bytearray()
        self._reader: threading.Thread | None = None

    def read_all(self, step: int = 64 * KiB, rest_s: float = 0.0) -> None:
        """Begin to read, in a thread that rests after each piece."""

        def run() -> None:
            while data := os.read(self.reading, step):
                self.got.extend(data)
                if rest_s:
                    time.sleep(rest_s)

        self._reader = threading.Thread(target=run)
        self._reader.start()

    def finish(self, pipe: PtcommPipe) -> bytes:
        pipe.close()
        if self._reader is not None:
            self._reader.join(20)
            assert not self._reader.is_alive()
        for fd in (self.silent_out, self.reading):
            os.close(fd)
        return bytes(self.got)


def received(stream: bytes, size: int) -> bytearray:
    """Return the file that a stream of packets makes."""
    image, at = bytearray(size), 0
    for packet in PtcommConnection(frozenset(ptcomm.Status)).receive_data(stream):
        if packet.status is ptcomm.Status.DATA:
            image[at : at + len(packet.data)] = packet.data
            at += len(packet.data)
        elif packet.text.startswith("OFFSET:"):
            at = int(packet.text.removeprefix("OFFSET:"))
    return image
