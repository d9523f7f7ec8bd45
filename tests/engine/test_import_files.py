# SPDX-License-Identifier: Apache-2.0
"""Files of a foreign VM in any order: which disk each belongs to, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import pytest

from pveplug.errors import JobError
from pveplug.events import ListReporter
from pveplug.images.stream import Event, ImageInfo
from pveplug.import_disk import ImportDisk
from pveplug.import_files import Arrival, ForeignFiles, Progress
from tests.support.foreign import Told, some_disk

SIZE = 1 << 20
"""Of the disks here."""


class Free:
    async def spend(self, size: int) -> None:
        pass


@dataclass
class Disk(ImportDisk):
    """What a disk was told, in place of a volume."""

    name: str
    size: int
    told: Told = field(default_factory=Told)
    adopted: list[ImageInfo] = field(default_factory=list)

    def adopt(self, info: ImageInfo) -> None:
        self.adopted.append(info)


class Vm:
    """Stands for ImportVm: a disk for each image."""

    vmid = 0
    name = "web"

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.ended: list[str] = []

    async def image(
        self,
        file: str,
        info: ImageInfo,
        file_size: int | None,
        *,
        size: int | None = None,
    ) -> Disk:
        disk = Disk(file, size or info.size or file_size or 0)
        self.disks[file] = disk
        return disk

    async def take(self, disk: Disk, events: Iterable[Event]) -> None:
        # A raw image's size is known at its end only.
        disk.told.take(
            dataclasses.replace(e, size=disk.size) if isinstance(e, ImageInfo) else e
            for e in events
        )

    async def end(self, disk: Disk, modified: int | None = None) -> None:
        self.ended.append(disk.name)


@pytest.fixture
def vm() -> Vm:
    return Vm()


def files_of(vm: Vm, say: ListReporter | None = None, **more: object) -> ForeignFiles:
    say = say or ListReporter()
    progress = Progress(say, "web")
    raw = more.get("raw", ())
    return ForeignFiles(vm, raw, "/nowhere", Free(), progress, say)  # type: ignore[arg-type]


async def give(files: ForeignFiles, name: str, data: bytes, piece: int = 65536) -> None:
    async def pieces() -> AsyncIterator[memoryview]:
        for at in range(0, len(data), piece):
            yield memoryview(data)[at : at + piece]

    await files.receive(Arrival(f"/@vsphere/web/{name}", len(data)), pieces())


def flat(seed: int = 1) -> bytes:
    content = bytearray(some_disk(SIZE, seed))
    content[510:512] = b"\x55\xaa"
    return bytes(content)


def descriptor(*extents: str, cid: str = "1234abcd", parent: str = "ffffffff") -> bytes:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        f"CID={cid}",
        f"parentCID={parent}",
        'createType="vmfs"',
        *extents,
    ]
    return "\n".join(lines).encode() + b"\n"


SECTORS = SIZE // 512
ONE = f'RW {SECTORS} VMFS "web-flat.vmdk" 0'


@pytest.mark.parametrize("piece", [1000, 65536, 4 << 20])
async def test_a_descriptor_is_followed_by_its_extent(vm: Vm, piece: int) -> None:
    files = files_of(vm)
    await give(files, "web.vmdk", descriptor(ONE), piece)
    assert vm.ended == []
    await give(files, "web-flat.vmdk", flat(), piece)
    files.all_came()
    assert vm.ended == ["/@vsphere/web/web.vmdk"]
    assert bytes(vm.disks["/@vsphere/web/web.vmdk"].told.disk) == flat()


async def test_a_flat_disk_may_come_before_its_descriptor(vm: Vm) -> None:
    files = files_of(vm)
    await give(files, "web-flat.vmdk", flat())
    await give(files, "web.vmdk", descriptor(ONE))
    files.all_came()
    (disk,) = vm.disks.values()
    assert bytes(disk.told.disk) == flat()
    assert [info.identity for info in disk.adopted] == ["1234abcd"]


async def test_parts_before_their_descriptor_are_refused(vm: Vm) -> None:
    files = files_of(vm)
    half = SECTORS // 2
    await give(files, "web-f001.vmdk", flat()[: SIZE // 2])
    with pytest.raises(JobError, match=r"came after web-f001\.vmdk, which is a part"):
        await give(
            files,
            "web.vmdk",
            descriptor(
                f'RW {half} FLAT "web-f001.vmdk" 0', f'RW {half} FLAT "web-f002.vmdk" 0'
            ),
        )


async def test_two_disks_may_come_between_each_other(vm: Vm) -> None:
    files = files_of(vm)
    other = ONE.replace("web-flat", "data-flat")
    await give(files, "web.vmdk", descriptor(ONE))
    await give(files, "data.vmdk", descriptor(other))
    await give(files, "data-flat.vmdk", flat(2))
    await give(files, "web-flat.vmdk", flat(1))
    files.all_came()
    found = {name: bytes(disk.told.disk) for name, disk in vm.disks.items()}
    assert found == {
        "/@vsphere/web/web.vmdk": flat(1),
        "/@vsphere/web/data.vmdk": flat(2),
    }


@pytest.mark.parametrize("flats_first", [False, True])
async def test_disks_of_one_name_in_two_folders_are_not_mixed_up(
    vm: Vm, flats_first: bool
) -> None:
    """As ESXi has it: ``[ds1] web/web.vmdk`` and ``[ds2] web/web.vmdk``."""
    files = files_of(vm)
    descriptors = [
        ("a/web.vmdk", descriptor(ONE, cid="aaaaaaaa")),
        ("b/web.vmdk", descriptor(ONE, cid="bbbbbbbb")),
    ]
    flats = [("b/web-flat.vmdk", flat(2)), ("a/web-flat.vmdk", flat(1))]
    for name, data in [*flats, *descriptors] if flats_first else [*descriptors, *flats]:
        await give(files, name, data)
    files.all_came()
    assert len(vm.disks) == 2
    for name, disk in vm.disks.items():
        a = "/a/" in name
        assert bytes(disk.told.disk) == flat(1 if a else 2)
        if flats_first:
            assert [i.identity for i in disk.adopted] == [
                ("aaaaaaaa", "bbbbbbbb")[not a]
            ]


async def test_an_extent_in_another_folder_is_taken_while_there_is_but_one(
    vm: Vm,
) -> None:
    files = files_of(vm)
    await give(files, "meta/web.vmdk", descriptor(ONE))
    await give(files, "data/web-flat.vmdk", flat())
    files.all_came()
    assert vm.ended == ["/@vsphere/web/meta/web.vmdk"]
    with pytest.raises(JobError, match=r"other/web-flat.vmdk .*beside neither"):
        await give(files, "other/web-flat.vmdk", flat(2))


async def test_a_descriptor_beside_none_of_two_extents_is_refused(vm: Vm) -> None:
    files = files_of(vm)
    await give(files, "a/web-flat.vmdk", flat(1))
    await give(files, "b/web-flat.vmdk", flat(2))
    with pytest.raises(JobError, match=r"meta/web\.vmdk .*beside neither"):
        await give(files, "meta/web.vmdk", descriptor(ONE))


async def test_an_extent_belongs_to_the_descriptor_of_its_folder(vm: Vm) -> None:
    files = files_of(vm)
    for folder in ("ds1", "ds2"):
        await give(files, f"{folder}/web.vmdk", descriptor(ONE))
    for number, folder in ((2, "ds2"), (1, "ds1")):
        await give(files, f"{folder}/web-flat.vmdk", flat(number))
    files.all_came()
    found = {name: bytes(disk.told.disk) for name, disk in vm.disks.items()}
    assert found == {
        "/@vsphere/web/ds1/web.vmdk": flat(1),
        "/@vsphere/web/ds2/web.vmdk": flat(2),
    }


async def test_extents_that_did_not_come_are_named(vm: Vm) -> None:
    files = files_of(vm)
    await give(files, "web.vmdk", descriptor(ONE))
    with pytest.raises(JobError, match=r"did not come: web-flat\.vmdk.*Remedy: select"):
        files.all_came()
    files.close()


async def test_small_files_are_kept_or_passed_over_by_what_they_are(vm: Vm) -> None:
    say = ListReporter()
    files = files_of(vm, say)
    await give(files, "web.vmx", b'displayName = "web"\n')
    await give(files, "later/web.vmx", b'displayName = "web, later"\n')
    await give(files, "vmware.log", b"log\n")
    await give(files, "huge.xml", b"<x>" + bytes(17 << 20))
    assert files.descriptions == {"web.vmx": b'displayName = "web, later"\n'}
    said = [text for _, text in say.lines]
    assert said[0] == "/@vsphere/web/vmware.log is not needed and was passed over"
    assert "huge.xml is longer than 16.0 MiB" in said[1]
    assert vm.disks == {}


async def test_an_unknown_file_is_no_disk_unless_the_operator_says_so(vm: Vm) -> None:
    data = b"HVRCT\1" + bytes(4090)
    with pytest.raises(JobError, match=r"48 56 52 43 54 01.*known are block-delta"):
        await give(files_of(vm), "d.vhdx", data)
    await give(files_of(vm, raw=("d.*",)), "d.vhdx", data)
    (disk,) = vm.disks.values()
    assert bytes(disk.told.disk) == data


async def test_a_damaged_file_is_named_with_its_format_and_byte(vm: Vm) -> None:
    bad = b"vhdxfile" + bytes(1 << 20)
    with pytest.raises(
        JobError, match=r"web disk d\.vhdx \(import\): d\.vhdx: vhdx at"
    ):
        await give(files_of(vm), "d.vhdx", bad)


async def test_progress_is_said_now_and_then() -> None:
    say = ListReporter()
    progress = Progress(say, "web", interval_s=0)
    progress.add(Arrival("/@vsphere/web/d.vmdk", 4 << 20), 1 << 20)
    ((kind, text),) = say.lines
    assert kind == "info"
    assert text.startswith("web d.vmdk: 1.0 MiB of 4.0 MiB read, ")
