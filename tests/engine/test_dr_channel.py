# SPDX-License-Identifier: Apache-2.0
"""The channel over real TLS on loopback: who gets in, who doesn't, and what passes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import re
import socket
import ssl
import time
from types import SimpleNamespace

import pytest
import uvloop

from pveplug.cli import main
from pveplug.dr.channel import (
    AuthenticationError,
    ClientAuth,
    ServerAuth,
    connect,
    listen,
    serve,
)
from pveplug.dr.link import READ_BYTES, WRITE_BYTES, address_text
from pveplug.dr.throttle import MAX_ADDRESSES, Throttle
from pveplug.errors import (
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto.dr_auth import Challenge, Hello, Method
from pveplug.proto.dr_wire import HEADER, RawFrame, encode_frame
from tests.support.dr_certs import pair, version_1
from tests.support.dr_stranger import context, impostor, stranger, wire

TOKEN, OTHER = b"0123456789abcdef" * 4, b"fedcba9876543210" * 4
REFUSE = bytes.fromhex("050000000000000 1a505df1b 01".replace(" ", ""))
"""All that anybody may learn."""
MiB = 1024 * 1024


def both_loops(test):
    """Run an asynchronous test on asyncio's own loop and on uvloop."""

    def run(new_loop, **given):
        with asyncio.Runner(debug=True, loop_factory=new_loop) as runner:
            runner.run(test(**given))

    loop = inspect.Parameter("new_loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    mine = inspect.signature(test)
    run.__signature__ = mine.replace(parameters=[loop, *mine.parameters.values()])
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.pytestmark = getattr(test, "pytestmark", [])
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    return pytest.mark.parametrize("new_loop", loops, ids=["asyncio", "uvloop"])(run)


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO, "pveplug.dr")
    yield
    loop = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name == "asyncio"
        and record.levelno >= logging.ERROR
        and "Error on transport creation" not in record.getMessage()  # of streams
    ]
    assert not loop


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    """Every certificate of this module, by what it is."""
    folder = tmp_path_factory.mktemp("certs")
    here = ("127.0.0.1", "localhost")
    ca = pair(folder, "ca", ca=True)
    strange_ca = pair(folder, "strange-ca", ca=True)
    return SimpleNamespace(
        ca=ca,
        server=pair(folder, "server", ca, names=here),
        own=pair(folder, "own"),  # signed by itself, no name: as a token needs it
        mallory=pair(folder, "mallory", names=here),
        client=pair(folder, "client", ca, names=("127.0.0.1",)),
        by_name=pair(folder, "by-name", ca, names=("localhost",)),
        listed=pair(folder, "listed", ca, names=("sender.invalid",)),
        strange=pair(folder, "strange", strange_ca, names=here),
        expired=pair(folder, "expired", ca, names=here, days=(-9, -1)),
        future=pair(folder, "future", ca, names=here, days=(1, 9)),
        elsewhere=pair(folder, "elsewhere", ca, names=("192.0.2.1", "::1")),
        unnamed=pair(folder, "localhost", ca),
        wildcard=pair(folder, "wildcard", ca, names=("*.localhost",)),
        old=version_1(folder, "old", ca),
    )


def psk(certs, token=TOKEN):
    return ServerAuth(certs.own.cert, certs.own.key, token)


def mutual(certs, token=None, **options):
    return ServerAuth(
        certs.server.cert, certs.server.key, token, certs.ca.cert, **options
    )


def sender(certs, token=TOKEN, own=None, ca=True, **options):
    """What a client is given; ``own`` is its pair."""
    return ClientAuth(
        token,
        own and own.cert,
        own and own.key,
        certs.ca.cert if ca else None,
        **options,
    )


async def echo(channel):
    while (frame := await channel.receive()) is not None:
        await channel.send_raw(frame.type, frame.payload, compress=True)


class Handler:
    """Echoes, and remembers whom."""

    def __init__(self, then=echo):
        self.channels, self.then = [], then

    async def __call__(self, channel):
        self.channels.append(channel)
        await self.then(channel)


@contextlib.asynccontextmanager
async def receiver(auth, then=echo, **options):
    """A server on a free port; checks that no task of it is left."""
    before = asyncio.all_tasks()
    handler = Handler(then)
    async with await serve(
        "127.0.0.1", 0, auth=auth, handler=handler, **options
    ) as server:
        yield SimpleNamespace(server=server, address=server.address, handler=handler)
    await until(lambda: asyncio.all_tasks() == before)


@contextlib.asynccontextmanager
async def joined(certs, then=echo, *, server=None, client=None, **options):
    """A channel to a receiver; gives it and the receiver."""
    async with (
        receiver(psk(certs), then, **(server or {}), **options) as there,
        await connect(
            *there.address, auth=ClientAuth(TOKEN), **(client or {}), **options
        ) as channel,
    ):
        yield channel, there


async def until(condition, what="what was waited for"):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


def refusals(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("dr refused")
    ]


async def refused(caplog, there, reason, count=1):
    """Wait for the log to say so; nobody has got in."""
    await until(lambda: len(refusals(caplog)) >= count)
    line = refusals(caplog)[-1]
    assert re.fullmatch(
        rf"dr refused peer=127\.0\.0\.1:\d+ reason=.*{reason}.*", line
    ), line
    assert len(refusals(caplog)) == count
    assert not there.handler.channels
    for secret in (TOKEN, OTHER):
        assert secret.decode() not in caplog.text


# -- who gets in ------------------------------------------------------------------


async def exchange(channel):
    await channel.send_raw(9, b"hello ", b"there")
    assert await channel.receive() == RawFrame(9, b"hello there")


@both_loops
async def test_a_token_alone_is_enough(certs, caplog):
    async with joined(certs) as (channel, there):
        await exchange(channel)
        (peer,) = there.handler.channels
        assert channel.peer == address_text(there.address)
        assert f"dr accepted peer={peer.peer} methods=psk" in caplog.messages
        assert (channel.methods, peer.methods) == (Method.PSK, Method.PSK)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("own", ["client", "by_name", "listed"])
@pytest.mark.parametrize("token", [None, TOKEN], ids=["mtls", "both"])
@both_loops
async def test_certificates_of_both_sides(certs, host, own, token):
    auth = mutual(certs, token, client_names=("Sender.invalid.",))
    async with receiver(auth) as there:
        port = there.address[1]
        given = sender(certs, token, getattr(certs, own))
        async with await connect(host, port, auth=given) as channel:
            await exchange(channel)
            assert Method.MTLS in channel.methods


@pytest.mark.parametrize("spelling", [str, str.upper, lambda pin: f"sha256:{pin}"])
@both_loops
async def test_a_pin_in_any_spelling(certs, spelling):
    async with receiver(psk(certs)) as there:
        pins = ("00" * 32, spelling(certs.own.fingerprint))
        auth = ClientAuth(TOKEN, fingerprints=pins)
        async with await connect(*there.address, auth=auth) as channel:
            await exchange(channel)


@both_loops
async def test_a_pin_stands_in_for_the_ca(certs):
    async with receiver(mutual(certs)) as there:
        pins = (certs.server.fingerprint,)
        auth = sender(certs, None, certs.client, ca=False, fingerprints=pins)
        async with await connect(*there.address, auth=auth) as channel:
            await exchange(channel)


@both_loops
async def test_what_receiver_init_makes(tmp_path, caplog):
    made = ["--with-ca", "--host", "127.0.0.1", "--client-host", "127.0.0.1"]
    assert main(["receiver", "init", "--dir", str(tmp_path), *made]) == 0
    base = tmp_path / "receiver-main"
    token = base.with_suffix(".token").read_bytes().strip()
    own = f"{base}.crt", f"{base}.key"
    ca = f"{base}-ca.crt"
    auth = ServerAuth(*own, token, ca)
    async with receiver(auth) as there:
        given = ClientAuth(token, f"{base}-sender.crt", f"{base}-sender.key", ca)
        async with await connect(*there.address, auth=given) as channel:
            await exchange(channel)
        await until(lambda: there.handler.channels)
        there.handler.channels.clear()
        # The receiver's certificate is none of a sender, though of the same CA.
        with pytest.raises((AuthenticationError, TransportError)):
            await connect(*there.address, auth=ClientAuth(token, *own, ca))
        await refused(caplog, there, "purpose")


@pytest.mark.optional("without IPv6 there is nothing to be told apart")
@both_loops
async def test_ipv4_through_an_ipv6_socket_is_the_same_address(certs):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    sock = listen("::", 0)
    async with receiver(mutual(certs), sock=sock) as there:
        port = sock.getsockname()[1]
        auth = sender(certs, None, certs.client)
        async with await connect("127.0.0.1", port, auth=auth) as channel:
            await exchange(channel)
        assert there.handler.channels[0].peer.startswith("[::ffff:127.0.0.1]:")


@both_loops
async def test_eight_at_once(certs):
    async with receiver(psk(certs)) as there:

        async def one(number):
            auth = ClientAuth(TOKEN)
            async with await connect(*there.address, auth=auth) as channel:
                for at in range(20):
                    await channel.send_raw(9, bytes([number, at]))
                    assert (await channel.receive()).payload == bytes([number, at])

        await asyncio.gather(*(one(number) for number in range(8)))
        assert len(there.handler.channels) == 8


# -- who doesn't: with our own client ---------------------------------------------

ALERT = "refused us in TLS|refused our certificate|is lost"
"""asyncio's own TLS closes without an alert; uvloop's sends one."""
WRONG_CLIENTS = {
    # what it has, the receiver's token, what it is told, what the log says
    "no token": ((None, "client"), TOKEN, "refused us", "it offers mtls, required is"),
    "wrong token": ((OTHER, "client"), TOKEN, "refused us", "wrong proof"),
    "token not asked for": ((TOKEN, "client"), None, "set up for psk.mtls", "it left"),
    "no certificate": ((TOKEN, None), TOKEN, ALERT, "it shows no certificate"),
    "another CA": ((TOKEN, "strange"), TOKEN, ALERT, "TLS: .*certificate"),
    "self-signed": ((TOKEN, "mallory"), TOKEN, ALERT, "TLS: self.signed certificate"),
    "expired": ((TOKEN, "expired"), TOKEN, ALERT, "certificate has expired"),
    "not yet valid": ((TOKEN, "future"), TOKEN, ALERT, "not yet valid"),
    "wrong SAN": ((TOKEN, "elsewhere"), TOKEN, "refused us", "for another address"),
    "unknown name": ((TOKEN, "listed"), TOKEN, "refused us", "for another address"),
    "wildcard": ((TOKEN, "wildcard"), TOKEN, "refused us", "for another address"),
    "only a CN": ((TOKEN, "unnamed"), TOKEN, "refused us", "no subject alternative"),
    "version 1": ((TOKEN, "old"), TOKEN, "refused us", "of version 1"),
}


@pytest.mark.parametrize("case", WRONG_CLIENTS)
@both_loops
async def test_a_wrong_client_is_refused(certs, caplog, case):
    (token, own), asked, told, reason = WRONG_CLIENTS[case]
    async with receiver(mutual(certs, asked)) as there:
        given = sender(certs, token, getattr(certs, own) if own else None)
        with pytest.raises((AuthenticationError, TransportError), match=told) as caught:
            await connect(*there.address, auth=given)
        await refused(caplog, there, reason)
        # Whoever is refused learns nothing of why.
        if told == "refused us":
            assert "wrong token or certificate, or no common version" in str(
                caught.value
            )


@pytest.mark.parametrize(
    ("auth", "asked", "reason"),
    [
        (ClientAuth(OTHER), TOKEN, "wrong proof"),
        (ClientAuth(TOKEN + b"0"), TOKEN, "wrong proof"),
        (ClientAuth(TOKEN[:-1]), TOKEN, "wrong proof"),
    ],
)
@both_loops
async def test_a_wrong_token_alone_is_refused(certs, caplog, auth, asked, reason):
    async with receiver(psk(certs, asked)) as there:
        with pytest.raises(AuthenticationError, match="refused us"):
            await connect(*there.address, auth=auth)
        await refused(caplog, there, reason)


@both_loops
async def test_a_client_with_a_certificate_but_no_token(certs, caplog):
    async with receiver(psk(certs)) as there:
        pins = (certs.own.fingerprint,)
        auth = sender(certs, None, certs.client, ca=False, fingerprints=pins)
        with pytest.raises(AuthenticationError, match="refused us"):
            await connect(*there.address, auth=auth)
        await refused(caplog, there, "it offers mtls, required is psk")


# -- who doesn't: strangers -------------------------------------------------------


@both_loops
async def test_plaintext(certs, caplog):
    async with receiver(psk(certs)) as there, stranger(there.address) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        got = await client.rest()
        assert got in (b"", bytes.fromhex("15030100020250"), got[:7])
        assert b"HTTP" not in got
        await refused(caplog, there, "not TLS")


@both_loops
async def test_our_own_frames_in_plaintext(certs, caplog):
    async with receiver(psk(certs)) as there, stranger(there.address) as client:
        await client.send(
            wire(RawFrame(1, Hello(bytes(32), Method.PSK, (1,)).encode()))
        )
        assert len(await client.rest()) <= 7  # an alert of TLS at most
        await refused(caplog, there, "not TLS|TLS: ")


@both_loops
async def test_tls_1_2(certs, caplog):
    async with receiver(psk(certs)) as there:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with stranger(there.address, context(highest=ssl.TLSVersion.TLSv1_2)):
                pass
        await refused(caplog, there, "TLS below 1.3")


@both_loops
async def test_a_recorded_handshake_replayed(certs, caplog):
    async with receiver(psk(certs)) as there:
        async with stranger(there.address, context()) as right:
            hello, _, proof, _ = await right.prove(TOKEN)
        await until(lambda: there.handler.channels)
        there.handler.channels.clear()
        async with stranger(there.address, context()) as thief:
            await thief.send(wire(hello))
            assert (await thief.receive()).type == 2
            await thief.send(wire(proof))
            assert (await thief.rest())[-len(REFUSE) :] == REFUSE
        await refused(caplog, there, "wrong proof")


@both_loops
async def test_a_recorded_handshake_replayed_in_one_go(certs, caplog):
    async with receiver(psk(certs)) as there:
        async with stranger(there.address, context()) as right:
            hello, _, proof, _ = await right.prove(TOKEN)
        await until(lambda: there.handler.channels)
        there.handler.channels.clear()
        async with stranger(there.address, context()) as thief:
            await thief.send(wire(hello) + wire(proof) + wire(RawFrame(9, b"x")))
            assert (await thief.rest())[-len(REFUSE) :] == REFUSE
        await refused(caplog, there, "wrong proof")


@both_loops
async def test_a_downgraded_version(certs, caplog):
    async with (
        receiver(psk(certs)) as there,
        stranger(there.address, context()) as client,
    ):
        # What the client says is version 2 or 1, what arrives is only 1.
        from pveplug.proto.dr_auth import ClientHandshake, Identity

        identity = Identity(Method.PSK, client.server_certificate, token=TOKEN)
        machine = ClientHandshake(identity, b"n" * 32, (2, 1))
        machine.start()
        forged = Hello(b"n" * 32, Method.PSK, (1,)).encode()
        await client.send(wire(RawFrame(1, forged)))
        await client.send(machine.receive(await client.receive()))
        assert (await client.rest())[-len(REFUSE) :] == REFUSE
        await refused(caplog, there, "wrong proof")


@both_loops
async def test_a_version_that_nobody_speaks(certs, caplog):
    async with (
        receiver(psk(certs)) as there,
        stranger(there.address, context()) as client,
    ):
        await client.send(
            wire(RawFrame(1, Hello(bytes(32), Method.PSK, (7,)).encode()))
        )
        assert await client.rest() == REFUSE
        await refused(caplog, there, "no common version, it offers 7")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (wire(RawFrame(9, b"data")), r"a frame of type 9 \(await hello\)"),
        (wire(RawFrame(3, bytes(32))), "a frame of type 3"),
        (wire(RawFrame(4, bytes(32))), "a frame of type 4"),
        (wire(RawFrame(1, b"hello")), "HELLO of 5 bytes"),
    ],
)
@both_loops
async def test_a_stranger_inside_tls(certs, caplog, sent, reason):
    async with (
        receiver(psk(certs)) as there,
        stranger(there.address, context()) as client,
    ):
        await client.send(sent)
        assert await client.rest() == REFUSE
        await refused(caplog, there, reason)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (wire(RawFrame(1, bytes(129))), "announces 129 bytes, at most 128"),
        (HEADER.pack(1, 0, 0, 0xFFFFFFFF, 0), "announces 4294967295 bytes"),
        (b"\0" * 64, "expected a frame"),
        (b"".join(encode_frame(9, bytes(9000), compress=True)), "grow beyond 128"),
    ],
)
@both_loops
async def test_a_stranger_who_speaks_no_frames(certs, caplog, sent, reason):
    async with (
        receiver(psk(certs)) as there,
        stranger(there.address, context()) as client,
    ):
        await client.send(sent)
        assert await client.rest() == b""
        await refused(caplog, there, reason)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@both_loops
async def test_silence_ends_soon(certs, caplog, tls):
    async with (
        receiver(psk(certs), handshake_s=0.2) as there,
        stranger(there.address, context() if tls else None) as client,
    ):
        assert await client.rest() == b""
        await refused(caplog, there, "no handshake within 0.2 s")


@both_loops
async def test_who_only_looks_whether_the_port_is_open_is_no_failure(certs, caplog):
    async with receiver(psk(certs)) as there:
        for count in range(1, 8):
            async with stranger(there.address):
                pass
            await refused(caplog, there, "it left", count)
        async with await connect(*there.address, auth=ClientAuth(TOKEN)) as channel:
            await exchange(channel)


# -- who isn't our receiver -------------------------------------------------------


async def relayed(certs, address, auth):
    """Connect through a man in the middle with his own certificate."""

    async def relay(one):
        async with stranger(address, context()) as other:

            async def pump(source, target):
                while (frame := await source.receive()) is not None:
                    await target.send(wire(frame))
                target.writer.close()

            await asyncio.gather(pump(one, other), pump(other, one))

    tls = context(certs.mallory.cert, certs.mallory.key, server=True)
    async with impostor(tls, relay) as (where, seen):
        try:
            await connect(*where[:2], auth=auth)
        finally:
            assert all(TOKEN not in one.got for one in seen)
            relayed.seen = b"".join(one.got for one in seen)


@both_loops
async def test_a_man_in_the_middle_who_relays(certs, caplog):
    async with receiver(psk(certs)) as there:
        with pytest.raises(AuthenticationError, match="refused us"):
            await relayed(certs, there.address, ClientAuth(TOKEN))
        await refused(caplog, there, "wrong proof")


@pytest.mark.parametrize(
    "options", [{"fingerprints": ("ab" * 32,)}, {"ca": True}], ids=["pin", "ca"]
)
@both_loops
async def test_a_man_in_the_middle_is_told_nothing(certs, options):
    async with receiver(psk(certs)) as there:
        auth = sender(certs, **{"ca": False, **options})
        with pytest.raises(AuthenticationError, match="nothing was sent"):
            await relayed(certs, there.address, auth)
        assert relayed.seen == b""


@both_loops
async def test_a_wrong_pin(certs, caplog):
    async with receiver(psk(certs)) as there:
        auth = ClientAuth(TOKEN, fingerprints=(certs.mallory.fingerprint,))
        with pytest.raises(AuthenticationError, match="another certificate") as caught:
            await connect(*there.address, auth=auth)
        assert certs.own.fingerprint.upper() in str(caught.value).replace(":", "")
        await refused(caplog, there, "it left")


async def false_receiver(certs, talk, auth=None):
    tls = context(certs.mallory.cert, certs.mallory.key, server=True)
    async with impostor(tls, talk) as (where, _):
        await connect(*where[:2], auth=auth or ClientAuth(TOKEN), timeout_s=5)


@both_loops
async def test_an_impostor_with_a_stolen_transcript(certs):
    async with receiver(psk(certs)) as there:
        async with stranger(there.address, context()) as right:
            _, challenge, _, accept = await right.prove(TOKEN)

    async def talk(victim):
        await victim.receive()
        await victim.send(wire(challenge))
        await victim.receive()
        await victim.send(wire(accept))
        await victim.rest()

    with pytest.raises(AuthenticationError, match="doesn't know our token"):
        await false_receiver(certs, talk)


@both_loops
async def test_a_reflected_mac(certs):
    async def talk(victim):
        await victim.receive()
        challenge = Challenge(1, bytes(32), Method.PSK).encode()
        await victim.send(wire(RawFrame(2, challenge)))
        proof = await victim.receive()
        await victim.send(wire(RawFrame(4, proof.payload)))
        await victim.rest()

    with pytest.raises(AuthenticationError, match="doesn't know our token"):
        await false_receiver(certs, talk)


@pytest.mark.parametrize(
    ("challenge", "text"),
    [
        (Challenge(1, bytes(32), Method.MTLS), "set up for psk"),
        (Challenge(2, bytes(32), Method.PSK), "chose version 2"),
    ],
)
@both_loops
async def test_an_impostor_who_asks_for_less(certs, challenge, text):
    async def talk(victim):
        await victim.receive()
        await victim.send(wire(RawFrame(2, challenge.encode())))
        await victim.rest()

    with pytest.raises(AuthenticationError, match=text):
        await false_receiver(certs, talk)


@both_loops
async def test_an_impostor_who_accepts_at_once(certs):
    async def talk(victim):
        await victim.send(wire(RawFrame(4, bytes(32))))
        await victim.rest()

    with pytest.raises(RemoteProtocolError, match="a frame of type 4"):
        await false_receiver(certs, talk)


@both_loops
async def test_an_impostor_who_hangs_up(certs):
    async def talk(victim):
        await victim.receive()

    with pytest.raises(TransportError):
        await false_receiver(certs, talk)


@both_loops
async def test_a_receiver_that_says_nothing(certs):
    async def talk(victim):
        await victim.rest()

    tls = context(certs.mallory.cert, certs.mallory.key, server=True)
    async with impostor(tls, talk) as (where, _):
        with pytest.raises(TransportError, match=r"within 0.2 s"):
            await connect(*where[:2], auth=ClientAuth(TOKEN), timeout_s=0.2)


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ("mallory", "not trusted .*self.signed"),
        ("strange", "not trusted"),
        ("expired", "certificate has expired"),
        ("elsewhere", "not trusted .*IP address mismatch"),
        ("unnamed", "not trusted"),
        ("old", "not trusted"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@both_loops
async def test_a_receiver_whose_certificate_is_wrong(certs, caplog, own, text, host):
    wrong = getattr(certs, own)
    auth = ServerAuth(wrong.cert, wrong.key, TOKEN)
    if host == "localhost":
        text = text.replace("IP address mismatch", "Hostname mismatch")
    async with receiver(auth) as there:
        with pytest.raises(AuthenticationError, match=text) as caught:
            await connect(host, there.address[1], auth=sender(certs))
        assert "nothing was sent" in str(caught.value)
        await refused(caplog, there, "")


@both_loops
async def test_something_else_than_a_receiver(certs):
    async def talk(reader, writer):
        await reader.read(10)
        writer.write(b"220 mail.example.org ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        address = server.sockets[0].getsockname()
        with pytest.raises(AuthenticationError, match=r"doesn't speak TLS 1.3"):
            await connect(*address, auth=ClientAuth(TOKEN))


@both_loops
async def test_a_receiver_of_tls_1_2(certs):
    tls = context(
        certs.own.cert, certs.own.key, server=True, highest=ssl.TLSVersion.TLSv1_2
    )

    async def talk(victim):
        await victim.rest()

    async with impostor(tls, talk) as (where, _):
        with pytest.raises((AuthenticationError, TransportError)):
            await connect(*where[:2], auth=ClientAuth(TOKEN))


@both_loops
async def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TransportError, match=f"at 127.0.0.1:{port}: Connection ref"):
        await connect("127.0.0.1", port, auth=ClientAuth(TOKEN))


@both_loops
async def test_no_such_host():
    with pytest.raises(
        TransportError, match=r"no receiver can be reached at .*invalid"
    ):
        await connect("no.such.host.invalid", 9190, auth=ClientAuth(TOKEN))


# -- failures are counted ---------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@both_loops
async def test_five_failures_and_the_address_waits_a_minute(certs, caplog):
    clock = Clock()
    async with receiver(psk(certs), clock=clock) as there:
        for count in range(1, 6):
            with pytest.raises(AuthenticationError):
                await connect(*there.address, auth=ClientAuth(OTHER))
            await refused(caplog, there, "wrong proof", count)
        # Dropped before a byte of TLS, the right token or not, and said once.
        for _ in range(3):
            async with stranger(there.address) as client:
                assert await client.rest() == b""
            with pytest.raises(TransportError):
                await connect(*there.address, auth=ClientAuth(TOKEN))
        await refused(caplog, there, "too many failures", 6)
        clock.now += 59.9
        with pytest.raises(TransportError):
            await connect(*there.address, auth=ClientAuth(TOKEN))
        clock.now += 0.2
        async with await connect(*there.address, auth=ClientAuth(TOKEN)) as channel:
            await exchange(channel)


@both_loops
async def test_failures_long_ago_or_before_a_success_do_not_count(certs, caplog):
    clock = Clock()
    async with receiver(psk(certs), clock=clock) as there:
        for count in range(1, 13):
            with pytest.raises(AuthenticationError):
                await connect(*there.address, auth=ClientAuth(OTHER))
            await until(lambda n=count: len(refusals(caplog)) == n)
            if count <= 4:
                clock.now += 20.0
            elif count % 3 == 0:
                async with await connect(*there.address, auth=ClientAuth(TOKEN)):
                    pass
        assert "too many failures" not in caplog.text


@both_loops
async def test_one_address_cannot_take_all_handshakes(certs, caplog):
    async with (
        receiver(psk(certs), handshakes=4, handshake_s=5.0) as there,
        stranger(there.address),
        stranger(there.address),
    ):
        for _ in range(3):
            async with stranger(there.address) as third:
                assert await third.rest() == b""
        await refused(caplog, there, "too many handshakes at once")  # said once


@both_loops
async def test_channels_that_are_open_take_no_handshake(certs):
    async with receiver(psk(certs), handshakes=2) as there:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                channel = await connect(*there.address, auth=ClientAuth(TOKEN))
                await stack.enter_async_context(channel)
                await exchange(channel)


@both_loops
async def test_who_leaves_again_and_again_waits_too(certs, caplog):
    clock = Clock()
    async with receiver(psk(certs), clock=clock) as there:
        for count in range(1, 121):
            async with stranger(there.address):
                pass
            await until(lambda n=count: len(refusals(caplog)) == n)
        async with stranger(there.address) as client:
            assert await client.rest() == b""
        await refused(caplog, there, "too many failures", 121)
        clock.now += 61
        async with await connect(*there.address, auth=ClientAuth(TOKEN)) as channel:
            await exchange(channel)


def test_an_address_blocked_is_not_another():
    throttle = Throttle(failures=2, window_s=60)
    for address in ("192.0.2.1", "2001:db8::1"):
        throttle.failed(address, 0.0)
        assert not throttle.blocked(address, 0.0)
        throttle.failed(address, 10.0)
        assert throttle.blocked(address, 69.9)
        assert not throttle.blocked(address, 70.0)
    assert throttle.blocked("::ffff:192.0.2.1", 60.0)
    assert throttle.blocked("2001:db8::ffff%eth0", 60.0)  # all of a /64 is one host
    assert not throttle.blocked("2001:db8:0:1::1", 60.0)
    assert not throttle.blocked("192.0.2.2", 60.0)


def test_a_throttle_remembers_a_bounded_number_of_addresses():
    throttle = Throttle()
    for number in range(3 * MAX_ADDRESSES):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(throttle) == MAX_ADDRESSES


# -- what passes ------------------------------------------------------------------


class Message:
    """Like those of dr_frames."""

    def __init__(self, type, *buffers, compressible=True):
        self.encoded = type, list(buffers), compressible

    def encode(self):
        return self.encoded


@both_loops
async def test_frames_of_every_size_come_back(certs):
    text = b"a line of a disk, again and again\n"
    payloads = [
        b"",
        b"x",
        text * 200,
        (text * (MiB // len(text) + 1))[:MiB],
        (text * (MiB // len(text) + 1))[:MiB],  # by now in a thread
        bytes(MiB + 65536),
        os.urandom(70_000),
        os.urandom(MiB),
    ]
    async with joined(certs) as (channel, there):
        for payload in payloads:
            await channel.send(Message(17, payload[:10], payload[10:]))
            assert await channel.receive() == RawFrame(17, payload)
        peer = there.handler.channels[0]
        assert channel.sent_bytes == peer.received_bytes
        assert channel.received_bytes == peer.sent_bytes
        assert MiB < channel.sent_bytes < 1.2 * MiB


@both_loops
async def test_what_never_shrinks_is_seldom_tried(certs, monkeypatch):
    tried = []

    def spy(type, *buffers, compress=False, **options):
        tried.append(compress)
        return encode_frame(type, *buffers, compress=compress, **options)

    monkeypatch.setattr("pveplug.dr.channel.encode_frame", spy)

    async def sink(channel):
        while await channel.receive() is not None:
            pass

    async with joined(certs, sink) as (channel, _):
        for _ in range(100):
            await channel.send_raw(9, os.urandom(5000), compress=True)
        assert 5 <= sum(tried) <= 11
        before = channel.sent_bytes
        for _ in range(116):
            await channel.send_raw(9, bytes(5000), compress=True)
        assert channel.sent_bytes - before < 15 * 5100 + 116 * 100


@both_loops
async def test_buffers_may_be_used_again(certs):
    got = []

    async def collect(channel):
        while (frame := await channel.receive()) is not None:
            got.append(bytes(frame.payload))
        done.set()

    done = asyncio.Event()
    async with joined(certs, collect) as (channel, _):
        buffer = bytearray(200_000)
        for number in range(100):
            buffer[:] = bytes([number]) * len(buffer)
            await channel.send_raw(9, buffer, compress=number % 2 == 0)
        buffer[:] = b"\xff" * len(buffer)
        await channel.aclose()
        await done.wait()
    assert got == [bytes([number]) * 200_000 for number in range(100)]


@both_loops
async def test_several_tasks_may_send(certs):
    got = []

    async def collect(channel):
        while (frame := await channel.receive()) is not None:
            got.append((frame.type, frame.payload[0], len(set(bytes(frame.payload)))))
        done.set()

    done = asyncio.Event()
    async with joined(certs, collect) as (channel, _):

        async def one(type):
            for number in range(30):
                payload = bytes([number]) * (300_000 if number % 3 else 10)
                await channel.send_raw(type, payload, compress=type % 2 == 0)

        await asyncio.gather(*(one(type) for type in range(20, 24)))
        await channel.aclose()
        await done.wait()
    for type in range(20, 24):
        assert [n for t, n, _ in got if t == type] == list(range(30))
    assert {distinct for _, _, distinct in got} == {1}


@both_loops
async def test_the_first_frame_of_a_receiver_may_be_large(certs):
    async def greet(channel):
        await channel.send_raw(9, b"z" * MiB)
        await channel.receive()

    async with joined(certs, greet) as (channel, _):
        assert len((await channel.receive()).payload) == MiB


@both_loops
async def test_the_end_is_none_on_the_other_side(certs):
    async def bye(channel):
        await channel.send_raw(9, b"last")

    async with joined(certs, bye) as (channel, _):
        assert await channel.receive() == RawFrame(9, b"last")
        assert await channel.receive() is None
        assert await channel.receive() is None
        with pytest.raises(TransportError):
            await channel.send_raw(9, b"too late")


@both_loops
async def test_what_was_sent_before_closing_arrives(certs):
    got, done = [], asyncio.Event()

    async def collect(channel):
        while (frame := await channel.receive()) is not None:
            got.append(len(frame.payload))
        done.set()

    async with joined(certs, collect) as (channel, _):
        for _ in range(3):
            await channel.send_raw(9, os.urandom(MiB))
        await channel.aclose()
        async with asyncio.timeout(10):
            await done.wait()
    assert got == [MiB] * 3


@pytest.mark.parametrize("count", [1, 4], ids=["all of it here", "reading has paused"])
@both_loops
async def test_who_reads_late_still_gets_all_and_the_end(certs, count):
    go, got = asyncio.Event(), []

    async def late(channel):
        await go.wait()
        while (frame := await channel.receive()) is not None:
            got.append(len(frame.payload))
        got.append(None)

    async with joined(certs, late) as (channel, there):
        for _ in range(count):
            await channel.send_raw(9, os.urandom(MiB))
        await until(lambda: there.handler.channels)
        peer = there.handler.channels[0]
        closing = asyncio.create_task(channel.aclose())
        await until(lambda: peer.received_bytes > min(count, 2) * MiB)
        if count == 1:
            await closing  # the connection is gone before anybody has asked
        go.set()
        await closing
        await until(lambda: got and got[-1] is None)
    assert got == [MiB] * count + [None]


@both_loops
async def test_a_closed_channel_says_so(certs):
    async with joined(certs) as (channel, _):
        await channel.aclose()
        await channel.aclose()
        channel.abort()
        for attempt in (channel.receive(), channel.send_raw(9)):
            with pytest.raises(TransportError, match="was closed"):
                await attempt


@both_loops
async def test_a_cut_wakes_who_waits(certs):
    async def cut(channel):
        await channel.receive()
        channel.abort()

    async with joined(certs, cut) as (channel, _):
        await channel.send_raw(9)
        with contextlib.suppress(TransportError):
            assert await channel.receive() is None


@both_loops
async def test_two_tasks_cannot_receive(certs):
    async with joined(certs) as (channel, _):
        waiting = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        with pytest.raises(LocalProtocolError, match="two tasks"):
            await channel.receive()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await exchange(channel)  # a cancelled wait has lost nothing


@both_loops
async def test_a_sender_waits_for_a_receiver_that_does_not_read(certs):
    go = asyncio.Event()
    total = 0

    async def late(channel):
        nonlocal total
        await go.wait()
        while (frame := await channel.receive()) is not None:
            total += len(frame.payload)
        go.clear()

    async with joined(certs, late) as (channel, there):
        block = os.urandom(MiB)

        async def send():
            for _ in range(40):
                await channel.send_raw(9, block)

        sending = asyncio.create_task(send())
        await until(lambda: there.handler.channels)
        before = -1
        while before != channel.sent_bytes:  # until it has come to a stop
            before = channel.sent_bytes
            await asyncio.sleep(0.2)
        assert not sending.done()
        # Both queues, what TLS and the kernel hold of them, and a frame each.
        assert channel.sent_bytes < READ_BYTES + WRITE_BYTES + 14 * MiB
        received = there.handler.channels[0].received_bytes
        assert received < READ_BYTES + 2 * MiB
        go.set()
        await sending
        await channel.aclose()
        await until(lambda: not go.is_set())
    assert total == 40 * MiB


@both_loops
async def test_bandwidth_is_limited(certs):
    async with joined(certs, client={"bwlimit": 400_000}) as (channel, _):
        began = time.monotonic()
        for _ in range(4):
            await channel.send_raw(9, os.urandom(30_000))
            await channel.receive()
        assert time.monotonic() - began >= 0.25  # 120,000 of 400,000 a second


@both_loops
async def test_what_is_compressed_counts_as_it_travels(certs):
    async with joined(certs, client={"bwlimit": 100_000}) as (channel, _):
        async with asyncio.timeout(5):
            for _ in range(4):
                await channel.send_raw(9, bytes(MiB), compress=True)
                await channel.receive()


@both_loops
async def test_a_frame_that_is_wrong_ends_the_channel(certs):
    failed = []

    async def watch(channel):
        try:
            await echo(channel)
        except RemoteProtocolError as error:
            failed.append(error)
            raise

    async with receiver(psk(certs), watch) as there:
        async with stranger(there.address, context()) as client:
            await client.prove(TOKEN)
            await client.send(HEADER.pack(9, 0, 0, 3, 1) + b"abc")
            await client.rest()
            await until(lambda: failed)
    assert re.match(r"127\.0\.0\.1:\d+: DR channel: .*was damaged", str(failed[0]))


@both_loops
async def test_a_connection_cut_within_a_frame_may_be_tried_again(certs):
    failed = []

    async def watch(channel):
        try:
            await echo(channel)
        except TransportError as error:
            failed.append(error)

    async with receiver(psk(certs), watch) as there:
        async with stranger(there.address, context()) as client:
            await client.prove(TOKEN)
            await client.send(wire(RawFrame(9, bytes(90_000)))[:50_000])
            client.writer.close()
            await until(lambda: failed)


@both_loops
async def test_a_handler_that_fails_takes_only_its_channel_along(certs, caplog):
    async def fail(channel):
        if (await channel.receive()).payload == b"fail":
            raise ValueError("a bug")
        await channel.send_raw(9, b"fine")

    async with receiver(psk(certs), fail) as there:
        for payload, answer in ((b"fail", None), (b"go", RawFrame(9, b"fine"))):
            auth = ClientAuth(TOKEN)
            async with await connect(*there.address, auth=auth) as channel:
                await channel.send_raw(9, payload)
                assert await channel.receive() == answer
    assert "a bug" in caplog.text


# -- heartbeats -------------------------------------------------------------------


@both_loops
async def test_idle_ends_stay_together(certs):
    async with joined(certs, ping_s=0.04, silence_s=0.2) as (channel, there):
        await exchange(channel)
        peer = there.handler.channels[0]
        before = channel.received_bytes, peer.received_bytes
        await until(lambda: channel.received_bytes >= before[0] + 12 * 12)
        await until(lambda: peer.received_bytes >= before[1] + 12 * 12)
        await exchange(channel)  # and receive() has swallowed them all


@both_loops
async def test_a_silent_peer_is_given_up(certs):
    failed = []

    async def watch(channel):
        try:
            await echo(channel)
        except TransportError as error:
            failed.append(str(error))

    async with receiver(psk(certs), watch, ping_s=0.05, silence_s=0.2) as there:
        async with stranger(there.address, context()) as client:
            await client.prove(TOKEN)
            first = await client.receive()
            assert (first.type, first.payload) == (6, b"")
            await client.rest()
            await until(lambda: failed)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ said nothing for 0.2 s", failed[0])


@both_loops
async def test_a_peer_is_not_silent_while_we_do_not_read(certs):
    """A receiver that applies an increment for an hour lets its sender wait."""
    go = asyncio.Event()

    async def late(channel):
        await go.wait()
        await echo(channel)

    options = {"ping_s": 0.04, "silence_s": 0.2}
    async with joined(certs, late, **options) as (channel, there):
        block = os.urandom(MiB)
        sending = asyncio.create_task(_send(channel, block, 20))
        await until(lambda: there.handler.channels)
        peer = there.handler.channels[0]
        before = -1
        while before != peer.received_bytes:
            before = peer.received_bytes
            await asyncio.sleep(0.5)  # twice the silence that is allowed
        assert not sending.done()
        go.set()
        for _ in range(20):
            assert len((await channel.receive()).payload) == MiB
        await sending


async def _send(channel, block, count):
    for _ in range(count):
        await channel.send_raw(9, block)


@both_loops
async def test_a_ping_with_a_payload_is_wrong(certs):
    failed = []

    async def watch(channel):
        try:
            await echo(channel)
        except RemoteProtocolError as error:
            failed.append(str(error))

    async with receiver(psk(certs), watch) as there:
        async with stranger(there.address, context()) as client:
            await client.prove(TOKEN)
            await client.send(wire(RawFrame(6, b"x")))
            await until(lambda: failed)
    assert "a PING with a payload" in failed[0]


# -- the server -------------------------------------------------------------------


@both_loops
async def test_a_taken_port_is_said_in_these_words(certs):
    async with receiver(psk(certs)) as there:
        port = there.address[1]
        with pytest.raises(TransportError) as caught:
            await serve("127.0.0.1", port, auth=psk(certs), handler=echo)
    assert str(caught.value).startswith(
        f"port {port} is taken: a receiver and a sender (File Daemon) on one host "
        "clash; give the receiver a port of its own"
    )


@both_loops
async def test_an_address_that_is_not_ours(certs):
    with pytest.raises(TransportError, match=r"cannot listen on 192.0.2.1:9190: "):
        await serve("192.0.2.1", 9190, auth=psk(certs), handler=echo)


@both_loops
async def test_new_credentials_without_a_restart(certs, caplog):
    async with receiver(psk(certs)) as there:
        async with await connect(*there.address, auth=ClientAuth(TOKEN)) as old:
            await exchange(old)
            there.server.reload(mutual(certs, OTHER))
            await exchange(old)  # channels that are open stay
            with pytest.raises((AuthenticationError, TransportError)):
                await connect(*there.address, auth=ClientAuth(TOKEN))
            given = sender(certs, OTHER, certs.client)
            async with await connect(*there.address, auth=given) as new:
                await exchange(new)


@both_loops
async def test_wrong_new_credentials_change_nothing(certs, tmp_path):
    async with receiver(psk(certs)) as there:
        for wrong in (
            ServerAuth(certs.own.cert, certs.client.key, TOKEN),
            ServerAuth(certs.own.cert, str(tmp_path / "none"), TOKEN),
            ServerAuth(certs.own.cert, certs.own.key),
        ):
            with pytest.raises(ConfigError):
                there.server.reload(wrong)
        async with await connect(*there.address, auth=ClientAuth(TOKEN)) as channel:
            await exchange(channel)


@both_loops
async def test_an_ending_server_ends_its_handlers(certs):
    ended = []

    async def wait(channel):
        try:
            await channel.receive()
        finally:
            ended.append(channel.peer)

    async with joined(certs, wait) as (channel, there):
        await until(lambda: there.handler.channels)
        await there.server.aclose()
        assert len(ended) == 1
        with contextlib.suppress(TransportError):
            assert await channel.receive() is None


@both_loops
async def test_a_server_that_accepts_no_more_keeps_what_it_has(certs):
    async with joined(certs) as (channel, there):
        await exchange(channel)
        await there.server.stop_accepting()
        with pytest.raises(TransportError, match="Connection refused"):
            await connect(*there.address, auth=ClientAuth(TOKEN))
        await exchange(channel)


# -- what can't be meant ----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "a sender needs a token"),
        ({"token": b"short"}, "at least 16 characters"),
        ({"cert_file": "server"}, "tell the receiver from an impostor"),
        ({"token": TOKEN, "fingerprints": ("xyz",)}, "dr_peer_fingerprint 'xyz'"),
        ({"token": TOKEN, "ca_file": "/nowhere"}, "dr_auth_ca /nowhere: No such file"),
        ({"token": TOKEN, "cert_file": "/nowhere"}, "dr_auth_cert /nowhere"),
    ],
)
@both_loops
async def test_a_sender_that_is_set_up_wrong_never_connects(certs, given, text):
    if given.get("cert_file") == "server":
        given = {"cert_file": certs.server.cert, "key_file": certs.server.key}
    with pytest.raises(ConfigError, match=text):
        await connect("127.0.0.1", 1, auth=ClientAuth(**given))


@both_loops
async def test_a_receiver_that_is_set_up_wrong_never_listens(certs):
    for given, text in [
        ({}, "would take anybody"),
        ({"token": b""}, "at least 16"),
        ({"token": TOKEN, "ca_file": certs.own.key}, "ca_file .*: not usable"),
    ]:
        auth = ServerAuth(certs.own.cert, certs.own.key, **given)
        with pytest.raises(ConfigError, match=text):
            await serve("127.0.0.1", 0, auth=auth, handler=echo)


def test_nothing_secret_is_shown(certs):
    for auth in (ClientAuth(TOKEN), psk(certs)):
        assert TOKEN.decode() not in repr(auth)
