# SPDX-License-Identifier: Apache-2.0
"""Which storage takes overlays, and what stands in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pveplug.errors import JobError
from pveplug.ir.overlay import CHAINS, backing_name, choose, why_not
from pveplug.ir.record import Record, Recovery
from pveplug.node import Node
from pveplug.proto.pve_values import Storage, parse_storages

GOOD = {
    **{"storage": "local", "type": "dir", "content": "images,iso"},
    **{"enabled": 1, "active": 1, "avail": 1, "total": 2, "used": 1, "shared": 0},
    "format": [{"raw": 1, "qcow2": 1, "vmdk": 1}, "raw"],
}


def storage(**changes: object) -> Storage:
    return parse_storages([{**GOOD, **changes}])[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"type": "nfs"}, None),
        ({"active": 0}, "not active"),
        ({"enabled": 0}, "not active"),
        ({"content": "iso,backup"}, "do not include images"),
        ({"type": "lvmthin"}, "a lvmthin storage can't"),
        ({"type": "btrfs"}, "a btrfs storage can't"),
        ({"format": [{"raw": 1}, "raw"]}, "does not hold qcow2"),
    ],
)
def test_a_storage_that_cannot_hold_overlays_says_why(
    changes: dict[str, object], why: str | None
) -> None:
    found = why_not(storage(**changes), {})
    assert found is None if why is None else why in (found or "")


def test_a_storage_whose_backing_files_pve_rewrites_is_refused() -> None:
    assert CHAINS in (why_not(storage(), {CHAINS: "1"}) or "")
    assert why_not(storage(), {CHAINS: "0"}) is None


def test_the_wanted_storage_is_taken_or_refused_with_the_good_ones() -> None:
    lvm = storage(storage="lvm", type="lvmthin")
    nfs = storage(storage="nfs", type="nfs")
    there = [lvm, nfs, storage()]
    assert choose("nfs", there, {}) is nfs
    for name in ("lvm", "elsewhere"):
        with pytest.raises(JobError) as raised:
            choose(name, there, {})
        assert f"ir_overlay_storage={name}" in str(raised.value)
        assert "name one of local, nfs." in str(raised.value)


def test_without_a_wish_it_is_local_or_the_first() -> None:
    nfs = storage(storage="a", type="nfs")
    assert choose(None, [nfs, storage()], {}).name == "local"
    assert choose(None, [nfs, storage(content="iso")], {}).name == "a"


def test_where_none_can_hold_them_each_says_why() -> None:
    with pytest.raises(JobError) as raised:
        choose(None, [storage(content="iso"), storage(storage="x", active=0)], {})
    assert "local: its content types" in str(raised.value)
    assert "x: it is not active" in str(raised.value)
    assert "give it with ir_overlay_storage" in str(raised.value)


def test_the_backing_file_is_our_export_and_qemu_waits_for_it(tmp_path: Path) -> None:
    node = Node(landing_dir=f"{tmp_path}/l", runtime_dir=f"{tmp_path}/r")
    recovery = Recovery(node, 120)
    record = Record(120, "u", "pve1", "/@proxmox/1", "n.1", "r.1", 1.0, timeout=77)
    name = backing_name(record, recovery, "scsi0")
    assert json.loads(name.removeprefix("json:")) == {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": {"type": "unix", "path": recovery.nbd_socket},
            "export": "scsi0",
            "reconnect-delay": 77,
            "open-timeout": 30,
        },
    }
    record.bind, record.port = "::1", 10809
    server = json.loads(backing_name(record, recovery, "x").removeprefix("json:"))
    assert server["file"]["server"] == {"type": "inet", "host": "::1", "port": "10809"}
