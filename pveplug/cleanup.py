# SPDX-License-Identifier: Apache-2.0
"""Freeing a VM of everything a backup put into its QEMU, from names alone.

This is the normal end of a backup, the first step of the next one, and what runs after
a kill: it needs no memory of what was done, only QEMU's own lists, and may be repeated.
Segments are not touched. The order and the two commands that would abort QEMU are
those of docs/cbt.md, "Clean-up".
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pveplug.blockgraph import (
    MARKER,
    Graph,
    drive_key,
    image_nodes,
    make_graph,
    throttle_options,
)
from pveplug.cbt import PREFIX
from pveplug.errors import IntegrityError, QmpError, TransportError
from pveplug.qmp import Qmp, VmGoneError, qmp_session

log = logging.getLogger(__name__)

SERVER: Final = "NBD server"
BROKEN_S: Final = 5.0
"""How long a clean-up that lost its connection is begun anew."""
DRAIN_TIMEOUT_S: Final = 25.0
"""How long exports and jobs may take to end; a reader that hangs is cut off hard."""


async def query_graph(qmp: Qmp) -> Graph:
    """Ask QEMU for everything this package wants to know of its block layer."""
    status: Any = await qmp.execute("query-status")
    return make_graph(
        await qmp.execute("query-block"),
        await qmp.execute("query-named-block-nodes", {"flat": True}),
        status=str(status["status"]),
        exports=await qmp.execute("query-block-exports"),
        jobs=await qmp.execute("query-jobs"),
        iothreads=await qmp.execute("query-iothreads"),
    )


async def query_blocked(qmp_path: str) -> list[str] | None:
    """Ask whether an I/O error has stopped the guest.

    Returns: None where it has not; else the drives that lack room, perhaps none.

    Raises:
        VmGoneError, TransportError, QmpError: QEMU can't be asked.
    """
    async with qmp_session(qmp_path) as qmp:
        status: Any = await qmp.execute("query-status")
        if status["status"] != "io-error":
            return None
        blocks = await qmp.execute("query-block")
    full = [block for block in blocks if block.get("io-status") == "nospace"]
    return [drive_key(block) or str(block["device"]) for block in full]


async def find_ours(qmp_path: str, nbd_socket: str) -> list[str]:
    """Return what :func:`clean_up` would remove now; nothing is changed.

    Raises:
        VmGoneError, TransportError, QmpError: as there.
    """
    async with qmp_session(qmp_path) as qmp:
        graph = await query_graph(qmp)
    stops = listens(nbd_socket) and not graph.foreign_exports
    return [*graph.ours, SERVER] if stops else graph.ours


async def clean_up(qmp_path: str, nbd_socket: str) -> list[str]:
    """Remove our exports, jobs, filters and scratch nodes from a VM.

    Args:
        qmp_path: the VM's monitor.
        nbd_socket: where our NBD server listens, if it does.

    Returns: what was found and removed, for the job log.

    Raises:
        VmGoneError: QEMU is not there, so there is nothing to clean.
        TransportError: it can't be asked now; what is there stays.
        QmpError, IntegrityError: something of ours could not be removed.
    """
    again_until = asyncio.get_running_loop().time() + BROKEN_S
    while True:
        try:
            return await _clean_up(qmp_path, nbd_socket)
        except VmGoneError:
            if not listens(nbd_socket):
                _forget(nbd_socket)  # QEMU was killed and could not remove it
            raise
        except TransportError as error:
            # A broken connection proves nothing: either nobody listens next time, or
            # QEMU lives and still has what is ours.
            if asyncio.get_running_loop().time() > again_until:
                raise
            log.info("clean-up socket=%s again after: %s", qmp_path, error)
            await asyncio.sleep(0.5)


async def _clean_up(qmp_path: str, nbd_socket: str) -> list[str]:
    async with qmp_session(qmp_path) as qmp:
        graph = await query_graph(qmp)
        found = graph.ours
        await _resume(qmp, graph)
        for name in graph.our_exports:
            await _quietly(qmp, "block-export-del", {"id": name, "mode": "hard"})
    # Ending a fleecing job waits, with the whole VM, for requests of a reader that
    # takes no answers: so not before the exports are gone.
    graph = await _drained(qmp_path, graph, lambda now: now.our_exports)
    if graph.our_jobs:
        async with qmp_session(qmp_path) as qmp:
            for name in graph.our_jobs:
                await _quietly(qmp, "job-cancel", {"id": name})
    graph = await _drained(
        qmp_path, graph, lambda now: [*now.our_exports, *now.our_jobs]
    )
    async with qmp_session(qmp_path) as qmp:
        # Somebody else's export on our server would go with it.
        if listens(nbd_socket) and not graph.foreign_exports:
            await _quietly(qmp, "nbd-server-stop", None)
            found.append(SERVER)
        await _remove_nodes(qmp, graph)
    if not listens(nbd_socket):
        _forget(nbd_socket)
    if found:
        log.info("cleaned socket=%s found=%s", qmp_path, ",".join(found))
    return found


async def _resume(qmp: Qmp, graph: Graph) -> None:
    """Let a guest go on that was paused for a switch which never ended."""
    if MARKER not in graph.nodes:
        return
    if graph.status == "paused":
        await qmp.execute("cont")
    await qmp.execute("blockdev-del", {"node-name": MARKER})


async def _drained(
    qmp_path: str, graph: Graph, names: Callable[[Graph], list[str]]
) -> Graph:
    """Come back until none of these is ours any more; return the graph then."""
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            pause = 0.02
            while names(graph):
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)
                async with qmp_session(qmp_path) as qmp:
                    graph = await query_graph(qmp)
    except TimeoutError as error:
        left = names(graph)
        raise IntegrityError(
            f"QEMU did not end {', '.join(left)} in {DRAIN_TIMEOUT_S:.0f} s"
        ) from error
    return graph


async def _remove_nodes(qmp: Qmp, graph: Graph) -> None:
    names = graph.our_nodes
    for name in names:
        if name.startswith(f"{PREFIX}sa-"):
            await qmp.execute("blockdev-del", {"node-name": name})
    inserted = []
    for name in names:
        if not name.startswith(f"{PREFIX}cbw-"):
            continue
        # It goes at once when it is no longer in the guest's path: the disk may have
        # been moved meanwhile, and putting the remembered node back would silently
        # return the guest to its old volume.
        try:
            await qmp.execute("blockdev-del", {"node-name": name})
        except QmpError as error:
            if "in use" not in error.desc:
                raise
            inserted.append(name)
    if inserted:
        await _take_out(qmp, graph, inserted)
        for name in inserted:
            await qmp.execute("blockdev-del", {"node-name": name})
    for name in names:
        if name.startswith(f"{PREFIX}sc-"):
            await qmp.execute("blockdev-del", {"node-name": name})


async def _take_out(qmp: Qmp, graph: Graph, filters: list[str]) -> None:
    """Put the image nodes back where the filters are in the guests' path."""
    options = []
    for name in filters:
        key = name.removeprefix(f"{PREFIX}cbw-")
        block = next((b for b in graph.blocks if drive_key(b) == key), None)
        if block is None or "inserted" not in block:
            raise IntegrityError(f"filter {name} is in use, but drive {key} is gone")
        inserted = block["inserted"]
        images = image_nodes(graph, str(graph.nodes[name].get("file", "")))
        child = graph.children.get(name) or (images[0] if len(images) == 1 else None)
        if child is None:
            raise IntegrityError(
                f"cannot tell the image below filter {name}: {', '.join(images)}"
            )
        if inserted["drv"] == "throttle":
            options.append(throttle_options(inserted, child))
        elif inserted["node-name"] == name:
            # Setting the node that is already there aborts QEMU, hence the test.
            await qmp.execute(
                "qom-set",
                {
                    "path": f"/machine/peripheral/{key}",
                    "property": "drive",
                    "value": child,
                },
            )
    if options:
        await qmp.execute("blockdev-reopen", {"options": options})


async def _quietly(qmp: Qmp, command: str, arguments: dict[str, Any] | None) -> None:
    """Send a command whose object may have gone by itself meanwhile."""
    try:
        await qmp.execute(command, arguments)
    except QmpError as error:
        log.info("clean-up command=%s answer=%s", command, error.desc)


def _forget(path: str) -> None:
    if path:
        Path(path).unlink(missing_ok=True)


def listens(path: str) -> bool:
    """Whether somebody accepts connections on a unix socket."""
    if not path:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
