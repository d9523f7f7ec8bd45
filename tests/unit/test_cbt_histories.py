# SPDX-License-Identifier: Apache-2.0
"""The histories that proved earlier rules for segments wrong, each by its name.

One disk of eight blocks; each job is preceded by a write to a block of its own, so a
union can be compared with what was written, block by block. ``D5(P=F1)`` is the fifth
job, a Differential that names F1.
``tests/property/test_cbt_model.py`` has any history.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from pveplug import cbt
from pveplug.cbt import Bitmap, DiskPlan, Level, Tracked
from pveplug.units import MiB

SIZE = 64 * MiB


@dataclass
class History:
    """What jobs do to one disk's bitmaps; ``names`` may put any time into a name."""

    bitmaps: dict[str, tuple[bool, set[int]]] = field(default_factory=dict)
    """name -> recording, the blocks written since"""
    jobs: dict[str, str] = field(default_factory=dict)
    """``F1`` -> the job's unique name"""

    def write(self, block: int) -> None:
        for recording, dirty in self.bitmaps.values():
            if recording:
                dirty.add(block)

    def run(
        self, job: str, parent: str | None = None, *, stamp: str = ""
    ) -> tuple[DiskPlan, set[int]]:
        """Run a job to its end, folds included; return its plan and its union."""
        number = len(self.jobs) + 1
        self.jobs[job] = (
            f"nightly.{stamp or f'2026-11-{number:02d}_01.05.00'}_{number:02d}"
        )
        tracked = Tracked(
            SIZE,
            tuple(
                Bitmap(name, recording=recording)
                for name, (recording, _) in self.bitmaps.items()
            ),
        )
        level = Level(job[0], self.jobs[parent] if parent else None)
        plan = cbt.plan(self.jobs[job], level, {"scsi0": tracked})["scsi0"]
        for name in plan.drop:
            del self.bitmaps[name]
        self.bitmaps[plan.new.name] = (True, set())
        for name in plan.disable:
            self.bitmaps[name] = (False, self.bitmaps[name][1])
        union = set().union(*(self.bitmaps[name][1] for name in plan.union))
        for fold in plan.folds:
            if fold.target:
                for name in fold.sources:
                    self.bitmaps[fold.target][1].update(self.bitmaps[name][1])
            for name in fold.remove:
                del self.bitmaps[name]
        self.write(number)
        return plan, union


@pytest.fixture(params=[24, 3, 1], ids=["short", "later", "folded"])
def history(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> History:
    """A history whose disk folds late, as it does, or as early as can be."""
    monkeypatch.setattr(cbt, "FOLD_ABOVE", request.param)
    return History()


def test_f1_f2_d3_i4_and_then_d5_on_f1_misses_nothing_after_f1(
    history: History,
) -> None:
    """``F1 F2 D3(P=F2) I4(P=D3)``, F2 to I4 are disowned, ``D5(P=F1)``.

    With one base for the chain, D5 missed all that was written between F1 and F2.
    """
    history.run("F1")
    history.run("F2")
    assert history.run("D3", "F2")[1] == {2}
    assert history.run("I4", "D3")[1] == {3}
    plan, union = history.run("D5", "F1")
    if plan.whole is None:
        assert union == {1, 2, 3, 4}
    else:
        # I4 proved F2 good and was itself above the limit: F1 was cut off.
        assert "is gone" in plan.whole
        assert cbt.FOLD_ABOVE == 1


def test_f1_i2_i3_d4_that_fails_and_i5_on_i3_reads_no_more_than_was_written(
    history: History,
) -> None:
    """``F1 I2 I3 D4(P=F1, fails) I5(P=I3)``: D4 says nothing against I2 and I3.

    Folding them into F1's segment at D4 took I5's own segment away.
    """
    history.run("F1")
    history.run("I2", "F1")
    history.run("I3", "I2")
    assert history.run("D4", "F1")[1] == {1, 2, 3}
    plan, union = history.run("I5", "I3")
    assert plan.whole is None
    assert union == {3, 4}


def test_a_full_that_failed_is_not_taken_for_the_start_of_the_chain(
    history: History,
) -> None:
    """``F1 I2 F3(fails) I4(P=I2) I5(P=I4) D6(P=F1)``: F3 must not cut F1 off."""
    history.run("F1")
    history.run("I2", "F1")
    history.run("F3")
    assert history.run("I4", "I2")[1] == {2, 3}
    assert history.run("I5", "I4")[1] == {4}
    plan, union = history.run("D6", "F1")
    assert plan.whole is None
    assert union == {1, 2, 3, 4, 5}


def test_jobs_around_the_end_of_summer_time_are_in_the_order_they_ran(
    history: History,
) -> None:
    """The second's name sorts before the first's, and QEMU lists them in any order."""
    stamps = ("2026-10-25_02.30.00", "2026-10-25_02.10.00", "2026-10-25_02.40.00")
    history.run("F1", stamp=stamps[0])
    history.run("I2", "F1", stamp=stamps[1])
    for order in itertools.permutations(history.bitmaps.items()):
        again = History(
            {name: (state, set(dirty)) for name, (state, dirty) in order},
            dict(history.jobs),
        )
        plan, union = again.run("I3", "I2", stamp=stamps[2])
        assert plan.new.seq == 3
        assert union == {2}
