# SPDX-License-Identifier: Apache-2.0
"""The keeper: the process that serves a recovered VM's disks while they still come.

One per VM, apart from Bacula and its jobs, for the VM must not depend on them::

    landing store ──► LandingDevice ──► NBD server ──► QEMU's overlay
         ▲ doorbell                        │
    restore jobs                     all here: `qm disk move`, one disk after the other
                                     nothing comes for ir_timeout: it is paused

It is root on its node and holds no credential: what it does to the VM goes through
``qm``. It never destroys a VM and never touches an overlay; when its disks have moved
it takes its traces away and ends. Killed, it is started again (systemd, the next
restore job, ``pveplug ir resume``), and QEMU, which has waited, reads on.

Exit status: 0 it is not needed any more, or was asked to end; 69 it can't serve; 70 a
fault of this program.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final

import uvloop

from pveplug import log as own_log
from pveplug import sdnotify
from pveplug.cleanup import query_blocked
from pveplug.errors import IntegrityError, JobError, PveplugError
from pveplug.ir import pausing
from pveplug.ir.control import MAX_LINE, DiskState, State, disable_unit
from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import Landing
from pveplug.ir.moving import clear_cut_move, move
from pveplug.ir.notes import running_note, untagged, without_note
from pveplug.ir.record import LandedDisk, Record, Recovery
from pveplug.ir.streaming import make_independent, same_place, stands_alone
from pveplug.nbd.client import Address, TcpAddress, UnixAddress
from pveplug.nbd.server import NbdServer, serve
from pveplug.node import Node, load_node
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError, PveLocal
from pveplug.vmconfig import Drive, drives, smbios_uuid

log = logging.getLogger(__name__)

EX_OK: Final = 0
EX_UNAVAILABLE: Final = 69
EX_SOFTWARE: Final = 70

TICK_S: Final = 0.5
ORPHAN_S: Final = 30.0
"""How long a recovery that nobody took over may be without the job that makes it."""
_PASSES: Final = frozenset({Reason.LOCKED, Reason.BUSY})
"""Why PVE refuses a move for now: a backup has the VM, say."""
LOOK_S: Final = 30.0
"""How often to ask whether the VM is still there; each `qm` costs a second."""
AGAIN_S: Final = 10.0
"""How long after PVE or QEMU was busy with the VM something is tried again."""
STOPPED_LOOK_S: Final = 5.0
"""How often to ask QEMU whether an I/O error has stopped the guest."""
LINKS_S: Final = 60.0
"""How long QEMU may keep a connection to a disk that has moved away."""


class VmGoneForGoodError(PveplugError):
    """The recovered VM was removed, and all that depended on us with it."""


class _Served(LandingDevice):
    """A device that can be made to give up: its VM is about to be removed."""

    def __init__(self, landing: Landing) -> None:
        super().__init__(landing)
        self._released = False
        self._waiting: set[asyncio.Future[None]] = set()

    def ready(self, offset: int, length: int) -> asyncio.Future[None] | None:
        future = super().ready(offset, length)
        if future is None:
            return None
        if self._released:
            future.cancel()
            raise OSError(errno.EIO, "the recovery is being given up")
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def release(self) -> None:
        """Fail what waits for data that will not come, so that QEMU can end."""
        self._released = True
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(OSError(errno.EIO, "given up"))


class Keeper:
    """Looks after one recovery from the first cluster to the last move."""

    def __init__(self, node: Node, recovery: Recovery, record: Record) -> None:
        self._node = node
        self._recovery = recovery
        self._record = record
        self._local = PveLocal(node)
        self._landings: dict[str, Landing] = {}
        self._devices: dict[str, _Served] = {}
        self._server: NbdServer | None = None
        self._migration: asyncio.Task[None] | None = None
        self._migrate = not record.prove and (
            record.auto_migrate or recovery.migration_wanted()
        )
        self._moving: dict[str, str] = {}
        self._moved: set[str] = set()
        self._trouble = ""
        self._over = asyncio.Event()
        self._orphan_since: float | None = None
        self._seen_s = 0.0
        self._looked_s = 0.0
        self._asked_s = 0.0
        self._again_s = 0.0
        self._stopped = ""
        self._owed = -1
        self._resumes = False
        """Whether the VM is to go on after a pause of ours, and does not yet."""
        self._resume_s = 0.0
        self._pause_s = 0.0
        self._damaged_run = ""
        """The run of QEMU that was paused because its data is damaged."""
        self._spoiled = ""
        self._lost = ""
        self._unproven = ""

    # --- serving ---------------------------------------------------------------------

    async def run(self, ready: asyncio.Event) -> None:
        """Serve until nobody needs it; ``ready`` is set when it does.

        Raises:
            PveplugError: the landing store can't be read, or not be listened on.
        """
        async with contextlib.AsyncExitStack() as stack:
            devices = self._devices
            for disk in self._record.disks:
                landing = Landing.open(
                    self._recovery.folder, self._recovery.runtime, disk.source
                )
                stack.callback(landing.close)
                self._landings[disk.source] = landing
                if disk.overlay:
                    devices[disk.source] = stack.enter_context(_Served(landing))
            self._server = await stack.enter_async_context(
                serve(devices, self._address())
            )
            control = await asyncio.start_unix_server(
                self._control, self._recovery.control_socket, limit=MAX_LINE
            )
            stack.push_async_callback(control.wait_closed)
            stack.callback(control.close)
            stack.push_async_callback(self._end_migration)
            ready.set()
            sdnotify.notify("READY=1")
            await self._moved_before()
            while not self._over.is_set():
                await self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._over.wait()

    def _address(self) -> Address:
        if self._record.bind:
            return TcpAddress(self._record.bind, self._record.port)
        return UnixAddress(self._recovery.nbd_socket)

    async def _end_migration(self) -> None:
        if self._migration is not None and not self._migration.done():
            self._migration.cancel()
            await asyncio.wait([self._migration])

    # --- orders ----------------------------------------------------------------------

    async def _control(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(10.0):
                order = json.loads(await reader.readline())
                answer = self._obey(order.get("do"))
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, AttributeError, TimeoutError) as error:
            log.warning("ir-control vm=%s: %s", self._record.vmid, error)
        finally:
            writer.close()

    def _obey(self, order: object) -> dict[str, object]:
        match order:
            case "status":
                pass
            case "migrate":
                self._recovery.want_migration()
                self._migrate = True
                self._again_s = self._asked_s = 0.0
                self._trouble = self._stopped = ""
            case "release":
                # A move holds the VM's configuration, and PVE could not stop it.
                self._migrate = False
                if self._migration is not None:
                    self._migration.cancel()
                for device in self._devices.values():
                    device.release()
            case "retire":
                # The VM is gone, or being removed: nothing to serve any more.
                self._over.set()
            case _:
                return {"error": f"no such order: {order!r}"}
        return self.state().dump()

    def state(self) -> State:
        """Return how far it is."""
        disks = [
            DiskState(
                disk.key,
                disk.size,
                self._landings[disk.source].owed_bytes,
                disk.key in self._moved,
                self._moving.get(disk.key, ""),
            )
            for disk in self._record.disks
        ]
        owed = sum(disk.owed for disk in disks)
        if owed:
            phase = "landing"
        elif self._over.is_set():
            phase = "done"
        elif self._migration is not None and not self._migration.done():
            phase = "migrating"
        else:
            phase = "landed"
        return State(
            phase,
            self._told(),
            bool(pausing.why_paused(self._recovery)),
            self._recovery.fed(),
            self._server.clients if self._server else 0,
            disks,
        )

    def _told(self) -> str:
        """Return what is wrong, the worst first."""
        record = self._record
        if record.damage:
            return pausing.damaged(record.vmid, _sentence(record.damage))
        paused = pausing.why_paused(self._recovery)
        if not any(landing.owed_bytes for landing in self._landings.values()):
            paused = ""  # it goes on with the next look, or why not is told below
        unproven = "" if self._recovery.fed() else self._unproven
        return (
            self._spoiled
            or self._lost
            or paused
            or self._stopped
            or self._trouble
            or unproven
        )

    # --- looking after it ------------------------------------------------------------

    async def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        fed = self._recovery.fed()
        try:
            record = self._recovery.load()
        except IntegrityError as error:
            # Whatever has spoiled it: the guest reads on, for we know what it said.
            if not self._spoiled:
                log.warning("ir vm=%s: %s", self._record.vmid, error)
            self._spoiled = str(error)
            return
        self._spoiled = ""
        if record is None:  # discarded
            self._over.set()
            return
        self._record = record
        if self._orphaned(record, fed, now):
            log.warning("ir-orphan vm=%s", record.vmid)
            self._recovery.remove()
            self._over.set()
            return
        if record.handed and record.damage:
            await self._tick_damage(now)
        elif record.handed:
            await self._tick_data(now)
            self._unproven = self._why_unproven(fed)
            await self._tick_move(now)
        if record.started and now - self._asked_s > STOPPED_LOOK_S:
            self._asked_s = now
            await self._look_whether_stopped()
        if record.handed and now - self._looked_s > LOOK_S:
            self._looked_s = now
            await self._look_whether_there()

    async def _tick_data(self, now: float) -> None:
        """Pause a VM whose data stays away; let it go on when that comes."""
        owed = sum(landing.owed_bytes for landing in self._landings.values())
        paused = bool(pausing.why_paused(self._recovery))
        if owed != self._owed:
            self._resumes = paused and (self._owed >= 0 or not owed)
            self._resume_s = now
            self._owed, self._seen_s = owed, now
        elif (
            owed
            and not paused
            and now - self._seen_s > self._record.timeout
            and now >= self._pause_s
        ):
            self._pause_s = now + AGAIN_S
            await self._pause(owed)
        if self._resumes and now >= self._resume_s:
            self._resume_s = now + AGAIN_S
            self._resumes = not await self._go_on()

    async def _tick_damage(self, now: float) -> None:
        """Pause a VM whose data isn't what was stored, once in each run of QEMU.

        The job that found it did so already, unless it was killed, or the node was
        rebooted since. Who lets the guest go on in spite of it knows why.
        """
        process = self._local.vm_running(self._record.vmid)
        if process is None or process.identity == self._damaged_run:
            return
        if now < self._pause_s:
            return
        self._pause_s = now + AGAIN_S
        text = pausing.damaged(self._record.vmid, _sentence(self._record.damage))
        if await self._quietly(self._pause_ours(text)):
            self._damaged_run = process.identity

    def _why_unproven(self, fed: bool) -> str:
        """Return why what is all here isn't moved; empty: it is, or isn't all here."""
        record = self._record
        if self._owed or record.whole or record.prove or fed:
            return ""
        return (
            "all of its data is here, but the job that brought it ended before all of "
            "it had been compared with its digests. Remedy: run the restore of job "
            f"{record.head} again; the disks are moved after that"
        )

    async def _look_whether_there(self) -> None:
        try:
            await self._vm()
        except VmGoneForGoodError:
            log.warning("ir-gone vm=%s", self._record.vmid)
            self._recovery.remove()
            self._over.set()
        except JobError as error:
            if str(error) != self._lost:
                log.warning("ir vm=%s: %s", self._record.vmid, error)
            self._lost = str(error)
        except PveplugError as error:
            log.warning("ir vm=%s: %s", self._record.vmid, error)
        else:
            self._lost = ""

    async def _tick_move(self, now: float) -> None:
        """Begin a migration, or see one to its end."""
        if self._owed or not self._record.whole or self._resumes:
            return
        if self._migration is not None and self._migration.done():
            done, self._migration = self._migration, None
            await self._after(done)
        elif self._migration is None and self._migrate and now >= self._again_s:
            self._migrate = False
            self._trouble = ""
            self._migration = asyncio.create_task(self._move_all(), name="migration")

    async def _look_whether_stopped(self) -> None:
        """See to a guest that an I/O error has stopped (rerror and werror are stop)."""
        vmid = self._record.vmid
        paused = pausing.why_paused(self._recovery)
        if paused or self._local.vm_running(vmid) is None:
            # Pausing waits, with all of QEMU, for reads under way: nobody is answered.
            self._stopped = ""
            return
        try:
            found = await query_blocked(self._node.qmp_socket(vmid))
        except PveplugError as error:
            log.info("ir vm=%s: %s", vmid, error)
            return
        if found is None:
            self._stopped = ""
        elif found:
            self._stopped = (
                f"the guest is stopped: no room for its writes to {', '.join(found)}. "
                "Nothing is lost. Remedy: make room on the storage of its overlays, "
                f"then qm resume {vmid}"
            )
        else:
            # Reads failed, as their link was away for longer than QEMU waits. It is
            # back; what failed is done again.
            log.warning("ir-stopped vm=%s goes on", vmid)
            await self._quietly(self._resume_ours())

    async def _resume_ours(self) -> None:
        await self._vm()
        await pausing.resume(self._local, self._record.vmid)

    def _orphaned(self, record: Record, fed: bool, now: float) -> bool:
        """Whether nobody makes it any more, and nobody took it over."""
        if record.handed or fed:
            self._orphan_since = None
            return False
        if self._orphan_since is None:
            self._orphan_since = now
        return now - self._orphan_since > ORPHAN_S

    async def _pause(self, owed: int) -> None:
        """Stop the guest before its own patience ends; nothing of it is lost."""
        record = self._record
        log.warning("ir-paused vm=%s owed=%s", record.vmid, owed)
        text = pausing.late(record.vmid, owed, record.timeout, record.head)
        await self._quietly(self._pause_ours(text))

    async def _pause_ours(self, text: str) -> None:
        await self._vm()
        await pausing.pause(self._local, self._recovery, text)

    async def _go_on(self) -> bool:
        """Let the guest go on after a pause of ours; whether it does."""
        vmid = self._record.vmid
        log.info("ir-resumed vm=%s", vmid)
        self._trouble = ""
        note = running_note(vmid, self._record.head)

        async def go_on() -> None:
            await self._vm()
            await pausing.go_on(self._local, self._recovery)

        went = await self._quietly(go_on())
        if went:
            await self._describe(note)
        return went

    async def _quietly(self, work: Awaitable[None]) -> bool:
        """Await what must not end us when it fails; then that is logged and told."""
        try:
            await work
        except (PveplugError, OSError) as error:
            log.warning("ir vm=%s: %s", self._record.vmid, error)
            self._trouble = str(error)
            return False
        return True

    async def _describe(self, text: str) -> None:
        """Write into the VM's notes; where PVE refuses, the log alone has it."""
        try:
            await pausing.describe(self._local, self._record.vmid, text)
        except PveplugError as error:
            log.warning("ir-notes vm=%s: %s", self._record.vmid, error)

    async def _vm(self) -> dict[str, str]:
        """Return the configuration of the VM, which is still the one we made.

        Raises:
            VmGoneForGoodError: it was removed, and its overlays with it.
            JobError: its id is another VM's, or it isn't on this node; nothing of
                it may be touched, and nothing that it may depend on removed.
            ProgramError: it can't be read now.
        """
        record = self._record
        try:
            config = dict((await self._local.config(record.vmid)).values)
        except ProgramError as error:
            if error.reason is not Reason.VM_MISSING:
                raise
            left = [
                disk.overlay
                for disk in record.served
                if disk.key not in self._moved
                and await self._local.volume_exists(disk.overlay)
            ]
            if not left:
                raise VmGoneForGoodError(f"VM {record.vmid} was removed") from None
            raise JobError(
                f"it is not on this node, but {', '.join(left)} is still there, with "
                "what the guest wrote: its disks need this node until the recovery "
                "has ended.",
                vm=str(record.vmid),
                phase="instant recovery",
                remedy="migrate it back if another node has it; if it was removed, "
                f"pveplug ir discard --vmid {record.vmid}.",
            ) from None
        if smbios_uuid(config) == record.uuid:
            return config
        raise JobError(
            f"the VM that has this id now has another SMBIOS UUID than {record.uuid}, "
            "which was given to the recovered one: nothing is done to it.",
            vm=str(record.vmid),
            phase="instant recovery",
            remedy=f"if it is the recovered one, put that UUID back (qm set "
            f"{record.vmid} --smbios1 uuid={record.uuid}); if it is another, remove "
            f"{self._recovery.folder}, then end podheitor-proxmox-ir@{record.vmid}.",
        )

    # --- moving away -----------------------------------------------------------------

    async def _moved_before(self) -> None:
        """Find out what an earlier keeper has moved."""
        try:
            config = await self._vm()
            await clear_cut_move(self._node, self._local, self._recovery)
        except (PveplugError, OSError) as error:
            # The look at it, or the next move, finds the same and tells.
            log.warning("ir vm=%s: %s", self._record.vmid, error)
            return
        there = {drive.key for drive in drives(config)}
        for disk in self._record.served:
            if attached(disk, config):
                moved = await self._is_independent(disk)
            else:
                moved = disk.key in there
            if moved:
                self._moved.add(disk.key)

    async def _is_independent(self, disk: LandedDisk) -> bool:
        """Whether a disk that stays where its overlay is has no backing file."""
        if not same_place(disk):
            return False
        with contextlib.suppress(PveplugError, OSError):
            path = await self._local.volume_path(disk.overlay)
            return await asyncio.to_thread(stands_alone, path)
        return False

    async def _move_all(self) -> None:
        for disk in self._record.served:
            if disk.key in self._moved:
                continue
            config = await self._vm()
            where = attached(disk, config)
            if not where and not await self._local.volume_exists(disk.overlay):
                log.warning("ir vm=%s %s was removed", self._record.vmid, disk.key)
            elif not where or where.startswith("unused"):
                raise JobError(
                    f"its volume {disk.overlay} is not attached "
                    f"({where or 'not in the configuration'}).",
                    vm=str(self._record.vmid),
                    disk=disk.key,
                    phase="migrate",
                    remedy=f"if {disk.key} is that disk, moved already, remove what is "
                    "left of it; else attach it again; then pveplug ir migrate --vmid "
                    f"{self._record.vmid}.",
                )
            else:
                # Its user may have given it another place.
                await self._move(dataclasses.replace(disk, key=where))
            self._moved.add(disk.key)

    async def _move(self, disk: LandedDisk) -> None:
        record = self._record
        log.info("ir-move vm=%s disk=%s to=%s", record.vmid, disk.key, disk.storage)

        def heard(line: str) -> None:
            self._moving[disk.key] = line[-200:]

        self._moving[disk.key] = "begins"
        try:
            if same_place(disk):
                await make_independent(
                    self._node, self._local, record.vmid, disk, record.bwlimit, heard
                )
                return
            await clear_cut_move(self._node, self._local, self._recovery)
            await move(
                self._node, self._local, self._recovery, disk, record.bwlimit, heard
            )
        finally:
            self._moving.pop(disk.key, None)

    async def _after(self, migration: asyncio.Task[None]) -> None:
        """See how the migration ended."""
        record = self._record
        if migration.cancelled():
            return
        error = migration.exception()
        if error is None:
            await self._finish()
            return
        if not isinstance(error, PveplugError):
            raise error
        if isinstance(error, ProgramError) and error.reason in _PASSES:
            log.info("ir-migration vm=%s again: %s", record.vmid, error)
            self._again_s = asyncio.get_running_loop().time() + AGAIN_S
            self._migrate = True
            return
        self._trouble = (
            f"a disk could not be moved: {error}. The VM goes on as it is. Remedy: "
            f"mend that, then pveplug ir migrate --vmid {record.vmid}"
        )
        log.warning("ir-migration vm=%s: %s", record.vmid, error)
        await self._describe(self._trouble)

    async def _finish(self) -> None:
        """The VM stands on its own: take our traces away and end."""
        record = self._record
        self._trouble = ""
        try:
            config = await self._vm()
        except VmGoneForGoodError:
            config = {}
        except PveplugError as error:
            # Unknown isn't gone: what we would remove may be all the guest has.
            self._finish_later(error)
            return
        for disk in record.served:
            if attached(disk, config) and not await self._is_independent(disk):
                self._moved.discard(disk.key)
                self._finish_later(
                    JobError(
                        f"{disk.overlay} is attached as {attached(disk, config)} "
                        "and still needs what has landed.",
                        vm=str(record.vmid),
                        disk=disk.key,
                        phase="migrate",
                    )
                )
                return
        if config:
            values, delete = finished(record, config)
            try:
                await self._local.set_values(record.vmid, values, delete=delete)
            except ProgramError as error:
                self._finish_later(error)
                return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LINKS_S
        while loop.time() < deadline:
            if not (self._server and self._server.clients):
                break
            await asyncio.sleep(0.1)
        log.info("ir-done vm=%s", record.vmid)
        self._recovery.remove()
        self._over.set()

    def _finish_later(self, error: PveplugError) -> None:
        """Try the end again soon; told unless it is only that PVE has the VM."""
        log.warning("ir-finish vm=%s: %s", self._record.vmid, error)
        self._again_s = asyncio.get_running_loop().time() + AGAIN_S
        self._migrate = True
        if not (isinstance(error, ProgramError) and error.reason in _PASSES):
            self._trouble = (
                f"its disks have moved, but the recovery can't be ended yet: {error}. "
                f"It is tried again every {AGAIN_S:.0f} s"
            )


def attached(disk: LandedDisk, config: Mapping[str, str]) -> str:
    """Return where a VM has a disk's overlay, ``unusedN`` too; empty: nowhere."""
    for drive in drives(config):
        if drive.file == disk.overlay:
            return drive.key
    for key, value in config.items():
        if key.startswith("unused") and value.partition(",")[0] == disk.overlay:
            return key
    return ""


def finished(
    record: Record, config: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return what to set and what to delete when a VM needs us no more."""
    values: dict[str, str] = {}
    delete: list[str] = []

    def put(key: str, value: str) -> None:
        if value:
            values[key] = value
        elif config.get(key):
            delete.append(key)

    put("description", without_note(config.get("description", "")))
    put("tags", untagged(config.get("tags", "")))
    for key, ours in (("protection", "1"), ("onboot", "0")):
        if config.get(key) == ours:  # else its user has changed it meanwhile
            put(key, record.notes.get(key, ""))
    there = {drive.key: drive for drive in drives(config)}
    for disk in record.served:
        drive = there.get(disk.key)
        if drive is None:
            continue
        # rerror and werror stood there for us; PVE applies that at the next start.
        mine = dict(disk.options)
        options = tuple(
            (name, mine.get(name, value))
            for name, value in drive.options
            if name not in ("rerror", "werror") or name in mine or value != "stop"
        )
        if options != drive.options:
            values[disk.key] = Drive(disk.key, drive.file, options).render()
    return values, delete


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1 or not words[0].isdecimal():
        sys.stderr.write(
            "usage: podheitor-proxmox-ir VMID\n\nServes the disks of an instant "
            "recovery; started by restore jobs and by `pveplug ir resume`.\n"
        )
        return 2
    try:
        node = load_node()
        if node.keeper == "unit":
            own_log.setup_service()
        else:
            own_log.setup_backend(node.log_file)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_main(node, int(words[0])))
    except PveplugError as error:
        log.critical("ir-keeper: %s", error)
        return EX_UNAVAILABLE
    except Exception:
        log.critical("ir-keeper failed", exc_info=True)
        return EX_SOFTWARE


async def _main(node: Node, vmid: int) -> int:
    recovery = Recovery(node, vmid)
    record = recovery.load()
    if record is None:
        log.info("ir-keeper vm=%s: no recovery of this VM", vmid)
        await disable_unit(node, vmid)
        return EX_OK
    recovery.make_runtime()
    with own_log.context(vm=vmid):
        await _keep(node, recovery, record)
    if recovery.load() is None:
        await disable_unit(node, vmid)
    return EX_OK


async def _keep(node: Node, recovery: Recovery, record: Record) -> None:
    async with recovery.keeping() as ours:
        if not ours:
            log.info("ir-keeper: another serves already")
            return
        keeper = Keeper(node, recovery, record)
        work = asyncio.create_task(keeper.run(asyncio.Event()), name="keeper")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, work.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await work


if __name__ == "__main__":
    sys.exit(main())
