# SPDX-License-Identifier: Apache-2.0
"""Reads a VM's serial console and looks for a pattern; holds nothing unbounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pveplug.errors import PveplugError, TransportError
from pveplug.proving.console import ConsoleText

log = logging.getLogger(__name__)

CHUNK: Final = 64 * 1024
RETRY_S: Final = 0.2
IDLE_S: Final = 0.3
"""A line that isn't finished by then is looked at as it is: it is a prompt."""
MATCH_S: Final = 5.0
"""How long a pattern may take for what arrived at once."""


class PatternError(PveplugError):
    """The pattern takes too long, or its matcher died."""


class Matcher:
    """Matches in a process of its own; ``async with Matcher(pattern) as matcher``."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        """Start the process."""
        script = Path(__file__).with_name("matcher.py")
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IS", str(script), self._pattern),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill the process."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def first(self, lines: Sequence[str]) -> int | None:
        """Return the index of the first line that matches, or None.

        Raises:
            PatternError: it took too long; this matcher is finished.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise PatternError("the matcher of prove_serial was not started")
        try:
            async with asyncio.timeout(MATCH_S):
                process.stdin.write(json.dumps(list(lines)).encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except TimeoutError:
            raise PatternError(
                f"prove_serial takes over {MATCH_S:g} s for a few lines of the "
                "console; write it without nested repetitions"
            ) from None
        except OSError as error:
            raise PatternError(f"the matcher of prove_serial died: {error}") from error
        try:
            found = int(answer)
        except ValueError:
            raise PatternError("the matcher of prove_serial died") from None
        return found if found >= 0 else None


async def connect(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a console's socket as soon as it is there; waits without end."""
    while True:
        try:
            return await asyncio.open_unix_connection(path, limit=CHUNK)
        except OSError as error:
            log.debug("serial path=%s connect=%s", path, error)
        await asyncio.sleep(RETRY_S)


async def read_lines(
    reader: asyncio.StreamReader, text: ConsoleText
) -> AsyncGenerator[list[str], None]:
    """Iterate over what the console shows: complete lines, and prompts when it rests.

    Ends when QEMU closes the socket. A guest that floods waits for whoever reads.

    Raises:
        TransportError: the connection broke.
    """
    shown = ""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(
                reader.read(CHUNK), name="serial read"
            )
            done, _ = await asyncio.wait({pending}, timeout=IDLE_S)
            if not done:
                if text.prompt.strip() and text.prompt != shown:
                    shown = text.prompt
                    yield [text.prompt]
                continue
            try:
                data = pending.result()
            except OSError as error:
                raise TransportError(f"the serial console broke: {error}") from error
            pending = None
            if not data:
                if text.prompt.strip():
                    yield [text.prompt]
                return
            if lines := text.receive_data(data):
                yield lines
    finally:
        if pending:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await pending
