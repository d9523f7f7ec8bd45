# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from pveplug.errors import ConfigError
from pveplug.units import GiB, KiB, MiB
from pveplug.values import Mapped
from pveplug.vmrestore import (
    Target,
    TargetStorage,
    Wishes,
    plan_single_disks,
    transform_for_restore,
)

UUID = "11111111-2222-3333-4444-555555555555"
FRESH = "99999999-8888-4777-8666-555555555555"
CONF = f"""\
#a web server
agent: 1
bios: ovmf
boot: order=scsi0;ide2;net0
cores: 2
cpu: host
efidisk0: local-lvm:vm-100-disk-1,efitype=4m,ms-cert=2023,pre-enrolled-keys=1,size=4M
ide0: local-lvm:vm-100-cloudinit,media=cdrom
ide2: local:iso/debian.iso,media=cdrom,size=600M
machine: q35
memory: 1024
meta: creation-qemu=9.2.0,ctime=1700000000
name: web
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,tag=5
onboot: 1
ostype: l26
protection: 1
scsi0: local-lvm:vm-100-disk-0,cache=writeback,discard=on,iothread=1,serial=abc,size=32G
scsi1: nas:100/vm-100-disk-3.qcow2,backup=0,replicate=0,size=1G
scsihw: virtio-scsi-single
smbios1: uuid={UUID}
tpmstate0: nas:100/vm-100-disk-2.qcow2,size=4M,version=v2.0
unused0: local-lvm:vm-100-disk-9
vmgenid: 0

[before]
cores: 1
"""
SIZES = {"scsi0": 32 * GiB, "efidisk0": 528 * KiB, "tpmstate0": 4 * MiB}
STORAGES = {
    "local-lvm": TargetStorage("local-lvm", ("raw",)),
    "nas": TargetStorage("nas", ("raw", "qcow2", "vmdk")),
}


def plan(conf=CONF, wishes=None, sizes=SIZES, running_machine=None, **target):
    target.setdefault("storages", STORAGES)
    return transform_for_restore(
        conf,
        wishes or Wishes(),
        Target(**target),
        disk_sizes=sizes,
        fresh_uuid=FRESH,
        running_machine=running_machine,
    )


def small(lines, wishes=None, running_machine=None, **target):
    return plan(
        "\n".join(lines) + "\n", wishes, {}, running_machine=running_machine, **target
    )


def test_a_vm_keeps_what_is_portable_and_its_identity():
    made = plan()
    assert made.params == {
        "description": "a web server",
        "agent": "1", "bios": "ovmf", "cores": "2", "cpu": "host", "machine": "q35",
        "memory": "1024", "name": "web", "ostype": "l26",
        "scsihw": "virtio-scsi-single",
        "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,tag=5",
        "ide0": "local-lvm:cloudinit",
        "ide2": "none,media=cdrom",
        "smbios1": f"uuid={UUID}",
    }  # fmt: skip
    assert made.warnings == ()


def test_what_needs_the_disks_or_hinders_a_clean_up_is_set_last():
    assert plan().late_params == {
        "boot": "order=scsi0;ide2;net0", "onboot": "1", "protection": "1"
    }  # fmt: skip


def test_disks_keep_their_options_and_lose_what_pve_computes():
    scsi0, efi, tpm = sorted(plan().disks, key=lambda d: list(SIZES).index(d.key))
    assert (scsi0.storage, scsi0.format, scsi0.size) == ("local-lvm", "raw", 32 * GiB)
    assert scsi0.drive_value("local-lvm:vm-120-disk-0") == (
        "local-lvm:vm-120-disk-0,cache=writeback,discard=on,iothread=1,serial=abc"
    )
    assert efi.drive_value("x:y") == "x:y,efitype=4m,ms-cert=2023,pre-enrolled-keys=1"
    assert efi.size == 528 * KiB
    assert (tpm.format, tpm.options) == ("raw", (("version", "v2.0"),))


def test_what_was_left_behind_is_reported_with_the_reason():
    assert dict(plan().dropped) == {
        "ide2": "medium local:iso/debian.iso taken out of the drive",
        "scsi1": "disk is not in the backup",
        "unused0": "was not attached and is not in the backup: local-lvm:vm-100-disk-9",
    }
    assert "ide2" not in dict(plan(volumes=frozenset({"local:iso/debian.iso"})).dropped)


@pytest.mark.parametrize(
    ("wishes", "storage", "form"),
    [
        (Wishes(), "local-lvm", "raw"),
        (Wishes(storage="nas"), "nas", "raw"),
        (Wishes(storage="nas", disk_format="qcow2"), "nas", "qcow2"),
        (Wishes(storage_map=Mapped({"local-lvm": "nas"})), "nas", "raw"),
        (Wishes(storage_map=Mapped({}, "nas")), "nas", "raw"),
        (Wishes(storage="nas", storage_map=Mapped({"local-lvm": "local-lvm"})),
         "local-lvm", "raw"),
    ],
)  # fmt: skip
def test_a_disk_goes_where_the_most_specific_wish_says(wishes, storage, form):
    scsi0 = next(d for d in plan(wishes=wishes).disks if d.key == "scsi0")
    assert (scsi0.storage, scsi0.format) == (storage, form)


def test_a_format_is_kept_where_the_storage_has_it():
    sizes = {**SIZES, "scsi1": GiB}
    scsi1 = next(d for d in plan(sizes=sizes).disks if d.key == "scsi1")
    assert scsi1.format == "qcow2"
    moved = plan(sizes=sizes, wishes=Wishes(storage="local-lvm"))
    assert {d.format for d in moved.disks} == {"raw"}


def test_a_disk_without_a_place_stops_the_restore_before_anything_is_made():
    with pytest.raises(ConfigError, match="no storage local-lvm for disk images"):
        plan(storages={"nas": STORAGES["nas"]})
    with pytest.raises(ConfigError, match="storage local-lvm can hold raw"):
        plan(wishes=Wishes(disk_format="qcow2"))
    with pytest.raises(ConfigError, match="give restore_storage"):
        plan("scsi0: /dev/sdb\n", sizes={"scsi0": GiB})
    with pytest.raises(ConfigError, match="does not know disk scsi9"):
        plan(sizes={"scsi9": GiB})


def test_a_copy_beside_the_original_gets_a_new_identity_and_is_warned_of():
    made = plan(original_exists=True)
    assert made.params["smbios1"] == f"uuid={FRESH}"
    assert "onboot" not in made.late_params
    assert "onboot" in dict(made.dropped)
    assert any("mac=new" in warning for warning in made.warnings)
    made = plan(original_exists=True, wishes=Wishes(mac="new", uuid="keep"))
    assert made.params["smbios1"] == f"uuid={UUID}"
    assert made.params["net0"] == "virtio,bridge=vmbr0,firewall=1,tag=5"
    assert made.warnings == ()


def test_a_new_uuid_leaves_the_other_smbios_fields():
    made = small([f"smbios1: base64=1,uuid={UUID},serial=QUJD=="], Wishes(uuid="new"))
    assert made.params["smbios1"] == f"uuid={FRESH},base64=1,serial=QUJD=="


def test_bridges_are_mapped_and_missing_ones_warned_of():
    made = plan(
        wishes=Wishes(bridge_map=Mapped({"vmbr0": "vmbr7"})),
        bridges=frozenset({"vmbr0"}),
    )
    assert "bridge=vmbr7" in made.params["net0"]
    assert "vmbr7, which the target does not have" in made.warnings[0]
    made = small(["net0: model=e1000,macaddr=BC:24:11:00:00:02"], Wishes(mac="new"))
    assert made.params["net0"] == "e1000"


ROOT_LINES = [
    "args: -device x", "arch: x86_64", "amd-sev: type=std", "hookscript: local:x/h",
    "affinity: 0-3", "hugepages: 2", "ivshmem: size=1", "parallel0: /dev/parport0",
    "serial0: /dev/ttyS0", "serial1: socket", "hostpci0: 0000:01:00.0",
    "hostpci1: mapping=gpu", "usb0: host=1234:5678", "usb1: spice,usb3=1",
    "virtiofs0: dirid=share", "numa0: cpus=0-1,hostnodes=0,memory=512,policy=bind",
    "rng0: source=/dev/urandom", "future-key: 1", "vmgenid: x", "lock: backup",
    "parent: before", "runningmachine: pc-q35-9.2", "snaptime: 1", "digest: x",
]  # fmt: skip


def test_a_token_sends_no_root_only_and_no_host_bound_key():
    made = small(ROOT_LINES)
    assert made.params == {
        "serial1": "socket",
        "usb1": "spice,usb3=1",
        "numa0": "cpus=0-1,memory=512",
        "rng0": "source=/dev/urandom",
    }
    reported = dict(made.dropped)
    for line in ROOT_LINES[:9] + ROOT_LINES[10:13] + ROOT_LINES[14:16]:
        assert line.split(":")[0] in reported, line
    assert "only root@pam" in reported["args"]
    assert "bound to the old host: 0000:01:00.0" in reported["hostpci0"]
    assert "not known to this version" in reported["future-key"]
    assert not set(reported) & {"vmgenid", "lock", "parent", "digest", "snaptime"}


def test_root_may_set_its_keys_and_a_mapping_that_exists_is_kept():
    made = small(ROOT_LINES, is_root=True, mappings=frozenset({"gpu"}))
    assert made.params["args"] == "-device x"
    assert made.params["hostpci1"] == "mapping=gpu"
    assert "vmgenid" not in made.params
    assert "hookscript" in dict(made.dropped)


def test_proxmox_ve_8_gets_only_what_it_knows():
    lines = [
        "agent: 1,guest-fsfreeze=0", "allow-ksm: 0", "machine: q35,aw-bits=48",
        "net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,host-tunnel=1", "cores: 1",
    ]  # fmt: skip
    made = small(lines, release=8)
    assert made.params == {
        "agent": "1", "machine": "q35", "cores": "1",
        "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
    }  # fmt: skip
    assert set(dict(made.dropped)) == {"agent", "allow-ksm", "machine", "net0"}
    assert small(lines, release=9).dropped == ()


def test_windows_is_pinned_to_the_machine_it_ran_with():
    made = small(
        ["ostype: win11", "machine: q35,viommu=intel"],
        running_machine="pc-q35-9.2+pve1",
        machines=frozenset({"pc-q35-9.2", "pc-q35-10.0"}),
    )
    assert made.params["machine"] == "pc-q35-9.2+pve1,viommu=intel"
    assert "pinned" in made.warnings[0]
    made = small(
        ["ostype: win11"],
        running_machine="pc-i440fx-11.0",
        machines=frozenset({"pc-i440fx-9.2"}),
    )
    assert "machine" not in made.params
    assert "may see new hardware" in made.warnings[0]


def test_a_pinned_machine_the_target_lacks_is_warned_of():
    made = small(["machine: pc-q35-11.0+pve0"], machines=frozenset({"pc-q35-9.2"}))
    assert "not known to the target's QEMU" in made.warnings[0]


def test_templates_masked_passwords_and_snippets_are_explained():
    made = small(
        ["template: 1", "cipassword: **********", "cicustom: user=local:snippets/u",
         "cpu: custom-x", "vmstatestorage: gone"],
    )  # fmt: skip
    assert made.params == {"cpu": "custom-x"}
    assert any("qm template" in warning for warning in made.warnings)
    assert any("cpu-models.conf" in warning for warning in made.warnings)
    assert set(dict(made.dropped)) == {"cipassword", "cicustom", "vmstatestorage"}
    made = small(
        ["cicustom: user=local:snippets/u"], volumes=frozenset({"local:snippets/u"})
    )
    assert "cicustom" in made.params


def test_the_boot_order_names_only_what_is_there():
    made = plan(sizes={k: v for k, v in SIZES.items() if k != "scsi0"})
    assert made.late_params["boot"] == "order=ide2;net0"
    assert "scsi0 taken out" in dict(made.dropped)["boot"]
    made = small(["boot: order=scsi5"])
    assert "boot" not in made.late_params
    assert small(["boot: cdn"]).late_params == {"boot": "cdn"}


def test_a_single_disk_gets_the_first_free_place_on_its_bus():
    existing = {"scsi0": "a:b", "scsi1": "a:b", "name": "x"}
    (disk,) = plan_single_disks(
        CONF, ["scsi0"], existing, Wishes(), Target(STORAGES), disk_sizes=SIZES
    )
    assert (disk.source_key, disk.key, disk.storage) == ("scsi0", "scsi2", "local-lvm")


@pytest.mark.parametrize(
    ("key", "existing", "said"),
    [
        ("scsi7", {}, "the backup has no such disk; it has efidisk0, scsi0, tpmstate0"),
        ("scsi1", {}, "no such disk"),
        ("efidisk0", {"efidisk0": "a:b"}, "has one already"),
        ("scsi0", {f"scsi{n}": "a:b" for n in range(31)}, "no free place on scsi"),
    ],
)
def test_a_single_disk_that_cannot_be_attached_is_refused(key, existing, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_single_disks(
            CONF, [key], existing, Wishes(), Target(STORAGES), disk_sizes=SIZES
        )
