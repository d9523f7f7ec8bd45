# SPDX-License-Identifier: Apache-2.0
"""Calls about a VM's snapshots and copies, and what its volumes can do."""

from __future__ import annotations

import re
from typing import Any

from . import clones, lifecycle, snapshots
from .api_vm import VM, conf_of, config_row, start_task
from .configops import check_lock
from .errors import bad_params, die
from .http import Call, route
from .tasks import Task

SNAPSHOT = f"{VM}/snapshot"
ONE = f"{VM}/snapshot/{{snapname}}"


@route("GET", SNAPSHOT, need="VM.Audit")
async def listed(call: Call) -> Any:
    conf = conf_of(call)
    rows: list[dict[str, Any]] = []
    for name, body in conf.snapshots.items():
        row: dict[str, Any] = {
            "name": name,
            "snaptime": int(body.get("snaptime", "0")),
            "description": body.get("description", ""),
            "vmstate": 0,
        }
        row |= {key: body[key] for key in ("parent", "snapstate") if key in body}
        rows.append(row)
    running = int(call.site.machine(call.vmid, call.node).running)
    now = {"name": "current", "description": "You are here!", "running": running}
    if "parent" in conf.values:
        now["parent"] = conf.values["parent"]
    return [*rows, {**now, "digest": conf.digest}]


@route(
    "POST",
    SNAPSHOT,
    "description=str snapname=str<=40! vmstate=bool",
    need="VM.Snapshot",
)
async def create(call: Call) -> Any:
    name = call.params["snapname"]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", name):
        said = f"invalid format - invalid configuration ID '{name}'\n"
        raise bad_params(snapname=said)
    if name == "current" or name.lower() == "pending":
        reserved = name.lower()
        raise die(f"unable to use snapshot name '{reserved}' (reserved name)")
    conf_of(call)
    if call.params.get("vmstate") and call.site.machine(call.vmid, call.node).running:
        raise die("the lab saves no memory")
    text = call.params.get("description", "")

    async def work(task: Task) -> None:
        await snapshots.create(call.site, call.node, call.vmid, name, text, task)

    return start_task(call, "qmsnapshot", work)


@route("DELETE", ONE, "force=bool", need="VM.Snapshot")
async def delete(call: Call) -> Any:
    name, force = call.path["snapname"], bool(call.params.get("force"))

    async def work(task: Task) -> None:
        await snapshots.delete(
            call.site, call.node, call.vmid, name, force=force, task=task
        )

    return start_task(call, "qmdelsnapshot", work)


@route(
    "POST",
    f"{ONE}/rollback",
    "start=bool",
    need="VM.Snapshot VM.Snapshot.Rollback",
    any=True,
)
async def rollback(call: Call) -> Any:
    site, node, vmid = call.site, call.node, call.vmid
    name, again = call.path["snapname"], bool(call.params.get("start"))
    if again:
        site.auth.check(call.user, f"/vms/{vmid}", "VM.PowerMgmt")

    async def work(task: Task) -> None:
        await snapshots.rollback(site, node, vmid, name, task)
        if again and not site.machine(vmid, node).running:
            # A task of its own: this one is over and well whatever becomes of it.
            async def starting(inner: Task) -> None:
                await lifecycle.start_vm(site, node, vmid)

            start_task(call, "qmstart", starting)

    return start_task(call, "qmrollback", work)


@route(
    "GET",
    f"{ONE}/config",
    need="VM.Snapshot VM.Snapshot.Rollback VM.Audit",
    any=True,
)
async def config(call: Call) -> Any:
    return config_row(snapshots.section_of(conf_of(call), call.path["snapname"]))


@route("PUT", f"{ONE}/config", "description=str", need="VM.Snapshot")
async def describe(call: Call) -> Any:
    if "description" not in call.params:
        return
    async with call.site.lock_config(call.vmid):
        conf = conf_of(call)
        check_lock(conf)
        section = snapshots.section_of(conf, call.path["snapname"])
        section["description"] = call.params["description"]
        call.site.save(call.node, call.vmid, conf)


@route(
    "GET", f"{VM}/feature", "feature=snapshot|clone|copy! snapname=str<=40",
    need="VM.Audit",
)  # fmt: skip
async def feature(call: Call) -> Any:
    conf, name = conf_of(call), call.params.get("snapname")
    values = snapshots.section_of(conf, name) if name else conf.values
    can = snapshots.has_feature(call.node, values, call.params["feature"], name)
    return {"hasFeature": int(can), "nodes": [call.node.name]}


@route(
    "POST",
    f"{VM}/clone",
    "bwlimit=int(0,) description=str format=raw|qcow2|vmdk full=bool name=str "
    "newid=vmid! pool=str snapname=str<=40 storage=str target=str",
    need="VM.Clone",
)
async def clone(call: Call) -> Any:
    site, new, pool = call.site, call.params["newid"], call.params.get("pool")
    if not (pool and site.auth.has(call.user, f"/pool/{pool}", "VM.Allocate")):
        site.auth.check(call.user, f"/vms/{new}", "VM.Allocate")
    if call.params.get("target", call.node.name) != call.node.name:
        raise bad_params(target="the lab clones on one node only")
    wanted = clones.Wanted(call.vmid, call.params)
    clones.planned(site, call.node, call.user, wanted)

    async def work(task: Task) -> None:
        await clones.clone(site, call.node, call.user, wanted, task)

    return start_task(call, "qmclone", work)
