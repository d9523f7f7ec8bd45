# SPDX-License-Identifier: Apache-2.0
"""bacula-fd's plugin side of a PTCOMM session, scripted, for tests of the backend.

A peer speaks the protocol on two file descriptors with code of its own (nothing of
pveplug.proto is used), blocks while doing so, and belongs in a thread::

    async with session_pair() as (shim, session_fds): ...
    peer = ShimPeer(fd_to_backend, fd_from_backend)
    result = await asyncio.to_thread(peer.run_backup, ShimJob(type="B"), "vmid=100")
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

MESSAGES = "AEQWISNRPOV"


class PeerGone(Exception):
    """The script reached the moment at which it was told to vanish."""


class BackendGone(Exception):
    """The backend closed its end."""


@dataclass(frozen=True)
class ShimJob:
    name: str = "vm-job.2026-11-22_20.42.31_15"
    job_id: int = 8
    type: str = "B"
    level: str = "F"
    since: int = 0
    prev_job: str = ""
    where: str = ""
    regex_where: str = ""
    replace: str = "a"
    client: str = "pve-fd"
    working_dir: str = "/var/lib/bacula"
    exe_path: str = "/usr/sbin"
    accurate: int = 0
    interface: int = 23
    params: tuple[str, ...] | None = None
    """What a stock plugin sends instead of ``Plugin=``."""

    def lines(self) -> list[str]:
        lines = [
            f"Name={self.name}",
            f"JobID={self.job_id}",
            f"Type={self.type}",
            f"WorkingDir={self.working_dir}",
            f"ExePath={self.exe_path}",
            f"Client={self.client}",
            f"Accurate={self.accurate}",
            f"BaculaVersion={self.interface}",
        ]
        if self.type == "R":
            lines += [
                f"Where={self.where}",
                f"RegexWhere={self.regex_where}",
                f"Replace={self.replace}",
            ]
        else:
            lines.append(f"Level={self.level}")
            if self.since:
                lines.append(f"Since={self.since}")
            if self.prev_job:
                lines.append(f"PrevJobName={self.prev_job}")
        return lines


@dataclass
class File:
    """A file as Bacula would have stored it."""

    name: str
    size: int = 0
    attrs: dict[str, str] = field(default_factory=dict)
    offsets: bool = False
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    data_bytes: int = 0
    complete: bool = False

    def content(self) -> bytes:
        """The whole file, holes as zeroes."""
        whole = bytearray(self.size)
        for offset, data in self.pieces:
            assert offset + len(data) <= self.size, "data beyond the file's size"
            whole[offset : offset + len(data)] = data
        return bytes(whole)


@dataclass
class Result:
    messages: list[tuple[str, str]] = field(default_factory=list)
    aborted: str | None = None
    closed: bool = False
    """The peer vanished because it was told to."""
    backend_gone: bool = False
    ended: bool = False
    """END was acknowledged."""

    def said(self, letter: str) -> list[str]:
        return [text for kind, text in self.messages if kind == letter]


@dataclass
class BackupResult(Result):
    files: dict[str, File] = field(default_factory=dict)
    objects: list[tuple[str, bytes]] = field(default_factory=list)
    plugin_configs: list[tuple[str, bytes]] = field(default_factory=list)
    status_confirmed: bool = False


@dataclass
class RestoreResult(Result):
    answers: dict[str, str] = field(default_factory=dict)
    """OK, SKIP, CORE or E for each name: the last answer given."""
    objects_accepted: int = 0
    finished: bool = False


class ShimPeer:
    """One session; make a new one for the next.

    Args:
        words: what follows the number in Hello.
        timeout_s: nothing is waited for longer (TimeoutError).
        close_when: called with ``"< C FNAME:x"`` or ``"> F"`` for every packet received
            or sent; when it returns true the peer closes both pipes at once.
        keep_data: keep the data of files, or only count it.
        read_delay_s: pause before every received packet.
        read_bytes: how much is read at once.
    """

    def __init__(
        self,
        fd_to_backend: int,
        fd_from_backend: int,
        *,
        words: str = "offset jobstatus fileindex",
        timeout_s: float = 30.0,
        close_when: Callable[[str], bool] | None = None,
        keep_data: bool = True,
        read_delay_s: float = 0.0,
        read_bytes: int = 1 << 17,
    ) -> None:
        self._to, self._from = fd_to_backend, fd_from_backend
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self.words = words
        self.timeout_s = timeout_s
        self.close_when = close_when
        self.keep_data = keep_data
        self.read_delay_s = read_delay_s
        self.read_bytes = read_bytes
        self.log: list[str] = []
        """Every packet in order, as given to ``close_when``."""
        self.largest_data = 0
        self.result: Result = Result()
        self._buffer = bytearray()
        self._eof = False

    def close(self) -> None:
        """Vanish: what a killed bacula-fd does to the backend."""
        for fd in (self._to, self._from):
            if fd >= 0:
                os.close(fd)
        self._to = self._from = -1

    # --- packets ---------------------------------------------------------------------

    def send(self, letter: str, payload: bytes | str = b"") -> None:
        """Write one packet, hearing the backend's messages meanwhile."""
        text = f"{payload}" if isinstance(payload, str) else f"{len(payload)}"
        data = payload.encode() + b"\n" if isinstance(payload, str) else payload
        rest = memoryview(b"%b%06d\n" % (letter.encode(), len(data)) + data)
        limit = time.monotonic() + self.timeout_s
        while rest:
            try:
                rest = rest[os.write(self._to, rest) :]
                continue
            except BlockingIOError:
                pass
            except BrokenPipeError:
                raise BackendGone from None
            poller = select.poll()
            poller.register(self._to, select.POLLOUT)
            if not self._eof:
                poller.register(self._from, select.POLLIN)
            if not (ready := poller.poll(max(0.0, limit - time.monotonic()) * 1000)):
                raise TimeoutError(f"the backend does not read: {letter} {text[:60]}")
            if any(fd == self._from for fd, _ in ready):
                self._fill()
                while (head := self._peek()) and head[0] in MESSAGES:
                    if not self._complete(head[1]):
                        break
                    self._message(*self._take())
        self._note(f"> {letter} {text}" if payload else f"> {letter}")

    def receive(self) -> tuple[str, bytes]:
        """The next packet that isn't a message; A and E raise nothing, see result."""
        while True:
            letter, payload = self._next()
            if letter not in MESSAGES:
                return letter, payload
            self._message(letter, payload)
            if letter == "A" or (letter == "E" and self._stop_at_error):
                return letter, payload

    _stop_at_error = False

    def _next(self) -> tuple[str, bytes]:
        if self.read_delay_s:
            time.sleep(self.read_delay_s)
        limit = time.monotonic() + self.timeout_s
        while not ((head := self._peek()) and self._complete(head[1])):
            if self._eof:
                raise BackendGone
            poller = select.poll()
            poller.register(self._from, select.POLLIN)
            if not poller.poll(max(0.0, limit - time.monotonic()) * 1000):
                raise TimeoutError(f"the backend says nothing after {self.log[-3:]}")
            self._fill()
        return self._take()

    def _peek(self) -> tuple[str, int] | None:
        if len(self._buffer) < 8:
            return None
        match = re.fullmatch(rb"([A-Z])(\d{6})\n", bytes(self._buffer[:8]))
        assert match, f"no PTCOMM header: {bytes(self._buffer[:40])!r}"
        return match[1].decode(), int(match[2])

    def _complete(self, length: int) -> bool:
        return len(self._buffer) >= 8 + length

    def _take(self) -> tuple[str, bytes]:
        letter, length = self._peek() or ("", 0)
        payload = bytes(memoryview(self._buffer)[8 : 8 + length])
        del self._buffer[: 8 + length]
        if letter in "FT":
            assert not payload
            self._note(f"< {letter}")
        elif letter == "D":
            assert payload, "an empty D packet looks like the end of data"
            self.largest_data = max(self.largest_data, length)
            self._note(f"< D {length}")
        else:
            assert payload.endswith(b"\n")
            assert payload.count(b"\n") == 1, payload
            self._note(f"< {letter} {payload[:-1].decode('utf-8', 'replace')}")
        return letter, payload

    def _fill(self) -> None:
        try:
            data = os.read(self._from, self.read_bytes)
        except BlockingIOError:
            return
        self._buffer += data
        self._eof = not data

    def _note(self, what: str) -> None:
        self.log.append(what)
        if self.close_when is not None and self.close_when(what):
            raise PeerGone(what)

    def _message(self, letter: str, payload: bytes) -> None:
        text = payload.decode().rstrip("\n")
        self.result.messages.append((letter, text))
        if letter == "A" and self.result.aborted is None:
            self.result.aborted = text

    def expect(self, letter: str) -> bytes:
        """Receive a packet of this letter; an abort ends the script."""
        got, payload = self.receive()
        if got == "A":
            raise BackendGone
        assert got == letter, f"expected {letter}, got {got} {payload[:80]!r}"
        return payload

    def expect_command(self) -> str | None:
        """The text of a C packet, None for F."""
        letter, payload = self.receive()
        if letter == "A":
            raise BackendGone
        if letter == "F":
            return None
        assert letter == "C", f"expected C or F, got {letter} {payload[:80]!r}"
        return payload.decode().rstrip("\n")

    # --- sessions --------------------------------------------------------------------

    def _opening(self, job: ShimJob, plugin: str, start: str) -> None:
        self.send("C", f"Hello podheitor-proxmox 3 {self.words}".rstrip())
        assert self.expect("C") == b"Hello Bacula\n"
        self.send("C", "Job")
        for line in job.lines():
            self.send("C", line)
        self.send("F")
        self.expect("F")
        self.send("C", "Params")
        for line in job.params if job.params is not None else (f"Plugin={plugin}",):
            self.send("C", line)
        self.send("F")
        self.expect("F")
        self.send("C", start)
        self.expect("F")

    def _goodbye(self) -> None:
        self.send("C", "END")
        self.expect("F")
        self.result.ended = True
        self.send("T")
        self.close()

    def _run(self, script: Callable[[], None]) -> None:
        try:
            script()
        except PeerGone:
            self.result.closed = True
        except BackendGone:
            self.result.backend_gone = True
            self._last_words()
        finally:
            self.close()

    def _last_words(self) -> None:
        """Hear what the backend said before it went; a failed write comes first."""
        with contextlib.suppress(BackendGone, TimeoutError):
            while not self.result.aborted:
                letter, payload = self._next()
                if letter in MESSAGES:
                    self._message(letter, payload)

    def run_backup(
        self, job: ShimJob, plugin: str = "", status: str = "T"
    ) -> BackupResult:
        """A backup to its end; ``status`` is what Bacula says at EndBackupJob."""
        result = BackupResult()
        self.result = result

        def script() -> None:
            self._opening(job, plugin, "BackupStart")
            self._files(result, with_data=True)
            if "jobstatus" in self.words.split():
                self.send("C", f"JobStatus={status}")
                self.send("F")
                self.expect("F")
                result.status_confirmed = True
            if status == "T":
                self._goodbye()

        self._run(script)
        return result

    def run_estimate(self, job: ShimJob, plugin: str = "") -> BackupResult:
        """An estimate: files without data."""
        result = BackupResult()
        self.result = result

        def script() -> None:
            self._opening(job, plugin, "EstimateStart")
            self._files(result, with_data=False)
            self._goodbye()

        self._run(script)
        return result

    def _files(self, result: BackupResult, *, with_data: bool) -> None:
        while (line := self.expect_command()) is not None:
            key, _, value = line.partition(":")
            if key in ("RESTOREOBJ", "PLUGINCONFIG"):
                data = self._object(key)
                kind = result.objects if key == "RESTOREOBJ" else result.plugin_configs
                kind.append((value, data))
                continue
            assert key == "FNAME", line
            assert value not in result.files, f"{value} was sent twice"
            file = File(value)
            while (line := self.expect_command()) is not None:
                key, _, value = line.partition(":")
                file.attrs[key] = value
            file.size = int(file.attrs["STAT"].split()[1])
            assert file.attrs["STAT"].split()[0] == "F"
            file.offsets = file.attrs.get("OPTIONS") == "offsets"
            result.files[file.name] = file
            if with_data:
                self._data(file)
            file.complete = True

    def _object(self, key: str) -> bytes:
        line = self.expect_command()
        assert line is not None
        assert line.startswith(f"{key}_LEN:"), line
        length, data = int(line.partition(":")[2]), b""
        while (packet := self.receive())[0] == "D":
            data += packet[1]
        assert packet[0] == "F", packet
        assert len(data) == length
        return data

    def _data(self, file: File) -> None:
        letter, payload = self.receive()
        if letter == "F":
            return
        if letter == "A":
            raise BackendGone
        assert (letter, payload) == ("C", b"DATA\n"), (letter, payload[:60])
        position = 0
        while (packet := self.receive())[0] != "F":
            letter, payload = packet
            if letter == "A":
                raise BackendGone
            if letter == "C":
                match = re.fullmatch(rb"OFFSET:(\d+)\n", payload)
                assert match, payload
                assert file.offsets, "OFFSET without OPTIONS:offsets"
                position = int(match[1])
                continue
            assert letter == "D", packet
            if self.keep_data:
                file.pieces.append((position, payload))
            position += len(payload)
            file.data_bytes += len(payload)

    def run_restore(
        self,
        job: ShimJob,
        plugin: str = "",
        objects: Sequence[tuple[str, int, bytes] | tuple[str, int, bytes, int]] = (),
        files: Iterable[tuple[str, int, Sequence[tuple[int, bytes]]]] = (),
    ) -> RestoreResult:
        """A restore to its end.

        Args:
            job: of type R.
            plugin: the command string of the jobs being restored.
            objects: (name, job id, data) or (name, job id, data, type).
            files: (name, size, pieces); a piece is (offset, bytes).
        """
        result = RestoreResult()
        self.result = result
        self._stop_at_error = True

        def script() -> None:
            self._opening(job, plugin, "RestoreStart")
            for name, job_id, data, *kind in objects:
                self.send("C", f"RESTOREOBJ:{name}")
                self.send("C", f"RESTOREOBJ_JOBID:{job_id}")
                self.send("C", f"RESTOREOBJ_TYPE:{kind[0] if kind else 25}")
                self.send("C", f"RESTOREOBJ_LEN:{len(data)}")
                for at in range(0, len(data), 65536):
                    self.send("D", data[at : at + 65536])
                self.send("F")
                assert self.expect("C") == b"OK\n"
                result.objects_accepted += 1
            self.send("C", "OBJECTSEND")
            self.expect("F")
            for name, size, pieces in files:
                self._restore_file(result, name, size, pieces)
            self.send("C", "FINISH")
            self.expect("F")
            result.finished = True
            self._goodbye()

        self._run(script)
        return result

    def _restore_file(
        self,
        result: RestoreResult,
        name: str,
        size: int,
        pieces: Sequence[tuple[int, bytes]],
    ) -> None:
        self.send("C", f"FNAME:{name}")
        self.send("C", f"STAT:F {size} 0 0 100640 1 0")
        self.send("C", "TSTAMP:1795380140 1795380140 1795380140")
        self.send("F")
        result.answers[name] = self._answer()
        if result.answers[name] != "OK":
            return
        errors = len(result.said("E"))
        self.send("C", "DATA")
        position = 0
        for offset, data in pieces:
            if offset != position:
                self.send("C", f"OFFSET:{offset}")
            for at in range(0, len(data), 65536):
                if len(result.said("E")) > errors:
                    result.answers[name] = "E"
                    return
                self.send("D", data[at : at + 65536])
            position = offset + len(data)
        self.send("F")
        result.answers[name] = self._answer()

    def _answer(self) -> str:
        letter, payload = self.receive()
        if letter == "A":
            raise BackendGone
        if letter == "E":
            return "E"
        assert letter == "C", (letter, payload)
        return payload.decode().strip()
