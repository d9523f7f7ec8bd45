# SPDX-License-Identifier: Apache-2.0
"""``pveplug dr``: what a replication job does, from the command line; docs/dr.md."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pveplug.columns import age, aligned
from pveplug.config import BackupConfig
from pveplug.config_parse import parse_backup
from pveplug.errors import ConfigError
from pveplug.node import Node, load_node
from pveplug.parameters import DR_MODES
from pveplug.pluginstring import PLUGIN_NAME

EX_OK: Final = 0
EX_LATE: Final = 1
_HEAD: Final = (
    *("SOURCE", "SITE", "REPLICA", "ROLE", "EPOCH", "POINTS", "NEWEST", "LAG"),
    "HEALTH",
)


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "dr",
        help=summary,
        description="Do at once what a Bacula job with this mode would do. Runs as "
        "root on the source's node (modes that only need the receiver: anywhere).",
        epilog="Exit status: 0 done; 1 with status: a replica is later than dr_rpo; "
        "69 it failed; 78 the parameters are wrong.",
    )
    parser.add_argument("mode", choices=DR_MODES, metavar="MODE", help=_modes())
    parser.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="as in the plug-in string: vmid=100 dr_host=… dr_auth_token_file=… …",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the reports as one JSON document"
    )


def _modes() -> str:
    return "one of " + ", ".join(DR_MODES)


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    node = load_node()
    words = " ".join(shlex.quote(word) for word in arguments.words)
    config, warnings = parse_backup(
        f"{PLUGIN_NAME}: mode={arguments.mode} {words}", node=node
    )
    for text in warnings:
        sys.stderr.write(f"warning: {text}\n")
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(node, config, as_json=arguments.json))


async def _run(node: Node, config: BackupConfig, *, as_json: bool) -> int:
    from pveplug.access import open_api
    from pveplug.dr.reports import TerminalReports
    from pveplug.dr.sender import Replicate
    from pveplug.pve_local import PveLocal

    if config.replication is None:
        raise ConfigError("give a mode of disaster recovery", key="mode")
    say = TerminalReports(as_json=as_json, quiet=config.mode == "status")
    now = datetime.datetime.now(datetime.UTC)
    async with contextlib.AsyncExitStack() as stack:
        api = None
        if config.needs_source:
            api = await stack.enter_async_context(await open_api(config.connection))
        engine = Replicate(
            config,
            config.replication,
            node,
            f"pveplug-dr.{now:%Y-%m-%d_%H.%M.%S}_00",
            api,
            PveLocal(node),
            say,
        )
        work = asyncio.ensure_future(engine.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        await work
    if as_json:
        sys.stdout.write(json.dumps(say.values, indent=1) + "\n")
    elif config.mode == "status":
        sys.stdout.write(status_table(say.values) or "the receiver has no replica\n")
    late = config.mode == "status" and any(values.get("late") for values in say.values)
    return EX_LATE if late else EX_OK


def status_table(replicas: Sequence[Mapping[str, Any]]) -> str:
    """Return what ``dr status`` found as a table; an empty text for none."""
    if not replicas:
        return ""
    rows = [_HEAD]
    for found in replicas:
        points = found.get("points", [])
        newest = max((point["instant"] for point in points), default=None)
        lag = None if newest is None else max(int(time.time()) - newest, 0)
        rows.append(
            (
                f"{found['source_vmid']} {found['source_name']}".strip(),
                str(found.get("site") or "-"),
                str(found.get("vmid") or "-"),
                str(found["role"]),
                str(found["epoch"]),
                str(len(points)),
                str(points[-1]["name"]) if points else "-",
                age(lag),
                "late" if found.get("late") else str(found.get("health") or "-"),
            )
        )
    return "\n".join(aligned(rows)) + "\n"
