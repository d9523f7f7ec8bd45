# SPDX-License-Identifier: Apache-2.0
"""What a session of the receiver can ask of its site; the one place that has it all.

A failover test is the exception among the actions: it takes the replica twice, to begin
and to end, so that cycles can come while the test VM boots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pveplug.dr import boot, testvm
from pveplug.dr.admission import CYCLE_MODES
from pveplug.dr.failover import ACTIONS, BOOT_S, Operation, seconds_of
from pveplug.dr.guard import HELD
from pveplug.dr.overview import overview, overviews
from pveplug.dr.provision import Site
from pveplug.dr.replica import open_replica
from pveplug.dr.sendback import SendingBack, sending_back
from pveplug.dr.store import Record, ReplicaError, ReplicaStore
from pveplug.errors import PveplugError
from pveplug.events import NullReporter, Reporter
from pveplug.proto.dr_frames import Command, Open, Result, State
from pveplug.tasks import to_the_end

log = logging.getLogger(__name__)

TEST: Final = "failover-test"
BUSY_S: Final = 30.0
"""How long the end of a test waits for a session that has the replica."""
_AGAIN_S: Final = 0.5
MAX_TOLD: Final = 4000
"""Restore points in one answer: 150 bytes each of the 1 MiB a frame may have."""

Opener = Callable[[ReplicaStore, Site, Open], AbstractAsyncContextManager[Any]]


class ReplicaServices:
    """Replicas, actions and tests of one receiver.

    Attributes:
        site: replaced at a reload; what is open keeps the one it began with.
    """

    def __init__(
        self,
        store: ReplicaStore,
        site: Site,
        opener: Opener = open_replica,
        *,
        busy_s: float = BUSY_S,
    ) -> None:
        self.store = store
        self.site = site
        self._opener = opener
        self._busy_s = busy_s
        self._tests: set[str] = set()
        """Replicas that this process is testing."""

    # --- sessions --------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open(self, opening: Open, say: Reporter) -> AsyncIterator[Any]:
        """Take a replica for a session alone, with nothing left to be finished.

        Raises:
            ReplicaError: it is busy, or not for this sender.
        """
        async with self._opener(self.store, self.site, opening) as replica:
            if replica.record.testing is not None and opening.uuid not in self._tests:
                await Operation(replica, say).clear_test()
            seeded = replica.record.role == "seeding" and replica.record.intent
            if opening.mode in CYCLE_MODES or seeded:
                await replica.apply_pending(say)
            yield replica

    def look(self, opening: Open) -> State:
        """Return what is known of a replica without taking it."""
        record = self.store.read(opening.uuid) if opening.uuid else None
        if record is None:
            return State(link="", role="none", epoch=0, node=self.site.here)
        return record.state(node=self.site.here, version=self.site.version)

    async def act(
        self, opening: Open, replica: Any | None, command: Command, say: Reporter
    ) -> Result:
        """Do what a command says.

        Raises:
            ReplicaError: it isn't for this replica now; the text says what is.
        """
        action, options = command.action, command.options
        if action == "status":
            return await self._status(opening.uuid, options)
        if action == TEST and opening.mode == TEST and opening.uuid:
            return await self._test(opening, options, say)
        known = ACTIONS.get(action)
        if known is None and action != TEST:
            names = ", ".join(sorted([*ACTIONS, TEST, "status"]))
            raise ReplicaError(
                "protocol",
                f"this receiver doesn't know {action[:40]!r}; it knows {names}",
                remedy="update the older of the two sites.",
            )
        if known is None or replica is None:
            raise ReplicaError(
                "protocol", f"{action} in a session opened for {opening.mode!r}"
            )
        if opening.uuid in self._tests:
            raise ReplicaError(
                "busy",
                "a failover test of this replica runs",
                remedy="let it end, then run this again.",
            )
        operation = Operation(replica, say, opening.job)
        values = await known(operation, options)
        return Result(action, operation.record.epoch, values)

    @contextlib.asynccontextmanager
    async def back(self, replica: Any) -> AsyncIterator[SendingBack]:
        """Serve the disks of a replica that is shut down, for a failback."""
        operation = Operation(replica, NullReporter())
        volumes = await operation.current_volumes()
        async with sending_back(operation.site, volumes) as back:
            yield back

    async def _status(self, uuid: str, options: Mapping[str, str]) -> Result:
        rpo_s = seconds_of(options, "dr_rpo", 0)

        def read() -> list[Any]:
            told: dict[str, Any] = {"stage_dir": self.site.stage_dir, "rpo_s": rpo_s}
            if uuid:
                return [overview(self.store, uuid, **told)]
            return list(overviews(self.store, **told))

        found = await asyncio.to_thread(read)
        # One frame has to hold it: of very many restore points the newest are told.
        most = max(1, MAX_TOLD // max(1, len(found)))
        found = [replace(one, points=one.points[-most:]) for one in found]
        epoch = found[0].epoch if uuid else 0
        return Result("status", epoch, {"replicas": [one.plain() for one in found]})

    # --- tests -----------------------------------------------------------------------

    async def _test(
        self, opening: Open, options: Mapping[str, str], say: Reporter
    ) -> Result:
        """Boot a restore point in isolation, measure, remove it again."""
        uuid = opening.uuid
        if uuid in self._tests:
            raise ReplicaError(
                "busy",
                "a failover test of this replica runs already",
                remedy="let it end first.",
            )
        began = time.monotonic()
        timeout_s = seconds_of(options, "dr_boot_timeout", BOOT_S)
        self._tests.add(uuid)
        try:
            async with self._opener(self.store, self.site, opening) as replica:
                operation = Operation(replica, say, opening.job)
                await operation.clear_test()
                wanted = options.get("dr_restore_point", "")
                vm, point = await operation.begin_test(wanted)
                site, epoch = operation.site, operation.record.epoch
            try:
                booted = await boot.boot(
                    site.api, site.here, vm.vmid, timeout_s=timeout_s, say=say
                )
            finally:
                await to_the_end(self._end_test(opening, vm, say))
        finally:
            self._tests.discard(uuid)
        values = {
            "point": point.name,
            "instant": point.instant,
            "verdict": booted.verdict,
            "rto_s": round(booted.seconds, 1),
            "total_s": round(time.monotonic() - began, 1),
        }
        return Result(TEST, epoch, values)

    async def _end_test(self, opening: Open, vm: testvm.TestVm, say: Reporter) -> None:
        """Remove the test VM and let the cycles that were staged be applied.

        Never raises: the next session finds in the record what is left to be done.
        """
        try:
            await vm.remove()
            self._tests.discard(opening.uuid)
            async with contextlib.AsyncExitStack() as stack:
                replica = await self._opened_in_time(stack, opening)
                await Operation(replica, say, opening.job).clear_test()
        except PveplugError as error:
            say.warning(f"the next session tidies up after this test: {error}")
        except Exception:
            log.exception("a test's end failed uuid=%s", opening.uuid)
            say.warning("the next session tidies up after this test")

    async def _opened_in_time(
        self, stack: contextlib.AsyncExitStack, opening: Open
    ) -> Any:
        until = time.monotonic() + self._busy_s
        while True:
            try:
                return await stack.enter_async_context(
                    self._opener(self.store, self.site, opening)
                )
            except ReplicaError as error:
                if error.code != "busy" or time.monotonic() >= until:
                    raise
            await asyncio.sleep(_AGAIN_S)  # a lock of the kernel's tells nobody

    # --- what a receiver that was killed has left ------------------------------------

    async def recover(self, say: Reporter) -> bool:
        """Undo what a receiver that was killed has left: test VMs, stages, locks.

        Returns: whether all is done; else it is to be tried again later.
        """
        done = True
        for uuid in await asyncio.to_thread(self.store.uuids):
            try:
                await self._recover(uuid, say)
            except PveplugError as error:
                done = False
                say.warning(f"replica {uuid}: {error}")
        return done

    async def _recover(self, uuid: str, say: Reporter) -> None:
        record = await asyncio.to_thread(self.store.read, uuid)
        if record is None or uuid in self._tests:
            return
        tested = record.testing is not None or bool(
            await testvm.leftovers(self.site, record)
        )
        unfinished = await asyncio.to_thread(self._unfinished, record)
        if not tested and not unfinished:
            return
        opening = Open("recovery", uuid, 0, "", self.site.here, "recovery")
        async with self._opener(self.store, self.site, opening) as replica:
            if tested:
                await Operation(replica, say).clear_test()
            if unfinished and record.role in ("seeding", "standby"):
                await replica.unlock()
                await replica.apply_pending(say)

    def _unfinished(self, record: Record) -> bool:
        """Whether a session was killed in the middle: its stage or lock is there."""
        directory = self.store.directory(record.uuid)
        stages = directory
        if self.site.stage_dir:
            stages = Path(self.site.stage_dir) / record.uuid
        return (
            record.intent is not None
            or (directory / HELD).exists()
            or any(stages.glob("*.stage"))
        )
