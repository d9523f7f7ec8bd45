# SPDX-License-Identifier: Apache-2.0
"""What is written to a UNIX socket is lent to it: never longer than until it is read,
and never less long, whatever becomes of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from pveplug import splicing
from pveplug.errors import TransportError
from pveplug.nbd.client import NbdClient, UnixAddress, connect
from pveplug.nbd.lending import lendable
from pveplug.nbd.sink import NbdSink
from pveplug.units import KiB, MiB
from tests.support.nbd_model import Manner, ModelServer, serving

SIZE = 24 * MiB


class StubbornServer:
    """Shakes hands, then reads nothing more until it is told to."""

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.address.path)
        self._listening.listen(1)
        self._listening.setblocking(False)
        self.talking: socket.socket | None = None
        self.model = ModelServer(bytearray(SIZE), Manner())

    async def shake_hands(self) -> None:
        loop = asyncio.get_running_loop()
        self.talking, _ = await loop.sock_accept(self._listening)
        self.talking.setblocking(False)
        while self.model._step != self.model._request:
            await loop.sock_sendall(self.talking, self.model.take_sent())
            self.model.receive(await loop.sock_recv(self.talking, 4096))
        await loop.sock_sendall(self.talking, self.model.take_sent())

    async def read_all(self) -> bytes:
        assert self.talking is not None
        got, loop = b"", asyncio.get_running_loop()
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(self.talking, 50_000):
                got += data
        return got

    def leave(self) -> None:
        for sock in (self.talking, self._listening):
            if sock is not None:
                sock.close()


@contextlib.asynccontextmanager
async def stubborn(base: Path) -> AsyncIterator[tuple[NbdClient, StubbornServer]]:
    server = StubbornServer(base / "s")
    shaking = asyncio.create_task(server.shake_hands())
    client = await connect(server.address)
    await shaking
    try:
        yield client, server
    finally:
        client.abort("the end of the test")
        server.leave()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def drops_a_sink(client: NbdClient, data: bytes) -> None:
    """Write, then give up; nothing of ours holds the bytes any longer."""
    with contextlib.suppress(RuntimeError):
        async with NbdSink(client) as sink:
            await sink.write(0, data)
            raise RuntimeError("given up")


async def test_what_a_given_up_sink_lent_stays_until_the_server_has_read_it(
    short_tmp: Path,
) -> None:
    data = random.Random(3).randbytes(MiB)
    async with stubborn(short_tmp) as (client, server):
        before = open_files()
        await drops_a_sink(client, data)
        others = [bytearray(b"!" * MiB) for _ in range(40)]
        await asyncio.sleep(0.2)
        others += [bytearray(b"?" * MiB) for _ in range(40)]
        sent = await server.read_all()
        assert sent.find(data[:64]) >= 0
        assert data.startswith(sent[sent.find(data[:64]) :][: len(data)])
        assert b"!!!!!!!!" not in sent
        assert b"????????" not in sent
        async with asyncio.timeout(10):
            while open_files() > before - 2:  # the transport's end and the writer's
                await asyncio.sleep(0.02)


async def test_nothing_lingers_when_the_server_has_gone(short_tmp: Path) -> None:
    before = open_files()
    async with stubborn(short_tmp) as (client, server):
        await drops_a_sink(client, bytes(range(256)) * 4 * KiB)
        server.leave()
        async with asyncio.timeout(10):
            while open_files() > before:
                await asyncio.sleep(0.02)


async def test_a_cancelled_write_was_not_lent(short_tmp: Path) -> None:
    """Its buffer is its owner's again, who may do with it what he likes."""
    data = bytearray(random.Random(4).randbytes(512 * KiB))
    expected = bytes(data)
    async with stubborn(short_tmp) as (client, server):
        write = asyncio.create_task(client.write(0, data))
        await asyncio.sleep(0.1)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        data[:] = bytes(len(data))
        sent = await server.read_all()
    rest = sent[sent.find(expected[:64]) :]
    assert len(rest) > 64
    assert expected.startswith(rest)


@pytest.mark.parametrize("refused", [False, True])
async def test_a_sink_uses_its_buffers_again_and_nothing_is_mixed_up(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Also where the kernel borrows nothing."""
    lent = []

    def lend(pipe: int, views: Sequence[memoryview]) -> int:
        lent.append(views)
        if refused:
            raise OSError(errno.EPERM, "Operation not permitted")
        return splicing.lend(pipe, views)

    monkeypatch.setattr("pveplug.nbd.lending.lend", lend)
    rng = random.Random(5)
    disk, expected = bytearray(SIZE), bytearray(SIZE)
    async with (
        serving(str(short_tmp / "s"), lambda: ModelServer(disk)) as address,
        await connect(address) as client,
        NbdSink(client, in_flight_bytes=2 * MiB) as sink,
    ):
        for _ in range(120):
            size = rng.choice((512, 20 * KiB, 64 * KiB, 300 * KiB, 2 * MiB))
            at = rng.randrange((SIZE - size) // 512) * 512
            piece = rng.randbytes(size)
            expected[at : at + size] = piece
            await sink.write(at, piece)
        await sink.finish()
    assert disk == expected
    assert len(lent) == 1 if refused else len(lent) > 20


@pytest.mark.parametrize("missing", ["the pipe", "the socket"])
async def test_a_sink_without_files_to_open_copies(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Too many open files cost nothing but time."""

    def too_many(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    target = {"the pipe": "os.pipe", "the socket": "os.dup"}[missing]
    monkeypatch.setattr(f"pveplug.nbd.lending.{target}", too_many)
    data, disk = random.Random(8).randbytes(4 * MiB), bytearray(SIZE)
    async with (
        serving(str(short_tmp / "s"), lambda: ModelServer(disk)) as address,
        await connect(address) as client,
        NbdSink(client) as sink,
    ):
        await sink.write(0, data)
        await sink.finish()
    assert disk.startswith(data)


def test_what_is_unread_when_the_loop_closes_stays_as_it_is(
    short_tmp: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may go on, and others be where it was; the wait gets longer."""
    monkeypatch.setattr("pveplug.nbd.lending._FIRST_LOOK_S", 0.002)
    monkeypatch.setattr("pveplug.nbd.lending._LAST_LOOK_S", 0.1)
    data = random.Random(6).randbytes(MiB)

    async def gives_up() -> socket.socket:
        async with stubborn(short_tmp) as (client, server):
            await drops_a_sink(client, data)
            await asyncio.sleep(0.5)
            assert server.talking is not None
            return server.talking.dup()

    theirs = asyncio.run(gives_up())
    others = [bytearray(b"!" * MiB) for _ in range(40)]
    theirs.setblocking(True)
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := theirs.recv(50_000):
            got += piece
            others.append(bytearray(b"?" * MiB))
    theirs.close()
    sent = got[got.find(data[:64]) :]
    assert len(sent) > 64 * KiB
    assert data.startswith(sent[: len(data)])
    told = [line for line in caplog.messages if "hasn't read what was lent" in line]
    assert len(told) == 1


async def test_a_server_that_vanishes_is_told_as_ever(short_tmp: Path) -> None:
    async with stubborn(short_tmp) as (client, server):
        writing = asyncio.create_task(drops(client))
        await asyncio.sleep(0.05)
        server.leave()
        with pytest.raises(TransportError, match="lost NBD server"):
            await writing


async def drops(client: NbdClient) -> None:
    async with NbdSink(client) as sink:
        for at in range(0, SIZE, MiB):
            await sink.write(at, b"x" * MiB)
        await sink.finish()


def test_what_is_tested_is_long_enough_to_be_lent() -> None:
    assert lendable(memoryview(bytearray(32 * KiB)))
    assert not lendable(memoryview(bytearray(32 * KiB - 1)))
    assert not lendable(memoryview(bytes(32 * KiB)))
