# SPDX-License-Identifier: Apache-2.0
"""The tiny guest of ``tests/lab/guest``: its files, and what its programs write."""

from __future__ import annotations

from typing import Final

from tests.support.requires import GUEST

KERNEL: Final = GUEST / "vmlinuz"
INITRD: Final = GUEST / "initrd.img"
BOOT_DISK: Final = GUEST / "boot.raw"
"""64 MiB, MBR; boots by BIOS. Copy it, never write to it."""
EFI_DISK: Final = GUEST / "boot-efi.raw"
"""96 MiB, GPT; boots by UEFI. Copy it, never write to it."""
ROOT_LABEL: Final = "TGROOT"

BLOCK: Final = 4096


def pattern(seed: str, block: int) -> bytes:
    """Return the 4 KiB that ``tg-write`` and ``tg-writer`` put into block ``block``."""
    line = f"SEED {seed[:12]:<12} BLK {block:012d} ".encode()
    return (line.ljust(63, b".") + b"\n") * (BLOCK // 64)
