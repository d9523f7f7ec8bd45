# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pveplug.describe.bootability import Bootability
from pveplug.describe.guest import (
    Bus,
    Family,
    Firmware,
    GuestCdrom,
    GuestDescription,
    GuestDisk,
    GuestNic,
)
from pveplug.describe.plan import DiskFacts, dns_name, match_disks, to_pve
from pveplug.errors import ConfigError
from pveplug.units import GiB
from pveplug.values import Mapped
from pveplug.vmrestore import Target, TargetStorage, Wishes

FRESH = "99999999-8888-4777-8666-555555555555"
TARGET = Target(
    {"nas": TargetStorage("nas", ("raw", "qcow2"))}, bridges=frozenset({"vmbr0"})
)
BIOS, UEFI, UNKNOWN = Firmware.BIOS, Firmware.UEFI, Firmware.UNKNOWN
BY_BIOS = Bootability(table="mbr", boot_code=True)
BY_UEFI = Bootability(table="gpt", esp=True, loaders=("EFI/BOOT/BOOTX64.EFI",))
BY_BOTH = Bootability("gpt", esp=True, loaders=BY_UEFI.loaders, boot_code=True)
BY_BOTH_MBR = Bootability("mbr", esp=True, loaders=BY_UEFI.loaders, boot_code=True)
BY_NVRAM = Bootability("gpt", esp=True, loaders=("EFI/DEBIAN/GRUBX64.EFI",))
NEITHER = Bootability("gpt")
SCSI0 = GuestDisk(0, Bus.SCSI, 0, 0, "lsilogic", "[ds1] a/a.vmdk", 8 * GiB)


def planned(wishes=None, target=TARGET, facts=None, boot=None, **fields):
    fields.setdefault("disks", (SCSI0,))
    fields.setdefault("cores", 1)
    fields.setdefault("memory_mib", 1024)
    vm = GuestDescription("a test", **fields)
    if facts is None:
        facts = {disk.key: DiskFacts() for disk in vm.disks}
        if boot is not None:
            facts[vm.boot_disk.key] = DiskFacts(boot=boot)
    wishes = wishes or Wishes(storage="nas")
    return to_pve(vm, wishes, target, disks=facts, fresh_uuid=FRESH)


@pytest.mark.parametrize(
    ("said", "found", "chosen", "warned"),
    [
        (BIOS, None, BIOS, False),
        (UEFI, None, UEFI, False),
        (UNKNOWN, None, BIOS, False),
        (BIOS, BY_BIOS, BIOS, False),
        (UEFI, BY_UEFI, UEFI, False),
        (UEFI, BY_NVRAM, UEFI, False),
        (BIOS, BY_BOTH, BIOS, False),
        (UEFI, BY_BOTH_MBR, UEFI, False),
        (BIOS, BY_UEFI, UEFI, True),
        (UEFI, BY_BIOS, BIOS, True),
        (UNKNOWN, BY_BIOS, BIOS, False),
        (UNKNOWN, BY_UEFI, UEFI, False),
        (UNKNOWN, BY_BOTH, UEFI, False),
        (UNKNOWN, BY_BOTH_MBR, BIOS, False),
        (BIOS, NEITHER, BIOS, True),
        (UEFI, NEITHER, UEFI, True),
        (UNKNOWN, NEITHER, UEFI, True),
        (UNKNOWN, Bootability("mbr"), BIOS, True),
    ],
)
def test_the_disk_outranks_a_description_that_it_contradicts(
    said, found, chosen, warned
):
    plan = planned(firmware=said, boot=found)
    assert plan.firmware is chosen
    assert bool(plan.restore.warnings) is warned
    assert plan.restore.params["bios"] == {BIOS: "seabios", UEFI: "ovmf"}[chosen]
    assert ("efidisk0" in plan.fresh) is (chosen is UEFI)


def test_storage_and_size_of_disks_are_the_same_before_and_after_the_look():
    def key_facts(plan):
        return [(d.source_key, d.size, d.storage, d.format) for d in plan.restore.disks]

    for said in Firmware:
        before = planned(firmware=said)
        for found in (BY_BIOS, BY_UEFI, BY_NVRAM, NEITHER):
            assert key_facts(planned(firmware=said, boot=found)) == key_facts(before)


def test_a_loader_that_only_nvram_named_is_named_to_the_operator():
    steps = planned(firmware=UEFI, boot=BY_NVRAM).steps(104)
    assert any("\\EFI\\DEBIAN\\GRUBX64.EFI" in line for line in steps)
    assert not any("VMID" in line for line in steps)


@pytest.mark.parametrize(
    ("os_id", "disk", "extra", "place", "scsihw"),
    [
        ("debian12-64", SCSI0, {}, "scsi0", "virtio-scsi-single"),
        ("windows2019srv-64", SCSI0, {}, "sata0", "virtio-scsi-single"),
        ("", SCSI0, {}, "sata0", "virtio-scsi-single"),
        ("winxppro", SCSI0, {}, "ide0", "virtio-scsi-single"),
        (
            "windows7-64",
            GuestDisk(0, Bus.SATA, 0, 0, capacity=GiB),
            {},
            "sata0",
            "virtio-scsi-single",
        ),
        (
            "windows2019srv-64",
            GuestDisk(0, Bus.IDE, 0, 0, capacity=GiB),
            {},
            "ide0",
            "virtio-scsi-single",
        ),
        (
            "windows2019srv-64",
            SCSI0,
            {"cdroms": (GuestCdrom(Bus.IDE, 1, 0),)},
            "ide0",
            "virtio-scsi-single",
        ),
        (
            "windows2019srv-64",
            SCSI0,
            {"cdroms": (GuestCdrom(Bus.IDE, 1, 0), GuestCdrom(Bus.SATA, 0, 0))},
            "sata0",
            "virtio-scsi-single",
        ),
        (
            "rhel8-64",
            GuestDisk(0, Bus.SCSI, 0, 0, "pvscsi", capacity=GiB),
            {},
            "scsi0",
            "pvscsi",
        ),
        (
            "rhel8-64",
            GuestDisk(0, Bus.SCSI, 0, 0, "pvscsi", capacity=GiB),
            {"firmware": UEFI, "machine": ("vmx-19",)},
            "ide0",
            "virtio-scsi-single",
        ),
        ("rhel8-64", SCSI0, {"machine": ("vmx-19",)}, "ide0", "virtio-scsi-single"),
        ("rhel8-64", SCSI0, {}, "sata0", "virtio-scsi-single"),
        (
            "rhel8-64",
            GuestDisk(0, Bus.VIRTIO, 0, 0, capacity=GiB),
            {},
            "virtio0",
            "virtio-scsi-single",
        ),
    ],
)
def test_the_first_start_is_on_a_bus_the_guest_surely_has(
    os_id, disk, extra, place, scsihw
):
    plan = planned(os_id=os_id, disks=(disk,), **extra)
    assert plan.restore.disks[0].key == place
    assert plan.restore.params["scsihw"] == scsihw
    assert plan.restore.late_params["boot"] == f"order={place}"


def test_ide_is_only_promised_where_the_machine_has_piix():
    plan = planned(os_id="windows7-64", firmware=UEFI)
    assert plan.restore.disks[0].key == "ide0"
    assert "machine" not in plan.restore.params
    assert planned(firmware=UEFI).restore.params["machine"] == "q35"


@pytest.mark.parametrize(
    ("os_id", "model", "card"),
    [
        ("windows2019srv-64", "vmxnet3", "e1000e"),
        ("windows7-64", "vmxnet3", "e1000"),
        ("winxppro", "vlance", "rtl8139"),
        ("debian12-64", "vmxnet3", "virtio"),
        ("rhel8-64", "vmxnet3", "virtio"),
        ("other5xlinux-64", "vmxnet3", "e1000"),
        ("", "virtio", "virtio"),
    ],
)
def test_the_network_card_is_one_the_guest_has_a_driver_for(os_id, model, card):
    nic = GuestNic(model, "00:50:56:00:00:01", "net")
    plan = planned(os_id=os_id, nics=(nic,))
    assert plan.restore.params["net0"] == f"{card}=00:50:56:00:00:01,bridge=vmbr0"


def test_networks_are_mapped_by_name_and_the_rest_is_said():
    nics = tuple(GuestNic(network=name) for name in ("Prod", "prod", "DMZ"))
    wishes = Wishes(storage="nas", bridge_map=Mapped({"PROD": "vmbr7"}))
    target = Target(TARGET.storages, bridges=frozenset({"vmbr7", "vmbr3"}))
    plan = planned(wishes, target, nics=nics)
    bridges = [plan.restore.params[f"net{n}"] for n in range(3)]
    assert bridges == ["e1000,bridge=vmbr7"] * 2 + ["e1000,bridge=vmbr3"]
    assert any("DMZ" in note for note in plan.notes)
    missing = planned(Wishes(storage="nas", bridge_map=Mapped({}, "vmbr9")), nics=nics)
    assert "needs bridge vmbr9" in missing.restore.warnings[0]


def test_the_disk_says_which_system_it_is_where_the_description_does_not():
    ubuntu = Bootability(
        "gpt", esp=True, loaders=BY_UEFI.loaders, family=Family.LINUX, os_id="ubuntu"
    )
    assert planned(boot=ubuntu).restore.disks[0].key == "scsi0"
    assert planned(boot=ubuntu, os_id="other5xlinux-64").system.storage.value == (
        "virtio"
    )
    assert planned(boot=ubuntu, os_id="rhel8-64").system.storage.value == "kept"


def test_a_disk_that_starts_another_system_than_described_is_reported():
    windows = Bootability("mbr", boot_code=True, family=Family.WINDOWS)
    plan = planned(boot=windows, os_id="ubuntu-64")
    assert plan.system.family is Family.WINDOWS
    assert plan.restore.disks[0].key == "sata0"
    assert "ubuntu-64" in plan.restore.warnings[0]


def test_grub_does_not_make_a_linux_of_what_is_described_as_another():
    grub = Bootability("mbr", boot_code=True, family=Family.LINUX)
    plan = planned(boot=grub, os_id="freebsd13-64")
    assert plan.system.family is Family.OTHER
    assert not plan.restore.warnings


def test_the_disk_that_starts_is_taken_where_the_first_cannot():
    disks = tuple(GuestDisk(n, Bus.SCSI, 0, n, capacity=GiB) for n in range(3))
    facts = {
        disk.key: DiskFacts(boot=BY_BIOS if disk.unit == 2 else Bootability())
        for disk in disks
    }
    plan = planned(disks=disks, facts=facts)
    assert plan.boot_disk == "scsi0:2"
    assert plan.restore.late_params["boot"] == "order=sata2"
    assert "scsi0:2" in plan.restore.warnings[0]


def test_the_boot_disk_gets_a_sure_place_whatever_its_number():
    disks = tuple(
        GuestDisk(n, Bus.SCSI, 0, n, capacity=GiB, boot=n == 9) for n in range(10)
    )
    plan = planned(disks=disks, os_id="windows7-64")
    places = {disk.source_key: disk.key for disk in plan.restore.disks}
    assert places["scsi0:9"] == "ide0"
    assert [places[f"scsi0:{n}"] for n in range(3)] == ["ide1", "ide3", "sata0"]
    assert len(set(places.values())) == 10
    assert "may need a driver" in plan.restore.warnings[0]


def test_more_disks_than_places_are_refused():
    disks = tuple(GuestDisk(n, Bus.SCSI, 0, n, capacity=GiB) for n in range(38))
    with pytest.raises(ConfigError, match="38 disks; there are places for 37 on sata"):
        planned(disks=disks)


def test_disks_without_an_image_and_what_has_no_place_are_reported():
    disks = (SCSI0, GuestDisk(1, Bus.SCSI, 0, 1, file="b.vmdk", capacity=GiB))
    plan = planned(
        disks=disks,
        facts={"scsi0:0": DiskFacts()},
        dropped=(("USB key", "a dongle"),),
        cdroms=(
            GuestCdrom(Bus.SATA, 0, 0, "x.iso"),
            GuestCdrom(Bus.SATA, 0, 1),
        ),
        memory_min_mib=512,
        secure_boot=True,
    )
    assert dict(plan.restore.dropped).keys() == {
        "USB key",
        "disk scsi0:1",
        "CD drive sata0:0",
        "CD drive sata0:1",
        "dynamic memory",
        "Secure Boot",
    }


def test_sizes_and_sectors_that_do_not_fit_are_warned_of():
    plan = planned(facts={"scsi0:0": DiskFacts(size=8 * GiB + 1, sector=4096)})
    assert plan.restore.disks[0].size == 8 * GiB + 512
    assert "the image counts" in plan.restore.warnings[0]
    assert "4096" in plan.restore.warnings[1]


def test_a_datastore_is_mapped_like_a_storage():
    wishes = Wishes(storage_map=Mapped({"ds1": "nas"}), disk_format="qcow2")
    (disk,) = planned(wishes).restore.disks
    assert (disk.storage, disk.format) == ("nas", "qcow2")


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (Wishes(), "give restore_storage"),
        (Wishes(storage="gone"), "no storage gone .* it has nas"),
        (Wishes(storage="nas", disk_format="vmdk"), "disk_format=vmdk"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wishes, says):
    with pytest.raises(ConfigError, match=says):
        planned(wishes)


def test_facts_of_unknown_disks_and_disks_of_unknown_size_are_refused():
    with pytest.raises(ConfigError, match="does not know disk scsi9:9"):
        planned(facts={"scsi9:9": DiskFacts()})
    nameless = GuestDisk(0, Bus.SCSI, 0, 0)
    with pytest.raises(ConfigError, match="how large"):
        planned(disks=(nameless,))


@pytest.mark.parametrize(
    ("uuid", "there", "kept"),
    [("keep", True, True), ("auto", False, True), ("auto", True, False), ("new", 0, 0)],
)
def test_the_uuid_is_kept_unless_the_original_is_there(uuid, there, kept):
    target = Target(TARGET.storages, original_exists=bool(there))
    old = "42000000-0000-4000-8000-000000000001"
    plan = planned(Wishes(storage="nas", uuid=uuid), target, uuid=old)
    assert plan.restore.params["smbios1"] == f"uuid={old if kept else FRESH}"


def test_a_windows_clock_runs_in_local_time_and_a_linux_one_does_not():
    assert planned(os_id="windows9-64").restore.params["localtime"] == "1"
    assert "localtime" not in planned(os_id="ubuntu-64").restore.params
    as_utc = planned(os_id="windows9-64", localtime=False)
    assert as_utc.restore.params["localtime"] == "0"


def test_what_is_missing_is_assumed_and_said():
    plan = planned(cores=None, memory_mib=None, disks=())
    assert plan.restore.params["memory"] == "2048"
    assert plan.restore.params["cores"] == "1"
    assert plan.restore.late_params == {}
    assert "2048" in plan.restore.warnings[0]


def test_the_agent_is_switched_on_only_where_it_is_known_to_be_there():
    for os_id in ("windows2019srv-64", "ubuntu-64"):
        known = planned(os_id=os_id, agent=True)
        assert known.restore.params["agent"] == "1"
        assert "--agent" not in "".join(known.next_steps)
        unknown = planned(os_id=os_id)
        assert "agent" not in unknown.restore.params
        assert "--agent 1" in "".join(unknown.next_steps)


def test_windows_is_told_the_way_to_virtio_and_an_old_one_is_not():
    text = "\n".join(planned(os_id="windows2019srv-64").steps(7))
    assert "qm set 7 --scsi30 nas:1" in text
    assert "--scsi0 VOLUME" in text
    assert "virtio-win" not in "\n".join(planned(os_id="winxppro").next_steps)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("web", "web"),
        ("Büro PC (neu)", "Buro-PC-neu"),
        ("a..b.-c-", "a.b.c"),
        ("…", ""),
        ("x" * 80 + ".y", "x" * 63 + ".y"),
        ("app01.example.org", "app01.example.org"),
    ],
)
def test_names_become_those_of_hosts(name, plain):
    assert dns_name(name) == plain


def test_images_are_found_by_name_and_never_guessed_between_two():
    disks = tuple(
        GuestDisk(n, Bus.SCSI, 0, n, file=file)
        for n, file in enumerate(["[ds] a/A.vmdk", "C:\\x\\b-000002.vmdk", "c.vmdk"])
    )
    vm = GuestDescription("x", disks=disks)
    names = ["/@vsphere/a.vmdk", "/@vsphere/b-flat.vmdk", "q.vmdk", "r.vmdk"]
    found, left = match_disks(vm, names)
    assert found == {"scsi0:0": names[0], "scsi0:1": names[1]}
    assert left == ("q.vmdk", "r.vmdk")
    one = GuestDescription("x", disks=disks[:1])
    assert match_disks(one, ["disk.raw"]) == ({"scsi0:0": "disk.raw"}, ())
    assert match_disks(one, ["x", "y"]) == ({}, ("x", "y"))
    by_place = ["Scsi0-1/disk", "Scsi0-11/disk", "vm/scsi0:0.raw", "aiscsi0-2"]
    found, left = match_disks(vm, by_place)
    assert found == {"scsi0:0": by_place[2], "scsi0:1": by_place[0]}
    assert left == (by_place[1], by_place[3])
    assert match_disks(GuestDescription("x"), ["x"]) == ({}, ("x",))


def test_memory_below_the_least_is_raised():
    assert planned(memory_mib=4).restore.params["memory"] == "16"
