# SPDX-License-Identifier: Apache-2.0
"""Backends with a planted fault, to see that the torture finds it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

FAULTS: Final = {
    # The segment that recorded until now is forgotten.
    "union": """
import pveplug.cbt as cbt
right = cbt._union
def union(*arguments):
    reason, found = right(*arguments)
    return reason, found[:-1] if len(found) > 1 else found
cbt._union = union
""",
    # The disks' points in time are half a second apart.
    "instant": """
import asyncio
import pveplug.qmp as qmp
right = qmp.Qmp.execute
async def execute(self, command, arguments=None, *more, **others):
    if command != "blockdev-reopen":
        return await right(self, command, arguments, *more, **others)
    for one in arguments["options"]:
        await right(self, command, {"options": [one]}, *more, **others)
        await asyncio.sleep(0.5)
qmp.Qmp.execute = execute
""",
    # Everything is read whole, always.
    "escalate": """
import pveplug.cbt as cbt
cbt._union = lambda *arguments: ("planted", [])
""",
    # One changed cluster of a disk that is compared is called unchanged.
    "digest": """
import pveplug.images.leaves as leaves
right = leaves.Window.same
missed = set()
def same(self, cluster, digest):
    if right(self, cluster, digest):
        return True
    missed.add(cluster)
    return len(missed) == 1
leaves.Window.same = same
""",
}


def install(path: Path, fault: str) -> Path:
    """Write an executable backend with that fault."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"{FAULTS[fault]}\nfrom pveplug.backend import main\nsys.exit(main())\n"
    )
    os.chmod(path, 0o755)
    return path
