# SPDX-License-Identifier: Apache-2.0
"""What holds for the NBD server whatever a client does."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pveplug.proto.nbd_client import NbdClientMachine, Ready
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_offer import Offer
from pveplug.proto.nbd_server import Entered, Hole, NbdServerMachine, Request, State
from pveplug.proto.nbd_wire import STATE_HOLE, STATE_ZERO, Command
from tests.support.nbd_garbage import Hostile, wires

SIZE = 16 * 1024
UNIT = 512
QUICK = settings(max_examples=200, deadline=None)


@QUICK
@given(raw=wires, data=st.data())
def test_any_split_gives_the_same_events_and_the_same_replies(raw, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    results = []
    for edges in ([0, len(raw)], [0, *cuts, len(raw)]):
        server = Hostile()
        for start, end in itertools.pairwise(edges):
            server.feed(raw[start:end])
        results.append((server.events, bytes(server.said), server.broken))
    (events, said, broken), pieces = results
    if broken:
        # What stands before a broken rule is answered if it came in an earlier piece.
        assert pieces[0][: len(events)] == events
        assert pieces[1].startswith(said)
        assert pieces[2] == broken
    else:
        assert pieces == results[0]


@QUICK
@given(raw=wires, tls=st.booleans(), most=st.integers(1, 5))
def test_whatever_comes_gives_events_or_a_remote_protocol_error(raw, tls, most):
    server = Hostile(tls=tls, max_requests=most)
    server.feed(raw)
    server.check()


class ClientAgainstServer(RuleBasedStateMachine):
    """Our client's machine and our server's, over a disk that is a bytearray."""

    @initialize(
        unit=st.sampled_from([1, UNIT]),
        seed=st.integers(),
        tls=st.booleans(),
        most=st.integers(1, 8),
        disk=st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=9),
    )
    def begin(self, unit, seed, tls, most, disk):
        self.rng = random.Random(seed)
        step = SIZE // len(disk) // UNIT * UNIT
        self.disk = bytearray().join(bytes([b]) * step for b in disk)
        self.disk += b"\7" * (SIZE - len(self.disk))
        self.server = NbdServerMachine(
            {"x": Offer(SIZE, unit, 4096, SIZE // 2), "y": Offer(1)},
            tls=tls,
            max_requests=most,
        )
        self.client = NbdClientMachine("x", contexts=["base:allocation"], tls=tls)
        self.unit = unit
        self.most = most
        self.asked = []  # requests the server owes an answer
        self.reads = {}  # cookie -> offset, buffer
        self.statuses = {}  # cookie -> offset, length
        self.carry()
        assert self.client.export is not None
        assert self.client.export.size == SIZE
        assert self.client.export.extended

    def carry(self):
        """Carry bytes in both directions, in pieces, until nobody speaks."""
        while True:
            to_server = b"".join(map(bytes, self.client.data_to_send()))
            to_client = b"".join(self.server.data_to_send())
            if not to_server and not to_client:
                return
            self.to_client(to_client)
            while to_server:
                count = self.rng.randint(1, 80)
                self.take(self.server.receive_data(to_server[:count]))
                to_server = to_server[count:]

    def to_client(self, raw):
        while raw:
            count = self.rng.randint(1, 700)
            for event in self.client.receive_data(raw[:count]):
                match event:
                    case StartTls():
                        self.client.tls_established()
                    case Ready():
                        pass
                    case _:
                        self.completed(event)
            raw = raw[count:]

    def take(self, events):
        for event in events:
            match event:
                case StartTls():
                    self.to_client(b"".join(self.server.data_to_send()))
                    self.server.tls_established()
                case Entered(name):
                    assert name == "x"
                case Request():
                    assert not event.error, event.reason
                    self.asked.append(event)

    def completed(self, event):
        assert event.error is None
        if event.cookie in self.reads:
            offset, buffer = self.reads.pop(event.cookie)
            assert buffer == self.disk[offset : offset + len(buffer)]
            return
        offset, length = self.statuses.pop(event.cookie)
        runs = list(event.status["base:allocation"])
        assert 0 < sum(run for run, _ in runs) <= length
        for run, flags in runs:
            zero = not any(self.disk[offset : offset + run])
            assert zero or not flags & STATE_ZERO
            offset += run

    def range(self, a, b):
        low, high = sorted((a, b))
        low = low // self.unit * self.unit
        length = max(-(-(high - low) // self.unit) * self.unit, self.unit)
        return low, min(length, SIZE - low, SIZE // 2)

    ends = st.integers(0, SIZE - 1)

    @rule(a=ends, b=ends, whole=st.booleans())
    def read(self, a, b, whole):
        offset, length = self.range(a, b)
        buffer = bytearray(b"?" * length)
        cookie = self.client.read(offset, memoryview(buffer), dont_fragment=whole)
        self.reads[cookie] = (offset, buffer)
        self.carry()

    @rule(a=ends, b=ends, one=st.booleans())
    def status(self, a, b, one):
        offset, length = self.range(a, b)
        cookie = self.client.block_status(offset, length, one=one)
        self.statuses[cookie] = (offset, length)
        self.carry()

    def runs(self, offset, length):
        """The disk's runs by 512 bytes: (length, is it zero)."""
        end = offset + length
        while offset < end:
            stop = min(offset // UNIT * UNIT + UNIT, end)
            piece = self.disk[offset:stop]
            yield stop - offset, not any(piece)
            offset = stop

    @precondition(lambda self: self.asked)
    @rule(scatter=st.booleans())
    def answer(self, scatter):
        at = self.rng.randrange(len(self.asked))
        request = self.asked.pop(at)
        offset, end = request.offset, request.offset + request.length
        runs = list(self.runs(offset, request.length))
        if request.command == Command.BLOCK_STATUS:
            kinds = [(n, (STATE_HOLE | STATE_ZERO) * zero) for n, zero in runs]
            kept = self.rng.randint(1, len(kinds))
            reply = self.server.send_status(request, kinds[:kept])
        elif scatter:
            pieces, at = [], offset
            for length, zero in runs:
                pieces.append(Hole(length) if zero else self.disk[at : at + length])
                at += length
            reply = self.server.send_read(request, pieces)
        else:
            reply = self.server.send_read(request, self.disk[offset:end])
        self.to_client(b"".join(map(bytes, reply)))
        self.take(self.server.receive_data(b""))

    @invariant()
    def never_more_are_open_than_agreed(self):
        if hasattr(self, "server"):
            assert len(self.asked) == self.server.open_requests <= self.most

    def teardown(self):
        if hasattr(self, "client"):
            while self.asked:
                self.answer(scatter=True)
            assert not self.reads
            assert not self.statuses
            self.client.disconnect()
            self.carry()
            assert self.server.state is State.LEAVING


TestClientAgainstServer = ClientAgainstServer.TestCase
TestClientAgainstServer.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
