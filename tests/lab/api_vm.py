# SPDX-License-Identifier: Apache-2.0
"""Calls about VMs: configuration, power, disks, snapshots, guest agent."""

from __future__ import annotations

import base64
from typing import Any

from . import configops, lifecycle
from .configops import check_digest, check_lock
from .errors import bad_params, die, forbidden
from .http import Call, route
from .relay import QmpRefused
from .tasks import Task, Work
from .vmconfig import UNUSED, Drive, VmConf

QEMU = "/nodes/{node}/qemu"
VM = "/nodes/{node}/qemu/{vmid}"
AGENT = f"{VM}/agent"
ANY_CONFIG = " ".join(
    f"VM.Config.{name}"
    for name in "Disk CDROM CPU Memory Network HWType Options Cloudinit".split()
)


def _start(call: Call, kind: str, work: Work) -> str:
    return call.site.tasks.start(call.node.name, kind, str(call.vmid), call.user, work)


def _root_only(call: Call, *names: str) -> None:
    for name in names:
        if call.params.get(name) and call.user != "root@pam":
            raise bad_params(**{name: "Only root may use this option."})


def _conf(call: Call) -> VmConf:
    return call.site.load(call.node, call.vmid)


@route("GET", QEMU, "full=bool")
async def vms(call: Call) -> Any:
    return [
        lifecycle.list_row(call.site, node, vmid)
        for node, vmid in call.site.vms()
        if node is call.node and call.site.may_see(call.user, vmid)
    ]


@route(
    "POST",
    QEMU,
    "vmid=vmid! archive=str<=255 bwlimit=int(0,) force=bool 9:ha-managed=bool "
    "import-working-storage=str live-restore=bool pool=str start=bool storage=str "
    "unique=bool",
    config=True,
)
async def create(call: Call) -> Any:
    vmid = call.params.pop("vmid")
    return await configops.create(call.site, call.node, call.user, vmid, call.params)


@route(
    "DELETE",
    VM,
    "destroy-unreferenced-disks=bool purge=bool skiplock=bool",
    need="VM.Allocate",
)
async def destroy(call: Call) -> Any:
    _root_only(call, "skiplock")
    site, node, vmid = call.site, call.node, call.vmid
    skiplock = bool(call.params.get("skiplock"))
    lifecycle.require_destroyable(site, node, vmid, skiplock)

    async def work(task: Task) -> None:
        await lifecycle.destroy_vm(
            site,
            node,
            vmid,
            skiplock=skiplock,
            unreferenced=bool(call.params.get("destroy-unreferenced-disks")),
        )

    return _start(call, "qmdestroy", work)


@route("GET", f"{VM}/config", "current=bool snapshot=str<=40", need="VM.Audit")
async def config(call: Call) -> Any:
    conf = _conf(call)
    values = dict(conf.values)
    if name := call.params.get("snapshot"):
        if name not in conf.snapshots:
            raise die(f"snapshot '{name}' does not exist")
        values = dict(conf.snapshots[name])
    elif not call.params.get("current"):
        for key in conf.pending_delete:
            values.pop(key, None)
        values |= conf.pending
    if "cipassword" in values:
        values["cipassword"] = "**********"
    return {**{k: _number(k, v) for k, v in values.items()}, "digest": conf.digest}


def _number(key: str, value: str) -> Any:
    """Integers come as numbers where the schema says so, else as strings."""
    kind = configops.config_kind(key)
    if kind in ("integer", "boolean") and value.lstrip("-").isdigit():
        return int(value)
    return value


@route(
    "PUT",
    f"{VM}/config",
    "delete=str digest=str<=40 force=bool revert=str skiplock=bool",
    need=ANY_CONFIG,
    any=True,
    config=True,
)
async def set_config(call: Call) -> Any:
    await _update(call, None)


@route(
    "POST",
    f"{VM}/config",
    "background_delay=int(1,30) delete=str digest=str<=40 force=bool "
    "import-working-storage=str revert=str skiplock=bool",
    need=ANY_CONFIG,
    any=True,
    config=True,
)
async def set_config_task(call: Call) -> Any:
    conf = _conf(call)
    check_digest(conf, call.params.get("digest"))
    if not call.params.get("skiplock"):
        check_lock(conf)

    async def work(task: Task) -> None:
        await _update(call, task)

    return _start(call, "qmconfig", work)


async def _update(call: Call, task: Task | None) -> None:
    params = dict(call.params)
    for name in ("background_delay", "import-working-storage"):
        params.pop(name, None)
    delete = _names(params.pop("delete", ""))
    revert = _names(params.pop("revert", ""))
    digest = params.pop("digest", None)
    skiplock = bool(params.pop("skiplock", 0))
    force = bool(params.pop("force", 0))
    if force and not delete:
        raise bad_params(force="Only allowed with 'delete' option")
    if not params and not delete and not revert:
        raise die("no options specified")
    await configops.update(
        call.site,
        call.node,
        call.user,
        call.vmid,
        {key: str(value) for key, value in params.items()},
        delete=delete,
        revert=revert,
        digest=digest,
        skiplock=skiplock,
        force=force,
        task=task,
    )


def _names(text: str) -> list[str]:
    return [
        name for name in text.replace(";", ",").replace(" ", ",").split(",") if name
    ]


@route("GET", f"{VM}/pending", need="VM.Audit")
async def pending(call: Call) -> Any:
    conf = _conf(call)
    rows = []
    for key in sorted(conf.values.keys() | conf.pending.keys()):
        row: dict[str, Any] = {"key": key}
        if key in conf.values:
            row["value"] = conf.values[key]
        if key in conf.pending:
            row["pending"] = conf.pending[key]
        if key in conf.pending_delete:
            row["delete"] = conf.pending_delete[key]
        rows.append(row)
    return rows


@route("GET", f"{VM}/status/current", need="VM.Audit")
async def current(call: Call) -> Any:
    return await lifecycle.current(call.site, call.node, call.vmid)


@route(
    "POST",
    f"{VM}/status/start",
    "force-cpu=str machine=str migratedfrom=str migration_network=str "
    "migration_type=secure|insecure nets-host-mtu=str skiplock=bool stateuri=str<=128 "
    "targetstorage=str timeout=int(0,) 9:with-conntrack-state=bool",
    need="VM.PowerMgmt",
)
async def start(call: Call) -> Any:
    _root_only(call, "skiplock", "stateuri", "migratedfrom")
    _conf(call)
    skiplock = bool(call.params.get("skiplock"))

    async def work(task: Task) -> None:
        await lifecycle.start_vm(call.site, call.node, call.vmid, skiplock=skiplock)

    return _start(call, "qmstart", work)


@route(
    "POST",
    f"{VM}/status/stop",
    "keepActive=bool migratedfrom=str overrule-shutdown=bool skiplock=bool "
    "timeout=int(0,)",
    need="VM.PowerMgmt",
)
async def stop(call: Call) -> Any:
    _root_only(call, "skiplock", "keepActive", "migratedfrom")
    _conf(call)
    skiplock = bool(call.params.get("skiplock"))

    async def work(task: Task) -> None:
        await lifecycle.stop_vm(call.site, call.node, call.vmid, skiplock=skiplock)

    return _start(call, "qmstop", work)


@route(
    "POST",
    f"{VM}/status/shutdown",
    "forceStop=bool keepActive=bool skiplock=bool timeout=int(0,)",
    need="VM.PowerMgmt",
)
async def shutdown(call: Call) -> Any:
    _root_only(call, "skiplock", "keepActive")
    _conf(call)
    if not call.site.machine(call.vmid, call.node).running:
        raise die(f"VM {call.vmid} not running")

    async def work(task: Task) -> None:
        await lifecycle.shutdown_vm(
            call.site,
            call.node,
            call.vmid,
            call.params.get("timeout", 60),
            bool(call.params.get("forceStop")),
        )

    return _start(call, "qmshutdown", work)


@route(
    "POST",
    f"{VM}/status/suspend",
    "skiplock=bool statestorage=str todisk=bool",
    need="VM.PowerMgmt",
)
async def suspend(call: Call) -> Any:
    return _pause(call, "qmsuspend", "stop")


@route("POST", f"{VM}/status/resume", "nocheck=bool skiplock=bool", need="VM.PowerMgmt")
async def resume(call: Call) -> Any:
    return _pause(call, "qmresume", "cont")


def _pause(call: Call, kind: str, command: str) -> str:
    """Pause or continue in memory; allowed while ``lock: backup``."""
    _root_only(call, "skiplock", "nocheck")
    conf = _conf(call)
    if call.params.get("todisk"):
        raise die("the lab cannot suspend to disk")
    machine = call.site.machine(call.vmid, call.node)
    if not machine.running:
        raise die(f"VM {call.vmid} not running")
    if conf.values.get("lock", "backup") != "backup":
        check_lock(conf)

    async def work(task: Task) -> None:
        await machine.qmp(command)

    return _start(call, kind, work)


@route(
    "POST",
    f"{VM}/move_disk",
    "bwlimit=int(0,) delete=bool digest=str<=40 disk=str! format=raw|qcow2|vmdk "
    "storage=str target-digest=str<=40 target-disk=str target-vmid=vmid",
    need="VM.Config.Disk",
)
async def move_disk(call: Call) -> Any:
    site, node, params = call.site, call.node, call.params
    if "target-vmid" in params:
        raise die("the lab moves disks between storages only")
    if "storage" not in params:
        raise bad_params(storage="either set storage or target-vmid, but not both")
    storage = params["storage"]
    site.auth.check(call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
    if storage not in node.storages:
        raise die(f"storage '{storage}' does not exist")
    conf = _conf(call)
    check_digest(conf, params.get("digest"))
    check_lock(conf)
    lifecycle.known_drive(conf, params["disk"])

    async def work(task: Task) -> None:
        await lifecycle.move_disk(
            site,
            node,
            call.vmid,
            params["disk"],
            storage,
            params.get("format"),
            delete=bool(params.get("delete")),
            task=task,
        )

    return _start(call, "qmmove", work)


@route(
    "PUT",
    f"{VM}/resize",
    r"digest=str<=40 disk=str! size=/\+?\d+(\.\d+)?[KMGT]?/! skiplock=bool",
    need="VM.Config.Disk",
)
async def resize(call: Call) -> Any:
    _root_only(call, "skiplock")
    conf = _conf(call)
    check_digest(conf, call.params.get("digest"))
    check_lock(conf)
    lifecycle.known_drive(conf, call.params["disk"])
    disk, size = call.params["disk"], call.params["size"]

    async def work(task: Task) -> None:
        await lifecycle.resize(call.site, call.node, call.vmid, disk, size)

    return _start(call, "resize", work)


@route("PUT", f"{VM}/unlink", "force=bool idlist=str!", need="VM.Config.Disk")
async def unlink(call: Call) -> Any:
    await configops.update(
        call.site,
        call.node,
        call.user,
        call.vmid,
        {},
        delete=_names(call.params["idlist"]),
        force=bool(call.params.get("force")),
    )


@route("POST", f"{VM}/template", "disk=str", need="VM.Allocate")
async def template(call: Call) -> Any:
    _conf(call)

    async def work(task: Task) -> None:
        await lifecycle.make_template(call.site, call.node, call.vmid)

    return _start(call, "qmtemplate", work)


# -- snapshots


@route("GET", f"{VM}/snapshot", need="VM.Audit")
async def snapshots(call: Call) -> Any:
    conf = _conf(call)
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
    _conf(call)
    text = call.params.get("description", "")

    async def work(task: Task) -> None:
        await lifecycle.snapshot(call.site, call.node, call.vmid, name, text)

    return _start(call, "qmsnapshot", work)


@route("DELETE", f"{VM}/snapshot/{{snapname}}", "force=bool", need="VM.Snapshot")
async def delete_snapshot(call: Call) -> Any:
    _conf(call)
    name, force = call.path["snapname"], bool(call.params.get("force"))

    async def work(task: Task) -> None:
        await lifecycle.delete_snapshot(call.site, call.node, call.vmid, name, force)

    return _start(call, "qmdelsnapshot", work)


@route(
    "POST",
    f"{VM}/snapshot/{{snapname}}/rollback",
    "start=bool",
    need="VM.Snapshot VM.Snapshot.Rollback",
    any=True,
)
async def rollback(call: Call) -> Any:
    _conf(call)
    name, again = call.path["snapname"], bool(call.params.get("start"))

    async def work(task: Task) -> None:
        await lifecycle.rollback(call.site, call.node, call.vmid, name, again)

    return _start(call, "qmrollback", work)


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
    conf = _conf(call)
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

    return _start(call, "qmclone", work)
