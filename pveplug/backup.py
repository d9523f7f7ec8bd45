# SPDX-License-Identifier: Apache-2.0
"""The Backup engine: VMs of this node into the files of a Bacula job.

For each VM, one after the other::

    hold ── point in time ── scan all disks ── edges ── per disk: image ── release
                                                 │                  │
                                            vm.conf, layout   /@proxmox/…/scsi0.qcow2,
                                            edges.bin         then manifest, objects

A VM that can't even be begun (locked, gone) doesn't keep the others from their backup;
the job fails at its end all the same. Once a disk's data flows, any failure ends the
job at once: nothing may follow a file that is not whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from pveplug import __version__
from pveplug.access import check_version, choose_vms
from pveplug.ancestry import recall, remember
from pveplug.bacula import BaculaSession, FileInfo
from pveplug.cbt import Level, chain_id
from pveplug.config import BackupConfig
from pveplug.config_parse import level_warning
from pveplug.diskstream import (
    DiskStream,
    Progress,
    RateLimit,
    give_back_unread,
    read_edges,
    scan,
)
from pveplug.errors import JobError, NbdError, PveplugError, TransportError
from pveplug.guestlatency import keep_pace
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.edges import Edges, EdgesWriter
from pveplug.images.manifest import (
    CONFIG_FILE,
    EDGES_FILE,
    FIREWALL_FILE,
    LAYOUT_FILE,
    MANIFEST_FILE,
    DiskEntry,
    Manifest,
    backing_name,
    digest_file,
    image_file,
    job_directory,
    text_digest,
    vm_directory,
)
from pveplug.images.restore_object import encode_objects
from pveplug.nbd.client import NbdClient, connect
from pveplug.nbd.source import READERS
from pveplug.node import Node
from pveplug.pacing import Pace
from pveplug.parameters import restore_template
from pveplug.progress import comparing, reporting, summary
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.selection import VmSummary
from pveplug.source import Opened, ReadableDisk, open_vm, watched
from pveplug.tasks import first_failure
from pveplug.tier import Tier
from pveplug.units import KiB
from pveplug.vmhold import held

log = logging.getLogger(__name__)

EINVAL = 22


@dataclass(slots=True)
class _Disk:
    """A disk on its way into the job."""

    source: ReadableDisk
    client: NbdClient
    clusters: ClusterMap
    digest: DigestWriter | None
    stream: DiskStream
    compared: Progress | None = None
    """What it was compared for with digests, where it was."""
    began: float = 0.0
    seconds: float = 0.0


class Backup:
    """One backup job; ``run`` once."""

    def __init__(
        self,
        config: BackupConfig,
        node: Node,
        session: BaculaSession,
        api: PveApi,
        local: PveLocal,
    ) -> None:
        self._config = config
        self._node = node
        self._session = session
        self._api = api
        self._local = local
        self._here = config.connection.node
        self._limit = RateLimit(config.capture.bwlimit * KiB)
        self._offsets = config.capture.offsets and session.offsets
        self._streaming = False
        self._offered = False

    async def run(self) -> None:
        """Back up every VM that the configuration selects.

        Raises:
            JobError: at least one VM is not (or not wholly) in this job.
        """
        if text := level_warning(self._config.backup_type, self._session.job.level):
            self._session.warning(text)
        if self._config.capture.offsets and self._session.job.interface == 14:
            self._session.warning(
                "Bacula 9.6 stores data with offsets unencrypted even when the FileSet "
                "encrypts; set offsets=no if it does"
            )
        await check_version(self._api, self._session)
        chosen = await choose_vms(
            self._api, self._config.selection, self._here, self._session
        )
        failures: list[tuple[VmSummary, PveplugError]] = []
        for vm in chosen:
            try:
                await self._back_up(vm)
            except PveplugError as error:
                if self._streaming or len(chosen) == 1:
                    raise
                log.warning("vm=%s failed", vm.vmid, exc_info=True)
                self._session.error(str(error))
                failures.append((vm, error))
        if failures:
            names = ", ".join(f"{vm.vmid} ({vm.name})" for vm, _ in failures)
            raise JobError(
                f"{len(failures)} of {len(chosen)} VMs were not backed up: {names}; "
                f"the first failed with: {failures[0][1]}"
            ) from failures[0][1]

    async def _back_up(self, vm: VmSummary) -> None:
        job = self._session.job
        level = Level(job.level or "F", job.prev_job or None, job.since or None)
        async with (
            held(
                self._node,
                self._local,
                vm.vmid,
                job=job.name,
                kind="backup",
                lock_wait_s=self._config.capture.lock_wait,
                lock_now=lambda: self._lock_of(vm),
                say=self._session,
            ) as hold,
            open_vm(
                self._config.capture,
                self._config.selection.exclude_disk,
                self._node,
                self._api,
                self._local,
                self._here,
                vm,
                hold.journal,
                job=job.name,
                level=level,
                say=self._session,
            ) as opened,
        ):
            await self._send_vm(opened, level)

    async def _lock_of(self, vm: VmSummary) -> str:
        return (await self._api.vm_config(self._here, vm.vmid)).lock

    async def _send_vm(self, opened: Opened, level: Level) -> None:
        self._limit.pace = Pace(self._config.capture.latency_budget_ms / 1000)
        vmid, every_s = opened.vm.vmid, self._config.capture.progress_interval
        tier = Tier(
            self._node.state_dir, vmid, self._session.job.name, level, self._session
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(tier.drop)
            if self._config.capture.compare:
                await tier.open(opened.uuid)
            # Watched from the first moment: the guest's writes depend on it.
            bound_s = self._config.capture.cbw_timeout
            async with watched(opened, bound_s), first_failure() as tasks:
                side = []
                told = comparing(self._session, f"VM {vmid}", tier.progress, every_s)
                comparison = tasks.create_task(told, name="comparing")
                disks: list[_Disk] = []
                if self._limit.pace.budget_s and "qemu" in opened.versions:
                    pacing = self._keep_pace(opened, tier, disks)
                    side.append(tasks.create_task(pacing, name="pace"))
                disks += await self._scan_all(opened, tier, stack)
                comparison.cancel()
                progress = reporting(
                    self._session,
                    f"VM {vmid}",
                    [(disk.source.key, disk.stream.progress) for disk in disks],
                    every_s,
                )
                side.append(tasks.create_task(progress, name="progress"))
                edges = await self._read_edges(opened, disks)
                layout = await self._send_description(opened, disks, level, edges)
                await self._send_disks(opened, disks)
                for task in side:
                    task.cancel()
            if self._limit.pace.samples:
                self._session.info(f"VM {vmid}: {self._limit.pace.summary()}")
            await self._send_papers(opened, disks, layout)
            await tier.keep([disk.source.key for disk in disks])
        self._session.info(
            f"VM {opened.vm.vmid} ({opened.vm.name}) is in this job, "
            f"{opened.consistency}"
        )

    def _keep_pace(
        self, opened: Opened, tier: Tier, disks: list[_Disk]
    ) -> Coroutine[Any, Any, None]:
        """Pace all reading, from the first comparison on; ``disks`` may come later."""

        def read() -> int:
            compared = sum(progress.read for _, progress in tier.progress)
            return compared + sum(disk.stream.progress.read for disk in disks)

        return keep_pace(
            self._node.qmp_socket(opened.vm.vmid),
            self._limit.pace,
            read,
            f"VM {opened.vm.vmid}",
            self._session,
        )

    async def _scan_all(
        self, opened: Opened, tier: Tier, stack: contextlib.AsyncExitStack
    ) -> list[_Disk]:
        """Look at every disk, a few at a time; only what is compared is read."""
        some = asyncio.Semaphore(self._config.capture.max_parallel_disks)

        async def one(
            source: ReadableDisk,
        ) -> tuple[ReadableDisk, NbdClient, ClusterMap, Progress | None]:
            async with some, _named(opened, source, "scan"):
                contexts = ["base:allocation"]
                if source.context:
                    contexts.append(source.context)
                client = await connect(
                    source.address, source.export, contexts=contexts, readers=READERS
                )
                stack.push_async_callback(client.aclose)
                if client.size != source.size:
                    raise JobError(
                        f"its export has {client.size} bytes instead of {source.size}"
                    )
                if "base:allocation" not in client.contexts:
                    self._session.warning(
                        f"VM {opened.vm.vmid} {source.key}: the export tells no "
                        "allocation; all of it is read"
                    )
                clusters = await scan(
                    client, context=source.context, known=source.parent_size
                )
                if source.trim:
                    await give_back_unread(client, clusters)
            if not source.whole:
                return source, client, clusters, None
            async with some, _named(opened, source, "compare"):
                changes = await tier.changes(
                    source.key, client, clusters, trim=source.trim, limit=self._limit
                )
            if changes is None:
                return source, client, clusters, None
            return replace(source, parent_job=tier.parent), client, *changes

        async with first_failure() as tasks:
            found = [tasks.create_task(one(source)) for source in opened.disks]
        disks = []
        for task in found:
            source, client, clusters, compared = task.result()
            backing = (
                backing_name(source.parent_job, source.key)
                if source.parent_job
                else None
            )
            digest = None
            if self._config.capture.digests:
                digest = DigestWriter(clusters, overlay=backing is not None)
            stream = DiskStream(
                client,
                clusters,
                backing=backing,
                trim=source.trim,
                limit=self._limit,
                digest=digest,
                leaves=tier.record(
                    source.key, clusters, source.parent_job, opened.started
                ),
            )
            stack.push_async_callback(stream.aclose)
            disks.append(_Disk(source, client, clusters, digest, stream, compared))
        return disks

    async def _read_edges(self, opened: Opened, disks: list[_Disk]) -> bytes:
        """Read the ends of all disks; the images take them from there.

        Returns: the content of edges.bin.
        """
        writer = EdgesWriter()
        for disk in disks:
            async with _named(opened, disk.source, "read"):
                writer.begin(disk.source.key, disk.clusters.size)
                await read_edges(
                    disk.client, disk.clusters, writer, self._limit, disks=len(disks)
                )
        content = writer.finish()
        # What an image has there is what was put into the file, and nothing else.
        edges = Edges.decode(content)
        for disk in disks:
            disk.stream.hold(edges.disks[disk.source.key].runs)
        return content

    async def _send_disks(self, opened: Opened, disks: list[_Disk]) -> None:
        """Send the images one after the other; the next ones read ahead meanwhile."""
        for number, disk in enumerate(disks):
            ahead = self._config.capture.max_parallel_disks
            if not self._limit.pace.ahead:
                ahead = 1
            for other in disks[number : number + ahead]:
                other.stream.prefetch()
            disk.began = time.monotonic()
            info = FileInfo(
                f"{self._directory(opened)}/{image_file(disk.source.key)}",
                disk.stream.file_size,
                mtime=opened.started,
            )
            self._streaming = True
            async with (
                _named(opened, disk.source, "read"),
                self._session.file(info, offsets=self._offsets) as out,
            ):
                await disk.stream.send(out)
            self._streaming = False
            disk.seconds = time.monotonic() - disk.began
            self._session.info(
                summary(
                    f"VM {opened.vm.vmid} {disk.source.key}",
                    disk.source,
                    disk.clusters,
                    disk.stream.progress,
                    opened.consistency,
                    disk.seconds,
                    disk.compared,
                )
            )

    def _directory(self, opened: Opened) -> str:
        return job_directory(opened.vm.vmid, opened.uuid, self._session.job.name)

    async def _send_description(
        self, opened: Opened, disks: list[_Disk], level: Level, edges: bytes
    ) -> Manifest:
        """Send what a restore without the catalogue's objects must know first.

        And what an instant recovery wants before the disks: ``edges``.

        Returns: the manifest as it is known without the digests' roots.
        """
        await self._send_file(opened, CONFIG_FILE, opened.config_text.encode())
        if opened.firewall is not None:
            await self._send_file(opened, FIREWALL_FILE, opened.firewall.encode())
        entries = [_entry(disk) for disk in disks]
        layout = self._manifest(opened, entries, level, text_digest(edges))
        if layout.built_on is not None and layout.parent_manifest is None:
            self._session.info(
                f"VM {opened.vm.vmid}: this node does not know the manifest of job "
                f"{layout.built_on}; this job's does not vouch for it"
            )
        await self._send_file(opened, LAYOUT_FILE, layout.to_json())
        await self._send_file(opened, EDGES_FILE, edges)
        return layout

    async def _send_papers(
        self, opened: Opened, disks: list[_Disk], layout: Manifest
    ) -> None:
        """Send what is known once all is read, and what the catalogue shall keep."""
        entries = []
        for disk, entry in zip(disks, layout.disks, strict=True):
            root = ""
            if disk.digest is not None:
                sidecar, root = disk.digest.finish()
                await self._send_file(opened, digest_file(disk.source.key), sidecar)
            entries.append(dataclasses.replace(entry, digest_root=root))
        manifest = dataclasses.replace(layout, disks=tuple(entries))
        await self._send_file(opened, MANIFEST_FILE, manifest.to_json())
        self._remember(opened, manifest)
        maps = {disk.source.key: disk.clusters for disk in disks}
        small = self._session.job.interface == 14  # Bacula 9.6
        for name, content in encode_objects(manifest, maps, small=small):
            await self._session.restore_object(name, content)
        if manifest.level == "F" and not self._offered:
            await self._session.plugin_config("pveplug.ini", restore_template())
            self._offered = True

    def _manifest(
        self, opened: Opened, entries: list[DiskEntry], level: Level, edges: str
    ) -> Manifest:
        made = Manifest(
            vmid=opened.vm.vmid,
            uuid=opened.uuid,
            vm_name=opened.vm.name,
            job=self._session.job.name,
            parent_job=level.parent_job if level.letter != "F" else None,
            level=level.letter,
            started=opened.started,
            node=self._here,
            consistency=opened.consistency,
            config=opened.config_text,
            firewall=opened.firewall,
            disks=tuple(entries),
            versions={
                "pveplug": __version__,
                "bacula-interface": str(self._session.job.interface),
                **opened.versions,
            },
            left_out=dict(opened.left_out),
            chain=chain_id(self._session.job.name),
            template=opened.vm.template,
            edges=edges,
        )
        if made.built_on is None:
            return made
        vm = _vm_name(opened)
        digest = recall(self._node.state_dir, vm, made.chain, made.built_on)
        return dataclasses.replace(made, parent_manifest=digest)

    def _remember(self, opened: Opened, manifest: Manifest) -> None:
        """Keep this manifest's digest for the next job; without it that one says so."""
        vm, state_dir = _vm_name(opened), self._node.state_dir
        try:
            remember(state_dir, vm, manifest.chain, manifest.job, manifest.digest)
        except OSError as error:
            self._session.warning(
                f"VM {opened.vm.vmid}: cannot write below {state_dir}/manifests: "
                f"{error.strerror or error}; the next job's manifest will not vouch "
                "for this one. Remedy: make room there"
            )

    async def _send_file(self, opened: Opened, name: str, content: bytes) -> None:
        info = FileInfo(
            f"{self._directory(opened)}/{name}", len(content), mtime=opened.started
        )
        self._streaming = True
        async with self._session.file(info, offsets=False) as out:
            await out.write(0, content)
        self._streaming = False


def _vm_name(opened: Opened) -> str:
    return vm_directory(opened.vm.vmid, opened.uuid).rsplit("/", 1)[-1]


def _entry(disk: _Disk) -> DiskEntry:
    source = disk.source
    return DiskEntry(
        key=source.key,
        size=source.size,
        format=source.format,
        storage=source.storage,
        file=image_file(source.key),
        backing=backing_name(source.parent_job, source.key)
        if source.parent_job
        else None,
        mechanism=source.mechanism + ("+digests" if disk.compared else ""),
        reason=source.whole or "",
        data_bytes=disk.clusters.data_bytes,
        zero_bytes=disk.clusters.zero_bytes,
    )


@contextlib.asynccontextmanager
async def _named(
    opened: Opened, source: ReadableDisk, phase: str
) -> AsyncIterator[None]:
    """Give an error the name of its VM, disk and phase."""
    try:
        yield
    except JobError:
        raise
    except NbdError as error:
        if error.errno == EINVAL and source.mechanism == "cbw":
            raise JobError(
                "the point in time broke: its scratch store was full or too slow for "
                "the guest's writes (the guest is unharmed).",
                vm=str(opened.vm.vmid),
                disk=source.key,
                phase=phase,
                remedy="more or faster scratch space: scratch_dir or fleecing_storage.",
            ) from error
        raise _failed(opened, source, phase, error) from error
    except PveplugError as error:
        raise _failed(opened, source, phase, error) from error


def _failed(
    opened: Opened, source: ReadableDisk, phase: str, error: PveplugError
) -> JobError:
    remedy = None
    if isinstance(error, TransportError):
        remedy = "see whether the VM was stopped or QEMU died; then run the job again."
    return JobError(
        str(error), vm=str(opened.vm.vmid), disk=source.key, phase=phase, remedy=remedy
    )
