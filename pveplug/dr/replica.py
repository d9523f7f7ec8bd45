# SPDX-License-Identifier: Apache-2.0
"""One replica, opened and locked: from what arrives to a restore point.

::

    seed        begin ─ provision ─ write the volumes ─ commit ──────────────┐
    increment   begin ─ stage ─ commit: verify ─ intent ─ reconfigure ─ write ┤
                                                                   finish: snapshot
                                              rotate ◄─ acknowledged ◄─ record ◄┘

Killed anywhere, the newest restore point stands, for it is a snapshot and nothing is
ever written to one. What the next opening finds decides what it does:

========================  =====================================================
a stage without intent    dropped: it was never acknowledged
an intent                 its stage is written again, then the restore point is
                          taken; a seed's volumes hold all of it already
staged and acknowledged   applied in order, as soon as no test runs
an intent without stage   back to the newest restore point; the sender compares
========================  =====================================================

Writing a stage again gives the same volumes, so it doesn't matter how far the first
attempt had come.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pveplug.dr.admission import CYCLE_MODES, admit, doomed, point_name
from pveplug.dr.guard import Guard
from pveplug.dr.provision import (
    Plan,
    Provisioner,
    Site,
    plan_replica,
    translated,
)
from pveplug.dr.reading import digest_window, read_padded, zero_digests
from pveplug.dr.stage import Stage, StageSpaceError, StageWriter, frames, verify
from pveplug.dr.store import (
    Origin,
    Record,
    ReplicaError,
    ReplicaStore,
    Report,
    Staged,
    Volume,
    checked_uuid,
    new_record,
)
from pveplug.dr.volumes import Volumes, forget_dead_sockets
from pveplug.errors import IntegrityError, PveplugError, RemoteProtocolError
from pveplug.events import NullReporter, Reporter
from pveplug.proto.dr_digest import (
    RunDigest,
    fnv1a_64,
)
from pveplug.proto.dr_frames import (
    DIGEST_SIZE,
    LEAF,
    MAX_DIGESTS,
    MAX_SAMPLES,
    Applied,
    AskDigests,
    AskSamples,
    Block,
    Commit,
    Describe,
    Digests,
    Disk,
    DiskEnd,
    Done,
    Durable,
    Finish,
    Open,
    Point,
    Ready,
    Samples,
    State,
    Zero,
    decode,
)
from pveplug.proto.dr_stage import Run
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.tasks import to_the_end
from pveplug.units import KiB, MiB, human
from pveplug.vmconfig import drives, is_drive_key, parse_size

log = logging.getLogger(__name__)

DURABLE_BYTES: Final = 64 * MiB
DURABLE_S: Final = 5.0
"""How much of a seed, and how long, may be lost by a cut."""
UNKNOWN: Final = bytes(DIGEST_SIZE)
"""Of a leaf that a staged increment changes: equal to no leaf's digest."""
_INLINE: Final = 64 * KiB
"""Hashing more than that is worth a thread."""
_GIVE_UP_S: Final = 30.0


# --- opening -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_replica(
    store: ReplicaStore, site: Site, opening: Open
) -> AsyncIterator[Replica]:
    """Have one replica for oneself; a session that didn't end is abandoned.

    Raises:
        ReplicaError: ``busy``, ``role``, ``epoch``, ``identity``.
    """
    uuid = checked_uuid(opening.uuid)
    with store.hold(uuid, f"{opening.job or 'a session'} ({opening.mode})"):
        record = await asyncio.to_thread(store.read, uuid)
        if record is None:
            record = new_record(uuid)
            record.epoch = max(opening.epoch or 1, 1)
        admit(record, opening)
        await asyncio.to_thread(forget_dead_sockets, site.node.runtime_dir)
        if opening.mode in CYCLE_MODES:
            record.origin = Origin(opening.vmid, opening.name, opening.site)
        replica = Replica(store, site, opening, record)
        try:
            yield replica
        finally:
            await to_the_end(replica.aclose())


@dataclass(slots=True)
class _Incoming:
    """A disk that is coming."""

    disk: Disk
    digest: RunDigest = field(default_factory=RunDigest)
    """Of a seed's frames; an increment's stage has its own."""
    bytes: int = 0
    frontier: int = 0
    """Where the data of a seed ends that has come in order."""
    ended: bool = False


@dataclass(slots=True)
class _Session:
    """One cycle, from Describe to Finish."""

    describe: Describe
    plan: Plan
    seed: bool
    item: Staged
    began: float
    fresh: frozenset[str]
    disks: dict[int, _Incoming] = field(default_factory=dict)
    stage: StageWriter | None = None
    committed: bool = False
    deferred: bool = False
    bytes: int = 0


class Replica:
    """An open replica; its calls come one after another, in the order of a cycle.

    What a call raises ends the session: :meth:`abandon` it. Cancelled, a call leaves
    the replica so that the next opening goes on.
    """

    def __init__(
        self, store: ReplicaStore, site: Site, opening: Open, record: Record
    ) -> None:
        self.site = site
        self.record = record
        self.opening = opening
        self.volumes = Volumes(site, record)
        self._store = store
        self._say: Reporter = NullReporter()
        self._session: _Session | None = None
        self._durable: list[Durable] = []
        self._saving = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None
        self._flushed_at = 0.0
        self._unflushed = 0
        self._guard = Guard(site, record, store.directory(record.uuid))

    # --- what is known ---------------------------------------------------------------

    @property
    def vmid(self) -> int:
        """Id of the replica VM; 0: none yet."""
        return self.record.vmid

    def state(self) -> State:
        """Return what the sender is told."""
        return self.record.state(node=self.site.here, version=self.site.version)

    async def save(self) -> None:
        """Bring the record onto stable storage."""
        async with self._saving:
            record = copy.deepcopy(self.record)
            await to_the_end(asyncio.to_thread(self._store.write, record))

    def provisioner(self, say: Reporter | None = None) -> Provisioner:
        """Return what makes and changes the VM."""
        return Provisioner(self.site, self.record, self.save, say or self._say)

    @property
    def durable(self) -> Iterable[Durable]:
        """What has become durable since this was last asked for."""
        said, self._durable = self._durable, []
        return said

    # --- a cycle begins --------------------------------------------------------------

    async def begin(self, describe: Describe, say: Reporter) -> Ready:
        """Make ready for a cycle's disks.

        Raises:
            ReplicaError: the replica can't be what the source is.
        """
        self._say = say
        if self._session is not None:
            raise ReplicaError("protocol", "a cycle has begun already")
        seed = self.opening.mode == "seed"
        if self.record.role not in (("none", "seeding") if seed else ("standby",)):
            raise ReplicaError(
                "role",
                f"the replica (VM {self.vmid}) is {self.record.role}",
                remedy="run mode=incremental." if seed else "",
            )
        if self.record.intent is not None:
            raise ReplicaError(
                "internal",
                f"cycle {self.record.intent.cycle} is not applied yet",
                remedy="run the job again.",
            )
        _check_describe(describe)
        plan = await plan_replica(self.site, self.record, self.opening, describe)
        record = self.record
        record.cycle = max(record.cycle + 1, describe.number)
        item = Staged(
            describe.cycle,
            record.cycle,
            instant=describe.instant,
            consistency=describe.consistency,
            sizes={disk.key: disk.size for disk in describe.disks},
        )
        fresh = self._fresh(describe)
        self._session = _Session(describe, plan, seed, item, time.monotonic(), fresh)
        if seed:
            await self._begin_seed(self._session)
        else:
            await self._begin_increment(self._session)
        return Ready(
            record.vmid,
            tuple(sorted(fresh)),
            {k: v for k, v in record.seeded.items() if k in item.sizes},
        )

    def _fresh(self, describe: Describe) -> frozenset[str]:
        """Return the disks that are made for this cycle."""
        held = {key: volume.size for key, volume in self.record.disks.items()}
        if self.record.staged:
            held = self.record.staged[-1].sizes
        return frozenset(
            disk.key
            for disk in describe.disks
            if disk.key not in held or disk.size < held[disk.key]
        )

    async def _begin_seed(self, session: _Session) -> None:
        record, describe = self.record, session.describe
        await self._guard.own()
        # Nothing durable yet: what changed since an earlier try doesn't matter.
        if record.seed_cycle is None or not any(record.seeded.values()):
            record.seed_cycle = describe.cycle
        first = record.role == "none"
        record.role = "seeding"
        await self.save()
        making = self.provisioner()
        for kind, text in session.plan.said:
            (self._say.warning if kind == "warning" else self._say.info)(text)
        try:
            with translated("the replica VM can't be made"):
                await making.create(
                    session.plan, self.opening.target_vmid, self.opening.vmid
                )
                await self._guard.own()
                await making.ensure(session.plan)
                await self._must_snapshot()
                await self._guard.lock()
        except BaseException:
            if first:
                await to_the_end(self._undo_provisioning(making))
            raise
        disks = ", ".join(
            f"{key} on {v.storage} ({v.format}, {human(v.size)})"
            for key, v in record.disks.items()
        )
        self._say.info(f"the replica is VM {record.vmid} on {self.site.here}: {disks}")

    async def _must_snapshot(self) -> None:
        able = await self.site.api.has_feature(
            self.site.here, self.record.vmid, "snapshot"
        )
        if not able:
            raise ReplicaError(
                "storage",
                f"Proxmox VE can't snapshot VM {self.record.vmid} with its disks where "
                "they are, and restore points are snapshots",
                remedy="name a dr_storage on a directory or NFS (qcow2), ZFS, LVM-thin "
                "or Ceph RBD.",
            )

    async def _undo_provisioning(self, making: Provisioner) -> None:
        """Leave nothing half made; what brought us here is what is raised."""
        try:
            gone = await making.destroy()
        except PveplugError as error:
            self._say.error(f"VM {self.record.vmid} was left half made: {error}")
            return
        if gone:
            self._say.info(f"VM {self.record.vmid} was removed again")
        blank = new_record(self.record.uuid)
        blank.link, blank.epoch = self.record.link, self.record.epoch
        for spec in dataclasses.fields(Record):
            setattr(self.record, spec.name, getattr(blank, spec.name))
        with contextlib.suppress(PveplugError):
            await asyncio.to_thread(self._store.forget, self.record.uuid)

    async def _begin_increment(self, session: _Session) -> None:
        item = session.item
        # What would fail the commit is found before all the data has come.
        with translated(f"the replica VM {self.vmid}"):
            await self.provisioner().must_be_there()
        self._guard.must_be_off()
        item.file = f"{item.number:08d}.stage"
        await self.save()
        meta = {"opening": _plain(self.opening), "describe": _plain(session.describe)}
        path = self._stage_path(item)
        with _stage_errors(path):
            session.stage = await StageWriter.create(
                path, meta, keep_free=self.site.keep_free
            )

    # --- disks -----------------------------------------------------------------------

    async def disk(self, disk: Disk) -> None:
        """Begin a disk."""
        session = self._running()
        if session.item.sizes.get(disk.key) != disk.size:
            raise ReplicaError(
                "protocol", f"disk {disk.key} of {disk.size} bytes was not described"
            )
        known = {incoming.disk.key for incoming in session.disks.values()}
        if disk.number in session.disks or disk.key in known:
            raise ReplicaError("protocol", f"disk {disk.key} comes twice")
        incoming = _Incoming(disk, frontier=self.record.seeded.get(disk.key, 0))
        session.disks[disk.number] = incoming
        session.item.numbers[disk.key] = disk.number
        if session.seed:
            await self.volumes.writer(disk.key)
            self._flushed_at = time.monotonic()
            self._unflushed = 0

    async def take(self, frame: Block | Zero) -> None:
        """Take a part of a disk; its data may be reused when this returns.

        Raises:
            ReplicaError: it doesn't belong to the disk, or there is no room for it.
        """
        session = self._running()
        incoming = session.disks.get(frame.number)
        if incoming is None or incoming.ended:
            raise ReplicaError("protocol", f"disk number {frame.number} isn't open")
        if frame.end > incoming.disk.size:
            raise ReplicaError(
                "protocol",
                f"disk {incoming.disk.key}: {frame.end} is behind its end",
            )
        if isinstance(frame, Block):
            session.bytes += len(frame.data)
            incoming.bytes += len(frame.data)
        if session.stage is not None:
            with _stage_errors(session.stage.path):
                await session.stage.add(frame)
            return
        await self._write_seed(incoming, frame)

    async def _write_seed(self, incoming: _Incoming, frame: Block | Zero) -> None:
        key = incoming.disk.key
        sink = await self.volumes.writer(key)
        with translated(f"disk {key} of the replica"):
            if isinstance(frame, Zero):
                incoming.digest.add(frame)
                await sink.zero(frame.offset, frame.length)
                return
            if len(frame.data) > _INLINE:
                hashing = asyncio.create_task(
                    asyncio.to_thread(incoming.digest.add, frame)
                )
                try:
                    await sink.write(frame.offset, frame.data)
                finally:
                    await to_the_end(_ended(hashing))
            else:
                incoming.digest.add(frame)
                await sink.write(frame.offset, frame.data)
        # Data comes in the disk's order; what changed below comes before the rest.
        incoming.frontier = max(incoming.frontier, frame.end)
        self._unflushed += len(frame.data)
        late = time.monotonic() - self._flushed_at >= DURABLE_S
        if self._unflushed >= DURABLE_BYTES or late:
            await self._flush(incoming)

    async def _flush(self, incoming: _Incoming) -> None:
        """Have what has come made durable while more comes; one at a time."""
        if self._flushing is not None:
            if not self._flushing.done():
                return
            await self._flush_ended()
        key, frontier = incoming.disk.key, incoming.frontier
        with translated(f"disk {key} of the replica"):
            durable = await (await self.volumes.writer(key)).mark()
        self._flushed_at = time.monotonic()
        self._unflushed = 0

        async def flush() -> None:
            if await durable():
                await self._seeded(incoming, frontier)

        self._flushing = asyncio.create_task(flush(), name=f"flush {key}")

    async def _flush_ended(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            with translated("the replica's storage"):
                await flushing

    async def _seeded(self, incoming: _Incoming, offset: int) -> None:
        key = incoming.disk.key
        if offset <= self.record.seeded.get(key, 0):
            return
        self.record.seeded[key] = offset
        await self.save()
        self._durable.append(Durable(incoming.disk.number, offset))

    async def disk_end(self, end: DiskEnd) -> None:
        """End a disk: what came must be what was sent.

        Raises:
            ReplicaError: ``integrity``.
        """
        session = self._running()
        incoming = session.disks.get(end.number)
        if incoming is None or incoming.ended:
            raise ReplicaError("protocol", f"disk number {end.number} isn't open")
        key = incoming.disk.key
        if session.stage is not None:
            with _stage_errors(session.stage.path):
                came = await session.stage.run(end.number)
        else:
            digest = incoming.digest
            came = Run(digest.frames, digest.bytes, digest.hexdigest())
        if came != Run(end.frames, end.bytes, end.digest):
            if session.seed:
                # What is on the volume isn't what was sent: none of it counts.
                await self._forget_flush()
                self.record.seeded[key] = 0
                await self.save()
            raise ReplicaError(
                "integrity",
                f"disk {key}: {came.frames} frames with {came.bytes} bytes came, and "
                f"{end.frames} with {end.bytes} were sent, or their digests differ",
                remedy="run the job again.",
            )
        if session.seed:
            await self._flush_ended()
            await self.volumes.close(key)
            await self._seeded(incoming, incoming.disk.size)
        incoming.ended = True

    # --- the cycle is applied --------------------------------------------------------

    async def commit(self, commit: Commit) -> Applied:
        """Verify the increment whole and make the replica's disks those of the cycle.

        Raises:
            ReplicaError: nothing was touched, or the next opening goes on.
        """
        session = self._running()
        ended = {i.disk.key for i in session.disks.values() if i.ended}
        if len(ended) != len(session.disks) or commit.disks != len(ended):
            raise ReplicaError(
                "integrity", f"{commit.disks} disks were sent, {len(ended)} came whole"
            )
        record, item = self.record, session.item
        item.bytes = session.bytes
        if session.seed:
            missing = [
                key
                for key, size in item.sizes.items()
                if key not in ended and record.seeded.get(key, 0) < size
            ]
            if missing:
                raise ReplicaError("integrity", f"{', '.join(missing)} did not come")
            await self._flush_ended()
            await self.volumes.close_all()
            await self._guard.unlock()
            item.seed = True
            record.intent = item
            await self.save()
            session.committed = True
            return Applied()
        if missing := sorted(session.fresh - ended):
            raise ReplicaError("integrity", f"{', '.join(missing)} did not come")
        stage, session.stage = session.stage, None
        if stage is None:
            raise ReplicaError("internal", "the increment has no stage")
        try:
            with _stage_errors(stage.path):
                await stage.finish()
                whole = await verify(stage.path)
        except BaseException:
            await stage.discard()
            raise
        session.committed = True
        await self.volumes.close_all()
        if record.testing is not None or record.staged:
            session.deferred = True
            return Applied(deferred=True)
        try:
            await self._check_room(session)
        except ReplicaError:
            self._unlink(stage.path)
            raise
        await self._intend(item)
        await self._apply(item, whole, session.plan)
        return Applied()

    async def _check_room(self, session: _Session) -> None:
        """Refuse what surely has no room, while nothing is touched yet.

        After a restore point every cluster that is overwritten needs a new one.
        """
        needed: dict[str, int] = {}
        for key, number in session.item.numbers.items():
            plan = session.plan.disks[key]
            needed[plan.storage] = needed.get(plan.storage, 0) + (
                session.disks[number].bytes
            )
        with translated("the DR site"):
            storages = await self.site.api.storages(self.site.here)
        for storage in storages:
            size = needed.get(storage.name, 0)
            if storage.total and size > storage.avail:
                raise ReplicaError(
                    "space",
                    f"storage {storage.name} has {human(storage.avail)} left and the "
                    f"increment needs {human(size)}",
                    remedy="make room there, or keep fewer restore points.",
                )

    async def _intend(self, item: Staged) -> None:
        self.record.intent = item
        self.record.dirty = True
        await self.save()

    async def _apply(self, item: Staged, whole: Stage, plan: Plan | None) -> None:
        """Make the VM and its disks those of a verified stage; may be done again."""
        await self._guard.own()
        if plan is None:
            opening, describe = _from_meta(whole)
            plan = await plan_replica(self.site, self.record, opening, describe)
        with translated("the replica VM can't be changed"):
            await self.provisioner().ensure(plan)
        keys = {number: key for key, number in item.numbers.items()}
        await self._guard.lock()
        try:
            async with aclosing(frames(whole.path)) as coming:  # type: ignore[type-var]
                async for frame in coming:
                    key = keys.get(frame.number)
                    if key is None:
                        raise ReplicaError("integrity", "the stage has another disk")
                    sink = await self.volumes.writer(key)
                    with translated(f"disk {key} of the replica"):
                        if isinstance(frame, Block):
                            await sink.write(frame.offset, frame.data)
                        else:
                            await sink.zero(frame.offset, frame.length)
            await self.volumes.close_all()
        except BaseException:
            await to_the_end(self.volumes.drop())
            raise
        await self._guard.unlock()
        self._guard.must_be_off()  # nor was it started meanwhile

    # --- verification ----------------------------------------------------------------

    async def digests(self, ask: AskDigests) -> Digests:
        """Digest leaves of a disk as it is now."""
        size = self._size(ask.key)
        end = ask.offset + ask.length
        aligned = not ask.offset % LEAF and (not ask.length % LEAF or end == size)
        if not aligned or not 0 < ask.length <= MAX_DIGESTS * LEAF or end > size:
            raise ReplicaError(
                "protocol", f"digests of {ask.length} bytes at {ask.offset}"
            )
        if self._unmade(ask.key):
            found = zero_digests(ask.length)
        else:
            client = await self.volumes.reader(ask.key)
            with translated(f"disk {ask.key} of the replica"):
                found = await digest_window(client, ask.offset, ask.length)
        if self.record.staged:
            found = await self._hide_staged(ask, found)
        return Digests(0, ask.offset, found)

    async def _hide_staged(self, ask: AskDigests, found: bytes) -> bytes:
        """Say UNKNOWN of the leaves that increments not yet applied change."""
        masked = bytearray(found)
        for item in self.record.staged:
            number = item.numbers.get(ask.key)
            path = self._stage_path(item)
            async with aclosing(frames(path)) as coming:  # type: ignore[type-var]
                async for frame in coming:
                    if frame.number != number:
                        continue
                    low = max(frame.offset, ask.offset)
                    high = min(frame.end, ask.offset + ask.length)
                    for at in range(low // LEAF * LEAF, high, LEAF):
                        place = (at - ask.offset) // LEAF * DIGEST_SIZE
                        masked[place : place + DIGEST_SIZE] = UNKNOWN
        return bytes(masked)

    async def samples(self, ask: AskSamples) -> Samples:
        """Return FNV-1a-64 of single leaves of a disk as it is now."""
        size = self._size(ask.key)
        bad = any(at % LEAF or at >= size for at in ask.offsets)
        if bad or len(ask.offsets) > MAX_SAMPLES:
            raise ReplicaError("protocol", f"{len(ask.offsets)} samples of {ask.key}")
        if self._unmade(ask.key):
            raise ReplicaError("protocol", f"{ask.key} isn't made yet")
        client = await self.volumes.reader(ask.key)
        values = []
        with translated(f"disk {ask.key} of the replica"):
            for at in ask.offsets:
                leaf = await read_padded(client, at, min(LEAF, size - at))
                values.append(await asyncio.to_thread(fnv1a_64, leaf))
        return Samples(ask.key, tuple(values))

    async def repair(self, block: Block) -> None:
        """Write a leaf that was found to differ; durable before the restore point."""
        session = self._session
        incoming = session.disks.get(block.number) if session else None
        if session is None or incoming is None or not session.committed:
            raise ReplicaError("protocol", "nothing is to be repaired now")
        if session.deferred or block.end > incoming.disk.size:
            raise ReplicaError("protocol", f"no repair of {incoming.disk.key} there")
        await self._guard.lock()
        sink = await self.volumes.writer(incoming.disk.key)
        with translated(f"disk {incoming.disk.key} of the replica"):
            await sink.write(block.offset, block.data)

    def _size(self, key: str) -> int:
        if self._session is not None and key in self._session.item.sizes:
            return self._session.item.sizes[key]
        if key in self.record.disks:
            return self.record.disks[key].size
        raise ReplicaError("protocol", f"the replica has no disk {key}")

    def _unmade(self, key: str) -> bool:
        """Whether the disk is one that this or a staged cycle only brings."""
        session = self._session
        if key not in self.record.disks:
            return True
        if session is None or session.seed or session.committed:
            return False
        return key in session.fresh

    # --- the restore point -----------------------------------------------------------

    async def finish(self, finish: Finish) -> Done:
        """Take the restore point and acknowledge.

        Raises:
            ReplicaError: it isn't acknowledged; the next opening tries again.
        """
        session = self._session
        if session is None or not session.committed:
            raise ReplicaError("protocol", "nothing was committed")
        record, item = self.record, session.item
        await self.volumes.close_all()
        await self._guard.unlock()
        seconds = time.monotonic() - session.began
        report = Report(self.opening.job, time.time(), round(seconds, 3), item.bytes)
        point: Point | None = None
        record.slice += 1 if finish.checked else 0
        if session.deferred:
            record.staged.append(item)
            record.acked = item.cycle
            record.welcome = False
            record.report = report
            await self.save()
        else:
            point = await self._take_point(item, report)
        self._session = None
        if point is not None:
            await self._rotate()
        await self._guard.release()
        return Done(item.cycle, record.epoch, point, tuple(record.points))

    async def _take_point(self, item: Staged, report: Report | None = None) -> Point:
        """Take the snapshot of an applied increment and write it down."""
        record = self.record
        if not item.snapshot:
            item.snapshot = point_name(item.number, time.time())
            await self.save()
        with translated("the restore point can't be taken"):
            await self._snapshot(item)
        point = Point(
            item.snapshot,
            item.cycle,
            int(time.time()),
            item.instant,
            item.consistency,
            item.bytes,
        )
        record.points.append(point)
        record.acked = record.staged[-1].cycle if record.staged else item.cycle
        record.intent = None
        record.dirty = False
        if item.seed:
            record.role = "standby"
            record.seeded = {}
            record.seed_cycle = None
        if report is not None:
            record.welcome = False
            record.report = report
        await self.save()
        if item.file:
            self._unlink(self._stage_path(item))
        return point

    async def _snapshot(self, item: Staged) -> None:
        if await self._taken(item):
            return
        api, here, vmid = self.site.api, self.site.here, self.record.vmid
        text = (
            f"Restore point of cycle {item.cycle}, "
            f"{item.consistency or 'unknown'} ({self.record.link}). "
            "Removed by rotation; failover and failover-test use it."
        )
        try:
            warnings = await api.snapshot_create(here, vmid, item.snapshot, text)
        except PveRefusalError as error:
            if error.reason is not Reason.EXISTS:
                with contextlib.suppress(PveplugError):
                    await self._drop_half(item.snapshot)
                raise
            warnings = []
        for line in warnings:
            self._say.warning(f"VM {vmid}: {line}")

    async def _taken(self, item: Staged) -> bool:
        """Whether an attempt whose end nobody heard of has taken the snapshot."""
        api, here, vmid = self.site.api, self.site.here, self.record.vmid
        if not item.snapshot:
            return False
        with translated(f"restore point {item.snapshot}"):
            if item.snapshot not in await api.snapshots(here, vmid):
                return False
            found = await api.snapshot_config(here, vmid, item.snapshot)
            if "snapstate" not in found.values:
                return True
            await api.snapshot_delete(here, vmid, item.snapshot, force=True)
        return False

    async def _drop_half(self, name: str) -> None:
        """Remove a snapshot that PVE began and didn't end."""
        api, here, vmid = self.site.api, self.site.here, self.record.vmid
        if name in await api.snapshots(here, vmid):
            await api.snapshot_delete(here, vmid, name, force=True)

    async def _rotate(self) -> None:
        """Let old restore points go; the cycle is good whatever happens here."""
        record, site = self.record, self.site
        try:
            there = set(await site.api.snapshots(site.here, record.vmid))
            gone = [p for p in record.points if p.name not in there]
            if gone:
                names = ", ".join(p.name for p in gone)
                self._say.warning(f"restore points removed by others: {names}")
                record.points = [p for p in record.points if p.name in there]
                await self.save()
            testing = record.testing or {}
            failover = record.failover or {}
            held = {str(testing.get("point", "")), str(failover.get("point", ""))}
            for point in doomed(
                record.points,
                wanted=self.opening.points,
                minimum=site.retention_min,
                lock_days=site.retention_lock_days,
                now=time.time(),
                held=held,
            ):
                record.points.remove(point)
                record.leaving.append(point.name)
            if record.leaving:
                await self.save()
            for name in list(record.leaving):
                if name in there:
                    await site.api.snapshot_delete(site.here, record.vmid, name)
                    self._say.info(f"restore point {name} has rotated out")
                record.leaving.remove(name)
                await self.save()
            await self.provisioner().sweep()
        except PveplugError as error:
            self._say.warning(f"old restore points stay for now: {error}")

    # --- what an earlier session left ------------------------------------------------

    async def unlock(self) -> None:
        """Take away the lock that a session has left which was killed.

        Raises:
            ReplicaError: ``busy``; ``role`` where the VM runs; ``pve``.
        """
        await self._guard.own()
        await self._guard.release()

    async def apply_pending(self, say: Reporter) -> bool:
        """Finish what an earlier session had begun, and apply what a test held up.

        Returns: whether anything was applied.

        Raises:
            ReplicaError: it can't be, yet; the last restore point stands.
        """
        self._say = say
        record = self.record
        if record.role in ("active", "permanent") or record.testing is not None:
            return False
        done = False
        while record.intent is not None or record.staged:
            if record.intent is None:
                item = record.staged.pop(0)
                await self._intend(item)
            item = record.intent or item
            if not await self._redo(item):
                break
            done = True
        self._drop_orphans()
        await self._guard.release()
        if done and self.opening.mode in CYCLE_MODES:
            await self._rotate()  # others don't say how many points are wanted
        return done

    async def _redo(self, item: Staged) -> bool:
        """Apply an intent again and take its restore point."""
        if not item.seed and not await self._taken(item):
            path = self._stage_path(item)
            try:
                whole = await verify(path)
            except IntegrityError as error:
                await self._fall_back(item, str(error))
                return False
            await self._apply(item, whole, None)
        point = await self._take_point(item)
        self._say.info(
            f"cycle {item.cycle}, which an earlier session had left, is applied: "
            f"restore point {point.name}"
        )
        return True

    async def _fall_back(self, item: Staged, why: str) -> None:
        """Go back to the newest restore point: the increment is lost."""
        record, site = self.record, self.site
        if not record.points:
            raise ReplicaError(
                "integrity", f"cycle {item.cycle} can't be applied: {why}"
            )
        await self._guard.own()
        newest = record.points[-1]
        with translated(f"going back to restore point {newest.name}"):
            await site.api.rollback(site.here, record.vmid, newest.name)
            config = await site.api.vm_config(site.here, record.vmid)
        disks = {}
        for drive in drives(config.values):
            if drive.is_cdrom:
                continue
            known = next(
                (v for v in record.disks.values() if v.volid == drive.file), None
            )
            size = parse_size(drive.get("size", "0"))
            form = known.format if known else drive.format or "raw"
            if known is not None and known.size <= size:
                size = known.size
            disks[drive.key] = Volume(drive.file, size, form, drive.storage or "")
        current = {volume.volid for volume in disks.values()}
        record.retired = [v for v in record.retired if v not in current] + [
            v.volid for v in record.disks.values() if v.volid not in current
        ]
        record.disks = disks
        lost = [item, *record.staged]
        record.staged = []
        record.intent = None
        record.dirty = False
        record.acked = newest.cycle
        await self.save()
        cycles = ", ".join(i.cycle for i in lost)
        self._say.warning(
            f"the staged increment of {cycles} can't be applied ({why}); the replica "
            f"went back to restore point {newest.name}"
        )

    def _drop_orphans(self) -> None:
        """Remove stages that nobody acknowledged."""
        known = {item.file for item in self.record.staged}
        if self.record.intent is not None:
            known.add(self.record.intent.file)
        for path in self._stage_directory().glob("*.stage"):
            if path.name not in known:
                self._unlink(path)

    # --- the end ---------------------------------------------------------------------

    async def reject(self) -> None:
        """Give up a cycle that is applied and was found to be wrong.

        It becomes no restore point. The volumes stay as they are, ``dirty``; the next
        cycle builds on the last one that was acknowledged.
        """
        item = self.record.intent
        if item is None:
            return
        self.record.intent = None
        await self.save()
        log.warning("cycle rejected by its sender cycle=%s", item.cycle)
        if item.file:
            self._unlink(self._stage_path(item))

    async def abandon(self) -> None:
        """Let go of a cycle that ends early; never raises.

        A stage that was not committed is dropped. What a seed has sent is kept, and so
        is an intent, for the next opening.
        """
        session, self._session = self._session, None
        try:
            if session is not None and session.seed and not session.committed:
                await self._keep_seeded(session)
            await self._forget_flush()
            await self.volumes.drop()
            if session is None:
                return
            if session.stage is not None:
                await session.stage.discard()
            elif session.deferred and session.item.file:
                self._unlink(self._stage_path(session.item))
        except Exception:
            log.exception("abandoning replica=%s", self.record.uuid)

    async def _keep_seeded(self, session: _Session) -> None:
        """Have what has come so far made durable, if that is quickly done."""
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                await self._flush_ended()
                for incoming in session.disks.values():
                    if not incoming.ended and incoming.disk.key in self.volumes.writing:
                        sink = await self.volumes.writer(incoming.disk.key)
                        await sink.finish()
                        await self._seeded(incoming, incoming.frontier)
        except (PveplugError, TimeoutError) as error:
            log.info("seed not flushed at its early end: %s", error)

    async def _forget_flush(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.cancel()
            await to_the_end(_ended(flushing))

    async def aclose(self) -> None:
        """Abandon what has not ended and close every volume."""
        await self.abandon()
        await self._guard.release()

    def _running(self) -> _Session:
        session = self._session
        if session is None or session.committed:
            raise ReplicaError("protocol", "no cycle takes disks now")
        return session

    def _stage_directory(self) -> Path:
        if self.site.stage_dir:
            return Path(self.site.stage_dir) / self.record.uuid
        return self._store.directory(self.record.uuid)

    def _stage_path(self, item: Staged) -> Path:
        return self._stage_directory() / item.file

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("stage path=%s not removed: %s", path, error)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


@contextlib.contextmanager
def _stage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StageSpaceError as error:
        raise ReplicaError(
            "space",
            str(error),
            remedy="make room there, or name another stage_dir in the receiver's "
            "configuration.",
        ) from error
    except IntegrityError as error:
        raise ReplicaError("integrity", f"{path.name}: {error}") from error


def _check_describe(describe: Describe) -> None:
    keys = [disk.key for disk in describe.disks]
    if not keys or len(set(keys)) != len(keys):
        raise ReplicaError("protocol", "the source VM's disks are none, or named twice")
    for disk in describe.disks:
        if not is_drive_key(disk.key) or disk.size <= 0:
            raise ReplicaError("protocol", f"disk {disk.key!r} of {disk.size} bytes")


def _plain(message: Open | Describe) -> object:
    return json.loads(b"".join(bytes(part) for part in message.encode()[1]))


def _from_meta(whole: Stage) -> tuple[Open, Describe]:
    """Return what an increment was opened and described with."""
    found = []
    try:
        for name, kind in (("opening", Open), ("describe", Describe)):
            text = json.dumps(whole.meta[name]).encode()
            found.append(decode(kind.TYPE, text))
    except (KeyError, RemoteProtocolError) as error:
        raise ReplicaError("integrity", f"{whole.path.name}: {error}") from error
    opening, describe = found
    if not isinstance(opening, Open) or not isinstance(describe, Describe):
        raise ReplicaError("integrity", f"{whole.path.name} describes nothing")
    return opening, describe
