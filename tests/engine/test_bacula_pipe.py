# SPDX-License-Identifier: Apache-2.0
"""What goes into the pipe to bacula-fd: in order, whole, and not in crumbs."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import tracemalloc

import pytest

from pveplug.bacula_files import FileInfo, OutgoingFile
from pveplug.bacula_pipe import GATHER_BYTES, PtcommPipe
from pveplug.errors import LocalProtocolError, TransportError
from pveplug.proto import ptcomm
from pveplug.units import KiB, MiB


class Ends:
    """A pipe to us that stays silent, and one from us whose other end is read here."""

    def __init__(self) -> None:
        self.silent_in, self.silent_out = os.pipe()
        self.reading, self.writing = os.pipe()
        self.got = bytearray()
        self._reader: threading.Thread | None = None

    def read_all(self, step: int = 64 * KiB) -> None:
        """Begin to read, in a thread."""

        def run() -> None:
            while data := os.read(self.reading, step):
                self.got.extend(data)

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


async def test_a_copied_buffer_may_be_used_again_and_order_is_kept():
    """Small and long pieces, messages between them, whatever is still queued."""
    ends, rng = Ends(), random.Random(5)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    expected, slot = [], bytearray(200 * KiB)
    ends.read_all(step=7919)
    for number in range(400):
        size = rng.choice((1, 700, 4 * KiB, 64 * KiB, 64 * KiB + 1, 200 * KiB))
        piece = rng.randbytes(size)
        view = memoryview(slot)[:size]
        view[:] = piece
        if size <= 64 * KiB:
            frames = [ptcomm.header(ptcomm.Status.DATA, size), view]
            await pipe.written(pipe.gather(frames))
        else:
            mark = pipe.send([ptcomm.header(ptcomm.Status.DATA, size), view])
            await pipe.written(mark)
        expected.append(ptcomm.header(ptcomm.Status.DATA, size) + piece)
        view[:] = b"x" * size
        if number % 50 == 0:
            pipe.send([b"I000002\n!\n"])
            expected.append(b"I000002\n!\n")
        if number % 17 == 0:
            await asyncio.sleep(0)
    await pipe.written()
    assert ends.finish(pipe) == b"".join(expected)


async def test_scattered_clusters_go_out_together(monkeypatch):
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    calls, writev = [], os.writev
    monkeypatch.setattr(os, "writev", lambda *a: calls.append(None) or writev(*a))
    ends.read_all()
    out = OutgoingFile(pipe, FileInfo("d.qcow2", 1 << 40), True)
    for number in range(64):
        await out.write(number << 20, bytes(64 * KiB))
    await out.finish()
    await pipe.written()
    # Four of them go together; a reader that is slower makes a few calls more.
    assert len(calls) <= 2 * (64 // 3 + 2)
    assert len(ends.finish(pipe)) > 64 * 64 * KiB


async def test_nothing_is_held_back_while_we_wait_for_something_else():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    os.set_blocking(ends.reading, False)
    pipe.gather([b"D000001\n", b"x"])
    with pytest.raises(BlockingIOError):
        os.read(ends.reading, 100)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert os.read(ends.reading, 100) == b"D000001\nx"
    ends.finish(pipe)


@pytest.mark.parametrize("size", [600, 64 * KiB])
async def test_what_waits_is_bounded_however_slowly_it_comes(size):
    """Each write in a turn of the loop of its own, and nobody reads."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    out = OutgoingFile(pipe, FileInfo("d.qcow2", 1 << 50), True)

    async def write_on() -> None:
        for number in range(20_000):
            await out.write(number * MiB, bytes(size))
            await asyncio.sleep(0)

    tracemalloc.start()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(write_on(), 2)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer = pipe.writer
    assert writer._queued - writer._written <= 2 * MiB + GATHER_BYTES
    assert held < 8 * MiB
    ends.finish(pipe)


async def test_what_was_gathered_before_an_abort_still_goes_out():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    pipe.gather([b"before"])
    pipe.refuse("the session was aborted")
    with pytest.raises(LocalProtocolError, match="aborted"):
        pipe.gather([b"after"])
    assert os.read(ends.reading, 100) == b"before"
    ends.finish(pipe)


async def test_a_full_pipe_takes_the_rest_later():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    pieces = [bytes([n]) * (GATHER_BYTES - 1000) for n in range(8)]
    marks = [pipe.send([piece[:1000], piece[1000:]]) for piece in pieces]
    assert pipe.writer.done < marks[-1]  # nobody reads, and a pipe holds 1 MiB
    ends.read_all(step=5000)
    await pipe.written(marks[-1])
    assert ends.finish(pipe) == b"".join(pieces)


async def test_a_reader_that_has_gone_is_told_to_the_next_who_sends():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    os.close(ends.reading)
    pipe.gather([b"nobody"])
    async with asyncio.timeout(10):
        await pipe.closed.wait()
    with pytest.raises(TransportError, match="bacula-fd closed the pipe"):
        pipe.gather([b"nobody"])
    pipe.close()
    os.close(ends.silent_out)
