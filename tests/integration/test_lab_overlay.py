# SPDX-License-Identifier: Apache-2.0
"""A VM on overlays over NBD: it runs, pauses, goes on, and moves to its own storage.

The NBD server is nbdkit: what is proved here is the ground instant recovery stands on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.lab.site import Site, short_base
from tests.lab.vm import LabVm
from tests.support.nbd_servers import NBDKIT, running
from tests.support.requires import GUEST, requires, requires_file
from tests.support.stranger import Client, program

pytestmark = [pytest.mark.integration, requires("nbdkit")]
LAYOUTS = ["pc", "pc-i440fx-9.2+pve1"]
MIB = 1 << 20
BOOT_S = 180


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site(short_base()) as made:
        made.add_storage("ir")
        yield made


@contextlib.contextmanager
def served(where: Path, image: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """One image, read-only, on a unix socket that may be taken up again.

    It ends as in a crash. One that ends in peace answers ESHUTDOWN before it hangs up,
    and QEMU waits for a lost connection alone: an error that was answered is an error.
    """
    where.unlink(missing_ok=True)
    argv = [NBDKIT, "--foreground", "--readonly", "--unix", str(where)]
    argv += ["--filter=rate", *(m for m in more if m.startswith("--"))]
    argv += ["file", str(image), *(m for m in more if not m.startswith("--"))]
    with running(argv, str(where)) as process:
        try:
            yield process
        finally:
            process.kill()


async def overlay(
    site: Site, vmid: int, number: int, socket: Path, size: int, *, wait_s: int = 3600
) -> str:
    """Allocate a volume by API and make it an overlay over an NBD export."""
    api, name = Client(site), f"vm-{vmid}-disk-{number}.qcow2"
    status, text, body = await api(
        "POST", "/nodes/pve1/storage/ir/content",
        filename=name, vmid=str(vmid), size=str(size >> 10), format="qcow2",
    )  # fmt: skip
    assert status == 200, text
    server = {"type": "unix", "path": str(socket)}
    nbd = {"driver": "nbd", "server": server, "export": "scsi0"}
    nbd |= {"reconnect-delay": wait_s, "open-timeout": 30}
    backing = "json:" + json.dumps({"driver": "raw", "file": nbd})
    volid = str(body["data"])
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
    argv += [site.storages["ir"].path(volid), str(size)]
    subprocess.run(argv, check=True)
    return volid


async def recovering(
    site: Site, vmid: int, volid: str, machine: str, **config: str
) -> LabVm:
    """Make and start the VM as instant recovery does: by a token, then as root."""
    api = Client(site)
    new = {"vmid": str(vmid), "memory": "128", "scsihw": "virtio-scsi-single"}
    new |= {"machine": machine, "serial0": "socket", "onboot": "0", **config}
    assert await api.task("POST", "/nodes/pve1/qemu", **new) == "OK"
    drive = f"{volid},rerror=stop,werror=stop,iothread=1"
    values = {"scsi0": drive, "protection": "1", "tags": "pveplug-ir", "boot": "order="
              "scsi0", "description": "runs from a backup: 100%\nwait"}  # fmt: skip
    argv = [part for k, v in values.items() for part in (f"--{k}", v)]
    done = await program(site, "qm", "set", str(vmid), *argv)
    assert done[0] == 0, done
    assert await program(site, "qm", "start", str(vmid)) == (0, "")
    vm = site.vm(vmid)
    assert vm.modern is (machine == "pc")
    return vm


async def status_of(site: Site) -> str:
    status, said = await program(site, "qm", "status", "100")
    assert status == 0, said
    return said.removeprefix("status: ").rstrip("\n")


async def nbd_nodes(vm: LabVm) -> list[str]:
    nodes = await vm.qmp("query-named-block-nodes", flat=True)
    return [node["node-name"] for node in nodes if node["drv"] == "nbd"]


async def moving(site: Site, *argv: str) -> asyncio.Task[tuple[int, str]]:
    """``qm move-disk 100 …`` on its way: its block job is there."""
    vm = site.vm(100)
    task = asyncio.create_task(program(site, "qm", "move-disk", "100", *argv))
    while not await vm.qmp("query-block-jobs"):
        assert not task.done(), task.result()
        await asyncio.sleep(0.05)
    return task


def patterned(path: Path, mib: int) -> Path:
    """An image of which each MiB has a byte of its own."""
    path.write_bytes(b"".join(bytes([0x20 + at]) * MIB for at in range(mib)))
    return path


@requires_file(GUEST / "boot.raw")
async def test_guest_runs_from_an_overlay_and_moves_while_it_writes(
    site: Site,
) -> None:
    image, socket = GUEST / "boot.raw", site.root / "n.sock"
    with served(socket, image):
        volid = await overlay(site, 100, 0, socket, image.stat().st_size)
        vm = await recovering(site, 100, volid, "pc", agent="1", vga="std")
        await vm.serial_wait("TG:READY", BOOT_S)
        await vm.guest_exec(["tg-mark", "was-here"])
        await vm.guest_exec(["tg-write", "/mnt/before", "0", "64", "one"])
        before = await vm.guest_exec(["tg-sum", "/mnt/before"])
        screen = site.root / "screen.ppm"
        await vm.qmp("screendump", filename=str(screen))
        assert screen.read_bytes().startswith(b"P6")
        await vm.guest_exec(["tg-writer", "/mnt/busy", "60", "s", "40"], wait=False)
        move = await moving(
            site, "scsi0", "local2", "--delete", "1", "--format", "raw",
            "--bwlimit", "20000",
        )  # fmt: skip
        await vm.guest_exec(["tg-write", "/mnt/during", "0", "64", "two"])
        during = await vm.guest_exec(["tg-sum", "/mnt/during"])
        assert not move.done()
        status, said = await move
        assert status == 0, said
        assert f"removing source volume '{volid}' after successful copy" in said
        assert site.storages["ir"].volumes(100) == []
        assert await nbd_nodes(vm) == []
    still = "killall tg-writer; sync; echo 3 >/proc/sys/vm/drop_caches"
    await vm.guest_exec(["/bin/sh", "-c", still])
    assert await vm.guest_exec(["tg-sum", "/mnt/before"]) == before
    assert await vm.guest_exec(["tg-sum", "/mnt/during"]) == during
    assert await vm.guest_exec(["cat", "/mnt/tg-marker"]) == "was-here\n"
    await vm.stop()


@pytest.mark.parametrize("machine", LAYOUTS)
async def test_moved_overlay_holds_the_backup_and_what_was_written_since(
    site: Site, machine: str, tmp_path: Path
) -> None:
    image, socket = patterned(tmp_path / "disk.raw", 24), site.root / "n.sock"
    with served(socket, image):
        volid = await overlay(site, 100, 0, socket, 24 * MIB)
        vm = await recovering(site, 100, volid, machine)
        api, one = Client(site), "/nodes/pve1/qemu/100"
        await vm.qemu_io("scsi0", "write -P 1 4M 64k")
        slow = {"disk": "scsi0", "storage": "local2", "delete": "1", "bwlimit": "4096"}
        began = time.monotonic()
        move = asyncio.create_task(
            api.task("POST", f"{one}/move_disk", **slow, format="raw")
        )
        while not (jobs := await vm.qmp("query-block-jobs")):
            assert not move.done(), move.result()
            await asyncio.sleep(0.02)
        assert [(job["speed"], job["type"]) for job in jobs] == [(4 << 20, "mirror")]
        await vm.qemu_io("scsi0", "write -P 2 23M 64k")
        await vm.qemu_io("scsi0", "write -P 3 0 64k")
        assert await move == "OK"
        assert time.monotonic() - began > 3, "24 MiB at 4 MiB/s, a burst less"
        assert await nbd_nodes(vm) == []
        assert site.storages["ir"].volumes(100) == []
    assert vm.conf.values["scsi0"].startswith("local2:100/vm-100-disk-0.raw,")
    assert "rerror=stop" in vm.conf.values["scsi0"], "the options stay"
    await vm.qemu_io("scsi0", "read -P 1 4M 64k")
    await vm.qemu_io("scsi0", "read -P 48 16M 64k")
    gone = "can't remove VM 100 - protection mode enabled\n"
    assert await program(site, "qm", "destroy", "100", "--purge") == (255, gone)
    await vm.stop()
    written = bytearray(image.read_bytes())
    for at, byte in ((4 * MIB, 1), (23 * MIB, 2), (0, 3)):
        written[at : at + 65536] = bytes([byte]) * 65536
    assert vm.disk_path("scsi0").read_bytes() == bytes(written)
    assert (await program(site, "qm", "set", "100", "--protection", "0"))[0] == 0
    done = await program(site, "qm", "destroy", "100", "--purge", "1")
    assert done == (0, "purging VM 100 from related configurations..\n")


@pytest.mark.parametrize("machine", LAYOUTS)
async def test_reads_wait_for_a_server_that_is_away_and_a_pause_ends_when_it_is_back(
    site: Site, machine: str, tmp_path: Path
) -> None:
    image, socket = patterned(tmp_path / "disk.raw", 8), site.root / "n.sock"
    volid = await overlay(site, 100, 0, socket, 8 * MIB)
    with served(socket, image):
        vm = await recovering(site, 100, volid, machine)
        await vm.qemu_io("scsi0", "read -P 33 1M 64k")
    await asyncio.sleep(2)  # its firmware reads the first sector once a second
    assert await status_of(site) == "running"
    with served(socket, image):
        await vm.qemu_io("scsi0", "read -P 34 2M 64k")
        assert await status_of(site) == "running"
        await vm.stop()


@pytest.mark.parametrize("machine", LAYOUTS)
async def test_read_that_waited_too_long_stops_the_vm_and_is_done_again_on_resume(
    site: Site, machine: str, tmp_path: Path
) -> None:
    image, socket = patterned(tmp_path / "disk.raw", 8), site.root / "n.sock"
    volid = await overlay(site, 100, 0, socket, 8 * MIB, wait_s=1)
    with served(socket, image):
        vm = await recovering(site, 100, volid, machine)
    async with asyncio.timeout(60):
        while await status_of(site) != "io-error":
            await asyncio.sleep(0.1)
    _, _, body = await Client(site)("GET", "/nodes/pve1/qemu/100/status/current")
    assert (body["data"]["status"], body["data"]["qmpstatus"]) == (
        "running",
        "io-error",
    )
    assert "qmpstatus: io-error" in (
        await program(site, "qm", "status", "100", "--verbose")
    )[1].splitlines()  # fmt: skip
    with served(socket, image):
        # QEMU connects again in the background once the delay is over, and until then
        # each read fails at once: one resume may not be enough.
        async with asyncio.timeout(60):
            while await status_of(site) != "running":
                assert await program(site, "qm", "resume", "100") == (0, "")
                await asyncio.sleep(0.5)
        await vm.stop()


async def test_move_whose_source_or_target_fails_leaves_the_vm_as_it_was(
    site: Site, tmp_path: Path, small_disk: object
) -> None:
    assert callable(small_disk)
    site.add_storage("small", root=small_disk("12M"))
    image, socket = patterned(tmp_path / "disk.raw", 24), site.root / "n.sock"
    volid = await overlay(site, 100, 0, socket, 24 * MIB, wait_s=1)
    with served(socket, image):
        vm = await recovering(site, 100, volid, "pc")
        status, said = await program(site, "qm", "move-disk", "100", "scsi0", "small")
        assert status == 255
        failed = "storage migration failed: block job (mirror) error: mirror-scsi0: "
        assert f"{failed}No space left on device (io-status: ok)" in said
        assert site.storages["small"].volumes(100) == []
        move = await moving(site, "scsi0", "local2", "--bwlimit", "4096")
    status, said = await move
    assert status == 255
    assert f"{failed}Input/output error (io-status: ok)" in said
    assert site.storages["local2"].volumes(100) == []
    assert vm.conf.values["scsi0"].startswith(volid)
    names = await vm.qmp("query-named-block-nodes", flat=True)
    assert not any("local2" in str(node.get("file")) for node in names)
    await vm.stop()


async def test_worker_dies_with_its_program_and_the_second_attempt_after_it_moves(
    site: Site, tmp_path: Path
) -> None:
    image, socket = patterned(tmp_path / "disk.raw", 8), site.root / "n.sock"
    volid = await overlay(site, 100, 0, socket, 8 * MIB)
    with served(socket, image):
        vm = await recovering(site, 100, volid, "pc")
        process = await asyncio.create_subprocess_exec(
            str(site.root / "usr/sbin/qm"), "move-disk", "100", "scsi0", "local2",
            "--delete", "--bwlimit", "512", stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not await vm.qmp("query-block-jobs"):
            await asyncio.sleep(0.05)
        locked = "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout"
        with pytest.raises(Exception, match=locked):
            async with site.lock_config(100, patience_s=0.2):
                pass
        process.kill()
        await process.wait()
        async with site.lock_config(100):
            pass
        assert len(await vm.qmp("query-block-jobs")) == 1, "the job goes on"
        assert len(site.storages["local2"].volumes(100)) == 1, "the volume is there"
        assert vm.conf.values["scsi0"].startswith(volid)
        again = ("qm", "move-disk", "100", "scsi0", "local2", "--delete", "1")
        status, said = await program(site, *again)
        assert status == 255
        assert "error starting blockdev mirrror" in said
        assert await vm.qmp("query-block-jobs") == []
        status, said = await program(site, *again)
        assert status == 0, said
        assert await nbd_nodes(vm) == []
        await vm.stop()


async def test_move_is_refused_with_the_texts_pve_has(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "8M"})
    site.add_storage("iso", content="iso")
    snapshotted = vm.conf.values["scsi1"]
    conf = vm.conf
    conf.snapshots["before"] = {"scsi1": snapshotted}
    site.save(site.node, 100, conf)
    move = ("qm", "move-disk", "100")
    same = (255, "you can't move to the same storage with same format\n")
    assert await program(site, *move, "scsi0", "local") == same
    assert await program(site, *move, "scsi0", "local", "--format", "qcow2") == same
    kept = (255, "you can't move a disk with snapshots and delete the source\n")
    assert await program(site, *move, "scsi1", "local2", "--delete", "1") == kept
    absent = (255, "disk 'scsi7' does not exist\n")
    assert await program(site, *move, "scsi7", "local2") == absent
    nowhere = (255, "storage 'none' does not exist\n")
    assert await program(site, *move, "scsi0", "none") == nowhere
    status, said = await program(site, *move, "scsi0", "iso")
    assert (status, "storage 'iso' does not support vm images" in said) == (255, True)
    assert (await program(site, *move, "scsi0"))[1].startswith("400 not enough")
    vm.set(lock="backup")
    locked = (255, "VM is locked (backup)\n")
    assert await program(site, *move, "scsi0", "local2") == locked
    vm.set(lock=None, protection="1")
    status, said = await program(site, *move, "scsi0", "local2", "--delete", "1")
    assert status == 0, "protection keeps a disk from being removed, not from moving"
    assert site.storages["local2"].volumes(100)
    refused = (255, "can't remove drive 'scsi0' - protection mode enabled\n")
    assert await program(site, "qm", "set", "100", "--delete", "scsi0") == refused


@pytest.mark.parametrize("machine", LAYOUTS)
async def test_pause_resume_and_changes_of_a_drive_while_it_runs(
    site: Site, machine: str
) -> None:
    vm = await site.create_vm(100, {"machine": machine}, disks={"scsi0": "8M"})
    vm.set(scsi0=f"{vm.conf.values['scsi0']},rerror=stop,werror=stop")
    await vm.start()
    argv = (site.node.log_dir / "100.argv").read_text()
    assert "rerror=stop,werror=stop" in argv
    assert await status_of(site) == "running"
    assert await program(site, "qm", "suspend", "100") == (0, "")
    assert await status_of(site) == "paused"
    said = (255, "VM is paused - cannot shutdown\n")
    assert await program(site, "qm", "shutdown", "100") == said
    assert await program(site, "qm", "resume", "100") == (0, "")
    assert await program(site, "qm", "resume", "100") == (0, ""), "nothing to do"
    verbose = (await program(site, "qm", "status", "100", "--verbose"))[1]
    assert {"status: running", "qmpstatus: running"} <= set(verbose.splitlines())
    # Nothing of the running QEMU changes, and nothing is pending: PVE's way.
    before = await vm.qmp("query-block")
    drive = vm.conf.values["scsi0"].replace("werror=stop", "werror=report")
    assert (await program(site, "qm", "set", "100", "--scsi0", drive))[0] == 0
    assert vm.conf.pending == {}
    assert "werror=report" in vm.conf.values["scsi0"]
    assert await vm.qmp("query-block") == before
    slowed = f"{vm.conf.values['scsi0']},mbps=3"
    assert (await program(site, "qm", "set", "100", "--scsi0", slowed))[0] == 0
    (disk,) = [b for b in await vm.qmp("query-block") if b.get("qdev") == "scsi0"]
    if vm.modern:
        group = "/objects/throttle-drive-scsi0"
        limits = await vm.qmp("qom-get", path=group, property="limits")
        assert limits["bps-total"] == 3 * MIB
    else:
        assert disk["inserted"]["bps"] == 3 * MIB
    assert vm.conf.pending == {}
    waits = f"{vm.conf.values['scsi0']},cache=unsafe"
    assert (await program(site, "qm", "set", "100", "--scsi0", waits))[0] == 0
    assert list(vm.conf.pending) == ["scsi0"]
    assert "new scsi0: " in (await program(site, "qm", "pending", "100"))[1]
    await vm.stop()
    gone = (255, "VM 100 not running\n")
    assert await program(site, "qm", "suspend", "100") == gone
    assert await program(site, "qm", "resume", "100") == gone


async def test_storages_tell_their_type_space_and_options(site: Site) -> None:
    site.add_storage("nas", "nfs", server="10.0.0.1", export="/x")
    site.add_storage("thin", "lvmthin", vgname="pve", thinpool="data")
    site.add_storage("tank", "zfspool", pool="tank")
    site.add_storage("chained", snapshot_as_volume_chain=1)
    reader = {"/storage": ["Datastore.Audit"]}
    secret = site.add_token("ir@pve!t", reader)
    api = Client(site, {"Authorization": f"PVEAPIToken=ir@pve!t={secret}"})
    _, _, body = await api("GET", "/nodes/pve1/storage?content=images")
    rows = {row["storage"]: row for row in body["data"]}
    types = {name: row["type"] for name, row in rows.items()}
    assert types == {
        "local": "dir", "local2": "dir", "thick": "lvm", "ir": "dir", "nas": "nfs",
        "thin": "lvmthin", "tank": "zfspool", "chained": "dir",
    }  # fmt: skip
    assert all(row["avail"] > 0 for row in rows.values())
    assert "snapshot-as-volume-chain" not in rows["chained"], "not told here"
    _, _, body = await api("GET", "/storage")
    rows = {row["storage"]: row for row in body["data"]}
    assert rows["chained"]["snapshot-as-volume-chain"] == 1
    assert "snapshot-as-volume-chain" not in rows["ir"]
    status, text, _ = await api("GET", "/storage/chained")
    said = "Permission check failed (/storage/chained, Datastore.Allocate)"
    assert (status, text) == (403, said)
    vm = await site.create_vm(
        100, {"machine": LAYOUTS[1]}, disks={"scsi0": "8M"}, storage="chained"
    )
    with pytest.raises(Exception, match=r"requires QEMU machine version >= 10\.0"):
        await vm.start()


async def test_serial_port_is_a_socket_and_all_of_it_is_kept(site: Site) -> None:
    config = {"serial0": "socket", "vga": "std"}
    vm = await site.create_vm(100, config, disks={"scsi0": "8M"})
    await vm.start()
    reader, writer = await asyncio.open_unix_connection(
        str(site.node.run_dir / "100.serial0")
    )
    writer.close()
    assert reader is not None
    screen = site.root / "screen.ppm"
    await vm.qmp("screendump", filename=str(screen))
    assert screen.read_bytes().startswith(b"P6")
    listed = await vm.qmp("qom-list", path="/machine/peripheral")
    assert "vga" in {item["name"] for item in listed}
    await vm.stop()
