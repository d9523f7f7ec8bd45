# SPDX-License-Identifier: Apache-2.0
"""Reads that take turns on several connections, where a server offers them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import re

import pytest

from pveplug.errors import NbdError, TransportError
from pveplug.nbd import client as nbd_client
from pveplug.nbd.client import connect
from pveplug.nbd.source import READERS, OrderedReader
from pveplug.proto.nbd_wire import Command, TransmissionFlag
from tests.support.nbd_model import FLAGS, Manner, ModelServer, listening, serving

KiB, MiB = 1024, 1024 * 1024
SIZE = 8 * MiB
MANY = FLAGS | TransmissionFlag.CAN_MULTI_CONN
ALLOCATION = "base:allocation"


@contextlib.asynccontextmanager
async def served(tmp_path, *, disk=None, **manner):
    """The address of a model and its connections; at the end all were said goodbye."""
    disk = bytearray(SIZE) if disk is None else disk
    manner = Manner(**{"flags": MANY, "contexts": {ALLOCATION: [(SIZE, 0)]}} | manner)
    models = []

    def make():
        models.append(ModelServer(disk, manner))
        return models[-1]

    async with serving(str(tmp_path / "s"), make) as address:
        yield address, models
    assert models
    assert all(model.seen[-1].command is Command.DISC for model in models)


def reads_of(model):
    return [(r.offset, r.length) for r in model.seen if r.command is Command.READ]


@pytest.mark.parametrize("extended", [False, True])
async def test_long_reads_take_turns_and_arrive_in_order(tmp_path, extended):
    disk = bytearray(random.Random(1).randbytes(SIZE))
    async with served(tmp_path, disk=disk, extended=extended) as (address, models):
        async with await connect(address, contexts=[ALLOCATION], readers=3) as client:
            assert client.connections == 3
            got = bytearray()
            reader = OrderedReader(client, request_bytes=512 * KiB)
            async for slot in reader.read([(0, SIZE)]):
                assert slot.offset == len(got)
                got += slot.view
            assert got == disk
            assert await client.block_status(0, SIZE) == {ALLOCATION: [(SIZE, 0)]}
            await client.flush()
        seen = [reads_of(model) for model in models]
        assert sorted(one for reads in seen for one in reads) == [
            (at, 512 * KiB) for at in range(0, SIZE, 512 * KiB)
        ]
        assert {len(one) for one in seen} <= {5, 6}
        for model in models[1:]:
            assert {r.command for r in model.seen} == {Command.READ, Command.DISC}


async def test_short_reads_stay_together(tmp_path):
    """A batch of them is one system call of ours, and wakes one coroutine of QEMU's."""
    disk = bytearray(random.Random(2).randbytes(SIZE))
    runs = [(at, 64 * KiB) for at in range(0, SIZE, 128 * KiB)]
    async with served(tmp_path, disk=disk) as (address, models):
        async with await connect(address, readers=2) as client:
            async for slot in OrderedReader(client).read(runs):
                assert slot.view == disk[slot.offset : slot.offset + slot.length]
        first, second = (reads_of(model) for model in models)
        assert len(first) == len(second) == len(runs) // 2
        together = [at for at, _ in runs[:8]]
        assert [at for at, _ in first[:8]] == together


async def test_one_connection_where_no_more_are_offered_or_asked_for(tmp_path):
    async with served(tmp_path, flags=FLAGS) as (address, models):
        async with await connect(address, readers=READERS) as client:
            assert client.connections == 1
            assert await client.read(0, 512) == bytes(512)
        assert len(models) == 1
    (tmp_path / "s").unlink(missing_ok=True)
    async with served(tmp_path) as (address, models):
        async with await connect(address) as client:
            assert client.connections == 1
            assert await client.read(0, 512) == bytes(512)
        assert len(models) == 1


async def converse(model, reader, writer, until=lambda: False):
    """Let the model talk until one of the two, or the test, has had enough."""
    writer.write(model.take_sent())
    while not model.closed and not until() and (data := await reader.read(65536)):
        model.receive(data)
        writer.write(model.take_sent())


def with_second(tmp_path, second, disk=None):
    """A server whose further connections are talked to by ``second``."""
    count = 0
    disk = bytearray(SIZE) if disk is None else disk

    async def talk(reader, writer):
        nonlocal count
        count += 1
        if count > 1:
            await second(reader, writer)
        else:
            await converse(ModelServer(disk, Manner(flags=MANY)), reader, writer)

    return listening(str(tmp_path / "s"), talk)


async def closes(reader, writer):
    writer.transport.abort()


async def sulks(reader, writer):
    await reader.read()


@pytest.mark.parametrize(
    ("second", "why"), [(closes, "not opened|closed|lost"), (sulks, "no answer")]
)
async def test_a_further_connection_that_isnt_given_is_done_without(
    tmp_path, monkeypatch, caplog, second, why
):
    monkeypatch.setattr(nbd_client, "FURTHER_S", 0.05)
    disk = bytearray(random.Random(3).randbytes(SIZE))
    caplog.set_level(logging.INFO)
    async with (
        with_second(tmp_path, second, disk) as address,
        await connect(address, readers=4) as client,
    ):
        assert client.connections == 1
        assert await client.read(0, MiB) == disk[:MiB]
    told = [r.getMessage() for r in caplog.records if "further" in r.getMessage()]
    assert len(told) == 1  # it is asked once, not for each
    assert re.search(why, told[0])


async def test_when_one_connection_is_lost_all_who_wait_are_told(tmp_path):
    """Also those of the other: a disk that was read in part is worth nothing."""
    lost = asyncio.Event()

    async def vanishes(reader, writer):
        model = ModelServer(bytearray(SIZE), Manner(flags=MANY))
        await converse(model, reader, writer, until=lambda: reads_of(model))
        writer.transport.abort()
        lost.set()

    before = asyncio.all_tasks()
    async with with_second(tmp_path, vanishes) as address:
        client = await connect(address, readers=2)
        assert client.connections == 2
        assert await client.read(0, 512) == bytes(512)
        with pytest.raises(TransportError, match="closed the connection"):
            async for _ in OrderedReader(client).read([(0, SIZE)]):
                pass
        assert lost.is_set()
        for again in (client.read(0, 512), client.read(512, 512), client.flush()):
            with pytest.raises(TransportError, match="closed the connection"):
                await again
        await client.aclose()
    assert asyncio.all_tasks() <= before


async def test_an_error_of_the_server_is_one_on_any_connection(tmp_path):
    def third(command, offset, length):
        return errno.EIO if command is Command.READ and offset == 512 * KiB else 0

    async with (
        served(tmp_path, fail=third) as (address, _),
        await connect(address, readers=2) as client,
    ):
        with pytest.raises(NbdError, match="EIO"):
            async for _ in OrderedReader(client).read([(0, SIZE)]):
                pass
        assert await client.read(0, 512) == bytes(512)  # still usable, as with one
        assert await client.read(0, 512) == bytes(512)


async def test_an_export_that_differs_from_the_first_connections_is_refused(tmp_path):
    ended = asyncio.Event()

    async def greeting(reader, writer):
        model = ModelServer(bytearray(SIZE + 512), Manner(flags=MANY))
        await converse(model, reader, writer)
        ended.set()

    async with with_second(tmp_path, greeting) as address:
        with pytest.raises(NbdError, match=f"size was {SIZE} and is {SIZE + 512} now"):
            await connect(address, readers=2)
        await asyncio.wait_for(ended.wait(), 5)


async def test_cancelled_while_the_second_opens_the_first_is_closed(tmp_path):
    began = asyncio.Event()

    async def waits(reader, writer):
        began.set()
        await reader.read()

    before = asyncio.all_tasks()
    async with with_second(tmp_path, waits) as address:
        task = asyncio.create_task(connect(address, readers=2))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert asyncio.all_tasks() <= before
