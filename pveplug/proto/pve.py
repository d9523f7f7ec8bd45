# SPDX-License-Identifier: Apache-2.0
"""The Proxmox VE REST protocol as pure functions: requests out, answers deciphered.

The API speaks JSON below ``/api2/json``. A success is ``{"data": …}``; a failure is an
HTTP status whose *reason phrase* carries the message, repeated as ``message`` in the
body, with ``errors`` per parameter. Most refusals of PVE's own logic are status 500 and
told apart by their text alone: see :mod:`pveplug.proto.pve_refusal`.

::

    build(method, path, params) -> Request      caller sends it
    decipher(request, response, who) -> Envelope | raises
    retry_delay(attempt, jitter) -> seconds | None
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

from pveplug.errors import LocalProtocolError, RemoteProtocolError, TransportError
from pveplug.proto.pve_refusal import one_line, refusal

BASE: Final = "/api2/json"
MAX_REQUEST_BODY: Final = 512 * 1024
"""pveproxy answers 501 to a larger body."""
MAX_RESPONSE_BODY: Final = 16 * 1024 * 1024
"""A cluster of 20,000 guests lists in about 10 MiB."""

Value = str | int | float | bool | Sequence[str | int] | None


class OutcomeUnknownError(TransportError):
    """A changing request was sent and its answer lost: it may have been carried out.

    Never repeat it blindly; read the state it would have changed.
    """


class NotSentError(TransportError):
    """No byte of the request reached the server: repeating is safe for any method."""


class TlsTrustError(TransportError):
    """The server's certificate isn't the one we trust; no credential was sent.

    Repeating doesn't help: an operator has to look.
    """


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready to be sent.

    ``target`` is encoded and begins with ``/api2/json``; ``body`` is form-encoded.
    ``repeatable`` says that carrying it out twice does no harm.
    """

    method: str
    target: str
    body: bytes | None
    repeatable: bool

    @property
    def name(self) -> str:
        """What an operator calls it: ``GET /nodes/pve1/qemu/100/config``."""
        path = self.target.removeprefix(BASE).partition("?")[0]
        return f"{self.method} {path}"


@dataclass(frozen=True, slots=True)
class Response:
    """What came back; ``body`` is bounded by the adapter."""

    status: int
    reason: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A success: the payload, and how many rows there are beyond it."""

    data: Any
    total: int | None


def path(*segments: str | int) -> str:
    """Return ``/a/b/c`` with every segment encoded: volume ids hold ``:`` and ``/``."""
    return "".join(f"/{quote(str(segment), safe='')}" for segment in segments)


def encode_params(params: Mapping[str, Value]) -> str:
    """Encode as a form: booleans as 0/1, lists as repeated keys, None left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in params.items():
        match value:
            case None:
                continue
            case bool():
                pairs.append((key, "1" if value else "0"))
            case str() | int() | float():
                pairs.append((key, str(value)))
            case _:
                pairs.extend((key, str(item)) for item in value)
    # %20, not +: PVE reads both, strangers' proxies don't.
    return urlencode(pairs, quote_via=quote, safe="")


def build(
    method: str,
    path: str,
    params: Mapping[str, Value] | None = None,
    *,
    repeatable: bool | None = None,
) -> Request:
    """Build a call; GET and DELETE carry their parameters in the query.

    Raises:
        LocalProtocolError: the path isn't absolute, or the body is over PVE's limit.
    """
    if not path.startswith("/") or any(c in path for c in "?# \r\n"):
        raise LocalProtocolError(f"not an encoded API path: {path!r}")
    encoded = encode_params(params or {})
    repeats = method == "GET" if repeatable is None else repeatable
    if method in ("GET", "DELETE"):  # a DELETE with a body is 501
        query = f"?{encoded}" if encoded else ""
        return Request(method, f"{BASE}{path}{query}", None, repeats)
    body = encoded.encode("ascii")
    if len(body) > MAX_REQUEST_BODY:
        raise LocalProtocolError(
            f"{method} {path}: body of {len(body)} bytes, PVE takes {MAX_REQUEST_BODY}"
        )
    return Request(method, f"{BASE}{path}", body, repeats)


# --- answers -----------------------------------------------------------------------


PROXY_FAILURES: Final = {
    595: "pveproxy could not connect to that node or its daemon",
    596: "pveproxy's connection to that node or its daemon broke or took over 30 s",
    597: "pveproxy lost the answer of that node or its daemon",
    598: "pveproxy gave the request up",
    599: "pveproxy could not forward the request",
}
_GATEWAY: Final = frozenset({502, 503, 504})
# A 500 that says "not now": pmxcfs restarting, a file lock or a monitor held by others.
_PASSING: Final = re.compile(r"ipcc_send_rec|got timeout|interrupted by signal")


def decipher(request: Request, response: Response, who: str) -> Envelope:
    """Return the payload of a success.

    ``who`` is the token id or user that asked, named in what an operator reads.

    Raises:
        PveRefusalError: PVE understood and refused.
        TransportError: pveproxy couldn't pass a *repeatable* request on.
        OutcomeUnknownError: the same for a changing request.
        RemoteProtocolError: this isn't the PVE API.
    """
    parsed = _parsed(response.body)
    if 200 <= response.status < 300:
        if parsed is None or "data" not in parsed:
            raise RemoteProtocolError(
                f"{request.name}: answer {response.status} isn't JSON with data: "
                "is this the Proxmox VE API (port 8006)?"
            )
        total = parsed.get("total")
        return Envelope(parsed["data"], total if isinstance(total, int) else None)
    if 300 <= response.status < 400:
        raise RemoteProtocolError(
            f"{request.name}: redirected ({response.status}); the Proxmox VE API never "
            "does that: check pve_host and pve_port"
        )
    said = _said(response, parsed)
    if response.status in PROXY_FAILURES or response.status in _GATEWAY:
        why = PROXY_FAILURES.get(response.status, "a gateway in between failed")
        raise lost(request, f"status {response.status} ({said}): {why}")
    if parsed is None and not said:
        raise RemoteProtocolError(
            f"{request.name}: status {response.status} with neither reason nor JSON: "
            "is this the Proxmox VE API (port 8006)?"
        )
    params = parsed.get("errors") if parsed else None
    errors = (
        {str(k): one_line(str(v), 200) for k, v in list(params.items())[:32]}
        if isinstance(params, dict)
        else {}
    )
    raise refusal(request.name, response.status, said, errors, who)


def lost(request: Request, why: str) -> TransportError:
    """Return the error for a request whose answer will never come."""
    if request.repeatable:
        return TransportError(f"{request.name}: {why}")
    return OutcomeUnknownError(
        f"{request.name}: {why}. The work may go on or be done: look at the state "
        "before repeating it"
    )


def is_passing(response: Response) -> bool:
    """Tell whether this answer to a repeatable request is worth another try."""
    if response.status in PROXY_FAILURES or response.status in _GATEWAY:
        return True
    if response.status != 500:
        return False
    text = _said(response, _parsed(response.body))
    return _PASSING.search(text) is not None


MAX_ATTEMPTS: Final = 4


def retry_delay(attempt: int, jitter: float) -> float | None:
    """Return the pause before the next try, or None when it's time to give up.

    Args:
        attempt: how many tries have failed, from 1.
        jitter: a random number from 0 to 1.

    0.25, 0.5, 1 s, each times 0.75 to 1.25: together longer than a reload of pveproxy.
    """
    if attempt >= MAX_ATTEMPTS:
        return None
    pause = 0.25 * 2.0 ** (attempt - 1)
    return pause * (0.75 + 0.5 * jitter)


def _parsed(body: bytes) -> dict[str, Any] | None:
    if not body.lstrip()[:1] == b"{":
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _said(response: Response, parsed: dict[str, Any] | None) -> str:
    message = parsed.get("message") if parsed else None
    if isinstance(message, str) and message.strip():
        return one_line(message)
    if response.reason.strip():
        return one_line(response.reason)
    return one_line(response.body[:200].decode("utf-8", "replace"))
