# SPDX-License-Identifier: Apache-2.0
"""Disks plugged into, unplugged from and changed under a running VM."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from .cmdline import (
    blockdev,
    controller,
    controller_device,
    disk_device,
    legacy_drive,
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


async def throttle(machine: Machine, drive: Drive) -> None:
    """Let the limits of a running VM's disk be those of ``drive``."""
    limits = throttle_group(drive)["limits"]
    assert isinstance(limits, dict)
    every = dict.fromkeys(
        f"{unit}-{kind}{peak}"
        for unit in ("bps", "iops")
        for kind in ("total", "read", "write")
        for peak in ("", "-max")
    )
    value = {name: limits.get(name, 0) for name in every}
    try:
        if machine.modern:
            await machine.qmp(
                "qom-set",
                path=f"throttle-drive-{drive.key}",
                property="limits",
                value=value,
            )
        else:
            names = {"total": "", "read": "_rd", "write": "_wr"}
            arguments = {}
            for name, number in value.items():
                unit, kind, *peak = name.split("-")
                arguments[f"{unit}{names[kind]}{'_max' if peak else ''}"] = number
            command = {"device": f"drive-{drive.key}", **arguments}
            await machine.batch([_command("block_set_io_throttle", command)])
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


def _command(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"execute": name, "arguments": arguments}


def _object(kind: str, ident: str) -> dict[str, Any]:
    return _command("object-add", {"qom-type": kind, "id": ident})
