# SPDX-License-Identifier: Apache-2.0
"""The NBD server's machine: every state with every input, byte by byte."""

from __future__ import annotations

import itertools
import struct

import pytest

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_offer import MAX_QUERIES, Offer
from pveplug.proto.nbd_server import (
    MAX_DROPPED,
    MAX_OPTION,
    MAX_OPTIONS,
    MIN_HOLE,
    NEXT,
    Entered,
    Goodbye,
    Hole,
    Input,
    NbdServerMachine,
    Request,
    State,
)
from pveplug.proto.nbd_wire import (
    Chunk,
    Command,
    CommandFlag,
    Error,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

SIZE = 1 << 20
OFFER = Offer(SIZE)
FLAGS = wire.CLIENT_FLAGS.pack(3)
CONTEXT = struct.pack(">I", 1) + wire.named("base:allocation")
RO = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
RO |= TransmissionFlag.CAN_MULTI_CONN


class Peer:
    """A machine, and the words a client would use."""

    def __init__(self, exports=None, flags=FLAGS, **options):
        exports = {"disk": OFFER} if exports is None else exports
        self.machine = NbdServerMachine(exports, **options)
        greeting = b"".join(self.machine.data_to_send())
        assert greeting == b"NBDMAGICIHAVEOPT\0\3"
        if flags:
            assert self.machine.receive_data(flags) == []

    def option(self, number, data=b""):
        """Send an option; return the replies as (type, data)."""
        self.events = self.machine.receive_data(wire.option(number, data))
        raw = b"".join(self.machine.data_to_send())
        replies = []
        while raw:
            magic, echoed, kind, length = wire.OPTION_REPLY.unpack_from(raw)
            assert (magic, echoed) == (wire.OPTION_REPLY_MAGIC, number)
            start = wire.OPTION_REPLY.size
            replies.append((kind, raw[start : start + length]))
            raw = raw[start + length :]
        return replies

    def refusal(self, number, data=b""):
        """Send an option that is refused; return with what."""
        ((kind, text),) = self.option(number, data)
        assert text
        return Reply(kind)

    def go(self, mode="structured", name="disk", context=True):
        if mode == "structured":
            assert self.option(Option.STRUCTURED_REPLY) == [(Reply.ACK, b"")]
        elif mode == "extended":
            assert self.option(Option.EXTENDED_HEADERS) == [(Reply.ACK, b"")]
        if mode != "simple" and context:
            granted = self.option(Option.SET_META_CONTEXT, wire.named(name) + CONTEXT)
            assert [kind for kind, _ in granted] == [Reply.META_CONTEXT, Reply.ACK]
        replies = self.option(Option.GO, wire.named(name) + b"\0\0")
        assert replies[-1] == (Reply.ACK, b"")
        return self

    def request(self, command, offset=0, length=0, flags=0, cookie=7, data=b""):
        extended = self.machine.agreed.extended
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        magic = wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC
        return layout.pack(magic, flags, command, cookie, offset, length) + data

    def ask(self, *arguments, **options):
        """Send one request; return the event it becomes."""
        (event,) = self.machine.receive_data(self.request(*arguments, **options))
        return event


def joined(buffers):
    return b"".join(bytes(buffer) for buffer in buffers)


def chunks(raw, extended=False):
    """Cut a structured reply: (flags, type, cookie, payload)."""
    found = []
    layout = wire.EXTENDED_REPLY if extended else wire.STRUCTURED_REPLY
    while raw:
        fields = layout.unpack_from(raw)
        magic, flags, kind, cookie, *offset, length = fields
        assert magic == (
            wire.EXTENDED_REPLY_MAGIC if extended else wire.STRUCTURED_REPLY_MAGIC
        )
        assert len(offset) == extended
        payload = raw[layout.size : layout.size + length]
        assert len(payload) == length
        found.append((flags, Chunk(kind), cookie, payload))
        raw = raw[layout.size + length :]
    return found


# -- states -------------------------------------------------------------------


def in_state(state):
    peer = Peer(tls=state is State.TLS, flags=None)
    if state is State.CLIENT_FLAGS:
        return peer
    peer.machine.receive_data(FLAGS)
    if state is State.TLS:
        assert peer.option(Option.STARTTLS) == [(Reply.ACK, b"")]
        assert peer.events == [StartTls()]
    elif state in (State.TRANSMISSION, State.LEAVING):
        peer.go()
        assert peer.events == [Entered("disk")]
        if state is State.LEAVING:
            assert peer.ask(Command.DISC) == Goodbye()
    elif state is State.CLOSED:
        peer.machine.receive_eof()
    assert peer.machine.state is state
    return peer


INPUTS = {
    "flags": lambda peer: peer.machine.receive_data(FLAGS + bytes(24)),
    "option": lambda peer: peer.machine.receive_data(wire.option(Option.LIST)),
    "request": lambda peer: peer.machine.receive_data(
        wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, Command.READ, 1, 0, 512)
    ),
    "nothing": lambda peer: peer.machine.receive_data(b""),
    "secured": lambda peer: peer.machine.tls_established(),
    "eof": lambda peer: peer.machine.receive_eof(),
}
LOCAL, REMOTE = LocalProtocolError, RemoteProtocolError
OUTCOMES = {
    State.CLIENT_FLAGS: {
        "flags": REMOTE,  # the zeroes behind them are no option
        "option": REMOTE,  # its first four bytes are flags nobody knows
        "request": REMOTE,
        "nothing": State.CLIENT_FLAGS,
        "secured": LOCAL,
    },
    State.OPTIONS: {
        "flags": REMOTE,
        "option": State.OPTIONS,
        "request": REMOTE,
        "nothing": State.OPTIONS,
        "secured": LOCAL,
    },
    State.TLS: {
        "flags": REMOTE,
        "option": REMOTE,
        "request": REMOTE,
        "nothing": State.TLS,
        "secured": State.OPTIONS,
    },
    State.TRANSMISSION: {
        "flags": REMOTE,
        "option": State.TRANSMISSION,  # sixteen bytes: half a request
        "request": State.TRANSMISSION,
        "nothing": State.TRANSMISSION,
        "secured": LOCAL,
    },
    State.LEAVING: {
        "flags": State.LEAVING,
        "option": State.LEAVING,
        "request": State.LEAVING,
        "nothing": State.LEAVING,
        "secured": LOCAL,
    },
    State.CLOSED: {
        "flags": LOCAL,
        "option": LOCAL,
        "request": LOCAL,
        "nothing": LOCAL,
        "secured": LOCAL,
    },
}


@pytest.mark.parametrize(("state", "what"), [*itertools.product(State, INPUTS)])
def test_every_state_has_an_outcome_for_every_input(state, what):
    peer = in_state(state)
    expected = OUTCOMES[state].get(what, State.CLOSED)
    if isinstance(expected, State):
        INPUTS[what](peer)
        assert peer.machine.state is expected
    else:
        with pytest.raises(expected):
            INPUTS[what](peer)
        assert peer.machine.state is (State.CLOSED if expected is REMOTE else state)


def test_the_table_reaches_every_state_and_every_state_can_end():
    reached = {State.CLIENT_FLAGS}
    while True:
        more = {after for (state, _), after in NEXT.items() if state in reached}
        if more <= reached:
            break
        reached |= more
    assert reached == set(State)
    for state in State:
        assert NEXT[state, Input.END] is NEXT[state, Input.BROKEN] is State.CLOSED


def test_nothing_is_wanted_where_nothing_may_come():
    wanting = {s for s in State if in_state(s).machine.wants_data}
    assert wanting == {State.CLIENT_FLAGS, State.OPTIONS, State.TRANSMISSION}


# -- handshake ----------------------------------------------------------------


def test_unknown_client_flags_end_the_connection():
    with pytest.raises(RemoteProtocolError, match="unknown flags"):
        Peer(flags=wire.CLIENT_FLAGS.pack(7))


def test_a_client_without_fixed_newstyle_may_only_name_an_export():
    with pytest.raises(RemoteProtocolError, match="fixed newstyle"):
        Peer(flags=wire.CLIENT_FLAGS.pack(2)).option(Option.LIST)
    peer = Peer(flags=wire.CLIENT_FLAGS.pack(2))
    events = peer.machine.receive_data(wire.option(Option.EXPORT_NAME, b"disk"))
    assert events == [Entered("disk")]


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_export_name_is_answered_by_size_flags_and_perhaps_124_zeroes(no_zeroes):
    peer = Peer(flags=wire.CLIENT_FLAGS.pack(3 if no_zeroes else 1))
    events = peer.machine.receive_data(wire.option(Option.EXPORT_NAME, b"disk"))
    assert events == [Entered("disk")]
    raw = joined(peer.machine.data_to_send())
    assert raw == struct.pack(">QH", SIZE, RO) + (b"" if no_zeroes else bytes(124))


@pytest.mark.parametrize("name", [b"other", b"\xff", b"n" * 5000])
def test_an_export_name_that_cant_be_granted_ends_the_connection(name):
    peer = Peer()
    with pytest.raises(RemoteProtocolError, match="EXPORT_NAME"):
        peer.machine.receive_data(wire.option(Option.EXPORT_NAME, name))


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_info_and_go_tell_size_flags_and_block_sizes(number):
    offer = Offer(SIZE, 512, 65536, 1 << 20, "of monday")
    peer = Peer({"a": OFFER, "b": offer})
    asked = struct.pack(">HHHH", 3, Info.NAME, Info.DESCRIPTION, 99)
    replies = peer.option(number, wire.named("b") + asked)
    assert replies == [
        (Reply.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, SIZE, RO)),
        (Reply.INFO, wire.INFO_BLOCK_SIZE.pack(3, 512, 65536, 1 << 20)),
        (Reply.INFO, b"\0\1b"),
        (Reply.INFO, b"\0\2of monday"),
        (Reply.ACK, b""),
    ]
    entered = number == Option.GO
    assert peer.events == ([Entered("b")] if entered else [])
    assert peer.machine.state is (State.TRANSMISSION if entered else State.OPTIONS)


def test_df_is_offered_with_structured_replies_only():
    for mode, df in (("simple", 0), ("structured", 128), ("extended", 128)):
        assert Peer().go(mode).machine.agreed.flags == RO | df


def test_the_empty_name_is_the_only_export_or_the_one_called_so():
    peer = Peer()
    assert peer.option(Option.GO, wire.named("") + b"\0\0")[-1][0] == Reply.ACK
    assert peer.events == [Entered("disk")]
    two = Peer({"a": OFFER, "b": OFFER})
    assert two.refusal(Option.GO, wire.named("") + b"\0\0") is Reply.ERR_UNKNOWN
    named = Peer({"a": OFFER, "": OFFER})
    named.option(Option.GO, wire.named("") + b"\0\0")
    assert named.events == [Entered("")]


def test_list_names_every_export():
    peer = Peer({"a": OFFER, "ü": OFFER})
    assert peer.option(Option.LIST) == [
        (Reply.SERVER, wire.named("a")),
        (Reply.SERVER, wire.named("ü")),
        (Reply.ACK, b""),
    ]


def test_abort_is_acknowledged_and_nothing_more_is_heard():
    peer = Peer()
    assert peer.option(Option.ABORT) == [(Reply.ACK, b"")]
    assert peer.events == [Goodbye()]
    assert peer.machine.state is State.LEAVING


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (99, b"", Reply.ERR_UNSUP),
        (4, b"", Reply.ERR_UNSUP),
        (Option.LIST, b"x", Reply.ERR_INVALID),
        (Option.STARTTLS, b"", Reply.ERR_POLICY),
        (Option.STARTTLS, b"x", Reply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", Reply.ERR_INVALID),
        (Option.EXTENDED_HEADERS, b"x", Reply.ERR_INVALID),
        (Option.GO, b"", Reply.ERR_INVALID),
        (Option.GO, wire.named("disk"), Reply.ERR_INVALID),
        (Option.GO, wire.named("disk") + b"\0\1", Reply.ERR_INVALID),
        (Option.GO, wire.named("disk") + b"\0\0!", Reply.ERR_INVALID),
        (Option.GO, struct.pack(">I", 1 << 31) + b"disk\0\0", Reply.ERR_INVALID),
        (Option.GO, wire.named("other") + b"\0\0", Reply.ERR_UNKNOWN),
        (Option.GO, wire.named("n" * 4097) + b"\0\0", Reply.ERR_TOO_BIG),
        (Option.GO, wire.named("disk") + b"\xff\xff", Reply.ERR_TOO_BIG),
        (Option.INFO, b"\0\0\0\1\xff\0\0", Reply.ERR_INVALID),
        (Option.SET_META_CONTEXT, wire.named("disk") + CONTEXT, Reply.ERR_INVALID),
        (Option.LIST_META_CONTEXT, b"\0\0\0", Reply.ERR_INVALID),
        (Option.LIST, b"x" * (MAX_OPTION + 1), Reply.ERR_TOO_BIG),
        (99, b"x" * (MAX_OPTION * 9), Reply.ERR_TOO_BIG),
    ],
)
def test_what_isnt_understood_is_refused_and_the_handshake_goes_on(number, data, reply):
    peer = Peer()
    assert peer.refusal(number, data) is reply
    peer.go()
    assert peer.events == [Entered("disk")]


def test_context_queries_are_refused_when_they_are_wrong_or_many():
    peer = Peer()
    peer.option(Option.STRUCTURED_REPLY)
    number, name = Option.SET_META_CONTEXT, wire.named("disk")
    many = struct.pack(">I", MAX_QUERIES + 1) + wire.named("x") * (MAX_QUERIES + 1)
    assert peer.refusal(number, name + many) is Reply.ERR_TOO_BIG
    assert peer.refusal(number, name + CONTEXT + b"!") is Reply.ERR_INVALID
    assert peer.refusal(number, name + b"\0\0\0\2") is Reply.ERR_INVALID
    assert peer.refusal(number, wire.named("x") + CONTEXT) is Reply.ERR_UNKNOWN


@pytest.mark.parametrize(
    ("queries", "listed", "granted"),
    [
        ([], True, False),
        (["base:allocation"], True, True),
        (["base:"], True, False),
        (["qemu:dirty-bitmap:x", "base:allocation"], True, True),
        (["qemu:"], False, False),
    ],
)
def test_contexts_are_listed_by_wildcard_and_granted_by_name(queries, listed, granted):
    peer = Peer()
    peer.option(Option.STRUCTURED_REPLY)
    data = wire.named("disk") + struct.pack(">I", len(queries))
    data += b"".join(map(wire.named, queries))
    for number, yes, identity in (
        (Option.LIST_META_CONTEXT, listed, 0),
        (Option.SET_META_CONTEXT, granted, 1),
    ):
        context = (Reply.META_CONTEXT, struct.pack(">I", identity) + CONTEXT[8:])
        assert peer.option(number, data) == [context] * yes + [(Reply.ACK, b"")]


def test_a_context_counts_for_the_export_it_was_asked_for_only():
    peer = Peer({"a": OFFER, "b": OFFER})
    peer.option(Option.STRUCTURED_REPLY)
    peer.option(Option.SET_META_CONTEXT, wire.named("a") + CONTEXT)
    peer.option(Option.GO, wire.named("b") + b"\0\0")
    assert peer.ask(Command.BLOCK_STATUS, 0, 512).error == Error.EINVAL


def test_a_failed_query_takes_back_what_was_granted():
    peer = Peer()
    peer.option(Option.STRUCTURED_REPLY)
    peer.option(Option.SET_META_CONTEXT, wire.named("disk") + CONTEXT)
    peer.refusal(Option.SET_META_CONTEXT, wire.named("no") + CONTEXT)
    peer.option(Option.GO, wire.named("disk") + b"\0\0")
    assert not peer.machine.agreed.allocation


def test_replies_are_agreed_once_and_extended_ones_include_structured():
    peer = Peer()
    peer.option(Option.STRUCTURED_REPLY)
    assert peer.refusal(Option.STRUCTURED_REPLY) is Reply.ERR_INVALID
    assert peer.option(Option.EXTENDED_HEADERS) == [(Reply.ACK, b"")]
    assert peer.refusal(Option.EXTENDED_HEADERS) is Reply.ERR_INVALID
    assert peer.refusal(Option.STRUCTURED_REPLY) is Reply.ERR_EXT_HEADER_REQD


@pytest.mark.parametrize(
    "number", sorted(set(Option) - {Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME})
)
def test_nothing_is_told_before_tls_where_tls_is_demanded(number):
    peer = Peer(tls=True)
    assert peer.refusal(number, wire.named("disk") + b"\0\0") is Reply.ERR_TLS_REQD


def test_naming_an_export_before_tls_ends_the_connection():
    with pytest.raises(RemoteProtocolError, match="before TLS"):
        Peer(tls=True).option(Option.EXPORT_NAME, b"disk")


def test_what_was_agreed_before_tls_counts_no_more():
    peer = Peer(tls=True)
    peer.option(Option.STARTTLS)
    peer.machine.tls_established()
    assert peer.refusal(Option.STARTTLS) is Reply.ERR_INVALID
    peer.machine.agreed.structured = True
    peer.machine.agreed.secure()
    assert not peer.machine.agreed.structured
    peer.go()


def test_bytes_behind_starttls_in_one_piece_are_refused():
    peer = Peer(tls=True)
    raw = wire.option(Option.STARTTLS) + wire.option(Option.STRUCTURED_REPLY)
    with pytest.raises(RemoteProtocolError, match="plain text"):
        peer.machine.receive_data(raw)


def test_options_without_end_end_the_connection():
    peer = Peer()
    for _ in range(MAX_OPTIONS):
        peer.option(Option.LIST)
    with pytest.raises(RemoteProtocolError, match="options"):
        peer.option(Option.LIST)


def test_an_option_of_any_length_costs_no_memory():
    peer = Peer()
    head = wire.OPTION_HEADER.pack(wire.IHAVEOPT, Option.INFO, MAX_DROPPED)
    peer.machine.receive_data(head)
    for _ in range(MAX_DROPPED >> 20):
        peer.machine.receive_data(bytes(1 << 20))
        assert len(peer.machine._buffer) == 0
    peer.machine.data_to_send()
    peer.go()
    with pytest.raises(RemoteProtocolError, match="bytes"):
        Peer().machine.receive_data(
            wire.OPTION_HEADER.pack(wire.IHAVEOPT, Option.INFO, MAX_DROPPED + 1)
        )


@pytest.mark.parametrize(
    "block", [(0, 4096, 4096), (3, 4096, 4096), (512, 256, 4096), (512, 512, 1000)]
)
def test_block_sizes_that_contradict_each_other_are_no_offer(block):
    with pytest.raises(LocalProtocolError):
        Offer(SIZE, *block)


# -- requests -----------------------------------------------------------------

MODES = ("simple", "structured", "extended")


@pytest.mark.parametrize("mode", MODES)
def test_a_read_comes_out_with_what_it_asks_for(mode):
    request = Peer().go(mode).ask(Command.READ, 4096, 512, cookie=1 << 63)
    assert (request.offset, request.length, request.error) == (4096, 512, 0)
    assert request.cookie == 1 << 63


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (Command.READ, 0, 0, 0, Error.EINVAL),
        (Command.READ, SIZE, 512, 0, Error.EINVAL),
        (Command.READ, SIZE - 511, 512, 0, Error.EINVAL),
        (Command.READ, (1 << 64) - 512, 1024, 0, Error.EINVAL),
        (Command.READ, 0, 512, CommandFlag.FUA, Error.EINVAL),
        (Command.READ, 0, 512, 1 << 15, Error.EINVAL),
        (Command.WRITE, 0, 512, 0, Error.EPERM),
        (Command.WRITE, SIZE, 512, CommandFlag.FUA, Error.EPERM),
        (Command.WRITE_ZEROES, 0, 1 << 20, 0, Error.EPERM),
        (Command.TRIM, 0, 512, 0, Error.EPERM),
        (Command.FLUSH, 0, 0, 0, Error.EINVAL),
        (Command.CACHE, 0, 512, 0, Error.EINVAL),
        (Command.BLOCK_STATUS, SIZE, 1, 0, Error.EINVAL),
        (Command.BLOCK_STATUS, 0, 512, CommandFlag.DF, Error.EINVAL),
        (77, 0, 512, 0, Error.EINVAL),
    ],
)
def test_what_may_not_be_is_refused_with_its_number_and_a_text(
    mode, command, offset, length, flags, error
):
    peer = Peer().go(mode)
    data = bytes(length) if command is Command.WRITE else b""
    request = peer.ask(command, offset, length, flags, data=data)
    assert request.error == error
    raw = joined(peer.machine.send_error(request))
    if mode == "simple":
        assert raw == wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, 7)
    else:
        ((flags, kind, cookie, payload),) = chunks(raw, mode == "extended")
        number, length = wire.CHUNK_ERROR_HEAD.unpack_from(payload)
        assert (flags, kind, cookie, number) == (1, Chunk.ERROR, 7, error)
        assert len(payload) == 6 + length > 12
    assert peer.ask(Command.READ, 0, 512).error == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_read_longer_than_the_maximum_is_refused(mode):
    peer = Peer({"disk": Offer(SIZE, maximum_block=65536)}).go(mode)
    assert peer.ask(Command.READ, 0, 65537).error == Error.EINVAL
    assert peer.ask(Command.READ, 0, 65536).error == 0
    df = peer.ask(Command.READ, 0, 65537, CommandFlag.DF)
    assert df.error == (Error.EINVAL if mode == "simple" else Error.EOVERFLOW)


def test_what_isnt_aligned_to_the_minimum_block_is_refused():
    peer = Peer({"disk": Offer(SIZE + 100, 512)}).go()
    for offset, length, error in (
        (0, 512, 0),
        (1, 511, Error.EINVAL),
        (0, 511, Error.EINVAL),
        (SIZE, 100, 0),
        (SIZE - 512, 612, 0),
    ):
        assert peer.ask(Command.READ, offset, length).error == error
        assert peer.ask(Command.BLOCK_STATUS, offset, length).error == error


def test_block_status_needs_a_context():
    for peer in (Peer().go("simple"), Peer().go(context=False)):
        assert peer.ask(Command.BLOCK_STATUS, 0, 512).error == Error.EINVAL


@pytest.mark.parametrize("mode", MODES)
def test_a_writes_payload_is_passed_over_in_any_split(mode):
    peer = Peer().go(mode)
    flag = CommandFlag.PAYLOAD_LEN if mode == "extended" else 0
    raw = peer.request(Command.WRITE, 0, 1000, flag, 1, b"w" * 1000)
    raw += peer.request(Command.READ, 0, 512, 0, 2)
    events = []
    for byte in raw:
        events += peer.machine.receive_data(bytes([byte]))
    assert [(e.cookie, e.error) for e in events] == [(1, Error.EPERM), (2, 0)]
    events = peer.machine.receive_data(raw)
    assert [(e.cookie, e.error) for e in events] == [(1, Error.EPERM), (2, 0)]


def test_a_payload_of_another_extended_command_is_passed_over():
    peer = Peer().go("extended")
    payload = peer.request(
        Command.BLOCK_STATUS, 0, 12, CommandFlag.PAYLOAD_LEN, data=bytes(12)
    )
    (event,) = peer.machine.receive_data(payload)
    assert event.error == Error.EINVAL
    assert peer.ask(Command.BLOCK_STATUS, 0, 512).error == 0


def test_a_payload_nobody_can_pass_over_ends_the_connection():
    peer = Peer().go("extended")
    with pytest.raises(RemoteProtocolError, match="WRITE"):
        peer.ask(Command.WRITE, 0, 1 << 40)


def test_a_wrong_magic_ends_the_connection_and_forgets_open_requests():
    peer = Peer().go()
    request = peer.ask(Command.READ, 0, 512)
    with pytest.raises(RemoteProtocolError, match="magic"):
        peer.machine.receive_data(bytes(28))
    with pytest.raises(LocalProtocolError):
        peer.machine.send_read(request, bytes(512))


def test_no_more_requests_are_open_than_agreed_and_the_rest_waits():
    peer = Peer(max_requests=3).go()
    raw = b"".join(peer.request(Command.READ, 0, 8, 0, n) for n in range(5))
    events = peer.machine.receive_data(raw)
    assert [e.cookie for e in events] == [0, 1, 2]
    assert not peer.machine.wants_data
    assert peer.machine.receive_data(b"") == []
    peer.machine.send_read(events[1], bytes(8))
    assert peer.machine.wants_data
    assert [e.cookie for e in peer.machine.receive_data(b"")] == [3]
    for event in (events[0], events[2]):
        peer.machine.send_error(event, 5)
    assert [e.cookie for e in peer.machine.receive_data(b"")] == [4]


def test_refused_requests_count_as_open_too():
    peer = Peer(max_requests=3).go()
    raw = peer.request(Command.TRIM, 0, 8) * 5
    raw += peer.request(Command.WRITE, 0, 8, data=bytes(8)) * 5
    assert len(peer.machine.receive_data(raw)) == 3
    assert peer.machine.open_requests == 3


def test_one_cookie_twice_is_the_clients_affair():
    peer = Peer().go()
    one, two = peer.ask(Command.READ, 0, 1), peer.ask(Command.READ, 1, 1)
    assert one.cookie == two.cookie
    for request in (two, one):
        assert chunks(joined(peer.machine.send_read(request, b"x")))


def test_what_is_open_at_a_goodbye_may_still_be_answered():
    peer = Peer().go()
    request = peer.ask(Command.READ, 0, 4)
    assert peer.ask(Command.DISC) == Goodbye()
    assert peer.machine.receive_data(peer.request(Command.READ, 0, 4)) == []
    assert peer.machine.open_requests == 1
    assert joined(peer.machine.send_read(request, b"data")).endswith(b"data")


# -- replies ------------------------------------------------------------------


def offset_data(offset, data):
    return Chunk.OFFSET_DATA, 7, struct.pack(">Q", offset) + data


def offset_hole(offset, length):
    return Chunk.OFFSET_HOLE, 7, struct.pack(">QI", offset, length)


@pytest.mark.parametrize("mode", MODES)
def test_a_buffer_leaves_as_it_is_behind_its_head(mode):
    peer = Peer().go(mode)
    data = memoryview(b"d" * 512)
    head, payload = peer.machine.send_read(peer.ask(Command.READ, 1024, 512), data)
    assert payload is data
    if mode == "simple":
        assert head == wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 7)
    else:
        found = chunks(bytes(head) + data, mode == "extended")
        assert found == [(1, *offset_data(1024, bytes(data)))]


BIG = 3 * MIN_HOLE
SCATTER = [b"aa", memoryview(b"bb"), Hole(BIG), b"c" * 10, Hole(10), Hole(6), b""]
FLAT = b"aabb" + bytes(BIG) + b"c" * 10 + bytes(16)


@pytest.mark.parametrize("extended", [False, True])
def test_holes_travel_as_numbers_and_short_ones_as_zeroes(extended):
    peer = Peer().go("extended" if extended else "structured")
    request = peer.ask(Command.READ, 100, len(FLAT))
    found = chunks(joined(peer.machine.send_read(request, SCATTER)), extended)
    assert found == [
        (0, *offset_data(100, b"aabb")),
        (0, *offset_hole(104, BIG)),
        (1, *offset_data(104 + BIG, b"c" * 10 + bytes(16))),
    ]


def test_an_unfragmented_read_is_one_chunk():
    peer = Peer().go()
    request = peer.ask(Command.READ, 100, len(FLAT), CommandFlag.DF)
    found = chunks(joined(peer.machine.send_read(request, SCATTER)))
    assert found == [(1, *offset_data(100, FLAT))]
    request = peer.ask(Command.READ, 0, BIG, CommandFlag.DF)
    found = chunks(joined(peer.machine.send_read(request, [Hole(BIG)])))
    assert found == [(1, *offset_hole(0, BIG))]


def test_a_simple_reply_has_its_holes_as_zeroes_all_from_one_buffer():
    peer = Peer().go("simple")
    request = peer.ask(Command.READ, 0, SIZE)
    buffers = peer.machine.send_read(request, [Hole(SIZE)])
    assert joined(buffers)[16:] == bytes(SIZE)
    assert len({id(b.obj) for b in buffers[1:]}) == 1


@pytest.mark.parametrize("data", [b"", b"x" * 511, [b"x"], [Hole(513)], []])
def test_an_answer_of_another_length_is_our_own_mistake(data):
    peer = Peer().go()
    request = peer.ask(Command.READ, 0, 512)
    with pytest.raises(LocalProtocolError, match="no answer"):
        peer.machine.send_read(request, data)
    peer.machine.send_error(request, Error.EIO)


def test_an_answer_that_nobody_waits_for_is_our_own_mistake():
    peer = Peer().go()
    read = peer.ask(Command.READ, 0, 4)
    status = peer.ask(Command.BLOCK_STATUS, 0, 4)
    for wrong in (
        lambda: peer.machine.send_status(read, [(4, 0)]),
        lambda: peer.machine.send_read(status, b"1234"),
        lambda: peer.machine.send_status(status, []),
        lambda: peer.machine.send_status(status, [(0, 0)]),
    ):
        with pytest.raises(LocalProtocolError, match="no answer"):
            wrong()
    peer.machine.send_read(read, b"1234")
    for again in (
        lambda: peer.machine.send_read(read, b"1234"),
        lambda: peer.machine.send_error(read, 5),
        lambda: peer.machine.send_error(Request(0, 0, 7, 0, 4), 5),
    ):
        with pytest.raises(LocalProtocolError, match="nobody waits"):
            again()


def status(peer, length, runs, flags=0):
    """What a client is told: [(length, flags)]."""
    request = peer.ask(Command.BLOCK_STATUS, 512, length, flags)
    extended = peer.machine.agreed.extended
    raw = joined(peer.machine.send_status(request, runs))
    ((done, kind, _, payload),) = chunks(raw, extended)
    assert done == 1
    if extended:
        assert kind is Chunk.BLOCK_STATUS_EXT
        assert payload[:8] == struct.pack(">II", 1, (len(payload) - 8) // 16)
        return list(struct.iter_unpack(">QQ", payload[8:]))
    assert kind is Chunk.BLOCK_STATUS
    assert payload[:4] == struct.pack(">I", 1)
    return list(struct.iter_unpack(">II", payload[4:]))


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_extents_are_joined_and_cut_to_what_was_asked(mode):
    peer = Peer().go(mode)
    runs = [(100, 0), (0, 3), (200, 0), (50, 3), (1 << 50, 0)]
    assert status(peer, 1000, runs) == [(300, 0), (50, 3), (650, 0)]
    assert status(peer, 320, runs) == [(300, 0), (20, 3)]
    assert status(peer, 1000, runs[:2]) == [(100, 0)]
    assert status(peer, 1000, runs, CommandFlag.REQ_ONE) == [(300, 0)]


def test_whoever_wants_one_extent_costs_no_walk_over_all():
    """QEMU asks so, up to 4 GiB at a time; a device may give a generator."""
    asked = []

    def runs():
        for number in range(1000):
            asked.append(number)
            yield 512, number % 2

    peer = Peer().go()
    assert status(peer, SIZE - 512, runs(), CommandFlag.REQ_ONE) == [(512, 0)]
    assert len(asked) == 2


def test_an_extended_client_is_told_of_more_than_four_gigabytes():
    peer = Peer({"disk": Offer(1 << 50)}).go("extended")
    assert status(peer, 1 << 49, [(1 << 49, 3)]) == [(1 << 49, 3)]


def test_an_errno_the_protocol_doesnt_know_is_told_as_eio():
    for number, told in ((5, 5), (2, 5), (1000, 5), (28, 28), (108, 108)):
        peer = Peer().go("simple")
        raw = peer.machine.send_error(peer.ask(Command.READ, 0, 4), number)
        assert wire.SIMPLE_REPLY.unpack(raw[0])[1] == told


def test_an_errors_text_is_cut_to_what_a_string_may_have():
    peer = Peer().go()
    request = peer.ask(Command.READ, 0, 4)
    ((_, _, _, payload),) = chunks(
        joined(peer.machine.send_error(request, 5, "x" * 9000))
    )
    assert payload == struct.pack(">IH", 5, 4096) + b"x" * 4096
