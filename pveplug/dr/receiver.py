# SPDX-License-Identifier: Apache-2.0
"""The receiver of replicas: one session per sender, told in the order of its frames.

::

                 Open            Describe            Disk
    OPENING ───────────► OPENED ──────────► READY ─────────► DISK ─┐ Block, Zero
                         ▲   │ ▲             │ ▲               │ ◄─┘ AskDigests
                 Command │   │ │ Command     │ └───────────────┘
     (failback-commit,   │   │ │             │      DiskEnd
      failback-undo)     │   │ └── DONE      │ Commit
                         │   │      ▲        ▼
            SendBack     │   │      └──── APPLIED ─┐ AskDigests, AskSamples, Block
      ┌───── BACK ◄──────────┘     Finish     ▲    │
      ▼       │ ▲     Command                 └────┘
    WINDOWS ──┴─┘   (failback)      AskDigests is legal in READY and DISK, too;
      Digests                       Bye everywhere.

What the table doesn't have ends the session. Whatever ends it before Done, a cut
included, leaves the replica's last restore point as it was: ``Replica.abandon``. What
was applied becomes a restore point at the next opening, unless its sender said Bye: it
has found the replica to be wrong, ``Replica.reject``.

Nothing is queued here: a frame is taken before the next one is read, so a slow disk
slows the socket, and a session holds one block at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from pveplug.errors import (
    CommandError,
    ConfigError,
    IntegrityError,
    NbdError,
    PveError,
    PveplugError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.events import Reporter
from pveplug.log import context
from pveplug.proto.dr_frames import (
    Applied,
    AskDigests,
    AskSamples,
    Block,
    Bye,
    Command,
    Commit,
    Describe,
    Digests,
    Disk,
    DiskEnd,
    Done,
    Durable,
    Finish,
    Frame,
    Message,
    Open,
    Ready,
    Refusal,
    Result,
    Samples,
    Say,
    SendBack,
    State,
    WindowEnd,
    Zero,
    decode,
)
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.tasks import to_the_end

log = logging.getLogger(__name__)

UNHELD: Final = frozenset({"status", "failover-test"})
"""Modes whose session doesn't hold the replica: a test lets cycles in between."""
SAY_LINES: Final = 1000
"""Lines kept for a sender that doesn't read them; the oldest go."""


# --- what is legal when --------------------------------------------------------------


class At(enum.Enum):
    OPENING = "opening"  # nothing was said yet
    OPENED = "opened"  # State was sent
    READY = "ready"  # the cycle has begun, no disk is open
    DISK = "disk"  # between Disk and DiskEnd
    APPLIED = "applied"  # the replica's disks are the cycle's
    DONE = "done"  # the restore point stands
    BACK = "back"  # failback: no disk was named yet
    WINDOWS = "windows"  # failback: digests of a disk may come
    ENDED = "ended"


NEXT: Final[Mapping[tuple[At, type[Any]], At]] = {
    (At.OPENING, Open): At.OPENED,
    (At.OPENED, Describe): At.READY,
    (At.OPENED, Command): At.OPENED,
    (At.READY, AskDigests): At.READY,
    (At.READY, Disk): At.DISK,
    (At.READY, Commit): At.APPLIED,
    (At.DISK, AskDigests): At.DISK,
    (At.DISK, Block): At.DISK,
    (At.DISK, Zero): At.DISK,
    (At.DISK, DiskEnd): At.READY,
    (At.APPLIED, AskDigests): At.APPLIED,
    (At.APPLIED, AskSamples): At.APPLIED,
    (At.APPLIED, Block): At.APPLIED,
    (At.APPLIED, Finish): At.DONE,
    (At.DONE, Command): At.OPENED,
    (At.BACK, SendBack): At.WINDOWS,
    (At.BACK, Command): At.OPENED,
    (At.WINDOWS, Digests): At.WINDOWS,
    (At.WINDOWS, SendBack): At.WINDOWS,
    (At.WINDOWS, Command): At.OPENED,
    **{(at, Bye): At.ENDED for at in At if at is not At.ENDED},
}
"""``Command("failback")`` leads to BACK instead, if it is granted."""
CYCLE: Final = frozenset({At.READY, At.DISK, At.APPLIED})
"""A cycle has begun and isn't acknowledged: leaving now abandons it."""


def follow(at: At, message: Message) -> At:
    """Return where a message leads.

    Raises:
        RemoteProtocolError: it isn't legal here.
    """
    to = NEXT.get((at, type(message)))
    if to is None:
        raise RemoteProtocolError(
            f"the sender said {type(message).__name__} while the session is {at.value}"
        )
    if to is At.OPENED and isinstance(message, Command):
        return At.BACK if message.action == "failback" else At.OPENED
    return to


# --- what a session needs ------------------------------------------------------------


class Peer(Protocol):
    """A sender that has proved who it is."""

    @property
    def peer(self) -> str: ...

    async def send(self, frame: Frame) -> None: ...

    async def receive(self) -> Any: ...


class Replica(Protocol):
    """One replica, ours alone while it is open; see :mod:`pveplug.dr.replica`."""

    def state(self) -> State: ...

    async def apply_pending(self, say: Reporter) -> object: ...

    async def begin(self, describe: Describe, say: Reporter) -> Ready: ...

    async def disk(self, disk: Disk) -> None: ...

    async def take(self, block: Block | Zero) -> None: ...

    async def disk_end(self, end: DiskEnd) -> None: ...

    @property
    def durable(self) -> Iterable[Durable]: ...

    async def commit(self, commit: Commit) -> Applied: ...

    async def digests(self, ask: AskDigests) -> Digests: ...

    async def samples(self, ask: AskSamples) -> Samples: ...

    async def repair(self, block: Block) -> None: ...

    async def finish(self, finish: Finish) -> Done: ...

    async def reject(self) -> None: ...

    async def abandon(self) -> None: ...


class Back(Protocol):
    """The disks of a replica that is shut down, to be compared with the source's."""

    async def disk(self, disk: SendBack) -> None: ...

    def window(self, digests: Digests) -> AsyncIterator[Block | Zero]: ...


class Services(Protocol):
    """What the DR site can do; see :mod:`pveplug.dr.services`."""

    def open(
        self, opening: Open, say: Reporter
    ) -> AbstractAsyncContextManager[Replica]:
        """Take a replica for this session alone; raises with a ``code``."""

    def look(self, opening: Open) -> State:
        """Return what is known of a replica without taking it."""

    async def act(
        self, opening: Open, replica: Any | None, command: Command, say: Reporter
    ) -> Result:
        """Do what a command says; ``replica`` is None in a session that holds none."""

    def back(self, replica: Any) -> AbstractAsyncContextManager[Back]:
        """Serve the disks of a replica for a failback."""


class Meter(Protocol):
    """Counts what happens; see :mod:`pveplug.dr.metrics`."""

    def session(self, change: int) -> None: ...

    def refused(self, code: str) -> None: ...

    def received(self, uuid: str, count: int) -> None: ...

    def mismatched(self, uuid: str, count: int) -> None: ...


class NullMeter:
    """A meter for who doesn't count."""

    def session(self, change: int) -> None:
        pass

    def refused(self, code: str) -> None:
        pass

    def received(self, uuid: str, count: int) -> None:
        pass

    def mismatched(self, uuid: str, count: int) -> None:
        pass


class PeerGoneError(TransportError):
    """The sender hung up, or doesn't take what we send."""


class RefusedError(PveplugError):
    """We refuse; ``code`` is one of those of :class:`Refusal`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


# --- refusals ------------------------------------------------------------------------

CODES: Final = frozenset(
    {
        *("epoch", "role", "busy", "storage", "space", "pve", "identity"),
        *("integrity", "configuration", "protocol", "internal"),
    }
)


def refusal(error: Exception) -> Refusal:
    """Return what the sender is told of an error: its code and one line."""
    code, text = _refusal(error)
    return Refusal(code, " ".join(text.split())[:1000])


def _refusal(error: Exception) -> tuple[str, str]:
    code = getattr(error, "code", None)
    if isinstance(error, PveplugError) and code in CODES:
        return str(code), str(error)
    match error:
        case PveRefusalError(reason=Reason.NO_SPACE):
            return "space", str(error)
        case PveError() | TransportError():
            return "pve", str(error)
        case CommandError() | NbdError():
            return "storage", str(error)
        case IntegrityError():
            return "integrity", (
                f"{error}. Nothing of it was applied; the next cycle sends it again"
            )
        case ConfigError():
            return "configuration", str(error)
        case RemoteProtocolError():
            return "protocol", f"{error}. Are both sites on the same version?"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "space", (
                f"{error.filename or 'the stage'}: {error.strerror}. Make room on the "
                "DR site, or set limits.stage_dir to a larger file system"
            )
        case OSError():
            return "storage", f"{error.filename or 'the DR site'}: {error.strerror}"
        case PveplugError():
            return "internal", str(error)
    return "internal", (
        f"internal error of the receiver: {error!r}. Please report it; its journal has "
        "the details"
    )


# --- a session -----------------------------------------------------------------------


class Session:
    """One sender, from its Open to its Bye."""

    def __init__(
        self, peer: Peer, services: Services, meter: Meter | None = None
    ) -> None:
        self._peer = peer
        self._services = services
        self._meter: Meter = meter or NullMeter()
        self._at = At.OPENING
        self._said = _Lines()
        self._sending = asyncio.Lock()
        self._opening = Open("", "", 0, "", "", "")
        self._replica: Any = None
        self._back: Back | None = None
        self._holding = contextlib.AsyncExitStack()
        self._ending = contextlib.AsyncExitStack()
        """Of a failback: the servers of its disks."""
        self._disk = 0
        self._waiting = False

    @property
    def idle(self) -> bool:
        """Whether it waits for the sender's next word, with nothing under way."""
        return self._waiting and self._at not in CYCLE

    async def run(self) -> None:
        """Lead the session to its end; nothing is left open, whatever happens.

        Never raises but for cancellation, which abandons an unfinished cycle.
        """
        self._meter.session(+1)
        forwarder = asyncio.create_task(self._forward(), name="dr say")
        try:
            with context(peer=self._peer.peer):
                await self._run()
        finally:
            forwarder.cancel()
            await asyncio.gather(forwarder, return_exceptions=True)
            self._meter.session(-1)

    async def _run(self) -> None:
        try:
            async with self._holding, self._ending:
                try:
                    await self._converse()
                except BaseException:
                    await to_the_end(self._abandon())
                    raise
        except PeerGoneError as error:
            log.warning("session cut at=%s: %s", self._at.value, error)
        except Exception as error:
            told = refusal(error)
            if told.code == "internal":
                log.exception("session failed at=%s", self._at.value)
            else:
                log.warning(
                    "session refused at=%s code=%s: %s",
                    *(self._at.value, told.code, told.text),
                )
            self._meter.refused(told.code)
            with contextlib.suppress(PveplugError):
                await self._send(told)

    async def _abandon(self) -> None:
        """Let go of a cycle that has begun; the last restore point stands."""
        if self._at not in CYCLE or self._replica is None:
            return
        try:
            await self._replica.abandon()
        except Exception:
            log.exception("abandoning a cycle failed uuid=%s", self._opening.uuid)

    async def _converse(self) -> None:
        opening = await self._receive()
        if opening is None or follow(At.OPENING, opening) is At.ENDED:
            return
        assert isinstance(opening, Open)  # noqa: S101 - nothing else leads here
        with context(uuid=opening.uuid, mode=opening.mode, job=opening.job):
            await self._open(opening)
            self._at = At.OPENED
            while self._at is not At.ENDED:
                await self._step()

    async def _step(self) -> None:
        message = await self._receive()
        if message is None:
            if self._at in CYCLE:
                raise PeerGoneError("the sender hung up in the middle of a cycle")
            self._at = At.ENDED
            return
        to = follow(self._at, message)
        if to is At.ENDED:
            if self._at is At.APPLIED:
                await self._replica.reject()
            await self._abandon()
        elif isinstance(message, Describe):
            self._at = to  # from here on there is something to abandon
        await self._answer(message)
        self._at = to

    async def _answer(self, message: Message) -> None:
        replica = self._replica
        match message:
            case Block() | Zero() if self._at is At.DISK:
                await replica.take(message)
                if isinstance(message, Block):
                    self._meter.received(self._opening.uuid, len(message.data))
                for durable in replica.durable:
                    await self._send(durable)
            case Describe():
                await self._send(await self._begin(message))
            case Disk():
                await replica.disk(message)
            case DiskEnd():
                await replica.disk_end(message)
                for durable in replica.durable:
                    await self._send(durable)
            case Commit():
                await self._send(await replica.commit(message))
            case AskDigests():
                await self._send(await replica.digests(message))
            case AskSamples():
                await self._send(await replica.samples(message))
            case Block():
                await replica.repair(message)
                self._meter.mismatched(self._opening.uuid, 1)
            case Finish():
                done = await to_the_end(replica.finish(message))
                log.info(
                    "cycle acknowledged cycle=%s epoch=%d point=%s",
                    *(done.cycle, done.epoch, done.point.name if done.point else ""),
                )
                self._at = At.DONE  # nothing is to be abandoned, even if Done is lost
                await self._send(done)
            case Command():
                await self._command(message)
            case SendBack():
                await self._the_back.disk(message)
                self._disk = message.number
            case Digests():
                await self._window(message)

    async def _open(self, opening: Open) -> None:
        self._opening = opening
        if not opening.uuid or opening.mode in UNHELD:
            # Never in the way of a session that works on the replica.
            await self._send(await asyncio.to_thread(self._services.look, opening))
            return
        self._replica = await self._holding.enter_async_context(
            self._services.open(opening, self._said)
        )
        log.info("session opened vmid=%d name=%s", opening.vmid, opening.name)
        await self._send(self._replica.state())

    async def _begin(self, describe: Describe) -> Ready:
        if self._replica is None:
            raise RefusedError(
                "protocol", f"a cycle in a session opened for {self._opening.mode!r}"
            )
        ready: Ready = await self._replica.begin(describe, self._said)
        return ready

    async def _command(self, command: Command) -> None:
        await self._ending.aclose()
        self._back = None
        began = time.monotonic()
        log.info("command began action=%s", command.action)
        result = await self._services.act(
            self._opening, self._replica, command, self._said
        )
        if command.action == "failback":
            self._back = await self._ending.enter_async_context(
                self._services.back(self._replica)
            )
        log.info(
            "command ended action=%s seconds=%.1f epoch=%d",
            *(command.action, time.monotonic() - began, result.epoch),
        )
        await self._send(result)

    @property
    def _the_back(self) -> Back:
        if self._back is None:
            raise RemoteProtocolError("no failback has begun")
        return self._back

    async def _window(self, digests: Digests) -> None:
        if digests.number != self._disk:
            raise RemoteProtocolError(
                f"digests of disk {digests.number} while disk {self._disk} is sent back"
            )
        frames = 0
        async for frame in self._the_back.window(digests):
            await self._send(frame)
            frames += 1
        await self._send(WindowEnd(digests.number, frames))

    # --- the channel -----------------------------------------------------------------

    async def _receive(self) -> Message | None:
        self._waiting = True
        try:
            raw = await self._peer.receive()
        except TransportError as error:
            raise PeerGoneError(str(error)) from error
        finally:
            self._waiting = False
        return None if raw is None else decode(raw.type, raw.payload)

    async def _send(self, frame: Frame) -> None:
        """Send what was said so far, then the frame."""
        async with self._sending:
            try:
                for line in self._said.taken():
                    await self._peer.send(line)
                await self._peer.send(frame)
            except TransportError as error:
                raise PeerGoneError(str(error)) from error

    async def _forward(self) -> None:
        """Send lines as they are said: an operation may take minutes."""
        while True:
            await self._said.some.wait()
            try:
                async with self._sending:
                    for line in self._said.taken():
                        await self._peer.send(line)
            except TransportError:
                return  # the session notices by itself


class _Lines:
    """A Reporter whose lines become Say frames; bounded, for nobody may listen."""

    def __init__(self) -> None:
        self._lines: list[Say] = []
        self.some = asyncio.Event()

    def info(self, text: str) -> None:
        self._add("info", text)

    def warning(self, text: str) -> None:
        self._add("warning", text)

    def error(self, text: str) -> None:
        self._add("warning", text)

    def _add(self, kind: str, text: str) -> None:
        log.info("say kind=%s: %s", kind, text)
        self._lines.append(Say(kind, text[:4000]))
        del self._lines[:-SAY_LINES]
        self.some.set()

    def taken(self) -> list[Say]:
        lines, self._lines = self._lines, []
        self.some.clear()
        return lines


# --- the receiver --------------------------------------------------------------------


class Receiver:
    """Serves senders, at most ``limit`` at a time, each in a task of its own."""

    def __init__(
        self, services: Services, limit: int, meter: Meter | None = None
    ) -> None:
        self.limit = limit
        """May be changed while it runs; sessions that are open stay."""
        self._services = services
        self._meter: Meter = meter or NullMeter()
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._closing = False

    @property
    def sessions(self) -> int:
        """How many senders are being served."""
        return len(self._sessions)

    async def serve(self, peer: Peer) -> None:
        """Serve one sender to its end: the channel's handler."""
        if self._closing or len(self._sessions) >= self.limit:
            text = (
                "the receiver is being stopped; the next cycle finds it again"
                if self._closing
                else f"{self.limit} senders are being served, which is limits.sessions;"
                " try again later or raise it"
            )
            self._meter.refused("busy")
            log.warning("session refused peer=%s code=busy: %s", peer.peer, text)
            with contextlib.suppress(TransportError):
                await peer.send(Refusal("busy", text))
            return
        task = asyncio.current_task() or _no_task()
        self._sessions[task] = Session(peer, self._services, self._meter)
        try:
            await self._sessions[task].run()
        finally:
            del self._sessions[task]

    async def drain(self, timeout_s: float) -> int:
        """Take no more senders and let those there are end; returns who is left.

        Who has nothing under way is ended at once.
        """
        self._closing = True
        for task, session in self._sessions.items():
            if session.idle:
                task.cancel()
        waiting = self._sessions.keys() - {asyncio.current_task()}
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s)
        return len(self._sessions)

    async def cancel(self) -> None:
        """End the sessions that are left; each abandons what it hasn't finished."""
        for task in self._sessions:
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)


def _no_task() -> asyncio.Task[None]:
    raise RuntimeError("a session is served outside of a task")
