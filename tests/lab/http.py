# SPDX-License-Identifier: Apache-2.0
"""pveproxy: TLS, who is asking, parameters, privileges, and PVE's envelope."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .errors import ApiError
from .schema import P, table, verify

if TYPE_CHECKING:
    from .site import LabNode, Site

BODY_LIMIT = 512 << 10
TICKET_COOKIE = "PVEAuthCookie"


@dataclass(slots=True)
class Call:
    """One verified call, as handlers get it."""

    site: Site
    user: str
    node: LabNode
    path: dict[str, str]
    params: dict[str, Any]

    @property
    def vmid(self) -> int:
        return int(self.path["vmid"])


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """A call: privileges are ``any`` of, ``all`` of, or checked by the handler."""

    method: str
    template: str
    pattern: re.Pattern[str]
    params: dict[str, dict[str, P]]
    """By the release's first digit."""
    handler: Handler
    need: tuple[str, ...]
    need_8: tuple[str, ...]
    on: str
    any: bool
    config: bool
    token: bool
    world: bool
    releases: tuple[str, ...]


ROUTES: list[Route] = []


def route(
    method: str,
    template: str,
    params: str = "",
    *,
    need: str = "",
    need_8: str | None = None,
    on: str = "/vms/{vmid}",
    any: bool = False,
    config: bool = False,
    token: bool = True,
    world: bool = False,
    releases: tuple[str, ...] = ("8", "9"),
) -> Callable[[Handler], Handler]:
    """Register a handler. ``need_8``: the privileges in 8.4 where they differ."""
    expression = re.sub(r"\{volume\}", r"(?P<volume>.+)", template)
    expression = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", expression)

    def register(handler: Handler) -> Handler:
        ROUTES.append(
            Route(
                method,
                template,
                re.compile(expression),
                {"8": table(params, "8.4"), "9": table(params, "9.2")},
                handler,
                tuple(need.split()),
                tuple((need if need_8 is None else need_8).split()),
                on,
                any,
                config,
                token,
                world,
                releases,
            )
        )
        return handler

    return register


def _heard(work: asyncio.Task[Any]) -> None:
    """Nobody waits any more for what a late call ends with."""
    if not work.cancelled():
        work.exception()


class Proxy:
    """The HTTPS server of one node; any node answers for all of them."""

    def __init__(self, site: Site, node: LabNode) -> None:
        self.site = site
        self.node = node
        self.port = 0
        self.fingerprint = ""
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, user) of every call that was let in."""
        self.unauthenticated = 0
        self._runner: web.AppRunner | None = None
        self._late: set[asyncio.Task[Any]] = set()

    async def start(self, port: int = 0) -> None:
        folder = self.node.root / "etc/pve/nodes" / self.node.name
        folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = make_certificate(self.node.name, folder)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "pve-ssl.pem", folder / "pve-ssl.key")
        app = web.Application(client_max_size=BODY_LIMIT + 1)
        app.router.add_route("*", "/api2/{kind:json|extjs}{path:/.*}", self._answer)
        self._runner = web.AppRunner(app, keepalive_timeout=5, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        for task in list(self._late):
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        if self._runner:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            data = await self._guarded(request)
        except ApiError as error:
            return self._error(request, error)
        except Exception as error:
            self.site.log(f"{request.method} {request.path}: {error!r}")
            return self._error(request, ApiError(500, " ".join(str(error).split())))
        body: dict[str, Any] = {"data": data}
        if request.match_info["kind"] == "extjs":
            body["success"] = 1
        return web.json_response(body)

    def _error(self, request: web.Request, error: ApiError) -> web.Response:
        body: dict[str, Any] = {"data": None, "message": error.message + "\n"}
        if error.errors:
            body["errors"] = error.errors
        if request.match_info["kind"] == "extjs":
            return web.json_response({**body, "success": 0, "status": error.status})
        reason = " ".join(error.message.split()) or "Error"
        return web.json_response(body, status=error.status, reason=reason)

    async def _guarded(self, request: web.Request) -> Any:
        """Run the call under pveproxy's time limit; late work still finishes."""
        work = asyncio.create_task(self._call(request))
        self._late.add(work)
        work.add_done_callback(self._late.discard)
        work.add_done_callback(_heard)
        done, _ = await asyncio.wait({work}, timeout=self.site.proxy_limit_s)
        if not done:
            raise ApiError(596, "Connection timed out")
        return work.result()

    async def _call(self, request: web.Request) -> Any:
        method, path = request.method, unquote(request.match_info["path"])
        if request.headers.get("Transfer-Encoding", "").lower() == "chunked":
            raise ApiError(501, "chunked transfer encoding not supported")
        if (request.content_length or 0) > BODY_LIMIT:
            raise ApiError(501, "for data too large")
        found, match = self._find(method, path)
        user = await self._who(request, world=bool(found and found.world))
        if found is None or match is None:
            raise ApiError(501, f"Method '{method} {path}' not implemented")
        if "!" in user and not found.token:
            raise ApiError(403, "Permission check failed (tokens not allowed)")
        self.requests.append((method, path, user))
        variables = match.groupdict()
        given = await _parameters(request)
        for key in variables:
            given.pop(key, None)
        call = Call(self.site, user, self.node, variables, {})
        self._variables(call)
        call.params = verify(
            given,
            found.params[self.site.release[0]],
            config=found.config,
            release=self.site.release,
        )
        self._permit(found, call)
        await self.site.faults.before_call(method, path)
        return await found.handler(call)

    def _find(
        self, method: str, path: str
    ) -> tuple[Route | None, re.Match[str] | None]:
        path = path.rstrip("/")
        for candidate in ROUTES:
            if (
                candidate.method == method
                and self.site.release[0] in candidate.releases
            ):
                if match := candidate.pattern.fullmatch(path):
                    return candidate, match
        return None, None

    def _variables(self, call: Call) -> None:
        errors: dict[str, str] = {}
        if vmid := call.path.get("vmid"):
            if not vmid.isdigit() or not 100 <= int(vmid) <= 999_999_999:
                errors["vmid"] = (
                    "invalid format - value does not look like a valid VM ID\n"
                )
        if errors:
            raise ApiError(400, "Parameter verification failed.", errors)
        if name := call.path.get("node"):
            if name not in self.site.nodes:
                raise ApiError(
                    500,
                    f"hostname lookup '{name}' failed - failed to get address info "
                    f"for: {name}: Name or service not known",
                )
            call.node = self.site.nodes[name]
            if name in self.site.offline:
                raise ApiError(595, "No route to host")

    def _permit(self, found: Route, call: Call) -> None:
        need = found.need_8 if self.site.release.startswith("8") else found.need
        if not need:
            return
        path = found.on.format(**call.path)
        check = self.site.auth.check_any if found.any else self.site.auth.check
        check(call.user, path, *need)

    async def _who(self, request: web.Request, *, world: bool) -> str:
        try:
            return self._authenticated(request, world)
        except ApiError:
            self.unauthenticated += 1
            await asyncio.sleep(self.site.auth_delay_s)
            raise

    def _authenticated(self, request: web.Request, world: bool) -> str:
        auth = self.site.auth
        header = request.headers.get("Authorization", "")
        if header.startswith("PVEAPIToken="):
            user = auth.verify_token(header.removeprefix("PVEAPIToken="))
            if user is None:
                raise ApiError(401, "invalid token value!")
            return user
        cookie = request.cookies.get(TICKET_COOKIE)
        if cookie is None:
            if world:
                return "nobody"
            raise ApiError(401, "No ticket")
        user = auth.verify_ticket(unquote(cookie))
        if user is None:
            if world:
                return "nobody"
            raise ApiError(401, "permission denied - invalid PVE ticket")
        if request.method != "GET" and not world:
            token = request.headers.get("CSRFPreventionToken", "")
            if not auth.verify_csrf(user, token):
                raise ApiError(401, "Permission denied - invalid csrf token")
        return user


async def _parameters(request: web.Request) -> dict[str, Any]:
    """Query, form and JSON parameters; repeated keys become lists."""
    found: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if key in found:
            old = found[key]
            found[key] = [*old, value] if isinstance(old, list) else [old, value]
        else:
            found[key] = value

    for key, value in request.query.items():
        add(key, value)
    if request.content_type == "application/json" and request.can_read_body:
        body = await request.json()
        for key, value in (body or {}).items():
            add(key, value)
    elif request.can_read_body:
        for key, value in (await request.post()).items():
            add(key, value)
    return found


def make_certificate(name: str, folder: Path) -> str:
    """Write ``pve-ssl.pem`` and key; return the SHA-256 fingerprint with colons."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name}.lab")])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName(name),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "pve-ssl.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "pve-ssl.key").write_bytes(
        key.private_bytes(
            pem,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "pve-ssl.key").chmod(0o600)
    raw = certificate.fingerprint(hashes.SHA256()).hex().upper()
    return ":".join(raw[i : i + 2] for i in range(0, len(raw), 2))
