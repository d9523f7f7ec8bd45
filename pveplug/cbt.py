# SPDX-License-Identifier: Apache-2.0
"""Segments: which dirty bitmaps say what changed since a job.

Every backup of a VM opens a *segment*, a recording bitmap on each of its disks, and
disables the older ones. "What changed since job P" is the union of P's own segment and
every later one::

    time      ── F1 ────── I2 ────── I3 (failed) ────── I4 ──►
    segments     [── S1 ──][── S2 ──][─────── S3 ──────][── S4, recording …
    I4 builds on I2 (Bacula's PrevJobName):   union = S2 ∪ S3

So a job that failed, was killed or was disowned by the Director needs no repair: its
segment is simply one more in the next union. Nothing here talks to QEMU; this module
decides on names and sizes, ``snapshot.py`` carries the decisions out.

A segment is named ``ph-<chain>-<seq>-<F|I|D>-<job>@<size>@<began>``. The order of
segments comes from ``seq`` and nothing else (QEMU lists bitmaps in no stable order, and
job names carry local time). ``job`` is the job's unique Bacula name, which is what
PrevJobName gives. ``size`` is the disk's size in bytes when the segment began: a
bitmap grows with its disk and its new tail starts clean, so what lies beyond the size
at job P must be read whatever the bitmaps say. It is in the name because the name
travels with the bitmap in a live migration, and no state file does. ``began`` is when
the segment began by the node's clock, in seconds since the epoch; only a VirtualFull's
name makes anybody look at it.

History is only ever cut off at its old end, never in the middle: a union with a hole
would call changed blocks clean. Where tracking was interrupted there *is* a hole, so
everything up to it goes, in the transaction that opens the new segment. Otherwise a
later job that names an older P would join the two ends and miss what lies between.

A *persistent* segment lives in a qcow2 image and goes wherever the image goes: under
another key, to another VM, into a copy. So its name ends with a *home*, ``@h<hash>``
of the VM, its generation and the disk's key: what is in another home, or in none, is a
stranger, which counts for nothing and is removed. Volatile segments have no home; so
one rule also keeps apart what either mode has left, docs/cbt.md, "Persistent segments".
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pveplug.units import CLUSTER

PREFIX: Final = "ph-"
FOLD_ABOVE: Final = 24
"""Fold when a disk has more segments than this; 16 to 32 measured best."""
KEEP_AT_MOST: Final = 96
"""Merges of more block QEMU's main loop too long (0.1 s per 100 on 1 TiB)."""
PUNCTUAL_S: Final = 600
"""Less than any two time zones differ by."""
SOON_S: Final = 30
"""A job that didn't wait begins its VM within this; the next job of its resource, which
runs after it, doesn't."""
_NAME: Final = re.compile(
    r"ph-(c[0-9a-f]{8})-([0-9]{5,})-([FID])-(.+)@([0-9]+)@([0-9]+)(?:@(h[0-9a-f]{8}))?",
    re.DOTALL,
)
_STAMP: Final = re.compile(r"\.(\d{4})-(\d\d)-(\d\d)_(\d\d)\.(\d\d)\.(\d\d)_\d+$")


def job_resource(unique_name: str) -> str:
    """Return the Job resource's name in a unique job name (``NAME.DATE_TIME_NN``)."""
    return _STAMP.sub("", unique_name)


def chain_id(unique_name: str, purpose: str = "bacula") -> str:
    """Return the id of the chain that a job's Job resource keeps for a VM.

    Different Job resources, and replication, have different chains; none disturbs
    another.
    """
    text = f"{purpose}\0{job_resource(unique_name)}"
    return "c" + hashlib.blake2s(text.encode(), digest_size=4).hexdigest()


def home_id(vmid: int, uuid: str, generation: str, key: str) -> str:
    """Return the home of a disk's persistent segments.

    It is what a job's images are filed under, the VM and the disk's key, and the VM's
    *generation*: PVE gives a VM a new ``vmgenid`` whenever it puts older content under
    it, by a rollback, a restore or a clone.
    """
    text = f"{vmid}\0{uuid}\0{generation}\0{key}"
    return "h" + hashlib.blake2s(text.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """A segment's name, taken apart; sorts by its place in the chain."""

    seq: int
    chain: str
    level: str
    job: str
    size: int
    """Of the disk when it began, in bytes."""
    began: int = 0
    """Seconds since the epoch; 0: not known."""
    home: str = ""
    """Of a persistent segment; empty: it is volatile."""

    @property
    def name(self) -> str:
        """The bitmap's name."""
        return (
            f"{PREFIX}{self.chain}-{self.seq:05d}-{self.level}-{self.job}"
            f"@{self.size}@{self.began}" + (f"@{self.home}" if self.home else "")
        )


def parse_segment(name: str) -> Segment | None:
    """Take a bitmap's name apart; None where it isn't a segment of ours."""
    if not (found := _NAME.fullmatch(name)):
        return None
    chain, seq, level, job, size, began, home = found.groups()
    return Segment(int(seq), chain, level, job, int(size), int(began), home or "")


def union_name(chain: str) -> str:
    """Return the name of the union bitmap, which lives on our scratch node only."""
    return f"{PREFIX}{chain}-union"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """What QEMU says of one named bitmap."""

    name: str
    recording: bool
    busy: bool = False
    inconsistent: bool = False
    granularity: int = CLUSTER
    count: int = 0
    """Dirty bytes."""
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class Tracked:
    """One disk as it is now: its size in bytes and the bitmaps on its tracking node."""

    size: int
    bitmaps: tuple[Bitmap, ...]
    home: str = ""
    """Where its segments belong; empty: they are volatile."""
    elsewhere: tuple[Bitmap, ...] = ()
    """Bitmaps on its other node, where segments are in the other mode."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge ``sources`` into ``target``, then remove what ``remove`` names."""

    target: str | None
    sources: tuple[str, ...]
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a job does with one disk's segments."""

    new: Segment
    disable: tuple[str, ...]
    """Older recording segments of the chain, to be disabled after the switch."""
    drop: tuple[str, ...]
    """Segments before a hole in the history, to be removed as ``new`` is added. With
    them go strangers, and bitmaps of ours that a killed QEMU left inconsistent."""
    union: tuple[str, ...]
    """Bitmaps to merge; empty exactly when ``whole`` gives a reason."""
    whole: str | None
    """Why the disk is read whole; None when the union says what changed."""
    parent_job: str | None
    """Unique name of the job whose image is the backing file; None: no backing."""
    parent_size: int
    """Size at the parent job; what lies beyond is read in any case."""
    folds: tuple[Fold, ...] = ()
    opens: bool = True
    """Whether ``new`` is added. Not where a hole can't be cut off: while it is the
    newest thing there is, every job sees it."""
    drop_elsewhere: tuple[str, ...] = ()
    """The same on the disk's other node."""


@dataclass(frozen=True, slots=True)
class Level:
    """What Bacula asked for: ``F``, ``I`` or ``D``, since when and since which job."""

    letter: str
    parent_job: str | None = None
    since: int | None = None
    """Seconds since the epoch; only used to recognise a VirtualFull's newest member."""


def plan(
    job: str,
    level: Level,
    disks: Mapping[str, Tracked],
    *,
    purpose: str = "bacula",
    now: float | None = None,
) -> dict[str, DiskPlan]:
    """Decide, for every disk of a VM, what the job reads and does to the segments.

    Args:
        job: the running job's unique name.
        level: what Bacula announced; never a disk's escalation.
        disks: disk key (``scsi0``) -> the disk as it is now.
        purpose: keeps chains of different uses apart.
        now: seconds since the epoch; None: a VirtualFull's name is never understood.
    """
    chain = chain_id(job, purpose)
    segments = {key: _segments(disk, chain) for key, disk in disks.items()}
    everything = [segment for found in segments.values() for segment in found]
    seq = 1 + max((segment.seq for segment in everything), default=0)
    parent = _parent_job(job, level, everything, now)
    # One job has one number on all disks of the VM; where P left a disk out, or its
    # segment is gone there, the other disks still tell where in the row P stands.
    parent_seq = max((s.seq for s in everything if s.job == parent), default=None)
    return {
        key: _plan_disk(
            Segment(seq, chain, level.letter, job, disk.size, int(now or 0), disk.home),
            level,
            parent,
            parent_seq,
            disk,
            segments[key],
        )
        for key, disk in disks.items()
    }


def _segments(disk: Tracked, chain: str) -> list[Segment]:
    found = _parsed(disk.bitmaps)
    return sorted(s for s in found if s.chain == chain and s.home == disk.home)


def _parsed(bitmaps: Sequence[Bitmap]) -> list[Segment]:
    found = (parse_segment(bitmap.name) for bitmap in bitmaps)
    return [segment for segment in found if segment is not None]


def leftovers(
    chain: str, disk: Tracked, *, tracking: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the bitmaps of ours that serve nobody any more: (on its node, elsewhere).

    That is the chain's where it doesn't belong, and what a killed QEMU has left
    inconsistent, whosever chain it is: it tells nothing, and keeps the disk from being
    resized and the VM from being migrated.

    Args:
        tracking: whether the chain goes on; without, nothing in the image is of use.
    """

    def useless(bitmap: Bitmap, home: str | None) -> bool:
        segment = parse_segment(bitmap.name)
        if segment is None or bitmap.busy:
            return False
        if bitmap.inconsistent:
            return True
        if not tracking:
            return segment.chain == chain and bitmap.persistent
        return segment.chain == chain and segment.home != home

    return (
        tuple(b.name for b in disk.bitmaps if useless(b, disk.home)),
        tuple(b.name for b in disk.elsewhere if useless(b, None)),
    )


def _plan_disk(
    new: Segment,
    level: Level,
    parent: str | None,
    parent_seq: int | None,
    disk: Tracked,
    segments: Sequence[Segment],
) -> DiskPlan:
    states = {bitmap.name: bitmap for bitmap in disk.bitmaps}
    reason: str | None
    union: list[Segment]
    if level.letter == "F":
        reason, union = "level Full", []
    else:
        reason, union = _union(level, new.chain, parent, disk, segments, states)
    start = union[0] if union and reason is None else None
    hole = _hole(disk, segments, states)
    drop, kept = segments[:hole], segments[hole:]
    opens = not any(states[s.name].busy for s in drop)
    folds: tuple[Fold, ...] = ()
    if opens and not any(states[s.name].busy for s in kept):
        folds = _folds(level, start, parent_seq, kept)
    dropped = [s.name for s in drop if opens]
    useless, elsewhere = leftovers(new.chain, disk)
    # What must stay because a hole can't be cut off is not to be thinned out, either.
    known = {segment.name for segment in segments}
    dropped += [name for name in useless if name not in known]
    return DiskPlan(
        new=new,
        disable=tuple(s.name for s in kept if opens and states[s.name].recording),
        drop=tuple(dropped),
        union=tuple(s.name for s in union) if start else (),
        whole=reason,
        parent_job=start.job if start else None,
        parent_size=start.size if start else 0,
        folds=folds,
        opens=opens,
        drop_elsewhere=elsewhere,
    )


def _hole(
    disk: Tracked, segments: Sequence[Segment], states: Mapping[str, Bitmap]
) -> int:
    """Return how many segments, from the oldest, lie before a hole in the history.

    A job of any level looks for it, also one that doesn't need the history: it is the
    last to see that the newest segment had stopped recording.
    """
    if segments and not states[segments[-1].name].recording:
        return len(segments)
    bad = (
        place
        for place, segment in enumerate(segments, 1)
        # A bitmap shrinks with its disk and grows again with a clean tail.
        if states[segment.name].inconsistent
        or segment.size > disk.size
        or states[segment.name].persistent != bool(disk.home)
    )
    return max(bad, default=0)


def _folds(
    level: Level,
    parent: Segment | None,
    parent_seq: int | None,
    segments: Sequence[Segment],
) -> tuple[Fold, ...]:
    """Return what shortens the history, to be done after the switch.

    All of ``segments`` are disabled by then. The newest, which records while this is
    planned, is often the one that matters: that of a job that failed just before.

    Args:
        level: what Bacula asked for.
        parent: P's own segment, where this disk's union starts with it.
        parent_seq: P's place in the row, known from any disk of the VM.
        segments: this disk's, after the last hole, oldest first.
    """
    dead, alive = _dead_fulls(segments, parent_seq)
    if parent is not None and level.letter == "I" and len(alive) > FOLD_ABOVE:
        return dead + _folded(alive, parent)
    return dead + _bounded(alive, parent)


def _union(
    level: Level,
    chain: str,
    parent: str | None,
    disk: Tracked,
    segments: Sequence[Segment],
    states: Mapping[str, Bitmap],
) -> tuple[str | None, list[Segment]]:
    """Return (why the disk must be read whole, []) or (None, the segments since P)."""
    if not level.parent_job:
        return "Bacula names no previous job", []
    own = next((s for s in segments if s.job == parent), None)
    if own is None and (why := _stranger(chain, parent, disk)):
        return why, []
    if not segments:
        return (
            f"no change tracking since job {level.parent_job} on this disk "
            "(VM or disk was stopped, replaced, moved or first seen since)",
            [],
        )
    if own is None and any(states[s.name].inconsistent for s in segments):
        return f"the segment of job {parent} is lost (QEMU was killed)", []
    if own is None:
        return (
            f"the segment of job {level.parent_job} is gone "
            f"(oldest kept: {segments[0].job})",
            [],
        )
    union = [s for s in segments if s.seq >= own.seq]
    for segment in union:
        state = states[segment.name]
        if state.inconsistent:
            return f"bitmap {segment.name} is inconsistent (QEMU was killed)", []
        if state.busy:
            return f"bitmap {segment.name} is in use by another operation", []
        if state.granularity != CLUSTER:
            return f"bitmap {segment.name} has granularity {state.granularity}", []
        if state.persistent != bool(disk.home):
            return f"bitmap {segment.name} isn't as persistent as its name says", []
    if not states[union[-1].name].recording:
        return (
            f"tracking was interrupted: bitmap {union[-1].name} is not recording "
            "(an external snapshot or another tool disabled it)",
            [],
        )
    if (largest := max(s.size for s in union)) > disk.size:
        return f"the disk shrank from {largest} to {disk.size} bytes", []
    return None, union


def _stranger(chain: str, parent: str | None, disk: Tracked) -> str | None:
    """Return why a segment of P that is here doesn't count; None: there is none."""
    for segment in _parsed((*disk.bitmaps, *disk.elsewhere)):
        if segment.chain != chain or segment.job != parent:
            continue
        if segment.home and disk.home and segment.home != disk.home:
            return (
                f"the image's segment of job {parent} is another disk's or VM's, or "
                "older than a rollback or restore, which gave the VM a new vmgenid"
            )
        if bool(segment.home) != bool(disk.home):
            was = "persistent" if segment.home else "volatile"
            return f"the segment of job {parent} is {was} (cbt was changed since)"
    return None


def _parent_job(
    job: str, level: Level, segments: Sequence[Segment], now: float | None
) -> str | None:
    """Return the job whose segment stands for Bacula's PrevJobName.

    Usually that name itself. After a VirtualFull whose sources were pruned,
    PrevJobName may be the VirtualFull's own name, which was never a backup of ours;
    then ``since`` is the start of its newest member. All of this must name that member,
    since each alone has named a job that failed:

    - the name we were given carries a later time than ``since``, so it is not the
      member's own, whose segment is gone.
    - the member's segment is the only one that began just after ``since``.
    - its name carries the time ``since``: it didn't wait, as a second job might have
      that was due when the member, which had waited, began. Names are in the Director's
      local time; read in another zone they are hours off and, with an hourly schedule,
      fit the wrong job. So the running job's own name must agree with our clock, too:
      one that waited long, or a Director in another zone, gets a whole read.
    """
    given = level.parent_job
    if not given or any(segment.job == given for segment in segments):
        return given
    since, named, virtual = level.since, _started(job), _started(given)
    if since is None or now is None or named is None or virtual is None:
        return given
    if not -60 <= now - named < PUNCTUAL_S or virtual <= since + 2:
        return given
    near = {s.job for s in segments if -2 <= s.began - since < SOON_S}
    if len(near) != 1:
        return given
    (member,) = near
    stamp = _started(member)
    return member if stamp is not None and 0 <= since - stamp <= 2 else given


def _started(job: str) -> float | None:
    """Return the local time in a unique job name as seconds since the epoch.

    None where there is none, or where the clock was set back and showed it twice.
    """
    if not (found := _STAMP.search(job)):
        return None
    try:
        stamp = datetime.datetime(*map(int, found.groups()))  # type: ignore[arg-type]  # noqa: DTZ001 - the Director writes local time
        seconds = stamp.timestamp()
        twice = stamp.replace(fold=1).timestamp() != seconds
    except (ValueError, OverflowError):
        return None
    return None if twice else seconds


def _dead_fulls(
    segments: Sequence[Segment], parent_seq: int | None
) -> tuple[tuple[Fold, ...], list[Segment]]:
    """Fold Fulls after P into their predecessors: the Director does not count them.

    A job that names P proves that a later Full failed or was disowned; left alone its
    segment would later be taken for the start of the chain. That holds for disks too
    of which P has no segment. The oldest stays what it is: nothing is cut off by it.
    """
    dead: dict[str, list[str]] = {}
    alive: list[Segment] = []
    for segment in segments:
        after = parent_seq is not None and segment.seq > parent_seq
        if segment.level == "F" and after and alive:
            dead.setdefault(alive[-1].name, []).append(segment.name)
        else:
            alive.append(segment)
    folds = tuple(Fold(into, tuple(s), tuple(s)) for into, s in dead.items())
    return folds, alive


def _folded(segments: Sequence[Segment], parent: Segment) -> tuple[Fold, ...]:
    """Fold the history of an Incremental that names P; P is thereby accepted.

    The Full that P stands on keeps its own segment (a Differential may name it), and
    takes in what lies between it and P; P takes in what failed since.
    """
    fulls = [s for s in segments if s.level == "F" and s.seq <= parent.seq]
    full = fulls[-1] if fulls else None
    folds: list[Fold] = []
    if full is None:
        older = tuple(s.name for s in segments if s.seq < parent.seq)
    else:
        older = tuple(s.name for s in segments if s.seq < full.seq)
        between = tuple(s.name for s in segments if full.seq < s.seq < parent.seq)
        if between:
            folds.append(Fold(full.name, between, between))
    if older:
        folds.append(Fold(None, (), older))
    if failed := tuple(s.name for s in segments if s.seq > parent.seq):
        folds.append(Fold(parent.name, failed, failed))
    return tuple(folds)


def _bounded(segments: Sequence[Segment], parent: Segment | None) -> tuple[Fold, ...]:
    """Bound the number of segments where the usual folding doesn't come.

    That is: Fulls only, or a Full with many Differentials. The oldest go; those that
    came after a P that is needed go into P. Either costs a whole read to a job that
    would name them, which happens only if all newer jobs are disowned.
    """
    extra = len(segments) + 1 - KEEP_AT_MOST  # the new one counts
    if extra <= 0:
        return ()
    place = len(segments) if parent is None else segments.index(parent)
    folds: list[Fold] = []
    if older := tuple(s.name for s in segments[: min(extra, place)]):
        folds.append(Fold(None, (), older))
    if parent is not None and extra > place:
        names = tuple(s.name for s in segments[place + 1 :][: extra - place])
        folds.append(Fold(parent.name, names, names))
    return tuple(folds)
