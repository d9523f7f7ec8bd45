# SPDX-License-Identifier: Apache-2.0
"""How replicas are doing, from their records alone: no lock, no network.

The status command, ``pveplug replicas`` and the metrics all tell this.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pveplug.dr.store import Record, ReplicaError, ReplicaStore
from pveplug.proto.dr_frames import Point

HEALTHY: Final = frozenset({"ok", "test", "staged", "permanent"})
"""What needs nobody's attention."""


@dataclass(frozen=True, slots=True)
class Overview:
    """One replica at a glance.

    Attributes:
        source_vmid: of the VM that is replicated; ``site``: where it is.
        vmid: of the replica; 0: none yet.
        points: its restore points, oldest first.
        last_instant: seconds since 1970 of the source's instant it holds, 0: none.
        lag_s: how old that instant is; None: there is none.
        staged: cycles acknowledged and not applied; ``stage_bytes``: of their files.
        health: ``ok``, ``test`` (one runs), ``staged``, ``late`` (older than the RPO),
            ``seeding``, ``interrupted`` (an increment is half applied: the next session
            ends it), ``no point``, ``failed over``, ``permanent`` or ``damaged``.
        why: a sentence for what isn't ``ok``.
    """

    uuid: str
    source_vmid: int = 0
    source_name: str = ""
    site: str = ""
    vmid: int = 0
    link: str = ""
    role: str = "none"
    epoch: int = 0
    welcome: bool = False
    points: tuple[Point, ...] = ()
    last_instant: int = 0
    last_taken: int = 0
    lag_s: int | None = None
    staged: int = 0
    stage_bytes: int = 0
    bytes: int = 0
    """Data of the last cycle."""
    cycle: int = 0
    testing: bool = False
    health: str = "ok"
    why: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return dataclasses.asdict(self)


def overviews(
    store: ReplicaStore, *, stage_dir: str = "", rpo_s: int = 0
) -> list[Overview]:
    """Return all replicas of a receiver, by the id of their source."""
    found = [
        overview(store, uuid, stage_dir=stage_dir, rpo_s=rpo_s)
        for uuid in store.uuids()
    ]
    return sorted(found, key=lambda one: (one.source_vmid, one.uuid))


def overview(
    store: ReplicaStore,
    uuid: str,
    *,
    stage_dir: str = "",
    rpo_s: int = 0,
    now: float | None = None,
) -> Overview:
    """Return one replica; a record that can't be read is ``damaged``.

    Args:
        store: where its record is.
        uuid: of the source.
        stage_dir: where increments wait, if not beside the record.
        rpo_s: an instant older than this is ``late``; 0: none is.
        now: seconds since 1970.
    """
    try:
        record = store.read(uuid)
    except ReplicaError as error:
        return Overview(uuid, health="damaged", why=str(error))
    if record is None:
        return Overview(uuid, health="no point", why="there is no such replica")
    now = time.time() if now is None else now
    point = record.points[-1] if record.points else None
    instant = max(
        [point.instant if point else 0, *(item.instant for item in record.staged)]
    )
    lag = max(0, int(now) - instant) if instant else None
    health, why = _health(record, lag, rpo_s)
    return Overview(
        uuid=uuid,
        source_vmid=record.origin.vmid,
        source_name=record.origin.name,
        site=record.origin.site,
        vmid=record.vmid,
        link=record.link,
        role=record.role,
        epoch=record.epoch,
        welcome=record.welcome,
        points=tuple(record.points),
        last_instant=instant,
        last_taken=point.taken if point else 0,
        lag_s=lag,
        staged=len(record.staged),
        stage_bytes=sum(_sizes(store, uuid, stage_dir)),
        bytes=record.report.bytes,
        cycle=record.cycle,
        testing=record.testing is not None,
        health=health,
        why=why,
    )


def _health(record: Record, lag: int | None, rpo_s: int) -> tuple[str, str]:
    if record.role == "permanent":
        return "permanent", "it is an ordinary VM now"
    if record.role == "active":
        return "failed over", "it runs instead of its source: failback or failover-undo"
    if record.intent is not None and record.role != "seeding":
        return "interrupted", "an increment is half applied; the next session ends it"
    if record.role in ("none", "seeding"):
        return "seeding", "the seed hasn't ended: run it again, it goes on"
    if not record.points:
        return "no point", "there is no restore point: run a cycle"
    if rpo_s and lag is not None and lag > rpo_s:
        return "late", f"its newest instant is {lag} s old, the RPO is {rpo_s} s"
    if record.testing is not None:
        return "test", "a failover test runs; increments are staged meanwhile"
    if record.staged:
        return "staged", "increments wait to be applied; the next session does it"
    return "ok", ""


def _sizes(store: ReplicaStore, uuid: str, stage_dir: str) -> Iterator[int]:
    for path in stage_files(store, uuid, stage_dir):
        try:
            yield path.stat().st_size
        except OSError:
            continue


def stage_files(store: ReplicaStore, uuid: str, stage_dir: str) -> list[Path]:
    """Return a replica's stages, whole or not."""
    places = {store.directory(uuid)}
    if stage_dir:
        places.add(Path(stage_dir) / uuid)
    return sorted(path for place in places for path in place.glob("*.stage"))
