# SPDX-License-Identifier: Apache-2.0
# what a context manager raises at its end is the subject here
"""The asyncio side of the NBD server, with our own client, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
import threading

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pveplug.errors import (
    ConfigError,
    IntegrityError,
    NbdError,
    TransportError,
)
from pveplug.extents import Kind
from pveplug.nbd import server_connection
from pveplug.nbd.client import TcpAddress, UnixAddress, connect
from pveplug.nbd.file_device import FileDevice
from pveplug.nbd.server import Limits, serve
from pveplug.nbd.source import OrderedReader, extents
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Command, Option
from tests.support.nbd_devices import UNIT, KiB, MemoryDevice, MiB, pattern, until
from tests.support.nbd_garbage import wires
from tests.support.nbd_tls import Pki

SIZE = 8 * MiB


@pytest.fixture(params=[asyncio, uvloop], ids=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine; at its end no task may be left."""

    async def checked(work):
        await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    return lambda work: request.param.run(checked(work), debug=True)


@pytest.fixture
def address(tmp_path):
    return UnixAddress(str(tmp_path / "nbd.sock"))


def serving(device, address, **options):
    return serve({"disk": device}, address, **options)


def client_of(address, **options):
    return connect(address, "disk", contexts=["base:allocation"], **options)


async def plain(address):
    """A connection of our own words, in transmission, with structured replies."""
    reader, writer = await asyncio.open_unix_connection(address.path)
    await reader.readexactly(wire.GREETING.size)
    writer.write(wire.CLIENT_FLAGS.pack(3) + wire.option(Option.STRUCTURED_REPLY))
    writer.write(wire.option(Option.GO, wire.named("disk") + b"\0\0"))
    await reader.readexactly(20 + 20 + 12 + 20 + 14 + 20)
    return reader, writer


def read_request(offset, length, cookie=1):
    head = (wire.REQUEST_MAGIC, 0, Command.READ, cookie, offset, length)
    return wire.REQUEST.pack(*head)


async def closed(writer):
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def test_a_disk_is_read_as_it_is_with_its_holes(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE + 777))
        async with serving(device, address) as server:
            async with await client_of(address) as client:
                assert client.size == len(device.disk)
                assert client.read_only
                assert client.can_multi_conn
                assert client.extended
                found = [e async for e in extents(client)]
                data = [(e.offset, e.length) for e in found if e.kind is Kind.DATA]
                assert sum(length for _, length in data) < SIZE
                copy = bytearray(client.size)
                async for slot in OrderedReader(client).read(data):
                    copy[slot.offset : slot.offset + slot.length] = slot.view
                assert copy == device.disk
                assert await client.read(1, SIZE) == device.disk[1 : SIZE + 1]
                assert server.clients == 1
            await until(lambda: server.clients == 0)

    run(body())


def test_exports_are_chosen_by_name_and_may_be_added_while_serving(run, address):
    async def body():
        exports = {"a": MemoryDevice(b"a" * 4096)}
        async with serve(exports, address):
            async with await connect(address, "") as client:
                assert await client.read(0, 4) == b"aaaa"
            exports["b"] = MemoryDevice(b"b" * 8192)
            async with await connect(address, "b") as client:
                assert client.size == 8192
                assert await client.read(0, 4) == b"bbbb"
            with pytest.raises(NbdError, match="no export is called 'c'"):
                await connect(address, "c")

    run(body())


def test_reads_of_what_is_owed_wait_and_hold_nobody_up(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0), held=range(10))
        async with serving(device, address), await client_of(address) as client:
            owed = [
                asyncio.ensure_future(client.read(n * UNIT, UNIT)) for n in range(10)
            ]
            await until(lambda: device.waiting == 10)
            for unit in range(10, 60):  # past them, on the same connection
                got = await client.read(unit * UNIT, UNIT)
                assert got == device.disk[unit * UNIT :][:UNIT]
            assert len(await client.block_status(0, SIZE)) == 1
            device.release([7])
            assert await owed[7] == device.disk[7 * UNIT :][:UNIT]
            assert device.waiting == 9
            device.release()
            for unit, got in enumerate(await asyncio.gather(*owed)):
                assert got == device.disk[unit * UNIT :][:UNIT]

    run(body())


def test_three_hundred_reads_wait_without_memory_and_all_are_answered(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0), held=range(100))
        limits = Limits(bytes=MiB)
        async with serving(device, address, limits=limits) as server:
            async with await client_of(address) as client:
                asked = [(n * 20 * KiB, MiB if n % 9 else 512) for n in range(300)]
                owed = [asyncio.ensure_future(client.read(*place)) for place in asked]
                await until(lambda: device.waiting == 300)
                assert server.open_requests == 300
                assert device.reads == 0
                assert await client.read(7 * MiB, MiB) == device.disk[7 * MiB :]
                device.release()
                for (offset, length), got in zip(
                    asked, await asyncio.gather(*owed), strict=True
                ):
                    assert got == device.disk[offset : offset + length]
                assert server.open_requests == 0

    run(body())


@pytest.mark.parametrize("how", ["between", "full", "goodbye"])
def test_the_reads_of_a_client_that_vanishes_are_cancelled(
    run, address, how, monkeypatch
):
    monkeypatch.setattr(server_connection, "LOOK_S", 0.05)

    async def body():
        device = MemoryDevice(pattern(SIZE), held=range(99))
        limits = Limits(requests=20 if how == "full" else 1000)
        async with serving(device, address, limits=limits) as server:
            _, writer = await plain(address)
            writer.write(b"".join(read_request(n * UNIT, 512, n) for n in range(50)))
            if how == "goodbye":
                head = (wire.REQUEST_MAGIC, 0, Command.DISC, 9, 0, 0)
                writer.write(wire.REQUEST.pack(*head))
            expected = 20 if how == "full" else 50
            await until(lambda: device.waiting == expected)
            writer.transport.abort()
            await until(lambda: device.cancelled == expected)
            await until(lambda: server.clients == 0)
            assert device.waiting == 0
            await closed(writer)

    run(body())


def test_no_more_is_read_at_a_time_than_the_limit_and_longer_reads_pass_alone(
    run, address
):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0), slow=True)
        limits = Limits(bytes=MiB)
        async with serving(device, address, limits=limits):
            async with await client_of(address) as client:
                lengths = [300 * KiB, 4 * MiB, *[256 * KiB] * 9]
                owed = [asyncio.ensure_future(client.read(0, n)) for n in lengths]
                await until(lambda: device.reading)
                for _ in range(200):
                    if device.reads == len(lengths) and not device.reading:
                        break
                    device.go_on.set()
                    await asyncio.sleep(0)
                    device.go_on.clear()
                    await asyncio.sleep(0.005)
                for length, got in zip(
                    lengths, await asyncio.gather(*owed), strict=True
                ):
                    assert got == device.disk[:length]
                assert device.peak == 4 * MiB

    run(body())


def test_a_client_that_doesnt_read_gets_no_more_than_the_transport_holds(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0))
        async with serving(device, address, limits=Limits(requests=500)):
            reader, writer = await plain(address)
            for n in range(600):
                writer.write(read_request(0, 256 * KiB, n))
            await until(lambda: device.reads > 1)
            await asyncio.sleep(0.2)
            # 2 MiB of high water, one reply more, and what the socket took.
            assert device.reads < 24
            cookies = set()
            for _ in range(600):
                head = await reader.readexactly(20)
                cookies.add(wire.STRUCTURED_REPLY.unpack(head)[3])
                await reader.readexactly(8 + 256 * KiB)
            assert cookies == set(range(600))
            await closed(writer)

    run(body())


def test_refusals_nobody_reads_are_bounded_too(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        async with serving(device, address, limits=Limits(requests=50)) as server:
            reader, writer = await plain(address)
            raw = read_request(SIZE, 512) * 10_000
            writer.write(raw)
            await asyncio.sleep(0.3)
            (client,) = server._clients
            waiting = client._transport.get_write_buffer_size()
            assert waiting < server_connection.HIGH_WATER + 64 * KiB
            for _ in range(10_000):
                _, flags, kind, _, length = wire.STRUCTURED_REPLY.unpack(
                    await reader.readexactly(20)
                )
                assert (flags, kind) == (1, wire.Chunk.ERROR)
                await reader.readexactly(length)
            await closed(writer)

    run(body())


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (NbdError("owed for ever", 108), 108),
        (OSError(12, "no memory"), 12),
        (OSError(2, "no such file"), 5),
        (IntegrityError("a gap"), 5),
        (ZeroDivisionError("a bug"), 5),
    ],
)
def test_a_devices_error_fails_its_read_and_no_more(
    run, address, error, number, slow, caplog
):
    class Failing(MemoryDevice):
        async def _slowly(self, offset, length):
            raise error

    async def body():
        device = Failing(pattern(SIZE), slow=slow)
        device.fail = None if slow else error
        async with serving(device, address), await client_of(address) as client:
            with pytest.raises(NbdError) as caught:
                await client.read(0, 512)
            assert caught.value.errno == number
            device.fail, device.slow = None, False
            assert await client.read(0, 512) == device.disk[:512]

    with caplog.at_level(logging.CRITICAL + 1):
        run(body())


def test_a_wrong_answer_of_a_device_is_an_error_of_that_read(run, address, caplog):
    class Short(MemoryDevice):
        def pieces(self, offset, length):
            return self.disk[: length - 1]

        def block_status(self, offset, length):
            return []

    async def body():
        async with serving(Short(pattern(SIZE)), address):
            async with await client_of(address) as client:
                with pytest.raises(NbdError, match="EIO"):
                    await client.read(0, 512)
                with pytest.raises(NbdError, match="EIO"):
                    await client.block_status(0, 512)

    run(body())


def test_a_stranger_is_dropped_and_the_others_are_served(run, address, caplog):
    async def body():
        async with serving(MemoryDevice(pattern(SIZE)), address) as server:
            async with await client_of(address) as client:
                for words in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\3" + b"?" * 99):
                    reader, writer = await asyncio.open_unix_connection(address.path)
                    writer.write(words)
                    with contextlib.suppress(ConnectionError):
                        await reader.read()
                    await closed(writer)
                reader, writer = await plain(address)
                writer.write(b"?" * 28)
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                await closed(writer)
                await client.read(0, 512)
                await until(lambda: server.clients == 1)

    run(body())
    assert "nbd-client-dropped reason=an NBD request has magic" in caplog.text


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(streams=st.lists(wires, min_size=5, max_size=20))
def test_hostile_streams_leave_nothing_behind(run, address, streams):
    async def body():
        async with serving(MemoryDevice(pattern(SIZE)), address) as server:
            for raw in streams:
                reader, writer = await asyncio.open_unix_connection(address.path)
                writer.write(raw)
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                await closed(writer)
            async with await client_of(address) as client:
                await client.read(0, 512)
            await until(lambda: server.clients == 0)

    logging.disable()
    try:
        run(body())
    finally:
        logging.disable(logging.NOTSET)


def test_who_asks_for_nothing_in_time_is_dropped(run, address, caplog):
    async def body():
        limits = Limits(handshake_s=0.1)
        async with serving(MemoryDevice(pattern(SIZE)), address, limits=limits):
            idle, writer = await asyncio.open_unix_connection(address.path)
            async with await client_of(address) as client:
                with contextlib.suppress(ConnectionError):
                    await idle.read()
                await closed(writer)
                await asyncio.sleep(0.15)
                await client.read(0, 512)  # who has entered may be silent

    run(body())


def test_more_clients_than_agreed_are_refused(run, address, caplog):
    async def body():
        limits = Limits(connections=2)
        async with serving(MemoryDevice(pattern(SIZE)), address, limits=limits):
            one, two = await client_of(address), await client_of(address)
            with pytest.raises(TransportError):
                await client_of(address)
            await one.aclose()
            await asyncio.sleep(0.05)
            three = await client_of(address)
            await three.read(0, 512)
            await two.aclose()
            await three.aclose()

    run(body())


# -- where it listens ---------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_an_address_of_the_network_needs_tls(run, host):
    async def body():
        with pytest.raises(ConfigError, match="cannot serve NBD on"):
            async with serve({}, TcpAddress(host, 0)):
                pass

    run(body())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_a_loopback_address_is_served_and_its_port_is_told(run, host):
    async def body():
        async with serving(MemoryDevice(pattern(SIZE)), TcpAddress(host, 0)) as server:
            assert server.address.port
            async with await client_of(server.address) as client:
                await client.read(0, MiB)

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        if host == "::1":
            pytest.skip("no IPv6 here")
    run(body())


def test_a_socket_is_its_owners_only_and_gone_at_the_end(run, address):
    async def body():
        async with serving(MemoryDevice(pattern(SIZE)), address):
            assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600
        assert not os.path.exists(address.path)

    run(body())


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(run, address):
    async def body():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(address.path)
        device = MemoryDevice(pattern(SIZE))
        async with serving(device, address):
            with pytest.raises(TransportError, match="cannot serve NBD"):
                async with serving(device, address):
                    pass
            async with await client_of(address) as client:
                await client.read(0, 512)
        with open(address.path, "w"):
            pass
        with pytest.raises(TransportError, match="cannot serve NBD"):
            async with serving(device, address):
                pass

    run(body())


def test_at_the_end_reads_under_way_are_answered_and_waiting_ones_are_dropped(
    run, address
):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0), held=[5], slow=True)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(serving(device, address))
            client = await client_of(address)
            under_way = asyncio.ensure_future(client.read(0, UNIT))
            waiting = asyncio.ensure_future(client.read(5 * UNIT, UNIT))
            await until(lambda: device.reading and device.waiting)
            asyncio.get_running_loop().call_later(0.1, device.go_on.set)
        assert await under_way == device.disk[:UNIT]
        with pytest.raises(TransportError):
            await waiting
        assert device.cancelled == 1
        await client.aclose()

    run(body())


def test_the_end_doesnt_wait_for_ever(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE, holes=0), slow=True)
        async with serving(device, address, grace_s=0.1):
            client = await client_of(address)
            owed = asyncio.ensure_future(client.read(0, UNIT))
            await until(lambda: device.reading)
        with pytest.raises(TransportError):
            await owed
        await until(lambda: device.cancelled == 1)
        await client.aclose()

    run(body())


# -- TLS ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_disk_goes_through_tls_while_reads_wait(run, pki, host):
    async def body():
        device = MemoryDevice(pattern(SIZE), held=[3])
        address = TcpAddress(host, 0)
        async with serving(device, address, tls=pki.server()) as server:
            there = TcpAddress("127.0.0.1", server.address.port)
            async with await client_of(there, tls=pki.client()) as client:
                owed = asyncio.ensure_future(client.read(3 * UNIT, UNIT))
                await until(lambda: device.waiting)
                assert await client.read(MiB, 7 * MiB) == device.disk[MiB:]
                device.release()
                assert await owed == device.disk[3 * UNIT :][:UNIT]

    run(body())


def test_options_that_come_with_the_end_of_the_tls_handshake_arent_lost(run, pki):
    """A client may say all it wants at once; its last flight then carries options."""

    async def body():
        device = MemoryDevice(pattern(SIZE))
        async with serving(
            device, TcpAddress("127.0.0.1", 0), tls=pki.server()
        ) as server:

            def talk():
                with socket.create_connection(("127.0.0.1", server.address.port)) as s:
                    s.recv(18, socket.MSG_WAITALL)
                    s.sendall(wire.CLIENT_FLAGS.pack(3) + wire.option(Option.STARTTLS))
                    s.recv(20, socket.MSG_WAITALL)
                    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                    tls = pki.client().wrap_bio(
                        incoming, outgoing, server_hostname="127.0.0.1"
                    )
                    while True:
                        try:
                            tls.do_handshake()
                            break
                        except ssl.SSLWantReadError:
                            s.sendall(outgoing.read())
                            incoming.write(s.recv(65536))
                    tls.write(wire.option(Option.LIST))
                    s.sendall(outgoing.read())
                    while True:
                        try:
                            return tls.read(65536)
                        except ssl.SSLWantReadError:
                            incoming.write(s.recv(65536))

            raw = await asyncio.to_thread(talk)
            assert b"disk" in raw

    run(body())


def test_without_tls_or_a_certificate_nothing_is_served(run, pki, caplog):
    async def body():
        address = TcpAddress("127.0.0.1", 0)
        async with serving(
            MemoryDevice(pattern(SIZE)), address, tls=pki.server()
        ) as server:
            there = server.address
            with pytest.raises(NbdError, match="demands TLS"):
                await client_of(there)
            with pytest.raises(TransportError):
                await client_of(there, tls=pki.client(shows=False))
            reader, writer = await asyncio.open_connection(there.host, there.port)
            await reader.readexactly(18)
            writer.write(wire.CLIENT_FLAGS.pack(3) + wire.option(Option.STARTTLS))
            await reader.readexactly(20)
            writer.write(b"no TLS record" * 9)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            await closed(writer)
            async with await client_of(there, tls=pki.client()) as client:
                await client.read(0, 512)

    run(body())


def test_a_client_that_leaves_amid_the_tls_handshake_leaves_nothing(run, pki, caplog):
    async def body():
        address = TcpAddress("127.0.0.1", 0)
        async with serving(
            MemoryDevice(pattern(SIZE)), address, tls=pki.server()
        ) as server:
            there = server.address
            reader, writer = await asyncio.open_connection(there.host, there.port)
            await reader.readexactly(18)
            writer.write(wire.CLIENT_FLAGS.pack(3) + wire.option(Option.STARTTLS))
            await reader.readexactly(20)
            await closed(writer)
            await until(lambda: server.clients == 0)

    run(body())


# -- files --------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    """A file of 16 MiB and a bit: data, holes, and data in front of its end."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(16 * MiB + 100)
        for at in (0, 3 * MiB, 16 * MiB - 64 * KiB):
            file.seek(at)
            file.write(os.urandom(MiB if at < 4 * MiB else 64 * KiB + 100))
        os.fsync(file.fileno())
    return path


def forget(path):
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def places(size):
    yield from ((0, 1), (size - 1, 1), (0, 4096), (MiB - 5, 10), (5 * MiB, 2 * MiB))
    yield from ((0, 16 * MiB), (MiB - 100, 3 * MiB), (size - 65, 65), (77, MiB))
    yield from ((16 * MiB - 70 * KiB, 70 * KiB + 100),)


@pytest.mark.parametrize("cold", [False, True])
def test_a_file_is_served_as_it_is(run, address, image, cold, monkeypatch):
    by_thread = []
    read_cold = FileDevice._cold

    def counted(device, offset, length):
        by_thread.append(threading.current_thread())
        return read_cold(device, offset, length)

    monkeypatch.setattr(FileDevice, "_cold", counted)

    async def body():
        content = image.read_bytes()
        with FileDevice(str(image)) as device:
            async with serving(device, address), await client_of(address) as client:
                for offset, length in places(len(content)):
                    if cold:
                        forget(image)
                    got = await client.read(offset, length)
                    assert got == content[offset : offset + length]
                runs = [e async for e in extents(client)]
        assert [e.kind for e in runs] == [Kind.DATA, Kind.ZERO] * 2 + [Kind.DATA]
        assert runs[1].offset == MiB

    run(body())
    assert threading.current_thread() not in by_thread
    assert bool(by_thread) is cold


def test_a_file_in_memory_is_served_too(run, address, tmp_path):
    path = f"/dev/shm/pveplug-test-{os.getpid()}"  # tmpfs has no RWF_NOWAIT
    content = os.urandom(MiB)

    async def body():
        with FileDevice(path) as device:
            async with serving(device, address), await client_of(address) as client:
                for offset, length in ((0, MiB), (5, 100), (MiB - 512, 512)):
                    got = await client.read(offset, length)
                    assert got == content[offset : offset + length]

    try:
        with open(path, "wb") as file:
            file.write(content)
        run(body())
    finally:
        os.unlink(path)


def test_a_file_that_shrinks_fails_the_reads_behind_its_end(run, address, image):
    async def body():
        with FileDevice(str(image)) as device:
            async with serving(device, address), await client_of(address) as client:
                await client.read(3 * MiB, MiB)
                os.truncate(image, 3 * MiB + 4096)
                for length in (4096, MiB // 2):
                    with pytest.raises(NbdError, match="EIO"):
                        await client.read(3 * MiB + 65536, length)
                assert len(await client.read(3 * MiB, 4096)) == 4096

    run(body())


def test_an_empty_file_is_an_export_of_no_bytes(run, address, tmp_path):
    async def body():
        (tmp_path / "empty").touch()
        with FileDevice(str(tmp_path / "empty")) as device:
            async with serving(device, address), await client_of(address) as client:
                assert client.size == 0

    run(body())
