# SPDX-License-Identifier: Apache-2.0
"""Typical descriptions and the VMs made of them: tests/unit/descriptions/*.golden.

``python -m tests.unit.test_describe_golden`` writes them anew; read the difference.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path

import pytest

from pveplug.describe import sidecar
from pveplug.describe.bootability import Bootability
from pveplug.describe.guest import Family
from pveplug.describe.plan import DiskFacts, to_pve
from pveplug.describe.reading import read_description
from pveplug.units import GiB
from pveplug.values import Mapped
from pveplug.vmrestore import Target, TargetStorage, Wishes
from tests.lab.schema import verify

HERE = Path(__file__).parent / "descriptions"
FRESH = "99999999-8888-4777-8666-555555555555"
TARGET = Target(
    {
        "nas": TargetStorage("nas", ("raw", "qcow2")),
        "lvm": TargetStorage("lvm", ("raw",)),
    },
    bridges=frozenset({"vmbr0", "vmbr1"}),
)
WISHES = Wishes(storage="nas", bridge_map=Mapped({"Servers 10": "vmbr1"}))
GRUB = Bootability(table="mbr", boot_code=True, bios_loader="grub", family=Family.LINUX)
WINDOWS_UEFI = Bootability(
    table="gpt",
    esp=True,
    loaders=("EFI/BOOT/BOOTX64.EFI", "EFI/MICROSOFT/BOOT/BOOTMGFW.EFI"),
    family=Family.WINDOWS,
)
CASES = {
    "windows-2022.vmx": (WISHES, WINDOWS_UEFI),
    "ubuntu.vmx": (WISHES, GRUB),
    "windows-2008.vmx": (WISHES, None),
    "many-disks.vmx": (
        Wishes(storage_map=Mapped({"fast": "lvm"}, "nas"), mac="new", name="db-test"),
        None,
    ),
    "hyperv-gen1.xml": (WISHES, GRUB),
    "hyperv-gen2.xml": (WISHES, WINDOWS_UEFI),
    "powershell.xml": (WISHES, None),
    "powershell.json": (WISHES, None),
    "vmware.ovf": (
        WISHES,
        Bootability(
            table="gpt",
            esp=True,
            loaders=("EFI/REDHAT/SHIMX64.EFI",),
            family=Family.LINUX,
            os_id="rhel",
        ),
    ),
    "virtualbox.ovf": (WISHES, WINDOWS_UEFI),
    "sidecar.json": (WISHES, None),
}


def plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def made(name):
    wishes, boot = CASES[name]
    description = read_description({name: (HERE / name).read_bytes()})
    facts = {
        disk.key: DiskFacts(
            size=disk.capacity or (10 + disk.order) * GiB,
            boot=boot if disk == description.boot_disk else None,
        )
        for disk in description.disks
    }
    plan = to_pve(description, wishes, TARGET, disks=facts, fresh_uuid=FRESH)
    value = {
        "description": json.loads(sidecar.render(description)),
        "plan": plain(plan),
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_a_typical_description_becomes_the_vm_that_was_reviewed(name):
    assert made(name) == (HERE / f"{name}.golden").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_a_description_written_as_sidecar_reads_the_same(name):
    description = read_description({name: (HERE / name).read_bytes()})
    assert read_description({"x": sidecar.render(description)}) == description


@pytest.mark.parametrize("release", ["8.4", "9.2"])
@pytest.mark.parametrize("name", CASES)
def test_proxmox_ve_takes_every_parameter_of_the_plans(name, release):
    plan = json.loads(made(name))["plan"]
    restore = plan["restore"]
    drives = {
        disk["key"]: ",".join(["nas:1", *("=".join(o) for o in disk["options"])])
        for disk in restore["disks"]
    }
    given = {**restore["params"], **plan["fresh"], **restore["late_params"], **drives}
    verify(given, {}, config=True, release=release)


def test_every_kept_description_is_a_case():
    kept = {path.name for path in HERE.iterdir() if path.suffix != ".golden"}
    assert kept == set(CASES)


if __name__ == "__main__":
    for case in CASES:
        (HERE / f"{case}.golden").write_text(made(case), encoding="utf-8")
