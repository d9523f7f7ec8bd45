# SPDX-License-Identifier: Apache-2.0
"""What the DR site does with a replica apart from taking cycles.

::

                    failover-exec                failover-permanent
        standby ───────────────────► active ────────────────────────► permanent
           ▲      failover-undo        │ ▲
           ├───────────────────────────┤ │
           │      failback-pre         │ │ failback-undo
           ├───────────────────────────┤ │
           │      failback-commit      ▼ │
           └──────────────────── active, shut down and sent back (failback)

    failover-test leaves a standby a standby.

What must not be lost is in the record before it is done, and each action may be run
again after a cut: it goes on from what the record and PVE say. An action that isn't for
the role a replica has is refused with what to do instead.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from pveplug.dr import boot, testvm
from pveplug.dr.admission import point_name
from pveplug.dr.provision import TAG, Site, translated
from pveplug.dr.sendback import same
from pveplug.dr.store import Record, ReplicaError, Volume
from pveplug.errors import CommandError, PveplugError
from pveplug.events import Reporter
from pveplug.proto.dr_frames import Point
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import FILE_STORAGES
from pveplug.vmconfig import drives, parse_size

log = logging.getLogger(__name__)

BOOT_S: Final = 300
SHUTDOWN_S: Final = 120
LATEST: Final = ("", "latest")
_NOTE_LINES: Final = 3
"""Of a replica's description, the lines that are ours."""


class Held(Protocol):
    """An open replica, as far as it concerns us; :mod:`pveplug.dr.replica`."""

    record: Record
    site: Site

    async def save(self) -> None: ...

    async def unlock(self) -> None: ...

    async def apply_pending(self, say: Reporter) -> bool: ...


Options = Mapping[str, str]
Values = dict[str, Any]


class Operation:
    """One action on one replica that is held.

    Args:
        replica: ours until the action has ended.
        say: takes what is worth telling meanwhile.
        job: whose action it is, for the record.
    """

    def __init__(self, replica: Held, say: Reporter, job: str = "") -> None:
        self._replica = replica
        self._say = say
        self._job = job
        self.record = replica.record
        self.site = replica.site
        self._api = replica.site.api
        self._here = replica.site.here

    # --- failover --------------------------------------------------------------------

    async def failover_exec(self, options: Options) -> Values:
        """Boot the replica in place of its source."""
        began = time.monotonic()
        record = self.record
        self._must_be("standby", "active", action="failover-exec")
        wanted = options.get("dr_restore_point", "")
        if record.role == "active":
            point = self._failed_over_to(wanted)
            self._say.info(
                f"VM {record.vmid} was failed over to restore point {point} before"
            )
        else:
            chosen = await self._stand_at(wanted, _yes(options, "dr_unplanned"))
            point = chosen.name
            await self._become_active(chosen, _yes(options, "dr_unplanned"))
        if not await self._runs():
            await self._configure({"onboot": "1"})
        booted = await self._boot(options)
        return {
            "vmid": record.vmid,
            "point": point,
            "verdict": booted.verdict,
            "rto_s": round(time.monotonic() - began, 1),
        }

    def _failed_over_to(self, wanted: str) -> str:
        failover = self.record.failover or {}
        point = str(failover.get("point", ""))
        if failover.get("back"):
            raise self._role(
                "its disks have been sent back to the source",
                "failback-undo lets it run again, failback-commit makes it a standby.",
            )
        if wanted not in (*LATEST, point):
            raise self._role(
                f"it runs from restore point {point or '?'} already",
                f"failover-undo first, then failover-exec to {wanted}.",
            )
        return point

    async def _stand_at(self, wanted: str, unplanned: bool) -> Point:
        """Have the disks hold exactly a restore point, with nothing running."""
        record = self.record
        if await self._runs():
            raise self._role(
                "it runs, and nobody has failed over to it",
                "stop it in Proxmox VE, then run this again; what it wrote is undone.",
            )
        await self._replica.unlock()
        try:
            await self._replica.apply_pending(self._say)
        except ReplicaError as error:
            if not unplanned:
                raise
            self._say.warning(f"what was not applied yet is given up: {error}")
        point = self.choose(wanted)
        config = await self._config()
        newest = point is record.points[-1]
        at_it = newest and not record.dirty and record.intent is None
        if at_it and config.get("parent", point.name) == point.name:
            return point
        if not newest or record.intent is not None or record.staged:
            # Before it isn't true any more: what is acknowledged is not there then.
            record.acked, record.dirty = None, True
            record.intent, record.staged = None, []
            await self._replica.save()
        await self._roll_back(point)
        return point

    async def _become_active(self, point: Point, unplanned: bool) -> None:
        record = self.record
        record.epoch += 1
        record.role = "active"
        record.welcome = False
        record.failover = {
            "point": point.name,
            "cycle": point.cycle,
            "time": int(time.time()),
            "job": self._job,
            "unplanned": unplanned,
        }
        # Durable before the VM starts: from now on no cycle is taken.
        await self._replica.save()
        age = max(0, int(time.time()) - point.instant)
        self._say.info(
            f"VM {record.vmid} is active from restore point {point.name}, {age} s old; "
            f"epoch {record.epoch}"
        )

    async def _boot(self, options: Options) -> boot.Booted:
        with translated(
            f"VM {self.record.vmid} is the active one now, but it did not start"
        ):
            return await boot.boot(
                self._api,
                self._here,
                self.record.vmid,
                timeout_s=seconds_of(options, "dr_boot_timeout", BOOT_S),
                say=self._say,
            )

    async def failover_undo(self, options: Options) -> Values:
        """Discard what the replica did since the failover: a standby as before."""
        self._must_be("standby", "active", action="failover-undo")
        self._must_not_be_sent_back()
        return await self._discard()

    async def _discard(self) -> Values:
        record = self.record
        if record.role == "standby":
            return {"vmid": record.vmid, "verdict": "it stands by already"}
        await boot.stop(self._api, self._here, record.vmid)
        newest = self.choose("")
        await self._roll_back(newest)
        record.role = "standby"
        record.acked = newest.cycle or None
        record.dirty = False
        await self._stand_by()
        self._say.info(
            f"VM {record.vmid} stands by again, at restore point {newest.name}"
        )
        return {"vmid": record.vmid, "point": newest.name, "verdict": "stands by"}

    async def failover_permanent(self, options: Options) -> Values:
        """Make the replica an ordinary VM; there is no way back."""
        record = self.record
        self._must_be("active", "permanent", action="failover-permanent")
        self._must_not_be_sent_back()
        keep = options.get("dr_keep_points", "yes") != "no"
        with translated(f"VM {record.vmid} can't be made an ordinary VM"):
            config = await self._config()
            await self._configure(
                {
                    "tags": ";".join(t for t in _tags(config) if t != TAG),
                    "description": _own_description(config, record),
                    "onboot": "1",
                    "protection": "0",
                }
            )
            if not keep:
                await self._drop_points()
        record.role = "permanent"
        record.welcome = False
        await self._replica.save()
        kept = f"{len(record.points)} restore points are left as snapshots"
        self._say.info(f"VM {record.vmid} is an ordinary VM now; {kept}")
        return {
            "vmid": record.vmid,
            "points": len(record.points),
            "verdict": "permanent",
        }

    async def _drop_points(self) -> None:
        there = set(await self._api.snapshots(self._here, self.record.vmid))
        for point in list(self.record.points):
            if point.name in there:
                await self._api.snapshot_delete(
                    self._here, self.record.vmid, point.name
                )
            self.record.points.remove(point)
            await self._replica.save()

    # --- failback --------------------------------------------------------------------

    async def failback_pre(self, options: Options) -> Values:
        """Return to standby, if nothing would be lost or it may be."""
        record = self.record
        self._must_be("standby", "active", action="failback-pre")
        self._must_not_be_sent_back()
        if record.role == "standby":
            return {"vmid": record.vmid, "verdict": "it stands by already"}
        if not _yes(options, "dr_discard"):
            await self._must_be_unchanged(options)
        return await self._discard()

    async def _must_be_unchanged(self, options: Options) -> None:
        """See that the disks are as they were when it was failed over."""
        record = self.record
        await self._shut_down(options)
        point = str((record.failover or {}).get("point", ""))
        for key, volume in (await self.current_volumes()).items():
            with translated(f"disk {key} can't be compared with {point}"):
                try:
                    unchanged = await same(self.site, volume, point)
                except CommandError:  # a disk that came after the restore point
                    unchanged = False
            if not unchanged:
                what = "can't be compared" if unchanged is None else "has changed"
                raise self._role(
                    f"disk {key} {what} since it was failed over; it is shut down",
                    "failback brings the changes to the source; dr_discard=yes gives "
                    "them up; failover-exec starts it again.",
                )
        self._say.info(f"VM {record.vmid} has not changed since it was failed over")

    async def failback(self, options: Options) -> Values:
        """Shut the replica down, so that its disks can be compared and sent back."""
        record = self.record
        self._must_be("active", action="failback")
        await self._shut_down(options)
        volumes = await self.current_volumes()
        for key in sorted(volumes.keys() - record.disks.keys()):
            self._say.warning(
                f"VM {record.vmid} has a disk {key} that its source hasn't: it stays "
                "here; copy it by hand if it is needed"
            )
        record.failover = {**(record.failover or {}), "back": int(time.time())}
        await self._replica.save()
        return {
            "vmid": record.vmid,
            "disks": {key: volume.size for key, volume in record.disks.items()},
        }

    async def failback_commit(self, options: Options) -> Values:
        """The source has what is here: keep it as a restore point, and stand by."""
        record = self.record
        self._must_be("standby", "active", action="failback-commit")
        failover = dict(record.failover or {})
        if record.role == "standby":
            return {"vmid": record.vmid, "verdict": "it stands by already"}
        if not failover.get("back"):
            raise self._role("its disks have not been sent back", "run failback first.")
        if await self._runs():
            raise self._role(
                "it was started after its disks had been sent back",
                "run failback again: what it wrote since would be lost.",
            )
        point = await self._keep_point(failover)
        record.disks = await self.current_volumes()
        record.role = "standby"
        record.acked = None
        record.cycle += 1
        record.dirty = False
        record.points.append(point)
        await self._stand_by()
        self._say.info(
            f"VM {record.vmid} stands by at restore point {point.name}; the next cycle "
            "compares it with the source"
        )
        return {"vmid": record.vmid, "point": point.name, "verdict": "stands by"}

    async def _keep_point(self, failover: dict[str, Any]) -> Point:
        """Take a restore point of what is there; its name is written down first."""
        record = self.record
        if not failover.get("new_point"):
            failover["new_point"] = point_name(record.cycle + 1, time.time())
            record.failover = failover
            await self._replica.save()
        name = str(failover["new_point"])
        with translated(f"the restore point {name} can't be taken"):
            await self._configure({"onboot": "0"})
            if name not in await self._api.snapshots(self._here, record.vmid):
                await self._api.snapshot_create(
                    self._here,
                    record.vmid,
                    name,
                    f"Restore point of the failback ({record.link}).",
                )
        return Point(name, "", int(time.time()), int(failover["back"]), "shut down")

    async def failback_undo(self, options: Options) -> Values:
        """The source has given up what came back: the replica goes on."""
        record = self.record
        self._must_be("active", action="failback-undo")
        if (record.failover or {}).get("back"):
            kept = {
                key: value
                for key, value in (record.failover or {}).items()
                if key not in ("back", "new_point")
            }
            record.failover = kept
            await self._replica.save()
        if not _yes(options, "dr_start", "yes"):
            self._say.info(f"VM {record.vmid} is the active one and left shut down")
            return {"vmid": record.vmid, "verdict": "left shut down"}
        booted = await self._boot(options)
        return {"vmid": record.vmid, "verdict": booted.verdict}

    # --- the test's beginning and end; in between the replica isn't ours -----------

    async def begin_test(self, wanted: str) -> tuple[testvm.TestVm, Point]:
        """Make the VM of a failover test.

        Of the newest restore point cycles are staged until :meth:`end_test`.
        """
        record = self.record
        self._must_be("standby", action="failover-test")
        await self._replica.apply_pending(self._say)
        point = self.choose(wanted)
        storage = None
        if point is record.points[-1] and not record.dirty:
            storage = testvm.overlay_storage(record, await self._file_storages())
        kind = "overlay" if storage else "clone"
        record.testing = {
            "kind": kind,
            "point": point.name,
            "time": int(time.time()),
            "job": self._job,
        }
        await self._replica.save()
        vm = testvm.TestVm(self.site, record, self._announce, self._say)
        try:
            with translated("the test VM can't be made"):
                if storage:
                    self._say.info(
                        f"restore point {point.name} is tested on throw-away overlays "
                        f"on {storage}; cycles are staged meanwhile"
                    )
                    await vm.overlay(storage)
                else:
                    self._say.info(
                        f"restore point {point.name} is tested on a full clone, which "
                        "takes as long as its disks are large"
                    )
                    await vm.clone(point.name)
        except BaseException:
            await self._remove_quietly(vm)
            raise
        if not storage:
            # Nothing of the replica is used any more; the tag tells whose VM it is.
            record.testing = None
            await self._replica.save()
        return vm, point

    async def _announce(self, vmid: int) -> None:
        if self.record.testing is not None:
            self.record.testing["vmid"] = vmid
            await self._replica.save()

    async def _remove_quietly(self, vm: testvm.TestVm) -> None:
        try:
            await vm.remove()
        except PveplugError as error:
            self._say.error(f"test VM {vm.vmid} is left: {error}")
            return
        self.record.testing = None
        await self._replica.save()

    async def clear_test(self) -> None:
        """Remove what a test has left, and apply what it held up."""
        record = self.record
        with translated("what a failover test has left can't be removed"):
            found = await testvm.leftovers(self.site, record)
            for vmid in found:
                await testvm.remove(self.site, record, vmid, self._say)
        if record.testing is not None:
            record.testing = None
            await self._replica.save()
        if record.role == "standby":
            await self._replica.apply_pending(self._say)

    async def _file_storages(self) -> dict[str, str]:
        return {
            storage.name: storage.type
            for storage in await self._api.storages(self._here)
            if storage.holds_images
            and storage.active
            and storage.enabled
            and storage.type in FILE_STORAGES
            and "qcow2" in storage.formats
        }

    # --- their steps -----------------------------------------------------------------

    def choose(self, wanted: str) -> Point:
        """Return a restore point by name, by its cycle's, or the newest.

        Raises:
            ReplicaError: there is no such one.
        """
        points = self.record.points
        if not points:
            raise ReplicaError(
                "role",
                f"replica VM {self.record.vmid} has no restore point",
                remedy="run a cycle (mode=incremental) first.",
            )
        if wanted in LATEST:
            return points[-1]
        for point in reversed(points):
            if wanted in (point.name, point.cycle):
                return point
        names = ", ".join(point.name for point in points)
        raise ReplicaError(
            "configuration",
            f"VM {self.record.vmid} has no restore point {wanted[:60]!r}",
            remedy=f"name one of {names}, or latest.",
        )

    async def current_volumes(self) -> dict[str, Volume]:
        """Return the disks the VM has now: they may have been moved or resized."""
        record = self.record
        known = {volume.volid: volume for volume in record.disks.values()}
        found: dict[str, Volume] = {}
        for drive in drives(await self._config()):
            if drive.is_cdrom:
                continue
            size = parse_size(drive.get("size") or "0")
            if (same_volume := known.get(drive.file)) is not None:
                # PVE's number is rounded; the source's own is exact.
                grown = size > same_volume.size and drive.key.startswith(_RESIZABLE)
                exact = size if grown else same_volume.size
                form = same_volume.format
            else:
                moved = record.disks.get(drive.key)
                exact = moved.size if moved is not None else size
                form = drive.format or "raw"
            found[drive.key] = Volume(drive.file, exact, form, drive.storage or "")
        return found

    async def _roll_back(self, point: Point) -> None:
        record = self.record
        self._say.info(f"VM {record.vmid} goes back to restore point {point.name}")
        with translated(f"VM {record.vmid} can't go back to {point.name}"):
            await self._api.rollback(self._here, record.vmid, point.name)
        volumes = await self.current_volumes()
        there = {volume.volid for volume in volumes.values()}
        record.retired = [volid for volid in record.retired if volid not in there]
        record.retired += [
            volume.volid
            for volume in record.disks.values()
            if volume.volid not in there and volume.volid not in record.retired
        ]
        record.disks = volumes
        await self._replica.save()

    async def _shut_down(self, options: Options) -> None:
        record = self.record
        if not await self._runs():
            return
        timeout_s = seconds_of(options, "dr_shutdown_timeout", SHUTDOWN_S)
        self._say.info(f"VM {record.vmid} is being shut down")
        try:
            await self._api.shutdown_vm(self._here, record.vmid, timeout_s=timeout_s)
        except PveRefusalError as error:
            if error.reason is not Reason.NOT_RUNNING:
                raise ReplicaError(
                    "pve",
                    f"VM {record.vmid} did not shut down: {error}",
                    remedy="shut it down yourself, then run this again.",
                ) from error
        if await self._runs():
            raise ReplicaError(
                "pve",
                f"VM {record.vmid} still runs after {timeout_s} s",
                remedy="shut it down yourself, then run this again.",
            )

    async def _stand_by(self) -> None:
        """Write down that it is a standby, whose sender may come back."""
        record = self.record
        record.role = "standby"
        record.welcome = True
        record.failover = None
        await self._replica.save()

    async def _runs(self) -> bool:
        with translated(f"replica VM {self.record.vmid}"):
            return (await self._api.vm_status(self._here, self.record.vmid)).running

    async def _config(self) -> dict[str, str]:
        with translated(f"replica VM {self.record.vmid}"):
            found = await self._api.vm_config(self._here, self.record.vmid)
        return dict(found.values)

    async def _configure(self, wanted: Mapping[str, str]) -> None:
        """Set keys of the VM; an empty value or a 0 of what has one deletes it."""
        config = await self._config()
        changed = {
            key: value
            for key, value in wanted.items()
            if value and config.get(key, "0" if value == "0" else "") != value
        }
        gone = [key for key, value in wanted.items() if not value and key in config]
        if changed or gone:
            for text in await self._api.update_config(
                self._here, self.record.vmid, changed, delete=gone
            ):
                self._say.warning(f"VM {self.record.vmid}: {text}")

    # --- refusals --------------------------------------------------------------------

    def _must_be(self, *roles: str, action: str) -> None:
        record = self.record
        if record.role in roles:
            return
        what, remedy = _REFUSED[record.role]
        raise ReplicaError(
            "role", f"{action}: {what.format(record.vmid)}", remedy=remedy
        )

    def _must_not_be_sent_back(self) -> None:
        if (self.record.failover or {}).get("back"):
            raise self._role(
                "a failback of it has begun",
                "failback-commit ends it, failback-undo takes it back.",
            )

    def _role(self, text: str, remedy: str) -> ReplicaError:
        return ReplicaError(
            "role", f"replica VM {self.record.vmid}: {text}", remedy=remedy
        )


_RESIZABLE: Final = ("scsi", "virtio", "sata", "ide")
_REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    "none": ("there is no replica of this VM", "run a job with mode=seed first."),
    "seeding": (
        "the seed of VM {} has not ended, so there is no restore point",
        "run the job with mode=seed again; it goes on where it was.",
    ),
    "standby": (
        "VM {} stands by, nobody has failed over to it",
        "nothing is to be done; failover-exec starts it.",
    ),
    "active": (
        "VM {} has been failed over to and is the active one",
        "failback brings it home, failover-undo discards what it did.",
    ),
    "permanent": (
        "VM {} was made a VM of its own",
        "it is no replica any more; use Proxmox VE.",
    ),
}

ACTIONS: Final[Mapping[str, Callable[[Operation, Options], Awaitable[Values]]]] = {
    "failover-exec": Operation.failover_exec,
    "failover-undo": Operation.failover_undo,
    "failover-permanent": Operation.failover_permanent,
    "failback-pre": Operation.failback_pre,
    "failback": Operation.failback,
    "failback-commit": Operation.failback_commit,
    "failback-undo": Operation.failback_undo,
}
"""What a session that holds the replica may ask for."""


def _yes(options: Options, name: str, default: str = "no") -> bool:
    return options.get(name, default) == "yes"


def seconds_of(options: Options, name: str, default: int) -> int:
    """Return an option in seconds."""
    text = options.get(name, "")
    if text and not re.fullmatch("[0-9]{1,6}", text):
        raise ReplicaError("protocol", f"{name}={text[:20]!r} is no number of seconds")
    return int(text) if text else default


def _tags(config: Mapping[str, str]) -> list[str]:
    return [tag for tag in re.split(r"[;,\s]+", config.get("tags", "")) if tag]


def _own_description(config: Mapping[str, str], record: Record) -> str:
    """Return the description without the lines that say what it was a replica of."""
    lines = config.get("description", "").rstrip("\n").split("\n")
    if lines[0].rstrip() != f"{TAG} link={record.link}":
        return "\n".join(lines)
    return "\n".join(lines[_NOTE_LINES:]).strip("\n")
