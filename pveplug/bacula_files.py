# SPDX-License-Identifier: Apache-2.0
"""The files of a PTCOMM session: one being backed up, one being restored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pveplug.bacula_pipe import PtcommPipe
from pveplug.errors import LocalProtocolError, RemoteProtocolError
from pveplug.proto import ptcomm
from pveplug.proto.ptcomm import Buffer, Packet, Status
from pveplug.proto.ptcomm_words import Stat, Times, parse_command
from pveplug.units import KiB

COPY_BYTES: Final = 64 * KiB
"""Up to this size a write is copied instead of waited for."""
LENT_BYTES: Final = 32 * KiB
"""What is shorter is copied: eight pages."""
_ZEROS: Final = bytes(256 * KiB)


class Answering(Protocol):
    """What an incoming file needs of its session."""

    async def receive(self) -> Packet: ...

    def unread(self, packet: Packet) -> None: ...

    def answer(self, text: str) -> None: ...

    def refuse(self, text: str) -> None: ...


def unexpected(expected: str, packet: Packet) -> RemoteProtocolError:
    """The error for a packet that doesn't belong here."""
    return RemoteProtocolError(f"PTCOMM: expected {expected}, got {packet}")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A virtual file of a backup; ``mtime`` in seconds since 1970."""

    name: str
    size: int
    mode: int = 0o100640
    mtime: int = 0


@dataclass(frozen=True, slots=True)
class RestoreObject:
    """What an earlier job left in the catalogue, or the restore's own options.

    ``type`` is Bacula's: 25 ours (FT_RESTORE_FIRST), 28 the operator's plugin options;
    ``job_id`` is the job that stored it, 0 when the plugin doesn't say.
    """

    name: str
    job_id: int
    type: int
    data: bytes


class OutgoingFile:
    """The data of the file being backed up."""

    def __init__(self, pipe: PtcommPipe, info: FileInfo, offsets: bool) -> None:
        self.info = info
        self.position = 0
        """Where the next contiguous byte goes."""
        self.sent = 0
        """Bytes of data given to bacula-fd."""
        self._pipe = pipe
        self._offsets = offsets
        self._in_order = asyncio.Lock()
        self._open = False

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Send the bytes of ``buffers``, in a row, as those from ``offset`` on.

        When this returns the buffers may be reused: small ones (64 KiB in total) were
        copied, and go out with those that follow; larger ones have been read by
        bacula-fd. Several may be under way, and go out in the order they were begun.
        Without offsets a gap is sent as zeroes.
        Cancelled, the buffers are still being written: the file is then beyond
        repair anyway, but they must not be changed any more.

        Raises:
            LocalProtocolError: backwards without offsets, or beyond the file's end.
            TransportError: bacula-fd is gone.
        """
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        send = self._pipe.send if size > COPY_BYTES else self._pipe.gather
        mark = await self._begin(offset, size, buffers, send)
        if size > COPY_BYTES:
            await self._pipe.free(mark)
        elif mark > self._pipe.writer.done:
            await self._pipe.written(mark)

    async def begin(self, offset: int, view: memoryview) -> int:
        """Begin to send the bytes of ``view`` as those from ``offset`` on.

        It must not change until bacula-fd has read it, see :meth:`free`, and never
        again when that fails or isn't waited for. How much is begun is the caller's
        business: nothing is waited for here.

        Returns: the mark for :meth:`free`; it rises.

        Raises: as :meth:`write`.
        """
        size = len(view)
        if size < LENT_BYTES or view.readonly:
            await self.write(offset, view)
            return self._pipe.writer.queued  # not less than what was lent before
        return await self._begin(offset, size, [view], self._lend)

    async def free(self, mark: int) -> None:
        """Wait until what was begun up to ``mark`` may be changed.

        Raises:
            TransportError: bacula-fd is gone.
        """
        if mark > self._pipe.writer.reusable:
            await self._pipe.free(mark)

    async def _begin(
        self,
        offset: int,
        size: int,
        buffers: Sequence[Buffer],
        send: Callable[[Sequence[Buffer]], int],
    ) -> int:
        if offset < 0 or offset + size > self.info.size:
            raise LocalProtocolError(
                f"{self.info.name}: {size} bytes at {offset} are beyond its end at "
                f"{self.info.size}"
            )
        if not size:
            return self._pipe.writer.queued
        if self._offsets:
            return send(self._frames(offset, size, buffers))
        async with self._in_order:
            await self._fill(offset)
            return send(self._frames(offset, size, buffers))

    def _lend(self, frames: Sequence[Buffer]) -> int:
        return self._pipe.lend(
            [
                frame if isinstance(frame, memoryview) else memoryview(bytearray(frame))
                for frame in frames
            ]
        )

    def _frames(
        self, offset: int, size: int, buffers: Sequence[Buffer]
    ) -> list[Buffer]:
        """Return the packets for data that is sent next."""
        frames: list[Buffer] = []
        if not self._open:
            frames.append(ptcomm.command("DATA"))
            self._open = True
        if offset != self.position:
            frames.append(ptcomm.command(f"OFFSET:{offset}"))
        self.position = offset + size
        self.sent += size
        return frames + ptcomm.data_frames(buffers)

    async def fill(self, end: int) -> None:
        """Send zeroes up to ``end``.

        Raises:
            LocalProtocolError: more than that was written already.
            TransportError: bacula-fd is gone.
        """
        async with self._in_order:
            await self._fill(end)

    async def _fill(self, end: int) -> None:
        if end < self.position:
            raise LocalProtocolError(
                f"{self.info.name}: cannot go back from {self.position} to {end} "
                "without offsets"
            )
        while self.position < end:
            count = min(end - self.position, len(_ZEROS))
            zeros = memoryview(_ZEROS)[:count]
            frames = self._frames(self.position, count, [zeros])
            await self._pipe.written(self._pipe.send(frames))
            await asyncio.sleep(0)  # else the loop stands still if the pipe takes all

    async def finish(self) -> None:
        """End the data; without offsets the file gets its full size."""
        if not self._offsets:
            await self.fill(self.info.size)
        self._pipe.send([ptcomm.END_OF_DATA])


class IncomingFile:
    """A file that is being restored: ``accept``, then ``data``, then ``done``."""

    def __init__(self, session: Answering, name: str, stat: Stat, times: Times) -> None:
        self.name = name
        """As Bacula gives it, with the job's ``where`` in front."""
        self.kind = stat.kind
        self.size = stat.size
        self.mode = stat.mode
        self.uid, self.gid = stat.uid, stat.gid
        self.atime, self.mtime, self.ctime = times.atime, times.mtime, times.ctime
        self._session = session
        self._state = "offered"

    @property
    def settled(self) -> bool:
        """Whether bacula-fd got its last answer for this file."""
        return self._state in ("settled", "failed")

    @property
    def failed(self) -> bool:
        """Whether that answer was :meth:`fail`."""
        return self._state == "failed"

    async def accept(self, answer: str = "OK") -> None:
        """Answer the offer: ``OK`` to get the data, ``SKIP``, or ``CORE`` to have
        Bacula itself write the file; after the latter two there is nothing to come.
        """
        self._expect("offered")
        if answer not in ("OK", "SKIP", "CORE"):
            raise LocalProtocolError(f"a file is not answered by {answer}")
        self._session.answer(answer)
        self._state = "accepted" if answer == "OK" else "settled"

    async def data(self) -> AsyncIterator[tuple[int, memoryview]]:
        """The file's bytes as (offset, view); a view is valid until the next step.

        Raises:
            RemoteProtocolError: what comes isn't data.
            TransportError: bacula-fd closed the pipe: the restore is incomplete.
        """
        self._expect("accepted")
        self._state = "reading"
        session = self._session
        packet = await session.receive()
        if packet.status is Status.COMMAND and packet.text != "DATA":
            # A stock plugin says nothing at all for a file without data.
            session.unread(packet)
            self._state = "silent"
            return
        if packet.status is Status.COMMAND:
            packet = await session.receive()
        position = 0
        while packet.status is not Status.END_OF_DATA:
            if packet.status is Status.DATA:
                view = memoryview(packet.data)
                if view:
                    yield position, view
                position += len(view)
            elif packet.status is Status.COMMAND:
                line = parse_command(packet.text)
                if line.key != "OFFSET":
                    raise unexpected("data, OFFSET:n or F", packet)
                position = line.number
            else:
                raise unexpected("data, OFFSET:n or F", packet)
            packet = await session.receive()
        self._state = "read"

    async def done(self) -> None:
        """Say that all data is where it belongs."""
        if self._state == "silent":
            self._state = "settled"
            return
        self._expect("read")
        self._session.answer("OK")
        self._state = "settled"

    async def fail(self, text: str) -> None:
        """Say that this file can't be restored. Our plugin fails the job then and
        leaves; with one that goes on, ``files()`` drops what is left of the data.
        """
        if self.settled:
            raise LocalProtocolError(f"{self.name} was answered already")
        self._session.refuse(text)
        self._state = "failed"

    def _expect(self, state: str) -> None:
        if self._state != state:
            raise LocalProtocolError(
                f"{self.name} is {self._state}, which doesn't go with this call"
            )
