# SPDX-License-Identifier: Apache-2.0
"""What the fuzzers of foreign VMs' descriptions and of boot disks share.

An input is a file, or edits on a good one: tests/support/description_edits.py. Every
input must give the documented error or a description that survives being written as
a sidecar and planned; a boot disk a finding within the bounds of its reads. Anything
else, five seconds without an answer, or memory beyond the limit is a finding.
"""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def fuzz(name: str) -> None:
    """Fuzz ``description`` or ``boot-disk``; arguments are libFuzzer's."""
    import atheris  # from an environment of the fuzzer's own: it isn't a dependency

    with atheris.instrument_imports(include=["pveplug.describe"]):
        from tests.support import description_edits as edits

    def one(data: bytes) -> None:
        if name == "boot-disk":
            edits.look(edits.edited(data, edits.disks()))
        else:
            edits.describe(edits.edited(data, edits.descriptions()))

    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    good = edits.disks() if name == "boot-disk" else edits.descriptions()
    for number in range(len(good)):
        (corpus / f"base{number + 1}").write_bytes(bytes([number + 1]))
    argv = [sys.argv[0], "-max_len=4096", "-timeout=5", *sys.argv[1:]]
    argv.append(str(corpus))  # new inputs go into the first directory
    atheris.Setup(argv, one)
    atheris.Fuzz()
