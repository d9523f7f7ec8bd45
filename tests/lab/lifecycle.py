# SPDX-License-Identifier: Apache-2.0
"""Start, stop, shut down, destroy, snapshot, move and resize, with PVE's texts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any

from .configops import apply_pending, check_digest, check_lock, human_size
from .errors import ApiError, bad_params, die
from .relay import QmpRefused
from .tasks import Task
from .vmconfig import DRIVE, Drive, VmConf

if TYPE_CHECKING:
    from .site import LabNode, Site


async def start_vm(
    site: Site,
    node: LabNode,
    vmid: int,
    *,
    skiplock: bool = False,
    paused: bool = False,
) -> None:
    """Start a VM cold: pending changes are applied first."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        if conf.values.get("template") == "1" and not paused:
            raise die("you can't start a vm if it's a template")
        if not skiplock:
            check_lock(conf)
        machine = site.machine(vmid, node)
        if machine.running:
            raise die(f"VM {vmid} already running")
        if conf.pending or conf.pending_delete:
            apply_pending(conf)
            site.save(node, vmid, conf)
            conf = site.load(node, vmid)
        await machine.start(conf, paused=paused)


async def stop_vm(
    site: Site, node: LabNode, vmid: int, *, skiplock: bool = False
) -> None:
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        machine = site.machine(vmid, node)
        if not machine.running:
            return  # well, and whatever lock it has
        if not skiplock:
            check_lock(conf)
        await machine.quit()


async def shutdown_vm(
    site: Site, node: LabNode, vmid: int, timeout_s: float, force: bool
) -> None:
    """Ask the guest to power off: by agent where it answers, else by ACPI."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        machine = site.machine(vmid, node)
        if not machine.running:
            return
        check_lock(conf)
        try:
            if conf.agent_enabled and await agent_answers(site, node, vmid):
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await machine.agent("guest-shutdown", timeout_s=3)
            else:
                await machine.qmp("system_powerdown")
        except QmpRefused:
            if not force:
                raise die("VM quit/powerdown failed") from None
            await machine.quit()
            return
        try:
            async with asyncio.timeout(timeout_s):
                await machine.gone.wait()
        except TimeoutError:
            if not force:
                raise die("VM quit/powerdown failed - got timeout") from None
            await machine.quit()


async def suspend_vm(
    site: Site, node: LabNode, vmid: int, *, skiplock: bool = False
) -> None:
    """Pause in memory; allowed while ``lock: backup``, not while the disk moves."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        if not skiplock and conf.values.get("lock", "backup") != "backup":
            check_lock(conf)
        await site.machine(vmid, node).qmp("stop")


async def resume_vm(
    site: Site, node: LabNode, vmid: int, *, skiplock: bool = False
) -> None:
    """Go on after a pause or an I/O error; a running VM stays as it is."""
    async with site.lock_config(vmid):
        machine = site.machine(vmid, node)
        status = (await machine.qmp("query-status", timeout_s=60))["status"]
        conf = site.load(node, vmid)
        if conf.values.get("template") == "1":
            raise die(f"VM {vmid} is a template and cannot be resumed!")
        if status == "running":
            return
        if not skiplock and conf.values.get("lock", "backup") != "backup":
            check_lock(conf)
        if status == "shutdown":
            await machine.qmp("system_reset")
        await machine.qmp("system_wakeup" if status == "suspended" else "cont")


async def require_not_paused(site: Site, node: LabNode, vmid: int, force: bool) -> bool:
    """Whether a VM is paused; without ``force`` that is no state to shut down in."""
    machine = site.machine(vmid, node)
    if not machine.running:
        return False
    with contextlib.suppress(TimeoutError, ConnectionError, QmpRefused):
        status = (await machine.qmp("query-status"))["status"]
        paused = status in ("paused", "prelaunch")
        if paused and not force:
            raise die("VM is paused - cannot shutdown")
        return paused
    return False


async def agent_answers(site: Site, node: LabNode, vmid: int) -> bool:
    try:
        await site.machine(vmid, node).agent("guest-ping", timeout_s=3)
    except (TimeoutError, ConnectionError, OSError):
        return False
    return True


async def require_agent(site: Site, node: LabNode, vmid: int) -> None:
    """PVE's three checks before an agent command."""
    conf = site.load(node, vmid)
    if not conf.agent_enabled:
        raise die("No QEMU guest agent configured")
    if not site.machine(vmid, node).running:
        raise die(f"VM {vmid} is not running")
    if not await agent_answers(site, node, vmid):
        raise die("QEMU guest agent is not running")


def require_destroyable(
    site: Site, node: LabNode, vmid: int, skiplock: bool, purge: bool = False
) -> None:
    conf = site.load(node, vmid)
    if conf.values.get("protection") == "1":
        raise die(f"can't remove VM {vmid} - protection mode enabled")
    if vmid in site.ha and not purge:
        raise die(
            f"unable to remove VM {vmid} - used in HA resources and purge parameter "
            "not set."
        )
    if site.machine(vmid, node).running:
        raise die(f"VM {vmid} is running - destroy failed")
    if not skiplock and conf.values.get("lock", "suspended") != "suspended":
        check_lock(conf)


async def destroy_vm(
    site: Site,
    node: LabNode,
    vmid: int,
    *,
    skiplock: bool,
    unreferenced: bool,
    purge: bool = False,
    task: Task | None = None,
) -> None:
    """Remove the VM, the volumes its current configuration names, and its ACLs.

    What only a snapshot names goes with ``unreferenced`` alone. A privilege somebody
    had on this VMID is gone afterwards.
    """
    async with site.lock_config(vmid):
        require_destroyable(site, node, vmid, skiplock, purge)
        site.faults.require_quorum()
        conf = site.load(node, vmid)
        named = VmConf(conf.values, conf.pending).volumes()
        await asyncio.to_thread(_free_owned, node, vmid, named, unreferenced, task)
        site.auth.forget(f"/vms/{vmid}")
        (site.root / f"etc/pve/firewall/{vmid}.fw").unlink(missing_ok=True)
        for members in site.pools.values():
            members.discard(vmid)
        if purge:
            if task:
                task.log(f"purging VM {vmid} from related configurations..")
            site.ha.discard(vmid)
        node.conf_path(vmid).unlink()


def _free_owned(
    node: LabNode, vmid: int, volumes: set[str], unreferenced: bool, task: Task | None
) -> None:
    """Free the volumes that are this VM's; what can't be freed is a warning."""
    for volid in sorted(volumes):
        storage = node.storages.get(volid.partition(":")[0])
        if not storage or storage.owner(volid) != vmid:
            continue
        try:
            if storage.exists(volid):
                storage.free(volid)
        except ApiError as error:
            if task:
                said = error.message
                task.warn(f"Could not remove disk '{volid}', check manually: {said}")
    if not unreferenced:
        return
    for storage in node.storages.values():
        if "images" in storage.content and storage.enabled and storage.active:
            for row in storage.volumes(vmid):
                storage.free(str(row["volid"]))


# -- disks


async def resize(
    site: Site,
    node: LabNode,
    vmid: int,
    key: str,
    text: str,
    *,
    user: str = "root@pam",
    digest: str | None = None,
    skiplock: bool = False,
) -> None:
    """Grow a disk; ``+SIZE`` is relative."""
    match = re.fullmatch(r"(\+)?(\d+(?:\.\d+)?)([KMGT])?", text)
    assert match
    unit = {None: 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[match[3]]
    wanted = int(float(match[2]) * unit)
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_digest(conf, digest)
        if not skiplock:
            check_lock(conf)
        known_drive(conf, key)
        drive = Drive.parse(key, conf.values[key])
        if drive.cdrom:
            raise die("you can't resize a cdrom")
        storage = node.storage_of(drive.file)
        site.auth.check(user, f"/storage/{storage.name}", "Datastore.AllocateSpace")
        storage.activate(drive.file)
        size = await asyncio.to_thread(storage.size, drive.file)
        wanted = size + wanted if match[1] else wanted
        if wanted < size:
            raise die("shrinking disks is not supported")
        if wanted == size:
            return
        machine = site.machine(vmid, node)
        if machine.running:
            if storage.type == "lvm":
                await asyncio.to_thread(storage.resize, drive.file, wanted)
            if machine.modern:
                name = {"node_name": f"drive-{key}"}
            else:
                name = {"device": f"drive-{key}"}
            grown = -(-wanted // 1024) * 1024
            await machine.qmp("block_resize", **name, size=grown)
        else:
            await asyncio.to_thread(storage.resize, drive.file, wanted)
        drive.options["size"] = human_size(wanted)
        conf.values[key] = str(drive)
        site.save(node, vmid, conf)


async def make_template(site: Site, node: LabNode, vmid: int) -> None:
    """Turn a stopped VM into a template: its disks become ``base-…``."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        if conf.snapshots:
            raise die("unable to create template because VM contains snapshots")
        if site.machine(vmid, node).running:
            raise die("you can't convert a VM to template if VM is running")
        for drive in conf.drives():
            if drive.volume and not drive.cdrom:
                old = node.storage_of(drive.file).file(drive.file)
                drive.file = drive.file.replace(f"vm-{vmid}-", f"base-{vmid}-")
                new = node.storage_of(drive.file).file(drive.file)
                old.rename(new)
                conf.values[drive.key] = str(drive)
        conf.values["template"] = "1"
        site.save(node, vmid, conf)


# -- status


def list_row(site: Site, node: LabNode, vmid: int) -> dict[str, Any]:
    """What lists show of a VM."""
    conf = site.load(node, vmid)
    machine = site.machine(vmid, node)
    memory = int(conf.values.get("memory", "512").split(",")[0].split("=")[-1]) << 20
    row: dict[str, Any] = {
        "vmid": vmid,
        "name": conf.values.get("name", f"VM {vmid}"),
        "status": "running" if machine.running else "stopped",
        "cpus": int(conf.values.get("cores", "1"))
        * int(conf.values.get("sockets", "1")),
        "maxmem": memory,
        "mem": memory if machine.running else 0,
        "maxdisk": 0,
        "disk": 0,
        "uptime": int(time.time() - machine.started_at) if machine.running else 0,
        "cpu": 0,
        "netin": 0,
        "netout": 0,
        "diskread": 0,
        "diskwrite": 0,
    }
    if machine.running:
        row["pid"] = machine.pid
    for key in ("lock", "tags"):
        if key in conf.values:
            row[key] = conf.values[key]
    if conf.values.get("template") == "1":
        row["template"] = 1
    return row


async def current(site: Site, node: LabNode, vmid: int) -> dict[str, Any]:
    """``status/current``: after about 3 s without QMP data where it is held."""
    conf = site.load(node, vmid)
    row = list_row(site, node, vmid)
    machine = site.machine(vmid, node)
    row["qmpstatus"] = row["status"]
    if conf.agent_enabled:
        row["agent"] = 1
    row["ha"] = {"managed": int(vmid in site.ha)}
    if machine.running:
        commands = [
            {"execute": "query-status"},
            {"execute": "query-version"},
            {
                "execute": "qom-get",
                "arguments": {"path": "/machine", "property": "type"},
            },
        ]
        with contextlib.suppress(TimeoutError, ConnectionError, QmpRefused):
            status, version, kind = await machine.batch(commands, timeout_s=3.0)
            row["qmpstatus"] = status["status"]
            v = version["qemu"]
            row["running-qemu"] = f"{v['major']}.{v['minor']}.{v['micro']}"
            suffix = "+pve0" if site.release.startswith("9") else "+pve1"
            row["running-machine"] = kind.removesuffix("-machine") + suffix
    return row


def known_drive(conf: VmConf, key: str) -> None:
    if not DRIVE.fullmatch(key):
        raise bad_params(disk=f"value '{key}' does not have a value in the enumeration")
    if key not in conf.values:
        raise die(f"disk '{key}' does not exist")
