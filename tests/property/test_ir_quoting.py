# SPDX-License-Identifier: Apache-2.0
"""Nothing said to bconsole means something else than what was to be said."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import PveplugError
from pveplug.ir.submit import where_values
from pveplug.pluginstring import WHERE_MAX_BYTES, where_string, where_words
from pveplug.proto import bconsole as words
from pveplug.proto.bconsole import RestoreOrder

KEYS = st.from_regex(r"\A[a-z_]{1,20}\Z").filter(
    lambda key: key not in ("mode", "restore_vmid")
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def arguments(line: str) -> list[tuple[str, str]]:
    """Take a console's line apart as Bacula does: blanks, quotes, backslashes, '='."""
    found, word, inside, at = [], "", False, 0
    while at < len(line):
        char = line[at]
        if char == "\\":
            at += 1
            word += line[at : at + 1]
        elif char == '"':
            inside = not inside
        elif char == " " and not inside:
            found.append(word)
            word = ""
        else:
            word += char
        at += 1
    assert not inside, "an open quote"
    pairs = (each.partition("=") for each in [*found, word] if each)
    return [(key, value) for key, _, value in pairs]


@given(TEXT, TEXT, TEXT)
def test_names_arrive_whole_or_are_refused(
    client: str, restore_client: str, restore_job: str
) -> None:
    order = RestoreOrder(
        (1, 2), (("/@proxmox/100-x/j", ("vm.conf",)),), "/@pve/mode=instant",
        client, restore_client, restore_job,
    )  # fmt: skip
    with contextlib.suppress(PveplugError):
        lines = words.restore_lines(order, run=True)
        assert lines[1:] == ("cd /@proxmox/100-x/j/", "mark vm.conf", "done")
        assert arguments(lines[0]) == [
            ("restore", ""),
            ("client", client),
            ("restoreclient", restore_client),
            ("restorejob", restore_job),
            ("where", "/@pve/mode=instant"),
            ("replace", "always"),
            ("jobid", "1,2"),
            ("yes", ""),
        ]
        assert "\n" not in lines[0]


@given(st.integers(100, 999_999_999), st.dictionaries(KEYS, TEXT, max_size=5))
def test_any_options_come_through_where_and_the_console(
    vmid: int, options: dict[str, str]
) -> None:
    values = where_values(vmid, None, options)
    where = where_string(values)
    if len(where) <= WHERE_MAX_BYTES:
        assert where_words(where) == values
        (pair,) = arguments(words.quoted_where(where))
        assert pair == ("where", where)


@given(st.text(max_size=400))
def test_no_answer_breaks_the_reader(text: str) -> None:
    order = RestoreOrder((1,), (("/a/b", ("c",)),), "/@pve", "c", "r", "j")
    with contextlib.suppress(PveplugError):
        words.answer(text)
    with contextlib.suppress(PveplugError):
        words.jobs(text)
    words.log_lines(text)
    words.files(text.split("\n"), "/")
    words.job_ids(text)
    words.running(text, 1)
    assert words.preview_problem(text, order) is not None


@given(st.text("| /@proxmox100-abc\n+", max_size=200), st.data())
def test_a_list_of_files_is_the_same_however_it_is_cut(
    text: str, data: st.DataObject
) -> None:
    lines = text.encode().splitlines(keepends=True)
    cut = data.draw(st.integers(0, len(lines)))
    whole = words.without_other_files(text.encode(), "/@proxmox/100-")
    halves = [
        words.without_other_files(b"".join(part), "/@proxmox/100-")
        for part in (lines[:cut], lines[cut:])
    ]
    assert b"".join(halves) == whole
