# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a VM as PVE takes, deletes and goes back to them.

What PVE does in several steps happens in several steps here: the configuration is
written with its ``lock`` and the snapshot's ``snapstate`` first, then come the volumes
without the file lock, then the configuration again. What fails in between leaves what
it leaves there: ``lock: rollback`` or ``lock: snapshot-delete``, which no token can
remove. The vocabulary of a section is PVE's: no ``unusedN``, its own description,
``snaptime`` and ``parent``.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .configops import check_lock
from .errors import ApiError, die
from .relay import QmpRefused
from .tasks import Task
from .vmconfig import UNUSED, Drive, VmConf, add_unused, drives_of

if TYPE_CHECKING:
    from .site import LabNode, Site

NOT_COPIED = {"snapstate", "snaptime", "vmstate", "lock", "digest", "description"}
RESERVED = ("current", "pending")


def volumes_of(values: Mapping[str, str]) -> list[Drive]:
    """The drives that snapshots are about: with a volume, not a CD."""
    return [d for d in drives_of(dict(values)) if d.volume and not d.cdrom]


def has_feature(
    node: LabNode, values: Mapping[str, str], feature: str, snapname: str | None = None
) -> bool:
    """Whether every drive of a configuration can do ``feature``."""
    return all(
        node.storage_of(drive.file).has_feature(feature, drive.file, snapname)
        for drive in volumes_of(values)
    )


def section_of(conf: VmConf, name: str) -> dict[str, str]:
    if name not in conf.snapshots:
        raise die(f"snapshot '{name}' does not exist")
    return conf.snapshots[name]


async def create(
    site: Site,
    node: LabNode,
    vmid: int,
    name: str,
    description: str = "",
    task: Task | None = None,
) -> None:
    """Take a snapshot of every volume, without memory."""
    done: set[str] = set()
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        if conf.values.get("template") == "1":
            raise die("you can't take a snapshot if it's a template")
        check_lock(conf)
        if name in conf.snapshots:
            raise die(f"snapshot name '{name}' already used")
        if not has_feature(node, conf.values, "snapshot"):
            raise die("snapshot feature is not available")
        site.faults.require_quorum()
        for body in conf.snapshots.values():
            if body.get("parent") == name:
                del body["parent"]
        section = _copied(conf.values)
        section |= {"snapstate": "prepare", "snaptime": str(int(time.time()))}
        if description:
            section["description"] = description
        conf.snapshots[name] = section
        conf.values["lock"] = "snapshot"
        site.save(node, vmid, conf)
    try:
        for drive in volumes_of(section):
            _log(task, f"snapshotting 'drive-{drive.key}' ({drive.file})")
            await _take(site, node, vmid, drive, name, task)
            done.add(drive.key)
    except ApiError as error:
        _log(task, "snapshot create failed: starting cleanup")
        await _delete(site, node, vmid, name, task, force=True, done=done)
        raise die(error.message) from error
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        if conf.values.get("lock") != "snapshot":
            raise die("missing snapshot lock")
        section = section_of(conf, name)
        if section.pop("snapstate", "") != "prepare":
            raise die("wrong snapshot state")
        del conf.values["lock"]
        conf.values["parent"] = name
        site.save(node, vmid, conf)


async def delete(
    site: Site,
    node: LabNode,
    vmid: int,
    name: str,
    *,
    force: bool = False,
    task: Task | None = None,
) -> None:
    """Delete a snapshot; its children become its parent's."""
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        section_of(conf, name)
        check_lock(conf)
        site.faults.require_quorum()
        conf.values["lock"] = "snapshot-delete"
        site.save(node, vmid, conf)
    await _delete(site, node, vmid, name, task, force=force)


async def _delete(
    site: Site,
    node: LabNode,
    vmid: int,
    name: str,
    task: Task | None,
    *,
    force: bool,
    done: set[str] | None = None,
) -> None:
    """The part both know: ``done`` are the drives of a snapshot that failed."""
    expected = "snapshot-delete" if done is None else "snapshot"
    async with site.lock_config(vmid):
        conf = _locked(site, node, vmid, expected)
        if conf.values.get("template") == "1":
            raise die("you can't delete a snapshot if vm is a template")
        section = section_of(conf, name)
        section["snapstate"] = "delete"
        site.save(node, vmid, conf)
    freed = []
    for drive in volumes_of(section):
        if done is None or drive.key in done:
            try:
                await _drop(site, node, vmid, drive, name, task)
                freed.append(drive.file)
            except ApiError as error:
                if not force:
                    raise
                _log(task, error.message)
        if not force:
            async with site.lock_config(vmid):
                conf = _locked(site, node, vmid, expected)
                left = section_of(conf, name)
                left.pop(drive.key, None)
                add_unused(left, drive.file)
                site.save(node, vmid, conf)
    async with site.lock_config(vmid):
        conf = _locked(site, node, vmid, expected)
        parent = section_of(conf, name).get("parent")
        del conf.snapshots[name]
        for body in (conf.values, *conf.snapshots.values()):
            if body.get("parent") == name:
                del body["parent"]
                if parent:
                    body["parent"] = parent
        del conf.values["lock"]
        for volid in freed:
            add_unused(conf.values, volid)  # written only where nothing uses it
        site.save(node, vmid, conf)


async def rollback(
    site: Site, node: LabNode, vmid: int, name: str, task: Task | None = None
) -> None:
    """Stop the VM, put the volumes back, then the configuration.

    Of the configuration before only the description and ``unusedN`` stay.
    """
    async with site.lock_config(vmid):
        conf = site.load(node, vmid)
        section = _to_go_back_to(conf, name)
        check_lock(conf)
        await site.machine(vmid, node).quit()
        site.faults.require_quorum()
        conf.values["lock"] = "rollback"
        site.save(node, vmid, conf)
    for drive in volumes_of(section):
        storage = node.storage_of(drive.file)
        if storage.format(drive.file) != "qcow2":
            raise die("can't rollback snapshot this image format")
        await _qemu_img(site, task, "snapshot", "-a", name, storage.path(drive.file))
    async with site.lock_config(vmid):
        conf = _locked(site, node, vmid, "rollback")
        section = _to_go_back_to(conf, name)
        held = {drive.file for drive in volumes_of(section)}
        for drive in volumes_of(conf.values):
            if drive.file not in held:
                add_unused(conf.values, drive.file)
        kept = {
            key: value
            for key, value in conf.values.items()
            if key == "description" or UNUSED.fullmatch(key)
        }
        conf.values = {**kept, **_copied(section), "parent": name}
        if "vmgenid" in conf.values:
            conf.values["vmgenid"] = str(uuid.uuid4())
        site.save(node, vmid, conf)


def _to_go_back_to(conf: VmConf, name: str) -> dict[str, str]:
    if conf.values.get("template") == "1":
        raise die("you can't rollback if vm is a template")
    section = section_of(conf, name)
    if state := section.get("snapstate"):
        raise die(f"unable to rollback to incomplete snapshot (snapstate = {state})")
    return section


def _copied(values: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in values.items()
        if key not in NOT_COPIED and not UNUSED.fullmatch(key)
    }


def _locked(site: Site, node: LabNode, vmid: int, lock: str) -> VmConf:
    conf = site.load(node, vmid)
    if conf.values.get("lock") != lock:
        if lock == "rollback":
            raise die("got wrong lock")
        raise die(f"encountered invalid lock, expected '{lock}'")
    return conf


async def _take(
    site: Site, node: LabNode, vmid: int, drive: Drive, name: str, task: Task | None
) -> None:
    machine = site.machine(vmid, node)
    if machine.running and drive.key != "tpmstate0":
        _log(task, "internal qemu snapshot")
        await _monitor(site, node, vmid, "blockdev-snapshot-internal-sync", drive, name)
        return
    storage = node.storage_of(drive.file)
    if storage.format(drive.file) != "qcow2":
        raise die("can't snapshot this image format")
    await _qemu_img(site, task, "snapshot", "-c", name, storage.path(drive.file))


async def _drop(
    site: Site, node: LabNode, vmid: int, drive: Drive, name: str, task: Task | None
) -> None:
    machine = site.machine(vmid, node)
    storage = node.storage_of(drive.file)
    if machine.running:
        for attached in volumes_of(site.load(node, vmid).values):
            if attached.file == drive.file and attached.key != "tpmstate0":
                command = "blockdev-snapshot-delete-internal-sync"
                await _monitor(site, node, vmid, command, attached, name)
                return
    if storage.format(drive.file) != "qcow2":
        raise die("can't delete snapshot for this image format")
    await _qemu_img(site, task, "snapshot", "-d", name, storage.path(drive.file))


async def _monitor(
    site: Site, node: LabNode, vmid: int, command: str, drive: Drive, name: str
) -> None:
    machine = site.machine(vmid, node)
    try:
        await machine.qmp(command, device=f"drive-{drive.key}", name=name)
    except QmpRefused as error:
        raise die(f"VM {vmid} qmp command '{command}' failed - {error}") from error
    except TimeoutError:
        raise die(f"VM {vmid} qmp command '{command}' failed - got timeout") from None


async def _qemu_img(site: Site, task: Task | None, *words: str) -> None:
    """Run qemu-img as PVE does: its words go into the task's log.

    Raises:
        ApiError: with no more than PVE says, the command and its exit code.
    """
    done = await asyncio.to_thread(
        subprocess.run, (site.qemu_img, *words), capture_output=True, text=True
    )
    for line in (done.stdout + done.stderr).splitlines():
        _log(task, line)
    if done.returncode:
        raise die(
            f"command '/usr/bin/qemu-img {' '.join(words)}' failed: "
            f"exit code {done.returncode}"
        )


def _log(task: Task | None, text: str) -> None:
    if task:
        task.log(text)
