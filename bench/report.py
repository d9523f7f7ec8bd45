# SPDX-License-Identifier: Apache-2.0
"""Make ``docs/performance.md`` and its plots: ``python -m bench.report [RESULT.json]``.

Without an argument, of the newest JSON in ``bench/results/``, by name; names are dates.
A Markdown file of the same name says why a bound isn't met.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
FOLDER = "performance"

GROWTH = {
    "growth-size": ("GiB of disk, the same changes", "s"),
    "growth-change": ("MiB changed of 100 GiB", "s"),
    "growth-disks": ("disks in one job", "s"),
    "growth-jobs": ("jobs at a time on one bacula-fd", "MB/s, all together"),
    "growth-memory": ("jobs at a time on one bacula-fd", "MiB, all backends"),
}
"""Row -> what was varied, what came out."""

HEAD = """\
# Performance

Made by `python -m bench.report` from `bench/results/{name}.json`; don't edit it. What
each row measures, and what makes a number meaningless, is in
[bench/README.md](../bench/README.md). Rates are in MB (10^6 bytes) per second, the
yardstick's from the same run; CPU seconds and memory are those of our side's whole
process tree. A ratio is product / yardstick; where less is better the bound reads
"at most".

{busy}```
{machine}
```

{met} of {all} rows meet their bound.

| Row | What | Ratio or value | Bound | MB/s | Yardstick MB/s | CPU s/GiB | MiB | Met |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(name: str, rows: list[dict[str, Any]], said: str, notes: str) -> str:
    """Return the document of one result.

    Args:
        name: of the result's file.
        said: what ``./dev bench`` printed.
        notes: what is to be known of these numbers, in Markdown.
    """
    machine = said.partition("\n\n")[0].strip()
    busy = ""
    if "this machine is busy" in machine:
        busy = (
            "**The machine was busy with other work when this was measured: the ratios "
            "say little.**\n\n"
        )
    met = sum(bool(row["ok"]) for row in rows)
    text = HEAD.format(
        **{"name": name, "busy": busy, "machine": machine, "met": met, "all": len(rows)}
    )
    for row in rows:
        least = row.get("at_least")
        bound = f"{least:g}" if least is not None else f"at most {row['at_most']:g}"
        cells = [row["row"], row["name"], f"{row['ratio']:g}", bound]
        for key in ("mb_s", "yardstick_mb_s", "cpu_s_per_gib", "rss_mib"):
            cells.append(f"{row[key]:g}" if row.get(key) is not None else "")
        cells.append("yes" if row["ok"] else "**no**")
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    if notes:
        text += f"\n{notes.strip()}\n"
    text += (
        "\n## Distance to the bounds\n\n"
        "1 is the bound, more is better, whichever way it points.\n\n"
        f"![Share of each bound]({FOLDER}/bounds.svg)\n"
    )
    for row in rows:
        if row.get("points"):
            text += (
                f"\n## {row['name'][0].upper()}{row['name'][1:]}\n\n"
                f"![{row['row']}]({FOLDER}/{row['row']}.svg)\n"
            )
    return text


def share(row: dict[str, Any]) -> float:
    """Return how a row stands to its bound; above 1 is better than that."""
    least = row.get("at_least")
    if least is not None:
        return float(row["ratio"] / least)
    return float(min(row["at_most"] / row["ratio"], 9.99)) if row["ratio"] > 0 else 9.99


def pictures(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the plots by file name."""
    made = {
        "bounds.svg": plots.bars(
            [(f"{row['row']}: {row['name']}", share(row), row["ok"]) for row in rows]
        )
    }
    for row in rows:
        if row.get("points"):
            along, up = GROWTH.get(row["row"], ("", ""))
            made[f"{row['row']}.svg"] = plots.line(row["points"], along, up)
    return made


def main() -> int:
    """Write the page; the exit status is 1 where there is no result."""
    found = sorted(RESULTS.glob("*.json"))
    if len(sys.argv) > 1:
        found = [Path(sys.argv[1])]
    if not found:
        sys.stderr.write(f"there is no result in {RESULTS}: ./dev bench all --json …\n")
        return 1
    source = found[-1]
    rows = json.loads(source.read_text())
    log = source.with_suffix(".txt")
    said = log.read_text() if log.exists() else ""
    kept = source.with_suffix(".md")
    notes = kept.read_text() if kept.exists() else ""
    folder = PAGE.parent / FOLDER
    folder.mkdir(exist_ok=True)
    for name, svg in pictures(rows).items():
        (folder / name).write_text(svg)
    PAGE.write_text(page(source.stem, rows, said, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
