# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from pveplug.describe import safexml, sidecar
from pveplug.describe.guest import (
    MAX_REPORTED,
    Bus,
    Family,
    Firmware,
    mac_address,
    reported,
)
from pveplug.describe.reading import Kind, detect, read_description, read_one
from pveplug.describe.systems import system_of
from pveplug.errors import DescriptionError
from pveplug.texts import known_encoding
from pveplug.units import MiB

HERE = Path(__file__).parent / "descriptions"
VMX = 'config.version = "8"\nvirtualHW.version = "19"\nmemSize = "512"\n'
NS = "http://schemas.dmtf.org/ovf/envelope/1"


def kept(name: str) -> bytes:
    return (HERE / name).read_bytes()


def vmx(text: str, encoding: str = "utf-8"):
    return read_one("a.vmx", (VMX + text).encode(encoding))


def ovf(items: str = "", parts: str = "", system: str = "", outer: str = "") -> bytes:
    return (
        f'<Envelope xmlns="{NS}" xmlns:ovf="{NS}" xmlns:vmw="urn:v">{parts}'
        f'<VirtualSystem ovf:id="vm">{system}<VirtualHardwareSection>{items}'
        f"</VirtualHardwareSection></VirtualSystem>{outer}</Envelope>"
    ).encode()


def item(kind: int, **fields: object) -> str:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<Item><ResourceType>{kind}</ResourceType>{inner}</Item>"


# ---- which file it is


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("windows-2022.vmx", Kind.VMX),
        ("ubuntu.vmx", Kind.VMX),
        ("vmware.ovf", Kind.OVF),
        ("virtualbox.ovf", Kind.OVF),
        ("hyperv-gen1.xml", Kind.HYPERV_XML),
        ("powershell.xml", Kind.POWERSHELL),
        ("powershell.json", Kind.POWERSHELL),
        ("sidecar.json", Kind.SIDECAR),
    ],
)
def test_a_description_is_known_by_content_and_never_by_name(name, kind):
    data = kept(name)
    assert detect(data) is kind
    assert read_description({"x.bin": data, "nvram": b"\0" * 600, "e": b""})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\ncreateType=x\n",
        b'.encoding = "UTF-8"\nsnapshot.lastUID = "1"\n',
        b"<?xml version='1.0'?><Foundry><VM/></Foundry>",
        b'{"a": 1}',
        b"[1, 2",
        b"Windows log: memsize = 4",
    ],
)
def test_what_describes_no_vm_is_passed_over(data):
    assert detect(data) is None
    with pytest.raises(DescriptionError, match="describes no VM"):
        read_description({"some.file": data})
    with pytest.raises(DescriptionError, match=r"some\.file"):
        read_one("some.file", data)


def test_the_best_of_several_descriptions_is_read_and_the_others_named():
    files = {name: kept(name) for name in ("sidecar.json", "ubuntu.vmx", "vmware.ovf")}
    found = read_description(files)
    assert found.name == "mail"
    assert "ubuntu.vmx, vmware.ovf" in found.notes[-1]
    with pytest.raises(DescriptionError, match="2 files describe a VM, each a VMX"):
        read_description({"a": kept("ubuntu.vmx"), "b": kept("many-disks.vmx")})
    twice = {"a": kept("ubuntu.vmx"), "b": kept("ubuntu.vmx")}
    assert read_description(twice).name == "shop.example.org"


def test_checkpoints_of_an_export_do_not_count():
    files = {
        "Virtual Machines/1.xml": kept("hyperv-gen1.xml"),
        "Snapshots/2.xml": kept("hyperv-gen2.xml"),
    }
    assert read_description(files).name == "Dateien & Druck"


def test_a_binary_configuration_asks_for_the_sidecar():
    data = b"\x14\x20\x28\x01" + bytes(5000)
    assert detect(data) is Kind.VMCX
    with pytest.raises(DescriptionError, match="sidecar") as error:
        read_description({"web.vmcx": data, "web.vmrs": data + b"1"})
    assert "Export-Clixml" in str(error.value)


def test_an_export_of_2008_is_named():
    data = b"<DECLARATIONS><DECLGROUP/></DECLARATIONS>"
    with pytest.raises(DescriptionError, match=r"Windows Server 2008 \(\.exp\)"):
        read_description({"a.exp": data})


def test_the_descriptor_in_an_ova_is_read_from_its_beginning():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("x.ovf", kept("vmware.ovf")), ("d.vmdk", bytes(9000))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    ova = made.getvalue()
    whole = read_description({"x.ova": ova[:-9000]})
    assert whole.name == "log-collector"
    assert detect(ova[:2000]) is None  # its descriptor is cut


# ---- XML of strangers

LAUGHS = (
    '<!DOCTYPE Envelope [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in ("ab", "bc", "cd", "de"))
    + "]>"
)


@pytest.mark.parametrize(
    "prolog",
    [
        LAUGHS,
        '<!DOCTYPE Envelope [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE Envelope SYSTEM "http://192.0.2.1/x.dtd">',
        '<!DOCTYPE Envelope [<!ENTITY % p SYSTEM "http://192.0.2.1/x"> %p;]>',
        "<!DOCTYPE Envelope>",
        '<?xml version="1.0"?>\n<!DOCTYPE Envelope PUBLIC "a" "b">',
    ],
)
def test_a_document_type_declaration_is_refused_where_it_begins(prolog):
    body = ovf().decode().replace("<VirtualHardwareSection>", "&e;&x;", 1)
    with pytest.raises(DescriptionError, match=r"DTD") as error:
        read_description({"evil.ovf": (prolog + body).encode()})
    assert error.value.file == "evil.ovf"
    assert error.value.line == prolog.count("\n") + 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<a>" * 70, "nested deeper than 64"),
        (b"<a>" + b"<b/>" * 100_001, "more than 100000 elements"),
        (b"<a>" + b"<b a='' b='' c=''/>" * 26_000, "more than 100000 elements"),
        (b"<a>" + b"x" * (MiB + 1) + b"</a>", "more than 1048576 characters"),
        (b"<a " + b" ".join(b"a%d=''" % n for n in range(200)), "not well-formed"),
        (
            b"<a " + b" ".join(b"a%d=''" % n for n in range(200)) + b"/>",
            "200 attributes",
        ),
        (b"<a>" + b" " * (4 * MiB), "bytes of XML"),
        (b"<a>", "not well-formed XML: no element found"),
        (b"<a></b>", "mismatched tag"),
        (b"<x:a/>", "unbound prefix"),
        (b"<?xml version='1.0' encoding='punycode'?><a/>", "encoding punycode"),
        (b"<?xml version='1.0' encoding='gbk'?><a>\xff\xff</a>", "isn't gbk"),
        (b"<a>&bogus;</a>", "undefined entity"),
    ],
)
def test_xml_beyond_its_bounds_is_refused_by_name(data, says):
    with pytest.raises(DescriptionError, match=says) as error:
        safexml.parse(data, "f.xml")
    assert error.value.file == "f.xml"
    assert "\n" not in str(error.value)


def test_hostile_xml_takes_no_more_memory_than_its_bounds():
    # Per byte of input: elements weigh most. A tenth of what is allowed, for time.
    data = b"<a>" + b"<b/>" * 9_900 + b"</a>"
    tracemalloc.start()
    try:
        safexml.parse(data, "f")
        assert tracemalloc.get_traced_memory()[1] < 12 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-8", "UTF-16"),
        ("utf-8", "utf-16le"),
        ("utf-8-sig", "UTF-8"),
        ("cp1252", "windows-1252"),
        ("latin-1", "ISO-8859-1"),
    ],
)
def test_xml_is_read_by_what_its_bytes_are(encoding, says):
    text = kept("hyperv-gen1.xml").decode().replace("Keller", "Käller")
    data = text.replace("UTF-8", says, 1).encode(encoding)
    assert read_description({"x": data}).text == "im Käller"


def test_xml_in_an_encoding_of_several_bytes_is_read():
    text = kept("hyperv-gen1.xml").decode().replace("Keller", "地下室")
    data = text.replace("UTF-8", "Shift_JIS", 1).encode("shift_jis")
    assert read_description({"x": data}).text == "im 地下室"


# ---- VMX


def test_a_vmx_is_read_in_the_encoding_it_names():
    name = 'displayName = "Bücher |FC |E4"\n'
    by_line = vmx('.encoding = "windows-1252"\n' + name, "cp1252")
    assert by_line.name == "Bücher ü ä"
    assert vmx('.encoding = "Shift_JIS"\ndisplayName = "本"\n', "cp932").name == "本"
    assert vmx('displayName = "Bücher |C3|BC"\n').name == "Bücher ü"
    assert vmx('displayName = "B\xfccher"\n', "latin-1").name == "Bücher"
    assert vmx('.encoding = "punycode"\ndisplayName = "x"\n').name == "x"


def test_a_vmx_has_keys_in_any_case_and_the_last_line_counts():
    assert read_one("a", b"#!/usr/bin/vmware\n" + VMX.encode()).memory_mib == 512
    found = vmx('DISPLAYNAME = "a"\ndisplayname="b" # no\nNumVCPUs = 2\n\n#x\n\0\n')
    assert (found.name, found.sockets, found.cores) == ("b", 2, 1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no equals sign", r"a\.vmx:4: not a line of key"),
        ('displayName = "open', "not a line of key"),
        ('displayName = "a" "b"', "not a line of key"),
        ('memSize = "-1"', r"a\.vmx:4: memsize = '-1' is no number from 1 to"),
        ('memSize = "99999999999"', "no number"),
        ('numvcpus = "0"', "no number"),
        ('cpuid.coresPerSocket = "x"', "no number"),
    ],
)
def test_a_vmx_with_nonsense_is_refused_by_its_line(line, says):
    with pytest.raises(DescriptionError, match=says):
        vmx(line + "\n")


def test_a_vmx_that_is_too_long_is_refused():
    with pytest.raises(DescriptionError, match="lines"):
        vmx("\n" * 50_001)
    with pytest.raises(DescriptionError, match="no VMX is longer"):
        vmx("#" * (4 * MiB))


def test_devices_of_a_vmx_without_a_counterpart_are_named():
    found = vmx(
        'sound.present = "TRUE"\nusb.present = "TRUE"\nserial1.present = "TRUE"\n'
        'serial1.fileName = "com1"\nfloppy0.present = "FALSE"\n'
        'vhv.enable = "TRUE"\nscsi0:3.fileName = "raw"\nscsi0:3.deviceType = '
        '"scsi-passthru"\nscsi1.present = "FALSE"\nscsi1:0.fileName = "x.vmdk"\n'
        'scsi1:0.present = "TRUE"\n'
    )
    assert dict(found.dropped).keys() == {
        *("sound", "serial1", "vhv.enable", "scsi0:3", "scsi1:0"),
    }
    assert found.disks == ()


def test_an_encrypted_vmx_is_refused_as_such():
    data = b'.encoding = "UTF-8"\ndisplayName = "x"\nencryption.data = "AAEC/w=="\n'
    with pytest.raises(DescriptionError, match=r"a\.vmx:3: the VM is encrypted"):
        read_description({"a.vmx": data})


def test_the_clock_of_a_vmx_is_known_only_when_it_is_utc():
    assert vmx('rtc.diffFromUTC = "0"\n').localtime is False
    assert vmx('rtc.diffFromUTC = "3600"\n').localtime is None


def test_a_vmx_counts_scsi_before_sata_before_ide():
    lines = "".join(
        f'{at}.present = "TRUE"\n{at}.fileName = "{n}.vmdk"\n'
        for n, at in enumerate(
            ("ide0:0", "nvme0:0", "sata0:10", "sata0:9", "scsi1:0", "scsi0:1")
        )
    )
    found = vmx(lines + 'bios.hddOrder = "sata0:9,scsi0:1"\n')
    order = ["scsi0:1", "scsi1:0", "sata0:9", "sata0:10", "ide0:0", "nvme0:0"]
    assert [disk.key for disk in found.disks] == order
    assert found.boot_disk.key == "sata0:9"


# ---- OVF


def test_units_of_an_ovf_are_understood():
    for unit, size in (
        ("byte * 2^20", 2048),
        ("byte*2^20", 2048),
        ("byte * 1024 * 1024", 2048),
        ("MegaBytes", 2048),
        ("byte * 2^30", 2048 * 1024),
        ("byte * 10^6", 1954),
        ("", 2048),
    ):
        unit = f"<AllocationUnits>{unit}</AllocationUnits>"
        one = item(4, VirtualQuantity=2048).replace("</Item>", unit + "</Item>")
        assert read_one("a", ovf(one)).memory_mib == size


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (ovf(item(4, VirtualQuantity=1, AllocationUnits="parsec")), "as a unit"),
        (ovf(item(4, VirtualQuantity=1, AllocationUnits="byte * 2^99")), "a unit of"),
        (ovf(item(4, VirtualQuantity=1 << 58)), "bytes of memory"),
        (ovf(item(3, VirtualQuantity="many")), "'many' in Item is no number"),
        (ovf(item("x")), "'x' in Item is no number"),
        (ovf(outer="<VirtualSystem/>"), "describes 2 VMs"),
        (f'<Envelope xmlns="{NS}"><References/></Envelope>'.encode(), "no VM"),
        (ovf(item(17, HostResource="ovf:/disk/9")), "disk/9 isn't in the file"),
        (ovf(parts="<DiskSection><Disk capacity='x'/></DiskSection>"), "no number"),
    ],
)
def test_an_ovf_with_nonsense_is_refused_with_its_line(data, says):
    with pytest.raises(DescriptionError, match=says) as error:
        read_one("a.ovf", data)
    assert str(error.value).startswith("a.ovf:1: ")


def test_the_default_configuration_of_an_ovf_is_read():
    options = (
        '<DeploymentOptionSection><Configuration ovf:id="small"/>'
        '<Configuration ovf:id="big" ovf:default="true"/></DeploymentOptionSection>'
    )
    items = "".join(
        item(4, VirtualQuantity=size).replace("<Item", f'<Item ovf:configuration="{c}"')
        for c, size in (("small", 1), ("big", 2), ("small other", 4), ("a big", 8))
    )
    assert read_one("a", ovf(items, options)).memory_mib == 10


def test_an_ovf_that_says_nothing_of_firmware_means_bios_only_with_vmware():
    system = "<System><VirtualSystemType>vmx-13</VirtualSystemType></System>"
    assert read_one("a", ovf(system)).firmware is Firmware.BIOS
    assert read_one("a", ovf()).firmware is Firmware.UNKNOWN


def test_an_empty_disk_of_an_ovf_keeps_its_place_and_is_noted():
    parts = (
        '<References><File ovf:id="f" ovf:href="x/a.vmdk"/></References><DiskSection>'
        '<Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="${size}"/>'
        '<Disk ovf:diskId="e" ovf:capacity="7" ovf:capacityAllocationUnits="byte"/>'
        "</DiskSection>"
    )
    items = (
        item(6, InstanceID=1, ResourceSubType="lsilogicsas")
        + item(17, Parent=1, AddressOnParent=1, HostResource="/disk/d", InstanceID=2)
        + item(17, Parent=1, AddressOnParent=0, HostResource="ovf:/disk/e")
        + item(17, HostResource="ovf:/file/f")
        + item(15, Parent=1, AddressOnParent=2, HostResource="ovf:/file/f")
    )
    boot = '<vmw:BootOrderSection vmw:type="disk" vmw:instanceId="2"/>'
    found = read_one("a.ovf", ovf(items, parts, boot))
    assert [(d.key, d.file, d.capacity) for d in found.disks] == [
        ("scsi0:0", None, 7),
        ("scsi0:1", "x/a.vmdk", None),
        ("unknown0:1000", "x/a.vmdk", None),
    ]
    assert found.boot_disk.key == "scsi0:1"
    assert found.cdroms[0].file == "x/a.vmdk"
    assert any("empty" in note for note in found.notes)


def test_a_file_without_a_name_is_no_file():
    data = kept("vmware.ovf").replace(b'ovf:href="log-disk2.vmdk"', b'ovf:href=""')
    assert read_one("a", data).disks[1].file is None
    path = rb'<pathname type="string">D:\VMs\files\files.vhdx'
    data = kept("hyperv-gen1.xml")
    assert path in data
    data = data.replace(path, b'<pathname type="string">')
    assert read_one("a", data).disks[0].file is None


def test_a_collection_of_one_and_a_draft_of_2007_are_read():
    one = ovf(item(4, VirtualQuantity=64)).decode()
    inner = one[one.index("<VirtualSystem") : one.index("</Envelope>")]
    outer = '<VirtualSystemCollection ovf:id="app"><Info/>'
    nested = one.replace(inner, f"{outer}{inner}</VirtualSystemCollection>")
    assert read_one("a", nested.encode()).memory_mib == 64
    draft = (
        f'<ovf:Envelope xmlns:ovf="{NS}" xmlns:xsi="urn:xsi"><References/>'
        '<ovf:Content ovf:id="old" xsi:type="ovf:VirtualSystem_Type">'
        '<Section xsi:type="ovf:VirtualHardwareSection_Type">'
        f"{item(4, VirtualQuantity=32)}</Section></ovf:Content></ovf:Envelope>"
    )
    found = read_one("a", draft.encode())
    assert (found.name, found.memory_mib) == ("old", 32)


def test_controllers_of_an_ovf_are_told_apart_and_places_are_not_shared():
    items = (
        item(5, InstanceID=1)
        + item(5, InstanceID=2)
        + item(20, InstanceID=3, ResourceSubType="vmware.nvme.controller")
        + item(20, InstanceID=4, ResourceSubType="VirtioSCSI")
        + item(6, InstanceID=5, ResourceSubType="virtio")
        + item(
            17,
            Parent=2,
            AddressOnParent=1,
            AllocationUnits="byte * 2^30",
            VirtualQuantity=3,
        )
        + item(17, Parent=2, AddressOnParent=1)
        + item(17, Parent=3, AddressOnParent=0)
        + item(17, Parent=4, AddressOnParent=0)
        + item(3, VirtualQuantity=3, CoresPerSocket=2)
        + item(10, Address="ff:ff:ff:ff:ff:ff", ElementName="NIC")
        + item(99, ElementName="a thing")
    )
    found = read_one("a", ovf(items))
    assert {disk.key: disk.capacity for disk in found.disks} == {
        "virtio0:0": None,
        "ide1:1": 3 << 30,
        "ide1:2": None,
        "nvme0:0": None,
    }
    assert (found.sockets, found.cores) == (3, 1)
    assert found.dropped == (
        ("NIC MAC address", "ff:ff:ff:ff:ff:ff"),
        ("device of type 99", "a thing"),
    )


# ---- Hyper-V


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("hyperv-gen1.xml", ">1024</size>", ">lots</size>", "size is 'lots'"),
        ("hyperv-gen1.xml", ">2</count>", ">0</count>", "count is '0'"),
        ("powershell.json", '"ProcessorCount": 2', '"ProcessorCount": -2', "'-2'"),
        ("powershell.json", "2147483648", "99999999999999999999", "no number"),
    ],
)
def test_numbers_of_hyper_v_that_are_absurd_are_refused(name, old, new, says):
    data = kept(name).decode()
    assert old in data
    with pytest.raises(DescriptionError, match=says):
        read_one(name, data.replace(old, new, 1).encode())


def test_a_passed_through_disk_of_powershell_is_named():
    vm = json.loads(kept("powershell.json"))
    vm["HardDrives"][0]["DiskNumber"] = 3
    vm["NetworkAdapters"] *= 40
    found = read_one("x", json.dumps(vm).encode())
    assert found.disks == ()
    assert len(found.nics) == 32
    assert [what for what, _ in found.dropped] == ["ide0:0", "network cards"]
    with pytest.raises(KeyError):
        found.disk("ide0:0")


def test_clixml_with_references_in_circles_ends():
    text = kept("powershell.xml").decode()
    ring = text.replace("<LST />", '<LST><Ref RefId="0" /><Ref RefId="7" /></LST>')
    assert read_one("x", ring.encode()).name == "crm"


def test_an_export_of_several_vms_is_refused():
    one = json.loads(kept("powershell.json"))
    assert read_one("x", json.dumps([one]).encode()).name == "old-erp"
    with pytest.raises(DescriptionError, match="holds 2 VMs"):
        read_one("x", json.dumps([one, one]).encode())


def test_what_powershell_writes_is_read_in_utf_16_too():
    text = kept("powershell.json").decode()
    assert read_description({"x": text.encode("utf-16")}).name == "old-erp"


# ---- sidecar


def changed(**fields: object) -> bytes:
    value = {"schema": "pveplug-guest/1", "name": "a", **fields}
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(schema="pveplug-guest/2"), "version 2 isn't known"),
        (changed(firmwarex="bios"), "'firmwarex' isn't known; did you mean firmware"),
        (changed(firmware="efi"), "firmware: is to be one of bios, uefi, unknown"),
        (changed(cores="4"), "cores: is to be a whole number"),
        (changed(cores=True), "cores: is to be a whole number"),
        (changed(memory_mib=1.5), "memory_mib"),
        (changed(tpm=1), "tpm: is to be true, false or null"),
        (changed(name=5), "name: is to be a text"),
        (changed(name="a\nb"), "name: has a control character"),
        (changed(text="a\x00"), "text: has a control character"),
        (changed(uuid="x"), "uuid"),
        (changed(disks={}), "disks: is to be a list"),
        (changed(disks=[1]), r"disks\[0\]: is to be an object"),
        (changed(disks=[{"bus": "scsi", "size": 1}]), "'size' isn't known"),
        (changed(disks=[{"unit": 1}, {"unit": 1}]), "two drives at unknown0:1"),
        (changed(nics=[{"mac": "01:00:5e:00:00:01"}]), r"nics\[0\]\.mac"),
        (changed(nics=[{"vlan": 4095}]), "vlan"),
        (changed(nics=[{}] * 33), "nics: is to be a list of at most 32"),
        (changed(dropped=[["one"]]), r"dropped\[0\]: is to be \[what, why\]"),
        (b'{"schema": "pveplug-guest/1", "name": "a", "name": "b"}', "there twice"),
        (b'{"schema": "pveplug-guest/1", "cores": NaN}', "NaN is no JSON"),
        (b'{"schema": "pveplug-guest/1", "cores": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"schema": "pveplug-guest/1",\n "cores": }', r"x:2: not JSON"),
        (b'{"schema": "pveplug-guest/1", "x-y": ' + b"[" * 100_000, "too deep|JSON"),
    ],
)
def test_a_sidecar_with_a_slip_is_refused_by_field(data, says):
    with pytest.raises(DescriptionError, match=says):
        read_description({"x": data})


def test_a_minimal_sidecar_is_enough():
    found = read_description({"x": b'{"schema": "pveplug-guest/1"}'})
    assert found.firmware is Firmware.UNKNOWN
    disks = [{"file": "a"}, {"file": "b"}]
    found = read_description({"x": changed(disks=disks, os_id="Ubuntu 22.04")})
    assert [disk.key for disk in found.disks] == ["unknown0:0", "unknown0:1"]
    assert found.family is Family.LINUX
    assert found.disks[0].bus is Bus.UNKNOWN


def test_fields_of_the_sidecar_are_all_in_its_document():
    text = (HERE.parents[2] / "docs" / "descriptions.md").read_text(encoding="utf-8")
    for names in sidecar._FIELDS.values():
        for name in names.split():
            assert f"| `{name}` |" in text, name


# ---- small parts


@pytest.mark.parametrize(
    ("text", "mac"),
    [
        ("00:50:56:AA:bb:01", "00:50:56:aa:bb:01"),
        ("00-15-5D-00-00-01", "00:15:5d:00:00:01"),
        ("00155D000001", "00:15:5d:00:00:01"),
        ("0015.5d00.0001", "00:15:5d:00:00:01"),
        ("000000000000", None),
        ("01:00:5e:00:00:01", None),
        ("ff:ff:ff:ff:ff:ff", None),
        ("00:50:56", None),
        ("", None),
    ],
)
def test_an_address_is_one_of_a_card_or_none(text, mac):
    assert mac_address(text) == mac


def test_a_flood_of_what_was_dropped_is_counted_not_told():
    told = reported((f"device {n}", "odd\n") for n in range(1000))
    assert len(told) == MAX_REPORTED + 1
    assert told[-1][0] == "800 more"
    assert told[0] == ("device 0", "odd")


@pytest.mark.parametrize(
    ("name", "ostype", "storage", "nic"),
    [
        ("windows2022srvNext-64", "win11", "ahci", "e1000e"),
        ("windows2019srvNext_64Guest", "win11", "ahci", "e1000e"),
        ("windows9Server64Guest", "win10", "ahci", "e1000e"),
        ("windows9_64Guest", "win10", "ahci", "e1000e"),
        ("Microsoft Windows Server 2012 R2 (64-bit)", "win8", "ahci", "e1000e"),
        ("windows7srv-64", "win7", "ide", "e1000"),
        ("Microsoft® Windows Server® 2008 R2 (64-bit)", "win7", "ide", "e1000"),
        ("longhorn-64", "w2k8", "ide", "e1000"),
        ("winNetEnterprise-64", "w2k3", "ide", "rtl8139"),
        ("winXPPro64Guest", "wxp", "ide", "rtl8139"),
        ("Windows11_64", "win11", "ahci", "e1000e"),
        ("some future Windows", "win10", "ahci", "e1000e"),
        ("ubuntu64Guest", "l26", "virtio", "virtio"),
        ("debian12_64Guest", "l26", "virtio", "virtio"),
        ("debian4-64", "l26", "ide", "e1000"),
        ("rockylinux_64Guest", "l26", "kept", "virtio"),
        ("centos5-64", "l26", "ide", "e1000"),
        ("sles15_64Guest", "l26", "kept", "virtio"),
        ("otherLinux64Guest", "l26", "kept", "e1000"),
        ("other26xLinuxGuest", "l26", "ide", "e1000"),
        ("solaris11_64Guest", "solaris", "ahci", "e1000"),
        ("freebsd13-64", "other", "ahci", "e1000"),
        ("darwin21_64Guest", "other", "ahci", "e1000"),
        ("", "other", "ahci", "e1000"),
    ],
)
def test_systems_are_known_by_everybodys_names(name, ostype, storage, nic):
    found = system_of(name)
    assert (found.ostype, found.storage.value, found.nic) == (ostype, storage, nic)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("UTF-8", "utf-8"),
        ("windows-1252", "cp1252"),
        ("Shift_JIS", "shift_jis"),
        ("punycode", None),
        ("zip", None),
        ("unicode_escape", None),
        ("cp9999", None),
        ("", None),
    ],
)
def test_only_encodings_of_files_are_known(name, known):
    assert known_encoding(name) == known
