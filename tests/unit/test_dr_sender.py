# SPDX-License-Identifier: Apache-2.0
"""Decisions of a sender: slices, samples, levels, names, what status says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.cbt import Level, chain_id
from pveplug.dr.cycle import cycle_name, wanted_level
from pveplug.dr.delta import choose_samples, slice_of
from pveplug.dr.memory import EpochMemory
from pveplug.dr.sender import status_line
from pveplug.errors import JobError
from pveplug.proto.dr_frames import LEAF, State


@given(st.integers(1, 1 << 34), st.integers(1, 300))
def test_slices_tile_the_disk_whatever_its_size(size: int, slices: int) -> None:
    at = 0
    for number in range(slices):
        part = slice_of(size, number, slices)
        if part is None:
            continue
        assert part.offset == at
        assert part.length > 0
        assert at % LEAF == 0
        at = part.end
    assert at == size


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 50 * LEAF), min_size=1),
    st.integers(0, 200),
    st.integers(),
)
def test_samples_are_different_leaves_of_the_disks(
    sizes: dict[str, int], count: int, seed: int
) -> None:
    chosen = choose_samples(sizes, count, random.Random(seed))
    places = [(key, at) for key, offsets in chosen.items() for at in offsets]
    leaves = sum(-(-size // LEAF) for size in sizes.values())
    assert len(places) == len(set(places)) == min(count, leaves)
    assert all(at % LEAF == 0 and at < sizes[key] for key, at in places)


def test_all_cycles_of_a_replica_are_one_chain() -> None:
    first = cycle_name("ab12cd34", 1, 0)
    assert first == "dr-ab12cd34.1970-01-01_00.00.00_01"
    assert chain_id(first) == chain_id(cycle_name("ab12cd34", 117, 1e9))
    assert chain_id(first) != chain_id(cycle_name("ab12cd35", 1, 0))


def state(role: str, acked: str | None = None, seed: str | None = None) -> State:
    return State("ab12cd34", role, 1, acked=acked, seed_cycle=seed)


def test_a_cycle_builds_on_what_the_receiver_acknowledged() -> None:
    assert wanted_level("seed", state("none")) == Level("F")
    assert wanted_level("seed", state("seeding", seed="c1")) == Level("I", "c1")
    assert wanted_level("incremental", state("standby", "c7")) == Level("I", "c7")
    assert wanted_level("incremental", state("standby")) == Level("F")


@pytest.mark.parametrize(
    ("mode", "role", "said"),
    [
        ("seed", "standby", "mode=incremental goes on"),
        ("incremental", "none", "mode=seed first"),
        ("incremental", "seeding", "it goes on where it was"),
    ],
)
def test_a_mode_out_of_turn_is_refused_with_the_right_one(
    mode: str, role: str, said: str
) -> None:
    with pytest.raises(JobError, match=said):
        wanted_level(mode, state(role))


def test_an_epoch_is_remembered_per_replica_and_receiver(tmp_path: Path) -> None:
    memory = EpochMemory(str(tmp_path), "u-1", "dr.example", 9190)
    assert memory.recall() is None
    memory.remember(3)
    assert EpochMemory(str(tmp_path), "u-1", "dr.example", 9190).recall() == 3
    assert EpochMemory(str(tmp_path), "u-1", "dr.example", 9191).recall() is None
    assert EpochMemory(str(tmp_path), "u-2", "dr.example", 9190).recall() is None


@pytest.mark.parametrize("text", ["", "{}", '{"epoch": 0}', '{"epoch": "3"}', "[1]"])
def test_a_damaged_epoch_is_not_taken_for_a_missing_one(
    tmp_path: Path, text: str
) -> None:
    memory = EpochMemory(str(tmp_path), "u", "h", 1)
    memory.remember(1)
    next((tmp_path / "dr").iterdir()).write_text(text)
    with pytest.raises(JobError, match=r"damaged.*dr_takeover=yes"):
        memory.recall()


def test_status_calls_a_replica_late_that_is() -> None:
    replica = {
        "source_vmid": 100,
        "source_name": "web",
        "site": "pve1",
        "vmid": 9100,
        "role": "standby",
        "epoch": 2,
        "points": [{"instant": 1000}, {"instant": 4000}],
    }
    line, late = status_line(replica, 3600, 7000)
    assert not late
    assert "2 restore points, newest 50 min old" in line
    line, late = status_line(replica, 2000, 7000)
    assert late
    assert line.endswith("later than dr_rpo=2000 s")
    # One that was failed over gets no restore points, and need not.
    assert not status_line({**replica, "role": "active"}, 2000, 7000)[1]
    assert status_line({**replica, "points": []}, 2000, 7000)[1]
