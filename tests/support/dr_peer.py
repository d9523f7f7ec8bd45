# SPDX-License-Identifier: Apache-2.0
"""A receiver in memory, at the other end of a sender's conversation.

It takes frames through their encoding, keeps the disks as byte arrays, and does only
what the protocol promises: enough to see what a sender sends.
"""

from __future__ import annotations

import asyncio

from pveplug.proto.dr_digest import RunDigest, fnv1a_64, leaf_digests
from pveplug.proto.dr_frames import (
    LEAF,
    AskDigests,
    AskSamples,
    Block,
    Digests,
    Disk,
    DiskEnd,
    Frame,
    Message,
    Samples,
    Zero,
    decode,
)
from pveplug.proto.dr_wire import RawFrame


class MemoryReceiver:
    """The ``Wire`` of a conversation; ``disks`` is the replica."""

    peer = "memory"

    def __init__(self, disks: dict[str, bytearray]) -> None:
        self.disks = disks
        self.seen: list[Message] = []
        self.ended: list[str] = []
        self._keys: dict[int, str] = {}
        self._runs: dict[int, RunDigest] = {}
        self._answers: asyncio.Queue[RawFrame | None] = asyncio.Queue()

    @property
    def data_bytes(self) -> int:
        return sum(len(f.data) for f in self.seen if isinstance(f, Block))

    async def send(self, frame: Frame) -> None:
        kind, buffers, _ = frame.encode()
        message = decode(kind, b"".join(buffers))
        self.seen.append(message)
        self._take(message)

    async def receive(self) -> RawFrame | None:
        return await self._answers.get()

    def say(self, frame: Frame) -> None:
        """Let the sender hear something."""
        kind, buffers, _ = frame.encode()
        self._answers.put_nowait(RawFrame(kind, b"".join(buffers)))

    def hang_up(self) -> None:
        self._answers.put_nowait(None)

    def _take(self, message: Message) -> None:
        match message:
            case Disk():
                self._keys[message.number] = message.key
                self._runs[message.number] = RunDigest()
                disk = self.disks.setdefault(message.key, bytearray())
                disk.extend(bytes(message.size - len(disk)))
            case Block() | Zero():
                self._runs[message.number].add(message)
                disk = self.disks[self._keys[message.number]]
                assert message.end <= len(disk)
                data = (
                    message.data
                    if isinstance(message, Block)
                    else bytes(message.length)
                )
                disk[message.offset : message.end] = data
            case DiskEnd():
                run = self._runs[message.number]
                assert (run.frames, run.bytes, run.hexdigest()) == (
                    message.frames,
                    message.bytes,
                    message.digest,
                )
                self.ended.append(self._keys[message.number])
            case AskDigests():
                disk = self.disks[message.key]
                part = disk[message.offset : message.offset + message.length]
                self.say(Digests(0, message.offset, leaf_digests(part)))
            case AskSamples():
                disk = self.disks[message.key]
                values = tuple(fnv1a_64(disk[at : at + LEAF]) for at in message.offsets)
                self.say(Samples(message.key, values))
