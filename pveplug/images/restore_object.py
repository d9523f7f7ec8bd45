# SPDX-License-Identifier: Apache-2.0
"""Restore objects: a manifest and its cluster maps, as Bacula's catalogue keeps them.

All objects of a chain arrive before any data, so a restore knows in advance which job
owns every cluster. They are never the only copy of anything: without them the restore
replays the images in order. Hence the rules: each object proves itself (Bacula 9.6
with SQLite gives back zeroes where an object's stored length is 1 modulo 3; a length
that is a multiple of 3 avoids it), and what is missing or damaged becomes a sentence
for the job log, not an error.

::

    PHRO | version, flags, part, parts, lengths | identity | sections … | BLAKE3 | pad
    section:  kind | name | offset | total | bytes   (a slice of the named thing)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import zstandard
from blake3 import blake3

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.images.clusters import ClusterMap
from pveplug.images.manifest import MAX_JSON, PREFIX, Manifest
from pveplug.units import MiB

OBJECT_BYTES: Final = 900_000
"""Most that one object may have: the FD refuses more than 1,000,000 on some paths."""
MAPS_BYTES: Final = 4 * MiB
"""Most that all maps of one VM in one job may take, packed: they live in the catalogue
and, for a whole chain, in the memory of a restore. A random quarter of 1 TiB packs
into 1.7 MiB, an everyday increment into a few KiB."""

_HEAD: Final = struct.Struct(">4sBBHHHI")
_MAGIC: Final = b"PHRO"
_VERSION: Final = 1
_SECTION: Final = struct.Struct(">BBIII")
_MANIFEST: Final = 1
_MAP: Final = 2
_MAPS_LEFT_OUT: Final = 1
_CHECK: Final = 16
UNCOMPRESSED_BYTES: Final = 999
"""Bacula compresses longer objects; a multiple of 3."""
SMALL_TOTAL: Final = 64 * 1024
_MOST_PARTS: Final = 1000


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is known of one VM in one job before any data.

    Attributes:
        maps: disk key -> packed cluster map; None when they are missing, damaged or
            were too large. Packed, because a chain has many: see :meth:`map`.
        maps_left_out: whether the backup left them out for their size.
    """

    manifest: Manifest
    maps: Mapping[str, bytes] | None = None
    maps_left_out: bool = False

    def map(self, key: str) -> ClusterMap | None:
        """Unpack one disk's map; None if it isn't known.

        Raises:
            IntegrityError: the map is damaged or belongs to a disk of another size.
        """
        if self.maps is None or key not in self.maps:
            return None
        made = ClusterMap.from_bytes(self.maps[key])
        disk = self.manifest.disk(key)
        if disk is None or disk.size != made.size:
            raise IntegrityError(
                f"job {self.manifest.job}: the map of {key} is for a disk of "
                f"{made.size} bytes"
            )
        return made


@dataclass(slots=True)
class _Collected:
    """What has been found of one job."""

    parts: int
    flags: int
    seen: set[int] = field(default_factory=set)
    sections: dict[tuple[int, str], list[tuple[int, int, bytes]]] = field(
        default_factory=dict
    )


def encode_objects(
    manifest: Manifest, maps: Mapping[str, ClusterMap], *, small: bool = False
) -> list[tuple[str, bytes]]:
    """Return the restore objects of one VM in one job, as ``(name, content)``.

    Args:
        small: in pieces that Bacula doesn't compress, as long as they are few. Bacula
            9.6 with SQLite loses what it stores in 1 modulo 3 bytes; what it compresses
            can't be padded from outside.

    Every object has at most 900,000 bytes. Maps are left out altogether when they
    would take more than :data:`MAPS_BYTES`; the restore is then an ordered replay.
    """
    packed = {key: made.to_bytes() for key, made in maps.items()}
    flags = 0
    if sum(map(len, packed.values())) > MAPS_BYTES:
        packed, flags = {}, _MAPS_LEFT_OUT
    text = zstandard.ZstdCompressor(level=9).compress(manifest.to_json())
    things = [(_MANIFEST, "", text)]
    things += [(_MAP, key, content) for key, content in packed.items()]
    identity = _identity(manifest)
    few = sum(len(content) for _, _, content in things) <= SMALL_TOTAL
    most = UNCOMPRESSED_BYTES if small and few else OBJECT_BYTES
    room = most - _HEAD.size - len(identity) - _CHECK - 3
    worth = min(1000, room // 4)
    bodies: list[bytearray] = [bytearray()]
    for kind, name, content in things:
        at, label = 0, name.encode()
        while at < len(content):
            left = room - len(bodies[-1]) - _SECTION.size - len(label)
            if left < min(len(content) - at, worth):
                bodies.append(bytearray())
                continue
            part = content[at : at + left]
            bodies[-1] += _SECTION.pack(kind, len(label), at, len(content), len(part))
            bodies[-1] += label + part
            at += len(part)
    if len(bodies) > _MOST_PARTS:
        raise LocalProtocolError(f"a manifest of {len(text)} packed bytes")
    objects = []
    for number, body in enumerate(bodies, 1):
        head = _HEAD.pack(
            _MAGIC, _VERSION, flags, number, len(bodies), len(identity), len(body)
        )
        content = head + identity + body
        content += blake3(content).digest(_CHECK)
        content += bytes(-len(content) % 3)
        place = manifest.directory.removeprefix(PREFIX)
        objects.append((f"pveplug{place}/{number}of{len(bodies)}", content))
    return objects


def _identity(manifest: Manifest) -> bytes:
    return manifest.directory.encode("utf-8", "surrogatepass")


def decode_objects(blobs: Iterable[bytes]) -> tuple[list[JobRecord], list[str]]:
    """Undo :func:`encode_objects` for the objects of any number of jobs and VMs.

    Returns: one record for each job whose manifest is whole, and one sentence for
    each thing that is missing or damaged. Never raises for what the bytes are.
    """
    problems: list[str] = []
    jobs: dict[bytes, _Collected] = {}
    for blob in blobs:
        try:
            _collect(bytes(blob), jobs)
        except IntegrityError as error:
            problems.append(str(error))
    records = []
    for identity, found in jobs.items():
        name = identity.decode("utf-8", "replace")
        lost = found.parts - len(found.seen)
        if lost:
            problems.append(
                f"{lost} of {found.parts} restore objects of {name} are missing"
            )
        try:
            records.append(_record(identity, name, found, problems))
        except IntegrityError as error:
            problems.append(f"restore object of {name}: {error}")
    return records, problems


def _collect(blob: bytes, jobs: dict[bytes, _Collected]) -> None:
    """Check one object and put its sections to its job's."""
    if not any(blob):
        raise IntegrityError(
            f"a restore object of {len(blob)} bytes holds only zeroes: the catalogue "
            "lost it"
        )
    if len(blob) < _HEAD.size or not blob.startswith(_MAGIC):
        raise IntegrityError(f"a restore object of {len(blob)} bytes is not ours")
    _, version, flags, part, parts, named, length = _HEAD.unpack_from(blob)
    if version != _VERSION:
        raise IntegrityError(f"a restore object has version {version}, not {_VERSION}")
    end = _HEAD.size + named + length
    if end + _CHECK > len(blob):
        raise IntegrityError(
            f"a restore object is cut short: {len(blob)} of {end + _CHECK} bytes"
        )
    if blake3(memoryview(blob)[:end]).digest(_CHECK) != blob[end : end + _CHECK]:
        raise IntegrityError(f"a restore object of {len(blob)} bytes is damaged")
    if not 1 <= part <= parts <= _MOST_PARTS:
        raise IntegrityError(f"a restore object is part {part} of {parts}")
    at = _HEAD.size + named
    sections = []
    while at < end:
        if at + _SECTION.size > end:
            raise IntegrityError("a restore object has a section cut short")
        kind, label, offset, total, size = _SECTION.unpack_from(blob, at)
        at += _SECTION.size
        name = blob[at : at + label].decode("utf-8", "replace")
        at += label
        if at + size > end:
            raise IntegrityError("a restore object has a section cut short")
        sections.append(((kind, name), (offset, total, blob[at : at + size])))
        at += size
    identity = blob[_HEAD.size : _HEAD.size + named]
    found = jobs.setdefault(identity, _Collected(parts, flags))
    if found.parts != parts or found.flags != flags:
        raise IntegrityError(
            f"two sets of restore objects for {identity.decode('utf-8', 'replace')}"
        )
    if part in found.seen:
        return  # Bacula may deliver one twice
    found.seen.add(part)
    for key, slice_ in sections:
        found.sections.setdefault(key, []).append(slice_)


def _joined(slices: list[tuple[int, int, bytes]]) -> bytes | None:
    """Put a thing together from its slices; None if one is missing."""
    whole = b""
    parts = []
    at = 0
    for offset, total, content in sorted(slices, key=lambda item: item[0]):
        if offset != at or total != slices[0][1]:
            return None
        parts.append(content)
        at += len(content)
    whole = b"".join(parts)
    return whole if at == slices[0][1] else None


def _record(
    identity: bytes, name: str, found: _Collected, problems: list[str]
) -> JobRecord:
    text = _joined(found.sections.get((_MANIFEST, ""), [(0, 1, b"")]))
    if text is None:
        raise IntegrityError("the manifest is missing")
    try:
        size = zstandard.get_frame_parameters(text).content_size
        if size > MAX_JSON:
            raise IntegrityError(f"a manifest of {size} bytes")
        content = zstandard.ZstdDecompressor().decompress(text)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"the manifest is damaged ({error})") from error
    manifest = Manifest.from_json(content)
    if _identity(manifest) != identity:
        raise IntegrityError(f"it holds the manifest of {manifest.directory}")
    if found.flags & _MAPS_LEFT_OUT:
        return JobRecord(manifest, None, maps_left_out=True)
    maps: dict[str, bytes] = {}
    for (kind, key), slices in found.sections.items():
        if kind != _MAP:
            continue
        packed = _joined(slices)
        if packed is not None:
            maps[key] = packed
    lost = [disk.key for disk in manifest.disks if disk.key not in maps]
    if lost:
        problems.append(f"{name}: no extent map of {', '.join(lost)}")
    return JobRecord(manifest, maps or None)
