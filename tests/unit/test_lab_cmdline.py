# SPDX-License-Identifier: Apache-2.0
"""The lab's QEMU command lines against those real PVE printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cmdline import Context, Volume, node_hash, pve_argv, uses_blockdev
from tests.lab.deviations import Bench, adapt
from tests.lab.vmconfig import Drive, VmConf

DATA = Path(__file__).resolve().parents[3] / "shared/data/pve-golden-cmdlines.json"
CONF = """\
boot: order=scsi0
machine: pc
memory: 512
name: vm
scsi0: local:100/vm-100-disk-0.qcow2,discard=on,iothread=1,size=8G
scsihw: virtio-scsi-single
"""


def resolve(drive: Drive) -> Volume:
    """The storages of the recorded command lines."""
    storage, _, name = drive.file.partition(":")
    form = name.rpartition(".")[2] if "." in name else "raw"
    match storage:
        case "local":
            return Volume(f"/var/lib/vz/images/{name}", form)
        case "nas":
            return Volume(f"/mnt/pve/nas/images/{name}", form, "nfs")
        case "local-lvm":
            return Volume(f"/dev/pve/{name}", "raw", "lvmthin")
        case "tank":
            return Volume(f"/dev/zvol/tank/vm/{name}", "raw", "zfspool")
        case "vg1":
            return Volume(f"/dev/vg1/{name}", "raw", "lvm")
        case "bt":
            folder = name.removesuffix(".raw")
            return Volume(f"/mnt/bt/images/{folder}/disk.raw", "raw", "btrfs")
    return Volume(f"{storage}:{name}", "raw", storage)


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not at hand")
@pytest.mark.optional(reason="the recorded command lines are not in the repository")
@pytest.mark.parametrize(
    ("release", "version", "column"),
    [("8.4", (9, 2), "argv-8.4"), ("9.2", (10, 1), "argv-9.x")],
)
@pytest.mark.parametrize("vmid", ["101", "102", "103", "104", "105"])
def test_command_line_is_the_one_pve_printed(
    vmid: str, release: str, version: tuple[int, int], column: str
) -> None:
    recorded = json.loads(DATA.read_text())["vms"][vmid]
    context = Context(int(vmid), release, version, resolve)
    ours = pve_argv(VmConf.parse(recorded["conf"]), context)
    theirs: list[str] = recorded[column]
    assert len(ours) == len(theirs)
    for mine, real in zip(ours, theirs, strict=True):
        if "rbd" in real:
            continue  # the lab has no Ceph
        assert mine == real


def test_hash_in_node_names_is_of_key_and_volume() -> None:
    drive = Drive("scsi0", "local:101/vm-101-disk-0.qcow2", {})
    assert node_hash(drive) == "9e39446d11c036ec5609fef2b853b3"


@pytest.mark.parametrize(
    ("release", "machine", "modern"),
    [
        ("9.2", "pc", True),
        ("9.2", "q35", True),
        ("9.2", "pc-q35-10.0+pve1", True),
        ("9.2", "pc-i440fx-9.2+pve1", False),
        ("8.4", "pc", False),
    ],
)
def test_layout_follows_the_machine_version(
    release: str, machine: str, modern: bool
) -> None:
    conf = VmConf.parse(CONF.replace("machine: pc", f"machine: {machine}"))
    assert uses_blockdev(conf, Context(100, release, (10, 0), resolve)) is modern


@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-9.2+pve1"])
def test_nothing_of_a_real_node_is_left_in_what_the_lab_runs(machine: str) -> None:
    conf = VmConf.parse(
        CONF.replace("machine: pc", f"machine: {machine}") + "agent: 1\n"
    )
    argv = pve_argv(conf, Context(100, "9.2", (10, 0), resolve, run_dir="/tmp/x"))
    bench = Bench("/usr/bin/qemu", Path("/fw"), Path("/tmp/serial"), direct_io=False)
    text = " ".join(adapt(argv, bench))
    for foreign in ("io_uring", "+pve", "-daemonize", "type=tap", "-vnc", "100.qmp,"):
        assert foreign not in text
    assert "/tmp/x/100.qmp.real," in text
    assert "accel=tcg" in text
    assert '"direct": true' not in text


def test_configuration_survives_parsing_and_writing() -> None:
    text = (
        "#first line\n#second%3A line\n" + CONF + "\n[PENDING]\ncores: 2\ndelete: "
        "net0\n\n[snap1]\nparent: x\nscsi0: local:100/vm-100-disk-0.qcow2\n"
    )
    conf = VmConf.parse(text)
    assert conf.values["description"] == "first line\nsecond: line\n"
    assert conf.pending == {"cores": "2"}
    assert conf.pending_delete == {"net0": 1}
    again = VmConf.parse(conf.text())

    def body(of: VmConf) -> tuple[Any, ...]:
        return of.values, of.pending, of.pending_delete, of.snapshots

    assert body(again) == body(conf)
