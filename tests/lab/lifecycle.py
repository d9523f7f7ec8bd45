# SPDX-License-Identifier: Apache-2.0
"""Start, stop, shut down, destroy, snapshot, move and resize, with PVE's texts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any

from . import hotplug
from .cmdline import Volume
from .configops import apply_pending, check_lock, human_size
from .errors import bad_params, die
from .relay import QmpRefused
from .storage import copy_image, run
from .tasks import Task
from .vmconfig import DRIVE, Drive, VmConf, add_unused

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
        if not skiplock:
            check_lock(conf)
        await site.machine(vmid, node).quit()


async def shutdown_vm(
    site: Site, node: LabNode, vmid: int, timeout_s: float, force: bool
) -> None:
    """Ask the guest to power off: by agent where it answers, else by ACPI."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        machine = site.machine(vmid, node)
        if conf.agent_enabled and await agent_answers(site, node, vmid):
            with contextlib.suppress(TimeoutError, ConnectionError):
                await machine.agent("guest-shutdown", timeout_s=3)
        else:
            await machine.qmp("system_powerdown")
        try:
            async with asyncio.timeout(timeout_s):
                await machine.gone.wait()
        except TimeoutError:
            if not force:
                raise die("VM quit/powerdown failed - got timeout") from None
            await machine.quit()


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


def require_destroyable(site: Site, node: LabNode, vmid: int, skiplock: bool) -> None:
    conf = site.load(node, vmid)
    if conf.values.get("protection") == "1":
        raise die(f"can't remove VM {vmid} - protection mode enabled")
    if site.machine(vmid, node).running:
        raise die(f"VM {vmid} is running - destroy failed")
    if vmid in site.ha:
        raise die(
            f"unable to remove VM {vmid} - used in HA resources and purge parameter "
            "not set."
        )
    if not skiplock and conf.values.get("lock", "suspended") != "suspended":
        check_lock(conf)


async def destroy_vm(
    site: Site, node: LabNode, vmid: int, *, skiplock: bool, unreferenced: bool
) -> None:
    """Remove the VM and the volumes it owns."""
    async with site.lock_config(vmid):
        require_destroyable(site, node, vmid, skiplock)
        site.faults.require_quorum()
        conf = site.load(node, vmid)
        volumes = conf.volumes()
        if unreferenced:
            volumes |= {
                str(row["volid"])
                for storage in node.storages.values()
                if "images" in storage.content
                for row in storage.volumes(vmid)
            }
        for volid in sorted(volumes):
            storage = node.storages.get(volid.partition(":")[0])
            if storage and storage.exists(volid) and storage.owner(volid) == vmid:
                await asyncio.to_thread(storage.free, volid)
        node.conf_path(vmid).unlink()
        (site.root / f"etc/pve/firewall/{vmid}.fw").unlink(missing_ok=True)
        for members in site.pools.values():
            members.discard(vmid)


# -- snapshots


def _qcow2_drives(node: LabNode, conf: VmConf) -> list[Drive]:
    drives = [d for d in conf.drives() if d.volume and not d.cdrom]
    for drive in drives:
        if node.storage_of(drive.file).format(drive.file) != "qcow2":
            raise die("snapshot feature is not available")
    return drives


async def snapshot(
    site: Site, node: LabNode, vmid: int, name: str, description: str
) -> None:
    """An internal snapshot of all disks, without memory."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        if name in conf.snapshots:
            raise die(f"snapshot name '{name}' already used")
        drives = _qcow2_drives(node, conf)
        machine = site.machine(vmid, node)
        for drive in drives:
            if machine.running:
                device = f"drive-{drive.key}"
                try:
                    await machine.qmp(
                        "blockdev-snapshot-internal-sync", device=device, name=name
                    )
                except QmpRefused as error:
                    raise die(f"snapshot create failed: {error}") from error
            else:
                file = node.storage_of(drive.file).file(drive.file)
                await asyncio.to_thread(
                    run, site.qemu_img, "snapshot", "-c", name, str(file)
                )
        body = {
            k: v for k, v in conf.values.items() if k not in ("lock", "description")
        }
        body["snaptime"] = str(int(time.time()))
        if description:
            body["description"] = description
        conf.snapshots[name] = body
        conf.values["parent"] = name
        site.save(node, vmid, conf)


async def delete_snapshot(
    site: Site, node: LabNode, vmid: int, name: str, force: bool
) -> None:
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        if name not in conf.snapshots:
            raise die(f"snapshot '{name}' does not exist")
        machine = site.machine(vmid, node)
        for drive in _qcow2_drives(node, conf):
            if machine.running:
                await machine.qmp(
                    "blockdev-snapshot-delete-internal-sync",
                    device=f"drive-{drive.key}", name=name,
                )  # fmt: skip
            else:
                file = node.storage_of(drive.file).file(drive.file)
                await asyncio.to_thread(
                    run, site.qemu_img, "snapshot", "-d", name, str(file)
                )
        body = conf.snapshots.pop(name)
        for other in (conf.values, *conf.snapshots.values()):
            if other.get("parent") == name:
                other.pop("parent")
                if "parent" in body:
                    other["parent"] = body["parent"]
        site.save(node, vmid, conf)


async def rollback(
    site: Site, node: LabNode, vmid: int, name: str, start: bool
) -> None:
    """Stop, put the disks back, give a new generation id."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        if name not in conf.snapshots:
            raise die(f"snapshot '{name}' does not exist")
        await site.machine(vmid, node).quit()
        conf.values["lock"] = "rollback"
        site.save(node, vmid, conf)
        for drive in _qcow2_drives(node, conf):
            file = node.storage_of(drive.file).file(drive.file)
            await asyncio.to_thread(
                run, site.qemu_img, "snapshot", "-a", name, str(file)
            )
        import uuid

        conf.values = {k: v for k, v in conf.snapshots[name].items() if k != "snaptime"}
        conf.values["parent"] = name
        conf.values["vmgenid"] = str(uuid.uuid4())
        site.save(node, vmid, conf)
    if start:
        await start_vm(site, node, vmid)


# -- disks


async def move_disk(
    site: Site,
    node: LabNode,
    vmid: int,
    key: str,
    target: str,
    fmt: str | None,
    *,
    delete: bool,
    task: Task,
) -> None:
    """Copy a disk to another storage, online by mirror, and use it from then on."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        drive = Drive.parse(key, conf.values[key])
        source = node.storage_of(drive.file)
        storage = node.storages[target]
        storage.require_images()
        if delete and conf.snapshots:
            raise die("you can't move a disk with snapshots and delete the source")
        have = source.format(drive.file)
        fmt = fmt or (have if storage.type == "dir" else "raw")
        if source is storage and fmt == have:
            raise die("you can't move to the same storage with same format")
        size = await asyncio.to_thread(source.size, drive.file)
        volid = await asyncio.to_thread(storage.alloc, vmid, None, size, fmt)
        moved = Drive(key, volid, {**drive.options, "size": human_size(size)})
        moved.options.pop("format", None)
        machine = site.machine(vmid, node)
        task.log(f"create full clone of drive {key} ({drive.file})")
        try:
            storage.activate(volid)
            if machine.running:
                if drive.key == "tpmstate0":
                    raise die("cannot move TPM state while VM is running")
                machine.activated(volid)
                volume = Volume(storage.path(volid), fmt, storage.type)
                await hotplug.mirror(machine, drive, moved, volume)
            else:
                source.activate(drive.file)
                await asyncio.to_thread(
                    copy_image, site.qemu_img, source.file(drive.file), have,
                    storage.file(volid), fmt,
                )  # fmt: skip
                source.deactivate(drive.file)
                storage.deactivate(volid)
        except BaseException:
            storage.free(volid)
            raise
        conf.values[key] = str(moved)
        if delete:
            source.free(drive.file)
        else:
            add_unused(conf.values, drive.file)
        site.save(node, vmid, conf)


async def resize(site: Site, node: LabNode, vmid: int, key: str, text: str) -> None:
    """Grow a disk; ``+SIZE`` is relative."""
    match = re.fullmatch(r"(\+)?(\d+(?:\.\d+)?)([KMGT])?", text)
    assert match
    unit = {None: 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[match[3]]
    wanted = int(float(match[2]) * unit)
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_lock(conf)
        if key not in conf.values:
            raise die(f"disk '{key}' does not exist")
        drive = Drive.parse(key, conf.values[key])
        storage = node.storage_of(drive.file)
        size = await asyncio.to_thread(storage.size, drive.file)
        wanted = size + wanted if match[1] else wanted
        if wanted < size:
            raise die("shrinking disks is not supported")
        machine = site.machine(vmid, node)
        if machine.running:
            if storage.type == "lvm":
                await asyncio.to_thread(storage.resize, drive.file, wanted)
            if machine.modern:
                name = {"node_name": f"drive-{key}"}
            else:
                name = {"device": f"drive-{key}"}
            await machine.qmp("block_resize", **name, size=wanted)
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
