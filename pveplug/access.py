# SPDX-License-Identifier: Apache-2.0
"""From the configuration to the API, and from a selection to its VMs."""

from __future__ import annotations

import asyncio

from pveplug.config import Connection, TokenLogin
from pveplug.events import Reporter
from pveplug.log import register_secret
from pveplug.pve import Endpoint, PveApi, TicketAuth, TokenAuth
from pveplug.selection import Selection, VmSummary, select


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


async def choose_vms(
    api: PveApi, selection: Selection, node: str, say: Reporter
) -> tuple[VmSummary, ...]:
    """Return the VMs of ``node`` that are selected, and say what is noteworthy.

    Raises:
        ConfigError: an id that isn't there or is elsewhere; nothing matched.
    """
    vms = [
        VmSummary(r.vmid, r.name, r.node, r.pool, r.tags, r.template, r.status)
        for r in await api.resources()
    ]
    selected = select(vms, selection, node=node)
    for note in selected.notes:
        say.info(note)
    if len(selected.chosen) > 1:
        ids = ", ".join(str(vm.vmid) for vm in selected.chosen)
        say.info(f"{len(selected.chosen)} VMs selected: {ids}")
    return selected.chosen
