# SPDX-License-Identifier: Apache-2.0
"""The record of a replica: what is written is read, and one session has it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.dr.admission import admit, doomed, point_name
from pveplug.dr.store import (
    Origin,
    Record,
    ReplicaError,
    ReplicaStore,
    Report,
    Staged,
    Volume,
    checked_uuid,
    new_record,
)
from pveplug.proto.dr_frames import Open, Point

UUID = "0a1b2c3d-0000-4000-8000-00000000abcd"
POINTS = [Point(f"ph-rp{n:04d}", f"c{n}", 1000 + n, 900 + n) for n in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> ReplicaStore:
    return ReplicaStore(str(tmp_path))


def full() -> Record:
    return Record(
        UUID,
        link="00ff00ff",
        vmid=200,
        created=True,
        role="standby",
        epoch=3,
        welcome=True,
        acked="c9",
        cycle=12,
        seed_cycle="c1",
        seeded={"scsi0": 5},
        disks={"scsi0": Volume("dr:200/vm-200-disk-0.qcow2", 1 << 30, "qcow2", "dr")},
        keys=["cores"],
        pending=["dr:200/vm-200-disk-1.qcow2"],
        retired=["dr:200/vm-200-disk-2.qcow2"],
        points=POINTS[:2],
        staged=[Staged("c10", 10, "10.stage", 7, "x", 8, {"scsi0": 0}, {"scsi0": 9})],
        intent=Staged("c9", 9, "9.stage", snapshot="ph-rp0009"),
        testing={"vmid": 900},
        slice=4,
        dirty=True,
        failover={"point": "ph-rp0001", "time": 5},
        origin=Origin(100, "shop", "main"),
        report=Report("job", 1.5, 2.5, 3),
        storage="dr",
    )


@pytest.mark.parametrize("record", [full(), new_record(UUID)])
def test_a_record_is_read_as_it_was_written(store, record):
    store.write(record)
    assert store.read(UUID.upper()) == record
    assert store.uuids() == [UUID]


def test_a_new_replica_has_a_link_of_its_own():
    links = {new_record(UUID).link for _ in range(20)}
    assert len(links) == 20
    assert all(len(link) == 8 and int(link, 16) >= 0 for link in links)


def test_the_state_is_what_the_record_says():
    state = full().state(node="pve1", version="1")
    assert state.link == "00ff00ff"
    assert state.staged == ("c10",)
    assert state.disks == {"scsi0": 1 << 30}
    assert state.testing
    assert state.node == "pve1"
    assert (state.acked, state.cycle, state.slice) == ("c9", 12, 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "record": []}',
        '{"version": 1, "record": {"uuid": 5}}',
        '{"version": 1, "record": {}}',
        '{"version": 1, "record": {"uuid": "other"}}',
        json.dumps({"version": 1, "record": {"uuid": UUID, "role": "king"}}),
        json.dumps({"version": 1, "record": {"uuid": UUID, "epoch": "2"}}),
        json.dumps({"version": 1, "record": {"uuid": UUID, "points": [{}]}}),
        json.dumps({"version": 1, "record": {"uuid": UUID, "disks": {"a": 1}}}),
        json.dumps({"version": 1, "record": {"uuid": UUID, "welcome": 1}}),
    ],
)
def test_a_damaged_record_is_a_clear_error(store, text):
    store.write(new_record(UUID))
    path = store.directory(UUID) / "record.json"
    path.write_text(text)
    with pytest.raises(ReplicaError, match="can't be read") as caught:
        store.read(UUID)
    assert str(path) in str(caught.value)
    assert caught.value.code == "internal"


def test_a_later_versions_record_is_left_alone(store):
    store.write(new_record(UUID))
    (store.directory(UUID) / "record.json").write_text('{"version": 2}')
    with pytest.raises(ReplicaError, match="later version"):
        store.read(UUID)


def test_a_later_key_is_passed_over(store):
    record = new_record(UUID)
    store.write(record)
    path = store.directory(UUID) / "record.json"
    values = json.loads(path.read_text())
    values["record"]["novelty"] = 5
    path.write_text(json.dumps(values))
    assert store.read(UUID) == record


@given(st.integers(0, 4000))
def test_a_record_cut_anywhere_is_read_whole_or_refused(cut):
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        store = ReplicaStore(base)
        store.write(full())
        path = store.directory(UUID) / "record.json"
        text = path.read_text()
        path.write_text(text[:cut])
        try:
            found = store.read(UUID)
        except ReplicaError:
            return
        assert cut >= len(text.rstrip())
        assert found is not None
        assert found.link == "00ff00ff"


def test_a_write_that_dies_half_way_leaves_the_old_record(store, monkeypatch):
    record = new_record(UUID)
    store.write(record)

    def full_disk(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    other = full()
    with pytest.raises(ReplicaError) as caught:
        store.write(other)
    assert caught.value.code == "space"
    assert store.read(UUID) == record


def test_one_session_holds_a_replica(store):
    with store.hold(UUID, "job nightly.1"):
        with pytest.raises(ReplicaError, match=r"job nightly\.1 since 2") as caught:
            with store.hold(UUID, "another"):
                pass
        assert caught.value.code == "busy"
        assert store.read(UUID) is None  # looking needs no lock
    with store.hold(UUID, "another"):
        pass


def test_two_replicas_are_held_at_once(store):
    other = UUID.replace("a", "b")
    with store.hold(UUID, "a"), store.hold(other, "b"):
        pass


def test_a_forgotten_replica_is_gone(store):
    store.write(new_record(UUID))
    store.forget(UUID)
    assert store.read(UUID) is None
    assert store.uuids() == []


@pytest.mark.parametrize("text", ["", "../../etc", "0a1b2c3d", UUID + "/x", "x" * 36])
def test_what_names_a_directory_is_a_uuid(text):
    with pytest.raises(ReplicaError) as caught:
        checked_uuid(text)
    assert caught.value.code == "identity"


# --- who may go on -------------------------------------------------------------------


def opening(mode: str = "incremental", epoch: int | None = 1, **more: bool) -> Open:
    return Open(mode, UUID, 100, "shop", "main", "job", epoch, **more)


def refusal(record: Record, asked: Open) -> ReplicaError | None:
    try:
        admit(record, asked)
    except ReplicaError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("role", "mode", "code"),
    [
        ("none", "seed", ""),
        ("seeding", "seed", ""),
        ("standby", "seed", "role"),
        ("active", "seed", "role"),
        ("permanent", "seed", "role"),
        ("none", "incremental", "role"),
        ("seeding", "incremental", "role"),
        ("standby", "incremental", ""),
        ("active", "incremental", "role"),
        ("permanent", "incremental", "role"),
        ("active", "failback", ""),
        ("active", "failover-undo", ""),
    ],
)
def test_each_role_takes_what_fits_it(role, mode, code):
    error = refusal(Record(UUID, role=role, vmid=200), opening(mode))
    assert (error.code if error else "") == code
    assert error is None or "Remedy" in str(error)


@pytest.mark.parametrize(
    ("theirs", "ours", "welcome", "takeover", "good"),
    [
        (1, 1, False, False, True),
        (None, 1, False, False, True),
        (1, 2, False, False, False),
        (None, 2, False, False, False),
        (1, 2, True, False, True),
        (None, 2, True, False, True),
        (1, 2, False, True, True),
        (None, 2, False, True, True),
        (3, 2, False, False, False),
        (2, 2, False, False, True),
    ],
)
def test_a_sender_of_another_epoch_is_refused(theirs, ours, welcome, takeover, good):
    failover = {"time": 1_790_000_000, "job": "failover.3"}
    record = Record(
        UUID, role="standby", epoch=ours, welcome=welcome, failover=failover
    )
    error = refusal(record, opening(epoch=theirs, takeover=takeover))
    assert (error is None) is good
    assert error is None or error.code == "epoch"
    if error is not None and (theirs or 0) < ours:
        assert "2026-09-21" in str(error)
        assert "failover.3" in str(error)


def test_takeover_doesnt_open_an_active_replica():
    record = Record(UUID, role="active", epoch=2)
    with pytest.raises(ReplicaError) as caught:
        admit(record, opening(epoch=1, takeover=True))
    assert caught.value.code == "epoch"


def test_a_seed_that_lacks_only_its_point_is_open_to_both_modes():
    record = Record(UUID, role="seeding", intent=Staged("c1", 1, seed=True))
    admit(record, opening())
    admit(record, opening("seed"))


# --- what rotates out ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "minimum", "lock_days", "gone"),
    [
        (7, 1, 0, 3),
        (10, 1, 0, 0),
        (99, 1, 0, 0),
        (1, 1, 0, 9),
        (0, 0, 0, 9),
        (1, 4, 0, 6),
        (1, 99, 0, 0),
        (1, 1, 1, 0),
    ],
)
def test_the_receivers_rule_wins(wanted, minimum, lock_days, gone):
    found = doomed(
        POINTS, wanted=wanted, minimum=minimum, lock_days=lock_days, now=2000
    )
    assert found == POINTS[:gone]


def test_a_locked_point_stays_and_older_ones_go():
    found = doomed(POINTS, wanted=1, minimum=1, lock_days=1, now=1005 + 86400)
    assert found == POINTS[:5]


def test_what_something_needs_stays():
    held = {POINTS[0].name}
    found = doomed(POINTS, wanted=8, minimum=1, lock_days=0, now=9e9, held=held)
    assert found == POINTS[1:2]


@given(
    st.lists(st.integers(0, 100), max_size=30).map(sorted),
    st.integers(-5, 40),
    st.integers(-5, 40),
    st.floats(0, 0.001),
    st.integers(0, 200),
)
def test_rotation_never_takes_what_must_stay(taken, wanted, minimum, lock, now):
    points = [Point(f"p{n}", f"c{n}", t, t) for n, t in enumerate(taken)]
    gone = doomed(points, wanted=wanted, minimum=minimum, lock_days=lock, now=now)
    left = [p for p in points if p not in gone]
    assert len(left) >= min(len(points), max(wanted, minimum, 1))
    assert not points or points[-1] in left
    assert all(point.taken < now - lock * 86400 for point in gone)


def test_a_points_name_is_one_pve_takes():
    assert point_name(7, 1_790_000_000) == "ph-rp0007-20260921T141320Z"
    assert len(point_name(10**9, 1_790_000_000)) <= 40
