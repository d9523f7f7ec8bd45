# SPDX-License-Identifier: Apache-2.0
"""Feed damaged streams to every parser of the replication channel.

``python -m fuzz.dr_channel [--seconds 60] [--seed N]``. Each stream begins as a right
one and is damaged at random; a frame's checksum is mostly made right again, so that
what lies behind it is reached. Whatever comes must give the documented error or a
result: anything else ends the run with the seed and the bytes that did it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
import traceback
import zlib

from pveplug.errors import RemoteProtocolError
from pveplug.proto import dr_frames
from pveplug.proto.dr_auth import (
    Challenge,
    ClientHandshake,
    Hello,
    Identity,
    Method,
    ServerHandshake,
    State,
)
from pveplug.proto.dr_wire import HEADER, MAX_PAYLOAD, FrameReader, encode_frame

IDENTITY = Identity(Method.PSK, bytes(32), token=b"t" * 32)


def seeds() -> list[bytes]:
    """Right streams: handshakes, messages of JSON and of bytes, compressed frames."""
    hello = ClientHandshake(IDENTITY, bytes(32)).start()
    (opening,) = FrameReader().receive_data(hello)
    challenge = ServerHandshake(IDENTITY, bytes(32)).receive(opening)
    frames = [
        dr_frames.Block(0, 65536, b"disk" * 3000),
        dr_frames.Zero(0, 65536, 1 << 30),
        dr_frames.Open("seed", "0f" * 16, 100, "web", "pve", "job.2026", points=7),
        dr_frames.Say("info", "a line of the job log"),
    ]
    streams = [hello, challenge, hello + challenge, b"".join(encode_frame(6))]
    for frame in frames:
        type, buffers, compress = frame.encode()
        streams.append(b"".join(encode_frame(type, *buffers)))
        streams.append(b"".join(encode_frame(type, *buffers, compress=compress)))
    return streams


def damaged(stream: bytes, dice: random.Random) -> bytes:
    """Return the stream with some bytes changed, moved, repeated or cut off."""
    data = bytearray(stream)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0 if data:
                data[at % len(data)] = dice.randrange(256)
            case 1:
                data[at:at] = dice.randbytes(dice.randint(1, 9))
            case 2:
                del data[at : at + dice.randint(1, 9)]
            case 3:
                data[at : at + 4] = dice.choice(
                    [b"\xff" * 4, bytes(4), MAX_PAYLOAD.to_bytes(4, "big")]
                )
            case _:
                data += data[at : at + 200]
    if dice.random() < 0.8 and len(data) >= HEADER.size:
        payload = bytes(data[HEADER.size :])
        head = data[0] or 1, data[1] & 1, 0, len(payload), zlib.crc32(payload)
        data[: HEADER.size] = HEADER.pack(*head)
    return bytes(data)


def feed(stream: bytes, dice: random.Random) -> None:
    """Give it to everything that reads what a peer sent."""
    frames = []
    reader = FrameReader()
    with contextlib.suppress(RemoteProtocolError):
        at = 0
        while at < len(stream):
            step = dice.randint(1, len(stream))
            frames += reader.receive_data(stream[at : at + step])
            at += step
        reader.receive_eof()
    server = ServerHandshake(IDENTITY, os.urandom(32))
    client = ClientHandshake(IDENTITY, os.urandom(32))
    client.start()
    for frame in frames:
        server.receive(frame)
        with contextlib.suppress(RemoteProtocolError):
            client.receive(frame)
        with contextlib.suppress(RemoteProtocolError):
            dr_frames.decode(frame.type, frame.payload)
        for kind in (Hello, Challenge):
            with contextlib.suppress(RemoteProtocolError):
                kind.decode(frame.payload)
    if State.DONE in (server.state, client.state):
        raise AssertionError("somebody got in")


def main() -> int:
    """Run until the time is over; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)  # noqa: S311 - it must be repeatable
    corpus, count = seeds(), 0
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        stream = damaged(dice.choice(corpus), dice)
        count += 1
        try:
            feed(stream, dice)
        except Exception:
            traceback.print_exc()
            sys.stderr.write(f"seed {arguments.seed}, stream {count}: {stream.hex()}\n")
            return 1
    sys.stdout.write(f"{count} streams, seed {arguments.seed}: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
