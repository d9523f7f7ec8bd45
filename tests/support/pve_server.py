# SPDX-License-Identifier: Apache-2.0
"""A scripted Proxmox VE API over TLS, certificates, and a TLS server that records."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificate:
    """A key pair on disk; ``ca_file`` verifies it."""

    cert_file: Path
    key_file: Path
    ca_file: Path
    digest: bytes

    @property
    def fingerprint(self) -> str:
        return self.digest.hex(":").upper()

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


def self_signed(
    base: Path, name: str = "pve1", *, host: str = "127.0.0.1"
) -> Certificate:
    """Make a certificate for ``host`` that is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = base / f"{name}.pem", base / f"{name}.key"
    cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    leaf = cert.public_bytes(serialization.Encoding.DER)
    return Certificate(cert_file, key_file, cert_file, hashlib.sha256(leaf).digest())


@dataclass
class Call:
    """What the server received."""

    method: str
    raw_path: str
    query: dict[str, list[str]]
    form: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def line(self) -> str:
        return f"{self.method} {self.raw_path.partition('?')[0]}"


Answer = Any  # data | (status, text) | (status, text, errors) | web.Response | callable


@dataclass
class ScriptedPve:
    """Answers each ``METHOD /path`` from a list; the last answer repeats."""

    port: int = 0
    script: dict[str, list[Answer]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)

    def on(self, line: str, *answers: Answer) -> None:
        self.script[line] = list(answers)

    def lines(self) -> list[str]:
        return [call.line for call in self.calls]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        call = Call(
            request.method,
            request.raw_path.removeprefix("/api2/json"),
            {key: request.query.getall(key) for key in request.query},
            {key: [str(v) for v in form.getall(key)] for key in form},
            dict(request.headers),
        )
        self.calls.append(call)
        self.connections.add(id(request.transport))
        answers = self.script.get(call.line)
        if not answers:
            return refused(501, f"Method '{call.line}' not implemented")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer(call, request)
            if asyncio.iscoroutine(answer):
                answer = await answer
        match answer:
            case web.StreamResponse():
                return answer
            case (int(status), str(text)):
                return refused(status, text)
            case (int(status), str(text), dict(errors)):
                return refused(status, text, errors)
            case _:
                return web.json_response({"data": answer})


def refused(
    status: int, text: str, errors: dict[str, str] | None = None
) -> web.Response:
    body: dict[str, Any] = {"data": None, "message": f"{text}\n"}
    if errors:
        body["errors"] = errors
    return web.Response(
        status=status,
        reason=text,
        body=json.dumps(body).encode(),
        content_type="application/json",
    )


@asynccontextmanager
async def scripted_pve(certificate: Certificate) -> AsyncIterator[ScriptedPve]:
    server = ScriptedPve()
    app = web.Application(client_max_size=1 << 20)
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(
        app, keepalive_timeout=5, access_log=None, shutdown_timeout=0.1
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate.context())
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


@dataclass
class Recorder:
    """Every decrypted byte of every connection, and how many handshakes succeeded."""

    port: int = 0
    handshakes: int = 0
    received: bytearray = field(default_factory=bytearray)
    reply: bytes = b""


@asynccontextmanager
async def tls_recorder(certificate: Certificate | None) -> AsyncIterator[Recorder]:
    """A TLS server (TCP without ``certificate``) that answers ``reply``, then EOF."""
    recorder = Recorder()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        recorder.handshakes += 1
        try:
            while data := await reader.read(4096):
                recorder.received += data
                if recorder.reply:
                    writer.write(recorder.reply)
                if b"\r\n\r\n" in recorder.received:
                    break
        except OSError:
            pass
        finally:
            writer.close()
            tasks.discard(task)

    context = certificate.context() if certificate else None
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    recorder.port = server.sockets[0].getsockname()[1]
    try:
        yield recorder
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
