# SPDX-License-Identifier: Apache-2.0
"""Calls about storages and their volumes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from .errors import ApiError, bad_params, die
from .http import Call, route
from .storage import Storage
from .tasks import Task

SEE = "Datastore.Audit Datastore.AllocateSpace"


def _storage(call: Call) -> Storage:
    name = call.path["storage"]
    if name not in call.node.storages:
        raise die(f"storage '{name}' does not exist")
    return call.node.storages[name]


@route(
    "GET",
    "/nodes/{node}/storage",
    "content=str enabled=bool format=bool storage=str target=str",
)
async def storages(call: Call) -> Any:
    rows = []
    wanted = set(filter(None, call.params.get("content", "").split(",")))
    for storage in call.node.storages.values():
        have = call.site.auth.privileges(call.user, f"/storage/{storage.name}")
        if not have & set(SEE.split()):
            continue
        if wanted and not wanted & set(storage.content.split(",")):
            continue
        if call.params.get("storage", storage.name) != storage.name:
            continue
        if call.params.get("enabled") and not storage.enabled:
            continue
        status = await asyncio.to_thread(storage.status)
        row = {"storage": storage.name, **status}
        if call.params.get("format"):
            row |= _formats(storage, call.site.release)
        rows.append(row)
    return rows


def _formats(storage: Storage, release: str) -> dict[str, Any]:
    """What ``format=1`` adds: 8.4 and 9 spell it differently."""
    supported = list(storage.formats)
    if release.startswith("9"):
        return {"formats": {"supported": supported, "default": "raw"}}
    return {"format": [dict.fromkeys(supported, 1), "raw"]}


TYPES = (
    "btrfs|cephfs|cifs|dir|esxi|iscsi|iscsidirect|lvm|lvmthin|nfs|pbs|rbd|zfs|zfspool"
)


@route("GET", "/storage", f"8:type={TYPES}|glusterfs 9:type={TYPES}")
async def configurations(call: Call) -> Any:
    """The cluster's storages; where ``snapshot-as-volume-chain`` can be seen."""
    rows = []
    for storage in call.node.storages.values():
        have = call.site.auth.privileges(call.user, f"/storage/{storage.name}")
        if not have & set(SEE.split()):
            continue
        if call.params.get("type", storage.type) == storage.type:
            rows.append({**storage.config(), "digest": _digest(call)})
    return rows


@route(
    "GET",
    "/storage/{storage}",
    need="Datastore.Allocate",
    on="/storage/{storage}",
)
async def configuration(call: Call) -> Any:
    return {**_storage(call).config(), "digest": _digest(call)}


def _digest(call: Call) -> str:
    """The SHA-1 of the whole file, the same for every storage."""
    all_of_it = [storage.config() for storage in call.node.storages.values()]
    return hashlib.sha1(repr(all_of_it).encode()).hexdigest()


@route(
    "GET",
    "/nodes/{node}/storage/{storage}/status",
    need=SEE,
    any=True,
    on="/storage/{storage}",
)
async def storage_status(call: Call) -> Any:
    return await asyncio.to_thread(_storage(call).status)


@route(
    "GET",
    "/nodes/{node}/storage/{storage}/content",
    "content=str vmid=vmid",
    need=SEE,
    any=True,
    on="/storage/{storage}",
)
async def content(call: Call) -> Any:
    storage = _storage(call)
    if call.params.get("content", "images") != "images":
        return []
    rows = await asyncio.to_thread(storage.volumes, call.params.get("vmid"))
    seen = []
    for row in rows:
        owner = row["vmid"]
        visible = call.site.auth.has(
            call.user, f"/storage/{storage.name}", "Datastore.Allocate"
        ) or call.site.may_see(call.user, owner)
        if visible:
            seen.append(row)
    return seen


@route(
    "POST",
    "/nodes/{node}/storage/{storage}/content",
    r"filename=str! format=raw|qcow2|subvol|vmdk size=/\d+[MG]?/! vmid=vmid!",
    need="Datastore.AllocateSpace",
    on="/storage/{storage}",
)
async def allocate(call: Call) -> Any:
    storage, params = _storage(call), call.params
    match = re.fullmatch(r"(\d+)([MG]?)", params["size"])
    assert match
    unit = {"": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
    fmt = params.get("format")
    suffix = params["filename"].rpartition(".")[2]
    if "." in params["filename"] and suffix in ("raw", "qcow2", "vmdk"):
        if fmt and fmt != suffix:
            raise bad_params(format=f"different storage formats ({fmt} != {suffix})")
        fmt = suffix
    return await asyncio.to_thread(
        storage.alloc, params["vmid"], params["filename"], int(match[1]) * unit, fmt
    )


def _volid(call: Call) -> str:
    volume = call.path["volume"]
    return volume if ":" in volume else f"{call.path['storage']}:{volume}"


@route("GET", "/nodes/{node}/storage/{storage}/content/{volume}")
async def volume_info(call: Call) -> Any:
    volid = _volid(call)
    storage = call.node.storage_of(volid)
    path = f"/storage/{storage.name}"
    owner = storage.owner(volid)
    if not call.site.auth.has(call.user, path, "Datastore.Allocate"):
        call.site.auth.check(call.user, path, "Datastore.Audit")
        call.site.auth.check(call.user, f"/vms/{owner}", "VM.Config.Disk")
    size = await asyncio.to_thread(storage.size, volid)
    return {
        "path": storage.path(volid),
        "size": size,
        "used": storage.file(volid).stat().st_blocks * 512,
        "format": storage.format(volid),
    }


@route(
    "DELETE",
    "/nodes/{node}/storage/{storage}/content/{volume}",
    "delay=int(1,30)",
)
async def delete(call: Call) -> Any:
    volid = _volid(call)
    storage = call.node.storage_of(volid)
    call.site.auth.check(call.user, f"/storage/{storage.name}", "Datastore.Allocate")
    storage.owner(volid)

    async def work(task: Task) -> None:
        await asyncio.to_thread(storage.free, volid)
        task.log(f"Removed volume '{volid}'")

    upid = call.site.tasks.start(
        call.node.name, "imgdel", volid.replace(":", "@"), call.user, work
    )
    if delay := call.params.get("delay"):
        done = call.site.tasks.all[upid].work
        assert done
        finished, _ = await asyncio.wait({done}, timeout=delay)
        if finished:
            task = call.site.tasks.all[upid]
            if task.exitstatus != "OK":
                raise ApiError(500, f"{task.exitstatus}")
            return None
    return upid
