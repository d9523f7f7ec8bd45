# SPDX-License-Identifier: Apache-2.0
"""The sender's side of a session with a receiver.

One task reads: what the receiver says for the job log is passed on at once, a refusal
fails whatever waits, and answers are handed out in their order. So digests may be asked
for before the last answer has come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from pveplug.errors import RemoteProtocolError, RequestError, TransportError
from pveplug.events import Reporter
from pveplug.proto.dr_frames import (
    Block,
    Digests,
    Durable,
    Frame,
    Json,
    Message,
    Refusal,
    Say,
    WindowEnd,
    Zero,
    decode,
)
from pveplug.proto.dr_wire import RawFrame

_A = TypeVar("_A", bound=Json | Digests)


class ReceiverRefusedError(RequestError):
    """The receiver refused, or failed; its text says what to do.

    Attributes:
        code: stable, see :class:`pveplug.proto.dr_frames.Refusal`.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"the receiver refused: {refusal.text}")
        self.code = refusal.code


class Wire(Protocol):
    """What is needed of :class:`pveplug.dr.channel.Channel`."""

    @property
    def peer(self) -> str: ...
    async def send(self, frame: Frame) -> None: ...
    async def receive(self) -> RawFrame | None: ...


class Conversation:
    """Ask and answer over a channel; made by :func:`conversation`."""

    def __init__(self, wire: Wire, say: Reporter) -> None:
        self._wire = wire
        self._say = say
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._failure: Exception | None = None
        self._over = asyncio.Event()
        self.durable: dict[int, int] = {}
        """Disk number -> bytes of a seeded disk that are durable."""

    async def send(self, frame: Frame) -> None:
        """Send a frame; its buffers are free again when this returns.

        Raises:
            ReceiverRefusedError: the receiver has refused meanwhile.
            TransportError: it went away.
        """
        if self._failure is not None:
            raise self._failure
        try:
            await self._wire.send(frame)
        except TransportError:
            # It may have said why before it hung up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._over.wait()
            if isinstance(self._failure, ReceiverRefusedError):
                raise self._failure from None
            raise

    async def answer(self, wanted: type[_A]) -> _A:
        """Return the next answer, which must be of the wanted kind.

        Raises:
            ReceiverRefusedError, TransportError: as :meth:`send`.
            RemoteProtocolError: another answer came.
        """
        message = await self.next()
        if not isinstance(message, wanted):
            raise RemoteProtocolError(
                f"the receiver answered {type(message).__name__} instead of "
                f"{wanted.__name__}"
            )
        return message

    async def next(self) -> Message:
        """Return the next answer, whatever it is."""
        if self._failure is None or not self._answers.empty():
            getter = asyncio.ensure_future(self._answers.get())
            ended = asyncio.ensure_future(self._over.wait())
            try:
                await asyncio.wait({getter, ended}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    return getter.result()
            finally:
                getter.cancel()
                ended.cancel()
        if not self._answers.empty():
            return self._answers.get_nowait()
        assert self._failure is not None  # noqa: S101 - that is when it is over
        raise self._failure

    async def ask(self, frame: Frame, wanted: type[_A]) -> _A:
        """Send a frame and return its answer."""
        await self.send(frame)
        return await self.answer(wanted)

    async def read(self) -> None:
        """Take what comes until the receiver ends or fails; one task's work."""
        try:
            while (raw := await self._wire.receive()) is not None:
                self._take(decode(raw.type, raw.payload))
            raise TransportError(
                f"the receiver {self._wire.peer} closed the connection"
            )
        except (ReceiverRefusedError, TransportError, RemoteProtocolError) as error:
            self._failure = error
        finally:
            if self._failure is None:
                self._failure = TransportError("the session with the receiver ended")
            self._over.set()

    def _take(self, message: Message) -> None:
        match message:
            case Say(kind="warning"):
                self._say.warning(f"receiver: {message.text}")
            case Say():
                self._say.info(f"receiver: {message.text}")
            case Durable():
                self.durable[message.number] = message.offset
            case Refusal():
                raise ReceiverRefusedError(message)
            case Block() | Zero() | WindowEnd() | Digests() | Json():
                self._answers.put_nowait(message)


@contextlib.asynccontextmanager
async def conversation(wire: Wire, say: Reporter) -> AsyncIterator[Conversation]:
    """Read from the channel while the block runs; the caller closes the channel."""
    talk = Conversation(wire, say)
    reader = asyncio.create_task(talk.read(), name="receiver's answers")
    try:
        yield talk
    finally:
        reader.cancel()
        await asyncio.wait([reader])
