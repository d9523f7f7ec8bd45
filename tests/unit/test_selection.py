# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import ConfigError
from pveplug.selection import Selection, VmSummary, select, select_disks
from pveplug.values import VmidRange

VMS = [
    VmSummary(102, "db1", "pve1", pool="prod", tags=("gold", "linux")),
    VmSummary(100, "web-1", "pve1", pool="prod"),
    VmSummary(101, "web-2", "pve2", pool="prod", tags=("gold",)),
    VmSummary(110, "golden-image", "pve1", template=True),
    VmSummary(120, "test-1", "pve1", pool="test"),
]


def ids(*numbers):
    return tuple(VmidRange(n, n) for n in numbers)


def chosen(**wanted):
    return [vm.vmid for vm in select(VMS, Selection(**wanted), node="pve1").chosen]


def notes(**wanted):
    return select(VMS, Selection(**wanted), node="pve1").notes


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"vmid": ids(102, 100)}, [100, 102]),
        ({"vmid": (VmidRange(100, 115),)}, [100, 102, 110]),
        ({"name": ("web-*",)}, [100]),
        ({"name": ("db?",), "vmid": ids(120)}, [102, 120]),
        ({"pool": ("prod",)}, [100, 102]),
        ({"tag": ("gold",)}, [102]),
        ({"all": True}, [100, 102, 110, 120]),
        ({"all": True, "exclude": ("test-*", VmidRange(110, 119))}, [100, 102]),
        ({"pool": ("prod", "test"), "exclude": ids(100)}, [102, 120]),
    ],
)
def test_selectors_add_up_and_exclude_wins(wanted, expected):
    assert chosen(**wanted) == expected


def test_what_was_left_out_is_said():
    said = notes(vmid=(VmidRange(500, 600),), pool=("prod",), exclude=("db*",))
    assert said == (
        "no VM has an id from 500-600",
        "left out by exclude: 102 (db1)",
        "left out because another node runs them (pve2): 101 (web-2)",
    )
    assert notes(all=True, exclude=ids(101))[-1] == (
        "templates among them: 110 (golden-image)"
    )


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"vmid": ids(999)}, "VM 999 is not there, or this credential lacks VM.Audit"),
        ({"vmid": ids(999)}, "seen: 100 (web-1), 101 (web-2)"),
        ({"vmid": ids(101)}, "VM 101 (web-2) is on node pve2"),
        (
            {"name": ("nope*",)},
            "no VM to back up matches name=nope*; seen: 100 (web-1)",
        ),
        ({"name": ("web-2",)}, "another node runs them (pve2): 101 (web-2)"),
        ({"vmid": ids(100), "exclude": ids(100)}, "left out by exclude: 100 (web-1)"),
    ],
)
def test_a_selection_that_cannot_be_met_is_refused_with_what_was_seen(wanted, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen(**wanted)


def test_an_empty_cluster_hints_at_the_missing_privilege():
    with pytest.raises(ConfigError, match=re.escape("may lack VM.Audit on /vms")):
        select([], Selection(all=True), node="pve1")
    elsewhere = [VmSummary(101, "web-2", "pve2")]
    with pytest.raises(ConfigError, match="none on node pve1"):
        select(elsewhere, Selection(name=("x",)), node="pve1")


def test_a_long_list_of_what_was_seen_is_cut():
    many = [VmSummary(n, f"vm{n}", "pve1") for n in range(100, 200)]
    with pytest.raises(ConfigError, match="and 88 more"):
        select(many, Selection(name=("nope",)), node="pve1")


@given(
    st.lists(
        st.builds(
            VmSummary,
            st.integers(100, 110),
            st.sampled_from(["a", "b", "ab"]),
            st.sampled_from(["pve1", "pve2"]),
            st.sampled_from(["", "p"]),
        ),
        unique_by=lambda vm: vm.vmid,
    ),
    st.builds(
        Selection,
        name=st.sampled_from([(), ("a*",)]),
        pool=st.sampled_from([(), ("p",)]),
        all=st.booleans(),
        exclude=st.sampled_from([(), ("ab",), (VmidRange(100, 104),)]),
    ),
)
def test_what_is_chosen_is_here_sorted_and_not_excluded(vms, selection):
    try:
        result = select(vms, selection, node="pve1").chosen
    except ConfigError:
        return
    assert result
    assert list(result) == sorted(result, key=lambda vm: vm.vmid)
    assert all(vm.node == "pve1" and vm in vms for vm in result)


CONFIG = {
    "bios": "ovmf",
    "efidisk0": "local:100/vm-100-disk-0.raw,efitype=4m,size=528K",
    "tpmstate0": "local:100/vm-100-disk-1.raw,size=4M,version=v2.0",
    "scsi0": "local-lvm:vm-100-disk-0,iothread=1,size=32G",
    "scsi10": "/dev/disk/by-id/x,size=1G",
    "scsi2": "local-lvm:vm-100-disk-2,backup=0,size=1G",
    "ide0": "local-lvm:vm-100-cloudinit,media=cdrom",
    "ide2": "local:iso/debian.iso,media=cdrom,size=600M",
    "ide3": "none,media=cdrom",
    "unused0": "local-lvm:vm-100-disk-9",
    "scsihw": "virtio-scsi-single",
    "name": "x",
}


def test_disks_with_firmware_state_go_and_the_rest_is_named_with_its_reason():
    result = select_disks(CONFIG, vmid=100)
    assert [d.key for d in result.chosen] == [
        "efidisk0", "scsi0", "scsi10", "tpmstate0"
    ]  # fmt: skip
    assert dict(result.left_out) == {
        "ide0": "is a cloud-init drive; a restore makes it anew",
        "ide2": "is a CD-ROM drive",
        "ide3": "is a CD-ROM drive",
        "scsi2": "has backup=0",
        "unused0": "is not attached to the VM (local-lvm:vm-100-disk-9)",
    }
    assert result.notes == ()


def test_exclude_disk_takes_keys_patterns_and_one_vm_s_disks():
    result = select_disks(CONFIG, ("scsi1*", "200:scsi0", "100:tpm*"), vmid=100)
    assert [d.key for d in result.chosen] == ["efidisk0", "scsi0"]
    assert ("scsi10", "is excluded by exclude_disk=scsi1*") in result.left_out
    result = select_disks(CONFIG, ("sata*",), vmid=100)
    assert result.notes == ("exclude_disk=sata* matches no disk of VM 100",)


def test_efi_variables_stay_out_where_the_vm_does_not_use_them():
    config = {k: v for k, v in CONFIG.items() if k != "bios"}
    assert "efidisk0" in dict(select_disks(config, vmid=100).left_out)


def test_a_vm_without_disks_is_said_to_be_one():
    assert "only its configuration" in select_disks({"name": "x"}, vmid=100).notes[0]
