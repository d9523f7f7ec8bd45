# SPDX-License-Identifier: Apache-2.0
"""The product's side of each comparison: ``python -m bench.sides NAME …``.

It is the feature path (scan, zero test, frames), not a special one for benchmarks. Only
what a side needs is imported: a process's start is a part of its time.
"""

from __future__ import annotations

import asyncio
import importlib
import sys

SIDES = {
    "read": "side_nbd",
    "scans": "side_nbd",
    "backup": "side_paths",
    "memory": "side_paths",
    "disks": "side_paths",
    "restore": "side_paths",
    "dr-channel": "side_dr",
    "dr-sink": "side_dr",
    "tls-plain": "side_dr",
}


def main() -> None:
    """Be the side that is named."""
    name, *arguments = sys.argv[1:]
    module = importlib.import_module(f"bench.{SIDES[name]}")
    side = getattr(module, name.replace("-", "_"))
    if not asyncio.iscoroutinefunction(side):
        side(*arguments)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(side(*arguments))


if __name__ == "__main__":
    main()
