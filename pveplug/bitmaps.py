# SPDX-License-Identifier: Apache-2.0
"""The segments a VM's disks carry, for the administrator: looked at and removed.

A running VM is asked over QMP. A stopped one's qcow2 images are asked by ``qemu-img
info`` and relieved by ``qemu-img bitmap --remove``: what keeps Proxmox VE from rolling
such a VM back, or QEMU from resizing its disks, is found and removed where the VM
can't help. Bitmaps whose names don't begin with ``ph-`` are nobody's business here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pveplug.blockgraph import find_disks
from pveplug.cbt import PREFIX, Bitmap, Segment, parse_segment
from pveplug.cleanup import query_graph
from pveplug.errors import JobError, PveplugError
from pveplug.journal import own_vm
from pveplug.node import Node
from pveplug.pve_local import ProgramError, PveLocal, run
from pveplug.qmp import qmp_session
from pveplug.recovery import recover_vm
from pveplug.vmconfig import Drive, drives

_QEMU_IMG_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """A bitmap of ours on a disk."""

    vmid: int
    disk: str
    volume: str
    """Its volume id."""
    bitmap: Bitmap
    counted: bool
    """Whether ``bitmap.count`` is known; only QEMU knows it, and a VM that runs."""
    where: str
    """The block node of a running VM, the image's path of a stopped one."""

    @property
    def segment(self) -> Segment | None:
        """Its name taken apart; None for a name of ours that is no segment's."""
        return parse_segment(self.bitmap.name)

    @property
    def chain(self) -> str:
        """The chain it belongs to; empty when its name doesn't say."""
        return self.segment.chain if self.segment else ""

    @property
    def state(self) -> str:
        """``recording``, ``closed``, ``in use`` or ``inconsistent``, in one word."""
        if self.bitmap.inconsistent:
            return "inconsistent"
        if self.bitmap.busy:
            return "in use"
        return "recording" if self.bitmap.recording else "closed"


async def list_bitmaps(node: Node, local: PveLocal, vmid: int) -> list[Found]:
    """Return the bitmaps of ours on a VM's disks, oldest first on each disk.

    Raises:
        PveplugError: the VM is not there, or a disk of it can't be asked.
    """
    config = (await local.config(vmid)).values
    attached = {d.key: d for d in drives(config) if not d.is_cdrom and d.storage}
    async with _images(node, local, vmid, attached) as images:
        if images is None:
            return await _live(node, vmid, attached)
        return [
            found
            for key, path in images.items()
            for found in await _offline(node, vmid, attached[key], path)
        ]


async def drop_bitmaps(
    node: Node,
    local: PveLocal,
    vmid: int,
    chosen: Callable[[Found], bool],
    *,
    remark: Callable[[str], None],
) -> list[Found]:
    """Remove bitmaps of ours from a VM's disks; the VM is ours alone meanwhile.

    Args:
        remark: told what a dead job had left, which is cleared up first.

    Returns: what was removed.

    Raises:
        JobError: a job of ours works on the VM.
        PveplugError: not all could be removed. A running VM then still has all; of a
            stopped one's disk, only the oldest may be gone, which no job mistakes.
    """
    async with own_vm(node.state_dir, vmid, 0) as fd:
        with local.keeping(fd):
            for line in await recover_vm(node, local, vmid):
                remark(f"after a job that was cut off: {line}")
            found = [
                one for one in await list_bitmaps(node, local, vmid) if chosen(one)
            ]
            if busy := [one for one in found if one.bitmap.busy]:
                raise JobError(
                    f"bitmap {busy[0].bitmap.name} is in use by QEMU.",
                    vm=str(vmid),
                    disk=busy[0].disk,
                    phase="bitmaps",
                    remedy="try again when the migration or backup has ended.",
                )
            if not found:
                return []
            if local.vm_running(vmid) is not None:
                await _remove_live(node, vmid, found)
            else:
                await _remove_offline(node, local, vmid, found)
            return found


async def _live(node: Node, vmid: int, attached: Mapping[str, Drive]) -> list[Found]:
    async with qmp_session(node.qmp_socket(vmid)) as qmp:
        graph = await query_graph(qmp)
    disks = find_disks(graph, {key: drive.file for key, drive in attached.items()})
    found = []
    for key, disk in disks.items():
        carried = [(disk.image, b) for b in disk.image_bitmaps]
        if disk.top != disk.image:
            carried += [(disk.top, b) for b in disk.bitmaps]
        found += [
            Found(vmid, key, attached[key].file, bitmap, True, where)
            for where, bitmap in sorted(carried, key=lambda one: _age(one[1]))
            if bitmap.name.startswith(PREFIX)
        ]
    return found


def _age(bitmap: Bitmap) -> tuple[int, str]:
    segment = parse_segment(bitmap.name)
    return segment.seq if segment else -1, bitmap.name


@contextlib.asynccontextmanager
async def _images(
    node: Node, local: PveLocal, vmid: int, attached: Mapping[str, Drive]
) -> AsyncIterator[dict[str, str] | None]:
    """Yield the paths of a stopped VM's qcow2 images, activated; None: it runs."""
    if local.vm_running(vmid) is not None:
        yield None
        return
    paths = {}
    async with contextlib.AsyncExitStack() as stack:
        for key, drive in attached.items():
            if drive.format != "qcow2":
                continue
            if await local.activate(drive.file):
                stack.push_async_callback(_deactivate, local, vmid, drive.file)
            paths[key] = await local.volume_path(drive.file)
        yield paths


async def _deactivate(local: PveLocal, vmid: int, volid: str) -> None:
    if local.vm_running(vmid) is None:
        await local.deactivate(volid)


async def _offline(node: Node, vmid: int, drive: Drive, path: str) -> list[Found]:
    # -U: a look only; somebody may have the image open.
    argv = [node.qemu_img, "info", "-U", "-f", "qcow2", "--output=json", path]
    text = await run(argv, timeout_s=_QEMU_IMG_S)
    found = [
        Found(vmid, drive.key, drive.file, bitmap, False, path)
        for bitmap in bitmaps_of_info(text, argv)
        if bitmap.name.startswith(PREFIX)
    ]
    return sorted(found, key=lambda one: _age(one.bitmap))


def bitmaps_of_info(text: str, argv: list[str]) -> list[Bitmap]:
    """Return the bitmaps in what ``qemu-img info --output=json`` says of a qcow2 image.

    Raises:
        ProgramError: it isn't what qemu-img says.
    """
    try:
        details: Any = json.loads(text)["format-specific"]["data"]
        return [
            Bitmap(
                name=str(row["name"]),
                recording="auto" in row["flags"] and "in-use" not in row["flags"],
                inconsistent="in-use" in row["flags"],
                granularity=int(row["granularity"]),
                persistent=True,
            )
            for row in details.get("bitmaps", [])
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProgramError(
            argv, 0, f"what it printed is not understood: {error}"
        ) from error


async def _remove_live(node: Node, vmid: int, found: list[Found]) -> None:
    async with qmp_session(node.qmp_socket(vmid)) as qmp:
        await qmp.transaction(
            [
                (
                    "block-dirty-bitmap-remove",
                    {"node": one.where, "name": one.bitmap.name},
                )
                for one in found
            ]
        )


async def _remove_offline(
    node: Node, local: PveLocal, vmid: int, found: list[Found]
) -> None:
    config = (await local.config(vmid)).values
    keys = {one.disk for one in found}
    attached = {drive.key: drive for drive in drives(config) if drive.key in keys}
    async with _images(node, local, vmid, attached) as images:
        for one in found:
            if images is None or images.get(one.disk) != one.where:
                raise JobError(
                    "the VM was started or changed meanwhile.",
                    vm=str(vmid),
                    disk=one.disk,
                    phase="bitmaps",
                    remedy="run the command again.",
                )
            name, path = one.bitmap.name, one.where
            argv = [node.qemu_img, "bitmap", "--remove", "-f", "qcow2", path, name]
            try:
                await run(argv, timeout_s=_QEMU_IMG_S)
            except PveplugError as error:
                raise JobError(
                    f"{error}.",
                    vm=str(vmid),
                    disk=one.disk,
                    phase="bitmaps",
                    remedy="see who has the image open (a VM that was just started?), "
                    "then run the command again.",
                ) from error
