# SPDX-License-Identifier: Apache-2.0
"""The Restore engine: files of Bacula jobs into VMs, or into plain files.

::

    restore objects of all jobs ──► who owns which cluster, how the VM looks
    files, oldest job first ──► per VM a target, per disk a writer
    FINISH ──► every VM that is whole is handed over, the others are undone

Where the objects are missing or damaged, the images are replayed in order, led by the
``layout.json`` that precedes them in every job. Either way every file of a job that is
needed is compared with the others of its job, see :mod:`pveplug.images.evidence`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pveplug.access import check_version, open_api
from pveplug.bacula import BaculaSession
from pveplug.bacula_files import IncomingFile
from pveplug.config import RestoreConfig
from pveplug.config_parse import parse_restore
from pveplug.diskstream import RateLimit
from pveplug.errors import (
    ConfigError,
    IntegrityError,
    JobError,
    NbdError,
    PveplugError,
    RemoteProtocolError,
)
from pveplug.images.chain import (
    Chain,
    JobRecord,
    by_vm,
    check_parent,
    decode_objects,
)
from pveplug.images.edges import FILE_BYTES, Edges
from pveplug.images.evidence import JobEvidence, Paper, is_paper
from pveplug.images.manifest import EDGES_FILE, LAYOUT_FILE, PREFIX, DiskEntry
from pveplug.ir.landing import LandingError
from pveplug.ir.prove_target import ProveTarget
from pveplug.ir.target import InstantTarget
from pveplug.node import Node
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.restore_vm import Goal, VmTarget
from pveplug.units import KiB

log = logging.getLogger(__name__)

OPTIONS_OBJECT: Final = 28
OUR_OBJECT: Final = 25


@dataclass(slots=True)
class _Vm:
    """One VM of the selection."""

    chain: Chain | None
    why_no_chain: str = ""
    target: VmTarget | None = None
    jobs: dict[str, JobEvidence] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Name:
    """``/@proxmox/100-1a2b3c4d/JOB/scsi0.qcow2``, taken apart."""

    directory: str
    job: str
    file: str


class Restore:
    """One restore job; ``run`` once."""

    def __init__(self, session: BaculaSession, node: Node) -> None:
        self._session = session
        self._node = node
        self._vms: dict[str, _Vm] = {}
        self._damaged: list[str] = []
        self._job_ids: dict[str, int] = {}

    async def run(self) -> None:
        """Restore what the job delivers.

        Raises:
            JobError, PveplugError: it can't be; nothing half-made is left behind.
        """
        session = self._session
        options: list[str] = []
        blobs: list[bytes] = []
        by_job: dict[int, list[bytes]] = {}
        async for found in session.restore_objects():
            if found.type == OPTIONS_OBJECT:
                options.append(found.data.decode("utf-8", "replace").rstrip("\0"))
            elif found.type == OUR_OBJECT:
                blobs.append(found.data)
                by_job.setdefault(found.job_id, []).append(found.data)
        config = parse_restore(
            session.plugin, session.job.where, options, node=self._node
        )
        session.info(config.reason)
        for text in config.warnings:
            session.warning(text)
        if config.target == "files":
            await session.objects_done()
            async for file in session.files():
                await file.accept("CORE")
            session.info(
                "Bacula writes these files by itself, unchecked: "
                f"'pveplug verify {session.job.where}' compares them with their digests"
            )
            await session.finish_done()
            return
        self._plan(blobs)
        if config.instant is not None:
            self._number(by_job)
        api = await open_api(config.connection)
        async with api, contextlib.AsyncExitStack() as stack:
            local = PveLocal(self._node)
            await check_version(api, session)
            await session.objects_done()
            try:
                await self._restore(config, api, local, stack)
            except PveplugError as error:
                for vm in self._vms.values():
                    if vm.target is not None:
                        await vm.target.failed(error)
                raise
            await session.finish_done()

    async def _restore(
        self,
        config: RestoreConfig,
        api: PveApi,
        local: PveLocal,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        async for file in self._session.files():
            await self._take(file, config, api, local, stack)
        if not any(vm.target for vm in self._vms.values()):
            raise JobError(
                "Bacula delivered nothing of a VM's disks.",
                phase="restore",
                remedy=f"select files below {PREFIX}/.",
            )
        for vm in self._vms.values():
            self._check_whole(vm)
        for vm in self._vms.values():
            if vm.target is not None:
                await vm.target.commit()

    def _plan(self, blobs: list[bytes]) -> None:
        """Find out from the objects what the jobs hold; touches nothing.

        Raises:
            IntegrityError: a chain has a missing member.
        """
        records, problems = decode_objects(blobs)
        self._damaged = problems
        for text in problems:
            self._session.warning(
                f"{text}; where that leaves a gap the images are replayed in order"
            )
        for directory, group in by_vm(records).items():
            self._vms[directory] = self._vm_of(group)
        if not blobs:
            self._session.warning(
                "the catalogue has no restore objects of these jobs; their images are "
                "replayed in order, which writes superseded data too"
            )

    def _number(self, by_job: Mapping[int, list[bytes]]) -> None:
        """Find out the JobIds of the jobs, for whoever reports them."""
        for job_id, blobs in by_job.items():
            for record in decode_objects(blobs)[0]:
                self._job_ids[record.manifest.job] = job_id

    def _vm_of(self, group: list[JobRecord]) -> _Vm:
        if self._damaged:
            # What is lost may be the newest job's: without it an older one would
            # pass for the one to restore.
            return _Vm(None, self._damaged[0])
        try:
            chain = Chain(group)
        except IntegrityError as error:
            raise JobError(
                f"{error}.",
                vm=str(group[0].manifest.vmid),
                phase="restore",
                remedy="restore with 'select current' (bconsole), or give all "
                "JobIds of the chain; a single job can be restored to files.",
            ) from error
        if chain.unused:
            self._session.info(
                f"VM {chain.head.vmid}: not needed: {', '.join(chain.unused)}"
            )
        for key in chain.keys:
            if not chain.mapped(key):
                self._session.info(
                    f"VM {chain.head.vmid} {key}: without an extent map; its images "
                    "are replayed in order"
                )
        return _Vm(chain)

    async def _take(
        self,
        file: IncomingFile,
        config: RestoreConfig,
        api: PveApi,
        local: PveLocal,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        name = _parse(file.name)
        if name is None:
            self._session.warning(f"{file.name} is not of a VM backup; left out")
            await file.accept("SKIP")
            return
        vm = self._vms.setdefault(name.directory, _Vm(None, "no restore objects"))
        if name.file == EDGES_FILE:
            await self._take_edges(file, name, vm, config, api, local, stack)
            return
        paper = is_paper(name.file)
        if (not paper and not name.file.endswith(".qcow2")) or not _needed(vm, name):
            await file.accept("SKIP")
            return
        try:
            if paper:
                await self._take_paper(file, name, vm)
            else:
                await self._take_image(file, name, vm, config, api, local, stack)
        except JobError:
            raise
        except (IntegrityError, RemoteProtocolError) as error:
            key = None if paper else name.file.removesuffix(".qcow2")
            remedy = "the backup is damaged: try another JobId"
            if paper:
                remedy += ", or leave this file out of the selection"
            raise _failed(vm, key, error, remedy) from error

    async def _take_image(
        self,
        file: IncomingFile,
        name: _Name,
        vm: _Vm,
        config: RestoreConfig,
        api: PveApi,
        local: PveLocal,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        key = name.file.removesuffix(".qcow2")
        if vm.target is None:
            vm.target = await self._begin(vm, name, config, api, local, stack)
        entry = self._entry(vm, name, key)
        if key not in vm.target.wanted or entry is None:
            await file.accept("SKIP")
            return
        await file.accept("OK")
        evidence = _evidence(vm, name)
        try:
            writer = await vm.target.writer(key)
            root = await writer.receive(
                name.job,
                file,
                entry.digest_root or None,
                entry=entry,
                version=evidence.best.version if evidence.best else 1,
            )
            evidence.image(entry.key, root)
        except (NbdError, LandingError) as error:
            raise vm.target.write_failed(key, error) from error
        except (JobError, IntegrityError, RemoteProtocolError):
            raise
        except PveplugError as error:
            raise _failed(vm, key, error, None) from error
        await file.done()

    async def _take_edges(
        self,
        file: IncomingFile,
        name: _Name,
        vm: _Vm,
        config: RestoreConfig,
        api: PveApi,
        local: PveLocal,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        """Give an instant recovery the ends of its disks; nobody else needs them.

        They are copies: where they can't be used, the images bring the same later.
        """
        if config.instant is None or vm.chain is None or not _needed(vm, name):
            await file.accept("SKIP")
            return
        if vm.target is None:
            vm.target = await self._begin(vm, name, config, api, local, stack)
        target, known = vm.target, vm.chain.record(name.job).manifest
        if not known.edges or not isinstance(target, InstantTarget):
            await file.accept("SKIP")
            return
        await file.accept("OK")
        content = bytearray()
        async for offset, view in file.data():
            # What doesn't follow is left out, and so the digest is another.
            if offset == len(content) and offset + len(view) <= FILE_BYTES:
                content += view
        paper = Paper(name.file)
        paper.add(0, content)
        try:
            _evidence(vm, name).paper(paper)
            await target.take_edges(name.job, Edges.decode(content))
        except IntegrityError as error:
            self._session.warning(
                f"VM {target.vmid}: {error}; the guest waits for the ends of its disks "
                "until this job's images have come"
            )
        await file.done()

    async def _take_paper(self, file: IncomingFile, name: _Name, vm: _Vm) -> None:
        """Compare what accompanies the images; without objects it also leads them."""
        await file.accept("OK")
        paper = Paper(name.file)
        async for offset, view in file.data():
            paper.add(offset, view)
        evidence = _evidence(vm, name)
        evidence.paper(paper)
        await file.done()
        if vm.chain is None and name.file == LAYOUT_FILE and evidence.best:
            parent = vm.jobs.get(evidence.best.built_on or "")
            if parent is not None and parent.proven is not None:
                check_parent(evidence.best, parent.proven.digest)
            if vm.target is not None:
                await vm.target.adopt(evidence.best)

    def _check_whole(self, vm: _Vm) -> None:
        """Compare what came with what the jobs' own papers announced, at the end."""
        if vm.target is None or vm.chain is not None:
            return
        for evidence in vm.jobs.values():
            lost = [key for key in evidence.without_image if key in vm.target.wanted]
            if lost:
                raise JobError(
                    f"job {evidence.job}: Bacula did not deliver the image of "
                    f"{', '.join(lost)}.",
                    vm=str(vm.target.vmid),
                    disk=lost[0],
                    phase="restore",
                    remedy="select the whole directory of the VM, in every job of the "
                    "chain, or name the disks you want with disks=.",
                )
            if evidence.unproven:
                self._session.warning(
                    f"job {evidence.job}: without restore object and manifest.json "
                    f"the data of {', '.join(evidence.unproven)} could not be compared "
                    "with its digests"
                )

    async def _begin(
        self,
        vm: _Vm,
        name: _Name,
        config: RestoreConfig,
        api: PveApi,
        local: PveLocal,
        stack: contextlib.AsyncExitStack,
    ) -> VmTarget:
        """Make the target when the first image of a VM comes."""
        if vm.chain is not None:
            manifest = vm.chain.head
        elif (described := _evidence(vm, name).best) is not None:
            manifest = described
        else:
            raise JobError(
                f"nothing describes {name.directory}/{name.job}: neither restore "
                f"objects ({vm.why_no_chain}) nor {LAYOUT_FILE} came before the disks.",
                phase="restore",
                remedy="select the whole directory of the job, or restore to files "
                "(where=/directory).",
            )
        others = [v for v in self._vms.values() if v.target is not None]
        if (
            others
            and config.vmids
            and config.vmids.default
            not in (
                None,
                "next",
                "same",
            )
        ):
            raise ConfigError(
                "restore_vmid names one id, and several VMs are being restored; use "
                "restore_vmid=OLD:NEW,OLD:NEW",
                key="restore_vmid",
            )
        limit = RateLimit(config.bwlimit * KiB)
        goal = Goal(manifest, vm.chain, job_ids=self._job_ids)
        common = (self._node, api, local, goal, limit, self._session)
        target: VmTarget
        if config.instant is None:
            target = VmTarget(config, *common)
        elif config.prove is None:
            target = InstantTarget(config, config.instant, *common)
        else:
            target = ProveTarget(config, config.instant, *common)
        stack.push_async_callback(target.aclose)
        await target.begin(self._session.job.name)
        return target

    @staticmethod
    def _entry(vm: _Vm, name: _Name, key: str) -> DiskEntry | None:
        """Return what is known of an image; None when it has no part in the result."""
        if vm.chain is not None:
            return vm.chain.disk(name.job, key)
        manifest = _evidence(vm, name).best
        return manifest.disk(key) if manifest else None


def _needed(vm: _Vm, name: _Name) -> bool:
    """Whether a job has any part in what is restored.

    Raises:
        JobError: nobody knows; left out it might be the state that is wanted.
    """
    if vm.chain is None or name.job in vm.chain.jobs:
        return True
    if name.job in vm.chain.unused:
        return False
    raise JobError(
        f"job {name.job} is in the selection, but the catalogue has no restore object "
        f"of it, only of {', '.join(vm.chain.jobs)}: which state is wanted?",
        vm=str(vm.chain.head.vmid),
        phase="restore",
        remedy="select only jobs that have one, or restore to files "
        "(where=/directory).",
    )


def _evidence(vm: _Vm, name: _Name) -> JobEvidence:
    """Return what is known of a job, beginning with what its restore object says."""
    if name.job not in vm.jobs:
        known = vm.chain.record(name.job).manifest if vm.chain else None
        vm.jobs[name.job] = JobEvidence(f"{name.directory}/{name.job}", known)
    return vm.jobs[name.job]


def _failed(
    vm: _Vm, key: str | None, error: PveplugError, remedy: str | None
) -> JobError:
    return JobError(
        str(error),
        vm=str(vm.target.vmid) if vm.target else None,
        disk=key,
        phase="write" if key else "restore",
        remedy=f"{remedy}." if remedy else None,
    )


def _parse(name: str) -> _Name | None:
    """Take a file name apart, whatever ``where`` stands in front of it."""
    at = name.rfind(f"{PREFIX}/")
    if at < 0:
        return None
    parts = name[at:].split("/")
    # "", "@proxmox", VM, JOB, FILE
    if len(parts) != 5 or not all(parts[1:]):
        return None
    return _Name("/".join(parts[:3]), parts[3], parts[4])
