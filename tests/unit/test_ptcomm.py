# SPDX-License-Identifier: Apache-2.0
"""PTCOMM's framing and vocabulary, without pipes."""

from __future__ import annotations

import pytest

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto import ptcomm
from pveplug.proto.buffer import ReceiveBuffer
from pveplug.proto.ptcomm import (
    FROM_BACKEND,
    MAX_DATA_FRAME,
    MAX_MESSAGE,
    Packet,
    PtcommConnection,
    Status,
)
from pveplug.proto.ptcomm_words import (
    Command,
    Hello,
    JobInfo,
    Stat,
    Times,
    parse_command,
    plugin_string,
)


def test_packets_arrive_as_they_were_sent():
    got = PtcommConnection().receive_data(b"C000004\nJob\nD000003\nabcF000000\n")
    assert got == [
        Packet(Status.COMMAND, b"Job\n"),
        Packet(Status.DATA, b"abc"),
        Packet(Status.END_OF_DATA),
    ]
    assert got[0].text == "Job"


def test_the_largest_packet_passes_whole_and_in_place():
    peer = PtcommConnection()
    wire = memoryview(b"D999999\n" + b"x" * 999_999 + b"F000000\n")
    while wire:
        space = peer.get_buffer()
        assert space
        count = min(len(space), len(wire), 65_536)
        space[:count] = wire[:count]
        peer.buffer_updated(count)
        wire = wire[count:]
        if packet := peer.next_packet():
            assert packet.status is Status.DATA
            assert isinstance(packet.data, memoryview)
            assert packet.data == b"x" * 999_999
    assert peer.next_packet() == Packet(Status.END_OF_DATA)


def test_data_stays_intact_while_more_is_received():
    peer = PtcommConnection()
    first = b"D065536\n" + b"a" * 65_536
    peer.get_buffer()[: len(first)] = first
    peer.buffer_updated(len(first))
    packet = peer.next_packet()
    assert packet is not None
    while space := peer.get_buffer():  # as a reader callback would
        space[:] = b"D" * len(space)
        peer.buffer_updated(len(space))
    assert packet.data == b"a" * 65_536


def readv(peer: PtcommConnection, wire: bytes) -> bytes:
    """Receive what there is room for; return the rest."""
    before = len(wire)
    for buffer in peer.get_buffers():
        part, wire = wire[: len(buffer)], wire[len(buffer) :]
        buffer[: len(part)] = part
    peer.buffers_updated(before - len(wire))
    return wire


def test_data_packets_of_one_length_come_as_one_in_place():
    peer = PtcommConnection()
    packets = [b"D065536\n" + bytes([number]) * 65_536 for number in range(6)]
    assert readv(peer, packets[0]) == b""
    first = peer.next_packet()
    assert first is not None
    assert readv(peer, b"".join(packets[1:]) + b"F000000\n") == b""
    packet = peer.next_packet()
    assert packet is not None
    assert isinstance(packet.data, memoryview)
    assert packet.data == b"".join(part[8:] for part in packets[1:])
    assert first.data == bytes(65_536)
    assert peer.next_packet() == Packet(Status.END_OF_DATA)
    assert peer.next_packet() is None


def test_a_header_other_than_foreseen_is_put_back_before_what_follows_it():
    peer = PtcommConnection()
    assert readv(peer, b"D004096\n" + b"a" * 4096) == b""
    assert peer.next_packet() == Packet(Status.DATA, b"a" * 4096)
    follows = b"D004096\n" + b"b" * 4096 + b"C000013\nOFFSET:65536\n"
    assert readv(peer, follows + b"D004096\n" + b"c" * 4096 + b"D00") == b""
    packets = []
    while packet := peer.next_packet():
        packets.append(Packet(packet.status, bytes(packet.data)))
    assert packets == [
        Packet(Status.DATA, b"b" * 4096),
        Packet(Status.COMMAND, b"OFFSET:65536\n"),
        Packet(Status.DATA, b"c" * 4096),
    ]
    assert readv(peer, b"4096\n" + b"d" * 4096) == b""
    assert peer.next_packet() == Packet(Status.DATA, b"d" * 4096)


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"X", "one of CDEFT, got 'X'"),
        (b"I000003\nhi\n", "one of CDEFT, got 'I000003"),
        (b"C00a", "six digits and a newline, got 'C00a'"),
        (b"C-00001\n", "six digits"),
        (b"C\xb2\xb2\xb2\xb2\xb2\xb2\n", "six digits"),
        (b"C0000001", "six digits and a newline, got 'C0000001'"),
        (b"F000001\n", "expected F without payload"),
        (b"T000001\n", "expected T without payload"),
        (b"C999999\n", "at most 65536 bytes of text in a C packet, got 999999"),
        (b"T000000\nC", "expected nothing after T, got 'C'"),
        (b"\x7fELF" + bytes(500), "(504 bytes)"),
    ],
)
def test_garbage_is_named(wire, expected):
    peer = PtcommConnection()
    with pytest.raises(RemoteProtocolError) as caught:
        peer.receive_data(wire)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(RemoteProtocolError, match=r"^PTCOMM: "):
        peer.next_packet()


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"", "expected a packet, the pipe was closed"),
        (b"C0000", "expected a header of 8 bytes, the pipe was closed after 'C0000'"),
        (b"D000100\nabc", "expected 100 bytes of a D packet, .* closed after 3"),
        (b"F000000\n", "expected a packet"),
    ],
)
def test_early_end_of_file_says_what_was_expected(wire, expected):
    peer = PtcommConnection()
    peer.receive_data(wire)
    with pytest.raises(RemoteProtocolError, match=expected):
        peer.receive_eof()


def test_end_of_file_after_terminate_is_fine():
    peer = PtcommConnection()
    peer.receive_data(b"T000000\n")
    peer.receive_eof()
    assert peer.finished


def test_messages_become_one_clean_line_each():
    text = "one\ttab\x1b[31m\r\n\n\x00two\x07\n" + "x" * 5000 + "é" * 3000
    packets = ptcomm.message(Status.WARNING, text)
    got = PtcommConnection(FROM_BACKEND).receive_data(b"".join(packets))
    assert [packet.text for packet in got[:2]] == ["one tab[31m", "two"]
    assert len(got) == 3
    assert all(packet.status is Status.WARNING for packet in got)
    assert len(got[2].data) <= MAX_MESSAGE
    assert "…" in got[2].text
    assert all(bytes(packet.data).endswith(b"\n") for packet in got)


def test_a_flood_of_lines_is_counted():
    packets = ptcomm.message(Status.INFO, "\n".join(map(str, range(100))))
    assert len(packets) == ptcomm.MAX_MESSAGE_LINES
    assert packets[-1].endswith(b"(71 more lines left out)\n")


@pytest.mark.parametrize("length", [1493, 1494, 1495, 1498, 1499, 1500, 1501])
def test_no_message_is_too_long(length):
    for char in ("x", "é", "𝄞"):
        (packet,) = ptcomm.message(Status.INFO, char * (length // len(char.encode())))
        assert len(packet) <= 8 + MAX_MESSAGE


def test_an_empty_message_is_none():
    assert ptcomm.message(Status.INFO, "\n \x00\n") == []


def test_data_frames_are_views_within_the_limit():
    one, two = bytearray(b"a" * 300_000), bytearray(b"b" * 300_000)
    frames = ptcomm.data_frames([one, b"", two])
    wire = b"".join(frames)
    got = PtcommConnection(FROM_BACKEND).receive_data(wire)
    assert b"".join(bytes(packet.data) for packet in got) == bytes(one + two)
    assert [len(packet.data) for packet in got] == [
        MAX_DATA_FRAME,
        MAX_DATA_FRAME,
        600_000 - 2 * MAX_DATA_FRAME,
    ]
    one[0:1] = b"z"
    assert any(bytes(frame[:1]) == b"z" for frame in frames)
    assert ptcomm.data_frames([b""]) == []


@pytest.mark.parametrize("text", ["", "a\nb", "a\rb", "a\0b", "x" * 70_000])
def test_what_is_no_command_is_refused(text):
    with pytest.raises(LocalProtocolError):
        ptcomm.command(text)


def test_a_header_has_six_digits():
    assert ptcomm.header(Status.DATA, 999_999) == b"D999999\n"
    with pytest.raises(LocalProtocolError):
        ptcomm.header(Status.DATA, 1_000_000)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("FNAME:/@proxmox/a=b:c", "FNAME", "/@proxmox/a=b:c"),
        (
            "Plugin=podheitor-proxmox: vmid=100",
            "Plugin",
            "podheitor-proxmox: vmid=100",
        ),
        ("FINISH", "FINISH", None),
        ("Where=", "Where", ""),
    ],
)
def test_commands_are_split_at_the_first_separator(text, key, value):
    assert parse_command(text) == Command(key, value)


@pytest.mark.parametrize("text", ["", ":x", "=1", "a b", "é:1"])
def test_other_lines_are_no_commands(text):
    with pytest.raises(RemoteProtocolError, match="expected a command"):
        parse_command(text)


def test_stat_and_times_come_back():
    stat = Stat(1 << 40, mode=0o100600, uid=3, gid=4, links=2)
    assert stat.encode() == f"STAT:F {1 << 40} 3 4 100600 2"
    assert Stat.parse(stat.encode().partition(":")[2]) == stat
    assert Stat.parse("F 5 0 0 100640 1 0").size == 5
    times = Times(1, 2, 3)
    assert Times.parse(times.encode().partition(":")[2]) == times
    assert Times.parse("-5 7 8") == Times(0, 7, 8)


@pytest.mark.parametrize(
    "value", ["", "F 1 2 3", "X 1 0 0 100640 1", "F -1 0 0 644 1", "F 1 0 0 948 1"]
)
def test_other_attributes_are_refused(value):
    with pytest.raises(RemoteProtocolError):
        Stat.parse(value)


@pytest.mark.parametrize("value", ["", "1 2", "1 2 x", "9999999999999999999 0 0"])
def test_other_times_are_refused(value):
    with pytest.raises(RemoteProtocolError):
        Times.parse(value)


def test_hello_tells_what_the_plugin_can_do():
    hello = Hello.parse("Hello podheitor-proxmox 3 offset jobstatus fileindex new")
    assert (hello.plugin, hello.offset, hello.jobstatus) == (
        "podheitor-proxmox",
        True,
        True,
    )
    stock = Hello.parse("Hello kubernetes 3")
    assert not stock.offset
    assert not stock.jobstatus


@pytest.mark.parametrize("text", ["Hello", "Hello x", "Hello x y", "Hi x 3"])
def test_other_greetings_are_refused(text):
    with pytest.raises(RemoteProtocolError):
        Hello.parse(text)


def test_an_old_protocol_is_refused_with_a_remedy():
    with pytest.raises(RemoteProtocolError, match="Install plugin and backend"):
        Hello.parse("Hello podheitor-proxmox 2")


def test_the_job_is_read_from_its_lines():
    lines = ["Name=j", "JobID=8", "Type=B", "Level=I", "Since=1795380140", "New=1"]
    job = JobInfo.parse([parse_command(line) for line in lines])
    assert (job.name, job.job_id, job.type, job.level) == ("j", 8, "B", "I")
    assert job.since == 1795380140
    assert job.others == {"New": "1"}
    assert not job.accurate


@pytest.mark.parametrize("lines", [["Name=j"], ["Type=B"], ["Name=j", "Type=X"]])
def test_a_job_needs_a_name_and_a_type(lines):
    with pytest.raises(RemoteProtocolError, match="expected"):
        JobInfo.parse([parse_command(line) for line in lines])


def test_the_plugin_string_is_whole_or_put_together():
    whole = [parse_command("Plugin=podheitor-proxmox: vmid=100 name='a b'")]
    assert plugin_string(whole, "p") == "podheitor-proxmox: vmid=100 name='a b'"
    stock = [parse_command(x) for x in ("vmid=100", "all", 'n=a "b', "Accurate=1")]
    assert plugin_string(stock, "p") == r'p: vmid=100 all=1 n="a \"b"'


def test_a_buffer_refuses_what_does_not_fit():
    buffer = ReceiveBuffer(8)
    buffer.space()[:4] = b"abcd"
    buffer.filled(4)
    assert bytes(buffer.take(2)) == b"ab"
    buffer.make_room(8)
    assert bytes(buffer.peek(9)) == b"cd"
    assert len(buffer.space()) == 4  # held: nothing moved
    buffer.release()
    buffer.make_room(8)
    assert len(buffer.space()) == 6
    with pytest.raises(ValueError, match="never fit"):
        buffer.make_room(9)
    with pytest.raises(ValueError, match="do not fit"):
        buffer.filled(7)
    with pytest.raises(ValueError, match="cannot skip"):
        buffer.skip(3)
