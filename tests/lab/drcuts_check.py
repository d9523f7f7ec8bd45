# SPDX-License-Identifier: Apache-2.0
"""What is asked after each event of ``./dev drcuts``, of strangers and of the lab."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import re
import time
from pathlib import Path
from typing import Any

from tests.lab.storage import holders
from tests.lab.vm import LabVm
from tests.support import dr_truth
from tests.support.dr_written import point_content
from tests.support.two_sites import TwoSites

CLEAN_WITHIN_S = 40.0
CRASHED = re.compile(
    r"internal error|Traceback|never retrieved|never awaited|session failed"
)
Sums = dict[str, str]


class LostPointError(Exception):
    """A restore point isn't what its cycle's instant was."""


class WrongCycleError(Exception):
    """A cycle ended as it must not, or left something behind."""


class Judge:
    """The restore points of one replica, and what is left anywhere.

    Attributes:
        open: the contents of cycles that have not been seen as a restore point, in the
            order of their attempts: a cycle that was cut may still become one.
    """

    def __init__(self, sites: TwoSites, source: LabVm, uuid: str) -> None:
        self.sites = sites
        self.source = source
        self.uuid = uuid
        self.open: list[Sums] = []
        self._known: dict[str, Sums] = {}

    # --- restore points --------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """What the receiver wrote down of the replica."""
        path = self.sites.state_dir / "replicas" / self.uuid / "record.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())["record"]
        except FileNotFoundError:
            return {}
        return found

    @property
    def replica(self) -> LabVm | None:
        vms = [vmid for _, vmid in self.sites.dr.vms()]
        return self.sites.dr.vm(vms[0]) if vms else None

    def points(self) -> list[str]:
        vm = self.replica
        return dr_truth.restore_points(vm) if vm else []

    async def judge_points(self, *, ended: bool) -> int:
        """Judge the last restore point, and all that are new; return how many are new.

        Args:
            ended: the last attempt ended well, so the last point is its content.

        Raises:
            LostPointError: one isn't right, or isn't there.
        """
        now = self.points()
        fresh = [name for name in now if name not in self._known]
        if self._known and not fresh and next(reversed(self._known)) not in now:
            raise LostPointError(f"of {list(self._known)} the last is gone: {now}")
        for name in fresh:
            found = await self._content(name)
            for number, sums in enumerate(self.open):
                if sums == found:
                    del self.open[: number + 1]
                    break
            else:
                raise LostPointError(f"{name} is none of the {len(self.open)} instants")
            self._known[name] = found
        if ended and (not fresh or self.open):
            raise LostPointError(f"{now}: not one of the cycle that ended well")
        if now and not fresh and await self._content(now[-1]) != self._known[now[-1]]:
            raise LostPointError(f"{now[-1]} is another than it was")
        return len(fresh)

    async def judge_all(self) -> None:
        """Judge every restore point there is, and the images."""
        for name in self.points():
            if await self._content(name) != self._known[name]:
                raise LostPointError(f"{name} is another than it was")
        vm = self.replica
        if vm is None:
            return
        for key in self._known[self.points()[-1]]:
            await asyncio.to_thread(dr_truth.check_image, vm.disk_path(key))

    async def _content(self, name: str) -> Sums:
        vm = self.replica
        assert vm
        return await asyncio.to_thread(point_content, vm, name)

    # --- what is left ----------------------------------------------------------------

    async def released(self) -> None:
        """Wait until the receiver has let go of the replica.

        Raises:
            WrongCycleError: it doesn't.
        """
        await self._gone(self._held, "the receiver holds on")

    async def clean(self, *, ended: bool, killed: str = "") -> None:
        """Wait until nothing is left.

        Args:
            ended: the last cycle ended well: no increment waits at the receiver.
            killed: ``sender`` or ``receiver``: it may have left there what the next
                cycle removes: a VM that is locked by us, sockets, a stage.

        Raises:
            WrongCycleError: something is.
        """

        async def left() -> list[str]:
            found = await asyncio.to_thread(self._left_at_the_replica, ended)
            if killed == "receiver":
                proved = any(self.sites.state_dir.rglob("held"))
                known = (str(self.sites.dr.root / "ph/run/nbd-"), "stage ")
                known = (*known, "lock: backup") if proved else known
                found = [what for what in found if not what.startswith(known)]
            if killed != "sender":
                found += await self._left_at_the_source()
            return found

        await self._gone(left, "left behind")

    async def _gone(self, what: Any, text: str) -> None:
        end = time.monotonic() + CLEAN_WITHIN_S
        while found := await what():
            if time.monotonic() > end:
                raise WrongCycleError(f"{text}: {', '.join(found)}")
            await asyncio.sleep(0.1)

    async def _held(self) -> list[str]:
        if not self.sites.receiver_alive:
            return ["the receiver has died"]
        directory = self.sites.state_dir / "replicas" / self.uuid
        with (
            contextlib.suppress(FileNotFoundError),
            (directory / "lock").open() as file,
        ):
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return ["the lock of the replica"]
        return self._servers()

    async def _left_at_the_source(self) -> list[str]:
        site = self.sites.site
        try:
            found = await self.source.leftovers()
        except TimeoutError:
            return ["a busy monitor"]
        return found + _files(site.root, site.node.qmeventd.backups)

    def _left_at_the_replica(self, ended: bool) -> list[str]:
        site, record = self.sites.dr, self.record
        found = self._servers() + _files(site.root, site.node.qmeventd.backups)
        stages = {path.name for path in self.sites.stage_dir.rglob("*.stage")}
        stages |= {path.name for path in self.sites.state_dir.rglob("*.stage")}
        intent = record.get("intent")
        if intent and not ended:
            stages.discard(intent["file"])
        elif intent:
            found.append(f"intent {intent['cycle']}")
        found += [f"stage {name}" for name in sorted(stages)]
        vm = self.replica
        if vm is None:
            return found
        found += [f"VM {vmid}" for _, vmid in site.vms() if vmid != vm.vmid]
        found += [f"VM {vm.vmid} runs"] if vm.running else []
        conf = vm.conf
        found += [f"lock: {conf.values['lock']}"] if "lock" in conf.values else []
        known = {point["name"] for point in record.get("points", [])}
        if intent and not ended:
            known.add(intent["snapshot"])
        known |= set(record.get("leaving", [])) if not ended else set()
        foreign = conf.snapshots.keys() - known
        found += [f"snapshot {name}" for name in sorted(foreign)]
        if ended:
            found += self._stray_volumes(vm)
        return found

    def _stray_volumes(self, vm: LabVm) -> list[str]:
        texts = [vm.conf.values, *vm.conf.snapshots.values()]
        used = " ".join(value for values in texts for value in values.values())
        found = []
        for storage in self.sites.dr.node.storages.values():
            for row in storage.volumes():
                if str(row["volid"]) not in used:
                    found.append(f"volume {row['volid']}")
                elif pids := holders(storage.file(str(row["volid"]))):
                    found.append(f"{row['volid']} is open in {pids}")
        return found

    def _servers(self) -> list[str]:
        """The qemu-nbd of the DR site."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "qemu-nbd" in line and str(self.sites.dr.root) in line:
                found.append(f"process {path.parent.name}: {line[:200]}")
        return found


def _files(root: Path, registered: Any) -> list[str]:
    """What the product has written below a node and would have removed."""
    found = [f"journal {p.stem}" for p in root.glob("ph/lib/vms/*.json")]
    found += [str(p) for p in (root / "ph/scratch").glob("*")]
    found += [str(p) for p in (root / "ph/run").glob("nbd-*")]
    return found + ([f"qmeventd: {registered}"] if +registered else [])


def crash(text: str) -> str:
    """Return what a log says of a crash, or nothing."""
    if (found := CRASHED.search(text)) is None:
        return ""
    return text[max(0, found.start() - 500) : found.start() + 3000]
