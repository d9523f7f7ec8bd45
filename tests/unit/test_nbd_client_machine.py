# SPDX-License-Identifier: Apache-2.0
"""The client machine, without a loop or a socket."""

from __future__ import annotations

import errno
import struct

import pytest

from pveplug.errors import (
    LocalProtocolError,
    NbdError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_client import Completed, NbdClientMachine, Phase, Ready
from pveplug.proto.nbd_handshake import StartTls
from pveplug.proto.nbd_wire import Chunk, Command, Option, Reply
from tests.support.nbd_model import FLAGS, Manner, ModelServer

SIZE = 1 << 20


def exchange(client, server, *, step=1 << 30):
    """Carry bytes both ways, ``step`` at a time, until nobody speaks."""
    events = []
    while True:
        for data in client.data_to_send():
            server.receive(bytes(data))
        sent = server.take_sent()
        if not sent:
            return events
        for at in range(0, len(sent), step):
            events += client.receive_data(sent[at : at + step])


def ready(manner=None, *, contexts=(), disk=None, step=1 << 30):
    server = ModelServer(disk if disk is not None else bytearray(SIZE), manner)
    client = NbdClientMachine("disk", contexts=contexts)
    events = exchange(client, server, step=step)
    assert isinstance(events[-1], Ready)
    return client, server


def greet(client, flags=3):
    client.receive_data(wire.GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, flags))
    client.data_to_send()


def answer(client, option, kind, payload=b""):
    head = (wire.OPTION_REPLY_MAGIC, option, kind, len(payload))
    return client.receive_data(wire.OPTION_REPLY.pack(*head) + payload)


VARIANTS = {
    "structured": Manner(),
    "extended": Manner(extended=True),
    "simple": Manner(structured=False),
    "no GO": Manner(go=False),
    "no GO, zeroes, simple": Manner(go=False, no_zeroes=False, structured=False),
    "no block sizes": Manner(block=None),
}


@pytest.mark.parametrize("step", [1, 7, 1 << 30])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_handshake_ends_ready(name, step):
    manner = VARIANTS[name]
    client, server = ready(manner, step=step)
    export = client.export
    assert export.size == SIZE
    assert export.flags == FLAGS
    assert export.extended == manner.extended
    assert export.structured == (manner.structured or manner.extended)
    assert export.maximum_block == 32 * 1024 * 1024
    buffer = bytearray(65536)
    server.disk[4096:8192] = b"x" * 4096
    client.read(0, memoryview(buffer))
    (done,) = exchange(client, server, step=step)
    assert done.error is None
    assert buffer == server.disk[:65536]


def test_granted_contexts_are_those_the_server_knows():
    manner = Manner(contexts={"base:allocation": [(SIZE, 3)]})
    client, _ = ready(manner, contexts=["base:allocation", "qemu:dirty-bitmap:b"])
    assert list(client.export.contexts.values()) == ["base:allocation"]


def test_tls_is_asked_for_first_and_the_handshake_goes_on_inside():
    client = NbdClientMachine("disk", tls=True)
    server = ModelServer(bytearray(SIZE), Manner(starttls=True))
    assert exchange(client, server) == [StartTls()]
    assert client.phase is Phase.TLS
    client.tls_established()
    assert isinstance(exchange(client, server)[-1], Ready)
    assert server.options[0] == Option.STARTTLS


def test_plain_bytes_after_starttls_are_refused():
    client = NbdClientMachine("disk", tls=True)
    greet(client)
    head = (wire.OPTION_REPLY_MAGIC, Option.STARTTLS, Reply.ACK, 0)
    injected = wire.OPTION_REPLY.pack(*head) + b"injected"
    with pytest.raises(RemoteProtocolError, match="before TLS"):
        client.receive_data(injected)


def test_a_server_without_tls_is_refused_not_talked_to_in_plain_text():
    client = NbdClientMachine("disk", tls=True)
    greet(client)
    with pytest.raises(NbdError, match="TLS"):
        answer(client, Option.STARTTLS, Reply.ERR_UNSUP)
    assert client.data_to_send() == []


def test_a_server_that_demands_tls_is_named_so():
    client = NbdClientMachine("disk")
    greet(client)
    with pytest.raises(NbdError, match="demands TLS"):
        answer(client, Option.EXTENDED_HEADERS, Reply.ERR_TLS_REQD)


def test_unknown_export_is_refused_with_the_servers_words():
    client = NbdClientMachine("disk9")
    greet(client)
    answer(client, Option.EXTENDED_HEADERS, Reply.ERR_UNSUP)
    answer(client, Option.STRUCTURED_REPLY, Reply.ACK)
    with pytest.raises(NbdError, match=r"'disk9' refused: ERR_UNKNOWN \(no such\)"):
        answer(client, Option.GO, Reply.ERR_UNKNOWN, b"no such")


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b"HTTP/1.1 400 Bad R", "not an NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + b"\0\0", "oldstyle"),
        (b"NBDMAGIC" + b"IHAVEOPx" + b"\0\3", "magic"),
        (b"NBDMAGICIHAVEOPT\0\0", "fixed newstyle"),
    ],
)
def test_a_wrong_greeting_ends_the_connection(greeting, says):
    client = NbdClientMachine()
    with pytest.raises(RemoteProtocolError, match=says):
        client.receive_data(greeting)
    assert client.phase is Phase.CLOSED
    with pytest.raises(LocalProtocolError):
        client.get_buffer()


def test_go_without_a_size_and_contradicting_blocks_are_refused():
    for payload in (None, struct.pack(">HIII", 3, 512, 256, 4096)):
        client = NbdClientMachine()
        greet(client)
        answer(client, Option.EXTENDED_HEADERS, Reply.ERR_UNSUP)
        answer(client, Option.STRUCTURED_REPLY, Reply.ACK)
        with pytest.raises(RemoteProtocolError):  # noqa: PT012
            if payload is not None:
                answer(client, Option.GO, Reply.INFO, payload)
            answer(client, Option.GO, Reply.ACK)


def test_an_oversize_option_reply_is_refused_before_it_is_received():
    client = NbdClientMachine()
    greet(client)
    head = (wire.OPTION_REPLY_MAGIC, Option.EXTENDED_HEADERS, Reply.ERR_UNSUP, 1 << 30)
    with pytest.raises(RemoteProtocolError, match="1073741824"):
        client.receive_data(wire.OPTION_REPLY.pack(*head))


def test_an_export_that_hangs_up_is_a_transport_error():
    client = NbdClientMachine()
    greet(client)
    with pytest.raises(TransportError, match="during the handshake"):
        client.receive_eof()


def structured(cookie, kind, payload=b"", *, done=True, size=None):
    length = len(payload) if size is None else size
    head = (wire.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, length)
    return wire.STRUCTURED_REPLY.pack(*head) + payload


def data_chunk(cookie, offset, data, *, done=True):
    payload = wire.CHUNK_OFFSET.pack(offset) + data
    return structured(cookie, Chunk.OFFSET_DATA, payload, done=done)


def reading(offset=4096, length=4096):
    client, _ = ready()
    buffer = bytearray(b"?" * length)
    cookie = client.read(offset, memoryview(buffer))
    client.data_to_send()
    return client, cookie, buffer


@pytest.mark.parametrize(
    "reply",
    [
        data_chunk(1, 0, b"a" * 4096),  # before the request
        data_chunk(1, 4097, b"a" * 4096),  # reaches behind it
        data_chunk(1, 4096, b"a" * 4095),  # leaves out a byte
        data_chunk(1, 4096, b"a" * 8, done=False) + data_chunk(1, 4100, b"b" * 4092),
        structured(1, Chunk.NONE),  # nothing at all
        structured(1, Chunk.NONE, done=False),
        structured(1, Chunk.OFFSET_DATA, bytes(8)),  # an empty chunk
        structured(1, Chunk.OFFSET_DATA, size=1 << 31),
        structured(1, Chunk.OFFSET_HOLE, wire.CHUNK_HOLE.pack(4096, 1 << 31)),
        structured(1, Chunk.OFFSET_HOLE, wire.CHUNK_HOLE.pack(4096, 0)),
        structured(1, Chunk.OFFSET_HOLE, bytes(13)),
        structured(1, Chunk.BLOCK_STATUS, bytes(12)),
        structured(1, 77, b""),
        structured(1, Chunk.ERROR, struct.pack(">IH", 0, 0)),
        structured(1, Chunk.ERROR, struct.pack(">IH", 5, 9) + b"short"),
        structured(1, Chunk.ERROR, size=1 << 20),
        structured(1, Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 1)),
        structured(9, Chunk.NONE),  # a cookie nobody gave
        b"\0" * 20,
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 1),  # simple to a READ
        wire.EXTENDED_REPLY.pack(wire.EXTENDED_REPLY_MAGIC, 1, 0, 1, 4096, 0),
    ],
)
def test_a_reply_that_breaks_the_rules_ends_the_connection(reply):
    client, _, _ = reading()
    with pytest.raises(RemoteProtocolError):
        client.receive_data(reply)
    assert client.phase is Phase.CLOSED


def test_chunks_in_any_order_fill_the_buffer_and_holes_are_zeroes():
    client, cookie, buffer = reading(0, 4096)
    hole = structured(
        1, Chunk.OFFSET_HOLE, wire.CHUNK_HOLE.pack(1024, 1024), done=False
    )
    wireful = (
        data_chunk(1, 2048, b"c" * 2048, done=False)
        + hole
        + data_chunk(1, 0, b"a" * 1024, done=False)
        + structured(1, Chunk.NONE)
    )
    assert client.receive_data(wireful) == [Completed(cookie, None, None)]
    assert buffer == b"a" * 1024 + bytes(1024) + b"c" * 2048


def test_an_error_ends_only_its_request():
    client, cookie, _ = reading()
    other = bytearray(16)
    second = client.read(0, memoryview(other))
    words = b"medium  error\n"
    payload = struct.pack(">IH", 5, len(words)) + words + struct.pack(">Q", 5000)
    (failed,) = client.receive_data(structured(1, Chunk.ERROR_OFFSET, payload))
    assert failed.cookie == cookie
    assert failed.error.errno == errno.EIO
    assert "READ of 4096 bytes at 4096: EIO at 5000 (medium error)" in str(failed.error)
    (good,) = client.receive_data(data_chunk(second, 0, b"0123456789abcdef"))
    assert good == Completed(second, None, None)
    assert other == b"0123456789abcdef"


def test_an_error_chunk_may_come_before_the_end_of_the_reply():
    client, cookie, _ = reading()
    error = structured(1, Chunk.ERROR, struct.pack(">IH", 28, 0), done=False)
    assert client.receive_data(error) == []
    (done,) = client.receive_data(structured(1, Chunk.NONE))
    assert (done.cookie, done.error.errno) == (cookie, errno.ENOSPC)


@pytest.mark.parametrize("arrived", [0, 20, 28, 29, 1000, 4000, 4123])
def test_an_abandoned_read_leaves_its_buffer_alone(arrived):
    client, cookie, buffer = reading()
    reply = data_chunk(1, 4096, b"late" * 1024)
    client.receive_data(reply[:arrived])
    client.abandon(cookie)
    buffer[:] = b"!" * len(buffer)
    events = client.receive_data(reply[arrived:])
    assert buffer == b"!" * len(buffer)
    assert events == [Completed(cookie, None, None)]
    again = bytearray(4)
    client.read(0, memoryview(again))
    client.receive_data(data_chunk(2, 0, b"next"))
    assert again == b"next"


def test_payload_bytes_are_received_in_place():
    client, _, buffer = reading(0, 4096)
    head = wire.STRUCTURED_REPLY.pack(wire.STRUCTURED_REPLY_MAGIC, 1, 1, 1, 4104)
    client.receive_data(head + bytes(8))
    target = client.get_buffer()
    assert target.obj is buffer
    assert len(target) == 4096


def status_reply(runs, number=101, *, wide=False, count=None):
    if wide:
        raw = struct.pack(">II", number, len(runs) if count is None else count)
        return raw + b"".join(struct.pack(">QQ", *run) for run in runs)
    return struct.pack(">I", number) + b"".join(struct.pack(">II", *r) for r in runs)


@pytest.mark.parametrize(
    ("runs", "legal"),
    [
        ([(65536, 0)], True),
        ([(512, 0)], True),  # shorter than asked
        ([(4096, 3), (1 << 30, 0)], True),  # the last one longer than asked
        ([(65536, 3), (512, 0)], False),  # one that begins behind the request
        ([(0, 3), (512, 0)], False),
        ([], False),
    ],
)
def test_block_status_lengths_are_checked(runs, legal):
    manner = Manner(contexts={"base:allocation": [(SIZE, 0)]})
    client, _ = ready(manner, contexts=["base:allocation"])
    client.block_status(0, 65536)
    reply = structured(1, Chunk.BLOCK_STATUS, status_reply(runs))
    if legal:
        (done,) = client.receive_data(reply)
        assert list(done.status["base:allocation"]) == runs
    else:
        with pytest.raises(RemoteProtocolError):
            client.receive_data(reply)


@pytest.mark.parametrize(
    "payload",
    [
        status_reply([(4096, 0)], number=7),  # a context nobody was granted
        status_reply([(4096, 0)]) + b"x",
        status_reply([(4096, 0)], wide=True),  # 64 bits without extended headers
    ],
)
def test_a_malformed_block_status_is_refused(payload):
    manner = Manner(contexts={"base:allocation": [(SIZE, 0)]})
    client, _ = ready(manner, contexts=["base:allocation"])
    client.block_status(0, 65536)
    wide = payload == status_reply([(4096, 0)], wide=True)
    kind = Chunk.BLOCK_STATUS_EXT if wide else Chunk.BLOCK_STATUS
    with pytest.raises(RemoteProtocolError):
        client.receive_data(structured(1, kind, payload))


def test_a_context_that_is_left_out_is_missed():
    runs = [(SIZE, 0)]
    manner = Manner(contexts={"base:allocation": runs, "qemu:dirty-bitmap:b": runs})
    client, _ = ready(manner, contexts=["base:allocation", "qemu:dirty-bitmap:b"])
    client.block_status(0, 65536)
    reply = structured(1, Chunk.BLOCK_STATUS, status_reply([(65536, 0)]))
    with pytest.raises(RemoteProtocolError, match="lacks a context"):
        client.receive_data(reply)


CHOOSES = wire.TransmissionFlag.BLOCK_STATUS_PAYLOAD
TWO = {
    "base:allocation": [(4096, 0), (SIZE - 4096, 3)],
    "qemu:dirty-bitmap:b": [(8192, 1), (SIZE - 8192, 0)],
}


@pytest.mark.parametrize("only", [None, *TWO])
def test_one_of_several_contexts_can_be_asked_for(only):
    manner = Manner(extended=True, flags=FLAGS | CHOOSES, contexts=TWO)
    client, server = ready(manner, contexts=[*TWO])
    client.block_status(4096, 65536, only=only)
    client.read(0, memoryview(bytearray(512)))
    status, read = exchange(client, server)
    assert {name: list(runs) for name, runs in status.status.items()} == {
        name: server.runs(name, 4096, 65536) for name in ([only] if only else TWO)
    }
    assert read.error is None


def test_a_context_is_chosen_only_where_that_is_offered_and_granted():
    client, _ = ready(Manner(extended=True, contexts=TWO), contexts=[*TWO])
    with pytest.raises(LocalProtocolError, match="choosing a context"):
        client.block_status(0, 512, only="base:allocation")
    manner = Manner(extended=True, flags=FLAGS | CHOOSES, contexts=TWO)
    client, _ = ready(manner, contexts=["base:allocation"])
    with pytest.raises(LocalProtocolError, match="granted no context qemu"):
        client.block_status(0, 512, only="qemu:dirty-bitmap:b")


def test_a_context_nobody_chose_is_refused():
    manner = Manner(extended=True, flags=FLAGS | CHOOSES, contexts=TWO)
    client, _ = ready(manner, contexts=[*TWO])
    client.block_status(0, 65536, only="qemu:dirty-bitmap:b")
    payload = status_reply([(65536, 0)], number=101, wide=True)
    head = (wire.EXTENDED_REPLY_MAGIC, 1, Chunk.BLOCK_STATUS_EXT, 1, 0)
    with pytest.raises(RemoteProtocolError, match="malformed"):
        client.receive_data(wire.EXTENDED_REPLY.pack(*head, len(payload)) + payload)


def test_extended_headers_carry_lengths_above_4_gib():
    huge = 1 << 40
    client = NbdClientMachine(contexts=["base:allocation"])
    greet(client)
    answer(client, Option.EXTENDED_HEADERS, Reply.ACK)
    context = struct.pack(">I", 5) + b"base:allocation"
    answer(client, Option.SET_META_CONTEXT, Reply.META_CONTEXT, context)
    answer(client, Option.SET_META_CONTEXT, Reply.ACK)
    export = wire.INFO_EXPORT.pack(0, huge, FLAGS)
    answer(client, Option.GO, Reply.INFO, export)
    answer(client, Option.GO, Reply.ACK)
    client.data_to_send()
    cookie = client.block_status(0, huge)
    (request,) = client.data_to_send()
    assert wire.EXTENDED_REQUEST.unpack(request)[5] == huge
    payload = status_reply([(huge - 512, 3), (512, 1 << 40)], number=5, wide=True)
    head = (wire.EXTENDED_REPLY_MAGIC, 1, Chunk.BLOCK_STATUS_EXT, cookie, 0)
    reply = wire.EXTENDED_REPLY.pack(*head, len(payload)) + payload
    (done,) = client.receive_data(reply)
    assert list(done.status["base:allocation"]) == [(huge - 512, 3), (512, 1 << 40)]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda c: c.read(SIZE - 1, memoryview(bytearray(2))),
        lambda c: c.read(0, memoryview(b"")),
        lambda c: c.read(-1, memoryview(bytearray(2))),
        lambda c: c.write(0, memoryview(bytes(1 << 26))),
        lambda c: c.block_status(0, 512),  # no context was granted
        lambda c: c.write_zeroes(0, 512, fast=True),  # not offered
        lambda c: c.tls_established(),
    ],
)
def test_what_the_protocol_forbids_is_never_sent(misuse):
    client, _ = ready()
    with pytest.raises(LocalProtocolError):
        misuse(client)
    assert client.data_to_send() == []
    assert client.phase is Phase.TRANSMISSION


def test_writes_to_a_read_only_export_are_never_sent():
    client, _ = ready(Manner(flags=FLAGS | wire.TransmissionFlag.READ_ONLY))
    with pytest.raises(LocalProtocolError, match="read-only"):
        client.write(0, memoryview(b"x"))


def test_unaligned_requests_are_never_sent():
    client, _ = ready(Manner(block=(4096, 4096, 65536)))
    with pytest.raises(LocalProtocolError, match="aligned"):
        client.read(512, memoryview(bytearray(4096)))


def test_goodbye_is_the_last_word():
    client, server = ready()
    client.disconnect()
    exchange(client, server)
    assert server.seen[-1].command is Command.DISC
    with pytest.raises(LocalProtocolError):
        client.flush()
    client.receive_eof()
