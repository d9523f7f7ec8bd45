# SPDX-License-Identifier: Apache-2.0
"""What goes into the pipe to bacula-fd: in order, whole, and not in crumbs."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import tracemalloc
from collections.abc import Sequence

import pytest

from pveplug import splicing
from pveplug.bacula_files import FileInfo, OutgoingFile
from pveplug.bacula_pipe import GATHER_BYTES, PtcommPipe
from pveplug.errors import LocalProtocolError, TransportError
from pveplug.proto import ptcomm
from pveplug.units import CLUSTER, GiB, KiB, MiB
from tests.support.pipe_ends import Ends, received


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
            await pipe.free(mark)
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


async def test_what_is_lent_is_free_when_it_has_been_read():
    """In the pipe isn't enough: whoever reads it reads from the buffer itself."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    slot = bytearray(b"a" * 512 * KiB)
    mark = pipe.send([memoryview(slot)])
    await pipe.written(mark)
    free = asyncio.create_task(pipe.free(mark))
    await asyncio.sleep(0.1)
    assert not free.done()
    got = os.read(ends.reading, 512 * KiB - 1)
    await asyncio.sleep(0.1)
    assert not free.done()
    got += os.read(ends.reading, 1)
    await asyncio.wait_for(free, 10)
    assert got == slot
    ends.finish(pipe)


async def test_what_is_begun_is_free_when_it_has_been_read():
    """Nobody waits before; a short one between has a mark that isn't lower."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    out = OutgoingFile(pipe, FileInfo("/@proxmox/d.qcow2", GiB), offsets=True)
    slot = memoryview(bytearray(b"a" * 128 * KiB))
    marks = [await out.begin(0, slot), await out.begin(len(slot), slot[:KiB])]
    marks.append(await out.begin(MiB, slot))
    assert marks == sorted(marks)
    assert marks[0] > 128 * KiB
    free = asyncio.create_task(out.free(marks[1]))
    await asyncio.sleep(0.1)
    assert not free.done()
    got = os.read(ends.reading, marks[0] - 1)
    await asyncio.sleep(0.1)
    assert not free.done()
    ends.read_all(step=50_000)
    await asyncio.wait_for(free, 10)
    await asyncio.wait_for(out.free(marks[2]), 10)
    slot[:] = b"b" * len(slot)
    got += ends.finish(pipe)
    assert (got.count(b"a"), got.count(b"b")) == (2 * len(slot) + KiB, 0)


async def test_scattered_clusters_are_lent_together(monkeypatch):
    """With their headers, in one call for several."""
    ends, calls = Ends(), []

    def lend(pipe: int, views: Sequence[memoryview]) -> int:
        calls.append(len(views))
        return splicing.lend(pipe, views)

    monkeypatch.setattr("pveplug.bacula_pipe.lend", lend)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    out = OutgoingFile(pipe, FileInfo("d.qcow2", 1 << 40), True)
    slots = [memoryview(bytearray([n]) * CLUSTER) for n in range(64)]
    ends.read_all()
    for number, slot in enumerate(slots):
        mark = await out.begin(number << 20, slot)
    await out.free(mark)
    # Four of them go together; a reader that is slower makes a few calls more.
    assert len(calls) <= 2 * (64 // 4 + 2)
    image = received(ends.finish(pipe), 64 << 20)
    for number, slot in enumerate(slots):
        assert image[number << 20 : (number << 20) + CLUSTER] == slot


async def test_what_is_begun_and_given_up_at_once_troubles_nobody(caplog):
    """The turn of the loop that was to write it comes after the pipe was closed."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    pipe.send([memoryview(bytearray(4 * KiB))])
    pipe.lend([memoryview(bytearray(64 * KiB))])
    pipe.close()
    await asyncio.sleep(0.01)
    assert not caplog.messages
    assert os.read(ends.reading, 100_000) == bytes(4 * KiB)
    for fd in (ends.silent_out, ends.reading):
        os.close(fd)


async def test_what_is_lent_is_not_free_because_the_pipe_was_closed():
    """Nor when its number has come to be another pipe's, of which nothing is unread."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    mark = pipe.send([memoryview(bytearray(b"a" * 64 * KiB))])
    pipe.close()
    with pytest.raises(TransportError, match="closed"):
        await pipe.free(mark)
    others = os.pipe()
    assert ends.writing in others
    with pytest.raises(TransportError, match="closed"):
        await pipe.free(mark)
    for fd in (ends.silent_out, ends.reading, *others):
        os.close(fd)


async def test_what_is_copied_is_copied_to_its_end():
    """A long array that a full pipe takes half of isn't lent from there on."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    data = bytearray(b"a" * 1500 * KiB)
    mark = pipe.send([data])
    got = os.read(ends.reading, 1000 * KiB)
    await asyncio.wait_for(pipe.written(mark), 10)
    data[:] = b"b" * len(data)
    ends.read_all()
    assert got + ends.finish(pipe) == b"a" * len(data)


async def test_who_waits_for_a_reader_that_has_gone_is_told():
    """Nothing else is written, and the pipe to us stays open."""
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    free = asyncio.create_task(pipe.free(pipe.send([memoryview(bytearray(MiB // 2))])))
    await asyncio.sleep(0.05)
    os.close(ends.reading)
    with pytest.raises(TransportError, match="bacula-fd closed the pipe"):
        await asyncio.wait_for(free, 10)
    assert pipe.closed.is_set()
    pipe.close()
    os.close(ends.silent_out)


async def test_what_was_lent_when_a_job_was_given_up_is_what_is_read_later():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    data = random.Random(9).randbytes(300 * KiB)
    pipe.send([memoryview(bytearray(data))])
    pipe.close()
    del pipe
    others = [bytearray(b"!" * 300 * KiB) for _ in range(40)]
    got = b""
    while piece := os.read(ends.reading, 10_000):
        got += piece
        others.append(bytearray(b"?" * 300 * KiB))
    assert got == data
    for fd in (ends.silent_out, ends.reading):
        os.close(fd)


async def test_a_message_behind_what_is_lent_needn_t_wait_for_a_reader():
    ends = Ends()
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    pipe.send([memoryview(bytearray(512 * KiB))])
    pipe.send([b"A000005\nenough"])
    await asyncio.wait_for(pipe.written(), 10)
    ends.finish(pipe)


async def test_what_is_lent_lives_until_it_is_read_whoever_lets_go_of_it():
    ends, rng = Ends(), random.Random(6)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    expected = [rng.randbytes(300 * KiB) for _ in range(3)]
    for piece in expected:
        pipe.send([memoryview(bytearray(piece))])
    others = [bytearray(b"!" * 300 * KiB) for _ in range(40)]
    got = b""
    while len(got) < sum(map(len, expected)):
        got += os.read(ends.reading, 5000)
        others[len(got) % 40] = bytearray(b"?" * 300 * KiB)
    assert got == b"".join(expected)
    ends.finish(pipe)


async def test_a_kernel_that_borrows_nothing_gets_copies(monkeypatch, caplog):
    def refuse(pipe: int, views: Sequence[memoryview]) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pveplug.bacula_pipe.lend", refuse)
    await passes_through(Ends())
    told = "copies what could be lent reason='Operation not permitted'"
    assert caplog.messages.count(told) == 1


async def test_a_socket_in_the_place_of_a_pipe_gets_copies(caplog):
    ends = Ends()
    for fd in (ends.reading, ends.writing):
        os.close(fd)
    ours, theirs = socket.socketpair()
    ends.writing, ends.reading = ours.detach(), theirs.detach()
    await passes_through(ends)
    assert "copies what could be lent" in caplog.text


async def passes_through(ends: Ends) -> None:
    """One buffer, used again and again, comes out as it was at each time."""
    rng = random.Random(7)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    slot, expected = bytearray(700 * KiB), []
    ends.read_all(step=50_000)
    for _ in range(8):
        slot[:] = rng.randbytes(len(slot))
        expected.append(bytes(slot))
        await pipe.free(pipe.send([memoryview(slot)]))
    assert ends.finish(pipe) == b"".join(expected)


@pytest.mark.parametrize("offsets", [True, False])
async def test_writes_go_out_in_the_order_they_were_begun(offsets):
    """Also where a gap before one has to be filled, and the pipe is full."""
    ends, rng = Ends(), random.Random(8)
    pipe = PtcommPipe(ends.silent_in, ends.writing)
    out = OutgoingFile(pipe, FileInfo("d.qcow2", 40 * MiB), offsets)
    image, writes, at = bytearray(40 * MiB), [], 0
    while at < 30 * MiB:
        size = rng.choice((1, 3000, 64 * KiB, 64 * KiB + 1, 700 * KiB))
        piece = memoryview(bytearray(rng.randbytes(size)))
        image[at : at + size] = piece
        writes.append((at, piece))
        at += size + rng.choice((0, 0, 5, 300 * KiB, 2 * MiB))
    tasks = [asyncio.create_task(out.write(at, piece)) for at, piece in writes]
    ends.read_all(step=100_000)
    await asyncio.gather(*tasks)
    await out.finish()
    await pipe.written()
    assert received(ends.finish(pipe), len(image)) == image
