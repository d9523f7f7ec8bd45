# SPDX-License-Identifier: Apache-2.0
"""Calls about snapshots, clones, the guest agent and the monitor of a VM."""

from __future__ import annotations

import base64
from typing import Any

from . import configops, lifecycle
from .api_vm import VM, conf_of, start_task
from .configops import check_lock
from .errors import die, forbidden
from .http import Call, route
from .relay import QmpRefused
from .tasks import Task
from .vmconfig import UNUSED, Drive, VmConf

AGENT = f"{VM}/agent"


# -- snapshots


@route("GET", f"{VM}/snapshot", need="VM.Audit")
async def snapshots(call: Call) -> Any:
    conf = conf_of(call)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "snaptime": int(body.get("snaptime", "0")),
            "description": body.get("description", ""),
            "vmstate": 0,
            **({"parent": body["parent"]} if "parent" in body else {}),
        }
        for name, body in conf.snapshots.items()
    ]
    running = int(call.site.machine(call.vmid, call.node).running)
    now = {"name": "current", "description": "You are here!", "running": running}
    if "parent" in conf.values:
        now["parent"] = conf.values["parent"]
    return [*rows, {**now, "digest": conf.digest}]


@route(
    "POST",
    f"{VM}/snapshot",
    "description=str snapname=str<=40! vmstate=bool",
    need="VM.Snapshot",
)
async def snapshot(call: Call) -> Any:
    name = call.params["snapname"]
    if name == "current":
        raise die("unable to use snapshot name 'current' (reserved name)")
    if name.lower() == "pending":
        raise die("unable to use snapshot name 'pending' (reserved name)")
    conf_of(call)
    text = call.params.get("description", "")

    async def work(task: Task) -> None:
        await lifecycle.snapshot(call.site, call.node, call.vmid, name, text)

    return start_task(call, "qmsnapshot", work)


@route("DELETE", f"{VM}/snapshot/{{snapname}}", "force=bool", need="VM.Snapshot")
async def delete_snapshot(call: Call) -> Any:
    conf_of(call)
    name, force = call.path["snapname"], bool(call.params.get("force"))

    async def work(task: Task) -> None:
        await lifecycle.delete_snapshot(call.site, call.node, call.vmid, name, force)

    return start_task(call, "qmdelsnapshot", work)


@route(
    "POST",
    f"{VM}/snapshot/{{snapname}}/rollback",
    "start=bool",
    need="VM.Snapshot VM.Snapshot.Rollback",
    any=True,
)
async def rollback(call: Call) -> Any:
    conf_of(call)
    name, again = call.path["snapname"], bool(call.params.get("start"))

    async def work(task: Task) -> None:
        await lifecycle.rollback(call.site, call.node, call.vmid, name, again)

    return start_task(call, "qmrollback", work)


@route(
    "POST",
    f"{VM}/clone",
    "bwlimit=int(0,) description=str format=raw|qcow2|vmdk full=bool name=str "
    "newid=vmid! pool=str snapname=str<=40 storage=str target=str",
    need="VM.Clone",
)
async def clone(call: Call) -> Any:
    site, node, new = call.site, call.node, call.params["newid"]
    site.auth.check(call.user, f"/vms/{new}", "VM.Allocate")
    conf = conf_of(call)
    check_lock(conf)
    if site.find(new):
        raise die(f"unable to create VM {new}: config file already exists")
    wanted = call.params.get("storage")
    drives = [d for d in conf.drives() if d.volume and not d.cdrom]
    for drive in drives:
        storage = wanted or drive.file.partition(":")[0]
        site.auth.check(call.user, f"/storage/{storage}", "Datastore.AllocateSpace")

    async def work(task: Task) -> None:
        values = {
            k: v
            for k, v in conf.values.items()
            if not UNUSED.fullmatch(k) and k not in ("template", "parent", "smbios1")
        }
        values.pop("vmgenid", None)
        if "name" in call.params:
            values["name"] = call.params["name"]
        site.save(node, new, VmConf({"lock": "clone"}))
        made: list[str] = []
        try:
            for drive in drives:
                storage = wanted or drive.file.partition(":")[0]
                options = {k: v for k, v in drive.options.items() if k != "size"}
                size = "1" if drive.key in ("efidisk0", "tpmstate0") else "0"
                copy = Drive(drive.key, f"{storage}:{size}", options)
                copy.options["import-from"] = drive.file
                copy.options["format"] = call.params.get(
                    "format", node.storage_of(drive.file).format(drive.file)
                )
                made += await configops.allocate(site, node, new, copy, task)
                values[drive.key] = str(copy)
            configops.finish_new(site, values)
            site.save(node, new, VmConf(values))
        except BaseException:
            for volid in made:
                node.storage_of(volid).free(volid)
            node.conf_path(new).unlink(missing_ok=True)
            raise

    return start_task(call, "qmclone", work)


# -- guest agent and monitor


async def _agent(call: Call, command: str, timeout_s: float, **arguments: Any) -> Any:
    await lifecycle.require_agent(call.site, call.node, call.vmid)
    machine = call.site.machine(call.vmid, call.node)
    try:
        return await machine.agent(command, timeout_s=timeout_s, **arguments)
    except TimeoutError:
        raise die(
            f"VM {call.vmid} qga command '{command}' failed - got timeout"
        ) from None
    except QmpRefused as error:
        raise die(f"Agent error: {error}") from error


@route(
    "POST",
    f"{AGENT}/ping",
    need="VM.GuestAgent.Audit VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
    any=True,
)
async def ping(call: Call) -> Any:
    return {"result": await _agent(call, "guest-ping", 3)}


FREEZE = "VM.GuestAgent.FileSystemMgmt VM.GuestAgent.Unrestricted"


@route("POST", f"{AGENT}/fsfreeze-freeze", need=FREEZE, need_8="VM.Monitor", any=True)
async def freeze(call: Call) -> Any:
    limit = 600.0 if call.site.release.startswith("9") else 3600.0
    return {"result": await _agent(call, "guest-fsfreeze-freeze", limit)}


@route("POST", f"{AGENT}/fsfreeze-thaw", need=FREEZE, need_8="VM.Monitor", any=True)
async def thaw(call: Call) -> Any:
    return {"result": await _agent(call, "guest-fsfreeze-thaw", 180)}


@route(
    "POST",
    f"{AGENT}/fsfreeze-status",
    need=f"VM.GuestAgent.Audit {FREEZE}",
    need_8="VM.Monitor",
    any=True,
)
async def freeze_status(call: Call) -> Any:
    return {"result": await _agent(call, "guest-fsfreeze-status", 10)}


@route(
    "POST",
    f"{AGENT}/exec",
    "command=array! input-data=str<=65536",
    need="VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
)
async def execute(call: Call) -> Any:
    path, *arguments = call.params["command"]
    more: dict[str, Any] = {}
    if data := call.params.get("input-data"):
        more["input_data"] = base64.b64encode(data.encode()).decode()
    return await _agent(
        call, "guest-exec", 10, path=path, arg=arguments, capture_output=True, **more
    )


@route(
    "GET",
    f"{AGENT}/exec-status",
    "pid=int!",
    need="VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
)
async def execute_status(call: Call) -> Any:
    result = await _agent(call, "guest-exec-status", 10, pid=call.params["pid"])
    for key in ("out-data", "err-data"):
        if key in result:
            result[key] = base64.b64decode(result[key]).decode("utf-8", "replace")
    result["exited"] = int(result["exited"])
    return result


@route(
    "POST",
    f"{VM}/monitor",
    "command=str!",
    need="Sys.Audit Sys.Modify",
    need_8="VM.Monitor",
    any=True,
)
async def monitor(call: Call) -> Any:
    line = call.params["command"]
    if call.user != "root@pam" and not line.startswith(("info", "help")):
        if not call.site.auth.has(call.user, "/", "Sys.Modify"):
            raise forbidden("/", "Sys.Modify")
    try:
        return await call.site.machine(call.vmid, call.node).hmp(line)
    except TimeoutError:
        raise die(
            f"VM {call.vmid} qmp command 'human-monitor-command' failed - got timeout"
        ) from None
