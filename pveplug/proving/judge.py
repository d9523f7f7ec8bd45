# SPDX-License-Identifier: Apache-2.0
"""Weigh what is seen of a booting VM, and decide as soon as it can be decided.

Whatever happens is told to the judge with the time it happened, in seconds from the
start of the watch; ``decision`` is None as long as there is something to wait for::

    agent answers ─────────┐
    serial line matches ───┼─► all that is wanted ───────────────► passed
    screen, stable  ───────┘
    known failure text, panic, VM ended, resets, I/O error ──────► failed
    time is up ──────────────────────────────────────────────────► not proven

The screen counts when an operating system's kernel has the machine and is alive
(``processors``), the picture isn't blank, has been the same for ``stable_s``, isn't the
one that firmware and boot loader have left, and bears no words of failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pveplug.proving.boottext import failure_in, is_left_over
from pveplug.proving.picture import Picture
from pveplug.proving.processors import Activity
from pveplug.proving.verdict import Evidence, Found, Outcome, Wanted

MAX_RESETS: Final = 3
"""A guest may restart once or twice (first boot, relabelling); the third is a loop."""
PAUSED_S: Final = 20.0
"""How long a VM may stand still before that is the verdict."""
STUCK_LOOKS: Final = 15
"""Looks in a row at a kernel that is neither idle nor in a program."""

ENDED: Final = {
    "guest-panicked": "the guest panicked",
    "internal-error": "QEMU stopped the VM over an internal error",
    "shutdown": "the guest switched itself off",
    "watchdog": "the VM's watchdog ran out",
}
"""Run states that a VM doesn't leave by itself, and what they mean for the boot."""
_STANDING: Final = {
    "io-error": "the VM stands still: its disk could not be read or written",
    "paused": "the VM stands still: it has been paused",
    "suspended": "the guest has put itself to sleep",
    "prelaunch": "the VM was made but never continued",
}


@dataclass(frozen=True, slots=True)
class Screen:
    """A picture and what can be read on it.

    Attributes:
        lines: as ``screentext.read_text`` returns them.
        text: the same, with broken lines joined.
    """

    picture: Picture
    lines: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the VM's monitor showed.

    Attributes:
        status: QEMU's run state.
        activity: who has the machine; None where that can't be told.
        screen: None where there is no screen.
    """

    status: str
    activity: Activity | None = None
    screen: Screen | None = None


class Judge:
    """Decides about one boot; the texts are those of an operator's report."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.decision: tuple[Outcome, str] | None = None
        self.found: list[Found] = []
        self.resets = 0
        self._last: Look | None = None
        self._left_over: list[Picture] = []
        self._kernel = False
        self._still: list[Picture] = []
        self._still_since = 0.0
        self._alive_while_still = False
        self._standing: tuple[str, float] | None = None
        self._stuck = 0
        self._why_no_screen = "no look at the screen succeeded"

    # --- what happens -----------------------------------------------------------------

    def agent_answered(self, now: float) -> None:
        """The guest agent answered a ping."""
        self._add(Evidence.AGENT, now, "the guest agent answers")

    def serial_matched(self, now: float, line: str) -> None:
        """A line of the serial console matched the pattern."""
        self._add(Evidence.SERIAL, now, f'serial console: "{line.strip()[:200]}"')

    def serial_line(self, line: str) -> None:
        """The serial console showed a line, or a prompt."""
        if why := failure_in(line):
            self._decide(Outcome.FAILED, f"{why} (serial console)")

    def vm_ended(self) -> None:
        """The VM ran, and its process has gone."""
        self._decide(Outcome.FAILED, "the VM ended before its guest was up")

    def cannot_judge(self, reason: str) -> None:
        """Something keeps the evidence from being judged at all."""
        self._decide(Outcome.NOT_PROVEN, reason)

    def no_screen(self, why: str) -> None:
        """A look had no picture."""
        self._why_no_screen = why
        self._still = []

    def looked(self, now: float, look: Look) -> None:
        """A look at the monitor succeeded."""
        if why := ENDED.get(look.status):
            self._decide(Outcome.FAILED, why)
            return
        self._see_standing(now, look.status)
        if look.status != "running":
            return
        self._see_processors(look)
        if look.screen is not None:
            self._see_screen(now, look.screen, look.activity)
        self._last = look

    def time_is_up(self) -> None:
        """``timeout_s`` has passed."""
        has = frozenset(one.kind for one in self.found)
        missing = [k for k in Evidence if k in self.wanted.evidence and k not in has]
        said = "; ".join(self._why_missing(kind) for kind in missing)
        text = f"no evidence within {self.wanted.timeout_s:g} s: {said}"
        if self._last and self._last.activity is Activity.FIRMWARE:
            text += "; no operating system has started"
        elif self._stuck >= STUCK_LOOKS:
            text += "; the kernel looks stuck"
        self._decide(Outcome.NOT_PROVEN, text)

    # --- how it is weighed ------------------------------------------------------------

    def _add(self, kind: Evidence, now: float, what: str) -> None:
        if any(one.kind is kind for one in self.found):
            return
        self.found.append(Found(kind, now, what))
        if self.wanted.is_met(frozenset(one.kind for one in self.found)):
            said = "; ".join(
                f"{one.what} after {one.after_s:.1f} s"
                for one in self.found
                if one.kind in self.wanted.evidence
            )
            self._decide(Outcome.PASSED, said)

    def _decide(self, outcome: Outcome, reason: str) -> None:
        if self.decision is None:
            self.decision = outcome, reason

    def _see_standing(self, now: float, status: str) -> None:
        if status not in _STANDING:
            self._standing = None
        elif self._standing is None or self._standing[0] != status:
            self._standing = status, now
        elif now - self._standing[1] >= PAUSED_S:
            self._decide(Outcome.FAILED, f"{_STANDING[status]} ({status})")

    def _see_processors(self, look: Look) -> None:
        match look.activity:
            case Activity.FIRMWARE:
                if self._kernel:
                    self._restarted()
                if look.screen:
                    self._left_over = [look.screen.picture]
            case Activity.KERNEL | Activity.ALIVE:
                if not self._kernel and look.screen:
                    # What stands there now a boot loader has written after our last
                    # look: "Loading initial ramdisk ...".
                    self._left_over.append(look.screen.picture)
                self._kernel = True
        self._stuck = self._stuck + 1 if look.activity is Activity.KERNEL else 0

    def _restarted(self) -> None:
        self._kernel = False
        self._still = []
        self.resets += 1
        if self.resets >= MAX_RESETS:
            self._decide(
                Outcome.FAILED, f"the guest restarts again and again ({self.resets} x)"
            )

    def _see_screen(
        self, now: float, screen: Screen, activity: Activity | None
    ) -> None:
        for line in screen.text.split("\n"):
            if why := failure_in(line):
                self._decide(Outcome.FAILED, f"{why} (screen)")
                return
        if not self._is_still(screen.picture):
            self._still = [screen.picture]
            self._still_since, self._alive_while_still = now, False
        self._alive_while_still |= activity is Activity.ALIVE
        stable_s = now - self._still_since
        why_not = self._why_not(screen, activity)
        if why_not is None and stable_s < self.wanted.stable_s:
            why_not = "the screen still changes"
        if why_not is not None:
            self._why_no_screen = why_not
            return
        self._add(
            Evidence.SCREEN,
            now,
            f"an operating system's screen was stable for {stable_s:.1f} s",
        )

    def _is_still(self, picture: Picture) -> bool:
        """Whether the screen is as it was, but for a cursor that blinks.

        A cursor is there or not: two pictures. A third one, however little differs, is
        a clock or a counter: "a start job is running for /dev/sdb (12s / 1min 30s)".
        """
        if picture in self._still:
            return True
        if len(self._still) == 1 and picture.is_like(self._still[0]):
            self._still.append(picture)
            return True
        return False

    def _why_not(self, screen: Screen, activity: Activity | None) -> str | None:
        """Return why this screen, however stable, is no evidence; None if it is."""
        if activity is None:
            return "QEMU doesn't tell what the processors do"
        if activity is Activity.FIRMWARE:
            return "the screen is that of firmware or of a boot loader"
        if screen.picture.is_blank():
            return "the screen is blank"
        if not self._alive_while_still:
            return "the kernel is neither idle nor runs a program, as after a panic"
        if is_left_over(screen.lines) or any(
            screen.picture.is_like(one) for one in self._left_over
        ):
            return "the screen still shows what firmware and boot loader left there"
        return None

    def _why_missing(self, kind: Evidence) -> str:
        match kind:
            case Evidence.AGENT:
                return "the guest agent did not answer"
            case Evidence.SERIAL:
                return "the serial console did not show prove_serial"
            case Evidence.SCREEN:
                return self._why_no_screen
