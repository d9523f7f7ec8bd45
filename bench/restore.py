# SPDX-License-Identifier: Apache-2.0
"""Rows 6 and 7: a restore into a fresh raw volume, of a Full and of a long chain.

Row 6 is a Full in PTCOMM packets of 64 KiB, as bacula-fd gives it back, beside nbdcopy
of the same disk, both into the same qemu-nbd, started as the product starts it.

Row 7 is a chain of a Full and 30 increments of 4 GiB that rewrite the same 1 GiB. Bytes
written are those of qemu-nbd's own write calls, as the kernel counts them; the time is
compared with reading the stream once, by ``cat``, and writing the final image once, by
nbdcopy.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import paths
from bench.harness import (
    NOTHING,
    Plumbing,
    Row,
    bounded,
    compare,
    full_image,
    run,
    say,
    serving,
    throughput,
    workspace,
)
from bench.images import exported, url
from pveplug.diskstream import DiskStream, RateLimit
from pveplug.extents import Kind
from pveplug.images.chain import backing_name
from pveplug.images.clusters import ClusterMap
from pveplug.images.digests import DigestWriter
from pveplug.images.manifest import DiskEntry
from pveplug.images.qcow2_writer import Metadata, Qcow2StreamWriter
from pveplug.images.restore_object import encode_objects
from pveplug.nbd.client import UnixAddress, connect
from pveplug.units import CLUSTER, GiB, MiB

MEMBERS = 30
KEY = "scsi0"


@dataclass(frozen=True)
class Stored:
    """A chain as Bacula keeps it: restore objects, and what comes out of the pipe."""

    objects: Path
    feed: tuple[Path, ...]


def measure(*, small: bool, rounds: int) -> list[Row]:
    """Return the rows; ``small`` is for seeing that it runs."""
    size = 256 * MiB if small else 2 * GiB
    with workspace(3 * size) as base:
        rows = full(base, size, rounds)
    size = 256 * MiB if small else 4 * GiB
    with workspace(size * 13 // 4) as base:
        return rows + chain(base, size, rounds)


def full(base: Path, size: int, rounds: int) -> list[Row]:
    """Return row 6."""
    image = base / "disk.raw"
    full_image(image, size)
    stored = asyncio.run(stored_chain(base, image, members=0))
    say(f"raw image, {size >> 20} MiB, no holes, in memory")
    with Volume(base / "volume.raw", size) as target:
        sides = compare(
            lambda: ours(stored, target.socket),
            lambda: ["nbdcopy", str(image), url(target.socket)],
            rounds=rounds,
            between=target.renew,
            fresh=size,
            plumbing=(Plumbing(feed=stored.feed), NOTHING),
        )
        target.must_equal(image)
    name = "restore from PTCOMM to a raw volume"
    return [throughput("6", name, size, sides, at_least=1.0)]


def chain(base: Path, size: int, rounds: int) -> list[Row]:
    """Return row 7."""
    image = base / "disk.raw"
    full_image(image, size)
    stored = asyncio.run(stored_chain(base, image, members=MEMBERS))
    total = sum(path.stat().st_size for path in stored.feed)
    say(f"{size >> 20} MiB, {MEMBERS} increments of a quarter: {total >> 20} MiB")
    files = " ".join(map(str, stored.feed))
    with Volume(base / "volume.raw", size) as target:
        floor = (
            f"cat {files} | cat >/dev/null && nbdcopy {image} '{url(target.socket)}'"
        )
        sides = compare(
            lambda: ours(stored, target.socket),
            lambda: ["sh", "-c", floor],
            rounds=rounds,
            between=target.renew,
            fresh=size,
            plumbing=(Plumbing(feed=stored.feed), NOTHING),
        )
        target.renew()
        before = target.written
        run(ours(stored, target.socket), (), Plumbing(feed=stored.feed))
        amount = (target.written - before) / target.allocated
        target.must_equal(image)
    mine, his = sides
    say(f"ours {mine.spread}, read once and write once {his.spread}")
    cpu = sorted(mine.cpu)[len(mine.cpu) // 2] * GiB / total
    return [
        bounded("7", f"chain of {MEMBERS}, written / allocated", amount, 1.02),
        bounded(
            "7",
            f"chain of {MEMBERS}, time / (read once + write once)",
            mine.median / his.median,
            1.15,
            mb_s=total / 1e6 / mine.median,
            yardstick_mb_s=total / 1e6 / his.median,
            cpu_s_per_gib=cpu,
            rss_mib=mine.rss_mib,
        ),
    ]


def ours(stored: Stored, socket: Path) -> list[str]:
    argv = [sys.executable, "-m", "bench.sides", "restore"]
    return [*argv, str(stored.objects), str(socket)]


class Volume:
    """A fresh raw volume behind qemu-nbd, as the product serves it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.socket = path.with_suffix(".vol")
        argv = ["qemu-nbd", "-t", "-e", "4", "--cache=writeback", "-k"]
        argv += [str(self.socket), "--discard=unmap", "--detect-zeroes=unmap"]
        spelled = f"driver=raw,file.driver=file,file.filename={path}"
        self.renew()
        self._server = serving([*argv, "--image-opts", spelled], self.socket)

    def __enter__(self) -> Volume:
        self._pid = self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(None, None, None)

    def renew(self) -> None:
        """Let it have no byte any more, under the server."""
        with self.path.open("wb") as file:
            file.truncate(self.size)

    @property
    def written(self) -> int:
        """Bytes the server has written to files so far."""
        lines = Path(f"/proc/{self._pid}/io").read_text().splitlines()
        return int(next(t for t in lines if t.startswith("wchar")).split()[1])

    @property
    def allocated(self) -> int:
        return self.path.stat().st_blocks * 512

    def must_equal(self, image: Path) -> None:
        run(["cmp", str(image), str(self.path)])


async def stored_chain(base: Path, image: Path, *, members: int) -> Stored:
    """Make the images of a Full, and of increments that have its first quarter anew."""
    size = image.stat().st_size
    changed = ClusterMap(size)
    changed.mark_range(0, size // 4, Kind.DATA)
    feed: list[Path] = []
    blobs: list[bytes] = []
    parent: str | None = None
    roots: list[str] = []
    with exported(image, "raw", bitmap=False) as socket:
        for number in range(1 + members):
            job = f"bench.2026-01-01_00.00.00_{number:02}"
            clusters = changed if number else ClusterMap.all_data(size)
            opening = base / f"{number:02}.opening"
            rest = base / ("increment.rest" if number else "full.rest")
            if number < 2:
                roots.append(await _stored(socket, clusters, parent, opening, rest))
            else:
                await _opening(clusters, parent, opening)
            feed += [opening, rest]
            entry = DiskEntry(
                key=KEY,
                size=size,
                backing=backing_name(parent, KEY) if parent else None,
                digest_root=roots[-1],
                data_bytes=clusters.data_bytes,
            )
            made = paths.manifest(job, entry, parent)
            objects = encode_objects(made, {KEY: clusters})
            blobs += [content for _, content in objects]
            parent = job
    packed = base / "objects"
    packed.write_bytes(pickle.dumps(blobs))
    return Stored(packed, tuple(feed))


async def _stored(
    socket: Path, clusters: ClusterMap, parent: str | None, opening: Path, rest: Path
) -> str:
    """Store an image in two files; return its digests' root."""
    digest = DigestWriter(clusters, overlay=parent is not None)
    async with await connect(UnixAddress(str(socket))) as client:
        stream = DiskStream(
            client,
            clusters,
            backing=backing_name(parent, KEY) if parent else None,
            trim=False,
            limit=RateLimit(0),
            digest=digest,
        )
        sink = paths.StoredFile(opening, rest)
        await stream.send(sink)
        sink.close()
        await stream.aclose()
    return digest.finish()[1]


async def _opening(clusters: ClusterMap, parent: str | None, opening: Path) -> None:
    """Store only the first cluster of an image."""
    backing = backing_name(parent, KEY) if parent else None
    sink = paths.StoredFile(opening, Path("/dev/null"))
    for piece in Qcow2StreamWriter(clusters, backing=backing).pieces():
        if piece.file_offset >= CLUSTER or not isinstance(piece, Metadata):
            break
        await sink.write(piece.file_offset, piece.data)
    sink.close()
