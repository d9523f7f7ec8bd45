# SPDX-License-Identifier: Apache-2.0
"""The text of a serial console: bytes in, clean lines out, bounded in every way."""

from __future__ import annotations

import codecs
import re
from collections import deque
from typing import Final

MAX_LINE: Final = 500
"""Characters; a longer line is cut into several."""
FIRST: Final = 20
LAST: Final = 40
"""Lines that are kept for the report, of the beginning and of the end."""
_MAX_ESCAPE: Final = 256
# Where a terminal would jump to another place, a new line begins: UEFI and GRUB paint
# their screens that way.
_JUMP: Final = re.compile(r"\x1b\[[0-9;]*[ABEFHJdf]|\x1b[DEMc]|\r\n?")
_ESCAPE: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # control sequences: colours
    r"|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # strings: titles
    r"|[ -/]+[0-~]"  # character sets
    r"|[0-Z\\-~])"
)
_UNFINISHED: Final = re.compile(
    r"\x1b(?:|\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]+)\Z|\r\Z"
)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")


class ConsoleText:
    """Turns what a serial console sends into lines of printable text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._line = ""
        self.first: list[str] = []
        self.last: deque[str] = deque(maxlen=LAST)
        self.received = 0
        """Bytes so far."""

    def receive_data(self, data: bytes) -> list[str]:
        """Take what arrived; return the lines it completed, without empty ones."""
        self.received += len(data)
        text = self._held + self._decoder.decode(data)
        self._held = ""
        # Only the end can be unfinished, and what is longer than any escape isn't one.
        if cut := _UNFINISHED.search(text, max(0, len(text) - _MAX_ESCAPE)):
            text, self._held = text[: cut.start()], text[cut.start() :]
        text = _ESCAPE.sub("", _JUMP.sub("\n", text))
        *whole, self._line = (self._line + _CONTROL.sub("", text)).split("\n")
        lines = [piece for line in whole for piece in _pieces(line) if piece.strip()]
        if len(self._line) > MAX_LINE:
            *full, self._line = _pieces(self._line)
            lines += full
        for line in lines:
            self._keep(line)
        return lines

    @property
    def prompt(self) -> str:
        """The line that isn't complete yet: what a prompt looks like."""
        return self._line

    def tail(self) -> tuple[str, ...]:
        """Return the last lines, the incomplete one included."""
        lines = list(self.last)
        if self._line.strip():
            lines.append(self._line)
        return tuple(lines[-LAST:])

    def _keep(self, line: str) -> None:
        if len(self.first) < FIRST:
            self.first.append(line)
        self.last.append(line)


def _pieces(line: str) -> list[str]:
    return [line[at : at + MAX_LINE] for at in range(0, len(line), MAX_LINE)] or [""]
