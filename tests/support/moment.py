# SPDX-License-Identifier: Apache-2.0
"""Being there when a backup takes its point in time.

The plug-in runs ``pre_freeze_cmd`` just before the freeze and ``post_thaw_cmd`` just
after the thaw. Here both are a program that asks this process and waits, so that a test
can make a guest stand still, have it say what is on its disks, and let it go on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

Attend = Callable[[], Awaitable[str]]

# $1 is "before" or "after". What the answer says goes to the job log; an answer that
# begins with FAILED fails the hook.
HOOK = """\
#!/bin/sh
cd '{folder}' && rm -f "$1.answer" && : >"$1.ask" || exit 1
tries=0
while [ ! -e "$1.answer" ]; do
    tries=$((tries + 1))
    [ $tries -gt 2400 ] && echo "nobody answered" && exit 1
    sleep 0.05
done
cat "$1.answer"
! grep -q '^FAILED' "$1.answer"
"""


class Moment:
    """The two hooks of a plug-in string, and who answers them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._program = folder / "hook"
        self._program.write_text(HOOK.format(folder=folder))
        self._program.chmod(0o755)

    @property
    def options(self) -> str:
        """For the plug-in string."""
        return (
            f"pre_freeze_cmd='{self._program} before' "
            f"post_thaw_cmd='{self._program} after' hook_timeout=120"
        )

    @contextlib.asynccontextmanager
    async def attended(self, before: Attend, after: Attend) -> AsyncIterator[None]:
        """Answer the hooks of the jobs that run within the block.

        Raises:
            Exception: what ``before`` or ``after`` raised; the hook fails as well.
        """
        task = asyncio.create_task(self._attend({"before": before, "after": after}))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _attend(self, answers: dict[str, Attend]) -> None:
        while True:
            for name, answer in answers.items():
                ask = self._folder / f"{name}.ask"
                if not ask.exists():
                    continue
                ask.unlink()
                try:
                    said = await answer()
                except Exception as error:
                    self._say(name, f"FAILED {error}")
                    raise
                self._say(name, said)
            await asyncio.sleep(0.05)

    def _say(self, name: str, text: str) -> None:
        fresh = self._folder / f"{name}.new"
        fresh.write_text(text + "\n")
        fresh.rename(self._folder / f"{name}.answer")
