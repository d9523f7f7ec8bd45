# SPDX-License-Identifier: Apache-2.0
"""``move_disk``: a disk copied to another storage, under a running guest by a mirror.

The way and the texts are PVE's. ``lock_config`` is held from the first byte to the
last, no ``lock:`` is set, ``protection`` is not asked: the old volume is freed with it
set. What ends the worker without a word (``tasks.Killed``) leaves the block job in
QEMU, the new volume and the old configuration; the next attempt fails on that job's
name, ends the job, and leaves it to the one after to move the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cmdline import Volume, blockdev
from .configops import check_digest, check_lock, human_size
from .deviations import adapt_node
from .errors import ApiError, bad_params, die
from .relay import QmpRefused
from .storage import Storage, copy_image
from .tasks import Killed, Task
from .vmconfig import DRIVE, UNUSED, Drive, VmConf, add_unused, drives_of

if TYPE_CHECKING:
    from .qemu import Machine
    from .site import LabNode, Site

POLL_S = 0.2
"""PVE looks once a second."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What ``move_disk`` was asked to do."""

    key: str
    storage: str
    format: str | None = None
    delete: bool = False
    digest: str | None = None
    bwlimit: int | None = None
    """KiB/s; 0 is no limit."""


def check(
    site: Site, node: LabNode, vmid: int, wanted: Wanted
) -> tuple[VmConf, Drive, bool]:
    """What PVE checks before the task, and again in it.

    Returns: the configuration, the drive, and whether a snapshot holds its volume.
    """
    conf = site.load(node, vmid)
    check_lock(conf)
    check_digest(conf, wanted.digest)
    key = wanted.key
    if not DRIVE.fullmatch(key) and not UNUSED.fullmatch(key):
        raise bad_params(disk=f"value '{key}' does not have a value in the enumeration")
    if key not in conf.values:
        raise die(f"disk '{key}' does not exist")
    if UNUSED.fullmatch(key):
        raise die("the lab moves no unused disks")
    drive = Drive.parse(key, conf.values[key])
    if drive.cdrom:
        raise die("you can't move a cdrom")
    source = node.storage_of(drive.file)
    same = wanted.format in (None, source.format(drive.file))
    if source.name == wanted.storage and same:
        raise die("you can't move to the same storage with same format")
    if wanted.storage not in node.storages:
        raise die(f"storage '{wanted.storage}' does not exist")
    target = node.storages[wanted.storage]
    if not target.enabled:
        raise die(f"storage '{target.name}' is disabled")
    if "images" not in target.content.split(","):
        raise bad_params(storage=f"storage '{target.name}' does not support vm images")
    snapshotted = any(
        drive.file == other.file
        for body in conf.snapshots.values()
        for other in drives_of(body)
    )
    if snapshotted and wanted.delete:
        raise die("you can't move a disk with snapshots and delete the source")
    return conf, drive, snapshotted


async def move_disk(
    site: Site, node: LabNode, vmid: int, wanted: Wanted, task: Task
) -> None:
    """Copy a disk to another storage and use it from then on."""
    async with site.lock_config(vmid):
        conf, drive, snapshotted = check(site, node, vmid, wanted)
        source, target = node.storage_of(drive.file), node.storages[wanted.storage]
        task.log(
            f"copying volume '{drive.file}' from current storage '{source.name}' to "
            f"target storage '{target.name}'"
        )
        made: list[str] = []
        try:
            if snapshotted:
                task.log("moving disk with snapshots, snapshots will not be moved!")
            moved = await _copied(site, node, vmid, drive, wanted, made, task)
            conf.values[drive.key] = str(moved)
            if not wanted.delete:
                unused = add_unused(conf.values, drive.file)
                task.log(f"adding source volume '{drive.file}' as '{unused}' to config")
            site.faults.require_quorum()
            site.save(node, vmid, conf)
        except Killed:
            raise
        except BaseException as error:
            for volid in made:
                with contextlib.suppress(ApiError):
                    node.storage_of(volid).free(volid)
            raise die(f"storage migration failed: {_text(error)}") from error
        if wanted.delete:
            task.log(f"removing source volume '{drive.file}' after successful copy")
            try:
                await asyncio.to_thread(source.deactivate, drive.file)
                await asyncio.to_thread(source.free, drive.file)
            except ApiError as error:
                task.log(error.message)


def _text(error: BaseException) -> str:
    if isinstance(error, ApiError):
        return error.message
    if isinstance(error, asyncio.CancelledError):
        return "interrupted by signal"
    return " ".join(str(error).split()) or type(error).__name__


def _format(storage: Storage, hint: str) -> str:
    """The format a storage takes for the wanted one: its default if it hasn't it."""
    return hint if hint in storage.formats else "raw"


async def _copied(
    site: Site,
    node: LabNode,
    vmid: int,
    drive: Drive,
    wanted: Wanted,
    made: list[str],
    task: Task,
) -> Drive:
    """Allocate the new volume (noted in ``made``) and fill it; return the new drive."""
    source, target = node.storage_of(drive.file), node.storages[wanted.storage]
    machine = site.machine(vmid, node)
    running = machine.running
    await asyncio.to_thread(source.activate, drive.file)
    if running and drive.key == "tpmstate0":
        raise die("cannot move TPM state while VM is running")
    task.log(f"create full clone of drive {drive.key} ({drive.file})")
    have = source.format(drive.file)
    fmt = _format(target, wanted.format or have)
    if wanted.format not in (None, fmt):
        task.log(
            f"format '{wanted.format}' is not supported by the target storage "
            f"'{target.name}' - using '{fmt}' instead"
        )
    size = await asyncio.to_thread(source.size, drive.file)
    volid = await asyncio.to_thread(target.alloc, vmid, None, size, fmt)
    made.append(volid)
    task.log(f"allocated target volume '{volid}'")
    await asyncio.to_thread(target.activate, volid)
    moved = Drive(drive.key, volid, {**drive.options})
    moved.options.pop("format", None)
    if running:
        machine.activated(volid)
        await mirror(
            machine, drive, moved, machine.resolve(moved),
            bwlimit=wanted.bwlimit, log=task.log,
        )  # fmt: skip
    else:
        await asyncio.to_thread(
            copy_image, site.qemu_img, source.file(drive.file), have,
            target.file(volid), fmt,
        )  # fmt: skip
        await asyncio.to_thread(target.deactivate, volid)
    moved.options["size"] = human_size(await asyncio.to_thread(target.size, volid))
    return moved


# -- block jobs


@dataclass(slots=True)
class _Job:
    """A mirror: its id, and the nodes to take away when it is over."""

    ident: str
    source: str | None = None
    target: str | None = None
    switched: bool = False


Log = Callable[[str], None]


async def _mon(machine: Machine, command: str, **arguments: Any) -> Any:
    try:
        return await machine.qmp(command, **arguments)
    except (QmpRefused, TimeoutError, ConnectionError) as error:
        said = "got timeout" if isinstance(error, TimeoutError) else str(error)
        raise die(
            f"VM {machine.vmid} qmp command '{command}' failed - {said}"
        ) from error


async def mirror(
    machine: Machine,
    drive: Drive,
    target: Drive,
    volume: Volume,
    *,
    bwlimit: int | None = None,
    log: Log = lambda text: None,
) -> None:
    """Move a running VM's disk to another volume, as its layout needs it.

    Raises:
        ApiError: with PVE's text; QEMU and the guest are on the old volume.
    """
    node = adapt_node(blockdev(target, volume), machine.bench())["file"]
    if node["driver"] != "raw":
        node.pop("size", None)
    common: dict[str, Any] = {
        "device": f"drive-{drive.key}",
        "sync": "full",
        "auto_dismiss": False,
    }
    limited = ""
    if bwlimit is not None:
        common["speed"] = bwlimit * 1024
        limited = f" with bandwidth limit: {bwlimit} KiB/s"
    if machine.modern:
        # The copy takes the place of the node below the throttle node.
        below = await _below_throttle(machine, drive)
        job = _Job(f"mirror-{drive.key}", below, node["node-name"])
        await _mon(machine, "blockdev-add", **_underscored(node))
        log(f"drive mirror is starting for drive-{drive.key}{limited}")
        try:
            await _mon(
                machine, "blockdev-mirror",
                job_id=job.ident, target=job.target, replaces=below, **common,
            )  # fmt: skip
        except ApiError as error:
            await _cancel(machine, job, log)
            with contextlib.suppress(ApiError):
                await _detach(machine, node["node-name"])
            raise die(f"error starting blockdev mirrror - {error.message}") from error
    else:
        job = _Job(f"drive-{drive.key}")
        log(f"drive mirror is starting for drive-{drive.key}{limited}")
        try:
            await _mon(
                machine, "drive-mirror",
                target=_as_filename(node), mode="existing", format=volume.format,
                **common,
            )  # fmt: skip
        except ApiError as error:
            await _cancel(machine, job, log)
            raise die(f"mirroring error: {error.message}") from error
    try:
        await _monitor(machine, job, log)
    except Killed:
        raise
    except BaseException as error:
        with contextlib.suppress(ApiError):
            await _cancel(machine, job, log)
        raise die(f"block job (mirror) error: {_text(error)}") from error


def _as_filename(node: dict[str, Any]) -> str:
    """What ``drive-mirror`` can open without locking it: see ``deviations``."""
    protocol = {key: node["file"][key] for key in ("driver", "filename", "locking")}
    return "json:" + json.dumps({"driver": node["driver"], "file": protocol})


async def _monitor(machine: Machine, job: _Job, log: Log) -> None:
    """See a mirror through, and switch to its target when it is ready."""
    started, said, tries, was_ready = time.monotonic(), 0.0, 0, False
    while True:
        found = await _job(machine, job)
        if found is None:
            if not job.switched:
                raise die(f"{job.ident}: 'mirror' has been cancelled")
            log(f"{job.ident}: mirror-job finished")
            return
        if found["status"] == "concluded":
            await _concluded(machine, job, found, log, cancelled=False)
        ready = bool(found["ready"])
        now = time.monotonic()
        if found["len"] and not was_ready and (ready or now >= said + 1):
            said, was_ready = now, ready
            share = 100 * found["offset"] / found["len"]
            log(
                f"{job.ident}: transferred {_bytes(found['offset'])} of "
                f"{_bytes(found['len'])} ({share:.2f}%) in {now - started:.0f}s"
                f"{', ready' if ready else ''}"
            )
        if ready:
            log("all 'mirror' jobs are ready")
            log(f"{job.ident}: Completing block job...")
            try:
                await _mon(machine, "job-complete", id=job.ident)
            except ApiError as error:
                if "cannot be completed" not in error.message:
                    raise die(
                        f"{job.ident}: block job cannot be completed - {error.message}"
                    ) from error
                tries += 1
                if tries > 300:
                    raise die("block job ('mirror') timed out") from error
                log(f"{job.ident}: block job cannot be completed, trying again.")
            else:
                log(f"{job.ident}: Completed successfully.")
                job.switched = True
        await asyncio.sleep(POLL_S)


async def _cancel(machine: Machine, job: _Job, log: Log) -> None:
    """End a job and wait until it is gone, however long its requests take."""
    log(f"{job.ident}: Cancelling block job")
    with contextlib.suppress(ApiError):
        await _mon(machine, "block-job-cancel", device=job.ident)
    while (found := await _job(machine, job)) is not None:
        if found["status"] == "concluded":
            with contextlib.suppress(ApiError):
                await _concluded(machine, job, found, log, cancelled=True)
        await asyncio.sleep(POLL_S)
    log(f"{job.ident}: Done.")


async def _job(machine: Machine, job: _Job) -> dict[str, Any] | None:
    jobs = await _mon(machine, "query-block-jobs")
    return next((found for found in jobs if found["device"] == job.ident), None)


async def _concluded(
    machine: Machine, job: _Job, found: dict[str, Any], log: Log, *, cancelled: bool
) -> None:
    """Dismiss a job that is over, and take away the node nobody uses any more."""
    with contextlib.suppress(ApiError):
        await _mon(machine, "job-dismiss", id=job.ident)
    error = found.get("error")
    left = job.target if error or cancelled else job.source if job.switched else None
    if left:
        try:
            await _detach(machine, left)
        except ApiError as problem:
            log(f"WARN: {problem.message}")
    if error:
        state = found.get("io-status", "ok")
        raise die(f"{job.ident}: {error} (io-status: {state})")


async def _children(machine: Machine) -> dict[str, list[tuple[str, str]]]:
    """Node name -> (role, name) of each child; stock QEMU 10.0 tells it here only."""
    graph = await _mon(machine, "x-debug-query-block-graph")
    names = {n["id"]: n["name"] for n in graph["nodes"] if n["type"] == "block-driver"}
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names.values()}
    for edge in graph["edges"]:
        if edge["parent"] in names and edge["child"] in names:
            pair = (edge["name"], names[edge["child"]])
            found[names[edge["parent"]]].append(pair)
    return found


async def _below_throttle(machine: Machine, drive: Drive) -> str:
    top = f"drive-{drive.key}"
    children = await _children(machine)
    if top not in children:
        raise die(f"no block node found for drive '{top}'")
    for role, name in children[top]:
        if role == "file":
            return name
    raise die(f"{top}: throttle node without file child node name!")


async def _detach(machine: Machine, node: str) -> None:
    """Delete a node and its children, as far as they are still there."""
    children, queue = await _children(machine), [node]
    while queue:
        name = queue.pop(0)
        if name not in children:
            continue
        try:
            await machine.qmp("blockdev-del", node_name=name)
        except QmpRefused as error:
            if "Failed to find node with node-name" in str(error):
                continue
            raise die(f"deleting blockdev '{name}' failed : {error}") from error
        queue += [to for role, to in children[name] if role in ("file", "backing")]


def _bytes(count: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count:.1f} B"


def _underscored(node: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in node.items()}
