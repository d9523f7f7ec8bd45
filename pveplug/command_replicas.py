# SPDX-License-Identifier: Apache-2.0
"""``pveplug replicas``: the DR site's replicas, from the records; docs/receiver.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pveplug.columns import aligned
from pveplug.dr.overview import HEALTHY, Overview, overviews
from pveplug.dr.receiver_config import STATE_ROOT
from pveplug.dr.store import ReplicaStore
from pveplug.errors import ConfigError
from pveplug.units import human

EX_OK: Final = 0
EX_UNHEALTHY: Final = 1
_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86400


def add_parser(commands: Any, summary: str) -> None:
    """Add the command to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replicas",
        help=summary,
        description="List the replicas that this node receives, read from the "
        "receiver's records: it need not run, and nothing is contacted.",
        epilog="Exit status: 0 all are well; 1 at least one needs a look, and a line "
        "says why.",
    )
    parser.add_argument(
        "--json", action="store_true", help="all that is known, as JSON"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help=f"state_dir of one receiver [those of all below {STATE_ROOT}]",
    )
    parser.add_argument(
        "--stage-dir", default="", metavar="DIR", help="its limits.stage_dir, if set"
    )
    parser.add_argument(
        "--rpo",
        type=_seconds,
        default=0,
        metavar="SECONDS",
        help="a replica whose instant is older needs a look",
    )


def _seconds(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """List; returns the exit status.

    Raises:
        ConfigError: the directory can't be read.
    """
    where = Path(arguments.state_dir or STATE_ROOT)
    found: list[Overview] = []
    try:
        places = [where] if arguments.state_dir else sorted(where.glob("*/"))
        for place in places:
            found += overviews(
                ReplicaStore(str(place)),
                stage_dir=arguments.stage_dir,
                rpo_s=arguments.rpo,
            )
    except OSError as error:
        raise ConfigError(f"{error.filename or where}: {error.strerror}") from error
    if arguments.json:
        sys.stdout.write(json.dumps([one.plain() for one in found], indent=2) + "\n")
    else:
        sys.stdout.write(table(found) or f"no replica in {where}\n")
    return EX_OK if all(one.health in HEALTHY for one in found) else EX_UNHEALTHY


_HEAD: Final = (
    *("SOURCE", "REPLICA", "ROLE", "EPOCH", "POINTS", "LAST POINT", "LAG", "STAGE"),
    "HEALTH",
)


def table(found: Sequence[Overview]) -> str:
    """Return replicas as lines for people; an empty text for none."""
    if not found:
        return ""
    lines = aligned([_HEAD, *(_row(one) for one in found)])
    lines += [
        f"{_name(one)}: {one.why}" for one in found if one.why and one.health != "ok"
    ]
    return "\n".join(lines) + "\n"


def _row(one: Overview) -> tuple[str, ...]:
    return (
        _name(one),
        str(one.vmid or "-"),
        one.role,
        str(one.epoch),
        str(len(one.points)),
        _when(one.last_instant) if one.last_instant else "-",
        _age(one.lag_s),
        human(one.stage_bytes) if one.stage_bytes else "-",
        one.health,
    )


def _name(one: Overview) -> str:
    if not one.source_vmid:
        return one.uuid
    return f"{one.source_vmid} {one.source_name}".strip()


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _age(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    if seconds < _MINUTE:
        return f"{seconds} s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE} min"
    if seconds < 2 * _DAY:
        return f"{seconds // _HOUR} h {seconds % _HOUR // _MINUTE} min"
    return f"{seconds // _DAY} d"
