# SPDX-License-Identifier: Apache-2.0
"""What all fuzzers of image readers share; each format has its own script.

An input is an image, or edits on a good one: tests/support/edits.py. Every input must
give the documented error or an image whose events tile its disk; anything else, a
minute without an answer, or memory beyond the limit is a finding.
"""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def fuzz(name: str) -> None:
    """Fuzz one format's reader; arguments are libFuzzer's."""
    import atheris  # from an environment of the fuzzer's own: it isn't a dependency

    with atheris.instrument_imports(include=["pveplug.images"]):
        from pveplug.errors import IntegrityError
        from pveplug.images.detect import Format
        from tests.support import edits

    kind = Format(name)
    if kind is Format.VHDX:
        believe_checksums()

    def one(data: bytes) -> None:
        try:
            if kind is Format.VMDK_DESCRIPTOR:
                edits.run_set(edits.set_of(data))
            else:
                edits.run(kind, edits.image_of(kind, data))
        except IntegrityError:
            return

    corpus = CORPUS / name.replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    good = 1 if kind is Format.VMDK_DESCRIPTOR else len(edits.bases(kind))
    for number in range(good):
        (corpus / f"base{number + 1}").write_bytes(bytes([number + 1]))
    argv = [sys.argv[0], "-max_len=4096", "-timeout=60", *sys.argv[1:]]
    argv.append(str(corpus))  # new inputs go into the first directory
    atheris.Setup(argv, one)
    atheris.Fuzz()


def believe_checksums() -> None:
    """Take every CRC-32C for right: else nearly all edits would end there."""
    from pveplug.images import vhdx_log, vhdx_wire

    def stored(data: bytes, at: int) -> int:
        return int.from_bytes(data[at : at + 4], "little")

    vhdx_wire.sealed = stored  # type: ignore[assignment]
    vhdx_log.sealed = stored  # type: ignore[assignment]
