# SPDX-License-Identifier: Apache-2.0
"""The library: its documented example, what it reads, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pveplug
from pveplug.errors import ConfigError, JobError
from pveplug.node import load_node
from pveplug.units import KiB, MiB
from tests.lab.site import Site, short_base
from tests.lab.vm import LabVm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32 * MiB


def options(site: Site) -> str:
    secret = site.root / "token"
    secret.write_text(site.token_secret)
    secret.chmod(0o600)
    return (
        f"pve_token_id={site.token_id} pve_token_secret_file={secret} "
        f"pve_fingerprint={site.fingerprint}"
    )


@pytest.fixture
async def site():
    base = short_base("pl")
    try:
        async with Site(base / "s") as found:
            yield found
            await found.assert_clean()
    finally:
        shutil.rmtree(base)


@pytest.fixture
async def vm(site: Site) -> LabVm:
    disks = {"scsi0": "32M", "scsi1": "32M"}
    found = await site.create_vm(100, {"agent": "0"}, disks=disks)
    await found.start()
    await found.qemu_io("scsi0", "write -P 7 1M 3M")
    await found.qemu_io("scsi1", "write -P 9 0 64k")
    return found


def content(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    argv = ["qemu-img", "convert", "-O", "raw", str(image), str(raw)]
    subprocess.run(argv, check=True)
    return raw.read_bytes()


async def test_the_documented_example_runs(site: Site, vm: LabVm) -> None:
    text = (ROOT / "docs" / "library.md").read_text()
    found = re.search(r"```python\n(import asyncio.*?)```", text, re.DOTALL)
    assert found
    lines = [line for line in found[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    values = f"OPTIONS = {options(site)!r}; DIRECTORY = {str(site.root)!r}\n"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", values + found[1]),
        env={"PODHEITOR_PROXMOX_NODE": str(site.node_toml())},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    first, second = out.decode().splitlines()
    assert first.startswith(f"vm100 scsi0: {3 * MiB} of {SIZE} bytes, crash-consistent")
    assert second.startswith(f"vm100 scsi1: {64 * KiB} of {SIZE} bytes")
    assert content(site.root / "scsi0.qcow2") == (
        bytes(MiB) + b"\7" * 3 * MiB + bytes(28 * MiB)
    )
    assert content(site.root / "scsi1.qcow2")[: 64 * KiB] == b"\x09" * 64 * KiB


async def test_blocks_tile_the_disk_and_later_ones_say_what_changed(
    site: Site, vm: LabVm
) -> None:
    node = await asyncio.to_thread(load_node, site.node_toml())
    names = [f"mirror.2026-11-23_01.05.00_{n:02d}" for n in (1, 2)]
    images = [site.root / "full.qcow2", site.root / "delta.qcow2"]
    async with pveplug.open_vm(100, options(site), node=node, name=names[0]) as first:
        assert "name: vm100" in first.config
        disk = first.disks[0]
        assert (disk.parent, disk.whole) == (None, "level Full")
        await pveplug.write_image(disk, images[0])
    await vm.qemu_io("scsi0", "write -P 8 2M 128k")
    await vm.qemu_io("scsi0", "write -z 3M 1M")
    await vm.qemu_io("scsi0", "write -P 6 20M 1M")
    async with pveplug.open_vm(
        100, options(site), node=node, name=names[1], since=names[0]
    ) as second:
        disk = second.disks[0]
        assert (disk.parent, disk.whole) == (names[0], None)
        seen = bytearray(content(images[0]))
        at = clean = 0
        async with disk.open() as reader:
            async for block in reader.blocks():
                assert block.extent.offset == at
                at = block.extent.end
                if block.data is not None:
                    assert len(block.data) == block.extent.length <= 512 * KiB
                    seen[block.extent.offset : at] = block.data
                elif block.extent.kind is pveplug.Kind.ZERO:
                    seen[block.extent.offset : at] = bytes(block.extent.length)
                else:
                    clean += block.extent.length
        assert at == SIZE
        assert clean == SIZE - 128 * KiB - 2 * MiB
        with pytest.raises(ConfigError, match="give the image of that as backing"):
            await pveplug.write_image(disk, images[1])
        written = await pveplug.write_image(disk, images[1], backing="full.qcow2")
        assert written.read <= 128 * KiB + 2 * MiB
        info = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--output=json", str(images[1])],
                check=True,
                capture_output=True,
            ).stdout
        )
        assert info["backing-filename"] == "full.qcow2"
        with pytest.raises(FileExistsError):
            await pveplug.write_image(disk, images[1], backing="full.qcow2")
    assert content(images[1]) == bytes(seen)
    assert seen[2 * MiB] == 8
    assert seen[3 * MiB] == 0


async def test_a_stopped_vm_is_read_and_a_locked_one_is_not(
    site: Site, vm: LabVm
) -> None:
    node = await asyncio.to_thread(load_node, site.node_toml())
    await vm.stop()
    async with pveplug.open_vm(100, options(site), node=node) as found:
        assert "stopped" in found.consistency
        async with found.disks[0].open() as reader:
            blocks = [
                (block.extent, bytes(block.data or b""))
                async for block in reader.blocks()
            ]
        assert b"".join(data for _, data in blocks if any(data)) == b"\7" * 3 * MiB
    vm.set(lock="migrate")
    with pytest.raises(JobError, match="locked"):
        async with pveplug.open_vm(100, options(site) + " lock_wait=0", node=node):
            pass
    vm.set(lock=None)
    with pytest.raises(ConfigError, match="needs a name"):
        async with pveplug.open_vm(100, options(site), node=node, since="x"):
            pass


async def test_reading_ends_before_the_scratch_store_is_full(
    site: Site, vm: LabVm, file_system: Callable[[str, int], Path]
) -> None:
    node = await asyncio.to_thread(load_node, site.node_toml())
    where = file_system("ext2", 345)  # it can't reserve
    how = f"{options(site)} mechanism=fleece scratch_dir={where}"

    async def read() -> None:
        async with pveplug.open_vm(100, how, node=node) as found:
            async with found.disks[0].open() as reader:
                (where / "filler").write_bytes(bytes(96 * MiB))
                async with asyncio.timeout(20):
                    while True:
                        assert [block async for block in reader.blocks()]

    with pytest.raises(JobError, match=f"VM 100 .*: only .* left in {where}.*Remedy"):
        await read()
    await vm.qemu_io("scsi0", "write -P 8 1M 3M")


async def test_reading_ends_when_the_scratch_store_stalls(
    site: Site, vm: LabVm, file_system: Callable[[str, int], Path]
) -> None:
    node = await asyncio.to_thread(load_node, site.node_toml())
    where = file_system("ext4", 128)
    how = f"{options(site)} mechanism=fleece cbw_timeout=2 scratch_dir={where}"
    thawing: list[asyncio.Task[None]] = []

    async def read() -> None:
        async with pveplug.open_vm(100, how, node=node) as found:
            async with found.disks[0].open() as reader:
                assert [block async for block in reader.blocks()]
                subprocess.run(["fsfreeze", "-f", where], check=True)
                try:
                    await asyncio.sleep(20)
                finally:
                    # What is ours is taken out of QEMU once the store answers.
                    thawing.append(asyncio.create_task(thaw(where, 1.0)))

    with pytest.raises(JobError, match=f"store {where} has not answered for 2 s"):
        await read()
    await asyncio.gather(*thawing)
    await vm.qemu_io("scsi0", "write -P 8 1M 3M")


async def thaw(where: Path, after_s: float) -> None:
    await asyncio.sleep(after_s)
    subprocess.run(["fsfreeze", "-u", where], check=True)


def test_importing_the_package_costs_nothing() -> None:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import pveplug"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    mine = [
        line for line in said.splitlines() if line.split("|")[-1].strip() == "pveplug"
    ]
    assert int(mine[0].split("|")[1]) < 5000
    assert "aiohttp" not in said
    assert set(pveplug.__all__) == {n for n in pveplug.__all__ if getattr(pveplug, n)}
    with pytest.raises(AttributeError):
        pveplug.nothing  # type: ignore[attr-defined]  # noqa: B018
