# SPDX-License-Identifier: Apache-2.0
"""Reading QEMU's block graph: which node is a disk, and what is ours in it.

Both layouts of Proxmox VE exist side by side on one node::

    -blockdev (machine >= 10.0)             -drive (older)
    drive-scsi0  throttle   <- top          BlockBackend drive-scsi0
      └ f<hash>  qcow2|raw  <- below          └ #block142 qcow2|raw  <- top = below
          └ e<hash> file                          └ #block012 file

*top* carries volatile segments; *below* is what a filter or a fleecing job goes on, and
carries persistent ones, which only a qcow2 node can store (*image*: below it where a
disk that was moved while it ran still has ``zeroinit`` there). Node
names are never remembered between jobs: a move or a restart changes them. These are
pure functions over the JSON of ``query-block`` and ``query-named-block-nodes``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pveplug.cbt import PREFIX, Bitmap, Tracked
from pveplug.errors import IntegrityError

Json = Mapping[str, Any]

# Drivers that open a file, device or connection: never the node a filter goes on.
PROTOCOLS: Final = frozenset(
    "file host_device host_cdrom rbd iscsi nbd nfs null-co null-aio ssh https".split()
)
# zeroinit: below the format node of a disk that was moved while it ran.
FILTERS: Final = ("throttle", "copy-before-write", "snapshot-access", "zeroinit")
FLASH: Final = ("/machine/system.flash1", "/machine/virt.flash1")
MARKER: Final = PREFIX + "paused"
_NODES: Final = (f"{PREFIX}sc-", f"{PREFIX}cbw-", f"{PREFIX}sa-")
_EXPORT: Final = f"{PREFIX}x-"
_JOB: Final = f"{PREFIX}fl-"


def node_names(key: str) -> tuple[str, str, str]:
    """Return the names of our scratch, filter and snapshot node of a disk."""
    scratch, filter_, access = _NODES
    return scratch + key, filter_ + key, access + key


def export_id(key: str) -> str:
    """Return the id of our NBD export of a disk."""
    return _EXPORT + key


def fleece_job(key: str) -> str:
    """Return the id of our fleecing job of a disk."""
    return _JOB + key


@dataclass(frozen=True, slots=True)
class DiskNode:
    """One drive of a running VM."""

    key: str
    blockdev: bool
    """Whether it is in the ``-blockdev`` layout (a throttle node on top)."""
    top: str
    below: str
    size: int
    """Virtual size in bytes, as the guest sees it."""
    bitmaps: tuple[Bitmap, ...]
    inserted: Json
    """The drive's entry in ``query-block``."""
    data_at_most: int
    """Bytes of it that can hold data now: what a backup may have to copy aside."""
    image: str = ""
    """The node of the image's format."""
    image_bitmaps: tuple[Bitmap, ...] = ()
    volatile_because: str = ""
    """Why its bitmaps can't be persistent; empty: they can."""

    @property
    def is_flash(self) -> bool:
        """Whether it holds EFI variables; those are always read whole."""
        return self.key.startswith("efidisk")

    @property
    def qom_path(self) -> str:
        """The device whose ``drive`` property names the root node (-drive layout)."""
        return f"/machine/peripheral/{self.key}"

    def tracked(self, home: str) -> Tracked:
        """Return the disk as its segments see it.

        Args:
            home: of its persistent segments; empty: they are to be volatile.
        """
        if self.image == self.top:
            return Tracked(self.size, self.bitmaps, home)
        here, elsewhere = self.bitmaps, self.image_bitmaps
        if home:
            here, elsewhere = elsewhere, here
        return Tracked(self.size, here, home, elsewhere)

    def reopen(self, child: str) -> dict[str, Any]:
        """Return the options that put ``child`` under this disk's throttle node."""
        return throttle_options(self.inserted, child)


def throttle_options(inserted: Json, child: str) -> dict[str, Any]:
    """Return the ``blockdev-reopen`` options that put ``child`` under a throttle node.

    An option left out would be reset for good, so all that PVE sets are repeated
    (``discard`` alone is kept by QEMU when it is left out).
    """
    top = inserted["node-name"]
    cache = inserted.get("cache", {})
    return {
        "driver": "throttle",
        "node-name": top,
        "throttle-group": f"throttle-{top}",
        "file": child,
        "detect-zeroes": inserted.get("detect_zeroes", "off"),
        "cache": {
            "direct": bool(cache.get("direct", False)),
            "no-flush": bool(cache.get("no-flush", False)),
        },
        "read-only": bool(inserted.get("ro", False)),
    }


@dataclass(frozen=True, slots=True)
class Graph:
    """A VM's block layer at one moment."""

    blocks: Sequence[Json]
    nodes: Mapping[str, Json]
    status: str = "running"
    exports: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    iothreads: bool = False
    children: Mapping[str, str] = field(default_factory=dict)
    """node -> its ``file`` child, where QEMU says so (from 10.1, and PVE's 10.0)."""

    @property
    def our_nodes(self) -> list[str]:
        """Names of the nodes that a job of ours has added."""
        return [n for n in self.nodes if n == MARKER or n.startswith(_NODES)]

    @property
    def our_exports(self) -> list[str]:
        """Ids of the exports that a job of ours has added."""
        return [n for n in self.exports if n.startswith(_EXPORT)]

    @property
    def our_jobs(self) -> list[str]:
        """Ids of the fleecing jobs that a job of ours has started."""
        return [n for n in self.jobs if n.startswith(_JOB)]

    @property
    def ours(self) -> list[str]:
        """Names of nodes, exports and jobs that a job of ours has left."""
        return sorted([*self.our_nodes, *self.our_exports, *self.our_jobs])

    @property
    def foreign_exports(self) -> list[str]:
        """Exports of somebody else's NBD server use."""
        return [n for n in self.exports if not n.startswith(_EXPORT)]


def make_graph(
    blocks: Sequence[Json],
    nodes: Sequence[Json],
    *,
    status: str = "running",
    exports: Sequence[Json] = (),
    jobs: Sequence[Json] = (),
    iothreads: Sequence[Json] = (),
) -> Graph:
    """Build a graph from the replies of the query commands."""
    children: dict[str, str] = {}
    for node in (*nodes, *(b["inserted"] for b in blocks if "inserted" in b)):
        for child in node.get("children", ()):
            if child.get("child") == "file" and "node-name" in child:
                children[node["node-name"]] = child["node-name"]
    return Graph(
        blocks=blocks,
        nodes={n["node-name"]: n for n in nodes if n.get("node-name")},
        status=status,
        exports=tuple(e["id"] for e in exports),
        jobs=tuple(j["id"] for j in jobs),
        iothreads=bool(iothreads),
        children=children,
    )


def drive_key(block: Json) -> str | None:
    """Return the config key (``scsi0``) of a ``query-block`` entry, or None."""
    node = block.get("inserted", {}).get("node-name", "")
    for name in (block.get("device", ""), node):
        if name.startswith("drive-"):
            return str(name.removeprefix("drive-"))
    qdev = str(block.get("qdev", ""))
    if qdev in FLASH:
        return "efidisk0"
    qdev = qdev.removesuffix("/virtio-backend").removeprefix("/machine/peripheral/")
    return qdev if qdev and "/" not in qdev else None


def find_disks(graph: Graph, volids: Mapping[str, str]) -> dict[str, DiskNode]:
    """Resolve the drives that ``volids`` (key -> volume id) names.

    A drive that QEMU doesn't have is left out; the caller knows what that means.

    Raises:
        IntegrityError: a drive's nodes can't be told apart, or a filter is on it.
    """
    disks: dict[str, DiskNode] = {}
    for block in graph.blocks:
        key = drive_key(block)
        inserted = block.get("inserted")
        if key not in volids or not inserted or key is None:
            continue
        blockdev = inserted["drv"] == "throttle"
        top = inserted["node-name"]
        size = int(inserted["image"]["virtual-size"])
        if top.startswith(PREFIX) or inserted["drv"] == "copy-before-write":
            raise IntegrityError(
                f"a copy-before-write filter ({top}) is on {key}; another backup is "
                "running, or its left-overs could not be removed"
            )
        below = below_throttle(graph, top, key, volids[key]) if blockdev else top
        image = _below_zeroinit(graph, below)
        node = graph.nodes.get(image, inserted if image == top else {})
        disks[key] = DiskNode(
            key=key,
            blockdev=blockdev,
            top=top,
            below=below,
            size=size,
            bitmaps=_bitmaps(graph.nodes.get(top, inserted)),
            inserted=inserted,
            data_at_most=int(min(_allocated(graph, below), size)),
            image=image,
            image_bitmaps=_bitmaps(node),
            volatile_because=_volatile_because(node),
        )
    return disks


def _allocated(graph: Graph, name: str) -> float:
    """Return the bytes of an image's file that are not holes; infinity: not known.

    Only a plain file tells: a block device is allocated whole, and what lies in a
    backing file doesn't count here.
    """
    node = graph.nodes.get(name, {})
    image = node.get("image", {})
    plain = any(
        other["drv"] == "file" and other.get("file") == node.get("file")
        for other in graph.nodes.values()
    )
    allocated = image.get("actual-size")
    if not plain or allocated is None or image.get("backing-filename"):
        return float("inf")
    return float(allocated)


def _below_zeroinit(graph: Graph, below: str) -> str:
    child = graph.children.get(below)
    zeroinit = graph.nodes.get(below, {}).get("drv") == "zeroinit"
    return child if zeroinit and child else below


def _volatile_because(node: Json) -> str:
    """Return why a format node can't store bitmaps of ours; empty when it can."""
    if node.get("drv") != "qcow2":
        return f"a {node.get('drv', 'unknown')} image can't hold persistent bitmaps"
    if node.get("ro"):
        return "a read-only image can't hold persistent bitmaps"
    image = node.get("image", {})
    details = image.get("format-specific", {}).get("data", {})
    if details.get("compat") == "0.10":
        return (
            "a qcow2 image of compat 0.10 can't hold persistent bitmaps "
            "(qemu-img amend -o compat=1.1 while the VM is stopped)"
        )
    if details.get("data-file"):
        return "a qcow2 image with a data file isn't trusted with persistent bitmaps"
    return ""


def below_throttle(graph: Graph, top: str, key: str, volid: str) -> str:
    """Return the node below a throttle node, filters of ours looked through.

    Raises:
        IntegrityError: it can't be told; nothing may then be put on this disk.
    """
    child = graph.children.get(top)
    if child and not child.startswith(PREFIX):
        return child
    file = str(graph.nodes.get(top, {}).get("file", ""))
    candidates = [name for name in _images_below(graph, file) if name != top]
    if len(candidates) == 1:
        return candidates[0]
    named = _pve_node(key, volid)
    if named in graph.nodes and (not candidates or named in candidates):
        return named
    raise IntegrityError(
        f"cannot tell which node is below {top} of {key}: "
        f"{', '.join(candidates) or 'none'} would fit"
    )


def image_nodes(graph: Graph, file: str) -> list[str]:
    """Return the format nodes of an image file: not ours, no filters, no protocols."""
    return [
        name
        for name, node in graph.nodes.items()
        if node.get("file") == file
        and file
        and not name.startswith(PREFIX)
        and node["drv"] not in PROTOCOLS
        and node["drv"] not in FILTERS
    ]


def _images_below(graph: Graph, file: str) -> list[str]:
    """Return the format nodes that fit the ``file`` of a throttle node.

    QEMU says either the file's plain name, or ``json:`` with all options, where what
    is below the throttle is the object ``file``.
    """
    below = _options(file).get("file")
    if not isinstance(below, dict):
        return image_nodes(graph, file)
    child = below.get("file")
    plain = child.get("filename", "") if isinstance(child, dict) else ""
    if found := image_nodes(graph, str(plain)):
        return found
    return [
        name
        for node in graph.nodes.values()
        if _options(str(node.get("file", ""))) == below
        for name in image_nodes(graph, str(node["file"]))
        if name == node["node-name"]
    ]


def _options(file: str) -> dict[str, Any]:
    """Return the options in a ``json:`` file name; empty for a plain one."""
    if not file.startswith("json:"):
        return {}
    try:
        options = json.loads(file.removeprefix("json:"))
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}


def _pve_node(key: str, volid: str) -> str:
    """Return the name PVE gives a format node: SHA-256 of drive and volume."""
    text = f"drive={key},volid={volid}"
    return "f" + hashlib.sha256(text.encode()).hexdigest()[:30]


def _bitmaps(node: Json) -> tuple[Bitmap, ...]:
    return tuple(
        Bitmap(
            name=bitmap["name"],
            recording=bool(bitmap.get("recording")),
            busy=bool(bitmap.get("busy")),
            inconsistent=bool(bitmap.get("inconsistent")),
            granularity=int(bitmap["granularity"]),
            count=int(bitmap["count"]),
            persistent=bool(bitmap.get("persistent")),
        )
        for bitmap in node.get("dirty-bitmaps", ())
        if bitmap.get("name")  # filters and jobs have unnamed ones of their own
    )
