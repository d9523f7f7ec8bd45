# SPDX-License-Identifier: Apache-2.0
"""What holds for every stream of frames, and for every stream that is none."""

from __future__ import annotations

import contextlib
import zlib

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pveplug.errors import RemoteProtocolError
from pveplug.proto import dr_auth
from pveplug.proto.dr_auth import (
    Challenge,
    ClientHandshake,
    Hello,
    Identity,
    Method,
    ServerHandshake,
    State,
)
from pveplug.proto.dr_wire import HEADER, FrameReader, RawFrame, encode_frame

QUICK = settings(deadline=None)  # a busy machine is no bug

payloads = st.one_of(
    st.binary(max_size=200),
    st.integers(0, 70_000).map(lambda n: b"ab" * (n // 2)),
    st.builds(bytes.__mul__, st.binary(min_size=1, max_size=64), st.integers(0, 400)),
)
frames = st.tuples(st.integers(1, 255), payloads, st.booleans())


@QUICK
@given(st.lists(frames, max_size=8), st.data())
def test_any_split_gives_the_same_frames(sent, data):
    wire = b"".join(
        part
        for type, payload, compress in sent
        for part in encode_frame(type, payload, compress=compress)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    reader, got = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += reader.receive_data(wire[start:end])
    reader.receive_eof()
    assert [(f.type, bytes(f.payload)) for f in got] == [(t, p) for t, p, _ in sent]


@QUICK
@given(st.lists(st.binary(max_size=64), max_size=5), st.booleans())
def test_how_a_payload_is_cut_into_buffers_does_not_matter(buffers, compress):
    one = b"".join(encode_frame(9, b"".join(buffers), compress=compress))
    assert b"".join(encode_frame(9, *buffers, compress=compress)) == one


@QUICK
@given(st.lists(st.binary(max_size=400), max_size=6))
@example([HEADER.pack(1, 1, 0, 4, 0) + b"abcd"])
def test_garbage_is_an_error_or_frames(pieces):
    reader = FrameReader()
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces:
            for frame in reader.receive_data(piece):
                assert isinstance(frame, RawFrame)
        reader.receive_eof()


@QUICK
@given(st.binary(max_size=100), st.integers(0, 255), st.integers(0, 1))
def test_a_garbage_payload_under_a_right_header_is_an_error_or_a_frame(data, type, f):
    raw = HEADER.pack(type, f, 0, len(data), zlib.crc32(data)) + data
    with contextlib.suppress(RemoteProtocolError):
        (frame,) = FrameReader().receive_data(raw)
        assert frame.type == type
        assert f or frame.payload == data


# -- the handshake ----------------------------------------------------------------

TOKEN = b"t" * 32
NONCE = bytes(32)
IDENTITY = Identity(Method.PSK, bytes(32), token=TOKEN)
methods = st.sampled_from([Method.PSK, Method.MTLS, Method.PSK | Method.MTLS])
nonces = st.binary(min_size=32, max_size=32)
raw_frames = st.builds(RawFrame, st.integers(1, 9), st.binary(max_size=140))


@QUICK
@given(nonces, methods, st.lists(st.integers(0, 65535), min_size=1, max_size=16))
def test_hello_comes_back(nonce, which, versions):
    hello = Hello(nonce, which, tuple(versions))
    assert Hello.decode(hello.encode()) == hello
    assert len(hello.encode()) <= dr_auth.MAX_PAYLOAD


@QUICK
@given(st.integers(0, 65535), nonces, methods)
def test_challenge_comes_back(version, nonce, which):
    challenge = Challenge(version, nonce, which)
    assert Challenge.decode(challenge.encode()) == challenge


@QUICK
@given(st.binary(max_size=140))
def test_garbage_is_no_hello_and_no_challenge(data):
    for kind in (Hello, Challenge):
        with contextlib.suppress(RemoteProtocolError):
            assert kind.decode(data).encode() == data


@QUICK
@given(st.lists(raw_frames, max_size=4))
def test_a_stranger_who_talks_garbage_is_never_accepted(sent):
    server = ServerHandshake(IDENTITY, NONCE)
    for frame in sent:
        server.receive(frame)
    server.receive_eof()
    assert server.state is State.FAILED
    assert server.reason


@QUICK
@given(st.lists(raw_frames, max_size=4))
def test_a_server_that_talks_garbage_is_never_trusted(sent):
    client = ClientHandshake(IDENTITY, NONCE)
    client.start()
    with contextlib.suppress(RemoteProtocolError):
        for frame in sent:
            client.receive(frame)
    assert client.state is not State.DONE


@QUICK
@given(st.data())
def test_any_bit_flipped_on_the_way_is_refused(data):
    """Whoever sat inside TLS could not change a bit of what is agreed."""
    client, server = (
        ClientHandshake(IDENTITY, b"c" * 32),
        ServerHandshake(IDENTITY, NONCE),
    )
    target = data.draw(st.integers(0, 3))
    to_server, wire = True, client.start()
    with contextlib.suppress(RemoteProtocolError):
        for step in range(4):
            (frame,) = FrameReader().receive_data(wire)
            payload = bytearray(frame.payload)
            if step == target:
                bit = data.draw(st.integers(0, 8 * len(payload) - 1))
                payload[bit // 8] ^= 1 << bit % 8
            changed = RawFrame(frame.type, bytes(payload))
            wire = (server if to_server else client).receive(changed)
            to_server = not to_server
            if not wire:
                break
    assert client.state is not State.DONE
    # The last one is the server's own proof: it had accepted the client before.
    assert (server.state is State.DONE) == (target == 3)
