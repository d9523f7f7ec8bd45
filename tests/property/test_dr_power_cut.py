# SPDX-License-Identifier: Apache-2.0
"""A replica's record when the power goes, at any moment, on a forgetful disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.dr.store import Record, ReplicaStore, Staged, new_record
from tests.property.test_power_cut import Disk, Recorder

UUID = "0a1b2c3d-0000-4000-8000-00000000abcd"


def written(base: Path, patch: pytest.MonkeyPatch, count: int) -> tuple[Recorder, list]:
    """Write some records; return what happened, and which holds after how much."""
    recorder = Recorder(base)
    recorder.install(patch)
    store = ReplicaStore(str(base / "lib"))
    ends: list[tuple[int, Record | None]] = [(0, None)]
    for number in range(count):
        record = new_record(UUID)
        record.link = "00000000"
        record.cycle = number
        record.intent = Staged("c", number, f"{number}.stage")
        store.write(record)
        recorder.observe()
        ends.append((len(recorder.ops), store.read(UUID)))
    store.forget(UUID)
    ends.append((len(recorder.ops), None))
    return recorder, ends


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_after_a_power_cut_the_record_is_the_last_or_the_one_being_written(
    data: st.DataObject,
) -> None:
    base = Path(tempfile.mkdtemp(prefix="pp-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            recorder, ends = written(base, patch, 3)
        check(base, recorder, ends, data)
    finally:
        shutil.rmtree(base)


def check(base: Path, recorder: Recorder, ends: list, data: st.DataObject) -> None:
    disk = Disk(base, directories={str(base)})
    at = 0
    for done in range(len(recorder.ops) + 1):
        if done:
            disk.happen(recorder.ops[done - 1])
        while at + 1 < len(ends) and done > ends[at + 1][0]:
            at += 1
        following = ends[at + 1] if at + 1 < len(ends) else ends[at]
        allowed = (
            [following[1]] if done == following[0] else [ends[at][1], following[1]]
        )
        for files in disk.found(data):
            with tempfile.TemporaryDirectory(prefix="pp-") as again:
                for name, content in files.items():
                    path = Path(again) / Path(name).relative_to(base)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                found = ReplicaStore(str(Path(again) / "lib")).read(UUID)
            assert found in allowed
