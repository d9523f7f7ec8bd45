# SPDX-License-Identifier: Apache-2.0
"""The rows of the bench run, small, and those that count bytes are met."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import backup, incremental
from bench.restore import chain, full
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    requires("qemu-nbd", "qemu-img", "qemu-io", "nbdcopy"),
]

MIB = 1 << 20


def test_a_chain_of_thirty_is_restored_with_each_byte_written_once(
    tmp_path: Path,
) -> None:
    written, _ = chain(tmp_path, 16 * MIB, 1)
    assert written.ok, written


def test_a_fed_full_comes_back_equal(tmp_path: Path) -> None:
    (row,) = full(tmp_path, 16 * MIB, 1)
    assert row.mb_s


def test_backup_and_incremental_read_what_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backup, "SMALL", 16 * MIB)
    rows = backup.measure(small=True, rounds=1)
    rows += incremental.measure(small=True, rounds=1)
    assert [row.row for row in rows] == ["2", "2-cpu", "3", "4", "4-path"]
