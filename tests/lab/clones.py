# SPDX-License-Identifier: Apache-2.0
"""Copies of a VM or of one of its snapshots, whole, as PVE makes them.

The source carries no ``lock`` meanwhile, but its file lock is held from the first
check to the last byte: shared where it is stopped, alone where it runs. So until then
a snapshot, a start or a change of the source waits 10 s and fails.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cmdline import EFI_SIZE
from .configops import check_lock, human_size
from .errors import ApiError, bad_params, die
from .permissions import check_bridge
from .snapshots import section_of
from .storage import Storage
from .tasks import Task
from .vmconfig import DRIVE, UNUSED, Drive, VmConf, parse_props

if TYPE_CHECKING:
    from .site import LabNode, Site

NOT_COPIED = {"parent", "snaptime", "snapstate", "vmstate", "template", "lock"}
PATIENCE_S = 1.0
"""How long a clone waits for either file lock."""


@dataclass(frozen=True)
class Wanted:
    """What the call asked for."""

    vmid: int
    params: Mapping[str, Any]

    @property
    def newid(self) -> int:
        return int(self.params["newid"])

    @property
    def snapname(self) -> str | None:
        return self.params.get("snapname")


def planned(
    site: Site, node: LabNode, user: str, wanted: Wanted
) -> tuple[dict[str, str], list[Drive]]:
    """Check all that PVE checks; return the copy's values and the drives to copy."""
    pool, target = wanted.params.get("pool"), wanted.params.get("storage")
    if pool and pool not in site.pools:
        raise die(f"pool '{pool}' does not exist")
    if target:
        if target not in node.storages:
            raise die(f"storage '{target}' does not exist")
        if not node.storages[target].enabled:
            raise die(f"storage '{target}' is disabled")
        if "images" not in node.storages[target].content:
            raise bad_params(storage=f"storage '{target}' does not support vm images")
    site.faults.require_quorum()
    conf = site.load(node, wanted.vmid)
    check_lock(conf)
    old = section_of(conf, wanted.snapname) if wanted.snapname else conf.values
    template = conf.values.get("template") == "1"
    full = bool(wanted.params.get("full", not template))
    for name in ("storage", "format"):
        if not full and name in wanted.params:
            raise die(f"parameter '{name}' not allowed for linked clones")
    drives = [Drive.parse(key, old[key]) for key in sorted(old) if DRIVE.fullmatch(key)]
    drives = [drive for drive in drives if not drive.cdrom]
    for drive in drives:
        storage = target or drive.file.partition(":")[0]
        site.auth.check(user, f"/storage/{storage}", "Datastore.AllocateSpace")
    for key, value in old.items():
        if re.fullmatch(r"net\d+", key):
            check_bridge(site.auth, user, value)
    if site.find(wanted.newid):
        raise die(f"unable to create VM {wanted.newid}: config file already exists")
    for drive in drives:
        copies = full or drive.key == "tpmstate0"
        of = " a snapshot of" if wanted.snapname else ""
        kind, feature = ("Full", "copy") if copies else ("Linked", "clone")
        source = node.storage_of(drive.file)
        if not source.has_feature(feature, drive.file, wanted.snapname):
            raise die(
                f"{kind} clone feature is not supported for{of} '{drive.file}' "
                f"({drive.key})"
            )
        if drive.key == "tpmstate0" and not wanted.snapname:
            if site.machine(wanted.vmid, node).running:
                raise die("cannot clone TPM state while VM is running")
        if not copies:
            raise die("the lab makes no linked clones")
    values = {
        key: value
        for key, value in old.items()
        if key not in NOT_COPIED and not UNUSED.fullmatch(key)
    }
    return values, drives


async def clone(
    site: Site, node: LabNode, user: str, wanted: Wanted, task: Task
) -> None:
    """Copy the disks, then the configuration with a new identity."""
    running = site.machine(wanted.vmid, node).running
    async with (
        site.lock_config(wanted.vmid, shared=not running, patience_s=PATIENCE_S),
        site.lock_config(wanted.newid, patience_s=PATIENCE_S),
    ):
        values, drives = planned(site, node, user, wanted)
        task.log(f"creating a clone of VM {wanted.vmid} with ID {wanted.newid}")
        site.save(node, wanted.newid, VmConf({"lock": "clone"}))
        made: list[str] = []
        try:
            for drive in drives:
                copied = await _copy(site, node, wanted, drive, values, made, task)
                values[drive.key] = str(copied)
                partly = {**_identity(values, wanted), "lock": "clone"}
                site.save(node, wanted.newid, VmConf(partly))
            site.save(node, wanted.newid, VmConf(_identity(values, wanted)))
            if pool := wanted.params.get("pool"):
                site.pools[pool].add(wanted.newid)
        except BaseException as error:
            for volid in made:
                await asyncio.to_thread(node.storage_of(volid).free, volid)
            node.conf_path(wanted.newid).unlink(missing_ok=True)
            if isinstance(error, ApiError):
                raise die(f"clone failed: {error.message}") from error
            raise


def _identity(values: Mapping[str, str], wanted: Wanted) -> dict[str, str]:
    """What makes the copy another machine: UUID, generation, MACs, name."""
    new = dict(values)
    smbios = parse_props(new.get("smbios1", ""), "uuid")
    smbios["uuid"] = str(uuid.uuid4())
    new["smbios1"] = ",".join(f"{key}={value}" for key, value in smbios.items())
    if "vmgenid" in new:
        new["vmgenid"] = str(uuid.uuid4())
    default = f"Copy-of-VM-{values.get('name', wanted.vmid)}"
    new["name"] = wanted.params.get("name") or default
    if description := wanted.params.get("description"):
        new["description"] = description
    for key, value in values.items():
        if re.fullmatch(r"net\d+", key):
            model, _, rest = value.partition(",")
            raw = secrets.token_hex(3).upper()
            mac = f"BC:24:11:{raw[:2]}:{raw[2:4]}:{raw[4:]}"
            new[key] = f"{model.partition('=')[0]}={mac}" + (f",{rest}" if rest else "")
    return new


async def _copy(
    site: Site,
    node: LabNode,
    wanted: Wanted,
    drive: Drive,
    values: Mapping[str, str],
    made: list[str],
    task: Task,
) -> Drive:
    task.log(f"create full clone of drive {drive.key} ({drive.file})")
    source = node.storage_of(drive.file)
    target = node.storages[wanted.params.get("storage") or source.name]
    fmt = _format(target, source.format(drive.file), wanted.params.get("format"), task)
    if drive.key == "efidisk0":
        size = EFI_SIZE[drive.options.get("efitype", "2m")]
    elif drive.key == "tpmstate0":
        size = 4 << 20
    else:
        # Of the disk as it is now, also where an older snapshot of it is copied.
        size = await asyncio.to_thread(source.size, drive.file)
    volid = await asyncio.to_thread(target.alloc, wanted.newid, None, size, fmt)
    made.append(volid)
    target.activate(volid)
    source.activate(drive.file)
    argv = [site.qemu_img, "convert", "-p", "-n", "-U"]
    if wanted.snapname and source.format(drive.file) == "qcow2":
        argv += ["-l", f"snapshot.name={wanted.snapname}"]
    argv += ["-f", source.format(drive.file), "-O", fmt]
    argv += [source.path(drive.file), target.path(volid)]
    await site.faults.before_copy(task)
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    finally:
        target.deactivate(volid)
    if process.returncode:
        task.log(said.decode(errors="replace").strip())
        words = " ".join(["/usr/bin/qemu-img", *argv[1:]])
        raise die(
            f"copy failed: command '{words}' failed: exit code {process.returncode}"
        )
    copied = Drive(drive.key, volid, dict(drive.options))
    copied.options.pop("format", None)
    copied.options["size"] = human_size(await asyncio.to_thread(target.size, volid))
    return copied


def _format(target: Storage, have: str, asked: str | None, task: Task) -> str:
    """The format asked for, else the source's, where the storage has it."""
    known = ("raw",) if target.type == "lvm" else ("raw", "qcow2")
    fmt = asked or have
    if fmt not in known:
        fmt = "raw"
        if asked:
            task.warn(
                f"format '{asked}' is not supported by the target storage "
                f"'{target.name}' - using '{fmt}' instead"
            )
    return fmt
