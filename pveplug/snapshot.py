# SPDX-License-Identifier: Apache-2.0
"""The point in time of all disks of a running VM.

Two mechanisms behind one interface, chosen by QEMU's version:

*cbw* (QEMU >= 10.0)::

    guest ── throttle ── copy-before-write ── image
                           │   old data before it is overwritten
                           └──────────────► scratch  (holds the union bitmap)
                       snapshot-access ◄── reads: scratch where copied, else image

A full or slow scratch store breaks the *backup* (``break-snapshot``, ``cbw-timeout``),
never the guest. Freed by TRIM as we read.

*fleece* (older): ``blockdev-backup sync=none`` into a scratch qcow2 that has the image
as its backing file. There a full scratch fails the *guest's write*, so its room is
reserved before the switch, and whoever uses it must watch the scratch store
(``pveplug.scratch``).

The calls come in this order; only ``switch`` needs the guest frozen::

    prepare()   left-overs removed, segments planned, scratch and filters added
    switch()    one instant for all disks: new segments, filters in, old segments off
    publish()   unions merged, exports opened, history folded
    close()     everything taken out again, from names alone

Sequences, and why their order may not be changed: docs/cbt.md.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from pveplug import cbt
from pveplug.blockgraph import (
    MARKER,
    DiskNode,
    Graph,
    export_id,
    find_disks,
    fleece_job,
    node_names,
)
from pveplug.cleanup import clean_up, query_graph
from pveplug.errors import ConfigError, IntegrityError, QmpError
from pveplug.qmp import VmGoneError, qmp_session
from pveplug.units import CLUSTER, GiB

log = logging.getLogger(__name__)

Mechanism = Literal["cbw", "fleece"]
CBW_SINCE: Final = (10, 0, 0)
IOTHREAD_SINCE: Final = (8, 0, 0)
UNTIL_SWITCH: Final = GiB
"""What the guest may write anew between the count and the switch, freeze included."""


@dataclass(frozen=True, slots=True)
class ScratchFile:
    """A scratch image that was just made, of exactly the size asked for."""

    path: str
    format: Literal["qcow2", "raw"]
    driver: Literal["file", "host_device"]


class Scratch(Protocol):
    """Where scratch images come from."""

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        """Make an image of ``size`` bytes.

        Args:
            backing: it must be able to have a backing file.
            data: bytes that must find room in it whatever else is written there.
        """

    async def remove(self) -> None:
        """Remove every image made; may be repeated."""


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """One disk of the point in time, ready to be read over NBD."""

    key: str
    size: int
    socket: str
    export: str
    mechanism: Mechanism
    plan: cbt.DiskPlan | None
    """None for a disk that is always read whole (EFI variables)."""
    context: str | None
    """The NBD meta context of what changed; None: everything is to be read."""
    trim: bool
    """Whether what has been read may be given back with NBD TRIM."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a point in time is taken."""

    mechanism: Literal["auto", "cbw", "fleece"] = "auto"
    cbw_timeout_s: int = 10
    """Below the 30 s after which guests' disk drivers give a request up."""
    cbt: bool = True
    homes: Mapping[str, str] = field(default_factory=dict)
    """disk key -> home: disks whose segments are to be persistent, if they can."""
    purpose: str = "bacula"


class PointInTime:
    """A point in time of a running VM; ``close`` it on every way out."""

    def __init__(
        self, qmp_path: str, nbd_socket: str, scratch: Scratch, options: Options
    ) -> None:
        self._qmp_path = qmp_path
        self._nbd_socket = nbd_socket
        self._scratch = scratch
        self._options = options
        self._disks: dict[str, DiskNode] = {}
        self._plans: dict[str, cbt.DiskPlan] = {}
        self._useless: list[tuple[str, str]] = []
        """(node, bitmap): what is removed as the new segments are added."""
        self.mechanism: Mechanism = "cbw"
        self.version = (0, 0, 0)
        self.missing: list[str] = []
        """Disks asked for which QEMU doesn't have."""
        self.persistent: list[str] = []
        """Disks whose segments are in their images."""
        self.notes: list[str] = []
        """What the job log should hear: left-overs, failed folds."""

    async def prepare(
        self, job: str, level: cbt.Level, volids: Mapping[str, str]
    ) -> None:
        """Get ready without touching the guest's I/O.

        Args:
            job: the running job's unique name.
            level: what Bacula asked for.
            volids: disk key -> volume id, from the VM's current configuration.

        Raises:
            TransportError: QEMU can't be reached.
            QmpError, IntegrityError, ConfigError: this VM can't be backed up so.
        """
        if found := await clean_up(self._qmp_path, self._nbd_socket):
            self.notes.append(
                f"removed what an earlier backup left behind: {', '.join(found)}"
            )
        graph = await self._inspect(volids)
        if graph.foreign_exports:
            raise IntegrityError(
                "QEMU's only NBD server is in use by another operation "
                f"({', '.join(graph.foreign_exports)}); wait for it to end"
            )
        self._plan(job, level)
        images = {
            key: await self._scratch.create(
                key,
                disk.size,
                backing=self._fleeced(disk),
                data=self._to_reserve(disk),
            )
            for key, disk in self._disks.items()
        }
        async with qmp_session(self._qmp_path) as qmp:
            for key, disk in self._disks.items():
                for node in self._nodes_to_add(disk, images[key]):
                    await qmp.execute("blockdev-add", node)

    def _plan(self, job: str, level: cbt.Level) -> None:
        tracked = {
            key: disk.tracked(self._home(disk))
            for key, disk in self._disks.items()
            if not disk.is_flash
        }
        self.persistent = [key for key, disk in tracked.items() if disk.home]
        purpose = self._options.purpose
        if not self._options.cbt:
            for key, disk in tracked.items():
                here, elsewhere = cbt.leftovers(
                    cbt.chain_id(job, purpose), disk, tracking=False
                )
                self._to_remove(key, here, elsewhere)
            return
        for key in tracked:
            if key in self._options.homes and key not in self.persistent:
                why = self._disks[key].volatile_because
                self.notes.append(f"{key}: change tracking ends with a stop: {why}")
        self._plans = cbt.plan(job, level, tracked, purpose=purpose, now=time.time())
        for key, plan in self._plans.items():
            self._to_remove(key, plan.drop, plan.drop_elsewhere)

    def _home(self, disk: DiskNode) -> str:
        if not self._options.cbt or disk.volatile_because:
            return ""
        return self._options.homes.get(disk.key, "")

    def _node(self, key: str) -> str:
        """Return the node that carries a disk's segments."""
        disk = self._disks[key]
        return disk.image if key in self.persistent else disk.top

    def _to_remove(
        self, key: str, here: Sequence[str], elsewhere: Sequence[str]
    ) -> None:
        disk, node = self._disks[key], self._node(key)
        other = disk.top if node == disk.image else disk.image
        self._useless += [(node, name) for name in here]
        self._useless += [(other, name) for name in elsewhere]

    async def _inspect(self, volids: Mapping[str, str]) -> Graph:
        async with qmp_session(self._qmp_path) as qmp:
            self.version = qmp.version
            graph = await query_graph(qmp)
        self.mechanism = self._choose(graph)
        self._disks = find_disks(graph, volids)
        self.missing = [key for key in volids if key not in self._disks]
        return graph

    def _choose(self, graph: Graph) -> Mechanism:
        version = ".".join(map(str, self.version))
        wanted = self._options.mechanism
        if wanted == "cbw" and self.version < CBW_SINCE:
            raise ConfigError(
                f"mechanism=cbw needs QEMU 10.0, this VM runs {version}; "
                "leave mechanism out",
                key="mechanism",
            )
        chosen: Mechanism = "fleece"
        if wanted == "cbw" or (wanted == "auto" and self.version >= CBW_SINCE):
            chosen = "cbw"
        if chosen == "fleece" and self.version < IOTHREAD_SINCE and graph.iothreads:
            raise IntegrityError(
                f"QEMU {version} aborts the VM when a backup reader disconnects from a "
                "disk with an iothread; remove iothread=1 or upgrade QEMU"
            )
        return chosen

    def _fleeced(self, disk: DiskNode) -> bool:
        # A flash drive can't get a filter while it runs; its few KiB are fleeced.
        return self.mechanism == "fleece" or disk.is_flash

    def _to_reserve(self, disk: DiskNode) -> int:
        """Return how much room a guest's writes may need for certain.

        All that holds data at the switch may be overwritten before it is read. A
        filter needs no certainty: there a full scratch store breaks the backup.
        """
        if not self._fleeced(disk):
            return 0
        return min(disk.data_at_most + UNTIL_SWITCH, disk.size)

    def _nodes_to_add(self, disk: DiskNode, image: ScratchFile) -> list[dict[str, Any]]:
        scratch, filter_, _ = node_names(disk.key)
        node: dict[str, Any] = {
            "driver": image.format,
            "node-name": scratch,
            "discard": "unmap",
            "file": {
                "driver": image.driver,
                "filename": image.path,
                "discard": "unmap",
            },
        }
        if image.format == "raw":
            node["size"] = disk.size
        if self._fleeced(disk):
            return [{**node, "backing": disk.below}]
        return [
            node,
            {
                "driver": "copy-before-write",
                "node-name": filter_,
                "file": disk.below,
                "target": scratch,
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": self._options.cbw_timeout_s,
                "discard": "unmap",
            },
        ]

    async def switch(self) -> None:
        """Take the point in time: the one instant of all disks.

        The order **add new, insert, disable old** is what makes it safe without a
        pause: a write in between lands in both segments, a superset. In a fleecing
        transaction only ``blockdev-backup`` opens a drained section that lasts to the
        end, so there too the old ones are disabled last.
        """
        # What lies before a hole in the history goes as the new segment comes: apart,
        # a kill in between would hide the hole.
        add: list[tuple[str, dict[str, Any]]] = [
            ("block-dirty-bitmap-remove", {"node": node, "name": name})
            for node, name in self._useless
        ]
        add += [
            (
                "block-dirty-bitmap-add",
                {
                    "node": self._node(key),
                    "name": plan.new.name,
                    "persistent": key in self.persistent,
                    # QEMU's default follows a qcow2's smaller clusters.
                    "granularity": CLUSTER,
                },
            )
            for key, plan in self._plans.items()
            if plan.opens
        ]
        fleece = [
            (
                "blockdev-backup",
                {
                    "job-id": fleece_job(disk.key),
                    "device": disk.below,
                    "target": node_names(disk.key)[0],
                    "sync": "none",
                },
            )
            for disk in self._disks.values()
            if self._fleeced(disk)
        ]
        disable = [
            ("block-dirty-bitmap-disable", {"node": self._node(key), "name": name})
            for key, plan in self._plans.items()
            for name in plan.disable
        ]
        async with qmp_session(self._qmp_path) as qmp:
            if self.mechanism == "fleece":
                await qmp.transaction([*add, *fleece, *disable])
                return
            if add or fleece:
                await qmp.transaction([*add, *fleece])
            filtered = [d for d in self._disks.values() if not self._fleeced(d)]
            if options := [
                disk.reopen(node_names(disk.key)[1])
                for disk in filtered
                if disk.blockdev
            ]:
                await qmp.execute("blockdev-reopen", {"options": options})
            roots = [disk for disk in filtered if not disk.blockdev]
            paused = len(roots) > 1 and await self._pause(qmp)
            try:
                for disk in roots:
                    await qmp.execute(
                        "qom-set",
                        {
                            "path": disk.qom_path,
                            "property": "drive",
                            "value": node_names(disk.key)[1],
                        },
                    )
            finally:
                if paused:
                    await qmp.execute("cont")
                    await qmp.execute("blockdev-del", {"node-name": MARKER})
            if disable:
                await qmp.transaction(disable)

    async def _pause(self, qmp: Any) -> bool:
        """Stop a running guest for the milliseconds of the switch; mark it as ours."""
        status: Any = await qmp.execute("query-status")
        if status["status"] != "running":
            return False
        await qmp.execute(
            "blockdev-add", {"driver": "null-co", "node-name": MARKER, "size": 512}
        )
        await qmp.execute("stop")
        return True

    async def publish(self) -> list[SnapshotDisk]:
        """Open the exports; returns the disks in the order they were asked for."""
        for key, plan in self._plans.items():
            if plan.union:
                await self._merge(key, plan)
        Path(self._nbd_socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one unlink
        async with qmp_session(self._qmp_path) as qmp:
            address = {"type": "unix", "data": {"path": self._nbd_socket}}
            await qmp.execute(
                "nbd-server-start", {"addr": address, "max-connections": 0}
            )
        published = []
        for key, disk in self._disks.items():
            published.append(await self._export(disk, self._plans.get(key)))
        for key, plan in self._plans.items():
            await self._fold(key, plan)
        return published

    async def _merge(self, key: str, plan: cbt.DiskPlan) -> None:
        scratch = node_names(key)[0]
        union = cbt.union_name(plan.new.chain)
        node = self._node(key)
        async with qmp_session(self._qmp_path) as qmp:
            # One merge with a list: every merge keeps a copy of its target until the
            # transaction ends. Never an empty list: QEMU would crash.
            await qmp.transaction(
                [
                    (
                        "block-dirty-bitmap-add",
                        {
                            "node": scratch,
                            "name": union,
                            "granularity": CLUSTER,
                            "disabled": True,
                        },
                    ),
                    (
                        "block-dirty-bitmap-merge",
                        {
                            "node": scratch,
                            "target": union,
                            "bitmaps": [
                                {"node": node, "name": name} for name in plan.union
                            ],
                        },
                    ),
                ]
            )

    async def _export(self, disk: DiskNode, plan: cbt.DiskPlan | None) -> SnapshotDisk:
        scratch, filter_, access = node_names(disk.key)
        fleeced = self._fleeced(disk)
        arguments: dict[str, Any] = {
            "id": export_id(disk.key),
            "type": "nbd",
            "node-name": scratch if fleeced else access,
            "name": disk.key,
            "writable": not fleeced,
        }
        context = None
        if plan is not None and plan.union:
            union = cbt.union_name(plan.new.chain)
            arguments["bitmaps"] = [{"node": scratch, "name": union}]
            context = f"qemu:dirty-bitmap:{union}"
        async with qmp_session(self._qmp_path) as qmp:
            if not fleeced:
                await qmp.execute(
                    "blockdev-add",
                    {
                        "driver": "snapshot-access",
                        "node-name": access,
                        "file": filter_,
                        "discard": "unmap",
                    },
                )
            await qmp.execute("block-export-add", arguments)
        return SnapshotDisk(
            key=disk.key,
            size=disk.size,
            socket=self._nbd_socket,
            export=disk.key,
            mechanism="fleece" if fleeced else "cbw",
            plan=plan,
            context=context,
            trim=not fleeced,
        )

    async def _fold(self, key: str, plan: cbt.DiskPlan) -> None:
        """Shorten the history; that it fails costs room, never correctness."""
        node = self._node(key)
        for fold in plan.folds:
            actions: list[tuple[str, dict[str, Any]]] = []
            if fold.target and fold.sources:
                actions.append(
                    (
                        "block-dirty-bitmap-merge",
                        {
                            "node": node,
                            "target": fold.target,
                            "bitmaps": list(fold.sources),
                        },
                    )
                )
            actions += [
                ("block-dirty-bitmap-remove", {"node": node, "name": name})
                for name in fold.remove
            ]
            try:
                async with qmp_session(self._qmp_path) as qmp:
                    await qmp.transaction(actions)
            except QmpError as error:
                self.notes.append(f"{key}: segments were not folded: {error.desc}")
                return  # the later ones count on the earlier

    async def let_go(self) -> None:
        """End the fleecing jobs, so that no further guest write is copied.

        The images stay in QEMU. One whose store doesn't answer is waited for with the
        whole VM if a copy is under way: see first whether one is.
        """
        async with qmp_session(self._qmp_path) as qmp:
            for disk in self._disks.values():
                if self._fleeced(disk):
                    with contextlib.suppress(QmpError):  # it has ended by itself
                        await qmp.execute("job-cancel", {"id": fleece_job(disk.key)})

    async def close(self) -> None:
        """Take everything out of the VM and remove the scratch images.

        Raises:
            QmpError, IntegrityError, TransportError: something of ours is still in the
                VM; the scratch images are then kept, the VM may still be writing to
                them.
        """
        try:
            await clean_up(self._qmp_path, self._nbd_socket)
        except VmGoneError as error:
            log.info("vm gone at clean-up: %s", error)
        await self._scratch.remove()
