# SPDX-License-Identifier: Apache-2.0
"""Which node is a disk: replies of QEMU as they were seen, in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pveplug.blockgraph import (
    Graph,
    drive_key,
    find_disks,
    image_nodes,
    make_graph,
    throttle_options,
)
from pveplug.errors import IntegrityError

DATA = Path(__file__).resolve().parents[3] / "shared/data/pve-qemu-transcripts.jsonl"
PATH = "/var/lib/vz/images/100/vm-100-disk-0.qcow2"
VOLID = "local:100/vm-100-disk-0.qcow2"
RBD = {"driver": "rbd", "pool": "rbd", "image": "vm-100-disk-0", "conf": "/x.conf"}
SIZE = 64 << 20

Node = dict[str, Any]


def node(name: str, drv: str, file: str = PATH, **more: Any) -> Node:
    return {
        "node-name": name,
        "drv": drv,
        "file": file,
        "image": {"virtual-size": SIZE},
        "detect_zeroes": "on",
        "cache": {"direct": True, "no-flush": False, "writeback": True},
        "ro": False,
        **more,
    }


def throttled(below: Any) -> str:
    options = {"throttle-group": "throttle-drive-scsi0", "driver": "throttle"}
    return "json:" + json.dumps({**options, "file": below})


def graph(*nodes: Node, device: str = "", qdev: str = "scsi0") -> Graph:
    """Return a graph whose first node is the drive's."""
    return make_graph([{"device": device, "qdev": qdev, "inserted": nodes[0]}], nodes)


def blockdev(*more: Node, file: str = PATH, **top: Any) -> Graph:
    return graph(node("drive-scsi0", "throttle", file, **top), *more)


def below(found: Graph, volid: str = VOLID) -> str:
    return find_disks(found, {"scsi0": volid})["scsi0"].below


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"device": "drive-scsi0", "qdev": "scsi0"}, "scsi0"),
        ({"device": "", "inserted": node("drive-virtio1", "throttle")}, "virtio1"),
        (
            {"device": "", "qdev": "/machine/peripheral/virtio0/virtio-backend"},
            "virtio0",
        ),
        ({"device": "", "qdev": "/machine/peripheral/sata2"}, "sata2"),
        ({"device": "pflash1", "qdev": "/machine/system.flash1"}, "efidisk0"),
        ({"device": "", "qdev": "/machine/virt.flash1"}, "efidisk0"),
        ({"device": "pflash0", "qdev": "/machine/system.flash0"}, None),
        ({"device": "ide2-cd", "qdev": "/machine/unattached/device[3]"}, None),
        ({}, None),
    ],
)
def test_a_drive_is_known_by_device_node_or_place(block: Node, key: str | None) -> None:
    assert drive_key(block) == key


def test_drive_layout_the_root_node_is_the_disk() -> None:
    found = graph(
        node("#block177", "qcow2"), node("#block008", "file"), device="drive-scsi0"
    )
    disk = find_disks(found, {"scsi0": VOLID})["scsi0"]
    assert (disk.top, disk.below, disk.blockdev) == ("#block177", "#block177", False)
    assert disk.qom_path == "/machine/peripheral/scsi0"


def test_blockdev_layout_children_say_what_is_below() -> None:
    children = [{"child": "file", "node-name": "f-any"}]
    found = blockdev(node("f-any", "qcow2"), node("f-2", "raw"), children=children)
    disk = find_disks(found, {"scsi0": VOLID})["scsi0"]
    assert (disk.top, disk.below, disk.blockdev) == ("drive-scsi0", "f-any", True)
    assert disk.size == SIZE


@pytest.mark.parametrize(
    "file",
    [
        PATH,
        throttled({"driver": "qcow2", "file": {"driver": "file", "filename": PATH}}),
    ],
)
def test_blockdev_layout_without_children_the_file_says_it(file: str) -> None:
    found = blockdev(
        node("f-any", "qcow2"),
        node("e-any", "file"),
        node("f-other", "raw", "/other.raw"),
        file=file,
    )
    assert below(found) == "f-any"


def test_a_ceph_disk_is_told_by_its_options() -> None:
    raw = {"driver": "raw", "file": RBD}
    other = {"driver": "raw", "file": {**RBD, "image": "vm-100-disk-1"}}
    found = blockdev(
        node("f-1", "raw", "json:" + json.dumps(other)),
        node("f-0", "raw", "json:" + json.dumps(raw, sort_keys=True)),
        node("e-0", "rbd", "json:" + json.dumps(RBD)),
        file=throttled(raw),
    )
    assert below(found) == "f-0"


def test_a_moved_disk_has_a_filter_more() -> None:
    found = blockdev(
        node("f-any", "raw"), node("z-any", "zeroinit"), node("e-any", "host_device")
    )
    assert below(found) == "f-any"


def test_left_over_filters_of_ours_are_looked_through() -> None:
    found = blockdev(
        node("ph-cbw-scsi0", "copy-before-write"),
        node("ph-sa-scsi0", "snapshot-access"),
        node("f-any", "qcow2"),
        children=[{"child": "file", "node-name": "ph-cbw-scsi0"}],
    )
    assert below(found) == "f-any"
    assert found.ours == ["ph-cbw-scsi0", "ph-sa-scsi0"]


def test_when_several_nodes_fit_the_one_that_pve_names_is_taken() -> None:
    found = blockdev(node("x", "qcow2"), node("f1", "qcow2"))
    with pytest.raises(IntegrityError, match="x, f1 would fit"):
        below(found)
    from pveplug.blockgraph import _pve_node

    named = _pve_node("scsi0", VOLID)
    assert below(blockdev(node("x", "qcow2"), node(named, "qcow2"))) == named


@pytest.mark.parametrize("file", ["", "json:", "json:[1]", "json:{", throttled(None)])
def test_a_disk_that_cannot_be_told_is_refused(file: str) -> None:
    with pytest.raises(IntegrityError, match="cannot tell which node is below"):
        below(blockdev(node("f-any", "qcow2"), file=file))
    assert image_nodes(blockdev(node("f-any", "qcow2", "")), "") == []


@pytest.mark.parametrize("name", ["ph-cbw-scsi0", "tool-cbw"])
def test_a_filter_on_the_drive_itself_is_refused(name: str) -> None:
    found = graph(node(name, "copy-before-write"), device="drive-scsi0")
    with pytest.raises(IntegrityError, match="another backup is running"):
        find_disks(found, {"scsi0": VOLID})


def test_drives_not_asked_for_or_empty_are_left_out() -> None:
    found = graph(node("#block1", "raw"), device="drive-scsi1")
    assert find_disks(found, {"scsi0": VOLID}) == {}
    empty = make_graph([{"device": "drive-ide2", "qdev": "ide2"}], [])
    assert find_disks(empty, {"ide2": "none"}) == {}


def test_only_named_bitmaps_of_the_top_node_count() -> None:
    bitmap = {"granularity": 65536, "count": 131072, "recording": True}
    top = node(
        "drive-scsi0",
        "throttle",
        **{"dirty-bitmaps": [{**bitmap, "name": "a", "busy": True}, bitmap]},
    )
    inner = node("f-any", "qcow2", **{"dirty-bitmaps": [{**bitmap, "name": "b"}]})
    (found,) = find_disks(graph(top, inner), {"scsi0": VOLID})["scsi0"].bitmaps
    assert (found.name, found.recording, found.busy) == ("a", True, True)
    assert (found.inconsistent, found.count) == (False, 131072)


def test_a_reopen_repeats_what_it_would_reset() -> None:
    top = node("drive-scsi0", "throttle", detect_zeroes="unmap")
    assert throttle_options(top, "ph-cbw-scsi0") == {
        "driver": "throttle",
        "node-name": "drive-scsi0",
        "throttle-group": "throttle-drive-scsi0",
        "file": "ph-cbw-scsi0",
        "detect-zeroes": "unmap",
        "cache": {"direct": True, "no-flush": False},
        "read-only": False,
    }


def test_exports_and_jobs_of_ours_and_of_others_are_told_apart() -> None:
    found = make_graph(
        [],
        [],
        exports=[{"id": "ph-x-scsi0"}, {"id": "drive-x"}],
        jobs=[{"id": "ph-fl-scsi0"}],
    )
    assert found.ours == ["ph-fl-scsi0", "ph-x-scsi0"]
    assert found.foreign_exports == ["drive-x"]


# -- as a real Proxmox VE answered


def recorded(scenario: str, command: str) -> list[Node]:
    for line in DATA.read_text().splitlines():
        step = json.loads(line)
        said = step.get("send")
        if step["scenario"] == scenario and isinstance(said, dict):
            if said.get("execute") == command and "recv" in step:
                return list(step["recv"]["return"])
    raise AssertionError(f"{scenario} has no {command}")


@pytest.mark.optional(reason="the recorded replies are not part of the repository")
@pytest.mark.skipif(not DATA.exists(), reason="no recorded replies here")
@pytest.mark.parametrize("children", [True, False])
@pytest.mark.parametrize(
    ("scenario", "tops", "belows"),
    [
        ("capabilities", ("drive-scsi0", "drive-scsi1"), ("f14746557d", "f4d44046ab")),
        (
            "capabilities-84-layout",
            ("#block177", "#block385"),
            ("#block177", "#block385"),
        ),
    ],
)
def test_recorded_graphs_are_understood(
    scenario: str, tops: tuple[str, str], belows: tuple[str, str], children: bool
) -> None:
    blocks = recorded(scenario, "query-block")
    nodes = recorded(scenario, "query-named-block-nodes")
    if not children:
        for one in (*nodes, *(b["inserted"] for b in blocks if "inserted" in b)):
            one.pop("children", None)
    found = find_disks(make_graph(blocks, nodes), {"scsi0": "a:x", "scsi1": "a:y"})
    assert tuple(d.top for d in found.values()) == tops
    for disk, prefix in zip(found.values(), belows, strict=True):
        assert disk.below.startswith(prefix)
    assert [d.size for d in found.values()] == [64 << 20, 32 << 20]


def image_of(disk_format: str, **more: Any) -> dict[str, Any]:
    details = {"format-specific": {"type": disk_format, "data": more}}
    return {"image": {"virtual-size": SIZE, **details}}


@pytest.mark.parametrize(
    ("below_node", "said"),
    [
        (node("f1", "qcow2", **image_of("qcow2", compat="1.1")), ""),
        (node("f1", "raw"), "a raw image can't hold"),
        (node("f1", "qcow2", **image_of("qcow2", compat="0.10")), "amend -o compat"),
        (node("f1", "qcow2", **image_of("qcow2", **{"data-file": "x"})), "data file"),
        (node("f1", "qcow2", **image_of("qcow2") | {"ro": True}), "read-only"),
    ],
)
def test_a_disk_says_whether_its_image_can_hold_bitmaps(below_node, said):
    for found in (blockdev(below_node), graph(below_node, device="drive-scsi0")):
        disk = find_disks(found, {"scsi0": VOLID})["scsi0"]
        assert disk.image == "f1"
        if said:
            assert said in disk.volatile_because
        else:
            assert disk.volatile_because == ""


def test_persistent_segments_are_on_the_images_node_and_volatile_ones_on_top():
    top = {"dirty-bitmaps": [bits("v")]}
    inner = node("f1", "qcow2", **{"dirty-bitmaps": [bits("p") | {"persistent": True}]})
    disk = find_disks(blockdev(inner, **top), {"scsi0": VOLID})["scsi0"]
    volatile, persistent = disk.tracked(""), disk.tracked("h01234567")
    assert [b.name for b in volatile.bitmaps] == ["v"]
    assert [b.name for b in volatile.elsewhere] == ["p"]
    assert persistent.bitmaps == volatile.elsewhere
    assert persistent.elsewhere == volatile.bitmaps
    assert persistent.bitmaps[0].persistent
    one = graph(inner, device="drive-scsi0")
    both = find_disks(one, {"scsi0": VOLID})["scsi0"].tracked("h01234567")
    assert [b.name for b in both.bitmaps] == ["p"]
    assert both.elsewhere == ()


def test_a_moved_disks_image_is_below_its_zeroinit():
    between = node("z1", "zeroinit", children=[{"child": "file", "node-name": "f1"}])
    top = {"children": [{"child": "file", "node-name": "z1"}]}
    found = blockdev(between, node("f1", "qcow2"), **top)
    disk = find_disks(found, {"scsi0": VOLID})["scsi0"]
    assert (disk.below, disk.image) == ("z1", "f1")


def bits(name: str) -> dict[str, Any]:
    return {"name": name, "recording": True, "granularity": 65536, "count": 0}
