# SPDX-License-Identifier: Apache-2.0
"""Logging for each way of being run; redaction; who owns file descriptors 0, 1 and 2.

To bacula-fd our standard output *is* the protocol, and whatever appears on standard
error is a job error. Python writes there unasked (forgotten tasks, warnings), libraries
and child processes do, too. So :func:`own_stdio` is the first thing the backend calls,
before anything else is imported: the pipes move to private descriptors, 0 becomes
/dev/null, 1 and 2 the log or /dev/null.

This module imports nothing but ``os`` until logging is set up.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing itself would cost milliseconds
if TYPE_CHECKING:
    import logging
    import re
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

SYSLOG_SOCKET = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/stdout"
IDENTIFIER = "podheitor-proxmox"


# --- file descriptors ----------------------------------------------------------------


def own_stdio() -> tuple[int, int]:
    """Take standard input and output away from everybody else.

    Returns: private, close-on-exec copies of file descriptors 0 and 1. Afterwards 0
    reads as empty and 1 and 2 lead nowhere until :func:`setup_backend` finds a log.

    Raises:
        OSError: 0 or 1 isn't open: nobody talks to us.
    """
    import fcntl

    # Not os.dup(): it could return 2 where that is closed.
    fd_in = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
    fd_out = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd, inheritable=True)
    if null > 2:
        os.close(null)
    return fd_in, fd_out


def last_words(fd_out: int, text: str) -> None:
    """Tell bacula-fd why the backend can't even start: one ``A`` packet, no loop.

    For the time before a session exists, e.g. when an import fails. Never raises.
    """
    line = " ".join(redact(text).split()).encode("utf-8", "replace")[:1400] + b"\n"
    try:
        os.write(fd_out, b"A%06d\n" % len(line) + line)
    except OSError:
        return  # nobody listens any more


# --- redaction -----------------------------------------------------------------------

_secrets: set[str] = set()
_patterns: tuple[re.Pattern[str], re.Pattern[str] | None] | None = None


def register_secret(value: str) -> None:
    """Have ``value`` replaced by ``***`` in every log line and job message.

    Also as it stands in a URL. Values shorter than four characters are only caught by
    the name in front of them: they would blot out half of every text.
    """
    global _patterns
    from urllib.parse import quote

    if len(value) >= 4:
        _secrets.update((value, quote(value), quote(value, safe="")))
        _patterns = None


def redact(text: str) -> str:
    """Return ``text`` without registered secrets and without what looks like one."""
    global _patterns
    if _patterns is None:
        _patterns = _compiled()
    shapes, registered = _patterns
    if registered is not None:
        text = registered.sub("***", text)
    return shapes.sub(lambda match: f"{match[match.lastindex or 1]}***", text)


def _compiled() -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    import re

    value = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;&"']+)"""
    names = r"[\w-]*(?:password|passwd|passphrase|secret|token|ticket|psk|api_?key)"
    shapes = re.compile(
        # Authorization: PVEAPIToken=user@realm!name=uuid. Keep whose token it is.
        r"(PVEAPIToken=[^\s=]*[=:])"
        + r"[^\s\"',;]+"
        # password=..., token_secret='...', secret : ... in JSON
        + rf"|(\b{names}=){value}"
        + rf"|([\"']{names}[\"']\s*:\s*){value}"
        + r"|((?:PVEAuthCookie|PVELocalCookie)=)[^\s;\"']+"
        + r"|(CSRFPreventionToken[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
        + r"|(\bPVE:[^\s:]+:)[0-9A-Fa-f]{8}::[A-Za-z0-9+/=]+",
        re.IGNORECASE,
    )
    longest_first = sorted(_secrets, key=len, reverse=True)
    registered = (
        re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
    )
    return shapes, registered


# --- which job, which VM, which disk -------------------------------------------------

_context: Any = None


def context(**fields: object) -> AbstractContextManager[None]:
    """Add ``vm=``, ``disk=``, ``job=`` … to all lines logged within, tasks included."""
    import contextlib
    import contextvars

    global _context
    if _context is None:
        _context = contextvars.ContextVar("pveplug_log", default=None)
    variable = _context

    @contextlib.contextmanager
    def added() -> Iterator[None]:
        token = variable.set({**(variable.get() or {}), **fields})
        try:
            yield
        finally:
            variable.reset(token)

    return added()


def fields() -> dict[str, object]:
    """What :func:`context` added around here."""
    return dict(_context.get() or {}) if _context is not None else {}


# --- logging -------------------------------------------------------------------------


def setup_backend(log_file: str = "", *, verbose: bool = False) -> str | None:
    """Log to ``log_file``, else to syslog's socket (the journal), else nowhere.

    File descriptors 1 and 2 follow, so that a crash leaves a trace there as well.

    Returns: a warning for the job log when ``log_file`` can't be used; a log that can't
    be written is no reason to lose a backup.
    """
    import logging
    import logging.handlers
    import stat

    warning = None
    handler: logging.Handler | None = None
    if log_file:
        try:
            fd = os.open(
                log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            _point_output_at(fd)
            handler = logging.handlers.WatchedFileHandler(log_file, encoding="utf-8")
        except OSError as error:
            warning = (
                f"cannot write the log file {log_file}: {error.strerror}. Logging to "
                "the journal instead. Remedy: correct log_file in node.toml."
            )
    if handler is None:
        try:
            if stat.S_ISSOCK(os.stat(SYSLOG_SOCKET).st_mode):
                handler = logging.handlers.SysLogHandler(
                    SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON
                )
                handler.ident = f"{IDENTIFIER}[{os.getpid()}]: "
        except OSError:
            handler = None
        _connect_journal()
    to_file = isinstance(handler, logging.handlers.WatchedFileHandler)
    _install(handler or logging.NullHandler(), verbose, dated=to_file, one_line=True)
    _log_what_nobody_caught()
    return warning


def setup_cli(*, verbose: bool = False) -> None:
    """Log to standard error: warnings, or everything with ``verbose``."""
    import logging

    _install(logging.StreamHandler(), verbose, quiet=True)


def setup_service(*, verbose: bool = False) -> None:
    """Log to standard error, one line each, for a service manager.

    Where that is the journal's, each line begins with its priority (sd-daemon(3)).
    """
    import logging

    handler = logging.StreamHandler()
    _install(handler, verbose, dated=not _is_journal(2), one_line=True)
    if _is_journal(2):
        inner = handler.formatter or logging.Formatter()
        handler.setFormatter(_prioritised(inner))
    _log_what_nobody_caught()


def _is_journal(fd: int) -> bool:
    """Whether systemd connected this descriptor to the journal: systemd.exec(5)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _prioritised(inner: logging.Formatter) -> logging.Formatter:
    import logging

    levels = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

    class Prioritised(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return f"<{levels.get(record.levelname, 6)}>{inner.format(record)}"

    return Prioritised()


def _install(
    handler: logging.Handler,
    verbose: bool,
    *,
    dated: bool = False,
    one_line: bool = False,
    quiet: bool = False,
) -> None:
    import logging
    import time

    stamp = "%(asctime)sZ [%(process)d] " if dated else ""
    formatter = logging.Formatter(
        f"{stamp}%(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(_finisher(one_line))
    # A full disk or a dead journal must never end a job, nor write to stderr.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING if quiet and not verbose else logging.INFO)
    logging.getLogger("pveplug").setLevel(logging.DEBUG if verbose else logging.NOTSET)


def _finisher(one_line: bool) -> Callable[[logging.LogRecord], bool]:
    """A handler's filter that completes the record: context, redaction, one line."""
    import logging

    format_exception = logging.Formatter().formatException

    def finish(record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = f"{record.msg} {record.args!r}"
        text += "".join(f" {key}={_quoted(value)}" for key, value in fields().items())
        if record.exc_info and record.exc_info[0] is not None:
            text += "\n" + format_exception(record.exc_info)
        record.exc_info = record.exc_text = None
        text = redact(text)
        record.msg = " | ".join(text.splitlines()) if one_line else text
        record.args = ()
        return True

    return finish


def _quoted(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(char in text for char in " \t\n\"'") else text


def _point_output_at(fd: int) -> None:
    for target in (1, 2):
        os.dup2(fd, target, inheritable=True)
    os.close(fd)


def _connect_journal() -> None:
    """Let 1 and 2 lead into the journal, where there is one."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as journal:
        try:
            journal.settimeout(1)
            journal.connect(JOURNAL_SOCKET)
            # sd_journal_stream_fd(3): identifier, unit, priority, "<N>" prefixes,
            # forward to syslog, kmsg, console.
            journal.sendall(f"{IDENTIFIER}\n\n5\n0\n0\n0\n0\n".encode())
            journal.settimeout(None)
        except OSError:
            return
        _point_output_at(os.dup(journal.fileno()))


def _log_what_nobody_caught() -> None:
    import logging
    import sys
    import threading

    log = logging.getLogger("pveplug")

    def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        log.critical("uncaught", exc_info=(kind, error, trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        error = args.exc_value or args.exc_type()
        log.critical(
            "uncaught thread=%s",
            name,
            exc_info=(args.exc_type, error, args.exc_traceback),
        )

    sys.excepthook = uncaught
    threading.excepthook = in_thread
