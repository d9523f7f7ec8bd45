# SPDX-License-Identifier: Apache-2.0
"""What of a disk reaches its replica: all that is needed, and no more."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pveplug.diskstream import Progress, RateLimit, scan
from pveplug.dr.conversation import (
    Conversation,
    ReceiverRefusedError,
    conversation,
)
from pveplug.dr.delta import (
    DiskSender,
    Range,
    check_samples,
    check_slice,
    needed_again,
    resumed,
    slice_of,
)
from pveplug.errors import RemoteProtocolError, TransportError
from pveplug.events import ListReporter
from pveplug.images.clusters import ClusterMap
from pveplug.nbd.client import NbdClient, connect
from pveplug.proto.dr_frames import (
    LEAF,
    AskDigests,
    Block,
    Done,
    Refusal,
    Say,
    State,
    Zero,
)
from pveplug.units import MiB
from tests.engine.test_compare import written_to
from tests.engine.test_disk_path import BASE, allocation, dirty, scribbled
from tests.support.dr_peer import MemoryReceiver
from tests.support.nbd_model import Manner, ModelServer, serving

DIRTY = "qemu:dirty-bitmap:x"


@contextlib.asynccontextmanager
async def source(
    base: Path, disk: bytearray, before: bytearray | None = None, block: int = 32 * MiB
) -> AsyncIterator[NbdClient]:
    contexts = {BASE: allocation(disk)}
    if before is not None:
        contexts[DIRTY] = dirty(bytes(before), bytes(disk))
    manner = Manner(block=(1, 4096, block), contexts=contexts)
    async with serving(str(base / "s"), lambda: ModelServer(disk, manner)) as address:
        async with await connect(address, contexts=list(contexts)) as client:
            yield client


@contextlib.asynccontextmanager
async def talking(
    replica: dict[str, bytearray],
) -> AsyncIterator[tuple[MemoryReceiver, Conversation]]:
    peer = MemoryReceiver(replica)
    async with conversation(peer, ListReporter()) as talk:
        yield peer, talk


def sender(talk: Conversation, client: NbdClient) -> DiskSender:
    return DiskSender(talk, 0, "scsi0", client, RateLimit(0), Progress())


async def test_a_fresh_replica_gets_all_data_and_no_zeroes(tmp_path: Path) -> None:
    disk = scribbled(3 * MiB + 512, 1, 0.5)
    async with source(tmp_path, disk) as client, talking({}) as (peer, talk):
        clusters = await scan(client, context=None, known=0)
        await sender(talk, client).changes(clusters, fresh=True)
    assert peer.disks["scsi0"] == disk
    assert not any(isinstance(frame, Zero) for frame in peer.seen)


@pytest.mark.parametrize("seed", range(6))
async def test_an_increment_carries_the_changes_only(tmp_path: Path, seed: int) -> None:
    before = scribbled(3 * MiB, seed, 0.6)
    disk = written_to(before, seed, 4)
    async with (
        source(tmp_path, disk, before) as client,
        talking({"scsi0": bytearray(before)}) as (peer, talk),
    ):
        clusters = await scan(client, context=DIRTY, known=len(before))
        await sender(talk, client).changes(clusters, fresh=False)
    assert peer.disks["scsi0"] == disk
    touched = {
        at // LEAF
        for frame in peer.seen
        if isinstance(frame, Block | Zero)
        for at in range(frame.offset, frame.end, LEAF)
    }
    assert touched == {
        at // LEAF
        for at in range(0, len(disk), LEAF)
        if before[at : at + LEAF] != disk[at : at + LEAF]
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [4096, 96 * 1024, 32 * MiB])
async def test_without_bitmaps_exactly_what_differs_is_sent(
    tmp_path: Path, seed: int, block: int
) -> None:
    before = scribbled(3 * MiB + 512 * seed, seed, 0.5)
    disk = written_to(before, seed, 5)
    async with (
        source(tmp_path, disk, block=block) as client,
        talking({"scsi0": bytearray(before)}) as (peer, talk),
    ):
        found = await scan(client, context=None, known=0)
        await sender(talk, client).differences(found)
    assert peer.disks["scsi0"] == disk
    differing = sum(
        before[at : at + LEAF] != disk[at : at + LEAF]
        for at in range(0, len(disk), LEAF)
    )
    sent = [frame for frame in peer.seen if isinstance(frame, Block | Zero)]
    assert len(sent) == differing


@pytest.mark.parametrize("durable", [0, LEAF, MiB + 4096, 3 * MiB])
async def test_a_seed_that_was_cut_goes_on_from_what_is_durable(
    tmp_path: Path, durable: int
) -> None:
    before = scribbled(3 * MiB, 3, 0.6)
    disk = written_to(before, 3, 4)
    # Below ``durable`` the replica has what was; above it, anything.
    replica = before[:durable] + random.Random(1).randbytes(len(disk) - durable)
    async with (
        source(tmp_path, disk, before) as client,
        talking({"scsi0": bytearray(replica)}) as (peer, talk),
    ):
        everything = await scan(client, context=None, known=0)
        changes = await scan(client, context=DIRTY, known=len(before))
        await sender(talk, client).changes(
            resumed(everything, changes, durable), fresh=False
        )
    assert peer.disks["scsi0"] == disk
    assert peer.data_bytes <= len(disk) - durable + LEAF + changes.data_bytes


async def test_a_flipped_bit_is_found_in_its_slice_and_mended(tmp_path: Path) -> None:
    disk = scribbled(4 * MiB + 512, 5, 0.5)
    replica = bytearray(disk)
    replica[3 * MiB + 17] ^= 4
    found = []
    async with (
        source(tmp_path, disk) as client,
        talking({"scsi0": replica}) as (_, talk),
    ):
        await sender(talk, client).changes(ClusterMap(len(disk)), fresh=False)
        checked = 0
        for number in range(16):
            part = slice_of(len(disk), number, 16)
            assert part is not None
            length, mended = await check_slice(talk, 0, "scsi0", client, part)
            checked += length
            found += mended
    assert found == [3 * MiB]
    assert checked == len(disk)
    assert replica == disk


async def test_a_sample_that_differs_is_named_by_its_offset(tmp_path: Path) -> None:
    disk = scribbled(MiB + 100, 6, 0.5)
    replica = bytearray(disk)
    replica[LEAF * 3] ^= 1
    replica[-1] ^= 1
    offsets = tuple(range(0, len(disk), LEAF))
    async with (
        source(tmp_path, disk) as client,
        talking({"scsi0": replica}) as (_, talk),
    ):
        differ = await check_samples(talk, "scsi0", client, offsets)
    assert differ == [3 * LEAF, MiB]


def test_what_is_verified_is_not_given_back() -> None:
    size = 4 * MiB + 7
    needed = needed_again(size, ClusterMap(size), Range(MiB, 2 * LEAF), (0, 4 * MiB))
    assert [(run.offset, run.length) for run in needed.data_runs()] == [
        (0, LEAF),
        (MiB, 2 * LEAF),
        (4 * MiB, 7),
    ]


async def test_a_refusal_ends_whatever_waits_and_its_text_arrives() -> None:
    async with talking({}) as (peer, talk):
        peer.say(Refusal("epoch", "this replica was failed over"))
        with pytest.raises(ReceiverRefusedError, match="was failed over") as caught:
            await talk.answer(State)
        assert caught.value.code == "epoch"
        with pytest.raises(ReceiverRefusedError):
            await talk.send(AskDigests("scsi0", 0, LEAF))


async def test_an_answer_of_another_kind_is_refused() -> None:
    async with talking({}) as (peer, talk):
        peer.say(Done("c", 1))
        with pytest.raises(RemoteProtocolError, match="Done instead of State"):
            await talk.answer(State)


async def test_what_the_receiver_says_is_in_the_job_log_before_its_end() -> None:
    peer, say = MemoryReceiver({}), ListReporter()
    async with conversation(peer, say) as talk:
        peer.say(Say("warning", "little space"))
        peer.hang_up()
        with pytest.raises(TransportError, match="closed the connection"):
            await talk.answer(State)
    assert say.lines == [("warning", "receiver: little space")]
