# SPDX-License-Identifier: Apache-2.0
"""Live migration between two nodes of a site, QEMU to QEMU.

As PVE does it for a VM whose volumes are on shared storage: ``lock: migrate``, a QEMU
on the target that waits for the state on a unix socket (PVE tunnels it through ssh),
the capabilities of ``set_migration_caps`` on both ends (``dirty-bitmaps`` among them),
``migrate``, the configuration moved to the target, ``cont`` there, ``quit`` here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .api_vm import VM, conf_of, start_task
from .configops import check_lock
from .errors import bad_params, die
from .http import Call, route
from .relay import QmpRefused
from .tasks import Task

if TYPE_CHECKING:
    from .qemu import Machine
    from .site import LabNode, Site

CAPABILITIES = ("auto-converge", "xbzrle", "dirty-bitmaps")
"""Those of PVE's that every QEMU the lab runs on still has."""


@route(
    "POST",
    f"{VM}/migrate",
    "bwlimit=int(0,) force=bool migration_network=str migration_type=secure|insecure "
    "online=bool target=str! targetstorage=str with-local-disks=bool "
    "9:with-conntrack-state=bool",
    need="VM.Migrate",
)
async def migrate(call: Call) -> Any:
    site, node, params = call.site, call.node, call.params
    if params["target"] == node.name:
        raise bad_params(target="target is local node.")
    if params["target"] not in site.nodes:
        raise die(f"no such cluster node '{params['target']}'")
    if params.get("with-local-disks") or params.get("targetstorage"):
        raise die("the lab migrates VMs on shared storages only")
    conf = conf_of(call)
    check_lock(conf)
    if site.machine(call.vmid, node).running and not params.get("online"):
        raise bad_params(online="VM is running")
    target = site.nodes[params["target"]]

    async def work(task: Task) -> None:
        await migrate_vm(site, node, target, call.vmid, task)

    return start_task(call, "qmigrate", work)


async def migrate_vm(
    site: Site, node: LabNode, target: LabNode, vmid: int, task: Task
) -> None:
    """Move a VM to another node; where that fails it goes on where it was."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        for drive in conf.drives():
            if drive.volume and not node.storage_of(drive.file).shared:
                task.log(f"found local disk '{drive.file}' (attached)")
                if not site.machine(vmid, node).running:
                    raise die("the lab copies no local disks to another node")
                raise die(
                    "can't migrate attached local disks without with-local-disks option"
                )
        conf.values["lock"] = "migrate"
        site.save(node, vmid, conf)
        machine = site.machine(vmid, node)
        try:
            if machine.running:
                await _live(machine, site.machine(vmid, target), site, vmid, task)
        except BaseException:
            conf = site.load(node, vmid)
            conf.values.pop("lock", None)
            site.save(node, vmid, conf)
            raise
        target.conf_dir.mkdir(parents=True, exist_ok=True)
        node.conf_path(vmid).rename(target.conf_path(vmid))
        if machine.running:
            await site.machine(vmid, target).qmp("cont")
            await machine.quit()
        conf = site.load(target, vmid)
        conf.values.pop("lock", None)
        site.save(target, vmid, conf)


async def _live(
    source: Machine, target: Machine, site: Site, vmid: int, task: Task
) -> None:
    uri = f"unix:{target.node.run_dir / f'{vmid}.migrate'}"
    task.log(f"starting VM {vmid} on remote node '{target.node.name}'")
    await target.start(site.load(source.node, vmid), incoming=uri)
    try:
        wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
        for machine in (target, source):
            await machine.qmp("migrate-set-capabilities", capabilities=wanted)
        task.log(f"start migrate command to {uri}")
        await source.qmp("migrate", uri=uri)
        await _completed(source, task)
    except BaseException as error:
        with contextlib.suppress(QmpRefused, TimeoutError):
            await source.qmp("migrate_cancel")
        await target.kill()
        if isinstance(error, QmpRefused):
            raise die(f"online migrate failure - {error}") from error
        raise


async def _completed(source: Machine, task: Task) -> None:
    while True:
        said = await source.qmp("query-migrate")
        status = said.get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            task.log(f"migration status: {status} ({said.get('error-desc', '')})")
            raise die("migration aborted")
        await asyncio.sleep(0.05)
