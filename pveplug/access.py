# SPDX-License-Identifier: Apache-2.0
"""From a connection as it is configured to the API, its secret read on the way."""

from __future__ import annotations

import asyncio

from pveplug.config import Connection, TokenLogin
from pveplug.log import register_secret
from pveplug.pve import Endpoint, PveApi, TicketAuth, TokenAuth


async def open_api(connection: Connection) -> PveApi:
    """Return the API for a connection; its secret is read here, in a thread.

    Raises:
        ConfigError: there is no credential, or its file or command gives none.
    """
    login = await asyncio.to_thread(connection.resolve)
    auth: TokenAuth | TicketAuth
    if isinstance(login, TokenLogin):
        register_secret(login.secret.reveal())
        auth = TokenAuth(login.token_id, login.secret.reveal())
    else:
        register_secret(login.password.reveal())
        auth = TicketAuth(login.user, login.password.reveal())
    endpoint = Endpoint(
        connection.host,
        connection.port,
        connection.fingerprints,
        connection.ca_file,
        connection.insecure,
        connection.timeout_s,
    )
    return PveApi(endpoint, auth)
