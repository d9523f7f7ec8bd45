# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time

import pytest

from pveplug import command_replicas
from pveplug.cli import main
from pveplug.dr.overview import overview
from pveplug.dr.store import Origin, Record, ReplicaStore, Staged
from pveplug.proto.dr_frames import Point

UUID = "0a1b2c3d-0000-4000-8000-00000000abc{}"


def record(number: int, **values) -> Record:
    now = int(time.time())
    made = Record(
        UUID.format(number),
        link="ab12cd34",
        vmid=900 + number,
        role="standby",
        origin=Origin(100 + number, f"web{number}", "site/pve1"),
        points=[
            Point("ph-rp0001", "dr-x.1", now - 3600, now - 3600),
            Point("ph-rp0002", "dr-x.2", now - 90, now - 120),
        ],
    )
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def store(tmp_path) -> ReplicaStore:
    return ReplicaStore(str(tmp_path))


def told(tmp_path, capsys, *more) -> tuple[int, str]:
    status = main(["replicas", "--state-dir", str(tmp_path), *more])
    return status, capsys.readouterr().out


def test_no_replica_is_no_fault(tmp_path, capsys):
    status, out = told(tmp_path, capsys)
    assert status == 0
    assert out == f"no replica in {tmp_path}\n"


def test_the_table_has_a_row_for_each(store, tmp_path, capsys):
    store.write(record(2))
    store.write(record(1, role="active", epoch=2, failover={"point": "ph-rp0002"}))
    status, out = told(tmp_path, capsys)
    lines = out.splitlines()
    assert lines[0].split() == [
        *("SOURCE", "REPLICA", "ROLE", "EPOCH", "POINTS", "LAST", "POINT", "LAG"),
        *("STAGE", "HEALTH"),
    ]
    assert lines[1].split()[:5] == ["101", "web1", "901", "active", "2"]
    assert lines[2].split()[:6] == ["102", "web2", "902", "standby", "1", "2"]
    assert lines[2].endswith("ok")
    assert "2 min" in lines[2]
    assert lines[3].startswith("101 web1: it runs instead of its source")
    assert status == 1


def test_json_has_all(store, tmp_path, capsys):
    store.write(record(1))
    status, out = told(tmp_path, capsys, "--json")
    (one,) = json.loads(out)
    assert status == 0
    assert one["source_name"] == "web1"
    assert [point["name"] for point in one["points"]] == ["ph-rp0001", "ph-rp0002"]
    assert 100 < one["lag_s"] < 200


def test_without_a_directory_all_receivers_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_replicas, "STATE_ROOT", str(tmp_path))
    ReplicaStore(str(tmp_path / "a")).write(record(1))
    ReplicaStore(str(tmp_path / "b")).write(record(2))
    assert main(["replicas"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_old_instant_is_late_by_the_rpo(store, tmp_path, capsys):
    store.write(record(1))
    assert told(tmp_path, capsys, "--rpo", "3600")[0] == 0
    status, out = told(tmp_path, capsys, "--rpo", "60")
    assert status == 1
    assert "late" in out


def test_a_damaged_record_is_told_and_hides_no_other(store, tmp_path, capsys):
    store.write(record(1))
    store.write(record(2))
    (store.directory(UUID.format(1)) / "record.json").write_text("{")
    status, out = told(tmp_path, capsys)
    assert status == 1
    assert "damaged" in out
    assert "102 web2" in out


@pytest.mark.parametrize(
    ("values", "health"),
    [
        ({}, "ok"),
        ({"testing": {}}, "test"),
        ({"staged": [Staged("dr-x.3", 3, instant=1)]}, "staged"),
        ({"intent": Staged("dr-x.3", 3)}, "interrupted"),
        ({"role": "seeding", "points": [], "intent": None}, "seeding"),
        ({"role": "none", "points": []}, "seeding"),
        ({"points": []}, "no point"),
        ({"role": "active"}, "failed over"),
        ({"role": "permanent"}, "permanent"),
    ],
)
def test_health_is_one_word_and_a_reason(store, values, health):
    store.write(record(1, **values))
    found = overview(store, UUID.format(1))
    assert found.health == health
    assert bool(found.why) == (health != "ok")


def test_stages_are_counted_wherever_they_are(store, tmp_path):
    store.write(record(1))
    elsewhere = tmp_path / "elsewhere"
    for place in (store.directory(UUID.format(1)), elsewhere / UUID.format(1)):
        place.mkdir(parents=True, exist_ok=True)
        (place / "00000003.stage").write_bytes(bytes(1000))
    found = overview(store, UUID.format(1), stage_dir=str(elsewhere))
    assert found.stage_bytes == 2000
