# SPDX-License-Identifier: Apache-2.0
"""Certificates for NBD under the names libnbd and QEMU look for in a folder."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

from tests.support.dr_certs import pair

NAMES = ("localhost", "127.0.0.1")


class Pki:
    """``folder`` is what ``tls-certificates=`` and ``dir=`` take."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ca = pair(folder, "ca", ca=True)
        for stem in ("server", "client"):
            made = pair(folder, stem, ca, names=NAMES, encipher=True)
            shutil.copy(made.cert, folder / f"{stem}-cert.pem")
            shutil.copy(made.key, folder / f"{stem}-key.pem")
        shutil.copy(ca.cert, folder / "ca-cert.pem")

    def server(self, *, demand: bool = True) -> ssl.SSLContext:
        """What the server is given; ``demand``: clients show a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert, key = self.folder / "server-cert.pem", self.folder / "server-key.pem"
        context.load_cert_chain(cert, key)
        if demand:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.folder / "ca-cert.pem")
        return context

    def client(self, *, shows: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca-cert.pem"))
        if shows:
            cert, key = self.folder / "client-cert.pem", self.folder / "client-key.pem"
            context.load_cert_chain(cert, key)
        return context
