# SPDX-License-Identifier: Apache-2.0
"""Who may try again: handshakes that fail, counted by address, with bounded memory."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

MAX_ADDRESSES: Final = 1024
"""Remembered at once; whoever was silent for the longest time is forgotten first."""


@dataclass(slots=True)
class _Record:
    failures: list[float] = field(default_factory=list)
    blocked_until: float = 0.0
    told: bool = False


class Throttle:
    """Blocks an address for ``window_s`` after ``failures`` within ``window_s``."""

    def __init__(self, failures: int = 5, window_s: float = 60.0) -> None:
        self._limit = failures
        self._window_s = window_s
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def blocked(self, address: str, now: float) -> bool:
        """Whether connections of this address are to be dropped."""
        record = self._records.get(_group(address))
        return record is not None and now < record.blocked_until

    def worth_telling(self, address: str) -> bool:
        """Whether this is the first drop since the address was blocked."""
        record = self._records.get(_group(address))
        if record is None or record.told:
            return False
        record.told = True
        return True

    def failed(self, address: str, now: float) -> None:
        """Count a failed handshake."""
        group = _group(address)
        record = self._records.setdefault(group, _Record())
        self._records.move_to_end(group)
        recent = [at for at in record.failures if now - at < self._window_s]
        record.failures = [*recent, now][-self._limit :]
        if len(record.failures) == self._limit:
            record.failures.clear()
            record.blocked_until = now + self._window_s
            record.told = False
        if len(self._records) > MAX_ADDRESSES:
            self._records.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """Forget what failed before."""
        self._records.pop(_group(address), None)

    def __len__(self) -> int:
        return len(self._records)


def _group(address: str) -> str:
    """Return the address, or the /64 of an IPv6 address: one host has all of it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
