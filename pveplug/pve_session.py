# SPDX-License-Identifier: Apache-2.0
"""One user's conversation with Proxmox VE: login, what is repeated, tasks.

The HTTP below is a :class:`Transport`; time is passed in. So every rule of waiting and
repeating is tested with a scripted transport and a clock that nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self

from pveplug.errors import (
    LocalProtocolError,
    PveError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto import pve_values as values
from pveplug.proto.pve import (
    Envelope,
    OutcomeUnknownError,
    Request,
    Response,
    TlsTrustError,
    Value,
    build,
    decipher,
    is_passing,
    path,
    retry_delay,
)
from pveplug.proto.pve_login import (
    Endpoint,
    Ticket,
    TicketAuth,
    TokenAuth,
    check_user,
    parse_ticket,
    token_header,
)
from pveplug.proto.pve_refusal import PveRefusalError, refusal
from pveplug.proto.pve_values import Upid, parse_upid

_RENEW_S: Final = 90 * 60.0
_LIFETIME_S: Final = 2 * 3600.0 - 60.0
_FIRST_POLL_S: Final = 0.1
_SLOWEST_POLL_S: Final = 1.0
_POLL_PATIENCE_S: Final = 60.0
"""How long a task's node may be unreachable before we give up asking for its end."""


class Transport(Protocol):
    """What a session needs of HTTP; the real one is in :mod:`pveplug.pve_http`."""

    async def send(self, request: Request, headers: Mapping[str, str]) -> Response: ...

    async def aclose(self) -> None: ...


class PveSession:
    """Calls and tasks for one user or token; an async context manager.

    Every call may raise :class:`PveRefusalError` (its ``reason`` tells why),
    :class:`TransportError` or :class:`RemoteProtocolError`. Cancelling a call leaves
    the object usable and what PVE already began going on. ``sleep``, ``clock`` and
    ``jitter`` are for tests.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        auth: TokenAuth | TicketAuth,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        transport: Transport | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._auth = auth
        self._sleep = sleep
        self._clock = clock
        self._jitter = jitter
        self._transport = transport
        self._token = ""
        if isinstance(auth, TokenAuth):
            self._token = token_header(auth.token_id, auth.secret)
        else:
            check_user(auth.username)
        self._ticket: Ticket | None = None
        self._ticket_since = 0.0
        self._login_lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        if self._transport is None:
            from pveplug.pve_http import HttpTransport

            self._transport = HttpTransport(self.endpoint)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; the object can be entered again."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    @property
    def who(self) -> str:
        """The token id or user that asks."""
        return self._auth.who

    # --- any call ------------------------------------------------------------------

    async def get(self, path: str, /, **params: Value) -> Any:
        """Read; ``path`` begins below ``/api2/json`` and is encoded."""
        return (await self.call("GET", path, params)).data

    async def post(self, path: str, /, **params: Value) -> Any:
        """Create or act; a UPID coming back means that the work has only started."""
        return (await self.call("POST", path, params)).data

    async def put(self, path: str, /, **params: Value) -> Any:
        """Change, synchronously."""
        return (await self.call("PUT", path, params)).data

    async def delete(self, path: str, /, **params: Value) -> Any:
        """Remove; a UPID coming back means that the work has only started."""
        return (await self.call("DELETE", path, params)).data

    async def call(
        self,
        method: str,
        path: str,
        params: Mapping[str, Value] | None = None,
        *,
        repeatable: bool | None = None,
    ) -> Envelope:
        """Make one call; ``repeatable`` says that a non-GET does no harm twice."""
        request = build(method, path, params, repeatable=repeatable)
        ticket = await self._current_ticket()
        response = await self._exchange(request, self._headers(request, ticket))
        if response.status == 401 and ticket is not None:
            # A ticket may end early: the clock jumped or the cluster's key rotated.
            # 401 means that nothing was done, so any method may be sent again.
            self._forget(ticket)
            ticket = await self._current_ticket()
            response = await self._exchange(request, self._headers(request, ticket))
        return decipher(request, response, self.who)

    async def task(
        self,
        method: str,
        path: str,
        params: Mapping[str, Value] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Make a call and wait for the task it starts, if it starts one.

        Returns: the task's warnings.
        """
        data = (await self.call(method, path, params)).data
        if not values.is_upid(data):
            return []
        return await self.wait_task(data, timeout_s=timeout_s)

    async def _exchange(self, request: Request, headers: Mapping[str, str]) -> Response:
        """Send, repeating what may be repeated; return the last answer."""
        if self._transport is None:
            raise LocalProtocolError("the session is not open: use 'async with'")
        attempt = 0
        while True:
            attempt += 1
            pause = retry_delay(attempt, self._jitter())
            try:
                response = await self._transport.send(request, headers)
            except (TlsTrustError, OutcomeUnknownError):
                raise
            except TransportError:
                if pause is None:
                    raise
            else:
                passing = request.repeatable and is_passing(response)
                if not passing or pause is None:
                    return response
            await self._sleep(pause)

    # --- login ---------------------------------------------------------------------

    def _headers(self, request: Request, ticket: Ticket | None) -> dict[str, str]:
        if ticket is None:
            return {"Authorization": self._token}
        headers = {"Cookie": ticket.cookie}
        if request.method != "GET":
            headers["CSRFPreventionToken"] = ticket.csrf
        return headers

    def _forget(self, ticket: Ticket) -> None:
        if self._ticket is ticket:
            self._ticket = None

    async def _current_ticket(self) -> Ticket | None:
        """Return a ticket with life in it, or None for token users."""
        if not isinstance(self._auth, TicketAuth):
            return None
        async with self._login_lock:
            old, age = self._ticket, self._clock() - self._ticket_since
            if old is not None and age < _RENEW_S:
                return old
            if old is not None and age < _LIFETIME_S:
                try:
                    return await self._login(self._auth.username, old.value)
                except TlsTrustError:
                    raise
                except TransportError:
                    return old  # still good for up to half an hour
                except PveError:
                    pass  # the password decides
            self._ticket = None
            return await self._login(self._auth.username, self._auth.password)

    async def _login(self, username: str, password: str) -> Ticket:
        request = build(
            "POST",
            "/access/ticket",
            {"username": username, "password": password},
            repeatable=True,
        )
        asked = self._clock()
        response = await self._exchange(request, {})
        data = decipher(request, response, self.who).data
        self._ticket = parse_ticket(data, username)
        self._ticket_since = asked
        return self._ticket

    # --- tasks ---------------------------------------------------------------------

    async def wait_task(
        self, upid: str, *, timeout_s: float | None = None
    ) -> list[str]:
        """Wait for a task's end.

        Returns: its warnings; PVE counts such a task as successful.

        Raises:
            PveRefusalError: the task failed; the text holds the end of its log.
            TransportError: it still runs after ``timeout_s``, or its node can't be
                asked any more. The task goes on either way.
        """
        name = parse_upid(upid)
        where = path("nodes", name.node, "tasks", name.text)
        deadline = None if timeout_s is None else self._clock() + timeout_s
        silent_since: float | None = None
        pause = _FIRST_POLL_S
        while True:
            try:
                state = values.parse_task(await self.get(f"{where}/status"))
            except TlsTrustError:
                raise
            except TransportError as error:
                silent_since = silent_since or self._clock()
                if self._clock() - silent_since > _POLL_PATIENCE_S:
                    raise OutcomeUnknownError(
                        f"{_task_name(name)}: its end can't be seen ({error}). It may "
                        "go on: look at the state before repeating it"
                    ) from error
            else:
                silent_since = None
                if not state.running:
                    break
            if deadline is not None and self._clock() + pause > deadline:
                raise OutcomeUnknownError(
                    f"{_task_name(name)} still runs after {timeout_s:g} s; it goes on "
                    f"in Proxmox VE as {name}"
                )
            await self._sleep(pause)
            pause = min(pause * 1.5, _SLOWEST_POLL_S)
        if not state.succeeded:
            raise await self._task_failure(name, where, state.exitstatus)
        if not state.warnings:
            return []
        try:
            found = values.log_warnings(await self._log(where))
        except (PveError, TransportError, RemoteProtocolError) as error:
            return [f"{_task_name(name)} gave warnings; its log can't be read: {error}"]
        return found or [f"{_task_name(name)} ended with {state.exitstatus}"]

    async def _task_failure(
        self, name: Upid, where: str, exitstatus: str
    ) -> PveRefusalError:
        tail = ""
        with contextlib.suppress(PveError, TransportError, RemoteProtocolError):
            tail = values.log_tail(await self._log(where))
        failure = refusal(_task_name(name), 0, exitstatus, {}, self.who)
        if not tail or exitstatus in tail:
            return failure
        return PveRefusalError(
            f"{failure}. Its log ends: {tail}",
            reason=failure.reason,
            said=failure.said,
            privilege=failure.privilege,
            path=failure.path,
            lock=failure.lock,
        )

    async def _log(self, where: str) -> list[str]:
        """Return the head of a task's log and, if it is long, its end."""
        head = await self.call("GET", f"{where}/log", {"start": 0, "limit": 500})
        lines = values.parse_log(head.data)
        if head.total is not None and head.total > 500:
            start = max(500, head.total - 100)
            rest = await self.get(f"{where}/log", start=start, limit=100)
            lines += values.parse_log(rest)
        return lines


def _task_name(name: Upid) -> str:
    return f"task {name.type} {name.id} on {name.node}".replace("  ", " ")
