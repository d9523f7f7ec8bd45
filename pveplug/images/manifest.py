# SPDX-License-Identifier: Apache-2.0
"""What a backup says of itself: the manifest of one VM in one job, and its paths.

``manifest.json`` lies beside the images and, packed, in the restore objects. It is
strict: an unknown or ill-typed field is refused, and a later version of the format
carries another ``version``. docs/protocols/backup-format.md describes every field.

Since version 2 the text ends with its own digest, so not one of its bits can change
unseen; and it names the digest of its parent's text, so the manifests of a chain are
a hash chain that only grows at its end.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.images.clusters import MAX_SIZE

VERSION: Final = 4
"""2: ends with ``self``; its digests cover zero clusters too. 3: has ``edges``. 4: its
digests are made of those of clusters."""
PREFIX: Final = "/@proxmox"
MAX_JSON: Final = 16 * 1024 * 1024
"""A PVE configuration is at most 1 MiB; more than this is not one of ours."""

MANIFEST_FILE: Final = "manifest.json"
LAYOUT_FILE: Final = "layout.json"
"""The manifest as it is known before the images: without their digests' roots. It comes
first in the stream, for a restore that has to do without the catalogue's objects."""
EDGES_FILE: Final = "edges.bin"
"""Copies of what lies at the ends of the disks, see :mod:`pveplug.images.edges`."""
CONFIG_FILE: Final = "vm.conf"
FIREWALL_FILE: Final = "firewall.fw"

_END: Final = b"\n}\n"
_SELF: Final = re.compile(rb',\n "self": "([0-9a-f]{32})"\n\}\n\Z')
_BACKING: Final = re.compile(r"\.\./([^/\0]+)/([^/\0]+)\Z")


def vm_directory(vmid: int, uuid: str) -> str:
    """Return ``/@proxmox/100-1a2b3c4d``: one directory per VM, whatever its name.

    ``uuid`` is the SMBIOS UUID; a VM without one gets ``100-nouuid``.
    """
    return f"{PREFIX}/{vmid}-{uuid.lower()[:8] or 'nouuid'}"


def job_directory(vmid: int, uuid: str, job: str) -> str:
    """Return the directory of one job's files; ``job`` is Bacula's unique name."""
    if not job or "/" in job or "\0" in job or job in (".", ".."):
        raise IntegrityError(f"job name {job!r} cannot be a directory")
    return f"{vm_directory(vmid, uuid)}/{job}"


def image_file(key: str) -> str:
    """Return the file name of a disk's image: ``scsi0.qcow2``."""
    return f"{key}.qcow2"


def digest_file(key: str) -> str:
    """Return the file name of a disk's digests: ``scsi0.digests``."""
    return f"{key}.digests"


def backing_name(parent_job: str, key: str) -> str:
    """Return what an image calls its parent: ``../JOB/scsi0.qcow2``."""
    return f"../{parent_job}/{image_file(key)}"


def text_digest(text: bytes) -> str:
    """Return what a child's manifest calls its parent's: the text's BLAKE3-128."""
    return blake3(text).hexdigest(16)


def parse_backing(name: str) -> tuple[str, str]:
    """Undo :func:`backing_name`; return the job and the file name.

    Raises:
        IntegrityError: the name points anywhere else than to a sibling job.
    """
    match = _BACKING.match(name)
    if not match or match[1] in (".", ".."):
        raise IntegrityError(f"backing file {name!r} is not the image of another job")
    return match[1], match[2]


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """One disk in one job; sizes in bytes.

    ``backing`` is None when the image stands alone: a Full, or a disk whose changes
    were not known. ``reason`` says why it was read whole, also where it was compared
    with digests and so has a backing file (``mechanism`` then ends in ``+digests``).
    """

    key: str
    size: int
    format: str = ""
    storage: str = ""
    file: str = ""
    backing: str | None = None
    mechanism: str = ""
    reason: str = ""
    data_bytes: int = 0
    zero_bytes: int = 0
    digest_root: str = ""

    @property
    def image(self) -> str:
        """The image's file name."""
        return self.file or image_file(self.key)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One VM in one job.

    Attributes:
        job: Bacula's unique job name; ``parent_job``: that of the job it builds on.
        level: ``F``, ``I`` or ``D`` as Bacula announced it.
        started: seconds since 1970 of the point in time.
        parent_manifest: BLAKE3-128 in hex of the parent's manifest.json, where known.
        config: text of the VM's configuration, current section.
        left_out: disk key -> why it isn't here.
        versions: program -> version, e.g. pveplug, qemu, pve, bacula.
        edges: BLAKE3-128 in hex of edges.bin; empty: the job has none.
    """

    vmid: int
    uuid: str
    vm_name: str
    job: str
    parent_job: str | None
    level: str
    started: int
    node: str
    consistency: str
    config: str
    firewall: str | None = None
    disks: tuple[DiskEntry, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    chain: str = ""
    parent_manifest: str | None = None
    template: bool = False
    edges: str = ""
    version: int = VERSION

    def disk(self, key: str) -> DiskEntry | None:
        """Return the entry of a disk, None if the job didn't have it."""
        return next((disk for disk in self.disks if disk.key == key), None)

    @property
    def directory(self) -> str:
        """Where this job's files are in the backup."""
        return job_directory(self.vmid, self.uuid, self.job)

    @property
    def built_on(self) -> str | None:
        """The job whose manifest ``parent_manifest`` is the digest of.

        The one that the images name as their parent's; Bacula's name for it may be
        another (after a VirtualFull). None: there is none, or they disagree.
        """
        parents = {parse_backing(d.backing)[0] for d in self.disks if d.backing}
        if not parents:
            return self.parent_job
        return parents.pop() if len(parents) == 1 else None

    @property
    def digest(self) -> str:
        """The digest of this manifest's text, by which its children name it."""
        return text_digest(self.to_json())

    def to_json(self) -> bytes:
        """Return the content of manifest.json, the same for the same manifest."""
        values = dataclasses.asdict(self)
        if self.version < 3:
            del values["edges"]
        if self.version < 2:
            return json.dumps(values, indent=1).encode() + b"\n"
        return sealed(values)

    @classmethod
    def from_json(cls, text: bytes | str) -> Manifest:
        """Undo :meth:`to_json`.

        Raises:
            IntegrityError: it is no manifest, a damaged one, or of a later version.
        """
        if len(text) > MAX_JSON:
            raise IntegrityError(f"manifest: {len(text)} bytes are too many")
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        sealed_text = _proves_itself(raw)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"manifest: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise IntegrityError("manifest: not an object")
        version = values.get("version")
        if type(version) is not int or version < 1:
            raise IntegrityError("manifest: without a version")
        if version > VERSION:
            raise IntegrityError(
                f"manifest: version {version}; this pveplug knows up to {VERSION}: "
                "restore with a newer one"
            )
        if version >= 2:
            if not sealed_text:
                raise IntegrityError("manifest: it does not end with its own digest")
            del values["self"]
        if version < 3 and "edges" in values:
            raise IntegrityError(f"manifest: version {version} has no edges")
        entries = values.get("disks", [])
        if not isinstance(entries, list):
            raise IntegrityError("manifest: disks is not a list")
        values["disks"] = tuple(_disk(entry) for entry in entries)
        _check(values, _FIELDS, "manifest")
        made = cls(**values)
        if len({disk.key for disk in made.disks}) != len(made.disks):
            raise IntegrityError("manifest: a disk appears twice")
        if not re.fullmatch(r"([0-9a-f]{32})?", made.edges):
            raise IntegrityError(f"manifest: impossible edges {made.edges!r}")
        if made.vmid < 0 or made.started < 0:
            raise IntegrityError("manifest: negative vmid or time")
        if not re.fullmatch(r"[0-9A-Fa-f-]{0,36}", made.uuid):
            raise IntegrityError(f"manifest: impossible uuid {made.uuid!r}")
        job_directory(made.vmid, made.uuid, made.job)
        return made


def sealed(values: Mapping[str, object]) -> bytes:
    """Return the text of a manifest with these fields, its own digest at the end."""
    body = json.dumps(values, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "self": "%b"' % text_digest(body).encode() + _END


def _proves_itself(text: bytes) -> bool:
    """Whether a manifest's text ends with its own digest; version 1 has none.

    Raises:
        IntegrityError: it ends with another digest.
    """
    found = _SELF.search(text)
    if found and text_digest(text[: found.start()]) != found[1].decode():
        raise IntegrityError(
            "manifest: its text is not what was stored: its own digest differs"
        )
    return found is not None


def _disk(values: object) -> DiskEntry:
    if not isinstance(values, dict):
        raise IntegrityError("manifest: a disk is not an object")
    _check(values, _DISK_FIELDS, "manifest: disk")
    made = DiskEntry(**values)
    if not re.fullmatch(r"[a-z0-9]{1,32}", made.key):
        raise IntegrityError(f"manifest: impossible disk key {made.key!r}")
    if "/" in made.image or made.image in (".", "..") or "\0" in made.image:
        raise IntegrityError(f"manifest: {made.key} has impossible file {made.file!r}")
    if not 0 < made.size <= MAX_SIZE or min(made.data_bytes, made.zero_bytes) < 0:
        raise IntegrityError(f"manifest: {made.key} has impossible sizes")
    if made.backing is not None:
        parse_backing(made.backing)
    return made


def _check(values: dict[str, Any], fields: dict[str, str], what: str) -> None:
    """Compare names and types with those of the dataclass."""
    for key, value in values.items():
        wanted = fields.get(key)
        if wanted is None:
            raise IntegrityError(f"{what}: unknown field {key!r}")
        match wanted:
            case "int":
                good = type(value) is int
            case "bool":
                good = type(value) is bool
            case "str":
                good = isinstance(value, str)
            case "str | None":
                good = value is None or isinstance(value, str)
            case "Mapping[str, str]":
                good = isinstance(value, dict) and all(
                    isinstance(text, str) for text in value.values()
                )
            case _:  # disks, made just before
                good = isinstance(value, tuple)
        if not good:
            raise IntegrityError(f"{what}: {key} must be {wanted}")
    for key in sorted(_REQUIRED & fields.keys() - values.keys()):
        raise IntegrityError(f"{what}: {key} is missing")


_FIELDS: Final = {f.name: str(f.type) for f in dataclasses.fields(Manifest)}
_DISK_FIELDS: Final = {f.name: str(f.type) for f in dataclasses.fields(DiskEntry)}
_REQUIRED: Final = {
    f.name
    for made in (Manifest, DiskEntry)
    for f in dataclasses.fields(made)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
}
