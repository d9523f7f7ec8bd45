# SPDX-License-Identifier: Apache-2.0
"""``pveplug verify``: files as Bacula alone restores them, whole and damaged."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pveplug.cli import main
from pveplug.verify import DAMAGED, MISSING, UNPROVEN, Verify
from tests.support.stored import a_chain


@pytest.fixture
def homes(tmp_path):
    return a_chain(edges=65536).write(tmp_path / "restored")


def verified(*paths):
    verify = Verify(map(str, paths))
    verify.run()
    return verify


def wrong(*paths):
    """Return what is wrong, as (path below the VM's directory, state, text)."""
    return [
        ("/".join(found.path.split("/")[-2:]), found.state, found.text)
        for found in verified(*paths).findings
        if not found.good
    ]


def turn(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_whole_chain_is_good_and_each_file_has_its_line(homes, capsys):
    root = homes[0].parents[2]
    assert main(["verify", str(root)]) == 0
    out = capsys.readouterr().out.splitlines()
    files = [f"{home}/{name}" for home in homes for name in os.listdir(home)]
    assert len(files) == 27
    assert sorted(line.split(": ")[0] for line in out[:-1]) == sorted(
        f"OK       {path}" for path in files
    )
    assert out[-1].startswith("3 jobs, ")
    assert out[-1].endswith("of images read: 27 ok, 0 damaged")
    assert main(["verify", "--quiet", str(root)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_holes_are_not_read_and_each_byte_is_read_once(homes):
    verify = verified(*homes, homes[0].parent)
    sizes = [p.stat() for home in homes for p in home.glob("*.qcow2")]
    assert verify.good
    assert 0 < verify.done <= sum(status.st_blocks for status in sizes) * 512
    assert verify.done < sum(status.st_size for status in sizes) - 10 * 65536


def test_a_flipped_bit_is_told_with_file_disk_and_offset(homes, capsys):
    image = homes[1] / "scsi0.qcow2"
    # Header, L1, L2, its first data cluster; the last one of the disk is in MiB 2.
    turn(image, 4 * 65536 + 777)
    assert main(["verify", "--json", str(homes[0].parent)]) == 65
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "damaged"
    (found,) = [f for f in report["files"] if f["state"] != "ok"]
    assert found["path"] == str(image)
    assert found["state"] == "damaged"
    assert (found["disk"], found["disk_offset"]) == ("scsi0", 2 << 20)
    assert found["job"] == homes[1].name
    assert main(["verify", "-q", str(homes[0].parent)]) == 65
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"DAMAGED  {image}: disk scsi0: ")
    assert "near byte 2097152 (MiB 2) is not what was backed up" in line


@pytest.mark.parametrize("offset", [0, 70, 65536, 2 * 65536 + 8])
def test_a_flipped_bit_of_metadata_is_told_with_its_offset_in_the_file(homes, offset):
    turn(homes[0] / "scsi0.qcow2", offset, 5)
    (found,) = [f for f in verified(homes[0]).findings if not f.good]
    assert found.state == DAMAGED
    assert found.file_offset is not None
    assert found.file_offset // 65536 == offset // 65536


def test_a_lost_zero_cluster_is_told(homes):
    # Entry 26 of the L2 table: a zero cluster in a MiB without data.
    turn(homes[1] / "scsi0.qcow2", 2 * 65536 + 26 * 8 + 7)
    ((path, state, text),) = wrong(homes[1])
    assert (path, state) == (f"{homes[1].name}/scsi0.qcow2", DAMAGED)
    assert "zero clusters are not those that were backed up" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vm.conf", "not the text that the manifest has of it"),
        ("firewall.fw", "not the text that the manifest has of it"),
        ("scsi0.digests", "not the digests whose root the manifest has"),
        ("edges.bin", "not the file whose digest the manifest has"),
        ("layout.json", "own digest differs"),
        ("manifest.json", "own digest differs"),
    ],
)
def test_a_flipped_bit_in_a_small_file_is_told_and_the_rest_is_good(homes, name, text):
    turn(homes[1] / name, (homes[1] / name).stat().st_size // 2)
    found = wrong(homes[0].parent)
    assert [path for path, _, _ in found] == [f"{homes[1].name}/{name}"]
    assert found[0][1] == DAMAGED
    assert text in found[0][2]


def test_a_member_that_is_missing_is_told_with_who_needs_it(homes):
    shutil.rmtree(homes[1])
    found = wrong(homes[0].parent)
    assert found == [
        (
            f"{homes[1].name}/{key}.qcow2",
            MISSING,
            f"job {homes[2].name}'s image of {key} builds on it",
        )
        for key in ("scsi0", "scsi1")
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("scsi0.qcow2", "scsi0.digests", "vm.conf", "layout.json", "manifest.json"),
        "edges.bin",
    ],
)
def test_a_file_that_is_missing_from_a_job_is_told(homes, name):
    (homes[2] / name).unlink()
    found = wrong(homes[0].parent)
    assert [(path, state) for path, state, _ in found] == [
        (f"{homes[2].name}/{name}", MISSING)
    ]


def test_swapped_members_are_told_with_whose_they_are(homes):
    one, two = (home / "scsi0.qcow2" for home in homes[:2])
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    found = wrong(homes[0].parent)
    assert [path for path, _, _ in found] == [
        f"{home.name}/scsi0.qcow2" for home in homes[:2]
    ]
    for (_, state, text), home in zip(found, homes, strict=False):
        assert state == DAMAGED
        assert f"job {home.name}: the image of scsi0 names " in text
        assert "it is the image of another job" in text
    assert f"(its header fits job {homes[1].name} of " in found[0][2]


def test_another_vms_image_is_told(homes, tmp_path):
    others = a_chain(vmid=101, seed=2).write(tmp_path / "others")
    shutil.copyfile(others[1] / "scsi0.qcow2", homes[1] / "scsi0.qcow2")
    ((path, state, text),) = wrong(homes[0].parent)
    assert (path, state) == (f"{homes[1].name}/scsi0.qcow2", DAMAGED)
    assert "is not what was backed up" in text
    (homes[1] / "scsi0.qcow2").rename(homes[1] / "scsi7.qcow2")
    found = dict((path, text) for path, _, text in wrong(homes[1]))
    assert "knows no such image" in found[f"{homes[1].name}/scsi7.qcow2"]


def test_another_vms_directory_is_told(homes, tmp_path):
    others = a_chain(vmid=101, seed=2).write(tmp_path / "others")
    shutil.rmtree(homes[1])
    shutil.copytree(others[1], homes[1])
    found = wrong(homes[0].parent)
    assert found[0][0] == f"{homes[1].name}/manifest.json"
    assert "it belongs to /@proxmox/101-1a2b3c4d/" in found[0][2]


def test_a_member_from_another_life_of_the_chain_is_told(homes, tmp_path):
    others = a_chain(seed=3).write(tmp_path / "others")
    shutil.rmtree(homes[1])
    shutil.copytree(others[1], homes[1])
    found = wrong(homes[0].parent)
    assert {path for path, _, _ in found} == {
        f"{home.name}/manifest.json" for home in homes[1:]
    }
    for (_, _, text), parent in zip(found, homes, strict=False):
        assert f"the manifest of job {parent.name} is not the one" in text


def test_one_file_is_compared_with_what_lies_beside_it(homes, capsys):
    image = homes[2] / "scsi0.qcow2"
    assert main(["verify", str(image)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"OK       {image}")
    turn(image, 3 * 65536)
    assert main(["verify", str(image)]) == 65
    shutil.rmtree(homes[1])
    shutil.copyfile(homes[0] / "scsi0.qcow2", image)
    assert [path for path, _, _ in wrong(image)] == [
        f"{homes[2].name}/scsi0.qcow2",
        f"{homes[1].name}/scsi0.qcow2",
    ]


def test_a_cut_image_and_one_that_goes_on_are_told(homes):
    image = homes[0] / "scsi0.qcow2"
    size = image.stat().st_size
    os.truncate(image, size - 65536)
    assert "the stream ends here of" in wrong(homes[0])[0][2]
    with image.open("r+b") as file:
        file.truncate(size)
        file.seek(size + 100)
        file.write(b"x")
    assert wrong(homes[0])


def test_backups_without_digests_are_said_to_be_unproven(tmp_path, capsys):
    homes = a_chain(digests=False).write(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    assert "digests=no" in capsys.readouterr().out
    assert verified(tmp_path).count(UNPROVEN) == 6
    # Their structure is compared all the same.
    turn(homes[1] / "scsi0.qcow2", 2 * 65536 + 26 * 8 + 7)
    assert "its manifest says" in wrong(tmp_path)[0][2]


def test_an_image_without_a_manifest_is_unproven_and_that_is_missing(homes):
    (homes[2] / "manifest.json").unlink()
    found = {f.path: f.state for f in verified(homes[2]).findings}
    assert found[str(homes[2] / "manifest.json")] == MISSING
    assert found[str(homes[2] / "scsi0.qcow2")] == UNPROVEN


def test_a_renamed_place_is_no_damage(homes, tmp_path):
    homes[0].parents[2].rename(tmp_path / "moved")
    (tmp_path / "moved/@proxmox").rename(tmp_path / "moved/backups")
    (tmp_path / "moved/backups/100-1a2b3c4d").rename(tmp_path / "moved/backups/web")
    assert verified(tmp_path / "moved").good


@pytest.mark.parametrize("name", ["empty", "not-there", "note.txt"])
def test_nothing_of_ours_has_a_status_of_its_own(tmp_path, homes, name, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("x")
    place = str(tmp_path / name)
    assert main(["verify", place]) == 66
    assert capsys.readouterr().err == (
        f"pveplug: {place}: no file of a backup is there\n"
    )
    assert main(["verify", str(homes[0]), place]) == 66
    turn(homes[0] / "vm.conf", 1)
    assert main(["verify", str(homes[0]), place]) == 65
    assert main(["verify", "--json", place]) == 66
    assert '"verdict": "nothing"' in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_told(homes, monkeypatch):
    def fail(fd, buffers, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    found = wrong(homes[0])
    assert [path for path, _, _ in found] == [
        f"{homes[0].name}/scsi{n}.qcow2" for n in (0, 1)
    ]
    assert found[0][2] == "it can't be read: Input/output error"


def test_a_file_system_without_seek_data_is_read_whole(homes, monkeypatch):
    lseek = os.lseek

    def refuse(fd, at, how):
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(22, "Invalid argument")
        return lseek(fd, at, how)

    monkeypatch.setattr(os, "lseek", refuse)
    verify = verified(homes[0].parent)
    assert verify.good
    assert verify.done == sum(
        p.stat().st_size for home in homes for p in home.glob("*.qcow2")
    )


def test_a_terminal_sees_how_far_it_is(homes, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("pveplug.command_verify.STEP_S", 0)
    assert main(["verify", "-q", str(homes[0].parent)]) == 0
    assert " of 3." in capsys.readouterr().err
