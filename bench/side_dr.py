# SPDX-License-Identifier: Apache-2.0
"""Sides of disaster recovery's channel, and its yardstick."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys

from pveplug.dr.channel import Channel, ClientAuth, ServerAuth, serve
from pveplug.dr.channel import connect as connect_channel
from pveplug.proto.dr_digest import RunDigest
from pveplug.proto.dr_frames import Block, Bye, DiskEnd, decode


async def dr_channel(image: str, cert: str, key: str) -> None:
    """Send a file as blocks to a receiver that checks and digests them."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.sides", "dr-sink", cert, key),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    port = int(await server.stdout.readline())
    auth = ClientAuth(token=b"t" * 64)
    async with await connect_channel("127.0.0.1", port, auth=auth) as channel:
        digest = RunDigest()
        with open(image, "rb") as file:
            offset = 0
            while data := file.read(1 << 20):
                block = Block(0, offset, data)
                digest.add(block)
                await channel.send(block)
                offset += len(data)
        await channel.send(DiskEnd(0, digest.frames, digest.bytes, digest.hexdigest()))
        await channel.receive()
    await server.wait()


async def dr_sink(cert: str, key: str) -> None:
    """Take one session of :func:`dr_channel`."""
    over = asyncio.Event()

    async def take(channel: Channel) -> None:
        digest = RunDigest()
        while (raw := await channel.receive()) is not None:
            message = decode(raw.type, raw.payload)
            if isinstance(message, Block):
                digest.add(message)
            elif isinstance(message, DiskEnd):
                assert digest.hexdigest() == message.digest
                await channel.send(Bye())
                break
        over.set()

    auth = ServerAuth(cert_file=cert, key_file=key, token=b"t" * 64, ca_file=None)
    async with await serve("127.0.0.1", 0, auth=auth, handler=take) as server:
        sys.stdout.write(f"{server.address[1]}\n")
        sys.stdout.flush()
        await over.wait()


def tls_plain(image: str, cert: str, key: str) -> None:
    """The yardstick: a file over TLS 1.3 by blocking sockets, to whoever reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    if os.fork() == 0:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(cert, key)
        taken, _ = listener.accept()
        with context.wrap_socket(taken, server_side=True) as stream:
            buffer = bytearray(1 << 20)
            while stream.recv_into(buffer):
                pass
        os._exit(0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    plain = socket.create_connection(listener.getsockname())
    with context.wrap_socket(plain) as stream, open(image, "rb") as file:
        while data := file.read(1 << 20):
            stream.sendall(data)
    os.wait()
