# SPDX-License-Identifier: Apache-2.0
"""A job of bacula-fd, as seen by its backend: the PTCOMM session.

``open_session()`` greets and reads what the job is. Then the engine leads::

    backup    accept_params → [accept_start] → restore_object*, plugin_config*, file*
              → no_more_files → job_status → confirm_status → end
    estimate  accept_params → [accept_start] → file* → no_more_files → end
    restore   accept_params → [accept_start] → restore_objects → objects_done
              → files → finish_done

Messages (``info``, ``warning``, ``error``) may be said at any moment and keep their
place among the data. ``abort()`` fails the job; after it nothing else is sent. When
bacula-fd goes away, ``session.closed`` is set and every call that waits or sends raises
:class:`TransportError`. One coroutine at a time leads a session; only messages may come
from anywhere in the loop. docs/protocols/ptcomm.md has the packets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final

from pveplug.bacula_files import (
    FileInfo,
    IncomingFile,
    OutgoingFile,
    RestoreObject,
    unexpected,
)
from pveplug.bacula_pipe import PtcommPipe
from pveplug.errors import LocalProtocolError, RemoteProtocolError, TransportError
from pveplug.log import redact
from pveplug.proto import ptcomm
from pveplug.proto.ptcomm import Buffer, Packet, Status
from pveplug.proto.ptcomm_words import (
    Command,
    Hello,
    JobInfo,
    Stat,
    Times,
    parse_command,
    plugin_string,
)
from pveplug.units import KiB, MiB

log = logging.getLogger(__name__)

MAX_OBJECT: Final = 16 * MiB
"""Restore objects are below 1 MB in the catalogue; compressed ones may grow."""
MAX_LINES: Final = 1000
MESSAGE_BYTES: Final = 256 * KiB
"""Messages that may wait while bacula-fd doesn't read; more are counted and dropped."""
FLUSH_S: Final = 10.0
_STARTS: Final = {"B": "BackupStart", "E": "EstimateStart", "R": "RestoreStart"}

__all__ = [
    "BaculaSession",
    "FileInfo",
    "IncomingFile",
    "JobInfo",
    "OutgoingFile",
    "RestoreObject",
    "open_session",
]


class BaculaSession:
    """One job; made by :func:`open_session`, closed by :meth:`aclose`.

    Attributes:
        job: what Bacula says of the job; ``plugin``: the plugin's command string.
        hello: what the plugin's side can do.
    """

    def __init__(
        self, pipe: PtcommPipe, hello: Hello, job: JobInfo, plugin: str
    ) -> None:
        self.hello = hello
        self.job = job
        self.plugin = plugin
        self.command = _STARTS[job.type]
        self._pipe = pipe
        self._aborted = False
        self._state = "params"
        self._in_file = False
        self._broken_file = ""
        self._unread: Packet | None = None
        self._ended = False
        self._message_mark = 0
        self._message_bytes = 0
        self._dropped = 0

    @property
    def closed(self) -> asyncio.Event:
        """Set when bacula-fd is gone; an engine that is busy should stop then."""
        return self._pipe.closed

    @property
    def offsets(self) -> bool:
        """Whether data may have holes: the plugin understands ``OFFSET``."""
        return self.hello.offset

    async def __aenter__(self) -> BaculaSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # --- messages: a Reporter --------------------------------------------------------

    def info(self, text: str) -> None:
        log.info("said %s", text)
        self._say(Status.INFO, text)

    def warning(self, text: str) -> None:
        log.warning("said %s", text)
        self._say(Status.WARNING, text)

    def error(self, text: str) -> None:
        """Report a failure that doesn't end the session: a job error."""
        log.error("said %s", text)
        self._say(Status.NONFATAL, text)

    async def abort(self, text: str) -> None:
        """Fail the job. Everything but closing is refused afterwards.

        Returns when the message is on its way or bacula-fd is gone; never raises.
        """
        log.error("aborted reason=%r", text)
        if self._aborted:
            return
        self._say(Status.ABORT, text)
        self._aborted = True
        try:
            if self._state == "status":
                # A plugin that reads on waits for the F that follows its JobStatus.
                self._pipe.send([ptcomm.END_OF_DATA])
        except TransportError:
            log.warning("abort not delivered reason=%r", "the pipe is closed")
        self._pipe.refuse("the session was aborted")
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._pipe.written()
        except (TransportError, TimeoutError) as error:
            log.warning("abort not delivered reason=%r", str(error))

    def _say(self, status: Status, text: str) -> None:
        """Queue a message; what can't be sent is in our own log and dropped."""
        if self._aborted or self.closed.is_set():
            return
        writer = self._pipe.writer
        if writer.done >= self._message_mark:
            self._message_bytes = 0
        if status in (Status.ABORT, Status.ERROR):
            # The plugin listens no further than the first: all lines in one packet.
            text = " ".join(text.splitlines()).translate(ptcomm.CONTROL).strip()
            text = text or "the backend gave no reason"
        packets = ptcomm.message(status, redact(text))
        size = sum(map(len, packets))
        if self._message_bytes + size > MESSAGE_BYTES and status is not Status.ABORT:
            self._dropped += 1
            return
        if self._dropped:
            note = f"{self._dropped} messages were left out: bacula-fd did not read"
            packets = ptcomm.message(Status.WARNING, note) + packets
            self._dropped = 0
        try:
            self._message_mark = self._pipe.send([b"".join(packets)])
        except TransportError as error:
            log.warning("message not delivered reason=%r", str(error))
            return
        self._message_bytes += size

    # --- all kinds of jobs -----------------------------------------------------------

    async def accept_params(self) -> str:
        """Say that the parameters are good; returns and sets ``command``.

        Before it, ``abort()`` is the way to refuse them.
        """
        self._expect("params")
        self._pipe.send([ptcomm.END_OF_DATA])
        line = await self._receive_command("BackupStart, EstimateStart or RestoreStart")
        if line.key != _STARTS[self.job.type]:
            raise RemoteProtocolError(
                f"PTCOMM: expected {_STARTS[self.job.type]} for a job of type "
                f"{self.job.type}, got {line.key}"
            )
        self.command = line.key
        self._state = "start"
        return self.command

    async def accept_start(self) -> None:
        """Say that the job can begin; the first object or file says it as well."""
        self._expect("start")
        self._pipe.send([ptcomm.END_OF_DATA])
        self._state = "restore" if self.job.type == "R" else "files"

    async def drain(self) -> None:
        """Wait until everything said so far is in the pipe.

        Raises:
            TransportError: bacula-fd is gone.
        """
        await self._pipe.written()

    async def end(self) -> None:
        """Take part in the goodbye; a second call does nothing.

        Raises:
            TransportError: bacula-fd closed the pipe instead: the job has failed.
        """
        if self._ended:
            return
        self._expect("confirmed", "ending", "finish")
        if self._state != "ending":
            line = await self._receive_command("END")
            if line.key != "END":
                raise RemoteProtocolError(f"PTCOMM: expected END, got {line}")
        self._pipe.send([ptcomm.END_OF_DATA])
        await self._pipe.written()
        self._ended = True
        try:
            packet = await self.receive()
        except TransportError:
            return  # it left without T; all is said
        if packet.status is not Status.TERMINATE:
            raise unexpected("T", packet)

    async def aclose(self) -> None:
        """Send what is queued, within a time limit, then close; safe to repeat."""
        if not self.closed.is_set():
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._pipe.written()
            except (TransportError, TimeoutError) as error:
                log.warning("close lost messages reason=%r", str(error))
        self._pipe.close()

    # --- backup and estimate ---------------------------------------------------------

    async def restore_object(self, name: str, data: bytes) -> None:
        """Store a small object in the catalogue; it precedes all files of a restore."""
        await self._object("RESTOREOBJ", name, data)

    async def plugin_config(self, name: str, text: str) -> None:
        """Offer options for the restore; ``text`` is Bacula's template syntax."""
        await self._object("PLUGINCONFIG", name, text.encode())

    async def _object(self, kind: str, name: str, data: bytes) -> None:
        await self._begin("files")
        frames: list[Buffer] = [
            ptcomm.command(f"{kind}:{name}"),
            ptcomm.command(f"{kind}_LEN:{len(data)}"),
            *ptcomm.data_frames([bytes(data)]),  # which is copied, not lent
            ptcomm.END_OF_DATA,
        ]
        await self._pipe.written(self._pipe.send(frames))

    @asynccontextmanager
    async def file(
        self, info: FileInfo, *, offsets: bool = True
    ) -> AsyncIterator[OutgoingFile]:
        """Announce a file and send its data within the block.

        When the block ends by an exception the file stays unfinished and only
        ``abort()`` is possible afterwards: no truncated file may look whole.

        Args:
            info: name, true size, mode and time.
            offsets: data may have holes and go anywhere; needs ``session.offsets``.
        """
        if offsets and not self.offsets:
            raise LocalProtocolError("this plugin doesn't understand OFFSET")
        await self._begin("files")
        times = Times(info.mtime, info.mtime, info.mtime)
        header = [
            ptcomm.command(f"FNAME:{info.name}"),
            ptcomm.command(Stat(info.size, mode=info.mode).encode()),
            ptcomm.command(times.encode()),
        ]
        if offsets:
            header.append(ptcomm.command("OPTIONS:offsets"))
        header.append(ptcomm.END_OF_DATA)
        self._in_file = True
        try:
            self._pipe.send([b"".join(header)])
            out = OutgoingFile(self._pipe, info, offsets)
            yield out
            if self._aborted:
                raise LocalProtocolError("the session was aborted")
            if self.job.type != "E":
                await out.finish()
        except BaseException:
            self._broken_file = info.name
            raise
        finally:
            self._in_file = False

    async def no_more_files(self) -> None:
        """End the list of files and wait until all of it is in the pipe."""
        await self._begin("files")
        await self._pipe.written(self._pipe.send([ptcomm.END_OF_DATA]))
        self._state = "confirmed" if self.job.type == "E" else "listed"

    async def job_status(self) -> str:
        """Wait for the job's status: ``T`` is success, ``f``, ``E``, ``A`` are not.

        Raises:
            TransportError: the job has failed or was cancelled without a word.
        """
        self._expect("listed")
        line = await self._receive_command("JobStatus=X or END")
        if line.key == "END":
            # A stock plugin sends END after a success only, and nothing else ever.
            self._state = "ending"
            return "T"
        if line.key != "JobStatus" or not line.value:
            raise RemoteProtocolError(f"PTCOMM: expected JobStatus=X, got {line}")
        packet = await self.receive()
        if packet.status is not Status.END_OF_DATA:
            raise unexpected("F after JobStatus", packet)
        self._state = "status"
        return line.value

    async def confirm_status(self) -> None:
        """Say that the job's end is dealt with; ``abort()`` instead fails it still."""
        self._expect("status", "ending")
        if self._state == "status":
            await self._pipe.written(self._pipe.send([ptcomm.END_OF_DATA]))
            self._state = "confirmed"

    # --- restore ---------------------------------------------------------------------

    async def restore_objects(self) -> AsyncIterator[RestoreObject]:
        """The objects of all jobs of the selection, oldest job first."""
        await self._begin("restore")
        while True:
            packet = await self.receive()
            line = self._parsed(packet, "RESTOREOBJ:name or OBJECTSEND")
            if line.key == "OBJECTSEND":
                self._state = "objects"
                return
            if line.key in ("FNAME", "FINISH"):
                # A stock plugin goes on without a word.
                self.unread(packet)
                self._state = "delivered"
                return
            if line.key != "RESTOREOBJ":
                raise unexpected("RESTOREOBJ:name or OBJECTSEND", packet)
            found = await self._receive_object(line.value or "")
            self.answer("OK")
            yield found

    async def _receive_object(self, name: str) -> RestoreObject:
        job_id = kind = 0
        while True:
            packet = await self.receive()
            line = self._parsed(packet, "RESTOREOBJ_LEN:n")
            if line.key == "RESTOREOBJ_JOBID":
                job_id = line.number
            elif line.key == "RESTOREOBJ_TYPE":
                kind = line.number
            elif line.key == "RESTOREOBJ_LEN":
                break
            # Others may come with a later plugin.
        length = line.number
        if length > MAX_OBJECT:
            raise RemoteProtocolError(
                f"PTCOMM: restore object {name} has {length} bytes, at most "
                f"{MAX_OBJECT} were expected"
            )
        data = bytearray()
        while (packet := await self.receive()).status is Status.DATA:
            data += packet.data
            if len(data) > length:
                break
        if packet.status is not Status.END_OF_DATA or len(data) != length:
            raise unexpected(
                f"{length} bytes of restore object {name} and F, of which "
                f"{len(data)} came",
                packet,
            )
        return RestoreObject(name, job_id, kind or 25, bytes(data))

    async def objects_done(self) -> None:
        """Say that the objects are understood; files follow."""
        if self._state in ("start", "restore"):
            async for ignored in self.restore_objects():
                log.warning("restore object ignored name=%r", ignored.name)
        self._expect("objects", "delivered")
        if self._state == "objects":
            self._pipe.send([ptcomm.END_OF_DATA])
        self._state = "delivered"

    async def files(self) -> AsyncIterator[IncomingFile]:
        """The files to restore, each to be settled before the next is asked for."""
        self._expect("delivered")
        failed = False
        while True:
            packet = await self.receive()
            if failed and packet.status in (Status.DATA, Status.END_OF_DATA):
                continue  # the rest of a file we have refused
            line = self._parsed(packet, "FNAME:name or FINISH")
            if line.key == "FINISH":
                self._state = "finish"
                return
            if failed and line.key in ("DATA", "OFFSET"):
                continue
            if line.key in ("ACL", "XATTR"):
                await self._skip_data()
                continue
            if line.key != "FNAME":
                raise unexpected("FNAME:name or FINISH", packet)
            incoming = await self._receive_attributes(line.value or "")
            yield incoming
            if not incoming.settled:
                raise LocalProtocolError(f"{incoming.name} was left without an answer")
            failed = incoming.failed

    async def _receive_attributes(self, name: str) -> IncomingFile:
        stat: Stat | None = None
        times = Times(0, 0, 0)
        while (packet := await self.receive()).status is not Status.END_OF_DATA:
            line = self._parsed(packet, "STAT, TSTAMP or F")
            if line.key == "STAT":
                stat = Stat.parse(line.value or "")
            elif line.key == "TSTAMP":
                times = Times.parse(line.value or "")
        if not name or stat is None:
            raise unexpected(f"a name and STAT for file {name!r}", packet)
        return IncomingFile(self, name, stat, times)

    async def _skip_data(self) -> None:
        while (packet := await self.receive()).status is not Status.END_OF_DATA:
            if packet.status is not Status.DATA:
                raise unexpected("D or F", packet)
        self.answer("OK")

    async def finish_done(self) -> None:
        """Say that the restore is complete, then take part in the goodbye.

        Raises:
            TransportError: the job has failed for another reason meanwhile.
        """
        self._expect("finish")
        self._pipe.send([ptcomm.END_OF_DATA])
        await self.end()

    # --- below -----------------------------------------------------------------------

    def _expect(self, *states: str) -> None:
        if self._aborted:
            raise LocalProtocolError("the session was aborted")
        if self._state not in states:
            raise LocalProtocolError(
                f"the session is at {self._state!r}, this call belongs to "
                f"{' or '.join(map(repr, states))}"
            )

    async def _begin(self, state: str) -> None:
        if self._state == "start":
            await self.accept_start()
        self._expect(state)
        if self._in_file:
            raise LocalProtocolError("a file is open: finish it first")
        if self._broken_file:
            raise LocalProtocolError(
                f"{self._broken_file} was left unfinished: only abort() is possible"
            )

    def answer(self, text: str) -> None:
        """For the session's files: send a command."""
        self._pipe.send([ptcomm.command(text)])

    def refuse(self, text: str) -> None:
        """For the session's files: what was asked for has failed."""
        log.error("said %s", text)
        self._say(Status.ERROR, text)

    async def receive(self) -> Packet:
        """For the session's files: the next packet."""
        if self._unread is not None:
            packet, self._unread = self._unread, None
            return packet
        return await receive(self._pipe)

    def unread(self, packet: Packet) -> None:
        """For the session's files: have :meth:`receive` return ``packet`` again."""
        self._unread = packet

    async def _receive_command(self, expected: str) -> Command:
        return self._parsed(await self.receive(), expected)

    def _parsed(self, packet: Packet, expected: str) -> Command:
        if packet.status is not Status.COMMAND:
            raise unexpected(expected, packet)
        return parse_command(packet.text)


async def receive(pipe: PtcommPipe) -> Packet:
    """The next packet that isn't the plugin's own error.

    Raises:
        TransportError: the pipe is closed, or the plugin says that it fails.
        RemoteProtocolError: this isn't PTCOMM.
    """
    packet = await pipe.receive()
    if packet.status is Status.ERROR:
        raise TransportError(f"bacula-fd's plugin reports: {redact(packet.text)}")
    return packet


async def open_session(fd_in: int, fd_out: int) -> BaculaSession:
    """Greet bacula-fd's plugin and learn what the job is.

    Owns both file descriptors from here on, also when it fails.

    Raises:
        TransportError: the descriptors are no pipes, or bacula-fd went away.
        RemoteProtocolError: whoever is there doesn't speak PTCOMM.
    """
    pipe = PtcommPipe(fd_in, fd_out)
    try:
        hello = Hello.parse((await _expected(pipe, "Hello")).text)
        pipe.send([ptcomm.command("Hello Bacula")])
        line = parse_command((await _expected(pipe, "Job")).text)
        if line.key != "Job":
            raise RemoteProtocolError(f"PTCOMM: expected Job, got {line}")
        job = JobInfo.parse(await _lines(pipe, "a line of the job or F"))
        pipe.send([ptcomm.END_OF_DATA])
        line = parse_command((await _expected(pipe, "Params")).text)
        if line.key != "Params":
            raise RemoteProtocolError(f"PTCOMM: expected Params, got {line}")
        plugin = plugin_string(await _lines(pipe, "Plugin=... or F"), hello.plugin)
    except BaseException:
        pipe.close()
        raise
    return BaculaSession(pipe, hello, job, plugin)


async def _expected(pipe: PtcommPipe, expected: str) -> Packet:
    packet = await receive(pipe)
    if packet.status is not Status.COMMAND:
        raise RemoteProtocolError(f"PTCOMM: expected C {expected}, got {packet}")
    return packet


async def _lines(pipe: PtcommPipe, expected: str) -> Sequence[Command]:
    lines: list[Command] = []
    while (packet := await receive(pipe)).status is not Status.END_OF_DATA:
        if packet.status is not Status.COMMAND:
            raise RemoteProtocolError(f"PTCOMM: expected {expected}, got {packet}")
        if len(lines) == MAX_LINES:
            raise RemoteProtocolError(f"PTCOMM: expected F after {MAX_LINES} lines")
        lines.append(parse_command(packet.text))
    return lines
