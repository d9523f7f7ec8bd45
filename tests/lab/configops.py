# SPDX-License-Identifier: Apache-2.0
"""Creating, reading and changing VM configurations, as PVE's API does it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hotplug
from .cmdline import EFI_SIZE
from .errors import ApiError, bad_params, die
from .permissions import check_bridge, check_key, check_volume, new_volume
from .schema import config_type
from .storage import copy_image, run
from .tasks import Task
from .vmconfig import (
    DRIVE,
    UNUSED,
    Drive,
    VmConf,
    add_unused,
    drives_of,
    parse_props,
    unused_volume,
)

if TYPE_CHECKING:
    from .site import LabNode, Site

GIB = 1 << 30
AT_ONCE = re.compile(
    r"(name|onboot|description|protection|tags|startup|lock|hookscript|autostart|"
    r"shares|vmstatestorage|unused\d+)\Z"
)
"""Keys that take effect while the VM runs; others than these and disks wait."""


def check_lock(conf: VmConf) -> None:
    if lock := conf.values.get("lock"):
        raise die(f"VM is locked ({lock})")


def check_digest(conf: VmConf, digest: str | None) -> None:
    if digest and digest != conf.digest:
        raise die("checksum mismatch (file change by other user?)")


async def allocate(
    site: Site, node: LabNode, vmid: int, drive: Drive, task: Task | None = None
) -> list[str]:
    """Turn ``STORAGE:SIZE`` into a new volume; return the volumes made."""
    if not new_volume(drive.file):
        storage = node.storage_of(drive.file) if drive.volume else None
        if storage and not drive.cdrom:
            size = await asyncio.to_thread(storage.size, drive.file)
            drive.options["size"] = human_size(size)
        drive.options.pop("format", None)
        return []
    name, _, amount = drive.file.partition(":")
    storage = node.storages[name]
    source = drive.options.pop("import-from", None)
    size = int(float(amount) * GIB)
    fmt = drive.options.pop("format", None)
    content: tuple[Path, str] | None = None
    if drive.key == "efidisk0":
        efitype = drive.options.setdefault("efitype", "2m")
        drive.options.setdefault("pre-enrolled-keys", "0")
        keys = ".ms" if drive.options["pre-enrolled-keys"] == "1" else ""
        small = "_4M" if efitype == "4m" else ""
        content = (site.firmware / f"OVMF_VARS{small}{keys}.fd", "raw")
        size = EFI_SIZE[efitype]
    elif drive.key == "tpmstate0":
        drive.options.setdefault("version", "v2.0")
        size = 4 << 20
        fmt = "raw"
    if source:
        if size and drive.interface not in ("efidisk", "tpmstate"):
            raise bad_params(
                **{
                    drive.key: "'import-from' requires special syntax - "
                    "use <storage ID>:0"
                }
            )
        content = await asyncio.to_thread(_import_source, node, source)
        size = await asyncio.to_thread(_virtual_size, site, *content)
    elif not size:
        raise die("unable to create image: invalid size")
    volid = await asyncio.to_thread(storage.alloc, vmid, None, size, fmt)
    if task:
        task.log(f"{drive.key}: successfully created disk '{volid}'")
    try:
        if content:
            await asyncio.to_thread(
                copy_image, site.qemu_img, *content,
                storage.file(volid), storage.format(volid),
            )  # fmt: skip
    except BaseException:
        storage.free(volid)
        raise
    drive.file = volid
    drive.options["size"] = human_size(storage.size(volid))
    return [volid]


def _import_source(node: LabNode, source: str) -> tuple[Path, str]:
    if source.startswith("/"):
        path = Path(source)
        if not path.exists():
            raise die(f"{source}: No such file or directory")
        return path, "qcow2" if path.suffix == ".qcow2" else "raw"
    storage = node.storage_of(source)
    return storage.file(source), storage.format(source)


def _virtual_size(site: Site, path: Path, fmt: str) -> int:
    if fmt == "raw":
        return path.stat().st_size
    said = run(site.qemu_img, "info", "--output=json", "-f", fmt, str(path))
    return int(json.loads(said)["virtual-size"])


def human_size(size: int) -> str:
    """As PVE writes ``size=``: the largest unit that divides."""
    for unit, letter in (
        (1 << 40, "T"),
        (1 << 30, "G"),
        (1 << 20, "M"),
        (1 << 10, "K"),
    ):
        if size % unit == 0 and size >= unit:
            return f"{size // unit}{letter}"
    return str(size)


def check_permissions(
    site: Site, node: LabNode, user: str, vmid: int, values: dict[str, str]
) -> None:
    """All privilege checks for setting ``values``."""
    for key, value in values.items():
        check_key(site.auth, user, vmid, key, value)
        if re.fullmatch(r"net\d+", key):
            check_bridge(site.auth, user, value)
        elif DRIVE.fullmatch(key):
            check_volume(site, node, user, vmid, Drive.parse(key, value), key)
        elif UNUSED.fullmatch(key):
            drive = Drive.parse(key, value)
            check_volume(site, node, user, vmid, drive, key)


async def create(
    site: Site, node: LabNode, user: str, vmid: int, params: dict[str, Any]
) -> str:
    """``POST /nodes/N/qemu``: check, then make the VM in a task."""
    pool = params.pop("pool", None)
    start = params.pop("start", 0)
    default = params.pop("storage", None)
    for key in ("unique", "force", "bwlimit", "ha-managed", "import-working-storage"):
        params.pop(key, None)
    if "archive" in params or params.pop("live-restore", 0):
        raise die("the lab restores no archives")
    values = {key: str(value) for key, value in params.items()}
    if pool and not site.auth.has(user, f"/pool/{pool}", "VM.Allocate"):
        site.auth.check(user, f"/vms/{vmid}", "VM.Allocate")
    elif not pool:
        site.auth.check(user, f"/vms/{vmid}", "VM.Allocate")
    if start and site.release.startswith("9"):
        with _as_member(site, pool, vmid):
            site.auth.check(user, f"/vms/{vmid}", "VM.PowerMgmt")
    if pool and pool not in site.pools:
        raise die(f"pool '{pool}' does not exist")
    if default and default not in node.storages:
        raise die(f"storage '{default}' does not exist")
    with _as_member(site, pool, vmid):
        check_permissions(site, node, user, vmid, values)
    if other := site.find(vmid):
        raise die(
            f"unable to create VM {vmid} - VM {vmid} already exists on node "
            f"'{other.name}'"
        )
    site.faults.require_quorum()
    conf = VmConf({"lock": "create"})
    site.save(node, vmid, conf)

    async def work(task: Task) -> None:
        made: list[str] = []
        try:
            result = dict(values)
            for key, value in values.items():
                if DRIVE.fullmatch(key):
                    drive = Drive.parse(key, value)
                    made += await allocate(site, node, vmid, drive, task)
                    result[key] = str(drive)
            finish_new(site, result)
            site.save(node, vmid, VmConf(result))
        except BaseException:
            for volid in made:
                node.storage_of(volid).free(volid)
            node.conf_path(vmid).unlink(missing_ok=True)
            raise
        if pool:
            site.pools[pool].add(vmid)
        if start:
            from .lifecycle import start_vm

            await start_vm(site, node, vmid)

    async def guarded(task: Task) -> None:
        try:
            await site.faults.before_task(task)
        except BaseException:
            node.conf_path(vmid).unlink(missing_ok=True)
            raise
        await work(task)

    return site.tasks.start(
        node.name, "qmcreate", str(vmid), user, guarded, faults=False
    )


@contextlib.contextmanager
def _as_member(site: Site, pool: str | None, vmid: int) -> Iterator[None]:
    """Judge a VM that is about to be made by the pool it will be in."""
    members = site.pools.get(pool or "", set())
    before = vmid in members
    members.add(vmid)
    try:
        yield
    finally:
        if not before:
            members.discard(vmid)


def finish_new(site: Site, values: dict[str, str]) -> None:
    """Give a new VM what PVE gives it: uuid, generation id, MACs, meta."""
    smbios = parse_props(values.get("smbios1", ""), "uuid")
    smbios.setdefault("uuid", str(uuid.uuid4()))
    first = {"uuid": smbios.pop("uuid")}
    values["smbios1"] = ",".join(f"{k}={v}" for k, v in {**first, **smbios}.items())
    if "tags" in values:
        values["tags"] = unique_tags(values["tags"])
    if values.get("vmgenid", "1") == "1":
        values["vmgenid"] = str(uuid.uuid4())
    version = ".".join(map(str, site.qemu_version))
    values["meta"] = f"creation-qemu={version}.0,ctime={int(time.time())}"
    for key, value in values.items():
        if re.fullmatch(r"net\d+", key):
            values[key] = with_mac(value)


def with_mac(value: str) -> str:
    """Add a MAC address to a ``netN`` value that has none."""
    model, _, rest = value.partition(",")
    if "=" not in model:
        raw = secrets.token_hex(3).upper()
        model += f"=BC:24:11:{raw[:2]}:{raw[2:4]}:{raw[4:]}"
    return f"{model},{rest}" if rest else model


async def update(
    site: Site,
    node: LabNode,
    user: str,
    vmid: int,
    values: dict[str, str],
    *,
    delete: list[str],
    revert: list[str] | None = None,
    digest: str | None = None,
    skiplock: bool = False,
    force: bool = False,
    task: Task | None = None,
) -> None:
    """``PUT config``: everything in one step under the VM's lock."""
    if skiplock and user != "root@pam":
        raise bad_params(skiplock="Only root may use this option.")
    for key in values.keys() & set(delete):
        raise bad_params(**{key: f"cannot set and delete property - {key}"})
    for key in delete:
        if not is_key(key):
            raise bad_params(delete=f"unknown option '{key}'")
        check_key(site.auth, user, vmid, key, None)
    check_permissions(site, node, user, vmid, values)
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        check_digest(conf, digest)
        if not skiplock:
            check_lock(conf)
        site.faults.require_quorum()
        machine = site.machine(vmid, node)
        live = machine.running
        for key in revert or []:
            conf.pending.pop(key, None)
            conf.pending_delete.pop(key, None)
        errors: dict[str, str] = {}
        for key in delete:
            said = await _delete(
                site, node, user, vmid, conf, key, live=live, force=force
            )
            if said:
                errors[key] = f"unable to apply pending change {key} : {said}\n"
        made: list[str] = []
        try:
            for key, value in values.items():
                await _set(site, node, vmid, conf, key, value, live, made, task)
        except BaseException:
            for volid in made:
                await asyncio.to_thread(node.storage_of(volid).free, volid)
            raise
        site.save(node, vmid, conf)
        if errors:
            raise bad_params(**errors)


async def _set(
    site: Site,
    node: LabNode,
    vmid: int,
    conf: VmConf,
    key: str,
    value: str,
    live: bool,
    made: list[str],
    task: Task | None,
) -> None:
    if re.fullmatch(r"net\d+", key):
        value = with_mac(value)
    if key == "tags":
        value = unique_tags(value)
    if UNUSED.fullmatch(key):
        volid = parse_props(value, "file")["file"]
        conf.values[key] = volid
        return
    if not DRIVE.fullmatch(key):
        if live and not AT_ONCE.fullmatch(key):
            if conf.values.get(key) != value:
                conf.pending[key] = value
        else:
            conf.values[key] = value
            conf.pending.pop(key, None)
        conf.pending_delete.pop(key, None)
        return
    drive = Drive.parse(key, value)
    made += await allocate(site, node, vmid, drive, task)
    for spare, volid in list(conf.values.items()):
        if UNUSED.fullmatch(spare) and volid.split(",")[0] == drive.file:
            del conf.values[spare]
    old = Drive.parse(key, conf.values[key]) if key in conf.values else None
    if live:
        if old is None and drive.interface in ("scsi", "virtio"):
            await hotplug.plug(site.machine(vmid, node), conf, drive)
        elif old is None or str(old) != str(drive):
            if old is None or old.file != drive.file or _waits(old, drive):
                conf.pending[key] = str(drive)
                return
            if _limits(old) != _limits(drive):
                await hotplug.throttle(site.machine(vmid, node), drive)
        conf.pending.pop(key, None)
    if old and old.volume and not old.cdrom and old.file != drive.file:
        add_unused(conf.values, old.file)
    conf.values[key] = str(drive)


def _waits(old: Drive, new: Drive) -> bool:
    """Whether a changed drive waits for the next start.

    Only these options do. PVE takes every other one into the configuration at once,
    and what the running QEMU can't be told (``rerror``, ``werror``, ``serial``) is
    there from the next start on, without a word in ``[PENDING]``.
    """
    return any(
        old.options.get(name) != new.options.get(name)
        for name in "aio discard iothread queues product cache ssd vendor ro".split()
    )


def _limits(drive: Drive) -> dict[str, str]:
    """The options that slow a drive down, which a running QEMU takes."""
    return {k: v for k, v in drive.options.items() if re.match(r"(mbps|iops|bps)", k)}


async def _delete(
    site: Site,
    node: LabNode,
    user: str,
    vmid: int,
    conf: VmConf,
    key: str,
    *,
    live: bool,
    force: bool,
) -> str:
    """Delete one key; return why the change stays pending, if it does."""
    conf.pending.pop(key, None)
    if key not in conf.values:
        return ""
    protected = conf.values.get("protection") == "1"
    if UNUSED.fullmatch(key):
        volid = unused_volume(conf.values[key])
        if protected:
            raise die(f"can't remove unused disk '{volid}' - protection mode enabled")
        await free_volume(site, node, user, vmid, conf, volid, key)
        del conf.values[key]
        return ""
    if DRIVE.fullmatch(key):
        return await _delete_drive(site, node, user, vmid, conf, key, live, force)
    if re.fullmatch(r"net\d+", key):
        check_bridge(site.auth, user, conf.values[key])
    if live and not AT_ONCE.fullmatch(key):
        conf.pending_delete[key] = 2 if force else 1
    else:
        del conf.values[key]
    return ""


async def _delete_drive(
    site: Site,
    node: LabNode,
    user: str,
    vmid: int,
    conf: VmConf,
    key: str,
    live: bool,
    force: bool,
) -> str:
    drive = Drive.parse(key, conf.values[key])
    if conf.values.get("protection") == "1":
        raise die(f"can't remove drive '{key}' - protection mode enabled")
    boot = parse_props(conf.values.get("boot", ""), "legacy")
    order = [name for name in boot.get("order", "").split(";") if name]
    if key in order:
        left = [name for name in order if name != key]
        conf.values["boot"] = "order=" + ";".join(left)
    if live:
        if drive.interface == "scsi" and not drive.cdrom:
            await hotplug.unplug(site.machine(vmid, node), conf, drive)
        else:
            conf.pending_delete[key] = 2 if force else 1
            return ""
    if drive.volume and not drive.cdrom:
        if not force:
            add_unused(conf.values, drive.file)
        else:
            try:
                await free_volume(site, node, user, vmid, conf, drive.file, key)
            except ApiError as error:
                conf.pending_delete[key] = 2
                return error.message
    del conf.values[key]
    return ""


async def free_volume(
    site: Site, node: LabNode, user: str, vmid: int, conf: VmConf, volid: str, key: str
) -> None:
    """Free a volume the VM owns, as removing ``unusedN`` does.

    Raises:
        ApiError: a drive or a snapshot still uses it.
    """
    storage = node.storages.get(volid.partition(":")[0])
    if storage is None or storage.owner(volid) != vmid:
        return
    site.auth.check(user, f"/storage/{storage.name}", "Datastore.AllocateSpace")
    others = {k: v for k, v in conf.values.items() if k != key}
    if any(
        volid == drive.file
        for body in (others, *conf.snapshots.values())
        for drive in drives_of(body)
        if not drive.cdrom
    ):
        raise die(f"unable to delete '{volid}' - volume is still in use (snapshot?)")
    if storage.exists(volid):
        await asyncio.to_thread(storage.free, volid)


def unique_tags(text: str) -> str:
    """Tags as PVE writes them: lower case, in order, each once."""
    return ";".join(sorted({tag.lower() for tag in re.split(r"[;,\s]+", text) if tag}))


def apply_pending(conf: VmConf) -> None:
    """What a cold start does with ``[PENDING]``."""
    for key in list(conf.pending_delete):
        if DRIVE.fullmatch(key) and key in conf.values:
            drive = Drive.parse(key, conf.values[key])
            if drive.volume and not drive.cdrom:
                add_unused(conf.values, drive.file)
        conf.values.pop(key, None)
    for key, value in conf.pending.items():
        if DRIVE.fullmatch(key) and key in conf.values:
            old, new = Drive.parse(key, conf.values[key]), Drive.parse(key, value)
            if old.volume and not old.cdrom and old.file != new.file:
                add_unused(conf.values, old.file)
        conf.values[key] = value
    conf.pending.clear()
    conf.pending_delete.clear()


def is_key(key: str) -> bool:
    return config_type(key) is not None or key in ("parent", "meta")


def config_kind(key: str) -> str:
    """``integer``, ``boolean``, ``string`` …: the schema's type of a key."""
    kind = config_type(key)
    return kind.type if kind else "string"
