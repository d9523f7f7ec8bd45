# SPDX-License-Identifier: Apache-2.0
"""Jobs of VMware's and Hyper-V's plug-ins, restored by a real Bacula to PVE VMs.

What backs up is a stand-in (:mod:`tests.lab.sisters`); what restores is our copy under
its name. What the disks must hold is told by qemu-img.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pveplug.importing import look
from tests.lab.bacula import JobResult
from tests.lab.sisters import Sisters
from tests.lab.vm import LabVm
from tests.support import foreign_vms, truth
from tests.support.foreign_vms import delta
from tests.support.guest import BOOT_WAIT_S
from tests.support.halt import halted_api
from tests.support.kills import kill
from tests.support.requires import GUEST, requires, requires_file
from tests.support.vhdx_images import Vhdx
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sisters() -> AsyncIterator[Sisters]:
    async with World() as world:
        found = Sisters(world)
        await found.install()
        yield found


async def converted(source: Path, image: Path, fmt: str, *options: str) -> Path:
    """Have qemu-img write an image of another hypervisor."""
    words = [word for option in options for word in ("-o", option)]
    await asyncio.to_thread(
        truth.run,
        *("qemu-img", "convert", "-f", "raw", "-O", fmt, *words),
        *(str(source), str(image)),
    )
    return image


async def imported(sisters: Sisters, **arguments: object) -> JobResult:
    """Restore; the job must end well."""
    result = await sisters.world.restore(**arguments)
    assert result.termination.startswith("Restore OK"), (
        f"{result.text}\n{sisters.world.backend_log[-6000:]}"
    )
    return result


async def holds(vm: LabVm, key: str, source: Path) -> None:
    """Raise unless a disk holds what a raw file holds."""
    path = vm.disk_path(key)
    fmt = path.suffix.removeprefix(".")
    found = await asyncio.to_thread(truth.sha256_of_image, path, fmt)
    assert found == await asyncio.to_thread(truth.sha256_of_image, source, "raw")


@requires_file(GUEST / "boot.raw")
async def test_a_vmware_job_becomes_a_vm_that_boots_by_bios(
    sisters: Sisters, tmp_path: Path
) -> None:
    """One streamOptimized disk, as in an export; its VMX comes behind it."""
    disk = GUEST / "boot.raw"
    image = await converted(
        disk, tmp_path / "web01.vmdk", "vmdk", "subformat=streamOptimized"
    )
    vmx = written(tmp_path / "web01.vmx", foreign_vms.vmx("web01", "web01.vmdk"))
    (job,) = await sisters.back_up(
        "esx-web01",
        "podheitor-vsphere",
        [
            {"file": "/@vsphere/@vsphere/web01/web01.vmdk", "path": image},
            {"file": "/@vsphere/@vsphere/web01/web01.vmx", "path": vmx},
        ],
    )
    said = await imported(
        sisters,
        where="/@pve/restore_vmid=200,import_verify=yes,start_after=yes",
        job_ids=[job.job_id],
    )
    vm = sisters.world.site.vm(200)
    wanted = await asyncio.to_thread(truth.sha256_of_image, disk, "raw")
    assert f"read back and compared, SHA-256 {wanted}" in said.text
    assert vm.conf.values["name"] == "web01"
    assert vm.conf.values["boot"] == "order=scsi0"
    await booted(vm, "tiny-guest")


@requires_file(GUEST / "boot-efi.raw", "/usr/share/OVMF/OVMF_CODE_4M.fd")
async def test_a_vmware_job_and_its_increments_become_a_vm_that_boots_by_uefi(
    sisters: Sisters, tmp_path: Path
) -> None:
    """A flat disk with its descriptor, then two increments in the container."""
    disk = GUEST / "boot-efi.raw"
    image = await converted(
        disk, tmp_path / "db.vmdk", "vmdk", "subformat=monolithicFlat"
    )
    text = image.read_text()
    cid = text.partition("CID=")[2].partition("\n")[0].zfill(8)
    ovf = written(
        tmp_path / "db.ovf",
        foreign_vms.ovf("db", "db.vmdk", disk.stat().st_size, "efi"),
    )
    content = bytearray(disk.read_bytes())
    at = marker_of(content)
    deltas = []
    for number, marker in enumerate((b"tiny-delta", b"twice-over"), 1):
        content[at : at + len(marker)] = marker
        block = bytes(content[at : at + 4096])
        path = tmp_path / f"db-{number}.delta"
        parent = cid if number == 1 else "state-1"
        deltas.append(
            delta(path, parent, f"state-{number}", len(content), [(at, block)])
        )
    home = "/@vsphere/db"
    jobs = await sisters.back_up(
        "esx-db",
        "podheitor-vsphere",
        [
            {"file": f"{home}/db.ovf", "path": ovf},
            {"file": f"{home}/db.vmdk", "path": image},
            {"file": f"{home}/db-flat.vmdk", "path": tmp_path / "db-flat.vmdk"},
        ],
        *([{"file": f"{home}/{path.name}", "path": path}] for path in deltas),
    )
    await imported(
        sisters, where="/@pve/restore_vmid=201", job_ids=[j.job_id for j in jobs]
    )
    vm = sisters.world.site.vm(201)
    await holds(vm, "scsi0", written(tmp_path / "wanted.raw", content))
    assert vm.conf.values["bios"] == "ovmf"
    assert "efitype=4m" in vm.conf.values["efidisk0"]
    await vm.start()
    await booted(vm, "twice-over")


@requires_file(GUEST / "boot.raw")
async def test_a_hyperv_job_and_its_checkpoint_become_a_vm_that_boots_by_bios(
    sisters: Sisters, tmp_path: Path
) -> None:
    """Generation 1: a dynamic VHDX on IDE, and an AVHDX upon it."""
    disk = GUEST / "boot.raw"
    image = await converted(disk, tmp_path / "gen1.vhdx", "vhdx")
    content = bytearray(disk.read_bytes())
    at = marker_of(content)
    content[at : at + 10] = b"checkpoint"
    parent = look([image])[0].info.identity
    states = ["n"] * (len(content) >> 20)
    states[at >> 20] = "p"
    present = [at <= s * 512 < at + 4096 for s in range(len(content) // 512)]
    child = Vhdx(
        bytes(content), "".join(states), parent=uuid.UUID(parent), present=present
    )
    xml = written(tmp_path / "g.xml", foreign_vms.hyperv("gen1", "gen1.avhdx", 1))
    home = "/@hyperv/@hyperv/gen1"
    jobs = await sisters.back_up(
        "hv-gen1",
        "podheitor-hyperv",
        [
            {"file": f"{home}/gen1.vhdx", "path": image},
            {"file": f"{home}/g.xml", "path": xml},
        ],
        [
            {
                "file": f"{home}/gen1.avhdx",
                "path": written(tmp_path / "gen1.avhdx", child.make()),
            },
            {"file": f"{home}/g.xml", "path": xml},
        ],
    )
    await imported(
        sisters, where="/@pve/restore_vmid=202", job_ids=[j.job_id for j in jobs]
    )
    vm = sisters.world.site.vm(202)
    key = vm.conf.values["boot"].removeprefix("order=")
    await holds(vm, key, written(tmp_path / "wanted.raw", content))
    assert vm.conf.values["bios"] == "seabios"
    await vm.start()
    await booted(vm, "checkpoint")


@requires_file(GUEST / "boot-efi.raw", "/usr/share/OVMF/OVMF_CODE_4M.fd")
async def test_a_hyperv_job_becomes_a_vm_that_boots_by_uefi(
    sisters: Sisters, tmp_path: Path
) -> None:
    """Generation 2, with a sidecar; and without restore_vmid the next free id."""
    disk = GUEST / "boot-efi.raw"
    image = await converted(disk, tmp_path / "gen2.vhdx", "vhdx")
    text = written(tmp_path / "g.json", foreign_vms.sidecar("gen2", "gen2.vhdx"))
    vmcx = written(tmp_path / "g.vmcx", b"\x14\x20\x28\x01" + bytes(8000))
    (job,) = await sisters.back_up(
        "hv-gen2",
        "podheitor-hyperv",
        [
            {"file": "/@hyperv/gen2/g.vmcx", "path": vmcx},
            {"file": "/@hyperv/gen2/g.json", "path": text},
            {"file": "/@hyperv/gen2/gen2.vhdx", "path": image},
        ],
    )
    said = await imported(sisters, where="/", job_ids=[job.job_id])
    found = re.search(r"gen2 is imported to VM (\d+)", said.text)
    assert found, said.text
    vm = sisters.world.site.vm(int(found[1]))
    assert vm.conf.values["bios"] == "ovmf"
    await vm.start()
    await booted(vm, "tiny-guest")


async def test_what_cannot_be_right_fails_the_job_and_leaves_nothing(
    sisters: Sisters, tmp_path: Path
) -> None:
    source = small_disk(tmp_path / "d.raw", 2 << 20)
    image = await converted(
        source, tmp_path / "d.vmdk", "vmdk", "subformat=streamOptimized"
    )
    flat = await converted(source, tmp_path / "f.vmdk", "vmdk")
    length = image.stat().st_size
    unknown = written(tmp_path / "u", b"HVRCT\1" + bytes(50_000))
    xml = written(tmp_path / "d.xml", b"<configuration><properties/><oops>")
    home = "/@hyperv/bad"
    whole = {"file": f"{home}/d.vmdk", "path": image}
    cases = {
        "truncated": [{**whole, "cut": length - 5000, "size": length - 5000}],
        "damaged": [{**whole, "flip": [length - 300_000]}],
        "unknown": [whole, {"file": f"{home}/d.rctdelta", "path": unknown}],
        "described": [whole, {"file": f"{home}/d.xml", "path": xml}],
        "no-disk": [{"file": f"{home}/d.xml", "path": xml}],
        # Nothing is handed over of a good VM when another one can't be.
        "other-vm": [
            {**whole, "file": "/@hyperv/a/d.vmdk"},
            {"file": "/@hyperv/b/d.xml", "path": xml},
        ],
        "other-described": [
            {**whole, "file": "/@hyperv/a/d.vmdk"},
            {**whole, "file": "/@hyperv/b/d.vmdk"},
            {"file": "/@hyperv/b/d.xml", "path": xml},
        ],
        "no-extent": [
            {"file": "/@vsphere/bad/f.vmdk", "path": descriptor_of(flat, tmp_path)}
        ],
    }
    wanted = {
        "truncated": "d.vmdk: vmdk at byte",
        "damaged": "d.vmdk: vmdk at byte",
        "unknown": "48 56 52 43 54 01",
        "described": "d.xml",
        "no-disk": "no disk came",
        "other-vm": "VM b (import): no disk came",
        "other-described": "d.xml",
        "no-extent": "did not come: f-flat.vmdk",
    }
    jobs = await sisters.back_up_each(cases)
    before = {vmid for _, vmid in sisters.world.site.vms()}
    for name, job in jobs.items():
        result = await sisters.world.restore(where="/", job_ids=[job.job_id])
        told = f"{name}: {result.text}\n{sisters.world.backend_log[-3000:]}"
        assert "Restore Error" in result.termination, told
        assert wanted[name] in result.text, told
        nothing_left(sisters, before)


async def test_an_increment_that_skips_one_is_refused(
    sisters: Sisters, tmp_path: Path
) -> None:
    source = small_disk(tmp_path / "s.raw")
    identity = f"sha256:{truth.sha256_of_image(source, 'raw')}"
    runs = [(4096, b"1" * 512)]
    paths = [
        source,
        delta(tmp_path / "1", identity, "one", 8 << 20, runs),
        delta(tmp_path / "2", "one", "two", 8 << 20, runs),
    ]
    names = ("s.raw", "1/s.inc", "2/s.inc")
    jobs = await sisters.back_up(
        "skips",
        "podheitor-vsphere",
        *(
            [{"file": f"/@vsphere/s/{name}", "path": path}]
            for name, path in zip(names, paths, strict=True)
        ),
    )
    ids = [job.job_id for job in jobs]
    before = {vmid for _, vmid in sisters.world.site.vms()}
    result = await sisters.world.restore(where="/", job_ids=[ids[0], ids[2]])
    assert "2/s.inc was made from digest one" in result.text
    assert "Restore Error" in result.termination
    nothing_left(sisters, before)
    # The whole chain is right, by the digest of the raw disk's content.
    said = await imported(sisters, where="/@pve/restore_vmid=300", job_ids=ids)
    assert "no description of s came" in said.text
    content = bytearray(source.read_bytes())
    content[4096:4608] = b"1" * 512
    vm = sisters.world.site.vm(300)
    assert vm.disk_path("sata0").read_bytes() == bytes(content)


async def test_each_vm_of_a_job_becomes_one_and_none_may_claim_the_others_id(
    sisters: Sisters, tmp_path: Path
) -> None:
    entries, wanted = [], {}
    for name in ("one", "two"):
        source = small_disk(tmp_path / f"{name}.raw", 2 << 20)
        wanted[name] = source.read_bytes()
        entries += [
            {"file": f"/@vsphere/{name}/{name}.raw", "path": source},
            {
                "file": f"/@vsphere/{name}/{name}.vmx",
                "path": written(
                    tmp_path / f"{name}.vmx", foreign_vms.vmx(name, f"{name}.raw")
                ),
            },
        ]
    (job,) = await sisters.back_up("both", "podheitor-vsphere", entries)
    site = sisters.world.site
    before = {vmid for _, vmid in site.vms()}
    result = await sisters.world.restore(
        where="/@pve/restore_vmid=500", job_ids=[job.job_id]
    )
    assert "names one id, and several VMs are being restored: one, two" in result.text
    nothing_left(sisters, before)
    await imported(sisters, where="/", job_ids=[job.job_id])
    made = {vmid for _, vmid in site.vms()} - before
    found = {
        vm.conf.values["name"]: vm.disk_path("scsi0").read_bytes()
        for vm in map(site.vm, made)
    }
    assert found == wanted


async def test_killed_in_the_middle_nothing_is_left(
    sisters: Sisters, tmp_path: Path
) -> None:
    world = sisters.world
    source = small_disk(tmp_path / "k.raw", 4 << 20)
    (job,) = await sisters.back_up(
        "killed",
        "podheitor-hyperv",
        [{"file": "/@hyperv/k/k.raw", "path": source}],
    )
    before = {vmid for _, vmid in world.site.vms()}
    restore = await asyncio.to_thread(
        world.bacula.start_restore,
        where="/@pve/restore_vmid=400,restore_bwlimit=256",
        job_ids=[job.job_id],
    )
    journal = world.site.root / "ph/lib/vms/400.json"
    async with asyncio.timeout(60):
        while not (journal.exists() and json.loads(journal.read_text())["volumes"]):
            await asyncio.sleep(0.05)
    await kill(json.loads(journal.read_text())["pid"])
    async with asyncio.timeout(60):  # --cleanup runs beside the job's end
        while journal.exists():
            await asyncio.sleep(0.1)
    nothing_left(sisters, before)
    result = await asyncio.to_thread(world.bacula.wait, restore, 300)
    assert "Restore Error" in result.termination


async def test_killed_while_its_disks_are_attached_nothing_is_left(
    sisters: Sisters, tmp_path: Path
) -> None:
    """Also of the EFI disk, which PVE makes itself in that very call."""
    world = sisters.world
    source = small_disk(tmp_path / "e.raw", 1 << 20)
    text = written(tmp_path / "e.json", foreign_vms.sidecar("e", "e.raw"))
    (job,) = await sisters.back_up(
        "attached",
        "podheitor-hyperv",
        [
            {"file": "/@hyperv/e/e.raw", "path": source},
            {"file": "/@hyperv/e/e.json", "path": text},
        ],
    )
    before = {vmid for _, vmid in world.site.vms()}
    journal = world.site.root / "ph/lib/vms/401.json"
    with halted_api(world.site, "(PUT|POST) .*/qemu/401/config") as halt:
        restore = await asyncio.to_thread(
            world.bacula.start_restore,
            where="/@pve/restore_vmid=401",
            job_ids=[job.job_id],
        )
        await halt.reached()
        await kill(json.loads(journal.read_text())["pid"])
    # PVE does now what it was asked for, although nobody wants it any more.
    result = await asyncio.to_thread(world.bacula.wait, restore, 300)
    assert "Restore Error" in result.termination
    async with asyncio.timeout(60):
        while journal.exists():
            await asyncio.sleep(0.1)
    nothing_left(sisters, before)


async def test_files_stay_files_and_the_copies_back_nothing_up(
    sisters: Sisters, tmp_path: Path
) -> None:
    source = small_disk(tmp_path / "p.raw")
    (job,) = await sisters.back_up(
        "plain",
        "podheitor-hyperv",
        [{"file": "/@hyperv/p/p.raw", "path": source}],
    )
    out = tmp_path / "out"
    said = await imported(sisters, where=str(out), job_ids=[job.job_id])
    assert "restoring to files" in said.text
    assert (out / "@hyperv/p/p.raw").read_bytes() == source.read_bytes()
    # The same job, run while our copy has the name.
    result = await sisters.world.run("plain", "Full")
    assert "Error" in result.termination
    assert "pveplug's copy under that name, which only restores" in result.text


# --- what the tests are made of ------------------------------------------------------


async def booted(vm: LabVm, marker: str) -> None:
    """Wait until a started VM has booted; its root file system has this marker."""
    line = await vm.serial_wait("TG:FILE", BOOT_WAIT_S)
    assert line.strip().endswith(f"TG:FILE {marker}")
    await vm.serial_wait("TG:READY", 60)
    await vm.stop()


def written(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def marker_of(disk: bytes | bytearray) -> int:
    """Return where the tiny guest's marker stands on its disk."""
    at = disk.index(b"tiny-guest\n" + bytes(100))
    assert at % 512 == 0
    return at


def small_disk(path: Path, size: int = 8 << 20) -> Path:
    rng = random.Random(str(path.name))
    content = bytearray(rng.randbytes(size))
    content[: 1 << 20] = bytes(1 << 20)
    content[510:512] = b"\x55\xaa"
    content[5 << 20 : 6 << 20] = bytes(1 << 20)
    return written(path, content)


def descriptor_of(image: Path, folder: Path) -> Path:
    """Return a descriptor whose extent is nowhere."""
    text = image.read_bytes()[512:2048].rstrip(b"\0").decode("latin-1")
    size = 8 << 20
    lines = [line for line in text.splitlines() if not line.startswith("RW ")]
    text = "\n".join(lines).replace("monolithicSparse", "monolithicFlat")
    extent = f'RW {size // 512} FLAT "f-flat.vmdk" 0\n'
    return written(folder / "lonely.vmdk", f"{text}\n{extent}".encode())


def nothing_left(sisters: Sisters, vmids: set[int]) -> None:
    """Raise unless the site has no other VM, volume, journal or socket."""
    site = sisters.world.site
    assert {vmid for _, vmid in site.vms()} == vmids
    rows = [row for s in site.node.storages.values() for row in s.volumes()]
    assert {row["vmid"] for row in rows} <= vmids
    assert list(site.root.glob("ph/lib/vms/*.json")) == []
    assert list((site.root / "ph/run").glob("*.sock")) == []
