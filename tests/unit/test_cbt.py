# SPDX-License-Identifier: Apache-2.0
"""Decisions on segments, case by case; test_cbt_model.py has any history."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest

from pveplug import cbt
from pveplug.cbt import Bitmap, DiskPlan, Fold, Level, Segment, Tracked
from pveplug.units import GiB, MiB

SIZE = 64 * MiB
FULL = Level("F")


def unique(number: int, resource: str = "nightly") -> str:
    return f"{resource}.2026-11-{number % 28 + 1:02d}_01.05.00_{number % 60:02d}"


def segment(number: int, level: str = "I", size: int = SIZE) -> Segment:
    return Segment(number, cbt.chain_id(unique(1)), level, unique(number), size)


def disk(levels: str, size: int = SIZE, **newest: object) -> Tracked:
    """Return a disk with a segment per letter; the newest records, newest first."""
    bitmaps = [
        Bitmap(segment(n, level).name, recording=n == len(levels))
        for n, level in enumerate(levels, 1)
    ]
    if newest:
        bitmaps[-1] = dataclasses.replace(bitmaps[-1], **newest)  # type: ignore[arg-type]
    return Tracked(size, tuple(reversed(bitmaps)))


def changed(tracked: Tracked, number: int, **values: object) -> Tracked:
    name = segment(number).name.rsplit("-I-", 1)[0]
    return dataclasses.replace(
        tracked,
        bitmaps=tuple(
            dataclasses.replace(b, **values) if b.name.startswith(name) else b  # type: ignore[arg-type]
            for b in tracked.bitmaps
        ),
    )


def plan(
    tracked: Tracked, letter: str, parent: int | None = None, number: int = 0
) -> DiskPlan:
    level = Level(letter, unique(parent) if parent else None)
    job = unique(number or len(tracked.bitmaps) + 1)
    return cbt.plan(job, level, {"scsi0": tracked})["scsi0"]


def jobs(names: tuple[str, ...]) -> list[int]:
    found = [cbt.parse_segment(name) for name in names]
    return [s.seq for s in found if s is not None]


@pytest.mark.parametrize(
    "job",
    [
        unique(7),
        "a@b.2026-11-22_20.42.31_03",
        "vm 100 - weekly-F-x@5.2026-11-22_20.42.31_03",
        "ünïcode.2026-11-22_20.42.31_113",
    ],
)
@pytest.mark.parametrize("seq", [1, 99_999, 123_456])
def test_a_name_says_all_of_its_segment(job: str, seq: int) -> None:
    one = Segment(seq, cbt.chain_id(job), "D", job, 16 * 1024 * GiB, TEN)
    assert cbt.parse_segment(one.name) == one
    assert len(one.name) < 1023


@pytest.mark.parametrize(
    "name",
    [
        *("", "ph-union", "ph-c12345678-union", "ph-c1-00001-I-j@1", "bitmap0"),
        *("ph-c12345678-1-I-j@1", "ph-c12345678-00001-X-j@1"),
        *("ph-c12345678-00001-I-j", "ph-c12345678-00001-I-j@\u0661"),
        "xph-c12345678-00001-I-j@1",
    ],
)
def test_other_names_are_no_segments(name: str) -> None:
    assert cbt.parse_segment(name) is None


def test_chains_belong_to_job_resource_and_purpose() -> None:
    assert cbt.chain_id(unique(1)) == cbt.chain_id(unique(2))
    assert cbt.chain_id(unique(1)) != cbt.chain_id(unique(1, "weekly"))
    assert cbt.chain_id(unique(1)) != cbt.chain_id(unique(1), "dr")


def test_a_full_opens_a_segment_and_reads_everything() -> None:
    first = plan(Tracked(SIZE, ()), "F", number=1)
    assert first.new == segment(1, "F")
    assert (first.whole, first.union, first.disable) == ("level Full", (), ())
    second = plan(disk("F"), "F")
    assert second.new.seq == 2
    assert jobs(second.disable) == [1]


def test_an_incremental_joins_its_parents_segment_and_all_later() -> None:
    found = plan(disk("FIII"), "I", parent=2)
    assert jobs(found.union) == [2, 3, 4]
    assert found.parent_job == unique(2)
    assert found.whole is None
    assert jobs(found.disable) == [4]
    assert found.folds == ()


def test_order_comes_from_the_number_though_the_clock_went_back() -> None:
    early = "nightly.2026-10-25_02.30.00_05"
    late = "nightly.2026-10-25_02.10.00_06"
    chain = cbt.chain_id(early)
    bitmaps = (
        Bitmap(Segment(1, chain, "F", early, SIZE).name, recording=False),
        Bitmap(Segment(2, chain, "I", late, SIZE).name, recording=True),
    )
    for order in (bitmaps, bitmaps[::-1]):
        level = Level("I", late)
        found = cbt.plan(unique(3), level, {"scsi0": Tracked(SIZE, order)})["scsi0"]
        assert jobs(found.union) == [2]


def test_all_disks_of_a_job_get_one_number() -> None:
    disks = {"scsi0": disk("FII"), "scsi1": Tracked(SIZE, ())}
    found = cbt.plan(unique(4), Level("I", unique(3)), disks)
    assert {p.new.seq for p in found.values()} == {4}
    assert found["scsi0"].whole is None
    assert "no change tracking since job" in str(found["scsi1"].whole)


def test_another_chain_is_neither_read_nor_touched() -> None:
    foreign = Segment(9, cbt.chain_id(unique(1, "weekly")), "F", unique(9), SIZE)
    mine = disk("FI")
    both = Tracked(SIZE, (Bitmap(foreign.name, recording=True), *mine.bitmaps))
    assert plan(both, "I", parent=2, number=3) == plan(mine, "I", parent=2)


def test_beyond_the_size_at_the_parent_nothing_is_believed() -> None:
    found = plan(disk("FI", size=2 * SIZE), "I", parent=2)
    assert found.parent_size == SIZE
    assert found.new.size == 2 * SIZE


@pytest.mark.parametrize(
    ("tracked", "parent", "reason"),
    [
        (Tracked(SIZE, ()), 1, "no change tracking since job"),
        (disk("FI"), 7, "the segment of job .* is gone .*oldest kept: nightly"),
        (disk("FI"), None, "no previous job"),
        (changed(disk("FIII"), 3, inconsistent=True), 2, "inconsistent"),
        (changed(disk("FIII"), 3, busy=True), 2, "in use by another operation"),
        (changed(disk("FIII"), 3, granularity=4096), 2, "granularity 4096"),
        (disk("FII", recording=False), 2, "is not recording"),
        (disk("FII", size=SIZE // 2), 2, "the disk shrank from .* to .* bytes"),
    ],
)
def test_a_history_in_doubt_is_not_used_and_the_reason_said(
    tracked: Tracked, parent: int | None, reason: str
) -> None:
    found = plan(tracked, "I", parent=parent)
    assert found.whole is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.whole)
    assert (found.union, found.parent_job, found.parent_size) == ((), None, 0)


def test_trouble_before_the_parent_is_no_trouble() -> None:
    for value in ({"inconsistent": True}, {"busy": True}, {"granularity": 4096}):
        found = plan(changed(disk("FIII"), 2, **value), "I", parent=3)
        assert found.whole is None, value


@pytest.mark.parametrize(("letter", "parent"), [("F", None), ("I", 3), ("D", 1)])
def test_a_hole_is_cut_off_by_whatever_job_sees_it_first(
    letter: str, parent: int | None
) -> None:
    """Once a new segment records, nobody sees any more that the last one stopped."""
    found = plan(disk("FII", recording=False), letter, parent)
    assert jobs(found.drop) == [1, 2, 3]
    assert found.whole
    assert found.disable == ()
    assert found.opens


def test_an_inconsistent_bitmap_goes_with_all_that_is_older() -> None:
    found = plan(changed(disk("FIIII"), 3, inconsistent=True), "F")
    assert jobs(found.drop) == [1, 2, 3]
    assert jobs(found.disable) == [5]
    assert plan(changed(disk("FIIII"), 3, inconsistent=True), "I", 4).whole is None


def test_a_shrunken_disk_loses_the_history_that_shrank_with_it() -> None:
    found = plan(disk("FI", size=SIZE // 2), "F")
    assert jobs(found.drop) == [1, 2]
    assert found.disable == ()


def test_a_hole_that_cannot_be_cut_off_stays_the_newest_thing_there_is() -> None:
    stopped = changed(disk("FII", recording=False), 2, busy=True)
    found = plan(stopped, "I", parent=3)
    assert not found.opens
    assert (found.drop, found.disable, found.folds) == ((), (), ())
    assert found.whole


def test_two_recording_segments_after_a_kill_are_both_disabled() -> None:
    found = plan(changed(disk("FII"), 2, recording=True), "I", parent=1)
    assert jobs(found.disable) == [2, 3]
    assert jobs(found.union) == [1, 2, 3]


def test_a_full_that_failed_just_before_is_folded_though_it_still_records() -> None:
    found = plan(disk("FIF"), "I", parent=2)
    assert found.folds == (
        Fold(segment(2).name, (segment(3, "F").name,), (segment(3, "F").name,)),
    )
    assert jobs(found.union) == [2, 3]


def test_dead_fulls_of_one_predecessor_go_together() -> None:
    found = plan(disk("FIFFIF"), "I", parent=2)
    assert [(jobs((f.target or "",)), jobs(f.sources)) for f in found.folds] == [
        ([2], [3, 4]),
        ([5], [6]),
    ]


def test_a_dead_full_is_dead_too_on_a_disk_that_the_parent_left_out() -> None:
    """Else the good Full before it would be cut off as older than "the Full"."""
    with_it = disk("FIF")
    without = Tracked(
        SIZE, tuple(b for b in with_it.bitmaps if b.name != segment(2).name)
    )
    level = Level("I", unique(2))
    plans = cbt.plan(unique(4), level, {"scsi0": with_it, "scsi1": without})
    assert "is gone" in (plans["scsi1"].whole or "")
    dead = segment(3, "F").name
    assert plans["scsi0"].folds == (Fold(segment(2).name, (dead,), (dead,)),)
    assert plans["scsi1"].folds == (Fold(segment(1, "F").name, (dead,), (dead,)),)


def test_a_dead_full_with_nothing_before_it_stays() -> None:
    only_dead = Tracked(SIZE, (Bitmap(segment(3, "F").name, recording=True),))
    level = Level("I", unique(2))
    plans = cbt.plan(unique(4), level, {"scsi0": disk("FIF"), "scsi1": only_dead})
    assert plans["scsi1"].folds == ()


def test_an_incremental_folds_a_long_history_and_keeps_the_full_and_the_parent() -> (
    None
):
    levels = "FI" + "F" + "I" * cbt.FOLD_ABOVE
    parent = len(levels) - 1
    found = plan(disk(levels), "I", parent)
    folds = {jobs((f.target,))[0] if f.target else 0: f for f in found.folds}
    assert sorted(folds) == [0, 3, parent]
    assert jobs(folds[0].remove) == [1, 2]
    assert jobs(folds[3].sources) == list(range(4, parent))
    assert jobs(folds[parent].sources) == [parent + 1]
    assert all(not f.sources or f.sources == f.remove for f in found.folds)


def test_fulls_and_differentials_never_fold_a_good_history() -> None:
    levels = "F" + "I" * 60
    assert plan(disk(levels), "D", parent=1).folds == ()
    assert plan(disk(levels), "F").folds == ()


@pytest.mark.parametrize(
    ("levels", "letter", "parent"),
    [
        ("F" * 150, "F", None),
        ("F" + "D" * 149, "D", 1),
        ("FIIF" + "D" * 146, "D", 4),
        ("I" * 150, "I", 77),
        ("F" * 150, "I", 200),
    ],
)
def test_segments_are_bounded_whatever_the_levels(
    levels: str, letter: str, parent: int | None
) -> None:
    found = plan(disk(levels), letter, parent)
    gone = [n for fold in found.folds for n in jobs(fold.remove)]
    assert len(gone) == len(set(gone))
    assert 150 + 1 - len(gone) <= cbt.KEEP_AT_MOST
    if letter == "D":
        assert found.parent_job == unique(parent or 0)
        assert jobs(found.union)[0] == parent


def test_no_fold_is_tried_while_a_segment_is_busy() -> None:
    tracked = changed(disk("F" + "I" * 40), 5, busy=True)
    assert plan(tracked, "I", parent=40).folds == ()
    assert plan(changed(disk("F" * 120), 5, busy=True), "F").folds == ()


# -- a VirtualFull's name

VIRTUAL = "nightly.2026-11-20_12.00.00_09"


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield monkeypatch
    monkeypatch.undo()
    time.tzset()


def virtual(
    *,
    since: int,
    now: float | None,
    stamps: tuple[str, ...],
    job: str,
    began: tuple[int, ...] = (),
) -> str | None:
    """Return what PrevJobName=VIRTUAL is understood as.

    Args:
        stamps: in the names of the jobs whose segments are there.
        began: when they began; by default, when their names say in Berlin.
    """
    chain = cbt.chain_id(job)
    began = began or tuple(TEN + 5 + 3600 * n for n in range(len(stamps)))
    names = [f"nightly.{stamp}_0{n}" for n, stamp in enumerate(stamps, 1)]
    bitmaps = tuple(
        Bitmap(Segment(n, chain, "I", name, SIZE, at).name, recording=n == len(names))
        for n, (name, at) in enumerate(zip(names, began, strict=True), 1)
    )
    level = Level("I", VIRTUAL, since)
    disks = {"scsi0": Tracked(SIZE, bitmaps)}
    return cbt.plan(job, level, disks, now=now)["scsi0"].parent_job


HOURLY = ("2026-11-20_10.00.00", "2026-11-20_11.00.00")
NEXT = "nightly.2026-11-20_13.00.00_11"
TEN = 1_795_165_200  # 2026-11-20 10:00 in Berlin
NOW = TEN + 3 * 3600 + 4


def test_a_virtual_full_stands_for_its_newest_member(
    zone: pytest.MonkeyPatch,
) -> None:
    eleven = TEN + 3600
    arguments = {"now": NOW, "stamps": HOURLY, "job": NEXT}
    assert virtual(since=eleven, **arguments) == "nightly.2026-11-20_11.00.00_02"  # type: ignore[arg-type]
    assert virtual(since=eleven + 2, **arguments) == "nightly.2026-11-20_11.00.00_02"  # type: ignore[arg-type]
    assert virtual(since=eleven + 60, **arguments) is None  # type: ignore[arg-type]
    assert virtual(since=eleven, now=None, stamps=HOURLY, job=NEXT) is None


def test_a_name_in_another_zone_does_not_stand_for_the_job_of_that_time(
    zone: pytest.MonkeyPatch,
) -> None:
    """The Director's zone was changed; what fits is the next job, which died."""
    arguments = {"now": NOW, "stamps": ("2026-11-20_09.00.00", HOURLY[0]), "job": NEXT}
    assert virtual(since=TEN, **arguments) is None  # type: ignore[arg-type]


def test_of_jobs_that_waited_and_began_together_none_is_taken(
    zone: pytest.MonkeyPatch,
) -> None:
    """The first was due at nine and ran at ten, as did the second, which died."""
    arguments = {"now": NOW, "stamps": ("2026-11-20_09.00.00", HOURLY[0]), "job": NEXT}
    began = (TEN + 5, TEN + 25)
    assert virtual(since=TEN, began=began, **arguments) is None  # type: ignore[arg-type]


def test_only_a_name_later_than_since_is_a_virtual_full(
    zone: pytest.MonkeyPatch,
) -> None:
    """Else it is the parent's own, whose segment is gone; another job's won't do."""
    level = Level("I", "nightly.2026-11-20_09.00.00_01", TEN)
    died = Segment(2, cbt.chain_id(NEXT), "F", f"nightly.{HOURLY[0]}_02", SIZE, TEN + 9)
    disks = {"scsi0": Tracked(SIZE, (Bitmap(died.name, recording=True),))}
    assert cbt.plan(NEXT, level, disks, now=NOW)["scsi0"].parent_job is None


def test_names_in_another_time_zone_fit_no_job(zone: pytest.MonkeyPatch) -> None:
    """One zone off and an hourly schedule: the name of the wrong job would fit."""
    zone.setenv("TZ", "Europe/London")
    time.tzset()
    assert virtual(since=TEN, now=NOW, stamps=HOURLY, job=NEXT) is None
    assert virtual(since=TEN + 3600, now=NOW, stamps=HOURLY, job=NEXT) is None


def test_a_time_that_the_clock_showed_twice_fits_no_job(
    zone: pytest.MonkeyPatch,
) -> None:
    half_past_two = 1_792_888_200  # 02:30 in Berlin, the first time
    assert (
        virtual(
            since=half_past_two,
            now=half_past_two + 7200 + 5,
            stamps=("2026-10-25_02.30.00",),
            began=(half_past_two + 5,),
            job="nightly.2026-10-25_03.30.00_12",
        )
        is None
    )


@pytest.mark.parametrize("stamp", ["2026-13-41_99.99.99", "9999-12-31_23.59.59", "x"])
def test_a_name_without_a_time_fits_no_job(stamp: str) -> None:
    assert virtual(since=TEN, now=NOW, stamps=(stamp,), job=NEXT) is None


HOME = cbt.home_id(100, "uuid", "generation", "scsi0")


def at_home(tracked: Tracked, home: str, **newest: object) -> Tracked:
    """Return the disk with persistent segments of a home, in that home."""
    bitmaps = []
    for bitmap in tracked.bitmaps:
        found = cbt.parse_segment(bitmap.name)
        assert found is not None
        name = dataclasses.replace(found, home=home).name
        bitmaps.append(dataclasses.replace(bitmap, name=name, persistent=True))
    bitmaps[0] = dataclasses.replace(bitmaps[0], **newest)  # type: ignore[arg-type]
    return Tracked(tracked.size, tuple(bitmaps), home)


def test_a_persistent_segments_name_tells_its_home_and_is_parsed_back():
    segment_ = dataclasses.replace(segment(7), began=1_700_000_000, home=HOME)
    assert segment_.name.endswith(f"@1700000000@{HOME}")
    assert cbt.parse_segment(segment_.name) == segment_
    tricky = dataclasses.replace(segment_, job="a@1@2@h01234567", home="")
    assert cbt.parse_segment(tricky.name) == tricky
    assert len(tricky.name) < 1023


def test_a_home_is_one_disk_of_one_generation_of_one_vm():
    others = [
        (101, "uuid", "generation", "scsi0"),
        (100, "other", "generation", "scsi0"),
        (100, "uuid", "new", "scsi0"),
        (100, "uuid", "generation", "scsi1"),
    ]
    assert HOME not in {cbt.home_id(*other) for other in others}


def test_persistent_segments_are_followed_in_their_home():
    found = plan(at_home(disk("FII"), HOME), "I", 3)
    assert found.whole is None
    assert jobs(found.union) == [3]
    assert found.new.home == HOME
    assert found.drop == found.drop_elsewhere == ()


@pytest.mark.parametrize(
    ("tracked", "said"),
    [
        (
            dataclasses.replace(at_home(disk("FII"), "h00000000"), home=HOME),
            "is another disk's or VM's, or older than a rollback or restore",
        ),
        (
            dataclasses.replace(disk("FII"), home=HOME),
            "is volatile (cbt was changed since)",
        ),
        (
            Tracked(SIZE, (), HOME, elsewhere=disk("FII").bitmaps),
            "is volatile (cbt was changed since)",
        ),
        (
            dataclasses.replace(at_home(disk("FII"), HOME), home=""),
            "is persistent (cbt was changed since)",
        ),
        (
            Tracked(SIZE, (), elsewhere=at_home(disk("FII"), HOME).bitmaps),
            "is persistent (cbt was changed since)",
        ),
    ],
)
def test_a_stranger_counts_for_nothing_and_is_removed_with_the_reason_said(
    tracked, said
):
    found = plan(tracked, "I", 3, number=4)
    assert said in str(found.whole)
    assert found.union == ()
    gone = {*found.drop, *found.drop_elsewhere}
    assert gone == {b.name for b in (*tracked.bitmaps, *tracked.elsewhere)}
    assert found.disable == ()


def test_what_a_killed_qemu_left_inconsistent_goes_whosever_chain_it_is():
    other = cbt.chain_id(unique(1, "weekly"))
    theirs = [
        Bitmap(
            dataclasses.replace(segment(n), chain=other, home=HOME).name,
            recording=False,
            inconsistent=n == 1,
            persistent=True,
        )
        for n in (1, 2)
    ]
    foreign = Bitmap("pbs-incremental-dirty-bitmap", False, inconsistent=True)
    mine = at_home(disk("FI"), HOME, inconsistent=True, recording=False)
    tracked = dataclasses.replace(mine, bitmaps=(*mine.bitmaps, *theirs, foreign))
    found = plan(tracked, "I", 2, number=3)
    assert "is inconsistent (QEMU was killed)" in str(found.whole)
    assert set(found.drop) == {*(b.name for b in mine.bitmaps), theirs[0].name}
    # A segment that was opened since the last start never was in the image.
    lost = plan(tracked, "I", 3, number=4)
    assert "is lost (QEMU was killed)" in str(lost.whole)


def test_a_segment_that_is_less_persistent_than_its_name_leaves_a_hole():
    found = plan(at_home(disk("FI"), HOME, persistent=False), "I", 2, number=3)
    assert "isn't as persistent as its name says" in str(found.whole)
    assert jobs(found.drop) == [1, 2]


def test_without_tracking_only_what_is_in_the_image_is_removed():
    chain = cbt.chain_id(unique(1))
    persistent = at_home(disk("FI"), HOME)
    both = Tracked(SIZE, disk("FI").bitmaps, elsewhere=persistent.bitmaps)
    here, elsewhere = cbt.leftovers(chain, both, tracking=False)
    assert here == ()
    assert set(elsewhere) == {b.name for b in persistent.bitmaps}
    busy = tuple(dataclasses.replace(b, busy=True) for b in persistent.bitmaps)
    assert cbt.leftovers(chain, Tracked(SIZE, busy), tracking=False) == ((), ())
