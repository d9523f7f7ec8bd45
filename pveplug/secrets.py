# SPDX-License-Identifier: Apache-2.0
"""Secrets that don't show themselves, and where they come from.

Bacula stores the plug-in string in the catalogue and on the volumes. So each secret may
be named instead of given: ``KEY_file`` (a file only root reads) or ``KEY_cmd`` (a
program that prints it). They are read when somebody needs them, not before: an
estimate, a check of the configuration or a restore to files needs none.
"""

from __future__ import annotations

import enum
import os
import selectors
import shlex
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from typing import Final

from pveplug.errors import ConfigError

COMMAND_LIMIT_S: Final = 30.0
MAX_BYTES: Final = 16 * 1024
"""Longest secret; a key file given by mistake is not read into memory."""


class Secret:
    """A text that is shown as ``***``; only :meth:`reveal` returns it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself; never log, format or raise it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))


class Origin(enum.Enum):
    INLINE = "inline"  # in the plug-in string
    FILE = "file"
    COMMAND = "cmd"


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where one secret is to be had; ``key`` is the parameter the operator wrote."""

    key: str
    origin: Origin
    value: Secret | str
    """The secret itself, or the path, or the command line."""

    def resolve(self) -> Secret:
        """Read the secret; blocks for at most 30 s (a command), so use a thread.

        Raises:
            ConfigError: there is none; the text names the key and the remedy, and
                never the secret.
        """
        if isinstance(self.value, Secret):
            return self.value
        if self.origin is Origin.FILE:
            return _from_file(self.key, self.value)
        return _from_command(self.key, self.value)


def check_file(key: str, path: str, *, private: bool) -> None:
    """See that a file can be read and, if private, that only its owner can.

    Raises:
        ConfigError: it can't, or others may read or change it; what to run is said.
    """
    handle = _opened(key, path)
    try:
        _check_owner(key, path, os.fstat(handle), private=private)
    finally:
        os.close(handle)


def _opened(key: str, path: str) -> int:
    try:
        # O_NONBLOCK: a FIFO by that name must not hang the job.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error.strerror}", key=key
        ) from error


def _check_owner(
    key: str, path: str, status: os.stat_result, *, private: bool = True
) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{key}: {path} is not a regular file", key=key)
    if not private:
        return
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{key}: {path} is open to group or others "
            f"(mode {stat.S_IMODE(status.st_mode):04o}); run: chmod 600 {path}",
            key=key,
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{key}: {path} belongs to user id {status.st_uid}, who could "
            f"change it; run: chown root {path}",
            key=key,
        )


def _from_file(key: str, path: str) -> Secret:
    handle = _opened(key, path)
    try:
        _check_owner(key, path, os.fstat(handle))
        raw = os.read(handle, MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error.strerror}", key=key
        ) from error
    finally:
        os.close(handle)
    return _checked(key, raw, path)


def _from_command(key: str, line: str) -> Secret:
    try:
        argv = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{key}: not a command line: {error}", key=key) from None
    if not argv:
        raise ConfigError(f"{key}: the command is empty", key=key)
    name = argv[0]
    try:
        process = subprocess.Popen(  # noqa: S603 - the administrator's own command, no shell
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{key}: cannot run {name}: {reason}", key=key) from error
    out, err = _bounded_output(key, name, process)
    if process.returncode != 0:
        said = " ".join(err.decode("utf-8", "replace").split())[-200:]
        raise ConfigError(
            f"{key}: {name} ended with status {process.returncode}: "
            f"{said or 'it said nothing'}",
            key=key,
        )
    return _checked(key, out, f"the output of {name}")


def _bounded_output(
    key: str, name: str, process: subprocess.Popen[bytes]
) -> tuple[bytes, bytes]:
    """Collect both outputs, ending the command's process group when it oversteps."""
    out, err = process.stdout, process.stderr
    assert out is not None  # noqa: S101 - for the type checker: PIPE above
    assert err is not None  # noqa: S101 - as above
    got = {out.fileno(): bytearray(), err.fileno(): bytearray()}
    collected = tuple(got.values())
    deadline = time.monotonic() + COMMAND_LIMIT_S
    complaint = ""
    with selectors.DefaultSelector() as selector, process:
        for pipe in got:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and not complaint:
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                complaint = f"did not finish within {COMMAND_LIMIT_S:.0f} s"
            for entry, _ in ready:
                data = os.read(entry.fd, 4096)
                if not data:
                    selector.unregister(entry.fd)
                got[entry.fd] += data
                if len(got[entry.fd]) > MAX_BYTES:
                    complaint = f"printed more than {MAX_BYTES} bytes"
        if not complaint:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                complaint = f"did not finish within {COMMAND_LIMIT_S:.0f} s"
        if complaint:
            os.killpg(process.pid, signal.SIGKILL)
    if complaint:
        raise ConfigError(f"{key}: {name} {complaint}", key=key)
    return bytes(collected[0]), bytes(collected[1])


def _checked(key: str, raw: bytes, source: str) -> Secret:
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{key}: {source} is longer than {MAX_BYTES} bytes", key=key)
    try:
        text = raw.decode("utf-8").strip("\r\n \t")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {source} is not UTF-8 text", key=key) from None
    if not text:
        raise ConfigError(f"{key}: {source} is empty", key=key)
    if len(text.splitlines()) > 1 or not text.isprintable():
        raise ConfigError(f"{key}: {source} must be one line of text", key=key)
    return Secret(text)
