# SPDX-License-Identifier: Apache-2.0
"""What fuzzing has found interesting is read again: fuzz/corpus, see fuzz/README.md."""

from __future__ import annotations

import contextlib

import pytest

from fuzz.images import CORPUS
from pveplug.errors import IntegrityError
from pveplug.images import vhdx_log, vhdx_wire
from pveplug.images.detect import Format
from tests.support import edits


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
