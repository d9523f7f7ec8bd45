# SPDX-License-Identifier: Apache-2.0
"""Calls about the site: access, cluster, nodes, pools, tasks."""

from __future__ import annotations

import time
from typing import Any

from .errors import ApiError, bad_params, die, forbidden
from .http import Call, route
from .lifecycle import list_row


@route("GET", "/version")
async def version(call: Call) -> Any:
    return version_of(call.site.release)


def version_of(release: str) -> dict[str, str]:
    full = {"9": "9.2.11", "8": "8.4.1"}[release[0]]
    return {"version": full, "release": full[:3], "repoid": "0123456789abcdef"}


@route(
    "POST",
    "/access/ticket",
    "new-format=bool otp=str password=str! path=str<=64 privs=str<=64 realm=str<=32 "
    "tfa-challenge=str username=str<=64!",
    token=False,
    world=True,
)
async def ticket(call: Call) -> Any:
    user = call.params["username"]
    if realm := call.params.get("realm"):
        user = f"{user}@{realm}"
    try:
        answer = call.site.auth.ticket(user, call.params["password"])
    except ApiError:
        import asyncio

        await asyncio.sleep(call.site.auth_delay_s)
        raise
    return {**answer, "clustername": "lab", "cap": {}}


@route("GET", "/access/permissions", "path=str userid=str")
async def permissions(call: Call) -> Any:
    auth = call.site.auth
    if wanted := call.params.get("userid"):
        if wanted != call.user:
            auth.check(call.user, "/access", "Sys.Audit")
    user = wanted or call.user
    paths = [call.params["path"]] if "path" in call.params else auth.paths(user)
    if user == "root@pam" and "path" not in call.params:
        paths = ["/", "/vms", "/storage", "/access", "/nodes"]
    found = {path: auth.privileges(user, path) for path in paths}
    return {
        path: dict.fromkeys(sorted(privs), 1) for path, privs in found.items() if privs
    }


@route("GET", "/cluster/resources", "type=vm|storage|node|sdn")
async def resources(call: Call) -> Any:
    site, kind = call.site, call.params.get("type")
    rows: list[dict[str, Any]] = []
    if kind in (None, "vm"):
        for node, vmid in site.vms():
            if not site.may_see(call.user, vmid):
                continue
            row = list_row(site, node, vmid)
            row |= {"id": f"qemu/{vmid}", "type": "qemu", "node": node.name}
            row.setdefault("template", 0)
            if pool := site.pool_of(vmid):
                row["pool"] = pool
            rows.append(row)
    for node in site.nodes.values():
        if kind in (None, "node"):
            online = node.name not in site.offline
            rows.append(
                {
                    "id": f"node/{node.name}",
                    "type": "node",
                    "node": node.name,
                    "status": "online" if online else "offline",
                }
            )
        if kind in (None, "storage"):
            for storage in node.storages.values():
                path = f"/storage/{storage.name}"
                if not site.auth.privileges(call.user, path) & {
                    "Datastore.Audit",
                    "Datastore.AllocateSpace",
                }:
                    continue
                status = storage.status()
                rows.append(
                    {
                        "id": f"storage/{node.name}/{storage.name}",
                        "type": "storage",
                        "node": node.name,
                        "storage": storage.name,
                        "status": "available" if storage.active else "unknown",
                        "plugintype": storage.type,
                        "content": storage.content,
                        "shared": status["shared"],
                        "disk": status["used"],
                        "maxdisk": status["total"],
                    }
                )
    return rows


@route("GET", "/cluster/nextid", "vmid=vmid")
async def nextid(call: Call) -> Any:
    site, wanted = call.site, call.params.get("vmid")
    if wanted is not None:
        if site.find(wanted):
            raise bad_params(vmid=f"VM {wanted} already exists")
        return str(wanted)
    taken = {vmid for _, vmid in site.vms()}
    return str(next(n for n in range(100, 1_000_000) if n not in taken))


@route("GET", "/cluster/status", need="Sys.Audit", on="/")
async def cluster_status(call: Call) -> Any:
    rows: list[dict[str, Any]] = [
        {"type": "cluster", "name": "lab", "quorate": int(call.site.faults.quorum)}
    ]
    for at, name in enumerate(call.site.nodes):
        rows.append(
            {
                "type": "node",
                "name": name,
                "nodeid": at + 1,
                "online": int(name not in call.site.offline),
                "local": int(call.site.nodes[name] is call.node),
            }
        )
    return rows


@route("GET", "/nodes")
async def nodes(call: Call) -> Any:
    return [
        {
            "node": name,
            "status": "offline" if name in call.site.offline else "online",
            "ssl_fingerprint": node.proxy.fingerprint,
            "type": "node",
            "id": f"node/{name}",
        }
        for name, node in call.site.nodes.items()
    ]


@route("GET", "/nodes/{node}/version")
async def node_version(call: Call) -> Any:
    return version_of(call.site.release)


@route("GET", "/nodes/{node}/status", need="Sys.Audit", on="/nodes/{node}")
async def node_status(call: Call) -> Any:
    return {
        "uptime": int(time.monotonic()),
        "pveversion": f"pve-manager/{version_of(call.site.release)['version']}",
        "memory": {"total": 8 << 30, "used": 1 << 30, "free": 7 << 30},
        "cpuinfo": {"cpus": 2},
    }


@route("GET", "/nodes/{node}/network", "type=str")
async def network(call: Call) -> Any:
    rows = [
        {"iface": name, "type": "bridge", "active": 1, "autostart": 1}
        for name in call.site.bridges
    ]
    visible = ("Sys.Audit", "SDN.Audit", "SDN.Use")
    return [
        row
        for row in rows
        if set(visible)
        & call.site.auth.privileges(
            call.user, f"/sdn/zones/localnetwork/{row['iface']}"
        )
    ]


@route("GET", "/nodes/{node}/capabilities/qemu/machines", "9:arch=x86_64|aarch64")
async def machines(call: Call) -> Any:
    major, minor = call.site.qemu_version
    versions = [f"{major}.{minor}", "9.2", "9.0", "8.1"]
    return [
        {"id": f"pc-{kind}-{version}", "type": kind, "version": version}
        for kind in ("i440fx", "q35")
        for version in dict.fromkeys(versions)
        if tuple(map(int, version.split("."))) <= (major, minor)
    ]


@route("GET", "/nodes/{node}/certificates/info")
async def certificates(call: Call) -> Any:
    folder = call.node.root / "etc/pve/nodes" / call.node.name
    return [
        {
            "filename": "pve-ssl.pem",
            "fingerprint": call.node.proxy.fingerprint,
            "pem": (folder / "pve-ssl.pem").read_text(),
        }
    ]


@route("GET", "/pools", "poolid=str type=qemu|lxc|storage")
async def pools(call: Call) -> Any:
    auth = call.site.auth
    return [
        {"poolid": name}
        for name in call.site.pools
        if auth.privileges(call.user, f"/pool/{name}") & {"Pool.Audit", "Pool.Allocate"}
    ]


@route(
    "GET",
    "/pools/{poolid}",
    "type=qemu|lxc|storage",
    need="Pool.Audit",
    on="/pool/{poolid}",
)
async def pool(call: Call) -> Any:
    name = call.path["poolid"]
    if name not in call.site.pools:
        raise die(f"pool '{name}' does not exist")
    return {
        "poolid": name,
        "members": [
            {"id": f"qemu/{vmid}", "type": "qemu", "vmid": vmid}
            for vmid in sorted(call.site.pools[name])
            if call.site.may_see(call.user, vmid)
        ],
    }


@route(
    "GET",
    "/nodes/{node}/tasks",
    "errors=bool limit=int(0,) since=int source=archive|active|all start=int(0,) "
    "statusfilter=str typefilter=str until=int userfilter=str vmid=vmid",
)
async def tasks(call: Call) -> Any:
    rows = []
    for task in reversed(call.site.tasks.all.values()):
        if task.node != call.node.name or not _may_see_task(call, task.user):
            continue
        if "vmid" in call.params and task.id != str(call.params["vmid"]):
            continue
        if call.params.get("typefilter", task.type) != task.type:
            continue
        row = task.row()
        if task.exitstatus is not None:
            row |= {"status": task.exitstatus, "endtime": task.end}
        rows.append(row)
    return rows


@route("GET", "/nodes/{node}/tasks/{upid}/status")
async def task_status(call: Call) -> Any:
    task = call.site.tasks.get(call.node.name, call.path["upid"])
    _require_task(call, task.user)
    return task.status()


@route(
    "GET",
    "/nodes/{node}/tasks/{upid}/log",
    "download=bool limit=int(0,) start=int(0,)",
)
async def task_log(call: Call) -> Any:
    task = call.site.tasks.get(call.node.name, call.path["upid"])
    _require_task(call, task.user)
    start = call.params.get("start", 0)
    limit = call.params.get("limit", 50) or len(task.lines)
    lines = task.lines[start : start + limit]
    if not task.lines:
        return [{"n": 1, "t": "no content"}]
    return [{"n": start + at + 1, "t": text} for at, text in enumerate(lines)]


@route("DELETE", "/nodes/{node}/tasks/{upid}")
async def task_stop(call: Call) -> Any:
    task = call.site.tasks.get(call.node.name, call.path["upid"])
    if task.user != call.user:
        call.site.auth.check(call.user, f"/nodes/{call.node.name}", "Sys.Modify")
    if task.work and not task.work.done():
        task.work.cancel()


def _may_see_task(call: Call, owner: str) -> bool:
    if owner == call.user or owner.split("!")[0] == call.user:
        return True
    return call.site.auth.has(call.user, f"/nodes/{call.node.name}", "Sys.Audit")


def _require_task(call: Call, owner: str) -> None:
    if not _may_see_task(call, owner):
        raise forbidden(f"/nodes/{call.node.name}", "Sys.Audit")
