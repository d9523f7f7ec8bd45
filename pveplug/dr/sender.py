# SPDX-License-Identifier: Apache-2.0
"""The Replication engine: a Bacula job, or ``pveplug dr``, at the source's node.

Each mode is a story of a few sentences here; what a cycle is stands in ``cycle.py``,
what comes back in ``failback.py``, and what the receiver does of itself at the
receiver. Of each VM a report goes into the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from pveplug.access import check_version, choose_vms
from pveplug.config import BackupConfig, Peer, Replication
from pveplug.dr.channel import Channel, ClientAuth
from pveplug.dr.channel import connect as connect_channel
from pveplug.dr.conversation import (
    Conversation,
    ReceiverRefusedError,
    conversation,
)
from pveplug.dr.cycle import Cycle, CycleReport, opening
from pveplug.dr.failback import Failback
from pveplug.dr.memory import EpochMemory
from pveplug.errors import ConfigError, JobError, PveplugError
from pveplug.events import Reporter
from pveplug.log import register_secret
from pveplug.node import Node
from pveplug.proto.dr_frames import Bye, Command, Open, Result, State
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.selection import Selection, VmSummary, select
from pveplug.units import KiB, human
from pveplug.vmconfig import smbios_uuid

log = logging.getLogger(__name__)


class Reports(Reporter, Protocol):
    """The job: its log, and where the reports of its VMs go."""

    async def report(self, vmid: int, uuid: str, values: Mapping[str, Any]) -> None:
        """Keep what came of a VM; JSON values."""


class Replicate:
    """One job of disaster recovery; ``run`` once.

    Args:
        job: the job's unique name.
        api: the source's; None where the mode doesn't need the source.
    """

    def __init__(
        self,
        config: BackupConfig,
        replication: Replication,
        node: Node,
        job: str,
        api: PveApi | None,
        local: PveLocal,
        say: Reports,
    ) -> None:
        self._config = config
        self._replication = replication
        self._node = node
        self._job = job
        self._source = api
        self._local = local
        self._say = say
        self._here = config.connection.node

    async def run(self) -> None:
        """Do what the mode says with every VM that is selected.

        Raises:
            JobError: it was not done for at least one.
        """
        if self._source is not None:
            await check_version(self._source, self._say)
        mode = self._config.mode
        match mode:
            case "seed" | "incremental":
                work, chosen = self._cycle, await self._at_the_source()
            case "failover-exec" if not self._replication.dr_unplanned:
                work, chosen = self._planned_failover, await self._at_the_source()
            case "failback" | "failback-commit" | "failback-undo":
                work, chosen = self._failback, await self._at_the_source()
            case "status":
                await self._status()
                return
            case _:
                work, chosen = self._command, await self._at_the_dr_site()
        failures: list[PveplugError] = []
        for vm in chosen:
            try:
                await work(vm)
            except PveplugError as error:
                if len(chosen) == 1:
                    raise
                log.warning("vm=%s failed", vm.vmid, exc_info=True)
                self._say.error(str(error))
                failures.append(error)
        if failures:
            raise JobError(
                f"{mode} failed for {len(failures)} of {len(chosen)} VMs; the first: "
                f"{failures[0]}"
            ) from failures[0]

    # --- which VMs -------------------------------------------------------------------

    @property
    def _api(self) -> PveApi:
        if self._source is None:
            raise JobError(f"mode={self._config.mode} needs the source's Proxmox VE")
        return self._source

    async def _at_the_source(self) -> tuple[VmSummary, ...]:
        return await choose_vms(
            self._api, self._config.selection, self._here, self._say
        )

    async def _at_the_dr_site(self) -> tuple[VmSummary, ...]:
        """Choose among the receiver's replicas by their sources' ids and names."""
        replicas = await self._replicas()
        vms = [
            VmSummary(int(r["source_vmid"]), str(r["source_name"]), "replica")
            for r in replicas
        ]
        return select(vms, self._selection(), node="replica").chosen

    def _selection(self) -> Selection:
        selection = self._config.selection
        if selection.pool or selection.tag:
            raise ConfigError(
                f"mode={self._config.mode} asks the receiver, which knows replicas by "
                "vmid and name; give one of these",
                key="pool" if selection.pool else "tag",
            )
        return selection

    async def _replicas(self) -> list[dict[str, Any]]:
        asked = Open("status", "", 0, "", self._here, self._job)
        async with self._session(asked) as (talk, _):
            result = await talk.ask(Command("status"), Result)
        return list(result.values.get("replicas", []))

    async def _uuid_of(self, vmid: int) -> str:
        """Return the identity of a replica by its source's id."""
        found = [r for r in await self._replicas() if r["source_vmid"] == vmid]
        if len(found) != 1:
            raise JobError(
                f"the receiver has {len(found)} replicas of a VM with this id.",
                vm=str(vmid),
                phase=self._config.mode,
                remedy="`pveplug dr status` lists all.",
            )
        return str(found[0]["uuid"])

    async def _identity(self, vm: VmSummary) -> str:
        config = await self._api.vm_config(self._here, vm.vmid)
        uuid = smbios_uuid(config.values)
        if not uuid:
            raise JobError(
                "it has no SMBIOS UUID, by which a replica is known.",
                vm=str(vm.vmid),
                phase="replication",
                remedy=f"qm set {vm.vmid} --smbios1 uuid=$(uuidgen), which takes "
                "effect when it is started next.",
            )
        return uuid.lower()

    # --- the modes -------------------------------------------------------------------

    async def _cycle(self, vm: VmSummary) -> None:
        await self._replicate(vm, self._config.mode)

    async def _replicate(self, vm: VmSummary, mode: str) -> None:
        uuid = await self._identity(vm)
        async with self._opened(vm, uuid, mode) as (talk, state, first):
            if mode == "seed" and state.role == "standby":
                # Else it had been refused: the receiver has just taken the restore
                # point that an earlier run was cut off from.
                await self._remember(uuid, state.epoch)
                self._say.info(
                    f"VM {vm.vmid} ({vm.name}): its seed had ended; the restore point "
                    "that was still missing is taken"
                )
                values = {"mode": mode, "cycle": state.acked, "vmid": state.vmid}
                await self._say.report(vm.vmid, uuid, values)
                return
            report = await Cycle(
                talk,
                state,
                first,
                self._config.capture,
                self._replication,
                self._config.selection.exclude_disk,
                self._node,
                self._api,
                self._local,
                self._here,
                vm,
                self._say,
            ).run()
            done = report.done
            if done is not None:
                await self._remember(uuid, done.epoch)
        self._say.info(f"VM {vm.vmid} ({vm.name}): {_closing(report)}")
        await self._say.report(vm.vmid, uuid, _values(mode, report))

    async def _planned_failover(self, vm: VmSummary) -> None:
        """Replicate once more with the source shut down, then boot the replica."""
        final = self._replication.dr_final_sync
        if self._local.vm_running(vm.vmid) is not None:
            if not final:
                raise JobError(
                    "it runs, and source and replica must never run both.",
                    vm=str(vm.vmid),
                    phase="failover",
                    remedy="dr_final_sync=yes shuts it down and replicates once more; "
                    "shut it down yourself; or dr_unplanned=yes if it is lost.",
                )
            await self._shut_down(vm)
        if final:
            await self._replicate(vm, "incremental")
        await self._command(vm, await self._identity(vm))

    async def _shut_down(self, vm: VmSummary) -> None:
        timeout_s = self._replication.dr_shutdown_timeout
        self._say.info(f"VM {vm.vmid} ({vm.name}) is being shut down")
        try:
            await self._api.shutdown_vm(self._here, vm.vmid, timeout_s=timeout_s)
        except PveplugError as error:
            raise JobError(
                f"it did not shut down: {error}.",
                vm=str(vm.vmid),
                phase="failover",
                remedy="shut it down yourself and run the job again.",
            ) from error
        if self._local.vm_running(vm.vmid) is not None:
            raise JobError(
                f"it still runs after {timeout_s} s.",
                vm=str(vm.vmid),
                phase="failover",
                remedy="shut it down yourself and run the job again.",
            )

    async def _command(self, vm: VmSummary, uuid: str | None = None) -> None:
        """Let the receiver do something with a replica."""
        mode, told = self._config.mode, self._replication
        uuid = uuid or await self._uuid_of(vm.vmid)
        options = {
            "dr_restore_point": told.dr_restore_point,
            "dr_unplanned": _word(told.dr_unplanned),
            "dr_boot_timeout": str(told.dr_boot_timeout),
            "dr_shutdown_timeout": str(told.dr_shutdown_timeout),
            "dr_discard": _word(told.dr_discard),
            "dr_start": _word(told.dr_start),
        }
        async with self._opened(vm, uuid, mode) as (talk, _, _):
            result = await talk.ask(Command(mode, options), Result)
        await self._remember(uuid, result.epoch)
        self._say.info(f"VM {vm.vmid} ({vm.name}): {mode}: {_told(result.values)}")
        values = {"mode": mode, "epoch": result.epoch, **result.values}
        await self._say.report(vm.vmid, uuid, values)

    async def _failback(self, vm: VmSummary) -> None:
        uuid = await self._identity(vm)
        async with self._opened(vm, uuid, self._config.mode) as (talk, state, first):
            epoch, values = await Failback(
                talk,
                state,
                first,
                self._config.capture,
                self._replication,
                self._node,
                self._api,
                self._local,
                self._here,
                vm,
                uuid,
                self._say,
            ).run()
        await self._remember(uuid, epoch)
        self._say.info(
            f"VM {vm.vmid} ({vm.name}): {self._config.mode}: {_told(values)}"
        )
        await self._say.report(
            vm.vmid, uuid, {"mode": self._config.mode, "epoch": epoch, **values}
        )

    async def _status(self) -> None:
        """Say of each selected replica how it is."""
        replicas = await self._replicas()
        chosen = self._selection()
        vms = [
            VmSummary(int(r["source_vmid"]), str(r["source_name"]), "replica")
            for r in replicas
        ]
        wanted = {vm.vmid for vm in select(vms, chosen, node="replica").chosen}
        for replica in replicas:
            vmid = int(replica["source_vmid"])
            if vmid not in wanted:
                continue
            line, is_late = status_line(replica, self._replication.dr_rpo, time.time())
            (self._say.warning if is_late else self._say.info)(line)
            await self._say.report(
                vmid,
                str(replica["uuid"]),
                {"mode": "status", "late": is_late, **replica},
            )

    # --- the session -----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _opened(
        self, vm: VmSummary, uuid: str, mode: str
    ) -> AsyncIterator[tuple[Conversation, State, Open]]:
        epoch = await asyncio.to_thread(self._memory(uuid).recall)
        first = opening(mode, uuid, vm, self._here, self._job, epoch, self._replication)
        try:
            async with self._session(first) as (talk, state):
                yield talk, state, first
        except ReceiverRefusedError as error:
            raise JobError(str(error), vm=str(vm.vmid), phase=mode) from error

    @contextlib.asynccontextmanager
    async def _session(self, first: Open) -> AsyncIterator[tuple[Conversation, State]]:
        async with contextlib.AsyncExitStack() as stack:
            channel = await open_channel(self._replication.peer)
            stack.push_async_callback(channel.aclose)
            talk = await stack.enter_async_context(conversation(channel, self._say))
            state = await talk.ask(first, State)
            yield talk, state
            await talk.send(Bye())

    def _memory(self, uuid: str) -> EpochMemory:
        peer = self._replication.peer
        return EpochMemory(self._node.state_dir, uuid, peer.host, peer.port)

    async def _remember(self, uuid: str, epoch: int) -> None:
        await asyncio.to_thread(self._memory(uuid).remember, epoch)


async def open_channel(peer: Peer) -> Channel:
    """Connect to a receiver; its secret is read here, in a thread.

    Raises:
        ConfigError: there is no token in the file or command.
        TransportError: it can't be reached, or one side could not prove itself.
    """
    token = None
    if peer.token is not None:
        secret = await asyncio.to_thread(peer.token.resolve)
        register_secret(secret.reveal())
        token = secret.reveal().encode()
    auth = ClientAuth(
        token=token,
        cert_file=peer.cert_file,
        key_file=peer.key_file,
        ca_file=peer.ca_file,
        fingerprints=peer.fingerprints,
    )
    return await connect_channel(
        peer.host, peer.port, auth=auth, bwlimit=peer.bwlimit * KiB
    )


def status_line(
    replica: Mapping[str, Any], rpo_s: int | None, now: float
) -> tuple[str, bool]:
    """Return one replica's line, and whether it is later than ``rpo_s``."""
    points = replica.get("points", [])
    newest = max((int(point["instant"]) for point in points), default=None)
    lag = None if newest is None else max(int(now) - newest, 0)
    standing_by = replica["role"] in ("standby", "seeding")
    late = bool(rpo_s and standing_by and (lag is None or lag > rpo_s))
    age = "no restore point" if lag is None else f"newest {_age(lag)} old"
    text = (
        f"VM {replica['source_vmid']} ({replica['source_name']}) of "
        f"{replica.get('site', '?')}: replica VM {replica['vmid']}, {replica['role']}, "
        f"epoch {replica['epoch']}, {len(points)} restore points, {age}"
    )
    if late:
        text += f", later than dr_rpo={rpo_s} s"
    return text, late


def _age(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value}"
        for key, value in values.items()
        if isinstance(value, str | int | float)
    )


def _closing(report: CycleReport) -> str:
    sent = sum(disk.sent for disk in report.disks)
    checked = sum(disk.checked for disk in report.disks)
    point = report.done.point if report.done else None
    kept = len(report.done.points) if report.done else 0
    what = (
        f"restore point {point.name} ({kept} kept)"
        if point
        else "staged, to be applied when the test there ends"
    )
    return (
        f"replicated to VM {report.vmid}: {what}; sent {human(sent)}, verified "
        f"{human(checked)} and {report.samples} samples, {report.seconds:.1f} s"
    )


def _values(mode: str, report: CycleReport) -> dict[str, Any]:
    values = dataclasses.asdict(report)
    values["disks"] = [dataclasses.asdict(disk) for disk in report.disks]
    values["done"] = dataclasses.asdict(report.done) if report.done else None
    return {"mode": mode, **values}
