# SPDX-License-Identifier: Apache-2.0
"""``pveplug import``: images as qemu-img writes them, into a file as it reads them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pveplug.cli import main
from tests.support import truth
from tests.support.requires import requires

pytestmark = [pytest.mark.integration, requires("qemu-img", "qemu-nbd", "qemu-io")]

VARIANTS = {
    "raw": ("raw",),
    "vmdk-sparse": ("vmdk", "subformat=monolithicSparse"),
    "vmdk-stream": ("vmdk", "subformat=streamOptimized"),
    "vhdx": ("vhdx",),
    "vhdx-fixed": ("vhdx", "subformat=fixed"),
    "vhd": ("vpc", "force_size=on"),
    "qcow2": ("qcow2",),
    "qcow2-zstd": ("qcow2", "compression_type=zstd"),
}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text(f'runtime_dir = "{tmp_path / "r"}"\n')
    monkeypatch.setenv("PODHEITOR_PROXMOX_NODE", str(file))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """8 MiB with noise, text, zeroes that are written and holes."""
    content, rng = bytearray(8 << 20), random.Random(3)
    content[510:512] = b"\x55\xaa"  # or a raw image would be nothing that is known
    content[65536:1_300_000] = rng.randbytes(1_300_000 - 65536)
    content[3 << 20 : (3 << 20) + 5000] = b"some text " * 500
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_becomes_a_file_with_the_same_content(
    node: None, disk: Path, tmp_path: Path, variant: str, fmt: str
) -> None:
    kind, *options = VARIANTS[variant]
    image = tmp_path / f"image.{kind}"
    truth.run(
        *("qemu-img", "convert", "-f", "raw", "-O", kind),
        *(word for option in options for word in ("-o", option)),
        *(str(disk), str(image)),
    )
    out = tmp_path / "out"
    assert main(["import", str(image), "--to-file", str(out), "--format", fmt]) == 0
    assert truth.sha256_of_image(out, fmt) == truth.sha256_of_image(disk, "raw")
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_chain_is_put_in_its_order_and_applied(
    node: None, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, first, second = (tmp_path / f"{n}.qcow2" for n in ("full", "a", "b"))
    truth.run("qemu-img", "convert", "-O", "qcow2", str(disk), str(full))
    for child, parent, words in (
        (first, full, ["write -P 7 1M 64k", "write -z 3M 64k"]),
        (second, first, ["write -P 8 1088k 64k", "write -P 9 7M 64k"]),
    ):
        made = ("create", "-q", "-f", "qcow2", "-b", parent.name, "-F", "qcow2")
        truth.run("qemu-img", *made, str(child))
        for word in words:
            truth.run("qemu-io", "-f", "qcow2", "-c", word, str(child))
    given = [str(second), str(full), str(first)]
    assert main(["import", *given, "--info"]) == 0
    said = capsys.readouterr().out
    assert said.index("full.qcow2") < said.index("a.qcow2") < said.index("b.qcow2")
    assert "virtual size  8388608 bytes (8.0 MiB)" in said
    out = tmp_path / "out.raw"
    assert main(["import", *given, "--to-file", str(out)]) == 0
    assert truth.sha256_of_image(out, "raw") == truth.sha256_of_image(second, "qcow2")


def test_a_vmdk_of_several_files_is_one_disk(
    node: None, disk: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    made = ("convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat")
    truth.run("qemu-img", *made, str(disk), str(folder / "vm.vmdk"))
    out = tmp_path / "out.raw"
    given = [str(path) for path in sorted(folder.iterdir())]
    assert len(given) == 2
    assert main(["import", *given, "--to-file", str(out)]) == 0
    assert truth.sha256_of_image(out, "raw") == truth.sha256_of_image(disk, "raw")


def test_a_flat_vmdk_and_its_snapshot_are_a_chain(
    node: None, disk: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    flat, snapshot = folder / "vm.vmdk", folder / "vm-000001.vmdk"
    made = ("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat")
    truth.run("qemu-img", *made, str(disk), str(flat))
    made = ("create", "-q", "-f", "vmdk", "-b", str(flat), "-F", "vmdk")
    truth.run("qemu-img", *made, "-o", "subformat=twoGbMaxExtentSparse", str(snapshot))
    words = ("-c", "write -P 7 1M 64k", "-c", "write -P 8 5M 192k")
    truth.run("qemu-io", "-f", "vmdk", *words, str(snapshot))
    given = [str(path) for path in sorted(folder.iterdir())]
    assert len(given) == 4
    out = tmp_path / "out.raw"
    assert main(["import", *given, "--to-file", str(out)]) == 0
    assert truth.sha256_of_image(out, "raw") == truth.sha256_of_image(snapshot, "vmdk")


def test_ended_by_a_signal_no_file_is_left(disk: Path, tmp_path: Path) -> None:
    """SIGTERM, as systemd and a closed session send it, while more is awaited."""
    node = tmp_path / "node.toml"
    node.write_text(f'runtime_dir = "{tmp_path / "r"}"\n')
    pipe, out = tmp_path / "pipe.raw", tmp_path / "out.raw"
    with pipe.open("wb") as file:
        file.write(disk.read_bytes())
        file.truncate(1 << 40)  # reading it takes long
    process = subprocess.Popen(
        [sys.executable, "-m", "pveplug", "import", str(pipe), "--to-file", str(out)],
        env={**os.environ, "PODHEITOR_PROXMOX_NODE": str(node)},
        stderr=subprocess.PIPE,
    )
    try:
        until = time.monotonic() + 60
        part = tmp_path / ".out.raw.part"
        while time.monotonic() < until:
            if part.exists() and part.stat().st_blocks:
                break  # it is being written
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 69
    assert b"interrupted" in said
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    assert not out.exists()


def test_what_is_damaged_or_alone_leaves_no_file(
    node: None, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.raw"
    vmdk = tmp_path / "image.vmdk"
    made = ("convert", "-O", "vmdk", "-o", "subformat=streamOptimized")
    truth.run("qemu-img", *made, str(disk), str(vmdk))
    vmdk.write_bytes(vmdk.read_bytes()[:-70_000])
    assert main(["import", str(vmdk), "--to-file", str(out)]) == 65
    assert "image.vmdk" in capsys.readouterr().err

    child = tmp_path / "child.qcow2"
    full = tmp_path / "full.qcow2"
    truth.run("qemu-img", "convert", "-O", "qcow2", str(disk), str(full))
    made = ("create", "-q", "-f", "qcow2", "-b", full.name, "-F", "qcow2")
    truth.run("qemu-img", *made, str(child))
    assert main(["import", str(child), "--to-file", str(out)]) == 65
    assert "builds on another image (full.qcow2)" in capsys.readouterr().err

    assert main(["import", str(tmp_path / "none"), "--info"]) == 78
    out.write_bytes(b"mine")
    assert main(["import", str(full), "--to-file", str(out)]) == 78
    assert out.read_bytes() == b"mine"
    assert list(tmp_path.glob(".*")) == []
