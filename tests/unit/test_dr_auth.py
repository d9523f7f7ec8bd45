# SPDX-License-Identifier: Apache-2.0
"""The proof of both ends, without a connection: who is refused, and who isn't."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import struct
from pathlib import Path

import pytest

from pveplug.errors import LocalProtocolError, RemoteProtocolError, TransportError
from pveplug.proto.dr_auth import (
    CLIENT_TRANSITIONS,
    NO_CERTIFICATE,
    REFUSED,
    SERVER_TRANSITIONS,
    AuthenticationError,
    Challenge,
    ClientHandshake,
    FrameType,
    Hello,
    Identity,
    Method,
    ServerHandshake,
    State,
    certificate_hash,
)
from pveplug.proto.dr_wire import FrameReader, RawFrame, encode_frame

TOKEN, OTHER = b"0123456789abcdef" * 4, b"fedcba9876543210" * 4
SERVER_CERT, CLIENT_CERT, MALLORY = (bytes([n]) * 32 for n in (1, 2, 3))
NONCE_C, NONCE_S = b"c" * 32, b"s" * 32
BOTH = Method.PSK | Method.MTLS

PSK = Identity(Method.PSK, SERVER_CERT, token=TOKEN)
MTLS = Identity(Method.MTLS, SERVER_CERT, CLIENT_CERT)
MUTUAL = Identity(BOTH, SERVER_CERT, CLIENT_CERT, TOKEN)


def client(identity=PSK, nonce=NONCE_C, **options):
    return ClientHandshake(identity, nonce, **options)


def server(identity=PSK, nonce=NONCE_S, **options):
    return ServerHandshake(identity, nonce, **options)


def frame(wire):
    """The one frame in ``wire``."""
    (got,) = FrameReader().receive_data(wire)
    return RawFrame(got.type, bytes(got.payload))


def shake(one, other):
    """Run a handshake; return the frames, in order."""
    frames = [frame(one.start())]
    while reply := (other if len(frames) % 2 else one).receive(frames[-1]):
        frames.append(frame(reply))
    return frames


def refuses(one, other):
    """Run a handshake that the server refuses; return its reason."""
    with pytest.raises(AuthenticationError, match="the receiver refused us"):
        shake(one, other)
    assert (one.state, other.state) == (State.FAILED, State.FAILED)
    return other.reason


# -- who is accepted --------------------------------------------------------------


@pytest.mark.parametrize("identity", [PSK, MTLS, MUTUAL], ids=["psk", "mtls", "both"])
def test_two_that_mean_the_same_accept_each_other(identity):
    one, other = client(identity), server(identity)
    types = [got.type for got in shake(one, other)]
    assert types == [1, 2, 3, 4]
    assert (one.state, other.state) == (State.DONE, State.DONE)
    assert (one.version, other.version) == (1, 1)
    one.receive_eof()
    other.receive_eof()
    assert other.reason == ""


def test_the_macs_are_over_exactly_this():
    frames = shake(client(MUTUAL), server(MUTUAL))
    hello = b"pveplug dr\0" + NONCE_C + b"\x03\x01" + b"\x00\x01"
    challenge = b"\x00\x01" + NONCE_S + b"\x03"
    for got, label in ((2, b"pveplug dr 1 client"), (3, b"pveplug dr 1 server")):
        covered = (
            label
            + struct.pack(">I", len(hello))
            + hello
            + struct.pack(">I", len(challenge))
            + challenge
            + SERVER_CERT
            + CLIENT_CERT
        )
        assert frames[got].payload == hmac.digest(TOKEN, covered, "sha256")
    assert [frames[0].payload, frames[1].payload] == [hello, challenge]


def test_the_document_shows_these_bytes():
    page = Path(__file__).parents[2] / "docs" / "protocols" / "dr.md"
    shown = "".join(page.read_text(encoding="utf-8").split())
    identity = Identity(Method.PSK, b"\x11" * 32, token=b"0123456789abcdef" * 4)
    one, other = client(identity, b"\xcc" * 32), server(identity, b"\x55" * 32)
    for sent, arrow in zip(shake(one, other), "►◄►◄", strict=True):
        wire = b"".join(encode_frame(sent.type, sent.payload)).hex()
        assert arrow + wire in shown
    assert server().refuse("because").hex().upper() in shown


def test_the_hash_of_a_certificate():
    assert certificate_hash(b"der") == hashlib.sha256(b"der").digest()
    assert certificate_hash(None) == certificate_hash(b"") == NO_CERTIFICATE


def test_the_servers_own_preference_decides_the_version():
    one, other = client(versions=(1, 2, 3)), server(versions=(2, 1))
    shake(one, other)
    assert (one.version, other.version) == (2, 2)


# -- who isn't --------------------------------------------------------------------


def test_no_token_where_one_is_needed():
    assert refuses(client(MTLS), server(MUTUAL)) == (
        "it offers mtls, required is psk+mtls"
    )


def test_no_certificate_where_one_is_needed():
    assert "required is mtls" in refuses(client(PSK), server(MTLS))


def test_a_wrong_token():
    wrong = dataclasses.replace(PSK, token=OTHER)
    assert "wrong proof" in refuses(client(wrong), server())


@pytest.mark.parametrize("field", ["server_certificate", "client_certificate"])
@pytest.mark.parametrize("identity", [MTLS, MUTUAL], ids=["mtls", "both"])
def test_a_certificate_that_the_other_side_does_not_see(field, identity):
    seen = dataclasses.replace(identity, **{field: MALLORY})
    assert "wrong proof" in refuses(client(seen), server(identity))


def test_a_man_in_the_middle_who_relays():
    """He has his own certificate, and passes every frame on untouched."""
    seen_by_client = dataclasses.replace(PSK, server_certificate=MALLORY)
    assert "wrong proof" in refuses(client(seen_by_client), server())


def test_a_recorded_handshake_replayed_to_the_server():
    recorded = shake(client(), server())
    fresh = server(nonce=b"S" * 32)
    assert frame(fresh.receive(recorded[0])).type == FrameType.CHALLENGE
    assert frame(fresh.receive(recorded[2])) == RawFrame(FrameType.REFUSE, REFUSED)
    assert fresh.state is State.FAILED


def test_a_recorded_handshake_replayed_to_the_client():
    recorded = shake(client(), server())
    fresh = client(nonce=b"C" * 32)
    fresh.start()
    fresh.receive(recorded[1])
    with pytest.raises(AuthenticationError, match="doesn't know our token"):
        fresh.receive(recorded[3])


def test_an_impostor_with_a_stolen_transcript_and_the_same_nonces():
    """Even if a nonce came twice: his certificate isn't the one that was meant."""
    recorded = shake(client(), server())
    victim = client(dataclasses.replace(PSK, server_certificate=MALLORY))
    victim.start()
    victim.receive(recorded[1])
    with pytest.raises(AuthenticationError, match="doesn't know our token"):
        victim.receive(recorded[3])


def test_the_clients_own_mac_reflected():
    victim = client()
    victim.start()
    challenge = Challenge(1, NONCE_S, Method.PSK).encode()
    proof = frame(victim.receive(RawFrame(FrameType.CHALLENGE, challenge)))
    with pytest.raises(AuthenticationError, match="doesn't know our token"):
        victim.receive(RawFrame(FrameType.ACCEPT, proof.payload))


def test_the_servers_mac_reflected():
    """What a server says is no proof of a client, even with all its nonces equal."""
    recorded = shake(client(), server())
    again = server()
    again.receive(recorded[0])
    assert (
        frame(again.receive(RawFrame(FrameType.PROOF, recorded[3].payload))).type == 5
    )


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_mac_of_another_length(length):
    one, other = client(), server()
    proof = frame(one.receive(frame(other.receive(frame(one.start())))))
    cut = (proof.payload + b"\0")[:length]
    assert frame(other.receive(RawFrame(FrameType.PROOF, cut))).type == 5
    with pytest.raises(AuthenticationError):
        one.receive(RawFrame(FrameType.ACCEPT, cut))


def test_no_common_version():
    reason = refuses(client(versions=(7, 9)), server(versions=(2, 1)))
    assert reason == "no common version, it offers 7, 9"


def test_a_version_that_was_not_offered():
    victim = client(versions=(2,))
    victim.start()
    challenge = Challenge(1, NONCE_S, Method.PSK).encode()
    with pytest.raises(AuthenticationError, match="chose version 1, offered were 2"):
        victim.receive(RawFrame(FrameType.CHALLENGE, challenge))
    assert victim.state is State.FAILED


def changed_hello(one, other, **changes):
    """Somebody inside TLS changes what the client offers."""
    hello = Hello.decode(frame(one.start()).payload)
    forged = dataclasses.replace(hello, **changes).encode()
    challenge = frame(other.receive(RawFrame(FrameType.HELLO, forged)))
    return frame(other.receive(frame(one.receive(challenge))))


def test_a_downgraded_version():
    one, other = client(versions=(2, 1)), server(versions=(2, 1))
    assert changed_hello(one, other, versions=(1,)).type == FrameType.REFUSE


def test_methods_taken_away_from_the_offer():
    one, other = client(PSK), server(PSK)
    assert changed_hello(one, other, methods=BOTH).type == FrameType.REFUSE


@pytest.mark.parametrize(
    ("identity", "asked"),
    [(MUTUAL, Method.PSK), (MUTUAL, Method.MTLS), (PSK, Method.MTLS), (PSK, BOTH)],
)
def test_a_client_settles_for_nothing_but_what_it_was_given(identity, asked):
    victim = client(identity)
    victim.start()
    challenge = Challenge(1, NONCE_S, asked).encode()
    with pytest.raises(AuthenticationError, match="this side is set up for"):
        victim.receive(RawFrame(FrameType.CHALLENGE, challenge))


def test_every_refusal_looks_the_same():
    wrong = dataclasses.replace(PSK, token=OTHER)
    said = set()
    for one, other in [
        (client(wrong), server()),
        (client(MTLS), server()),
        (client(versions=(9,)), server()),
    ]:
        sent = frame(other.receive(frame(one.start())))
        if sent.type == FrameType.CHALLENGE:
            sent = frame(other.receive(frame(one.receive(sent))))
        said.add((sent.type, sent.payload))
    garbage = server()
    said.add(dataclasses.astuple(frame(garbage.receive(RawFrame(200, b"x")))))
    caller = server()
    said.add(dataclasses.astuple(frame(caller.refuse("the certificate is for x"))))
    assert said == {(5, b"\x01")}
    assert caller.reason == "the certificate is for x"


def test_nothing_secret_is_shown():
    assert TOKEN.decode() not in repr(PSK)
    assert repr(PSK) == "Identity(methods=psk)"


# -- every state with every input -------------------------------------------------

TYPES = [*FrameType, 6, 7, 255]


def right(type):
    """A frame of this type, right where there is a right one."""
    good = {got.type: got.payload for got in shake(client(), server())}
    return RawFrame(type, good.get(type, REFUSED))


def client_in(state):
    one = client()
    if state is State.START:
        return one
    one.start()
    if state is State.AWAIT_CHALLENGE:
        return one
    if state is State.FAILED:
        with pytest.raises(AuthenticationError):
            one.receive(RawFrame(FrameType.REFUSE, REFUSED))
        return one
    other = server()
    other.receive(frame(client().start()))
    proof = one.receive(RawFrame(2, Challenge(1, NONCE_S, Method.PSK).encode()))
    if state is State.DONE:
        one.receive(frame(other.receive(frame(proof))))
    assert one.state is state
    return one


CLIENT_STATES = [
    State.START,
    State.AWAIT_CHALLENGE,
    State.AWAIT_ACCEPT,
    State.DONE,
    State.FAILED,
]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("state", CLIENT_STATES, ids=lambda state: state.value)
def test_a_client_in_every_state_with_every_frame(state, type):
    one = client_in(state)
    good = right(type)
    if (state, type) in CLIENT_TRANSITIONS:
        one.receive(good)
        assert one.state is CLIENT_TRANSITIONS[state, type]
        return
    with pytest.raises(RemoteProtocolError) as caught:
        one.receive(good)
    assert one.state is State.FAILED
    waiting = state in (State.AWAIT_CHALLENGE, State.AWAIT_ACCEPT)
    refused = type == FrameType.REFUSE and waiting
    assert isinstance(caught.value, AuthenticationError) == refused


def server_in(state):
    other = server()
    if state is State.FAILED:
        other.refuse("because")
    if state in (State.AWAIT_PROOF, State.DONE):
        other.receive(frame(client().start()))
    if state is State.DONE:
        other.receive(shake(client(), server())[2])
    assert other.state is state
    return other


SERVER_STATES = [State.AWAIT_HELLO, State.AWAIT_PROOF, State.DONE, State.FAILED]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("state", SERVER_STATES, ids=lambda state: state.value)
def test_a_server_in_every_state_with_every_frame(state, type):
    other = server_in(state)
    reply = other.receive(right(type))
    if (state, type) in SERVER_TRANSITIONS:
        assert other.state is SERVER_TRANSITIONS[state, type]
        assert frame(reply).type == type + 1
    elif state in (State.DONE, State.FAILED):
        assert (reply, other.state) == (b"", state)
    else:
        assert frame(reply) == RawFrame(FrameType.REFUSE, REFUSED)
        assert other.state is State.FAILED
        assert other.reason == f"a frame of type {type} ({state.value})"


@pytest.mark.parametrize("state", CLIENT_STATES[1:], ids=lambda state: state.value)
def test_the_end_of_the_connection_at_a_client(state):
    one = client_in(state)
    if state is State.DONE:
        one.receive_eof()
        return
    with pytest.raises(TransportError, match="closed the connection in the handshake"):
        one.receive_eof()
    assert one.state is State.FAILED


@pytest.mark.parametrize("state", SERVER_STATES, ids=lambda state: state.value)
def test_the_end_of_the_connection_at_a_server(state):
    other = server_in(state)
    before = other.reason
    other.receive_eof()
    assert other.state is (State.DONE if state is State.DONE else State.FAILED)
    if state in (State.AWAIT_HELLO, State.AWAIT_PROOF):
        assert other.reason == f"it left ({state.value})"
    else:
        assert other.reason == before


def test_a_handshake_begins_once():
    one = client()
    one.start()
    with pytest.raises(LocalProtocolError, match="has begun"):
        one.start()


# -- payloads that are none -------------------------------------------------------

GOOD = Hello(NONCE_C, Method.PSK, (1,)).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        b"x" + GOOD[1:],
        GOOD[:43] + b"\0" + GOOD[44:],  # no method
        GOOD[:43] + b"\4" + GOOD[44:],  # an unknown one
        GOOD[:44] + b"\0",  # no version
        GOOD[:44] + b"\x11" + bytes(34),  # seventeen
    ],
)
def test_a_hello_that_is_none(payload):
    with pytest.raises(RemoteProtocolError):
        Hello.decode(payload)
    other = server()
    assert frame(other.receive(RawFrame(1, payload))).type == FrameType.REFUSE
    assert other.state is State.FAILED


@pytest.mark.parametrize("payload", [b"", bytes(35), bytes(34), bytes(36)])
def test_a_challenge_that_is_none(payload):
    with pytest.raises(RemoteProtocolError):
        Challenge.decode(payload)
    one = client()
    one.start()
    with pytest.raises(RemoteProtocolError):
        one.receive(RawFrame(2, payload))
    assert one.state is State.FAILED


@pytest.mark.parametrize(
    "fields",
    [
        {"methods": Method.NONE, "token": None},
        {"token": None},
        {"methods": Method.MTLS},
        {"token": b"short"},
        {"server_certificate": b"x"},
        {"client_certificate": b""},
    ],
)
def test_an_identity_that_is_none_is_our_own_mistake(fields):
    with pytest.raises(LocalProtocolError):
        dataclasses.replace(PSK, **fields)


@pytest.mark.parametrize("kind", [ClientHandshake, ServerHandshake])
def test_a_nonce_of_another_length_is_our_own_mistake(kind):
    with pytest.raises(LocalProtocolError, match="a nonce has 32 bytes"):
        kind(PSK, b"short")
