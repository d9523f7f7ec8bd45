# SPDX-License-Identifier: Apache-2.0
"""Documents lead somewhere, and those that are made are what their makers make."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pveplug.config_parse import parse_backup
from pveplug.node import Node, load_node
from pveplug.proto import dr_frames
from tests.support.documents import MADE, REPOSITORY, anchors, broken_links, documents


def test_links_between_documents_lead_somewhere() -> None:
    broken = [line for path in documents() for line in broken_links(path)]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_made_documents_are_up_to_date(path: Path) -> None:
    made = MADE[path]()
    where = path.relative_to(REPOSITORY)
    assert path.read_text(encoding="utf-8") == made, f"run ./dev docs for {where}"


def test_a_lost_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.documents.REPOSITORY", tmp_path)
    (tmp_path / "b.md").write_text("# A heading\n")
    page = tmp_path / "a.md"
    page.write_text("[1](b.md) [2](b.md#a-heading) [3](c.md) [4](b.md#other)\n")
    assert [line.split()[1] for line in broken_links(page)] == ["c.md", "b.md#other"]
    assert anchors("# `vm.conf`, and *more*\n") == {"vmconf-and-more"}


def test_the_example_node_file_shows_every_default(tmp_path: Path) -> None:
    shown = (REPOSITORY / "deploy" / "node.toml").read_text(encoding="utf-8")
    active = tmp_path / "node.toml"
    active.write_text(re.sub(r"^# (\w+ = )", r"\1", shown, flags=re.MULTILINE))
    assert load_node(active) == Node()
    for field in dataclasses.fields(Node):
        assert f"# {field.name} = " in shown


@pytest.mark.parametrize(
    "path", ["README.md", "deploy/bacula-dir.conf"], ids=lambda path: Path(path).name
)
def test_plugin_strings_shown_are_read_without_a_warning(path: str) -> None:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    shown = re.findall(r'^ *Plugin = "(.*)"$', text, re.MULTILINE)
    assert shown
    for line in shown:
        _, warnings = parse_backup(line.replace("AA:BB:…", ":".join(["AA"] * 32)))
        assert not warnings


def test_every_message_of_replication_is_in_its_protocol() -> None:
    text = (REPOSITORY / "docs/protocols/dr.md").read_text()
    for kind, message in dr_frames._JSON.items():
        keys = " ".join(f"`{spec.name}`" for spec in dataclasses.fields(message))
        row = rf"\| {kind} \| {message.__name__} \| [SR] \| {keys} ?\|"
        assert re.search(row, text), f"{kind} {message.__name__}: {keys}"
    for message in (dr_frames.Block, dr_frames.Zero, dr_frames.Digests):
        assert f"| {message.TYPE} | {message.__name__} |" in text
