# SPDX-License-Identifier: Apache-2.0
"""Who can read which increment: the registry of adapters.

Sister plug-ins store increments in formats of their own, which aren't published. An
adapter for one of them is a reader like the others here, and a function that knows
its first bytes; :data:`ADAPTERS` has those that exist. Until then such an increment
can be converted to the neutral container (docs/protocols/block-delta.md), and one that
nobody knows is refused with what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.blockdelta import MAGIC, BlockDeltaReader
from pveplug.images.stream import StreamReader


@dataclass(frozen=True, slots=True)
class Adapter:
    """Somebody who can read one kind of increment.

    Attributes:
        name: what it reads, for people.
        recognises: whether a file that begins with these bytes is one.
        reader: makes a reader, with the arguments of StreamReader.
    """

    name: str
    recognises: Callable[[bytes], bool]
    reader: Callable[..., StreamReader]


class Registry:
    """The adapters that are known; the container's own is the first."""

    def __init__(self) -> None:
        self._adapters = [
            Adapter(
                "block-delta", lambda head: head.startswith(MAGIC), BlockDeltaReader
            )
        ]

    def register(self, adapter: Adapter) -> None:
        """Add an adapter; its name must be new."""
        if any(adapter.name == known.name for known in self._adapters):
            raise LocalProtocolError(f"an adapter {adapter.name} is there already")
        self._adapters.append(adapter)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters)

    def known(self, first: bytes) -> Adapter | None:
        """Return who can read an increment that begins with ``first``, if anybody."""
        return next((one for one in self._adapters if one.recognises(first)), None)

    def find(self, first: bytes, *, name: str) -> Adapter:
        """Return who can read an increment that begins with ``first``.

        Raises:
            IntegrityError: nobody knows it; the text lists what was found.
        """
        if (adapter := self.known(first)) is not None:
            return adapter
        known = ", ".join(adapter.name for adapter in self._adapters)
        raise IntegrityError(
            f"{name} is an increment of an unknown format: its first bytes are "
            f"{first[:16].hex(' ')} ({_printable(first[:16])}); known are {known}. "
            "Restore the full backup alone, or convert the increment: "
            "docs/protocols/block-delta.md",
            offset=0,
        )


def _printable(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)


ADAPTERS: Final = Registry()
