# SPDX-License-Identifier: Apache-2.0
"""What a job's images must hold, said by qemu-img and by the guest's own log.

*Still*: the guest stands still for the switch (``pre_freeze_cmd``) and qemu-img copies
its disks; the images must equal that copy. *Moving*: the guest writes on; the images
must equal a copy from before the job plus the first *k* requests since, with one *k*
for all disks: no block too old, too new, or torn between disks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.torture_writer import KIB, SECTOR, Write, Writer
from tests.lab.vm import LabVm
from tests.support import truth

BLOCK = 64 * KIB

# $1 is "before" or "after"; the question holds the job's name, and the answer is its
# file's end. A job that was killed leaves a hook behind: it ends with the folder.
HOOK = """\
#!/bin/sh
cd '{folder}' || exit 1
answer="$1.$PVEPLUG_JOB"
printf '%s' "$PVEPLUG_JOB" >"$1.new" && mv "$1.new" "$1.ask"
tries=0
while [ ! -e "$answer" ]; do
    tries=$((tries + 1))
    [ $tries -gt 1200 ] || [ ! -e hook ] && echo "nobody answered" && exit 1
    sleep 0.05
done
rm -f "$answer"
"""


@dataclass
class Truth:
    """What was known of the disks when a job took its point in time."""

    base: dict[str, Path]
    """Copies from before the job, or, when ``exact``, from its very instant."""
    log: Sequence[Write] = ()
    exact: bool = False
    grown: bool = False
    """A disk grew while the job ran: it may have either size."""

    def forget(self) -> None:
        for path in self.base.values():
            path.unlink(missing_ok=True)


class Hooks:
    """The two hooks of the plug-in string, and who answers them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._program = folder / "hook"
        self._program.write_text(HOOK.format(folder=folder))
        self._program.chmod(0o755)

    @property
    def options(self) -> str:
        return (
            f"pre_freeze_cmd='{self._program} before' "
            f"post_thaw_cmd='{self._program} after' hook_timeout=60"
        )

    @contextlib.asynccontextmanager
    async def attended(
        self, before: Callable[[str], Awaitable[None]], after: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Answer the hooks of the jobs within the block; ``after`` always comes."""
        for name in ("before", "after"):
            (self._folder / f"{name}.ask").unlink(missing_ok=True)

        async def attend() -> None:
            while True:
                for name in ("before", "after"):
                    ask = self._folder / f"{name}.ask"
                    if not ask.exists():
                        continue
                    job = ask.read_text()
                    ask.unlink()
                    if name == "before":
                        await before(job)
                    else:
                        after()
                    (self._folder / f"{name}.{job}").touch()
                await asyncio.sleep(0.03)

        task = asyncio.create_task(attend(), name="hooks")
        try:
            yield
        finally:
            task.cancel()
            ended = await asyncio.gather(task, return_exceptions=True)
            after()
        if isinstance(ended[0], Exception):
            raise ended[0]

    def close(self) -> None:
        self._program.unlink()


@dataclass
class Copies:
    """Copies of a VM's disks as its image files have them."""

    folder: Path
    vm: LabVm
    writer: Writer
    keys: tuple[str, ...]
    _number: int = field(default=0, init=False)

    async def take(self) -> dict[str, Path]:
        """Copy all disks; the caller holds the writer still."""
        self._number += 1
        found = {}
        for key in self.keys:
            path = self.vm.disk_path(key)
            flat = self.folder / f"{self._number}-{key}.raw"
            # Without locks (-U): QEMU has the file open.
            await asyncio.to_thread(
                truth.run, "qemu-img", "convert", "-U", "-f", image_format(path),
                "-O", "raw", str(path), str(flat),
            )  # fmt: skip
            found[key] = flat
            self.writer.sizes[key] = flat.stat().st_size
        return found


def image_format(path: Path) -> str:
    return "qcow2" if path.suffix == ".qcow2" else "raw"


def lost_blocks(truth: Truth, images: Mapping[str, bytes]) -> list[str]:
    """Return the 64 KiB blocks that are wrong, as ``scsi0@65536``; of the best cut."""
    disks = {}
    for key, image in images.items():
        disk = bytearray(truth.base[key].read_bytes())
        if len(disk) != len(image) and not truth.grown:
            return [f"{key} has {len(image)} bytes instead of {len(disk)}"]
        disk.extend(bytes(max(0, len(image) - len(disk))))
        disks[key] = disk
    judge = _Judge(disks, images)
    best = judge.blocks()
    for write in () if truth.exact else truth.log:
        if not best:
            break
        judge.apply(write)
        if len(now := judge.blocks()) < len(best):
            best = now
    return sorted(best)


class _Judge:
    """Images beside the disks' state, and the sectors where the two differ."""

    def __init__(
        self, state: Mapping[str, bytearray], images: Mapping[str, bytes]
    ) -> None:
        self._state, self._images = state, images
        self._wrong: set[tuple[str, int]] = set()
        for key, image in images.items():
            for start in range(0, len(image), BLOCK):
                self._compare(key, start, min(BLOCK, len(image) - start))

    def blocks(self) -> set[str]:
        return {f"{k}@{at * SECTOR // BLOCK * BLOCK}" for k, at in self._wrong}

    def apply(self, write: Write) -> None:
        state, image = self._state[write.key], self._images[write.key]
        length = max(0, min(write.length, len(image) - write.offset))
        if write.pattern is not None:
            end = write.offset + length
            state[write.offset : end] = bytes([write.pattern]) * length
        else:
            # QEMU may carry a discard out, in part, or not: old or zero, per sector.
            zero = bytes(SECTOR)
            for at in range(write.offset, write.offset + length, SECTOR):
                if image[at : at + SECTOR] == zero:
                    state[at : at + SECTOR] = zero
        self._compare(write.key, write.offset, length)

    def _compare(self, key: str, start: int, length: int) -> None:
        state, image = self._state[key], self._images[key]
        sectors = range(start // SECTOR, (start + length) // SECTOR)
        self._wrong.difference_update((key, at) for at in sectors)
        if state[start : start + length] == image[start : start + length]:
            return
        for at in sectors:
            place = slice(at * SECTOR, (at + 1) * SECTOR)
            if state[place] != image[place]:
                self._wrong.add((key, at))
