# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pveplug.guestlatency import counters, slowest


def entry(device: str, node: str, **stats: tuple[int, int]) -> dict[str, object]:
    counted = {}
    for kind in ("rd", "wr", "flush"):
        count, took = stats.get(kind, (0, 0))
        counted[f"{kind}_operations"] = count
        counted[f"{kind}_total_time_ns"] = took
    return {"device": device, "node-name": node, "qdev": "", "stats": counted}


def test_both_layouts_name_the_disk() -> None:
    found = counters(
        [
            entry("drive-scsi0", "#block132", wr=(1, 5)),
            entry("", "drive-scsi1", rd=(2, 6)),
            entry("", "pflash0"),
        ]
    )
    assert found["scsi0", "wr"] == (1, 5)
    assert found["scsi1", "rd"] == (2, 6)
    assert {key for key, _ in found} == {"scsi0", "scsi1"}


def test_the_slowest_kind_of_the_slowest_disk_counts() -> None:
    before = counters([entry("", "drive-a0", wr=(10, 0)), entry("", "drive-b0")])
    after = counters(
        [
            entry("", "drive-a0", wr=(110, 100_000_000), flush=(2, 60_000_000)),
            entry("", "drive-b0", rd=(1, 20_000_000)),
        ]
    )
    assert slowest(before, after) == pytest.approx(0.030)


def test_without_requests_or_with_fresh_counters_nothing_is_told() -> None:
    some = counters([entry("", "drive-a0", wr=(10, 10))])
    assert slowest(some, some) is None
    assert slowest({}, some) is None
    assert slowest(some, counters([entry("", "drive-a0", wr=(1, 10**9))])) is None
