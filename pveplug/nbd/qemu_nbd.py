# SPDX-License-Identifier: Apache-2.0
"""Runs qemu-nbd on one image or volume for as long as a context lasts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
from collections.abc import AsyncIterator
from typing import Final

from pveplug.errors import CommandError, ConfigError, TransportError
from pveplug.nbd.client import UnixAddress
from pveplug.node import Node

START_S: Final = 15.0
STOP_S: Final = 60.0
"""After SIGTERM: a qcow2 is closed in order, which writes its metadata."""
ENDING_S: Final = 0.5
AGAIN_S: Final = 0.25
STDERR_BYTES: Final = 4096
SUN_PATH: Final = 107
_SOCKET: Final = re.compile(r"nbd-([1-9][0-9]{0,9})-[0-9a-f]+\.sock")


def socket_prefix(pid: int) -> str:
    """Return how the names of a process's sockets begin."""
    return f"nbd-{pid}-"


def socket_owner(name: str) -> int | None:
    """Return the process whose socket a file of this name is, None for any other."""
    found = _SOCKET.fullmatch(name)
    return int(found[1]) if found else None


@contextlib.asynccontextmanager
async def qemu_nbd(
    node: Node,
    path: str,
    fmt: str,
    *,
    socket_dir: str,
    read_only: bool,
    export: str = "",
    size: int | None = None,
    bitmap: str | None = None,
    snapshot: str | None = None,
    lazy_refcounts: bool = False,
    shared: int = 4,
    start_s: float = START_S,
) -> AsyncIterator[UnixAddress]:
    """Serve ``path`` on a unix socket; the process has ended when this is left.

    Args:
        node: tells where qemu-nbd is.
        path: an image file or a block device; or one of QEMU's own names (``rbd:…``).
        fmt: never guessed, for a raw disk's first bytes are the guest's.
        socket_dir: made with mode 0700 unless it is there.
        read_only: False: writable, with holes punched where zeroes are written.
        export: name of the export, "" for the default.
        size: for raw: serve only so many bytes of a larger volume (multiple of 512).
        bitmap: a qcow2's persistent bitmap to offer.
        lazy_refcounts: of a writable qcow2 with snapshots: keep reference counts in
            memory and write them at the end. Without it every other overwrite of a
            cluster that a snapshot shares waits for the disk (2.5 ms each, 0.2 ms
            with it). A power cut leaves the image marked dirty, and whoever opens it
            for writing next counts anew.
        snapshot: serve this internal snapshot of a qcow2; read only.
        shared: connections at a time.
        start_s: bound of the start, opening the image included.

    The process dies with us: it gets SIGKILL when our thread ends without leaving this.

    Raises:
        CommandError: qemu-nbd failed; at the start, in between, or (writable only)
            at the end, where an error means that the image may be incomplete.
        ConfigError: the path can't be served.
        TransportError: it didn't listen in time.
    """
    os.makedirs(socket_dir, mode=0o700, exist_ok=True)
    socket_path = os.path.join(
        socket_dir, f"{socket_prefix(os.getpid())}{secrets.token_hex(4)}.sock"
    )
    if len(socket_path) > SUN_PATH:
        raise ConfigError(f"socket path {socket_path} is longer than {SUN_PATH} bytes")
    argv = [node.qemu_nbd, "--persistent", f"--shared={shared}"]
    argv += [f"--socket={socket_path}", f"--export-name={export}"]
    argv += _access(path, read_only)
    if bitmap is not None:
        argv.append(f"--bitmap={bitmap}")
    if snapshot is not None:
        argv.append(f"--load-snapshot=snapshot.name={snapshot}")
    argv += _image(path, fmt, size, lazy=lazy_refcounts and fmt == "qcow2")
    process = await _start(argv)
    said = asyncio.create_task(_last_words(process), name="qemu-nbd stderr")
    well = False
    try:
        await _listening(process, argv, socket_path, said, start_s)
        yield UnixAddress(socket_path)
        well = True
    except TransportError as error:
        # A connection is lost a moment before the process is known to have ended.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await process.wait()
        if process.returncode:
            words = await _words(said)
            raise CommandError(argv, process.returncode, words) from error
        raise
    finally:
        try:
            await _stop(process)
        finally:
            words = await _words(said)
            with contextlib.suppress(OSError):
                os.unlink(socket_path)
    if well and not read_only and process.returncode:
        raise CommandError(argv, process.returncode, words)


def _access(path: str, read_only: bool) -> list[str]:
    """Return how the image is opened: measured in facts on writing, see decisions."""
    # Page cache in between would only be copied through on a block device; on files
    # it is what makes small writes and the one flush at the end cheap.
    device = _is_block_device(path)
    cache = ["--cache=none", "--aio=native"] if device else ["--cache=writeback"]
    if read_only:
        return ["--read-only", *cache]
    return [*cache, "--discard=unmap", "--detect-zeroes=unmap"]


def _image(path: str, fmt: str, size: int | None, *, lazy: bool) -> list[str]:
    if not path.startswith("/"):
        if size is not None:
            raise ConfigError(f"a size limit needs a file or a device, not {path}")
        return [f"--format={fmt}", "--", path]
    if size is not None and (fmt != "raw" or size % 512):
        raise ConfigError(f"a size limit of {size} bytes is not for {fmt} images")
    # Spelled out, a path can't be taken for one of QEMU's protocols or for json:.
    driver = "host_device" if _is_block_device(path) else "file"
    spelled = path.replace(",", ",,")
    options = f"driver={fmt},file.driver={driver},file.filename={spelled}"
    if size is not None:
        options += f",size={size}"
    if lazy:
        options += ",lazy-refcounts=on"
    return ["--image-opts", "--", options]


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


async def _start(argv: list[str]) -> asyncio.subprocess.Process:
    # PR_SET_PDEATHSIG: nothing is left over even if we are killed with SIGKILL. KILL,
    # not TERM, which may be lost (see _stop); what was being written is lost anyway.
    # If we are killed before it is in force nobody is told: hence the shell, which asks
    # then whether we still are its parent. "$0" is our pid, "$@" the command.
    setpriv = shutil.which("setpriv")
    ours = ["/bin/sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
    prefix = [setpriv, "--pdeathsig", "KILL", "--", *ours] if setpriv else []
    if not os.access(argv[0], os.X_OK):
        raise ConfigError(f"{argv[0]} is not there; install qemu-utils or set qemu_nbd")
    try:
        return await asyncio.create_subprocess_exec(
            *prefix,
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ConfigError(f"cannot run {argv[0]}: {error.strerror}") from error


async def _listening(
    process: asyncio.subprocess.Process,
    argv: list[str],
    socket_path: str,
    said: asyncio.Task[str],
    start_s: float,
) -> None:
    """Wait until it greets.

    Taking the connection says nothing: qemu-nbd listens before it opens the image.
    """
    wait_s = 0.004
    try:
        async with asyncio.timeout(start_s):
            while not await _greets(socket_path):
                if process.returncode is not None:
                    words = await _words(said)
                    raise CommandError(argv, process.returncode, words)
                await asyncio.sleep(wait_s)  # it has no other way to tell
                wait_s = min(wait_s * 1.5, 0.1)
    except TimeoutError as error:
        text = f"qemu-nbd didn't listen within {start_s:.0f} s for {argv[-1]}"
        raise TransportError(text) from error


async def _greets(socket_path: str) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(socket_path)
    except OSError:
        return False
    try:
        return await reader.read(1) != b""
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _last_words(process: asyncio.subprocess.Process) -> str:
    """Drain its stderr, keeping the end."""
    kept = b""
    if process.stderr is not None:
        while data := await process.stderr.read(STDERR_BYTES):
            kept = (kept + data)[-STDERR_BYTES:]
    return kept.decode("utf-8", "replace").strip()


async def _words(said: asyncio.Task[str]) -> str:
    """Return its stderr; bounded, for a child of its own could hold the pipe open."""
    try:
        async with asyncio.timeout(2):
            return await said
    except TimeoutError:
        return ""


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End it by its pid: SIGTERM, then SIGKILL; also when cancelled meanwhile."""
    if process.returncode is not None:
        return
    try:
        async with asyncio.timeout(STOP_S):
            while process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                # Once isn't enough: qemu-nbd forgets a SIGTERM that arrives between
                # installing its handler and entering its loop (seen with 10.0.2).
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
