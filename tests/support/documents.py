# SPDX-License-Identifier: Apache-2.0
"""Documents that are made, and the links of all of them.

``python -m tests.support.documents`` writes the made ones anew (``./dev docs``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pveplug.manual import manual

REPOSITORY: Final = Path(__file__).resolve().parents[2]
MADE: Final = {REPOSITORY / "docs" / "parameters.md": manual}
"""path -> what returns its text"""

_LINK: Final = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING: Final = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def documents() -> list[Path]:
    """Return the Markdown files at the top and below docs/, bacula_shim/, deploy/."""
    found = [*REPOSITORY.glob("*.md")]
    for folder in ("docs", "bacula_shim", "deploy", "requirements"):
        found += (REPOSITORY / folder).rglob("*.md")
    return sorted(found)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as code hosts make them."""
    return {
        re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        for title in _HEADING.findall(_FENCE.sub("", text))
    }


def broken_links(path: Path) -> Iterator[str]:
    """Yield each local link of the document that leads nowhere."""
    text = path.read_text(encoding="utf-8")
    for link in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"{path.relative_to(REPOSITORY)}: {link} does not exist"
        elif anchor and target.suffix == ".md":
            if anchor not in anchors(target.read_text(encoding="utf-8")):
                yield f"{path.relative_to(REPOSITORY)}: {link} has no such heading"


def main() -> None:
    for path, make in MADE.items():
        path.write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
