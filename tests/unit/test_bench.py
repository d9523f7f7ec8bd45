# SPDX-License-Identifier: Apache-2.0
"""What measures is itself right: the sides, the rows, the page made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import __main__ as bench_main
from bench import report, sides
from bench.harness import (
    Plumbing,
    Side,
    better,
    bounded,
    compare,
    run,
    throughput,
    write_json,
)

MIB = 1 << 20
ROW_FIELDS = {
    *("row", "name", "ratio", "ok", "mb_s", "yardstick_mb_s"),
    *("cpu_s_per_gib", "rss_mib"),
}


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_memory_and_cpu_are_those_of_the_whole_process_tree() -> None:
    child = "b = bytearray(80 << 20); b[::4096] = b'x' * len(b[::4096])\nimport time\n"
    child += "t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    _, cpu, mib = run(["sh", "-c", f'{sys.executable} -c "{child}"; true'])
    assert cpu >= 0.3
    assert mib > 80


def test_a_failing_side_ends_the_measuring() -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        run(python("raise SystemExit(3)"))


def test_what_is_fed_arrives_in_order_and_what_is_drained_is_all_taken(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_bytes(b"a" * MIB)
    (tmp_path / "b").write_bytes(b"b" * MIB)
    text = "import sys; d = sys.stdin.buffer.read(); sys.stdout.buffer.write(d); "
    text += f"sys.exit(d != b'a' * {MIB} + b'b' * {MIB})"
    run(python(text), (), Plumbing((tmp_path / "a", tmp_path / "b"), drain=True))


def test_both_sides_run_alternately_and_the_warm_up_is_left_out(
    tmp_path: Path,
) -> None:
    order = tmp_path / "order"
    two = [["sh", "-c", f"echo {name} >>{order}"] for name in ("ours", "theirs")]
    mine, his = compare(lambda: two[0], lambda: two[1], rounds=2)
    assert order.read_text().split() == ["ours", "theirs"] * 3
    assert len(mine.seconds) == len(his.seconds) == 2


def test_the_yardstick_is_the_faster_of_several() -> None:
    pairs = [(Side([1.0], []), Side([theirs], [])) for theirs in (3.0, 2.0)]
    assert better(pairs)[1].median == 2.0


def test_the_json_has_the_fields_of_the_table(tmp_path: Path) -> None:
    pair = Side([1.0, 2.0, 9.0], [0.5, 0.5, 0.5], 40.0), Side([3.0], [1.0], 9.0)
    rows = [
        throughput("2", "more is better", 1000 * MIB, pair, at_least=1.2),
        bounded("9", "less is better", 1.3, 1.2),
    ]
    write_json(tmp_path / "r.json", rows)
    more, less = json.loads((tmp_path / "r.json").read_text())
    assert set(more) == ROW_FIELDS | {"at_least"}
    assert more["ratio"] == 1.5
    assert more["ok"] is True
    assert more["cpu_s_per_gib"] == 0.512
    assert set(less) == ROW_FIELDS | {"at_most"}
    assert less["mb_s"] is None
    assert less["ok"] is False
    assert (tmp_path / "r.txt").exists()


def test_the_page_tells_what_is_missed_and_how_busy_it_was() -> None:
    rows = [
        {"row": "2", "name": "a | b", "ratio": 0.9, "at_least": 1.2, "ok": False},
        {"row": "growth-size", "name": "flat", "ratio": 1.0, "at_most": 1.2, "ok": True}
        | {"points": [[10, 0.5], [100, 0.5]]},
    ]
    text = report.page(
        "2026-01-02", rows, "$ it\nload 5.0: this machine is busy\n\nx", "## Why\n"
    )
    assert "1 of 2 rows meet their bound" in text
    assert "| 2 | a \\| b | 0.9 | 1.2 |" in text
    assert "\n## Why\n" in text
    assert "**no**" in text
    assert "The machine was busy" in text
    for name, svg in report.pictures(rows).items():
        assert f"/{name})" in text
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert report.share(rows[0]) == pytest.approx(0.75)
    assert report.share(rows[1]) == pytest.approx(1.2)


def test_every_name_is_a_script_and_every_side_a_function() -> None:
    for name in bench_main.NAMES:
        module = __import__(f"bench.{name}", fromlist=["measure"])
        assert callable(module.measure), name
    for name, module_name in sides.SIDES.items():
        module = __import__(f"bench.{module_name}", fromlist=[name])
        assert callable(getattr(module, name.replace("-", "_"))), name
