# SPDX-License-Identifier: Apache-2.0
"""The simulated site says what PVE says, and is no kinder."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pveplug.node import load_node
from pveplug.proto.pve_login import Endpoint, TokenAuth
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from tests.lab.site import Site, short_base
from tests.support.requires import QEMU_7, requires_file
from tests.support.stranger import Client, program, root

pytestmark = pytest.mark.integration


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site(short_base()) as made:
        yield made


async def test_errors_have_the_texts_pve_has(site: Site) -> None:
    """At least thirty recorded texts, each provoked by a call."""
    vm = await site.create_vm(100, {"agent": "1"}, disks={"scsi0": "8M"})
    await site.create_vm(101, disks={"scsi0": "8M"})
    await site.create_vm(102, {"protection": "1"})
    api, admin = Client(site), root(site)
    secret = site.add_token("weak@pve!t", {"/vms/101": {"VM.Audit"}})
    weak = Client(site, {"Authorization": f"PVEAPIToken=weak@pve!t={secret}"})
    unused = {"/vms": {"VM.Audit", "VM.Config.Disk", "VM.Config.Network"}}
    secret = site.add_token("disk@pve!t", unused)
    disk = Client(site, {"Authorization": f"PVEAPIToken=disk@pve!t={secret}"})
    bad = Client(site, {"Authorization": "PVEAPIToken=bacula@pve!backup=no"})
    nobody = Client(site, {})
    forged = Client(site, {"Cookie": "PVEAuthCookie=PVE:root@pam:00000000::x"})
    cookie_only = {"Cookie": root(site).headers["Cookie"]}  # type: ignore[index]
    no_csrf = Client(site, cookie_only)
    q, one = "/nodes/pve1/qemu", "/nodes/pve1/qemu/100"
    seen = 0

    async def says(
        client: Client, status: int, text: str, method: str, path: str, **data: Any
    ) -> Any:
        nonlocal seen
        seen += 1
        got = await client(method, path, **data)
        assert got[:2] == (status, text), f"{method} {path} {data}"
        return got[2]

    check = "Permission check failed "
    put = f"{one}/config"
    await says(nobody, 401, "No ticket", "GET", "/version")
    await says(forged, 401, "permission denied - invalid PVE ticket", "GET", "/version")
    await says(
        no_csrf, 401, "Permission denied - invalid csrf token", "PUT", put, name="x"
    )
    await says(bad, 401, "invalid token value!", "GET", "/version")
    await says(
        nobody, 401, "authentication failure", "POST", "/access/ticket",
        username="root@pam", password="wrong",
    )  # fmt: skip
    await says(weak, 403, f"{check}(/vms/100, VM.Audit)", "GET", put)
    await says(
        weak, 403, f"{check}(/vms/101, VM.PowerMgmt)", "POST", f"{q}/101/status/start"
    )
    await says(
        weak, 403, f"{check}(/vms/101, VM.Snapshot)", "POST", f"{q}/101/snapshot",
        snapname="a",
    )  # fmt: skip
    await says(
        weak,
        403,
        f"{check}(/vms/101, VM.GuestAgent.FileSystemMgmt|VM.GuestAgent.Unrestricted)",
        "POST",
        f"{q}/101/agent/fsfreeze-freeze",
    )
    await says(weak, 403, f"{check}(/vms/101, VM.Allocate)", "DELETE", f"{q}/101")
    await says(weak, 403, f"{check}(/vms/900, VM.Allocate)", "POST", q, vmid="900")
    await says(
        weak, 403, f"{check}(/storage/local, Datastore.AllocateSpace)", "POST",
        "/nodes/pve1/storage/local/content", filename="vm-101-disk-9.raw", vmid="101",
        size="1M",
    )  # fmt: skip
    await says(
        disk, 403, f"{check}(/storage/local, Datastore.Allocate)", "DELETE",
        "/nodes/pve1/storage/local/content/local:100/vm-100-disk-0.qcow2",
    )  # fmt: skip
    await says(
        disk, 403, f"{check}(/sdn/zones/localnetwork/vmbr0, SDN.Use)", "PUT", put,
        net0="virtio,bridge=vmbr0",
    )  # fmt: skip
    await says(disk, 403, f"{check}(/vms/100, VM.Config.CPU)", "PUT", put, cores="2")
    for key, value in (
        ("args", "-S"),
        ("lock", "backup"),
        ("vmgenid", "1"),
        ("hookscript", "local:snippets/x"),
        ("affinity", "0"),
        ("serial0", "/dev/ttyS0"),
        ("hostpci0", "0000:00:02.0"),
    ):
        text = f"only root can set '{key}' config"
        await says(api, 500, text, "PUT", put, **{key: value})
    text = "Only root can pass arbitrary filesystem paths."
    await says(api, 500, text, "PUT", put, scsi5="/dev/sdz")
    await says(api, 500, text, "PUT", put, scsi5="local:0,import-from=/tmp/x.raw")
    gone = "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist"
    await says(api, 500, gone, "GET", f"{q}/999/config")
    await says(api, 500, gone, "GET", f"{q}/999/status/current")
    await says(
        api, 500, "unable to create VM 101 - VM 101 already exists on node 'pve1'",
        "POST", q, vmid="101",
    )  # fmt: skip
    changed = "checksum mismatch (file change by other user?)"
    await says(api, 500, changed, "PUT", put, name="x", digest="0" * 40)
    await says(api, 500, "storage 'nbd' does not exist", "PUT", put, scsi3="nbd://h/x")
    await says(
        api, 500, "volume 'local:100/vm-100-disk-7.raw' does not exist", "PUT", put,
        scsi3="local:100/vm-100-disk-7.raw",
    )  # fmt: skip
    await says(api, 500, "VM 100 not running", "POST", f"{one}/status/suspend")
    await says(
        api, 500, "No QEMU guest agent configured", "POST", f"{q}/101/agent/ping"
    )
    await says(api, 500, "VM 100 is not running", "POST", f"{one}/agent/ping")
    await says(
        api, 500, "can't remove VM 102 - protection mode enabled", "DELETE", f"{q}/102"
    )
    await says(api, 501, "Method 'GET /nope' not implemented", "GET", "/nope")
    wrong = "Parameter verification failed."
    body = await says(api, 400, wrong, "PUT", put, bogus="1", cores="many")
    assert body["errors"] == {
        "bogus": "property is not defined in schema and the schema does not allow "
        "additional properties",
        "cores": "type check ('integer') failed - got 'many'",
    }
    body = await says(api, 400, wrong, "POST", f"{one}/snapshot")
    assert body["errors"] == {"snapname": "property is missing and it is not optional"}
    body = await says(api, 400, wrong, "PUT", put, scsi0="local:1,nonsense=1")
    assert "scsi0.nonsense: property is not defined" in body["errors"]["scsi0"]
    body = await says(api, 400, wrong, "PUT", put, name="x", skiplock="1")
    assert body["errors"] == {"skiplock": "Only root may use this option."}
    body = await says(api, 400, wrong, "GET", "/cluster/nextid?vmid=100")
    assert body["errors"] == {"vmid": "VM 100 already exists"}

    vm.set(lock="backup")
    locked = "VM is locked (backup)"
    await says(api, 500, locked, "PUT", put, name="x")
    await says(admin, 500, locked, "PUT", put, lock="backup")
    await says(
        api, 500, locked, "POST", f"{one}/move_disk", disk="scsi0", storage="local2"
    )
    grow = {"disk": "scsi0", "size": "+1M"}
    assert await api.task("PUT", f"{one}/resize", **grow) == locked
    assert await api.task("DELETE", one) == locked
    assert await api.task("POST", f"{one}/status/start") == locked
    assert await api.task("POST", f"{one}/snapshot", snapname="aa") == locked
    status, said, _ = await admin("PUT", put, delete="lock", skiplock="1")
    assert (status, said) == (200, "OK")

    site.faults.quorum = False
    await says(api, 500, "cluster not ready - no quorum?", "PUT", put, name="x")
    site.faults.quorum = True
    site.faults.fail_next("GET", "/version", 596, "Broken pipe")
    await says(api, 596, "Broken pipe", "GET", "/version")
    site.offline.add("pve1")
    await says(api, 595, "No route to host", "GET", put)
    site.offline.clear()
    ticket = root(site)
    site.faults.expire_tickets()
    text = "permission denied - invalid PVE ticket"
    await says(ticket, 401, text, "GET", "/version")
    assert seen >= 30


async def test_programs_have_the_texts_pve_has(site: Site) -> None:
    await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "thick:0.01"})
    gone = "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist\n"
    assert await program(site, "qm", "config", "999") == (255, gone)
    said = (0, "update VM 100: -lock backup\n")
    assert await program(site, "qm", "set", "100", "--lock", "backup") == said
    locked = (255, "VM is locked (backup)\n")
    assert await program(site, "qm", "set", "100", "--lock", "backup") == locked
    assert await program(site, "qm", "start", "100") == locked
    assert "lock: backup\n" in (await program(site, "qm", "config", "100"))[1]
    assert await program(site, "qm", "unlock", "100") == (0, "")
    await program(site, "qm", "set", "100", "--lock", "backup")
    done = await program(site, "qm", "set", "100", "--delete", "lock", "--skiplock")
    assert done == (0, "update VM 100: -delete lock\n")
    assert "lock" not in site.vm(100).conf.values
    missing = await program(site, "pvesm", "path", "none:vm-100-disk-0")
    assert missing == (255, "storage 'none' does not exist\n")
    bad = await program(site, "pvesm", "path", "local:nonsense")
    assert bad == (255, "unable to parse directory volume name 'nonsense'\n")
    assert (await program(site, "qm", "status", "100"))[1] == "status: stopped\n"


async def test_thick_volume_holds_stale_bytes_and_is_there_only_while_active(
    site: Site,
) -> None:
    api = Client(site)
    path = "/nodes/pve1/storage/thick/content"
    size = 5 << 20
    _, _, body = await api(
        "POST", path, filename="vm-100-disk-0", vmid="100", size=str(size >> 10)
    )
    assert body["data"] == "thick:vm-100-disk-0"
    _, _, body = await api("GET", path)
    assert [row["size"] for row in body["data"]] == [8 << 20], "whole extents of 4 MiB"
    status, where = await program(site, "pvesm", "path", "thick:vm-100-disk-0")
    device = Path(where.strip())
    assert status == 0
    assert not device.exists()
    assert (await program(site, "lvchange", "-ay", "-K", str(device)))[0] == 0
    with device.open("r+b") as stream:
        assert stream.read(4096) == b"\xa5" * 4096
        status, text = await program(site, "lvchange", "-an", "thick/vm-100-disk-0")
        assert status == 5
        assert "in use" in text
    assert (await program(site, "lvchange", "-an", "thick/vm-100-disk-0"))[0] == 0
    assert not device.exists()
    site.storages["thick"].total = 8 << 20
    status, text, _ = await api(
        "POST", path, filename="vm-100-disk-1", vmid="100", size="4M"
    )
    assert status == 500
    assert "insufficient free space (0 extents): 1 required" in text


async def test_full_directory_and_wrong_names_are_refused(site: Site) -> None:
    api = Client(site)
    path = "/nodes/pve1/storage/local/content"
    good = {"filename": "vm-9002-disk-7.qcow2", "vmid": "9001", "size": "1G"}
    _, _, body = await api("POST", path, **good)
    assert body["data"] == "local:9001/vm-9002-disk-7.qcow2", "the name is not checked"
    status, text, _ = await api("POST", path, **good)
    assert status == 500
    assert text.endswith("already exists")
    site.storages["local"].total = 1 << 20
    more = {"filename": "vm-9001-disk-8.raw", "vmid": "9001", "size": "1G"}
    status, text, _ = await api("POST", path, **more)
    assert status == 500
    assert text.endswith("No space left on device")


async def test_what_a_token_may_not_see_is_hidden(site: Site) -> None:
    await site.create_vm(100)
    await site.create_vm(101)
    site.pools["dev"] = {101}
    secret = site.add_token("a@pve!t", {"/pool/dev": {"VM.Audit", "Pool.Audit"}})
    api = Client(site, {"Authorization": f"PVEAPIToken=a@pve!t={secret}"})
    _, _, body = await api("GET", "/cluster/resources?type=vm")
    assert [(row["vmid"], row["pool"]) for row in body["data"]] == [(101, "dev")]
    _, _, body = await api("GET", "/nodes/pve1/storage")
    assert body["data"] == []


async def test_tasks_can_fail_warn_and_outlast_the_proxy(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    api = Client(site)
    start = "/nodes/pve1/qemu/100/status/start"
    site.faults.fail_task("qmstart", "start failed: QEMU exited with code 1")
    text = "start failed: QEMU exited with code 1"
    assert await api.task("POST", start) == text
    assert not vm.running
    site.faults.warn_task("qmstart", "something small")
    assert await api.task("POST", start) == "WARNINGS: 1"
    assert vm.running
    assert await api.task("POST", start) == "VM 100 already running"
    site.proxy_limit_s = 0.2
    site.faults.delay("PUT", "/config", 0.5)
    status, _, _ = await api("PUT", "/nodes/pve1/qemu/100/config", name="late")
    assert status == 596
    await asyncio.sleep(0.6)
    assert vm.conf.values["name"] == "late", "the work goes on"
    assert await api.task("POST", "/nodes/pve1/qemu/100/status/stop") == "OK"


async def test_failed_creation_leaves_nothing(site: Site) -> None:
    api = Client(site)
    drives = {"scsi0": "local:1", "scsi1": "thick:1000"}
    status = await api.task("POST", "/nodes/pve1/qemu", vmid="100", **drives)
    assert "insufficient free space" in status
    assert site.find(100) is None
    assert site.storages["local"].volumes(100) == []


@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-9.2+pve1"])
async def test_one_client_at_a_time_on_the_monitor_and_measured(
    site: Site, machine: str
) -> None:
    vm = await site.create_vm(100, {"machine": machine}, disks={"scsi0": "8M"})
    await vm.start()
    assert vm.modern is (machine == "pc")
    loop = asyncio.get_running_loop()
    path = str(site.node.run_dir / "100.qmp")

    def connected() -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        one.connect(path)
        return one

    first = connected()
    while not (greeting := await loop.sock_recv(first, 4096)):
        first.close()  # QEMU was still at the client before
        first = connected()
    assert b'"QMP"' in greeting
    second = connected()
    waiting = asyncio.create_task(loop.sock_recv(second, 4096))
    with pytest.raises(TimeoutError, match="got timeout"):
        await vm.machine.qmp("query-status", timeout_s=1.0)
    assert not waiting.done(), "the second client has no greeting yet"
    before = time.monotonic()
    _, _, body = await Client(site)("GET", "/nodes/pve1/qemu/100/status/current")
    assert 2.5 < time.monotonic() - before < 6
    assert body["data"]["qmpstatus"] == "running"
    assert "running-qemu" not in body["data"], "no QMP data while the socket is held"
    first.close()
    assert b'"QMP"' in await asyncio.wait_for(waiting, 5)
    second.close()
    await asyncio.sleep(0.2)
    assert vm.max_qmp_hold_s() > 3
    assert (await vm.qmp("query-status"))["status"] == "running"
    await vm.qemu_io("scsi0", "write -P 1 0 64k")
    with pytest.raises(AssertionError):
        await vm.qemu_io("scsi0", "read -P 2 0 64k")


async def test_guest_shutdown_ends_qemu_unless_a_backup_is_registered(
    site: Site,
) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "thick:0.01"})
    await vm.start()
    device = Path(site.storages["thick"].path("thick:vm-100-disk-0"))
    assert device.exists(), "start activates"
    _, backup = await asyncio.open_unix_connection(str(site.node.qmeventd.path))
    backup.write(b'{"vzdump":{"vmid":"100"}}\n')
    await asyncio.sleep(0.1)
    await vm.power_off_guest()
    await asyncio.sleep(0.5)
    assert (await vm.qmp("query-status"))["status"] == "shutdown"
    with pytest.raises(AssertionError, match="registered"):
        await site.assert_clean()
    backup.close()
    await vm.wait_gone()
    assert not vm.running
    assert not device.exists(), "the end deactivates"
    assert not site.machine(100).pid_file.exists()


async def test_kill_of_qemu_is_cleaned_up_and_can_be_started_again(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    for _ in range(2):
        await vm.start()
        await vm.kill()
        assert not vm.running
    await site.assert_clean()


@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-9.2+pve1"])
async def test_disks_are_plugged_moved_grown_and_unplugged_while_running(
    site: Site, machine: str
) -> None:
    vm = await site.create_vm(100, {"machine": machine}, disks={"scsi0": "8M"})
    await vm.start()
    api, one = Client(site), "/nodes/pve1/qemu/100"
    status, text, _ = await api("PUT", f"{one}/config", scsi1="local:0.01,format=raw")
    assert (status, text) == (200, "OK")
    await vm.qemu_io("scsi1", "write -P 7 0 64k")
    await vm.qemu_io("scsi0", "write -P 5 64k 64k")
    move = {"disk": "scsi0", "storage": "local2", "format": "raw", "delete": "1"}
    assert await api.task("POST", f"{one}/move_disk", **move) == "OK"
    assert vm.conf.values["scsi0"].startswith("local2:100/vm-100-disk-0.raw")
    await vm.qemu_io("scsi0", "read -P 5 64k 64k")
    assert vm.disk_path("scsi0").read_bytes()[65536] == 5
    grow = {"disk": "scsi0", "size": "+8M"}
    assert await api.task("PUT", f"{one}/resize", **grow) == "OK"
    await vm.qemu_io("scsi0", "write -P 6 15M 64k")
    assert "size=16M" in vm.conf.values["scsi0"]
    done = await api("PUT", f"{one}/config", delete="scsi1")
    assert done[:2] == (200, "OK")
    unused = vm.conf.values["unused0"]
    status, _, _ = await api("PUT", f"{one}/config", delete="unused0")
    assert status == 200
    assert not site.storages["local"].exists(unused)
    status, _, _ = await api("PUT", f"{one}/config", cores="2")
    assert vm.conf.pending == {"cores": "2"}
    await vm.stop()
    await vm.start()
    assert vm.conf.values["cores"] == "2"
    assert vm.conf.pending == {}


async def test_rollback_goes_back_and_gives_a_new_generation(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    api, one = Client(site), "/nodes/pve1/qemu/100"
    assert await api.task("POST", f"{one}/snapshot", snapname="before") == "OK"
    await vm.start()
    await vm.qemu_io("scsi0", "write -P 5 0 64k")
    generation = vm.conf.values["vmgenid"]
    assert await api.task("POST", f"{one}/snapshot/before/rollback", start="1") == "OK"
    started = next(t for t in site.tasks.all.values() if t.type == "qmstart")
    await site.tasks.wait(started.upid)
    await vm.qemu_io("scsi0", "read -P 0 0 64k")
    assert vm.conf.values["vmgenid"] != generation
    assert vm.conf.values["parent"] == "before"
    await vm.stop()
    assert await api.task("DELETE", f"{one}/snapshot/before") == "OK"
    assert await api.task("DELETE", one, purge="1") == "OK"
    assert site.storages["local"].volumes(100) == []


async def test_agent_that_is_off_hangs_or_is_played(site: Site) -> None:
    vm = await site.create_vm(100, {"agent": "1"}, disks={"scsi0": "8M"})
    await vm.start()
    api, agent = Client(site), "/nodes/pve1/qemu/100/agent"
    site.faults.agent(100, "off")
    status, text, _ = await api("POST", f"{agent}/ping")
    assert (status, text) == (500, "QEMU guest agent is not running")
    site.faults.agent(100, "fake")
    assert (await api("POST", f"{agent}/fsfreeze-freeze"))[2]["data"] == {"result": 1}
    assert await vm.leftovers() == ["guest frozen"]
    frozen = (await api("POST", f"{agent}/fsfreeze-status"))[2]["data"]
    assert frozen == {"result": "frozen"}
    assert (await api("POST", f"{agent}/fsfreeze-thaw"))[2]["data"] == {"result": 1}
    await vm.assert_clean()
    site.faults.agent(100, "hang")
    assert (await api("POST", f"{agent}/ping"))[2]["data"] == {"result": {}}
    with pytest.raises(TimeoutError):
        await vm.machine.agent("guest-fsfreeze-freeze", timeout_s=0.5)


async def test_what_is_left_over_is_found(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M"})
    await vm.start()
    await vm.qmp("blockdev-add", driver="null-co", node_name="ph-x", size=512)
    await vm.qmp("block-dirty-bitmap-add", node="drive-scsi0", name="ph-c-00001-F-J1")
    vm.set(lock="backup")
    assert await vm.leftovers() == ["lock: backup", "node ph-x"], "segments may stay"
    await vm.qmp("blockdev-del", node_name="ph-x")
    vm.set(lock=None)
    await vm.assert_clean()


async def test_two_sites_and_two_nodes_live_side_by_side(site: Site) -> None:
    async with Site(short_base(), nodes=("a", "b"), release="8.4") as other:
        assert other.fingerprint != site.fingerprint
        await site.create_vm(100, disks={"scsi0": "8M"})
        far = await other.create_vm(100, disks={"scsi0": "8M"}, node="b")
        await far.start()
        assert not far.modern, "8.4 has the old layout only"
        api = Client(other)
        _, _, body = await api("GET", "/cluster/resources?type=vm")
        assert [(r["node"], r["status"]) for r in body["data"]] == [("b", "running")]
        status, text, _ = await api("GET", "/nodes/a/qemu/100/config")
        assert status == 500
        assert (
            text == "Configuration file 'nodes/a/qemu-server/100.conf' does not exist"
        )
        assert not site.vm(100).running
        node = load_node(other.node_toml("b"))
        assert Path(node.qmp_socket(100)).exists()
        assert node.pve_node == "b"


async def test_a_migration_is_refused_as_pve_refuses_it_or_moves_the_vm() -> None:
    async with Site(short_base(), nodes=("a", "b"), shared=("nas",)) as cluster:
        vm = await cluster.create_vm(100, disks={"scsi0": "nas:0.0078125"})
        await cluster.create_vm(101, disks={"scsi0": "8M"})
        await vm.start()
        await cluster.vm(101).start()
        name = "root@pam!migrate"
        secret = cluster.add_token(name, {"/": ["VM.Migrate"]})
        api = Client(cluster, {"Authorization": f"PVEAPIToken={name}={secret}"})
        call = "/nodes/a/qemu/{}/migrate?target={}&online={}"
        for vmid, target, online, wanted, said in (
            (100, "a", 1, 400, "Parameter verification failed."),
            (100, "b", 0, 400, "Parameter verification failed."),
            (100, "c", 1, 500, "no such cluster node 'c'"),
        ):
            status, text, _ = await api("POST", call.format(vmid, target, online))
            assert (status, text) == (wanted, said)
        vm.set(lock="backup")
        status, text, _ = await api("POST", call.format(100, "b", 1))
        assert (status, text) == (500, "VM is locked (backup)")
        vm.set(lock=None)
        _, _, body = await api("POST", call.format(101, "b", 1))
        task = await cluster.tasks.wait(body["data"])
        assert "can't migrate attached local disks" in str(task.exitstatus)
        assert "lock" not in cluster.vm(101).conf.values
        _, _, body = await api("POST", call.format(100, "b", 1))
        task = await cluster.tasks.wait(body["data"])
        assert task.exitstatus == "OK", task.lines
        moved = cluster.vm(100)
        assert moved.node.name == "b"
        assert moved.running
        assert not vm.machine.running
        await moved.qemu_io("scsi0", "write -P 1 0 64k")
        await moved.assert_clean()


async def test_certificate_of_another_site_is_not_accepted(site: Site) -> None:
    wrong = ssl.create_default_context()
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection("127.0.0.1", site.api_port, ssl=wrong)
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", site.fingerprint)


@requires_file(QEMU_7 / "bin/qemu-system-x86_64")
async def test_an_older_qemu_runs_the_older_release() -> None:
    qemu, img = QEMU_7 / "bin/qemu-system-x86_64", QEMU_7 / "bin/qemu-img"
    async with Site(
        short_base(), release="8.4", qemu=str(qemu), qemu_img=str(img)
    ) as site:
        assert site.qemu_version == (7, 2)
        vm = await site.create_vm(100, {"agent": "1"}, disks={"scsi0": "8M"})
        await vm.start()
        await vm.qemu_io("scsi0", "write -P 1 0 64k")
        assert not vm.modern
        await vm.power_off_guest()
        await vm.wait_gone()


async def test_product_speaks_with_the_lab(site: Site) -> None:
    vm = await site.create_vm(100, disks={"scsi0": "8M", "scsi1": "thick:0.01"})
    endpoint = Endpoint("127.0.0.1", site.api_port, fingerprints=(site.fingerprint,))
    token = TokenAuth(site.token_id, site.token_secret)
    async with PveApi(endpoint, token) as api:
        assert (await api.version()).major == 9
        await api.create_vm("pve1", 200, {"net0": "virtio,bridge=vmbr0"})
        volid = await api.allocate_volume(
            "pve1", "thick", 200, "vm-200-disk-0", 1 << 20
        )
        await api.update_config("pve1", 200, {"scsi0": volid})
        await api.start_vm("pve1", 200)
        assert (await api.vm_status("pve1", 200)).qmpstatus == "running"
        await api.stop_vm("pve1", 200)
        await api.destroy_vm("pve1", 200)
    local = PveLocal(load_node(site.node_toml()))
    await local.set_lock(100)
    assert vm.conf.values["lock"] == "backup"
    assert await local.unlock(100)
    volid = vm.conf.drives()[1].file
    assert await local.activate(volid)
    assert Path(await local.volume_path(volid)).exists()
    await local.deactivate(volid)
    assert await local.volume_exists(volid)
    await site.assert_clean()
