# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates of version 3 for the two ends of a replication channel."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pveplug.errors import ConfigError
from pveplug.proto.pve_login import colon_hex

YEARS: Final = 10
_BACKDATED: Final = datetime.timedelta(days=1)
"""The other site's clock may be behind."""
_MAX_COMMON_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key (EC P-256) and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, ``AA:BB:…``."""
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        return colon_hex(hashlib.sha256(der).digest())


def make_ca(name: str, now: datetime.datetime) -> KeyPair:
    """Make a CA that may sign certificates of hosts, and nothing below them."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    builder = _builder(subject, subject, key, key, now).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    builder = builder.add_extension(_usage(ca=True), critical=True)
    return KeyPair(key, builder.sign(key, hashes.SHA256()))


def make_host(
    name: str,
    hosts: Sequence[str],
    now: datetime.datetime,
    *,
    issuer: KeyPair | None = None,
    client: bool = False,
) -> KeyPair:
    """Make a receiver's certificate, or a sender's (``client``).

    Args:
        hosts: DNS names and addresses, the subject alternative names.
        issuer: the CA; None: signed by itself.

    Raises:
        ConfigError: one of ``hosts`` is neither a name nor an address.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    above = issuer.certificate.subject if issuer else subject
    signer = issuer.key if issuer else key
    purpose = (
        ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    )
    builder = (
        _builder(subject, above, key, signer, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(host) for host in hosts]),
            critical=False,
        )
    )
    return KeyPair(key, builder.sign(signer, hashes.SHA256()))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    # The two identifiers are what a strict verification (RFC 5280; Python 3.13's
    # default) asks for.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS + YEARS // 4))
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    )


def _name(text: str) -> x509.Name:
    common = x509.NameAttribute(NameOID.COMMON_NAME, text[:_MAX_COMMON_NAME])
    return x509.Name([common])


def _usage(*, ca: bool) -> x509.KeyUsage:
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


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-._")
    if not host or not set(host.lower()) <= allowed or host[0] in "-.":
        raise ConfigError(f"{host!r} is neither a host name nor an address")
    return x509.DNSName(host)
