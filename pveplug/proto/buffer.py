# SPDX-License-Identifier: Apache-2.0
"""A bounded receive buffer that is filled in place and read without copying.

::

    0        start           end                 capacity
    |  free  |  unread bytes  |  space for reads  |

Bytes are received into :meth:`space`, taken from the front by :meth:`take`. What was
taken last stays where it is until :meth:`release`: a reader callback may keep filling
the space behind it, and only :meth:`make_room` moves bytes.
"""

from __future__ import annotations


class ReceiveBuffer:
    """One reused ``bytearray`` of ``capacity`` bytes."""

    __slots__ = ("_end", "_held", "_start", "_view")

    def __init__(self, capacity: int) -> None:
        self._view = memoryview(bytearray(capacity))
        self._start = 0
        self._end = 0
        self._held = False

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def capacity(self) -> int:
        return len(self._view)

    @property
    def held(self) -> bool:
        """Whether somebody may still look at what was taken last."""
        return self._held

    def space(self) -> memoryview:
        """Where the next received bytes go; empty when the buffer is full."""
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """Say that ``count`` bytes of :meth:`space` were received."""
        if not 0 <= count <= len(self._view) - self._end:
            raise ValueError(f"{count} bytes do not fit into the space that was given")
        self._end += count

    def peek(self, count: int) -> memoryview:
        """The first unread bytes, at most ``count``."""
        return self._view[self._start : min(self._start + count, self._end)]

    def skip(self, count: int) -> None:
        """Drop ``count`` unread bytes."""
        if not 0 <= count <= len(self):
            raise ValueError(f"cannot skip {count} of {len(self)} bytes")
        self._start += count

    def take(self, count: int) -> memoryview:
        """Remove ``count`` bytes from the front; valid until :meth:`release`."""
        taken = self.peek(count)
        self.skip(count)
        self._held = True
        return taken

    def release(self) -> None:
        """The bytes taken last aren't looked at any more."""
        self._held = False

    def make_room(self, wanted: int, comfortable: int = 0) -> None:
        """Move the unread bytes to the front when ``wanted`` bytes wouldn't fit.

        Args:
            wanted: the number of bytes that must fit, counted from the first unread.
            comfortable: also move when less than this is left to receive into.

        Nothing moves while the bytes taken last are held.
        """
        if wanted > len(self._view):
            raise ValueError(f"{wanted} bytes can never fit into {len(self._view)}")
        if self._held or not self._start:
            return
        if self._start == self._end:
            self._start = self._end = 0
        elif (
            self._start + wanted > len(self._view)
            or len(self._view) - self._end < comfortable
        ):
            count = len(self)
            self._view[:count] = self._view[self._start : self._end]
            self._start, self._end = 0, count
