# SPDX-License-Identifier: Apache-2.0
"""A serial console's bytes become clean, bounded lines however they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.proving.console import FIRST, LAST, MAX_LINE, ConsoleText


def lines_of(*parts: bytes) -> list[str]:
    text = ConsoleText()
    found = [line for part in parts for line in text.receive_data(part)]
    return [*found, text.prompt] if text.prompt.strip() else found


def test_lines_and_the_prompt_are_told_apart() -> None:
    text = ConsoleText()
    assert text.receive_data(b"Debian GNU/Linux 12\r\n\r\nweb lo") == [
        "Debian GNU/Linux 12"
    ]
    assert text.receive_data(b"gin: ") == []
    assert text.prompt == "web login: "
    assert text.tail() == ("Debian GNU/Linux 12", "web login: ")


def test_colours_titles_and_control_characters_are_taken_out() -> None:
    data = (
        b"\x1b[0;32m  OK  \x1b[0m\x1b]0;root@web\x07 Started \x1b(Bcron\x07.\r\n"
        b"\x1bP+q\x1b\\done\0\x08\n"
    )
    assert lines_of(data) == ["  OK   Started cron.", "done"]


def test_a_jump_of_the_cursor_begins_a_new_line() -> None:
    data = b"\x1b[2J\x1b[01;01HUEFI Interactive Shell v2.2\x1b[02;01HEDK II\x1b[03;01H"
    assert lines_of(data + b"\x1b[33mShell> \x1b[37m") == [
        "UEFI Interactive Shell v2.2",
        "EDK II",
        "Shell> ",
    ]


def test_text_that_could_turn_a_report_around_is_taken_out() -> None:
    assert lines_of("a\u202eb\u2028c\x9bd\n".encode()) == ["abcd"]


@given(st.binary(max_size=250), st.lists(st.integers(0, 250), max_size=6))
@settings(deadline=None)
def test_any_split_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    at = sorted(min(cut, len(data)) for cut in cuts)
    parts = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
    whole = ConsoleText()
    expected = whole.receive_data(data)
    split = ConsoleText()
    got = [line for part in parts for line in split.receive_data(part)]
    assert got == expected
    assert split.prompt == whole.prompt


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_no_line_is_long_or_has_a_control_character(data: bytes) -> None:
    for line in lines_of(data):
        assert len(line) <= MAX_LINE
        assert not any(ord(c) < 0x20 and c != "\t" for c in line)


def test_a_flood_without_line_ends_is_bounded() -> None:
    text = ConsoleText()
    for _ in range(50):
        text.receive_data(b"x" * 65536)
    for _ in range(50):
        text.receive_data(b"\x1b]" + b"y" * 65536)
    assert len(text.first) <= FIRST
    assert len(text.tail()) <= LAST
    assert len(text.prompt) <= MAX_LINE
    assert max(map(len, text.tail())) <= MAX_LINE


@pytest.mark.parametrize("data", [b"\xff\xfe\xfd\n", b"\xc3\n", "é\n".encode()])
def test_bytes_that_are_no_utf_8_are_replaced(data: bytes) -> None:
    assert len(lines_of(data)) == 1
