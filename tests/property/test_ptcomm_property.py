# SPDX-License-Identifier: Apache-2.0
"""What is true of PTCOMM for all inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import RemoteProtocolError
from pveplug.proto import ptcomm
from pveplug.proto.ptcomm import FROM_BACKEND, Packet, PtcommConnection, Status
from pveplug.proto.ptcomm_words import Hello, Stat, Times, parse_command

numbers = st.integers(0, (1 << 63) - 1)
texts = st.binary(max_size=100).map(lambda data: data + b"\n")
packets = st.one_of(
    st.builds(Packet, st.just(Status.DATA), st.binary(max_size=3000)),
    st.builds(
        Packet,
        st.sampled_from(
            sorted(
                FROM_BACKEND - {Status.DATA, Status.END_OF_DATA, Status.TERMINATE},
                key=lambda status: status.value,
            )
        ),
        texts,
    ),
    st.just(Packet(Status.END_OF_DATA)),
)


def wire_of(sent: list[Packet]) -> bytes:
    return b"".join(
        ptcomm.header(packet.status, len(packet.data)) + bytes(packet.data)
        for packet in sent
    )


def is_one_line(error: RemoteProtocolError) -> bool:
    return "expected" in str(error) and "\n" not in str(error)


@given(st.lists(packets), st.data())
def test_any_split_gives_the_same_packets(sent, data):
    wire = wire_of(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    peer, got = PtcommConnection(FROM_BACKEND), []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += peer.receive_data(wire[start:end])
    assert got == sent


@given(st.lists(packets, max_size=5), st.data())
def test_received_in_place_with_lookahead_the_packets_are_the_same(sent, data):
    wire = memoryview(wire_of(sent))
    peer, got = PtcommConnection(FROM_BACKEND), []
    while wire or len(got) < len(sent):
        packet = None
        if data.draw(st.booleans()) or not wire:
            packet = peer.next_packet()
        # More arrives while the packet is looked at.
        space = peer.get_buffer()
        count = min(len(space), len(wire), data.draw(st.integers(0, 2000)))
        space[:count] = wire[:count]
        peer.buffer_updated(count)
        wire = wire[count:]
        if packet is not None:
            got.append(Packet(packet.status, bytes(packet.data)))
    assert got == sent


def scattered(buffers: list[memoryview], data: memoryview) -> int:
    """Do what readv does; return how much there was room for."""
    at = 0
    for buffer in buffers:
        part = data[at : at + len(buffer)]
        buffer[: len(part)] = part
        at += len(part)
    return at


def joined(sent: list[Packet]) -> list[Packet]:
    """Return packets with the data of neighbours in one: nothing tells them apart."""
    out: list[Packet] = []
    for packet in sent:
        if packet.status is Status.DATA and out and out[-1].status is Status.DATA:
            before = bytes(out.pop().data)
            out.append(Packet(Status.DATA, before + bytes(packet.data)))
        else:
            out.append(Packet(packet.status, bytes(packet.data)))
    return out


repeated = st.builds(
    lambda first, length, count: [
        Packet(Status.DATA, bytes([(first + number) % 251]) * length)
        for number in range(count)
    ],
    st.integers(0, 250),
    st.sampled_from([1, 4095, 4096, 4100, 65_536, 262_144, 300_000]),
    st.integers(1, 9),
)
restores = st.lists(st.one_of(repeated, st.lists(packets, max_size=3)), max_size=6).map(
    lambda parts: [packet for part in parts for packet in part]
)


@given(restores, st.data())
def test_packets_of_a_length_received_beside_their_headers_are_the_same(sent, data):
    wire, taken = memoryview(wire_of(sent)), 0
    peer, got = PtcommConnection(FROM_BACKEND), []
    amounts = st.one_of(st.sampled_from([8, 65_536, 1 << 20]), st.integers(1, 200_000))
    while True:
        packet = None
        if taken == len(wire) or data.draw(st.booleans()):
            packet = peer.next_packet()
            if packet is None and taken == len(wire):
                break
        # More arrives while the packet is looked at.
        buffers = peer.get_buffers()
        if taken < len(wire) and buffers:
            some = wire[taken:][: data.draw(amounts)]
            count = scattered(buffers, some)
            assert count
            peer.buffers_updated(count)
            taken += count
        if packet is not None:
            got.append(Packet(packet.status, bytes(packet.data)))
    assert joined(got) == joined(sent)


@given(st.lists(packets, max_size=3), st.binary(max_size=100), st.booleans())
def test_garbage_gives_packets_or_a_remote_protocol_error(sent, garbage, end):
    peer = PtcommConnection(FROM_BACKEND)
    try:
        for packet in peer.receive_data(wire_of(sent) + garbage):
            assert packet.status in FROM_BACKEND
            assert str(packet)
        if end:
            peer.receive_eof()
    except RemoteProtocolError as error:
        assert is_one_line(error)  # noqa: PT017  either outcome is fine


@given(st.lists(packets, min_size=1), st.data())
def test_a_stream_cut_anywhere_is_an_early_end(sent, data):
    wire = wire_of(sent)
    peer = PtcommConnection(FROM_BACKEND)
    peer.receive_data(wire[: data.draw(st.integers(0, len(wire)))])
    with pytest.raises(RemoteProtocolError, match="pipe was closed"):
        peer.receive_eof()


@given(st.text())
def test_any_message_is_whole_lines_within_bounds(text):
    got = PtcommConnection(FROM_BACKEND).receive_data(
        b"".join(ptcomm.message(Status.INFO, text))
    )
    for packet in got:
        payload = bytes(packet.data)
        assert 1 < len(payload) <= ptcomm.MAX_MESSAGE
        assert payload.endswith(b"\n")
        assert payload.count(b"\n") == 1
        assert not any(byte < 32 or byte == 127 for byte in payload[:-1])


@given(st.lists(st.binary(max_size=700_000), max_size=4))
def test_data_frames_carry_the_bytes(buffers):
    got = PtcommConnection(FROM_BACKEND).receive_data(
        b"".join(ptcomm.data_frames(buffers))
    )
    assert b"".join(bytes(packet.data) for packet in got) == b"".join(buffers)
    assert all(0 < len(packet.data) <= ptcomm.MAX_DATA_FRAME for packet in got)


@given(st.builds(Stat, numbers, st.sampled_from("FEDSL"), numbers, numbers))
def test_attributes_come_back(stat):
    assert Stat.parse(parse_command(stat.encode()).value or "") == stat


@given(st.builds(Times, numbers, numbers, numbers))
def test_times_come_back(times):
    assert Times.parse(parse_command(times.encode()).value or "") == times


@given(st.text(max_size=60))
def test_any_text_is_understood_or_a_remote_protocol_error(text):
    for parse in (Stat.parse, Times.parse, Hello.parse, parse_command):
        try:
            parse(text)
        except RemoteProtocolError as error:
            assert is_one_line(error)  # noqa: PT017  either outcome is fine
