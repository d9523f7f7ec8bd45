# SPDX-License-Identifier: Apache-2.0
"""Peers that a channel must not trust: by hand, over TLS or without."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from pveplug.proto.dr_auth import (
    ClientHandshake,
    Identity,
    Method,
    State,
    certificate_hash,
)
from pveplug.proto.dr_wire import FrameReader, RawFrame, encode_frame

WAIT_S = 5.0


def context(cert=None, key=None, *, highest=ssl.TLSVersion.TLSv1_3, server=False):
    """A context that verifies nothing."""
    made = ssl.SSLContext(
        ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    )
    if not server:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    made.maximum_version = highest
    if cert:
        made.load_cert_chain(cert, key)
    return made


class Stranger:
    """One connection, frame by frame."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.frames = FrameReader()
        self.waiting = []
        self.got = b""

    @property
    def server_certificate(self):
        return certificate_hash(
            self.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        )

    async def send(self, data):
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def receive(self):
        """The next frame, or None when there is no more."""
        while not self.waiting:
            data = await self._read()
            if not data:
                return None
            self.got += data
            self.waiting += self.frames.receive_data(data)
        frame = self.waiting.pop(0)
        return RawFrame(frame.type, bytes(frame.payload))

    async def rest(self):
        """Everything that still comes, as bytes."""
        while data := await self._read():
            self.got += data
        return self.got

    async def _read(self):
        try:
            async with asyncio.timeout(WAIT_S):
                return await self.reader.read(65536)
        except (ConnectionError, ssl.SSLError):
            return b""

    async def prove(self, token, *, versions=(1,), nonce=b"n" * 32):
        """Be a right client; return the frames of both sides, in order."""
        identity = Identity(Method.PSK, self.server_certificate, token=token)
        machine = ClientHandshake(identity, nonce, versions)
        sent = machine.start()
        frames = FrameReader().receive_data(sent)
        await self.send(sent)
        while machine.state is not State.DONE:
            frames.append(await self.receive())
            if reply := machine.receive(frames[-1]):
                frames += FrameReader().receive_data(reply)
                await self.send(reply)
        return frames


def wire(frame):
    return b"".join(encode_frame(frame.type, frame.payload))


@contextlib.asynccontextmanager
async def stranger(address, tls=None):
    """Connect to a receiver; ``tls`` is a context, None: plaintext."""
    reader, writer = await asyncio.open_connection(*address, ssl=tls)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def impostor(tls, talk):
    """A false receiver; ``talk(stranger)`` is what it does. Gives its address."""
    tasks, seen = set(), []

    async def serve(reader, writer):
        task = asyncio.current_task()
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        one = Stranger(reader, writer)
        seen.append(one)
        try:
            with contextlib.suppress(OSError):  # whoever it talked to has left
                await talk(one)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname(), seen
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
