# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.cutting_proxy import CuttingProxy, How, Way


class Listener:
    """Keeps what it hears and answers each connection with ``reply``."""

    def __init__(self, reply: bytes = b"") -> None:
        self.heard: list[bytearray] = []
        self.ended: list[str] = []
        self.reply = reply

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        heard = bytearray()
        self.heard.append(heard)
        try:
            writer.write(self.reply)
            while data := await reader.read(1 << 16):
                heard += data
            self.ended.append("eof")
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            self.ended.append("reset")
            writer.close()


@asynccontextmanager
async def between(listener: Listener) -> AsyncIterator[CuttingProxy]:
    server = await asyncio.start_server(listener.serve, "127.0.0.1", 0)
    try:
        async with CuttingProxy(server.sockets[0].getsockname()[1]) as proxy:
            yield proxy
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def connected(
    proxy: CuttingProxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def talk(proxy: CuttingProxy, data: bytes) -> bytes:
    """Say ``data``, then the end; return what is answered until the end."""
    async with connected(proxy) as (reader, writer):
        writer.write(data)
        await writer.drain()
        writer.write_eof()
        return await reader.read()


async def until(true, timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


async def test_without_an_order_all_passes_and_is_counted():
    listener = Listener(b"welcome")
    async with between(listener) as proxy:
        assert await talk(proxy, b"x" * 300_000) == b"welcome"
        assert bytes(listener.heard[0]) == b"x" * 300_000
        assert (proxy.connections[0].up, proxy.connections[0].down) == (300_000, 7)
        assert not proxy.connections[0].cut
        await talk(proxy, b"abc")
        assert proxy.passed(Way.UP) == 300_003


@pytest.mark.parametrize("after", [0, 1, 7, 65_535, 65_536, 65_537, 199_999, 200_000])
async def test_exactly_so_many_bytes_arrive_before_a_cut(after):
    listener = Listener()
    async with between(listener) as proxy:
        proxy.cut_next(Way.UP, after)
        async with connected(proxy) as (reader, writer):
            writer.write(bytes(range(250)) * 800)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            with pytest.raises((ConnectionError, EOFError)):
                await reader.readexactly(1)
        await until(lambda: listener.ended or (after == 0 and not listener.heard))
        got = bytes(listener.heard[0]) if listener.heard else b""
        assert got == (bytes(range(250)) * 800)[:after]
        assert listener.ended in ([], ["eof"])
        assert proxy.connections[0].up == after
        assert proxy.connections[0].cut


async def test_the_answer_can_be_cut_as_well():
    async with between(Listener(b"0123456789")) as proxy:
        proxy.cut_next(Way.DOWN, 4)
        async with connected(proxy) as (reader, _writer):
            assert await reader.read() == b"0123"


async def test_orders_are_for_one_connection_each():
    listener = Listener()
    async with between(listener) as proxy:
        proxy.cut_next(Way.UP, 2)
        proxy.spare_next()
        proxy.cut_next(Way.UP, 3)
        for _ in range(4):
            await talk(proxy, b"abcdef")
        await until(lambda: len(listener.ended) == 4)
        assert [bytes(heard) for heard in listener.heard] == [
            b"ab",
            b"abcdef",
            b"abc",
            b"abcdef",
        ]


async def test_a_reset_is_a_reset():
    listener = Listener()
    async with between(listener) as proxy:
        proxy.cut_next(Way.UP, 3, How.RESET)
        async with connected(proxy) as (reader, writer):
            writer.write(b"abcdef")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await until(lambda: listener.ended == ["reset"])


async def test_a_hang_is_silence_with_the_connection_open():
    listener = Listener()
    async with between(listener) as proxy:
        proxy.cut_next(Way.UP, 3, How.HANG)
        async with connected(proxy) as (reader, writer):
            writer.write(b"abcdef")
            await until(lambda: listener.heard and bytes(listener.heard[0]) == b"abc")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)
            assert listener.ended == []


async def test_all_can_hang_for_a_while():
    listener = Listener()
    async with between(listener) as proxy:
        async with connected(proxy) as (_, writer):
            writer.write(b"one")
            await until(lambda: listener.heard and bytes(listener.heard[0]) == b"one")
            proxy.hang()
            writer.write(b"two")
            await asyncio.sleep(0.1)
            assert bytes(listener.heard[0]) == b"one"
            proxy.go_on()
            await until(lambda: bytes(listener.heard[0]) == b"onetwo")


async def test_a_cut_can_be_ordered_now():
    listener = Listener()
    async with between(listener) as proxy:
        async with connected(proxy) as (reader, writer):
            writer.write(b"one")
            await until(lambda: listener.heard and bytes(listener.heard[0]) == b"one")
            proxy.cut_now()
            assert await reader.read() == b""
            await until(lambda: listener.ended == ["eof"])


async def test_a_rate_and_a_delay_take_their_time():
    listener = Listener()
    async with between(listener) as proxy:
        proxy.rate = 1_000_000
        begin = time.monotonic()
        await talk(proxy, bytes(200_000))
        assert time.monotonic() - begin >= 0.19
        proxy.rate, proxy.delay_s = 0, 0.1
        begin = time.monotonic()
        await talk(proxy, b"x")
        assert time.monotonic() - begin >= 0.1


async def test_nobody_listening_behind_it_is_a_refusal():
    async with CuttingProxy(1) as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()
