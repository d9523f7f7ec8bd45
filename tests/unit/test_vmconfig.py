# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import ConfigError
from pveplug.units import GiB, KiB, MiB
from pveplug.vmconfig import (
    Drive,
    current_section_text,
    drives,
    from_api,
    parse_config,
    parse_drive,
    parse_size,
    properties,
    render_properties,
    render_size,
    smbios_uuid,
)

FILE = """\
#Web server
#50%25 of load%3A gr%C3%B6%C3%9Fe
boot: order=scsi0;net0
cores: 2
name: web
scsi0: local-lvm:vm-100-disk-0,iothread=1,size=32G
smbios1: uuid=11111111-2222-3333-4444-55555555AAAA
unused0: local:100/vm-100-disk-1.qcow2

[PENDING]
cores: 4
delete: net1,net2

[before]
#taken before the upgrade
cores: 1
parent: other
snaptime: 1700000000

[special:cloudinit]
name: web
"""
GOLDEN = Path(
    os.environ.get("PVEPLUG_PVE_DATA", Path(__file__).parents[3] / "shared" / "data")
) / "pve-golden-cmdlines.json"  # fmt: skip

keys = st.from_regex("[a-z][a-z0-9]{0,8}", fullmatch=True)
values = st.text(
    st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]),
    min_size=1,
    max_size=20,
)


def test_every_section_of_a_file_goes_where_it_belongs():
    parsed = parse_config(FILE)
    assert parsed.current["description"] == "Web server\n50% of load: größe"
    assert parsed.current["cores"] == "2"
    assert parsed.current["boot"] == "order=scsi0;net0"
    assert parsed.pending == {"cores": "4"}
    assert parsed.pending_delete == ("net1", "net2")
    assert parsed.snapshots["before"] == {
        "cores": "1", "parent": "other", "snaptime": "1700000000",
        "description": "taken before the upgrade",
    }  # fmt: skip
    assert parsed.special == {"cloudinit": {"name": "web"}}


def test_vm_conf_is_the_current_section_alone_and_reads_back_the_same():
    current = parse_config(FILE).current
    text = current_section_text(current)
    assert "[" not in text
    assert "cores: 4" not in text
    again = parse_config(text)
    assert again.current == current
    assert not again.pending
    assert not again.snapshots


@given(st.dictionaries(keys, values, max_size=5), st.text(max_size=40))
def test_any_configuration_survives_vm_conf(config, description):
    config = {k: v for k, v in config.items() if k not in ("description", "digest")}
    if description.rstrip("\n"):
        config["description"] = description.rstrip("\n")
    try:
        text = current_section_text(config)
    except UnicodeEncodeError:
        return
    assert parse_config(text).current == config


def test_what_the_api_returns_becomes_text_without_the_digest():
    assert from_api({"cores": 2, "onboot": True, "digest": "x", "name": "w"}) == {
        "cores": "2", "onboot": "1", "name": "w"
    }  # fmt: skip


def test_a_value_with_a_line_break_cannot_smuggle_a_key_into_vm_conf():
    with pytest.raises(ConfigError, match="line break"):
        current_section_text({"name": "x\nargs: -evil"})


def test_a_line_that_is_not_pve_s_is_refused_by_number():
    with pytest.raises(ConfigError, match="line 2"):
        parse_config("name: x\nrubbish\n")


@pytest.mark.parametrize(
    ("key", "text", "storage", "form", "cdrom", "cloudinit", "backup"),
    [
        ("scsi0", "local-lvm:vm-1-disk-0,size=1G", "local-lvm", None, 0, 0, 1),
        ("scsi0", "nas:1/vm-1-disk-0.qcow2,backup=0", "nas", "qcow2", 0, 0, 0),
        ("scsi0", "file=nas:1/vm-1-disk-0.raw,backup=no", "nas", "raw", 0, 0, 0),
        ("sata1", "/dev/disk/by-id/ata-x:1,size=1G", None, None, 0, 0, 1),
        ("ide2", "none,media=cdrom", None, None, 1, 0, 1),
        ("ide2", "cdrom,media=cdrom", None, None, 1, 0, 1),
        ("ide2", "local:iso/x.iso,media=cdrom", "local", None, 1, 0, 1),
        ("ide0", "nas:1/vm-1-cloudinit.qcow2,media=cdrom", "nas", "qcow2", 1, 1, 1),
        ("ide0", "lvm:vm-1-cloudinit,media=cdrom", "lvm", None, 1, 1, 1),
        ("scsi3", "zfs:base-9-disk-0/vm-1-disk-0,backup=1", "zfs", None, 0, 0, 1),
    ],
)
def test_a_drive_knows_what_it_is(key, text, storage, form, cdrom, cloudinit, backup):
    drive = parse_drive(key, text)
    assert drive.storage == storage
    assert drive.format == form
    assert drive.is_cdrom is bool(cdrom)
    assert drive.is_cloudinit is bool(cloudinit)
    assert drive.backup is bool(backup)
    assert parse_drive(key, drive.render()) == drive


def test_drives_are_found_in_natural_order_and_nothing_else_is_one():
    config = {
        "scsi10": "a1:x", "scsi2": "a1:x", "scsihw": "virtio-scsi-pci", "ide4": "a1:x",
        "virtio15": "a1:x", "virtio16": "a1:x", "efidisk0": "a1:x", "scsi31": "a1:x",
    }  # fmt: skip
    assert [d.key for d in drives(config)] == [
        "efidisk0", "scsi2", "scsi10", "virtio15"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("32G", 32 * GiB), ("528K", 528 * KiB), ("4M", 4 * MiB), ("512", 512),
     ("1.5G", 1536 * MiB)],
)  # fmt: skip
def test_sizes_are_read_as_pve_writes_them(text, size):
    assert parse_size(text) == size
    assert parse_size(render_size(size)) == size


@pytest.mark.parametrize("text", ["", "x", "1X", "-1G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError):
        parse_size(text)


def test_a_drive_without_a_volume_or_with_a_key_twice_is_refused():
    with pytest.raises(ConfigError, match="names no volume"):
        parse_drive("scsi0", "size=1G")
    with pytest.raises(ConfigError, match="malformed"):
        parse_drive("scsi0", "a:b,size=1G,size=2G")
    with pytest.raises(ConfigError, match="malformed"):
        properties("a,b", "file")


def test_property_strings_round_trip():
    text = "virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1"
    assert render_properties(properties(text)) == text
    assert Drive("scsi0", "a:b", (("size", "1G"),)).get("size") == "1G"


def test_the_identity_of_a_vm_is_its_smbios_uuid_in_lower_case():
    current = parse_config(FILE).current
    assert smbios_uuid(current) == "11111111-2222-3333-4444-55555555aaaa"
    assert smbios_uuid({}) is None
    assert smbios_uuid({"smbios1": "manufacturer=QQ==,base64=1"}) is None


@pytest.mark.optional("recorded PVE data lies beside the project, not in it")
@pytest.mark.skipif(not GOLDEN.exists(), reason="recorded PVE data is not here")
def test_recorded_pve_configurations_are_understood():
    for vm in json.loads(GOLDEN.read_text())["vms"].values():
        current = parse_config(vm["conf"]).current
        assert parse_config(current_section_text(current)).current == current
        assert list(drives(current))


@given(st.text("[]#:=,\nabcPENDIGscsi0123 ", max_size=60))
def test_any_text_is_a_configuration_or_refused(text):
    with contextlib.suppress(ConfigError):
        list(drives(parse_config(text).current))
