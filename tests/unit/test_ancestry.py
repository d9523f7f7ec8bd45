# SPDX-License-Identifier: Apache-2.0
"""What a node remembers of the manifests it sent."""

from __future__ import annotations

import os

import pytest

from pveplug import ancestry
from pveplug.ancestry import recall, remember

VM, CHAIN = "100-1a2b3c4d", "c01234567"


def test_what_was_remembered_is_recalled_by_job_vm_and_chain(tmp_path):
    state = str(tmp_path)
    assert recall(state, VM, CHAIN, "a") is None
    remember(state, VM, CHAIN, "a", "0" * 32)
    remember(state, VM, CHAIN, "b c:d.1", "1" * 32)
    remember(state, VM, CHAIN, "a", "2" * 32)
    assert recall(state, VM, CHAIN, "a") == "2" * 32
    assert recall(state, VM, CHAIN, "b c:d.1") == "1" * 32
    assert recall(state, VM, "c7", "a") is None
    assert recall(state, "101-1a2b3c4d", CHAIN, "a") is None


def test_the_memory_is_bounded_and_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(ancestry, "MOST_JOBS", 3)
    for number in range(5):
        remember(str(tmp_path), VM, CHAIN, f"job{number}", f"{number:032x}")
    known = [recall(str(tmp_path), VM, CHAIN, f"job{n}") for n in range(5)]
    assert known == [None, None, *(f"{n:032x}" for n in (2, 3, 4))]


def test_a_vm_that_nobody_has_backed_up_for_years_is_forgotten(tmp_path):
    remember(str(tmp_path), VM, CHAIN, "a", "0" * 32)
    os.utime(tmp_path / "manifests" / f"{VM}.{CHAIN}", (1, 1))
    remember(str(tmp_path), "101-x", CHAIN, "a", "0" * 32)
    assert [p.name for p in (tmp_path / "manifests").iterdir()] == [f"101-x.{CHAIN}"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"zz  a\n", b"0123 a\n"])
def test_a_damaged_memory_is_none(tmp_path, content):
    remember(str(tmp_path), VM, CHAIN, "a", "0" * 32)
    (tmp_path / "manifests" / f"{VM}.{CHAIN}").write_bytes(content)
    assert recall(str(tmp_path), VM, CHAIN, "a") is None
    remember(str(tmp_path), VM, CHAIN, "a", "3" * 32)
    assert recall(str(tmp_path), VM, CHAIN, "a") == "3" * 32
