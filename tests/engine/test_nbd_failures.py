# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PT012  # what a context manager raises at its end is the subject here
"""The asyncio side against a model server: what fails, fails loudly, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections import deque

import pytest

from pveplug.errors import (
    LocalProtocolError,
    NbdError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.extents import Kind
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import OrderedReader, Slot, extents
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Command, TransmissionFlag
from tests.support.nbd_model import FLAGS, Manner, ModelServer, listening, serving

KiB, MiB = 1024, 1024 * 1024
SIZE = 8 * MiB


@contextlib.asynccontextmanager
async def served(tmp_path, manner=None, disk=None, **options):
    """A client of a model; gives both, and checks that no task is left."""
    before = asyncio.all_tasks()
    disk = bytearray(SIZE) if disk is None else disk
    models = []

    def make():
        models.append(ModelServer(disk, manner))
        return models[-1]

    async with (
        serving(str(tmp_path / "s"), make) as address,
        await connect(address, contexts=["base:allocation"], **options) as client,
    ):
        yield client, models[0]
        ours = [
            task
            for task in asyncio.all_tasks() - before
            if "listening" not in repr(task.get_coro())
        ]
        assert ours == []


def failing(command, number, *, after=0, above=0):
    """Let ``command`` fail from its n-th time on, where longer than ``above``."""
    count = 0

    def fail(asked, offset, length):
        nonlocal count
        if asked is not command or length <= above:
            return 0
        count += 1
        return number if count > after else 0

    return fail


async def test_what_the_sink_writes_is_on_the_disk(tmp_path):
    expected = bytearray(random.Random(1).randbytes(SIZE))
    disk = bytearray(expected)
    rng = random.Random(2)
    async with served(tmp_path, disk=disk) as (client, model):
        async with NbdSink(client, in_flight_bytes=2 * MiB) as sink:
            for _ in range(300):
                offset = rng.randrange(SIZE)
                length = min(rng.choice([1, 4096, 65536, 300_000]), SIZE - offset)
                if rng.random() < 0.3:
                    expected[offset : offset + length] = bytes(length)
                    await sink.zero(offset, length)
                else:
                    data = (
                        rng.randbytes(length) if rng.random() < 0.7 else bytes(length)
                    )
                    expected[offset : offset + length] = data
                    reused = bytearray(data)
                    await sink.write(offset, reused)
                    reused[:] = b"?" * length
            await sink.finish()
        assert model.seen[-1].command is Command.FLUSH
    assert disk == expected


async def test_touching_writes_are_joined_and_zero_pieces_become_zeroes(tmp_path):
    async with served(tmp_path) as (client, model):
        async with NbdSink(client) as sink:
            for at in range(0, MiB, 10_000):
                data = b"d" * min(10_000, MiB - at)
                await sink.write(at, data if at < 500_000 else bytes(len(data)))
            await sink.finish()
    sent = [(r.command, r.offset, r.length) for r in model.seen[:-2]]
    border = 8 * 64 * KiB
    assert sorted(sent, key=lambda r: r[1]) == [
        (Command.WRITE, 0, border),
        (Command.WRITE_ZEROES, border, MiB - border),
    ]
    assert sink.written == border


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES])
async def test_failed_write_never_commits(tmp_path, command):
    manner = Manner(fail=failing(command, errno.EIO, after=3))
    async with served(tmp_path, manner) as (client, model):
        with pytest.raises(NbdError) as caught:
            async with NbdSink(client) as sink:
                for at in range(0, SIZE, 512 * KiB):
                    await sink.write(at, b"x" * 64 * KiB)
                    await sink.zero(at + 64 * KiB, 64 * KiB)
                await sink.finish()
        assert caught.value.errno == errno.EIO
        for again in (sink.finish(), sink.write(0, b"x"), sink.zero(0, 512)):
            with pytest.raises(NbdError):
                await again
        assert Command.FLUSH not in {r.command for r in model.seen}


async def test_a_failure_of_the_very_last_write_surfaces_in_finish(tmp_path):
    manner = Manner(fail=failing(Command.WRITE, errno.ENOSPC))
    async with served(tmp_path, manner) as (client, _):
        sink = NbdSink(client)
        await sink.write(0, b"x" * 4096)
        with pytest.raises(NbdError, match="ENOSPC"):
            await sink.finish()
        with pytest.raises(NbdError, match="ENOSPC"):
            await sink.finish()


async def test_a_failed_flush_is_a_failed_copy(tmp_path):
    manner = Manner(fail=failing(Command.FLUSH, errno.EIO, above=-1))
    async with served(tmp_path, manner) as (client, _):
        with pytest.raises(NbdError, match="FLUSH"):
            async with NbdSink(client) as sink:
                await sink.write(0, b"x" * 4096)
                await sink.finish()
        with pytest.raises(NbdError):
            await sink.finish()


async def test_leaving_a_sink_without_finish_is_an_error(tmp_path):
    async with served(tmp_path) as (client, _):
        with pytest.raises(LocalProtocolError, match="without finish"):
            async with NbdSink(client) as sink:
                await sink.write(0, b"x")


@pytest.mark.parametrize(
    ("manner", "punched"),
    [
        (Manner(flags=FLAGS & ~TransmissionFlag.SEND_WRITE_ZEROES), False),
        (Manner(fail=failing(Command.WRITE_ZEROES, errno.ENOTSUP)), False),
        (Manner(fail=failing(Command.WRITE_ZEROES, errno.EINVAL)), False),
        (
            Manner(
                block=(512, 4096, MiB),
                fail=failing(Command.WRITE_ZEROES, errno.EINVAL, above=MiB),
            ),
            True,
        ),
    ],
)
async def test_zeroes_a_server_refuses_are_sent_smaller_or_as_data(
    tmp_path, manner, punched
):
    disk = bytearray(b"o" * SIZE)
    async with served(tmp_path, manner, disk) as (client, model):
        async with NbdSink(client) as sink:
            await sink.zero(MiB, 6 * MiB)
            await sink.write(2 * MiB, b"n" * 4096)
            await sink.finish()
    expected = bytearray(b"o" * SIZE)
    expected[MiB : 7 * MiB] = bytes(6 * MiB)
    expected[2 * MiB : 2 * MiB + 4096] = b"n" * 4096
    assert disk == expected
    written = sum(r.length for r in model.seen if r.command is Command.WRITE)
    assert (written == 4096) is punched


async def test_a_failed_read_fails_the_iteration_and_leaves_the_client_usable(tmp_path):
    manner = Manner(fail=failing(Command.READ, errno.EIO, after=3))
    async with served(tmp_path, manner) as (client, _):
        seen = []
        with pytest.raises(NbdError, match="EIO"):
            async for slot in OrderedReader(client).read([(0, SIZE)]):
                seen.append(slot.offset)
        assert seen == [0, 512 * KiB, MiB]
        manner.fail = None
        assert await client.read(0, 16) == bytes(16)


async def test_reads_come_in_order_joined_and_cut_at_the_request_size(tmp_path):
    disk = bytearray(random.Random(3).randbytes(SIZE))
    manner = Manner(fragment=random.Random(4))
    async with served(tmp_path, manner, disk) as (client, _):
        runs = [(64 * KiB, 64 * KiB), (128 * KiB, 2 * MiB), (5 * MiB + 512, 100)]
        got, buffers = [], set()
        async for slot in OrderedReader(client, in_flight_bytes=MiB).read(runs):
            assert slot.view == disk[slot.offset : slot.offset + slot.length]
            got.append((slot.offset, slot.length))
            buffers.add((len(slot.buffer), id(slot.buffer)))
        assert got == [
            (64 * KiB, 448 * KiB),
            (512 * KiB, 512 * KiB),
            (MiB, 512 * KiB),
            (1536 * KiB, 512 * KiB),
            (2 * MiB, 128 * KiB),
            (5 * MiB + 512, 100),
        ]
        assert sum(size for size, _ in buffers) <= MiB + 256 * KiB + 64 * KiB


async def test_scattered_pieces_are_asked_for_together(tmp_path):
    """As many as their buffers allow, and no more."""
    disk = bytearray(random.Random(8).randbytes(SIZE))
    async with served(tmp_path, disk=disk) as (client, _):
        for length, most in ((4 * KiB, 16), (100 * KiB, 4), (300 * KiB, 2)):
            reader = OrderedReader(client, in_flight_bytes=MiB)
            count = SIZE // (512 * KiB)
            runs = [(n * 512 * KiB, length) for n in range(count)]
            waiting, started = [], reader._start

            def start(*piece, started=started, waiting=waiting):
                waiting.append(piece[0])
                return started(*piece)

            reader._start = start
            buffers, ahead = set(), 0
            async for slot in reader.read(runs):
                ahead = max(ahead, len(waiting))
                waiting.pop()
                assert slot.view == disk[slot.offset : slot.offset + length]
                buffers.add((len(slot.buffer), id(slot.buffer)))
            assert ahead == min(most, count)
            assert sum(size for size, _ in buffers) <= MiB


class Counted:
    """A socket whose writes are counted."""

    def __init__(self, sock) -> None:
        self._socket = sock
        self.writes = 0

    def sendmsg(self, pieces) -> int:
        self.writes += 1
        return self._socket.sendmsg(pieces)

    def __getattr__(self, name):
        return getattr(self._socket, name)


async def test_short_requests_are_sent_together_but_none_waits_for_another(tmp_path):
    disk = bytearray(random.Random(8).randbytes(SIZE))
    async with served(tmp_path, disk=disk, stall_s=0.4) as (client, _):
        writer = client._adapter._writer
        writer._socket = counted = Counted(writer._socket)
        runs = [(n * 128 * KiB, 64 * KiB) for n in range(SIZE // (128 * KiB))]
        async for slot in OrderedReader(client).read(runs):
            assert slot.view == disk[slot.offset : slot.offset + slot.length]
            if slot.offset == 20 * 128 * KiB:
                await asyncio.sleep(1)  # a full volume: nothing stalls meanwhile
        assert 0 < counted.writes < len(runs) * 3 / 4


async def test_slots_that_are_kept_stay_as_they_are(tmp_path):
    disk = bytearray(random.Random(9).randbytes(SIZE))
    async with served(tmp_path, disk=disk) as (client, _):
        reader = OrderedReader(
            client, request_bytes=256 * KiB, in_flight_bytes=MiB, keep=True
        )
        last: deque[Slot] = deque()
        buffers = set()
        async for slot in reader.read([(0, SIZE)]):
            last.append(slot)
            buffers.add(id(slot.buffer))
            for one in last:
                assert one.view == disk[one.offset : one.offset + one.length]
            if len(last) > 3:
                reader.release(last.popleft())
                reader.release(Slot(0, KiB, bytearray(KiB), memoryview(b"")))
        assert len(buffers) <= 4 + 5  # kept and read ahead


async def test_a_consumer_that_stops_leaves_nothing_and_slots_can_be_reused(tmp_path):
    disk = bytearray(random.Random(5).randbytes(SIZE))
    async with served(tmp_path, disk=disk) as (client, _):
        reader = OrderedReader(client)
        for _ in range(5):
            async with contextlib.aclosing(reader.read([(0, SIZE)])) as slots:
                async for slot in slots:
                    assert slot.view == disk[: slot.length]
                    break
        got = bytearray()
        async for slot in reader.read([(0, SIZE)]):
            got += slot.view
        assert got == disk


async def test_a_cancelled_read_leaves_the_client_usable(tmp_path):
    disk = bytearray(random.Random(6).randbytes(SIZE))
    async with served(tmp_path, disk=disk) as (client, _):
        buffer = bytearray(4 * MiB)
        task = asyncio.create_task(client.read_into(0, memoryview(buffer)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer[:] = b"!" * len(buffer)
        assert await client.read(MiB, MiB) == disk[MiB : 2 * MiB]
        assert buffer.count(b"!") == len(buffer)


async def test_a_cancelled_write_closes_the_client(tmp_path):
    async with served(tmp_path) as (client, _):
        task = asyncio.create_task(client.write(0, bytes(4 * MiB)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TransportError, match="half-way"):
            await client.read(0, 512)


async def test_unaligned_reads_and_large_ones_are_cut_to_what_the_server_takes(
    tmp_path,
):
    disk = bytearray(random.Random(7).randbytes(SIZE))
    manner = Manner(block=(4096, 4096, 64 * KiB))
    async with served(tmp_path, manner, disk) as (client, model):
        assert await client.read(1, 300_000) == disk[1:300_001]
        assert max(r.length for r in model.seen) == 64 * KiB
        await client.write(4096, b"w" * 200_704)
        assert disk[4096:204_800] == b"w" * 200_704
        got = [s.length async for s in OrderedReader(client).read([(100, 5000)])]
        assert got == [5000]


def scripted(tmp_path, after):
    """A server that behaves for the handshake, then does ``after``."""

    async def talk(reader, writer):
        model = ModelServer(bytearray(SIZE), Manner(structured=False))
        while not model.seen:
            writer.write(model.take_sent())
            model.receive(await reader.read(65536) or bytes(1 << 16))
        await after(reader, writer, model)

    return listening(str(tmp_path / "s"), talk)


async def test_when_the_server_dies_all_waiters_get_the_same_error(tmp_path):
    async def vanish(reader, writer, model):
        writer.transport.abort()

    async with (
        scripted(tmp_path, vanish) as address,
        await connect(address) as client,
    ):
        reads = [client.read(at, 512) for at in range(0, 4096, 512)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert {type(r) for r in results} == {TransportError}
        assert len({id(r) for r in results}) == 1
        with pytest.raises(TransportError):
            await client.read(0, 512)


async def test_a_reply_that_breaks_the_protocol_closes_the_client_for_all(tmp_path):
    async def babble(reader, writer, model):
        writer.write(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 99))
        await reader.read()

    async with (
        scripted(tmp_path, babble) as address,
        await connect(address) as client,
    ):
        reads = [client.read(at, 512) for at in (0, 512)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert {type(r) for r in results} == {RemoteProtocolError}
        assert "unknown cookie 99" in str(results[0])


async def test_a_server_that_falls_silent_is_given_up(tmp_path):
    async def sulk(reader, writer, model):
        await reader.read()

    async with (
        scripted(tmp_path, sulk) as address,
        await connect(address, stall_s=0.04) as client,
    ):
        with pytest.raises(TransportError, match="said nothing"):
            await client.read(0, 512)


async def test_connecting_is_bounded_and_its_errors_are_translated(tmp_path):
    with pytest.raises(TransportError, match="No such file"):
        await connect(UnixAddress(str(tmp_path / "nobody")))

    async def mute(reader, writer):
        await reader.read()

    async with listening(str(tmp_path / "mute"), mute) as address:
        with pytest.raises(TransportError, match="no answer in time"):
            await connect(address, timeout_s=0.05)


async def test_a_server_that_isnt_nbd_is_refused(tmp_path):
    async def greet(reader, writer):
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")
        await reader.read()

    async with listening(str(tmp_path / "ssh"), greet) as address:
        with pytest.raises(RemoteProtocolError, match="not an NBD server"):
            await connect(address)


async def test_closing_with_requests_under_way_fails_them(tmp_path):
    async def sulk(reader, writer, model):
        await reader.read()

    async with scripted(tmp_path, sulk) as address:
        client = await connect(address)
        task = asyncio.create_task(client.read(0, 512))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(TransportError, match="closed"):
            await task


async def test_extents_without_contexts_are_all_data_never_clean(tmp_path):
    async with served(tmp_path, Manner(structured=False)) as (client, _):
        (extent,) = [e async for e in extents(client)]
        assert (extent.length, extent.kind) == (SIZE, Kind.DATA)
        with pytest.raises(NbdError, match="no context qemu:dirty-bitmap:ph"):
            async for _ in extents(client, dirty="ph"):
                pass


async def test_a_failed_block_status_fails_the_iteration(tmp_path):
    manner = Manner(
        contexts={"base:allocation": [(SIZE, 0)]},
        fail=failing(Command.BLOCK_STATUS, errno.EINVAL, after=1),
    )
    async with served(tmp_path, manner) as (client, _):
        with pytest.raises(NbdError, match="BLOCK_STATUS"):
            async for _ in extents(client, window=MiB):
                pass
