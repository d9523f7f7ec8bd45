# SPDX-License-Identifier: Apache-2.0
"""Overlays: what a guest writes while its disk still comes.

A qcow2 image on a storage of files, whose backing file is our NBD export, written so
that QEMU waits for a server that went away instead of failing the guest's reads
(``reconnect-delay``). Proxmox VE takes it for a volume like any other, starts the VM
from it and moves it elsewhere online.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final

from pveplug.errors import JobError
from pveplug.ir.record import Record, Recovery
from pveplug.node import Node
from pveplug.proto.pve_values import Storage
from pveplug.pve_local import run

TYPES: Final = frozenset({"dir", "nfs", "cifs", "cephfs", "glusterfs"})
"""Of storages that can hold one. Not btrfs, which has its own idea of snapshots."""
CHAINS: Final = "snapshot-as-volume-chain"
OPEN_S: Final = 30
"""How long QEMU waits for the server when it opens the overlay."""
IMG_S: Final = 60.0


def why_not(storage: Storage, settings: Mapping[str, str]) -> str | None:
    """Return why a storage can't hold overlays; None: it can.

    Args:
        settings: of the storage in ``storage.cfg``, as far as one may see them.
    """
    if not storage.enabled or not storage.active:
        return "it is not active on this node"
    if not storage.holds_images:
        return "its content types do not include images"
    if storage.type not in TYPES:
        return (
            f"a {storage.type} storage can't: an overlay is a qcow2 file, whose "
            "backing is a network export"
        )
    if "qcow2" not in storage.formats:
        return "it does not hold qcow2 images"
    if settings.get(CHAINS, "0") == "1":
        return f"with {CHAINS} Proxmox VE rewrites an image's backing file"
    return None


def choose(
    wanted: str | None,
    storages: Iterable[Storage],
    settings: Mapping[str, Mapping[str, str]],
) -> Storage:
    """Return the storage for the overlays.

    Raises:
        JobError: the one that is wanted can't hold them, or there is none.
    """
    there = {storage.name: storage for storage in storages}
    reasons = {
        name: why_not(storage, settings.get(name, {}))
        for name, storage in there.items()
    }
    good = sorted(name for name, why in reasons.items() if why is None)
    if wanted is not None:
        why = reasons.get(
            wanted, "this node has no such storage, or one may not use it"
        )
        if why is not None:
            raise JobError(
                f"ir_overlay_storage={wanted} cannot hold the guest's writes: {why}.",
                phase="instant recovery",
                remedy=f"name one of {', '.join(good)}."
                if good
                else "make a directory storage with content images.",
            )
        return there[wanted]
    if not good:
        found = "; ".join(f"{name}: {why}" for name, why in sorted(reasons.items()))
        raise JobError(
            f"no storage of this node can hold the guest's writes ({found}).",
            phase="instant recovery",
            remedy="make a directory storage with content images, and give it with "
            "ir_overlay_storage.",
        )
    return there["local" if "local" in good else good[0]]


def backing_name(record: Record, recovery: Recovery, export: str) -> str:
    """Return the backing file's name: our export, and how patient QEMU is with it."""
    server: dict[str, str] = {"type": "unix", "path": recovery.nbd_socket}
    if record.bind:
        server = {"type": "inet", "host": record.bind, "port": str(record.port)}
    # Without the raw layer QEMU doesn't open a json: name as a backing file.
    description = {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": server,
            "export": export,
            "reconnect-delay": record.timeout,
            "open-timeout": OPEN_S,
        },
    }
    return "json:" + json.dumps(description, separators=(",", ":"))


async def write_overlay(node: Node, path: str, size: int, backing: str) -> None:
    """Make an empty overlay of a volume that PVE has allocated.

    Raises:
        ProgramError: qemu-img could not.
    """
    argv = [node.qemu_img, "create", "-q", "-u", "-f", "qcow2", "-F", "raw"]
    await run([*argv, "-b", backing, path, str(size)], timeout_s=IMG_S)
