# SPDX-License-Identifier: Apache-2.0
"""Files that a real Bacula restored by itself, read by ``pveplug verify``."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.support.requires import requires
from tests.support.story import backup, restore, written_vm
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
]

PVEPLUG = Path(sys.prefix) / "bin/pveplug"


async def verified(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Run the program; return its status and what it found wrong."""
    done = await asyncio.to_thread(
        subprocess.run, [PVEPLUG, "verify", "--json", folder], capture_output=True
    )
    assert not done.stderr, done.stderr
    files = json.loads(done.stdout)["files"]
    assert files
    return done.returncode, [file for file in files if file["state"] != "ok"]


async def test_what_bacula_restored_by_itself_is_proven_or_named() -> None:
    async with World() as world:
        _, ledger = await written_vm(world, 100)
        _, other = await written_vm(world, 101)
        await world.add_job("nightly", "vmid=100,101")
        names = []
        for level in ("Full", "Incremental", "Incremental"):
            await ledger.some(15)
            await other.some(15)
            names.append((await backup(world, "nightly", level)).name)
        whole = world.base / "whole"
        job = await restore(world, where=str(whole), job_ids=[1, 2, 3])
        assert f"'pveplug verify {whole}' compares them" in job.text
        assert await verified(whole) == (0, [])

        (vm,) = (whole / "@proxmox").glob("100-*")
        (stranger,) = (whole / "@proxmox").glob("101-*")
        # Each manifest names the digest of the one before it.
        before = None
        for name in names:
            text = (vm / name / "manifest.json").read_bytes()
            assert json.loads(text)["parent_manifest"] == before
            before = blake3(text).hexdigest(16)

        image = vm / names[1] / "scsi0.qcow2"
        kept = image.read_bytes()
        # After header, L1 and L2 the first data cluster; one bit in its middle.
        at = next(n for n in range(3 << 16, len(kept)) if kept[n])
        turned = bytearray(kept)
        turned[at] ^= 4
        image.write_bytes(turned)
        status, (found,) = await verified(whole)
        assert (status, found["path"], found["disk"]) == (65, str(image), "scsi0")
        assert found["disk_offset"] is not None
        assert f"near byte {found['disk_offset']} " in found["text"]

        shutil.copyfile(stranger / names[1] / "scsi0.qcow2", image)
        status, (found,) = await verified(whole)
        assert (status, found["path"]) == (65, str(image))

        full = vm / names[0] / "scsi0.qcow2"
        image.write_bytes(full.read_bytes())
        full.write_bytes(kept)
        status, (one, two) = await verified(whole)
        assert status == 65
        assert {one["path"], two["path"]} == {str(full), str(image)}
        assert "it is the image of another job" in one["text"]
        full.write_bytes(image.read_bytes())
        image.write_bytes(kept)
        assert await verified(whole) == (0, [])

        shutil.rmtree(vm / names[1])
        status, missing = await verified(whole)
        assert status == 65
        assert {file["path"] for file in missing} == {
            str(vm / names[1] / f"{key}.qcow2") for key in ("scsi0", "scsi1")
        }
        assert all(file["state"] == "missing" for file in missing)
        assert names[2] in missing[0]["text"]
