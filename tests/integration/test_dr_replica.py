# SPDX-License-Identifier: Apache-2.0
"""A replica on the lab's PVE: provisioning, restore points, and real kills."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pveplug.dr.provision import Site
from pveplug.dr.store import Record, ReplicaError, ReplicaStore
from pveplug.node import load_node
from pveplug.proto.pve_login import Endpoint, TokenAuth
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.values import Mapped
from tests.lab.auth import receiver_acl
from tests.lab.site import Site as LabSite
from tests.lab.site import short_base
from tests.support.dr_child import Task
from tests.support.dr_sender import UUID, Sender, Source
from tests.support.requires import requires
from tests.support.truth import run

pytestmark = [
    pytest.mark.integration,
    requires("qemu-system-x86_64", "qemu-nbd", "qemu-img"),
]

RECEIVER = "receiver@pve!dr"
REPOSITORY = Path(__file__).resolve().parents[2]


class DrSite:
    """A lab site and a sender without a channel."""

    def __init__(self, lab: LabSite, api: PveApi, secret: str) -> None:
        self.lab = lab
        self.api = api
        self.secret = secret
        self.node = load_node(lab.node_toml())
        self.options = {"storage": "local", "keep_free": 0}
        self.sender = self.new_sender(Source())

    def new_sender(self, source: Source, **more: object) -> Sender:
        options = {**self.options, **more}
        local = PveLocal(self.node)
        site = Site(self.node, self.api, local, "pve1", **options)
        return Sender(ReplicaStore(self.node.state_dir), site, source)

    @property
    def record(self) -> Record | None:
        return self.sender.store.read(UUID)

    def content(self, volid: str, point: str = "") -> bytes:
        """What a volume holds, now or at a snapshot, read by qemu-img."""
        path = self.lab.node.storage_of(volid).file(volid)
        raw = self.lab.root / "content.raw"
        at = ("-l", f"snapshot.name={point}") if point else ()
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *at, str(path), str(raw))
        data = raw.read_bytes()
        raw.unlink()
        return data

    def holds(self, state: dict[str, bytes], point: str = "") -> None:
        record = self.record
        assert record is not None
        conf = self.lab.vm(record.vmid).conf
        values = conf.snapshots[point] if point else conf.values
        for key, wanted in state.items():
            found = self.content(values[key].split(",")[0], point)[: len(wanted)]
            assert found == wanted, f"{key} at {point or 'now'}"


@pytest.fixture
async def lab() -> AsyncIterator[LabSite]:
    async with LabSite(short_base()) as made:
        made.auth_delay_s = 0
        yield made


@pytest.fixture
async def dr(lab: LabSite) -> AsyncIterator[DrSite]:
    secret = lab.add_token(RECEIVER, receiver_acl(lab.release))
    endpoint = Endpoint("127.0.0.1", lab.api_port, fingerprints=(lab.fingerprint,))
    async with PveApi(endpoint, TokenAuth(RECEIVER, secret)) as api:
        yield DrSite(lab, api, secret)


async def test_every_restore_point_is_its_cycles_instant(dr: DrSite) -> None:
    source = dr.sender.source
    states = {}
    for number in range(5):
        source.write("scsi0")
        if number < 4:
            source.write("scsi1", 2)
        if number == 2:
            source.grow("scsi0", 7 << 20)
            source.add("virtio1", 3 << 20)
        if number == 3:
            source.remove("scsi1")
            source.set("cores", "8")
        state = source.state()
        done = await (dr.sender.seed() if number == 0 else dr.sender.increment())
        assert done.point is not None
        states[done.point.name] = state
        for name, wanted in states.items():
            dr.holds(wanted, name)
        dr.holds(state)
    vm = dr.lab.vm(100)
    assert vm.conf.values["cores"] == "8"
    assert vm.conf.values["smbios1"] == f"uuid={UUID}"
    assert vm.conf.values["scsi0"].endswith("iothread=1,size=7M")
    assert "scsi1" not in vm.conf.values
    assert set(vm.conf.snapshots) == set(states)
    await dr.lab.assert_clean()


async def test_a_removed_disk_goes_with_its_last_restore_point(dr: DrSite) -> None:
    source = dr.sender.source
    await dr.sender.seed()
    source.remove("scsi1")
    for _ in range(2):
        await dr.sender.increment(points=2)
    record = dr.record
    assert record is not None
    assert record.retired == []
    (row,) = dr.lab.storages["local"].volumes(100)
    assert row["volid"] == record.disks["scsi0"].volid
    conf = dr.lab.vm(100).conf.values
    assert not [key for key in conf if key.startswith("unused")]
    assert conf["protection"] == "1"


async def test_a_running_replica_is_left_alone(dr: DrSite) -> None:
    await dr.sender.seed()
    vm = dr.lab.vm(100)
    await vm.start()
    with pytest.raises(ReplicaError, match="runs, and nobody") as caught:
        await dr.sender.increment()
    assert caught.value.code == "role"
    await vm.stop()
    await dr.sender.increment()
    dr.holds(dr.sender.source.state())


async def test_firmware_and_tpm_are_replicated_too(dr: DrSite) -> None:
    source = dr.sender.source
    source.config += (
        "bios: ovmf\n"
        "efidisk0: local:100/vm-100-disk-5.raw,efitype=4m,size=528K\n"
        "tpmstate0: local:100/vm-100-disk-6.raw,size=4M,version=v2.0\n"
    )
    source.disks["efidisk0"] = bytearray(b"\x01") * (528 << 10)
    source.disks["tpmstate0"] = bytearray(b"\x02") * (4 << 20)
    await dr.sender.seed()
    source.disks["tpmstate0"][:3] = b"new"
    source.changed["tpmstate0"] = {0}
    done = await dr.sender.increment()
    assert done.point is not None
    dr.holds(source.state(), done.point.name)
    values = dr.lab.vm(100).conf.values
    assert "efitype=4m" in values["efidisk0"]
    assert "version=v2.0" in values["tpmstate0"]
    assert ".qcow2" in values["tpmstate0"]


@pytest.mark.parametrize(
    ("storage", "key"), [("thick", "scsi0"), ("nowhere", "configuration")]
)
async def test_storage_without_snapshots_is_refused_before_anything(
    dr: DrSite, storage: str, key: str
) -> None:
    sender = dr.new_sender(Source(), storage=storage)
    with pytest.raises(ReplicaError, match="dr_storage") as caught:
        await sender.seed()
    assert caught.value.code == ("storage" if storage == "thick" else "configuration")
    assert dr.lab.vms() == []
    assert dr.record is None


async def test_an_id_that_is_taken_is_not_touched(dr: DrSite) -> None:
    other = await dr.lab.create_vm(100, disks={"scsi0": "1M"})
    before = other.conf.text()
    with pytest.raises(ReplicaError, match="shall be VM 100") as caught:
        await dr.sender.seed(target_vmid=100)
    assert caught.value.code == "identity"
    assert dr.record is None
    await dr.sender.seed()
    record = dr.record
    assert record is not None
    assert record.vmid not in (0, 100)
    dr.holds(dr.sender.source.state())
    assert other.conf.text() == before


async def test_bridges_are_mapped_by_the_receiver_first(dr: DrSite) -> None:
    mapped = Mapped({"vmbr0": "vmbr1"})
    sender = dr.new_sender(Source(), bridge_map=mapped)
    await sender.seed(bridge_map="vmbr0:vmbr0")
    assert "bridge=vmbr1" in dr.lab.vm(100).conf.values["net0"]


# --- kills ---------------------------------------------------------------------------


async def child(dr: DrSite, mode: str, after_s: float | None) -> bool:
    """Run a cycle in a process; kill it after a while. Returns whether it ended."""
    lab = dr.lab
    task = Task(
        mode,
        dr.sender.source,
        lab.root / "node.toml",
        lab.api_port,
        lab.fingerprint,
        RECEIVER,
        dr.secret,
        dict(dr.options),
    )
    file = lab.root / "task"
    file.write_bytes(pickle.dumps(task))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.dr_child", str(file)), cwd=REPOSITORY
    )
    try:
        async with asyncio.timeout(after_s):
            return await process.wait() == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        return False


async def settled(dr: DrSite) -> None:
    """Wait for what PVE goes on with when its caller was killed.

    Our own ``lock: backup`` stays until the replica is opened again.
    """
    async with asyncio.timeout(30):
        while {dr.lab.vm(vmid).conf.values.get("lock") for _, vmid in dr.lab.vms()} - {
            None,
            "backup",
        }:
            await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_receiver_killed_at_any_moment_goes_on(dr: DrSite) -> None:
    rng = random.Random(5)
    source = dr.sender.source
    states: dict[str, dict[str, bytes]] = {}
    kills = 0
    takes = 1.0
    for number in range(14):
        source.write("scsi0", 8)
        source.write("scsi1", 3)
        if number == 6:
            source.add("virtio1", 2 << 20)
        if number == 9:
            source.remove("virtio1")
        record = dr.record
        seeding = record is None or record.role in ("none", "seeding")
        mode = "seed" if seeding and (record is None or not record.intent) else ""
        name = f"dr-x.2026-11-25_08.00.00_{source.cycle + 1:02d}"
        states[name] = source.state()
        # In the middle, however fast the machine is: some time of what one takes.
        patience = None if number % 4 == 3 else takes * rng.uniform(0.35, 0.95)
        began = time.monotonic()
        ended = await child(dr, mode or "incremental", patience)
        takes = time.monotonic() - began if ended else takes * 1.1
        source.cycle += 1
        kills += not ended
        assert ended or patience is not None
        if ended:
            source.changed.clear()
        await settled(dr)
        record = dr.record
        for point in record.points if record else ():
            dr.holds(states[point.cycle], point.name)
    record = dr.record
    assert record is not None
    await dr.sender.increment()
    dr.holds(source.state())
    assert kills > 3
    assert "lock" not in dr.lab.vm(100).conf.values
    record = dr.record
    assert record is not None
    assert record.pending == record.leaving == []
    directory = dr.sender.store.directory(UUID)
    assert not list(directory.glob("*.stage"))
    left = {str(row["volid"]) for row in dr.lab.storages["local"].volumes(100)}
    assert left == {v.volid for v in record.disks.values()} | set(record.retired)
    assert not list(Path(dr.node.runtime_dir).glob("nbd-*"))
    assert not re.search(f"qemu-nbd.*{dr.lab.root}", run("ps", "-eo", "args"))


# --- no room -------------------------------------------------------------------------


async def test_a_full_dr_storage_costs_a_cycle_and_no_restore_point(
    dr: DrSite, small_disk: Callable[[str], Path]
) -> None:
    full = small_disk("24M")
    (dr.lab.storages["local"].root / "images").mkdir(exist_ok=True)
    storage = dr.lab.storages["local2"]
    images = storage.root / "images"
    images.symlink_to(full)
    sender = dr.new_sender(Source(), storage="local2")
    source = sender.source
    dr.sender = sender
    done = await sender.seed()
    assert done.point is not None
    state = source.state()
    (full / "ballast").write_bytes(bytes(_free(full) - (300 << 10)))
    source.write("scsi0", 30)
    for _ in range(2):
        with pytest.raises(ReplicaError) as caught:
            await sender.increment()
        assert caught.value.code == "space", caught.value
        dr.holds(state, done.point.name)
    (full / "ballast").unlink()
    later = await sender.increment()
    assert later.point is not None
    dr.holds(source.state(), later.point.name)
    dr.holds(state, done.point.name)


async def test_a_full_stage_directory_refuses_the_cycle(
    dr: DrSite, small_disk: Callable[[str], Path]
) -> None:
    small = small_disk("1M")
    sender = dr.new_sender(dr.sender.source, stage_dir=str(small))
    dr.sender = sender
    done = await sender.seed()
    assert done.point is not None
    state = sender.source.state()
    sender.source.write("scsi0", 40)
    with pytest.raises(ReplicaError, match="no space") as caught:
        await sender.increment()
    assert caught.value.code == "space"
    assert not list(small.rglob("*.stage"))
    dr.holds(state)
    roomy = dr.new_sender(sender.source)
    await roomy.increment()
    dr.holds(sender.source.state())


async def test_a_seed_on_a_full_storage_goes_on_when_there_is_room(
    dr: DrSite, small_disk: Callable[[str], Path]
) -> None:
    full = small_disk("4M")
    (dr.lab.storages["local2"].root / "images").symlink_to(full)
    sender = dr.new_sender(Source(), storage="local2")
    dr.sender = sender
    (full / "ballast").write_bytes(bytes(_free(full) - (1 << 20)))
    with pytest.raises(ReplicaError) as caught:
        await sender.seed()
    assert caught.value.code == "space"
    (full / "ballast").unlink()
    await sender.seed()
    dr.holds(sender.source.state())


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
