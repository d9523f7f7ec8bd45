# SPDX-License-Identifier: Apache-2.0
"""What a hostile NBD client may send, and a server that bears it."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from pveplug.errors import RemoteProtocolError
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_offer import Offer
from pveplug.proto.nbd_server import (
    MAX_DROPPED,
    MAX_OPTION,
    Hole,
    NbdServerMachine,
    Request,
    State,
)
from pveplug.proto.nbd_wire import Command, Option

SIZE = 1 << 20
EXPORTS = {"disk": Offer(SIZE, maximum_block=1 << 16), "odd": Offer(4097, 512)}

names = st.one_of(
    st.sampled_from([b"disk", b"odd", b"", b"none", b"\xff", b"n" * 4097]),
    st.binary(max_size=20),
)
counts = st.sampled_from([0, 1, 2, 3, 65, 1 << 31, (1 << 32) - 1])
strings = names.map(lambda raw: struct.pack(">I", len(raw)) + raw)
contexts = st.lists(
    st.sampled_from([b"base:allocation", b"base:", b"qemu:x", b""]).map(
        lambda raw: struct.pack(">I", len(raw)) + raw
    ),
    max_size=4,
)


def queries(name, found, count):
    number = len(found) if count is None else count
    return name + struct.pack(">I", number) + b"".join(found)


option_data = st.one_of(
    st.binary(max_size=40),
    names,
    strings.map(lambda name: name + b"\0\0"),
    st.builds(
        lambda name, infos: name + struct.pack(f">H{len(infos)}H", len(infos), *infos),
        strings,
        st.lists(st.integers(0, 5), max_size=5),
    ),
    st.builds(queries, strings, contexts, st.none() | counts),
)
numbers = st.sampled_from(list(Option)) | st.integers(0, (1 << 32) - 1)
options = st.builds(
    lambda number, data, length: (
        wire.OPTION_HEADER.pack(
            wire.IHAVEOPT, number, len(data) if length is None else length
        )
        + data
    ),
    numbers,
    option_data,
    st.none()
    | st.sampled_from([0, 1, MAX_OPTION, MAX_OPTION + 1, MAX_DROPPED + 1, 1 << 31]),
)
offsets = st.integers(0, SIZE + 512) | st.integers(0, (1 << 64) - 1)
lengths = st.sampled_from([0, 1, 511, 512, 4096, 1 << 16, (1 << 16) + 1, SIZE, 1 << 31])
commands = st.sampled_from([*Command, 8, 65535])
cookies = st.integers(0, 3) | st.integers(0, (1 << 64) - 1)
flags = st.just(0) | st.integers(0, 63) | st.integers(0, 65535)


def request(extended, magic, flags, command, cookie, offset, length, payload):
    layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
    right = wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC
    head = (right if magic is None else magic, flags, command, cookie, offset, length)
    carries = command == Command.WRITE or (extended and flags & 32)
    return layout.pack(*head) + (bytes(length) if carries and payload else b"")


EXTENDED = wire.option(Option.EXTENDED_HEADERS)
sound = st.sampled_from(
    [
        wire.option(Option.STRUCTURED_REPLY),
        EXTENDED,
        wire.option(
            Option.SET_META_CONTEXT,
            wire.named("disk") + b"\0\0\0\1" + wire.named("base:allocation"),
        ),
        wire.option(Option.LIST),
    ]
)
rows = st.tuples(flags, commands, cookies, offsets, lengths.filter(lambda n: n <= SIZE))
exports = st.sampled_from(["disk", "disk", "odd", ""])


def seldom(likely, strategy):
    """Draw from ``strategy`` once in ten times."""
    return st.integers(0, 9).flatmap(
        lambda n: strategy if n == 9 else st.sampled_from(likely)
    )


@st.composite
def streams(draw):
    """A client that begins like an honest one and then goes wrong, or doesn't."""
    parts = [draw(seldom([3, 3, 1], st.integers(0, (1 << 32) - 1))).to_bytes(4, "big")]
    said = draw(st.lists(sound, max_size=4))
    parts += said + draw(seldom([[]], st.lists(options, max_size=4)))
    name = draw(exports)
    if draw(st.integers(0, 9)):
        parts.append(wire.option(Option.GO, wire.named(name) + b"\0\0"))
    else:
        parts.append(wire.option(Option.EXPORT_NAME, name.encode()))
    extended = draw(seldom([EXTENDED in said], st.booleans()))
    least = draw(st.sampled_from([0, 3, 6]))
    for row in draw(st.lists(rows, min_size=least, max_size=12)):
        magic = draw(seldom([None], st.integers(0, (1 << 32) - 1)))
        parts.append(
            request(extended, magic, *row, draw(seldom([True], st.booleans())))
        )
    return b"".join(parts)


wires = st.one_of(
    streams(),
    streams(),
    st.binary(max_size=200),
    st.builds(
        lambda said: wire.CLIENT_FLAGS.pack(3) + b"".join(said),
        st.lists(options, max_size=8),
    ),
)


def shape(event):
    """An event as something to compare."""
    if isinstance(event, Request):
        return (event.command, event.flags, event.cookie, event.offset, event.length)
    return event


class Hostile:
    """A server that answers all it may at once, and notes what it says."""

    def __init__(self, **options):
        self.machine = NbdServerMachine(EXPORTS, **options)
        self.limit = options.get("max_requests", 1024)
        self.events = []
        self.said = bytearray()
        self.broken = ""

    def secure(self, flags):
        """Go through STARTTLS as a client must: what follows is sent behind it."""
        self.feed(flags + wire.option(Option.STARTTLS))

    def feed(self, raw):
        if self.machine.state is State.CLOSED:
            return
        try:
            events = self.machine.receive_data(raw)
            while events:
                assert self.machine.open_requests <= self.limit
                self.said += b"".join(self.machine.data_to_send())
                for event in events:
                    self.answer(event)
                events = self.machine.receive_data(b"")
        except RemoteProtocolError as error:
            assert self.machine.state is State.CLOSED
            self.broken = str(error)
        self.said += b"".join(self.machine.data_to_send())

    def answer(self, event):
        self.events.append(shape(event))
        machine = self.machine
        if isinstance(event, StartTls):
            machine.tls_established()
        if not isinstance(event, Request):
            return
        if event.error:
            reply = machine.send_error(event)
        elif event.command == Command.READ:
            half = event.length // 2
            data = [Hole(half), bytes(event.length - half)]
            reply = machine.send_read(event, data)
        else:
            reply = machine.send_status(event, [(7, 0), (SIZE, 3)])
        self.said += b"".join(map(bytes, reply))

    def check(self):
        """What must hold at any time."""
        machine = self.machine
        assert machine.open_requests <= self.limit
        if machine.wants_data:
            # Half an option at most, or half a request.
            assert len(machine._buffer) <= wire.OPTION_HEADER.size + MAX_OPTION
