# SPDX-License-Identifier: Apache-2.0
"""Disks plugged into, unplugged from and moved under a running VM."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .cmdline import (
    Volume,
    blockdev,
    controller,
    controller_device,
    disk_device,
    legacy_drive,
    node_hash,
    throttle_group,
)
from .deviations import adapt_node
from .errors import die
from .relay import QmpRefused
from .vmconfig import Drive, VmConf

if TYPE_CHECKING:
    from .qemu import Machine


def _options(text: str) -> dict[str, Any]:
    """``-device`` text as ``device_add`` arguments."""
    driver, _, rest = text.partition(",")
    result: dict[str, Any] = {"driver": driver}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        number = key in ("lun", "scsi-id", "channel", "bootindex", "rotation_rate")
        result[key] = int(value) if number else value
    return result


async def plug(machine: Machine, conf: VmConf, drive: Drive) -> None:
    """Add a disk to the running VM, with its controller where it has its own."""
    storage = machine.node.storage_of(drive.file)
    await asyncio.to_thread(storage.activate, drive.file)
    machine.activated(drive.file)
    volume = machine.resolve(drive)
    commands: list[dict[str, Any]] = []
    iothread = drive.options.get("iothread") == "1"
    single = conf.values.get("scsihw") == "virtio-scsi-single"
    if drive.interface == "scsi":
        bus, _, _ = controller(drive, conf, machine.context())
        listed = await machine.qmp("qom-list", path="/machine/peripheral")
        if bus not in {item["name"] for item in listed}:
            if iothread and single:
                commands.append(_object("iothread", f"iothread-{bus}"))
            text = controller_device(drive, conf)
            commands.append(_command("device_add", _options(text)))
    elif iothread:
        commands.append(_object("iothread", f"iothread-{drive.key}"))
    if machine.modern:
        group = throttle_group(drive)
        commands.append(_command("object-add", group))
        node = adapt_node(blockdev(drive, volume), machine.bench())
        commands.append(_command("blockdev-add", node))
    else:
        text = legacy_drive(drive, volume)
        for aio in ("io_uring", "native"):
            text = text.replace(f"aio={aio}", "aio=threads")
        if not machine.bench().direct_io:
            text = text.replace("cache=none", "cache=writeback")
        text += ",file.locking=off"
        commands.append(
            _command(
                "human-monitor-command",
                {"command-line": f'drive_add auto "{text}"'},
            )
        )
    text = disk_device(
        drive, conf, machine.context(), modern=machine.modern, bootindex=None
    )
    commands.append(_command("device_add", _options(text)))
    try:
        await machine.batch(commands)
    except QmpRefused as error:
        raise die(f"hotplug problem - {error}") from error


async def unplug(machine: Machine, conf: VmConf, drive: Drive) -> None:
    """Take a SCSI disk out of the running VM."""
    try:
        await machine.qmp("device_del", id=drive.key)
        for _ in range(50):
            listed = await machine.qmp("qom-list", path="/machine/peripheral")
            if drive.key not in {item["name"] for item in listed}:
                break
            await asyncio.sleep(0.1)
        else:
            raise die(f"hotplug problem - error on hot-unplugging device '{drive.key}'")
        if machine.modern:
            await _delete_node(machine, f"drive-{drive.key}")
            await machine.qmp("object-del", id=f"throttle-drive-{drive.key}")
        else:
            await machine.hmp(f"drive_del drive-{drive.key}")
    except QmpRefused as error:
        raise die(f"hotplug problem - {error}") from error


async def _delete_node(machine: Machine, name: str) -> None:
    """Delete a node; its device may let go of it a moment after it is gone."""
    for _ in range(50):
        try:
            await machine.qmp("blockdev-del", node_name=name)
        except QmpRefused as error:
            if "in use" not in str(error):
                raise
            refused = error
            await asyncio.sleep(0.1)
        else:
            return
    raise refused


async def mirror(
    machine: Machine,
    drive: Drive,
    target: Drive,
    volume: Volume,
    *,
    below: str | None = None,
) -> None:
    """Move a running VM's disk to another volume by ``blockdev-mirror``.

    Args:
        below: the node below the throttle node, where it isn't the format node.
    """
    node = adapt_node(blockdev(target, volume), machine.bench())["file"]
    replaced: dict[str, Any] = {}
    if machine.modern:
        # The copy takes the place of the format node, below the throttle node.
        replaced["replaces"] = below or await format_node(machine, drive)
    job = f"mirror-{drive.key}"
    await machine.qmp("blockdev-add", **_underscored(node))
    try:
        await machine.qmp(
            "blockdev-mirror",
            job_id=job, device=f"drive-{drive.key}", target=node["node-name"],
            sync="full", **replaced,
        )  # fmt: skip
        await _finish(machine, job)
    except BaseException:
        await machine.qmp("blockdev-del", node_name=node["node-name"])
        raise
    if machine.modern:
        # Part of the -blockdev it came with, it is gone with its last user.
        with contextlib.suppress(QmpRefused):
            await machine.qmp("blockdev-del", node_name=replaced["replaces"])


async def _finish(machine: Machine, job: str) -> None:
    completing = False
    while True:
        jobs = await machine.qmp("query-block-jobs")
        mine = [j for j in jobs if j["device"] == job]
        if not mine:
            if completing:
                return
            raise die(f"mirroring error: {job}: job ended unexpectedly")
        if mine[0].get("io-status", "ok") != "ok":
            await machine.qmp("block-job-cancel", device=job, force=True)
            raise die(f"mirroring error: {job}: io-status {mine[0]['io-status']}")
        if mine[0].get("ready") and not completing:
            await machine.qmp("job-complete", id=job)
            completing = True
        await asyncio.sleep(0.2)


async def format_node(machine: Machine, drive: Drive) -> str:
    """The node below the throttle node of a disk."""
    nodes = await machine.qmp("query-named-block-nodes", flat=True)
    for wanted in (f"f{node_hash(drive)}",):
        if any(n["node-name"] == wanted for n in nodes):
            return wanted
    raise die(f"could not find the format node of drive-{drive.key}")


def _command(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"execute": name, "arguments": arguments}


def _object(kind: str, ident: str) -> dict[str, Any]:
    return _command("object-add", {"qom-type": kind, "id": ident})


def _underscored(node: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in node.items()}
