# SPDX-License-Identifier: Apache-2.0
"""aiohttp, imported without the system's certificates.

On import it makes a default context of all 140 of them, for 40 ms of each start. We
name in each connection what is trusted and never use that one; it would trust nobody
but who is in the system's certificate directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator


@contextlib.contextmanager
def _without_certificates() -> Generator[None, None, None]:
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = os.devnull
    try:
        yield
    finally:
        if before is None:
            del os.environ["SSL_CERT_FILE"]
        else:
            os.environ["SSL_CERT_FILE"] = before


with _without_certificates():
    import aiohttp

__all__ = ["aiohttp"]
