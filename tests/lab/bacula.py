# SPDX-License-Identifier: Apache-2.0
"""A real Bacula on loopback: director, storage and file daemon, SQLite catalogue.

Everything lives below one base directory; daemons run in the foreground as children of
this process and are ended by their process ids. Nothing is shared with an installed
Bacula but its programs, and with ``prefix`` not even those.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import bacula_config as config

TERMINAL = frozenset("TWEefADI")
"""Job status letters that no longer change: T and W are success, A is cancelled."""


class LabError(Exception):
    """The lab, not the product, is in trouble."""


@dataclass(frozen=True)
class JobResult:
    """What the catalogue says of a job that has ended.

    Attributes:
        name: the unique name, ``vm-job.2026-11-22_20.42.31_15``.
        status: one letter: T success (see ``warnings``), f or E failure, A cancelled.
        bytes: as the file daemon counted them: data and 8 per offset.
    """

    job_id: int
    name: str
    type: str
    level: str
    status: str
    files: int
    bytes: int
    errors: int
    log: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.status == "T" and "OK" in self.termination

    @property
    def termination(self) -> str:
        """The summary's own words, "Backup OK -- with warnings"."""
        found = re.search(r"Termination:\s*(.+)", self.text)
        return found[1].strip().strip("*").strip() if found else ""

    @property
    def text(self) -> str:
        return "\n".join(self.log)


class Conversation:
    """bconsole where answers depend on what it asks."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._pending = ""
        self.transcript = ""

    def send(self, line: str) -> None:
        self.transcript += f"[{line}]\n"
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        """Wait until ``pattern`` was said since the last match."""
        until = time.monotonic() + timeout
        while True:
            if found := re.search(pattern, self._pending):
                self._pending = self._pending[found.end() :]
                return found
            if not self._selector.select(max(0.0, until - time.monotonic())):
                raise LabError(f"no {pattern!r} within {timeout} s:\n{self.transcript}")
            data = os.read(self._process.stdout.fileno(), 65536).decode(
                errors="replace"
            )
            if not data:
                raise LabError(f"bconsole ended before {pattern!r}:\n{self.transcript}")
            self._pending += data
            self.transcript += data

    def close(self) -> None:
        self._selector.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class BaculaLab:
    """Three daemons and a catalogue; a context manager.

    Args:
        base: an empty or missing directory; kept afterwards.
        prefix: where another Bacula's packages were unpacked; None: the installed one.
        plugin_dir: the file daemon's, with real files ending in ``-fd.so``.
        env: added to the daemons' environment, and so to that of the backend.
        pki: the file daemon encrypts and signs with a key made here.
        storages: that many devices, pools and storages, ``lab-storage-1`` and so on.
    """

    def __init__(
        self,
        base: Path,
        *,
        prefix: Path | None = None,
        plugin_dir: Path,
        env: Mapping[str, str] | None = None,
        pki: bool = False,
        storages: int = 2,
    ) -> None:
        self.base = base.resolve()
        self.prefix = prefix
        self.plugin_dir = plugin_dir.resolve()
        self.pki = pki
        self.storages = storages
        root = prefix or Path("/")
        self._programs = root / "usr/sbin"
        self._schemas = (
            root / "usr/share/bacula-director/make_sqlite3_tables",
            root
            / "usr/share/dbconfig-common/data/bacula-director-sqlite3/install/sqlite3",
        )
        self._env = {**os.environ, **(env or {})}
        if prefix is not None:
            self._env["LD_LIBRARY_PATH"] = str(root / "usr/lib/bacula")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}

    # --- life -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Write the configuration, make the catalogue if there is none, start."""
        for name in ("etc/jobs.d", "etc/storages.d", "work", "run", "log", "volumes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pki:
            self._make_keypair()
        self._make_catalogue()
        for attempt in range(3):
            self._configure()
            try:
                for daemon in ("sd", "fd", "dir"):
                    self.start_daemon(daemon)
            except LabError:
                # Somebody may have taken a port between our look and the daemon's.
                self.stop()
                if attempt == 2:
                    raise
            else:
                return

    def stop(self) -> None:
        """End the daemons that still run.

        Not a word to the director: it would wait up to 4 s for its job threads, which
        wait for work, and what it has told the catalogue is there.
        """
        running = {name: self._daemons.pop(name) for name in tuple(self._daemons)}
        for name, process in running.items():
            process.send_signal(signal.SIGKILL if name == "dir" else signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_daemon(self, daemon: str) -> None:
        """Start ``dir``, ``sd`` or ``fd`` and wait until its port answers."""
        output = self.base / f"log/{daemon}.out"
        with output.open("ab") as file:
            process = subprocess.Popen(
                [
                    self._programs / f"bacula-{daemon}",
                    "-f",
                    "-c",
                    self.base / f"etc/bacula-{daemon}.conf",
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._env,
                cwd=self.base,
            )
        self._daemons[daemon] = process
        until = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._ports[daemon]), 1).close()
                return
            time.sleep(0.05)
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-10:])
        raise LabError(f"bacula-{daemon} does not answer, see {output}:\n{tail}")

    def stop_daemon(self, daemon: str) -> None:
        """End a daemon in order; ``start_daemon`` brings it back."""
        process = self._daemons.pop(daemon)
        process.terminate()
        process.wait(20)

    def set_environment(self, **values: str) -> None:
        """Change the environment of daemons that start from now on."""
        self._env.update(values)

    def kill(self, daemon: str) -> None:
        """End a daemon with SIGKILL; ``start_daemon`` brings it back."""
        process = self._daemons.pop(daemon)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def pid(self, daemon: str) -> int:
        return self._daemons[daemon].pid

    def port(self, daemon: str) -> int:
        return self._ports[daemon]

    def reach_storage_at(self, port: int) -> None:
        """Let Director and File Daemon find the Storage Daemon at another port."""
        for number in range(1, self.storages + 1):
            path = self.base / f"etc/storages.d/{number}.conf"
            text = re.sub(r"SDPort = \d+", f"SDPort = {port}", path.read_text())
            path.write_text(text)
        if self.alive("dir"):
            self.reload()

    def alive(self, daemon: str) -> bool:
        process = self._daemons.get(daemon)
        return process is not None and process.poll() is None

    # --- configuration ----------------------------------------------------------------

    def add_job(
        self,
        name: str,
        plugin: str | Iterable[str],
        *,
        options: str = "signature = MD5",
        accurate: bool = False,
        storage: int = 1,
        **directives: str,
    ) -> None:
        """Define or replace a backup job and its FileSet ``fs-<name>``.

        Args:
            plugin: one command string or several, unquoted.
            options: lines for the FileSet's Options, e.g. ``compression = LZO``.
            directives: more for the Job resource; ``max_run_time="1h"``.
        """
        plugins = [plugin] if isinstance(plugin, str) else list(plugin)
        own = {
            "Accurate": "yes" if accurate else "no",
            "Storage": f"lab-storage-{storage}",
            "Pool": f"lab-pool-{storage}",
            "Maximum Concurrent Jobs": "10",
            **{key.replace("_", " "): value for key, value in directives.items()},
        }
        text = config.JOB.format(
            name=name,
            fileset=f"fs-{name}",
            options="\n".join(f"      {line.strip()}" for line in options.splitlines()),
            plugins="\n".join(f"    Plugin = {_quoted(text)}" for text in plugins),
            directives="\n".join(f"  {key} = {value}" for key, value in own.items()),
        )
        (self.base / f"etc/jobs.d/{name.replace('/', '_')}.conf").write_text(text)
        if self.alive("dir"):
            self.reload()

    def reload(self) -> None:
        said = self.console("reload")
        if "rror" in said:
            raise LabError(f"the director refuses its configuration:\n{said}")

    def _configure(self) -> None:
        self._ports = dict(zip(("dir", "sd", "fd"), _free_ports(3), strict=True))
        values = {
            "base": self.base,
            "plugin_dir": self.plugin_dir,
            "password": "lab-only",
            **{f"{daemon}_port": port for daemon, port in self._ports.items()},
        }
        pki = config.PKI.format(**values) if self.pki else ""
        etc = self.base / "etc"
        (etc / "query.sql").touch()
        devices = ""
        for number in range(1, self.storages + 1):
            devices += config.DEVICE.format(number=number, **values)
            path = etc / f"storages.d/{number}.conf"
            path.write_text(config.DIRECTOR_STORAGE.format(number=number, **values))
        (etc / "bacula-dir.conf").write_text(config.DIRECTOR.format(**values))
        (etc / "bacula-sd.conf").write_text(config.STORAGE.format(**values) + devices)
        (etc / "bacula-fd.conf").write_text(config.CLIENT.format(pki=pki, **values))
        (etc / "bconsole.conf").write_text(config.CONSOLE.format(**values))

    def _make_catalogue(self) -> None:
        if self.catalogue.exists():
            return
        for path in self._schemas:
            if path.exists():
                text = path.read_text()
                # The shell script of the package has the tables in a here-document.
                script = re.search(
                    r"<<\s*END-OF-DATA[^\n]*\n(.*?)^END-OF-DATA", text, re.S | re.M
                )
                with contextlib.closing(sqlite3.connect(self.catalogue)) as database:
                    database.executescript(script[1] if script else text)
                return
        raise LabError(
            f"no catalogue schema: none of {[str(p) for p in self._schemas]}"
        )

    def _make_keypair(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab-fd")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            # Bacula finds the key of a volume's session by this identifier.
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False
            )
            .sign(key, hashes.SHA256())
        )
        (self.base / "etc/fd-keypair.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )

    # --- console ----------------------------------------------------------------------

    def _bconsole(self) -> list[str]:
        program = self._programs / "bconsole"
        if not program.exists():
            program = Path(shutil.which("bconsole") or "bconsole")
        return [str(program), "-n", "-c", str(self.base / "etc/bconsole.conf")]

    @property
    def bconsole(self) -> tuple[list[str], Mapping[str, str]]:
        """The console's command, and the environment it needs."""
        return self._bconsole(), self._env

    def console(self, *lines: str, timeout: float = 60) -> str:
        """What bconsole says to these lines."""
        try:
            done = subprocess.run(
                self._bconsole(),
                input="".join(f"{line}\n" for line in lines).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=self._env,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise LabError(f"bconsole is stuck at {lines}:\n{said}") from error
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0 and "Enter a period" not in said:
            raise LabError(f"bconsole failed: {said}")
        return said

    # --- jobs -------------------------------------------------------------------------

    def start_job(self, name: str, level: str = "Full") -> int:
        """Queue a backup; returns its JobId."""
        return _job_id(self.console(f'run job="{name}" level={level} yes'))

    def run_job(
        self, name: str, level: str = "Full", timeout: float = 120
    ) -> JobResult:
        return self.wait(self.start_job(name, level), timeout)

    def wait(self, job_id: int, timeout: float = 120) -> JobResult:
        """Wait until a job has ended and everything about it is in the catalogue."""
        until = time.monotonic() + timeout
        while self.status(job_id) not in TERMINAL:
            if time.monotonic() > until:
                raise LabError(
                    f"job {job_id} runs for over {timeout} s:\n"
                    + "\n".join(self.joblog(job_id))
                )
            time.sleep(0.1)
        # The summary, its last words, comes after the status.
        while "Termination:" not in "\n".join(self.joblog(job_id)):
            if time.monotonic() > until:
                raise LabError(f"job {job_id} ended without a summary")
            time.sleep(0.05)
        return self.result(job_id)

    def result(self, job_id: int) -> JobResult:
        rows = self.query(
            "SELECT JobId, Job, Type, Level, JobStatus, JobFiles, JobBytes, JobErrors "
            "FROM Job WHERE JobId = ?",
            job_id,
        )
        if not rows:
            raise LabError(f"no job {job_id} in the catalogue")
        return JobResult(*rows[0], log=self.joblog(job_id))

    def status(self, job_id: int) -> str:
        """The status letter, empty when the job is unknown."""
        rows = self.query("SELECT JobStatus FROM Job WHERE JobId = ?", job_id)
        return rows[0][0] if rows else ""

    def joblog(self, job_id: int) -> tuple[str, ...]:
        rows = self.query(
            "SELECT LogText FROM Log WHERE JobId = ? ORDER BY LogId", job_id
        )
        return tuple(line for (text,) in rows for line in text.splitlines())

    def cancel(self, job_id: int) -> str:
        return self.console(f"cancel jobid={job_id} yes")

    def estimate(self, name: str, level: str = "Full", timeout: float = 60) -> str:
        return self.console(
            f'estimate job="{name}" level={level} listing', timeout=timeout
        )

    def start_restore(
        self,
        *,
        where: str,
        job: str | None = None,
        job_ids: Sequence[int] = (),
        plugin_options: Mapping[str, str] | None = None,
        replace: str = "always",
    ) -> int:
        """Queue a restore; returns its JobId.

        Args:
            job: restore the newest chain of this backup job, or
            job_ids: what these jobs hold, all files of each.
            plugin_options: set through the console's Plugin Options menu.
        """
        what = f'fileset="fs-{job}" select current' if job else _job_ids(job_ids)
        command = (
            "restore client=lab-fd restoreclient=lab-fd restorejob=lab-restore "
            f'where="{_escaped(where)}" replace={replace} {what} all done'
        )
        if plugin_options is None:
            return _job_id(self.console(f"{command} yes"))
        conversation = Conversation(self._bconsole(), self._env)
        try:
            return self._restore_with_options(conversation, command, plugin_options)
        finally:
            conversation.close()

    def restore(self, *, timeout: float = 120, **arguments: Any) -> JobResult:
        """As :meth:`start_restore`, and wait for the end."""
        return self.wait(self.start_restore(**arguments), timeout)

    def _restore_with_options(
        self, console: Conversation, command: str, options: Mapping[str, str]
    ) -> int:
        console.send(command)
        for name, value in options.items():
            console.expect(
                r"OK to run\? \(Y(es|)/M(od|)/N(o|)\): ?|OK to run\?[^\n]*: ?"
            )
            console.send("mod")
            console.expect(r"Parameters to modify:")
            console.send(console.expect(r"(\d+): Plugin Options")[1])
            console.expect(r"Use above plugin configuration\?[^\n]*: ?")
            console.send("mod")
            console.send(console.expect(rf"(\d+): {re.escape(name)} ")[1])
            console.expect(r"(?i)please enter[^\n]*: ?")
            console.send(value)
            console.expect(r"Use above plugin configuration\?[^\n]*: ?")
            console.send("yes")
        console.expect(r"OK to run\?[^\n]*: ?")
        console.send("yes")
        return int(console.expect(r"Job queued\. JobId=(\d+)")[1])

    # --- catalogue --------------------------------------------------------------------

    @property
    def catalogue(self) -> Path:
        return self.base / "work/lab.db"

    @property
    def volumes(self) -> Path:
        return self.base / "volumes"

    def query(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
        """Ask the catalogue, read-only and beside the director."""
        uri = f"file:{self.catalogue}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=20)) as database:
            return database.execute(statement, arguments).fetchall()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _job_ids(job_ids: Sequence[int]) -> str:
    if not job_ids:
        raise LabError("a restore needs a job's name or JobIds")
    return "jobid=" + ",".join(map(str, job_ids))


def _job_id(said: str) -> int:
    found = re.search(r"Job queued\. JobId=(\d+)", said)
    if found is None:
        raise LabError(f"no job was queued:\n{said}")
    return int(found[1])
