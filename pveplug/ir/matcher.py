# SPDX-License-Identifier: Apache-2.0
"""A process that matches lines against one pattern, so that it can be killed.

Python's regular expressions can take longer than the universe on an innocent line, and
nothing inside a process stops them. Run as ``python -IS matcher.py PATTERN``: each line
on stdin is a JSON list of strings, each answer the index of the first that matches, or
-1. Standard library only, and nothing of this package: it starts in 20 ms.
"""

from __future__ import annotations

import json
import re
import resource
import sys

CPU_S = 30
"""Processor time after which the kernel ends it, should nobody else."""


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    search = re.compile(sys.argv[1]).search
    for request in sys.stdin.buffer:
        texts = json.loads(request)
        found = next((at for at, text in enumerate(texts) if search(text)), -1)
        sys.stdout.write(f"{found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
