# SPDX-License-Identifier: Apache-2.0
"""A bconsole that plays a script: ``scripted_bconsole.py SCRIPT -n -c FILE``.

SCRIPT is JSON: ``log``, a file that takes the lines of each console and its process id;
``answers``, a list of [pattern, [answer, …]]. The first pattern that the first line
matches answers; of several answers each is given once, the last one for ever. An answer
is text; "hang" reads on and never answers; "silent" ends at once, without a Director.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

GREETING = (
    "Connecting to Director dir:9101\n"
    "1000 OK: 10002 lab-dir Version: 15.0.3 (25 March 2025)\n"
    "Enter a period to cancel a command.\n"
)


def program(folder: Path, answers: list[tuple[str, list[str]]]) -> str:
    """Write the script and a program that plays it; return the program's path."""
    script = folder / "script.json"
    script.write_text(json.dumps({"log": str(folder / "said"), "answers": answers}))
    path = folder / "bconsole"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {script} "$@"\n')
    path.chmod(0o755)
    return str(path)


def said(folder: Path) -> list[list[str]]:
    """Return the lines of each console there was."""
    path = folder / "said"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["lines"] for line in lines]


def pids(folder: Path) -> list[int]:
    """Return the process ids of the consoles there were."""
    lines = (folder / "said").read_text().splitlines()
    return [json.loads(line)["pid"] for line in lines]


def main() -> None:
    script = json.loads(Path(sys.argv[1]).read_text())
    log = Path(script["log"])
    before = said(log.parent)
    lines = sys.stdin.read().splitlines()
    with log.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "lines": lines}) + "\n")
    for pattern, answers in script["answers"]:
        if re.match(pattern, lines[0]):
            times = sum(bool(re.match(pattern, past[0])) for past in before)
            answer = answers[min(times, len(answers) - 1)]
            break
    else:
        answer = f"{lines[0].split()[0]}: is an invalid command.\n"
    if answer == "hang":
        while True:
            time.sleep(60)
    if answer == "silent":
        sys.stdout.write("Connecting to Director dir:9101\n")
        sys.exit(1)
    sys.stdout.write(GREETING + answer)


if __name__ == "__main__":
    main()
