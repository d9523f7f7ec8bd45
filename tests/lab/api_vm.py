# SPDX-License-Identifier: Apache-2.0
"""Calls about VMs: configuration, power, disks, snapshots, guest agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from . import configops, lifecycle, moves
from .configops import check_digest, check_lock
from .errors import bad_params, die
from .http import Call, route
from .tasks import Task, Work
from .vmconfig import DRIVE, VmConf

QEMU = "/nodes/{node}/qemu"
VM = "/nodes/{node}/qemu/{vmid}"
AGENT = f"{VM}/agent"
ANY_CONFIG = " ".join(
    f"VM.Config.{name}"
    for name in "Disk CDROM CPU Memory Network HWType Options Cloudinit".split()
)


def start_task(call: Call, kind: str, work: Work) -> str:
    return call.site.tasks.start(call.node.name, kind, str(call.vmid), call.user, work)


def _root_only(call: Call, *names: str) -> None:
    for name in names:
        if call.params.get(name) and call.user != "root@pam":
            raise bad_params(**{name: "Only root may use this option."})


def conf_of(call: Call) -> VmConf:
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
    skiplock, purge = bool(call.params.get("skiplock")), bool(call.params.get("purge"))
    # Only these two are known before the task; a running VM too, a lock is not.
    lifecycle.require_destroyable(site, node, vmid, True, purge)

    async def work(task: Task) -> None:
        await lifecycle.destroy_vm(
            site,
            node,
            vmid,
            skiplock=skiplock,
            purge=purge,
            task=task,
            unreferenced=bool(call.params.get("destroy-unreferenced-disks")),
        )

    return start_task(call, "qmdestroy", work)


@route("GET", f"{VM}/config", "current=bool snapshot=str<=40", need="VM.Audit")
async def config(call: Call) -> Any:
    conf = conf_of(call)
    values = dict(conf.values)
    if name := call.params.get("snapshot"):
        if name not in conf.snapshots:
            raise die(f"snapshot '{name}' does not exist")
        values = dict(conf.snapshots[name])
    elif not call.params.get("current"):
        for key in conf.pending_delete:
            values.pop(key, None)
        values |= conf.pending
    return {**config_row(values), "digest": conf.digest}


def config_row(values: dict[str, str]) -> dict[str, Any]:
    """A configuration as JSON; a password is never told."""
    hidden = {"cipassword": "**********"} if "cipassword" in values else {}
    return {key: _number(key, value) for key, value in (values | hidden).items()}


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
    conf = conf_of(call)
    check_digest(conf, call.params.get("digest"))
    if not call.params.get("skiplock"):
        check_lock(conf)

    async def work(task: Task) -> None:
        await _update(call, task)

    return start_task(call, "qmconfig", work)


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
    conf = conf_of(call)
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
    conf_of(call)
    skiplock = bool(call.params.get("skiplock"))

    async def work(task: Task) -> None:
        await lifecycle.start_vm(call.site, call.node, call.vmid, skiplock=skiplock)

    return start_task(call, "qmstart", work)


@route(
    "POST",
    f"{VM}/status/stop",
    "keepActive=bool migratedfrom=str overrule-shutdown=bool skiplock=bool "
    "timeout=int(0,)",
    need="VM.PowerMgmt",
)
async def stop(call: Call) -> Any:
    _root_only(call, "skiplock", "keepActive", "migratedfrom")
    conf_of(call)
    skiplock = bool(call.params.get("skiplock"))

    async def work(task: Task) -> None:
        await lifecycle.stop_vm(call.site, call.node, call.vmid, skiplock=skiplock)

    return start_task(call, "qmstop", work)


@route(
    "POST",
    f"{VM}/status/shutdown",
    "forceStop=bool keepActive=bool skiplock=bool timeout=int(0,)",
    need="VM.PowerMgmt",
)
async def shutdown(call: Call) -> Any:
    _root_only(call, "skiplock", "keepActive")
    site, node, vmid = call.site, call.node, call.vmid
    conf_of(call)
    force = bool(call.params.get("forceStop"))
    paused = await lifecycle.require_not_paused(site, node, vmid, force)

    async def work(task: Task) -> None:
        if paused:
            task.log("VM is paused - stop instead of shutdown")
            await lifecycle.stop_vm(site, node, vmid)
            return
        limit = call.params.get("timeout", 60)
        await lifecycle.shutdown_vm(site, node, vmid, limit, force)

    return start_task(call, "qmshutdown", work)


@route(
    "POST",
    f"{VM}/status/suspend",
    "skiplock=bool statestorage=str todisk=bool",
    need="VM.PowerMgmt",
)
async def suspend(call: Call) -> Any:
    return _pause(call, "qmsuspend", lifecycle.suspend_vm)


@route("POST", f"{VM}/status/resume", "nocheck=bool skiplock=bool", need="VM.PowerMgmt")
async def resume(call: Call) -> Any:
    return _pause(call, "qmresume", lifecycle.resume_vm)


def _pause(call: Call, kind: str, action: Callable[..., Awaitable[None]]) -> str:
    """Pause or continue in memory; allowed while ``lock: backup``."""
    _root_only(call, "skiplock", "nocheck")
    conf_of(call)
    if call.params.get("todisk"):
        raise die("the lab cannot suspend to disk")
    if not call.site.machine(call.vmid, call.node).running:
        raise die(f"VM {call.vmid} not running")
    skiplock = bool(call.params.get("skiplock"))

    async def work(task: Task) -> None:
        await action(call.site, call.node, call.vmid, skiplock=skiplock)

    return start_task(call, kind, work)


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
        if "storage" in params:
            text = "either set 'storage' or 'target-vmid', but not both"
            raise bad_params(**{"target-vmid": text, "storage": text})
        raise die("the lab moves disks between storages only")
    if "storage" not in params:
        text = "both 'storage' and 'target-vmid' missing, either needs to be set"
        raise bad_params(**{"target-vmid": text, "storage": text})
    storage = params["storage"]
    site.auth.check(call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
    wanted = moves.Wanted(
        params["disk"],
        storage,
        params.get("format"),
        bool(params.get("delete")),
        params.get("digest"),
        params.get("bwlimit"),
    )
    moves.check(site, node, call.vmid, wanted)

    async def work(task: Task) -> None:
        await moves.move_disk(site, node, call.vmid, wanted, task)

    return start_task(call, "qmmove", work)


@route(
    "PUT",
    f"{VM}/resize",
    r"digest=str<=40 disk=str! size=/\+?\d+(\.\d+)?[KMGT]?/! skiplock=bool",
    need="VM.Config.Disk",
)
async def resize(call: Call) -> Any:
    _root_only(call, "skiplock")
    if not DRIVE.fullmatch(call.params["disk"]):
        raise bad_params(disk="value does not have a value in the enumeration")

    async def work(task: Task) -> None:
        await lifecycle.resize(
            call.site,
            call.node,
            call.vmid,
            call.params["disk"],
            call.params["size"],
            user=call.user,
            digest=call.params.get("digest"),
            skiplock=bool(call.params.get("skiplock")),
        )

    return start_task(call, "resize", work)


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
    conf_of(call)

    async def work(task: Task) -> None:
        await lifecycle.make_template(call.site, call.node, call.vmid)

    return start_task(call, "qmtemplate", work)
