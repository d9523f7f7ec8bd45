# SPDX-License-Identifier: Apache-2.0
"""Scratch images: where the old content of overwritten blocks waits to be read.

They go into a local directory, or onto a PVE storage (``fleecing_storage``). With the
*fleece* mechanism a full scratch store fails the guest's write, so the room for the
worst case is reserved before the point in time, or the job refused. Where the store
can't reserve, its free space must suffice, and is watched; the backup is ended in time.
With *cbw* QEMU itself ends the backup.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol

from pveplug.errors import CommandError, JobError, PveplugError
from pveplug.journal import Journal
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.snapshot import ScratchFile
from pveplug.storeprobe import StoreProbe
from pveplug.units import GiB, MiB, human

logger = logging.getLogger(__name__)
RESERVE: Final = 256 * MiB
"""Least free space below which a fleecing backup is ended: 2 s of a fast disk."""
WATCH_S: Final = 0.5
FALLOC_FL_KEEP_SIZE: Final = 1
CREATE_TIMEOUT_S: Final = 60.0
MOST_NAMES: Final = 64
_NAME: Final = re.compile(r"ph-([1-9][0-9]{0,8})-[a-z]+[0-9]+\.qcow2")


def scratch_owner(name: str) -> int | None:
    """Return the VM whose scratch image a file of this name is, None for any other."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def scratch_images(directories: Iterable[str], vmid: int | None = None) -> list[str]:
    """Return the scratch images in these directories, of one VM if it is given."""
    found = []
    for directory in dict.fromkeys(directories):
        try:
            with os.scandir(directory) as there:
                plain = [e.name for e in there if e.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("scratch directory=%s error=%s", directory, error)
            continue
        for name in sorted(plain):
            owner = scratch_owner(name)
            if owner is not None and vmid in (None, owner):
                found.append(os.path.join(directory, name))
    return found


class VolumeStore(Protocol):
    """What is needed of a PVE storage."""

    def volid(self, name: str) -> str:
        """Return the id that a volume of this name will have."""

    async def allocate(self, name: str, size: int, fmt: str) -> str:
        """Allocate a volume; return its id."""

    async def path(self, volid: str) -> str:
        """Return where a volume is reached, after activating it."""

    async def exists(self, volid: str) -> bool:
        """Whether there is a volume of this id."""

    async def free(self, volid: str) -> None:
        """Free a volume, if it is there."""


async def _qemu_img_create(qemu_img: str, path: str, size: int) -> None:
    argv = [qemu_img, "create", "-q", "-f", "qcow2", path, str(size)]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise CommandError(argv, 127, str(error)) from error
    try:
        async with asyncio.timeout(CREATE_TIMEOUT_S):
            _, said = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise CommandError(argv, process.returncode, said.decode(errors="replace"))


class LocalScratch:
    """Sparse qcow2 images in a directory of this node."""

    def __init__(self, directory: str, vmid: int, qemu_img: str, log: Journal) -> None:
        self.directory = directory
        self._vmid = vmid
        self._prefix = f"{directory}/ph-{vmid}"
        self._qemu_img = qemu_img
        self._journal = log
        self._made: list[str] = []
        self._promised = 0
        self._vmid = vmid
        self.paths: set[str] = set()
        """Image files made."""
        self.devices: set[str] = set()
        """Volumes made that aren't files; there are none here."""
        self.counted: set[str] = set()
        """Directories of theirs that can't reserve, so that their space matters."""

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        """Make an image; a left-over of the same name is replaced.

        Raises:
            CommandError, JobError: it can't be made, or has no room for ``data`` bytes;
                the directory says why.
        """
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise JobError(
                f"cannot use the scratch directory {self.directory}: {error}.",
                disk=key,
                phase="scratch",
                remedy="set scratch_dir or fleecing_storage.",
            ) from error
        path = f"{self._prefix}-{key}.qcow2"
        self._journal.add("files", path)
        self._made.append(path)
        self.paths.add(path)
        await _qemu_img_create(self._qemu_img, path, size)
        os.chmod(path, 0o600)
        if data:
            await self.reserve(key, path, size, data)
        return ScratchFile(path, "qcow2", "file")

    async def reserve(self, key: str, path: str, size: int, data: int) -> None:
        """Take the room that an image needs to hold ``data`` bytes of its ``size``.

        Raises:
            JobError: there is not so much.
        """
        need = data + size // 4096 + MiB  # tables: 10 bytes for 64 KiB, and rounding
        directory = os.path.dirname(path)
        try:
            if await asyncio.to_thread(_reserve, path, need):
                return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            enough = False
        else:
            # Others may take it meanwhile, so it is watched, and more must be there.
            self.counted.add(directory)
            self._promised += need
            enough = await asyncio.to_thread(_free, directory) >= (
                self._promised + RESERVE
            )
        if not enough:
            free = await asyncio.to_thread(_free, directory)
            raise JobError(
                f"scratch needs {human(need)} in {directory}, where {human(free)} are "
                "free: were it to run full, this version of QEMU would fail the "
                "guest's writes. The guest was not touched.",
                vm=str(self._vmid),
                disk=key,
                phase="scratch",
                remedy="set scratch_dir or fleecing_storage to a larger place.",
            )

    async def remove(self) -> None:
        """Remove every image made, and what an earlier job has left beside it."""
        while self._made:
            path = self._made.pop()
            _unlink(path)
            self._journal.drop("files", path)
        for path in scratch_images([self.directory], self._vmid):
            _unlink(path)


class StorageScratch:
    """Images on a PVE storage, named ``vm-<vmid>-fleece-<n>`` as PVE names its own.

    File storages take sparse qcow2. Block storages take raw volumes, which can't have
    a backing file: there only the cbw mechanism works, and what must have one (EFI
    variables) goes to the local directory.
    """

    def __init__(
        self,
        store: VolumeStore,
        vmid: int,
        *,
        qcow2: bool,
        local: LocalScratch,
        log: Journal,
    ) -> None:
        self._store = store
        self._vmid = vmid
        self._qcow2 = qcow2
        self._local = local
        self._journal = log
        self._made: list[str] = []
        self._count = 0
        self.paths = local.paths
        self.devices = local.devices
        self.counted = local.counted

    async def create(
        self, key: str, size: int, *, backing: bool, data: int = 0
    ) -> ScratchFile:
        """Allocate an image.

        Raises:
            PveplugError: the storage refused, e.g. because it is full.
        """
        if backing and not self._qcow2:
            if size > GiB:
                raise JobError(
                    "fleecing_storage must hold qcow2 files for this version of QEMU.",
                    disk=key,
                    phase="scratch",
                    remedy="name a directory or NFS storage, or leave it out.",
                )
            return await self._local.create(key, size, backing=True, data=data)
        fmt = "qcow2" if self._qcow2 else "raw"
        path = await self._store.path(await self._allocate(size, fmt))
        if fmt == "raw":
            self.devices.add(path)
            driver = "host_device" if path.startswith("/dev/") else "file"
            return ScratchFile(path, "raw", driver)  # type: ignore[arg-type]
        self.paths.add(path)
        if data:
            await self._local.reserve(key, path, size, data)
        return ScratchFile(path, "qcow2", "file")

    async def _allocate(self, size: int, fmt: str) -> str:
        """Allocate under a name that nobody has; it is in the journal before it is."""
        while True:
            name = f"vm-{self._vmid}-fleece-{self._count}"
            self._count += 1
            expected = self._store.volid(name + (".qcow2" if self._qcow2 else ""))
            # Before it is in the journal: whose it is can't be told from its name, for
            # vzdump names its own like this, and what the journal names is freed.
            if await self._store.exists(expected):
                if self._count < MOST_NAMES:
                    continue
                raise JobError(
                    f"{expected} and all such names before it are taken.",
                    vm=str(self._vmid),
                    phase="scratch",
                    remedy="look which of them nobody uses any more, and pvesm free "
                    "those.",
                )
            self._journal.add("volumes", expected)
            self._made.append(expected)
            try:
                volid = await self._store.allocate(
                    expected.rpartition(":")[2].rpartition("/")[2], size, fmt
                )
            except PveRefusalError as error:
                if error.status or error.reason is Reason.EXISTS:
                    self._forget(expected)
                if error.reason is Reason.EXISTS and self._count < MOST_NAMES:
                    continue
                raise
            if volid != expected:
                self._journal.add("volumes", volid)
                self._made.append(volid)
                self._forget(expected)
            return volid

    def _forget(self, volid: str) -> None:
        self._made.remove(volid)
        self._journal.drop("volumes", volid)

    async def remove(self) -> None:
        """Free every image made; what can't be freed is named in one error."""
        await self._local.remove()
        left: list[str] = []
        cause: PveplugError | None = None
        while self._made:
            volid = self._made.pop()
            try:
                await self._store.free(volid)
            except PveplugError as error:
                left.append(volid)
                cause = error
            else:
                self._journal.drop("volumes", volid)
        if left:
            raise JobError(
                f"could not free {', '.join(left)}: {cause}",
                phase="scratch",
                remedy=f"pvesm free {left[0]}",
            ) from cause


def _reserve(path: str, need: int) -> bool:
    """Give a file ``need`` bytes of its own without making it longer.

    qcow2 grows by writing behind its end, so it grows into them. Returns False where
    the file system knows no such thing (ext3, NFS, ZFS).

    Raises:
        OSError: it does, and there is no room.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        libc.fallocate64.argtypes = arguments
        while libc.fallocate64(fd, FALLOC_FL_KEEP_SIZE, 0, need):
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)
    return True


def _free(directory: str) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def directories(paths: set[str]) -> set[str]:
    """Return the directories of these files."""
    return {os.path.dirname(path) for path in paths}


async def watch_space(vmid: int, counted: set[str], reserve: int = RESERVE) -> None:
    """Return never; raise when a scratch store is about to run full.

    Raises:
        JobError: free space fell below the reserve; end the backup now.
    """
    while True:
        for directory in sorted(counted):
            free = await asyncio.to_thread(_free, directory)
            if free < reserve:
                raise JobError(
                    f"only {human(free)} left in {directory}; the backup is ended "
                    "before a full scratch store hurts the guest.",
                    vm=str(vmid),
                    phase="scratch",
                    remedy="set scratch_dir or fleecing_storage to a larger place.",
                )
        await asyncio.sleep(WATCH_S)


async def watch_answers(vmid: int, paths: set[str], bound_s: float) -> None:
    """Return never; raise when a scratch store has not answered for ``bound_s``.

    Raises:
        JobError: guest writes wait for it; end the backup.
    """
    async with StoreProbe(directories(paths)) as probe:
        where = await probe.silent(bound_s)
    raise JobError(
        f"the scratch store {where} has not answered for {bound_s:.0f} s, and guest "
        "writes wait for it; the backup is ended.",
        vm=str(vmid),
        phase="scratch",
        remedy="see what is wrong with it, or set scratch_dir or fleecing_storage to "
        "another place.",
    )


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)
