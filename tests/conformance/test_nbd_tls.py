# SPDX-License-Identifier: Apache-2.0
"""TLS against nbdkit, with certificates made for the test."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pveplug.errors import NbdError, TransportError
from pveplug.nbd.client import TcpAddress, UnixAddress, connect
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import OrderedReader
from tests.support.nbd_servers import NBDKIT, free_port, nbdkit, running

pytestmark = pytest.mark.integration

MiB = 1024 * 1024


def usage(ca):
    """What a CA's key, or another's, may be used for."""
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def certificate(folder, stem, name, issuer=None, *, ca=False):
    """Write ``stem-cert.pem`` and ``stem-key.pem``; return them for signing others."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        # Python 3.13 verifies strictly: RFC 5280 wants these three.
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                (issuer[1] if issuer else key).public_key()
            ),
            critical=False,
        )
        .add_extension(usage(ca), critical=True)
    )
    made = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / f"{stem}-cert.pem").write_bytes(made.public_bytes(pem))
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{stem}-key.pem").write_bytes(private)
    return made, key


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    ca = certificate(folder, "ca", "test CA", ca=True)
    certificate(folder, "server", "localhost", ca)
    certificate(folder, "client", "client", ca)
    return folder


def trusting(pki):
    return ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))


async def round_trip(address, context, **options):
    data = bytes(range(256)) * 4096
    async with await connect(address, tls=context, **options) as client:
        async with NbdSink(client) as sink:
            await sink.write(MiB, data)
            await sink.finish()
    async with await connect(address, tls=context, readers=2, **options) as client:
        assert client.connections == 2
        got = bytearray()
        async for slot in OrderedReader(client).read([(0, 4 * MiB)]):
            got += slot.view
    assert got == bytes(MiB) + data + bytes(2 * MiB)


@pytest.mark.parametrize("loop", [asyncio, uvloop])
def test_a_disk_goes_through_tls_both_ways(pki, loop):
    port = free_port()
    argv = [NBDKIT, "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require"]
    argv += [f"--tls-certificates={pki}", "memory", "4M"]
    with running(argv, port):
        loop.run(round_trip(TcpAddress("127.0.0.1", port), trusting(pki)))


@pytest.fixture
def tls_unix(pki, tmp_path):
    options = ["--tls=require", f"--tls-certificates={pki}", "memory", "4M"]
    with nbdkit(tmp_path, *options) as path:
        yield UnixAddress(path)


async def test_tls_works_on_a_unix_socket_with_a_named_server(pki, tls_unix):
    await round_trip(tls_unix, trusting(pki), server_hostname="localhost")


async def test_a_server_that_demands_tls_refuses_plain_text_and_says_so(tls_unix):
    with pytest.raises(NbdError, match="demands TLS"):
        await connect(tls_unix)


async def test_a_certificate_nobody_vouches_for_is_refused(tls_unix):
    with pytest.raises(TransportError, match=r"(?i)certificate verify failed"):
        await connect(
            tls_unix, tls=ssl.create_default_context(), server_hostname="localhost"
        )


async def test_another_hosts_certificate_is_refused(pki, tls_unix):
    with pytest.raises(TransportError, match="not valid for"):
        await connect(tls_unix, tls=trusting(pki), server_hostname="elsewhere")


async def test_a_server_without_tls_is_refused_when_tls_is_wanted(pki, tmp_path):
    with nbdkit(tmp_path, "memory", "4M") as path:
        with pytest.raises(NbdError, match="refused TLS"):
            await connect(
                UnixAddress(path), tls=trusting(pki), server_hostname="localhost"
            )
