# SPDX-License-Identifier: Apache-2.0
"""What holds for the NBD client whatever a server does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pveplug.errors import NbdError, RemoteProtocolError
from pveplug.extents import Extent, Kind, coalesced, tiles
from pveplug.nbd import source as nbd_source
from pveplug.nbd.source import extents, is_zero, mark
from pveplug.proto.nbd_client import Completed, NbdClientMachine, Phase, Ready
from pveplug.proto.nbd_request import Runs
from pveplug.units import round_up
from tests.support.nbd_model import FLAGS, Manner, ModelServer

SIZE = 32 * 1024
UNIT = 512
CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:b")
QUICK = settings(max_examples=150, deadline=None)


def run_lists(flags):
    """(length, flags) runs that tile the disk, in units."""
    units = SIZE // UNIT

    def tiled(cuts, values):
        edges = sorted({0, units, *cuts})
        runs = itertools.pairwise(edges)
        return [
            ((high - low) * UNIT, values[i % len(values)])
            for i, (low, high) in enumerate(runs)
        ]

    cuts = st.lists(st.integers(1, units - 1), max_size=12)
    return st.builds(tiled, cuts, st.lists(flags, min_size=1, max_size=13))


manners = st.builds(
    Manner,
    go=st.booleans(),
    structured=st.booleans(),
    extended=st.booleans(),
    no_zeroes=st.booleans(),
    block=st.sampled_from([None, (1, 4096, 1 << 25), (512, 4096, 8192)]),
    contexts=st.fixed_dictionaries(
        {
            CONTEXTS[0]: run_lists(st.sampled_from([0, 1, 3])),
            CONTEXTS[1]: run_lists(st.sampled_from([0, 1])),
        }
    ),
    fragment=st.one_of(st.none(), st.integers().map(random.Random)),
    status_limit=st.one_of(st.none(), st.integers(1, 20).map(lambda n: n * UNIT)),
    status_long=st.booleans(),
)


def carry(client, server, rng=None, limit=64):
    """Carry bytes both ways in pieces of random size until nobody speaks."""
    events = []
    while True:
        for data in client.data_to_send():
            server.receive(bytes(data))
        sent = memoryview(server.take_sent())
        if not sent:
            return events
        while sent:
            count = rng.randint(1, limit) if rng else len(sent)
            if rng and rng.random() < 0.5:
                events += client.receive_data(sent[:count])
            else:
                room = client.get_buffer()
                count = min(count, len(room), len(sent))
                room[:count] = sent[:count]
                client.buffer_updated(count)
                events += client.events()
            sent = sent[count:]


def shape(event):
    match event:
        case Ready(export):
            return export
        case Completed(cookie, error, status):
            told = {k: list(v) for k, v in status.items()} if status else None
            return cookie, error.errno if error else 0, told
    raise AssertionError(event)


@QUICK
@given(manner=manners, seed=st.integers(), pattern=st.binary(min_size=1, max_size=40))
def test_any_split_gives_the_same_events_and_the_same_bytes(manner, seed, pattern):
    disk = bytearray((pattern * SIZE)[: SIZE // 2].ljust(SIZE, b"\0"))
    results = []
    for rng in (None, random.Random(seed)):
        if manner.fragment:
            manner.fragment.seed(seed)
        server = ModelServer(bytearray(disk), manner)
        client = NbdClientMachine("x", contexts=CONTEXTS)
        events = carry(client, server, rng)
        export = client.export
        buffers = [bytearray(b"?" * 8192) for _ in range(3)]
        for i, buffer in enumerate(buffers):
            client.read(i * 6144, memoryview(buffer))
        if export.contexts:
            client.block_status(UNIT, SIZE - UNIT)
        client.write(1024, memoryview(b"w" * 1024))
        client.flush()
        events += carry(client, server, rng)
        assert buffers == [disk[i * 6144 :][:8192] for i in range(3)]
        assert server.disk[1024:2048] == b"w" * 1024
        shapes = [shape(event) for event in events]
        first, rest = shapes[0], sorted(shapes[1:], key=lambda s: s[0])
        results.append((first, rest))
    assert results[0] == results[1]


def negotiated(extended):
    manner = Manner(extended=extended, contexts={c: [(SIZE, 0)] for c in CONTEXTS})
    server = ModelServer(bytearray(SIZE), manner)
    client = NbdClientMachine("x", contexts=CONTEXTS)
    carry(client, server)
    return client, server


@QUICK
@given(garbage=st.binary(max_size=400), extended=st.booleans(), fed=st.integers(0, 300))
def test_garbage_gives_a_result_or_a_remote_protocol_error(garbage, extended, fed):
    fresh = NbdClientMachine("x", contexts=CONTEXTS)
    honest = ModelServer(bytearray(SIZE)).take_sent()
    with contextlib.suppress(RemoteProtocolError, NbdError):
        fresh.receive_data(honest[:fed] + garbage)
    client, _ = negotiated(extended)
    client.read(0, memoryview(bytearray(64)))
    client.block_status(0, SIZE)
    with contextlib.suppress(RemoteProtocolError):
        client.receive_data(garbage)


@QUICK
@given(data=st.data(), extended=st.booleans())
def test_a_flipped_bit_in_a_reply_gives_a_result_or_a_remote_protocol_error(
    data, extended
):
    client, server = negotiated(extended)
    guarded = bytearray(b"#" * 192)
    client.read(0, memoryview(guarded)[64:128])
    client.block_status(0, SIZE)
    for part in client.data_to_send():
        server.receive(bytes(part))
    reply = bytearray(server.take_sent())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(reply) - 1))
        reply[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        client.receive_data(reply)
    except RemoteProtocolError:
        assert client.phase is Phase.CLOSED
    # Whatever came, nothing was written beside the buffer.
    assert guarded[:64] == b"#" * 64
    assert guarded[128:] == b"#" * 64


class Answer:
    """A question under way; ``open`` holds those that nobody has dealt with."""

    def __init__(self, told, under_way):
        self.told, self.under_way = told, under_way
        under_way.append(self)

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        self.under_way.remove(self)
        return self.told

    def abandon(self):
        self.under_way.remove(self)


class FakeClient:
    """What extents() needs of a client, told from runs."""

    def __init__(self, manner, contexts, minimum_block=UNIT, *, choosing=False):
        self.can_choose_context = choosing
        self.asked = []
        self.model = ModelServer(bytearray(SIZE), manner)
        self.size, self.contexts, self.minimum_block = SIZE, contexts, minimum_block
        self.under_way = []

    def start_status(self, offset, length, only=None):
        assert only is None or self.can_choose_context
        self.asked.append((offset, length, only))
        assert offset % self.minimum_block == 0
        assert 0 < length
        assert offset + length <= SIZE
        told = {}
        for name in self.contexts if only is None else [only]:
            runs = self.model.runs(name, offset, length)
            told[name] = Runs(
                lengths=array("Q", [r[0] for r in runs]),
                flags=array("Q", [r[1] for r in runs]),
            )
        return Answer(told, self.under_way)


def expected_kinds(manner, contexts):
    """Kind of every unit of the disk, by brute force."""

    def spread(name):
        return [f for length, f in manner.contexts[name] for _ in range(length // UNIT)]

    zero = [Kind.ZERO if f & 2 else Kind.DATA for f in spread(CONTEXTS[0])]
    if CONTEXTS[0] not in contexts:
        zero = [Kind.DATA] * len(zero)
    if CONTEXTS[1] not in contexts:
        return zero
    dirty = spread(CONTEXTS[1])
    return [k if d & 1 else Kind.CLEAN for k, d in zip(zero, dirty, strict=True)]


@QUICK
@given(
    manner=manners,
    granted=st.sets(st.sampled_from(CONTEXTS)),
    window=st.integers(1, 100).map(lambda n: n * UNIT),
    ends=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted),
    few=st.one_of(st.none(), st.integers(0, 6)),
    short=st.integers(0, 3).map(lambda n: n * UNIT),
    unit=st.sampled_from([1, UNIT, 4 * UNIT]),
)
def test_any_legal_block_status_tiles_the_range(
    manner, granted, window, ends, few, short, unit
):
    """Also where the allocation is asked for by itself, of at most ``few`` runs.

    With ``short`` what is dirty may be told as DATA where it is zero, never as CLEAN.
    """
    contexts = tuple(sorted(granted))
    manner.status_limit = manner.status_limit and round_up(manner.status_limit, unit)
    client = FakeClient(manner, contexts, unit, choosing=few is not None)
    start, end = ends

    async def collect():
        dirty = "b" if CONTEXTS[1] in contexts else None
        source = extents(client, dirty=dirty, start=start, end=end, window=window)
        return [extent async for extent in source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbd_source, "SPARSE", few or 0)
        patch.setattr(nbd_source, "TOO_SHORT", short)
        got = asyncio.run(collect())
    assert not client.under_way
    moved = [Extent(e.offset - start, e.length, e.kind) for e in got]
    assert tiles(moved, end - start)
    assert list(coalesced(got)) == got
    kinds = expected_kinds(manner, contexts)
    for extent in got:
        low, high = extent.offset // UNIT, -(-extent.end // UNIT)
        if few is not None and short and extent.kind is Kind.DATA:
            assert Kind.CLEAN not in kinds[low:high]
        else:
            assert set(kinds[low:high]) == {extent.kind}


@pytest.mark.parametrize(
    ("few", "short", "asked"),
    [(1, UNIT, "once"), (0, UNIT, "with it"), (1, 2 * UNIT, "never")],
)
def test_allocation_counts_only_where_it_is_dirty(monkeypatch, few, short, asked):
    """One run of two units is dirty in the second of four windows."""
    monkeypatch.setattr(nbd_source, "SPARSE", few)
    monkeypatch.setattr(nbd_source, "TOO_SHORT", short)
    quarter = SIZE // 4
    dirty = [(quarter + UNIT, 0), (2 * UNIT, 1), (SIZE - quarter - 3 * UNIT, 0)]
    manner = Manner(contexts={CONTEXTS[0]: [(SIZE, 3)], CONTEXTS[1]: dirty})
    client = FakeClient(manner, CONTEXTS, choosing=True)

    async def collect():
        return [e async for e in extents(client, dirty="b", window=quarter)]

    got = [(e.offset, e.length, e.kind) for e in asyncio.run(collect())]
    kind = Kind.DATA if asked == "never" else Kind.ZERO
    assert got[1] == (quarter + UNIT, 2 * UNIT, kind)
    bitmaps = [(n * quarter, quarter, CONTEXTS[1]) for n in range(4)]
    if asked == "once":
        run = (quarter + UNIT, 2 * UNIT, CONTEXTS[0])
        assert sorted(client.asked) == sorted([*bitmaps, run])
    elif asked == "never":
        assert client.asked == bitmaps
    else:  # the second again, and the third, of which nothing is known yet
        both = [(quarter, quarter, None), (2 * quarter, quarter, None)]
        assert client.asked == [*bitmaps[:2], *both, bitmaps[3]]


@pytest.mark.parametrize("short_of", CONTEXTS)
def test_a_status_of_less_than_a_block_is_refused_not_asked_for_ever(
    monkeypatch, short_of
):
    monkeypatch.setattr(nbd_source, "TOO_SHORT", 0)
    runs = {CONTEXTS[0]: [(SIZE, 0)], CONTEXTS[1]: [(SIZE, 1)]}
    client = FakeClient(Manner(contexts=runs), CONTEXTS, 4 * UNIT, choosing=True)
    honest = client.model.runs

    def short(name, offset, length):
        return [(UNIT, 1)] if name == short_of else honest(name, offset, length)

    monkeypatch.setattr(client.model, "runs", short)

    async def collect():
        await mark(client, Marks(), dirty="b")

    with pytest.raises(NbdError, match="at 0 is shorter than its own minimum block"):
        asyncio.run(collect())
    assert len(client.asked) <= 3
    assert not client.under_way


def test_the_next_window_is_asked_for_while_one_is_gone_through():
    manner = Manner(contexts={c: [(UNIT, n % 2) for n in range(64)] for c in CONTEXTS})
    client = FakeClient(manner, CONTEXTS)

    async def leave_midway():
        source = extents(client, dirty="b", window=8 * UNIT)
        async with contextlib.aclosing(source):
            seen = [(await anext(source), len(client.under_way)) for _ in range(60)]
        return [under_way for _, under_way in seen]

    assert asyncio.run(leave_midway()) == [1] * 55 + [0] * 5
    assert not client.under_way
    marks = Marks()
    marks.mark_range = None  # which fails

    async def fail_midway():
        await mark(client, marks, dirty="b")

    with pytest.raises(TypeError):
        asyncio.run(fail_midway())
    assert not client.under_way


class Marks:
    """A map of clusters that only notes what is marked."""

    def __init__(self):
        self.extents = []

    def mark_range(self, offset, length, kind):
        self.extents.append(Extent(offset, length, kind))


@QUICK
@given(
    manner=manners,
    granted=st.sets(st.sampled_from(CONTEXTS)),
    ends=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted),
)
def test_what_is_marked_is_what_the_extents_are(manner, granted, ends):
    contexts = tuple(sorted(granted))
    start, end = ends
    dirty = "b" if CONTEXTS[1] in contexts else None
    marks = Marks()

    async def collect():
        # The server's manner may be random: each asks one of its own.
        one, other = FakeClient(manner, contexts), FakeClient(manner, contexts)
        await mark(one, marks, dirty=dirty, start=start, end=end)
        source = extents(other, dirty=dirty, start=start, end=end)
        return [e async for e in source if e.kind is not Kind.CLEAN]

    assert asyncio.run(collect()) == list(coalesced(marks.extents))


@given(
    st.integers(0, 300), st.integers(0, 300), st.one_of(st.none(), st.integers(0, 599))
)
def test_is_zero_looks_at_exactly_its_range(start, length, dirty):
    buffer = bytearray(600)
    if dirty is not None:
        buffer[dirty] = 1
    expected = not any(buffer[start : start + length])
    assert is_zero(buffer, start, length) is expected
    assert is_zero(memoryview(buffer), start, length) is expected


@pytest.mark.parametrize("length", [64 * 1024 - 1, 64 * 1024, 1 << 20, (1 << 20) + 1])
def test_is_zero_looks_at_the_whole_of_long_ranges(length):
    buffer = bytearray(length + 2)
    buffer[0] = buffer[-1] = 1
    assert is_zero(buffer, 1, length)
    assert is_zero(memoryview(buffer), 1, length)
    for dirty in (1, 2, length // 2, length):
        buffer[dirty] = 1
        assert not is_zero(buffer, 1, length)
        assert not is_zero(memoryview(buffer), 1, length)
        buffer[dirty] = 0


class ClientAgainstModel(RuleBasedStateMachine):
    """Reads, writes, zeroes and abandoned reads in any order against a bytearray."""

    @initialize(manner=manners, seed=st.integers())
    def begin(self, manner, seed):
        self.rng = random.Random(seed)
        self.server = ModelServer(bytearray(SIZE), manner)
        self.client = NbdClientMachine("x", contexts=CONTEXTS)
        carry(self.client, self.server, self.rng)
        self.mirror = bytearray(SIZE)
        self.reads = {}  # cookie -> offset, buffer
        self.given_up = []  # buffers of abandoned reads
        self.open = set()
        self.unit = self.client.export.minimum_block
        self.limit = min(self.client.export.maximum_block, SIZE)

    def range(self, a, b):
        low, high = sorted((a, b))
        low = low // self.unit * self.unit
        length = max(-(-(high - low) // self.unit) * self.unit, self.unit)
        return low, min(length, SIZE - low, self.limit)

    ends = st.integers(0, SIZE - 1)

    @rule(a=ends, b=ends)
    def read(self, a, b):
        offset, length = self.range(a, b)
        if self.open - set(self.reads):
            return  # a write is under way: its order to this read isn't defined
        buffer = bytearray(b"?" * length)
        cookie = self.client.read(offset, memoryview(buffer))
        self.reads[cookie] = (offset, buffer)
        self.open.add(cookie)

    @rule(a=ends, b=ends, byte=st.binary(min_size=1, max_size=1), zero=st.booleans())
    def change(self, a, b, byte, zero):
        self.deliver()
        offset, length = self.range(a, b)
        data = bytes(length) if zero else byte * length
        self.mirror[offset : offset + length] = data
        if zero:
            self.open.add(self.client.write_zeroes(offset, length))
        else:
            self.open.add(self.client.write(offset, memoryview(data)))

    @precondition(lambda self: self.reads)
    @rule()
    def abandon(self):
        cookie = self.rng.choice(sorted(self.reads))
        _, buffer = self.reads.pop(cookie)
        self.client.abandon(cookie)
        buffer[:] = b"!" * len(buffer)
        self.given_up.append(buffer)

    @rule()
    def deliver(self):
        for event in carry(self.client, self.server, self.rng, limit=5000):
            assert event.error is None
            self.open.remove(event.cookie)
            if event.cookie in self.reads:
                offset, buffer = self.reads.pop(event.cookie)
                assert buffer == self.mirror[offset : offset + len(buffer)]
        assert not self.open

    @invariant()
    def abandoned_buffers_stay_as_they_are(self):
        for buffer in getattr(self, "given_up", ()):
            assert buffer.count(b"!") == len(buffer)

    def teardown(self):
        if hasattr(self, "client"):
            self.deliver()
            assert self.server.disk == self.mirror
            assert self.client.export.flags == FLAGS


TestClientAgainstModel = ClientAgainstModel.TestCase
TestClientAgainstModel.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
