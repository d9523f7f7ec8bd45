# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, ordered by what the caller may do next.

::

    PveplugError
     ├─ ConfigError            which key, which value, why; before anything is touched
     │   └─ DescriptionError       a foreign VM's description: which file, which line
     ├─ ProtocolError          abstract
     │   ├─ LocalProtocolError     we misused our own machine: a bug
     │   └─ RemoteProtocolError    the peer broke the rules: this connection is over
     ├─ RequestError           understood and refused; the connection stays usable
     │   ├─ NbdError   ├─ QmpError   ├─ PveError └─ CommandError
     ├─ TransportError         refused, reset, timed out; all that may be retried
     ├─ IntegrityError         the copy isn't the disk: a gap, an overlap, a digest
     └─ JobError               what an engine raises: vm, disk, phase, remedy

``str()`` of each is one line an operator can act on; values are attributes.
"""

from __future__ import annotations


class PveplugError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PveplugError):
    """A parameter, file or option is wrong; nothing has been touched yet."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DescriptionError(ConfigError):
    """A foreign VM's description is damaged, hostile, or of a kind that isn't read.

    Attributes:
        file: the file's name; ``line``: counted from 1, None where it has no place.
    """

    def __init__(self, reason: str, *, file: str, line: int | None = None) -> None:
        super().__init__(f"{file}{f':{line}' if line else ''}: {reason}")
        self.file = file
        self.line = line


class ProtocolError(PveplugError):
    """A protocol rule was broken; raise one of the two subclasses."""


class LocalProtocolError(ProtocolError):
    """We asked our own protocol machine for something its rules forbid."""


class RemoteProtocolError(ProtocolError):
    """The peer isn't speaking the protocol; the connection is finished."""


class RequestError(PveplugError):
    """The peer understood the request and refused it."""


class NbdError(RequestError):
    """An NBD server answered a request with an error number.

    Attributes:
        errno: the number of the NBD protocol's "Error values", e.g. 22 for EINVAL.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class QmpError(RequestError):
    """QEMU refused a QMP command.

    Attributes:
        command: the command's name; ``kind``: its error class; ``desc``: its text.
    """

    def __init__(self, command: str, kind: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.command = command
        self.kind = kind
        self.desc = desc


class PveError(RequestError):
    """The Proxmox VE API refused a call, or a task it started failed.

    Attributes:
        status: HTTP status, or 0 for a failed task.
        params: parameter name -> message, for "Parameter verification failed.".
    """

    def __init__(
        self, message: str, status: int = 0, params: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.params = params or {}


class CommandError(RequestError):
    """A program on this node (qm, pvesm, qemu-img …) failed.

    Attributes:
        argv: what was run; ``status``: its exit status; ``stderr``: its last lines.
    """

    def __init__(self, argv: list[str], status: int, stderr: str) -> None:
        said = " ".join(stderr.split())[-400:] or "it said nothing"
        super().__init__(f"{' '.join(argv[:4])} ended with status {status}: {said}")
        self.argv = argv
        self.status = status
        self.stderr = stderr


class TransportError(PveplugError):
    """A peer could not be reached, went away or did not answer in time."""


class IntegrityError(PveplugError):
    """The copy is not the disk: a gap, an overlap, a digest, a lost segment.

    Attributes:
        offset: where, in bytes of what the text speaks of (a disk, an image's file);
            None where that has no place.
    """

    def __init__(self, message: str, *, offset: int | None = None) -> None:
        super().__init__(message)
        self.offset = offset


class TruncatedError(IntegrityError):
    """The copy ends too early; nothing is known against what came before."""


class JobError(PveplugError):
    """An engine gave up: which VM, which disk, in which phase, and what to do.

    The cause is in ``__cause__``.
    """

    def __init__(
        self,
        message: str,
        *,
        vm: str | None = None,
        disk: str | None = None,
        phase: str | None = None,
        remedy: str | None = None,
    ) -> None:
        where = " ".join(
            part
            for part in (
                f"VM {vm}" if vm else "",
                f"disk {disk}" if disk else "",
                f"({phase})" if phase else "",
            )
            if part
        )
        text = f"{where}: {message}" if where else message
        if remedy:
            text = f"{text.rstrip('. ')}. Remedy: {remedy}"
        super().__init__(text)
        self.vm = vm
        self.disk = disk
        self.phase = phase
        self.remedy = remedy
