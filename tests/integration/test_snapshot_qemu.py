# SPDX-License-Identifier: Apache-2.0
"""The point in time on a real QEMU; a stranger (libnbd) reads it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pveplug.cbt import Level
from pveplug.guestlatency import Counters, counters, slowest
from pveplug.snapshot import SnapshotDisk
from tests.support.bare_qemu import BareQemu, DiskImage, make_image
from tests.support.points import full_read, point, rebuilt, taken, unique

pytestmark = pytest.mark.integration
SIZE = 24 << 20


@pytest.mark.parametrize("layout", ["blockdev", "drive"])
@pytest.mark.parametrize("mechanism", ["cbw", "fleece"])
async def test_a_chain_of_segments_restores_every_point_in_time(
    base: Path, layout: str, mechanism: str
) -> None:
    disks = {
        "scsi0": make_image(base / "a.qcow2", "qcow2", SIZE),
        "scsi1": make_image(base / "b.raw", "raw", SIZE + 512 * 3),
    }
    rng = random.Random(7)
    restored: dict[str, dict[str, bytes]] = {}
    with BareQemu(base, layout, disks) as vm:

        def scribble(count: int) -> None:
            for _ in range(count):
                key = rng.choice(["scsi0", "scsi1"])
                at, length = rng.randrange(SIZE // 4096 - 32) * 4096, 4096 * 4
                vm.io(key, f"write -P {rng.randrange(1, 255)} {at} {length}")
                vm.io(key, f"write -z -u {rng.randrange(300) * 65536} 64k")

        scribble(30)
        chain = [
            ("01", "F", None),
            ("02", "I", "01"),
            ("03", "I", "02"),
            ("04", "D", "01"),
            ("05", "I", "04"),
            ("06", "I", "03"),  # D4 and I5 were disowned
        ]
        for job, letter, parent in chain:
            async with taken(
                point(vm, mechanism), vm, job, letter, parent,
                prepared=lambda: scribble(5), switched=lambda: scribble(20),
            ) as opened:  # fmt: skip
                scribble(5)
                for disk in opened:
                    assert disk.plan is not None
                    assert (disk.context is None) == (letter == "F")
                    assert (disk.plan.whole is None) == (letter != "F")
                    assert disk.plan.parent_job == (parent and unique(parent))
                    truth = full_read(disk, base / "truth")
                    old = restored[parent][disk.key] if parent else None
                    image, _ = rebuilt(disk, truth, old)
                    assert image == truth
                    restored.setdefault(job, {})[disk.key] = image
                    assert full_read(disk, base / "again") == truth
            assert vm.ours() == []
            scribble(10)
        inserted = [b["inserted"] for b in vm.command("query-block")]  # type: ignore[attr-defined]
        assert all(i["detect_zeroes"] == "unmap" for i in inserted)
        assert all(i["cache"]["direct"] for i in inserted)
    assert not list(base.glob("scratch-*"))


@pytest.mark.parametrize("layout", ["blockdev", "drive"])
@pytest.mark.parametrize("mechanism", ["cbw", "fleece"])
@pytest.mark.parametrize("step", ["prepare", "switch", "publish"])
async def test_clean_up_from_names_frees_the_vm_after_any_step(
    base: Path, layout: str, mechanism: str, step: str
) -> None:
    disks = {
        "scsi0": make_image(base / "a.qcow2", "qcow2", SIZE),
        "scsi1": make_image(base / "b.raw", "raw", SIZE),
    }
    with BareQemu(base, layout, disks) as vm:
        first = point(vm, mechanism)
        await first.prepare(unique("01"), Level("F"), vm.volids)
        if step != "prepare":
            await first.switch()
        if step == "publish":
            await first.publish()
        assert vm.ours() != []
        second = point(vm, mechanism)
        await second.prepare(unique("02"), Level("I", unique("01")), vm.volids)
        await second.switch()
        for disk in await second.publish():
            assert disk.plan is not None
            assert (disk.plan.whole is None) == (step != "prepare")
        vm.io("scsi0", "write -P 9 0 64k")
        assert second.notes
        await second.close()
        assert vm.ours() == []
        assert vm.command("query-status")["status"] == "running"  # type: ignore[index]


async def take(vm: BareQemu, job: str, level: Level) -> SnapshotDisk:
    """Take a point in time of the one disk and let it go again."""
    snapshot = point(vm)
    async with taken(snapshot, vm, job, level.letter, level.parent_job) as (disk,):
        pass
    assert snapshot.notes == []
    return disk


def segments(vm: BareQemu) -> dict[str, int]:
    """Return the job number and granularity of each segment there is."""
    (block,) = vm.command("query-block")  # type: ignore[misc]
    named = [b for b in block["inserted"].get("dirty-bitmaps", []) if "name" in b]
    return {b["name"][-11:][:2]: b["granularity"] for b in named}


@pytest.mark.parametrize("layout", ["blockdev", "drive"])
async def test_a_hole_in_the_history_is_cut_off_in_the_switch(
    base: Path, layout: str
) -> None:
    with BareQemu(base, layout, {"scsi0": make_image(base / "a", "raw", SIZE)}) as vm:
        await take(vm, "01", Level("F"))
        await take(vm, "02", Level("I", unique("01")))
        (block,) = vm.command("query-block")  # type: ignore[misc]
        node = block["inserted"]["node-name"]
        (name,) = [
            b["name"] for b in block["inserted"]["dirty-bitmaps"] if b["recording"]
        ]
        vm.command("block-dirty-bitmap-disable", node=node, name=name)
        vm.io("scsi0", "write -P 9 1M 64k")  # nobody has seen it
        await take(vm, "03", Level("F"))
        assert len(segments(vm)) == 1
        # Job 3 was disowned: job 4 must not join what was before the hole to it.
        disk = await take(vm, "04", Level("D", unique("01")))
        assert disk.plan is not None
        assert "is gone" in str(disk.plan.whole)
        again = await take(vm, "05", Level("I", unique("04")))
        assert again.plan is not None
        assert again.plan.whole is None


async def test_segments_have_64_kib_whatever_the_images_clusters(base: Path) -> None:
    path = base / "a.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"]
    subprocess.run([*argv, str(path), str(SIZE)], check=True)
    with BareQemu(base, "blockdev", {"scsi0": DiskImage(path, "qcow2", SIZE)}) as vm:
        await take(vm, "01", Level("F"))
        disk = await take(vm, "02", Level("I", unique("01")))
        assert disk.plan is not None
        assert disk.plan.whole is None
        assert set(segments(vm).values()) == {65536}


@pytest.mark.parametrize("layout", ["blockdev", "drive"])
async def test_the_guests_own_requests_are_timed_with_and_without_a_filter(
    base: Path, layout: str
) -> None:
    def now() -> Counters:
        return counters(vm.command("query-blockstats"))  # type: ignore[arg-type]

    with BareQemu(base, layout, {"scsi0": make_image(base / "a", "raw", SIZE)}) as vm:
        before = now()
        vm.io("scsi0", "aio_write -q -P 9 1M 64k")
        vm.io("scsi0", "aio_flush")
        assert (slowest(before, now()) or 0) > 0
        snapshot = point(vm, "auto")
        await snapshot.prepare(unique("01"), Level("F"), vm.volids)
        await snapshot.switch()
        (disk,) = await snapshot.publish()
        before = now()
        full_read(disk, base / "copy")
        reads = now()["scsi0", "rd"][0] - before["scsi0", "rd"][0]
        assert reads < 10, "the backup's own reads are counted"  # the BIOS has a few
        vm.io("scsi0", "aio_write -q -P 8 1M 64k")
        vm.io("scsi0", "aio_flush")
        assert (slowest(before, now()) or 0) > 0
        await snapshot.close()


@contextlib.contextmanager
def frozen_store(where: Path) -> Iterator[None]:
    """A file system on which no write returns within the block."""
    subprocess.run(["fsfreeze", "-f", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", where], check=True)


def took(vm: BareQemu, text: str) -> float:
    began = time.monotonic()
    vm.io("scsi0", text)
    return time.monotonic() - began


@pytest.mark.alone
async def test_a_stuck_scratch_store_costs_a_guest_the_timeout_once(
    base: Path, file_system: Callable[[str, int], Path]
) -> None:
    store = file_system("ext4", 64)
    disk_image = make_image(base / "a", "raw", SIZE)
    with BareQemu(base, "blockdev", {"scsi0": disk_image}) as vm:
        vm.io("scsi0", "write -q -P 1 0 24M")
        snapshot = point(vm, "cbw", store=store, cbw_timeout_s=1)
        await snapshot.prepare(unique("01"), Level("F"), vm.volids)
        await snapshot.switch()
        (disk,) = await snapshot.publish()
        assert took(vm, "write -q -P 2 0 64k") < 1
        with frozen_store(store):
            assert 0.9 < took(vm, "write -q -P 3 8M 64k") < 3
            for at in range(9, 20):
                assert took(vm, f"write -q -P 4 {at}M 64k") < 0.9
        assert "failed" not in (base / "qemu.err").read_text()
        with pytest.raises(subprocess.CalledProcessError):
            full_read(disk, base / "copy")
        await snapshot.close()
        assert vm.ours() == []


@pytest.mark.alone
@pytest.mark.parametrize("mechanism", ["cbw", "fleece"])
async def test_a_reader_that_stands_still_does_not_hold_the_guest(
    base: Path, mechanism: str
) -> None:
    disk_image = make_image(base / "a", "raw", SIZE)
    with BareQemu(base, "blockdev", {"scsi0": disk_image}) as vm:
        vm.io("scsi0", "write -q -P 1 0 24M")
        snapshot = point(vm, mechanism)
        await snapshot.prepare(unique("01"), Level("F"), vm.volids)
        await snapshot.switch()
        (disk,) = await snapshot.publish()
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(disk.socket)
            ask_and_never_read(reader, disk.export)
            for at in range(0, 24, 2):
                assert took(vm, f"write -q -P 4 {at}M 64k") < 1
        # Gone, as a killed backend is; before, QEMU would not let go of its requests.
        await snapshot.close()
        assert vm.ours() == []


def ask_and_never_read(reader: socket.socket, export: str) -> None:
    """Handshake, ask for 24 MiB in pieces, and take none of it."""
    reader.recv(18, socket.MSG_WAITALL)
    name = export.encode()
    reader.sendall(
        struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name
    )  # NBD_OPT_EXPORT_NAME, without the zeroes after its answer
    reader.recv(10, socket.MSG_WAITALL)
    for number in range(SIZE >> 20):
        reader.sendall(
            struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number << 20, 1 << 20)
        )
    time.sleep(0.2)
