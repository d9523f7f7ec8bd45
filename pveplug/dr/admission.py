# SPDX-License-Identifier: Apache-2.0
"""Who may have a replica, which restore points may go: pure decisions on its record."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from pveplug.dr.store import Record, ReplicaError
from pveplug.proto.dr_frames import Open, Point

CYCLE_MODES: Final = ("seed", "incremental")
MAX_POINTS: Final = 1000


def admit(record: Record, opening: Open) -> None:
    """Let a sender have the replica, or refuse.

    Raises:
        ReplicaError: ``role`` or ``epoch``, with what to do.
    """
    if opening.mode not in CYCLE_MODES:
        return
    _check_epoch(record, opening)
    where = f"the replica (VM {record.vmid})"
    if record.role == "seeding" and record.intent is not None and record.intent.seed:
        return  # its restore point is all that is missing: apply_pending takes it
    match record.role, opening.mode:
        case "active", _:
            raise ReplicaError(
                "role",
                f"{where} has been failed over to{_failed_over(record)} and may have "
                "changed since",
                remedy="failback brings its changes to the source, failover-undo "
                "discards them, failover-permanent keeps it as a VM of its own.",
            )
        case "permanent", _:
            raise ReplicaError(
                "role",
                f"{where} was made a VM of its own{_failed_over(record)}",
                remedy="to replicate this VM again, give it another SMBIOS UUID, or "
                "have the receiver forget the replica.",
            )
        case "standby", "seed":
            raise ReplicaError(
                "role",
                f"{where} exists already",
                remedy="run mode=incremental; it compares what it has to.",
            )
        case (("none" | "seeding"), "incremental"):
            what = "there is no replica" if record.role == "none" else "it isn't whole"
            raise ReplicaError(
                "role",
                f"nothing to go on with: {what}",
                remedy="run mode=seed; what an earlier seed has sent is kept.",
            )


def _check_epoch(record: Record, opening: Open) -> None:
    if record.role == "none" or record.welcome:
        return
    if opening.takeover and record.role in ("standby", "seeding"):
        return
    if opening.epoch is None:
        if record.epoch == 1:
            return
        known = "doesn't know the epoch"
    elif opening.epoch < record.epoch:
        known = f"is in epoch {opening.epoch}"
    elif opening.epoch > record.epoch:
        raise ReplicaError(
            "epoch",
            f"this receiver has the replica in epoch {record.epoch}, and the sender "
            f"has seen {opening.epoch}: what the receiver knows is older than what it "
            "did",
            remedy="was its state_dir put back from a backup? Compare the VM with its "
            "source before going on, then use dr_takeover=yes.",
        )
    else:
        return
    raise ReplicaError(
        "epoch",
        f"the replica is in epoch {record.epoch}{_failed_over(record)}, and this "
        f"sender ({opening.site}, VM {opening.vmid}) {known}: it may be a source that "
        "was given up in a failover",
        remedy="failback or failover-undo first; if this source is the right one all "
        "the same, dr_takeover=yes.",
    )


def _failed_over(record: Record) -> str:
    found = record.failover or {}
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found["time"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return ""
    who = f" by {found['job']}" if found.get("job") else ""
    return f" ({when}{who})"


def doomed(
    points: Sequence[Point],
    *,
    wanted: int,
    minimum: int,
    lock_days: float,
    now: float,
    held: Collection[str] = (),
) -> list[Point]:
    """Return the restore points that may go, oldest first.

    Args:
        points: all, oldest first.
        wanted: how many the sender wants kept; it can't have fewer than ``minimum``.
        minimum: the receiver's own; the newest is always kept.
        lock_days: younger ones are kept in any case.
        now: seconds since the epoch.
        held: names that something else needs.
    """
    keep = max(min(wanted, MAX_POINTS), minimum, 1)
    locked_from = now - lock_days * 86400
    return [
        point
        for point in points[: max(len(points) - keep, 0)]
        if point.taken < locked_from and point.name not in held
    ]


def point_name(number: int, now: float) -> str:
    """Return the name of a cycle's snapshot."""
    return f"ph-rp{number:04d}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}"
