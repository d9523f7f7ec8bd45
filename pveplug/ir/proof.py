# SPDX-License-Identifier: Apache-2.0
"""Watch a VM that boots from a backup, until it is proven or not.

Whoever makes, starts and removes the VM calls :func:`watch` when it starts it, or
before; everything is seen from outside, through the VM's own sockets::

    VMID.qmp      a burst each second: run state, processors, picture of the screen
    VMID.qga      guest-ping
    VMID.serial0  read to its end; its lines against the pattern, in another process

What is seen goes to the :class:`~pveplug.proving.judge.Judge`, which decides. A VM with
``freeze: 1`` is continued when its console is connected, so no line of it is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any, Final

from pveplug.errors import PveplugError, QmpError, RemoteProtocolError, TransportError
from pveplug.ir import serialwatch
from pveplug.node import Node
from pveplug.proving.console import ConsoleText
from pveplug.proving.judge import ENDED, Judge, Look, Screen
from pveplug.proving.picture import MAX_FILE, as_png, parse_ppm
from pveplug.proving.processors import activity, parse_processors
from pveplug.proving.report import Subject, as_json, as_text
from pveplug.proving.screentext import columns_of, joined, read_text
from pveplug.proving.verdict import Evidence, Screenshot, Verdict, Wanted
from pveplug.qga import AsyncGuestAgent
from pveplug.qmp import Qmp, VmGoneError, qmp_session

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
LOOK_LIMIT_S: Final = 15.0
"""A look that takes longer is given up; the next one may succeed."""
LAST_LOOK_S: Final = 3.0
MONITOR_BUSY_S: Final = 10.0
PING_S: Final = 3.0
DRAIN_S: Final = 0.5
"""What a VM that has ended may still have on its way through the console."""
CONSOLE_S: Final = 5.0
"""How long a VM that was started frozen waits for its console's reader."""
PICTURE: Final = "screen.png"
_OWN: Final = "prove-"
"""How directories begin that we make for pictures."""
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


async def watch(
    node: Node,
    vmid: int,
    wanted: Wanted,
    *,
    folder: Path | None = None,
    look_every_s: float = LOOK_EVERY_S,
) -> Verdict:
    """Wait for the evidence, a failure, or ``wanted.timeout_s``.

    Args:
        node: where the VM's sockets are.
        vmid: the VM; it may not run yet.
        wanted: what has to be seen.
        folder: an existing directory, mode 0700, for the pictures; None: one below
            ``node.runtime_dir``. :func:`write_report` removes the latter.
        look_every_s: pause between two looks at the monitor.

    Cancelling leaves nothing running and the VM as it is. It raises no error of ours:
    what can't be seen is in the verdict.
    """
    if folder is not None:
        return await _Watch(node, vmid, wanted, folder, look_every_s).run()
    own = await asyncio.to_thread(_fresh, node, vmid)
    kept = False
    try:
        verdict = await _Watch(node, vmid, wanted, own, look_every_s).run()
        kept = verdict.screenshot is not None
        return verdict
    finally:
        if not kept:
            shutil.rmtree(own, ignore_errors=True)


class _Watch:
    def __init__(
        self, node: Node, vmid: int, wanted: Wanted, folder: Path, look_every_s: float
    ) -> None:
        self._node = node
        self._vmid = vmid
        self._wanted = wanted
        self._folder = folder
        self._look_every_s = look_every_s
        self._judge = Judge(wanted)
        self._began = time.monotonic()
        self._decided = asyncio.Event()
        self._console = ConsoleText()
        self._connected = asyncio.Event()
        self._seen_running = False
        self._waits_since: float | None = None
        self._screen: Screen | None = None
        self._notes: list[str] = []
        self._decided_by_look = False

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    async def run(self) -> Verdict:
        try:
            async with asyncio.timeout(self._wanted.timeout_s) as limit:
                await self._until_decided()
        except TimeoutError:
            if not limit.expired():
                raise
            if not self._seen_running:
                self._judge.cannot_judge(
                    f"VM {self._vmid} did not run within {self._wanted.timeout_s:g} s"
                )
            self._judge.time_is_up()
        seconds = self._now
        if not self._decided_by_look:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(LAST_LOOK_S):
                    await self._look_once()  # the picture of the end
        outcome, reason = self._judge.decision or _undecided()
        return Verdict(
            outcome=outcome,
            reason=reason,
            wanted=self._wanted,
            found=tuple(self._judge.found),
            seconds=seconds,
            screenshot=await asyncio.to_thread(self._save_picture),
            notes=tuple(self._notes),
            first_lines=tuple(self._console.first),
            last_lines=self._console.tail(),
        )

    async def _until_decided(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._looks(), name="prove looks"),
                tasks.create_task(self._serial(), name="prove serial"),
            ]
            if Evidence.AGENT in self._wanted.evidence:
                running.append(tasks.create_task(self._agent(), name="prove agent"))
            await self._decided.wait()
            for task in running:
                task.cancel()

    def _told(self) -> bool:
        """Wake whoever waits if the judge has decided."""
        if self._judge.decision:
            self._decided.set()
        return self._decided.is_set()

    def _note(self, text: str) -> None:
        if text not in self._notes and len(self._notes) < 20:
            log.info("prove vm=%d note=%s", self._vmid, text)
            self._notes.append(text)

    # --- the agent --------------------------------------------------------------------

    async def _agent(self) -> None:
        agent = AsyncGuestAgent(self._node.qga_socket(self._vmid))
        while True:
            try:
                await agent.ping(PING_S)
            except PveplugError as error:
                log.debug("prove vm=%d agent=%s", self._vmid, error)
            else:
                self._judge.agent_answered(self._now)
                self._told()
                return
            await asyncio.sleep(self._look_every_s)

    # --- the serial console -----------------------------------------------------------

    async def _serial(self) -> None:
        path = f"{self._node.qemu_run_dir}/{self._vmid}.serial0"
        async with contextlib.AsyncExitStack() as stack:
            matcher = None
            if Evidence.SERIAL in self._wanted.evidence:
                matcher = await stack.enter_async_context(
                    serialwatch.Matcher(self._wanted.serial)
                )
            while True:
                reader, writer = await serialwatch.connect(path)
                self._connected.set()
                try:
                    await self._read_console(reader, matcher)
                except TransportError as error:
                    self._note(str(error))
                except serialwatch.PatternError as error:
                    self._judge.cannot_judge(str(error))
                    self._told()
                    return
                finally:
                    writer.close()
                await asyncio.sleep(serialwatch.RETRY_S)

    async def _read_console(
        self, reader: asyncio.StreamReader, matcher: serialwatch.Matcher | None
    ) -> None:
        async with contextlib.aclosing(
            serialwatch.read_lines(reader, self._console)
        ) as console:
            async for lines in console:
                at = await matcher.first(lines) if matcher else None
                # A failure before the line that matches counts, one behind it doesn't.
                for line in lines if at is None else lines[: at + 1]:
                    self._judge.serial_line(line)
                if at is not None:
                    self._judge.serial_matched(self._now, lines[at])
                self._told()

    # --- the monitor ------------------------------------------------------------------

    async def _looks(self) -> None:
        while True:
            try:
                look = await self._look_once()
            except VmGoneError:
                if self._seen_running:
                    await asyncio.sleep(DRAIN_S)
                    self._judge.vm_ended()
            except TimeoutError:
                self._note("a look at the VM's monitor took too long and was given up")
            except Exception as error:
                # qemu.qmp lets through what hostile bytes give: UnicodeDecodeError.
                self._note(f"a look at the VM's monitor failed: {error}"[:300])
            else:
                if look.status in ENDED:
                    await asyncio.sleep(DRAIN_S)
                self._judge.looked(self._now, look)
                self._decided_by_look = self._judge.decision is not None
            if self._told():
                return
            await asyncio.sleep(self._look_every_s)

    async def _look_once(self) -> Look:
        """Look at the VM; VmGoneError: it doesn't run."""
        file = self._folder / "look.ppm"
        picture = False
        async with asyncio.timeout(LOOK_LIMIT_S):
            async with qmp_session(
                self._node.qmp_socket(self._vmid), connect_timeout_s=MONITOR_BUSY_S
            ) as qmp:
                self._seen_running = True
                status = _status(await qmp.execute("query-status"))
                if status == "prelaunch" and self._may_continue():
                    await qmp.execute("cont")
                registers = await self._registers(qmp)
                try:
                    await qmp.execute("screendump", {"filename": str(file)})
                    picture = True
                except QmpError as error:
                    self._no_picture(str(error))
            if picture:
                try:
                    self._screen = await asyncio.to_thread(_read, file, self._screen)
                except (OSError, RemoteProtocolError) as error:
                    self._no_picture(str(error))
                    picture = False
        return Look(
            status,
            activity(parse_processors(registers)),
            self._screen if picture else None,
        )

    async def _registers(self, qmp: Qmp) -> str:
        try:
            said = await qmp.execute(
                "human-monitor-command", {"command-line": "info registers -a"}
            )
        except QmpError as error:
            self._note(f"QEMU doesn't tell what the processors do: {error}")
            return ""
        return said if isinstance(said, str) else ""

    def _no_picture(self, why: str) -> None:
        self._judge.no_screen(f"there is no picture of the screen: {why}")
        self._note(f"there is no picture of the screen: {why}")

    def _may_continue(self) -> bool:
        """Whether a VM that was started frozen may run: its console is connected."""
        if self._waits_since is None:
            self._waits_since = self._now
        if self._connected.is_set():
            return True
        if self._now - self._waits_since < CONSOLE_S:
            return False
        self._note("the VM has no serial console to read")
        return True

    def _save_picture(self) -> Screenshot | None:
        if self._screen is None:
            return None
        picture = self._screen.picture
        data = as_png(picture)
        path = self._folder / PICTURE
        path.write_bytes(data)
        path.chmod(0o600)
        (self._folder / "look.ppm").unlink(missing_ok=True)
        return Screenshot(
            path=str(path),
            sha256=hashlib.sha256(data).hexdigest(),
            width=picture.width,
            height=picture.height,
            text=self._screen.lines,
        )


def _status(answer: Any) -> str:
    status = answer.get("status") if isinstance(answer, dict) else None
    if not isinstance(status, str):
        raise RemoteProtocolError("QEMU's answer to query-status has no status")
    return status


def _undecided() -> Any:
    raise AssertionError("a watch ended without a decision")


def _read(file: Path, before: Screen | None) -> Screen:
    """Read a picture that QEMU has written; the last one where nothing has changed."""
    with open(os.open(file, _READ), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise RemoteProtocolError("QEMU's picture of the screen is no file")
        data = opened.read(MAX_FILE + 1)
    picture = parse_ppm(data)
    if before is not None and before.picture == picture:
        return before
    lines = read_text(picture)
    return Screen(picture, lines, joined(lines, columns_of(picture)))


def _fresh(node: Node, vmid: int) -> Path:
    """Make an empty directory for this VM's pictures, mode 0700."""
    runtime = Path(node.runtime_dir)
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = runtime / f"{_OWN}{vmid}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


async def write_report(directory: Path, subject: Subject, verdict: Verdict) -> Path:
    """Write ``NAME.json``, ``NAME.txt`` and ``NAME.png``; return the path of the JSON.

    NAME is the subject's ``file_name``. Files appear whole or not at all, the JSON the
    last; the directory is made if it isn't there, mode 0700. The picture is moved.

    Raises:
        PveplugError: it can't be written; the text names the path.
    """
    try:
        return await asyncio.to_thread(_write_report, directory, subject, verdict)
    except OSError as error:
        raise PveplugError(
            f"the report cannot be written to {directory}: {error.strerror or error}"
        ) from error


def _write_report(directory: Path, subject: Subject, verdict: Verdict) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = subject.file_name
    shot = verdict.screenshot
    picture = f"{base}.png" if shot else None
    if shot:
        _put(directory / f"{base}.png", Path(shot.path).read_bytes())
    _put(directory / f"{base}.txt", as_text(subject, verdict, picture).encode())
    path = directory / f"{base}.json"
    _put(path, as_json(subject, verdict, picture).encode())
    if shot:
        taken = Path(shot.path)
        taken.unlink(missing_ok=True)
        if taken.parent.name in (
            _OWN + str(subject.vmid),
            _OWN + str(subject.proved_as),
        ):
            shutil.rmtree(taken.parent, ignore_errors=True)
    return path


def _put(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(
        os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
    ) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
