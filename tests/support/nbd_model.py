# SPDX-License-Identifier: Apache-2.0
"""An NBD server over a bytearray, without a socket: the stranger our client talks to.

It is written from the specification, shares only the constants with the client, and
can be told to be old, terse, fragmenting, or wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from pveplug.nbd.client import UnixAddress
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Chunk, Command, Info, Option, Reply

FLAGS = (
    wire.TransmissionFlag.HAS_FLAGS
    | wire.TransmissionFlag.SEND_FLUSH
    | wire.TransmissionFlag.SEND_FUA
    | wire.TransmissionFlag.SEND_TRIM
    | wire.TransmissionFlag.SEND_WRITE_ZEROES
    | wire.TransmissionFlag.SEND_DF
)


@dataclass
class Manner:
    """How the model behaves."""

    go: bool = True
    structured: bool = True
    extended: bool = False
    no_zeroes: bool = True
    starttls: bool = False
    flags: int = FLAGS
    block: tuple[int, int, int] | None = (1, 4096, 32 * 1024 * 1024)
    contexts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Context -> (length, flags) that tile the disk."""
    fragment: random.Random | None = None
    """Cuts reads into chunks and mixes the replies when given."""
    status_limit: int | None = None
    """Cover at most so much in one BLOCK_STATUS."""
    status_long: bool = False
    """Let the last extent reach behind what was asked."""
    fail: Callable[[Command, int, int], int] | None = None
    """(command, offset, length) -> error number, 0 for none."""


@dataclass(frozen=True)
class Request:
    command: Command
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


class ModelServer:
    """``receive(bytes)`` takes the client's bytes; ``sent`` collects the answers."""

    def __init__(self, disk: bytearray, manner: Manner | None = None) -> None:
        self.disk = disk
        self.manner = manner or Manner()
        self.sent = bytearray()
        self.seen: list[Request] = []
        self.options: list[int] = []
        self.closed = False
        self._in = bytearray()
        self._structured = self._extended = False
        self._granted: list[str] = []
        self._queue: list[list[bytes]] = []  # chunks of replies not sent yet
        self._step = self._client_flags
        flags = 1 | (2 if self.manner.no_zeroes else 0)
        self.sent += wire.GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, flags)

    def receive(self, data: bytes) -> None:
        self._in += data
        while not self.closed and self._step():
            pass

    def take_sent(self) -> bytes:
        self._mix()
        data = bytes(self.sent)
        self.sent.clear()
        return data

    # handshake

    def _take(self, count: int) -> bytes | None:
        if len(self._in) < count:
            return None
        data = bytes(self._in[:count])
        del self._in[:count]
        return data

    def _client_flags(self) -> bool:
        raw = self._take(4)
        if raw is None:
            return False
        self._client = int.from_bytes(raw, "big")
        self._step = self._option
        return True

    def _option(self) -> bool:
        size = wire.OPTION_HEADER.size
        if len(self._in) < size:
            return False
        magic, number, length = wire.OPTION_HEADER.unpack_from(self._in)
        assert magic == wire.IHAVEOPT
        if len(self._in) < size + length:
            return False
        data = self._take(size + length)[size:]
        self.options.append(number)
        manner = self.manner

        def reply(kind: int, payload: bytes = b"") -> None:
            head = (wire.OPTION_REPLY_MAGIC, number, kind, len(payload))
            self.sent.extend(wire.OPTION_REPLY.pack(*head) + payload)

        if number == Option.EXPORT_NAME:
            raw = wire.EXPORT_NAME_REPLY.pack(len(self.disk), manner.flags)
            self.sent += raw + (b"" if self._client & 2 else bytes(124))
            self._step = self._request
        elif number == Option.STRUCTURED_REPLY and manner.structured:
            self._structured = True
            reply(Reply.ACK)
        elif number == Option.EXTENDED_HEADERS and manner.extended:
            self._structured = self._extended = True
            reply(Reply.ACK)
        elif number == Option.STARTTLS and manner.starttls:
            reply(Reply.ACK)
        elif number == Option.SET_META_CONTEXT and self._structured:
            at = 4 + int.from_bytes(data[:4], "big")
            count = int.from_bytes(data[at : at + 4], "big")
            at += 4
            for _ in range(count):
                size = int.from_bytes(data[at : at + 4], "big")
                name = data[at + 4 : at + 4 + size].decode()
                at += 4 + size
                if name in manner.contexts:
                    self._granted.append(name)
                    number_ = struct.pack(">I", 100 + len(self._granted))
                    reply(Reply.META_CONTEXT, number_ + name.encode())
            reply(Reply.ACK)
        elif number == Option.GO and manner.go:
            reply(Reply.INFO, struct.pack(">H", Info.NAME) + b"model")
            reply(
                Reply.INFO,
                wire.INFO_EXPORT.pack(Info.EXPORT, len(self.disk), manner.flags),
            )
            if manner.block:
                reply(
                    Reply.INFO,
                    wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *manner.block),
                )
            reply(Reply.ACK)
            self._step = self._request
        else:
            reply(Reply.ERR_UNSUP, b"not in this model")
        return True

    # transmission

    def _request(self) -> bool:
        layout = wire.EXTENDED_REQUEST if self._extended else wire.REQUEST
        if len(self._in) < layout.size:
            return False
        magic, flags, kind, cookie, offset, length = layout.unpack_from(self._in)
        expected = wire.EXTENDED_REQUEST_MAGIC if self._extended else wire.REQUEST_MAGIC
        assert magic == expected
        command = Command(kind)
        payload = length if command is Command.WRITE else 0
        chooses = flags & wire.CommandFlag.PAYLOAD_LEN
        chosen = command is Command.BLOCK_STATUS and chooses
        if chosen:
            assert self._extended
            assert self.manner.flags & wire.TransmissionFlag.BLOCK_STATUS_PAYLOAD
            payload = length
        if command is Command.WRITE and self._extended:
            assert flags & wire.CommandFlag.PAYLOAD_LEN
        if len(self._in) < layout.size + payload:
            return False
        data = self._take(layout.size + payload)[layout.size :]
        if chosen:
            length = int.from_bytes(data[:8], "big")
        request = Request(command, flags, cookie, offset, length, data)
        self.seen.append(request)
        if command is Command.DISC:
            self.closed = True
            return False
        self._answer(request)
        return True

    def _answer(self, request: Request) -> None:
        fail = self.manner.fail
        offset, length, command = request.offset, request.length, request.command
        error = fail(command, offset, length) if fail else 0
        if error:
            text = b"as the test wants"
            payload = wire.CHUNK_ERROR_HEAD.pack(error, len(text)) + text
            if self._structured:
                self._reply([self._chunk(request, Chunk.ERROR, payload, done=True)])
            else:
                self._reply([self._simple(request, error)])
            return
        end = offset + length
        if command is Command.READ:
            if not self._structured:
                raw = bytes(self.disk[offset:end])
                self._reply([self._simple(request, 0) + raw])
            else:
                self._reply(self._read_chunks(request))
            return
        if command is Command.BLOCK_STATUS:
            self._reply(self._status_chunks(request))
            return
        if command is Command.WRITE:
            self.disk[offset:end] = request.data
        elif command is Command.WRITE_ZEROES:
            self.disk[offset:end] = bytes(length)
        if self._extended:
            self._reply([self._chunk(request, Chunk.NONE, b"", done=True)])
        else:
            self._reply([self._simple(request, 0)])

    def _simple(self, request: Request, error: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, request.cookie)

    def _chunk(
        self, request: Request, kind: int, payload: bytes, *, done: bool = False
    ) -> bytes:
        flags, size = int(done), len(payload)
        if self._extended:
            head = (wire.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie)
            return wire.EXTENDED_REPLY.pack(*head, request.offset, size) + payload
        head = (wire.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie)
        return wire.STRUCTURED_REPLY.pack(*head, size) + payload

    def _read_chunks(self, request: Request) -> list[bytes]:
        offset, length = request.offset, request.length
        rng = self.manner.fragment
        cuts = [0, length]
        if rng and not request.flags & wire.CommandFlag.DF:
            cuts = sorted({0, length, *(rng.randrange(length + 1) for _ in range(3))})
        pieces = list(itertools.pairwise(cuts))
        if rng:
            rng.shuffle(pieces)
        chunks = []
        for low, high in pieces:
            raw = bytes(self.disk[offset + low : offset + high])
            start = wire.CHUNK_OFFSET.pack(offset + low)
            if rng and not any(raw):
                hole = wire.CHUNK_HOLE.pack(offset + low, high - low)
                chunks.append((Chunk.OFFSET_HOLE, hole))
            else:
                chunks.append((Chunk.OFFSET_DATA, start + raw))
        if rng and rng.random() < 0.5:
            chunks.append((Chunk.NONE, b""))
        last = len(chunks) - 1
        return [
            self._chunk(request, kind, payload, done=i == last)
            for i, (kind, payload) in enumerate(chunks)
        ]

    def _status_chunks(self, request: Request) -> list[bytes]:
        chunks = []
        chosen = [
            int.from_bytes(request.data[at : at + 4], "big") - 101
            for at in range(8, len(request.data), 4)
        ]
        asked = chosen or range(len(self._granted))
        for i in asked:
            name = self._granted[i]
            runs = self.runs(name, request.offset, request.length)
            if request.flags & wire.CommandFlag.REQ_ONE:
                length, flags = runs[0]
                runs = [(min(length, request.length), flags)]
            number = struct.pack(">I", 101 + i)
            if self._extended:
                raw = b"".join(struct.pack(">QQ", *run) for run in runs)
                payload = number + struct.pack(">I", len(runs)) + raw
                kind = Chunk.BLOCK_STATUS_EXT
            else:
                payload = number + b"".join(struct.pack(">II", *run) for run in runs)
                kind = Chunk.BLOCK_STATUS
            done = i == asked[-1]
            chunks.append(self._chunk(request, kind, payload, done=done))
        return chunks

    def runs(self, name: str, offset: int, length: int) -> list[tuple[int, int]]:
        """What this server tells of ``[offset, offset + length)``."""
        limit = self.manner.status_limit
        end = offset + (min(length, limit) if limit else length)
        told, at = [], 0
        for size, flags in self.manner.contexts[name]:
            low, high = max(at, offset), at + size
            at = high
            if low >= end or high <= offset:
                continue
            stop = high if self.manner.status_long else min(high, end)
            told.append((stop - low, flags))
        return told

    def _reply(self, chunks: list[bytes]) -> None:
        self._queue.append(chunks)
        if not self.manner.fragment:
            self._mix()

    def _mix(self) -> None:
        """Send what waits: replies mixed, each in its own order."""
        rng = self.manner.fragment
        while self._queue:
            at = rng.randrange(len(self._queue)) if rng else 0
            self.sent += self._queue[at].pop(0)
            if not self._queue[at]:
                del self._queue[at]


@contextlib.asynccontextmanager
async def serving(
    path: str, make: Callable[[], ModelServer]
) -> AsyncIterator[UnixAddress]:
    """Serve a model to each connection on a unix socket."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        model = make()
        while not model.closed:
            writer.write(model.take_sent())
            await writer.drain()
            data = await reader.read(65536)
            if not data:
                break
            model.receive(data)

    async with listening(path, talk) as address:
        yield address


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(path: str, talk: Talk) -> AsyncIterator[UnixAddress]:
    """Run ``talk`` for each connection; at the end all have ended and are closed."""
    talks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError):
                await talk(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_unix_server(one, path)
    try:
        yield UnixAddress(path)
    finally:
        server.close()
        if talks:
            await asyncio.wait(talks, timeout=5)
        await server.wait_closed()
