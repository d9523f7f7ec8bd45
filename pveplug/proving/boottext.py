# SPDX-License-Identifier: Apache-2.0
"""Texts of firmware, boot loaders and kernels that say how a boot goes.

Only what is an end counts as a failure: OVMF says "failed to load Boot0001" of each
entry and goes on, so that isn't in the table; "No bootable option" is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_FAILURES: Final[tuple[tuple[str, str], ...]] = (
    # firmware
    (r"No bootable device\.", "the firmware finds no bootable device"),
    (r"No bootable option or device was found", "UEFI finds no bootable device"),
    (r"UEFI Interactive Shell v\d", "UEFI finds nothing to boot and starts its shell"),
    (r"^\s*Shell> ", "UEFI finds nothing to boot and starts its shell"),
    (r"No bootable medium found", "the firmware finds no bootable medium"),
    (r"Reboot and Select proper Boot device", "the firmware finds no bootable device"),
    (r"FATAL: INT18: BOOT FAILURE", "the firmware finds nothing to boot"),
    # boot sectors
    (r"Missing operating system", "the boot sector finds no operating system"),
    (r"Operating [Ss]ystem not found", "the boot sector finds no operating system"),
    (r"Error loading operating system", "the boot sector cannot load what it starts"),
    (r"Invalid partition table", "the partition table is invalid"),
    (r"A disk read error occurred", "the boot sector cannot read the disk"),
    (r"(?:BOOTMGR|NTLDR) is (?:missing|compressed)", "Windows' boot manager is lost"),
    (r"Windows failed to start", "Windows' boot manager gives up"),
    (r"Your (?:PC|device) (?:needs to be|couldn't be) repaired", "Windows gives up"),
    # GRUB and friends
    (r"^\s*grub(?: rescue)?> ", "GRUB waits at its prompt"),
    (r"Entering rescue mode\.\.\.", "GRUB cannot find its files"),
    (r"Minimal BASH-like line editing is supported", "GRUB waits at its prompt"),
    (r"^\s*iPXE> ", "iPXE waits at its prompt"),
    (r"No Operating System found|Boot Failed\. EFI", "no operating system is found"),
    (r"Could not find kernel image", "the boot loader finds no kernel"),
    # Linux
    (r"Kernel panic - not syncing", "the kernel panics"),
    (r"VFS: (?:Unable to mount root|Cannot open root device)", "there is no root disk"),
    (r"Dropping to a shell!", "the root file system isn't found"),
    (r"^\s*\(initramfs\) ", "the root file system isn't found"),
    (r"^\s*dracut:/# ", "the root file system isn't found"),
    (r"You are in (?:emergency|rescue) mode", "the system boots to emergency mode"),
    (r"Give root password for maintenance", "the system boots to emergency mode"),
    (
        r"Press Enter for (?:emergency|maintenance)",
        "the system boots to emergency mode",
    ),
    (r"Cannot open access to console, the root account is locked", "emergency mode"),
    (r"UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY", "a file system is damaged"),
    # the BSDs
    (r"^\s*mountroot> ", "the root file system isn't found"),
    (r"^\s*(?:db|ddb\{\d+\})> ", "the kernel is in its debugger"),
)
_COMPILED: Final = tuple((re.compile(text), why) for text, why in _FAILURES)
_NOT_THE_SYSTEMS: Final = re.compile(
    r"Guest has not initialized the display"
    r"|Display output is not active"
    r"|Loading (?:initial ramdisk|Linux )"
    r"|Booting from (?:Hard Disk|DVD|CD|ROM|Floppy)"
    r"|GRUB loading|Welcome to GRUB|Booting `"
    r"|Begin: (?:Running|Waiting)|[Ww]aiting for root|A start job is running"
    r"|Decompressing Linux|Booting the kernel|KASLR disabled|EFI stub:"
    r"|SeaBIOS \(version"
)
"""Last words on a screen whose system has drawn nothing yet, or still waits."""
MAX_LINE: Final = 500
"""Characters of a line that are looked at."""


def failure_in(line: str) -> str | None:
    """Return why this line means that the boot has failed, with its words; or None."""
    line = line[:MAX_LINE]
    for pattern, why in _COMPILED:
        if pattern.search(line):
            return f'{why}: "{" ".join(line.split())[:120]}"'
    return None


def is_left_over(lines: Sequence[str]) -> bool:
    """Whether the last words on a screen are those of what came before the system."""
    for line in reversed(lines):
        if line.strip("\ufffd \t\n"):
            return _NOT_THE_SYSTEMS.search(line[:MAX_LINE]) is not None
    return False
