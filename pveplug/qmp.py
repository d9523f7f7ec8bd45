# SPDX-License-Identifier: Apache-2.0
"""Short QMP sessions with a VM of this node.

A PVE monitor socket serves one client at a time, and PVE itself waits only three to
five seconds for it. So a session here is a burst: connect, send, read, leave, well
within a second; nothing ever waits for an event or a job while it is connected, it
polls by coming back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from pveplug.errors import QmpError, TransportError

log = logging.getLogger(__name__)

# A reply of query-named-block-nodes with 100 segments on each of 30 disks is 5 MiB.
READ_LIMIT: Final = 64 * 1024 * 1024
# PVE's own clients hold the socket for up to 5 s; wait for some of them in a row.
CONNECT_TIMEOUT_S: Final = 30.0
COMMAND_TIMEOUT_S: Final = 60.0
HOLD_LIMIT_S: Final = 1.0
SPOILT_GREETINGS: Final = 20
"""Tries of 0.1 s: longer than QEMU needs to close its socket when it dies."""


class VmGoneError(TransportError):
    """Nobody listens at the monitor: the VM doesn't run.

    Only this is a proof. A connection that breaks is not: QEMU may be alive, with our
    nodes in it, and whoever deletes their scratch images then is wrong.
    """


class _Client(QMPClient):
    """Numbers its commands so that no answer to another client's fits.

    A command whose sender dies in the middle of it is answered to whoever connects
    next; qemu.qmp counts from zero in every session and would take it for its own.
    """

    _serial = itertools.count()

    def _get_exec_id(self) -> str:
        return f"pveplug-{os.getpid()}-{next(self._serial)}"


class Qmp:
    """One burst of commands; made by :func:`qmp_session`."""

    def __init__(self, client: QMPClient, version: tuple[int, int, int]) -> None:
        self._client = client
        self.version = version
        """QEMU's version from the greeting."""

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None
    ) -> Any:
        """Send one command and return what it returned.

        Raises:
            QmpError: QEMU refused the command; the session goes on.
            TransportError: QEMU went away, or gave no answer in a minute.
        """
        log.debug("qmp command=%s arguments=%s", command, arguments)
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpError(command, error.error_class, str(error)) from error
        except TimeoutError as error:
            raise TransportError(
                f"QEMU gave no answer to {command} in a minute"
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise TransportError(f"QEMU hung up during {command}") from error

    async def transaction(self, actions: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Run the actions as one ``transaction``; all happen or none."""
        listed = [{"type": name, "data": data} for name, data in actions]
        await self.execute("transaction", {"actions": listed})


@contextlib.asynccontextmanager
async def qmp_session(
    path: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> AsyncIterator[Qmp]:
    """Connect to the monitor at ``path`` for one burst.

    Raises:
        VmGoneError: nobody listens: the VM is not running.
        TransportError: somebody else has kept the monitor busy for
            ``connect_timeout_s`` seconds.
    """
    client = _Client("pveplug", READ_LIMIT)
    client.logger.setLevel(logging.CRITICAL)  # it logs what we translate and raise
    try:
        async with asyncio.timeout(connect_timeout_s):
            await _connect(client, path)
    except TimeoutError as error:
        await _leave(client)
        raise TransportError(
            f"the QMP monitor {path} has been busy for {connect_timeout_s:.0f} s; "
            "another program holds it"
        ) from error
    except (ConnectError, QMPError, OSError, EOFError) as error:
        await _leave(client)
        raise TransportError(
            f"what answers at {path} does not speak QMP: {_cause(error)}"
        ) from error
    except BaseException:
        await _leave(client)
        raise
    qemu = _version(client)
    began = time.monotonic()
    try:
        yield Qmp(client, qemu)
    finally:
        await _leave(client)
        held = time.monotonic() - began
        if held > HOLD_LIMIT_S:
            log.warning("qmp held_too_long seconds=%.2f path=%s", held, path)


async def _connect(client: QMPClient, path: str) -> None:
    """Connect; a full backlog (EAGAIN) is tried again, as PVE does, every 0.1 s.

    So is a greeting that was spoilt by an answer meant for somebody else, and a
    connection that broke before its greeting.

    Raises:
        VmGoneError: nobody listens.
    """
    spoilt = 0
    while True:
        channel = _open(path)
        try:
            if channel is not None:
                await client.connect(channel)
                return
        except ConnectError as error:
            if channel is not None:
                channel.close()
            spoilt += 1
            if spoilt > SPOILT_GREETINGS:
                raise
            log.info("qmp path=%s connect=%s", path, _cause(error))
        except BaseException:
            # Cancelled in the middle: nobody else knows of the socket yet.
            await _leave(client)
            if channel is not None:
                channel.close()
            raise
        await asyncio.sleep(0.1)


def _open(path: str) -> socket.socket | None:
    """Return a socket connected to the monitor, or None where its backlog is full.

    Connected here and not by asyncio: that takes EAGAIN of a unix socket for "under
    way", and the first read then fails with EINVAL as if the peer were broken.

    Raises:
        VmGoneError: nobody listens.
        OSError: anything else.
    """
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.setblocking(False)
        channel.connect(path)
    except BlockingIOError:
        channel.close()
        return None
    except (FileNotFoundError, ConnectionRefusedError) as error:
        channel.close()
        raise VmGoneError(
            f"cannot talk to QEMU at {path}: {error.strerror}; is the VM running?"
        ) from error
    except BaseException:
        channel.close()
        raise
    return channel


async def _leave(client: QMPClient) -> None:
    """Close the connection; that it is already broken is no news here."""
    with contextlib.suppress(QMPError, OSError, EOFError):
        await client.disconnect()


def _version(client: QMPClient) -> tuple[int, int, int]:
    """Return QEMU's version from the greeting that every session starts with."""
    said: Any = client.greeting.QMP.version if client.greeting else {}
    qemu = said.get("qemu", {})
    return (
        int(qemu.get("major", 0)),
        int(qemu.get("minor", 0)),
        int(qemu.get("micro", 0)),
    )


def _inner(error: BaseException) -> BaseException | None:
    found: BaseException | None = getattr(error, "exc", None)
    return found


def _cause(error: BaseException) -> str:
    # An end of file has no text of its own.
    return str(_inner(error) or error) or "it closed the connection"
