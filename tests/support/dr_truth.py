# SPDX-License-Identifier: Apache-2.0
"""What is on a replica's disk, now and at each restore point, said by a stranger.

::

    assert content(replica, "ph-7") == source_at_cycle_7
    assert content(replica) == content(source)

Read by qemu-img alone, and only while nobody writes to the image.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.vm import LabVm
from tests.support.truth import run

MIB = 1 << 20


@dataclass(frozen=True)
class Content:
    """What a guest would read: how many bytes, and their SHA-256."""

    size: int
    sha256: str


def content(
    path: Path, snapshot: str | None = None, *, fmt: str = "", size: int | None = None
) -> Content:
    """Return what an image holds, or held at one of its internal snapshots.

    Args:
        path: raw or qcow2; backing files are read through.
        snapshot: the name of an internal snapshot.
        fmt: where the suffix of ``path`` doesn't tell.
        size: of the disk at that time. An older snapshot is read with the size of
            today (as PVE clones it); all beyond ``size`` must be zeroes.
    """
    with flat(path, snapshot, fmt=fmt) as file:
        digest, length = hashlib.sha256(), file.stat().st_size
        size = length if size is None else size
        assert size <= length, f"{path} is {length} bytes long, not {size}"
        with file.open("rb") as stream:
            for at in range(0, size, MIB):
                digest.update(stream.read(min(MIB, size - at)))
            while data := stream.read(MIB):
                assert not any(data), f"{path} has data beyond {size}"
    return Content(size, digest.hexdigest())


def content_sha256(path: Path, snapshot: str | None = None) -> str:
    """Return the SHA-256 of what :func:`content` reads."""
    return content(path, snapshot).sha256


def of_bytes(data: bytes) -> Content:
    """The same of what a test knows by itself."""
    return Content(len(data), hashlib.sha256(data).hexdigest())


@contextmanager
def flat(path: Path, snapshot: str | None = None, *, fmt: str = "") -> Iterator[Path]:
    """Have the content as a raw file for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        target = Path(folder) / "flat"
        at = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
        source = ["-f", fmt or format_of(path), str(path)]
        run("qemu-img", "convert", *at, "-O", "raw", *source, str(target))
        yield target


def format_of(path: Path) -> str:
    return "qcow2" if path.suffix == ".qcow2" else "raw"


def internal_snapshots(path: Path) -> list[str]:
    """Return the names of an image's internal snapshots, oldest first."""
    said = run("qemu-img", "info", "--output=json", "-f", "qcow2", str(path))
    return [entry["name"] for entry in json.loads(said).get("snapshots", [])]


def check_image(path: Path) -> None:
    """Raise unless a qcow2 image and all its snapshots are in order, nothing leaked."""
    run("qemu-img", "check", "-q", "-f", "qcow2", str(path))


def disks(vm: LabVm, snapshot: str | None = None) -> dict[str, Content]:
    """Return what each disk of a stopped VM holds, or held at a PVE snapshot.

    At a snapshot the disks are those of the snapshot's configuration.
    """
    values = vm.conf.snapshots[snapshot] if snapshot else vm.conf.values
    found = {}
    for drive in _drives(values):
        path = vm.node.storage_of(drive[1]).file(drive[1])
        found[drive[0]] = content(path, snapshot)
    return found


def _drives(values: dict[str, str]) -> Iterable[tuple[str, str]]:
    from tests.lab.snapshots import volumes_of

    return ((drive.key, drive.file) for drive in volumes_of(values))


def restore_points(vm: LabVm) -> list[str]:
    """Return the names of a VM's snapshots from the oldest to the newest, by parent.

    Raises:
        AssertionError: they aren't one line that ends at the current state.
    """
    conf = vm.conf
    line, at = [], conf.values.get("parent")
    while at:
        assert at in conf.snapshots, f"VM {vm.vmid}: parent {at} isn't there"
        assert at not in line, f"VM {vm.vmid}: {at} is its own ancestor"
        line.append(at)
        at = conf.snapshots[at].get("parent")
    off = sorted(conf.snapshots.keys() - set(line))
    assert not off, f"VM {vm.vmid}: snapshots off the line: {off}"
    return line[::-1]
