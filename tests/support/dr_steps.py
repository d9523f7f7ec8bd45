# SPDX-License-Identifier: Apache-2.0
"""Every step that a receiver takes, counted; at one of them it dies or PVE fails.

Death is an exception that nothing may get past: from then on no call reaches PVE, no
record is written and no file is removed, as if the process were gone. (Real kills are
in the integration tests; these are for every single place.)
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pveplug.dr import replica as replica_module
from pveplug.dr.replica import Replica
from pveplug.dr.stage import StageWriter
from pveplug.dr.store import Record, ReplicaStore
from pveplug.pve_local import ProgramError
from tests.support.dr_sender import Sender, Source
from tests.support.fake_pve import FakePve, refused


class Death(BaseException):
    """What kill -9 looks like from inside."""


class Steps:
    """Counts steps; ``at`` is the one that ends it."""

    def __init__(self, at: int, *, kind: str) -> None:
        self.at = at
        self.kind = kind
        """``death``, or ``refused`` and ``lost`` for PVE's calls alone."""
        self.count = 0
        self.dead = False
        self.seen: list[str] = []
        self.happened = ""

    def step(self, what: str) -> None:
        if self.dead:
            raise Death(what)
        self.seen.append(what)
        self.count += 1
        if self.count != self.at:
            return
        self.happened = what
        if self.kind == "death":
            self.dead = True
            raise Death(what)
        if what.endswith("lock"):
            raise ProgramError(["qm"], 1, f"fault at {what}")
        raise refused(f"fault at {what}")

    def install(self, patch: pytest.MonkeyPatch, pve: FakePve) -> None:
        if self.kind != "lost":
            pve.before = lambda call: self.step(f"before {call}")
        if self.kind != "refused":
            pve.after = lambda call: self.step(f"after {call}")
        if self.kind == "death":
            self._install_death(patch)

    def _install_death(self, patch: pytest.MonkeyPatch) -> None:
        write, unlink = ReplicaStore.write, Replica._unlink
        forget, discard = ReplicaStore.forget, StageWriter.discard
        finish, frames = StageWriter.finish, replica_module.frames

        def stepped_write(store: ReplicaStore, record: Record) -> None:
            self.step(f"before record {record.role} {record.acked}")
            write(store, record)
            self.step(f"after record {record.role} {record.acked}")

        def stepped_unlink(replica: Replica, path: Path) -> None:
            self.step(f"before unlink {path.name}")
            unlink(replica, path)

        def stepped_forget(store: ReplicaStore, uuid: str) -> None:
            self.step("before forget")
            forget(store, uuid)

        async def stepped_discard(stage: StageWriter) -> None:
            if self.dead:
                stage._file.close()
            else:
                await discard(stage)

        async def stepped_finish(stage: StageWriter) -> Any:
            self.step("before the stage's end")
            trailer = await finish(stage)
            self.step("after the stage's end")
            return trailer

        async def stepped_frames(path: Path) -> AsyncIterator[Any]:
            at = 0
            async for frame in frames(path):
                at += 1
                if at in (1, 4, 9):
                    self.step(f"before frame {at}")
                yield frame

        patch.setattr(ReplicaStore, "write", stepped_write)
        patch.setattr(ReplicaStore, "forget", stepped_forget)
        patch.setattr(Replica, "_unlink", stepped_unlink)
        patch.setattr(StageWriter, "discard", stepped_discard)
        patch.setattr(StageWriter, "finish", stepped_finish)
        patch.setattr(replica_module, "frames", stepped_frames)


class World:
    """A PVE, its receiver's store and a source, which can be copied whole."""

    def __init__(self, base: Path, **site: Any) -> None:
        self.base = base
        self.options = site
        self.pve = FakePve(base)
        self.sender = Sender(ReplicaStore(self.pve.node.state_dir), self._site())
        self.states: dict[str, dict[str, bytes]] = {}
        """Cycle -> what the source's disks held at its instant."""

    def _site(self) -> Any:
        return self.pve.site(**self.options)

    def copied(self, base: Path) -> World:
        shutil.copytree(self.base, base)
        other = World(base, **self.options)
        other.pve.vms = copy.deepcopy(self.pve.vms)
        other.pve.snaps = copy.deepcopy(self.pve.snaps)
        other.sender.source = copy.deepcopy(self.sender.source)
        other.sender.opening = self.sender.opening
        other.states = copy.deepcopy(self.states)
        return other

    @property
    def source(self) -> Source:
        return self.sender.source

    def expect(self) -> None:
        """Remember what the next cycle's instant holds."""
        name = f"dr-x.2026-11-25_08.00.00_{self.source.cycle + 1:02d}"
        self.states[name] = self.source.state()

    @property
    def record(self) -> Record | None:
        return self.sender.store.read(self.sender.opening.uuid)

    def check_points(self) -> None:
        """Every restore point holds exactly what its cycle's instant held."""
        record = self.record
        for point in record.points if record else ():
            assert record is not None
            body = self.pve.snaps[record.vmid][point.name]
            held = {}
            for key, state in self.states[point.cycle].items():
                volid = body[key].split(",")[0]
                held[key] = self.pve.content(volid, point.name)[: len(state)]
            assert held == self.states[point.cycle], point

    def check_quiet(self) -> None:
        """Nothing is left but the replica, its points and their volumes."""
        record = self.record
        assert record is not None
        assert record.role == "standby"
        assert record.intent is None
        assert record.pending == record.leaving == []
        assert not record.dirty
        assert list(self.pve.vms) == [record.vmid]
        assert set(self.pve.snaps[record.vmid]) == {p.name for p in record.points}
        needed = {v.volid for v in record.disks.values()} | set(record.retired)
        assert self.pve.volids(record.vmid) == needed
        for volid in record.retired:
            assert self.pve._held(record.vmid, volid), f"{volid} is nobody's"
        directory = self.sender.store.directory(record.uuid)
        assert not list(directory.glob("*.stage"))
        assert not (directory / "held").exists()
        config = self.pve.vms[record.vmid]
        assert "lock" not in config
        assert config["protection"] == "1"
        current = {k: v.volid for k, v in record.disks.items()}
        assert {k: config[k].split(",")[0] for k in current} == current


Change = Callable[[World], None]
