# SPDX-License-Identifier: Apache-2.0
"""The two sites that the tests of disaster recovery are played on."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from pathlib import Path

import pytest

from pveplug.node import load_node
from pveplug.proto.pve_login import Endpoint, TokenAuth
from pveplug.pve import PveApi
from tests.support import dr_truth
from tests.support.cutting_proxy import Way
from tests.support.stranger import Client
from tests.support.two_sites import TwoSites

pytestmark = pytest.mark.integration

STAND_IN = """
import os, signal, socket, sys, tomllib
file = sys.argv[sys.argv.index("--config") + 1]
keys = tomllib.load(open(file, "rb"))
print("stand-in with", os.environ["PODHEITOR_PROXMOX_NODE"], flush=True)
if "fail" in sys.argv:
    sys.exit("cannot start: " + file)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, lambda *_: print("reloaded", flush=True))
server = socket.create_server((keys["bind"], keys["port"]))
tell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
tell.sendto(b"READY=1\\nSTATUS=there", os.environ["NOTIFY_SOCKET"])
while True:
    connection, _ = server.accept()
    print("connected", flush=True)
    connection.sendall(b"hello")
    connection.close()
"""


def stand_in(tmp_path: Path, *words: str) -> list[str | Path]:
    """A receiver's program that only listens, until the true one is there."""
    script = tmp_path / "receiver.py"
    script.write_text(STAND_IN)
    return [sys.executable, script, *words]


async def test_two_sites_share_nothing_and_the_receiver_is_a_process(
    tmp_path: Path,
) -> None:
    argv = stand_in(tmp_path)
    keys = {"retention.min": 3, "replicas.bridge_map": "vmbr0:vmbr1"}
    async with TwoSites(argv=argv, receiver=keys, auth="both") as sites:
        await sites.site.create_vm(100, disks={"scsi0": "8M"})
        assert sites.dr.vms() == []
        assert sites.dr.node.name == "dr1"
        assert sites.dr.fingerprint != sites.site.fingerprint
        assert (await Client(sites.dr)("GET", "/version"))[0] == 200
        await sites.start_receiver()
        first = sites.receiver_pid
        assert sites.receiver_alive
        assert "connected" not in sites.receiver_log, "seen without a connection"
        await _until(lambda: "READY=1" in sites.notified)
        file = tomllib.loads(sites.config_file.read_text())
        assert (file["name"], file["port"]) == ("lab", sites.receiver_port)
        assert file["retention"]["min"] == 3
        assert file["replicas"] == {"storage": "local", "bridge_map": "vmbr0:vmbr1"}
        for path in (file["tls"]["key"], file["auth"]["token_file"]):
            assert Path(path).stat().st_mode & 0o077 == 0
        node = load_node(sites.dr_node_file)
        assert str(sites.dr_node_file) in sites.receiver_log
        assert (node.pve_node, node.pve_port) == ("dr1", sites.dr.api_port)
        words = dict(word.split("=") for word in sites.dr_words().split())
        assert int(words["dr_port"]) == sites.receiver_port
        for key in ("token_file", "cert", "key", "ca"):
            assert Path(words[f"dr_auth_{key}"]).exists()
        await sites.reload_receiver()
        await _until(lambda: "reloaded" in sites.receiver_log)
        await sites.kill_receiver()
        assert not sites.receiver_alive
        await sites.start_receiver()
        assert sites.receiver_pid != first
        async with sites.cutting() as proxy:
            proxy.cut_next(Way.DOWN, 2)
            assert f"dr_port={proxy.port}" in sites.dr_words(proxy.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await reader.read() == b"he"
            writer.close()
        await sites.restart_receiver()
        assert await sites.stop_receiver() == 0
    assert not sites.base.exists(), "nothing is left behind"


async def _until(true) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.02)


async def test_a_receiver_that_does_not_start_says_why(tmp_path: Path) -> None:
    async with TwoSites(argv=stand_in(tmp_path, "fail")) as sites:
        with pytest.raises(AssertionError, match="cannot start: "):
            await sites.start_receiver()
        assert not sites.receiver_alive


async def test_the_end_asks_whether_the_dr_site_is_clean(tmp_path: Path) -> None:
    argv = stand_in(tmp_path)
    holding: list[asyncio.subprocess.Process] = []

    async def locked() -> None:
        async with TwoSites(argv=argv) as sites:
            vm = await sites.dr.create_vm(900, disks={"scsi0": "8M"})
            vm.set(lock="rollback")

    async def held() -> None:
        async with TwoSites(argv=argv) as sites:
            vm = await sites.dr.create_vm(900, disks={"scsi0": "8M"})
            with vm.disk_path("scsi0").open("rb") as disk:
                process = asyncio.create_subprocess_exec("sleep", "60", stdin=disk)
                holding.append(await process)

    with pytest.raises(AssertionError, match="VM 900: lock: rollback"):
        await locked()
    try:
        with pytest.raises(AssertionError, match="is open in processes"):
            await held()
    finally:
        for process in holding:
            process.kill()
            await process.wait()


async def test_several_full_jobs_of_one_vm_are_ordinary_jobs(tmp_path: Path) -> None:
    """A mode is a job of its own: level Full, not accurate, side by side."""
    async with TwoSites(argv=stand_in(tmp_path)) as sites:
        await sites.site.create_vm(100, disks={"scsi0": "8M"})
        for name in ("dr-one", "dr-two"):
            await sites.add_job(name, "vmid=100")
        for name in ("dr-one", "dr-two", "dr-one"):
            job = await sites.run(name)
            assert job.ok, job.text
            assert job.level == "F"


async def test_what_a_replica_holds_is_said_by_a_stranger(tmp_path: Path) -> None:
    async with TwoSites(argv=stand_in(tmp_path)) as sites:
        replica = await sites.dr.create_vm(
            900, disks={"scsi0": "2M", "scsi1": "local:0.001,format=raw"}
        )
        secret = sites.dr_secret_file.read_text().strip()
        endpoint = Endpoint(
            "127.0.0.1", sites.dr.api_port, fingerprints=(sites.dr.fingerprint,)
        )
        path = replica.disk_path("scsi0")
        empty = dr_truth.of_bytes(bytes(2 << 20))
        assert dr_truth.content(path) == empty
        assert sorted(dr_truth.disks(replica)) == ["scsi0", "scsi1"]
        replica.set(scsi1=None)
        async with PveApi(endpoint, TokenAuth("receiver@pve!dr", secret)) as api:
            await api.snapshot_create("dr1", 900, "ph-1")
            dr_truth.run("qemu-io", "-c", "write -P 7 1M 64k", str(path))
            await api.snapshot_create("dr1", 900, "ph-2")
            dr_truth.run("qemu-io", "-c", "write -P 8 1M 64k", str(path))
            changed = bytearray(2 << 20)
            changed[1 << 20 : (1 << 20) + 65536] = b"\x07" * 65536
            assert dr_truth.content(path, "ph-1") == empty
            assert dr_truth.content(path, "ph-2") == dr_truth.of_bytes(changed)
            assert dr_truth.disks(replica, "ph-1") == {"scsi0": empty}
            assert dr_truth.content(path).sha256 != dr_truth.content_sha256(
                path, "ph-2"
            )
            assert dr_truth.restore_points(replica) == ["ph-1", "ph-2"]
            dr_truth.check_image(path)
            await api.rollback("dr1", 900, "ph-1")
            with pytest.raises(AssertionError, match=r"off the line: \['ph-2'\]"):
                dr_truth.restore_points(replica)
