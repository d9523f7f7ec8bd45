# SPDX-License-Identifier: Apache-2.0
"""What qemu-img says of an image's bitmaps, and what is made of it."""

from __future__ import annotations

import json

import pytest

from pveplug import cbt
from pveplug.bitmaps import Found, bitmaps_of_info
from pveplug.command_bitmaps import _table
from pveplug.pve_local import ProgramError

ARGV = ["qemu-img", "info"]
NAME = cbt.Segment(3, "c0123abcd", "I", "nightly.2026-11-22_20.42.31_07", 1, 2).name


def info(*rows: dict[str, object]) -> str:
    return json.dumps({"format-specific": {"data": {"bitmaps": list(rows)}}})


def row(name: str, *flags: str) -> dict[str, object]:
    return {"name": name, "flags": list(flags), "granularity": 65536}


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        ((), "closed"),
        (("auto",), "recording"),
        (("in-use", "auto"), "inconsistent"),
        (("in-use",), "inconsistent"),
    ],
)
def test_the_flags_of_a_stopped_vms_bitmap_tell_its_state(flags, state):
    (bitmap,) = bitmaps_of_info(info(row(NAME, *flags)), ARGV)
    found = Found(100, "scsi0", "local:x", bitmap, False, "/x")
    assert found.state == state
    assert found.chain == "c0123abcd"
    assert bitmap.persistent


def test_an_image_without_bitmaps_has_none():
    text = json.dumps({"format-specific": {"data": {"compat": "1.1"}}})
    assert bitmaps_of_info(text, ARGV) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", info({"name": "x"}), '{"a": 1}'])
def test_what_qemu_img_does_not_say_is_refused(text):
    with pytest.raises(ProgramError, match="is not understood"):
        bitmaps_of_info(text, ARGV)


def test_the_table_shows_what_is_known_in_columns():
    closed = cbt.Bitmap(NAME, recording=False, count=3 << 20, persistent=True)
    strange = cbt.Bitmap("ph-c0123abcd-union", recording=False)
    text = _table(
        [
            Found(100, "scsi0", "local:x", closed, True, "f1"),
            Found(100, "scsi0", "local:x", strange, False, "/x"),
        ]
    )
    head, first, second = text.splitlines()
    assert head.split()[:4] == ["VMID", "DISK", "CHAIN", "SEQ"]
    assert first.split()[:8] == [
        *("100", "scsi0", "c0123abcd", "3", "I", "persistent", "closed", "3.0")
    ]
    assert first.endswith("nightly.2026-11-22_20.42.31_07")
    assert "volatile" in second
    assert second.endswith("ph-c0123abcd-union")
    assert _table([]) == "no bitmaps of ours\n"
