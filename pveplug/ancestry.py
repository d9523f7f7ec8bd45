# SPDX-License-Identifier: Apache-2.0
"""Digests of the manifests that this node has sent, for the jobs that build on them.

One small text file per VM and chain, ``<state_dir>/manifests/<vm>.<chain>``, a line for
each of its newest jobs::

    5f0c…  nightly.2026-11-22_22.35.59_56

The caller holds the VM. What isn't here (the state was lost, the VM came from another
node) is unknown, and the next manifest says so by naming no parent's digest. A job that
failed in the end may be here, too; nobody will build on it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

MOST_JOBS: Final = 400
"""A year of days and its Full; a line has about 70 bytes."""
MOST_AGE_S: Final = 800 * 86400
"""Files of VMs and jobs that were not written for so long go."""

_LINE: Final = re.compile(r"([0-9a-f]{32})  (.+)")


def _path(state_dir: str, vm: str, chain: str) -> Path:
    return Path(state_dir) / "manifests" / f"{vm}.{chain}"


def _read(path: Path) -> dict[str, str]:
    """Return job -> digest, oldest first; nothing where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("ancestry path=%s not read: %s", path, error)
        return {}
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {match[2]: match[1] for match in found if match}


def recall(state_dir: str, vm: str, chain: str, job: str) -> str | None:
    """Return the digest of a job's manifest, None if this node doesn't know it."""
    return _read(_path(state_dir, vm, chain)).get(job)


def remember(state_dir: str, vm: str, chain: str, job: str, digest: str) -> None:
    """Keep the digest of a job's manifest; it is on disk when this returns.

    Args:
        vm: the VM's directory in the backup, ``100-1a2b3c4d``.

    Raises:
        OSError: it can't be written; what was there before is unharmed.
    """
    path = _path(state_dir, vm, chain)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    known = _read(path)
    known.pop(job, None)
    known[job] = digest
    lines = [f"{value}  {name}\n" for name, value in known.items()]
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(lines[-MOST_JOBS:])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    _forget_old(path.parent)


def _forget_old(directory: Path) -> None:
    """Remove the files of what has not been backed up for years."""
    for path in directory.iterdir():
        try:
            if path.stat().st_mtime < time.time() - MOST_AGE_S:
                path.unlink()
        except OSError as error:
            log.warning("ancestry path=%s not removed: %s", path, error)
