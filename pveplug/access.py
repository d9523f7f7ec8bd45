# SPDX-License-Identifier: Apache-2.0
"""From the configuration to the API, and from a selection to its VMs."""

from __future__ import annotations

import asyncio
from typing import Final

from pveplug.config import Connection, TokenLogin
from pveplug.events import Reporter
from pveplug.log import register_secret
from pveplug.pve import Endpoint, PveApi, TicketAuth, TokenAuth
from pveplug.selection import Selection, VmSummary, select

OLDEST: Final = 8
NEWEST: Final = 9
"""Major versions of Proxmox VE that this plug-in was tested with."""


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


async def check_version(api: PveApi, say: Reporter) -> None:
    """Warn of a Proxmox VE that is older or newer than we know; the job goes on.

    Raises:
        PveplugError: the API can't be reached, or refuses us.
    """
    version = await api.version()
    if OLDEST <= version.major <= NEWEST:
        return
    age = "older" if version.major < OLDEST else "newer"
    say.warning(
        f"Proxmox VE {version.text} is {age} than this plug-in knows ({OLDEST}.x and "
        f"{NEWEST}.x); the job goes on: try a restore of it"
    )


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
