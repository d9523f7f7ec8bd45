# SPDX-License-Identifier: Apache-2.0
"""One HTTPS connection pool to a Proxmox VE node, on aiohttp.

It sends a :class:`~pveplug.proto.pve.Request` and brings back what was answered,
bounded, or says how far it came: not sent, answer lost, certificate not trusted. Who
asks, what is repeated and what an answer means is decided in pve_session.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Mapping
from typing import Final

from yarl import URL

from pveplug.errors import ConfigError, PveplugError, RemoteProtocolError
from pveplug.http_library import aiohttp
from pveplug.proto.pve import (
    MAX_RESPONSE_BODY,
    NotSentError,
    Request,
    Response,
    TlsTrustError,
    lost,
)
from pveplug.proto.pve_login import Endpoint, colon_hex, parse_fingerprints

_CONNECT_S: Final = 10.0
_MARGIN_S: Final = 5.0
_MAX_ERROR_BODY: Final = 64 * 1024


class _Pin(aiohttp.Fingerprint):
    """Checks the leaf of each new connection, after the handshake, before the request.

    aiohttp calls ``check`` between the TLS handshake and handing the connection out,
    closes the transport itself for this one exception, and builds the context for a
    ``Fingerprint`` without CA and host name check.
    """

    def __init__(self, digests: tuple[bytes, ...]) -> None:
        super().__init__(digests[0])
        self._digests = digests

    def check(self, transport: asyncio.Transport) -> None:
        sslobj = transport.get_extra_info("ssl_object")
        leaf = sslobj.getpeercert(binary_form=True) if sslobj else None
        got = hashlib.sha256(leaf or b"").digest()
        if got not in self._digests:
            host, port, *_ = transport.get_extra_info("peername")
            raise aiohttp.ServerFingerprintMismatch(self._digests[0], got, host, port)


class _BrokenError(aiohttp.ClientError):
    """The connection broke after the request began: not a kind aiohttp repeats."""


async def _once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send once: aiohttp repeats PUT and DELETE on its own after a broken connection.

    Even on a fresh one (3.14). Idempotent they are for HTTP, but a repeated DELETE of
    a volume meets the one that another job has allocated meanwhile.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _BrokenError(_cause(error)) from error


class HttpTransport:
    """Sends requests to one endpoint; close it with :meth:`aclose`.

    Changing requests travel on fresh connections: a kept one may be closed by pveproxy
    (5 s idle) just as we write, and nobody could tell whether the request was read.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pins = parse_fingerprints(",".join(endpoint.fingerprints))
        trust = self._trust()
        # Below the server's 5 s, so that we rarely pick a connection it is closing.
        kept = aiohttp.TCPConnector(ssl=trust, limit=8, keepalive_timeout=3.0)
        fresh = aiohttp.TCPConnector(ssl=trust, limit=8, force_close=True)
        self._kept = self._session(kept)
        self._fresh = self._session(fresh)

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        total = self._endpoint.timeout_s + _MARGIN_S
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=total, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            # identity: a compressed body could outgrow its bound before we see it.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,  # no proxy of the environment sees the credential
            middlewares=(_once,),
        )

    def _trust(self) -> ssl.SSLContext | bool | aiohttp.Fingerprint:
        if self._pins:
            return _Pin(tuple(bytes.fromhex(p.replace(":", "")) for p in self._pins))
        if self._endpoint.insecure:
            return False
        try:
            context = ssl.create_default_context(cafile=self._endpoint.ca_file)
        except OSError as error:
            raise ConfigError(
                f"pve_ca {self._endpoint.ca_file}: {error.strerror or error}",
                key="pve_ca",
            ) from error
        # Python 3.13 made this the default; the CA that PVE makes lacks the extensions.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    async def aclose(self) -> None:
        """Close every connection."""
        await self._kept.close()
        await self._fresh.close()

    async def send(self, request: Request, headers: Mapping[str, str]) -> Response:
        """Send one request and read its answer.

        Raises:
            NotSentError: no connection could be made.
            TlsTrustError: the certificate isn't trusted; nothing was sent.
            TransportError: the answer was lost, for a repeatable request.
            OutcomeUnknownError: the same for a changing one.
            RemoteProtocolError: what came back isn't HTTP or exceeds its bound.
        """
        url = URL(f"https://{self._endpoint}{request.target}", encoded=True)
        session = self._kept if request.repeatable else self._fresh
        sent = dict(headers)
        if request.body is not None:
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            async with session.request(
                request.method,
                url,
                data=request.body,
                headers=sent,
                allow_redirects=False,  # credentials go nowhere else
            ) as answer:
                body = await self._body(request, answer)
                reason = (answer.reason or "").encode("utf-8", "surrogateescape")
                return Response(answer.status, reason.decode("utf-8", "replace"), body)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise await self._translated(request, error) from error

    async def _body(self, request: Request, answer: aiohttp.ClientResponse) -> bytes:
        """Read the body; an error's is cut at its bound, a success's must fit."""
        fine = answer.status < 300
        limit = MAX_RESPONSE_BODY if fine else _MAX_ERROR_BODY
        body = bytearray()
        async for piece in answer.content.iter_any():
            body += piece
            if len(body) > limit:
                if not fine:
                    answer.close()
                    return bytes(body[:limit])
                raise RemoteProtocolError(
                    f"{request.name}: the answer is longer than {limit} bytes"
                )
        return bytes(body)

    async def _translated(self, request: Request, error: Exception) -> PveplugError:
        where = f"the Proxmox VE API at {self._endpoint}"
        match error:
            case aiohttp.ServerFingerprintMismatch(got=got):
                expected = " or ".join(self._pins)
                return TlsTrustError(
                    "TLS fingerprint mismatch. "
                    f"Expected {expected} got {colon_hex(got)}"
                )
            case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
                return await self._untrusted(cause)
            case aiohttp.ClientConnectorSSLError():
                return NotSentError(
                    f"{where} doesn't speak TLS as we do: {_cause(error)}. Check "
                    "pve_port"
                )
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return NotSentError(
                    f"{where} can't be reached: {_cause(error)}. Check pve_host, "
                    "pve_port and 'systemctl status pveproxy' there"
                )
            case aiohttp.ClientResponseError() | aiohttp.InvalidURL():
                return RemoteProtocolError(
                    f"{request.name}: {where} doesn't answer in HTTP: {_cause(error)}"
                )
            case TimeoutError():
                seconds = f"{self._endpoint.timeout_s + _MARGIN_S:g}"
                return lost(request, f"{where} did not answer within {seconds} s")
            case _:
                return lost(request, f"{where} broke the connection: {_cause(error)}")

    async def _untrusted(self, cause: Exception) -> TlsTrustError:
        said = getattr(cause, "verify_message", "") or str(cause)
        shown = await presented_fingerprint(self._endpoint.host, self._endpoint.port)
        pin = (
            f"set pve_fingerprint={shown} after comparing it with 'pvenode cert info' "
            "on that node"
            if shown
            else "set pve_fingerprint to what 'pvenode cert info' shows on that node"
        )
        return TlsTrustError(
            f"The certificate of {self._endpoint} is not trusted ({said}); no "
            f"credential was sent. If this is your node, {pin}, or pve_ca to its CA "
            "(/etc/pve/pve-root-ca.pem)"
        )


def _cause(error: Exception) -> str:
    inner = getattr(error, "os_error", None) or error
    if isinstance(inner, ssl.SSLError):
        return inner.reason or "TLS error"
    if isinstance(inner, TimeoutError):
        return "no answer"
    if isinstance(inner, ConnectionError) and inner.errno:
        return os.strerror(inner.errno)  # asyncio's own text names the address only
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return " ".join(str(inner).split())[:200] or type(inner).__name__


async def presented_fingerprint(
    host: str, port: int, *, timeout_s: float = _CONNECT_S
) -> str | None:
    """Return the SHA-256 of the certificate a server shows, or None if it shows none.

    A handshake of its own, unverified, over which no byte of ours is sent.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:  # TimeoutError and ssl.SSLError are kinds of it
        return None
    try:
        leaf = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    return colon_hex(hashlib.sha256(leaf).digest()) if leaf else None
