# SPDX-License-Identifier: Apache-2.0
"""The VM of a proof is isolated, can't be taken for the original, and still boots."""

from __future__ import annotations

import pytest

from pveplug.errors import ConfigError
from pveplug.proveconfig import config_for_proof, wanted_for
from pveplug.proving.verdict import Evidence

ORIGINAL = {
    "agent": "1,fstrim_cloned_disks=1",
    "args": "-device foo",
    "balloon": "1024",
    "bios": "ovmf",
    "boot": "order=scsi0;ide2;net0",
    "cores": "4",
    "cpu": "host",
    "description": "the web server",
    "efidisk0": "local:vm-100-disk-1,efitype=4m",
    "hookscript": "local:snippets/x.pl",
    "hostpci0": "0000:01:00.0",
    "hotplug": "disk,memory,cpu",
    "ide2": "local:iso/debian.iso,media=cdrom",
    "lock": "backup",
    "machine": "q35",
    "memory": "8192",
    "name": "web",
    "net0": "virtio=AA:BB:CC:DD:EE:FF,bridge=vmbr0",
    "net1": "e1000=AA:BB:CC:DD:EE:00,bridge=vmbr1",
    "numa": "1",
    "numa0": "cpus=0-3,memory=8192",
    "onboot": "1",
    "ostype": "l26",
    "protection": "1",
    "scsi0": "local:vm-100-disk-0,iothread=1,size=32G",
    "scsihw": "virtio-scsi-single",
    "serial1": "/dev/ttyS0",
    "smbios1": "uuid=1-2-3",
    "startup": "order=1",
    "tags": "prod",
    "usb0": "host=1234:5678",
    "vga": "qxl",
    "watchdog": "model=i6300esb,action=reset",
}


def test_it_has_no_nic_no_host_device_and_does_not_start_by_itself() -> None:
    made = config_for_proof(ORIGINAL)
    gone = {
        *("net0", "net1", "hostpci0", "usb0", "serial1", "args", "hookscript"),
        *("protection", "startup", "lock", "tags", "watchdog", "description"),
    }
    assert not gone & set(made.values)
    assert made.values["onboot"] == "0"
    assert made.values["name"] == "prove-web"
    assert made.values["boot"] == "order=scsi0;ide2"
    assert made.values["ide2"] == "none,media=cdrom"
    said = dict(made.dropped)
    assert {"net0", "net1", "hostpci0", "usb0", "args", "hookscript"} <= set(said)
    assert "protection" not in said


def test_what_the_guest_boots_with_is_kept() -> None:
    made = config_for_proof(ORIGINAL).values
    for key in (
        *("agent", "bios", "cores", "cpu", "efidisk0", "machine", "memory", "numa0"),
        *("ostype", "scsi0", "scsihw", "smbios1", "vga", "balloon"),
    ):
        assert made[key] == ORIGINAL[key], key


def test_it_can_be_watched() -> None:
    made = config_for_proof(ORIGINAL).values
    assert made["serial0"] == "socket"
    assert made["freeze"] == "1"
    assert "freeze" not in config_for_proof(ORIGINAL, freeze=False).values
    for vga in ("serial0", "none", "serial1,memory=16"):
        changed = config_for_proof({**ORIGINAL, "vga": vga})
        assert changed.values["vga"] == "std"
        assert "vga" in dict(changed.dropped)


def test_a_vm_has_the_display_it_had() -> None:
    assert config_for_proof({}).values["vga"] == "std"
    assert "vga" not in config_for_proof({"ostype": "wxp"}).values
    assert config_for_proof({"vga": "virtio,memory=32"}).values["vga"] == (
        "virtio,memory=32"
    )


def test_a_host_s_serial_port_becomes_a_socket() -> None:
    made = config_for_proof({**ORIGINAL, "serial0": "/dev/ttyUSB0"}).values
    assert made["serial0"] == "socket"
    assert config_for_proof({"serial1": "socket"}).values["serial1"] == "socket"


def test_memory_is_capped_with_all_that_depends_on_it() -> None:
    made = config_for_proof(ORIGINAL, memory_mib=2048).values
    assert made["memory"] == "2048"
    assert made["balloon"] == "0"
    assert made["hotplug"] == "disk,cpu"
    assert not {"numa", "numa0"} & set(made)
    assert config_for_proof(ORIGINAL, memory_mib=16384).values["memory"] == "8192"
    made = config_for_proof({"memory": "current=4096"}, memory_mib=1024).values
    assert made["memory"] == "1024"
    with pytest.raises(ConfigError, match="prove_memory=4"):
        config_for_proof(ORIGINAL, memory_mib=4)


def test_a_boot_order_of_nics_alone_goes() -> None:
    assert "boot" not in config_for_proof({"boot": "order=net0", "net0": "x"}).values
    later = config_for_proof({"boot": "order=net0;scsi0;usb1", "net0": "x"}).values
    assert later["boot"] == "order=scsi0", "a disk that is attached later stays"
    assert config_for_proof({"boot": "cdn"}).values["boot"] == "cdn"


def test_a_name_stays_within_what_a_name_may_have() -> None:
    assert config_for_proof({"name": "a" * 63}).values["name"] == "prove-" + "a" * 57
    assert config_for_proof({}).values["name"] == "prove-vm"


@pytest.mark.parametrize(
    ("config", "evidence", "serial", "expected"),
    [
        ({"agent": "1"}, "", "", {Evidence.AGENT}),
        ({"agent": "1"}, "", "login:", {Evidence.AGENT}),
        ({"agent": "enabled=0"}, "", "login:", {Evidence.SERIAL}),
        ({}, "", "", {Evidence.SCREEN}),
        ({}, "any", "", {Evidence.SCREEN}),
        ({"agent": "1"}, "any", "login:", set(Evidence)),
        ({"agent": "1"}, "agent+screen", "", {Evidence.AGENT, Evidence.SCREEN}),
    ],
)
def test_what_is_asked_follows_from_the_vm_and_the_wish(
    config: dict[str, str], evidence: str, serial: str, expected: set[Evidence]
) -> None:
    wanted = wanted_for(config, evidence=evidence, serial=serial)
    assert wanted.evidence == expected
    assert wanted.every is (evidence != "any")


@pytest.mark.parametrize(
    ("evidence", "key"),
    [
        ("agent", "prove_evidence"),
        ("smell", "prove_evidence"),
        ("serial", "prove_serial"),
    ],
)
def test_evidence_that_cannot_come_is_refused(evidence: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        wanted_for({}, evidence=evidence)
    assert caught.value.key == key
