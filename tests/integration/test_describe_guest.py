# SPDX-License-Identifier: Apache-2.0
"""Disks that a BIOS and UEFI do start are found to be such."""

from __future__ import annotations

import pytest

from pveplug.describe.bootability import inspect
from tests.support.requires import GUEST, requires_file

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("name", "bios", "uefi"), [("boot.raw", True, False), ("boot-efi.raw", False, True)]
)
@requires_file(GUEST / "boot.raw", GUEST / "boot-efi.raw")
def test_the_tiny_guest_is_found_to_start_as_it_does(name, bios, uefi):
    path = GUEST / name
    with path.open("rb") as file:

        def read(offset, length):
            file.seek(offset)
            return file.read(length)

        found = inspect(read, path.stat().st_size)
    assert (found.bios, found.uefi) == (bios, uefi)
