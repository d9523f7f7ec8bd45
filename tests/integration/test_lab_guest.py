# SPDX-License-Identifier: Apache-2.0
"""Guests boot in the lab: both layouts, UEFI and a TPM; a person can use it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.blocking import SiteThread
from tests.lab.site import Site, short_base
from tests.support.requires import GUEST

pytestmark = pytest.mark.integration
needs_guest = pytest.mark.skipif(
    not (GUEST / "boot.raw").exists(), reason="the tiny guest is not built"
)
REPOSITORY = Path(__file__).resolve().parents[2]
BOOT_S = 120.0


@needs_guest
@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-9.2+pve1"])
async def test_guest_boots_by_grub_freezes_and_powers_off(machine: str) -> None:
    config = {"agent": "1", "machine": machine, "boot": "order=scsi0"}
    async with Site(short_base()) as site:
        disks: dict[str, Path | str] = {"scsi0": GUEST / "boot.raw", "scsi1": "8M"}
        vm = await site.create_vm(100, config, disks=disks)
        await vm.start()
        await vm.serial_wait("TG:READY", BOOT_S)
        await vm.guest_exec(["/bin/tg-write", "/dev/sdb", "0", "4", "s"])
        summed = await vm.guest_exec(["/bin/tg-sum", "/dev/sdb"])
        assert len(summed.split()[0]) == 64
        assert await vm.machine.agent("guest-fsfreeze-freeze") >= 1
        assert await vm.leftovers() == ["guest frozen"]
        await vm.machine.agent("guest-fsfreeze-thaw")
        await site.assert_clean()
        await vm.power_off_guest()
        await vm.wait_gone()
        assert (100, "SHUTDOWN") in site.node.qmeventd.events


@needs_guest
async def test_guest_boots_with_firmware_variables_and_tpm_on_thick_volumes() -> None:
    config = {"machine": "q35", "bios": "ovmf", "boot": "order=scsi0"}
    disks: dict[str, Path | str] = {
        "scsi0": GUEST / "boot-efi.raw",
        "efidisk0": "thick:1,efitype=4m,pre-enrolled-keys=0",
        "tpmstate0": "thick:1,version=v2.0",
    }
    async with Site(short_base()) as site:
        vm = await site.create_vm(100, config, disks=disks)
        assert "size=4M" in vm.conf.values["tpmstate0"]
        before = vm.disk_path("efidisk0").read_bytes()
        assert len(before) == 4 << 20, "rounded up to a whole extent"
        assert before[540672:540673] == b"\xa5", "more than the firmware ever sees"
        await vm.start()
        for name in ("100.swtpm", "100.swtpm.pid"):
            assert (site.node.run_dir / name).exists()
        await vm.serial_wait("TG:READY", BOOT_S)
        blocks = {b["qdev"]: b for b in await vm.qmp("query-block") if "qdev" in b}
        flash = blocks["/machine/system.flash1"]["inserted"]
        assert flash["image"]["virtual-size"] == 540672
        await vm.stop()
        assert vm.disk_path("efidisk0").read_bytes() != before
        assert not (site.node.run_dir / "100.swtpm").exists()


def test_blocking_callers_have_a_site_too() -> None:
    with SiteThread(short_base()) as lab:
        vm = lab.create_vm(100, disks={"scsi0": "8M"})
        vm.start()
        vm.qemu_io("scsi0", "write -P 3 0 64k")
        assert vm.running
        lab.assert_clean()
        root = lab.site.root
    assert not root.exists()


async def test_lab_of_a_person_comes_up_and_goes_down(tmp_path: Path) -> None:
    async def lab(command: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.lab", "--state", str(tmp_path), command,
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    assert (await lab("status"))[0] == 3
    try:
        status, text = await lab("up")
        assert status == 0, text
        assert "fingerprint" in text
        assert "running already" in (await lab("up"))[1]
        assert (await lab("status"))[0] == 0
        root = Path(json.loads((tmp_path / "state.json").read_text())["root"])
        assert root.exists()
    finally:
        status, text = await lab("down")
    assert (status, text) == (0, "The lab is down.\n")
    assert not root.exists()
    assert (await lab("down"))[0] == 0
