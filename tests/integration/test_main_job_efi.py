# SPDX-License-Identifier: Apache-2.0
"""A guest that boots by UEFI and has a TPM: its variables and its TPM come back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.lab.vm import LabVm
from tests.support.guest import BOOT_WAIT_S
from tests.support.requires import GUEST, requires, requires_file
from tests.support.story import backup, restore
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd", "swtpm"),
]

VARIABLES = 540672
"""Bytes of OVMF's 4M variable store; its volume is rounded up."""


@requires_file(GUEST / "boot-efi.raw", "/usr/share/OVMF/OVMF_CODE_4M.fd")
@pytest.mark.parametrize("storage", ["local", "thick"])
async def test_uefi_variables_and_tpm_state_are_part_of_the_vm(storage: str) -> None:
    disks: dict[str, Path | str] = {
        "scsi0": GUEST / "boot-efi.raw",
        "efidisk0": f"{storage}:1,efitype=4m,pre-enrolled-keys=0",
        "tpmstate0": f"{storage}:1,version=v2.0",
    }
    config = {
        "machine": "q35",
        "bios": "ovmf",
        "boot": "order=scsi0",
        "agent": "1",
        "cores": "1",
    }
    async with World() as world:
        vm = await world.site.create_vm(100, config, disks=disks)
        fresh = efi(vm.disk_path("efidisk0"))
        await vm.start()
        await vm.serial_wait("TG:READY", BOOT_WAIT_S)
        await world.add_job("nightly", "vmid=100")
        await backup(world, "nightly")
        await vm.guest_exec(["tg-mark", "incremental"])
        for _ in range(3):
            before = state_of(vm)
            await backup(world, "nightly", "Incremental")
            if state_of(vm) == before:
                break  # else the TPM wrote meanwhile, and nobody knows what was read
        else:
            pytest.fail("firmware and TPM never stand still")
        variables, tpm = before
        assert variables != fresh, "the firmware has written its variables"
        await vm.stop()

        await restore(world, where="/@pve/restore_vmid=200", job="nightly")
        restored = world.site.vm(200)
        values = restored.conf.values
        assert values["bios"] == "ovmf"
        assert "efitype=4m" in values["efidisk0"]
        assert "version=v2.0" in values["tpmstate0"]
        assert efi(restored.disk_path("efidisk0")) == variables
        state = restored.disk_path("tpmstate0").read_bytes()
        # swtpm shrinks a file to what it needs; what is restored can hold all it may.
        assert len(state) == 4 << 20
        assert state[: len(tpm)] == tpm, [
            n for n in range(0, len(tpm), 512) if state[n : n + 512] != tpm[n : n + 512]
        ][:20]
        await restored.start()
        line = await restored.serial_wait("TG:FILE", BOOT_WAIT_S)
        assert line.strip().endswith("TG:FILE incremental")
        await restored.serial_wait("TG:READY", 30)
        await restored.stop()


def state_of(vm: LabVm) -> tuple[str, bytes]:
    """Return what the files of a running VM hold: EFI variables, TPM state."""
    return efi(vm.disk_path("efidisk0")), vm.disk_path("tpmstate0").read_bytes()


def efi(path: Path) -> str:
    """Return the digest of what the firmware sees of its volume."""
    assert path.suffix != ".qcow2"
    with path.open("rb") as file:
        return hashlib.sha256(file.read(VARIABLES)).hexdigest()
