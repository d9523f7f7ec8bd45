# SPDX-License-Identifier: Apache-2.0
"""How hard a backup may read, decided from how long the guest's requests take.

A ladder, a step at a time; the guest's latency says up or down::

    step 0    all requests in flight, other disks read ahead
    step 1-3  4, 2, 1 requests in flight, no reading ahead
    step 4-   the rate that step 3 had, halved at each step, never below 4 MiB/s

Over the budget it goes down at once, then sees for a sample what that did. Up again it
goes after some calm samples; if that was too early, the next time after twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pveplug.units import MiB, human

IN_FLIGHT: Final = 8
LEAST_RATE: Final = 4 * MiB
"""A backup that never ends helps nobody: 1 TiB takes three days."""
PARALLEL_STEPS: Final = 3
CALM: Final = 0.75
"""Of the budget; between this and the budget nothing changes."""
PATIENCE: Final = 5
MOST_PATIENCE: Final = 80


@dataclass(slots=True)
class Pace:
    """The step one VM's reading is at; ``budget_s`` 0: always the first.

    Attributes:
        in_flight: requests a reader may have under way.
        ahead: whether disks that are not yet sent may be read ahead.
        rate: bytes/s, 0 is no limit.
    """

    budget_s: float = 0.0
    in_flight: int = IN_FLIGHT
    ahead: bool = True
    rate: int = 0
    step: int = 0
    samples: int = 0
    over: int = 0
    slowed: int = 0
    worst_s: float = 0.0
    _base: float = 0.0
    _calm: int = 0
    _patience: int = PATIENCE
    _settling: bool = False
    _since_up: int = MOST_PATIENCE

    def sample(self, latency_s: float | None, moved: float) -> bool:
        """Take a sample; whether the pace changed.

        Args:
            latency_s: mean time of the guest's requests; None: it made none.
            moved: bytes/s that were read meanwhile.
        """
        if not self.budget_s:
            return False
        latency = latency_s or 0.0
        self.samples += 1
        self.slowed += self.step > 0
        self.worst_s = max(self.worst_s, latency)
        self._since_up += 1
        settling, self._settling = self._settling, False
        if latency > self.budget_s:
            self.over += 1
            self._calm = 0
            return not settling and self._down(moved)
        if latency >= CALM * self.budget_s:
            self._calm = 0
            return False
        self._calm += 1
        if self._calm < self._patience or not self.step:
            return False
        self._go(self.step - 1)
        self._since_up = 0
        return True

    def _down(self, moved: float) -> bool:
        if self.step >= PARALLEL_STEPS and self.rate == LEAST_RATE:
            return False
        if self._since_up <= self._patience:
            self._patience = min(self._patience * 2, MOST_PATIENCE)
        self._since_up = MOST_PATIENCE
        if self.step == PARALLEL_STEPS:
            self._base = max(moved, LEAST_RATE)
        self._go(self.step + 1)
        return True

    def _go(self, step: int) -> None:
        self.step = step
        self.ahead = step == 0
        self.in_flight = max(IN_FLIGHT >> step, 1)
        self.rate = 0
        if step > PARALLEL_STEPS:
            halved = self._base / 2 ** (step - PARALLEL_STEPS)
            self.rate = max(int(halved), LEAST_RATE)
        self._calm = 0
        self._settling = True

    def __str__(self) -> str:
        text = f"{self.in_flight} requests in flight"
        if self.in_flight == 1:
            text = "1 request in flight"
        return f"{text}, {human(self.rate)}/s" if self.rate else text

    def summary(self) -> str:
        """Return what it came to, for the end of the job."""
        return (
            f"latency budget {self.budget_s * 1000:.0f} ms: the guest's requests were "
            f"over it in {self.over} of {self.samples} samples, at worst "
            f"{self.worst_s * 1000:.0f} ms; reading was slowed in {self.slowed}"
        )
