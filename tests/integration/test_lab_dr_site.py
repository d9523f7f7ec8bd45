# SPDX-License-Identifier: Apache-2.0
"""What a receiver of replicas does to a PVE site, answered as PVE answers it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pveplug.node import load_node
from pveplug.proto.pve_login import Endpoint, TokenAuth
from pveplug.pve import PveApi, PveRefusalError, Reason, Snapshot
from pveplug.pve_local import PveLocal
from tests.lab.auth import receiver_acl
from tests.lab.site import Site, short_base
from tests.lab.vm import LabVm
from tests.support.dr_truth import content, internal_snapshots
from tests.support.stranger import Client, program
from tests.support.truth import run

pytestmark = pytest.mark.integration

MIB = 1 << 20
NODE = "pve1"
RECEIVER = "receiver@pve!dr"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site(short_base()) as made:
        made.auth_delay_s = 0
        yield made


@pytest.fixture
async def api(site: Site) -> AsyncIterator[PveApi]:
    """The product's client with the token of a receiver."""
    secret = site.add_token(RECEIVER, receiver_acl(site.release))
    endpoint = Endpoint("127.0.0.1", site.api_port, fingerprints=(site.fingerprint,))
    async with PveApi(endpoint, TokenAuth(RECEIVER, secret)) as opened:
        yield opened


def write(vm: LabVm, key: str, what: int, at: str = "0") -> None:
    """Write 64 KiB of one byte to a stopped VM's disk."""
    path = str(vm.disk_path(key))
    fmt = path.rpartition(".")[2]
    run("qemu-io", "-f", fmt, "-c", f"write -P {what} {at} 64k", path)


def holds(vm: LabVm, key: str, what: int, at: str = "0") -> None:
    path = str(vm.disk_path(key))
    fmt = path.rpartition(".")[2]
    said = run("qemu-io", "-r", "-f", fmt, "-c", f"read -P {what} {at} 64k", path)
    assert "failed" not in said, said


# --- snapshots of a stopped VM ------------------------------------------------------


async def test_snapshots_of_a_stopped_vm_are_a_line_that_is_mended_when_one_goes(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "8M"})
    for number in (1, 2, 3):
        write(vm, "scsi0", number)
        await api.snapshot_create(NODE, 100, f"p{number}", f"cycle {number}")
    listed = await api.snapshot_list(NODE, 100)
    assert [(s.name, s.parent, s.description) for s in sorted(listed, key=_name)] == [
        ("p1", "", "cycle 1"),
        ("p2", "p1", "cycle 2"),
        ("p3", "p2", "cycle 3"),
    ]
    assert all(s.time for s in listed)
    for key in ("scsi0", "scsi1"):
        assert internal_snapshots(vm.disk_path(key)) == ["p1", "p2", "p3"]
    await api.snapshot_delete(NODE, 100, "p2")
    await api.snapshot_delete(NODE, 100, "p3")
    assert vm.conf.values["parent"] == "p1"
    assert "lock" not in vm.conf.values
    assert internal_snapshots(vm.disk_path("scsi1")) == ["p1"]
    rows = (await Client(site)("GET", f"/nodes/{NODE}/qemu/100/snapshot"))[2]["data"]
    current = rows[-1]
    assert (current["name"], current["parent"]) == ("current", "p1")
    assert (current["running"], current["description"]) == (0, "You are here!")


def _name(snapshot: Snapshot) -> str:
    return snapshot.name


async def test_a_snapshot_keeps_the_configuration_but_not_what_is_not_of_it(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(
        100, {"description": "of the VM", "tags": "dr"}, disks={"scsi0": "8M"}
    )
    vm.set(unused3="local:100/vm-100-disk-9.qcow2")
    await api.snapshot_create(NODE, 100, "p1", "of the snapshot\nin two lines")
    text = vm.node.conf_path(100).read_text()
    section = text.partition("[p1]\n")[2]
    assert section.startswith("#of the snapshot\n#in two lines\n")
    assert "unused3" not in section
    assert "snapstate" not in section
    config = await api.snapshot_config(NODE, 100, "p1")
    assert config.values["tags"] == "dr"
    assert config.values["scsi0"] == vm.conf.values["scsi0"]
    assert int(config.values["snaptime"]) > 0
    assert "digest" not in config.values
    one = f"/nodes/{NODE}/qemu/100/snapshot/p1/config"
    assert (await Client(site)("PUT", one, description="later"))[0] == 200
    assert (await api.snapshot_list(NODE, 100))[0].description == "later"
    with pytest.raises(PveRefusalError) as missing:
        await api.snapshot_config(NODE, 100, "p9")
    assert missing.value.said == "snapshot 'p9' does not exist"


async def test_snapshots_are_refused_as_pve_refuses_them(
    site: Site, api: PveApi
) -> None:
    await site.create_vm(100, disks={"scsi0": "8M"})
    await site.create_vm(101, disks={"scsi0": "8M"}, fmt="raw")
    await site.create_vm(102, disks={"scsi0": "thick:0.01"})
    stranger, path = Client(site), f"/nodes/{NODE}/qemu"
    for vmid in (101, 102):
        said = "snapshot feature is not available"
        for _ in range(2):  # nothing of the first try is left in the way
            task = stranger.task("POST", f"{path}/{vmid}/snapshot", snapname="p1")
            assert await task == said
        with pytest.raises(PveRefusalError) as refused:
            await api.snapshot_create(NODE, vmid, "p1")
        assert refused.value.reason is Reason.UNSUPPORTED
        assert not await api.has_feature(NODE, vmid, "snapshot")
        assert site.vm(vmid).conf.snapshots == {}
    assert await api.has_feature(NODE, 100, "snapshot")
    assert await api.has_feature(NODE, 101, "copy")
    assert not await api.has_feature(NODE, 100, "clone")
    for name, status, text in (
        ("current", 500, "unable to use snapshot name 'current' (reserved name)"),
        ("PENDING", 500, "unable to use snapshot name 'pending' (reserved name)"),
        ("1st", 400, "Parameter verification failed."),
        ("p", 400, "Parameter verification failed."),
    ):
        got = await stranger("POST", f"{path}/100/snapshot", snapname=name)
        assert got[:2] == (status, text)
    await api.snapshot_create(NODE, 100, "p1")
    task = stranger.task("POST", f"{path}/100/snapshot", snapname="p1")
    assert await task == "snapshot name 'p1' already used"
    task = stranger.task("DELETE", f"{path}/100/snapshot/p2")
    assert await task == "snapshot 'p2' does not exist"
    task = stranger.task("POST", f"{path}/100/snapshot/p2/rollback")
    assert await task == "snapshot 'p2' does not exist"
    site.vm(100).set(lock="backup")
    for method, where in (
        ("POST", f"{path}/100/snapshot"),
        ("DELETE", f"{path}/100/snapshot/p1"),
        ("POST", f"{path}/100/snapshot/p1/rollback"),
    ):
        more = {"snapname": "p2"} if where.endswith("snapshot") else {}
        assert await stranger.task(method, where, **more) == "VM is locked (backup)"


async def test_a_snapshot_that_one_disk_refuses_is_on_no_disk(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "8M"})
    site.storages["local"].file(vm.conf.values["scsi1"].split(",")[0]).write_bytes(b"")
    with pytest.raises(PveRefusalError, match="snapshot -c p1"):
        await api.snapshot_create(NODE, 100, "p1")
    assert internal_snapshots(vm.disk_path("scsi0")) == []
    assert vm.conf.snapshots == {}
    assert "lock" not in vm.conf.values
    assert "parent" not in vm.conf.values


# --- going back ---------------------------------------------------------------------


async def test_going_back_takes_the_snapshots_configuration_and_keeps_later_disks(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(
        100,
        {"name": "web", "tags": "b;a", "description": "old"},
        disks={"scsi0": "8M"},
    )
    write(vm, "scsi0", 1)
    await api.snapshot_create(NODE, 100, "p1")
    before = vm.conf
    write(vm, "scsi0", 2)
    await api.update_config(
        *(NODE, 100),
        {"name": "changed", "description": "new", "scsi1": "local:0.01,format=qcow2"},
    )
    later = vm.conf.values["scsi1"].split(",")[0]
    await api.snapshot_create(NODE, 100, "p2")
    await api.rollback(NODE, 100, "p1")
    values = vm.conf.values
    holds(vm, "scsi0", 1)
    assert values["name"] == "web"
    assert values["description"] == "new\n", "the description isn't a snapshot's"
    assert "scsi1" not in values
    assert values["unused0"] == later
    assert values["parent"] == "p1"
    assert "lock" not in values
    assert values["vmgenid"] != before.values["vmgenid"]
    assert values["smbios1"] == before.values["smbios1"]
    assert sorted(vm.conf.snapshots) == ["p1", "p2"], "later ones stay"
    await api.rollback(NODE, 100, "p2")
    holds(vm, "scsi0", 2)
    assert vm.conf.values["scsi1"].split(",")[0] == later
    assert "unused0" not in vm.conf.values


async def test_going_back_stops_a_running_vm_and_starts_it_by_a_task_of_its_own(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    await api.snapshot_create(NODE, 100, "p1")
    await api.start_vm(NODE, 100)
    await vm.qemu_io("scsi0", "write -P 5 0 64k")
    await api.rollback(NODE, 100, "p1")
    assert not vm.running
    site.faults.fail_task("qmstart", "start failed: QEMU exited with code 1")
    await api.rollback(NODE, 100, "p1", start=True)  # and is well nevertheless
    await _ended(site, "qmstart")
    assert not vm.running
    await api.rollback(NODE, 100, "p1", start=True)
    await _ended(site, "qmstart")
    assert vm.running
    await vm.qemu_io("scsi0", "read -P 0 0 64k")
    weak = site.add_token("r@pve!t", {"/vms": {"VM.Snapshot.Rollback"}})
    client = Client(site, {"Authorization": f"PVEAPIToken=r@pve!t={weak}"})
    where = f"/nodes/{NODE}/qemu/100/snapshot/p1/rollback"
    status, said, _ = await client("POST", where, start="1")
    assert (status, said) == (
        403,
        "Permission check failed (/vms/100, VM.PowerMgmt)",
    )
    assert await client.task("POST", where) == "OK"


async def _ended(site: Site, kind: str) -> None:
    tasks = [task for task in site.tasks.all.values() if task.type == kind]
    assert tasks
    await site.tasks.wait(tasks[-1].upid)


async def test_a_disk_that_refuses_to_go_back_leaves_a_lock_no_token_removes(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    await api.snapshot_create(NODE, 100, "p1")
    run("qemu-img", "snapshot", "-d", "p1", str(vm.disk_path("scsi0")))
    with pytest.raises(PveRefusalError, match=r"snapshot -a p1 .*exit code 1"):
        await api.rollback(NODE, 100, "p1")
    assert vm.conf.values["lock"] == "rollback"
    with pytest.raises(PveRefusalError, match=r"VM is locked \(rollback\)"):
        await api.start_vm(NODE, 100)
    with pytest.raises(PveRefusalError) as refused:
        await api.update_config(NODE, 100, delete=["lock"])
    assert refused.value.reason is Reason.ROOT_ONLY
    assert await program(site, "qm", "unlock", "100") == (0, "")
    with pytest.raises(PveRefusalError, match="snapshot -d p1"):
        await api.snapshot_delete(NODE, 100, "p1")
    assert vm.conf.values["lock"] == "snapshot-delete"
    await program(site, "qm", "unlock", "100")
    with pytest.raises(PveRefusalError) as incomplete:
        await api.rollback(NODE, 100, "p1")
    said = "unable to rollback to incomplete snapshot (snapstate = delete)"
    assert incomplete.value.said == said
    await api.snapshot_delete(NODE, 100, "p1", force=True)
    assert vm.conf.snapshots == {}
    assert "lock" not in vm.conf.values


# --- disks that come, go and grow ---------------------------------------------------


async def test_a_removed_disk_stays_as_long_as_a_snapshot_holds_it(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, {"boot": "order=scsi1;scsi0"}, disks=TWO)
    volid = vm.conf.values["scsi1"].split(",")[0]
    await api.snapshot_create(NODE, 100, "p1")
    await api.snapshot_create(NODE, 100, "p2")
    busy = f"unable to delete '{volid}' - volume is still in use (snapshot?)"
    with pytest.raises(PveRefusalError, match="still in use"):
        await api.unlink_disk(NODE, 100, "scsi1", destroy=True)
    assert vm.conf.pending_delete == {"scsi1": 2}, "the wish stays in the configuration"
    put = f"/nodes/{NODE}/qemu/100/config"
    await Client(site)("PUT", put, revert="scsi1")
    await api.unlink_disk(NODE, 100, "scsi1")
    assert vm.conf.values["unused0"] == volid
    assert vm.conf.values["boot"] == "order=scsi0"
    assert (await Client(site)("PUT", put, delete="unused0"))[:2] == (500, busy)
    await api.snapshot_delete(NODE, 100, "p1")
    await api.snapshot_create(NODE, 100, "p3")
    assert internal_snapshots(site.storages["local"].file(volid)) == ["p2"]
    assert (await Client(site)("PUT", put, delete="unused0"))[:2] == (500, busy)
    vm.set(unused0=None)
    await api.snapshot_delete(NODE, 100, "p2")
    given_back = {value: key for key, value in vm.conf.values.items()}
    # Not unused0: that was scsi0's, for as long as PVE needed to look again.
    assert given_back[volid] == "unused1", "its last snapshot gives it back"
    await api.unlink_disk(NODE, 100, "unused1")
    assert not site.storages["local"].exists(volid)


TWO = {"scsi0": "8M", "scsi1": "8M"}


async def test_a_disk_with_snapshots_grows_and_each_snapshot_keeps_its_size(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    write(vm, "scsi0", 1)
    old = content(vm.disk_path("scsi0"))
    await api.snapshot_create(NODE, 100, "p1")
    await api.resize_disk(NODE, 100, "scsi0", 16 * MIB)
    assert "size=16M" in vm.conf.values["scsi0"]
    write(vm, "scsi0", 2, "15M")
    assert content(vm.disk_path("scsi0")).size == 16 * MIB
    assert content(vm.disk_path("scsi0"), "p1", size=8 * MIB) == old
    assert old.size == 8 * MIB
    with pytest.raises(PveRefusalError, match="shrinking disks is not supported"):
        await api.resize_disk(NODE, 100, "scsi0", 8 * MIB)
    with pytest.raises(PveRefusalError, match="disk 'scsi7' does not exist"):
        await api.resize_disk(NODE, 100, "scsi7", 8 * MIB)
    await api.rollback(NODE, 100, "p1")
    assert "size=8M" in vm.conf.values["scsi0"]
    assert content(vm.disk_path("scsi0")) == old
    secret = site.add_token("d@pve!t", {"/vms": {"VM.Config.Disk"}})
    client = Client(site, {"Authorization": f"PVEAPIToken=d@pve!t={secret}"})
    where = f"/nodes/{NODE}/qemu/100/resize"
    said = await client.task("PUT", where, disk="scsi0", size="+1M")
    assert said == (
        "403 Permission check failed (/storage/local, Datastore.AllocateSpace)"
    )


async def test_a_protected_vm_gives_nothing_away(site: Site, api: PveApi) -> None:
    vm = await site.create_vm(100, disks=TWO)
    await api.unlink_disk(NODE, 100, "scsi1")
    volid = vm.conf.values["unused0"]
    await api.update_config(NODE, 100, {"protection": True})
    client, one = Client(site), f"/nodes/{NODE}/qemu/100"
    for answer, said in (
        (client("DELETE", one), "can't remove VM 100"),
        (client("PUT", f"{one}/config", delete="scsi0"), "can't remove drive 'scsi0'"),
        (
            client("PUT", f"{one}/config", delete="unused0"),
            f"can't remove unused disk '{volid}'",
        ),
    ):
        assert (await answer)[:2] == (500, f"{said} - protection mode enabled")
    await api.snapshot_create(NODE, 100, "p1")
    await api.rollback(NODE, 100, "p1")
    await api.snapshot_delete(NODE, 100, "p1")  # snapshots are not protected
    await api.update_config(NODE, 100, delete=["protection"])
    await api.destroy_vm(NODE, 100)


async def test_destroying_takes_what_is_named_and_all_that_is_owned_if_asked(
    site: Site, api: PveApi
) -> None:
    storage = site.storages["local"]
    for vmid, unreferenced, left in ((100, False, 1), (101, True, 0)):
        vm = await site.create_vm(vmid, disks=TWO)
        await api.allocate_volume(
            *(NODE, "local", vmid, f"vm-{vmid}-disk-7.qcow2", MIB, "qcow2")
        )
        await api.unlink_disk(NODE, vmid, "scsi1")
        secret = site.add_token("one@pve!t", {f"/vms/{vmid}": {"VM.Audit"}})
        client = Client(site, {"Authorization": f"PVEAPIToken=one@pve!t={secret}"})
        where = f"/nodes/{NODE}/qemu/{vmid}/config"
        assert (await client("GET", where))[0] == 200
        await api.start_vm(NODE, vmid)
        with pytest.raises(PveRefusalError, match="is running - destroy failed"):
            await api.destroy_vm(NODE, vmid)
        await api.stop_vm(NODE, vmid)
        site.ha.add(vmid)
        with pytest.raises(PveRefusalError, match="purge parameter not set"):
            await api.destroy_vm(NODE, vmid, purge=False)
        await api.destroy_vm(NODE, vmid, unreferenced=unreferenced)
        assert len(storage.volumes(vmid)) == left
        assert not vm.node.conf_path(vmid).exists()
        said = f"Permission check failed (/vms/{vmid}, VM.Audit)"
        assert (await client("GET", where))[:2] == (403, said), "its ACL went with it"


# --- clones -------------------------------------------------------------------------


async def test_a_snapshot_is_cloned_as_another_machine(site: Site, api: PveApi) -> None:
    vm = await site.create_vm(
        100,
        {
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0,link_down=1",
            "tags": "dr",
            "onboot": "1",
        },
        disks={"scsi0": "8M", "scsi1": "local:0.0078125,format=raw"},
    )
    vm.set(scsi1=None)
    write(vm, "scsi0", 1)
    await api.snapshot_create(NODE, 100, "p1", "point one")
    at_p1 = content(vm.disk_path("scsi0"))
    write(vm, "scsi0", 2)
    await api.snapshot_create(NODE, 100, "p2")
    await api.clone_vm(*(NODE, 100, 901), name="test", snapname="p1", storage="local2")
    made = site.vm(901)
    old, new = vm.conf.values, made.conf.values
    assert new["scsi0"].startswith("local2:901/vm-901-disk-0.qcow2")
    assert content(made.disk_path("scsi0")) == at_p1
    assert internal_snapshots(made.disk_path("scsi0")) == []
    assert new["name"] == "test"
    assert new["smbios1"] != old["smbios1"]
    assert new["vmgenid"] != old["vmgenid"]
    assert "BC:24:11:00:00:01" not in new["net0"]
    assert "link_down=1" in new["net0"]
    assert (new["tags"], new["onboot"]) == ("dr", "1"), "all else is the same"
    assert new["description"] == "point one\n", "even what the snapshot was called"
    assert not {"parent", "snaptime", "lock"} & new.keys()
    assert made.conf.snapshots == {}
    await api.start_vm(NODE, 901)
    await made.qemu_io("scsi0", "read -P 1 0 64k")
    await api.clone_vm(NODE, 100, 902)
    assert site.vm(902).conf.values["name"] == "Copy-of-VM-vm100"
    holds(site.vm(902), "scsi0", 2)


async def test_while_a_vm_is_cloned_its_file_lock_is_held(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    await api.snapshot_create(NODE, 100, "p1")
    copying, go_on = asyncio.Event(), asyncio.Event()

    async def gate(ident: str) -> None:
        copying.set()
        await go_on.wait()

    site.faults.copy_gate = gate
    cloning = asyncio.create_task(api.clone_vm(NODE, 100, 901, snapname="p1"))
    await copying.wait()
    assert site.vm(901).conf.values == {"lock": "clone"}
    assert "lock" not in vm.conf.values, "the source has no lock to be seen"
    with pytest.raises(PveRefusalError) as busy:
        await api.snapshot_create(NODE, 100, "p2")
    assert busy.value.reason is Reason.BUSY
    assert "lock-100.conf' - got timeout" in busy.value.said
    second = asyncio.create_task(api.clone_vm(NODE, 100, 902, snapname="p1"))
    await asyncio.sleep(0.3)
    assert not second.done(), "two clones of a stopped VM share the lock"
    go_on.set()
    await cloning
    await second
    await api.snapshot_create(NODE, 100, "p2")


async def test_a_clone_that_fails_or_may_not_be_leaves_nothing(
    site: Site, api: PveApi
) -> None:
    await site.create_vm(100, disks=TWO)
    await site.create_vm(101, disks={"scsi0": "8M"}, fmt="raw")
    await api.snapshot_create(NODE, 100, "p1")
    client, path = Client(site), f"/nodes/{NODE}/qemu/100/clone"
    secret = site.add_token(
        "c@pve!t", {"/vms": {"VM.Clone"}, "/vms/901": {"VM.Allocate"}}
    )
    weak = Client(site, {"Authorization": f"PVEAPIToken=c@pve!t={secret}"})
    check = "Permission check failed"
    for who, status, said, params in (
        (client, 403, f"{check} (/vms/100, VM.Clone)", {}),
        (weak, 403, f"{check} (/vms/902, VM.Allocate)", {"newid": "902"}),
        (weak, 403, f"{check} (/storage/local, Datastore.AllocateSpace)", {}),
    ):
        got = await who("POST", path, **{"newid": "901", **params})
        assert got[:2] == (status, said)
    for said, params in (
        ("snapshot 'p9' does not exist", {"snapname": "p9"}),
        ("unable to create VM 101: config file already exists", {"newid": 101}),
        ("parameter 'storage' not allowed for linked clones", {"full": False}),
        ("storage 'none' does not exist", {"storage": "none"}),
    ):
        arguments = {"newid": 901, "storage": "local", **params}
        with pytest.raises(PveRefusalError) as refused:
            await api.clone_vm(NODE, 100, **arguments)  # type: ignore[arg-type]
        assert refused.value.said == said
    with pytest.raises(PveRefusalError) as linked:
        await api.clone_vm(NODE, 101, 901, full=False)
    volid = site.vm(101).conf.values["scsi0"].split(",")[0]
    said = f"Linked clone feature is not supported for '{volid}' (scsi0)"
    assert linked.value.said == said
    assert linked.value.reason is Reason.UNSUPPORTED
    site.storages["local2"].total = 4 * MIB
    with pytest.raises(PveRefusalError, match=r"clone failed: .*No space left"):
        await api.clone_vm(NODE, 100, 901, snapname="p1", storage="local2")
    assert site.find(901) is None
    assert site.storages["local2"].volumes() == []


# --- a replica's life ---------------------------------------------------------------


async def test_the_token_of_a_receiver_does_all_it_needs_and_no_more(
    site: Site, api: PveApi
) -> None:
    await api.create_vm(
        *(NODE, 900),
        {
            "name": "web-replica",
            "cores": 2,
            "sockets": 1,
            "cpu": "host",
            "memory": "128",
            "scsihw": "virtio-scsi-single",
            "machine": "pc",
            "ostype": "l26",
            "agent": "1",
            "tags": "Pveplug-DR,web",
            "description": "source: web\n100",
            "onboot": False,
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0,link_down=1",
        },
    )
    volid = await api.allocate_volume(
        NODE, "local", 900, "vm-900-disk-0.qcow2", 8 * MIB, "qcow2"
    )
    await api.update_config(NODE, 900, {"scsi0": f"{volid},discard=on,iothread=1"})
    await api.update_config(NODE, 900, {"boot": "order=scsi0", "protection": True})
    config = await api.vm_config(NODE, 900)
    assert config.values["tags"] == "pveplug-dr;web"
    assert config.values["description"] == "source: web\n100\n"
    assert config.values["onboot"] == "0"
    await api.snapshot_create(NODE, 900, "p1")
    (found,) = [row for row in await api.resources() if row.vmid == 900]
    assert found.tags == ("pveplug-dr", "web")
    link_up = config.values["net0"].replace(",link_down=1", "")
    await api.update_config(NODE, 900, {"net0": link_up})
    await api.start_vm(NODE, 900, timeout_s=60)
    site.faults.agent(900, "fake")
    await api.agent_ping(NODE, 900)
    with pytest.raises(PveRefusalError, match=r"VM\.GuestAgent\.Unrestricted"):
        await api.agent_exec(NODE, 900, ["/bin/true"])
    site.faults.agent(900, "off")
    with pytest.raises(PveRefusalError, match="got timeout"):
        await api.shutdown_vm(NODE, 900, timeout_s=1)
    await api.shutdown_vm(NODE, 900, timeout_s=1, force=True)
    assert not site.vm(900).running
    await api.stop_vm(NODE, 900)  # of a stopped VM: nothing to do, and no error
    await api.shutdown_vm(NODE, 900, timeout_s=1)
    await api.start_vm(NODE, 900)
    await site.vm(900).qmp("stop")
    with pytest.raises(PveRefusalError, match="VM is paused - cannot shutdown"):
        await api.shutdown_vm(NODE, 900, timeout_s=1)
    await api.shutdown_vm(NODE, 900, timeout_s=1, force=True)
    assert not site.vm(900).running
    await api.rollback(NODE, 900, "p1")
    await api.clone_vm(NODE, 900, 901, snapname="p1", full=True)
    await api.update_config(NODE, 901, {"protection": False})
    await api.destroy_vm(NODE, 901, unreferenced=True)
    with pytest.raises(PveRefusalError, match=r"Datastore\.Allocate "):
        await api.delete_volume(NODE, volid)
    for params in ({"vmgenid": "1"}, {"lock": "backup"}, {"args": "-S"}):
        with pytest.raises(PveRefusalError) as refused:
            await api.update_config(NODE, 900, params)
        assert refused.value.reason is Reason.ROOT_ONLY
    with pytest.raises(PveRefusalError, match=r"Sys\.Modify"):
        await api.update_config(NODE, 900, {"startup": "order=1"})
    await api.update_config(NODE, 900, delete=["protection", "net0"])
    await api.snapshot_delete(NODE, 900, "p1")
    await api.destroy_vm(NODE, 900)
    assert site.storages["local"].volumes() == []


async def test_a_pool_is_enough_for_a_receiver(site: Site) -> None:
    acl = receiver_acl(site.release)
    acl["/pool/dr"] = acl.pop("/vms") | {"Pool.Audit"}
    site.pools["dr"] = set()
    secret = site.add_token("pool@pve!dr", acl)
    endpoint = Endpoint("127.0.0.1", site.api_port, fingerprints=(site.fingerprint,))
    async with PveApi(endpoint, TokenAuth("pool@pve!dr", secret)) as api:
        params = {"pool": "dr", "memory": "128", "scsi0": "local:0.01,format=qcow2"}
        await api.create_vm(NODE, 900, params)
        await api.snapshot_create(NODE, 900, "p1")
        await api.clone_vm(NODE, 900, 901, snapname="p1", pool="dr")
        await api.start_vm(NODE, 901)
        await api.stop_vm(NODE, 901)
        await api.destroy_vm(NODE, 901)
        assert [row.vmid for row in await api.resources()] == [900]


@pytest.mark.parametrize("by", ["api", "qm"])
@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-9.2+pve1"])
async def test_an_overlay_on_another_vms_volume_starts_and_spares_it(
    site: Site, api: PveApi, by: str, machine: str
) -> None:
    base = await site.create_vm(900, disks={"scsi0": "8M"})
    write(base, "scsi0", 1)
    before = content(base.disk_path("scsi0"))
    config = {"memory": "128", "machine": machine, "scsihw": "virtio-scsi-single"}
    await api.create_vm(NODE, 901, config)
    volid = await api.allocate_volume(
        NODE, "local", 901, "vm-901-disk-0.qcow2", 8 * MIB, "qcow2"
    )
    local = PveLocal(load_node(site.node_toml()))
    overlay = Path(await local.volume_path(volid))
    overlay.unlink()
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
        *("-b", str(base.disk_path("scsi0")), str(overlay)),
    )
    await api.update_config(NODE, 901, {"scsi0": volid})
    assert "size=8M" in site.vm(901).conf.values["scsi0"]
    if by == "api":
        await api.start_vm(NODE, 901)
    else:
        assert await program(site, "qm", "start", "901") == (0, "")
    test = site.vm(901)
    await test.qemu_io("scsi0", "read -P 1 0 64k")
    await test.qemu_io("scsi0", "write -P 9 0 64k")
    await api.stop_vm(NODE, 901)
    assert content(base.disk_path("scsi0")) == before
    assert content(overlay) != before
    await api.destroy_vm(NODE, 901)
    assert content(base.disk_path("scsi0")) == before


async def test_an_overlay_with_a_relative_backing_name_is_listed_as_a_linked_clone(
    site: Site, api: PveApi
) -> None:
    base = await site.create_vm(900, disks={"scsi0": "8M"})
    folder = site.storages["local"].root / "images/901"
    folder.mkdir()
    for number, backing in ((0, "../900/vm-900-disk-0.qcow2"), (1, "absolute")):
        if backing == "absolute":
            backing = str(base.disk_path("scsi0"))
        run(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
            *("-b", backing, str(folder / f"vm-901-disk-{number}.qcow2")),
        )
    await site.create_vm(901)
    assert [volume.volid for volume in await api.volumes(NODE, "local", vmid=901)] == [
        "local:900/vm-900-disk-0.qcow2/901/vm-901-disk-0.qcow2",
        "local:901/vm-901-disk-1.qcow2",
    ]
    await api.destroy_vm(NODE, 901, unreferenced=True)
    assert not folder.exists()
    assert base.disk_path("scsi0").exists()


async def test_a_receiver_finds_the_paths_of_a_stopped_replica(
    site: Site, api: PveApi
) -> None:
    vm = await site.create_vm(900, disks={"scsi0": "8M", "scsi1": "thick:0.0078125"})
    file, device = [
        (await program(site, "pvesm", "path", vm.conf.values[key].split(",")[0]))[1]
        for key in ("scsi0", "scsi1")
    ]
    assert Path(file.strip()) == vm.disk_path("scsi0")
    assert not Path(device.strip()).exists(), "a path is not yet a device"
    await program(site, "lvchange", "-ay", device.strip())
    assert Path(device.strip()).exists()
    await program(site, "lvchange", "-an", device.strip())
    writer = await asyncio.create_subprocess_exec(
        *("qemu-nbd", "-f", "qcow2", "-k", str(site.root / "n.sock"), "-t"),
        str(vm.disk_path("scsi0")),
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (site.root / "n.sock").exists():
            await asyncio.sleep(0.05)
        vm.set(scsi1=None)
        with pytest.raises(PveRefusalError, match="snapshot -c p1"):
            # PVE's programs lock nothing and would spoil the image: here it is heard.
            await api.snapshot_create(NODE, 900, "p1")
    finally:
        writer.terminate()
        await writer.wait()
    await api.snapshot_create(NODE, 900, "p1")


async def test_on_8_4_the_receivers_token_pings_by_another_privilege() -> None:
    async with Site(short_base(), release="8.4") as site:
        secret = site.add_token(RECEIVER, receiver_acl("8.4"))
        pins = (site.fingerprint,)
        endpoint = Endpoint("127.0.0.1", site.api_port, fingerprints=pins)
        async with PveApi(endpoint, TokenAuth(RECEIVER, secret)) as api:
            await site.create_vm(900, {"agent": "1"}, disks={"scsi0": "8M"})
            await api.snapshot_create(NODE, 900, "p1")
            await api.start_vm(NODE, 900)
            site.faults.agent(900, "fake")
            await api.agent_ping(NODE, 900)
            await api.rollback(NODE, 900, "p1")
            await api.destroy_vm(NODE, 900)
