#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The backend of the lab's stand-in for a sister plug-in: streams files into Bacula.

Its plug-in string is ``podheitor-vsphere: scenario=/path/to/scenario.json``, whose
entries are ``{"file": "/@vsphere/web01/web01.ovf", "path": "/a/real/file"}``. With
``"cut": n`` only n bytes come although more are announced, with ``"flip": [n]`` byte n
is another one, with ``"size": n`` that is what is announced.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import ptcomm_backend  # beside this file

FRAME = 500_000


class Sister(ptcomm_backend.Backend):
    """A backend that has files to give."""

    def send_file(self, entry: dict[str, Any], *, data: bool) -> None:
        found = os.stat(entry["path"])
        size = entry.get("size", found.st_size)
        when = int(found.st_mtime)
        self.command(f"FNAME:{entry['file']}")
        self.command(f"STAT:F {size} 0 0 100640 1")
        self.command(f"TSTAMP:{when} {when} {when}")
        self.end()
        if not data:
            return
        left, flip = entry.get("cut", found.st_size), entry.get("flip", ())
        self.command("DATA")
        with open(entry["path"], "rb") as file:
            at = 0
            while left and (piece := file.read(min(FRAME, left))):
                changed = bytearray(piece)
                for place in flip:
                    if at <= place < at + len(piece):
                        changed[place - at] ^= 0x55
                ptcomm_backend.write(ptcomm_backend.packet("D", bytes(changed)))
                left -= len(piece)
                at += len(piece)
        self.end()


if __name__ == "__main__":
    if len(sys.argv) == 1:  # with --cleanup there is nothing to do
        Sister().run()
