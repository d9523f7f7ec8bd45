# SPDX-License-Identifier: Apache-2.0
"""What only root on this node can do: locks, volume paths, activation, qmeventd.

PVE lets no token set or remove a ``lock:``, and its API neither resolves nor activates
volumes. So this runs ``qm``, ``pvesm`` and ``lvchange``, each with a time limit, in the
C.UTF-8 locale, its output bounded, and turns what they say into one line with a remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pveplug.errors import CommandError, TransportError
from pveplug.node import Node
from pveplug.proto.pve_refusal import Reason, classify
from pveplug.proto.pve_values import VmConfig, parse_qm_config
from pveplug.tasks import to_the_end

_MAX_OUTPUT: Final = 1024 * 1024
_MAX_FIREWALL: Final = 1024 * 1024
"""/etc/pve holds no larger file."""
_QM_S: Final = 60.0
_FREE_S: Final = 120.0
_LOOK_S: Final = 0.5
_LVM: Final = re.compile(r"/([\w+.][\w+.\-]*)/([\w+.][\w+.\-]*)")
_NOT_LVM: Final = frozenset(
    {"zvol", "rbd", "rbd-pve", "disk", "mapper", "shm", "pts", "block", "bus", "fd"}
)
_LOCALE: Final = "C.UTF-8"
"""English, and not C: PVE decodes its arguments by the locale (get_options of
PVE::JSONSchema), and notes with any other letter than ASCII's would be spoiled."""
_VOLID: Final = re.compile(r"[A-Za-z][\w.\-]*:\S+|/\S+")


class ProgramError(CommandError):
    """A program of PVE failed; the text ends with what to do.

    Attributes:
        reason: the kind of failure; ``lock``: the lock's name for ``Reason.LOCKED``.
    """

    def __init__(self, argv: list[str], status: int, stderr: str) -> None:
        self.reason, hint, self.lock = classify(stderr)
        super().__init__(argv, status, f"{stderr}. {hint}" if hint else stderr)
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class VmProcess:
    """The QEMU process of a running VM.

    ``started`` is in clock ticks since the node's boot ``boot_id``; all three together
    tell one run of a VM from every other.
    """

    pid: int
    started: int
    boot_id: str

    @property
    def identity(self) -> str:
        """A text that differs once QEMU was replaced."""
        return f"{self.boot_id}/{self.pid}/{self.started}"


class PveLocal:
    """Root's programs and files on this node. ``proc`` is for tests."""

    def __init__(self, node: Node, *, proc: str = "/proc") -> None:
        self.node = node
        self._proc = Path(proc)
        self._kept: list[int] = []

    @contextlib.contextmanager
    def keeping(self, fd: int) -> Iterator[None]:
        """Let the programs run within the block inherit a descriptor.

        It is the lock of a VM (``journal.own_vm``): a program that goes on when we are
        killed keeps the VM from whoever comes to clean up, until it has ended.
        """
        self._kept.append(fd)
        try:
            yield
        finally:
            self._kept.remove(fd)

    # --- locks ---------------------------------------------------------------------

    async def set_lock(self, vmid: int, proof: Path | None = None) -> None:
        """Set ``lock: backup``; PVE refuses if the VM is locked already.

        Args:
            proof: a file to make once that is done, also if we are killed meanwhile.

        Raises:
            ProgramError: ``Reason.LOCKED`` with the holder's ``lock``, or another.
        """
        argv = [self.node.qm, "set", str(vmid), "--lock", "backup"]
        if proof is None:
            await self._run(argv)
            return
        # Nobody may hear it any more; what it says must not be what ends it.
        script = 'trap "" PIPE; "$1" set "$2" --lock backup >/dev/null && : >"$3"'
        wrapped = ["/bin/sh", "-c", script, "sh", self.node.qm, str(vmid), str(proof)]
        try:
            await self._run(wrapped)
        except ProgramError as error:
            raise ProgramError(argv, error.status, error.stderr) from error

    async def unlock(self, vmid: int) -> bool:
        """Remove ``lock: backup`` if that is what the VM carries.

        Returns: whether there was such a lock. A VM that is gone has none. Only the
        caller can know that the lock is its own and not vzdump's.
        """
        try:
            if (await self.config(vmid)).lock != "backup":
                return False
            await self._run([self.node.qm, "unlock", str(vmid)])
        except ProgramError as error:
            if error.reason is Reason.VM_MISSING:
                return False
            raise
        return True

    async def config(self, vmid: int) -> VmConfig:
        """Return the configuration in force as ``qm config`` prints it."""
        argv = [self.node.qm, "config", str(vmid), "--current"]
        return parse_qm_config(await self._run(argv))

    async def vmids(self) -> list[int]:
        """Return the ids of this node's VMs."""
        listed = await self._run([self.node.qm, "list"])
        words = (line.split() for line in listed.split("\n"))
        return sorted(int(row[0]) for row in words if row and row[0].isdigit())

    async def vm_lock(self, vmid: int) -> str:
        """Return the name of the VM's lock, or an empty text."""
        return (await self.config(vmid)).lock

    # --- volumes -------------------------------------------------------------------

    async def volume_path(self, volid: str) -> str:
        """Return where QEMU's tools find a volume: a path, or an ``rbd:`` string.

        Raises:
            ProgramError: there is no such storage or volume.
        """
        if not _VOLID.fullmatch(volid):
            raise ProgramError([self.node.pvesm, "path"], 2, f"{volid!r} is no volume")
        argv = [self.node.pvesm, "path", volid]
        lines = (await self._run(argv)).split("\n")
        if not (found := lines[0].strip()):
            raise ProgramError(argv, 0, "it printed no path")
        return found

    async def activate(
        self, volid: str, announce: Callable[[], None] = lambda: None
    ) -> bool:
        """Make a volume readable on this node.

        Args:
            announce: called just before a volume is activated that wasn't, so that
                whoever has to deactivate it knows, whatever happens.

        Returns: whether it was activated, so that the caller deactivates it.

        Raises:
            ProgramError: it can't be, or its kind is activated by PVE alone.
        """
        where = await self.volume_path(volid)
        if _is_there(where):
            return False
        if not where.startswith(f"{self.node.dev_dir}/"):
            if where.startswith("/"):
                raise ProgramError(
                    [self.node.pvesm, "path", volid],
                    0,
                    f"{where} does not exist",
                )
            return False  # rbd:, iscsi:, … are opened by QEMU itself
        if volume := _logical_volume(where, self.node.dev_dir):
            announce()
            # -K: lvmthin snapshots and bases carry "skip activation".
            await self._run([self.node.lvchange, "-ay", "-K", volume])
        if await _appears(where):
            return volume is not None
        raise ProgramError(
            [self.node.pvesm, "path", volid],
            0,
            f"{where} is not there: the volume isn't active on this node. Start "
            "the VM, or map the volume by hand ('rbd map', 'zfs set volmode=dev')",
        )

    async def deactivate(self, volid: str) -> None:
        """Undo :meth:`activate`; nothing for what PVE keeps active itself."""
        where = await self.volume_path(volid)
        if volume := _logical_volume(where, self.node.dev_dir):
            await self._run([self.node.lvchange, "-an", volume])

    async def volume_exists(self, volid: str) -> bool:
        """Whether a storage of this node lists the volume."""
        storage, colon, _ = volid.partition(":")
        if not colon:
            return False
        listed = await self._run([self.node.pvesm, "list", storage])
        return any(line.split()[:1] == [volid] for line in listed.split("\n"))

    async def volumes(self, storage: str) -> list[str]:
        """Return the ids of the volumes that a storage lists."""
        listed = await self._run([self.node.pvesm, "list", storage])
        words = (line.split()[:1] for line in listed.split("\n")[1:])
        return [word[0] for word in words if word]

    async def fleecing_volumes(self, vmid: int) -> list[str]:
        """Return the volumes of a VM that are named as fleecing images are."""
        name = re.compile(rf"[^:]+:(?:.*/)?vm-{vmid}-fleece-[0-9]+(?:\.\w+)?")
        listed = await self._run([self.node.pvesm, "status", "--content", "images"])
        rows = [line.split() for line in listed.split("\n")[1:]]
        active = [row[0] for row in rows if row[2:3] == ["active"]]
        found = []
        for storage in active:
            listed = await self._run([self.node.pvesm, "list", storage])
            volids = (line.split()[:1] for line in listed.split("\n"))
            found += [v[0] for v in volids if v and name.fullmatch(v[0])]
        return found

    async def free_volume(self, volid: str) -> None:
        """Free a volume for good, whether or not a configuration names it."""
        argv = [self.node.pvesm, "free", volid]
        await self._run(argv, timeout_s=_FREE_S)

    async def destroy_vm(self, vmid: int) -> bool:
        """Destroy a stopped VM and its disks, whatever lock it carries.

        Returns: False when there was no such VM.
        """
        argv = [self.node.qm, "destroy", str(vmid), "--skiplock", "1", "--purge", "1"]
        try:
            await self._run(argv, timeout_s=_FREE_S)
        except ProgramError as error:
            if error.reason is Reason.VM_MISSING:
                return False
            raise
        return True

    # --- a VM as a whole -----------------------------------------------------------

    async def stop_vm(self, vmid: int) -> None:
        """Stop the VM at once, as if its power failed, whatever lock it carries."""
        argv = [self.node.qm, "stop", str(vmid), "--skiplock", "1"]
        await self._run(argv, timeout_s=_FREE_S)

    async def set_values(
        self,
        vmid: int,
        values: Mapping[str, str],
        *,
        delete: Sequence[str] = (),
        skiplock: bool = False,
    ) -> None:
        """Change the VM's configuration as root; ``skiplock``: whatever lock it has."""
        argv = [self.node.qm, "set", str(vmid)]
        if skiplock:
            argv += ["--skiplock", "1"]
        for key, value in values.items():
            argv += [f"--{key}", value]
        if delete:
            argv += ["--delete", ",".join(delete)]
        await self._run(argv)

    async def move_disk(
        self,
        vmid: int,
        key: str,
        storage: str,
        *,
        form: str | None = None,
        bwlimit: int = 0,
        on_line: Callable[[str], None] = lambda line: None,
        output: Path | None = None,
    ) -> None:
        """Move a disk to another storage, online where the VM runs; the old one goes.

        Takes as long as it takes. Cancelled, PVE is asked to undo what it began.

        Args:
            form: image format; None: as it is, where the storage can.
            bwlimit: KiB/s, 0 is unlimited.
            on_line: is told each line that PVE prints, its progress.
            output: a file for that; PVE then goes on when we are killed.

        Raises:
            ProgramError: the disk stays where it was.
        """
        argv = [self.node.qm, "disk", "move", str(vmid), key, storage, "--delete", "1"]
        if form:
            argv += ["--format", form]
        if bwlimit:
            argv += ["--bwlimit", str(bwlimit)]
        await run_long(argv, on_line=on_line, keep=self._kept, output=output)

    # --- files ---------------------------------------------------------------------

    async def firewall(self, vmid: int) -> str | None:
        """Return the VM's firewall rules as PVE stores them, None if it has none.

        Raises:
            TransportError: the file is there and can't be read, or is no text.
        """
        return await asyncio.to_thread(self._firewall, vmid)

    def _firewall(self, vmid: int) -> str | None:
        where = Path(self.node.firewall_dir) / f"{vmid}.fw"
        try:
            with where.open("rb") as file:
                data = file.read(_MAX_FIREWALL + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TransportError(f"{where}: {error.strerror or error}") from error
        if len(data) > _MAX_FIREWALL:
            raise TransportError(f"{where} is longer than {_MAX_FIREWALL} bytes")
        return data.decode("utf-8", "surrogateescape")

    def vm_running(self, vmid: int) -> VmProcess | None:
        """Return the VM's QEMU process, None when it doesn't run.

        The rule is PVE's: the pid in the pid file exists, its program is ``kvm`` or
        ``qemu-*`` and it was started with ``-pidfile`` and exactly this path.
        """
        pid_file = self.node.pid_file(vmid)
        try:
            pid = int(Path(pid_file).read_bytes()[:32].split(b"\n")[0])
            command = (self._proc / str(pid) / "cmdline").read_bytes()
            fields = (self._proc / str(pid) / "stat").read_bytes()
        except (OSError, ValueError):
            return None
        argv = [os.fsdecode(word) for word in command.split(b"\0")]
        program = argv[0].rpartition("/")[2]
        if not (program.endswith("kvm") or program.startswith("qemu-")):
            return None
        pairs = itertools.pairwise(argv)
        if not any(
            option in ("-pidfile", "--pidfile") and value == pid_file
            for option, value in pairs
        ):
            return None
        # proc(5): field 2 is the program's name in brackets and may hold blanks; after
        # it, "state" is field 3 and "starttime" 22.
        started = int(fields.rpartition(b")")[2].split()[22 - 3])
        boot_id = ""
        with contextlib.suppress(OSError):
            text = (self._proc / "sys/kernel/random/boot_id").read_text("ascii")
            boot_id = text.strip()
        return VmProcess(pid, started, boot_id)

    # --- qmeventd ------------------------------------------------------------------

    @asynccontextmanager
    async def register_qmeventd(self, vmid: int) -> AsyncIterator[str | None]:
        """Keep qmeventd from ending QEMU when the guest powers off meanwhile.

        Yields: None, or a warning when qmeventd can't be told. The job can go on; a
        guest that powers off then takes the point in time with it.
        """
        writer: asyncio.StreamWriter | None = None
        warning: str | None = None
        try:
            async with asyncio.timeout(5.0):
                _, writer = await asyncio.open_unix_connection(
                    self.node.qmeventd_socket
                )
                hello = {"vzdump": {"vmid": str(vmid)}}
                writer.write(json.dumps(hello, separators=(",", ":")).encode())
                await writer.drain()
        except OSError as error:
            warning = (
                f"qmeventd at {self.node.qmeventd_socket} can't be told of this job "
                f"({error.strerror or 'no answer'}): if the guest powers off "
                "before the end, this VM's backup fails"
            )
        try:
            yield warning
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    # --- running programs ----------------------------------------------------------

    async def _run(self, argv: list[str], *, timeout_s: float = _QM_S) -> str:
        return await run(argv, timeout_s=timeout_s, keep=self._kept)


async def run(argv: list[str], *, timeout_s: float, keep: Sequence[int] = ()) -> str:
    """Run a program to its end and return what it printed.

    It gets no input, the C.UTF-8 locale, a session of its own and the descriptors
    ``keep``. When it takes too long or the caller is cancelled, its whole group is
    killed.

    Raises:
        ProgramError: it can't be started, failed, took too long or printed too much.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": _LOCALE, "LANG": _LOCALE},
            start_new_session=True,
            pass_fds=tuple(keep),
        )
    except OSError as error:
        raise ProgramError(
            argv,
            127,
            f"{error.strerror or error}. Is this a Proxmox VE node, and its path right "
            "in /etc/podheitor-proxmox/node.toml?",
        ) from error
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
            out = tasks.create_task(_bounded(process.stdout), name="stdout")
            err = tasks.create_task(_bounded(process.stderr), name="stderr")
            status = await process.wait()
    except TimeoutError:
        raise ProgramError(
            argv, -signal.SIGKILL, f"it did not end within {timeout_s:g} s"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    printed, overflow = out.result()
    said, _ = err.result()
    if status != 0:
        text = said.decode("utf-8", "replace").strip()
        raise ProgramError(argv, status, text or printed.decode("utf-8", "replace"))
    if overflow:
        raise ProgramError(argv, 0, f"it printed more than {_MAX_OUTPUT} bytes")
    return printed.decode("utf-8", "surrogateescape")


async def run_long(
    argv: list[str],
    *,
    on_line: Callable[[str], None],
    gentle_s: float = 60.0,
    keep: Sequence[int] = (),
    output: Path | None = None,
) -> None:
    """Run a program that may take hours and tells how far it is.

    Cancelled, the program is asked to end (SIGTERM) and has ``gentle_s`` to undo what
    it began. It inherits the descriptors ``keep``. Where it prints to a file,
    ``output``, it doesn't end when we are killed.

    Raises:
        ProgramError: it can't be started, or failed; the last lines say why.
    """
    with contextlib.ExitStack() as stack:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stack.enter_context(output.open("wb"))
                if output
                else asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "LC_ALL": _LOCALE, "LANG": _LOCALE},
                start_new_session=True,
                pass_fds=tuple(keep),
            )
        except OSError as error:
            raise ProgramError(argv, 127, f"{error.strerror or error}") from error
    last: deque[str] = deque(maxlen=20)
    try:
        async for line in _printed(process, output):
            text = line.decode("utf-8", "replace").strip()
            last.append(text)
            on_line(text)
        status = await process.wait()
    finally:
        if process.returncode is None:
            await to_the_end(_ended(process, gentle_s))
    if status != 0:
        raise ProgramError(argv, status, "\n".join(last))


async def _printed(
    process: asyncio.subprocess.Process, output: Path | None
) -> AsyncIterator[bytes]:
    """Yield the lines of a program as they come, from a pipe or from a file."""
    if process.stdout is not None:
        while line := await _line(process.stdout):
            yield line
    if output is None:
        return
    with output.open("rb") as file:
        rest = b""
        while True:
            over = process.returncode is not None
            data = file.read(64 * 1024)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line
            if data:
                continue
            if over:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await process.wait()
        if rest:
            yield rest


async def _line(stream: asyncio.StreamReader) -> bytes:
    """Return the next line, or a piece of one that is too long; b"": the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(max(error.consumed, 1))


async def _ended(process: asyncio.subprocess.Process, gentle_s: float) -> None:
    for number, wait_s in ((signal.SIGTERM, gentle_s), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await process.wait()
                return


async def _bounded(stream: asyncio.StreamReader | None) -> tuple[bytes, bool]:
    """Read to the end, keeping the first ``_MAX_OUTPUT`` bytes."""
    kept = bytearray()
    overflow = False
    while stream and (data := await stream.read(64 * 1024)):
        room = _MAX_OUTPUT - len(kept)
        overflow = overflow or len(data) > room
        kept += data[:room]
    return bytes(kept), overflow


def _logical_volume(where: str, dev_dir: str) -> str | None:
    """Return ``VG/LV`` for ``/dev/VG/LV``."""
    if not where.startswith(f"{dev_dir}/"):
        return None
    found = _LVM.fullmatch(where.removeprefix(dev_dir))
    if found is None or found.group(1) in _NOT_LVM:
        return None
    return f"{found.group(1)}/{found.group(2)}"


def _is_there(where: str) -> bool:
    try:
        mode = os.stat(where).st_mode
    except OSError:
        return False
    return stat.S_ISBLK(mode) or stat.S_ISREG(mode)


async def _appears(where: str) -> bool:
    """Wait for udev to make the device's link."""
    for _ in range(100):
        if _is_there(where):
            return True
        await asyncio.sleep(0.1)
    return False
