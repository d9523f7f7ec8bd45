# SPDX-License-Identifier: Apache-2.0
"""What a VM's processors are busy with, by what QEMU's monitor says of them.

A picture can't tell firmware from an operating system: "No bootable device." is as
stable and as little black as a login screen. The processors can. Where the table of
interrupt handlers lies says who owns the machine::

    real mode, or no paging          SeaBIOS, MBR code, GRUB, iPXE, DOS
    IDT in the lower half            UEFI and its shell, GRUB for UEFI, Windows' loader
    IDT in the upper half, paging    the kernel of an operating system: Linux, Windows,
                                     the BSDs keep theirs there, in user mode as well

A kernel that has panicked is told from an idle one by the way it waits: an idle
processor halts with interrupts *on*, or a program is seen in user mode. After a panic
one processor spins in the kernel for ever and the others halt with interrupts *off*.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_STATE: Final = re.compile(
    r"^[ER]IP=[0-9a-f]+ (?:RFL|EFL)=([0-9a-f]{8}) \[[^\]]*\] CPL=([0-3]) .*"
    r"\bSMM=([01]) HLT=([01])",
    re.M,
)
_IDT: Final = re.compile(r"^IDT=\s*([0-9a-f]{8}|[0-9a-f]{16}) [0-9a-f]{8}", re.M)
_CR0: Final = re.compile(r"^CR0=([0-9a-f]{8})", re.M)
_INTERRUPTS: Final = 1 << 9
_PAGING: Final = 1 << 31
MAX_TEXT: Final = 4 << 20
"""Bytes of monitor output that are looked at: over a thousand processors."""


class Activity(enum.Enum):
    """Who has the machine."""

    FIRMWARE = "firmware or boot loader"
    KERNEL = "kernel, neither idle nor in a program"
    ALIVE = "operating system"


@dataclass(frozen=True, slots=True)
class Processor:
    """One virtual processor at one instant.

    Attributes:
        idt: address of the table of interrupt handlers; ``wide``: in 64-bit mode.
        user: a program runs, not the kernel.
        halted: it waits for an interrupt; ``interrupts``: it would take one.
    """

    idt: int
    wide: bool
    paging: bool
    user: bool
    halted: bool
    interrupts: bool
    management: bool = False

    @property
    def in_kernel(self) -> bool:
        """Whether an operating system's kernel owns it."""
        if not self.paging or self.management:
            return False
        return self.idt >= (1 << 63 if self.wide else 1 << 31)

    @property
    def alive(self) -> bool:
        """Whether that kernel runs programs, or waits for something to do."""
        return self.in_kernel and (self.user or (self.halted and self.interrupts))


def parse_processors(text: str) -> tuple[Processor, ...]:
    """Read what the monitor's ``info registers -a`` said.

    Returns: those that could be read; none for a machine that is no x86, or for text
    that is none of QEMU's.
    """
    found = []
    for part in re.split(r"^CPU#\d+", text[:MAX_TEXT].replace("\r", ""), flags=re.M):
        state, idt, cr0 = _STATE.search(part), _IDT.search(part), _CR0.search(part)
        if not (state and idt and cr0):
            continue
        flags, level, management, halted = state.groups()
        found.append(
            Processor(
                idt=int(idt[1], 16),
                wide=len(idt[1]) == 16,
                paging=bool(int(cr0[1], 16) & _PAGING),
                user=level == "3",
                halted=halted == "1",
                interrupts=bool(int(flags, 16) & _INTERRUPTS),
                management=management == "1",
            )
        )
    return tuple(found)


def activity(processors: Iterable[Processor]) -> Activity | None:
    """Say who has the machine; None where no processor could be read.

    One processor decides: the others of a booting machine still wait in firmware.
    """
    seen = tuple(processors)
    if not seen:
        return None
    if any(one.alive for one in seen):
        return Activity.ALIVE
    if any(one.in_kernel for one in seen):
        return Activity.KERNEL
    return Activity.FIRMWARE
