# SPDX-License-Identifier: Apache-2.0
"""What people see of a recovery, and what of it is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pveplug.ir.notes import (
    BEGIN,
    END,
    MAX_DESCRIPTION,
    TAG,
    noted,
    running_note,
    tagged,
    untagged,
    without_note,
)

words = st.text(max_size=60).map(lambda text: text.strip("\n"))


@given(words, words.filter(lambda text: BEGIN not in text and END not in text))
def test_a_note_comes_and_goes_and_its_users_words_stay(own: str, text: str) -> None:
    if BEGIN in own:
        return
    there = noted(own, text)
    assert there.startswith(BEGIN)
    assert text in there
    assert without_note(there) == own


def test_a_new_note_takes_the_place_of_the_old() -> None:
    there = noted(noted("mine", "one"), "two")
    assert there.count(BEGIN) == 1
    assert "one" not in there
    assert without_note(there) == "mine"


def test_words_around_the_note_stay() -> None:
    there = "above\n" + noted("below", "note")
    assert without_note(there) == "above\n\n\nbelow"


def test_a_long_description_is_never_cut() -> None:
    own = "x" * (MAX_DESCRIPTION - 10)
    assert noted(own, running_note(120, "n.1")) == own
    exact = MAX_DESCRIPTION - len(noted("", "note")) - 2
    assert len(noted("x" * exact, "note")) == MAX_DESCRIPTION


def test_a_note_without_its_last_line_takes_nothing_else_with_it() -> None:
    there = noted("mine\n\nand more", running_note(120, "n.1")).replace(END, "")
    assert without_note(there) == "mine\n\nand more"


def test_the_tag_is_there_once_and_the_others_stay() -> None:
    assert tagged("web;db") == f"web;db;{TAG}"
    assert tagged(tagged("web")) == f"web;{TAG}"
    assert tagged("") == TAG
    assert untagged(f"web,{TAG} db") == "web;db"
    assert untagged(TAG) == ""
