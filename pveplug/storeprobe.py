# SPDX-License-Identifier: Apache-2.0
"""Whether a scratch store still answers, asked by a process that may hang in our stead.

A write to a dead NFS server, or to a disk that has gone, doesn't return, and whoever
waits for it can't even be killed. So a child writes 4 KiB and syncs them, every second,
and says so; what it is at is known when it falls silent::

    async with StoreProbe(directories) as probe:
        await probe.silent(10)           # returns the directory that said nothing

Two things of QEMU wait for the store too, *with the whole VM*: closing a scratch image,
and ending a fleecing job while it is copying. Both are therefore only done when the
store answers, or when nothing of QEMU hangs in it (``stuck``).

A slow store answers, and yet may have megabytes to take that a filter has given up
waiting for. Taking the filter out waits for all of them, so that is only done when no
single write lasts any more (``settled``).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # a script: make "pveplug" importable without running it
    import types

    _package = types.ModuleType("pveplug")
    _package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["pveplug"] = _package

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from pveplug.errors import TransportError

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType
    from typing import Self

_SCRIPT: Final = os.path.abspath(__file__)
EVERY_S: Final = 1.0
LOOK_S: Final = 0.05
"""A write that is seen at two looks is one of a slow store."""
IDLE_LOOKS: Final = 8
BUSY_LOOKS: Final = 16
"""Looks in a row at which no write lasted: enough to see that the store is fast. QEMU
may be idle for a few of them only because the processor is busy."""
SIZE: Final = 4096


def main(directories: list[str], every_s: float) -> int:
    """Ask until stdin ends; say ``? N`` before and ``= N`` after each directory."""
    import select

    files: dict[str, int] = {}
    try:
        while True:
            for number, directory in enumerate(directories):
                _say(f"? {number}\n")
                try:
                    _ask(directory, files)
                except OSError:
                    pass  # full, or gone: that is an answer, and others see to it
                _say(f"= {number}\n")
            if select.select([0], [], [], every_s)[0]:
                return 0
    except OSError:
        return 0  # nobody listens any more


def _ask(directory: str, files: dict[str, int]) -> None:
    if directory not in files:
        path = os.path.join(directory, f".ph-probe-{os.getpid()}")
        files[directory] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.unlink(path)  # a killed probe leaves nothing behind
    # The same block each time: nothing but it has to reach the disk.
    os.pwrite(files[directory], bytes(SIZE), 0)
    os.fdatasync(files[directory])


def _say(text: str) -> None:
    os.write(1, text.encode())


class StoreProbe:
    """Asks directories all the time; an async context manager.

    Leaving it ends the child, or leaves it alone where it hangs: it then ends when the
    store does answer, or at the next boot.
    """

    def __init__(self, directories: Iterable[str], every_s: float = EVERY_S) -> None:
        self._directories = sorted(directories)
        self._every_s = every_s
        self._process: asyncio.subprocess.Process | None = None
        self._at = 0
        self._heard = 0.0

    async def __aenter__(self) -> Self:
        import asyncio
        import subprocess

        if self._directories:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", _SCRIPT),
                *(repr(self._every_s), *self._directories),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._heard = time.monotonic()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import asyncio

        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.kill()
        except ProcessLookupError:
            pass
        try:
            async with asyncio.timeout(1.0):
                await process.wait()
        except TimeoutError:
            pass  # it hangs in the store, as a guest's write would

    async def silent(self, bound_s: float) -> str:
        """Return, when a store has not answered for ``bound_s`` seconds, which one.

        Raises:
            TransportError: the child has died: nobody asks any more.
        """
        while await self._answer(bound_s):
            pass
        return self._directories[self._at]

    async def all_answer(self, bound_s: float) -> bool:
        """Whether every store answers once within ``bound_s`` seconds from now."""
        wanted = set(range(len(self._directories)))
        until = time.monotonic() + bound_s
        while wanted:
            self._heard = time.monotonic()
            if not await self._answer(until - self._heard):
                return False
            wanted.discard(self._at)
        return True

    async def _answer(self, bound_s: float) -> bool:
        """Wait for the next answer; False: none in ``bound_s`` since the last."""
        import asyncio

        process = self._process
        if process is None or process.stdout is None:  # no directory: nothing to ask
            await asyncio.Event().wait()
            return False
        try:
            async with asyncio.timeout_at(
                asyncio.get_running_loop().time()
                + max(self._heard + bound_s - time.monotonic(), 0.0)
            ):
                while line := await process.stdout.readline():
                    self._at = int(line[2:])
                    if line.startswith(b"="):
                        self._heard = time.monotonic()
                        return True
        except TimeoutError:
            return False
        raise TransportError("what asks whether the scratch store answers has died")


def stuck(pid: int, paths: Iterable[str]) -> bool:
    """Whether a process is inside a call on one of these files, by ``/proc``.

    What can't be told counts as yes. Files are told by their names alone, which are
    ours: the directory may be a link, and asking where it leads could hang.
    """
    return bool(_calls(pid, paths))


async def settled(pid: int, paths: Iterable[str], bound_s: float) -> bool:
    """Wait until no single call on these files lasts; False: some did, to the end.

    As ``stuck``, at many looks: what is quickly done doesn't count, or a guest that
    writes all the time would be waited for.
    """
    import asyncio

    wanted = list(paths)
    until = time.monotonic() + bound_s
    before: set[tuple[str, str]] = set()
    idle = busy = 0
    while wanted and idle < IDLE_LOOKS and idle + busy < BUSY_LOOKS:
        now = _calls(pid, wanted)
        idle = 0 if now else idle + 1
        busy = 0 if before & now else busy + bool(now)
        before = now
        if time.monotonic() > until:
            return False
        await asyncio.sleep(LOOK_S)
    return True


def _calls(pid: int, paths: Iterable[str]) -> set[tuple[str, str]]:
    """Return each thread that is inside a call on one of these files, and the call."""
    wanted = {os.path.basename(path) for path in paths}
    found: set[tuple[str, str]] = set()
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found  # it is gone
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/syscall", encoding="ascii") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            found.add((task, "?"))
            continue
        words = text.split()
        if len(words) < 2 or not words[0].isdigit():
            continue  # it runs
        try:
            path = os.readlink(f"/proc/{pid}/fd/{int(words[1], 16)}")
        except OSError:
            continue  # the first argument is no descriptor
        if os.path.basename(path.removesuffix(" (deleted)")) in wanted:
            found.add((task, text))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], float(sys.argv[1])))
