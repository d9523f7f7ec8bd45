# SPDX-License-Identifier: Apache-2.0
"""What a torture run will do: rounds drawn from a seed before anything starts.

Events are dealt from shuffled decks, so that even a short run sees most of them and a
long one sees each about as often as its neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAIN, OTHER = "nightly", "hourly"
"""Two Job resources of the same VM, each with a chain of its own."""

BEFORE = (
    "stop and start", "stay stopped", "reboot", "grow", "move", "snapshot", "rollback",
    "disown", "disown several", "foreign bitmap", "kill qemu",
    "grow", "move", "snapshot", "disown", "disown several",
)  # fmt: skip
"""Between two jobs; what ends all bitmaps is the smaller part."""

DURING = (
    "kill backend", "kill backend", "cancel", "kill sd", "cut nbd", "full scratch",
    "kill qemu", "reboot", "power off", "grow", "other job", "kill fd", "power cut",
)  # fmt: skip
"""While a job runs, at a random instant of it."""

MAY_FAIL = frozenset(DURING) - {"reboot", "other job"}


@dataclass(frozen=True, slots=True)
class Instant:
    """When something happens to a job: at the product's n-th QMP command, or later."""

    command: int | None
    after_s: float

    def __str__(self) -> str:
        if self.command is not None:
            return f"at its QMP command {self.command}"
        return f"after {self.after_s:.2f} s"


@dataclass(frozen=True, slots=True)
class Round:
    """One job, what comes before it and what happens to it."""

    number: int
    job: str
    level: str
    still: bool
    """The guest stands still at the switch, and a stranger copies its disks."""
    before: tuple[str, ...]
    during: str | None
    instant: Instant
    seed: str
    """For the details, which depend on the state of things."""


class _Deck:
    def __init__(self, cards: Sequence[str], rng: random.Random) -> None:
        self._cards, self._rng = cards, rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = list(self._cards)
            self._rng.shuffle(self._left)
        return self._left.pop()


def rounds(seed: int, count: int) -> Iterator[Round]:
    """Yield the rounds of a run; the same for the same seed."""
    rng = random.Random(f"torture {seed}")
    before, during = _Deck(BEFORE, rng), _Deck(DURING, rng)
    for number in range(1, count + 1):
        first = number == 1
        level = rng.choices(
            ("Full", "Incremental", "Differential"), weights=(12, 58, 30)
        )[0]
        amount = rng.choices((0, 1, 2), weights=(50, 38, 12))[0]
        command = rng.randint(1, 60) if rng.random() < 0.5 else None
        yield Round(
            number=number,
            job=OTHER if not first and rng.random() < 0.15 else MAIN,
            level="Full" if first else level,
            still=rng.random() < 0.65,
            before=() if first else tuple(before.deal() for _ in range(amount)),
            during=during.deal() if not first and rng.random() < 0.42 else None,
            instant=Instant(command, rng.uniform(0.2, 2.5)),
            seed=f"{seed}/{number}",
        )
