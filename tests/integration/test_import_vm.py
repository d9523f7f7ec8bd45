# SPDX-License-Identifier: Apache-2.0
"""``pveplug import … --to-vmid`` on a PVE site: what comes of it, what is left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.site import Site, short_base
from tests.lab.vm import LabVm
from tests.support import foreign_vms, truth
from tests.support.foreign_vms import delta
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    requires("qemu-img", "qemu-nbd", "qemu-io"),
]
MIB = 1 << 20


@dataclass
class Bench:
    """A site, and the command on its node."""

    site: Site
    base: Path

    async def run(
        self, *words: str | Path, stdin: Path | None = None, status: int = 0
    ) -> str:
        """Run ``pveplug import``; return all that it said."""
        with (stdin or Path(os.devnull)).open("rb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pveplug", "import"),
                *map(str, words),
                stdin=file,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(self.node_file)},
            )
            said = (await process.communicate())[0].decode()
        assert process.returncode == status, said
        return said

    def write_node(self) -> None:
        secret = self.base / "token"
        secret.write_text(self.site.token_secret + "\n")
        secret.chmod(0o600)
        words = (
            f"pve_token_id={self.site.token_id} pve_token_secret_file={secret} "
            f"pve_fingerprint={self.site.fingerprint}"
        )
        self.node_file = self.site.node_toml(import_options=words)

    def nothing_left(self) -> None:
        """Raise unless the site has neither VM, volume, lock nor journal."""
        site = self.site
        assert site.vms() == []
        assert [r for s in site.node.storages.values() for r in s.volumes()] == []
        assert list(site.root.glob("ph/lib/vms/*.json")) == []
        assert list((site.root / "ph/run").glob("*.sock")) == []

    async def destroy(self, vmid: int) -> None:
        qm = self.site.root / "usr/sbin/qm"
        await asyncio.to_thread(
            subprocess.run, [qm, "destroy", str(vmid), "--purge", "1"], check=True
        )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bench() -> AsyncIterator[Bench]:
    base = short_base("pi")
    site = Site(base / "s")
    await site.start()
    try:
        found = Bench(site, base)
        found.write_node()
        yield found
    finally:
        await site.stop()
        shutil.rmtree(base, ignore_errors=True)


def disk(path: Path, seed: int, size: int = 8 * MIB) -> Path:
    """A partitioned disk with noise, zeroes that are written, and holes."""
    rng = random.Random(seed)
    content = bytearray(size)
    content[510:512] = b"\x55\xaa"
    content[65536:1_300_000] = rng.randbytes(1_300_000 - 65536)
    content[3 * MIB : 3 * MIB + 5000] = b"some text " * 500
    content[-4096:] = rng.randbytes(4096)
    path.write_bytes(content)
    return path


def convert(source: Path, image: Path, fmt: str, *options: str) -> Path:
    words = [word for option in options for word in ("-o", option)]
    truth.run("qemu-img", "convert", "-O", fmt, *words, str(source), str(image))
    return image


def sha256(vm: LabVm, key: str) -> str:
    path = vm.disk_path(key)
    return truth.sha256_of_image(path, path.suffix.removeprefix("."))


async def test_two_disks_and_their_description_become_a_vm(
    bench: Bench, tmp_path: Path
) -> None:
    sources = [disk(tmp_path / f"d{n}.raw", n) for n in (1, 2)]
    images = [
        convert(sources[0], tmp_path / "web.vmdk", "vmdk", "subformat=streamOptimized"),
        convert(sources[1], tmp_path / "data.vhdx", "vhdx"),
    ]
    vmx = tmp_path / "web.vmx"
    text = foreign_vms.vmx("web", "web.vmdk").decode()
    text += 'scsi0:1.present = "TRUE"\nscsi0:1.fileName = "data.vhdx"\n'
    vmx.write_text(text)
    log = tmp_path / "vmware.log"
    log.write_text("nothing of use\n")
    said = await bench.run(
        *("--to-vmid", "100", "--storage", "local", "--disk-format", "qcow2"),
        *("--bridge-map", "VM Network:vmbr0", "--verify"),
        *(vmx, images[1], images[0], log),
    )
    vm = bench.site.vm(100)
    assert said.endswith("VM 100\n")
    assert "vmware.log is not needed" in said
    for number, source in enumerate(sources):
        wanted = truth.sha256_of_image(source, "raw")
        assert sha256(vm, f"scsi{number}") == wanted
        assert f"read back and compared, SHA-256 {wanted}" in said
    values = vm.conf.values
    assert values["name"] == "web"
    assert values["memory"] == "384"
    assert foreign_vms.MAC.upper() in values["net0"]
    assert values["boot"] == "order=scsi0"
    assert "lock" not in values
    await bench.destroy(100)
    bench.nothing_left()


def ova(path: Path, files: list[Path]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            tar.add(file, file.name)
    return path


async def test_an_ova_becomes_a_vm_as_it_is(bench: Bench, tmp_path: Path) -> None:
    source = disk(tmp_path / "d1.raw", 21)
    vmdk = tmp_path / "web-disk1.vmdk"
    convert(source, vmdk, "vmdk", "subformat=streamOptimized")
    described = tmp_path / "web.ovf"
    described.write_bytes(foreign_vms.ovf("web", vmdk.name, source.stat().st_size))
    sums = tmp_path / "web.mf"
    sums.write_text("SHA256(web.ovf)= 00\n")
    packed = ova(tmp_path / "web.ova", [described, sums, vmdk])
    wanted = truth.sha256_of_image(source, "raw")
    to = ("--to-vmid", "100", "--storage", "local", "--verify")
    said = await bench.run(*to, "--bridge-map", "vmbr0", packed)
    vm = bench.site.vm(100)
    assert said.endswith("VM 100\n")
    assert f"read back and compared, SHA-256 {wanted}" in said
    assert vm.conf.values["name"] == "web"
    key = vm.conf.values["boot"].removeprefix("order=")
    assert sha256(vm, key) == wanted
    await bench.destroy(100)
    # What the operator names describes it, and nothing in the archive.
    other = tmp_path / "other.vmx"
    other.write_bytes(foreign_vms.vmx("other", vmdk.name))
    await bench.run(
        *(*to, "--bridge-map", "vmbr0", "--description", other, packed),
    )
    assert bench.site.vm(100).conf.values["name"] == "other"
    await bench.destroy(100)
    bench.nothing_left()


async def test_an_ova_that_is_cut_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    source = disk(tmp_path / "d1.raw", 22)
    vmdk = tmp_path / "web-disk1.vmdk"
    convert(source, vmdk, "vmdk", "subformat=streamOptimized")
    packed = ova(tmp_path / "web.ova", [vmdk])
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    to = ("--to-vmid", "100", "--storage", "local")
    said = await bench.run(*to, packed, status=65)
    assert "web.ova/web-disk1.vmdk: the archive ends within it" in said
    bench.nothing_left()
    packed.write_bytes(whole[:700])
    await bench.run(*to, packed, status=65)
    bench.nothing_left()


async def test_without_a_description_the_options_say_what_it_is(
    bench: Bench, tmp_path: Path
) -> None:
    source = disk(tmp_path / "alone.raw", 3)
    image = convert(source, tmp_path / "alone.vhd", "vpc", "subformat=fixed")
    said = await bench.run(
        *("--to-vmid", "next", "--storage", "thick", "--name", "lonely"),
        *("--cores", "3", "--memory", "777", "--firmware", "bios", "--verify", image),
    )
    assert "no description of lonely came" in said
    vm = bench.site.vm(int(said.rsplit(None, 1)[1]))
    values = vm.conf.values
    assert (values["cores"], values["memory"]) == ("3", "777")
    assert values["name"] == "lonely"
    assert values["bios"] == "seabios"
    key = values["boot"].removeprefix("order=")
    # A thick volume is born with what was there before, and is a little larger.
    found = vm.disk_path(key).read_bytes()
    told = truth.sha256_of_image(image, "vpc")
    assert f"SHA-256 {told}" in said
    content = source.read_bytes()
    assert found[: len(content)] == content
    assert not any(found[len(content) :])
    await bench.destroy(vm.vmid)
    bench.nothing_left()


async def test_an_image_comes_through_standard_input(
    bench: Bench, tmp_path: Path
) -> None:
    source = disk(tmp_path / "piped.raw", 4)
    vmdk = convert(source, tmp_path / "p.vmdk", "vmdk", "subformat=streamOptimized")
    wanted = truth.sha256_of_image(source, "raw")
    to = ("--to-vmid", "100", "--storage", "local")
    await bench.run(*to, "-", stdin=vmdk)
    assert sha256(bench.site.vm(100), "sata0") == wanted
    await bench.destroy(100)
    said = await bench.run(*to, "-", stdin=source, status=65)
    assert "raw image of unknown length" in said
    assert "--size" in said
    bench.nothing_left()
    await bench.run(*to, "--size", "8M", "-", stdin=source)
    assert sha256(bench.site.vm(100), "sata0") == wanted
    await bench.destroy(100)


async def test_increments_of_each_kind_are_put_upon_what_they_were_made_from(
    bench: Bench, tmp_path: Path
) -> None:
    """A VMDK's delta by CID, a container upon it, and one upon a raw disk's content."""
    source = disk(tmp_path / "base.raw", 5)
    full = convert(source, tmp_path / "base.vmdk", "vmdk")
    cid = next(
        line.partition("=")[2].zfill(8)
        for line in full.read_bytes()[:4096].decode("latin-1").split("\n")
        if line.startswith("CID=")
    )
    flat = disk(tmp_path / "data.raw", 6)
    raw_id = f"sha256:{truth.sha256_of_image(flat, 'raw')}"
    expected = bytearray(source.read_bytes())
    expected[2 * MIB : 2 * MIB + 512] = b"A" * 512
    expected[3 * MIB : 3 * MIB + 4096] = bytes(4096)
    expected += b"B" * MIB  # it grew
    first = delta(
        tmp_path / "base-1.delta",
        cid,
        "state-1",
        8 * MIB,
        [(2 * MIB, b"A" * 512), (3 * MIB, 4096)],
    )
    second = delta(
        tmp_path / "base-2.delta",
        "state-1",
        "state-2",
        9 * MIB,
        [(8 * MIB, b"B" * MIB)],
    )
    other = bytearray(flat.read_bytes())
    other[4096:8192] = b"C" * 4096
    third = delta(
        tmp_path / "data-1.delta", raw_id, "other-1", 8 * MIB, [(4096, b"C" * 4096)]
    )
    said = await bench.run(
        *("--to-vmid", "100", "--storage", "local", "--verify"),
        *(second, third, full, first, flat),
    )
    vm = bench.site.vm(100)
    assert vm.disk_path("sata0").read_bytes() == bytes(expected)
    assert vm.disk_path("sata1").read_bytes() == bytes(other)
    assert "3 images" in said
    await bench.destroy(100)
    # The same increment upon another raw disk is refused when that has been read.
    wrong = disk(tmp_path / "wrong.raw", 7)
    said = await bench.run(
        *("--to-vmid", "100", "--storage", "local", third, wrong), status=65
    )
    assert "what it was made from did not come before it" in said
    bench.nothing_left()


async def test_what_is_damaged_unknown_or_lonely_leaves_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    source = disk(tmp_path / "d.raw", 8)
    vmdk = convert(source, tmp_path / "d.vmdk", "vmdk", "subformat=streamOptimized")
    whole = vmdk.read_bytes()
    damaged = bytearray(whole)
    damaged[-70_000] ^= 1  # in the last grains' deflated data
    vmdk.write_bytes(damaged)
    to = ("--to-vmid", "100", "--storage", "local")
    said = await bench.run(*to, vmdk, status=65)
    assert "d.vmdk" in said
    assert "vmdk at byte" in said
    assert "undone: destroyed the unfinished VM 100" in said
    bench.nothing_left()

    vmdk.write_bytes(whole)
    unknown = tmp_path / "d-1.inc"
    unknown.write_bytes(b"HVRCT\1" + bytes(5000))
    said = await bench.run(*to, vmdk, unknown, status=65)
    assert "48 56 52 43 54 01" in said
    assert "known are block-delta" in said
    lonely = delta(tmp_path / "l.delta", "nobody", "me", 8 * MIB, [(0, b"x" * 512)])
    said = await bench.run(*to, vmdk, lonely, status=65)
    assert "l.delta is an increment of nothing that was given" in said
    broken = tmp_path / "d.ovf"
    broken.write_text("<Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1'><x>")
    said = await bench.run(*to, vmdk, broken, status=65)
    assert "d.ovf" in said
    said = await bench.run("--to-vmid", "100", "--storage", "none", vmdk, status=78)
    assert "no storage none" in said
    said = await bench.run("--to-vmid", "100", vmdk, status=78)
    assert "an import needs restore_storage" in said
    bench.nothing_left()


async def test_interrupted_it_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    source = disk(tmp_path / "slow.raw", 9, 64 * MIB)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pveplug", "import", "--to-vmid", "100"),
        *("--storage", "local", "-o", "restore_bwlimit=2M", str(source)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(bench.node_file)},
    )
    journal = bench.site.root / "ph/lib/vms/100.json"
    async with asyncio.timeout(30):
        while not (journal.exists() and json.loads(journal.read_text())["volumes"]):
            await asyncio.sleep(0.05)
    process.terminate()
    said = (await process.communicate())[0].decode()
    assert process.returncode == 69, said
    assert "interrupted; what was made is undone" in said
    bench.nothing_left()
