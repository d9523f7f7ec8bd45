# SPDX-License-Identifier: Apache-2.0
"""Real guests that boot, and real ways not to: each gets the verdict it deserves."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pveplug.ir.proof import watch, write_report
from pveplug.node import load_node
from pveplug.proveconfig import config_for_proof, wanted_for
from pveplug.proving.report import ChainMember, Subject, log_lines
from pveplug.proving.verdict import Evidence, Outcome, Verdict, Wanted
from tests.lab.site import Site, short_base
from tests.support.requires import requires, requires_file
from tests.support.tiny_guest import BOOT_DISK

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64"),
    requires_file(BOOT_DISK),
]

EVERYTHING = frozenset(Evidence)
BOOT_S = 150.0
KERNEL_LINE = b"console=ttyS0 quiet mitigations=off tg.root=TGROOT"
ON_BOTH = b"console=tty0 console=ttyS0 tg.root=TGROOT"
NO_ROOT = b"console=tty0 root=/dev/sdz1 quiet"
INITRD = b"initrd /boot/initrd.img"


async def proven(
    root: Path, config: Mapping[str, str], disk: Path | str, wanted: Wanted, **more: str
) -> Verdict:
    """Boot a VM as a proof does, watch it, write its report; return the verdict."""
    async with Site(root) as site:
        made = config_for_proof({"boot": "order=scsi0", **config}).values
        vm = await site.create_vm(100, made, disks={"scsi0": disk, **more})
        watching = asyncio.create_task(watch(load_node(site.node_toml()), 100, wanted))
        await vm.start()
        verdict = await watching
        held = vm.machine.qmp_relay.holds()
        subject = Subject(100, "web", "web-backup", (ChainMember(1),), "now", "now")
        report = await write_report(root / "reports", subject, verdict)
        assert log_lines(subject, verdict)[0].count(verdict.outcome.value.upper()) == 1
        assert report.exists()
        if shot := verdict.screenshot:
            data = report.with_suffix(".png").read_bytes()
            assert hashlib.sha256(data).hexdigest() == shot.sha256
        assert {name for one in held for name in one.commands} <= {
            *("qmp_capabilities", "query-status", "cont", "screendump"),
            "human-monitor-command",
        }
    return verdict


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the tiny guest's disk with texts replaced, length kept."""

    def edit(changes: dict[bytes, bytes], keep: int | None = None) -> Path:
        disk = tmp_path / "disk.raw"
        shutil.copyfile(BOOT_DISK, disk)
        data = bytearray(disk.read_bytes())
        for old, new in changes.items():
            assert data.count(old) == 1
            data = data.replace(old, new.ljust(len(old)))
        if keep is not None:
            data[keep:] = bytes(len(data) - keep)
        disk.write_bytes(data)
        return disk

    return edit


async def test_a_guest_that_boots_is_proven_by_agent_console_and_screen(
    edited: Callable[..., Path],
) -> None:
    wanted = Wanted(EVERYTHING, True, r"^TG:READY \d", BOOT_S, stable_s=3)
    disk = edited({KERNEL_LINE: ON_BOTH})
    verdict = await proven(short_base(), {"agent": "1", "name": "web"}, disk, wanted)
    assert verdict.outcome is Outcome.PASSED, verdict
    assert {one.kind for one in verdict.found} == EVERYTHING
    assert any("Linux version" in line for line in verdict.first_lines)


async def test_a_zeroed_boot_sector_fails(edited: Callable[..., Path]) -> None:
    disk = edited({})
    with disk.open("r+b") as file:
        file.write(bytes(512))
    wanted = wanted_for({"agent": "1"}, timeout_s=BOOT_S)
    verdict = await proven(short_base(), {"agent": "1"}, disk, wanted)
    assert verdict.outcome is Outcome.FAILED, verdict
    assert "No bootable device" in verdict.reason


async def test_a_lost_root_file_system_fails_in_the_boot_loader(
    edited: Callable[..., Path],
) -> None:
    wanted = wanted_for({}, evidence="any", serial="TG:READY", timeout_s=BOOT_S)
    verdict = await proven(short_base(), {}, edited({}, keep=1 << 20), wanted)
    assert verdict.outcome is Outcome.FAILED, verdict
    assert "GRUB" in verdict.reason


async def test_a_kernel_without_its_root_disk_fails(
    edited: Callable[..., Path],
) -> None:
    disk = edited({KERNEL_LINE: NO_ROOT, INITRD: b"#"})
    wanted = wanted_for({}, timeout_s=BOOT_S)
    assert wanted.evidence == {Evidence.SCREEN}
    verdict = await proven(short_base(), {}, disk, wanted)
    assert verdict.outcome is Outcome.FAILED, verdict
    assert verdict.screenshot
    assert any("Kernel panic" in line for line in verdict.screenshot.text)


async def test_uefi_without_anything_to_boot_fails() -> None:
    config = {"machine": "q35", "bios": "ovmf", "memory": "256"}
    efi = {"efidisk0": "local:1,efitype=4m,pre-enrolled-keys=0"}
    wanted = wanted_for({}, timeout_s=BOOT_S)
    verdict = await proven(short_base(), config, "8M", wanted, **efi)
    assert verdict.outcome is Outcome.FAILED, verdict
    assert "UEFI finds nothing to boot" in verdict.reason


async def test_a_screen_that_is_only_the_firmware_s_proves_nothing(
    tmp_path: Path,
) -> None:
    # An endless loop in the boot sector: a stable screen with text on it.
    disk = tmp_path / "loop.raw"
    disk.write_bytes(
        (b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")
    )
    wanted = Wanted(frozenset({Evidence.SCREEN}), timeout_s=6, stable_s=1)
    verdict = await proven(short_base(), {}, disk, wanted)
    assert verdict.outcome is Outcome.NOT_PROVEN, verdict
    assert "firmware or of a boot loader" in verdict.reason
