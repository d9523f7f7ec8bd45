# SPDX-License-Identifier: Apache-2.0
"""The record of a recovery: kept whole, and refused in any other state."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from pveplug.errors import IntegrityError, JobError, TransportError
from pveplug.ir.record import RECORD, LandedDisk, Record, Recovery, recoveries
from pveplug.node import Node

WHOLE = Record(
    120,
    "u-1",
    "pve1",
    "/@proxmox/100-1a",
    "n.1",
    "r.1",
    1.5,
    timeout=60,
    jobs=["n.0", "n.1"],
    disks=[
        LandedDisk("efidisk0", "efidisk0", 528384, "lvm", "raw"),
        LandedDisk(
            *("scsi0", "scsi0", 1 << 40, "lvm", "raw", "local:120/o.qcow2"),
            options=(("discard", "on"), ("size", "1T")),
        ),
    ],
    auto_migrate=False,
    bwlimit=1024,
    bind="127.0.0.1",
    port=10809,
    notes={"onboot": "1", "protection": ""},
    config={"description": "größer"},
    stale=["scsi9"],
    handed=True,
    damage="VM 120 scsi0: …",
)


@pytest.fixture
def recovery(tmp_path: Path) -> Recovery:
    node = Node(landing_dir=f"{tmp_path}/l", runtime_dir=f"{tmp_path}/r")
    found = Recovery(node, 120)
    found.make()
    return found


def test_a_record_comes_back_as_it_was(recovery: Recovery) -> None:
    recovery.save(WHOLE)
    assert recovery.load() == WHOLE
    assert [disk.key for disk in WHOLE.served] == ["scsi0"]
    assert [p.name for p in recovery.folder.iterdir()] == [RECORD]


def test_every_damage_is_refused_with_path_and_remedy(recovery: Recovery) -> None:
    recovery.save(WHOLE)
    path = recovery.folder / RECORD
    text = path.read_text()
    values = json.loads(text)
    damaged = [text[:cut] for cut in range(0, len(text), 37)] + [
        "[]",
        "null",
        json.dumps({**values, "version": 2}),
        json.dumps({**values, "disks": [{}]}),
        json.dumps({**values, "more": 1}),
        json.dumps({k: v for k, v in values.items() if k != "uuid"}),
        json.dumps({k: v for k, v in values.items() if k != "version"}),
    ]
    for each in damaged:
        path.write_text(each)
        with pytest.raises(IntegrityError) as raised:
            recovery.load()
        assert str(path) in str(raised.value)
        assert "stop and destroy the VM" in str(raised.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError):
        recovery.load()


def test_a_record_that_cannot_be_written_keeps_the_one_there_was(
    recovery: Recovery,
) -> None:
    recovery.save(WHOLE)
    (recovery.folder / RECORD).with_suffix(".new").mkdir()
    with pytest.raises(TransportError, match=RECORD):
        recovery.save(dataclasses.replace(WHOLE, whole=True))
    assert recovery.load() == WHOLE


def test_recoveries_are_those_with_a_record(tmp_path: Path, recovery: Recovery) -> None:
    node = Node(landing_dir=f"{tmp_path}/l", runtime_dir=f"{tmp_path}/r")
    assert recoveries(node) == []
    recovery.save(WHOLE)
    for name in ("lost+found", "130", "file"):
        (tmp_path / "l" / name).mkdir()
    assert recoveries(node) == [120]
    recovery.remove()
    assert recoveries(node) == []
    assert recoveries(Node(landing_dir=f"{tmp_path}/none")) == []


async def test_one_job_delivers_and_the_next_says_what_to_do(
    recovery: Recovery,
) -> None:
    assert not recovery.fed()
    async with recovery.feeding(1):
        assert recovery.fed()
        with pytest.raises(JobError, match="wait for that job, or cancel it"):
            async with recovery.feeding(0):
                pass
    assert not recovery.fed()


async def test_a_second_keeper_is_none(recovery: Recovery) -> None:
    async with recovery.keeping() as ours:
        assert ours
        assert recovery.kept()
        async with asyncio.timeout(10), recovery.keeping(0) as second:
            assert not second
    assert not recovery.kept()
