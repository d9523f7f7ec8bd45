# SPDX-License-Identifier: Apache-2.0
"""Certificates for the replication channel: good ones, and bad in one way each."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files and as objects."""

    cert: str
    key: str
    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.certificate.public_bytes(DER)).hexdigest()


def usage(ca, encipher=False):
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=encipher,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def pair(
    folder: Path,
    stem: str,
    issuer: Pair | None = None,
    *,
    names: tuple[str, ...] = (),
    ca: bool = False,
    days: tuple[int, int] = (-1, 1),
    encipher: bool = False,
) -> Pair:
    """Make ``stem.pem`` and ``stem.key``; ``names`` are DNS names and addresses.

    ``encipher``: QEMU (7.2 to 10.0) wants that usage though TLS 1.3 has no use for it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, stem)])
    now = datetime.datetime.now(datetime.UTC)
    signer = issuer.private if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .add_extension(usage(ca, encipher), critical=True)
    )
    if not ca:
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([general_name(name) for name in names]),
            critical=False,
        )
    return stored(folder, stem, builder.sign(signer, hashes.SHA256()), key)


def general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def stored(folder, stem, certificate, key) -> Pair:
    cert_file, key_file = folder / f"{stem}.pem", folder / f"{stem}.key"
    cert_file.write_bytes(certificate.public_bytes(PEM))
    private = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(PEM, private, serialization.NoEncryption()))
    return Pair(str(cert_file), str(key_file), certificate, key)


# -- version 1, which no builder makes any more -----------------------------------


def tlv(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 128:
        return bytes([tag, size]) + body
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + body


def parts(data: bytes) -> list[tuple[int, bytes]]:
    """Split DER into its elements: tag and the element as it stands."""
    found, at = [], 0
    while at < len(data):
        size, head = data[at + 1], 2
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(data[at + 2 : at + head], "big")
        found.append((data[at], data[at : at + head + size]))
        at += head + size
    return found


def body(element: bytes) -> bytes:
    size = element[1]
    return element[2 + (size & 0x7F if size & 0x80 else 0) :]


def version_1(folder: Path, stem: str, issuer: Pair) -> Pair:
    """A certificate of X.509 version 1, so without extensions, signed by ``issuer``."""
    modern = pair(folder, stem, issuer, names=("127.0.0.1",))
    tbs = body(modern.certificate.tbs_certificate_bytes)
    old = tlv(0x30, b"".join(e for tag, e in parts(tbs) if tag not in (0xA0, 0xA3)))
    signature = issuer.private.sign(old, ec.ECDSA(hashes.SHA256()))
    algorithm = parts(body(modern.certificate.public_bytes(DER)))[1][1]
    der = tlv(0x30, old + algorithm + tlv(0x03, b"\0" + signature))
    return stored(folder, stem, x509.load_der_x509_certificate(der), modern.private)
