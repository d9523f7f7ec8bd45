# SPDX-License-Identifier: Apache-2.0
"""What fuzzing has found interesting is read again: fuzz/corpus, see fuzz/README.md."""

from __future__ import annotations

import contextlib

import pytest

from fuzz.images import CORPUS
from pveplug.errors import IntegrityError
from pveplug.images import vhdx_log, vhdx_wire
from pveplug.images.detect import Format
from tests.support import description_edits, edits


@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.value)
def test_the_corpus_gives_the_documented_error_or_a_disk(kind, monkeypatch):
    def stored(data, at):
        return int.from_bytes(data[at : at + 4], "little")

    monkeypatch.setattr(vhdx_wire, "sealed", stored)
    monkeypatch.setattr(vhdx_log, "sealed", stored)
    inputs = sorted((CORPUS / kind.value.replace(" ", "-")).iterdir())
    assert inputs
    for path in inputs:
        data = path.read_bytes()
        with contextlib.suppress(IntegrityError):
            if kind is Format.VMDK_DESCRIPTOR:
                edits.run_set(edits.set_of(data))
            else:
                edits.run(kind, edits.image_of(kind, data))


def test_the_corpus_of_descriptions_gives_the_documented_error_or_a_plan():
    inputs = sorted((CORPUS / "description").iterdir())
    assert inputs
    for path in inputs:
        good = description_edits.descriptions()
        description_edits.describe(description_edits.edited(path.read_bytes(), good))


def test_the_corpus_of_boot_disks_gives_findings_within_the_bounds():
    inputs = sorted((CORPUS / "boot-disk").iterdir())
    assert inputs
    for path in inputs:
        good = description_edits.disks()
        description_edits.look(description_edits.edited(path.read_bytes(), good))
