# SPDX-License-Identifier: Apache-2.0
"""The frames of the replication channel, byte by byte."""

from __future__ import annotations

import os
import zlib

import pytest
import zstandard

from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto.dr_wire import (
    HEADER,
    MAX_PAYLOAD,
    ZSTD,
    FrameReader,
    RawFrame,
    encode_frame,
)

MiB = 1024 * 1024


def wire(type, *buffers, **options):
    return b"".join(encode_frame(type, *buffers, **options))


def frame(payload, type=9, flags=0, reserved=0, length=None, crc=None):
    """A frame with whatever is wrong with it."""
    length = len(payload) if length is None else length
    crc = zlib.crc32(payload) if crc is None else crc
    return HEADER.pack(type, flags, reserved, length, crc) + payload


def test_a_frame_is_these_bytes():
    assert wire(9, b"abc").hex(" ", -4) == "09000000 00000003 352441c2 616263"


def test_header_and_payload_leave_as_they_are_without_a_copy():
    block = bytearray(MiB)
    head, meta, sent = encode_frame(9, b"meta", memoryview(block))
    assert (len(head), meta, sent.obj) == (12, b"meta", block)


def test_empty_buffers_are_left_out_and_an_empty_frame_is_a_header():
    assert [len(part) for part in encode_frame(6, b"", b"")] == [12]
    assert FrameReader().receive_data(wire(6)) == [RawFrame(6, b"")]


def test_frames_come_back_from_one_piece():
    sent = [(9, b"a"), (10, b""), (11, os.urandom(100_000)), (12, b"z" * 16_384)]
    got = FrameReader().receive_data(b"".join(wire(*one) for one in sent))
    assert [(one.type, bytes(one.payload)) for one in got] == sent


def test_frames_come_back_byte_by_byte():
    sent = wire(9, b"abc") + wire(10) + wire(11, b"0" * 5000, compress=True)
    reader, got = FrameReader(), []
    for at in range(len(sent)):
        got += reader.receive_data(sent[at : at + 1])
    reader.receive_eof()
    assert got == [RawFrame(9, b"abc"), RawFrame(10), RawFrame(11, b"0" * 5000)]


def test_the_rest_of_a_large_payload_is_received_in_place():
    block = os.urandom(MiB)
    sent = wire(9, block)
    reader = FrameReader()
    space = reader.get_buffer()
    space[:] = sent[: len(space)]
    assert reader.buffer_updated(len(space)) == []
    rest = reader.get_buffer()
    assert len(rest) == len(sent) - len(space)
    rest[:] = sent[len(space) :]
    (got,) = reader.buffer_updated(len(rest))
    assert got.payload.obj is rest.obj
    assert got.payload == block


def test_what_was_received_is_not_overwritten_by_what_follows():
    reader = FrameReader()
    first = reader.receive_data(wire(9, b"x" * 50_000))
    first += reader.receive_data(wire(9, b"y" * 50_000) + wire(9, b"z" * 10))
    reader.receive_data(wire(9, b"0" * 60_000))
    assert [bytes(one.payload[:1]) for one in first] == [b"x", b"y", b"z"]


# -- compression ------------------------------------------------------------------


def test_what_shrinks_is_compressed():
    head, packed = encode_frame(9, b"ab" * 1000, b"c" * 4000, compress=True)
    type, flags, reserved, length, crc = HEADER.unpack(head)
    assert (type, flags, reserved, length) == (9, ZSTD, 0, len(packed))
    assert crc == zlib.crc32(packed)
    assert len(packed) < 100
    (got,) = FrameReader().receive_data(head + packed)
    assert got.payload == b"ab" * 1000 + b"c" * 4000


@pytest.mark.parametrize(
    "payload",
    [os.urandom(100_000), b"a" * 4095, os.urandom(60_000) + b"a" * 8000],
    ids=["random", "short", "saves less than an eighth"],
)
def test_what_does_not_pay_travels_as_it_is(payload):
    assert encode_frame(9, payload, compress=True)[1] is payload


def test_nothing_is_compressed_unasked():
    assert encode_frame(9, bytes(100_000))[0][1] == 0


def test_a_compressor_can_be_used_again():
    compressor = zstandard.ZstdCompressor(level=1)
    frames = [
        wire(9, bytes([n]) * 9000, compress=True, compressor=compressor)
        for n in range(3)
    ]
    got = FrameReader().receive_data(b"".join(frames))
    assert [one.payload for one in got] == [bytes([n]) * 9000 for n in range(3)]


def bomb(size, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(bytes(size))


def streamed(data):
    """A zstd frame that doesn't say how large its content is."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return compressor.compress(data) + compressor.flush()


WRONG_ZSTD = {
    "a bomb": (bomb(1 << 30), "would grow beyond"),
    "one byte too many": (bomb(MAX_PAYLOAD + 1), "would grow beyond"),
    "no size": (streamed(b"abc"), "doesn't say its size"),
    "no size, a bomb": (streamed(bytes(1 << 24)), "doesn't say its size"),
    "not zstd": (b"hello, this is text", "flagged zstd and isn't"),
    "nothing": (b"", "flagged zstd and isn't"),
    "magic only": (b"\x28\xb5\x2f\xfd", "can't be decompressed"),
    "cut short": (bomb(100_000)[:-3], "can't be decompressed"),
    "junk behind": (bomb(100) + b"junk", "can't be decompressed"),
    "two frames": (bomb(100) + bomb(100), "can't be decompressed"),
    "skippable": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "flagged zstd"),
    "empty skippable": (b"\x50\x2a\x4d\x18\0\0\0\0", "flagged zstd"),
}


@pytest.mark.parametrize("case", WRONG_ZSTD)
def test_wrong_compression_is_refused(case):
    packed, text = WRONG_ZSTD[case]
    with pytest.raises(RemoteProtocolError, match=text):
        FrameReader().receive_data(frame(packed, flags=ZSTD))


def test_a_lying_size_gives_an_error_not_memory():
    packed = bytearray(bomb(300))
    # Magic, descriptor, then the content's size in two bytes, less 256.
    size = zstandard.get_frame_parameters(bytes(packed)).content_size
    assert size == 300
    at = bytes(packed).index((300 - 256).to_bytes(2, "little"), 4)
    packed[at : at + 2] = (60_000).to_bytes(2, "little")
    with pytest.raises(RemoteProtocolError, match=r"decompressed|announced"):
        FrameReader().receive_data(frame(bytes(packed), flags=ZSTD))


def test_the_largest_payload_passes_both_ways():
    for payload in (os.urandom(MAX_PAYLOAD), bytes(MAX_PAYLOAD)):
        (got,) = FrameReader().receive_data(wire(9, payload, compress=True))
        assert got.payload == payload


# -- what isn't a frame -----------------------------------------------------------

WRONG = {
    "type 0": (frame(b"abc", type=0), "expected a frame, got type 0"),
    "zeroes": (bytes(64), "expected a frame, got type 0"),
    "unknown flag": (frame(b"abc", flags=2), "flags 0x02"),
    "reserved": (frame(b"abc", reserved=1), "reserved 0x0001"),
    "too long": (frame(b"", length=MAX_PAYLOAD + 1), "announces 1114113 bytes"),
    "far too long": (frame(b"", length=0xFFFFFFFF), "announces 4294967295 bytes"),
    "damaged": (frame(b"abd", crc=zlib.crc32(b"abc")), "was damaged"),
    "damaged, empty": (frame(b"", crc=1), "was damaged"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "expected a frame"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_frame_ends_the_connection(case):
    data, text = WRONG[case]
    reader = FrameReader()
    with pytest.raises(RemoteProtocolError, match=text) as caught:
        reader.receive_data(data)
    assert str(caught.value).startswith("DR channel: ")
    # And it stays ended, with the same words.
    for call in (lambda: reader.receive_data(wire(9)), reader.receive_eof):
        with pytest.raises(RemoteProtocolError, match=text):
            call()


def test_every_flipped_bit_is_noticed():
    good = wire(9, b"block of a disk")
    for bit in range(8, 8 * len(good)):  # the type isn't covered: TLS below covers it
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        reader = FrameReader()
        with pytest.raises(RemoteProtocolError):  # noqa: PT012 - either notices
            reader.receive_data(bad)
            reader.receive_eof()


def test_a_stranger_is_given_less():
    reader = FrameReader(limit=128)
    assert reader.receive_data(wire(1, bytes(128)))
    with pytest.raises(RemoteProtocolError, match="at most 128"):
        reader.receive_data(wire(1, bytes(129)))
    packed = frame(bomb(4096), flags=ZSTD)
    with pytest.raises(RemoteProtocolError, match="would grow beyond 128"):
        FrameReader(limit=128).receive_data(packed)


def test_the_end_between_frames_is_clean():
    reader = FrameReader()
    reader.receive_eof()
    reader.receive_data(wire(9, b"abc"))
    reader.receive_eof()


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "after 1 bytes of a header"), (12, "after 0 of 3 bytes"), (14, "after 2 of")],
)
def test_the_end_within_a_frame_is_not(count, text):
    reader = FrameReader()
    reader.receive_data(wire(9, b"abc")[:count])
    with pytest.raises(RemoteProtocolError, match=text):
        reader.receive_eof()


@pytest.mark.parametrize("type", [0, 256, -1])
def test_a_type_that_is_none_is_our_own_mistake(type):
    with pytest.raises(LocalProtocolError, match="no frame has type"):
        encode_frame(type)


def test_a_payload_too_long_is_our_own_mistake():
    with pytest.raises(LocalProtocolError, match="no frame has"):
        encode_frame(9, bytes(MAX_PAYLOAD), b"x")
